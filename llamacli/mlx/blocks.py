"""The texts of the block formats: how kernels read weights out of GGUF's bytes. A subset of C for Metal, CUDA and C++.

In: a type's name. Out: its `Format`, whose text defines two functions and a constant. A block consists of pieces of 32 weights;
a piece is two runs of 16 weights that follow one another in the row and share a scale and a minimum:

    u32 run(u32 p, u32 r)        the first weight, within the block, of run r (0 or 1) of piece p
    void piece(b, p, q, d, m)    weight i of run r is d[r] * q[16 * r + i] - m[r], where i is even, and
                                 d[r] * ODD * q[16 * r + i] - m[r] where it is odd; b: the block's bytes

ODD lets a byte pair be masked and not shifted: the second byte's values are 256 times too large, and the sum is corrected, not
each weight. In the same way high nibbles are 16 times too large, and the second run's scale corrects that.

kernels.py defines for each language: u8 to u64, INLINE, GLOBAL and LOCAL (address spaces), TABLE, UNROLL (registers hold
arrays only then), `half_of` and `float_of` (bits to numbers). Blocks begin at even addresses, so two bytes are read at a time.
Layouts: ggml's ggml-common.h and ggml-quants.c; the values are compared with gguf-py's.
"""

from typing import NamedTuple

from llamacli.files.ggml import BY_NAME


class Format(NamedTuple):
    """A block's weights and bytes, and the text of `run` and `piece`."""

    block: int
    nbytes: int
    text: str


HELPERS = """
INLINE u32 two(const GLOBAL u8* b) { return *(const GLOBAL u16*)b; }
INLINE u32 four(const GLOBAL u8* b) { return two(b) | (two(b + 2) << 16); }
INLINE float half_at(const GLOBAL u8* b) { return half_of((u16)two(b)); }

INLINE void both(float scale, float minimum, LOCAL float* d, LOCAL float* m) {
  d[0] = d[1] = scale;
  m[0] = m[1] = minimum;
}
"""

_PLAIN = """
#define ODD 1.0f
INLINE u32 run(u32 p, u32 r) { return 32 * p + 16 * r; }
"""

_PAIRED = """
#define ODD 0.00390625f

// 16 bytes: their low nibbles to run 0, their high ones, 16 times too large, to run 1
INLINE void nibbles(const GLOBAL u8* b, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 8; i++) {
    const u32 v = two(b + 2 * i);
    q[2 * i] = (float)(v & 0x000f);
    q[2 * i + 1] = (float)(v & 0x0f00);
    q[2 * i + 16] = (float)(v & 0x00f0);
    q[2 * i + 17] = (float)(v & 0xf000);
  }
}

// adds to a run, times `unit`, a field of each of 16 bytes: what is left by `mask` after a shift
INLINE void fields(const GLOBAL u8* b, u32 shift, u32 mask, float unit, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 8; i++) {
    const u32 v = two(b + 2 * i) >> shift;
    q[2 * i] += unit * (float)(v & mask);
    q[2 * i + 1] += unit * (float)(v & (mask << 8));
  }
}

// d and m of runs with one scale and one minimum, where run 1 is of high nibbles
INLINE void halves(float scale, float minimum, LOCAL float* d, LOCAL float* m) {
  both(scale, minimum, d, m);
  d[1] *= 0.0625f;
}
"""

_OF_32 = (
    _PAIRED
    + """
INLINE u32 run(u32 p, u32 r) { return 32 * p + 16 * r; }
"""
)

_FIFTH_BITS = """
// the fifth bits of 32 weights, 4 bytes at b, a bit a weight
INLINE void fifths(const GLOBAL u8* b, LOCAL float* q) {
  const u32 h = four(b);
  UNROLL for (u32 i = 0; i < 16; i++) {
    const float unit = i % 2 ? 4096.0f : 16.0f;
    q[i] += (h >> i) & 1 ? unit : 0.0f;
    q[i + 16] += (h >> (i + 16)) & 1 ? 16.0f * unit : 0.0f;
  }
}
"""

_LEVELS = """
TABLE float levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE void looked_up(const GLOBAL u8* b, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 8; i++) {
    const u32 v = two(b + 2 * i);
    q[2 * i] = levels[v & 15];
    q[2 * i + 1] = levels[(v >> 8) & 15];
    q[2 * i + 16] = levels[(v >> 4) & 15];
    q[2 * i + 17] = levels[v >> 12];
  }
}
"""

_SIX_BIT_SCALES = (
    _PAIRED
    + """
// runs of piece p: 16 bytes hold weights of two neighbouring groups of 32, low nibbles the first's, high ones the second's
INLINE u32 run(u32 p, u32 r) { return 64 * (p / 2) + 16 * (p % 2) + 32 * r; }

// scales and minima of the groups of piece p, six bits each, in 12 bytes after two halves; without a branch
INLINE void scales(const GLOBAL u8* b, u32 p, LOCAL float* d, LOCAL float* m) {
  const u32 first = four(b + 4), second = four(b + 8), third = four(b + 12);
  UNROLL for (u32 r = 0; r < 2; r++) {
    const u32 j = p / 2 * 2 + r, shift = 8 * (j % 4), upper = 0u - j / 4;  // all bits set for groups 4 to 7
    const u32 low = first >> shift, middle = second >> shift, high = third >> shift;
    const u32 scale = (low & 63 & ~upper) | (((high & 15) | ((low >> 2) & 48)) & upper);
    const u32 minimum = (middle & 63 & ~upper) | ((((high >> 4) & 15) | ((middle >> 2) & 48)) & upper);
    d[r] = half_at(b) * (float)scale;
    m[r] = half_at(b + 2) * (float)minimum;
  }
  d[1] *= 0.0625f;
}
"""
)

_TWO_BITS = (
    _PAIRED
    + """
// piece p: bytes 16h to 16h + 15 of half n of the block, of whose four pairs of bits it has numbers j and j + 1
INLINE u32 run(u32 p, u32 r) { return 128 * (p / 4) + 32 * (p % 2 * 2 + r) + 16 * (p / 2 % 2); }
INLINE u32 group(u32 p, u32 r) { return run(p, r) / 16; }

INLINE void quarters(const GLOBAL u8* b, u32 p, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = 0.0f;
  UNROLL for (u32 r = 0; r < 2; r++) fields(b + 32 * (p / 4) + 16 * (p / 2 % 2), 2 * (p % 2 * 2 + r), 3, 1.0f, q + 16 * r);
}
"""
)

_PIECE = "\nINLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {"
_TEXTS = {
    "Q4_0": _OF_32
    + _PIECE
    + """
  nibbles(b + 2, q);
  halves(half_at(b), 8.0f * half_at(b), d, m);
}
""",
    "Q4_1": _OF_32
    + _PIECE
    + """
  nibbles(b + 4, q);
  halves(half_at(b), -half_at(b + 2), d, m);
}
""",
    "Q5_0": _OF_32
    + _FIFTH_BITS
    + _PIECE
    + """
  nibbles(b + 6, q);
  fifths(b + 2, q);
  halves(half_at(b), 16.0f * half_at(b), d, m);
}
""",
    "Q5_1": _OF_32
    + _FIFTH_BITS
    + _PIECE
    + """
  nibbles(b + 8, q);
  fifths(b + 4, q);
  halves(half_at(b), -half_at(b + 2), d, m);
}
""",
    "Q8_0": _OF_32
    + _PIECE
    + """
  UNROLL for (u32 i = 0; i < 16; i++) {  // signed bytes, made unsigned by 128
    const u32 v = two(b + 2 + 2 * i) ^ 0x8080;
    q[2 * i] = (float)(v & 0x00ff);
    q[2 * i + 1] = (float)(v & 0xff00);
  }
  both(half_at(b), 128.0f * half_at(b), d, m);
}
""",
    "IQ4_NL": _PLAIN
    + _LEVELS
    + _PIECE
    + """
  looked_up(b + 2, q);
  both(half_at(b), 0.0f, d, m);
}
""",
    "IQ4_XS": _PLAIN
    + _LEVELS
    + _PIECE
    + """
  const u32 low = (b[4 + p / 2] >> (4 * (p % 2))) & 15, high = (two(b + 2) >> (2 * p)) & 3;
  looked_up(b + 8 + 16 * p, q);
  both(half_at(b) * (float)((int)(low | (high << 4)) - 32), 0.0f, d, m);
}
""",
    "Q4_K": _SIX_BIT_SCALES
    + _PIECE
    + """
  nibbles(b + 16 + 16 * p, q);
  scales(b, p, d, m);
}
""",
    "Q5_K": _SIX_BIT_SCALES
    + _PIECE
    + """
  nibbles(b + 48 + 16 * p, q);
  fields(b + 16 + 16 * (p % 2), p / 2 * 2, 1, 16.0f, q);
  fields(b + 16 + 16 * (p % 2), p / 2 * 2 + 1, 1, 256.0f, q + 16);
  scales(b, p, d, m);
}
""",
    "Q6_K": _PAIRED
    + """
// piece p: bytes 16h to 16h + 15 of quarter k of the low four bits; low nibbles belong 64 weights before the high ones
INLINE u32 run(u32 p, u32 r) { return 128 * (p / 4) + 16 * (p % 4) + 64 * r; }
"""
    + _PIECE
    + """
  nibbles(b + 16 * p, q);
  UNROLL for (u32 r = 0; r < 2; r++) {
    fields(b + 128 + 32 * (p / 4) + 16 * (p % 2), 2 * (p / 2 % 2) + 4 * r, 3, r ? 256.0f : 16.0f, q + 16 * r);
    const u32 scale = b[192 + run(p, r) / 16];
    d[r] = half_at(b + 208) * (float)((int)scale - (int)((scale & 128) << 1));
    m[r] = 32.0f * d[r];
  }
  d[1] *= 0.0625f;
}
""",
    "Q2_K": _TWO_BITS
    + _PIECE
    + """
  quarters(b + 16, p, q);
  UNROLL for (u32 r = 0; r < 2; r++) {
    d[r] = half_at(b + 80) * (float)(b[group(p, r)] & 15);
    m[r] = half_at(b + 82) * (float)(b[group(p, r)] >> 4);
  }
}
""",
    "Q3_K": _TWO_BITS
    + _PIECE
    + """
  quarters(b + 32, p, q);
  UNROLL for (u32 r = 0; r < 2; r++) {
    const u32 g = group(p, r);
    fields(b + 16 * (p / 2 % 2), 4 * (p / 4) + p % 2 * 2 + r, 1, 4.0f, q + 16 * r);
    const u32 low = (b[96 + g % 8] >> (4 * (g / 8))) & 15, high = (b[104 + g % 4] >> (2 * (g / 4))) & 3;
    d[r] = half_at(b + 108) * (float)((int)(low | (high << 4)) - 32);
    m[r] = 4.0f * d[r];
  }
}
""",
    "F16": _PLAIN
    + _PIECE
    + """
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = half_at(b + 2 * i);
  both(1.0f, 0.0f, d, m);
}
""",
    "BF16": _PLAIN
    + _PIECE
    + """
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = float_of(two(b + 2 * i) << 16);
  both(1.0f, 0.0f, d, m);
}
""",
    "F32": _PLAIN
    + _PIECE
    + """
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = float_of(four(b + 4 * i));
  both(1.0f, 0.0f, d, m);
}
""",
}
PIECE = 32  # weights


def _format(name: str) -> Format:
    kind = BY_NAME[name]
    blocks = max(1, PIECE // kind.block)  # float types are read as blocks of one piece
    return Format(blocks * kind.block, blocks * kind.nbytes, _TEXTS[name])


FORMATS = {name: _format(name) for name in _TEXTS}
