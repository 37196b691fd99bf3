"""Trainers of `lightning.pytorch` and of `pytorch_lightning` train alike with every piece of the package."""

import importlib
import math
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_stosign as ours
from lightning_stosign._lightning_names import adopt, counterpart, is_a, like

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")

NAMES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


@pytest.fixture(params=NAMES)
def pl(request):
    return NAMES[request.param]


def net(pl, lr=1e-2, state_precision=None):
    class Net(ours.StoSignMixin, pl.LightningModule):
        stosign = ours.StoSignConfig(lr=lr, warmup_steps=2, state_precision=state_precision)

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
            self.head = nn.Linear(32, 16)
            self.norms = []

        def forward(self, x):
            return self.head(self.backbone(x))

        def training_step(self, batch, index):
            return 10 * (self(batch[0]) - batch[0].roll(1, 1)).square().mean()

        def validation_step(self, batch, index):
            self.log("val", self.training_step(batch, index).detach())

        def on_train_batch_end(self, *args):
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]).item()
            if math.isfinite(norm):  # not a step that float16 leaves out
                self.norms.append(norm)

    return Net()


def data():
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    inputs[:, 0] = 0
    return DataLoader(TensorDataset(inputs), batch_size=64)  # a checkpoint is never in the middle of an epoch


def trainer(pl, folder=None, steps=8, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "log_every_n_steps": 1,
            "logger": False if folder is None else pl.loggers.TensorBoardLogger(folder, name="", version=""),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def everything(pl, folder, **options):
    callbacks = [
        ours.OptimizerStateMonitor(),
        # The first input is always 0, and so is the momentum of its weights.
        ours.StateCollapseGuard(0.0, patience=1, states=["exp_avg"], action="promote", every_n_steps=1),
        ours.OptimizerDashboard(),
        pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}"),
    ]
    plugins = [ours.Float8Precision(weights_dtype=options.pop("weights_dtype", "bfloat16"))]
    return trainer(
        pl, folder, callbacks=callbacks, plugins=plugins, gradient_clip_val=0.5, enable_checkpointing=True, **options
    )


@pytest.mark.parametrize("weights_dtype", ["float32", "float16"])
def test_both_names_train_to_the_same_bits_with_all_pieces_together(tmp_path, weights_dtype):
    weights = {}
    for name, pl in NAMES.items():
        folder, model = tmp_path / name, net(pl, state_precision="fp8:min_numel=0")
        with pytest.warns(RuntimeWarning, match="has collapsed"):
            everything(pl, folder, weights_dtype=weights_dtype).fit(model, data(), data())
        weights[name] = model.state_dict()
        # Lightning's own code clips the gradients of a module of its own name only, and says nothing of others.
        assert 0.4 < max(model.norms) < 0.501

        # A resumed run continues with the same bits.
        resumed = net(pl, state_precision="fp8:min_numel=0")
        everything(pl, tmp_path / "resumed" / name, weights_dtype=weights_dtype).fit(
            resumed, data(), data(), ckpt_path=folder / "step=4.ckpt"
        )
        assert all(torch.equal(value, weights[name][key]) for key, value in resumed.state_dict().items())

        events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0, "images": 0}).Reload()
        tags = events.Tags()
        assert "optimizer_state/log10_abs/exp_avg" in tags["histograms"]
        assert "optimizer_state/collapse/text_summary" in tags["tensors"]
        assert "optimizer_state/magnitudes" in tags["images"]
        assert "optimizer_state/promotions" in tags["scalars"]

    first, second = weights.values()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_single_callback_needs_no_list(pl, tmp_path):
    trainer(pl, tmp_path, callbacks=ours.OptimizerStateMonitor()).fit(net(pl), data())


@pytest.mark.parametrize("other", NAMES)
def test_monitor_draws_histograms_with_loggers_of_either_name(pl, other, tmp_path):
    logger = NAMES[other].loggers.TensorBoardLogger(tmp_path, name="", version="", prefix="run")
    trainer(pl, callbacks=[ours.OptimizerStateMonitor()], logger=logger).fit(net(pl), data())
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert "run-optimizer_state/log10_abs/exp_avg" in tags["histograms"]


def test_the_finder_only_searches(pl, tmp_path):
    model = net(pl)
    found = ours.find_step_size(trainer(pl, default_root_dir=tmp_path), model, data(), steps=10, refine=False)
    assert model.stosign.lr == pytest.approx(found.suggestion())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_backbone_finetuning_with_the_plugin(pl):
    model = net(pl)

    frozen = model.backbone[0].weight.clone()
    finetuning = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=10)
    trainer(pl, plugins=[ours.Float8Precision()], callbacks=[finetuning], steps=4).fit(model, data())
    assert torch.equal(model.backbone[0].weight, frozen)
    assert type(model.backbone[0]).__name__ == "TorchAOLinear"


def test_throughput_monitors_count_the_plugin_as_float8(pl):
    from torch.utils.flop_counter import FlopCounterMode  # noqa: F401  # what they need

    module = importlib.import_module(f"{pl.__name__}.callbacks.throughput_monitor")
    assert module._plugin_to_compute_dtype(ours.Float8Precision()) is torch.int8


def test_lightning_cli_finds_the_classes_by_name(pl, tmp_path):
    cli = importlib.import_module(f"{pl.__name__}.cli")
    model = type(net(pl))
    made = cli.LightningCLI(
        model,
        run=False,
        args=[
            "--trainer.accelerator=cpu",
            "--trainer.plugins=Float8Precision",
            "--trainer.callbacks+=OptimizerStateMonitor",
            "--trainer.callbacks+=StateCollapseGuard",
            f"--trainer.logger={pl.__name__}.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={tmp_path}",
        ],
        save_config_callback=None,
    )
    assert type(made.trainer.precision_plugin) is ours.Float8Precision
    assert {type(callback) for callback in made.trainer.callbacks} >= {
        ours.OptimizerStateMonitor,
        ours.StateCollapseGuard,
    }


@pytest.mark.parametrize("strategy", ["sign_ddp", "sign_ddp_mean", "instance"])
def test_sign_ddp_inherits_from_the_trainers_own_strategy(pl, strategy):
    chosen = ours.SignDDPStrategy(uncompressed=["*bias"]) if strategy == "instance" else strategy
    taken = trainer(pl, strategy=chosen, devices=2).strategy
    assert isinstance(taken, ours.SignDDPStrategy) and isinstance(taken, pl.strategies.DDPStrategy)
    assert next(base for base in type(taken).__mro__ if base.__name__ == "DDPStrategy") is pl.strategies.DDPStrategy
    copy = pickle.loads(pickle.dumps(taken))
    assert type(copy) is type(taken) and copy.uncompressed == taken.uncompressed


@pytest.mark.slow
def test_sign_ddp_trains_alike_under_both_names(tmp_path):
    script = Path(__file__).with_name("sign_ddp_script.py")
    for name in NAMES:
        subprocess.run([sys.executable, script, name, tmp_path / f"{name}.pt"], check=True, capture_output=True)
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in NAMES)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_subclass_is_adopted_with_its_super_calls():
    class Louder(ours.SignDDPStrategy):
        @property
        def lightning_restore_optimizer(self):
            return not super().lightning_restore_optimizer

    louder = Louder()
    adopt(louder, pytorch_lightning.accelerators.CPUAccelerator())
    assert isinstance(louder, Louder) and lightning.pytorch.strategies.DDPStrategy not in type(louder).__mro__
    assert louder.lightning_restore_optimizer is False
    adopted = type(louder)
    adopt(louder, pytorch_lightning.accelerators.CPUAccelerator())
    assert type(louder) is adopted
    calm = Louder()
    adopt(calm, lightning.pytorch.accelerators.CPUAccelerator())
    assert type(calm) is Louder


ORDERS = [
    "import lightning_stosign.callbacks, lightning_stosign.precision, pytorch_lightning",
    "import lightning_stosign, pytorch_lightning",
    "import pytorch_lightning, lightning_stosign",
    "import lightning_fabric, lightning_stosign.precision, pytorch_lightning",
]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_is_free(order):
    code = (
        f"{order}\n"
        "import lightning_stosign, pytorch_lightning as pl, lightning_fabric\n"
        "options = dict(accelerator='cpu', logger=False, enable_checkpointing=False)\n"
        "plugin = lightning_stosign.Float8Precision()\n"
        "monitor = lightning_stosign.OptimizerStateMonitor()\n"
        "made = pl.Trainer(plugins=[plugin], callbacks=monitor, **options)\n"
        "assert made.precision_plugin is plugin and monitor in made.callbacks\n"
        "assert pl.Trainer(strategy='sign_ddp', devices=2, **options).strategy.aggregation == 'majority'\n"
        "assert lightning_fabric.Fabric(accelerator='cpu', plugins=plugin)._precision is plugin\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_the_other_name_is_not_imported_for_its_own_sake():
    code = (
        "import sys, lightning.pytorch, lightning_stosign\n"
        "lightning_stosign._lazy.load()\n"
        "from lightning_stosign._lightning_names import is_a\n"
        "assert not is_a(object(), lightning.pytorch.Trainer)\n"
        "assert not {'pytorch_lightning', 'lightning_fabric'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_counterparts_are_found_both_in_pytorch_and_in_fabric():
    import lightning_fabric

    assert counterpart(lightning.pytorch.Trainer) is pytorch_lightning.Trainer
    assert counterpart(lightning.fabric.Fabric) is lightning_fabric.Fabric
    assert counterpart(SimpleNamespace) is None
    assert like(pytorch_lightning.Trainer, int) is int
    assert is_a(pytorch_lightning.loggers.CSVLogger("x"), lightning.pytorch.loggers.Logger)
    assert not is_a(pytorch_lightning.loggers.CSVLogger("x"), lightning.pytorch.loggers.TensorBoardLogger)
