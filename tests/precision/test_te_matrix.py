"""Every recipe on every backend and hardware either trains or is refused in its own words."""

from typing import Any

import pytest
import torch
from float8_models import Wide, batches, trainer

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


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("backend", ["auto", TE, AO, EMULATION])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_entry_trains_or_is_refused(
    te: Any, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, recipe: str, backend: Any, hardware: str
) -> None:
    capability = HARDWARE[hardware]
    if capability is None:
        monkeypatch.setattr(te_backend, "cuda_capability", lambda: None)
        monkeypatch.setattr(_select, "_has_gpu", lambda: False)
    else:
        on_gpu(capability)
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
