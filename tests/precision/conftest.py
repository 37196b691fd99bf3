import contextlib
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import te_cpu
import torch
from packaging.version import Version

from lightning_stosign.precision import te_backend
from lightning_stosign.precision.te_backend import TransformerEngineBackend

ON_CPU = os.environ.get(te_cpu.VARIABLE) == "1"
if not (ON_CPU or torch.cuda.is_available()):
    collect_ignore_glob = ["test_te_*.py"]  # `make test-te` runs them; one that is named runs, and says so


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The models are tiny: on a busy machine, several threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def transformer_engine() -> Any:
    """The module ``transformer_engine.pytorch``: on the CPU in a process of its own, else on a GPU, else skipped."""
    if ON_CPU:
        try:
            return te_cpu.start()
        except ImportError as error:
            pytest.skip(f"the wheel transformer-engine is not installed: {error}")
    if (obstacle := te_backend.missing_for_transformer_engine()) is not None:
        pytest.skip(f"`make test-te` runs this without a GPU; here {obstacle}")
    return te_backend.import_transformer_engine()


@pytest.fixture
def te(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Transformer Engine's own classes, on what seems to be an H100 where there is no GPU; see :mod:`te_cpu`."""
    if not ON_CPU and request.node.get_closest_marker("gpu") is None:
        pytest.skip("computes on the CPU: `make test-te` runs it")
    transformer_engine = request.getfixturevalue("transformer_engine")
    if ON_CPU:
        monkeypatch.setattr(TransformerEngineBackend, "device_types", ("cpu",))
    yield transformer_engine
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


@pytest.fixture
def since(te: Any) -> Callable[[str, str], None]:
    """Skip a test of what an older TE does not have."""

    def skip_before(version: str, what: str) -> None:
        if Version(metadata.version("transformer_engine")) < Version(version):
            pytest.skip(f"{what}: since Transformer Engine {version}")

    return skip_before


@pytest.fixture
def no_fp8(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TE's layers compute in the type of the weights: all else that the plugin does must cancel out."""
    autocast = te.autocast
    monkeypatch.setattr(te, "autocast", lambda **arguments: autocast(**{**arguments, "enabled": False}))


@pytest.fixture
def on_gpu(te: Any) -> Iterator[Callable[[tuple[int, int]], None]]:
    """Seem to have a GPU of another compute capability, to the end of the test; a real GPU is what it is."""
    with contextlib.ExitStack() as stack:
        yield lambda capability: stack.enter_context(te_cpu.gpu(capability)) if ON_CPU else None
