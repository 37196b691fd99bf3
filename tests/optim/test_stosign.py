import math

import numpy as np
import pytest
import reference
import torch

from lightning_stosign import StatePrecision, StoSignSGD, state_bytes
from lightning_stosign.optim.numerics.noise import noise_key, uniform_noise
from lightning_stosign.optim.states.storage import dequantize, read_state

SHAPE = (7, 11)


def run(optimizer, x, grads):
    """Step through given gradients; return the iterates."""
    iterates = []
    for g in grads:
        x.grad = torch.from_numpy(g).to(x.dtype)
        optimizer.step()
        iterates.append(x.detach().clone())
    return iterates


def problem(steps=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), rng.standard_normal((steps, *SHAPE)) * 0.1


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 1.0), (0.0, 1.0), (0.95, 0.9)])
@pytest.mark.parametrize("stochastic", [True, False])
def test_iterates_equal_the_reference(stochastic, betas, weight_decay, maximize):
    start, grads = problem()
    x = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = StoSignSGD([x], 0.01, betas, weight_decay, stochastic=stochastic, seed=3, maximize=maximize)
    iterates = run(optimizer, x, grads)
    noises = [
        reference.noise(reference.key(3, t, 0), start.size).reshape(SHAPE) if stochastic else None
        for t in range(1, len(grads) + 1)
    ]
    expected = reference.stosign(start, -grads if maximize else grads, 0.01, *betas, weight_decay, noises)
    np.testing.assert_allclose(torch.stack(iterates).numpy(), np.stack(expected), rtol=0, atol=1e-12)


def test_mean_of_the_update_is_v_over_envelope_and_each_is_a_sign():
    draws, count = 20_000, 1_000
    rng = np.random.default_rng(0)
    envelope = torch.from_numpy(np.exp(rng.uniform(-12, 3, count))).float()
    v = envelope * torch.from_numpy(rng.uniform(-1, 1, count)).float()
    x = torch.nn.Parameter(torch.zeros(count))
    optimizer = StoSignSGD([x], lr=1.0, betas=(0.0, 1.0))
    x.grad = envelope
    optimizer.step()  # exp_inf is the envelope from now on
    x.grad = v
    total = torch.zeros(count, dtype=torch.float64)
    for _ in range(draws):
        x.data.zero_()
        optimizer.step()
        total -= x.detach()
        assert set(x.detach().unique().tolist()) <= {-1.0, 0.0, 1.0}
    u = (v / envelope).double()
    standard_error = ((1 - u.square()) / draws).sqrt()
    assert bool(((total / draws - u).abs() <= 5 * standard_error).all())


def test_coordinate_without_momentum_and_envelope_is_dead():
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = StoSignSGD([x], lr=0.5)
    run(optimizer, x, [np.array([0.0, 1.0])])
    assert x[0] == 1 and x[1] != 1


def test_coordinate_at_its_envelope_follows_the_sign():
    x = torch.nn.Parameter(torch.zeros(10_000))
    x.grad = torch.linspace(-1, 1, 10_000)
    StoSignSGD([x], lr=1.0).step()  # the first step: |m| = G everywhere
    assert torch.equal(x.detach(), -torch.sign(torch.linspace(-1, 1, 10_000)))


def test_gradients_of_another_scale_give_the_same_steps():
    start, grads = problem()
    iterates = []
    for scale in (1.0, 2.0**-20):
        x = torch.nn.Parameter(torch.from_numpy(start).float())
        iterates.append(run(StoSignSGD([x], 0.01, state_precision="fp8:min_numel=0"), x, grads * scale)[-1])
    assert torch.equal(*iterates)


@pytest.mark.parametrize("beta2", [1.0, 0.8])
@pytest.mark.parametrize(
    "precision",
    [
        *(
            "float32",
            "bfloat16:min_numel=0",
            "float16:min_numel=0",
            "fp8:min_numel=0",
            "fp8-raw:min_numel=0",
            "fp8-raw:static_scale=1024,min_numel=0",
        ),
        *(
            "fp8-block:block_size=8,min_numel=0",
            "fp8:dtype=float8_e5m2,min_numel=0",
            "fp8:stochastic_rounding=true,min_numel=0",
        ),
    ],
)
def test_stored_envelope_covers_the_stored_momentum(precision, beta2):
    start, grads = problem(steps=60)
    x = torch.nn.Parameter(torch.from_numpy(start).float())
    optimizer = StoSignSGD([x], 0.01, (0.9, beta2), state_precision=precision)
    for g in grads * np.logspace(-3, 3, 60)[::-1].reshape(-1, 1, 1):
        run(optimizer, x, [g])
        m, G = (read_state(optimizer.state[x], s, StatePrecision.parse(precision)) for s in ("exp_avg", "exp_inf"))
        assert bool((m.abs() <= G).all())


def test_envelope_in_fp8_does_not_creep():
    x = torch.nn.Parameter(torch.zeros(1000))
    optimizer = StoSignSGD([x], 0.01, (0.0, 1.0), state_precision="fp8:min_numel=0")
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0)).numpy()
    run(optimizer, x, [g])
    first = optimizer.state[x]["exp_inf"].float()
    run(optimizer, x, [g / 2] * 50)
    assert torch.equal(optimizer.state[x]["exp_inf"].float(), first)


def test_fp8_states_take_two_bytes_a_parameter():
    x = torch.nn.Parameter(torch.zeros(1024, 8))
    optimizer = StoSignSGD([x], state_precision="fp8:min_numel=0")
    run(optimizer, x, [np.ones((1024, 8))])
    assert state_bytes(optimizer) == 2 * x.numel() + 2 * 4  # and a float32 scale each


@pytest.mark.parametrize(
    "precision",
    ["fp8", "fp8-raw", "fp8-raw:static_scale=1024", "fp8-block", "fp8:dtype=float8_e5m2", "bfloat16", "float16"],
)
def test_a_slow_decay_of_the_stored_envelope_is_kept_on_average(precision):
    steps, beta2 = 40, 0.995
    start = torch.linspace(1, 2, 1 << 14).numpy()
    x = torch.nn.Parameter(torch.zeros(start.size))
    optimizer = StoSignSGD([x], 0.01, (0.0, beta2), state_precision=precision)
    run(optimizer, x, [start])
    before = read_state(optimizer.state[x], "exp_inf", StatePrecision.parse(precision)).double()
    run(optimizer, x, [np.zeros_like(start)] * steps)
    after = read_state(optimizer.state[x], "exp_inf", StatePrecision.parse(precision)).double()
    ratio = after / (before * beta2**steps)
    # 5 standard errors: one false alarm in 1.7 million.
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / start.size**0.5 + 1e-4
    assert bool((after <= before).all()) and float(after.min()) > 0


def test_an_envelope_that_is_not_to_decay_does_not():
    x = torch.nn.Parameter(torch.zeros(4096))
    optimizer = StoSignSGD([x], 0.01, (0.0, 1.0), state_precision="fp8:stochastic_rounding=true")
    run(optimizer, x, [np.linspace(1, 2, 4096)])
    before = optimizer.state[x]["exp_inf"].float()
    run(optimizer, x, [np.zeros(4096)] * 20)
    assert torch.equal(optimizer.state[x]["exp_inf"].float(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_half_a_spacing_of_a_low_precision_parameter_are_kept_on_average(dtype):
    # bfloat16 numbers near 1 are 2**-8 apart below it: rounded to nearest, a step of 1e-4 would always be lost.
    x = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = StoSignSGD([x], lr=1e-4, betas=(0.0, 1.0))
    run(optimizer, x, [np.ones(20_000)] * 20)
    moved = 1 - x.detach().double()
    assert abs(moved.mean().item() - 20e-4) < 5 * moved.std().item() / math.sqrt(20_000)


def test_parameter_in_any_memory_format_draws_the_same_noise():
    start = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for layout in (
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        x = torch.nn.Parameter(layout(start))
        optimizer = StoSignSGD([x], 0.01, state_precision="fp8-block:min_numel=0")
        for _ in range(3):
            x.grad = layout(grad)
            optimizer.step()
        results.append(x.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_noise_belongs_to_the_parameters_place_among_all():
    # A frozen or unused parameter before it, or another grouping, must not shift the noise of the others.
    x = torch.nn.Parameter(torch.zeros(100))
    unused = torch.nn.Parameter(torch.zeros(3))
    optimizer = StoSignSGD([{"params": [unused]}, {"params": [x]}], lr=1.0, betas=(0.0, 1.0), seed=5)
    run(optimizer, x, [np.ones(100)])
    run(optimizer, x, [np.full(100, 0.25)])
    expected = -1 - torch.sign(0.25 + uniform_noise(noise_key(5, 2, 1), 100))
    assert torch.equal(x.detach(), expected)


def figure_1(x):
    return (x[0] + x[1]).abs() + 2 * (x[0] - x[1]).abs()


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_averaged_iterate_obeys_theorem_4(steps):
    # f is Lipschitz with L = (3, 3); X = [-1, 1]^2 has l_inf diameter 2; f* = 0.
    values = []
    for seed in range(20):
        x = torch.nn.Parameter(torch.tensor([0.9, -0.4], dtype=torch.float64))
        optimizer = StoSignSGD([x], betas=(0.0, 1.0), seed=seed)
        average = torch.zeros(2, dtype=torch.float64)
        for t in range(1, steps + 1):
            average += x.detach() / steps
            optimizer.zero_grad()
            figure_1(x).backward()
            optimizer.param_groups[0]["lr"] = 2 / math.sqrt(2 * t)
            optimizer.step()
            x.data.clamp_(-1, 1)
        values.append(figure_1(average).item())
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert mean - 5 * error <= math.sqrt(2) * 2 * 6 / math.sqrt(steps)
    assert mean < 0.5 * abs(0.9 - 0.4)  # and below what SignSGD can reach from here, see test_signsgd.py


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"betas": (1.0, 1.0)}, ValueError, r"betas\[0\]=1.0 must be in \[0, 1\)"),
        ({"betas": (-0.1, 1.0)}, ValueError, r"betas\[0\]=-0.1"),
        ({"betas": (0.9, 0.0)}, ValueError, r"betas\[1\]=0.0 must be in \(0, 1\]"),
        ({"betas": (0.9, 1.1)}, ValueError, r"betas\[1\]=1.1"),
        ({"betas": (0.9, float("nan"))}, ValueError, r"betas\[1\]=nan"),
        ({"betas": 0.9}, TypeError, "betas=0.9 must be a pair"),
        ({"betas": (0.9, 1.0, 1.0)}, TypeError, "must be a pair"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 0.5}, TypeError, "seed=0.5"),
        ({"stochastic": "yes"}, ValueError, "stochastic='yes'"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        StoSignSGD([torch.nn.Parameter(torch.zeros(2))], **arguments)


def test_momentum_rounded_stochastically_does_not_stall():
    # With beta1 = 0.99 a step of the momentum is 1% of the gradient: below half of E4M3's spacing (6% at best).
    x = torch.nn.Parameter(torch.zeros(4096))
    momenta = {}
    for spec in ("fp8:min_numel=0", "fp8:stochastic_rounding=true,min_numel=0"):
        optimizer = StoSignSGD([x], betas=(0.99, 1.0), state_precision=spec)
        run(optimizer, x, [np.ones(4096)] * 300)
        state = optimizer.state[x]
        momenta[spec] = dequantize(state["exp_avg"], state["exp_avg_scale"], StatePrecision.parse(spec)).mean().item()
    assert momenta["fp8:min_numel=0"] < 0.5  # stuck on the way to 1
    assert abs(momenta["fp8:stochastic_rounding=true,min_numel=0"] - (1 - 0.99**300)) < 0.02
