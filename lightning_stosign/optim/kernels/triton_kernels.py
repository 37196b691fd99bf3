"""The step in Triton: for each kind one kernel that updates all parameters, and one that looks at them first.

Equal bits on every device come from three rules. Numbers narrower than float32 are read, rounded and written as
integers: Triton's own FP8 conversions need sm_89, and its interpreter's are wrong. Nothing is contracted to a fused
multiply-add (launch with ``enable_fp_fusion=False``). Divisions are ``tl.div_rn``.

A program updates ROWS x ROW values of one run, a run being a parameter or 2**32 values of it. Whole blocks take a
branch without masks, so that memory is accessed 128 bits at a time.
"""

import triton
import triton.language as tl

# Formats of parameters and states.
FLOAT32, BFLOAT16, FLOAT16, E4M3, E5M2 = (tl.constexpr(i) for i in range(5))

# Scales of states: none, a constant, one per tensor, one per block.
UNSCALED, FIXED, BY_TENSOR, BY_BLOCK = (tl.constexpr(i) for i in range(4))

# Ways of rounding.
NEAREST, UP, STOCHASTIC = (tl.constexpr(i) for i in range(3))

# Columns of the table, int64 [runs, COLUMNS]: addresses, sizes, and two 32-bit words of noise per stream.
PARAM, GRAD, NUMEL, JOB = (tl.constexpr(i) for i in range(4))
MOMENTUM, MOMENTUM_SCALE, ENVELOPE, ENVELOPE_SCALE = (tl.constexpr(i) for i in range(4, 8))
DRAW_UPDATE, DRAW_STATE, DRAW_PARAM, DRAW_ENVELOPE = (tl.constexpr(i) for i in range(8, 12))
COLUMNS = tl.constexpr(12)

_SIGN_BIT = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _magnitude(value):
    return _float(_bits(value) & _MAGNITUDE)


@triton.jit
def _larger(a, b):
    """Return the larger of two numbers >= 0."""
    return _float(tl.maximum(_bits(a), _bits(b)))


# Noise: numerics.noise, element by element.


@triton.jit
def _hash(index, words):
    """Return int32 hashes of elements, uint32 counted from the run's first, for a stream's two words in an int64."""
    x = index * 0x9E3779B1 + (words & 0xFFFFFFFF).to(tl.uint32)
    x ^= x >> 16
    x = (x * 0x7FEB352D) ^ (words >> 32).to(tl.uint32)
    x ^= x >> 15
    return (x * 0x846CA68B).to(tl.int32, bitcast=True)


@triton.jit
def _noise(hashed):
    return ((hashed & -256) | 128).to(tl.float32) * 4.656612873077393e-10  # 2**-31


# Formats: numerics.rounding, in bits.


@triton.jit
def _decode(stored, FORMAT: tl.constexpr, SIGNED: tl.constexpr):
    """Return the float32 values of stored numbers; SIGNED=False: of numbers >= 0, which takes less."""
    if FORMAT == FLOAT32:
        return stored
    elif FORMAT == BFLOAT16:
        return _float(stored.to(tl.int32) << 16)
    else:
        return _decode_narrow(stored, FORMAT, SIGNED)


@triton.jit
def _decode_narrow(stored, FORMAT: tl.constexpr, SIGNED: tl.constexpr):
    MANTISSA: tl.constexpr = 3 if FORMAT == E4M3 else (2 if FORMAT == E5M2 else 10)
    BIAS: tl.constexpr = 7 if FORMAT == E4M3 else 15
    MAGNITUDE: tl.constexpr = 0x7FFF if FORMAT == FLOAT16 else 0x7F
    LARGEST: tl.constexpr = 0x7E if FORMAT == E4M3 else (0x7B if FORMAT == E5M2 else 0x7BFF)
    word = stored.to(tl.int32)  # sign extended
    code = word & MAGNITUDE
    # The fields in float32's places, where the exponent means 2**(127 - BIAS) less; exact for subnormal numbers, too.
    bits = _bits(_float(code << (23 - MANTISSA)) * (2.0 ** (127 - BIAS)))
    if FORMAT == E4M3:
        bits = tl.where(code > LARGEST, _NAN, bits)
    else:
        bits = tl.where(code > LARGEST, tl.where(code > LARGEST + 1, _NAN, _INFINITY), bits)
    if SIGNED:
        bits |= word & _SIGN_BIT
    return _float(bits)


@triton.jit
def _encode_bfloat16(value, hashed, SATURATE: tl.constexpr, ROUNDING: tl.constexpr):
    bits = _bits(value)
    size = bits & _MAGNITUDE
    kept = tl.minimum(size, 0x7F7F0000 if SATURATE else _INFINITY)
    # A carry out of the dropped bits makes the upper neighbour.
    if ROUNDING == NEAREST:
        kept += 0x7FFF + ((kept >> 16) & 1)
    elif ROUNDING == UP:
        kept += 0xFFFF
    else:
        kept += 0xFFFF - ((hashed >> 16) & 0xFFFF)
    kept = tl.where(size > _INFINITY, _NAN, kept & -0x10000) | (bits & _SIGN_BIT)
    return _float(kept), (kept >> 16).to(tl.int16)


@triton.jit
def _encode_narrow(
    value, hashed, FORMAT: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, SIGNED: tl.constexpr
):
    """Round to float16 or FP8 with integer operations alone: conversions run at a fraction of their rate."""
    MANTISSA: tl.constexpr = 3 if FORMAT == E4M3 else (2 if FORMAT == E5M2 else 10)
    BIAS: tl.constexpr = 7 if FORMAT == E4M3 else 15
    WIDTH: tl.constexpr = 16 if FORMAT == FLOAT16 else 8
    LARGEST: tl.constexpr = 0x7E if FORMAT == E4M3 else (0x7B if FORMAT == E5M2 else 0x7BFF)
    DROPPED: tl.constexpr = 23 - MANTISSA
    MASK: tl.constexpr = (1 << DROPPED) - 1
    LARGEST_BITS: tl.constexpr = (LARGEST << DROPPED) + ((127 - BIAS) << 23)
    BEYOND_BITS: tl.constexpr = (LARGEST_BITS & 0x7F800000) + (1 << 23)
    FIRST_NORMAL_BITS: tl.constexpr = (128 - BIAS) << 23
    # Adding it rounds to the spacing of subnormal numbers: float32's numbers around it are as far apart.
    SHIFTER: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    SHIFTER_BITS: tl.constexpr = (151 - BIAS - MANTISSA) << 23
    SPACING: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA)
    word = _bits(value)
    size = word & _MAGNITUDE if SIGNED else word
    limited = tl.minimum(size, LARGEST_BITS if SATURATE else BEYOND_BITS)
    small = _float(limited)
    shifted = small + SHIFTER
    if ROUNDING == NEAREST:
        normal = limited + (MASK >> 1) + ((limited >> DROPPED) & 1)
    elif ROUNDING == UP:
        normal = limited + MASK
        shifted = _float(_bits(shifted) + (shifted - SHIFTER < small).to(tl.int32))
    else:
        normal = limited + (MASK - ((hashed >> (32 - DROPPED)) & MASK))
        shifted = _float(_bits(shifted) - (shifted - SHIFTER > small).to(tl.int32))  # down
        fraction = ((hashed >> 8) & 0xFFFFFF).to(tl.float32) * (5.960464477539063e-08 * SPACING)  # 2**-24
        shifted = _float(_bits(shifted) + (fraction < small - (shifted - SHIFTER)).to(tl.int32))
    is_subnormal = limited < FIRST_NORMAL_BITS
    code = tl.where(is_subnormal, _bits(shifted) - SHIFTER_BITS, (normal >> DROPPED) - ((127 - BIAS) << MANTISSA))
    bits = tl.where(is_subnormal, _bits(shifted - SHIFTER), normal & ~MASK)
    code = tl.where(size > _INFINITY, (1 << (WIDTH - 1)) - 1, code)
    bits = tl.where(size > _INFINITY, _NAN, bits)
    if SIGNED:
        code |= (word >> (32 - WIDTH)) & (1 << (WIDTH - 1))
        bits |= word & _SIGN_BIT
    return _float(bits), code.to(tl.int16 if FORMAT == FLOAT16 else tl.int8)


@triton.jit
def _encode(value, hashed, FORMAT: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, SIGNED: tl.constexpr):
    """Return (the values as stored, what to store). Beyond the format: its largest number, or inf without SATURATE."""
    if FORMAT == FLOAT32:
        return value, value
    elif FORMAT == BFLOAT16:
        return _encode_bfloat16(value, hashed, SATURATE, ROUNDING)
    else:
        return _encode_narrow(value, hashed, FORMAT, SATURATE, ROUNDING, SIGNED)


@triton.jit
def _power_of_two_scale(amax, FORMAT: tl.constexpr):
    """Return numerics.rounding.power_of_two_scale of an amax >= 0, without its division, for all float32 numbers."""
    # Mantissa and exponent of the largest numbers 448, 57344 and 65504, and below which amax / largest is 0.
    FRACTION: tl.constexpr = 0x7FE000 if FORMAT == FLOAT16 else 0x600000
    POWER: tl.constexpr = 8 if FORMAT == E4M3 else 15
    NOTHING: tl.constexpr = 224 if FORMAT == E4M3 else (28672 if FORMAT == E5M2 else 32752)
    bits = _bits(amax)
    exponent = ((tl.minimum(bits, _INFINITY) + (0x7FFFFF - FRACTION)) >> 23) - POWER
    exponent = tl.where(bits >= _INFINITY, 254, tl.maximum(exponent, 1))
    return tl.where(bits <= NOTHING, 1.0, _float(exponent << 23))


@triton.jit
def _inverse(scale):
    """Return 1 / a power of two."""
    return _float(tl.maximum((254 << 23) - _bits(scale), 0x400000))


@triton.jit
def _pointer(address, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address of the table as a pointer to numbers of a format, below float32 to their bits."""
    if FORMAT == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == BFLOAT16 or FORMAT == FLOAT16:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=inside, other=0)  # without `other`, what lies outside would count in a maximum


@triton.jit
def _momentum(m, grad, weight, MAXIMIZE: tl.constexpr):
    """m_t = beta1 m_{t-1} + (1 - beta1) g_t."""
    grad = -grad if MAXIMIZE else grad
    grad = tl.minimum(
        tl.maximum(grad, -8.507059173023462e37), 8.507059173023462e37
    )  # numerics.rounding.LARGEST_GRADIENT
    return m + (grad - m) * weight


@triton.jit
def _update_rows(
    run, at, left, new_scales, numbers,
    HAS_MOMENTUM: tl.constexpr, HAS_ENVELOPE: tl.constexpr, STOCHASTIC_SIGN: tl.constexpr, MAXIMIZE: tl.constexpr,
    DECAYS: tl.constexpr, ROUND_STATE: tl.constexpr, ROUND_PARAM: tl.constexpr, PARAM_FORMAT: tl.constexpr,
    STATE_FORMAT: tl.constexpr, SCALING: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Update ROWS x ROW values of a run, or what is left of it."""
    i = tl.arange(0, ROWS)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    inside = i < left
    index = i.to(tl.uint32) + at.to(tl.uint32)
    x_at = _pointer(tl.load(run + PARAM), PARAM_FORMAT, ALIGNED) + at + i
    g_at = _pointer(tl.load(run + GRAD), PARAM_FORMAT, ALIGNED) + at + i
    lr, decay, weight, beta2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    factor, unfactor = tl.load(numbers + 4), tl.load(numbers + 5)
    block = at // ROW + tl.arange(0, ROWS)
    has_block = block * ROW < at + left

    x = _decode(_load(x_at, inside, WHOLE), PARAM_FORMAT, True)
    m = _decode(_load(g_at, inside, WHOLE), PARAM_FORMAT, True)
    if HAS_MOMENTUM:
        m_at = _pointer(tl.load(run + MOMENTUM), STATE_FORMAT, ALIGNED) + at + i
        grad, m = m, _decode(_load(m_at, inside, WHOLE), STATE_FORMAT, True)
        if SCALING == FIXED:
            m = m * unfactor
        if SCALING == BY_TENSOR:
            m = m * tl.load(tl.load(run + MOMENTUM_SCALE).to(tl.pointer_type(tl.float32)))
        if SCALING == BY_BLOCK:
            m_scales = tl.load(run + MOMENTUM_SCALE).to(tl.pointer_type(tl.float32)) + block
            m = m * tl.load(m_scales, mask=has_block, other=1.0)[:, None]
        m = _momentum(m, grad, weight, MAXIMIZE)
        # As it is stored: scaled, rounded, and scaled back.
        if SCALING == FIXED:
            m = m * factor
        if SCALING == BY_TENSOR:
            m_scale = tl.load(new_scales)
            m = m * _inverse(m_scale)
        if SCALING == BY_BLOCK:
            m_scale = _power_of_two_scale(_float(tl.max(_bits(m) & _MAGNITUDE, axis=1)), STATE_FORMAT)
            tl.store(m_scales, m_scale, mask=has_block)
            m_scale = m_scale[:, None]
            m = m * _inverse(m_scale)
        hashed = _hash(index, tl.load(run + DRAW_STATE)) if ROUND_STATE else i
        m, stored = _encode(m, hashed, STATE_FORMAT, True, STOCHASTIC if ROUND_STATE else NEAREST, True)
        tl.store(m_at, stored, mask=None if WHOLE else inside)
        if SCALING == FIXED:
            m = m * unfactor
        if SCALING == BY_TENSOR or SCALING == BY_BLOCK:
            m = m * m_scale
    elif MAXIMIZE:
        m = -m

    if HAS_ENVELOPE:
        G_at = _pointer(tl.load(run + ENVELOPE), STATE_FORMAT, ALIGNED) + at + i
        G = _decode(_load(G_at, inside, WHOLE), STATE_FORMAT, False)
        if SCALING == FIXED:
            G = G * unfactor
        if SCALING == BY_TENSOR:
            G = G * tl.load(tl.load(run + ENVELOPE_SCALE).to(tl.pointer_type(tl.float32)))
        if SCALING == BY_BLOCK:
            G_scales = tl.load(run + ENVELOPE_SCALE).to(tl.pointer_type(tl.float32)) + block
            G = G * tl.load(G_scales, mask=has_block, other=1.0)[:, None]
        # G_t = max(beta2 G_{t-1}, |m_t|), of m_t as it was stored
        if DECAYS:
            G = G * beta2
        at_least = _magnitude(m)
        if SCALING == FIXED:
            G = G * factor
            at_least = at_least * factor
        if SCALING == BY_TENSOR:
            G_scale = tl.load(new_scales + (1 if HAS_MOMENTUM else 0))
        if SCALING == BY_BLOCK:
            G_scale = _power_of_two_scale(_float(tl.max(_bits(_larger(G, at_least)), axis=1)), STATE_FORMAT)
            tl.store(G_scales, G_scale, mask=has_block)
            G_scale = G_scale[:, None]
        if SCALING == BY_TENSOR or SCALING == BY_BLOCK:
            G = G * _inverse(G_scale)
            at_least = at_least * _inverse(G_scale)
        if DECAYS and STATE_FORMAT != FLOAT32:
            # Rounding up would undo a decay that does not reach the next lower number.
            hashed = _hash(index, tl.load(run + DRAW_ENVELOPE))
            G, _ = _encode(G, hashed, STATE_FORMAT, True, STOCHASTIC, False)
            at_least, _ = _encode(at_least, i, STATE_FORMAT, True, UP, False)
        G, stored = _encode(_larger(G, at_least), i, STATE_FORMAT, True, UP, False)
        tl.store(G_at, stored, mask=None if WHOLE else inside)
        if SCALING == FIXED:
            G = G * unfactor
        if SCALING == BY_TENSOR or SCALING == BY_BLOCK:
            G = G * G_scale
        if STOCHASTIC_SIGN:
            direction = _noise(_hash(index, tl.load(run + DRAW_UPDATE))) * G + m
        else:
            direction = tl.where(G == 0, 0.0, tl.div_rn(m, G))
    else:
        direction = m

    if HAS_ENVELOPE and not STOCHASTIC_SIGN:
        step = direction * lr
    else:
        step = _float(_bits(lr + tl.zeros_like(direction)) ^ (_bits(direction) & _SIGN_BIT))
        step = tl.where((direction > 0) | (direction < 0), step, 0.0)
    x = x * decay - step
    hashed = _hash(index, tl.load(run + DRAW_PARAM)) if ROUND_PARAM else i
    if PARAM_FORMAT == FLOAT32:
        x = tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)
    _, stored = _encode(x, hashed, PARAM_FORMAT, True, STOCHASTIC if ROUND_PARAM else NEAREST, True)
    tl.store(x_at, stored, mask=None if WHOLE else inside)


@triton.jit
def update(
    table, blocks, found_inf, scales, numbers,
    HAS_MOMENTUM: tl.constexpr, HAS_ENVELOPE: tl.constexpr, STOCHASTIC_SIGN: tl.constexpr, MAXIMIZE: tl.constexpr,
    DECAYS: tl.constexpr, ROUND_STATE: tl.constexpr, ROUND_PARAM: tl.constexpr, PARAM_FORMAT: tl.constexpr,
    STATE_FORMAT: tl.constexpr, SCALING: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update all runs of the table, unless a gradient of the step is not finite.

    Args:
        table: int64 [runs, COLUMNS].
        blocks: int32 [programs, 2]: a program's run, and which block of it.
        found_inf: float32; where it is not 0, nothing changes.
        scales: float32 [jobs, states]: the tensor scales to store with.
        numbers: float32 [6]: lr, 1 - lr * weight_decay, 1 - beta1, beta2, the constant scale and its inverse.
    """
    if tl.load(found_inf) == 0:
        number = tl.load(blocks + 2 * tl.program_id(0))
        at = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * (ROWS * ROW)
        run = table + number.to(tl.int64) * COLUMNS
        left = tl.minimum(tl.load(run + NUMEL) - at, ROWS * ROW).to(tl.int32)
        STATES: tl.constexpr = (1 if HAS_MOMENTUM else 0) + (1 if HAS_ENVELOPE else 0)
        new_scales = scales + tl.load(run + JOB) * STATES
        if left == ROWS * ROW:
            _update_rows(
                run, at, left, new_scales, numbers, HAS_MOMENTUM, HAS_ENVELOPE, STOCHASTIC_SIGN, MAXIMIZE, DECAYS,
                ROUND_STATE, ROUND_PARAM, PARAM_FORMAT, STATE_FORMAT, SCALING, ROWS, ROW, ALIGNED, True,
            )  # fmt: skip
        else:
            _update_rows(
                run, at, left, new_scales, numbers, HAS_MOMENTUM, HAS_ENVELOPE, STOCHASTIC_SIGN, MAXIMIZE, DECAYS,
                ROUND_STATE, ROUND_PARAM, PARAM_FORMAT, STATE_FORMAT, SCALING, ROWS, ROW, ALIGNED, False,
            )  # fmt: skip


@triton.jit
def largest(
    table, blocks, found, numbers,
    HAS_MOMENTUM: tl.constexpr, HAS_ENVELOPE: tl.constexpr, MAXIMIZE: tl.constexpr, PARAM_FORMAT: tl.constexpr,
    STATE_FORMAT: tl.constexpr, VALUES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Find the largest |m_t| and beta2 G_{t-1} of each job, before they are stored.

    Args:
        table: as for ``update``.
        blocks: likewise.
        found: int32 [jobs, states], zero at first: the bits of the largest values, of inf or NaN if the gradient has
            such a value.
        numbers: as for ``update``.
    """
    number = tl.load(blocks + 2 * tl.program_id(0))
    at = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * VALUES
    run = table + number.to(tl.int64) * COLUMNS
    left = tl.minimum(tl.load(run + NUMEL) - at, VALUES).to(tl.int32)
    STATES: tl.constexpr = (1 if HAS_MOMENTUM else 0) + (1 if HAS_ENVELOPE else 0)
    found += tl.load(run + JOB) * STATES
    i = tl.arange(0, VALUES)
    inside = i < left
    if HAS_MOMENTUM:
        g_at = _pointer(tl.load(run + GRAD), PARAM_FORMAT, ALIGNED) + at + i
        m_at = _pointer(tl.load(run + MOMENTUM), STATE_FORMAT, ALIGNED) + at + i
        if left == VALUES:
            stored_g, stored_m = tl.load(g_at), tl.load(m_at)
        else:
            stored_g = tl.load(g_at, mask=inside, other=0)
            stored_m = tl.load(m_at, mask=inside, other=0)
        scale = tl.load(tl.load(run + MOMENTUM_SCALE).to(tl.pointer_type(tl.float32)))
        m = _decode(stored_m, STATE_FORMAT, True) * scale
        g = _decode(stored_g, PARAM_FORMAT, True)
        m = _momentum(m, g, tl.load(numbers + 2), MAXIMIZE)
        size = _bits(g) & _MAGNITUDE
        tl.atomic_max(found, tl.max(tl.where(size < _INFINITY, _bits(m) & _MAGNITUDE, size), axis=0))
        found += 1
    if HAS_ENVELOPE:
        G_at = _pointer(tl.load(run + ENVELOPE), STATE_FORMAT, ALIGNED) + at + i
        if left == VALUES:
            stored_G = tl.load(G_at)
        else:
            stored_G = tl.load(G_at, mask=inside, other=0)
        scale = tl.load(tl.load(run + ENVELOPE_SCALE).to(tl.pointer_type(tl.float32)))
        # The largest code is the largest number.
        code = tl.max(stored_G.to(tl.int32) & (0x7FFF if STATE_FORMAT == FLOAT16 else 0x7F), axis=0)
        tl.atomic_max(found, _bits(_decode(code, STATE_FORMAT, False) * scale * tl.load(numbers + 3)))


@triton.jit
def nonfinite(
    table, blocks, found, PARAM_FORMAT: tl.constexpr, VALUES: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Set each job's ``found``, int32 [jobs], to the bits of inf if its gradient holds inf or NaN."""
    number = tl.load(blocks + 2 * tl.program_id(0))
    at = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * VALUES
    run = table + number.to(tl.int64) * COLUMNS
    left = tl.minimum(tl.load(run + NUMEL) - at, VALUES).to(tl.int32)
    i = tl.arange(0, VALUES)
    g_at = _pointer(tl.load(run + GRAD), PARAM_FORMAT, ALIGNED) + at + i
    if left == VALUES:
        g = tl.load(g_at)
    else:
        g = tl.load(g_at, mask=i < left, other=0)
    if PARAM_FORMAT == FLOAT32:
        size = _bits(g) & _MAGNITUDE
    else:
        size = g.to(tl.int32) & 0x7FFF
    LIMIT: tl.constexpr = 0x7F800000 if PARAM_FORMAT == FLOAT32 else (0x7F80 if PARAM_FORMAT == BFLOAT16 else 0x7C00)
    if tl.max(size, axis=0) >= LIMIT:
        tl.store(found + tl.load(run + JOB), _INFINITY)  # every program that writes writes the same
