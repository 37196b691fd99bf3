"""Four-bit storage: its bytes are numpy's, its envelope never is below, and storing again changes nothing."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from lightning_stosign import SignSGD, StatePrecision, StoSignSGD, promote_state, state_bytes
from lightning_stosign.optim.kernels import eager
from lightning_stosign.optim.numerics.fp4 import round_e2m1, round_e2m1_stochastically, round_e2m1_up
from lightning_stosign.optim.states.storage import init_state, pack, read_state, unpack, write_state

FP4 = "fp4-block:min_numel=0"
PRECISION = StatePrecision.parse(FP4)
quarters = hnp.arrays(np.float32, 16, elements=st.integers(-28, 28).map(lambda n: n / 4))
# A tensor that rounds to zeros, as one of subnormal numbers may, has another scale the next time.
arrays = hnp.arrays(
    np.float32, st.integers(1, 70), elements=st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
)
roundings = pytest.mark.parametrize("rounding", ["nearest", "up"])


def spread(size, seed=0, decades=12):
    """Magnitudes over many decades, with zeros and an outlier."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * 10.0 ** rng.uniform(-decades, 0, size)).astype(np.float32)
    values[::17] = 0
    values[0] = 7.3
    return values


def signed(values, rounding):
    return values if rounding == "nearest" else np.abs(values)


@given(quarters)
def test_e2m1_takes_ties_to_even_and_saturates(values):
    rounded = round_e2m1(torch.from_numpy(values)).double().numpy()
    np.testing.assert_array_equal(rounded, reference.round_nearest(values.astype(float), reference.E2M1))


@given(quarters)
def test_e2m1_up_is_the_smallest_number_not_below(values):
    rounded = round_e2m1_up(torch.from_numpy(np.abs(values))).double().numpy()
    np.testing.assert_array_equal(rounded, reference.round_up(np.abs(values.astype(float)), reference.E2M1))


@roundings
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("block_size", [16, 6])
def test_bytes_and_scales_are_those_of_the_definition(rounding, size, block_size):
    precision = StatePrecision.parse(f"fp4-block:block_size={block_size}")
    for seed in range(3):
        values = signed(spread(size, seed), rounding)
        packed = pack(torch.from_numpy(values), precision, rounding=rounding)
        by_hand = {"nearest": reference.round_nearest, "up": reference.round_up}[rounding]
        stored, scale, tensor_scale, read = reference.fp4(values, by_hand, block_size)
        np.testing.assert_array_equal(packed.stored.numpy(), stored)
        np.testing.assert_array_equal(packed.scale.double().numpy(), scale)
        assert packed.tensor_scale.item() == tensor_scale
        np.testing.assert_array_equal(unpack(packed, values.shape).double().numpy(), read)


@given(arrays)
@example(np.array([2.0**20, 1e-45], np.float32))
def test_up_never_is_below(values):
    value = torch.from_numpy(np.abs(values))
    assert bool((unpack(pack(value, PRECISION, rounding="up"), value.shape) >= value).all())


@given(arrays, st.integers(-60, 60))
def test_nearest_is_off_by_at_most_half_a_spacing(values, exponent):
    value = torch.from_numpy(values) * 2.0**exponent
    packed = pack(value, PRECISION)
    scale = (packed.scale.float() * packed.tensor_scale).repeat_interleave(16)[: value.numel()]
    magnitude = value.abs()
    spacing = torch.where(magnitude < 2 * scale, 0.5, torch.where(magnitude < 4 * scale, 1.0, 2.0)) * scale
    assert bool(((unpack(packed, value.shape) - value).abs() <= spacing / 2).all())


@roundings
@given(arrays)
@example(np.array([6.0] + 16 * [2.0**-10 * 2.2], np.float32))  # far below the largest: the smallest block scale
def test_storing_what_was_read_gives_the_same_bytes(rounding, values):
    once = pack(torch.from_numpy(signed(values, rounding)), PRECISION, rounding=rounding)
    twice = pack(unpack(once, values.shape), PRECISION, rounding=rounding)
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(first.double(), second.double())


def test_stochastic_rounding_is_unbiased_between_the_two_neighbours():
    draws = 20_000
    values = torch.tensor([0.3, -0.3, 1.7, -4.5, 5.9, 0.01, 0.0, 1.5, 3.0, -6.0])
    fraction = torch.rand(draws, len(values), generator=torch.Generator().manual_seed(0))
    rounded = round_e2m1_stochastically(values.expand(draws, -1), fraction).double()
    low, high = rounded.min(0).values, rounded.max(0).values
    nearest = round_e2m1(values).double()
    assert bool(((nearest == low) | (nearest == high)).all())
    assert all(len(rounded[:, i].unique()) <= 2 for i in range(len(values)))
    error = (rounded.mean(0) - values.double()).abs()
    assert bool((error <= 5 * (high - low) / 2 / math.sqrt(draws)).all())


def test_zeros_stay_zero_and_nan_takes_its_block():
    assert unpack(pack(torch.zeros(20), PRECISION), (20,)).tolist() == [0.0] * 20
    values = torch.ones(32)
    values[3] = torch.nan
    restored = unpack(pack(values, PRECISION), (32,))
    assert bool(restored[:16].isnan().all()) and not bool(restored[16:].isnan().any())


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2), (16, 16)])
def test_a_state_knows_its_shape_and_is_read_as_it_was_written(shape):
    state = {}
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    init_state(state, "m", value, PRECISION)
    assert torch.equal(read_state(state, "m", PRECISION), torch.zeros(shape))
    written = write_state(state, "m", value, PRECISION)
    assert torch.equal(read_state(state, "m", PRECISION), written) and written.shape == value.shape


def test_a_value_takes_four_and_a_half_bits_a_state():
    x = nn.Parameter(torch.zeros(256, 256))
    x.grad = torch.ones_like(x)
    optimizer = StoSignSGD([x], state_precision="fp4-block")
    optimizer.step()
    of_values = 2 * x.numel() * 4.5 / 8
    assert of_values <= state_bytes(optimizer) <= of_values + 2 * (4 + 2 * 8)  # a scale and a shape each
    assert optimizer.state[x]["exp_avg"].dtype == torch.uint8


# ---- in the optimizers -----------------------------------------------------------------------------------------------


def gradients(shape, steps):
    scales = torch.logspace(-3, 0, math.prod(shape)).view(shape)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scales for seed in range(steps)]


@pytest.mark.parametrize("chunk", [48, 1 << 18])
def test_a_run_is_that_of_algorithm_3_with_its_states_stored_so(monkeypatch, chunk):
    monkeypatch.setattr(eager, "_PIECE", chunk)
    x = nn.Parameter(torch.zeros(5, 23))
    optimizer = StoSignSGD([x], lr=0.25, state_precision=FP4)
    expected, m, G = np.zeros(x.numel()), np.zeros(x.numel(), np.float32), np.zeros(x.numel(), np.float32)
    for step, grad in enumerate(gradients(x.shape, 6), start=1):
        x.grad = grad
        optimizer.step()
        m = m + (grad.numpy().ravel() - m) * np.float32(1 - 0.9)
        m = reference.fp4(m)[3].astype(np.float32)
        G = reference.fp4(np.maximum(G, np.abs(m)), reference.round_up)[3].astype(np.float32)
        noise = reference.noise(reference.key(0, step, 0), x.numel())
        expected = expected - 0.25 * np.sign(m + G * noise)
        np.testing.assert_array_equal(read_state(optimizer.state[x], "exp_avg", PRECISION).numpy().ravel(), m)
        np.testing.assert_array_equal(read_state(optimizer.state[x], "exp_inf", PRECISION).numpy().ravel(), G)
        np.testing.assert_array_equal(x.detach().numpy().ravel(), expected)


@pytest.mark.parametrize("options", ["", ",stochastic_rounding=true", ",block_size=8"])
@pytest.mark.parametrize("beta2", [1.0, 0.5])
def test_the_envelope_covers_the_momentum_as_stored(options, beta2):
    x = nn.Parameter(torch.zeros(37, 23))
    optimizer = StoSignSGD([x], betas=(0.9, beta2), state_precision=FP4 + options)
    for grad in gradients(x.shape, 20):
        x.grad = grad
        optimizer.step()
        m, G = (read_state(optimizer.state[x], name, PRECISION) for name in ("exp_avg", "exp_inf"))
        assert bool((m.abs() <= G).all())
    assert bool(m.any())


@pytest.mark.parametrize("cls", [StoSignSGD, SignSGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_format_and_strides_do_not_matter(cls, dtype):
    base = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = [base.clone(), base.to(memory_format=torch.channels_last), base.mT.contiguous().mT]
    params = [nn.Parameter(layout) for layout in layouts]
    optimizers = [cls([param], 0.25, state_precision=FP4 + ",stochastic_rounding=true") for param in params]
    for grad in gradients(base.shape, 3):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param)
            optimizer.step()
    assert params[1].stride() != params[0].stride()
    for param, optimizer in zip(params[1:], optimizers[1:], strict=True):
        assert torch.equal(param, params[0])
        states = optimizer.state[param], optimizers[0].state[params[0]]
        assert torch.equal(*(state["exp_avg"] for state in states))


def copies(optimizer, params):
    """The optimizer after each way that there is to keep it, with the parameters it then has."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded_params = [nn.Parameter(param.detach().clone()) for param in params]
    loaded = type(optimizer)(loaded_params)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    yield loaded, loaded_params
    for keep in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        yield keep((optimizer, params))


def test_a_run_goes_on_bit_for_bit_however_it_was_kept():
    params = [nn.Parameter(torch.zeros(5, 23)), nn.Parameter(torch.zeros(16, dtype=torch.bfloat16))]
    optimizer = StoSignSGD(params, 0.25, state_precision=FP4 + ",stochastic_rounding=true")

    def go(optimizer, params, seed):
        for param in params:
            param.grad = gradients(param.shape, seed + 1)[seed].to(param.dtype)
        optimizer.step()

    for seed in range(3):
        go(optimizer, params, seed)
    kept = list(copies(optimizer, params))
    for seed in (3, 4):
        go(optimizer, params, seed)
    for other, other_params in kept:
        for seed in (3, 4):
            go(other, other_params, seed)
        for param, same in zip(params, other_params, strict=True):
            assert torch.equal(param, same)
            for name, value in optimizer.state[param].items():
                assert other.state[same][name].dtype == value.dtype
                assert torch.equal(other.state[same][name].double(), value.double()), name


@pytest.mark.slow
def test_fused_takes_the_eager_path_with_the_same_bits():
    params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
    optimizers = [
        StoSignSGD([p], 0.25, state_precision=FP4, fused=f) for p, f in zip(params, (True, False), strict=True)
    ]
    for grad in gradients((64, 64), 2):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize(("beta2", "warns"), [(0.999, True), (0.8, True), (0.75, False)])
def test_an_envelope_that_cannot_decay_is_warned_of(beta2, warns, recwarn):
    StoSignSGD([nn.Parameter(torch.ones(1))], betas=(0.9, beta2), state_precision=FP4)
    assert bool(recwarn) is warns


@pytest.mark.parametrize("seed", range(3))
def test_a_promoted_envelope_still_covers_the_momentum(seed):
    x = nn.Parameter(torch.zeros(37, 23))
    optimizer = StoSignSGD([x], state_precision=FP4)
    for grad in gradients(x.shape, 4 + seed):
        x.grad = grad
        optimizer.step()
    before = read_state(optimizer.state[x], "exp_inf", PRECISION)
    wider = promote_state(optimizer, x)
    assert str(wider) == "fp8-block:min_numel=0"
    m, G = (read_state(optimizer.state[x], name, wider) for name in ("exp_avg", "exp_inf"))
    assert bool((m.abs() <= G).all()) and bool((before <= G).all())
    assert "exp_avg_shape" not in optimizer.state[x]
    x.grad = grad
    optimizer.step()
