"""Ask llama-quantize which type each tensor gets, for tests/quantizer/test_recipe.py: writes recipes.json beside this file.

    python tests/golden/make_recipes.py path/to/llama-quantize

In: miniatures and the real shapes of Llama 4, as F16 files that have a header and a hole where the weights would be, so that
they take no room; only --dry-run reads them. Out: for every case and recipe the types that `packed` makes short; with an
importance matrix only where that changes something. Made with llama.cpp's commit 0c1e570.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipe_cases import CASES, RECIPES, packed, shapes

ROW = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .* type = +(\w+), size = .*?(?:-> .*\((\w+)\))?$", re.M)


def write_hollow(path, case):
    """An F16 file of the case's shapes whose weights are a hole."""
    writer = gguf.GGUFWriter(path, "llama4")
    writer.add_block_count(case["layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(case["hidden"])
    writer.add_feed_forward_length(case["dense"])
    writer.add_head_count(case["heads"])
    writer.add_head_count_kv(case["kv_heads"])
    writer.add_key_length(case["head"])
    writer.add_value_length(case["head"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(case["experts"])
    writer.add_expert_used_count(min(1, case["experts"]))
    writer.add_expert_feed_forward_length(case["expert"])
    writer.add_interleave_moe_layer_step(case["step"])
    for name, shape in shapes(case).items():
        full = len(shape) == 1 or "ffn_gate_inp" in name
        dtype = np.dtype(np.float32 if full else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        step()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 64 + 4 * sum(-(-int(np.prod(shape)) // 8) * 8 for shape in shapes(case).values()))


def write_imatrix(path):
    """An importance matrix of a tensor that no model has."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("nothing.in_sum2", np.ones((1, 32), np.float32))
    writer.add_tensor("nothing.counts", np.ones((1, 1), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def answers(tool, model, recipe, imatrix):
    """Type by tensor name, as llama-quantize prints its plan."""
    command = [tool, *(["--imatrix", imatrix] if imatrix else []), "--dry-run", model, recipe, "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    return {name: (after or before).upper() for name, before, after in ROW.findall(done.stdout + done.stderr)}


if __name__ == "__main__":
    golden = {}
    with tempfile.TemporaryDirectory() as folder:
        model, imatrix = Path(folder) / "model.gguf", Path(folder) / "imatrix.gguf"
        write_imatrix(imatrix)
        for name, case in CASES.items():
            write_hollow(model, case)
            for recipe in RECIPES:
                plain, weighted = (packed(answers(sys.argv[1], model, recipe, matrix)) for matrix in (None, imatrix))
                golden.setdefault(name, {})[recipe] = plain
                if weighted != plain:
                    golden[name][f"{recipe} imatrix"] = weighted
    text = json.dumps(golden, indent=1)
    text = re.sub(r"\{\s+([^{}]+?)\s+\}", lambda found: "{" + re.sub(r",\s+", ", ", found[1]) + "}", text)
    Path(__file__).with_name("recipes.json").write_text(text + "\n")
