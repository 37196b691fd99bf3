"""What only the native backend has: threads, a compiler, and jobs that it refuses. Its bits: test_backends.py."""

import stat
import types
import warnings
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from backend_runs import SHAPES, assert_equal, assert_same_runs, train
from torch import nn

from lightning_stosign import StoSignSGD
from lightning_stosign.optim.kernels import cpu, dispatch, native_build
from lightning_stosign.optim.kernels.job import SEGMENT, Job, Kind, Numbers
from lightning_stosign.optim.kernels.native_build import native_library
from lightning_stosign.optim.states.state_precision import FLOAT32

pytestmark = pytest.mark.filterwarnings("ignore:betas")


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
        results.append(train(bad=None, fused=True, state_precision=precision)[0])
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
    train(bad=None, fused=True)
    before = native_library.cache_info().misses
    train(bad=None, fused=True)
    x = nn.Parameter(torch.ones(77, 256))
    x.grad = torch.ones(77, 256)
    StoSignSGD([x], lr=torch.tensor(0.123), betas=(0.8, 1.0), weight_decay=0.3, fused=True).step()
    assert native_library.cache_info().misses == before


def test_by_default_it_is_taken_where_it_is_worth_it(updates, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH", 1 << 40)
    train(steps=1, bad=None)
    assert updates == []
    monkeypatch.setattr(cpu, "WORTH", 40_000)
    train(steps=1, bad=None)
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
        assert_same_runs(train(steps=2, bad=None, fused=True), train(steps=2, bad=None, fused=False))
    assert native_library("finite.cpp") is not None


@pytest.mark.parametrize("script", ["exit 1", "exit 0"], ids=["that fails", "that makes nothing"])
def test_without_a_working_compiler_the_step_is_eager_and_warns_once(compiler, script, updates):
    compiler(script)
    with pytest.warns(RuntimeWarning, match="No native code could be compiled") as caught:
        assert_same_runs(train(steps=2, bad=None, fused=True), train(steps=2, bad=None, fused=False))
    assert len(caught) == 1
    assert updates == []


def test_eager_steps_compile_nothing(monkeypatch):
    def look(*_):
        raise AssertionError("looked for native code")

    monkeypatch.setattr(cpu, "native_library", look)
    train(fused=False, steps=1, bad=None, state_precision="fp8:min_numel=0")
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
