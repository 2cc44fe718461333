"""The files and token sequences on which llama.cpp and the engine are compared, and how their logits are.

Random cases come from tests/tiny.py by seed. Trained ones are the small model of models/scout-tiny, its weights written again
in the types of llama.cpp's mixes; the K types by the plain encoders below, which round to the nearest code, so that the very
same file can be made wherever the test runs.
"""

import json
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
import oracle  # noqa: E402
import tiny  # noqa: E402

TRAINED = ROOT / "models" / "scout-tiny"
TOP = 64  # log-probabilities kept for each position; the others count as one
LIKE_META = {"chunk": 8192, "temperature_length": 8192.0, "n_embd": 256, "n_ff_exp": 256, "n_ff": 512, "head_dim": 64}


def mix(base, better):
    """llama.cpp's habit: more bits for output, attn_v and ffn_down."""
    return lambda name: better if name.startswith("output") or "attn_v" in name or "ffn_down" in name else base


MIXES = {"Q4_K": mix("Q4_K", "Q6_K"), "Q6_K": mix("Q6_K", "Q6_K"), "Q8_0": mix("Q8_0", "Q8_0"), "Q4_0": mix("Q4_0", "Q8_0")}
SHAPES = {
    "scout": {"n_layers": 8, "experts": 16},
    "maverick": tiny.MAVERICK | {"experts": 128, "heads": 4, "kv_heads": 1},  # llama.cpp takes 128 experts for Maverick
}
RANDOM = {f"random-scout-{types}": ("scout", types) for types in MIXES} | {"random-maverick-Q4_K": ("maverick", "Q4_K")}
SMALL = {f"scout-tiny-{types}": types for types in MIXES}
SHIPPED = "scout-tiny-shipped"  # the 4-bit file in the repository, as it is
CASES = [*RANDOM, *SMALL, SHIPPED]


def available(name):
    return name in RANDOM or (TRAINED / "hf" / "model.safetensors").exists()


def write(name, folder):
    """Write the case's file; returns path and token sequences. Any other name is the path of a file of the small model."""
    path = Path(folder) / f"{name}.gguf"
    if name in RANDOM:
        shape, types = RANDOM[name]
        tiny.tiny_gguf(path, types=MIXES[types], seed=31, **LIKE_META | SHAPES[shape])
        return path, [np.random.RandomState(32).randint(0, 257, 512)]
    if name == SHIPPED or name not in CASES:
        path = TRAINED / "scout-tiny.gguf" if name == SHIPPED else Path(name)
        return path, conversations(path)
    retype(float_model(folder), path, MIXES[SMALL[name]])
    return path, conversations(path)


def float_model(folder):
    """The trained model as an F32 file, made once in a folder."""
    from quantize.convert import convert

    path = Path(folder) / "scout-tiny-F32.gguf"
    if not path.exists():
        convert(TRAINED / "hf", path, "F32")
    return path


def conversations(path, at_least=512):
    """Held-out questions with their answers in the chat format, as ids."""
    from llamacli.files.gguf import open_gguf
    from llamacli.text.tokenizer import Tokenizer

    tokenizer, found = Tokenizer.from_gguf(open_gguf(path)), []
    for line in (TRAINED / "questions.jsonl").read_text().splitlines():
        item = json.loads(line)
        messages = [*item["messages"], {"role": "assistant", "content": item["accept"][0]}]
        text = "".join(f"<|header_start|>{m['role']}<|header_end|>\n\n{m['content']}<|eot|>" for m in messages)
        found.append(np.array(tokenizer.encode(text, bos=True, special=True)))
        if sum(map(len, found)) >= at_least:
            break
    return found


def retype(source, path, types):
    """Copy a GGUF of float tensors, its matrices in other types."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama4")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        plain = values.ndim == 1 or "ffn_gate_inp" in tensor.name
        kind = "F32" if plain else types(tensor.name)
        writer.add_tensor(tensor.name, values if plain else encode(values, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encode(values, kind):
    encoder = {"Q4_K": _q4_k, "Q6_K": _q6_k}.get(kind)
    if encoder is None:
        return quantize(values, gguf.GGMLQuantizationType[kind])
    return encoder(values.reshape(-1, 256)).reshape(*values.shape[:-1], -1)


def _q4_k(x):
    """Blocks of 256: f16 d and dmin, 8 scales and 8 minima of 6 bits, 4-bit weights."""
    groups = x.reshape(len(x), 8, 32)
    low = np.minimum(groups.min(-1), 0)
    scale = (np.maximum(groups.max(-1), 0) - low) / 15
    d = (scale.max(-1) / 63).astype(np.float16)
    dmin = (-low.min(-1) / 63).astype(np.float16)
    sc = np.clip(np.rint(_over(scale, d)), 0, 63).astype(np.uint8)
    mn = np.clip(np.rint(_over(-low, dmin)), 0, 63).astype(np.uint8)
    step = d.astype(np.float32)[:, None] * sc
    shifted = groups + (dmin.astype(np.float32)[:, None] * mn)[..., None]
    q = np.clip(np.rint(np.divide(shifted, step[..., None], out=np.zeros_like(shifted), where=step[..., None] > 0)), 0, 15)
    q = q.astype(np.uint8).reshape(len(x), 4, 2, 32)
    first = sc[:, :4] | (sc[:, 4:] >> 4 << 6), mn[:, :4] | (mn[:, 4:] >> 4 << 6)
    packed = np.concatenate([*first, (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4], 1)
    nibbles = (q[:, :, 0] | q[:, :, 1] << 4).reshape(len(x), 128)
    return np.concatenate([_bytes(d), _bytes(dmin), packed, nibbles], 1)


def _q6_k(x):
    """Blocks of 256: low 4 bits, high 2 bits, 16 scales of 8 bits, f16 d."""
    groups = x.reshape(len(x), 16, 16)
    scale = np.abs(groups).max(-1) / 31
    d = (scale.max(-1) / 127).astype(np.float16)
    sc = np.clip(np.rint(_over(scale, d)), 0, 127).astype(np.int8)
    step = (d.astype(np.float32)[:, None] * sc)[..., None]
    q = np.divide(groups, step, out=np.zeros_like(groups), where=step > 0)
    q = (np.clip(np.rint(q), -32, 31) + 32).astype(np.uint8).reshape(len(x), 2, 4, 32)
    low = np.concatenate([(q[:, :, 0] & 15) | (q[:, :, 2] & 15) << 4, (q[:, :, 1] & 15) | (q[:, :, 3] & 15) << 4], -1)
    high = sum((q[:, :, i] >> 4) << (2 * i) for i in range(4)).astype(np.uint8)
    return np.concatenate([low.reshape(len(x), 128), high.reshape(len(x), 64), sc.view(np.uint8), _bytes(d)], 1)


def _over(values, d):
    d = d.astype(np.float32)[:, None]
    return np.divide(values, d, out=np.zeros_like(values), where=d > 0)


def _bytes(halves):
    return halves.view(np.uint8).reshape(len(halves), 2)


def checksum(path):
    """Of all tensors' bytes."""
    total = 0
    for tensor in gguf.GGUFReader(path).tensors:
        total = zlib.crc32(tensor.data.tobytes(), total)
    return total


def engine_logits(path, sequences):
    """The engine's logits of every position of every sequence, [positions, n_vocab]."""
    from llamacli.engine import Engine
    from llamacli.files.gguf import open_gguf
    from llamacli.llama4.config import Config

    file = open_gguf(path)
    engine = Engine(file, Config.from_gguf(file), threads=2)
    return np.concatenate([engine.forward(ids, engine.new_cache(len(ids)), all_logits=True) for ids in sequences])


def exact_logits(path, sequences):
    """The oracle's, of the same positions."""
    return np.concatenate([oracle.logits(path, ids) for ids in sequences])


def log_probabilities(logits):
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def divergence(exact, logits):
    """KL(exact || logits) of each position, over the whole vocabulary."""
    p, q = log_probabilities(exact), log_probabilities(logits)
    return (np.exp(p) * (p - q)).sum(-1)


def compact(logits):
    """The TOP most likely ids of each position, uint16 and best first, and their log-probabilities, float16."""
    found = log_probabilities(logits)
    ids = np.argsort(-found, -1, kind="stable")[:, :TOP]
    return ids.astype(np.uint16), np.take_along_axis(found, ids, -1).astype(np.float16)


def compare(golden, logits):
    """KL(golden || logits) of each position, over the golden TOP ids and all others as one; and where the best ids agree."""
    ids, kept = golden[0].astype(np.int64), golden[1].astype(np.float64)
    other = np.take_along_axis(log_probabilities(logits), ids, -1)
    rest = [np.maximum(1 - np.exp(side).sum(-1), 1e-9) for side in (kept, other)]
    kl = (np.exp(kept) * (kept - other)).sum(-1) + rest[0] * np.log(rest[0] / rest[1])
    return kl, ids[:, 0] == logits.argmax(-1)
