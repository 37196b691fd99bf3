"""The exchange between real processes, bucket by bucket as DDP calls it, against numpy."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from votes_in_numpy import exchanged
from workers import run_workers

from lightning_stosign.strategies.exchange import SignExchange, sign_hook
from lightning_stosign.strategies.wire import Wire

SHAPES = {"a": (7, 3), "b": (5,), "c": (11, 23), "d": (0, 4), "e": (), "f": (16, 9)}
COMPRESSED = ("a", "c", "d", "f")
STEPS = 4


class Prescribed(nn.Module):
    """A model whose gradients are what it is called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.params = nn.ParameterDict({name: nn.Parameter(torch.zeros(s, dtype=dtype)) for name, s in SHAPES.items()})

    def forward(self, grads):
        return sum((self.params[name] * grad).sum() for name, grad in grads.items())


def gradients(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    grads = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    grads["c"][:4] = 0  # exact zeros on all workers
    return {name: grad.to(dtype) for name, grad in grads.items()}


def exchange_gradients(*, bucket_cap_mb=25, dtype=torch.float32, warmup_steps=0, **options):
    """Return each step's gradients after DDP's backward, and the bytes it sent."""
    model, wire = Prescribed(dtype), Wire(dist.new_group())
    exchange = SignExchange(
        dict(model.params.named_parameters()),
        set(COMPRESSED),
        wire,
        error_feedback=options.pop("error_feedback", False),
        warmup_steps=warmup_steps,
        seed=9,
        **options,
    )
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    ddp.register_comm_hook(exchange, sign_hook)
    steps, sent = [], []
    for step in range(1, STEPS + 1):
        ddp.zero_grad()
        ddp(gradients(wire.rank, step, dtype)).backward()
        steps.append({name: param.grad.clone() for name, param in model.params.items()})
        sent.append(exchange.bytes_sent)
    exchange.close()
    state = exchange.state_dict()
    return {"grads": steps, "bytes": sent, "state": state}


CASES = {
    f"{aggregation} {'stochastic' if stochastic else 'plain'}": {"aggregation": aggregation, "stochastic": stochastic}
    for aggregation, stochastic in itertools.product(("majority", "mean"), (True, False))
}


def all_cases(rank, workers):
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    results = {name: exchange_gradients(**options) for name, options in CASES.items()}
    mean = CASES["mean stochastic"]
    results["many buckets"] = exchange_gradients(bucket_cap_mb=1e-4, **mean)
    results["warm-up"] = exchange_gradients(warmup_steps=2, **mean)
    results["bfloat16"] = exchange_gradients(dtype=torch.bfloat16, **mean)
    results["feedback"] = exchange_gradients(error_feedback=True, **CASES["mean plain"])
    return results


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def results(request):
    return run_workers(all_cases, request.param)


def grads_of_all(workers, step, name):
    return torch.stack([gradients(rank, step)[name].flatten() for rank in range(workers)]).numpy()


@pytest.mark.parametrize("case", CASES)
def test_every_worker_gets_numpys_vote(results, case):
    workers = len(results)
    for index, (name, shape) in enumerate(SHAPES.items()):
        for step in range(1, STEPS + 1):
            grads = grads_of_all(workers, step, name)
            if name in COMPRESSED and grads.size:
                expected, _ = exchanged(grads, **CASES[case], seed=9, step=step, index=index)
            else:
                expected = grads.mean(0)
            for result in results:
                ours = result[case]["grads"][step - 1][name]
                assert torch.equal(ours, results[0][case]["grads"][step - 1][name])
                assert np.array_equal(np.sign(ours.numpy().ravel()), np.sign(expected.astype(np.float32)))
                assert np.allclose(ours.numpy(), expected.reshape(shape), rtol=1e-6, atol=1e-7)


def test_result_does_not_depend_on_the_buckets(results):
    for a, b in zip(results[0]["many buckets"]["grads"], results[0]["mean stochastic"]["grads"], strict=True):
        for name in COMPRESSED:
            assert torch.equal(a[name], b[name]), name


def test_warm_up_is_plain_ddp_and_does_not_shift_the_noise(results):
    workers = len(results)
    for step, grads in enumerate(results[0]["warm-up"]["grads"], start=1):
        for name in SHAPES:
            if step <= 2:
                assert np.allclose(grads[name].flatten(), grads_of_all(workers, step, name).mean(0), atol=1e-6)
            else:
                assert torch.equal(grads[name], results[0]["mean stochastic"]["grads"][step - 1][name])


def test_gradients_of_low_precision_stay_in_it(results):
    for grads in results[0]["bfloat16"]["grads"]:
        assert all(grad.dtype == torch.bfloat16 and bool(grad.isfinite().all()) for grad in grads.values())
    exact = results[0]["mean stochastic"]["grads"][0]["c"]
    ours = results[0]["bfloat16"]["grads"][0]["c"].float()
    assert (ours.sign() == exact.sign()).float().mean() > 0.95  # but for what rounding the gradients does


def test_bytes_are_a_bit_up_and_the_result_down(results):
    workers = len(results)
    size = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    width = -(-sum(size[name] for name in COMPRESSED) // (8 * workers))
    exact = 2 * 4 * sum(n for name, n in size.items() if name not in COMPRESSED) * (workers - 1) // workers
    scales = 2 * 4 * 3 * (workers - 1) // workers  # "d" has no values
    for case, options in CASES.items():
        bits = 1 if options["aggregation"] == "majority" else workers.bit_length()
        assert results[0][case]["bytes"] == [(workers - 1) * width * (1 + bits) + exact + scales] * STEPS
    assert results[0]["warm-up"]["bytes"][0] == 2 * 4 * sum(size.values()) * (workers - 1) // workers


def test_feedback_owes_exactly_what_has_not_been_sent(results):
    residuals = results[0]["feedback"]["state"]["residuals"]
    assert len(residuals) == len(results)
    for name in ("a", "c", "f"):
        wanted = sum(grads_of_all(len(results), step, name).mean(0) for step in range(1, STEPS + 1))
        sent = sum(grads[name].flatten() for grads in results[0]["feedback"]["grads"])
        owed = torch.stack([residual[name] for residual in residuals]).mean(0)
        assert np.allclose(sent + owed, wanted, atol=1e-5)
    assert all(
        "residuals" not in result["feedback"]["state"] or not result["feedback"]["state"]["residuals"][0]
        for result in results[1:]
    )  # only rank 0 writes the checkpoint


def not_finite_on_one(rank, workers):
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    finite = {}
    for case, options in CASES.items():
        model = Prescribed()
        exchange = SignExchange(
            dict(model.params.named_parameters()),
            set(COMPRESSED),
            Wire(dist.new_group()),
            error_feedback=False,
            warmup_steps=0,
            seed=0,
            **options,
        )
        ddp = nn.parallel.DistributedDataParallel(model)
        ddp.register_comm_hook(exchange, sign_hook)
        for name, value in (("c", torch.nan), ("f", -torch.inf), ("b", torch.inf)):
            grads = gradients(rank, 1)
            if rank == workers - 1:
                grads[name].view(-1)[3] = value
            ddp.zero_grad()
            ddp(grads).backward()
            finite[f"{case}, {name}"] = [bool(p.grad.isfinite().all()) for p in model.params.values()]
        exchange.close()
    return finite


def test_all_workers_see_in_the_same_step_that_one_has_a_gradient_that_is_not_finite():
    results = run_workers(not_finite_on_one, 2)
    assert results[0] == results[1]
    for case, finite in results[0].items():
        assert finite == [name != case[-1] for name in SHAPES], case
