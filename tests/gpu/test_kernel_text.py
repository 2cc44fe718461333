"""The kernels' texts compile for Metal and CUDA, as far as clang can check this without Apple's and NVIDIA's headers. What the
texts use of these is declared here.

Metal is checked as OpenCL, which has the same address spaces. OpenCL C 1.2 shows that every pointer names its own, as in Metal;
C++ for OpenCL reads the exact text that Metal is given, in the function that MLX writes around it. CUDA is checked by clang's
CUDA for the device side.
"""

import pytest
from clang import cindex
from installed import needed

needed("mlx.core")

from llamacli.mlx import kernels  # noqa: E402
from llamacli.mlx.blocks import FORMATS, HELPERS  # noqa: E402

TYPES = """
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef unsigned char uchar; typedef unsigned short ushort; typedef unsigned int uint; typedef unsigned long ulong;
typedef uint uint3 __attribute__((ext_vector_type(3)));
"""
OPENCL = """
typedef uchar u8; typedef ushort u16; typedef uint u32; typedef ulong u64; typedef half f16;
#define INLINE static inline
#define GLOBAL __global
#define LOCAL __private
#define TABLE __constant
#define UNROLL
#define ROWS 4
#define TOKENS 2
INLINE float half_of(u16 v) { return (float)__builtin_astype(v, half); }
INLINE float float_of(u32 v) { return __builtin_astype(v, float); }
float lane_sum(float v);
float exp_of(float v);
float root_of(float v);
typedef half T;
"""
APPLE = """
#define device __global
#define thread __private
#define constant __constant
typedef uchar uint8_t; typedef int int32_t; typedef long int64_t;
namespace metal { float simd_sum(float); float exp(float); float sqrt(float); }
template <class A, class B> A as_type(B b) { return __builtin_astype(b, A); }
"""
NVIDIA = """
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __forceinline__ __inline__ __attribute__((always_inline))
typedef unsigned char uint8_t; typedef int int32_t; typedef long int64_t;
struct __half { unsigned short bits; __half() = default; __device__ __half(float); };
struct Position { unsigned x, y, z; };
extern __device__ Position blockIdx, blockDim, threadIdx;
__device__ float __half2float(__half);
__device__ __half __ushort_as_half(unsigned short);
__device__ float __uint_as_float(unsigned);
__device__ float expf(float);
__device__ float sqrtf(float);
typedef __half T;
__device__ float __shfl_xor_sync(unsigned, float, int);
"""
SIGNATURES = {  # what MLX writes for inputs of these names
    "matvec": "const device uint8_t* w, const constant int64_t* place, const {experts} int32_t* experts, "
    "const device float* x, device float* y",
    "gated": "const device uint8_t* w, const constant int64_t* place, const {experts} int32_t* experts, "
    "const device float* x, const device uint8_t* up, const constant int64_t* up_place, const {experts} float* scores, "
    "device float* y",
    "added": "const device uint8_t* w, const constant int64_t* place, const {experts} int32_t* experts, "
    "const device float* x, const device float* base, device float* y",
    "heads": "const device float* x, const {experts} float* cosines, const {experts} float* sines, "
    "const {experts} float* scales, const constant int32_t* sizes, const constant float* eps, device half* y",
    "widen": "const device uint8_t* w, const constant int64_t* place, const {experts} int32_t* experts, device half* y",
}


CASES = [(name, kind) for name in FORMATS for kind in SIGNATURES if kind != "heads"] + [("F32", "heads")]
OPTIONS = {
    "cl": ["-target", "spir64", "-cl-no-stdinc"],
    "cuda": [
        "-std=c++17",
        "-nocudainc",
        "-nocudalib",
        "--cuda-device-only",
        "--cuda-gpu-arch=sm_75",
        "-Wno-unknown-cuda-version",
    ],
}


def complaints(text, language, *more):
    args = ["-x", language, *OPTIONS[language], *more, "-Wall", "-Wno-unused-function", "-Wno-unused-variable"]
    unit = cindex.Index.create().parse("kernel.txt", args=args, unsaved_files=[("kernel.txt", text)])
    return [f"{found.location.line}: {found.spelling}" for found in unit.diagnostics if found.severity >= found.Warning]


def sizes(name):
    return f"#define BLOCK {FORMATS[name].block}\n#define NBYTES {FORMATS[name].nbytes}\n{HELPERS}{FORMATS[name].text}"


def as_opencl(name, kind, signature):
    signature = signature.format(experts="constant").replace("const constant", "const __constant").replace("device", "__global")
    for apple, own in (("uint8_t", "u8"), ("int64_t", "long"), ("int32_t", "int")):
        signature = signature.replace(apple, own)
    positions = "const u32 at_x = 0, at_y = 0;"
    return f"{TYPES}{OPENCL}{sizes(name)}\n__kernel void k({signature}) {{ {positions} {kernels.BODIES[kind]} }}"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_pointer_has_its_address_space(name, kind):
    assert complaints(as_opencl(name, kind, SIGNATURES[kind]), "cl", "-cl-std=CL1.2") == []


@pytest.mark.parametrize("experts", ["constant", "device"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_metal_is_given_is_read_without_a_complaint(name, kind, experts):
    header = kernels.METAL.replace("#include <metal_stdlib>", "")
    function = f"void k({SIGNATURES[kind].format(experts=experts)}, uint3 thread_position_in_grid)"
    body = f"{{ {kernels.METAL_PROLOGUE} {kernels.BODIES[kind]} }}"
    text = f"{TYPES}{APPLE}{header}{sizes(name)}\ntypedef half T;\ntemplate <int ROWS, int TOKENS> {function} {body}\n"
    text += f"template {function.replace(' k(', ' k<4, 2>(', 1)};"
    assert complaints(text, "cl", "-cl-std=clc++2021") == []


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_cuda_is_given_is_read_without_a_complaint(name, kind):
    header = kernels.CUDA.replace("#include <cuda_fp16.h>", "")
    signature = (
        SIGNATURES[kind].format(experts="device").replace("device ", "").replace("constant ", "").replace("half", "__half")
    )
    body = f"{{ constexpr int ROWS = 4; constexpr int TOKENS = 2; {kernels.CUDA_PROLOGUE} {kernels.BODIES[kind]} }}"
    assert complaints(f"{NVIDIA}{header}{sizes(name)}\n__global__ void k({signature}) {body}", "cuda") == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("const GLOBAL float* rows", "const float* rows", "address space"),
        ("float q[32], d[2], m[2];", "float q[32], d[2];", "undeclared identifier 'm'"),
        ("LOCAL float* q)", "GLOBAL float* q)", "address space"),
    ],
)
def test_an_error_in_a_text_is_found(right, wrong, words):
    text = as_opencl("Q4_K", "matvec", SIGNATURES["matvec"])
    assert right in text
    assert any(words in found for found in complaints(text.replace(right, wrong), "cl", "-cl-std=CL1.2"))
