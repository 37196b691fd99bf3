import copy
import math
import pickle
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_stosign import SignSGD, StatePrecision, StoSignConfig, StoSignMixin, StoSignSGD
from lightning_stosign.module import lr_factor
from lightning_stosign.optim.muon import MuonAdamW

NAMES = ["stosign", "signsgd", "adamw", "lion", "muon", "alias"]


class Model(StoSignMixin, pl.LightningModule):
    """A small regression that takes its config as an argument."""

    def __init__(self, stosign: StoSignConfig = StoSignConfig()):  # noqa: B008 - immutable
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.stosign = stosign
        self.first = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1)
        self.lrs = []

    def training_step(self, batch, batch_idx):
        return self.head(self.norm(self.first(batch))).square().mean()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.lrs.append([group["lr"] for group in optimizer.param_groups])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def train_dataloader(self):
        return DataLoader(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)


def trainer(**options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**settings, **options})


def fit(config, ckpt_path=None, **options):
    model, run = Model(config), trainer(**options)
    run.fit(model, ckpt_path=ckpt_path)
    return model, run


# ---- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "sgd"}, ValueError, r"optimizer='sgd' is not supported; accepted: 'stosign', 'signsgd'"),
        ({"lr": -1.0}, ValueError, r"lr=-1\.0 must be finite and at least 0"),
        ({"lr": math.inf}, ValueError, r"lr=inf must be finite"),
        ({"lr": "0.1"}, TypeError, r"lr='0\.1' must be a number"),
        ({"betas": (1.0, 1.0)}, ValueError, r"betas\[0\]=1\.0 must be in \[0, 1\)"),
        ({"betas": (0.9, 0.0)}, ValueError, r"betas\[1\]=0\.0 must be in \(0, 1\]"),
        ({"betas": 0.9}, TypeError, r"betas=0\.9 must be a pair of numbers"),
        ({"betas": (0.9,), "optimizer": "signsgd"}, TypeError, r"betas=\(0\.9,\) must be a pair of numbers"),
        ({"betas": (1.5, 0.9), "optimizer": "signsgd"}, ValueError, r"momentum=1\.5 must be"),
        ({"betas": (0.9, 1.0), "optimizer": "adamw"}, ValueError, r"beta.*1\.0"),
        ({"betas": (0.9, 1.0), "optimizer": "muon"}, ValueError, r"betas\[1\]=1\.0 must be in \[0, 1\)"),
        ({"betas": (2.0, 0.9), "optimizer": "muon"}, ValueError, r"betas\[0\]=2\.0 must be"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1 must be finite and at least 0"),
        ({"no_decay": "bias"}, TypeError, r"no_decay='bias' must be a list of strings"),
        ({"no_decay": None}, TypeError, r"no_decay=None must be a list of strings"),
        ({"warmup_steps": -1}, ValueError, r"warmup_steps=-1 must be at least 0"),
        ({"warmup_steps": 0.1}, TypeError, r"warmup_steps=0\.1 must be an int"),
        ({"warmup_steps": True}, TypeError, r"warmup_steps=True must be an int"),
        ({"schedule": "step"}, ValueError, r"schedule='step' is not supported; accepted: 'cosine', 'linear'"),
        ({"min_lr_ratio": 1.5}, ValueError, r"min_lr_ratio=1\.5 must be between 0\.0 and 1\.0"),
        ({"wsd_decay_ratio": 0.0}, ValueError, r"wsd_decay_ratio=0.* must be greater than 0"),
        ({"wsd_decay_ratio": 2.0}, ValueError, r"wsd_decay_ratio=2\.0 must be between"),
        ({"state_precision": "fp9"}, ValueError, r"state_precision='fp9' is unknown"),
        ({"state_precision": 8}, TypeError, r"state_precision=8 must be a name or a StatePrecision"),
        ({"stochastic": "no"}, ValueError, r"stochastic='no' is not supported"),
        ({"seed": -1}, ValueError, r"seed=-1 must be in"),
        ({"seed": 1.0}, TypeError, r"seed=1\.0 must be an int"),
        ({"on_nonfinite": "ignore"}, ValueError, r"on_nonfinite='ignore' is not supported"),
    ],
)
def test_bad_options_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        StoSignConfig(**options)


def test_lists_become_tuples_so_that_a_config_is_hashable():
    config = StoSignConfig(betas=[0.9, 0.99], no_decay=["bias"])
    assert (config.betas, config.no_decay) == ((0.9, 0.99), ("bias",))
    assert hash(config) == hash(StoSignConfig(betas=(0.9, 0.99), no_decay=("bias",)))


def test_a_state_precision_becomes_its_name():
    precision = StatePrecision(torch.float8_e4m3fn, static_scale=1024)
    assert StoSignConfig(state_precision=precision).state_precision == "fp8-raw:static_scale=1024.0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stosign", {"lr": 0.02, "betas": (0.9, 1.0), "stochastic": False, "seed": 7, "on_nonfinite": "skip"}),
        ("signsgd", {"lr": 0.02, "momentum": 0.9, "on_nonfinite": "skip"}),
        ("adamw", {"lr": 0.02, "betas": (0.9, 0.95)}),
        ("lion", {"lr": 0.02, "betas": (0.9, 0.99), "weight_decouple": True}),
        ("muon", {"lr": 0.02, "betas": (0.9, 0.95)}),
        ("alias", {"lr": 1.0, "momentum": 0.9, "beta2": 0.999, "on_nonfinite": "skip"}),
    ],
)
def test_options_reach_the_optimizer(name, expected):
    config = StoSignConfig(name, lr=0.02, stochastic=False, seed=7, on_nonfinite="skip", weight_decay=0.3)
    group = config.build_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))]}]).param_groups[0]
    assert {option: group[option] for option in expected} == expected
    assert group["weight_decay"] == 0.3


@pytest.mark.parametrize("name", NAMES)
def test_betas_reach_the_optimizer(name):
    config = StoSignConfig(name, betas=(0.8, 0.85))
    group = config.build_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True}]).param_groups[0]
    options = {"signsgd": {"momentum": 0.8}, "muon": {"momentum": 0.8}, "alias": {"momentum": 0.8, "beta2": 0.85}}
    expected = options.get(name, {"betas": (0.8, 0.85)})
    assert {option: group[option] for option in expected} == expected


@pytest.mark.parametrize("name", ["stosign", "signsgd"])
def test_state_precision_stores_the_states_of_this_package_s_optimizers(name):
    model, run = fit(StoSignConfig(name, state_precision="fp8:min_numel=0", schedule="constant"), max_steps=1)
    assert run.optimizers[0].state[model.head.weight]["exp_avg"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("name", "state"), [("adamw", "exp_avg"), ("lion", "exp_avg"), ("muon", "momentum_buffer")])
def test_state_precision_is_emulated_for_the_others(name, state):
    model, run = fit(StoSignConfig(name, state_precision="fp8-raw:min_numel=0", schedule="constant"), max_steps=1)
    value = run.optimizers[0].state[model.first.weight][state]
    assert value.abs().max() > 0
    assert torch.equal(value, value.to(torch.float8_e4m3fn).float())


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls"), [("stosign", StoSignSGD), ("signsgd", SignSGD), ("adamw", torch.optim.AdamW), ("muon", MuonAdamW)]
)
def test_each_name_is_its_optimizer(name, cls):
    assert type(fit(StoSignConfig(name), max_steps=1)[1].optimizers[0]) is cls


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_moves_every_parameter(name):
    before = Model().state_dict()
    after = fit(StoSignConfig(name, lr=0.1), max_steps=3)[0].state_dict()
    assert [key for key in before if torch.equal(before[key], after[key])] == []


class OwnDefaults(StoSignMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_without_a_config_the_defaults_apply():
    model = OwnDefaults()
    model.trainer = trainer(max_steps=10)
    assert type(model.configure_optimizers()["optimizer"]) is StoSignSGD


class NoModule(StoSignMixin):
    pass


def test_the_mixin_asks_for_a_lightning_module():
    with pytest.raises(TypeError, match=r"NoModule must be a LightningModule: class Model\(StoSignMixin"):
        NoModule().param_groups()


# ---- param groups ----------------------------------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class LayerNorm2d(nn.LayerNorm):
    """A norm by its base class, not by its name."""


class FusedNormLinear(nn.Module):
    """As Transformer Engine's LayerNormLinear: the norm is a parameter, not a module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.layer_norm_weight = nn.Parameter(torch.ones(4))


class Zoo(StoSignMixin, pl.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.stosign = StoSignConfig(weight_decay=0.5, **options)
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.rms_norm = nn.RMSNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.llama = LlamaRMSNorm()
        self.norm_by_base = LayerNorm2d(4)
        self.fused = FusedNormLinear()
        self.embedding = nn.Embedding(6, 4)
        self.bag = nn.EmbeddingBag(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(4))


MATRICES = {"linear.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
MATRICES |= {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "fused.weight"}
BIASES = {"linear.bias", "conv.bias", "attention.in_proj_bias", "attention.out_proj.bias", "lstm.bias_ih_l0"}
BIASES |= {"lstm.bias_hh_l0"}
WITH_BIAS = ("layer_norm", "batch_norm", "group_norm", "norm_by_base")
NORM_BIASES = {f"{norm}.bias" for norm in WITH_BIAS}
NORMS = {f"{norm}.weight" for norm in (*WITH_BIAS, "rms_norm", "llama")} | {"fused.layer_norm_weight"}
EMBEDDINGS = {"embedding.weight", "bag.weight"}


def by_decay(model):
    groups = model.param_groups()
    return {decay: {n for g in groups if g["weight_decay"] == decay for n in g["param_names"]} for decay in (0.5, 0.0)}


def test_biases_norms_and_embeddings_are_not_decayed():
    assert by_decay(Zoo()) == {0.5: MATRICES | {"gain"}, 0.0: BIASES | NORMS | NORM_BIASES | EMBEDDINGS}


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        ((), set()),
        (("bias",), BIASES | NORM_BIASES),
        (("norm",), NORMS | NORM_BIASES),
        (("embedding",), EMBEDDINGS),
        (("gain",), {"gain"}),
        (("lstm.*", "*.in_proj_weight"), {n for n in MATRICES | BIASES if "lstm" in n} | {"attention.in_proj_weight"}),
        (("head.weight",), {"embedding.weight"}),  # the tied weight's other name
    ],
)
def test_no_decay_takes_kinds_and_globs(no_decay, exempt):
    assert by_decay(Zoo(no_decay=no_decay))[0.0] == exempt


def test_frozen_parameters_are_in_no_group_and_the_others_in_one():
    model = Zoo()
    params = [param for group in model.param_groups() for param in group["params"]]
    assert len(params) == len({id(p) for p in params})
    assert {id(p) for p in params} == {id(p) for p in model.parameters() if p.requires_grad}


def test_names_and_parameters_of_a_group_belong_together():
    model = Zoo()
    for group in model.param_groups():
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is param


class OwnRule(Zoo):
    def decays(self, name, param, module):
        return name.startswith("conv")


def test_decays_can_be_overridden():
    assert by_decay(OwnRule())[0.5] == {"conv.weight", "conv.bias"}


def test_muon_gets_the_matrices_without_the_embeddings():
    muon = {n for g in Zoo(optimizer="muon").param_groups() if g.get("use_muon") for n in g["param_names"]}
    assert muon == MATRICES - {"conv.weight"}


def test_muon_s_matrices_keep_their_decay():
    assert by_decay(Zoo(optimizer="muon")) == by_decay(Zoo())


class AllFrozen(StoSignMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2).requires_grad_(False)


def test_a_model_without_trainable_parameters_is_an_error():
    model = AllFrozen()
    model.trainer = trainer(max_steps=10)
    with pytest.raises(ValueError, match="empty parameter list"):
        model.configure_optimizers()


# ---- schedules -------------------------------------------------------------------------------------------------------

CLOSED_FORMS = {
    "linear": lambda t: 1 - 0.8 * t,
    "cosine": lambda t: 0.2 + 0.8 * (1 + math.cos(math.pi * t)) / 2,
}


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_decay_follows_its_closed_form_to_min_lr_ratio(schedule, warmup):
    factor = lr_factor(StoSignConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.2), 25)
    expected = [CLOSED_FORMS[schedule]((step - warmup) / (25 - warmup)) for step in range(warmup, 26)]
    assert [factor(step) for step in range(warmup, 26)] == pytest.approx(expected)
    assert factor(25) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_warmup_rises_linearly_from_its_first_step_to_1(schedule):
    factor = lr_factor(StoSignConfig(schedule=schedule, warmup_steps=4), 100)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_needs_no_end():
    factor = lr_factor(StoSignConfig(schedule="constant", warmup_steps=2), math.inf)
    assert [factor(step) for step in (0, 1, 2, 10**9)] == [0.5, 1.0, 1.0, 1.0]


def test_wsd_is_constant_then_linear_over_its_share_of_all_steps():
    config = StoSignConfig(schedule="wsd", warmup_steps=2, min_lr_ratio=0.1, wsd_decay_ratio=0.25)
    factor = lr_factor(config, 20)
    expected = [0.5] + [1.0] * 15 + [1 - 0.9 * k / 5 for k in range(1, 6)]
    assert [factor(step) for step in (0, *range(1, 21))] == pytest.approx(expected[:1] + expected[1:])


def test_wsd_s_decay_does_not_begin_before_warmup_ends():
    factor = lr_factor(StoSignConfig(schedule="wsd", warmup_steps=6, wsd_decay_ratio=1.0, min_lr_ratio=0.0), 10)
    assert [factor(step) for step in range(5, 11)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_beyond_the_end_lr_stays_at_its_floor(schedule):
    assert lr_factor(StoSignConfig(schedule=schedule, min_lr_ratio=0.3), 10)(15) == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_that_end_need_an_end(schedule):
    with pytest.raises(
        ValueError, match=f"schedule='{schedule}' needs an end: set the Trainer's max_steps or max_epochs"
    ):
        lr_factor(StoSignConfig(schedule=schedule), math.inf)


def test_warmup_must_fit_into_the_training():
    with pytest.raises(ValueError, match="warmup_steps=10 must be less than the 10 steps of this training"):
        fit(StoSignConfig(warmup_steps=10), max_steps=10)


def linear(**options):
    return StoSignConfig(lr=1.0, schedule="linear", min_lr_ratio=0.0, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_reaches_all_param_groups(name):
    model, _ = fit(StoSignConfig(name, lr=0.1, schedule="linear", min_lr_ratio=0.0, warmup_steps=2), max_steps=4)
    peak = 1.0 if name == "alias" else 0.1  # a factor on the step size that it finds
    expected = [0.5 * peak, peak, peak, 0.5 * peak]
    assert [len(set(lrs)) for lrs in model.lrs] == [1] * 4
    assert [lrs[0] for lrs in model.lrs] == pytest.approx(expected)
    assert len(model.lrs[0]) == 2


@pytest.mark.parametrize("options", [{"max_steps": 8}, {"max_epochs": 4, "accumulate_grad_batches": 4}])
def test_the_schedule_counts_optimizer_steps(options):
    # 8 batches an epoch; 4 epochs of 2 steps
    model, _ = fit(linear(), **options)
    assert [lrs[0] for lrs in model.lrs] == pytest.approx([1 - k / 8 for k in range(8)])


def test_a_constant_schedule_has_no_scheduler():
    assert fit(StoSignConfig(schedule="constant"), max_steps=1)[1].lr_scheduler_configs == []


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(3)


class EndlessModel(Model):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4)


def test_fast_dev_run_is_not_too_short_for_a_warm_up():
    model = Model(StoSignConfig(warmup_steps=100))
    pl.Trainer(fast_dev_run=True, accelerator="cpu", enable_model_summary=False, enable_progress_bar=False).fit(model)
    assert model.trainer.global_step == 1


@pytest.mark.parametrize("options", [{"max_steps": -1, "max_epochs": -1}, {"max_epochs": 1}])
def test_training_without_an_end_is_an_error(options):
    with pytest.raises(ValueError, match="schedule='cosine' needs an end"):
        trainer(**options).fit(EndlessModel())


def test_endless_data_need_max_steps_only():
    model = EndlessModel(linear())
    trainer(max_steps=4).fit(model)
    assert [lrs[0] for lrs in model.lrs] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_resume_with_more_steps_extends_the_schedule(tmp_path):
    fit(linear(), max_steps=4)[1].save_checkpoint(tmp_path / "4.ckpt")
    model, _ = fit(linear(), ckpt_path=tmp_path / "4.ckpt", max_steps=8)
    # The first step after the resume still has the learning rate in the checkpoint: 0, the old schedule's end.
    assert [lrs[0] for lrs in model.lrs][1:] == pytest.approx([1 - k / 8 for k in (5, 6, 7)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, name, precision):
    config = StoSignConfig(name, lr=0.1, warmup_steps=2, state_precision=precision)
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight, _ = fit(config, max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    resumed, run = fit(config, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert (run.global_step, len(resumed.lrs)) == (16, 8)
    for (key, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), key


# ---- checkpoints and the command line --------------------------------------------------------------------------------


def test_a_checkpoint_with_the_config_loads_with_weights_only(tmp_path):
    config = StoSignConfig(
        lr=0.02, state_precision=StatePrecision("float8_e4m3fn"), betas=[0.9, 0.5], no_decay=["bias"]
    )
    fit(config, max_steps=1)[1].save_checkpoint(tmp_path / "1.ckpt")
    assert torch.load(tmp_path / "1.ckpt", weights_only=True)["hyper_parameters"]["stosign"] == config


def test_load_from_checkpoint_brings_the_config_back(tmp_path):
    config = StoSignConfig(lr=0.02)
    fit(config, max_steps=1)[1].save_checkpoint(tmp_path / "1.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "1.ckpt", weights_only=True).stosign == config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_config_can_be_copied(copied):
    config = StoSignConfig("lion", state_precision="fp8")
    assert copied(config) == config


def cli(*args):
    return LightningCLI(
        Model,
        args=list(args),
        run=False,
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "logger": False},
    )


def test_the_command_line_fills_the_config():
    config = cli(
        "--model.stosign.optimizer=adamw",
        "--model.stosign.lr=3e-4",
        "--model.stosign.betas=[0.8,0.9]",
        "--model.stosign.no_decay=[bias,'head.*']",
        "--model.stosign.state_precision=fp8-raw:static_scale=1024",
    ).model.stosign
    assert config == StoSignConfig(
        "adamw",
        lr=3e-4,
        betas=(0.8, 0.9),
        no_decay=("bias", "head.*"),
        state_precision="fp8-raw:static_scale=1024",
    )


def test_yaml_fills_the_config(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model:\n  stosign:\n    lr: 0.002\n    schedule: wsd\n    warmup_steps: 3\n    state_precision: fp8-block\n"
    )
    config = cli(f"--config={tmp_path / 'run.yaml'}").model.stosign
    assert config == StoSignConfig(lr=0.002, schedule="wsd", warmup_steps=3, state_precision="fp8-block")


def test_yaml_takes_a_state_precision_by_its_fields(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model:\n  stosign:\n    state_precision:\n"
        "      class_path: lightning_stosign.StatePrecision\n"
        "      init_args: {dtype: torch.float8_e5m2, scaling: tensor}\n"
    )
    assert cli(f"--config={tmp_path / 'run.yaml'}").model.stosign.state_precision == "fp8:dtype=float8_e5m2"


def test_the_command_line_refuses_what_the_config_refuses():
    with pytest.raises(ValueError, match=r"min_lr_ratio=3\.0 must be between 0\.0 and 1\.0"):
        cli("--model.stosign.min_lr_ratio=3.0")


def test_fit_from_the_command_line_trains_with_the_config():
    options = ["--trainer.max_steps=2", "--trainer.enable_checkpointing=false", "--model.stosign.lr=0.25"]
    command = LightningCLI(
        Model,
        args=["fit", *options, "--model.stosign.state_precision=fp8", "--model.stosign.schedule=constant"],
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    )
    (optimizer,) = command.trainer.optimizers
    assert command.trainer.global_step == 2
    assert {(g["lr"], g["state_precision"]) for g in optimizer.param_groups} == {(0.25, "fp8")}


# ---- Muon with AdamW -------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))


def split(net):
    params = list(net.parameters())
    return [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]


def muon_adamw(net, **options):
    matrices, rest = split(net)
    return MuonAdamW(
        [{"params": matrices, "use_muon": True, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}],
        **{"lr": 0.02, "betas": (0.8, 0.9), **options},
    )


def take_steps(net, optimizers, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_muon_adamw_is_torch_s_two_optimizers_bit_for_bit():
    net, reference = network(), network()
    matrices, rest = split(reference)
    apart = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.8, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.8, 0.9), weight_decay=0.0),
    ]
    take_steps(net, [muon_adamw(net)], 5)
    take_steps(reference, apart, 5)
    assert_same(net, reference)


@pytest.mark.parametrize("copied", ["load_state_dict", "deepcopy", "pickle", "weights_only"])
def test_muon_adamw_continues_bit_for_bit(copied, tmp_path):
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 3)
    if copied == "deepcopy":
        other, restored = copy.deepcopy((net, optimizer))
    elif copied == "pickle":
        other, restored = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        other = copy.deepcopy(net)
        restored = muon_adamw(other, lr=0.5)
        restored.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=copied == "weights_only"))
    take_steps(net, [optimizer], 3, start=3)
    take_steps(other, [restored], 3, start=3)
    assert_same(net, other)


def test_a_copy_of_muon_adamw_has_states_of_its_own():
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 1)
    other, restored = copy.deepcopy((net, optimizer))
    take_steps(other, [restored], 1)
    assert not torch.equal(
        optimizer.state[net[0].weight]["momentum_buffer"], restored.state[other[0].weight]["momentum_buffer"]
    )


def test_schedulers_reach_both_parts_of_muon_adamw():
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 1)
    before = copy.deepcopy(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    take_steps(net, [optimizer], 1)
    scheduler.step()
    assert_same(net, before)


def test_schedulers_reach_both_parts_after_load_state_dict():
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(net)
    take_steps(net, [optimizer], 1)
    assert_same(net, before)


def test_a_group_added_later_is_trained():
    net = network()
    optimizer = muon_adamw(nn.Sequential(net[0], net[1]))
    optimizer.add_param_group({"params": [net[2].weight], "use_muon": True})
    before = net[2].weight.detach().clone()
    take_steps(net, [optimizer], 1)
    assert not torch.equal(net[2].weight, before)
    assert "momentum_buffer" in optimizer.state[net[2].weight]


def test_adding_a_group_keeps_the_states():
    net = network()
    optimizer = muon_adamw(nn.Sequential(net[0], net[1]))
    take_steps(net, [optimizer], 2)
    kept = optimizer.state[net[0].weight]["momentum_buffer"]
    optimizer.add_param_group({"params": [net[2].bias]})
    take_steps(net, [optimizer], 1)
    assert optimizer.state[net[0].weight]["momentum_buffer"] is kept


def test_muon_adamw_without_matrices_is_adamw():
    net, reference = network(), network()
    take_steps(net, [MuonAdamW(net.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.1)], 3)
    take_steps(reference, [torch.optim.AdamW(reference.parameters(), 0.02, (0.8, 0.9), weight_decay=0.1)], 3)
    assert_same(net, reference)


def test_muon_adamw_evaluates_a_closure_once_with_gradients():
    x = nn.Parameter(torch.ones(2, 2))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = x.square().sum()
        loss.backward()
        return loss

    loss = MuonAdamW([{"params": [x], "use_muon": True}]).step(closure)
    assert (loss.item(), calls) == (4.0, [True])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr=-1\.0 must be"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay=-1\.0 must be"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]=1\.0 must be"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]=-0\.1 must be"),
        ({"betas": 0.9}, TypeError, r"betas=0\.9 must be a pair"),
    ],
)
def test_muon_adamw_refuses_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        MuonAdamW([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    "group", [{"use_muon": True, "shape": (3,)}, {"use_muon": True, "shape": (2, 2, 2)}, {"lr": -1.0, "shape": (2, 2)}]
)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(group):
    net = network()
    optimizer = muon_adamw(net)
    options = {key: value for key, value in group.items() if key != "shape"}
    with pytest.raises(ValueError, match=re.compile("2D|lr")):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(group["shape"]))], **options})
    assert (len(optimizer.param_groups), [len(part.param_groups) for part in optimizer.parts]) == (2, [1, 1])
    take_steps(net, [optimizer], 1)
