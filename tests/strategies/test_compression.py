"""What the bits mean, on average and one by one; workers are simulated in this process."""

import math

import numpy as np
import pytest
import torch

from lightning_stosign.strategies.compression import (
    Layout,
    SignCode,
    add_residuals_,
    collect_,
    decode_,
    keep_residuals_,
)
from lightning_stosign.strategies.counts import counts_width, pack_counts, unpack_counts
from lightning_stosign.strategies.packing import count_votes, majority, pack_signs, unpack_planes


def layout_of(workers, *numels, exact=()):
    layout = Layout(workers)
    for index, numel in enumerate(numels):
        layout.add(f"p{index}", index, numel, compress=index not in exact)
    return layout


def in_place_of_workers(grads, layout, aggregation, step, *, stochastic=True, seed=0):
    """Do what the workers' exchange does, without any exchange. ``grads``: [workers, numel]."""
    workers = len(grads)
    codes = [SignCode(stochastic, seed, rank) for rank in range(workers)]
    values = torch.zeros(workers, layout.padded)
    for of_worker, grad in zip(values, grads, strict=True):
        collect_(of_worker, grad, layout.compressed)
    local = torch.stack([code.local_scales(v, layout) for code, v in zip(codes, values, strict=True)])
    scales = local.amax(0) if stochastic else local.mean(0)
    for code, v in zip(codes, values, strict=True):
        code.perturb_(v, layout, scales, step)
    signs = [
        pack_signs(v.view(workers, -1), zero_is_positive=code.zero_is_positive(step))
        for code, v in zip(codes, values, strict=True)
    ]
    voters = workers if aggregation == "mean" else 1
    results = torch.empty(workers, counts_width(layout.width, voters), dtype=torch.uint8)
    for rank in range(workers):
        votes = torch.stack([of_worker[rank] for of_worker in signs])
        if aggregation == "mean":
            pack_counts(count_votes(votes), voters, out=results[rank])
            continue
        if workers % 2 == 0:
            coins = codes[rank].tie_breaker(layout, step, torch.empty(8 * layout.width, dtype=torch.int8))
            votes = torch.cat([votes, pack_signs(coins.view(1, -1), zero_is_positive=True)])
        pack_counts(majority(votes), voters, out=results[rank])
    counts = unpack_counts(results, voters, out=torch.empty(workers, 8 * layout.width)).view(-1)
    flat = grads[0].clone()
    decode_(flat, counts, layout, scales, voters)
    return flat


@pytest.mark.parametrize("rounds", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mean_of_stochastic_signs_is_the_mean_gradient_within_five_standard_errors(rounds):
    grads = torch.tensor([[0.0, 1.0, -1.0, 0.3, -0.01, 0.5, 2e-4], [0.0, 1.0, 0.2, -0.3, -0.02, -0.5, 1e-4]])
    layout = layout_of(2, 7)
    total, squares = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for step in range(1, rounds + 1):
        estimate = in_place_of_workers(grads, layout, "mean", step, seed=11).double()
        total += estimate
        squares += estimate**2
    mean = total / rounds
    standard_error = ((squares / rounds - mean**2).clamp(min=0) / rounds).sqrt()
    assert bool(((mean - grads.double().mean(0)).abs() <= 5 * standard_error + 1e-7).all())
    # ... and it says something: the standard error is that of two independent coins within the envelope of 1.
    variance = (1 - grads.double() ** 2).mean(0) / 2
    assert torch.allclose(standard_error, (variance / rounds).sqrt(), rtol=0.2, atol=1e-9)


@pytest.mark.parametrize(("workers", "stochastic"), [(2, True), (2, False), (4, False), (6, False)])
def test_ties_fall_to_either_side_alike(workers, stochastic):
    # Half the workers want up and half down: all coordinates tie under plain signs.
    grads = torch.ones(workers, 50_000)
    grads[: workers // 2] *= -1
    result = in_place_of_workers(grads, layout_of(workers, 50_000), "majority", 1, stochastic=stochastic)
    assert set(result.unique().tolist()) == {-1.0, 1.0}
    assert abs(result.mean().item()) < 5 / math.sqrt(50_000)
    again = in_place_of_workers(grads, layout_of(workers, 50_000), "majority", 2, stochastic=stochastic)
    assert abs((result * again).mean().item()) < 5 / math.sqrt(50_000)  # drawn anew each step


def test_result_does_not_depend_on_how_parameters_are_grouped():
    torch.manual_seed(0)
    a, b = torch.randn(4, 700), torch.randn(4, 333)
    for aggregation in ("majority", "mean"):
        together = in_place_of_workers(torch.cat([a, b], 1), layout_of(4, 700, 333), aggregation, 5)
        alone = Layout(4)
        alone.add("p1", 1, 333, compress=True)
        assert torch.equal(together[700:], in_place_of_workers(b, alone, aggregation, 5))
        assert torch.equal(together[:700], in_place_of_workers(a, layout_of(4, 700), aggregation, 5))


def test_workers_draw_different_noise_and_each_the_same_again():
    layout = layout_of(1, 4096)
    drawn = []
    for rank, step in ((0, 1), (1, 1), (0, 2), (0, 1)):
        values = torch.zeros(4096)
        SignCode(True, 3, rank).perturb_(values, layout, torch.ones(1), step)
        drawn.append(values)
    assert torch.equal(drawn[0], drawn[3])
    for other in drawn[1:3]:
        assert abs(torch.corrcoef(torch.stack([drawn[0], other]))[0, 1].item()) < 5 / 64
    before = torch.get_rng_state()
    SignCode(True, 3, 0).perturb_(values, layout, torch.ones(1), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_plain_signs_of_zeros_cancel_over_workers_and_steps():
    zeros_but_one = torch.zeros(2, 16)
    zeros_but_one[:, 0] = 1.0
    layout = layout_of(2, 16)
    for step in (1, 2):
        result = in_place_of_workers(zeros_but_one, layout, "mean", step, stochastic=False)
        assert result[0] > 0 and not result[1:].any()
    alone = [
        in_place_of_workers(zeros_but_one[:1], layout_of(1, 16), "mean", step, stochastic=False) for step in (1, 2)
    ]
    assert alone[0][1:].any() and not (alone[0] + alone[1])[1:].any()


@pytest.mark.parametrize("stochastic", [True, False])
def test_parameter_without_any_gradient_stays_without(stochastic):
    grads = torch.randn(3, 40)
    grads[:, 8:24] = 0
    result = in_place_of_workers(grads, layout_of(3, 8, 16, 16), "majority", 1, stochastic=stochastic)
    assert not result[8:24].any() and result[:8].all() and result[24:].all()


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("aggregation", ["majority", "mean"])
def test_value_that_is_not_finite_makes_its_parameter_and_no_other_not_finite(stochastic, bad, aggregation):
    grads = torch.ones(4, 24)
    grads[2, 10] = bad
    result = in_place_of_workers(grads, layout_of(4, 8, 8, 8), aggregation, 1, stochastic=stochastic)
    assert not result[8:16].isfinite().any() and result[:8].isfinite().all() and result[16:].isfinite().all()


def test_what_was_lost_is_added_to_the_next_values():
    layout = layout_of(1, 3, 8, 5, exact=(1,))
    torch.manual_seed(0)
    residuals, total_sent, total = {}, torch.zeros(16), torch.zeros(16)
    code = SignCode(False, 0, 0)
    for step in range(1, 30):
        flat = torch.randn(16)
        total += flat
        values = torch.zeros(layout.padded)
        collect_(values, flat, layout.compressed)
        add_residuals_(values, layout, residuals)
        scales = code.local_scales(values, layout)
        zero = code.zero_is_positive(step)
        keep_residuals_(values, layout, scales, residuals, zero_is_positive=zero)
        counts = unpack_planes(pack_signs(values.view(1, -1), zero_is_positive=zero)[None], torch.empty(1, 8))
        decode_(flat, counts.view(-1), layout, scales, voters=1)
        total_sent += flat
    assert sorted(residuals) == ["p0", "p2"]
    owed = torch.cat([residuals["p0"], torch.zeros(8), residuals["p2"]])
    assert torch.allclose(total_sent + owed, total, atol=1e-5)


def test_residual_survives_a_gradient_that_is_not_finite():
    layout = layout_of(1, 4)
    residuals = {"p0": torch.arange(4.0)}
    values = torch.full((layout.padded,), torch.inf)
    keep_residuals_(values, layout, torch.tensor([torch.inf]), residuals, zero_is_positive=False)
    assert residuals["p0"].tolist() == [0, 1, 2, 3]


def test_parameters_without_values_and_uncompressed_ones_take_no_bits():
    layout = layout_of(2, 0, 5, 3, 0, 9, exact=(2,))
    assert [(s.index, s.start, s.at, s.numel) for s in layout.compressed] == [(1, 0, 0, 5), (4, 8, 5, 9)]
    assert [(s.index, s.start, s.at, s.numel) for s in layout.exact] == [(2, 5, 0, 3)]
    assert (layout.width, layout.padded) == (1, 16)


def test_noise_of_a_long_parameter_is_one_function_of_the_element(monkeypatch):
    values = torch.zeros(1000)
    SignCode(True, 0, 1).perturb_(values, layout_of(1, 1000), torch.ones(1), 1)
    monkeypatch.setattr("lightning_stosign.strategies.compression.CHUNK", 77)
    in_chunks = torch.zeros(1000)
    SignCode(True, 0, 1).perturb_(in_chunks, layout_of(1, 1000), torch.ones(1), 1)
    assert np.array_equal(values.numpy(), in_chunks.numpy())
