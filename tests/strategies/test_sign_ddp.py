"""The strategy under the Trainer: real fits in processes of their own."""

import copy

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workers import run_workers

from lightning_stosign import SignDDPStrategy, StoSignSGD

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(LightningModule):
    """A classifier that counts what is sent."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.LayerNorm(24))
        self.heads = nn.ModuleList(nn.Linear(24, 3) for _ in range(3))
        self.sent = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.body(x)
        return nn.functional.cross_entropy(sum(head(hidden) for head in self.used_heads(batch_idx)), y)

    def used_heads(self, batch_idx):
        return self.heads

    def on_train_batch_end(self, outputs, batch, batch_idx):
        strategy = self.trainer.strategy
        exchange = None
        if isinstance(strategy, SignDDPStrategy):
            exchange = next(iter(strategy._ballots), strategy._exchange)
        self.sent.append(exchange.wire.bytes_sent if exchange is not None else 0)

    def configure_optimizers(self):
        return StoSignSGD(self.parameters(), lr=1e-2)


def data(batches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * batches, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0)), batch_size=4)


def fit(workers, strategy, steps, *, net=Net, batches=None, ckpt_path=None, **options):
    """Train for some steps, by default in one epoch; with one batch an epoch, a checkpoint is never in the middle."""
    torch.manual_seed(0)
    net = net()
    batches = batches or steps * options.get("accumulate_grad_batches", 1)
    trainer = Trainer(devices=workers, strategy=strategy, max_steps=steps, max_epochs=1000, **(QUIET | options))
    trainer.fit(net, data(batches * workers), ckpt_path=ckpt_path)
    return net, trainer


def outcome(net, trainer):
    return {
        "weights": net.state_dict(),
        "sent": net.sent,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
    }


def four_workers(rank, workers, signs_of, aggregation, steps):
    """Steps with all that can make replicas differ."""
    options = {"find_unused_parameters": True, "bucket_cap_mb": 0.001} if signs_of == "gradients" else {}
    strategy = SignDDPStrategy(aggregation, signs_of=signs_of, warmup_steps=5, **options)
    return outcome(*fit(workers, strategy, steps, net=Unused, gradient_clip_val=0.5, accumulate_grad_batches=2))


LONG = [("gradients", "majority", 200), ("gradients", "mean", 200), ("updates", "mean", 200)]
SHORT = [("gradients", "mean", 40), ("updates", "majority", 50)]


@pytest.fixture(scope="module", params=[*SHORT, *(pytest.param(p, marks=pytest.mark.slow) for p in LONG)], ids=str)
def long_fit(request):
    return run_workers(four_workers, 4, *request.param)


def test_replicas_are_the_same_bits_after_clipping_accumulation_and_unused_parameters(long_fit):
    torch.manual_seed(0)
    start = Unused().state_dict()
    first = long_fit[0]["weights"]
    for result in long_fit[1:]:
        for name, weight in first.items():
            assert torch.equal(weight, result["weights"][name]), name
    moved = {name for name, weight in first.items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in first if not name.startswith("heads.0")}


def test_nothing_is_sent_before_the_last_micro_batch(long_fit):
    sent = long_fit[0]["sent"]
    per_batch = [after - before for before, after in zip([0, *sent], sent, strict=False)]
    assert not any(per_batch[0::2]) and all(per_batch[1::2])
    assert max(per_batch[11::2]) < min(per_batch[1:10:2])  # warm-up over


def test_bytes_of_the_step_are_logged(long_fit):
    for result in long_fit:
        assert result["metrics"]["sign_ddp/bytes_sent"] == result["sent"][-1] - result["sent"][-2]


def on_gradients(aggregation="majority", **options):
    return SignDDPStrategy(aggregation, signs_of="gradients", **options)


def variants(rank, workers, folder):
    """Two workers: other ways to train, each of which must end with finite weights that all workers share."""
    results = {}
    results["static graph"] = outcome(*fit(workers, on_gradients(static_graph=True), 6))
    results["bucket views"] = outcome(*fit(workers, on_gradients(gradient_as_bucket_view=True), 6))
    results["usual"] = outcome(*fit(workers, on_gradients(), 6))
    results["bfloat16 autocast"] = outcome(*fit(workers, on_gradients("mean"), 6, precision="bf16-mixed"))
    results["manual"] = outcome(*fit(workers, on_gradients(), 6, net=Manual))

    results["accumulated"] = outcome(*fit(workers, on_gradients(), 6, accumulate_grad_batches=2))
    for name, strategy in {"static graph": on_gradients(static_graph=True), "thawed": on_gradients()}.items():
        net, options = (Net, {"accumulate_grad_batches": 2}) if name == "static graph" else (Thawing, {"batches": 2})
        with pytest.raises((ValueError, RuntimeError)) as raised:
            fit(workers, strategy, 6, net=net, **options)
        results[f"{name}: refused"] = str(raised.value)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    overflowing, trainer = fit(workers, on_gradients("mean"), 6, net=Overflows, plugins=[plugin])
    results["grad scaler"] = outcome(overflowing, trainer) | {"scales": overflowing.scales}

    # A run of 8 steps, and one that stops after 5 and is resumed; with all that a strategy has to remember.
    def fresh():
        return on_gradients("mean", stochastic=False, error_feedback=True, warmup_steps=2)

    results["whole"] = outcome(*fit(workers, fresh(), 8, batches=1))
    _, trainer = fit(workers, fresh(), 5, batches=1)
    trainer.save_checkpoint(f"{folder}/five.ckpt")
    trainer.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    results["resumed"] = outcome(*fit(workers, fresh(), 8, batches=1, ckpt_path=f"{folder}/five.ckpt"))
    dist.barrier()
    return results


class Unused(Net):
    """Nobody uses the first head, and only worker 0 the second, now and then."""

    def used_heads(self, batch_idx):
        return [self.heads[1 if self.global_rank == 0 and batch_idx % 3 == 0 else 2]]


class Thawing(Net):
    """Frozen in part when DDP wraps the model."""

    def configure_model(self):
        self.body.requires_grad_(False)

    def on_train_epoch_start(self):
        self.body.requires_grad_(self.current_epoch == 2)


class Manual(Net):
    """Manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Overflows(Net):
    """Worker 1's gradient overflows in the third step."""

    def __init__(self):
        super().__init__()
        self.scales = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.global_rank == 1 and batch_idx == 2 else loss

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def short_fits(folder):
    return run_workers(variants, 2, str(folder))


@pytest.mark.parametrize(
    "variant",
    [
        "static graph",
        "bucket views",
        "usual",
        "accumulated",
        "bfloat16 autocast",
        "manual",
        "grad scaler",
        "whole",
        "resumed",
    ],
)
def test_replicas_agree(short_fits, variant):
    first, second = (result[variant]["weights"] for result in short_fits)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) and bool(weight.isfinite().all()), name


@pytest.mark.parametrize("variant", ["static graph", "bucket views", "manual"])
def test_way_of_running_backward_does_not_change_the_result(short_fits, variant):
    for name, weight in short_fits[0]["usual"]["weights"].items():
        assert torch.equal(weight, short_fits[0][variant]["weights"][name]), name


def test_static_graph_with_accumulation_is_refused_where_torch_fails(short_fits):
    message = "static_graph=True) cannot accumulate gradients: torch's DDP fails. Leave out static_graph=True"
    assert all(message in result["static graph: refused"] for result in short_fits)


def test_parameters_unfrozen_after_ddp_wrapped_the_model_are_refused_by_name(short_fits):
    for result in short_fits:
        assert (
            "body.0.weight, body.0.bias, body.2.weight, body.2.bias had requires_grad=False"
            in result["thawed: refused"]
        )


def test_grad_scaler_of_every_worker_skips_the_step_in_which_one_overflows(short_fits):
    for result in short_fits:
        assert result["grad scaler"]["scales"] == [1024.0, 1024.0, 512.0, 512.0, 512.0, 512.0]


def test_resumed_run_equals_the_uninterrupted_one(short_fits):
    for result in short_fits:
        assert result["resumed"]["step"] == 8
        for name, weight in result["whole"]["weights"].items():
            assert torch.equal(weight, result["resumed"]["weights"][name]), name


def test_checkpoint_of_weights_is_one_of_weights(short_fits, folder):
    assert "SignDDPStrategy" not in torch.load(folder / "weights.ckpt", weights_only=True)
    assert torch.load(folder / "five.ckpt", weights_only=True)["SignDDPStrategy"]["step"] == 5


def three_workers_resume(rank, workers, folder):
    strategy = on_gradients("mean", stochastic=False, error_feedback=True)
    checkpoint = torch.load(f"{folder}/five.ckpt", weights_only=True)
    owed = []

    class Look(Net):
        def on_train_start(self):
            owed.append(copy.deepcopy(self.trainer.strategy._exchange._residuals))

    net, trainer = fit(workers, strategy, 7, net=Look, batches=1, ckpt_path=f"{folder}/five.ckpt")
    saved = checkpoint["SignDDPStrategy"]["residuals"]
    return outcome(net, trainer) | {"owed": owed[0], "saved": saved}


def test_other_number_of_workers_resumes_and_still_owes_the_same(short_fits, folder):
    results = run_workers(three_workers_resume, 3, str(folder))
    for name, weight in results[0]["weights"].items():
        assert all(torch.equal(weight, result["weights"][name]) for result in results)
    for result in results:
        assert result["step"] == 7
        for name, owed in result["owed"].items():
            assert torch.allclose(owed, torch.stack([saved[name] for saved in result["saved"]]).mean(0))
            assert owed.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"aggregation": "median"}, ValueError, "aggregation='median' is not supported; accepted: 'majority', 'mean'"),
        ({"stochastic": "yes"}, ValueError, "stochastic='yes' is not supported; accepted: True, False"),
        ({"signs_of": "weights"}, ValueError, "signs_of='weights' is not supported; accepted: 'updates', 'gradients'"),
        ({"error_feedback": True}, ValueError, "error_feedback=True needs signs_of='gradients'"),
        ({"stochastic": False}, ValueError, "stochastic=False needs signs_of='gradients'"),
        ({"signs_of": "gradients", "error_feedback": True}, ValueError, "error_feedback=True needs stochastic=False"),
        ({"noise": 1.5}, ValueError, "noise=1.5 must be between 0.0 and 1.0"),
        ({"noise": 0.0}, ValueError, r"noise=0 must be in \(0, 1\]; for plain signs use SignSGD"),
        ({"noise": 0.5, "signs_of": "gradients"}, ValueError, "noise=0.5 needs signs_of='updates'"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1 must be at least 0"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps=1.5 must be an int"),
        ({"seed": 1 << 64}, ValueError, r"seed=\d+ must be at least 0 and less than 2\*\*64"),
        ({"uncompressed": "*bias"}, TypeError, r"must be a list of globs, got '\*bias': write \['\*bias'\]"),
        ({"uncompressed": [1]}, TypeError, r"uncompressed must be a list of globs, got \[1\]"),
        ({"ddp_comm_hook": print}, ValueError, "ddp_comm_hook: SignDDPStrategy is a communication hook itself"),
    ],
)
def test_bad_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        SignDDPStrategy(**options)


@pytest.mark.parametrize(
    ("name", "aggregation"), [("sign_ddp", "majority"), ("sign_ddp_majority", "majority"), ("sign_ddp_mean", "mean")]
)
def test_strategy_has_a_name(name, aggregation):
    trainer = Trainer(strategy=name, devices=2, **QUIET)
    assert type(trainer.strategy) is SignDDPStrategy and isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy.aggregation == aggregation
    assert name in StrategyRegistry.available_strategies()


def alone(rank, workers):
    """One worker, which is enough to see what is compressed and what is refused."""
    refused = {}
    for name, globs in {"everything": ["1d", "*weight"], "nothing": [], "idle": ["1d", "*nobody*"]}.items():
        with pytest.MonkeyPatch.context() as patch:
            warned = []
            patch.setattr("lightning_stosign.strategies.sign_ddp.rank_zero_warn", warned.append)
            try:
                fit(workers, SignDDPStrategy(uncompressed=globs), 1)
                refused[name] = warned
            except ValueError as error:
                refused[name] = str(error)
    return refused


def test_globs_choose_what_is_compressed():
    (result,) = run_workers(alone, 1)
    assert "nothing to compress: uncompressed=['1d', '*weight'] leaves out all 10 parameters" in result["everything"]
    assert result["nothing"] == []
    assert result["idle"] == ["SignDDPStrategy: no parameter matches uncompressed=['*nobody*']."]
