"""Which parameters are decayed, and which group they are in."""

import lightning.pytorch as pl
import pytest
import torch
from module.mixin_fits import trainer
from torch import nn

from lightning_stosign import StoSignConfig, StoSignMixin


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


@pytest.mark.parametrize("name", ["muon", "muon-sign"])
def test_muon_gets_the_matrices_without_the_embeddings(name):
    muon = {n for g in Zoo(optimizer=name).param_groups() if g.get("use_muon") for n in g["param_names"]}
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
