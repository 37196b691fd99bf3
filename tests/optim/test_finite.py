"""Finite stays finite: no gradient, however large or small, leaves inf or NaN in a state or a parameter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_stosign import (
    ALIAS,
    SignConverted,
    SignSGD,
    StatePrecision,
    StoSignSGD,
    emulate_state_precision,
    promote_state,
)
from lightning_stosign.optim.promotion import state_precision_of
from lightning_stosign.optim.states.storage import read_state

FORMATS = ["float32", "bfloat16", "float16", "fp8-raw", "fp8", "fp8-block:block_size=16", "fp4-block"]
FORMATS += ["fp8:dtype=float8_e5m2", "fp8:dtype=float16", "fp8-raw:static_scale=9.223372036854775808e18"]
FORMATS += ["fp8-raw:dtype=float8_e5m2", "fp8-raw:static_scale=1.0842021724855044e-19"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
M = torch.finfo(torch.float32).max
NUMEL = 33

RULES = {
    "StoSignSGD": (StoSignSGD, {}),
    "decaying": (StoSignSGD, {"betas": (0.9, 0.9)}),
    "in expectation": (StoSignSGD, {"betas": (0.0, 0.5), "stochastic": False}),
    "SignSGD": (SignSGD, {}),
}

magnitudes = st.one_of(
    st.sampled_from([0.0, M, M / 2, 2.0**126, 2.0**127, 2.0**-149, 2.0**-126, 1.0, 448.0, 65504.0, 1.9375 * 2.0**127]),
    st.floats(-149, 127.999).map(lambda power: min(2.0**power, M)),
)
gradients = st.lists(
    st.lists(st.tuples(magnitudes, st.sampled_from([-1.0, 1.0])), min_size=1, max_size=NUMEL), min_size=1, max_size=4
)


def all_finite(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        assert bool(param.isfinite().all())
        for name, value in optimizer.state[param].items():
            assert not torch.is_tensor(value) or bool(value.double().isfinite().all()), name
        precision = state_precision_of(optimizer, param)
        for name in ("exp_avg", "exp_inf"):
            if precision is not None and name in optimizer.state[param]:
                assert bool(read_state(optimizer.state[param], name, precision).isfinite().all()), name


def gradient(values, dtype):
    of_pattern = torch.tensor([size * sign for size, sign in values], dtype=torch.float64)
    largest = torch.finfo(dtype).max
    return of_pattern.repeat(NUMEL)[:NUMEL].clamp(-largest, largest).to(dtype)


def train(cls, options, steps, dtype, start=1.0, lr=0.1):
    x = nn.Parameter(torch.full((NUMEL,), start, dtype=dtype))
    optimizer = cls([x], lr, **options)
    for values in steps:
        x.grad = gradient(values, dtype)
        optimizer.step()
        all_finite(optimizer)
    return x, optimizer


def assert_same_bits(one, other):
    (x, a), (y, b) = one, other
    assert torch.equal(x, y)
    for name, value in a.state[x].items():
        assert torch.equal(value.double(), b.state[y][name].double()), name


def narrow(precision, at_random):
    """Name the precision of small tensors too."""
    at_random = at_random and precision != "float32"
    return f"{precision}{',' if ':' in precision else ':'}min_numel=0,stochastic_rounding={at_random}"


def each_format(test):
    """All formats for float32 parameters; the others are slow for the many kernels that they compile."""
    cases = [pytest.param(p, d, id=f"{p}-{d}", marks=[pytest.mark.slow] * (d is not torch.float32))
             for d in DTYPES for p in FORMATS]  # fmt: skip
    return pytest.mark.parametrize(("precision", "dtype"), cases)(test)


@each_format
@settings(max_examples=8, deadline=None)
@given(steps=gradients, rule=st.sampled_from(list(RULES)), at_random=st.booleans())
def test_any_finite_gradients_leave_finite_states(precision, dtype, steps, rule, at_random):
    cls, options = RULES[rule]
    train(cls, {**options, "state_precision": narrow(precision, at_random), "fused": False}, steps, dtype)


@each_format
@settings(max_examples=8, deadline=None)
@given(steps=gradients, decays=st.booleans())
def test_any_finite_gradients_have_the_eager_step_s_bits_natively(precision, dtype, steps, decays):
    options = {"betas": (0.9, 0.9 if decays else 1.0), "state_precision": narrow(precision, not decays)}
    runs = [train(StoSignSGD, {**options, "fused": fused}, steps, dtype) for fused in (False, True)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("precision", FORMATS)
def test_gradients_of_float32_s_largest_number_do_not_poison(precision, at_random, fused):
    spec = narrow(precision, at_random)
    there_and_back = [[(M, 1.0)], [(M, -1.0)], [(M, 1.0)]]
    x, optimizer = train(StoSignSGD, {"state_precision": spec, "fused": fused}, there_and_back, torch.float32)
    for _ in range(20):
        x.grad = torch.ones(NUMEL)
        optimizer.step()
    all_finite(optimizer)


def test_what_counts_of_a_gradient_is_two_to_the_126th():
    (x, a), (y, b) = (train(StoSignSGD, {}, [[(size, 1.0)]], torch.float32) for size in (M, 2.0**126))
    assert torch.equal(a.state[x]["exp_avg"], b.state[y]["exp_avg"])
    (x, a), _ = (train(StoSignSGD, {"betas": (0.0, 1.0)}, [[(2.0**126, -1.0)]], torch.float32) for _ in range(2))
    assert bool((a.state[x]["exp_avg"] == -(2.0**126)).all())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lr", "weight_decay"), [(1e38, 0.0), (3e38, 0.0), (1.0, 5.0), (1e4, 1.0), (1e3, 0.0)])
def test_no_step_takes_a_parameter_beyond_its_largest_number(dtype, rounding, fused, lr, weight_decay):
    largest = torch.finfo(dtype).max
    for start in (largest, -largest):
        options = {"param_rounding": rounding, "fused": fused, "weight_decay": weight_decay}
        train(StoSignSGD, options, [[(1.0, 1.0), (1.0, -1.0)]] * 3, dtype, start=start, lr=lr)


def test_a_float64_parameter_s_states_stay_finite():
    for precision in (None, *(narrow(name, False) for name in ("float32", "fp8", "fp4-block"))):
        x = nn.Parameter(torch.ones(NUMEL, dtype=torch.float64))
        optimizer = StoSignSGD([x], state_precision=precision)
        for sign in (1, -1, 1):
            x.grad = torch.full_like(x, sign * torch.finfo(torch.float64).max)
            optimizer.step()
            all_finite(optimizer)


def test_an_infinite_gradient_is_still_found():
    for precision in (None, "fp8:min_numel=0", "fp8-block:min_numel=0", "fp4-block:min_numel=0"):
        for fused in (False, True):
            for value in (math.inf, -math.inf, math.nan):
                x = nn.Parameter(torch.ones(NUMEL))
                optimizer = StoSignSGD([x], state_precision=precision, fused=fused)
                x.grad = torch.full_like(x, M)
                x.grad[7] = value
                with pytest.raises(RuntimeError, match="is not finite"):
                    optimizer.step()
                assert bool((x == 1).all())


@pytest.mark.parametrize("precision", ["fp8-raw", "fp8", "fp8-block", "fp4-block", "float16"])
def test_promotion_keeps_what_is_finite(precision):
    x, optimizer = train(
        StoSignSGD, {"state_precision": f"{precision}:min_numel=0"}, [[(M, 1.0), (1.0, -1.0)]], torch.float32
    )
    while state_precision_of(optimizer, x).dtype is not torch.float32:
        promote_state(optimizer, x)
        all_finite(optimizer)


@pytest.mark.parametrize("precision", ["fp8-raw", "fp8", "fp8:dtype=float16", "fp8-block", "fp4-block", "bfloat16"])
def test_emulated_storage_of_float32_s_largest_numbers_stays_finite(precision):
    x = nn.Parameter(torch.ones(NUMEL))
    optimizer = torch.optim.SGD([x], 1e-3, momentum=0.5)
    emulate_state_precision(optimizer, narrow(precision, False))
    for values in ([(M, 1.0), (1.0, -1.0)], [(0.0, 1.0)], [(1.9375 * 2.0**126, 1.0)]):
        x.grad = gradient(values, torch.float32)
        optimizer.step()
        assert bool(optimizer.state[x]["momentum_buffer"].isfinite().all())


@pytest.mark.parametrize(
    "make",
    [lambda params: SignConverted(params, StoSignSGD), lambda params: ALIAS(params, same_batch=False, d0=0.1)],
    ids=["SignConverted", "ALIAS"],
)
def test_wrapped_and_parameter_free_steps_stay_finite(make):
    x = nn.Parameter(torch.ones(NUMEL))
    optimizer = make([x])
    for sign in (1, -1, 1, 1):
        x.grad = torch.full_like(x, sign * M)
        optimizer.step(lambda: 1.0)
        assert bool(x.isfinite().all())
        assert all(bool(v.double().isfinite().all()) for v in optimizer.state[x].values() if torch.is_tensor(v))


@pytest.mark.parametrize("scale", [2.0**64, 2.0**-64])
def test_a_static_scale_whose_square_leaves_float32_is_refused(scale):
    with pytest.raises(ValueError, match="static_scale="):
        StatePrecision(torch.float8_e4m3fn, static_scale=scale)
