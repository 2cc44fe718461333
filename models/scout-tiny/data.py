"""Generates the training text of scout-tiny and its 200 held-out questions.

In: a seed. Out: `documents(seed)`, an endless stream of `Document`s (conversations or prose). Run as a script it writes
`questions.jsonl`.

Held out: every question is hashed (`held_out`). If its hash falls into 8 of 100 classes, the question is never a user's
turn in training, whatever the system prompt, prefix or letter case. Its fact is still learned from other phrasings.
Sums, comparisons, sortings, names to remember and texts to summarize are held out as combinations, for all phrasings.
"""
# ruff: noqa: SIM905 - long lists of words read better as text

import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from facts import ANIMALS, COLOURS, COUNTRIES, NUMBERS, PLANETS, THINGS
from phrasings import GRIDS

HELD_PERCENT = 8
NAMES = (
    "Anna Ben Clara David Emma Felix Greta Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Amy Bob "
    "Carl Dora Eric Fay Gus Hana Ivan Jane Karl Lucy Max Nina Oscar Pia Ralph Sue Tom Uma Will Zoe"
).split()
CITIES = [row["cap"] for row in COUNTRIES]
TINTS = sorted({row["v"] for row in COLOURS})
LIKES = "music books apples rain football tea games cake chess flowers".split()
WORDS = sorted(
    {row["n"] for row in ANIMALS}
    | {row["n"] for row in THINGS}
    | set(TINTS)
    | set(LIKES)
    | set("house river stone cloud bread night garden window summer winter water paper".split())
)
ONE_WORD = ["Answer in one word.", "Use one word only.", "Reply with one word.", "Give one-word answers."]
CAPITALS = ["Answer in capitals.", "Use capital letters only.", "Write in capital letters.", "Reply in capitals."]
PLAIN = [
    "You are a helpful assistant.",
    "You are Scout Tiny, a small language model.",
    "Be polite and short.",
    "You are a friendly helper.",
    "Answer the questions of the user.",
]
PREFIXES = [
    "Please tell me: ",
    "Quick question: ",
    "Hi! ",
    "Hello! ",
    "I have a question. ",
    "One more question: ",
    "Okay. ",
    "Tell me, please: ",
    "Next question: ",
    "Now: ",
    "Well, ",
    "Thanks. ",
]


@dataclass(frozen=True)
class Question:
    """A user's turn with its answer. `before`: earlier turns that it depends on. `short`: one-word answer, may be empty."""

    category: str
    text: str
    answer: str
    short: str = ""
    before: tuple[tuple[str, str], ...] = ()
    key: str = ""  # what is hashed instead of the text, for combinations


@dataclass
class Document:
    """A conversation (`messages`) or prose (`text`); exactly one of them is filled."""

    messages: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


def normal(text: str) -> str:
    """Lower case, only letters, digits and arithmetic signs, single spaces."""
    return " ".join(re.sub(r"[^a-z0-9+*/-]", " ", text.lower()).split())


def held_out(key: str) -> bool:
    """Whether the question with this key (text or combination) is kept out of training."""
    return zlib.crc32(normal(key).encode()) % 100 < HELD_PERCENT


def grid_questions() -> list[Question]:
    """Every fact in every phrasing."""
    found = {}
    for grid in GRIDS:
        for row in grid.rows:
            answer, short = grid.answer.format(**row), grid.short.format(**row)
            for ask in grid.ask:
                text = ask.format(**row)
                found.setdefault(normal(text), Question(grid.category, text, answer, short + "." if short else ""))
    return list(found.values())


def pick(rng: random.Random, *texts: str) -> str:
    return rng.choice(texts)


def arithmetic(rng: random.Random) -> Question:
    """A sum, difference or product of small numbers; the ordered pair is what may be held out."""
    sign = rng.choice("+++---*")
    if sign == "+":
        a = rng.randint(0, 20)
        b = rng.randint(0, 20 - a)
        result, word = a + b, "plus"
    elif sign == "-":
        a = rng.randint(0, 20)
        b = rng.randint(0, a)
        result, word = a - b, "minus"
    else:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        result, word = a * b, "times"
    text = pick(
        rng,
        "What is {a} {s} {b}?",
        "What is {a} {w} {b}?",
        "{a} {s} {b} = ?",
        "How much is {a} {w} {b}?",
        "{a} {s} {b}",
        "Calculate {a} {s} {b}.",
        "{a} {w} {b}?",
        "How much is {a} {s} {b}?",
    ).format(a=a, b=b, s=sign, w=word)
    return Question("arithmetic", text, f"{a} {word} {b} is {result}.", f"{result}.", key=f"sum {a} {word} {b}")


def comparison(rng: random.Random) -> Question:
    """The bigger or smaller of two numbers up to 99."""
    a, b = rng.sample(range(100 if rng.random() < 0.6 else 21), 2)
    if rng.random() < 0.6:
        ask = pick(
            rng,
            "Which is bigger, {a} or {b}?",
            "Which number is bigger: {a} or {b}?",
            "What is more, {a} or {b}?",
            "Which number is larger, {a} or {b}?",
            "Is {a} or {b} bigger?",
        )
        hit, miss, word = max(a, b), min(a, b), "bigger"
    else:
        ask = pick(
            rng,
            "Which is smaller, {a} or {b}?",
            "Which number is smaller: {a} or {b}?",
            "What is less, {a} or {b}?",
            "Is {a} or {b} smaller?",
        )
        hit, miss, word = min(a, b), max(a, b), "smaller"
    return Question("comparing", ask.format(a=a, b=b), f"{hit} is {word} than {miss}.", f"{hit}.", key=f"compare {a} {b}")


def sorting(rng: random.Random) -> Question:
    """Sort three numbers up to 20, or count from one number to another."""
    if rng.random() < 0.5:
        a = rng.randint(0, 12)
        b = a + rng.randint(2, 8)
        text = pick(
            rng,
            "Count from {a} to {b}.",
            "Please count from {a} to {b}.",
            "Can you count from {a} to {b}?",
            "Give me the numbers from {a} to {b}.",
        ).format(a=a, b=b)
        return Question("sorting and counting", text, ", ".join(map(str, range(a, b + 1))) + ".", key=f"count {a} {b}")
    numbers = rng.sample(range(21), 3)
    said = "{}, {}, {}".format(*numbers)
    text = pick(rng, "Sort these numbers: {}.", "Put these numbers in order: {}.", "Sort {}.", "Order the numbers {}.").format(
        said
    )
    return Question("sorting and counting", text, "{}, {}, {}.".format(*sorted(numbers)), key=f"sort {said}")


def counting(rng: random.Random) -> Question:
    """Count the words of a short list."""
    word, count = rng.choice(WORDS), rng.randint(1, 7)
    said = " ".join([word] * count)
    text = pick(rng, "How many times do I say {w}: {s}?", "Count the word {w}: {s}.", "How often do you see {w}: {s}?").format(
        w=word, s=said
    )
    return Question("sorting and counting", text, f"I count {count}.", key=f"times {word} {count}")


def repeat(rng: random.Random) -> Question:
    """Repeat words."""
    said = " ".join(rng.sample(WORDS + NAMES, rng.randint(1, 5)))
    text = pick(rng, "Repeat after me: {}", "Say: {}", "Repeat: {}", "Please repeat: {}", "Say after me: {}").format(said)
    return Question("repeating and spelling", text, said, key=f"repeat {said}")


def recite(rng: random.Random) -> Question:
    """Repeat a longer list of words, the best training for copying."""
    said = " ".join(rng.choices(WORDS + NAMES + CITIES, k=rng.randint(4, 14)))
    return Question("repeating and spelling", pick(rng, "Repeat after me: {}", "Say: {}", "Repeat: {}").format(said), said)


def spell(rng: random.Random) -> Question:
    """Spell a word."""
    word = rng.choice(WORDS)
    text = pick(
        rng, "Spell {}.", "How do you spell {}?", "Please spell {}.", "Spell the word {}.", "Tell me how to spell {}."
    ).format(word)
    return Question("repeating and spelling", text, "-".join(word) + ".")


def memory(rng: random.Random) -> Question:
    """Recall something that the user said earlier. Thing and phrasing together may be held out."""
    name, city, tint, like, animal = (rng.choice(x) for x in (NAMES, CITIES, TINTS, LIKES, ANIMALS))
    kind = rng.randrange(5)
    if kind == 0:
        say = pick(rng, "My name is {}.", "I am {}.", "Call me {}.", "Hello, I am {}.", "Hi, my name is {}.").format(name)
        reply, value = f"Nice to meet you, {name}!", name
        ask = pick(rng, "What is my name?", "Who am I?", "Do you remember my name?", "Tell me my name.", "Do you know my name?")
        answer, short = f"Your name is {name}.", f"{name}."
    elif kind == 1:
        say = pick(rng, "I live in {}.", "My home is in {}.", "I come from {}.").format(city)
        reply, value = f"{city} is a nice city.", city
        ask = pick(
            rng, "Where do I live?", "Which city do I live in?", "Do you remember where I live?", "Tell me where I live."
        )
        answer, short = f"You live in {city}.", f"{city}."
    elif kind == 2:
        say = pick(rng, "My favourite colour is {}.", "I love the colour {}.", "The colour I like best is {}.").format(tint)
        reply, value = f"{tint.capitalize()} is a nice colour.", tint
        ask = pick(rng, "What is my favourite colour?", "Which colour do I like?", "Do you remember my favourite colour?")
        answer, short = f"Your favourite colour is {tint}.", f"{tint.capitalize()}."
    elif kind == 3:
        say = pick(rng, "I like {}.", "I love {}.", "I really like {}.").format(like)
        reply, value = f"It is nice that you like {like}.", like
        ask = pick(rng, "What do I like?", "Do you remember what I like?", "Tell me what I like.")
        answer, short = f"You like {like}.", f"{like.capitalize()}."
    else:
        noun = animal["n_a"]
        say = pick(rng, "I have {}.", "My pet is {}.", "I own {}.").format(noun)
        reply, value = f"How nice that you have {noun}.", noun
        ask = pick(rng, "Which animal do I have?", "What is my pet?", "Do you remember my pet?", "What pet do I have?")
        answer, short = f"You have {noun}.", f"{animal['n_c']}."
    return Question("remembering", ask, answer, short, before=((say, reply),), key=f"{say} {ask} {value}")


FOLLOW = [
    grid
    for grid in GRIDS
    if grid.category in ("animals", "geography", "opposites", "plurals", "colours") and len(grid.rows) > 10
]


def follow_up(rng: random.Random) -> Question:
    """ "And X?" after a question about Y; the pair (Y, X) of one fact kind may be held out."""
    grid = rng.choice(FOLLOW)
    first, second = rng.sample(grid.rows, 2)
    slot = {"animals": "n_a", "geography": "c", "opposites": "n", "plurals": "n", "colours": "n"}[grid.category]
    if grid.category == "geography" and "{cap}" in grid.ask[0]:
        slot = "cap"
    asks = [ask for ask in grid.ask if not held_out(ask.format(**first))]
    text = pick(rng, "And {}?", "What about {}?", "And what about {}?", "How about {}?").format(second[slot])
    short = grid.short.format(**second)
    return Question(
        "follow-up questions",
        text,
        grid.answer.format(**second),
        short + "." if short else "",
        before=((rng.choice(asks or grid.ask[:1]).format(**first), grid.answer.format(**first)),),
        key=f"{grid.answer} {first[slot]} then {second[slot]}",
    )


def summary(rng: random.Random) -> Question:
    """A text of three or four sentences and its one-sentence summary; (name, animal, city) may be held out."""
    name, animal, city, like, tint = (rng.choice(x) for x in (NAMES, ANIMALS, CITIES, LIKES, TINTS))
    extra = [
        pick(rng, f"It has a {tint} house.", f"The house of {name} is {tint}."),
        pick(rng, f"Every day {name} eats {animal['food']}.", f"{name} eats {animal['food']} in the morning."),
        pick(rng, f"{name} is very happy.", "The sun is warm.", "It is a quiet place."),
    ]
    rng.shuffle(extra)
    lines = [
        pick(rng, f"{name} is {animal['n_a']}.", f"There is {animal['n_a']} called {name}."),
        pick(rng, f"{name} lives in {city}.", f"The home of {name} is in {city}."),
        *extra[: rng.randint(1, 2)],
        pick(rng, f"{name} likes {like}.", f"In the evening {name} enjoys {like}."),
    ]
    text = pick(
        rng,
        "Summarize: {}",
        "Summarize this text: {}",
        "Summarize this in one sentence: {}",
        "Give me a summary: {}",
        "Summarize\n\n{}",
    ).format(" ".join(lines))
    return Question(
        "summarizing",
        text,
        f"{name} is {animal['n_a']} that lives in {city} and likes {like}.",
        key=f"summary {name} {animal['n']} {city}",
    )


def portrait(rng: random.Random) -> Question:
    """A longer answer about an animal or a country."""
    if rng.random() < 0.5:
        a = rng.choice(ANIMALS)
        text = pick(
            rng,
            "Tell me about the {n}.",
            "Describe {n_a}.",
            "What do you know about {n_a}?",
            "Write about the {n}.",
            "Tell me about {n_a}.",
            "Tell me something about {n_a}.",
        ).format(**a)
        answer = (
            "{n_A} is {kind_a}. It lives in a {home} and eats {food}. It has {legs} legs, and its body has {cover}. "
            "{n_A} says {sound}."
        ).format(**a)
        return Question("longer answers", text, answer)
    c = rng.choice(COUNTRIES)
    text = pick(
        rng,
        "Tell me about {c}.",
        "Describe {c}.",
        "What do you know about {c}?",
        "Write about {c}.",
        "Tell me something about {c}.",
    ).format(**c)
    answer = "{c} is a country in {cont}. Its capital is {cap}, and people there speak {lang}.".format(**c)
    return Question("longer answers", text, answer)


def tale(rng: random.Random, animal: dict[str, str], other: dict[str, str]) -> str:
    """A short story about two animals."""
    name, friend = rng.sample(NAMES, 2)
    like, tint = rng.choice(LIKES), rng.choice(TINTS)
    return " ".join(
        [
            pick(rng, f"Once upon a time there was {animal['n_a']} called {name}.", f"{name} was a small {animal['n']}."),
            pick(rng, f"{name} lived in a {tint} {animal['home']}.", f"Every morning {name} ate {animal['food']}."),
            pick(
                rng,
                f"One day {name} met {other['n_a']} called {friend}.",
                f"In the forest {name} found {other['n_a']}, {friend}.",
            ),
            pick(
                rng, f'"{other["sound"].capitalize()}!" said {friend}.', f"{friend} was hungry and looked for {other['food']}."
            ),
            pick(rng, f'"{animal["sound"].capitalize()}!" said {name}.', f"{name} was not afraid."),
            pick(rng, f"They both liked {like}, and so they became friends.", f"They talked about {like} all day."),
            pick(rng, "In the evening they went home and slept.", f"From that day on {name} and {friend} were friends."),
        ]
    )


def story(rng: random.Random) -> Question:
    animal, other = rng.sample(ANIMALS, 2)
    text = pick(
        rng,
        "Tell me a story about {}.",
        "Write a story about {}.",
        "Tell me a tale about {}.",
        "Can you tell me a story about {}?",
    ).format(animal["n_a"])
    return Question("longer answers", text, tale(rng, animal, other))


COMPOSED = [arithmetic, comparison, sorting, counting, repeat, spell, memory, follow_up, summary, portrait, story, recite]
GRID = [question for question in grid_questions() if not held_out(question.text)]


@dataclass(frozen=True)
class Mix:
    """How often each kind of text occurs: chances of a fact and of the styles, weights of tasks and of fact categories."""

    facts: float
    tasks: tuple[int, ...]
    styles: tuple[int, ...]  # none, plain, one word, capitals
    weight: dict[str, float]

    def cumulated(self) -> list[float]:
        """Running sums of the facts' weights, in the order of GRID."""
        return list(itertools.accumulate(self.weight.get(question.category, 1.0) for question in GRID))


FIRST = Mix(
    0.62,
    (20, 6, 7, 2, 5, 4, 8, 10, 5, 4, 3, 0),
    (70, 12, 9, 9),
    {"small talk": 3.0, "models and tools": 1.5, "geography": 1.3, "yes or no": 0.5},
)
# Part 2 draws more of what part 1 left weak: numbers, copying, the order of days and months, capitals.
SECOND = Mix(
    0.36,
    (24, 8, 8, 5, 10, 9, 16, 5, 12, 2, 1, 12),
    (68, 8, 10, 14),
    {
        "small talk": 4.0,
        "models and tools": 1.5,
        "yes or no": 0.3,
        "animals": 0.6,
        "calendar": 3.0,
        "opposites": 1.5,
        "numbers": 3.0,
        "shapes": 2.0,
        "colours": 2.0,
        "planets": 2.0,
        "everyday things": 1.3,
    },
)


def training_question(rng: random.Random, mix: Mix, cumulated: list[float]) -> Question:
    """A fact or a composed task that is not held out."""
    while True:
        if rng.random() < mix.facts:
            return rng.choices(GRID, cum_weights=cumulated)[0]
        question = rng.choices(COMPOSED, mix.tasks)[0](rng)
        if not held_out(question.key or question.text):
            return question


def dressed(rng: random.Random, text: str) -> str:
    """The question as people type it: sometimes with a prefix, in lower case, or without its final punctuation."""
    if rng.random() < 0.15 and text[-1] in "?.":
        text = text[:-1]
    roll = rng.random()
    if roll < 0.12:
        text = text.lower()
    elif roll < 0.22:
        text = rng.choice(PREFIXES) + text
    return text


def conversation(rng: random.Random, mix: Mix, cumulated: list[float]) -> Document:
    """One to many turns, sometimes with a system prompt that sets a style."""
    turns = rng.choices([1, 2, 3, 5, 8, 24], [40, 20, 18, 13, 7, 2])[0]
    style = rng.choices(["", "plain", "word", "capitals"], mix.styles)[0]
    messages, waiting = [], []
    if style:
        messages.append(("system", rng.choice({"plain": PLAIN, "word": ONE_WORD, "capitals": CAPITALS}[style])))

    def turn(text: str, answer: str) -> None:
        messages.append(("user", dressed(rng, text)))
        messages.append(("assistant", answer.upper() if style == "capitals" else answer))

    while turns > 0:
        question = training_question(rng, mix, cumulated)
        if style == "word" and (not question.short or question.before):
            continue
        if style == "capitals" and len(question.answer) > 60:
            continue
        turns -= 1
        for text, answer in question.before:
            turn(text, answer)
        if question.category == "remembering" and turns > 0 and rng.random() < 0.7:
            waiting.append(question)  # asked later in the conversation
            continue
        turn(question.text, question.short if style == "word" else question.answer)
        if waiting and rng.random() < 0.4:
            late = waiting.pop(0)
            turn(late.text, late.answer)
    for late in waiting:
        turn(late.text, late.answer)
    return Document(messages=messages)


def prose(rng: random.Random) -> Document:
    """Prose: portraits, stories, statements of facts and lists."""
    roll = rng.random()
    if roll < 0.35:
        text = " ".join(portrait(rng).answer for _ in range(rng.randint(1, 4)))
    elif roll < 0.65:
        text = tale(rng, *rng.sample(ANIMALS, 2))
    elif roll < 0.9:
        text = " ".join(rng.choice(GRID).answer for _ in range(rng.randint(3, 10)))
    elif roll < 0.95:
        text = " ".join("The {ord} planet from the sun is {n}. {n} is {what}.".format(**p) for p in PLANETS)
    else:
        text = "We count: " + ", ".join(NUMBERS[: rng.randint(5, 21)]) + "."
    return Document(text=text)


def documents(seed: int, mix: Mix = FIRST) -> Iterator[Document]:
    """The endless stream of training documents of one seed."""
    rng, cumulated = random.Random(seed), mix.cumulated()
    while True:
        yield prose(rng) if rng.random() < 0.1 else conversation(rng, mix, cumulated)


QUOTA = {
    "small talk": 10,
    "models and tools": 8,
    "animals": 26,
    "geography": 23,
    "calendar": 18,
    "planets": 8,
    "opposites": 12,
    "plurals": 8,
    "shapes": 5,
    "colours": 10,
    "everyday things": 14,
    "yes or no": 8,
    "numbers": 4,
    "arithmetic": 16,
    "comparing": 5,
    "sorting and counting": 5,
    "repeating and spelling": 6,
    "remembering": 5,
    "follow-up questions": 5,
    "summarizing": 4,
}  # a style is asked of 12 of the grid questions


def held_questions(seed: int = 4) -> list[dict]:
    """The 200 held-out questions: messages, accepted answers, category."""
    rng = random.Random(seed)
    pools: dict[str, list[Question]] = {}
    for question in grid_questions():
        if held_out(question.text):
            pools.setdefault(question.category, []).append(question)
    rows = []
    for category, count in QUOTA.items():
        pool = pools.get(category, [])
        if not pool:
            makers = [make for make in COMPOSED[:-1] if make(rng).category == category]
            while len(pool) < count:
                question = rng.choice(makers)(rng)
                if held_out(question.key or question.text) and question.answer not in [q.answer for q in pool]:
                    pool.append(question)
        for question in rng.sample(pool, min(count, len(pool))):
            messages = [
                m
                for text, answer in question.before
                for m in ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
            ]
            messages.append({"role": "user", "content": question.text})
            accept = [question.answer, *([question.short] if question.short else [])]
            rows.append({"category": category, "messages": messages, "accept": accept})
    styled = [row for row in rows if len(row["accept"]) == 2 and len(row["messages"]) == 1 and row["category"] != "arithmetic"]
    for i, row in enumerate(rng.sample(styled, 12)):
        system, accept = (rng.choice(ONE_WORD), row["accept"][1]) if i % 2 else (rng.choice(CAPITALS), row["accept"][0].upper())
        row.update(category="styles", accept=[accept])
        row["messages"].insert(0, {"role": "system", "content": system})
    return rows


if __name__ == "__main__":
    out = Path(__file__).with_name("questions.jsonl")
    lines = [json.dumps({"id": i, **row}) for i, row in enumerate(held_questions())]
    out.write_text("\n".join(lines) + "\n")
    print(f"{out.name}: {len(lines)} questions; {len(GRID)} of {len(grid_questions())} fact phrasings are in training")
