"""The texts of the block formats: how kernels read weights out of GGUF's bytes. A subset of C for Metal, CUDA and C++.

In: a type's name. Out: its `Format`, whose text defines two functions. A block consists of pieces of 32 weights; a piece is two
runs of 16 weights that follow one another in the row and share a scale and a minimum:

    u32 run(u32 p, u32 r)            the first weight, within the block, of run r (0 or 1) of piece p
    void piece(b, p, q, d, m)        weight i of run r is d[r] * q[16 * r + i] - m[r]; b: the block's bytes

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
INLINE float half_at(const GLOBAL u8* b) { return half_of((u16)two(b)); }
INLINE int signed_byte(u32 v) { return (int)(v & 255) - (int)((v & 128) << 1); }

// 16 bytes: their low nibbles to q[0..15], their high ones to q[16..31]
INLINE void nibbles(const GLOBAL u8* b, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 8; i++) {
    const u32 v = two(b + 2 * i);
    q[2 * i] = (float)(v & 15);
    q[2 * i + 1] = (float)((v >> 8) & 15);
    q[2 * i + 16] = (float)((v >> 4) & 15);
    q[2 * i + 17] = (float)(v >> 12);
  }
}

// adds `unit` to the weights of a run whose bit `shift` is set in 16 bytes
INLINE void bits(const GLOBAL u8* b, u32 shift, float unit, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 8; i++) {
    const u32 v = two(b + 2 * i);
    q[2 * i] += (v >> shift) & 1 ? unit : 0.0f;
    q[2 * i + 1] += (v >> (shift + 8)) & 1 ? unit : 0.0f;
  }
}

// adds 2 bits from `shift` on of each of 16 bytes, times `unit`
INLINE void pairs(const GLOBAL u8* b, u32 shift, float unit, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 8; i++) {
    const u32 v = two(b + 2 * i);
    q[2 * i] += unit * (float)((v >> shift) & 3);
    q[2 * i + 1] += unit * (float)((v >> (shift + 8)) & 3);
  }
}

INLINE void both(float scale, float minimum, LOCAL float* d, LOCAL float* m) {
  d[0] = d[1] = scale;
  m[0] = m[1] = minimum;
}
"""

_ONE_RUN_AFTER_THE_OTHER = """
INLINE u32 run(u32 p, u32 r) { return 32 * p + 16 * r; }
"""

_FIFTH_BITS = """
// the fifth bits of 32 weights, 4 bytes at b, a bit a weight
INLINE void fifths(const GLOBAL u8* b, LOCAL float* q) {
  const u32 h = two(b) | (two(b + 2) << 16);
  UNROLL for (u32 i = 0; i < 32; i++) q[i] += (h >> i) & 1 ? 16.0f : 0.0f;
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

_SIX_BIT_SCALES = """
// runs of piece p: 16 bytes hold weights of two neighbouring groups of 32, low nibbles the first's, high ones the second's
INLINE u32 run(u32 p, u32 r) { return 64 * (p / 2) + 16 * (p % 2) + 32 * r; }

// scale and minimum of group j of 8, six bits each, in 12 bytes at s
INLINE void scale_and_minimum(const GLOBAL u8* s, u32 j, float scale, float minimum, LOCAL float* d, LOCAL float* m) {
  const u32 lower = j < 4;
  const u32 a = lower ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
  const u32 b = lower ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
  *d = scale * (float)a;
  *m = minimum * (float)b;
}

INLINE void scales(const GLOBAL u8* b, u32 p, LOCAL float* d, LOCAL float* m) {
  const float scale = half_at(b), minimum = half_at(b + 2);
  UNROLL for (u32 r = 0; r < 2; r++) scale_and_minimum(b + 4, p / 2 * 2 + r, scale, minimum, d + r, m + r);
}
"""

_TWO_BITS = """
// piece p: bytes 16h to 16h + 15 of half n of the block, of whose four pairs of bits it has numbers j and j + 1
INLINE u32 run(u32 p, u32 r) { return 128 * (p / 4) + 32 * (p % 2 * 2 + r) + 16 * (p / 2 % 2); }
INLINE u32 group(u32 p, u32 r) { return run(p, r) / 16; }

INLINE void quarters(const GLOBAL u8* b, u32 p, LOCAL float* q) {
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = 0.0f;
  UNROLL for (u32 r = 0; r < 2; r++) pairs(b + 32 * (p / 4) + 16 * (p / 2 % 2), 2 * (p % 2 * 2 + r), 1.0f, q + 16 * r);
}
"""

_TEXTS = {
    "Q4_0": _ONE_RUN_AFTER_THE_OTHER
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 2, q);
  both(half_at(b), 8.0f * half_at(b), d, m);
}
""",
    "Q4_1": _ONE_RUN_AFTER_THE_OTHER
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 4, q);
  both(half_at(b), -half_at(b + 2), d, m);
}
""",
    "Q5_0": _ONE_RUN_AFTER_THE_OTHER
    + _FIFTH_BITS
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 6, q);
  fifths(b + 2, q);
  both(half_at(b), 16.0f * half_at(b), d, m);
}
""",
    "Q5_1": _ONE_RUN_AFTER_THE_OTHER
    + _FIFTH_BITS
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 8, q);
  fifths(b + 4, q);
  both(half_at(b), -half_at(b + 2), d, m);
}
""",
    "Q8_0": _ONE_RUN_AFTER_THE_OTHER
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  UNROLL for (u32 i = 0; i < 16; i++) {
    const u32 v = two(b + 2 + 2 * i);
    q[2 * i] = (float)signed_byte(v);
    q[2 * i + 1] = (float)signed_byte(v >> 8);
  }
  both(half_at(b), 0.0f, d, m);
}
""",
    "IQ4_NL": _ONE_RUN_AFTER_THE_OTHER
    + _LEVELS
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  looked_up(b + 2, q);
  both(half_at(b), 0.0f, d, m);
}
""",
    "IQ4_XS": _ONE_RUN_AFTER_THE_OTHER
    + _LEVELS
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  const u32 low = (b[4 + p / 2] >> (4 * (p % 2))) & 15, high = (two(b + 2) >> (2 * p)) & 3;
  looked_up(b + 8 + 16 * p, q);
  both(half_at(b) * (float)((int)(low | (high << 4)) - 32), 0.0f, d, m);
}
""",
    "Q4_K": _SIX_BIT_SCALES
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 16 + 16 * p, q);
  scales(b, p, d, m);
}
""",
    "Q5_K": _SIX_BIT_SCALES
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 48 + 16 * p, q);
  UNROLL for (u32 r = 0; r < 2; r++) bits(b + 16 + 16 * (p % 2), p / 2 * 2 + r, 16.0f, q + 16 * r);
  scales(b, p, d, m);
}
""",
    "Q6_K": """
// piece p: bytes 16h to 16h + 15 of quarter k of the low four bits; low nibbles belong 64 weights before the high ones
INLINE u32 run(u32 p, u32 r) { return 128 * (p / 4) + 16 * (p % 4) + 64 * r; }

INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  nibbles(b + 16 * p, q);
  UNROLL for (u32 r = 0; r < 2; r++) {
    pairs(b + 128 + 32 * (p / 4) + 16 * (p % 2), 2 * (p / 2 % 2) + 4 * r, 16.0f, q + 16 * r);
    d[r] = half_at(b + 208) * (float)signed_byte(b[192 + run(p, r) / 16]);
    m[r] = 32.0f * d[r];
  }
}
""",
    "Q2_K": _TWO_BITS
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  quarters(b + 16, p, q);
  UNROLL for (u32 r = 0; r < 2; r++) {
    d[r] = half_at(b + 80) * (float)(b[group(p, r)] & 15);
    m[r] = half_at(b + 82) * (float)(b[group(p, r)] >> 4);
  }
}
""",
    "Q3_K": _TWO_BITS
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  quarters(b + 32, p, q);
  UNROLL for (u32 r = 0; r < 2; r++) {
    const u32 g = group(p, r);
    bits(b + 16 * (p / 2 % 2), 4 * (p / 4) + p % 2 * 2 + r, 4.0f, q + 16 * r);
    const u32 low = g < 8 ? b[96 + g] & 15 : b[88 + g] >> 4, high = (b[104 + g % 4] >> (2 * (g / 4))) & 3;
    d[r] = half_at(b + 108) * (float)((int)(low | (high << 4)) - 32);
    m[r] = 4.0f * d[r];
  }
}
""",
    "F16": _ONE_RUN_AFTER_THE_OTHER
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = half_at(b + 2 * i);
  both(1.0f, 0.0f, d, m);
}
""",
    "BF16": _ONE_RUN_AFTER_THE_OTHER
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = float_of(two(b + 2 * i) << 16);
  both(1.0f, 0.0f, d, m);
}
""",
    "F32": _ONE_RUN_AFTER_THE_OTHER
    + """
INLINE void piece(const GLOBAL u8* b, u32 p, LOCAL float* q, LOCAL float* d, LOCAL float* m) {
  UNROLL for (u32 i = 0; i < 32; i++) q[i] = float_of(two(b + 4 * i) | (two(b + 4 * i + 2) << 16));
  both(1.0f, 0.0f, d, m);
}
""",
}
PIECE = 32  # weights


def _format(name: str) -> Format:
    kind = BY_NAME[name]
    blocks = max(1, PIECE // kind.block)  # numbers that stand alone are read as blocks of a piece
    return Format(blocks * kind.block, blocks * kind.nbytes, _TEXTS[name])


FORMATS = {name: _format(name) for name in _TEXTS}
