import json
import math

import pytest
import torch
from callbacks.fits import OPTIMIZERS, Regression, events
from inspection.checkpoints import lightning_file, save
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torchao.optim import AdamW8bit
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from lightning_stosign import OptimizerStateMonitor, StoSignSGD, emulate_state_precision
from lightning_stosign.inspection import CheckpointError, as_json, inspect_checkpoint

FORMATS = ("fp8-raw:min_numel=0", "fp8:min_numel=0", "fp8-block:min_numel=0")


def _report(path, forecast=FORMATS):
    return json.loads(json.dumps(as_json(inspect_checkpoint(path, forecast)), allow_nan=False))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"lbfgs", "plain-sgd"}))
def test_the_checkpoint_says_what_the_monitor_logged(tmp_path, name):
    monitor = OptimizerStateMonitor(every_n_steps=1, forecast=FORMATS, histograms=False)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module, _ = save(tmp_path / "x.ckpt", Regression(name), logger=logger, callbacks=[monitor])
    log = events(tmp_path)
    logged = {
        tag.removeprefix("optimizer_state/").removeprefix("per_layer_"): log.Scalars(tag)[-1].value
        for tag in log.Tags()["scalars"]
        if tag.startswith(("optimizer_state/", "per_layer_"))
    }
    (optimizer,) = _report(tmp_path / "x.ckpt")["optimizers"]
    assert [layer["name"] for layer in optimizer["layers"]] == [n for n, _ in module.named_parameters()]
    compared = set()

    def compare(tag, value):
        assert value == pytest.approx(logged[tag], rel=1e-6), tag
        compared.add(tag)

    for place, suffix in [(optimizer, ""), *((layer, f"/{layer['name']}") for layer in optimizer["layers"])]:
        for state, counts in place["states"].items():
            for statistic in ("zero_fraction", "abs_max", "rms"):
                compare(f"{statistic}/{state}{suffix}", counts[statistic])
            for format, share in counts["underflow_fraction"].items():
                compare(f"underflow_fraction/{state}/{format}{suffix}", share)
        for statistic in ("dead_fraction", "exploding_fraction"):
            if statistic in place:
                compare(f"{statistic}{suffix}", place[statistic])
    kinds = ["zero_fraction", "abs_max", "rms", "underflow_fraction"]
    if name != "adafactor":  # it divides the gradient, which a checkpoint has not
        kinds += ["dead_fraction", "exploding_fraction"]
    assert compared == {tag for tag in logged if tag.partition("/")[0] in kinds}


class TwoOptimizers(Regression):
    """A frozen layer between two that have an optimizer each, with and without decay."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.frozen = nn.Linear(3, 8).requires_grad_(False)
        self.critic = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) + self.critic(torch.ones(5)).square().sum())
            optimizer.step()

    def configure_optimizers(self):
        decayed = [
            {"params": [self.first.weight, self.head.weight]},
            {"params": [self.first.bias], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(decayed), torch.optim.RMSprop(self.critic.parameters())]


def test_each_of_several_optimizers_is_reported(tmp_path):
    save(tmp_path / "x.ckpt", TwoOptimizers())
    first, second = _report(tmp_path / "x.ckpt")["optimizers"]
    assert (first["optimizer"], second["optimizer"]) == ("AdamW", "RMSprop")
    # the bias could as well be the frozen layer's; the weight comes before head.weight
    assert [layer["name"] for layer in first["layers"]] == ["first.weight", "head.weight", None]
    assert [layer["number"] for layer in first["layers"]] == [0, 1, 2]
    assert [layer["name"] for layer in second["layers"]] == ["critic.weight", "critic.bias"]
    assert [layer["shape"] for layer in second["layers"]] == [[2, 5], [2]]


def test_names_that_the_optimizer_was_given_count(tmp_path):
    class Named(TwoOptimizers):
        def configure_optimizers(self):
            return [torch.optim.AdamW([(n, p) for n, p in self.named_parameters() if n.startswith("first")])] * 2

    save(tmp_path / "x.ckpt", Named())
    for optimizer in _report(tmp_path / "x.ckpt")["optimizers"]:
        assert [layer["name"] for layer in optimizer["layers"]] == ["first.weight", "first.bias"]


def test_names_in_the_place_of_numbers_count(tmp_path):
    # as FSDP saves a full checkpoint
    state = {"first.weight": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.zeros(2)}}
    group = {**torch.optim.Adam([nn.Parameter(torch.ones(1))]).state_dict()["param_groups"][0], "params": [*state]}
    path = lightning_file(tmp_path / "x.ckpt", optimizer_states=[{"state": state, "param_groups": [group]}])
    (optimizer,) = _report(path)["optimizers"]
    assert optimizer["layers"][0]["name"] == "first.weight"
    assert optimizer["exploding_fraction"] == 1


@pytest.mark.parametrize("precision", ["fp8", "fp8-raw:static_scale=1024", "fp8-block", "bfloat16", "fp4-block"])
def test_stored_states_are_dequantised(tmp_path, precision):
    class Stored(Regression):
        def configure_optimizers(self):
            return StoSignSGD(self.parameters(), lr=0.01, state_precision=f"{precision}{self.options}")

        options = ",min_numel=0" if ":" in precision else ":min_numel=0"

    save(tmp_path / "x.ckpt", Stored())
    save(tmp_path / "y.ckpt", Regression("stosign"))
    (optimizer,) = _report(tmp_path / "x.ckpt")["optimizers"]
    stored = {"bfloat16": "bfloat16", "fp8-raw:static_scale=1024": "float8_e4m3fn"}
    stored["fp4-block"] = "float4_e2m1 with scale"
    assert optimizer["stored_as"]["exp_inf"] == stored.get(precision, "float8_e4m3fn with scale")
    (exact,) = _report(tmp_path / "y.ckpt")["optimizers"]
    tolerance = 0.4 if precision == "fp4-block" else 0.15
    for state in ("exp_avg", "exp_inf"):
        assert optimizer["states"][state]["rms"] == pytest.approx(exact["states"][state]["rms"], rel=tolerance)


def test_emulated_states_are_read_as_they_are(tmp_path):
    class Emulated(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
            return optimizer

    save(tmp_path / "x.ckpt", Emulated())
    (optimizer,) = _report(tmp_path / "x.ckpt", ["fp8-raw:min_numel=0"])["optimizers"]
    second_moment = optimizer["states"]["exp_avg_sq"]
    assert second_moment["zero_fraction"] > 0.3
    assert second_moment["underflow_fraction"]["fp8-raw:min_numel=0"] == 0  # what could be lost is lost
    assert optimizer["exploding_fraction"] > 0.1


@pytest.mark.parametrize("kind", ["8bit", "Fp8", "4bit"])
def test_torchao_s_low_bit_states_are_dequantised(tmp_path, kind):
    optimizer = AdamW8bit([nn.Parameter(torch.ones(64, 128))])
    state_class = {"8bit": OptimState8bit, "Fp8": OptimStateFp8, "4bit": OptimState4bit}[kind]
    sign = () if kind == "Fp8" else (True,)
    stored = state_class.zeros((64, 128), *sign, 128).copy_(torch.randn(64, 128))
    states = {"state": {0: {"exp_avg": stored}}, "param_groups": optimizer.state_dict()["param_groups"]}
    weights = {"weight": torch.ones(64, 128)}
    lightning_file(tmp_path / "x.ckpt", state_dict=weights, optimizer_states=[states])
    (report,) = _report(tmp_path / "x.ckpt")["optimizers"]
    assert report["layers"][0]["name"] == "weight"
    assert report["stored_as"] == {"exp_avg": state_class.__name__}
    exact = stored.dequantize().double().square().mean().sqrt().item()
    assert report["states"]["exp_avg"]["rms"] == pytest.approx(exact)


def test_an_optimizer_without_states_has_no_counts(tmp_path):
    save(tmp_path / "x.ckpt", Regression("plain-sgd"))
    (optimizer,) = _report(tmp_path / "x.ckpt")["optimizers"]
    assert (optimizer["optimizer"], optimizer["states"], optimizer["stored_as"]) == ("SGD", {}, {})


def test_an_unknown_optimizer_s_states_are_counted(tmp_path):
    state = {"clever_avg": torch.tensor([[0.0, 3.0], [4.0, 0.0]]), "count": 3}
    states = [{"state": {0: state}, "param_groups": [{"lr": 0.1, "cleverness": 7, "params": [0]}]}]
    (optimizer,) = _report(lightning_file(tmp_path / "x.ckpt", optimizer_states=states))["optimizers"]
    assert optimizer["optimizer"] == "unknown optimizer"
    assert optimizer["options"] == {"lr": 0.1, "cleverness": 7}
    assert optimizer["states"]["clever_avg"] == {
        "values": 4,
        "zero_fraction": 0.5,
        "abs_max": 4.0,
        "rms": 2.5,
        "underflow_fraction": dict.fromkeys(FORMATS, 0.0),
    }


def test_numbers_that_are_not_finite_are_null(tmp_path):
    group = torch.optim.Adam([nn.Parameter(torch.ones(1))]).state_dict()["param_groups"][0]
    state = {"exp_avg": torch.tensor([math.nan, 1.0]), "exp_avg_sq": torch.tensor([math.inf, 1.0])}
    path = lightning_file(
        tmp_path / "x.ckpt", optimizer_states=[{"state": {0: state}, "param_groups": [{**group, "lr": math.inf}]}]
    )
    (optimizer,) = _report(path)["optimizers"]
    assert optimizer["states"]["exp_avg"]["abs_max"] is None
    assert optimizer["states"]["exp_avg_sq"]["rms"] is None
    assert optimizer["options"]["lr"] is None


def test_states_that_contradict_each_other_are_refused(tmp_path):
    group = StoSignSGD([nn.Parameter(torch.ones(1))], state_precision="fp8-block").state_dict()["param_groups"][0]
    state = {"exp_avg": torch.ones(500).to(torch.float8_e4m3fn), "exp_avg_scale": torch.ones(77)}
    path = lightning_file(tmp_path / "x.ckpt", optimizer_states=[{"state": {0: state}, "param_groups": [group]}])
    with pytest.raises(CheckpointError, match=r"the states of parameter #0 cannot be read: "):
        inspect_checkpoint(path)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'fp7' is unknown"):
        inspect_checkpoint(lightning_file(tmp_path / "x.ckpt"), ["fp7"])
