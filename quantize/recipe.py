"""Which type each tensor gets.

In: a tensor's GGUF name and shape, the type asked for. Out: a TensorType. The rules are llama-quantize's for these types, but
in a Q4_0 file, where it keeps the output matrix at Q6_K, this one keeps the output matrix and the embedding at Q8_0. Knows
nothing of weights.
"""

from llamacli.errors import UsageError
from llamacli.ggml import BY_NAME, TensorType

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
ENDS = ("token_embd.weight", "output.weight")
ENDS_TYPE = {"Q4_0": "Q8_0"}  # the last matrix decides between 200,000 words; of the first only one row is read for each token


def asked_type(name: str) -> TensorType:
    """The type the user names; UsageError when files of it cannot be made."""
    if name not in FILE_TYPES:
        raise UsageError(f"expected a type of {', '.join(FILE_TYPES)}, found {name!r}")
    return BY_NAME[name]


def choose(name: str, shape: tuple[int, ...], asked: TensorType) -> TensorType:
    """The type of one tensor."""
    if len(shape) == 1 or name.endswith("_norm.weight") or name.endswith("ffn_gate_inp.weight"):
        return BY_NAME["F32"]
    kind = BY_NAME[ENDS_TYPE.get(asked.name, asked.name)] if name in ENDS else asked
    return kind if shape[-1] % kind.block == 0 else BY_NAME["F16"]
