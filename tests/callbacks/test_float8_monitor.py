"""Float8Monitor against numpy in float64, beside every backend of the CPU, and as a forecast."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import scalars
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_stosign import Float8Monitor, Float8Precision
from lightning_stosign.precision.operands import OperandRounding, Operands

sys.path.insert(0, str(Path(__file__).parents[1] / "precision"))
from block_reference import E2M1, E4M3, E5M2, in_blocks, scaled

RECIPES = {"current": "torchao", "rowwise": "torchao", "block": "emulation", "mxfp8": "emulation", "nvfp4": "emulation"}


class Chain(pl.LightningModule):
    """Four layers of 128. Sick: one token of the inputs of ``b`` is 1e6 times the others; so are gradients of ``c``."""

    def __init__(self, sick=False, checkpointing=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(128, 128, bias=False) for _ in range(4))
        self.sick, self.checkpointing, self.seen = sick, checkpointing, []

    def block(self, x):
        large, small = torch.ones(len(x), 1), torch.ones(len(x), 1)
        if self.sick:
            large[0], small[1:] = 1e6, 1e-6
        return x + self.b(x * large) / large + self.c(x) * small

    def training_step(self, batch, index):
        (x,) = batch
        hidden = torch.tanh(self.a(x))
        if self.checkpointing is None:
            out = self.block(hidden)
        else:
            out = checkpoint(self.block, hidden, use_reentrant=self.checkpointing == "reentrant")
        return (self.d(out) - x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        x = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=32)


def fit(module, monitor=None, plugin=None, folder=None, steps=4, ckpt_path=None, **options):
    settings = {
        "callbacks": [] if monitor is None else [monitor],
        "plugins": [] if plugin is None else [plugin],
        "logger": TensorBoardLogger(folder, name="", version="") if folder is not None else False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(
        **{**settings, **options},
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def oracle(recipe, x, w, g):
    """The rounded operands, float64."""
    if recipe == "current":
        return scaled(E4M3, x), scaled(E4M3, w), scaled(E5M2, g)
    if recipe == "rowwise":
        return tuple(scaled(E4M3, values, 1, power_of_two=True) for values in (x, w, g))
    numbers, size, square, nv = {
        "block": (E4M3, 128, True, False),
        "mxfp8": (E4M3, 32, False, False),
        "nvfp4": (E2M1, 16, True, True),
    }[recipe]
    return (
        in_blocks(numbers, x, size, nv=nv),
        in_blocks(numbers, w, size, square=square, nv=nv),
        in_blocks(numbers, g, size, nv=nv),
    )


def row_error(exact, result):
    size = np.square(exact).sum(1)
    return np.sqrt((np.square(result - exact).sum(1)[size > 0] / size[size > 0]).mean())


@pytest.mark.parametrize("recipe", RECIPES)
def test_statistics_equal_a_float64_oracle(recipe, tmp_path):
    seen = {}

    class Watched(Chain):
        def training_step(self, batch, index):
            handle = self.b.register_forward_hook(self.keep)
            loss = super().training_step(batch, index)
            handle.remove()
            return loss

        def keep(self, layer, args, output):
            seen.update(input=args[0].detach().double().numpy(), weight=layer.weight.detach().double().numpy().copy())
            output.register_hook(lambda g: seen.update(output_gradient=g.double().numpy()))

    fit(Watched(), Float8Monitor([recipe], every_n_steps=1), folder=tmp_path, steps=1)
    logged = {tag: values[0] for tag, values in scalars(tmp_path).items() if tag.endswith("/b")}
    exact = [seen[operand] for operand in ("input", "weight", "output_gradient")]
    rounded = oracle(recipe, *exact)
    expected = {}
    for operand, values, result in zip(seen, exact, rounded, strict=True):
        expected[f"amax/{operand}"] = np.abs(values).max()
        expected[f"rms/{operand}"] = np.sqrt(np.square(values).mean())
        expected[f"log2_range/{operand}"] = np.log2(np.abs(values).max() / np.abs(values[values != 0]).min())
        if not (recipe == "nvfp4" and operand == "output_gradient"):  # rounded stochastically
            expected[f"quantization_error/{operand}/{recipe}"] = row_error(values, result)
            flushed = ((values != 0) & (result == 0)).sum() / (values != 0).sum()
            expected[f"underflow_fraction/{operand}/{recipe}"] = flushed
    (x, w, _), (qx, qw, qg) = exact, rounded
    expected[f"product_error/output/{recipe}"] = row_error(x @ w.T, qx @ qw.T)
    if recipe == "current":
        g = exact[2]
        expected[f"product_error/input_gradient/{recipe}"] = row_error(g @ w, qg @ qw)
        expected[f"product_error/weight_gradient/{recipe}"] = row_error(g.T @ x, qg.T @ qx)
    for tag, value in expected.items():
        statistic, _, rest = tag.partition("/")
        assert logged[f"float8_{statistic}/{rest}/b"] == pytest.approx(value, rel=1e-4), tag


@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_factors_are_those_of_torchao(recipe):
    torch.manual_seed(0)
    x, w, g = torch.randn(32, 128), torch.randn(64, 128), torch.randn(32, 64)
    layer = nn.Module()
    layer.linear = nn.Linear(128, 64, bias=False)
    layer.linear.weight.data = w.clone()
    Float8Precision(recipe, backend="torchao").convert_module(layer)
    leaf = x.clone().requires_grad_()
    output = layer.linear(leaf)
    output.backward(g)
    operands, rounding = Operands(x, w, g), OperandRounding(recipe)
    rounded, _ = rounding.operands(operands, torch.zeros(3))
    results = [left @ right for left, right in rounding.factors(operands, rounded)]
    for ours, theirs in zip(results, (output, leaf.grad, layer.linear.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)


def test_what_is_beyond_a_stale_scale_is_counted():
    torch.manual_seed(0)
    operands = Operands(torch.randn(32, 128), torch.randn(64, 128), torch.randn(32, 64))
    limits = torch.tensor([1.0, 100.0, 0.5])
    rounded, saturated = OperandRounding("delayed").operands(operands, limits)
    for values, result, limit, number in zip(operands, rounded, limits, saturated, strict=True):
        assert number == (values.abs() > limit).sum()
        assert result.abs().max() <= limit * 1.0001


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_weights_keep_their_bits_and_the_sick_layers_are_named(recipe, tmp_path):
    def plugin():
        return None if recipe is None else Float8Precision(recipe, backend=RECIPES[recipe])

    monitor = Float8Monitor(["nvfp4", "rowwise"], bound=0.3, products_every_n_records=1)
    watched, plain = Chain(sick=True), Chain(sick=True)
    fit(watched, monitor, plugin(), tmp_path)
    fit(plain, None, plugin())
    for name, parameter in watched.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert not any(module._forward_hooks for module in watched.modules())
    errors = monitor._worst_products
    assert next(iter(errors)) == (recipe or "nvfp4")
    assert monitor.recommend(recipe="nvfp4") == {"recipe": "nvfp4", "exclude": ["b", "c"]}  # the other tokens vanish
    if recipe in (None, "nvfp4"):
        assert {row["layer"]: row["operand"] for row in monitor.table()} == {"b": "input", "c": "output_gradient"}
    assert {"input_gradient", "output"} <= {tag.split("/")[1] for tag in scalars(tmp_path) if "product_error/" in tag}


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_layers_that_are_computed_again_count_once(checkpointing, tmp_path):
    fit(Chain(), Float8Monitor(), folder=tmp_path / "plain")
    fit(Chain(checkpointing=checkpointing), Float8Monitor(), folder=tmp_path / "again")
    plain, again = scalars(tmp_path / "plain"), scalars(tmp_path / "again")
    assert plain == again
    assert "float8_rms/input/b" in plain


def test_micro_batches_of_a_step_are_taken_together(tmp_path):
    fit(Chain(), Float8Monitor(every_n_steps=1), folder=tmp_path, steps=1, accumulate_grad_batches=4)
    x = next(iter(torch.utils.data.DataLoader(Chain().train_dataloader().dataset, batch_size=128)))[0]
    logged = scalars(tmp_path)
    assert logged["float8_rms/input/a"] == {0: pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)}
    assert logged["float8_amax/input/a"] == {0: pytest.approx(x.abs().max().item())}


def test_a_resumed_run_goes_on_with_its_worst_errors(tmp_path):
    whole, first, second = (Float8Monitor(["current", "delayed"]) for _ in range(3))
    fit(Chain(), whole, steps=8)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(Chain(), None, steps=4, callbacks=[first, saving], enable_checkpointing=True)
    fit(Chain(), second, steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert second._records == whole._records == 4
    assert second.recommend() == whole.recommend()
    assert second._worst_products == whole._worst_products


def test_the_recommendation_is_an_argument_of_the_plugin():
    monitor = Float8Monitor(["nvfp4"], bound=0.3)
    fit(Chain(sick=True), monitor)
    advice = monitor.recommend()
    module = Chain()
    Float8Precision(**advice, backend="emulation").convert_module(module)
    assert advice["exclude"]
    for name in "abcd":
        assert (type(module.get_submodule(name)) is nn.Linear) == (name in advice["exclude"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"forecast": ["fp7"]}, ValueError),
        ({"forecast": "current"}, TypeError),
        ({"bound": 0}, ValueError),
        ({"bound": "small"}, TypeError),
        ({"every_n_steps": 0}, ValueError),
        ({"products_every_n_records": 0}, ValueError),
    ],
)
def test_bad_arguments_are_refused(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        Float8Monitor(**arguments)


def test_a_recommendation_needs_a_record():
    with pytest.raises(RuntimeError, match="no record"):
        Float8Monitor().recommend()
