import pytest
import pytorch_optimizer
import torch
from health.torch_optimizers import FACTORIES, OURS, stepped
from torch import nn

from lightning_stosign import ALIAS, SignConverted
from lightning_stosign.inspection.optimizer_signatures import UNKNOWN, identify

OURS = {**OURS, "ALIAS": lambda params: ALIAS(params)}


def _identified(state_dict):
    return identify(state_dict["param_groups"], {name for state in state_dict["state"].values() for name in state})


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", [*FACTORIES, *OURS])
def test_every_optimizer_is_told_by_its_state_dict(name):
    optimizer, _ = stepped({**FACTORIES, **OURS}[name], sparse=name == "SparseAdam")
    signature = _identified(optimizer.state_dict())
    assert signature.name == {"MuonAdamW": "Muon and AdamW"}.get(name, name)
    assert name == "MuonAdamW" or isinstance(optimizer, signature.optimizer_class)


@pytest.mark.parametrize("name", [*FACTORIES, *OURS])
def test_an_optimizer_is_told_before_its_first_step(name):
    optimizer = {**FACTORIES, **OURS}[name]([nn.Parameter(torch.ones(2, 2))])
    assert _identified(optimizer.state_dict()).name == {"MuonAdamW": "Muon and AdamW"}.get(name, name)


def test_adam_with_decoupled_decay_is_adamw():
    optimizer, _ = stepped(lambda params: torch.optim.Adam(params, decoupled_weight_decay=True))
    assert _identified(optimizer.state_dict()).name == "AdamW"


def test_adam_of_an_older_torch_is_adam_or_adamw():
    optimizer, _ = stepped(FACTORIES["AdamW"])
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][0]["decoupled_weight_decay"]
    assert _identified(state_dict).name == "Adam or AdamW"


def test_a_scheduler_s_options_do_not_matter():
    optimizer, _ = stepped(FACTORIES["RMSprop"])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert _identified(optimizer.state_dict()).name == "RMSprop"


def test_what_nobody_knows_is_unknown():
    assert identify([{"lr": 0.1, "cleverness": 3}], ["cleverness_avg"]) is UNKNOWN


def test_a_converted_optimizer_is_told_with_its_base():
    optimizer, _ = stepped(lambda params: SignConverted(params, torch.optim.Adamax))
    signature = _identified(optimizer.state_dict())
    assert (signature.name, signature.optimizer_class) == ("SignConverted Adamax", torch.optim.Adamax)


def test_optimizers_of_other_packages_are_told():
    lion, _ = stepped(pytorch_optimizer.Lion)
    assert _identified(lion.state_dict()).name == "Lion"
    belief, _ = stepped(pytorch_optimizer.AdaBelief)
    assert _identified(belief.state_dict()) is UNKNOWN
    assert identify([{"betas": (0.9, 0.99)}], ["state1", "qmap1", "absmax1"]).name == "Lion of bitsandbytes"
    fused = {"lr": 0.1, "betas": (0.9, 0.99), "bias_correction": True, "step": 3}
    assert identify([fused], ["exp_avg", "exp_avg_sq", "master_param"]).name == "FusedAdam"
