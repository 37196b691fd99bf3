"""Layers that thaw during training: their groups are named, decayed, scheduled and resumed."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from module.mixin_fits import NAMES, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_stosign import SignDDPStrategy, StoSignConfig, StoSignMixin


class Net(StoSignMixin, pl.LightningModule):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stosign = StoSignConfig(**{"lr": 0.1, "weight_decay": 0.5, **options})
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 1)
        self.lrs = []

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).square().mean()

    def on_train_batch_end(self, *args):
        self.lrs.append([group["lr"] for group in self.optimizers().param_groups])

    def train_dataloader(self):
        return DataLoader(torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), batch_size=4)


def finetuning(**options):
    return BackboneFinetuning(**{"unfreeze_backbone_at_epoch": 1, "backbone_initial_ratio_lr": 0.5, **options})


@pytest.mark.parametrize("name", NAMES)
def test_a_thawed_backbone_is_trained_named_and_decayed_by_the_rule(name):
    model = Net(optimizer=name)
    before = [param.detach().clone() for param in model.parameters()]
    run = trainer(max_epochs=3, callbacks=[finetuning()])
    run.fit(model)
    decay = {n: g["weight_decay"] for g in run.optimizers[0].param_groups for n in g["param_names"]}
    assert decay == {n: 0.5 if n.endswith("weight") and "backbone.1" not in n else 0.0 for n in decay}
    assert set(decay) == {n for n, _ in model.named_parameters()}
    if name in ("muon", "muon-sign"):
        matrices = {n for g in run.optimizers[0].param_groups if g["use_muon"] for n in g["param_names"]}
        assert matrices == {"head.weight", "backbone.0.weight", "backbone.3.weight"}
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_finetuning_resumes_bit_for_bit(name, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = Net(optimizer=name, state_precision="fp8:min_numel=0")
    trainer(max_epochs=4, callbacks=[finetuning(), checkpoint], enable_checkpointing=True).fit(straight)
    for epoch in (0, 2):  # before and after the thaw
        resumed = Net(optimizer=name, state_precision="fp8:min_numel=0")
        trainer(max_epochs=4, callbacks=[finetuning()]).fit(resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.backbone[0].weight.requires_grad
        for (key, p), q in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(p, q), (epoch, key)


def test_all_groups_of_a_thawed_layer_follow_the_callback_and_the_schedule():
    model = Net(schedule="linear", min_lr_ratio=0.0)
    trainer(max_epochs=3, callbacks=[finetuning(lambda_func=lambda epoch: 1.5)]).fit(model)
    factors = [1 - step / 12 for step in range(13)]
    heads = [lrs[0] for lrs in model.lrs]
    assert heads == pytest.approx([0.1 * factor for factor in factors[1:]])
    # Half of the head's when it joins, in every group; from there along the schedule, and 1.5 times as much of its
    # first rate an epoch later, at most the head's.
    second, third = model.lrs[4:8], model.lrs[8:12]
    start = 0.5 * 0.1 * factors[4]
    assert [lrs[2:] for lrs in second] == [pytest.approx([start * factors[5 + i] / factors[4]] * 2) for i in range(4)]
    assert third[0][3] == pytest.approx(min(1.5 * start, heads[7]) * factors[9] / factors[8])
    assert model.lrs[-1] == pytest.approx([0.0] * 4)


class Staged(BaseFinetuning):
    """Thaws a layer an epoch, with the learning rate of the first group."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch in (1, 2):
            self.unfreeze_and_add_param_group(pl_module.backbone[3 if epoch == 1 else 0], optimizer, train_bn=True)


@pytest.mark.parametrize("name", ["stosign", "adamw", "sign-adamw", "alias"])
def test_layers_that_thaw_one_after_the_other_resume_bit_for_bit(name, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = Net(optimizer=name)
    run = trainer(max_epochs=4, callbacks=[Staged(), checkpoint], enable_checkpointing=True)
    run.fit(straight)
    assert [group.get("addition") for group in run.optimizers[0].param_groups][-4:] == [1, 1, 2, 2]
    resumed = Net(optimizer=name)
    trainer(max_epochs=4, callbacks=[Staged()]).fit(resumed, ckpt_path=tmp_path / "epoch=2.ckpt")
    for (key, p), q in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), key


class OnTwoRanks(Net):
    """Sees other data on each rank, and says whether the replicas still agree."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch + self.global_rank, batch_idx)

    def on_train_end(self):
        flat = torch.cat([param.detach().flatten() for param in self.parameters()])
        everywhere = self.all_gather(flat)
        assert torch.equal(everywhere[0], everywhere[1]), "the replicas have drifted apart"


def on_two_ranks(model, strategy):
    trainer(max_epochs=2, devices=2, strategy=strategy, callbacks=[finetuning()]).fit(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stosign", "adamw"])
def test_replicas_stay_identical_after_the_thaw(name):
    on_two_ranks(OnTwoRanks(optimizer=name), DDPStrategy(start_method="spawn"))


@pytest.mark.slow
def test_replicas_that_vote_on_updates_stay_identical_after_the_thaw():
    on_two_ranks(OnTwoRanks(), SignDDPStrategy(start_method="spawn"))


@pytest.mark.slow
def test_votes_on_gradients_refuse_what_they_would_not_exchange():
    with pytest.raises(Exception, match="does not exchange the gradients of 4 parameters"):
        on_two_ranks(OnTwoRanks(), SignDDPStrategy(signs_of="gradients", start_method="spawn"))


class ByTimm(nn.Module):
    """Says which of its parameters are not to be decayed, as timm's models do."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 6))
        self.table = nn.Parameter(torch.ones(4, 6))
        self.gate = nn.Parameter(torch.ones(6, 6))
        self.gate.no_decay = True
        self.kernel = nn.Linear(6, 6, bias=False)
        self.kernel.no_decay = True
        self.weight = nn.Parameter(torch.ones(6, 6))

    def no_weight_decay(self):
        return {"pos_embed"}

    def no_weight_decay_keywords(self):
        return {"tabl"}


def test_what_the_model_exempts_is_not_decayed():
    model = Net()
    model.backbone = nn.Sequential(ByTimm())
    exempt = {n for g in model.param_groups() if g["weight_decay"] == 0 for n in g["param_names"]}
    of_model = {f"backbone.0.{leaf}" for leaf in ("pos_embed", "table", "gate", "kernel.weight")}
    assert exempt == of_model | {"head.bias"}
