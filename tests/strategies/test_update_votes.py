"""Votes on updates between real processes, against numpy and against the optimizer alone."""

from functools import partial

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
from reference import coins, key, noise
from torch import nn
from workers import run_workers

from lightning_stosign import SignConverted, SignSGD, StoSignSGD
from lightning_stosign.strategies import update_votes
from lightning_stosign.strategies.update_votes import UpdateBallot
from lightning_stosign.strategies.wire import Wire

WORKER, TIE = 3, 4  # streams of the noise
SHAPES = {"a": (7, 3), "b": (5,), "c": (11, 23), "d": (0, 4), "e": (), "f": (16, 9)}
STEPS, LR, DECAY, SEED, TIE_SEED = 5, 0.125, 0.25, 3, 9


def gradients(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    grads = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    grads["c"][:4] = 0  # no worker ever has an update here
    return grads


def start(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def connect(optimizer, *, by_majority, warmup_steps=0, noise=1.0):
    options = {"by_majority": by_majority, "seed": TIE_SEED, "warmup_steps": warmup_steps, "watch": True}
    options["noise"] = noise
    ballot = UpdateBallot(lambda param: param.ndim > 1, Wire(dist.new_group()), **options)
    optimizer.vote_by(ballot)
    return ballot


def train(
    cls=StoSignSGD,
    *,
    by_majority,
    dtype=torch.float32,
    connected=True,
    warmup_steps=0,
    lacks=None,
    noise=1.0,
    **options,
):
    """Take steps by prescribed gradients; return each step's parameters, the bytes sent and the last states."""
    params, rank = start(dtype), dist.get_rank()
    if cls is StoSignSGD:
        options["seed"] = SEED
    optimizer = cls(params.items(), lr=LR, weight_decay=DECAY, **options)
    ballot = connect(optimizer, by_majority=by_majority, warmup_steps=warmup_steps, noise=noise) if connected else None
    steps, sent, agreement = [], [], []
    for step in range(1, STEPS + 1):
        for name, grad in gradients(rank, step, dtype).items():
            params[name].grad = None if lacks and lacks(rank, step, name) else grad
        optimizer.step()
        steps.append({name: param.detach().clone() for name, param in params.items()})
        sent.append(ballot.bytes_sent if ballot else 0)
        agreement.append(ballot.agreement() if ballot else 0)
    states = {name: {k: v for k, v in optimizer.state[p].items() if k != "step"} for name, p in params.items()}
    if ballot:
        ballot.close()
    counted = [group.get("steps", STEPS) for group in optimizer.param_groups]
    return {"steps": steps, "bytes": sent, "states": states, "agreement": agreement, "counted": counted}


class Counting(torch.optim.Optimizer):
    """Momentum; counts its steps in the param group, as some libraries' optimizers do."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    m = self.state[param].setdefault("m", torch.zeros_like(param))
                    m.add_((param.grad - m) * 0.1)
                    param.sub_(group["lr"] * m)


# Over its running maximum, it is StoSignSGD.
CONVERTED = partial(SignConverted, base=Counting, normalize=True, seed=SEED)


def sometimes_unused(rank, step, name):
    return (name == "a" and rank == 0) or (name == "f" and step == 2) or (name == "b" and rank == step % 2)


CASES = {
    "majority": {"by_majority": True},
    "mean": {"by_majority": False},
    "plain signs": {"cls": SignSGD, "by_majority": True},
    "no momentum": {"cls": SignSGD, "momentum": 0.0, "by_majority": False},
    "converted": {"cls": CONVERTED, "by_majority": False},
    "less noise": {"by_majority": False, "noise": 0.25},
    "converted, less noise": {"cls": CONVERTED, "by_majority": True, "noise": 0.25},
}
OTHERS = {
    "fp8": {"by_majority": True, "state_precision": "fp8:min_numel=1"},
    "fp4": {"by_majority": False, "state_precision": "fp4-block:min_numel=1"},
    "bfloat16": {"by_majority": False, "dtype": torch.bfloat16},
    "to nearest": {"by_majority": False, "dtype": torch.bfloat16, "param_rounding": "nearest"},
    "unused": {"by_majority": False, "lacks": sometimes_unused},
    "converted, unused": {"cls": CONVERTED, "by_majority": False, "lacks": sometimes_unused},
    "warm-up": {"by_majority": True, "warmup_steps": 2},
}


def all_cases(rank, workers):
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    results = {name: train(**options) for name, options in (CASES | OTHERS).items()}
    update_votes.BUCKET_VALUES = 1
    results["many buckets"] = train(by_majority=False)
    results["alone"] = train(by_majority=True, connected=False)
    return results


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def results(request):
    return run_workers(all_cases, request.param)


def voted(grads, step, index, shape, case):
    """Return the vote on a parameter's update: from all gradients so far, [steps, workers, numel]."""
    options, workers = CASES[case], grads.shape[1]
    beta = np.float32(options.get("momentum", 0.9))
    m, G = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for g in grads:
        m = m + (g - m) * np.float32(1 - beta)
        G = np.maximum(G, np.abs(m))
    if options.get("cls") is not SignSGD:
        seeds = [SEED if rank == 0 else key(SEED, rank, 0, WORKER) for rank in range(workers)]
        m = m + np.float32(options.get("noise", 1)) * G * np.stack(
            [noise(key(seed, step, index), m.shape[1]) for seed in seeds]
        ).astype(np.float32)
    positive = np.where(m == 0, ((step + np.arange(workers)) % 2 == 1)[:, None], m > 0)
    count = positive.sum(0)
    if not options["by_majority"]:
        return (2 * count - workers) / workers
    heads = coins(key(TIE_SEED, (step + 1) // 2, index, TIE), m.shape[1]) ^ (step % 2 == 0)
    return np.where(np.where(2 * count == workers, heads, 2 * count > workers), 1, -1)


@pytest.mark.parametrize("case", CASES)
def test_every_worker_steps_by_numpys_vote(results, case):
    workers = len(results)
    for index, (name, shape) in enumerate(SHAPES.items()):
        if len(shape) < 2 or 0 in shape:
            continue
        grads = np.stack(
            [[gradients(rank, s)[name].flatten().numpy() for rank in range(workers)] for s in range(1, STEPS + 1)]
        )
        x = start()[name].detach().numpy()
        for step in range(1, STEPS + 1):
            vote = voted(grads[:step], step, index, shape, case).reshape(shape)
            x = x - LR * vote - LR * DECAY * x
            for result in results:
                assert np.allclose(result[case]["steps"][step - 1][name], x, rtol=1e-5, atol=1e-6), (name, step)


def test_parameters_are_the_same_bits_on_all_workers(results):
    for case, first in results[0].items():
        for result in results[1:] if case != "alone" else []:
            for ours, theirs in zip(result[case]["steps"], first["steps"], strict=True):
                assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), case


def test_momenta_are_each_workers_own_where_workers_vote_and_common_elsewhere(results):
    for result in results[1:]:
        ours, first = result["fp8"]["states"], results[0]["fp8"]["states"]
        for name in ("a", "c", "f"):
            assert not torch.equal(ours[name]["exp_avg"].float(), first[name]["exp_avg"].float()), name
        for name in ("b", "e"):
            assert torch.equal(ours[name]["exp_avg"].float(), first[name]["exp_avg"].float()), name


def test_vectors_step_by_the_mean_gradient(results):
    workers = len(results)
    params = start()
    optimizer = StoSignSGD(params.items(), lr=LR, weight_decay=DECAY, seed=SEED)
    for step in range(1, STEPS + 1):
        of_workers = [gradients(rank, step) for rank in range(workers)]
        for name, param in params.items():
            param.grad = torch.stack([grads[name] for grads in of_workers]).div(workers).sum(0)
        optimizer.step()
        for name in ("b", "e"):
            assert torch.allclose(results[0]["mean"]["steps"][step - 1][name], params[name]), name


def test_coordinate_without_any_update_stays_where_it_is(results):
    # What a step adds, the next one takes away, but for the decay in between.
    for case in CASES:
        x = start()["c"].detach()[:4]
        for step, after in enumerate(results[0][case]["steps"], start=1):
            x = x * (1 - LR * DECAY)
            assert float((after["c"][:4] - x).abs().max()) < (1.1 if step % 2 else 0.1) * LR, case


def test_result_does_not_depend_on_the_buckets(results):
    for ours, theirs in zip(results[0]["many buckets"]["steps"], results[0]["mean"]["steps"], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_converted_optimizer_takes_one_step_of_votes_and_averages(results):
    assert all(result["converted"]["counted"] == [STEPS] for result in results)
    for result in results[1:]:
        ours, first = result["converted"]["states"], results[0]["converted"]["states"]
        assert not torch.equal(ours["c"]["m"], first["c"]["m"]) and torch.equal(ours["b"]["m"], first["b"]["m"])


def test_worker_without_a_gradient_votes_by_its_momentum(results):
    unused, plain = results[0]["unused"]["steps"], results[0]["mean"]["steps"]
    assert torch.equal(unused[1]["f"], unused[0]["f"])  # nobody had one
    assert torch.equal(unused[1]["c"], plain[1]["c"])
    if len(results) > 1:
        assert not torch.equal(unused[0]["a"], start()["a"])  # others had one
    else:
        assert torch.equal(unused[-1]["a"], start()["a"])


def test_warm_up_steps_by_mean_gradients(results):
    first, averaged = results[0]["warm-up"], results[0]["mean"]
    for result in results[1:]:
        assert torch.equal(result["warm-up"]["steps"][1]["c"], first["steps"][1]["c"])
    if len(results) > 1:
        assert first["bytes"][0] > first["bytes"][2] and averaged["bytes"][0] == averaged["bytes"][2]


def test_bytes_are_a_bit_up_and_the_result_down(results):
    workers = len(results)
    size = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    width = -(-sum(size[name] for name in "acdf") // (8 * workers))
    exact = 4 * -(-(size["b"] + size["e"]) // workers)
    flags = 2 * (2 * len(SHAPES)) * (workers - 1) // workers
    counts = {1: width, 2: 2 * -(-8 * width // 10), 3: 2 * width, 4: 2 * -(-8 * width // 6)}[workers]
    for case, options in CASES.items():
        down = width if options["by_majority"] else counts
        messages = sum(-(-(exact + packed) // 8) * 8 for packed in (width, down))  # in multiples of 8 bytes
        assert results[0][case]["bytes"] == [(workers - 1) * messages + flags] * STEPS


def test_agreement_is_the_share_of_coordinates_that_all_workers_move_alike(results):
    before = start()
    for after, agreement in zip(results[0]["mean"]["steps"], results[0]["mean"]["agreement"], strict=True):
        moved = [((after[n] - before[n] * (1 - LR * DECAY)) / LR).abs().flatten() for n in ("a", "c", "f")]
        assert float((torch.cat(moved) > 0.99).float().mean()) == pytest.approx(agreement)
        before = after
    if len(results) > 1:
        assert 0 < agreement < 1


@pytest.mark.parametrize("case", ["majority", "mean", "bfloat16", "fp8"])
def test_steps_move_by_the_learning_rate_in_all_formats(results, case):
    before = start(torch.bfloat16 if case == "bfloat16" else torch.float32)
    after = results[0][case]["steps"][0]
    for name in ("a", "c", "f"):
        moved = (after[name].float() - before[name].detach().float() * (1 - LR * DECAY)) / LR
        assert bool((moved.abs() < 1.1).all()) and bool((moved.abs() > 0.9).any())


def not_finite_on_one(rank, workers):
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    outcomes = {}
    for mode in ("raise", "skip"):
        params = start()
        optimizer = StoSignSGD(params.items(), lr=LR, on_nonfinite=mode)
        ballot = connect(optimizer, by_majority=False)
        for step in (1, 2, 3):
            for name, grad in gradients(rank, step).items():
                params[name].grad = grad
            if step == 2 and rank == 1:
                params["f"].grad[0, 0] = torch.nan
            try:
                optimizer.step()
            except RuntimeError as error:
                outcomes[f"{mode} {step}"] = str(error)
            outcomes[f"{mode} values {step}"] = params["c"].detach().clone()
            outcomes[f"{mode} count {step}"] = int(optimizer.state[params["c"]]["step"])
        ballot.close()
    return outcomes


@pytest.mark.filterwarnings("ignore:.*this step was skipped")
def test_gradient_that_is_not_finite_on_one_worker_stops_the_step_on_all():
    results = run_workers(not_finite_on_one, 2)
    for result in results:
        assert "the gradient of f [16, 9] on some worker is not finite" in result["raise 2"]
        for mode in ("raise", "skip"):
            assert torch.equal(result[f"{mode} values 2"], result[f"{mode} values 1"])
            assert torch.equal(result[f"{mode} values 3"], results[0][f"{mode} values 3"])
            assert [result[f"{mode} count {step}"] for step in (1, 2, 3)] == [1, 1, 2]


@pytest.mark.parametrize("cls", [StoSignSGD, partial(SignConverted, base=torch.optim.Adam)])
def test_update_that_is_no_sign_is_refused(cls):
    optimizer = cls([nn.Parameter(torch.zeros(3))], stochastic=False)
    with pytest.raises(ValueError, match=r"Sign\w+\(stochastic=False\) does not step by signs"):
        optimizer.vote_by(None)


def listed_state(rank, workers):
    """A converted optimizer whose state is no plain tensor."""
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    optimizer = SignConverted([nn.Parameter(torch.ones(3, 4))], pytorch_optimizer.SOAP)
    ballot = connect(optimizer, by_majority=False)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"SOAP keeps .* as list, but a checkpoint holds only plain tensors"):
        optimizer.step()
    return ballot.close()


def test_states_that_no_checkpoint_could_hold_are_refused_in_the_first_step():
    assert run_workers(listed_state, 1) == [True]
