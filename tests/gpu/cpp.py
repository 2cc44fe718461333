"""The GPU's kernels compiled as C++: a Dialect that stands in for Metal's on a machine without a GPU.

In: what kernels.py would give to `mx.fast.metal_kernel`. Out: an object that is called as that is, and computes at once. It
shows what a text means, not what Metal's compiler makes of it. The 32 lanes run one after the other, twice: first the values
given to each call of `lane_sum` are added up, then the lanes that write run again and are given the sums. This is right since
no lane's way through a kernel depends on a sum.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from llamacli.mlx.kernels import Dialect

COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
HEADER = """
#include <stdint.h>
#define memcpy __builtin_memcpy  // the headers that declare these three take longer to compile than a kernel
#define expf __builtin_expf
#define sqrtf __builtin_sqrtf
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef _Float16 f16;
#define INLINE static inline
#define GLOBAL
#define LOCAL
#define TABLE static const
#define UNROLL
INLINE float half_of(u16 v) { f16 h; memcpy(&h, &v, 2); return (float)h; }
INLINE float float_of(u32 v) { float f; memcpy(&f, &v, 4); return f; }
INLINE float exp_of(float v) { return expf(v); }
INLINE float root_of(float v) { return sqrtf(v); }
static float lane_sums[64];
static u32 lane_call;
static bool lane_replay;
INLINE float lane_sum(float v) {
  if (lane_replay) return lane_sums[lane_call++];
  lane_sums[lane_call++] += v;
  return 0.0f;
}
"""
TYPES = {"uint8": "uint8_t", "int32": "int32_t", "int64": "int64_t", "float32": "float", "float16": "f16"}


def named(dtype):
    return str(dtype).split(".")[-1]


class Kernel:
    """Called as what mx.fast.metal_kernel returns."""

    def __init__(self, name, input_names, output_names, source, header):
        self.inputs, self.outputs, self.source, self.header, self.calls = input_names, output_names, source, header, 0

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes, template=()):
        self.calls += 1
        assert 0 < grid[0] < 1 << 31, "CUDA's limits of grids, which are those of threads here"
        assert 0 < grid[1] <= 65535
        assert grid[2] == 1
        found = [np.ascontiguousarray(np.array(array, copy=False)) for array in inputs]
        made = [np.full(shape, 77, np.dtype(named(dtype))) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        parameters = [f"const {TYPES[a.dtype.name]}* {name}" for a, name in zip(found, self.inputs, strict=True)]
        parameters += [f"{TYPES[a.dtype.name]}* {name}" for a, name in zip(made, self.outputs, strict=True)]
        constants = "".join(
            f"static const int {name} = {value};\n" if isinstance(value, int) else f"typedef {TYPES[named(value)]} {name};\n"
            for name, value in template
        )
        run = compiled(self.header, constants, ", ".join(parameters), self.source, ", ".join((*self.inputs, *self.outputs)))
        run(*(ctypes.c_void_p(a.ctypes.data) for a in (*found, *made)), ctypes.c_uint(grid[0]), ctypes.c_uint(grid[1]))
        return [mx.array(a) for a in made]


@cache
def compiled(header, constants, parameters, source, names):
    replayed = 1 if "lane == 0" in source else 32  # lanes that write
    text = f"""{header}
{constants}
static void body({parameters}, const u32 at_x, const u32 at_y) {{
{source}
}}
extern "C" void run({parameters}, u32 grid_x, u32 grid_y) {{
  for (u32 at_y = 0; at_y < grid_y; at_y++)
    for (u32 at_x = 0; at_x < grid_x; at_x += 32) {{
      __builtin_memset(lane_sums, 0, sizeof lane_sums);
      lane_replay = false;
      for (u32 lane = 0; lane < 32 && at_x + lane < grid_x; lane++) {{ lane_call = 0; body({names}, at_x + lane, at_y); }}
      const bool lane_used = lane_call;
      lane_replay = true;
      for (u32 lane = 0; lane < (lane_used ? {replayed} : 0); lane++) {{ lane_call = 0; body({names}, at_x + lane, at_y); }}
    }}
}}
"""
    stem = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = Path(tempfile.mkdtemp())
    (folder / f"{stem}.cpp").write_text(text)
    library = folder / f"{stem}.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unused-function", "-Wno-unused-variable", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, "-o", library, folder / f"{stem}.cpp"], check=True)
    found = ctypes.CDLL(library).run
    shutil.rmtree(folder)
    return found


def dialect():
    return Dialect(HEADER, "", Kernel)


def forget(kernels):
    """Have kernels made anew, since the dialect has changed."""
    kernels._kernel.cache_clear()
    kernels._heads_kernel.cache_clear()
