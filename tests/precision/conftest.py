import sys
from collections.abc import Iterator
from typing import Any

import pytest
import te_stand_in
import torch

from lightning_stosign.precision import te_backend
from lightning_stosign.precision.te_backend import TransformerEngineBackend


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The models are tiny: on a busy machine, several threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with an H100 and Transformer Engine, as far as the package sees; the Trainer still runs on the CPU."""
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te_stand_in)
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(TransformerEngineBackend, "device_types", ("cpu",))
    te_stand_in.AUTOCASTS.clear()
    te_stand_in.QUANTIZED_INITS.clear()
    return te_stand_in
