"""Rounding to few bits in plain numpy and float64: value by value against the list of all numbers of a format."""

import math

import numpy as np

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def float8_numbers(exponent_bits: int, mantissa_bits: int, largest: float) -> np.ndarray:
    """All numbers >= 0 up to the largest, in order: the index of one with an even mantissa is even."""
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = [
        (0 if e == 0 else 1) * 2.0 ** (e - bias) + m * 2.0 ** (max(e, 1) - bias - mantissa_bits)
        for e in range(2**exponent_bits)
        for m in range(2**mantissa_bits)
    ]
    return np.array([number for number in numbers if number <= largest])


E4M3 = float8_numbers(4, 3, 448.0)
E5M2 = float8_numbers(5, 2, 57344.0)


def round_to(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """To the nearest number, ties to the one with an even mantissa, saturating."""
    magnitude = np.minimum(np.abs(values), numbers[-1])
    above = np.clip(np.searchsorted(numbers, magnitude), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def scaled(numbers: np.ndarray, values: np.ndarray, axis: int | None = None, power_of_two: bool = False) -> np.ndarray:
    """torchao's recipes: one scale a tensor or a row, found in float64 and kept in float32."""
    amax = np.abs(values).max(axis=axis, keepdims=True)
    scale = (numbers[-1] / amax).astype(np.float32)
    if power_of_two:
        scale = np.exp2(np.floor(np.log2(scale)))
    # The scaling itself is in float32, as the values are.
    return round_to(numbers, (values.astype(np.float32) * scale).astype(np.float64)) / scale.astype(np.float64)


def in_blocks(
    numbers: np.ndarray, values: np.ndarray, size: int, *, square: bool = False, nv: bool = False
) -> np.ndarray:
    """Block by block; ``nv``: NVFP4's scales, else the smallest power of two with which nothing saturates."""
    result = np.empty_like(values, dtype=np.float64)
    height = size if square else 1
    tensor_scale = np.float32(np.abs(values).max() / np.float32(448 * 6))
    for row in range(0, values.shape[0], height):
        for column in range(0, values.shape[1], size):
            block = values[row : row + height, column : column + size]
            amax = np.abs(block).max()
            if amax == 0:
                scale = 1.0
            elif nv:
                scale = float(round_to(E4M3, np.float32(amax / np.float32(6 * tensor_scale)))) * float(tensor_scale)
            else:
                scale = 2.0 ** math.ceil(math.log2(amax / numbers[-1]))
            rounded = np.zeros_like(block) if scale == 0 else round_to(numbers, block / scale) * scale
            result[row : row + height, column : column + size] = rounded
    return result
