"""A thin layer over llvmlite's IR builder in which the microkernels are written.

`Simd` builds one function. Vectors are `target.width` bytes; LLVM splits them where registers are narrower. What differs
between CPUs are `dot4`, `dot8` and `lookup`; everything else is portable IR.
"""

from llvmlite import ir

i1, i8, i16, i32, i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
f16, f32 = ir.HalfType(), ir.FloatType()


def vec(element, n):
    """The vector type of `n` elements."""
    return ir.VectorType(element, n)


class Simd:
    """One `void name(i64, ...)` function under construction in `module`."""

    def __init__(self, module, target, name: str, n_args: int):
        self.target, self.module = target, module
        self.width, self.lanes = target.width, target.lanes
        self.fn = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * n_args), name)
        self.b = ir.IRBuilder(self.fn.append_basic_block())
        self.args = self.fn.args

    def done(self):
        """Close the function."""
        self.b.ret_void()

    # constants and shapes

    def int(self, value):
        """A 64-bit constant."""
        return value if isinstance(value, ir.Value) else i64(value)

    def fill(self, element, n, value):
        """A constant vector."""
        return ir.Constant(vec(element, n), [value] * n)

    def zeros(self, element=f32, n=None):
        """A vector of zeros, one register wide by default."""
        return self.fill(element, n or self.lanes, 0)

    def shuffle(self, a, lanes, b=None):
        """Pick `lanes` of a (and b, whose lanes count on)."""
        return self.b.shuffle_vector(
            a, ir.Constant(a.type, ir.Undefined) if b is None else b, ir.Constant(vec(i32, len(lanes)), lanes)
        )

    def concat(self, a, b):
        """Both vectors one after the other; they are of one type."""
        return self.shuffle(a, list(range(2 * a.type.count)), b)

    def joined(self, vectors):
        """All vectors one after the other; a power of two, of one type."""
        while len(vectors) > 1:
            vectors = [self.concat(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def vector(self, scalars):
        """The scalars as a vector, inserted into zeros: an insertion into an undefined register waits for its old value."""
        v = self.zeros(scalars[0].type, len(scalars))
        for k, scalar in enumerate(scalars):
            v = self.b.insert_element(v, scalar, i32(k))
        return v

    def splat(self, scalar, n=None):
        """The scalar in every lane."""
        n = n or self.lanes
        v = self.b.insert_element(ir.Constant(vec(scalar.type, n), ir.Undefined), scalar, i32(0))
        return self.shuffle(v, [0] * n)

    def bits(self, v, element):
        """The same bits as a vector of another element."""
        return self.b.bitcast(v, vec(element, v.type.count * _bits(v.type.element) // _bits(element)))

    def each(self, element, values):
        """A constant vector of these values."""
        return ir.Constant(vec(element, len(values)), values)

    # memory

    def add(self, a, b):
        """Integer addition of addresses and offsets."""
        return self.b.add(a, self.int(b))

    def mul(self, a, b):
        """Integer product."""
        return self.b.mul(a, self.int(b))

    def load(self, type_, address, offset=0):
        """A value of `type_` at address + offset, of any alignment."""
        value = self.b.load(self.b.inttoptr(self.add(address, offset), type_.as_pointer()))
        value.align = 1
        return value

    def store(self, value, address, offset=0):
        """Write a value at address + offset, of any alignment."""
        self.b.store(value, self.b.inttoptr(self.add(address, offset), value.type.as_pointer()), align=1)

    def room(self, element, n):
        """The address of stack space for n elements; to be asked for at a function's start."""
        return self.b.ptrtoint(self.b.alloca(vec(element, n)), i64)

    def prefetch(self, address, distance, nbytes, level=1):
        """Ask for the lines of `nbytes` bytes that lie `distance` ahead, into the cache of this level, 1 or 2."""
        fn = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), i8.as_pointer(), i32, i32, i32)
        for line in range(0, nbytes, 64):
            at = self.add(self.add(address, distance), line)
            self.b.call(fn, [self.b.inttoptr(at, i8.as_pointer()), i32(0), i32(4 - level), i32(1)])

    # control

    def loop(self, count, values, body, start=0):
        """`values = body(i, values)` for i in range(start, count); returns the last values. Zero rounds are fine."""
        before = self.b.block
        head, inside, after = (self.fn.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        i = self.b.phi(i64)
        i.add_incoming(self.int(start), before)
        phis = [self.b.phi(v.type) for v in values]
        for phi, v in zip(phis, values, strict=True):
            phi.add_incoming(v, before)
        self.b.cbranch(self.b.icmp_signed("<", i, self.int(count)), inside, after)
        self.b.position_at_end(inside)
        new = body(i, phis)
        i.add_incoming(self.add(i, 1), self.b.block)
        for phi, v in zip(phis, new, strict=True):
            phi.add_incoming(v, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return phis

    # arithmetic

    def fma(self, a, b, c):
        """a * b + c, one rounding where the CPU has it."""
        if self.target.dot == "plain" and self.target.triple.startswith("x86"):
            return self.b.fadd(self.b.fmul(a, b), c)  # SSE2 has no fma, and a library call for each lane would be worse
        return self.b.call(self._intrinsic(f"llvm.fma.{_name(a.type)}", a.type, a.type, a.type, a.type), [a, b, c])

    def fmax(self, a, b):
        """The larger, lane by lane."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def fmin(self, a, b):
        """The smaller, lane by lane."""
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def fabs(self, a):
        """Absolute value."""
        return self.b.call(self._intrinsic(f"llvm.fabs.{_name(a.type)}", a.type, a.type), [a])

    def to_float(self, v):
        """Signed integers to float32."""
        return self.b.sitofp(v, vec(f32, v.type.count) if isinstance(v.type, ir.VectorType) else f32)

    def round(self, v):
        """float32 to the nearest int32 by the magic-number addition: exact for |v| < 2**22, ties to even."""
        magic = self.fill(f32, v.type.count, 12582912.0)
        return self.b.sub(self.bits(self.b.fadd(v, magic), i32), self.bits(magic, i32))

    def unsigned(self, v, element=i32):
        """Widen unsigned integers."""
        return self.b.zext(v, vec(element, v.type.count))

    def signed(self, v, element=i32):
        """Widen signed integers."""
        return self.b.sext(v, vec(element, v.type.count))

    def rotate(self, v, counts):
        """Each integer lane turned right by its count of bits."""
        name = f"llvm.fshr.v{v.type.count}i{v.type.element.width}"
        return self.b.call(self._intrinsic(name, *[v.type] * 4), [v, v, ir.Constant(v.type, counts)])

    def sum(self, v):
        """All lanes of a float vector added."""
        fn = self._intrinsic(f"llvm.vector.reduce.fadd.{_name(v.type)}", f32, f32, v.type)
        return self.b.call(fn, [ir.Constant(f32, -0.0), v], fastmath=("reassoc",))

    def reduce_max(self, v):
        """The largest lane of a float vector without NaN."""
        while v.type.count > 1:
            n = v.type.count // 2
            v = self.fmax(self.shuffle(v, list(range(n))), self.shuffle(v, list(range(n, 2 * n))))
        return self.b.extract_element(v, i32(0))

    def exp(self, v):
        """e**v to about 2 ulp for v <= 88; below -87 it is 0."""
        n = v.type.count
        c = lambda x: self.fill(f32, n, x)
        tiny = self.b.fcmp_ordered("<", v, c(-87.0))
        t = self.b.fmul(v, c(1.4426950408889634))
        whole = self.round(self.b.select(tiny, c(0.0), t))
        k = self.to_float(whole)
        r = self.fma(
            k, c(-0.693145751953125), v
        )  # ln 2 in two parts, so that the remainder keeps its low bits (Cody and Waite)
        r = self.fma(k, c(-1.428606765330187e-06), r)
        p = c(1 / 5040)
        for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = self.fma(p, r, c(term))
        scale = self.bits(self.b.shl(self.b.add(whole, self.fill(i32, n, 127)), self.fill(i32, n, 23)), f32)
        return self.b.select(tiny, c(0.0), self.b.fmul(p, scale))

    # half precision

    def from_half(self, v):
        """float16 (as half values) to float32; infinities and NaN are kept only where the CPU has the conversion."""
        scalar = not isinstance(v.type, ir.VectorType)
        if self.target.half:
            return self.b.fpext(v, f32 if scalar else vec(f32, v.type.count))
        if scalar:
            v = self.splat(v, 1)
        n = v.type.count
        h = self.unsigned(self.bits(v, i16))
        magnitude = self.b.shl(self.b.and_(h, self.fill(i32, n, 0x7FFF)), self.fill(i32, n, 13))
        value = self.b.fmul(self.bits(magnitude, f32), self.fill(f32, n, 2.0**112))
        sign = self.b.shl(self.b.and_(h, self.fill(i32, n, 0x8000)), self.fill(i32, n, 16))
        value = self.bits(self.b.or_(self.bits(value, i32), sign), f32)
        return self.b.extract_element(value, i32(0)) if scalar else value

    def splat_half(self, address, offset, n):
        """The half float at address + offset in n float32 lanes."""
        if self.width == 64 or not self.target.half:
            return self.splat(self.from_half(self.load(f16, address, offset)), n)
        eight = self.from_half(self.bits(self.splat(self.load(i16, address, offset), 8), f16))
        return self.shuffle(eight, [0] * n)

    def to_half(self, v):
        """float32 to float16, nearest even; beyond the range it becomes infinity."""
        n = v.type.count
        if self.target.half:
            return self.b.fptrunc(v, vec(f16, n))
        c = lambda x: self.fill(i32, n, x)
        raw = self.bits(v, i32)
        magnitude = self.b.and_(raw, c(0x7FFFFFFF))
        odd = self.b.and_(self.b.lshr(magnitude, c(13)), c(1))
        normal = self.b.sub(self.b.lshr(self.b.add(self.b.add(magnitude, c(0xFFF)), odd), c(13)), c(112 << 10))
        small = self.b.sub(self.bits(self.b.fadd(self.bits(magnitude, f32), self.fill(f32, n, 0.5)), i32), c(0x3F000000))
        h = self.b.select(self.b.icmp_unsigned("<", magnitude, c(113 << 23)), small, normal)
        h = self.b.select(self.b.icmp_unsigned(">", magnitude, c(0x477FEFFF)), c(0x7C00), h)
        h = self.b.or_(h, self.b.and_(self.b.lshr(raw, c(16)), c(0x8000)))
        return self.bits(self.b.trunc(h, vec(i16, n)), f16)

    # operations that are each CPU's own

    def lookup(self, table, index):
        """table[index] for 16 bytes and an <n x i8> index below 16."""
        n = index.type.count
        if self.target.triple.startswith("x86_64") and self.target.dot != "plain":
            fn = self._intrinsic({32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}[n], *[index.type] * 3)
            return self.b.call(fn, [ir.Constant(index.type, [*table] * (n // 16)), index])
        if self.target.neon:
            fn = self._intrinsic("llvm.aarch64.neon.tbl1.v16i8", vec(i8, 16), vec(i8, 16), vec(i8, 16))
            levels = ir.Constant(vec(i8, 16), list(table))
            halves = [self.b.call(fn, [levels, self.shuffle(index, list(range(k, k + 16)))]) for k in range(0, n, 16)]
            return self.concat(*halves)
        value = self.fill(i8, n, table[0])
        for k in range(1, 16):
            value = self.b.select(self.b.icmp_unsigned("==", index, self.fill(i8, n, k)), self.fill(i8, n, table[k]), value)
        return value

    def dot4(self, acc, u, s, largest=127):
        """acc[l] + sum of u[4l+j] * s[4l+j] over j < 4: unsigned bytes times signed bytes into int32 lanes.

        `largest` is the largest u; up to 127 the cheaper saturating forms are safe. Where the CPU multiplies signed bytes
        only (sdot), u is taken as signed too, and must not exceed 127.
        """
        n, kind, wide = u.type.count, self.target.dot, largest > 127
        if kind == "vnni":
            return self._vpdpbusd(acc, u, s)
        if kind == "maddubs" and not wide:
            return self.b.add(acc, self.widen_pairs(self.pairs(u, s), self.fill(i16, n // 2, 1)))
        if kind == "maddubs":  # even and odd bytes apart, in 16 bits: nothing can saturate
            eight, name = self.fill(i16, n // 2, 8), {64: "avx512.pmaddw.d.512", 32: "avx2.pmadd.wd"}[n]
            u16, s16 = self.bits(u, i16), self.bits(s, i16)
            madd = self._intrinsic(f"llvm.x86.{name}", acc.type, u16.type, u16.type)
            even = self.b.and_(u16, self.fill(i16, n // 2, 255)), self.b.ashr(self.b.shl(s16, eight), eight)
            odd = self.b.lshr(u16, eight), self.b.ashr(s16, eight)
            return self.b.add(acc, self.b.add(self.b.call(madd, even), self.b.call(madd, odd)))
        if kind in ("usdot", "sdot"):
            assert not wide or kind == "usdot", "sdot takes bytes as signed"
            return self._neon(kind, acc, u, s)
        products = self.b.mul(self.unsigned(u), self.signed(s))
        for j in range(4):
            acc = self.b.add(acc, self.shuffle(products, list(range(j, n, 4))))
        return acc

    def products(self, us, ss, largest, signed=False):
        """The sum of dot4 over the vectors `us` times `ss`: int32 lanes.

        `signed` says that u is signed. Where products of bytes come in 16 bits, they are added there as long as they fit.
        """
        n, total = us[0].type.count, None
        if self.target.dot != "maddubs" or (largest > 127 and not signed):
            total = self.fill(i32, n // 4, 0)
            for u, x in zip(us, ss, strict=True):
                total = self.dot4(total, u, x, largest)
            return total
        run = 1 if signed else max(1, self.fits(largest))
        for k in range(0, len(us), run):
            short = None
            for u, x in zip(us[k : k + run], ss[k : k + run], strict=True):
                pair = self.signed_pairs(u, x) if signed else self.pairs(u, x)
                short = pair if short is None else self.b.add(short, pair)
            wide = self.widen_pairs(short, self.fill(i16, n // 2, 1))
            total = wide if total is None else self.b.add(total, wide)
        return total

    def sums_of_fours(self, four, doublings=0):
        """In each 4 lanes of 32 bits the sum of these lanes of the first of `four` vectors, then those of the others.

        int16 lanes are added as pairs and widened to int32: at once, or after the sums have doubled one or two times.
        """
        n = four[0].type.count // (2 if four[0].type.element == i16 else 1)
        if self.target.neon:  # adds neighbours in one instruction
            rounds = [((0, 2, n, n + 2), (1, 3, n + 1, n + 3))] * 2
        else:  # no neighbours: of these LLVM makes `hadd`, which takes three micro-operations on x86 and is slow on AMD
            rounds = [((0, n, 1, n + 1), (2, n + 2, 3, n + 3)), ((0, 1, n, n + 1), (2, 3, n + 2, n + 3))]
        for k, picks in enumerate(rounds):
            if k == doublings:
                four = [self._widened(v) for v in four]
            four = [self._add_lanes(a, b, picks) for a, b in zip(four[::2], four[1::2], strict=True)]
        return self._widened(four[0])

    def _add_lanes(self, a, b, picks):
        """Two selections of 32-bit lanes of a and b, added. `picks` says which lanes of each four are selected."""
        element = a.type.element
        add, word = (self.b.fadd, f32) if element == f32 else (self.b.add, i32)
        a, b = self.bits(a, word), self.bits(b, word)
        lanes = [[q + k for q in range(0, a.type.count, 4) for k in pick] for pick in picks]
        return add(*(self.bits(self.shuffle(a, at, b), element) for at in lanes))

    def _widened(self, v):
        """Pairs of int16 added to int32; other vectors as they are."""
        return self.widen_pairs(v, self.fill(i16, v.type.count, 1)) if v.type.element == i16 else v

    @staticmethod
    def fits(largest):
        """How many `pairs` of codes up to `largest` can be added in 16 bits; activations reach 127."""
        return 32767 // (2 * 127 * largest)

    def pairs(self, u, s):
        """u[2l] * s[2l] + u[2l+1] * s[2l+1] in int16 lanes, saturating; only on x86 from AVX2 on."""
        name = {64: "avx512.pmaddubs.w.512", 32: "avx2.pmadd.ub.sw"}[u.type.count]
        return self.b.call(self._intrinsic(f"llvm.x86.{name}", vec(i16, u.type.count // 2), u.type, s.type), [u, s])

    def signed_pairs(self, u, s):
        """`pairs` of signed u, as |u| times s with the sign of u: 128 * 127 * 2 fits."""
        size = f"v{u.type.count}i8"
        magnitude = self.b.call(self._intrinsic(f"llvm.abs.{size}", u.type, u.type, i1), [u, i1(0)])
        return self.pairs(magnitude, self.b.call(self._intrinsic("llvm.x86.avx2.psign.b", *[u.type] * 3), [s, u]))

    def widen_pairs(self, a, b):
        """a[2l] * b[2l] + a[2l+1] * b[2l+1] of int16 in int32 lanes; only on x86 from AVX2 on."""
        name = {32: "avx512.pmaddw.d.512", 16: "avx2.pmadd.wd"}[a.type.count]
        return self.b.call(self._intrinsic(f"llvm.x86.{name}", vec(i32, a.type.count // 2), a.type, b.type), [a, b])

    def dot8(self, acc, u, s):
        """Every 16 bytes are a matrix of 2 rows of 8: acc, matrices of 2 x 2 int32, plus u's times the transpose of s's.

        Only where target.step is 8. u is unsigned, s signed; nothing saturates.
        """
        return self._neon("usmmla", acc, u, s)

    def _vpdpbusd(self, acc, u, s):
        """VNNI's product of bytes. The operands are int32 lanes, as LLVM before 22 wants them; newer ones convert that form."""
        fn = self._intrinsic(f"llvm.x86.avx512.vpdpbusd.{u.type.count * 8}", *[acc.type] * 4)
        return self.b.call(fn, [acc, self.bits(u, i32), self.bits(s, i32)])

    def _neon(self, op, acc, u, s):
        """NEON's `op` on 16 bytes at a time."""
        four, sixteen = vec(i32, 4), vec(i8, 16)
        fn = self._intrinsic(f"llvm.aarch64.neon.{op}.v4i32.v16i8", four, four, sixteen, sixteen)
        parts = []
        for k in range(0, u.type.count, 16):
            pick = list(range(k, k + 16))
            sums = self.shuffle(acc, list(range(k // 4, k // 4 + 4)))
            parts.append(self.b.call(fn, [sums, self.shuffle(u, pick), self.shuffle(s, pick)]))
        while len(parts) > 1:
            parts = [self.concat(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def transpose(self, rows):
        """n vectors of n lanes, rows to columns, by log2(n) rounds of two-vector shuffles."""
        n, rows, step = len(rows), list(rows), 1
        while step < n:
            for i in range(n):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i] = self.shuffle(a, [k if not k & step else n + k - step for k in range(n)], b)
                    rows[i + step] = self.shuffle(a, [k + step if not k & step else n + k for k in range(n)], b)
            step *= 2
        return rows

    def _intrinsic(self, name, result, *args):
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, args), name)


def _bits(element):
    return {f16: 16, f32: 32}[element] if element in (f16, f32) else element.width


def _name(type_):
    return f"v{type_.count}f32" if isinstance(type_, ir.VectorType) else "f32"
