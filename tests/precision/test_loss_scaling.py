"""float16 weights: the loss is scaled, a step with an overflow is left out, and the scale is saved."""

from typing import Any

import pytest
import torch
from float8_models import Net, batches, net, torchao_plugin, trainer

from lightning_stosign import StoSignSGD

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


class Half(Net):
    """Trains with an optimizer that keeps what float16 weights would lose, and may overflow on request."""

    overflow_at = -1

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        return loss * (1e6 if self.global_step == self.overflow_at else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StoSignSGD(self.parameters(), lr=1e-2)


def scale(plugin: Any) -> float:
    return plugin.state_dict()["loss_scale"]["scale"]


def test_float16_learns_what_float32_learns() -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        model = net(model=Half)
        trainer(torchao_plugin(weights_dtype=dtype), steps=24, gradient_clip_val=1.0).fit(model, batches(4))
        assert model.first.weight.dtype == model.dtype == getattr(torch, dtype)
        losses[dtype] = sum(model.losses[-4:])
    assert losses["float16"] < 1.1 * losses["float32"] < 0.6


def test_a_step_with_an_overflow_changes_no_weight_and_halves_the_scale() -> None:
    model, plugin = net(model=Half), torchao_plugin(weights_dtype="float16")
    trainer(plugin, steps=1).fit(model, batches(1))
    weights, before = model.first.weight.clone(), scale(plugin)
    model.overflow_at = 0
    trainer(plugin, steps=1).fit(model, batches(1))
    assert torch.equal(model.first.weight, weights)
    assert scale(plugin) == before / 2


def test_gradients_are_clipped_after_they_are_unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    model = net(model=Half)
    monkeypatch.setattr(model, "on_before_zero_grad", lambda optimizer: None)

    def on_before_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
        norms.append(torch.stack([p.grad.float().norm() for p in model.parameters()]).norm().item())

    monkeypatch.setattr(model, "on_before_optimizer_step", on_before_optimizer_step)
    trainer(torchao_plugin(weights_dtype="float16"), steps=1, gradient_clip_val=1e-3).fit(model, batches(1))
    assert norms[0] < 10  # the scale is 65536
    assert torch.stack([p.grad.float().norm() for p in model.parameters()]).norm() < 1.1e-3


def test_a_float16_run_resumes_bit_for_bit(tmp_path: Any) -> None:
    uninterrupted = net(model=Half)
    trainer(torchao_plugin(weights_dtype="float16"), steps=6).fit(uninterrupted, batches(1))
    first = trainer(torchao_plugin(weights_dtype="float16"), steps=2)
    first.fit(net(model=Half), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = net(seed=7, model=Half)
    plugin = torchao_plugin(weights_dtype="float16")
    trainer(plugin, steps=6).fit(resumed, batches(1), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert resumed.losses == uninterrupted.losses[2:]
    assert plugin.state_dict()["loss_scale"]["_growth_tracker"] == 6
