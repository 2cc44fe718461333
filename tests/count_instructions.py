"""Counts the kernels' instructions in the assembly that LLVM makes for each variant.

    python tests/count_instructions.py         the tables of docs/performance-kernels.md

`matvec`, for 256 weights: the loop over scales and the loop over products. `tile`, for 8 rows x 32 columns x 4 tokens. A loop
is a branch to an earlier label; loops are nested by position; inner loops of a tile count as often as they run.
"""

import re
from functools import cache
from typing import NamedTuple

from llamacli.cpu.kernels.formats import dots, tiles
from llamacli.cpu.kernels.formats.layout import QUANTIZED
from llamacli.cpu.kernels.formats.tiles import adds_in_16_bits
from llamacli.cpu.kernels.jit.loader import Target, assembly, targets

LINUX, MAC = "x86_64-unknown-linux-gnu", "arm64-apple-macosx"
AVX2 = dict.fromkeys(("avx2", "fma", "f16c", "bmi2"), True)
AVX512 = AVX2 | dict.fromkeys(("avx512f", "avx512bw", "avx512dq", "avx512vl"), True)
NEON = {"neon": True, "dotprod": True}


def _named(name: str, *machine) -> Target:
    return next(target for target in targets(*machine) if target.name == name)


TARGETS = {
    "avx2": _named("avx2", LINUX, "haswell", AVX2),
    "avxvnni": _named("avxvnni", LINUX, "alderlake", AVX2 | {"avxvnni": True}),
    "avx512": _named("avx512", LINUX, "skylake-avx512", AVX512),
    "avx512vnni": _named("avx512vnni", LINUX, "znver4", AVX512 | {"avx512vnni": True}),
    "dotprod": _named("dotprod", MAC, "apple-m1", NEON),
    "i8mm": _named("i8mm", MAC, "apple-m2", NEON | {"i8mm": True}),
}


PREFETCH = 8  # instructions of a tile's loop of prefetches, at most: it runs once in 256 columns, so it is not counted


@cache
def _assembly(target: Target, name: str) -> str:
    return assembly(lambda target: dots.quantized(name, target), target)


class Loop(NamedTuple):
    """Instructions of a function from `first` to `last`, the branch back."""

    first: int
    last: int

    def holds(self, other: "Loop") -> bool:
        """Whether the other loop is inside of this one."""
        return self != other and self.first <= other.first and other.last <= self.last


def loops(text: str, function: str) -> list[Loop]:
    """The loops of one function, in the order of their ends; branches to one label are one loop."""
    body = re.search(rf"^_?{function}:.*?(?=^\s*\.cfi_endproc|^\s*\.size|\Z)", text, re.M | re.S).group()
    labels, ends, count = {}, {}, 0
    for line in body.splitlines()[1:]:
        line = re.split(r"\s[#;/]", line)[0].rstrip()
        if label := re.match(r"^(\.?L\w+):", line):
            labels[label[1]] = count
        elif re.match(r"^\s+[a-z{]", line):
            target = re.match(r"^\s+(?:j\w+|b\.?\w*|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.?L\w+)$", line)
            if target and target[1] in labels:
                ends[target[1]] = count
            count += 1
    return sorted((Loop(labels[name], last) for name, last in ends.items()), key=lambda loop: loop.last)


def length(loop: Loop, every: list[Loop]) -> int:
    """Instructions of a loop without those of the loops inside."""
    return _size(loop) - sum(_size(inner) for inner in _inside(loop, every))


def matvec(target: Target, name: str) -> tuple[int, int]:
    """Instructions of the loop over scales and the one over products, for 256 weights."""
    every = loops(_assembly(target, name), "matvec")
    chunk = next(loop for loop in every if len(_inside(loop, every)) == 2)
    scales, products = map(_size, _inside(chunk, every))
    return scales, products


def tile(target: Target, name: str) -> float:
    """Instructions for 8 rows x 32 columns x 4 tokens."""
    fmt = QUANTIZED[name]
    every = [loop for loop in loops(_assembly(target, name), "tile") if _size(loop) > PREFETCH]
    innermost = [loop for loop in every if not _inside(loop, every)]
    steps = innermost if adds_in_16_bits(target) else []
    whole = next(loop for loop in every if _inside(loop, every) == steps)  # of 32 columns
    rounds = 8 // tiles.UNROLL / max(1, len(steps))  # of each inner loop: together they do 8 steps of 4 columns
    count = length(whole, every) + sum(_size(loop) * rounds for loop in steps)
    assert fmt.group in (16, 32)
    return count * 8 * 4 / (target.lanes * target.tile_vectors * target.tile)


def _size(loop: Loop) -> int:
    return loop.last - loop.first + 1


def _inside(loop: Loop, every: list[Loop]) -> list[Loop]:
    return [inner for inner in every if loop.holds(inner)]


def main():
    print("| |", " | ".join(f"{name} matvec | {name} tile" for name in TARGETS), "|")
    print("|---" * (2 * len(TARGETS) + 1) + "|")
    for name in QUANTIZED:
        cells = []
        for target in TARGETS.values():
            cells += ["{} + {}".format(*matvec(target, name)), f"{tile(target, name):.0f}"]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
