"""Chooses the type of each tensor by a recipe: a table whose rows are kinds of tensors, a condition and a type.

In: a recipe's name, the tensors' GGUF names and shapes, overrides by regular expression, and whether there is an importance
matrix. Out: `{name: TensorType}`, and notices.

llama.cpp's recipes choose the types that its llama-quantize chooses for Llama 4 (llama-quant.cpp of commit 0c1e570; its answers
are in tests/golden/recipes.json). `Q4_EXPERTS` is our own: a token passes through one routed expert of many, but through all of
attention, shared experts, embedding and output, so those get more bits at little cost.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llamacli.errors import UsageError
from llamacli.files.ggml import BY_NAME, TensorType
from llamacli.llama4.tensors import OUTPUT, TOKEN_EMBD, Role, find, kinds, role_of

DEFAULT = "Q4_EXPERTS"
RECIPE_KEY = "llamacli.recipe"  # the metadata field that names a recipe without a number in general.file_type
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
NEED_IMATRIX = ("Q2_K_S",)
TYPES = (  # that tensors can be written in
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
NARROWER = {  # types in blocks of 32, for rows that are not a multiple of 256
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


class Place(NamedTuple):
    """What a condition may ask for. `n_shared`: query heads to a key head; `imatrix`: whether there is an importance matrix."""

    layer: int
    n_layers: int
    n_experts: int
    n_shared: int
    imatrix: bool


Condition = Callable[[Place], bool]
Rule = tuple[tuple[str, ...], Condition, str]  # kinds of tensors (llama4/tensors.py), condition, type


class Recipe(NamedTuple):
    """`base` is the type where no rule holds, `bits` are a weight's on Scout's shapes, `file_type` is llama.cpp's number."""

    name: str
    file_type: int
    base: str
    bits: float
    purpose: str
    rules: tuple[Rule, ...] = ()

    @property
    def metadata(self) -> dict[str, object]:
        """The fields that a file of this recipe carries."""
        return {"general.file_type": self.file_type} | ({RECIPE_KEY: self.name} if self.name == DEFAULT else {})


def always(at: Place) -> bool:
    return True


def first(n: int) -> Condition:
    return lambda at: at.layer < n


def first_part(n: int) -> Condition:
    """The first of `n` equal parts of the layers."""
    return lambda at: at.layer < at.n_layers // n


def more_bits(at: Place) -> bool:
    """The first and the last eighth of the layers, and of those between every third."""
    edge = at.n_layers // 8
    return at.layer < edge or at.layer >= 7 * at.n_layers // 8 or (at.layer - edge) % 3 == 2


def shared_keys(at: Place) -> bool:
    return at.n_shared >= 4


def eight_experts(at: Place) -> bool:
    return at.n_experts == 8


def first_eighth(imatrix: bool) -> Condition:
    """The first eighth of the layers, if there is (or is no) importance matrix."""
    return lambda at: at.imatrix == imatrix and first_part(8)(at)


K, V, OUT = ("attn_k",), ("attn_v",), ("attn_output",)
DOWN = tuple(kind for kind in kinds(Role.DENSE, Role.EXPERTS, Role.SHARED) if kind.startswith("ffn_down"))
ENDS: tuple[Rule, ...] = ((kinds(Role.OUTPUT), always, "Q6_K"),)
FEW: tuple[Rule, ...] = ((K, eight_experts, "Q8_0"), (V, eight_experts, "Q8_0"))
FEW_OUT: tuple[Rule, ...] = ((OUT, eight_experts, "Q5_K"),)
IQ4: tuple[Rule, ...] = ((V, shared_keys, "Q5_K"), (DOWN, first_eighth(imatrix=False), "Q5_K"))
MORE: tuple[Rule, ...] = ((V, more_bits, "Q6_K"), (DOWN, more_bits, "Q6_K"))


def _mixture(name: str, file_type: int, base: str, bits: float, purpose: str, *rules: Rule) -> Recipe:
    """A recipe of llama.cpp, whose rules for every mixture come first."""
    return Recipe(name, file_type, base, bits, purpose, (*ENDS, *FEW, *rules))


# fmt: off
RECIPES = {recipe.name: recipe for recipe in (
    Recipe("F32", 0, "F32", 32.0, "exact, for tests"),
    Recipe("F16", 1, "F16", 16.0, "16 bits, for weights up to 65504"),
    Recipe("BF16", 32, "BF16", 16.0, "16 bits, what Meta published"),
    Recipe("Q4_EXPERTS", 15, "Q6_K", 4.71, "4 bits in routed experts, 6 in what every token passes", (
        (kinds(Role.EXPERTS), always, "Q4_K"),
        (kinds(Role.EMBEDDING), always, "Q6_K"),
        (kinds(Role.OUTPUT), always, "Q6_K"),
    )),
    Recipe("Q8_0", 7, "Q8_0", 8.5, "next to lossless"),
    _mixture("Q6_K", 18, "Q6_K", 6.56, "almost indistinguishable from the original"),
    _mixture("Q5_K_M", 17, "Q5_K", 5.68, "very close, more bits in the tensors that matter most", *MORE),
    _mixture("Q5_K_S", 16, "Q5_K", 5.51, "very close"),
    _mixture("Q5_1", 9, "Q5_1", 6.01, "plain 5 bits with an offset"),
    _mixture("Q5_0", 8, "Q5_0", 5.51, "plain 5 bits", (DOWN, first_eighth(imatrix=True), "Q5_1")),
    _mixture("Q4_K_M", 15, "Q4_K", 4.85, "the usual 4 bits, more in the tensors that matter most", *FEW_OUT, *MORE),
    _mixture("Q4_K_S", 14, "Q4_K", 4.56, "4 bits, smaller", *FEW_OUT,
        (V, first(4), "Q5_K"), (DOWN, first_part(8), "Q5_K")),
    _mixture("Q4_1", 3, "Q4_1", 5.02, "plain 4 bits with an offset"),
    _mixture("Q4_0", 2, "Q4_0", 4.52, "plain 4 bits, fastest to make", (DOWN, first_eighth(imatrix=True), "Q4_1")),
    _mixture("IQ4_NL", 25, "IQ4_NL", 4.56, "4 bits on an uneven scale", *FEW_OUT, *IQ4),
    _mixture("IQ4_XS", 30, "IQ4_XS", 4.33, "the smallest 4 bits", *FEW_OUT, *IQ4),
    _mixture("Q3_K_L", 13, "Q3_K", 4.15, "3 bits, 5 in the tensors that matter most",
        (V, always, "Q5_K"), (DOWN, always, "Q5_K"),
        (OUT, lambda at: not eight_experts(at), "Q5_K")),
    _mixture("Q3_K_M", 12, "Q3_K", 3.84, "3 bits, 4 in the tensors that matter most", *FEW_OUT,
        (V, first(2), "Q5_K"), (V, always, "Q4_K"),
        (DOWN, first_part(16), "Q5_K"), (DOWN, always, "Q4_K"), (OUT, always, "Q4_K")),
    _mixture("Q3_K_S", 11, "Q3_K", 3.47, "3 bits: a loss that shows", *FEW_OUT),
    _mixture("Q2_K", 10, "Q2_K", 2.94, "2 bits, 3 in the tensors that matter most", *FEW_OUT,
        (V, shared_keys, "Q4_K"), (V, always, "Q3_K"),
        (DOWN, always, "Q3_K"), (OUT, always, "Q3_K")),
    _mixture("Q2_K_S", 21, "Q2_K", 2.74, "the smallest; only with an importance matrix",
        (V, shared_keys, "Q4_K"), (DOWN, first_part(8), "Q4_K")),
)}
# fmt: on


def find_recipe(name: str) -> Recipe:
    """The recipe the user names, in any case; UsageError when there is none of that name."""
    found = RECIPES.get(ALIASES.get(name.upper(), name.upper()))
    if found is None:
        raise UsageError(f"--type: expected one of {', '.join(RECIPES)}, found {name!r}")
    return found


def choose_types(
    recipe: Recipe,
    shapes: dict[str, tuple[int, ...]],
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: bool = False,
) -> tuple[dict[str, TensorType], list[str]]:
    """Every tensor's type, in the order of `shapes` (NumPy's order, row length last), and notices.

    `overrides`: (regular expression searched in the name, type); the first that matches wins over the recipe. Vectors, norms
    and routers stay F32 in any case. UsageError: not a regular expression, one that matches nothing, or not a type.
    """
    patterns = [(_compiled(pattern), _type_named(kind, pattern)) for pattern, kind in overrides]
    model, matched, decided, wanted = _model(shapes, imatrix), set(), set(), {}
    for name, shape in shapes.items():
        if stays_full(name, shape):
            wanted[name] = "F32"
        elif hits := [i for i, (pattern, _) in enumerate(patterns) if pattern.search(name)]:
            matched.update(hits)
            decided.add(hits[0])
            wanted[name] = patterns[hits[0]][1]
        else:
            kind, layer = _kind_and_layer(name)
            if name == TOKEN_EMBD and OUTPUT not in shapes:
                kind = "output"  # tied: the embedding gets the type of an output
            place = model._replace(layer=layer)
            rules = (type_name for parts, holds, type_name in recipe.rules if kind in parts and holds(place))
            wanted[name] = next(rules, recipe.base)
    types = {name: _fitting(BY_NAME[wanted[name]], shape[-1]) for name, shape in shapes.items()}
    notices = []
    for i, (pattern, kind) in enumerate(patterns):
        if i not in matched:
            raise UsageError(
                f"--tensor-type: expected an expression that is found in the name of a tensor to be quantized, found "
                f"{pattern.pattern!r}, which matches none; --dry-run lists them"
            )
        elif i not in decided:
            notices.append(f"--tensor-type: all that {pattern.pattern!r} matches was given a type by one before it, not {kind}")
    if recipe.name in NEED_IMATRIX and not imatrix:
        notices.append(f"{recipe.name} without an importance matrix loses a lot; llama-quantize refuses it: use --imatrix")
    return types, notices + _fallbacks(wanted, types)


def stays_full(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays F32 in every file: a vector, a norm, a router."""
    return len(shape) < 2 or role_of(name) in (Role.NORM, Role.ROUTER)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--tensor-type: expected a regular expression, found {pattern!r}: {error}") from None


def _type_named(kind: str, pattern: str) -> str:
    if kind.upper() not in TYPES:
        raise UsageError(f"--tensor-type {pattern}: expected a type of {', '.join(TYPES)}, found {kind!r}")
    return kind.upper()


def _kind_and_layer(name: str) -> tuple[str | None, int]:
    """The kind of a tensor, None for an unknown name, and its layer, -1 outside of the layers."""
    row, layer = find(name) or (None, None)
    return row and row.kind, -1 if layer is None else layer


def _model(shapes: dict[str, tuple[int, ...]], imatrix: bool) -> Place:
    """What holds for the whole model, derived from its tensors."""
    rows, n_layers = {}, 0
    for name, shape in shapes.items():
        kind, layer = _kind_and_layer(name)
        rows.setdefault(kind, shape[0])
        n_layers = max(n_layers, layer + 1)
    n_shared = rows.get("attn_q", 0) // max(1, rows.get("attn_k", 0))
    return Place(-1, n_layers, rows.get("ffn_gate_inp", 0), n_shared, imatrix)


def _fitting(kind: TensorType, n_cols: int) -> TensorType:
    """`kind`, or a type with smaller blocks where rows of `n_cols` are no whole number of its blocks."""
    for candidate in (kind, BY_NAME[NARROWER.get(kind.name, "F16")]):
        if n_cols % candidate.block == 0:
            return candidate
    return BY_NAME["F16"]


def _fallbacks(wanted: dict[str, str], types: dict[str, TensorType]) -> list[str]:
    """A notice for each type that did not fit some rows."""
    odd: dict[tuple[str, str], list[str]] = {}
    for name, kind in types.items():
        if kind.name != wanted[name]:
            odd.setdefault((wanted[name], kind.name), []).append(name)
    return [
        f"{len(names)} tensors are {found} instead of {kind}, their rows are not a multiple of {BY_NAME[kind].block}: "
        f"{names[0]} first"
        for (kind, found), names in odd.items()
    ]
