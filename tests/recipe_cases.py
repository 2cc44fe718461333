"""Models for the comparison of recipes with llama-quantize's: names and shapes, without weights.

In: a row of CASES. Out: GGUF names and shapes in NumPy's order; types by name in a compact form.
"""

import re
from itertools import groupby

FIELDS = ["vocab", "layers", "hidden", "expert", "dense", "heads", "kv_heads", "head", "experts", "step", "tied"]
CASES = {
    name: dict(zip(FIELDS, row, strict=True))
    for name, row in {
        "Scout": (202048, 48, 5120, 8192, 16384, 40, 8, 128, 16, 1, False),
        "Maverick": (202048, 48, 5120, 8192, 16384, 40, 8, 128, 128, 2, False),
        "4 layers": (1024, 4, 256, 256, 512, 4, 2, 64, 16, 1, False),
        "8 layers, every other dense": (1024, 8, 256, 512, 256, 4, 1, 64, 128, 2, False),
        "24 layers, tied": (1024, 24, 512, 256, 256, 4, 2, 128, 16, 1, True),
        "24 layers, every other dense, 8 experts": (1024, 24, 256, 256, 256, 4, 2, 64, 8, 2, False),
        "17 layers, every third dense, rows of 32s": (1024, 17, 96, 160, 288, 3, 1, 32, 4, 3, False),
        "5 layers, rows of no block, tied": (1024, 5, 40, 48, 72, 2, 1, 20, 16, 1, True),
        "6 layers, no experts": (1024, 6, 256, 256, 256, 2, 2, 128, 0, 1, False),
    }.items()
}
RECIPES = [
    *(
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q5_K_S",
        "Q5_1",
        "Q5_0",
        "Q4_K_M",
        "Q4_K_S",
        "Q4_1",
        "Q4_0",
        "IQ4_NL",
        "IQ4_XS",
    ),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S"),
]


def packed(types):
    """Types by tensor name, inverted: runs of types over the layers ("Q6_K*6 Q4_K*2") to the kinds of tensors with them."""
    kinds, runs = {}, {}
    for name in sorted(types, key=lambda name: [int(n) for n in re.findall(r"(?<=blk\.)\d+", name)]):
        kinds.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), []).append(types[name])
    for kind, found in sorted(kinds.items()):
        runs.setdefault(" ".join(f"{name}*{len(list(run))}" for name, run in groupby(found)), []).append(kind)
    return {run: " ".join(names) for run, names in runs.items()}


def shapes(case):
    """Every tensor of a text model of Llama 4, in the order of a converted file."""
    h, e, d, n = case["hidden"], case["expert"], case["dense"], case["experts"]
    q, kv = case["heads"] * case["head"], case["kv_heads"] * case["head"]
    found = {"token_embd.weight": (case["vocab"], h)}
    for i in range(case["layers"]):
        layer = {"attn_norm": (h,), "attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, q)}
        layer["ffn_norm"] = (h,)
        if n and (i + 1) % case["step"] == 0:
            layer["ffn_gate_inp"] = (n, h)
            layer |= {"ffn_gate_exps": (n, e, h), "ffn_up_exps": (n, e, h), "ffn_down_exps": (n, h, e)}
            layer |= {"ffn_gate_shexp": (e, h), "ffn_up_shexp": (e, h), "ffn_down_shexp": (h, e)}
        else:
            layer |= {"ffn_gate": (d, h), "ffn_up": (d, h), "ffn_down": (h, d)}
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    found["output_norm.weight"] = (h,)
    return found if case["tied"] else found | {"output.weight": (case["vocab"], h)}
