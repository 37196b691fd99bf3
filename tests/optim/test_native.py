"""The native step: the eager step's bits in every format, whatever the shapes, the threads and the machine."""

import stat
import types
import warnings
from dataclasses import dataclass, replace
from unittest.mock import patch

import fused_runs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_stosign import SignSGD, StatePrecision, StoSignSGD
from lightning_stosign.optim.kernels import cpu, dispatch, native_build
from lightning_stosign.optim.kernels.job import SEGMENT, Job, Kind, Numbers
from lightning_stosign.optim.kernels.native_build import native_library
from lightning_stosign.optim.states.state_precision import FLOAT32

SHAPES = [(20480,), (70, 256), (128, 64, 2, 2), (129, 130), (300, 7), (256,), (5,), (), (0, 3)]
FORMATS = {
    **{name: name for name in ("bfloat16", "float16", "fp8-raw", "fp8", "fp8-block")},
    "E5M2, raw": "fp8-raw:dtype=float8_e5m2",
    "E5M2": "fp8:dtype=float8_e5m2",
    "float16, scaled": "fp8:dtype=float16",
    "float16, blocks of 48": "fp8-block:dtype=float16,block_size=48",
    "the longest blocks": "fp8-block:block_size=2048",
    "static": "fp8-raw:static_scale=1024.0",
}

pytestmark = pytest.mark.filterwarnings("ignore:betas")


def precision_of(spec, **changes):
    return str(replace(StatePrecision.parse(spec), min_numel=0, **changes))


def train(**options):
    return fused_runs.train(SHAPES, **{"steps": 6, **options})


def assert_equal(a, b, what=""):
    assert a.dtype == b.dtype, what
    a, b = a.detach().double(), b.detach().double()
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)), what


def assert_same_bits(**options):
    (a, one), (b, other) = (train(fused=compiled, **options) for compiled in (True, False))
    for p, q in zip(a, b, strict=True):
        assert_equal(p, q, p.shape)
        assert one.state[p].keys() == other.state[q].keys()
        for name, value in one.state[p].items():
            assert_equal(value, other.state[q][name], (name, p.shape))


def test_this_machine_has_native_code():
    assert native_library("finite.cpp") is not None


@pytest.fixture
def updates(monkeypatch):
    """The storage of what is updated natively, and how many parameters have it, call by call."""
    calls = []

    def record(jobs, scales, found_inf):
        calls.append((str(jobs[0].kind.precision), len(jobs)))
        return update(jobs, scales, found_inf)

    update = cpu.update
    monkeypatch.setattr(cpu, "update", record)
    return calls


@pytest.mark.parametrize("precision", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("at_random", [False, True], ids=["to nearest", "at random"])
def test_every_storage_has_the_eager_step_s_bits(precision, at_random, updates):
    precision = precision_of(precision, stochastic_rounding=at_random)
    assert_same_bits(state_precision=precision)
    assert updates == [(precision, len(SHAPES) - 1)] * 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stochastic": False},
        {"weight_decay": 0.1, "maximize": True},
        {"betas": (0.5, 0.9)},
        *({"betas": (0.5, 0.9), "state_precision": precision_of(spec)} for spec in FORMATS.values()),
        {"state_precision": "fp8"},  # small tensors in float32
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "weight_decay": 0.1},
        {"dtype": torch.bfloat16, "param_rounding": "nearest", "state_precision": "bfloat16"},
        {"dtype": torch.float16, "param_rounding": "nearest", "state_precision": precision_of("fp8-block")},
        {"cls": SignSGD},
        {"cls": SignSGD, "maximize": True, "state_precision": precision_of("fp8", stochastic_rounding=True)},
        {"cls": SignSGD, "momentum": 0.0, "maximize": True, "weight_decay": 0.1},
        {"cls": SignSGD, "momentum": 0.0, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_every_option_has_the_eager_step_s_bits(options, updates):
    assert_same_bits(**options)
    assert updates


@pytest.mark.parametrize(
    "precision",
    ["float32", "bfloat16", "float16", "fp8-raw", "fp8-raw:dtype=float8_e5m2", "fp8", "fp8-block:block_size=8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rounding=st.sampled_from(["stochastic", "nearest"]))
def test_any_bits_in_parameter_and_states_come_out_as_eagerly(precision, dtype, seed, rounding):
    generator = torch.Generator().manual_seed(seed)

    def any_bits(dtype, numel=1 << 12):
        return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)

    storage = StatePrecision.parse(precision_of(precision))
    start, grad, m, G = (any_bits(of) for of in (dtype, dtype, storage.dtype, storage.dtype))
    grad = torch.where(grad.isfinite(), grad, 1.0)
    G = G.float().abs().clamp(max=torch.finfo(G.dtype).max).to(G.dtype)  # a stored envelope is no inf; NaN is kept
    scales = (torch.randint(-126, 120, (2, len(m) // 8), generator=generator).float()).exp2()
    results = []
    for compiled in (True, False):
        x = nn.Parameter(start.clone())
        x.grad = grad
        optimizer = StoSignSGD([x], lr=3.0, state_precision=storage, param_rounding=rounding, fused=compiled)
        for name, values, scale in (("exp_avg", m, scales[0]), ("exp_inf", G, scales[1])):
            optimizer.state[x][name] = values.clone()
            if storage.scaling != "none":
                optimizer.state[x][name + "_scale"] = scale.clone() if storage.scaling == "block" else scale[0].clone()
        optimizer.step()
        results.append((x, *optimizer.state[x].values()))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


@pytest.fixture
def threads():
    """Sets the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0"])
def test_threads_change_nothing(precision, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(train(fused=True, state_precision=precision)[0])
    for others in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], others, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("at", [0, 50_000, (1 << 17) - 1])
def test_the_scale_covers_the_largest_value_whichever_thread_has_it(count, at, threads):
    threads(count)
    x = nn.Parameter(torch.zeros(1 << 17))
    x.grad = torch.full_like(x, 1e-3)
    x.grad[at] = 4096.0
    optimizer = StoSignSGD([x], state_precision="fp8", fused=True)
    optimizer.step()
    assert optimizer.state[x]["exp_avg_scale"] == 1.0  # 409.6 of at most 448
    assert optimizer.state[x]["exp_avg"][at].float() == 416.0


@pytest.mark.parametrize("precision", ["float32", "fp8"])
def test_a_part_across_the_noise_key_s_boundary_is_updated_as_eagerly(precision):
    numel = 1 << 16
    shard = types.SimpleNamespace(starts=torch.tensor([SEGMENT - 700]), run=numel)
    results = []
    for fused in (True, False):
        values, grad = (torch.randn(numel, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        param = nn.Parameter(values)
        param.grad = grad
        optimizer = StoSignSGD([param], lr=0.1, state_precision=precision, fused=fused)
        with patch("lightning_stosign.optim.kernels.job.shard_of", return_value=shard):
            optimizer.step()
        results.append((param, *optimizer.state[param].values()))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_one_nonfinite_value_is_found_wherever_it_is(dtype, value):
    sizes = [1, 5, 1 << 14, (1 << 14) + 1, 100_000]
    for at, size in enumerate(sizes):
        for place in {0, size // 2, size - 1}:
            tensors = [torch.full((n,), torch.finfo(dtype).max, dtype=dtype) for n in sizes]
            tensors[at][place] = value
            assert cpu.nonfinite(tensors).tolist() == [i == at for i in range(len(sizes))]


def test_gradients_of_several_dtypes_and_layouts_are_checked():
    tensors = [torch.ones(3, 4).t(), torch.ones((), dtype=torch.bfloat16).expand(7), torch.ones(2, 0)]
    assert cpu.nonfinite(tensors).tolist() == [False] * 3
    tensors[0][1, 2] = torch.nan
    assert cpu.nonfinite(tensors).tolist() == [True, False, False]


def test_nonfinite_gradient_touches_nothing():
    params, optimizer = train(steps=2, fused=True)
    before = [p.detach().clone() for p in params]
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    params[3].grad[5, 5] = float("inf")
    with pytest.raises(RuntimeError, match=r"gradient of params\[3\] of group 0 \[129, 130\] is not finite"):
        optimizer.step()
    for p, q, state in zip(params, before, states, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "layout",
    [lambda t: t.t().contiguous().t(), lambda t: t[:, ::2], lambda t: torch.cat([t, t])[2:10]],
    ids=["transposed", "strided", "offset"],
)
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0"])
def test_parameter_of_any_layout_gets_the_same_update(layout, precision):
    start = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (True, False):
        x = nn.Parameter(layout(start.clone()))
        optimizer = StoSignSGD([x], 0.1, fused=compiled, state_precision=precision)
        for seed in range(2):
            x.grad = layout(torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)))
            optimizer.step()
        results.append((x, *optimizer.state[x].values()))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


def test_what_native_code_does_not_do_is_done_eagerly(updates):
    dispatch._say_once.cache_clear()
    for options in ({"state_precision": "fp8-block:block_size=4096"}, {"state_precision": "fp4-block"}):
        x = nn.Parameter(torch.ones(8192))
        x.grad = torch.ones(8192)
        optimizer = StoSignSGD([x], fused=True, **options)
        with pytest.warns(UserWarning, match="fused=True has no effect for some parameters: native code") as caught:
            optimizer.step()
        assert caught[0].filename == __file__
        optimizer.step()  # said once
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    x.grad = torch.ones(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="native code does not take torch.float64 parameters"):
        StoSignSGD([x], fused=True).step()
    assert updates == []


def test_one_compilation_serves_all_shapes_steps_and_learning_rates():
    train(fused=True)
    before = native_library.cache_info().misses
    train(fused=True)
    x = nn.Parameter(torch.ones(77, 256))
    x.grad = torch.ones(77, 256)
    StoSignSGD([x], lr=torch.tensor(0.123), betas=(0.8, 1.0), weight_decay=0.3, fused=True).step()
    assert native_library.cache_info().misses == before


def test_by_default_it_is_taken_where_it_is_worth_it(updates, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH", 1 << 40)
    train(steps=1)
    assert updates == []
    monkeypatch.setattr(cpu, "WORTH", 60_000)
    train(steps=1)
    assert updates == [("float32", len(SHAPES) - 1)]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Sets the compiler to a script."""

    def use(script):
        path = tmp_path / "compiler"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))

    def forget():
        for cached in (native_library, native_build.find_compiler, cpu._library, dispatch._say_once):
            cached.cache_clear()
        native_build._given_up.clear()
        native_build._told.clear()

    forget()
    yield use
    forget()


def test_without_openmp_it_runs_on_one_thread(compiler):
    compiler('for option; do [ "$option" = -fopenmp ] && exit 1; done; exec c++ "$@"')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(steps=2)
    assert native_library("finite.cpp") is not None


@pytest.mark.parametrize("script", ["exit 1", "exit 0"], ids=["that fails", "that makes nothing"])
def test_without_a_working_compiler_the_step_is_eager_and_warns_once(compiler, script, updates):
    compiler(script)
    with pytest.warns(RuntimeWarning, match="No native code could be compiled") as caught:
        assert_same_bits(steps=2)
    assert len(caught) == 1
    assert updates == []


def test_eager_steps_compile_nothing(monkeypatch):
    def look(*_):
        raise AssertionError("looked for native code")

    monkeypatch.setattr(cpu, "native_library", look)
    train(fused=False, steps=1, state_precision=precision_of("fp8"))
    StoSignSGD([nn.Parameter(torch.ones(3))]).step()  # there is no gradient


def test_kinds_that_it_does_not_implement_are_refused():
    """By the kind itself: a new option of the kernel, or a combination that no optimizer has yet."""

    @dataclass(frozen=True)
    class Newer(Kind):
        nesterov: bool = False

    known = {"stochastic": True, "maximize": False, "decays": False, "precision": FLOAT32, "round_param": False}
    param = torch.ones(3)
    for kind in (Kind(momentum=False, envelope=True, **known), Newer(momentum=True, envelope=True, **known)):
        job = Job(kind, Numbers(0.1, 1.0, 0.1, 1.0), {}, param, param, param, [param, param], [None, None], [])
        assert cpu.refusal(job) == f"native code does not implement {kind}"
