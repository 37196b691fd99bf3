"""Every backend against the reference: the same bits of parameters and states, in every format, whatever the shapes.

A backend is a line in BACKENDS. One of another device runs here on the CPU, as Triton does under its interpreter, which
needs a process of its own.
"""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import backend_runs
import pytest
import torch
from backend_runs import KINDS, LAYOUTS, SHAPES, assert_equal, assert_same_runs, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_stosign import StatePrecision, StoSignSGD
from lightning_stosign.optim import low_precision
from lightning_stosign.optim.kernels import cpu, dispatch, triton_step


class Backend(NamedTuple):
    """A backend, and what it leaves to the reference."""

    module: ModuleType
    refuses: frozenset[str] = frozenset()  # names of FORMATS


BACKENDS = {"native": Backend(cpu, frozenset({"fp4-block"}))}
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS:
    BACKENDS = {"triton": Backend(triton_step, frozenset({"fp4-block", "float16, blocks of 48"}))}

FORMATS = {
    **{name: name for name in ("float32", "bfloat16", "float16", "fp8-raw", "fp8", "fp8-block", "fp4-block")},
    "E5M2, raw": "fp8-raw:dtype=float8_e5m2",
    "E5M2": "fp8:dtype=float8_e5m2",
    "E5M2, blocks": "fp8-block:dtype=float8_e5m2,block_size=32",
    "float16, scaled": "fp8:dtype=float16",
    "float16, blocks of 48": "fp8-block:dtype=float16,block_size=48",
    "blocks of 2048": "fp8-block:block_size=2048",
    "static": "fp8-raw:static_scale=1024.0",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:betas", "ignore:.*this step was skipped")


def cases():
    """(backend, format, states rounded stochastically, kind, dtype, rounding of parameters): some of all_cases()."""
    kinds = list(KINDS)
    for backend, (_, refuses) in BACKENDS.items():
        number = 0
        for name in FORMATS:
            for stochastic in (False, True):
                if name in refuses or (name == "float32" and stochastic):
                    continue
                # Algorithm 3 in every format, then each other kind in turn.
                of_format = (kinds[0], kinds[1 + number % (len(kinds) - 1)])
                for kind in of_format[(number + stochastic) % 2 :][:1] if INTERPRETS else of_format:
                    rounding = ("stochastic", "nearest")[number // 3 % 2]
                    yield backend, name, stochastic, kind, DTYPES[number % 3], rounding
                    number += 1
        for kind in kinds:
            for dtype in DTYPES[:1] if INTERPRETS else DTYPES:
                yield backend, "float32", False, kind, dtype, "stochastic"


def all_cases():
    roundings = ("stochastic", "nearest")
    for backend, (_, refuses) in BACKENDS.items():
        for name in FORMATS:
            for stochastic in (False, True):
                if name not in refuses and not (name == "float32" and stochastic):
                    for kind in KINDS:
                        yield from ((backend, name, stochastic, kind, d, r) for d in DTYPES for r in roundings)


def precision_of(name, stochastic):
    precision = StatePrecision.parse(FORMATS[name])
    return replace(precision, min_numel=0, stochastic_rounding=stochastic)


@pytest.fixture
def use(monkeypatch):
    """Makes a backend that of the CPU; returns the list of the numbers of jobs that it then updates."""

    def install(name):
        module = BACKENDS[name].module
        updated = []

        def update(jobs, scales, found_inf):
            updated.append(len(jobs))
            module.update(jobs, scales, found_inf)

        stand_in = ModuleType(name)
        stand_in.WORTH, stand_in.refusal, stand_in.largest = 0, module.refusal, module.largest
        stand_in.update = update
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", stand_in)
        monkeypatch.setattr(triton_step, "VALUES", 4096)  # the interpreter's cost is per program
        return updated

    return install


def check(case, use, monkeypatch):
    backend, name, stochastic, kind, dtype, rounding = case
    options = {"dtype": dtype, "param_rounding": rounding, **KINDS[kind]}
    options["state_precision"] = None if name == "float32" else precision_of(name, stochastic)
    reference = train(fused=False, **options)
    updated = use(backend)
    assert_same_runs(train(fused=True, **options), reference)
    assert updated == [len(SHAPES) - 1] * 3, "one call per step, and none for the step that was skipped"
    # The host does not know of the bad gradient before the next step.
    monkeypatch.setattr(low_precision, "defers", lambda jobs: True)
    assert_same_runs(train(fused=True, **options), reference)
    assert updated == [len(SHAPES) - 1] * 7


@pytest.mark.parametrize("case", list(dict.fromkeys(cases())), ids=str)
def test_same_bits_as_the_reference_over_steps_of_which_one_is_skipped(case, use, monkeypatch):
    check(case, use, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in all_cases() if case not in set(cases())], ids=str)
def test_same_bits_in_every_combination(case, use, monkeypatch):
    check(case, use, monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0", "fp8-block:min_numel=0"])
def test_parameters_of_any_layout_get_the_same_update(backend, layout, precision, use):
    options = {"state_precision": precision, "dtype": torch.bfloat16, "param_rounding": "nearest", "steps": 3}
    reference = train(fused=False, **options)  # that depends on no layout
    assert_same_runs(train(layout=layout, fused=False, **options), reference)
    updated = use(backend)
    assert_same_runs(train(layout=layout, fused=True, **options), reference)
    assert updated == [len(SHAPES) - 1] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_lr_gives_the_same_bits(backend, use):
    use(backend)
    results = []
    for lr, fused in ((0.3, False), (torch.tensor(0.3), False), (torch.tensor(0.3), True)):
        x = nn.Parameter(torch.ones(4, 256))
        optimizer = StoSignSGD([x], lr, weight_decay=0.125, fused=fused)
        for seed in range(3):
            x.grad = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append(x)
    assert torch.equal(results[1], results[2])
    assert torch.allclose(results[0], results[1], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_alike_when_the_backend_changes(backend, use):
    use(backend)
    options = {"state_precision": "fp8:min_numel=0"}
    params, optimizer = train(steps=3, bad=None, fused=True, **options)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    eager = StoSignSGD(others, lr=1e-2, **options)
    eager.load_state_dict(optimizer.state_dict())
    eager.param_groups[0]["fused"] = False
    for p, q in zip(params, others, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    eager.step()
    assert_same_runs((params, optimizer), (others, eager))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "fp8-raw", "E5M2, raw", "fp8", "fp8-block"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=2 if INTERPRETS else 6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bits_in_parameter_and_states_come_out_as_from_the_reference(backend, name, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def any_bits(dtype, numel=1 << 12):
        return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)

    storage = precision_of(name, False)
    start, grad, m, G = (any_bits(of) for of in (dtype, dtype, storage.dtype, storage.dtype))
    grad = torch.where(grad.isfinite(), grad, 1.0)
    G = G.float().abs().clamp(max=torch.finfo(G.dtype).max).to(G.dtype)  # a stored envelope is no inf; NaN is kept
    scales = (torch.randint(-126, 120, (2, -(-len(m) // storage.block_size)), generator=generator).float()).exp2()
    results = []
    for fused in (True, False):
        x = nn.Parameter(start.clone())
        x.grad = grad
        rounding = ("stochastic", "nearest")[seed % 2]
        optimizer = StoSignSGD([x], lr=3.0, state_precision=storage, param_rounding=rounding, fused=fused)
        for state, values, scale in (("exp_avg", m, scales[0]), ("exp_inf", G, scales[1])):
            optimizer.state[x][state] = values.clone()
            if storage.scaling != "none":
                optimizer.state[x][state + "_scale"] = scale.clone() if storage.scaling == "block" else scale[0].clone()
        before = dispatch.BACKENDS["cpu"]
        dispatch.BACKENDS["cpu"] = BACKENDS[backend].module
        try:
            optimizer.step()
        finally:
            dispatch.BACKENDS["cpu"] = before
        results.append((x, *optimizer.state[x].values()))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("backend", [name for name, (_, refuses) in BACKENDS.items() if refuses])
def test_what_a_backend_refuses_is_done_by_the_reference_and_said_once(backend, use):
    dispatch._say_once.cache_clear()
    updated = use(backend)
    for name in BACKENDS[backend].refuses:
        options = {"state_precision": precision_of(name, False), "shapes": [(4096,)], "bad": None}
        with pytest.warns(UserWarning, match="fused=True has no effect for some parameters") as caught:
            fused = train(fused=True, **options)
        assert len(caught) == 1 and caught[0].filename == backend_runs.__file__  # where step() is called
        assert_same_runs(fused, train(fused=False, **options))
    assert updated == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(fused=None, **options)  # which asks for nothing in particular


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETS, reason="this is that process")
def test_triton_under_its_interpreter(request):
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not slow",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
