"""NVIDIA Transformer Engine's own Python (TE), running without a GPU.

The wheel ``transformer_engine`` holds TE's Python files and none of its compiled code. Here a module in plain torch,
:mod:`te_cpu.compiled`, answers in the place of the compiled one; everything above it is TE's own: layers, autocast,
recipes, quantizers, tensor classes, extra state and FusedAdam. So a test sees TE's real signatures, names, assertions
and order of events.

Encodings are real: bytes of E4M3, E5M2, E8M0 and E2M1, and the scales in TE's layouts. Products are computed in float32
from the decoded values; a GPU adds in another order. Not covered: fused attention, userbuffers, CUDA graphs, streams,
swizzled scales, the grouped kernels that read their sizes from the GPU, row-scaled and four-over-six NVFP4, speed.

:func:`start` changes torch for the whole process, so these tests have a pytest process of their own: ``make test-te``.

Credit: formats, rounding rules and calling conventions follow Transformer Engine (Apache-2.0),
https://github.com/NVIDIA/TransformerEngine; no code of it is copied.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from te_cpu import cuda_on_cpu

H100, B200 = (9, 0), (10, 0)
VARIABLE = "TE_ON_CPU"  # set by `make test-te`


def start(capability: tuple[int, int] = H100) -> ModuleType:
    """Return ``transformer_engine.pytorch``, imported for a machine that seems to have such a GPU.

    Raises:
        ImportError: The wheel ``transformer-engine`` is not installed, or cannot be imported.
    """
    cuda_on_cpu.install(capability)
    if "transformer_engine_torch" in sys.modules:
        return importlib.import_module("transformer_engine.pytorch")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE then does without the shared libraries of CUDA
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    try:
        with warnings.catch_warnings(), cuda_on_cpu.optional_modules():
            warnings.simplefilter("ignore")
            common = importlib.import_module("transformer_engine.common")
            common._get_shared_object_file = lambda library: Path(__file__).with_name("compiled.py")
            return importlib.import_module("transformer_engine.pytorch")
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]


@contextmanager
def gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Another GPU for a while: TE, torch and the package are told this compute capability."""
    before = cuda_on_cpu.answers.capability
    cuda_on_cpu.answers.capability = capability
    _forget_gpu()
    try:
        yield
    finally:
        cuda_on_cpu.answers.capability = before
        _forget_gpu()


def _forget_gpu() -> None:
    """Make TE ask again; it asks once for a GPU's capability and recipes, and remembers the answers."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformer_engine.") or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == name:
                value.cache_clear()
            elif attribute.endswith("_SUPPORT") and attribute.startswith("_"):
                setattr(module, attribute, None)
        manager = getattr(module, "FP8GlobalStateManager", None)
        for attribute in ("fp8_available", "mxfp8_available", "fp8_block_scaling_available", "nvfp4_available"):
            if hasattr(manager, attribute):  # before 2.17
                setattr(manager, attribute, None)
