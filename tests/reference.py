"""The papers' algorithms and formats in plain numpy: the oracle of the optimizer tests. Slow and obvious on purpose."""

import numpy as np

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key(seed, step, index, stream=0):
    k = 0
    for word in (seed, step, index, stream):
        k = splitmix64(k ^ word)
    return k


def hashed(k, i):
    """The hash of element i, before the mixer's last shift, one Python integer at a time."""
    segment = splitmix64(k ^ (i >> 32))
    h = (((i & MASK32) + segment) * 0x9E3779B1) & MASK32
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK32
    h ^= segment >> 32
    return ((h ^ (h >> 15)) * 0x846CA68B) & MASK32


def noise(k, numel, start=0):
    """n ~ Unif(-1, 1)."""
    values = []
    for i in range(start, start + numel):
        h = hashed(k, i)
        upper = h >> 8 if h < 1 << 31 else (h >> 8) - (1 << 24)  # the upper 24 bits as a signed number
        values.append((2 * upper + 1) / 2**24)
    return np.array(values)


def coins(k, numel, start=0):
    """Whether coin i shows the side of 0 and more: the sign of byte i % 4 of hash i // 4."""
    words = [(h := hashed(k, i // 4)) ^ h >> 16 for i in range(start, start + numel)]
    return np.array([word >> 8 * (i % 4) + 7 & 1 == 0 for i, word in enumerate(words, start)])


def stosign(x, grads, lr, beta1, beta2, weight_decay, noises):
    """Algorithm 3 (Algorithm 11 with beta2 < 1; Algorithm 10 where a noise is None), float64. Returns the iterates."""
    m, G, iterates = np.zeros_like(x), np.zeros_like(x), []
    for g, n in zip(grads, noises, strict=True):
        m = beta1 * m + (1 - beta1) * g
        G = np.maximum(beta2 * G, np.abs(m))
        direction = np.divide(m, G, out=np.zeros_like(m), where=G > 0) if n is None else np.sign(m + G * n)
        x = x - lr * direction - lr * weight_decay * x
        iterates.append(x)
    return iterates


def signsgd(x, grads, lr, beta, weight_decay):
    """Algorithm 5."""
    m, iterates = np.zeros_like(x), []
    for g in grads:
        m = beta * m + (1 - beta) * g
        x = x - lr * np.sign(m) - lr * weight_decay * x
        iterates.append(x)
    return iterates


def float_format_values(exponent_bits, mantissa_bits, bias, largest):
    """All finite values >= 0 of a floating-point format, in order."""
    values = []
    for e in range(1 << exponent_bits):
        for f in range(1 << mantissa_bits):
            fraction = f / (1 << mantissa_bits)
            value = fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias)
            if value <= largest:
                values.append(value)
    return np.array(values)


FORMATS = {
    "float8_e4m3fn": float_format_values(4, 3, 7, 448.0),
    "float8_e5m2": float_format_values(5, 2, 15, 57344.0),
    "float16": float_format_values(5, 10, 15, 65504.0),
}


def round_nearest(values, table):
    """To the nearest magnitude of the table, ties to the even one (tables start with an even number), saturating."""
    magnitude = np.minimum(np.abs(values), table[-1])
    above = np.searchsorted(table, magnitude, side="left")
    below = np.maximum(above - 1, 0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    pick_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.copysign(np.where(pick_above, table[above], table[below]), values)


def round_up(values, table):
    """To the smallest number of the table that is not below, saturating; values >= 0."""
    return table[np.searchsorted(table, np.minimum(values, table[-1]), side="left")]


E2M1 = float_format_values(2, 1, 1, 6.0)


def fp4(values, rounding=round_nearest, block=16):
    """Four-bit storage, float64: the bytes, the block scales, the tensor's scale, and the values that are read back."""
    values = values.astype(float).ravel()
    amax = np.abs(values).max()
    tensor_scale = 2.0 ** max(np.ceil(np.log2(amax / (448 * 6))), -126) if amax > 0 else 1.0
    codes, scales, read = [], [], []
    for start in range(0, values.size, block):
        part = np.pad(values[start : start + block], (0, max(start + block - values.size, 0)))
        wanted = max(np.abs(part).max() / 6 / tensor_scale, 2.0**-6)
        scales.append(round_up(np.array([wanted]), FORMATS["float8_e4m3fn"])[0])
        rounded = rounding(part / (scales[-1] * tensor_scale), E2M1)
        read.extend(rounded * scales[-1] * tensor_scale)
        codes.extend(np.searchsorted(E2M1, np.abs(rounded)) + 8 * np.signbit(rounded))
    pairs = np.array(codes, dtype=np.uint8).reshape(-1, 2)
    return pairs[:, 0] + 16 * pairs[:, 1], np.array(scales), tensor_scale, np.array(read)[: values.size]


def sign_converted_adamax(x, grads, lr, beta1, beta2, eps, weight_decay, noises):
    """Algorithm 9 for AdaMax, float64. Returns the iterates."""
    m, u, iterates = np.zeros_like(x), np.zeros_like(x), []
    for t, (g, n) in enumerate(zip(grads, noises, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * g
        u = np.maximum(beta2 * u, np.abs(g))
        x = x - lr * np.sign(m / (1 - beta1**t) + (u + eps) * n) - lr * weight_decay * x
        iterates.append(x)
    return iterates


def online_to_nonconvex(x, gradient, lr, beta1, beta2, radius, noises, scales):
    """Algorithm 12 with StoSignSGD as the learner, float64. Returns the points at which gradients are taken."""
    m, G, delta, points = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), []
    for n, s in zip(noises, scales, strict=True):
        points.append(x)
        m = beta1 * m + (1 - beta1) * gradient(x)
        G = np.maximum(beta2 * G, np.abs(m))
        delta = np.clip(delta - lr * np.sign(m + G * n), -radius, radius)
        x = x + s * delta
    return points


def relu_network(x, inputs, targets, hidden):
    """Loss and gradient of 1/2 mean (a . relu(W z + b) - target)^2 in the flat x = (W, b, a)."""
    n, d = inputs.shape
    W, b, a = x[: hidden * d].reshape(hidden, d), x[hidden * d : hidden * (d + 1)], x[hidden * (d + 1) :]
    before = inputs @ W.T + b
    after = np.maximum(before, 0)
    residual = after @ a - targets
    back = (residual[:, None] * a) * (before > 0) / n
    gradient = np.concatenate([(back.T @ inputs).ravel(), back.sum(0), after.T @ residual / n])
    return 0.5 * np.mean(residual**2), gradient
