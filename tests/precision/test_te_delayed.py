"""Delayed scaling remembers: its histories are saved, restored, and seen by training alone."""

import contextlib
from typing import Any

import pytest
import torch
from float8_models import Net, batches, net, te_plugin, trainer
from lightning.pytorch import LightningModule
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


@pytest.fixture(autouse=True)
def trusted_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


class Evaluated(Net):
    """Validates and predicts on inputs that are a thousand times larger than those of training."""

    def validation_step(self, batch: Any, index: int) -> None:
        self(1e3 * batch[0])

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(1e3 * batch[0])

    def test_step(self, batch: Any, index: int) -> None:
        self(1e3 * batch[0])


def histories(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        layer = getattr(module, "inner", module)
        for direction in ("scaling_fwd", "scaling_bwd"):
            if direction in getattr(layer, "fp8_meta", {}):
                found[f"{name}.{direction}.scale"] = layer.fp8_meta[direction].scale.clone()
                found[f"{name}.{direction}.history"] = layer.fp8_meta[direction].amax_history.clone()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class BuiltOfTe(LightningModule):
    """With TE's own blocks, which are containers of layers, and an operation that TE fuses."""

    def __init__(self) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        options: Any = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": torch.float32}
        self.block = te.TransformerLayer(32, 64, 2, self_attn_mask_type="no_mask", **options)
        self.operations = te.ops.Sequential(te.ops.Linear(32, 32, device="cpu"), te.ops.GELU())
        self.head = nn.Linear(32, 16)
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.head(self.operations(self.block(batch[0][:, None]))).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")


@pytest.mark.usefixtures("te", "plain_attention")
def test_a_model_of_te_s_own_blocks_saves_and_resumes_bit_for_bit(tmp_path: Any) -> None:
    def built(seed: int) -> BuiltOfTe:
        torch.manual_seed(seed)
        return BuiltOfTe()

    uninterrupted = built(0)
    trainer(te_plugin(recipe="delayed"), steps=5).fit(uninterrupted, batches(1))
    first = trainer(te_plugin(recipe="delayed"), steps=2)
    first.fit(built(0), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = built(7)
    trainer(te_plugin(recipe="delayed"), steps=5).fit(resumed, batches(1), ckpt_path=tmp_path / "two.ckpt")
    assert resumed.losses == uninterrupted.losses[2:]
    assert same(histories(resumed), histories(uninterrupted))


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.usefixtures("te")
def test_a_run_resumes_after_an_evaluation_in_the_same_process(loop: str, inference_mode: bool, tmp_path: Any) -> None:
    uninterrupted = net(model=Evaluated)
    trainer(te_plugin(recipe="delayed"), steps=4).fit(uninterrupted, batches(1))
    first = trainer(te_plugin(recipe="delayed"), steps=2)
    first.fit(net(model=Evaluated), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")

    model = net(seed=7, model=Evaluated)
    run = trainer(te_plugin(recipe="delayed"), steps=4, inference_mode=inference_mode)
    getattr(run, loop)(model, batches(1))
    run.fit(model, batches(1), ckpt_path=tmp_path / "two.ckpt")
    assert model.losses == uninterrupted.losses[2:]
    assert same(histories(model), histories(uninterrupted))


@pytest.mark.usefixtures("te")
def test_validation_leaves_no_trace_in_training() -> None:
    watched, alone = net(model=Evaluated), net(model=Evaluated)
    trainer(te_plugin(recipe="delayed"), steps=4, num_sanity_val_steps=2, val_check_interval=1).fit(
        watched, batches(1), batches(1)
    )
    trainer(te_plugin(recipe="delayed"), steps=4).fit(alone, batches(1))
    assert watched.losses == alone.losses
    assert same(histories(watched), histories(alone))


class WritesIntoItsBatch(Evaluated):
    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0].clamp_(-1, 1))


@pytest.mark.usefixtures("te")
def test_a_validation_step_may_write_into_its_batch() -> None:
    trainer(te_plugin(recipe="delayed")).validate(net(model=WritesIntoItsBatch), batches(1), verbose=False)


@pytest.mark.usefixtures("te")
def test_an_evaluation_that_fails_leaves_no_trace_either() -> None:
    model, float8 = net(), te_plugin(recipe="delayed")
    float8.convert_module(model)
    with float8.forward_context():
        model(torch.randn(16, 32)).sum().backward()
    before = histories(model)
    with contextlib.suppress(ZeroDivisionError), torch.no_grad(), float8.forward_context():
        model(1e3 * torch.randn(16, 32))
        raise ZeroDivisionError
    assert same(histories(model), before)


@pytest.mark.usefixtures("te")
def test_quantised_weights_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"recipe='delayed'.*no history yet.*use recipe='current'"):
        te_plugin(recipe="delayed", quantized_weights=True)
