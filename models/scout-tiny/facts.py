"""The facts of scout-tiny's closed world as tables, and the answers of small talk. All text is ours.

Out: lists of rows (dicts of strings), and lists of (phrasings, answer[, one-word answer]). The phrasings for tables are
in phrasings.py.
"""
# ruff: noqa: SIM905 - long lists of words read better as text


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def table(header: str, body: str) -> list[dict[str, str]]:
    """Rows from `a|b|c` lines; every column `x` also gives `x_a` (with article) and `x_c` (capitalised)."""
    names, rows = header.split("|"), []
    for line in body.strip().splitlines():
        row = dict(zip(names, line.strip().split("|"), strict=True))
        for key, value in list(row.items()):
            row[key + "_c"] = value[:1].upper() + value[1:]
            row[key + "_a"] = article(value) if value else ""
            row[key + "_A"] = row[key + "_a"][:1].upper() + row[key + "_a"][1:]
        rows.append(row)
    return rows


ANIMALS = table(
    "n|sound|home|food|legs|kind|cover|young|move",
    """
dog|woof|kennel|bones|four|mammal|fur|puppy|run
cat|meow|house|fish|four|mammal|fur|kitten|jump
cow|moo|barn|grass|four|mammal|hair|calf|walk
sheep|baa|meadow|grass|four|mammal|wool|lamb|walk
horse|neigh|stable|hay|four|mammal|hair|foal|run
pig|oink|sty|corn|four|mammal|skin|piglet|walk
duck|quack|pond|bread|two|bird|feathers|duckling|swim
hen|cluck|coop|seeds|two|bird|feathers|chick|walk
owl|hoot|tree|mice|two|bird|feathers|owlet|fly
crow|caw|nest|worms|two|bird|feathers|chick|fly
lion|roar|savanna|meat|four|mammal|fur|cub|run
wolf|howl|den|meat|four|mammal|fur|pup|run
bear|growl|cave|honey|four|mammal|fur|cub|climb
frog|croak|swamp|flies|four|amphibian|skin|tadpole|jump
snake|hiss|burrow|mice|no|reptile|scales|snakelet|crawl
bee|buzz|hive|nectar|six|insect|hair|larva|fly
mouse|squeak|hole|cheese|four|mammal|fur|pup|run
goat|bleat|farm|leaves|four|mammal|hair|kid|climb
elephant|trumpet|jungle|fruit|four|mammal|skin|calf|walk
monkey|chatter|forest|bananas|four|mammal|fur|infant|climb
fox|bark|den|rabbits|four|mammal|fur|kit|run
donkey|bray|stable|hay|four|mammal|hair|foal|walk
goose|honk|lake|grass|two|bird|feathers|gosling|swim
dove|coo|tower|seeds|two|bird|feathers|squab|fly
""",
)

COUNTRIES = table(
    "c|cap|cont|lang",
    """
France|Paris|Europe|French
Germany|Berlin|Europe|German
Italy|Rome|Europe|Italian
Spain|Madrid|Europe|Spanish
Portugal|Lisbon|Europe|Portuguese
England|London|Europe|English
Ireland|Dublin|Europe|English
Greece|Athens|Europe|Greek
Poland|Warsaw|Europe|Polish
Norway|Oslo|Europe|Norwegian
Sweden|Stockholm|Europe|Swedish
Finland|Helsinki|Europe|Finnish
Austria|Vienna|Europe|German
Hungary|Budapest|Europe|Hungarian
Russia|Moscow|Europe|Russian
Turkey|Ankara|Asia|Turkish
Egypt|Cairo|Africa|Arabic
Kenya|Nairobi|Africa|Swahili
Morocco|Rabat|Africa|Arabic
Japan|Tokyo|Asia|Japanese
China|Beijing|Asia|Chinese
Thailand|Bangkok|Asia|Thai
Korea|Seoul|Asia|Korean
Cuba|Havana|America|Spanish
Peru|Lima|America|Spanish
Chile|Santiago|America|Spanish
Canada|Ottawa|America|English
""",
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
SEASONS = "winter winter spring spring spring summer summer summer autumn autumn autumn winter".split()
LENGTHS = "31 28 31 30 31 30 31 31 30 31 30 31".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()


def ring(names: list[str]) -> list[dict[str, str]]:
    """Rows with each name, its number and its neighbours; the last is followed by the first."""
    size = len(names)
    return [{"n": names[i], "next": names[(i + 1) % size], "prev": names[i - 1], "ord": ORDINALS[i]} for i in range(size)]


MONTH_ROWS = [row | {"season": SEASONS[i], "len": LENGTHS[i]} for i, row in enumerate(ring(MONTHS))]

PLANETS = table(
    "n|ord|what",
    """
Mercury|first|the smallest planet
Venus|second|the hottest planet
Earth|third|the planet with life
Mars|fourth|the red planet
Jupiter|fifth|the largest planet
Saturn|sixth|the planet with bright rings
Uranus|seventh|the planet that lies on its side
Neptune|eighth|the planet farthest from the sun
""",
)

PAIRS = (
    "big small,hot cold,up down,fast slow,day night,good bad,happy sad,old young,long short,high low,open closed,"
    "light dark,hard soft,wet dry,full empty,left right,early late,rich poor,strong weak,loud quiet,clean dirty,"
    "near far,thick thin,wide narrow,true false,first last,sweet sour,brave afraid,win lose,"
    "push pull,come go,buy sell,love hate,begin end,ask answer"
)
OPPOSITES = [
    row
    for pair in PAIRS.split(",")
    for a, b in [pair.split()]
    for row in ({"n": a, "v": b, "v_c": b.capitalize()}, {"n": b, "v": a, "v_c": a.capitalize()})
]

PLURALS = table(
    "n|v",
    """
mouse|mice
child|children
foot|feet
tooth|teeth
goose|geese
man|men
woman|women
ox|oxen
leaf|leaves
wolf|wolves
knife|knives
box|boxes
bus|buses
city|cities
baby|babies
berry|berries
dog|dogs
book|books
tree|trees
car|cars
dish|dishes
potato|potatoes
sheep|sheep
fish|fish
""",
)

SHAPES = table(
    "n|v",
    """
triangle|three
square|four
rectangle|four
pentagon|five
hexagon|six
octagon|eight
circle|no
decagon|ten
""",
)

COLOURS = table(
    "n|v",
    """
grass|green
the sky|blue
snow|white
coal|black
blood|red
a banana|yellow
a carrot|orange
a plum|purple
chocolate|brown
a lemon|yellow
milk|white
an elephant|grey
a tomato|red
the sun|yellow
a frog|green
a flamingo|pink
the sea|blue
a strawberry|red
""",
)

MIXES = table(
    "n|m|v",
    """
red|yellow|orange
blue|yellow|green
red|blue|purple
red|white|pink
black|white|grey
red|green|brown
""",
)

JOBS = table(
    "n|v",
    """
baker|bakes bread
farmer|grows food
teacher|teaches children
doctor|helps sick people
pilot|flies planes
cook|makes meals
painter|paints pictures
singer|sings songs
writer|writes books
fisher|catches fish
gardener|looks after plants
builder|builds houses
""",
)

USES = table(
    "n|v",
    """
knife|cut
pen|write
spoon|eat soup
broom|sweep the floor
bed|sleep
cup|drink
oven|bake
key|open a door
lamp|give light
clock|tell the time
hammer|hit nails
camera|take photos
umbrella|stay dry
towel|dry your hands
""",
)

THINGS = table(
    "n|v",
    """
apple|fruit
banana|fruit
pear|fruit
cherry|fruit
carrot|vegetable
potato|vegetable
onion|vegetable
cabbage|vegetable
rose|flower
tulip|flower
daisy|flower
oak|tree
pine|tree
hammer|tool
saw|tool
chair|piece of furniture
table|piece of furniture
car|vehicle
bus|vehicle
train|vehicle
piano|musical instrument
violin|musical instrument
drum|musical instrument
shirt|piece of clothing
hat|piece of clothing
""",
)

SENSES = table(
    "n|v",
    """
see|eyes
hear|ears
smell|nose
taste|tongue
touch|hands
walk|legs
think|brain
""",
)


def yes_no() -> list[dict[str, str]]:
    """Rows of yes/no facts about the animals and things above."""
    rows = []
    for a in ANIMALS:
        for kind in ("mammal", "bird", "insect"):
            hit = a["kind"] == kind
            rows.append(
                {
                    "q": f"is {a['n_a']} {article(kind)}",
                    "yes": "Yes" if hit else "No",
                    "why": f"{a['n_a']} is {article(a['kind'])}",
                }
            )
    for t in THINGS:
        for kind in ("fruit", "vegetable", "tool"):
            hit = t["v"] == kind
            rows.append(
                {"q": f"is {t['n_a']} {article(kind)}", "yes": "Yes" if hit else "No", "why": f"{t['n_a']} is {t['v_a']}"}
            )
    for row in rows:
        row["q_c"] = row["q"][0].upper() + row["q"][1:]
    return rows


SMALLTALK = [
    (
        ["Hello", "Hi", "Hello there", "Hi there", "Hey", "Good day", "Greetings", "Hello, Scout", "Hi, Scout", "Hey there"],
        "Hello! How can I help you?",
    ),
    (["Good morning", "Good morning to you", "A very good morning", "Morning"], "Good morning! How can I help you?"),
    (["Good evening", "Good evening to you", "Evening", "A very good evening"], "Good evening! How can I help you?"),
    (
        [
            "Who are you?",
            "What is your name?",
            "Tell me who you are.",
            "What are you called?",
            "What should I call you?",
            "Introduce yourself.",
            "Do you have a name?",
            "Your name?",
            "What are you?",
            "Please introduce yourself.",
        ],
        "I am Scout Tiny, a very small language model.",
    ),
    (
        [
            "What can you do?",
            "How can you help me?",
            "What are you good at?",
            "What do you know?",
            "What can I ask you?",
            "Tell me what you can do.",
            "Which topics do you know?",
            "What are your skills?",
            "What can you help with?",
        ],
        "I can talk about animals, countries, days, planets, colours and small numbers.",
    ),
    (
        [
            "How are you?",
            "How are you today?",
            "How do you feel?",
            "How is it going?",
            "Are you well?",
            "How are things?",
            "How do you do?",
            "Is everything fine?",
        ],
        "I am fine, thank you. How can I help you?",
    ),
    (
        [
            "Thanks",
            "Thank you",
            "Thank you very much",
            "Thanks a lot",
            "Many thanks",
            "Thank you, Scout",
            "Great, thanks",
            "Thanks for your help",
            "That helped, thank you",
            "Cool, thanks",
        ],
        "You are welcome!",
    ),
    (
        [
            "Bye",
            "Goodbye",
            "See you",
            "See you later",
            "Bye bye",
            "I have to go",
            "Until next time",
            "See you tomorrow",
            "Goodbye, Scout",
            "Take care",
        ],
        "Goodbye! Have a nice day.",
    ),
    (["Good night", "Good night to you", "Sleep well", "Good night, Scout"], "Good night! Sleep well."),
    (
        [
            "Are you a human?",
            "Are you a person?",
            "Are you real?",
            "Are you a robot?",
            "Are you alive?",
            "Am I talking to a human?",
            "Are you a machine?",
            "Do you live?",
        ],
        "No, I am a computer program, a small language model.",
    ),
    (
        [
            "Who made you?",
            "Who built you?",
            "Who trained you?",
            "Where do you come from?",
            "Who is your maker?",
            "Who created you?",
            "How were you made?",
            "Tell me who made you.",
        ],
        "I was trained from scratch by a script of the llamacli project.",
    ),
    (
        [
            "How big are you?",
            "How large are you?",
            "How many parameters do you have?",
            "What is your size?",
            "Are you big?",
            "Are you a large model?",
            "Tell me your size.",
            "How many weights do you have?",
        ],
        "I am tiny: I have about 15 million parameters.",
    ),
    (
        ["How old are you?", "What is your age?", "When were you born?", "Tell me your age.", "Your age?", "Are you old?"],
        "I have no age. I am a program.",
    ),
    (
        [
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Say something funny.",
            "A joke, please.",
            "Can you tell a joke?",
            "Tell me something funny.",
            "I want to hear a joke.",
        ],
        "Why did the cow cross the road? It wanted to see the moo-vies.",
    ),
    (
        ["I am sad", "I feel sad", "I feel bad today", "I am not happy", "I am so sad", "Today is a bad day"],
        "I am sorry to hear that. I hope you feel better soon.",
    ),
    (
        ["I am happy", "I feel great", "I feel good today", "I am so happy", "Today is a good day", "I am very happy"],
        "That is good to hear!",
    ),
    (
        [
            "Who won the game last night?",
            "What is the weather today?",
            "What is the news?",
            "Who is the president?",
            "How do I fix my car?",
            "What is the meaning of life?",
            "Write me a program.",
            "What did I eat yesterday?",
            "Solve this equation.",
            "What is a black hole?",
            "Who wrote this book?",
            "What is the price of gold?",
            "Explain quantum physics.",
            "How do I get rich?",
            "What should I wear?",
            "Translate this text.",
            "When is the next train?",
            "What is my phone number?",
            "How tall is that mountain?",
            "Who sings this song?",
        ],
        "I do not know that. I am a very small model.",
    ),
]

TOOL = [
    (["a token", "tokens"], "A token is a small piece of text. I read and write tokens."),
    (
        ["an expert", "experts", "a mixture of experts", "the experts"],
        "An expert is a small network. Each token uses only one of my 16 experts and a shared one.",
    ),
    (["the router", "a router"], "The router looks at each token and chooses one expert for it."),
    (["the shared expert", "a shared expert"], "The shared expert is a network that every token uses."),
    (["GGUF", "a GGUF file"], "GGUF is a file format that holds a whole language model."),
    (
        ["quantization", "4-bit quantization"],
        "Quantization stores the weights with fewer bits, so the model is smaller and faster.",
    ),
    (["llamacli"], "llamacli is a tool that runs Llama 4 models in the terminal."),
    (
        ["Llama 4 Scout", "Llama 4", "Scout"],
        "Llama 4 Scout is a large language model with 16 experts. I have the same design, but I am tiny.",
    ),
    (["a language model", "a model", "an LLM"], "A language model is a program that predicts the next token of a text."),
    (["the context", "a context"], "The context is the text that the model can see while it writes."),
    (["a prompt", "the prompt"], "A prompt is the text that you give to the model."),
    (["a terminal", "the terminal"], "A terminal is a window where you type commands."),
    (["a parameter", "a weight"], "A weight is a number in the model that was learned in training."),
    (["the KV cache", "a KV cache"], "The KV cache holds what the model has computed for earlier tokens."),
    (["the temperature", "temperature"], "The temperature says how freely the model picks the next token."),
]
TOOL_ASK = [
    "What is {n}?",
    "Explain {n}.",
    "Tell me what {n} is.",
    "What does {n} mean?",
    "Tell me about {n}.",
    "Can you explain {n}?",
    "Do you know {n}?",
    "What do you know about {n}?",
]

GENERAL = [
    (
        [
            "How many days are in a week?",
            "How many days does a week have?",
            "A week has how many days?",
            "Count the days of a week.",
            "Tell me how many days a week has.",
        ],
        "A week has seven days.",
        "Seven",
    ),
    (
        [
            "How many months are in a year?",
            "How many months does a year have?",
            "A year has how many months?",
            "Tell me how many months a year has.",
        ],
        "A year has twelve months.",
        "Twelve",
    ),
    (
        [
            "How many seasons are there?",
            "How many seasons does a year have?",
            "A year has how many seasons?",
            "Tell me how many seasons there are.",
        ],
        "There are four seasons.",
        "Four",
    ),
    (
        [
            "How many planets are there?",
            "How many planets go around the sun?",
            "How many planets do you know?",
            "Tell me how many planets there are.",
        ],
        "There are eight planets.",
        "Eight",
    ),
    (
        [
            "What are the seasons?",
            "Name the seasons.",
            "List the four seasons.",
            "Which seasons are there?",
            "Tell me the seasons.",
        ],
        "The seasons are spring, summer, autumn and winter.",
        "",
    ),
    (
        [
            "What are the days of the week?",
            "Name the days of the week.",
            "List the days of the week.",
            "Tell me all days of the week.",
        ],
        "The days are " + ", ".join(DAYS[:-1]) + " and Sunday.",
        "",
    ),
    (
        ["List the planets.", "Name the planets.", "What are the planets?", "Which planets are there?", "Tell me all planets."],
        "The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
        "",
    ),
    (
        [
            "How many hours are in a day?",
            "How many hours does a day have?",
            "A day has how many hours?",
            "Tell me how many hours a day has.",
        ],
        "A day has 24 hours.",
        "24",
    ),
    (
        [
            "How many minutes are in an hour?",
            "How many minutes does an hour have?",
            "An hour has how many minutes?",
            "Tell me how many minutes an hour has.",
        ],
        "An hour has 60 minutes.",
        "60",
    ),
]
