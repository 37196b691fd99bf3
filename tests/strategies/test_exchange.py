"""The exchange between real processes, bucket by bucket as DDP calls it, against numpy."""

import itertools
from types import SimpleNamespace

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


def exchange_gradients(*, bucket_cap_mb=25, dtype=torch.float32, device="cpu", warmup_steps=0, **options):
    """Return each step's gradients after DDP's backward, and the bytes it sent."""
    model, wire = Prescribed(dtype).to(device), Wire(dist.new_group() if device == "cpu" else None)
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
        ddp({name: grad.to(device) for name, grad in gradients(wire.rank, step, dtype).items()}).backward()
        steps.append({name: param.grad.clone().cpu() for name, param in model.params.items()})
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
    exact = 4 * -(-sum(n for name, n in size.items() if name not in COMPRESSED) // workers)
    scales = 2 * 4 * 3 * (workers - 1) // workers  # "d" has no values
    counts = {1: width, 2: 2 * -(-8 * width // 10), 3: 2 * width, 4: 2 * -(-8 * width // 6)}[workers]
    for case, options in CASES.items():
        down = width if options["aggregation"] == "majority" else counts
        messages = sum(-(-(exact + packed) // 8) * 8 for packed in (width, down))  # in multiples of 8 bytes
        assert results[0][case]["bytes"] == [(workers - 1) * messages + scales] * STEPS
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


class NoWire:
    """The first of three workers, whose messages say nothing."""

    rank, workers, bytes_sent = 0, 3, 0

    def all_reduce_(self, tensor, op):
        assert tensor.device.type == "meta"

    def all_to_all(self, rows, out):
        assert rows.shape == out.shape and rows.device == out.device

    def all_gather(self, mine):
        return mine.new_empty(self.workers, *mine.shape)


@pytest.mark.parametrize(
    ("stochastic", "error_feedback"), [(True, False), (False, True)], ids=["stochastic", "with feedback"]
)
@pytest.mark.parametrize("aggregation", ["majority", "mean"])
def test_accelerators_values_never_go_through_the_host(aggregation, stochastic, error_feedback):
    # Tensors of the meta device have no values: reading one fails, and so does an operation beside one of the CPU.
    params = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in SHAPES.items()}
    options = {"stochastic": stochastic, "error_feedback": error_feedback, "warmup_steps": 0, "seed": 0}
    exchange = SignExchange(params, set(COMPRESSED), NoWire(), aggregation=aggregation, **options)
    flat = torch.empty(sum(param.numel() for param in params.values()), device="meta")
    exchange._exchange(flat, exchange._layout(list(params.values())), step=1)
    assert exchange._scratch.device.type == "meta"


def test_more_workers_than_a_byte_counts_are_refused():
    crowd = SimpleNamespace(rank=0, workers=256)
    options = {"stochastic": True, "error_feedback": False, "warmup_steps": 0, "seed": 0}
    with pytest.raises(ValueError, match="counts the votes of at most 255 workers, got 256"):
        SignExchange({}, set(), crowd, aggregation="mean", **options)
    SignExchange({}, set(), crowd, aggregation="majority", **options)


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


def on_gpus(rank, workers):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=workers, device_id=torch.device("cuda", rank))
    results = {name: exchange_gradients(device="cuda", **options) for name, options in CASES.items()}
    results["many buckets"] = exchange_gradients(device="cuda", bucket_cap_mb=1e-4, **CASES["mean stochastic"])
    results["feedback"] = exchange_gradients(device="cuda", error_feedback=True, **CASES["mean plain"])
    return results


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_exchange_what_cpus_do():
    for ours, on_cpu in zip(run_workers(on_gpus, 2), run_workers(all_cases, 2), strict=True):
        for case, result in ours.items():
            assert result["bytes"] == on_cpu[case]["bytes"]
            for grads, expected in zip(result["grads"], on_cpu[case]["grads"], strict=True):
                for name, grad in grads.items():
                    # Plain signs' scales are means, which another device adds up in another order.
                    torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=f"{case}, {name}")
