"""Draws the pictures that scout-tiny learns to see, and asks about them.

In: a seed. Out: `scenes(seed)`, an endless stream of `Scene`: a picture of one to four equal shapes of one colour on a pale
ground, with what is on it. `questions(scene)` asks for the number, the colour, the shape and all three. Run as a script it
writes the examples in `pictures/`. The answers use words that are one token each: the text model cannot spell others.

Numbers, colours and shapes make 60 combinations; sizes, places, tints and grounds are drawn at random, so that no picture comes
twice. The evaluation draws with a seed of its own.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from facts import NUMBERS
from PIL import Image, ImageDraw

SHAPES = {"square": 4, "circle": 0, "triangle": 3}  # corners; 0: round
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 150, 55),
    "blue": (30, 70, 215),
    "yellow": (245, 205, 0),
    "black": (20, 20, 20),
}
MOST = 4
SCALE = 2  # drawn so much larger, then scaled down: smooth edges


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows. `centres`: of the shapes, as shares of width and height."""

    picture: Image.Image
    count: int
    colour: str
    shape: str
    centres: list[tuple[float, float]]


def outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a shape that fits into a circle."""
    angles = [turn + 2 * math.pi * i / SHAPES[shape] for i in range(SHAPES[shape])]
    return [(x + radius * math.sin(angle), y - radius * math.cos(angle)) for angle in angles]


def places(rng: random.Random, count: int, width: int, height: int) -> tuple[float, list[tuple[float, float]]]:
    """A radius, and centres of circles of that radius that neither touch each other nor leave the picture."""
    radius = rng.uniform(0.14, 0.28 if count < 3 else 0.22) * min(width, height)
    while True:
        found: list[tuple[float, float]] = []
        for _ in range(60):
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            if all(math.hypot(x - a, y - b) > 2.15 * radius for a, b in found):
                found.append((x, y))
                if len(found) == count:
                    return radius, found
        radius *= 0.9


def draw(rng: random.Random, count: int, colour: str, shape: str) -> Scene:
    """A picture of `count` such shapes, at most 160 pixels wide and high."""
    longer, ratio = rng.randint(80, 160), rng.uniform(0.6, 1.0)
    width, height = (longer, round(longer * ratio)) if rng.random() < 0.5 else (round(longer * ratio), longer)
    ground = tuple(rng.randint(215, 255) for _ in range(3))
    paint = tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLOURS[colour])
    radius, centres = places(rng, count, width, height)
    picture = Image.new("RGB", (width * SCALE, height * SCALE), ground)
    pen = ImageDraw.Draw(picture)
    for x, y in centres:
        a, b, r = x * SCALE, y * SCALE, radius * SCALE
        if shape == "circle":
            pen.ellipse((a - r, b - r, a + r, b + r), fill=paint)
        else:
            turn = rng.uniform(-0.2, 0.2) + (math.pi / 4 if shape == "square" else 0)
            pen.polygon(outline(shape, a, b, r, turn), fill=paint)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return Scene(picture, count, colour, shape, [(x / width, y / height) for x, y in centres])


def scenes(seed: int) -> Iterator[Scene]:
    """Endless scenes."""
    rng = random.Random(seed)
    while True:
        yield draw(rng, rng.randint(1, MOST), rng.choice([*COLOURS]), rng.choice([*SHAPES]))


def questions(scene: Scene) -> dict[str, tuple[list[str], str]]:
    """By category: the ways to ask, and the answer."""
    shape, colour, number = scene.shape, scene.colour, NUMBERS[scene.count]
    shapes, they = (shape, "is") if scene.count == 1 else (shape + "s", "are")
    return {
        "number": (
            [f"How many {shape}s?", f"How many {shape}s are there?", f"How many {shape}s do you see?", f"Count the {shape}s."],
            f"I see {number}.",
        ),
        "colour": (
            [f"What colour {they} the {shapes}?", "What colour do you see?", "Which colour do you see?"],
            f"I see {colour}.",
        ),
        "shape": (["What shape do you see?", "Which shape do you see?", "What shape is it?"], f"I see a {shape}."),
        "all": (
            ["What do you see?", "What is in the picture?", "Describe the picture.", "What does the picture show?"],
            f"I see a {colour} {shape}, {number} in all.",
        ),
    }


def main() -> None:
    out = Path(__file__).with_name("pictures")
    out.mkdir(exist_ok=True)
    for number, (count, colour, shape) in enumerate(
        [(3, "red", "square"), (1, "blue", "circle"), (4, "green", "triangle"), (2, "black", "circle")]
    ):
        scene = draw(random.Random(7000 + number), count, colour, shape)
        scene.picture.save(out / f"{NUMBERS[count]}-{colour}-{shape}{'s' if count > 1 else ''}.png", optimize=True)


if __name__ == "__main__":
    main()
