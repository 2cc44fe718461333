"""The phrasings in which scout-tiny's facts are asked for.

In: the tables of facts.py. Out: `GRIDS`, a list of `Grid` (category, phrasings, answer template, one-word answer, rows).
Each row fills the templates' `{slots}`.
"""

from dataclasses import dataclass

from facts import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    DAYS,
    GENERAL,
    JOBS,
    MIXES,
    MONTH_ROWS,
    NUMBERS,
    OPPOSITES,
    PLANETS,
    PLURALS,
    SENSES,
    SHAPES,
    SMALLTALK,
    THINGS,
    TOOL,
    TOOL_ASK,
    USES,
    ring,
    yes_no,
)


@dataclass(frozen=True)
class Grid:
    """One kind of fact. `ask`, `answer` and `short` are format strings over a row; `short` may be empty."""

    category: str
    ask: list[str]
    answer: str
    short: str
    rows: list[dict[str, str]]


def listed(category: str, groups: list[tuple]) -> list[Grid]:
    """One grid per (phrasings, answer[, short]) group that has no rows of its own."""
    return [Grid(category, list(g[0]), g[1], g[2] if len(g) > 2 else "", [{}]) for g in groups]


GRIDS = [
    *listed("small talk", SMALLTALK),
    *listed("calendar", GENERAL),
    *[Grid("models and tools", TOOL_ASK, answer, "", [{"n": n} for n in names]) for names, answer in TOOL],
    Grid(
        "animals",
        [
            "What sound does {n_a} make?",
            "What does {n_a} say?",
            "How does {n_a} sound?",
            "Which sound does {n_a} make?",
            "What noise does {n_a} make?",
            "Tell me the sound of {n_a}.",
            "What is the sound of {n_a}?",
            "{n_A} makes which sound?",
        ],
        "{n_A} says {sound}.",
        "{sound_c}",
        ANIMALS,
    ),
    Grid(
        "animals",
        [
            "Where does {n_a} live?",
            "What is the home of {n_a}?",
            "Where can I find {n_a}?",
            "Where is the home of {n_a}?",
            "In what place does {n_a} live?",
            "Tell me where {n_a} lives.",
            "{n_A} lives where?",
        ],
        "{n_A} lives in a {home}.",
        "{home_c}",
        ANIMALS,
    ),
    Grid(
        "animals",
        [
            "What does {n_a} eat?",
            "What food does {n_a} like?",
            "What do you feed {n_a}?",
            "What is the food of {n_a}?",
            "Tell me what {n_a} eats.",
            "What does {n_a} like to eat?",
            "{n_A} eats what?",
        ],
        "{n_A} eats {food}.",
        "{food_c}",
        ANIMALS,
    ),
    Grid(
        "animals",
        [
            "How many legs does {n_a} have?",
            "{n_A} has how many legs?",
            "Tell me how many legs {n_a} has.",
            "What is the number of legs of {n_a}?",
            "Count the legs of {n_a}.",
            "How many legs has {n_a}?",
        ],
        "{n_A} has {legs} legs.",
        "{legs_c}",
        ANIMALS,
    ),
    Grid(
        "animals",
        [
            "What kind of animal is {n_a}?",
            "What type of animal is {n_a}?",
            "Which kind of animal is {n_a}?",
            "Tell me what kind of animal {n_a} is.",
            "{n_A} is what kind of animal?",
            "To which group does {n_a} belong?",
        ],
        "{n_A} is {kind_a}.",
        "{kind_c}",
        ANIMALS,
    ),
    Grid(
        "animals",
        [
            "What is a young {n} called?",
            "What do you call a baby {n}?",
            "What is a baby {n} called?",
            "What is the name of a young {n}?",
            "What do you call a young {n}?",
            "Tell me the word for a baby {n}.",
        ],
        "A young {n} is called {young_a}.",
        "{young_c}",
        ANIMALS,
    ),
    Grid(
        "animals",
        [
            "What covers the body of {n_a}?",
            "What is on the body of {n_a}?",
            "What does {n_a} wear on its body?",
            "What covers {n_a}?",
            "Tell me what covers {n_a}.",
        ],
        "The body of {n_a} has {cover}.",
        "{cover_c}",
        ANIMALS,
    ),
    Grid(
        "geography",
        [
            "What is the capital of {c}?",
            "Which city is the capital of {c}?",
            "Name the capital of {c}.",
            "Tell me the capital of {c}.",
            "What is {c}'s capital?",
            "The capital of {c} is which city?",
            "What city is the capital of {c}?",
            "Do you know the capital of {c}?",
            "Capital of {c}?",
        ],
        "The capital of {c} is {cap}.",
        "{cap}",
        COUNTRIES,
    ),
    Grid(
        "geography",
        [
            "{cap} is the capital of which country?",
            "Which country has the capital {cap}?",
            "In which country is {cap}?",
            "Where is {cap}?",
            "What country is {cap} in?",
            "Tell me where {cap} is.",
            "{cap} is in which country?",
        ],
        "{cap} is in {c}.",
        "{c}",
        COUNTRIES,
    ),
    Grid(
        "geography",
        [
            "On which continent is {c}?",
            "Where is {c}?",
            "What continent is {c} on?",
            "Which continent is {c} on?",
            "{c} is on which continent?",
            "Tell me the continent of {c}.",
            "Where can I find {c}?",
        ],
        "{c} is in {cont}.",
        "{cont}",
        COUNTRIES,
    ),
    Grid(
        "geography",
        [
            "What language do people speak in {c}?",
            "Which language is spoken in {c}?",
            "What is the language of {c}?",
            "What do people speak in {c}?",
            "Tell me the language of {c}.",
            "Which language do they speak in {c}?",
        ],
        "People in {c} speak {lang}.",
        "{lang}",
        COUNTRIES,
    ),
    *[
        Grid(
            "calendar",
            [
                "What " + unit + " comes after {n}?",
                "Which " + unit + " follows {n}?",
                "What comes after {n}?",
                "What is the " + unit + " after {n}?",
                "Tell me the " + unit + " after {n}.",
                "After {n} comes what?",
            ],
            "{next} comes after {n}.",
            "{next}",
            rows,
        )
        for unit, rows in (("day", ring(DAYS)), ("month", MONTH_ROWS))
    ],
    *[
        Grid(
            "calendar",
            [
                "What " + unit + " comes before {n}?",
                "Which " + unit + " is before {n}?",
                "What comes before {n}?",
                "What is the " + unit + " before {n}?",
                "Tell me the " + unit + " before {n}.",
                "Before {n} comes what?",
            ],
            "{prev} comes before {n}.",
            "{prev}",
            rows,
        )
        for unit, rows in (("day", ring(DAYS)), ("month", MONTH_ROWS))
    ],
    *[
        Grid(
            "calendar",
            [
                "What is the {ord} " + unit + " of the " + of + "?",
                "Which " + unit + " is the {ord}?",
                "Name the {ord} " + unit + " of the " + of + ".",
                "Tell me the {ord} " + unit + ".",
                "The {ord} " + unit + " of the " + of + " is called what?",
            ],
            "The {ord} " + unit + " of the " + of + " is {n}.",
            "{n}",
            rows,
        )
        for unit, of, rows in (("day", "week", ring(DAYS)), ("month", "year", MONTH_ROWS))
    ],
    Grid(
        "calendar",
        [
            "In which season is {n}?",
            "What season is {n} in?",
            "Which season is it in {n}?",
            "What season is it in {n}?",
            "{n} is in which season?",
            "Tell me the season of {n}.",
        ],
        "{n} is in {season}.",
        "{season}",
        MONTH_ROWS,
    ),
    Grid(
        "calendar",
        [
            "How many days does {n} have?",
            "How many days are in {n}?",
            "{n} has how many days?",
            "How long is {n}?",
            "Tell me how many days {n} has.",
        ],
        "{n} has {len} days.",
        "{len}",
        MONTH_ROWS,
    ),
    Grid(
        "planets",
        [
            "Which planet is the {ord} from the sun?",
            "What is the {ord} planet?",
            "Name the {ord} planet from the sun.",
            "Tell me the {ord} planet.",
            "The {ord} planet from the sun is which one?",
            "Which planet is number {ord}?",
        ],
        "The {ord} planet is {n}.",
        "{n}",
        PLANETS,
    ),
    Grid(
        "planets",
        [
            "Which planet is {what}?",
            "What is {what}?",
            "Name {what}.",
            "Tell me the name of {what}.",
            "What do we call {what}?",
            "How is {what} called?",
        ],
        "{n} is {what}.",
        "{n}",
        PLANETS,
    ),
    Grid(
        "planets",
        [
            "What do you know about {n}?",
            "Tell me about {n}.",
            "What is {n}?",
            "What is special about {n}?",
            "Why is {n} special?",
            "Describe {n}.",
        ],
        "{n} is the {ord} planet from the sun. It is {what}.",
        "",
        PLANETS,
    ),
    Grid(
        "opposites",
        [
            "What is the opposite of {n}?",
            "Give me the opposite of {n}.",
            "Tell me the opposite of {n}.",
            "The opposite of {n} is what?",
            "What is the contrary of {n}?",
            "Opposite of {n}?",
            "Which word is the opposite of {n}?",
            "Name the opposite of {n}.",
        ],
        "The opposite of {n} is {v}.",
        "{v_c}",
        OPPOSITES,
    ),
    Grid(
        "plurals",
        [
            "What is the plural of {n}?",
            "Give me the plural of {n}.",
            "Tell me the plural of {n}.",
            "Plural of {n}?",
            "The plural of {n} is what?",
            "How do you say {n} in the plural?",
            "What do you call more than one {n}?",
            "One {n}, two what?",
        ],
        "The plural of {n} is {v}.",
        "{v_c}",
        PLURALS,
    ),
    Grid(
        "shapes",
        [
            "How many sides does a {n} have?",
            "How many sides has a {n}?",
            "A {n} has how many sides?",
            "Count the sides of a {n}.",
            "Tell me how many sides a {n} has.",
            "What is the number of sides of a {n}?",
        ],
        "{n_A} has {v} sides.",
        "{v_c}",
        SHAPES,
    ),
    Grid(
        "shapes",
        [
            "How many corners does a {n} have?",
            "How many corners has a {n}?",
            "A {n} has how many corners?",
            "Count the corners of a {n}.",
            "Tell me how many corners a {n} has.",
        ],
        "{n_A} has {v} corners.",
        "{v_c}",
        SHAPES,
    ),
    Grid(
        "colours",
        [
            "What colour is {n}?",
            "Which colour is {n}?",
            "What is the colour of {n}?",
            "Tell me the colour of {n}.",
            "{n_c} is what colour?",
            "Which colour does {n} have?",
            "What colour does {n} have?",
        ],
        "{n_c} is {v}.",
        "{v_c}",
        COLOURS,
    ),
    Grid(
        "colours",
        [
            "What do you get when you mix {n} and {m}?",
            "Mix {n} and {m}.",
            "What colour is {n} and {m} together?",
            "Which colour do {n} and {m} make?",
            "What do {n} and {m} make?",
            "{n_c} and {m} make which colour?",
            "What do you get when you mix {m} and {n}?",
            "Which colour do {m} and {n} make?",
        ],
        "{n_c} and {m} make {v}.",
        "{v_c}",
        MIXES,
    ),
    Grid(
        "everyday things",
        [
            "What does {n_a} do?",
            "What is the job of {n_a}?",
            "What is the work of {n_a}?",
            "Tell me what {n_a} does.",
            "{n_A} does what?",
            "Describe the job of {n_a}.",
        ],
        "{n_A} {v}.",
        "",
        JOBS,
    ),
    Grid(
        "everyday things",
        ["Who {v}?", "Which person {v}?", "Tell me who {v}.", "What do you call a person who {v}?", "Somebody {v}. Who is it?"],
        "{n_A} {v}.",
        "{n_c}",
        JOBS,
    ),
    Grid(
        "everyday things",
        [
            "What do you use {n_a} for?",
            "What is {n_a} for?",
            "What can you do with {n_a}?",
            "Why do people use {n_a}?",
            "Tell me what {n_a} is for.",
            "How do you use {n_a}?",
        ],
        "You use {n_a} to {v}.",
        "",
        USES,
    ),
    Grid(
        "everyday things",
        [
            "What is {n_a}?",
            "What kind of thing is {n_a}?",
            "Tell me what {n_a} is.",
            "{n_A} is what?",
            "Do you know what {n_a} is?",
            "What type of thing is {n_a}?",
        ],
        "{n_A} is {v_a}.",
        "",
        THINGS,
    ),
    Grid(
        "everyday things",
        [
            "What do you need to {n}?",
            "Which part of the body do you need to {n}?",
            "What do people use to {n}?",
            "With what do you {n}?",
            "Which part of the body helps you to {n}?",
        ],
        "You use your {v} to {n}.",
        "{v_c}",
        SENSES,
    ),
    Grid(
        "yes or no", ["{q_c}?", "Tell me: {q}?", "Do you know: {q}?", "{q_c}, yes or no?"], "{yes}, {why}.", "{yes}", yes_no()
    ),
    Grid(
        "numbers",
        [
            "How do you write {d} in words?",
            "Write {d} in words.",
            "What is {d} in words?",
            "{d} in words?",
            "Spell out the number {d}.",
        ],
        "{d} in words is {w}.",
        "{w_c}",
        [{"d": str(i), "w": w, "w_c": w.capitalize()} for i, w in enumerate(NUMBERS)],
    ),
    Grid(
        "numbers",
        ["Write {w} as a number.", "Which number is {w}?", "What is {w} as a number?", "What number is {w}?"],
        "{w_c} is {d}.",
        "{d}",
        [{"d": str(i), "w": w, "w_c": w.capitalize()} for i, w in enumerate(NUMBERS)],
    ),
]
