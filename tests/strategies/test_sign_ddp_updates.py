"""Votes on updates under the Trainer: every kind of training loop, checkpoints, other numbers of workers."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_sign_ddp import Manual, Net, Unused, fit, outcome
from torch import nn
from workers import run_workers

from lightning_stosign import SignConverted, SignDDPStrategy, SignSGD, StoSignConfig, StoSignMixin, StoSignSGD
from lightning_stosign.strategies import sign_ddp


class Dropping(Net):
    """With dropout, FP8 states and a bfloat16 matrix; clipped and accumulated by the trainer."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.body.append(self.dropout)
        self.heads.to(torch.bfloat16)

    def training_step(self, batch, batch_idx):
        x, y = batch
        torch.manual_seed(1000 * self.global_step + self.global_rank)  # a resumed run draws what a whole one does
        logits = sum(head(self.body(x).bfloat16()) for head in self.heads)
        return nn.functional.cross_entropy(logits.float(), y)

    def configure_optimizers(self):
        decayed = [param for param in self.parameters() if param.ndim > 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in self.parameters() if p.ndim < 2]}]
        optimizer = StoSignSGD(groups, lr=1e-2, seed=5, state_precision="fp8:min_numel=1")
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]


class Two(Manual):
    """Two optimizers, of which the second steps every other batch."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = Net.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return StoSignSGD(self.body.parameters(), lr=1e-2), SignSGD(self.heads.parameters(), lr=1e-3)


class Mixed(StoSignMixin, Net):
    def __init__(self):
        super().__init__()
        self.stosign = StoSignConfig(lr=1e-2, warmup_steps=2, state_precision="fp8")


Mixed.configure_optimizers = StoSignMixin.configure_optimizers


class Thaw(BaseFinetuning):
    """Freezes the body before DDP wraps the model, and trains it from the third epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


class OnlyTrainable(Net):
    def configure_optimizers(self):
        return StoSignSGD([param for param in self.parameters() if param.requires_grad], lr=1e-2)


class Buffered(Net):
    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(24))
        self.register_buffer("owner", torch.tensor(dist.get_rank() if dist.is_initialized() else -1))


CLIPPED = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}


def ways_to_train(rank, workers, folder):
    """Two workers: each way must end with finite weights that all workers share."""
    results = {}
    results["majority"] = outcome(*fit(workers, "sign_ddp", 10))
    results["mean"] = outcome(*fit(workers, SignDDPStrategy("mean", log_agreement=True, noise=0.5), 10))
    results["manual"] = outcome(*fit(workers, "sign_ddp", 10, net=Manual))
    results["bfloat16 autocast"] = outcome(*fit(workers, "sign_ddp_mean", 10, precision="bf16-mixed"))
    results["two optimizers"] = outcome(*fit(workers, "sign_ddp_mean", 10, net=Two))
    results["unused"] = outcome(*fit(workers, "sign_ddp_mean", 10, net=Unused, **CLIPPED))
    for option in ("static_graph", "find_unused_parameters"):
        net = Unused if option == "find_unused_parameters" else Net
        strategy = SignDDPStrategy(**{option: True})  # says that it has no effect
        results[option] = outcome(*fit(workers, strategy, 10, net=net, **CLIPPED))
    results["mixin"] = outcome(*fit(workers, "sign_ddp", 10, net=Mixed))
    results["thawed"] = outcome(*fit(workers, "sign_ddp_mean", 10, net=OnlyTrainable, batches=2, callbacks=[Thaw()]))
    results["batch norm"] = outcome(*fit(workers, "sign_ddp_mean", 10, net=Buffered))

    results["whole"] = outcome(*fit(workers, "sign_ddp_mean", 8, net=Dropping, batches=2, **CLIPPED))
    options = {"net": Dropping, "batches": 2, "enable_checkpointing": True} | CLIPPED
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(workers, "sign_ddp_mean", 5, callbacks=[save], **options)
    results["resumed"] = outcome(*fit(workers, "sign_ddp_mean", 8, ckpt_path=f"{folder}/step=5.ckpt", **options))

    sign_ddp.GATHERED_BYTES = 0  # each worker writes a file of its own
    save = ModelCheckpoint(f"{folder}/own", "{step}", monitor="step", mode="max", every_n_train_steps=1)
    fit(workers, "sign_ddp_mean", 5, callbacks=[save], **options)
    own = f"{folder}/own/step=5.ckpt"
    results["resumed from own files"] = outcome(*fit(workers, "sign_ddp_mean", 8, ckpt_path=own, **options))
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("votes")


@pytest.fixture(scope="module")
def fits(folder):
    return run_workers(ways_to_train, 2, str(folder), timeout=240)


WAYS = ["majority", "mean", "manual", "bfloat16 autocast", "two optimizers", "unused", "mixin", "thawed", "batch norm"]
WAYS += ["static_graph", "find_unused_parameters"]


@pytest.mark.parametrize("way", [*WAYS, "whole", "resumed", "resumed from own files"])
def test_replicas_agree(fits, way):
    first, second = (result[way]["weights"] for result in fits)
    for name, weight in first.items():
        local = "running" in name  # what a worker's own last batch did to it
        assert (local or torch.equal(weight, second[name])) and bool(weight.isfinite().all()), name


def test_agreement_is_logged_if_wanted(fits):
    assert all(0 < result["mean"]["metrics"]["sign_ddp/agreement"] < 1 for result in fits)
    assert not any("sign_ddp/agreement" in result["majority"]["metrics"] for result in fits)


def test_manual_optimization_takes_the_same_steps(fits):
    for name, weight in fits[0]["majority"]["weights"].items():
        assert torch.equal(weight, fits[0]["manual"]["weights"][name]), name


def test_parameters_unfrozen_after_ddp_wrapped_the_model_are_trained(fits):
    torch.manual_seed(0)
    start = Net().state_dict()
    assert not any(torch.equal(weight, start[name]) for name, weight in fits[0]["thawed"]["weights"].items())


@pytest.mark.parametrize("way", ["resumed", "resumed from own files"])
def test_resumed_run_equals_the_uninterrupted_one(fits, way):
    for result in fits:
        assert result[way]["step"] == 8
        for name, weight in result["whole"]["weights"].items():
            assert torch.equal(weight, result[way]["weights"][name]), name


def test_checkpoint_holds_every_workers_momentum(fits, folder):
    saved = torch.load(folder / "step=5.ckpt", weights_only=True)
    of_workers = saved["SignDDPStrategy"]["states"]
    assert len(of_workers) == 2
    for index, state in of_workers[0][0].items():
        of_rank_0 = saved["optimizer_states"][0]["state"][index]["exp_avg"]
        assert torch.equal(state["exp_avg"].float(), of_rank_0.float())
        assert not torch.equal(state["exp_avg"].float(), of_workers[1][0][index]["exp_avg"].float())
    # Beside the one checkpoint that was kept.
    assert sorted(path.name for path in (folder / "own").iterdir()) == ["step=5.ckpt", "step=5.ckpt.workers"]
    assert sorted(path.name for path in (folder / "own" / "step=5.ckpt.workers").iterdir()) == ["0.ckpt", "1.ckpt"]


class Looking(Dropping):
    def on_train_start(self):
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.momenta = [state["exp_avg"].float() for state in optimizer.state.values()]


def three_workers_resume(rank, workers, path):
    net, trainer = fit(workers, "sign_ddp_mean", 8, net=Looking, batches=2, ckpt_path=path)
    return outcome(net, trainer) | {"momenta": [m for m in net.momenta if m.ndim > 1]}


@pytest.mark.parametrize("path", [pytest.param("step=5.ckpt", marks=pytest.mark.slow), "own/step=5.ckpt"])
def test_other_number_of_workers_resumes_from_the_mean_momentum(fits, folder, path):
    results = run_workers(three_workers_resume, 3, str(folder / path))
    for name, weight in results[0]["weights"].items():
        assert all(torch.equal(weight, result["weights"][name]) for result in results)
    saved = torch.load(folder / "step=5.ckpt", weights_only=True)["SignDDPStrategy"]["states"]
    for position, index in enumerate(saved[0][0]):
        of_workers = [worker[0][index]["exp_avg"].float() * worker[0][index]["exp_avg_scale"] for worker in saved]
        mean = torch.stack(of_workers).mean(0)
        for result in results:
            ours = result["momenta"][position]
            ours = ours * (mean.abs().max() / ours.abs().max())  # the scale aside: what FP8 stores
            assert torch.allclose(ours, mean, rtol=0.1, atol=float(mean.abs().max()) / 32)


class NoSigns(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Converted(Net):
    def configure_optimizers(self):
        return SignConverted(self.parameters(), torch.optim.AdamW, lr=1e-2)

    def on_train_start(self):
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.variance = optimizer.state.get(self.body[0].weight, {}).get("exp_avg_sq", torch.zeros(())).clone()


def converted(rank, workers, folder):
    """Adam's signs: a whole run, one that is resumed, and what three workers would begin with."""
    results = {"whole": outcome(*fit(workers, "sign_ddp", 6, net=Converted, batches=2))}
    options = {"net": Converted, "batches": 2, "enable_checkpointing": True}
    if workers == 2:
        save = ModelCheckpoint(folder, "converted", every_n_train_steps=4, save_top_k=-1)
        fit(workers, "sign_ddp", 4, callbacks=[save], **options)
        dist.barrier()
    net, trainer = fit(workers, "sign_ddp", 6, ckpt_path=f"{folder}/converted.ckpt", **options)
    return results | {"resumed": outcome(net, trainer) | {"variance": net.variance}}


@pytest.mark.slow
def test_workers_vote_on_the_signs_of_another_optimizer_and_resume(folder):
    first, second = run_workers(converted, 2, str(folder))
    for name, weight in first["whole"]["weights"].items():
        assert torch.equal(weight, second["whole"]["weights"][name]), name
        assert all(torch.equal(weight, result["resumed"]["weights"][name]) for result in (first, second)), name
    ours, theirs = first["resumed"]["variance"], second["resumed"]["variance"]
    assert not torch.equal(ours, theirs)
    three = run_workers(converted, 3, str(folder))
    assert all(torch.allclose(result["resumed"]["variance"], (ours + theirs) / 2) for result in three)


class InExpectation(Net):
    def configure_optimizers(self):
        return StoSignSGD(self.parameters(), stochastic=False)


def alone(rank, workers):
    """One worker: the same as with DDP, which deals the data alike; and what is refused."""
    results = {"voted": outcome(*fit(1, "sign_ddp_mean", 6, net=Dropping, **CLIPPED))}
    results["plain"] = outcome(*fit(1, "ddp", 6, net=Dropping, **CLIPPED))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused = {
        "AdamW": {"net": NoSigns},
        "in expectation": {"net": InExpectation},
        "GradScaler": {"plugins": [plugin]},
    }
    for name, options in refused.items():
        with pytest.raises(ValueError) as raised:
            fit(1, "sign_ddp", 1, **options)
        results[name] = str(raised.value)
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr("lightning_stosign.strategies.sign_ddp.rank_zero_warn", warned.append)
        SignDDPStrategy(find_unused_parameters=True, static_graph=True)
        results["warned"] = warned
    return results


def test_one_worker_is_the_optimizer_alone_and_other_optimizers_are_refused_by_name():
    (result,) = run_workers(alone, 1)
    for name, weight in result["plain"]["weights"].items():
        assert torch.equal(weight, result["voted"]["weights"][name]), name
    assert (
        "StoSignSGD, SignSGD or SignConverted of another one, got AdamW. Use SignDDPStrategy(signs_of='gradients')"
        in result["AdamW"]
    )
    assert "StoSignSGD(stochastic=False) does not step by signs" in result["in expectation"]
    assert "does not run with a GradScaler" in result["GradScaler"]
    assert len(result["warned"]) == 1
    assert "static_graph=True has no effect with signs_of='updates'" in result["warned"][0]


class Regression(Net):
    """Two layers, 32-64-1."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)), nn.ModuleList()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(4096, 32, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(32, 1, generator=generator) / 8)

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(2 * batch_idx + self.global_rank)
        chosen = torch.randint(len(self.x), (32,), generator=generator)
        return nn.functional.mse_loss(self.body(self.x[chosen]), self.y[chosen])

    def configure_optimizers(self):
        return StoSignSGD(self.body.parameters(), lr=2e-3)


def regression(rank, workers):
    losses = {}
    for strategy in ("ddp", "sign_ddp_mean", "sign_ddp_majority"):
        net, _ = fit(workers, strategy, 500, net=Regression)
        losses[strategy] = float(nn.functional.mse_loss(net.body(net.x), net.y))
    return losses


def test_small_regression_learns_as_with_ddp():
    losses = run_workers(regression, 2)[0]
    assert max(losses.values()) < 0.05, losses
