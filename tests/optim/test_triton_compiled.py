"""Triton's kernels compiled without a GPU: no spills, no inexact operations, wide loads."""

import os
from itertools import cycle

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter replaces what is compiled here", allow_module_level=True)

from triton_ahead_of_time import AMD, COVERING, NVIDIA, compile_for, faults, variants

VARIANTS = variants()


def test_covering_variants_exist():
    assert set(COVERING) <= set(VARIANTS)


# Each variant for one of the architectures; the slow tests have all pairs.
@pytest.mark.parametrize(("architecture", "name"), zip(cycle(["sm_80", "sm_90", "sm_100"]), COVERING, strict=False))
def test_code_is_exact_and_stays_in_registers(architecture, name):
    assert faults(name, NVIDIA[architecture], *VARIANTS[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_code_of_every_variant(architecture, name):
    assert faults(name, NVIDIA[architecture], *VARIANTS[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("architecture", ["sm_89", "sm_120", "gfx942"])
def test_code_for_further_gpus(architecture, name):
    assert faults(name, (NVIDIA | AMD)[architecture], *VARIANTS[name]) == []


def test_what_is_looked_for_is_found_where_it_is(monkeypatch):
    # With contraction, and without alignment, the same kernel has what the others must not have.
    from lightning_stosign.optim.kernels import triton_step

    kernel, constants = VARIANTS["update StoSignSGD, float32, float32"]
    monkeypatch.setitem(triton_step.OPTIONS, "enable_fp_fusion", True)
    wrong = faults("contracted", NVIDIA["sm_80"], kernel, constants | {"ALIGNED": False})
    assert any(fault.startswith("fma") for fault in wrong) and "no 128-bit load" in wrong
    assert compile_for(NVIDIA["sm_80"], kernel, constants).metadata.num_warps == 4
