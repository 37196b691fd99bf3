"""The step that torch.compile makes: the eager step's bits, from one compilation."""

import warnings

import fused_runs
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from lightning_stosign import SignSGD, StoSignSGD
from lightning_stosign.optim import low_precision
from lightning_stosign.optim.kernels import dispatch, fused

# Compiled: of 1, 2 and 4 dimensions, with 2, 5, 6 and 256 rows. Eager: too small, and not a multiple of a row.
# Alone, of 1, 2 and 4 dimensions, with 80, 70 and 128 whole rows, and one with a rest; and small ones together.
SHAPES = [(20480,), (70, 256), (128, 64, 2, 2), (129, 130), (300, 7), (256,), (5,), ()]
OPTIONS = [{}, {"stochastic": False}, {"weight_decay": 0.1, "maximize": True, "betas": (0.95, 0.9)}]
FP8 = "fp8:stochastic_rounding=true,min_numel=0"
slow = pytest.mark.slow

pytestmark = pytest.mark.filterwarnings("ignore:betas")


@pytest.fixture(autouse=True)
def without_native_code(monkeypatch):
    """Which would be taken first on the CPU."""
    monkeypatch.setattr(low_precision, "has_native", lambda: False)


def train(**options):
    return fused_runs.train(SHAPES, **options)


def assert_same_bits(**options):
    (a, one), (b, other) = (train(fused=compiled, **options) for compiled in (True, False))
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q), p.shape
        assert one.state[p].keys() == other.state[q].keys()
        for name, value in one.state[p].items():
            assert value.dtype == other.state[q][name].dtype
            assert torch.equal(value.double(), other.state[q][name].double()), (name, p.shape)


@pytest.mark.parametrize("options", [OPTIONS[0], *(pytest.param(o, marks=slow) for o in OPTIONS[1:])])
@pytest.mark.parametrize("precision", [None, FP8])
def test_compiled_and_eager_steps_have_the_same_bits(precision, options):
    assert_same_bits(state_precision=precision, **options)


@slow
@pytest.mark.parametrize(
    "precision",
    [
        *("bfloat16:min_numel=0", "float16:min_numel=0", "fp8-raw:static_scale=1024,min_numel=0", "fp8:min_numel=0"),
        *("fp8:dtype=float8_e5m2", "fp8-block", "fp8-block:block_size=32,stochastic_rounding=true,min_numel=0"),
    ],
)
def test_every_storage_has_the_same_bits(precision):
    assert_same_bits(state_precision=precision)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        pytest.param({"dtype": torch.float16, "state_precision": "fp8-block"}, marks=slow),
        pytest.param({"dtype": torch.bfloat16, "param_rounding": "nearest", "state_precision": FP8}, marks=slow),
        {"cls": SignSGD},
        pytest.param({"cls": SignSGD, "maximize": True, "state_precision": FP8}, marks=slow),
        pytest.param({"cls": SignSGD, "momentum": 0.0, "dtype": torch.bfloat16}, marks=slow),
    ],
)
def test_every_kind_of_parameter_and_optimizer_has_the_same_bits(options):
    assert_same_bits(**options)


def test_tensor_lr_gives_the_same_bits():
    results = []
    for use_compiler in (True, False):
        x = nn.Parameter(torch.ones(4, 256))
        optimizer = StoSignSGD([x], torch.tensor(0.3), weight_decay=0.1, fused=use_compiler)
        for seed in range(3):
            x.grad = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append(x)
    assert torch.equal(*results)


def test_one_compilation_serves_all_shapes_steps_and_learning_rates():
    train(fused=True)
    before = counters["stats"]["unique_graphs"]
    train(fused=True)
    x = nn.Parameter(torch.ones(77, 256))
    x.grad = torch.ones(77, 256)
    StoSignSGD([x], lr=0.123, betas=(0.8, 0.99), weight_decay=0.3, fused=True).step()
    assert counters["stats"]["unique_graphs"] == before


@slow
def test_nothing_is_compiled_after_the_second_of_200_steps_with_a_scheduler():
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = StoSignSGD(params, lr=1e-2, weight_decay=0.1, state_precision="fp8", fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for number in range(200):
        if number == 2:
            before = counters["stats"]["unique_graphs"]
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
        scheduler.step()
    assert counters["stats"]["unique_graphs"] == before


def test_a_run_goes_on_alike_when_the_path_changes():
    params, optimizer = train(steps=3, fused=True)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    eager = StoSignSGD(others, lr=1e-2)
    eager.load_state_dict(optimizer.state_dict())
    eager.param_groups[0]["fused"] = False
    for p, q in zip(params, others, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step()
    eager.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: t[:, ::2],
        lambda t: torch.cat([t, t])[2:10],  # an offset into its storage, but in order
    ],
    ids=["transposed", "strided", "offset"],
)
def test_parameter_of_any_layout_gets_the_same_update(layout):
    start = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    results = []
    for use_compiler in (True, False):
        x = nn.Parameter(layout(start.clone()))
        optimizer = StoSignSGD([x], 0.1, fused=use_compiler)
        for seed in range(2):
            x.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append(x)
    assert torch.equal(*results)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what was updated compiled."""
    shapes = []

    def record(spec, tensors, rows, *args):
        shapes.append((rows.numel // rows.length, rows.length))
        return fused.compiled_update(spec, tensors, rows, *args)

    monkeypatch.setattr(dispatch, "compiled_update", record)
    return shapes


def test_large_parameters_are_compiled_alone_and_small_ones_together(calls):
    train(steps=1, fused=True)
    assert calls == [(80, 256), (70, 256), (128, 256), (65, 256), (9 + 1 + 1 + 1, 256)]


def test_by_default_only_what_is_worth_it_is_compiled(calls, monkeypatch):
    train(steps=1)
    assert calls == []
    monkeypatch.setitem(low_precision.WORTH, "compiled", 60_000)
    train(steps=1)
    assert len(calls) == 5


def test_without_a_compiler_the_step_is_eager_and_warns_once(calls, monkeypatch, tmp_path):
    def no_compiler(*args):
        raise InvalidCxxCompiler()

    # What is compiled already does not need one.
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    fused.has_compiler.cache_clear()
    try:
        with pytest.warns(UserWarning, match="No compiler for the fused step"):
            train(steps=1, fused=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(steps=1, fused=True)
    finally:
        fused.has_compiler.cache_clear()
    assert calls == []


def test_nonfinite_gradient_touches_nothing():
    params, optimizer = train(steps=2, fused=True)
    before = [p.detach().clone() for p in params]
    params[0].grad[3] = float("inf")
    with pytest.raises(RuntimeError, match="is not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
