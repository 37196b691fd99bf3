"""What the rest of Lightning and torch makes of the plugin: throughput, torch.compile, the tied GPT of the example."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from float8_models import Wrapped, batches, net, torchao_plugin, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_stosign import StoSignConfig, StoSignMixin
from lightning_stosign.precision import Float8Precision

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from gpt import GPTModule  # noqa: E402
from pretrain_gpt import main as pretrain  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


def test_throughput_is_measured_against_the_flops_of_eight_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    asked: list[torch.dtype] = []

    def available_flops(device: torch.device, dtype: torch.dtype) -> int:
        asked.append(dtype)
        return 10**12

    monkeypatch.setattr("lightning.pytorch.callbacks.throughput_monitor.get_available_flops", available_flops)
    monitor = ThroughputMonitor(batch_size_fn=len)
    run = trainer(torchao_plugin(), steps=1, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(net(), batches(1))
    assert asked == [torch.int8]


@pytest.mark.parametrize("recipe", ["current", "rowwise", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("pad", [False, True])
def test_a_converted_model_compiles_into_one_graph(recipe: str, pad: bool) -> None:
    torch.manual_seed(0)
    model = Wrapped(layer=nn.Linear(64, 33 if pad else 32))
    Float8Precision(recipe, pad=pad).convert_module(model)
    inputs, results = torch.randn(32, 64), []
    compiled = torch.compile(model.layer, backend="aot_eager", fullgraph=True)
    for layer in (model.layer, compiled):
        model.zero_grad()
        leaf = inputs.clone().requires_grad_()
        output = layer(leaf)
        output.square().sum().backward()
        results.append((output, leaf.grad, model.layer.weight.grad))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


@pytest.mark.slow
def test_the_compiler_s_own_kernels_compute_the_same() -> None:
    torch.manual_seed(0)
    model = torchao_plugin().convert_module(Wrapped(layer=nn.Linear(64, 32)))
    inputs = torch.randn(32, 64)
    torch.testing.assert_close(torch.compile(model.layer, fullgraph=True)(inputs), model.layer(inputs))


def gpt(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return GPTModule(context=16, vocab_size=64, stosign=StoSignConfig(schedule="constant"))


def tokens() -> Any:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 64, (4, 17), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data[:, :-1], data[:, 1:]), batch_size=4)


@pytest.mark.parametrize("recipe", ["current", "mxfp8", "nvfp4"])
def test_the_tied_gpt_trains_resumes_bit_for_bit_and_exports(recipe: str, tmp_path: Any) -> None:
    uninterrupted = gpt()
    run = trainer(Float8Precision(recipe), steps=3)
    run.fit(uninterrupted, tokens())
    assert uninterrupted.model.head.weight is uninterrupted.model.tokens.weight
    assert run.precision_plugin._backend.is_converted(uninterrupted.model.head)

    first = trainer(Float8Precision(recipe), steps=1)
    first.fit(gpt(), tokens())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = gpt(seed=7)
    trainer(Float8Precision(recipe), steps=3).fit(resumed, tokens(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    for one, other in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(one, other)

    plain = gpt(seed=8)
    plain.load_state_dict(uninterrupted.state_dict())
    back = Float8Precision(recipe).convert_module(gpt(seed=9))
    back.load_state_dict(plain.state_dict())
    inputs = torch.zeros(1, 16, dtype=torch.int64)
    assert torch.equal(back(inputs), uninterrupted(inputs))


def test_the_emulated_recipes_learn(tmp_path: Any) -> None:
    for recipe in ("mxfp8", "nvfp4", "mxfp4"):
        model = net()
        plugin = Float8Precision(recipe, pad=True)
        trainer(plugin, steps=24).fit(model, batches(4))
        assert sum(model.losses[-4:]) < 0.5 * sum(model.losses[:4]), recipe


def test_bfloat16_weights_run_emulated_under_autocast() -> None:
    model: LightningModule = net()
    plugin = Float8Precision("mxfp8", weights_dtype="bfloat16", exclude=["last", "head"])
    plugin.convert_module(model)
    twin = copy.deepcopy(model)
    inputs = torch.randn(16, 32)
    with plugin.forward_context():
        output = model(plugin.convert_input(inputs))
        # Autocast casts what float32 operations leave, as it does for nn.Linear.
        again = twin(inputs)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, again)


@pytest.mark.parametrize(
    ("optimizer", "param_rounding", "moves"),
    [
        ("stosign", "stochastic", True),
        ("signsgd", "stochastic", True),
        ("stosign", "nearest", False),
        ("signsgd", "nearest", False),
        ("adamw", "stochastic", False),
    ],
)
def test_steps_below_bfloat16_s_spacing_are_not_lost(optimizer: Any, param_rounding: Any, moves: bool) -> None:
    """The weights are 1, half the spacing of bfloat16 there is 2**-8 above and 2**-9 below, and a step is 1e-4."""

    class Constant(StoSignMixin, Wrapped):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.layer(torch.ones(16, 64)).sum()  # descends: every gradient is 16

    model = Constant(layer=nn.Linear(64, 64, bias=False))
    nn.init.ones_(model.layer.weight)
    model.stosign = StoSignConfig(
        optimizer=optimizer, lr=1e-4, schedule="constant", weight_decay=0.0, param_rounding=param_rounding
    )
    trainer(torchao_plugin(weights_dtype="bfloat16"), steps=10).fit(model, batches(10))
    moved = 1 - model.layer.weight.double().mean().item()
    assert model.layer.weight.dtype == torch.bfloat16
    if moves:
        # Each of 4096 weights moves by one spacing of 2**-8 with probability 10 * 1e-4 * 2**8: 4.5 standard deviations.
        assert moved == pytest.approx(10e-4, abs=1.3e-4)
    else:
        assert moved == 0


def test_the_command_line_chooses_recipe_and_backend(tmp_path: Path) -> None:
    cli = pretrain(
        [
            "fit",
            f"--config={EXAMPLES / 'pretrain_gpt.yaml'}",
            '--trainer.plugins={"class_path": "lightning_stosign.Float8Precision", "init_args": '
            '{"recipe": {"name": "nvfp4", "disable_rht": true}, "backend": "emulation", "weights_dtype": "bfloat16"}}',
            "--trainer.max_steps=1",
            "--model.stosign.warmup_steps=0",
            "--model.stosign.param_rounding=nearest",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            "--trainer.callbacks=null",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    plugin = cli.trainer.precision_plugin
    assert isinstance(plugin, Float8Precision)
    assert (plugin.backend, plugin._backend.rounding.rotate) == ("emulation", False)
    assert cli.model.model.head.weight.dtype == torch.bfloat16
    assert cli.trainer.global_step == 1
    assert cli.trainer.optimizers[0].param_groups[0]["param_rounding"] == "nearest"
