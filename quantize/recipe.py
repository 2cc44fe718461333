"""Which type each tensor gets.

In: a tensor's GGUF name and shape, the type asked for. Out: a TensorType. The rules are llama-quantize's for these types, with
one difference: where it keeps the output matrix of a Q4_0 file at Q6_K, this one keeps it at Q8_0. Knows nothing of weights.
"""

from llamacli.errors import UsageError
from llamacli.ggml import BY_NAME, TensorType

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
OUTPUT_TYPE = {"Q4_0": "Q8_0"}  # the last matrix decides between 200,000 words: it keeps more bits


def asked_type(name: str) -> TensorType:
    """The type the user names; UsageError when files of it cannot be made."""
    if name not in FILE_TYPES:
        raise UsageError(f"expected a type of {', '.join(FILE_TYPES)}, found {name!r}")
    return BY_NAME[name]


def choose(name: str, shape: tuple[int, ...], asked: TensorType, tied: bool) -> TensorType:
    """The type of one tensor. `tied`: the embedding is the output matrix too."""
    if len(shape) == 1 or name.endswith("_norm.weight") or name.endswith("ffn_gate_inp.weight"):
        return BY_NAME["F32"]
    is_output = name == "output.weight" or (tied and name == "token_embd.weight")
    kind = BY_NAME[OUTPUT_TYPE.get(asked.name, asked.name)] if is_output else asked
    return kind if shape[-1] % kind.block == 0 else BY_NAME["F16"]
