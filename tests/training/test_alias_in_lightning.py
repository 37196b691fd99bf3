"""ALIAS under Lightning's automatic optimization, which hands it the closure."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_stosign import ALIAS, OptimizerStateMonitor, StoSignConfig, StoSignMixin

DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Net(StoSignMixin, pl.LightningModule):
    def __init__(self, dropout=0.0, manual=False, data=DATA):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)).double()
        self.automatic_optimization, self.data = not manual, data.double()
        self.stosign = StoSignConfig("alias", schedule="constant")
        self.evaluations, self.logged = 0, []

    def loss(self, x):
        self.evaluations += 1
        return (self.layers(x) - x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        if not self.automatic_optimization:
            return self.optimizers().step(lambda: self.closure(batch[0]))
        loss = self.loss(batch[0])
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def closure(self, x):
        self.optimizers().zero_grad()
        loss = self.loss(x)
        self.manual_backward(loss)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(self.global_step)  # dropout

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append(self.trainer.callback_metrics.get("loss"))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.data), batch_size=8)


def fit(net, steps=24, **options):
    settings = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(**{**settings, **options}).fit(net)
    return net


def by_hand(net, steps=24):
    optimizer = ALIAS(net.param_groups(), momentum=0.9, beta2=0.999)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x = net.data[step * 8 % 64 :][:8]

        def closure(x=x):
            optimizer.zero_grad()
            loss = net.loss(x)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
    return losses


@pytest.mark.parametrize("manual", [False, True])
def test_training_equals_a_loop_by_hand(manual):
    net, other = Net(dropout=0.25, manual=manual), Net(dropout=0.25)
    fit(net)
    losses = by_hand(other)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert net.evaluations == other.evaluations == 24 + 10 + 1
    if not manual:
        # logged is the loss at the parameters as they are, not the one at the previous ones
        assert torch.stack(net.logged).tolist() == torch.stack(losses).tolist()


def test_accumulated_batches_step_alike_where_micro_batches_are_equal():
    whole, parts = Net(), Net(data=DATA.view(8, 1, 8, 4).expand(8, 4, 8, 4).reshape(-1, 4))
    fit(whole)
    fit(parts, accumulate_grad_batches=4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    assert parts.evaluations == 24 * 4 + 10 + 1


def test_monitoring_changes_nothing(tmp_path):
    monitor = {"callbacks": [OptimizerStateMonitor(every_n_steps=2)], "logger": TensorBoardLogger(tmp_path)}
    plain, watched = fit(Net()), fit(Net(), **monitor)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
