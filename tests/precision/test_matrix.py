"""Every recipe on every backend and hardware either trains, without a word per step, or is refused in its own words."""

import logging
from typing import Any

import pytest
import torch
from float8_models import Net, batches, trainer
from torch import nn

from lightning_stosign.precision import Float8Precision, _select, te_backend
from lightning_stosign.precision._recipes import RECIPES

HARDWARE = {"cpu": None, "A100": (8, 0), "L4": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}

# Which backend "auto" takes, where it does.
TE, AO, EMULATION = "transformer-engine", "torchao", "emulation"
AUTO = {
    "delayed": {"L4": TE, "H100": TE, "B200": TE, "RTX 5090": TE},
    "current": {"cpu": AO, "A100": AO, "L4": TE, "H100": TE, "B200": TE, "RTX 5090": TE},
    "rowwise": dict.fromkeys(HARDWARE, AO),
    "block": {"cpu": EMULATION, "H100": TE, "B200": TE, "RTX 5090": TE},
    "mxfp8": {"cpu": EMULATION, "B200": TE},
    "nvfp4": {"cpu": EMULATION, "B200": TE, "RTX 5090": TE},
    "mxfp4": dict.fromkeys(HARDWARE, EMULATION),
}
OFFERED = {
    TE: {"delayed", "current", "block", "mxfp8", "nvfp4"},
    AO: {"current", "rowwise"},
    EMULATION: {"block", "mxfp8", "nvfp4", "mxfp4"},
}
REFUSAL = {
    "auto": r"recipe='\w+' (needs compute capability|is not offered by backend='torchao', which has .* has it)",
    TE: r"recipe='\w+' (needs compute capability|is not offered by)|backend='transformer-engine' cannot be used here",
    AO: r"recipe='\w+' is not offered by backend='torchao', which has \['current', 'rowwise'\]; backend='.*' has it",
    EMULATION: r"recipe='\w+' is not offered by backend='emulation', which has .*; backend='.*' has it",
}


class Wide(Net):
    """With sizes that every recipe takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(32, 128), nn.Linear(128, 128)
        self.norm, self.last, self.head = nn.LayerNorm(128), nn.Linear(128, 16), nn.Linear(16, 3)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("backend", ["auto", TE, AO, EMULATION])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_entry_trains_or_is_refused(
    te: Any, monkeypatch: pytest.MonkeyPatch, recipe: str, backend: Any, hardware: str
) -> None:
    capability = HARDWARE[hardware]
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: capability)
    monkeypatch.setattr(_select, "_has_gpu", lambda: capability is not None)
    on_te = capability is not None and AUTO[recipe].get(hardware) == TE
    expected = {"auto": AUTO[recipe].get(hardware), TE: TE if on_te else None}.get(
        backend, backend if recipe in OFFERED[backend if backend != "auto" else AO] else None
    )
    arguments = {"weights_dtype": "bfloat16"} if recipe == "nvfp4" else {}
    if expected is None:
        with pytest.raises(ValueError, match=REFUSAL[backend]):
            Float8Precision(recipe, backend=backend, **arguments)
        return
    plugin = Float8Precision(recipe, backend=backend, exclude=["last", "head", "first"], **arguments)
    assert plugin.backend == expected
    torch.manual_seed(0)
    model = Wide()
    trainer(plugin, steps=2).fit(model, batches(2))
    assert len(model.losses) == 2
    assert plugin._backend.is_converted(model.middle)


@pytest.mark.parametrize("recipe", ["current", "rowwise", "block", "mxfp8", "nvfp4", "mxfp4"])
def test_no_step_says_anything(
    recipe: str, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    plugin = Float8Precision(recipe, exclude=["last", "head", "first"])
    model = Wide()
    run = trainer(plugin, steps=1)
    run.fit(model, batches(1))
    said = [message for message in caplog.messages if "Float8Precision" in message]
    assert len(said) == 1
    assert "torch sees no CUDA device" in said[0] or "offers it" in said[0]
    recwarn.clear()
    caplog.clear()
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            with plugin.forward_context():
                loss = model.training_step(plugin.convert_input(next(iter(batches(1)))), 0)
            loss.backward()
            plugin.convert_output(loss)
    assert not recwarn.list
    assert not caplog.messages
    assert capfd.readouterr() == ("", "")


def test_auto_does_not_emulate_by_surprise_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(_select, "_has_gpu", lambda: True)
    with pytest.raises(ValueError, match=r"'nvfp4'.*backend='transformer-engine' or 'emulation' has it.*pip install"):
        Float8Precision("nvfp4")
    assert Float8Precision("nvfp4", backend="emulation").backend == "emulation"
