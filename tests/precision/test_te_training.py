"""What people train with, on Transformer Engine's own layers."""

import copy
import io
import pickle
from typing import Any

import pytest
import te_cpu
import torch
from float8_models import Net, Wrapped, batches, net, te_plugin, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_stosign import StoSignSGD

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")

RECIPES = {
    "current": te_cpu.H100,
    "delayed": te_cpu.H100,
    "block": te_cpu.H100,
    "mxfp8": te_cpu.B200,
    "nvfp4": te_cpu.B200,
}


class Square(LightningModule):
    """128 -> 128 -> 128, with sizes that every recipe takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 128)
        self.body = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU("tanh"), nn.Linear(128, 128))
        self.losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        hidden = self.embed(batch[0])
        return (self.body(hidden) - batch[0].repeat(1, 4)).float().square().mean()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_as_bfloat16_does(te: Any, on_gpu: Any, recipe: str, fuse: bool) -> None:
    on_gpu(RECIPES[recipe])
    models = [net(model=Square), net(model=Square)]
    try:
        plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16", exclude=["embed"], fuse=fuse)
    except ValueError as error:  # not for this GPU
        pytest.skip(str(error))
    trainer(plugin, steps=40, accelerator="auto").fit(models[0], batches(4))
    trainer(steps=40, precision="bf16-true", accelerator="auto").fit(models[1], batches(4))
    low, exact = (sum(model.losses[-4:]) / 4 for model in models)
    start = models[1].losses[0]
    assert exact < 0.2 * start
    assert abs(low - exact) < (0.05 if recipe == "nvfp4" else 0.01) * start
    assert models[0].losses != models[1].losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_tied_weights_stay_tied_and_learn_from_both_uses(te: Any, on_gpu: Any, recipe: str) -> None:
    on_gpu(RECIPES[recipe])
    torch.manual_seed(0)
    model = Wrapped(embedding=nn.Embedding(128, 128), head=nn.Linear(128, 128, bias=False))
    model.head.weight = model.embedding.weight
    truth = copy.deepcopy(model).bfloat16()
    plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16")
    plugin.convert_module(model)
    tokens = torch.randint(128, (64,))
    with plugin.forward_context():
        loss = nn.functional.cross_entropy(model.head(model.embedding(tokens)).float(), tokens.roll(1))
    loss.backward()
    nn.functional.cross_entropy(truth.head(truth.embedding(tokens)).float(), tokens.roll(1)).backward()
    assert len(list(model.parameters())) == 1
    assert isinstance(model.head, te.Linear)
    grad, exact = model.embedding.weight.grad.float(), truth.embedding.weight.grad.float()
    assert (grad - exact).norm() < (0.4 if recipe == "nvfp4" else 0.15) * exact.norm()


def test_an_average_of_the_weights_follows_them_and_computes(te: Any) -> None:
    model = net()
    run = trainer(te_plugin(recipe="delayed"), steps=6, callbacks=[EMAWeightAveraging(decay=0.5)])
    run.fit(model, batches(1))
    assert isinstance(model.first, te.Linear)
    steps: list[dict[str, torch.Tensor]] = []

    class Recorded(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            steps.append({name: value.detach().clone() for name, value in self.named_parameters()})

    expected = net(model=Recorded)
    trainer(te_plugin(recipe="delayed"), steps=6).fit(expected, batches(1))
    averaged = steps[0]
    for later in steps[1:]:
        averaged = {name: value.lerp(later[name], 0.5) for name, value in averaged.items()}
    # Lightning hands the averaged weights to the model at the end.
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.data, averaged[name])


class Manual(Net):
    """Two optimizers, and a step in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *rest = list(self.parameters())
        return [torch.optim.AdamW([first], lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_manual_optimisation_goes_where_automatic_goes(te: Any, recipe: str) -> None:
    models = [net(model=Manual), net()]
    for model in models:
        # A step of two optimizers counts twice.
        steps = {"max_steps": -1, "max_epochs": 4} if isinstance(model, Manual) else {"max_steps": 4}
        trainer(te_plugin(recipe=recipe), **steps).fit(model, batches(1))
    assert models[0].losses == models[1].losses
    assert len(models[0].losses) == 4


class SignTrained(Square):
    """StoSignSGD whose states are FP8 too."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return StoSignSGD(self.parameters(), lr=3e-3, state_precision="fp8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_stosign_sgd_with_fp8_states_trains_and_resumes_bit_for_bit(
    te: Any, on_gpu: Any, recipe: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(RECIPES[recipe])
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    name: Any = {"name": "nvfp4", "disable_stochastic_rounding": True} if recipe == "nvfp4" else recipe

    def plugin() -> Any:
        return te_plugin(recipe=name, weights_dtype="bfloat16", exclude=["embed"])

    uninterrupted = net(model=SignTrained)
    run = trainer(plugin(), steps=30)
    run.fit(uninterrupted, batches(1))
    states = next(iter(run.optimizers)).state
    assert torch.float8_e4m3fn in {
        value.dtype for state in states.values() for value in state.values() if hasattr(value, "dtype")
    }
    assert uninterrupted.losses[-1] < 0.8 * uninterrupted.losses[0]
    first = trainer(plugin(), steps=3)
    first.fit(net(model=SignTrained), batches(1))
    first.save_checkpoint(tmp_path / "three.ckpt")
    resumed = net(seed=7, model=SignTrained)
    trainer(plugin(), steps=6).fit(resumed, batches(1), ckpt_path=tmp_path / "three.ckpt", weights_only=True)
    assert resumed.losses == uninterrupted.losses[3:6]


# Grouped experts


class Experts(LightningModule):
    """A mixture of experts that routes by the sign of two inputs; some experts get no token."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        self.embed = nn.Linear(32, 128)
        self.experts = te.GroupedLinear(len(sizes), 128, 128, params_dtype=torch.bfloat16, device="cpu")
        self.sizes = sizes

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.experts(self.embed(inputs), list(self.sizes))


@pytest.mark.parametrize("sizes", [(32, 64, 32), (0, 128, 0), (32, 0, 96), (0, 0, 0)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_experts_compute_what_separate_ones_do_also_without_tokens(
    te: Any, on_gpu: Any, recipe: str, sizes: tuple[int, ...]
) -> None:
    on_gpu(RECIPES[recipe])
    torch.manual_seed(0)
    model = Experts(sizes)
    plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16", exclude=["embed"])
    plugin.convert_module(model)
    assert type(model.experts) is te.GroupedLinear
    inputs = torch.randn(sum(sizes), 32, dtype=torch.bfloat16)
    with plugin.forward_context():
        output = model(inputs)
    output.sum().backward()
    hidden = model.embed(inputs).detach()
    parts = [
        nn.functional.linear(part, model.experts.get_parameter(f"weight{i}"), model.experts.get_parameter(f"bias{i}"))
        for i, part in enumerate(hidden.split(sizes))
    ]
    truth = torch.cat(parts)
    assert output.shape == truth.shape
    assert (output - truth).norm() <= (0.25 if recipe == "nvfp4" else 0.06) * truth.norm()
    for i, part in enumerate(hidden.split(sizes)):
        grad, exact = model.experts.get_parameter(f"weight{i}").grad.float(), part.float().sum(0).expand(128, 128)
        assert (grad - exact).norm() <= (0.3 if recipe == "nvfp4" else 0.06) * exact.norm()


# Copies


@pytest.mark.parametrize("flags", [{}, {"fuse": True}, {"quantized_weights": True}, {"pad": True}])
def test_a_converted_model_can_be_copied_and_pickled(te: Any, flags: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = Wrapped(
        chain=nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)), odd=nn.Linear(16, 10 if flags.get("pad") else 16)
    )
    plugin = te_plugin(**flags)
    plugin.convert_module(model)
    inputs = torch.randn(16, 32)

    def output(of: Any) -> torch.Tensor:
        with plugin.forward_context():
            return of.odd(of.chain(inputs))

    before = output(model)
    twins = [copy.deepcopy(model)]
    if "quantized_weights" not in flags:  # TE's tensors lose their quantizer
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins += [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(output(twin), before)
    assert te_plugin(**flags).recipe == pickle.loads(pickle.dumps(plugin)).recipe
