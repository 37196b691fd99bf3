"""What a recipe does on every backend and hardware: no step says a word, and nothing is emulated by surprise."""

import logging

import pytest
from float8_models import Wide, batches, trainer

from lightning_stosign.precision import Float8Precision, _select, te_backend


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
