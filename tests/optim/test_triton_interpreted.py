"""Triton's kernels under its interpreter: the eager step's bits. `make test-triton` runs it, in its own process."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 before Triton is imported: make test-triton", allow_module_level=True)

from lightning_stosign import SignSGD, StoSignSGD
from lightning_stosign.optim import low_precision
from lightning_stosign.optim.kernels import dispatch, triton_step

SHAPES = [(3, 5), (0,), (1,), (4096,), (4097,), (129, 3)]
SKIPPED = 2  # of three steps
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

STATES = [
    None,
    "bfloat16",
    "float16",
    "fp8",
    "fp8:dtype=float8_e5m2",
    "fp8-raw",
    "fp8-raw:static_scale=1024",
    "fp8-block",
    "fp8-block:block_size=32",
]
STOSIGN = {
    "StoSignSGD": {},
    "v2": {"betas": (0.9, 0.99)},
    "in expectation": {"stochastic": False},
    "maximize": {"maximize": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored(states, stochastic=False):
    """Return a state_precision for tensors of any size."""
    if states is None:
        return None
    options = ["min_numel=1", *(["stochastic_rounding=true"] if stochastic else [])]
    return f"{states}{',' if ':' in states else ':'}{','.join(options)}"


@pytest.fixture(autouse=True)
def triton_takes_cpu_jobs(monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", triton_step)
    monkeypatch.setattr(triton_step, "VALUES", 2048)  # the interpreter's cost is per program


def same_bits(a, b):
    view = BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(view), b.reshape(-1).view(view))


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    unaligned = torch.randn(1001, generator=generator).to(dtype)[1:]
    strided = torch.randn(24, 40, generator=generator).to(dtype).t()
    return [*params, torch.nn.Parameter(unaligned), torch.nn.Parameter(strided)]


def gradients(params, step, *, scale=1e-2):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        spread = 10 ** torch.randn(param.shape, generator=generator)
        param.grad = (torch.randn(param.shape, generator=generator) * scale * spread).to(param.dtype)
    if step == SKIPPED:
        params[-1].grad[3, 1] = torch.inf if scale < 1 else torch.nan


def compare(cls=StoSignSGD, dtype=torch.float32, steps=3, **options):
    """Take steps, the second of which is skipped, eagerly and by Triton; compare everything after each."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "on_nonfinite": "skip"} | options
    eagerly, ours = parameters(dtype), parameters(dtype)
    reference, optimizer = cls(eagerly, fused=False, **options), cls(ours, fused=True, **options)
    for step in range(1, steps + 1):
        gradients(eagerly, step), gradients(ours, step)
        reference.step(), optimizer.step()
        for number, (a, b) in enumerate(zip(eagerly, ours, strict=True)):
            assert same_bits(a.data, b.data), (step, number)
            assert reference.state[a].keys() == optimizer.state[b].keys()
            for name, value in reference.state[a].items():
                assert same_bits(value, optimizer.state[b][name]), (step, number, name)
    return ours


@pytest.fixture
def launches(monkeypatch):
    """Count the launches of each kernel."""
    counted = []
    for name in ("update", "largest", "nonfinite"):
        kernel = getattr(triton_step._kernels(), name)

        class Counting:
            def __init__(self, kernel=kernel, name=name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                counted.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(triton_step._kernels(), name, Counting())
    return counted


@pytest.mark.filterwarnings("ignore:.*this step was skipped", "ignore:invalid value")
@pytest.mark.parametrize("states", STATES, ids=str)
def test_bits_of_stosign_are_the_eager_steps(states):
    compare(state_precision=stored(states))


CASES = [
    {"betas": (0.9, 0.99), "state_precision": stored("fp8")},
    {"betas": (0.9, 0.99), "state_precision": stored("fp8-block:block_size=32", True)},
    {"betas": (0.9, 0.99), "state_precision": None},
    {"stochastic": False, "state_precision": stored("fp8-raw:static_scale=1024")},
    {"stochastic": False, "maximize": True},
    {"cls": SignSGD, "state_precision": stored("fp8")},
    {"cls": SignSGD, "momentum": 0.0, "maximize": True},
    {"dtype": torch.bfloat16, "state_precision": stored("fp8", True)},
    {"dtype": torch.bfloat16, "param_rounding": "nearest"},
    {"dtype": torch.float16, "state_precision": stored("bfloat16", True)},
    {"dtype": torch.float16, "param_rounding": "nearest", "cls": SignSGD},
    {"lr": torch.tensor(1e-2), "state_precision": stored("fp8")},
]
SKIPS = ["ignore:.*this step was skipped", "ignore:invalid value"]


@pytest.mark.filterwarnings(*SKIPS)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_bits_are_the_eager_steps(options):
    compare(**options)


EVERY = list(itertools.product(STOSIGN, DTYPES, STATES, (False, True), ("stochastic", "nearest")))


@pytest.mark.slow
@pytest.mark.filterwarnings(*SKIPS)
@pytest.mark.parametrize(("rule", "dtype", "states", "stochastic", "rounding"), EVERY, ids=str)
def test_bits_of_every_combination(rule, dtype, states, stochastic, rounding):
    options = STOSIGN[rule] | {"state_precision": stored(states, stochastic), "param_rounding": rounding}
    compare(dtype=DTYPES[dtype], **options)


@pytest.mark.filterwarnings(*SKIPS)
@pytest.mark.parametrize("states", [None, stored("fp8"), stored("fp8-block")], ids=str)
def test_step_is_skipped_on_the_device_without_the_hosts_knowing(states, monkeypatch):
    monkeypatch.setattr(low_precision, "defers", lambda jobs: True)
    compare(state_precision=states)


def test_at_most_two_launches_for_each_kind(launches):
    compare(steps=1, state_precision="fp8:min_numel=64")  # small tensors are stored in float32: a kind of their own
    assert sorted(launches) == ["largest", "nonfinite", "update", "update"]


def test_what_triton_does_not_take_is_updated_eagerly_with_one_message(launches):
    param = torch.nn.Parameter(torch.ones(64, dtype=torch.float64))
    optimizer = StoSignSGD([param], lr=0.5, fused=True)
    with pytest.warns(UserWarning, match=r"fused=True has no effect for some parameters: .*float64") as warned:
        for _ in range(3):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert len(warned) == 1 and not launches and bool((param != 1).all())


@pytest.mark.filterwarnings(*SKIPS)
@pytest.mark.parametrize("wrong", ["STOCHASTIC_SIGN", "MAXIMIZE", "DECAYS", "ROUND_STATE", "HAS_ENVELOPE"])
def test_other_constant_gives_other_bits(wrong, monkeypatch):
    constants = triton_step.updating_constants

    def mistaken(*args, **options):
        right = constants(*args, **options)
        return right | {wrong: not right[wrong]}

    monkeypatch.setattr(triton_step, "updating_constants", mistaken)
    with pytest.raises(AssertionError):
        compare(state_precision=stored("bfloat16"), betas=(0.9, 0.9))


def test_segment_of_a_large_tensor_draws_the_noise_of_its_place(monkeypatch):
    # As of 2**32 values, but with segments of 1,000.
    from lightning_stosign.optim.kernels.job import SEGMENT

    assert SEGMENT == 1 << 32
    runs = triton_step._segments(type("Job", (), {"start": SEGMENT - 10, "param": torch.empty(25)}))
    assert runs == [(0, 10), (10, 15)]
