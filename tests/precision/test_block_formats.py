import math
from typing import Any

import pytest
import torch
from block_reference import E2M1, E4M3, in_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stosign.optim.numerics.fp4 import round_e2m1_stochastically
from lightning_stosign.precision.block_formats import (
    FP8_BLOCK,
    MXFP4,
    MXFP8,
    NVFP4,
    BlockFormat,
    content_noise,
    rotate_blocks,
    round_blocks,
)

FORMATS = {"block": FP8_BLOCK, "mxfp8": MXFP8, "mxfp4": MXFP4, "nvfp4": NVFP4}

each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def wide_values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 12, (rows, columns), generator=generator)
    return torch.ldexp(torch.randn(rows, columns, generator=generator), exponents)


@each_format
@pytest.mark.parametrize("square", [False, True])
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 9))
def test_rounding_is_that_of_numpy(form: BlockFormat, square: bool, rows: int, columns: int, seed: int) -> None:
    values = wide_values(rows, columns, seed)
    numbers = E4M3 if form.bits == 8 else E2M1
    truth = in_blocks(numbers, values.double().numpy(), form.block_size, square=square, nv=form.nv_scales)
    torch.testing.assert_close(
        round_blocks(values, form, square=square).double(), torch.from_numpy(truth), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("form", "name"), [(MXFP8, "float8_e4m3fn"), (MXFP4, "float4_e2m1fn_x2")])
def test_mx_rounding_is_that_of_torchao(form: BlockFormat, name: str) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    values = wide_values(64, 256)
    theirs = mx.MXTensor.to_mx(values, getattr(torch, name), 32, config.ScaleCalculationMode.RCEIL)
    assert torch.equal(round_blocks(values, form), theirs.dequantize(torch.float32))


def test_nvfp4_rounding_is_that_of_torchao() -> None:
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    scale = nvfp4.per_tensor_amax_to_scale(values.abs().max())
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(values, per_tensor_scale=scale).dequantize(torch.float32)
    torch.testing.assert_close(round_blocks(values, NVFP4), theirs, rtol=1e-6, atol=0)


@each_format
def test_square_blocks_round_a_matrix_and_its_transpose_alike(form: BlockFormat) -> None:
    values = wide_values(100, 200)
    assert torch.equal(
        round_blocks(values, form, square=True), round_blocks(values.t().contiguous(), form, square=True).t()
    )


@each_format
def test_strides_do_not_matter(form: BlockFormat) -> None:
    values = wide_values(48, 64).t()
    assert torch.equal(round_blocks(values, form), round_blocks(values.contiguous(), form))


@each_format
def test_powers_of_two_commute_with_rounding(form: BlockFormat) -> None:
    values = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_blocks(values * 2.0**40, form), round_blocks(values, form) * 2.0**40)


@each_format
@pytest.mark.parametrize("shape", [(0, 32), (4, 0)])
def test_nothing_rounds_to_nothing(form: BlockFormat, shape: tuple[int, int]) -> None:
    assert round_blocks(torch.empty(shape), form).shape == shape


@each_format
def test_zeros_stay_zeros(form: BlockFormat) -> None:
    assert not round_blocks(torch.zeros(3, 40), form).any()


@each_format
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_not_finite_does_not_become_finite(form: BlockFormat, bad: float, stochastic: bool) -> None:
    values = torch.ones(2, 40)
    values[1, 3] = bad
    assert not round_blocks(values, form, stochastic=stochastic)[1, 3].isfinite()


# Stochastic rounding


def test_the_mean_over_the_noise_is_the_value() -> None:
    values = torch.linspace(-6, 6, 241)
    fractions = (torch.arange(4096) + 0.5) / 4096
    rounded = round_e2m1_stochastically(values.expand(4096, -1), fractions[:, None].expand(-1, 241))
    torch.testing.assert_close(rounded.mean(0), values, rtol=0, atol=2 / 4096)
    assert set(rounded.abs().unique().tolist()) == set(E2M1.tolist())


@pytest.mark.parametrize("form", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
def test_stochastic_rounding_is_unbiased_over_tensors(form: BlockFormat) -> None:
    """Many tensors that share a row, each with noise of its own; a false alarm once in 10^5 (4.9 sigma, 160 values)."""
    count, generator = 4000, torch.Generator().manual_seed(0)
    row = torch.randn(160, generator=generator)
    # NVFP4 rounds a block's scale: where it is too small, the largest value saturates, which is a bias of its own.
    row[::16] = 6.0
    total, squares = torch.zeros(160, dtype=torch.float64), torch.zeros(160, dtype=torch.float64)
    for _ in range(count):
        other = torch.randn(1, 160, generator=generator).clamp(-6, 6)
        rounded = round_blocks(torch.cat([row[None], other]), form, stochastic=True)[0].double()
        total += rounded
        squares += rounded**2
    mean = total / count
    error = ((squares / count - mean**2).clamp(min=0) / count).sqrt()
    assert ((mean - row).abs() <= 4.9 * error + 1e-6).all()


def test_the_noise_is_a_pure_function_of_the_values() -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    noise = content_noise(values)
    assert torch.equal(noise, content_noise(values.clone()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["one value", "the order"])
def test_any_change_gives_other_noise(change: str) -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    if change == "one value":
        other[3, 5] += 1e-6
    else:
        other[0, 0], other[0, 1] = values[0, 1], values[0, 0]
    first, second = content_noise(values).flatten(), content_noise(other).flatten()
    assert (first == second).float().mean() < 0.01
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.08  # 5 / sqrt(4096)


def test_the_noise_is_uniform() -> None:
    noise = content_noise(torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))).double()
    ordered, expected = noise.sort().values, (torch.arange(1 << 16) + 0.5) / (1 << 16)
    assert (ordered - expected).abs().max() < 2.3 / 2**8  # Kolmogorov-Smirnov: a false alarm once in 10^4
    assert noise.min() >= 0
    assert noise.max() < 1


# Rotation


@pytest.mark.parametrize("size", [16, 32])
def test_rotation_leaves_products_and_lengths(size: int) -> None:
    one, other = wide_values(5, 72), wide_values(7, 72, seed=1)
    torch.testing.assert_close(
        rotate_blocks(one, size).double() @ rotate_blocks(other, size).double().t(),
        one.double() @ other.double().t(),
        rtol=1e-4,
        atol=1e-2,
    )
    torch.testing.assert_close(rotate_blocks(one, size).norm(dim=1), one.norm(dim=1))


def test_rotation_spreads_an_outlier() -> None:
    values = torch.zeros(1, 32)
    values[0, 3] = 4.0
    rotated: Any = rotate_blocks(values, 16)
    assert rotated[0, :16].abs().tolist() == [1.0] * 16
    assert not rotated[0, 16:].any()
