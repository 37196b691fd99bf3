"""release_gradients=True: parameters are updated during backward, with the bits of an ordinary step."""

import copy
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from module.mixin_fits import Model, fit, trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_stosign import Float8Precision, SignDDPStrategy, StoSignConfig, StoSignMixin, StoSignSGD
from lightning_stosign.optim.gradient_release import GradientRelease

CASES = {
    "stosign": {"state_precision": "fp8:stochastic_rounding=true,min_numel=0"},
    "signsgd": {"state_precision": "bfloat16:min_numel=0"},
    "muon-sign": {"state_precision": "fp8:min_numel=0"},
}


class Watch(pl.Callback):
    """Counts the gradients that are there when a parameter is updated, and after backward."""

    def __init__(self):
        self.at_once, self.left = [], []

    def on_train_start(self, trainer, pl_module):
        for param in [p for p in pl_module.parameters() if p.requires_grad]:
            param.register_post_accumulate_grad_hook(
                lambda _: self.at_once.append(sum(p.grad is not None for p in pl_module.parameters()))
            )

    def on_after_backward(self, trainer, pl_module):
        self.left.append(sum(p.grad is not None for p in pl_module.parameters()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_weights_and_states_are_those_of_ordinary_steps(name, precision):
    results = []
    for release in (True, False):
        watch = Watch()
        config = StoSignConfig(name, lr=0.05, warmup_steps=2, release_gradients=release, **CASES[name])
        model, run = fit(config, max_steps=6, precision=precision, callbacks=[watch])
        assert set(watch.left) == ({0} if release else {6})
        assert max(watch.at_once) == (1 if release else 6)
        states = run.optimizers[0].state_dict()["state"]
        results.append((list(model.parameters()), [v for i in range(6) for v in states[i].values()]))
    for ours, expected in zip(*results, strict=True):
        assert all(torch.equal(p.float(), q.float()) for p, q in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, "GradientAccumulationScheduler"),
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1\.0"),
        ({"plugins": [Float8Precision("mxfp8", weights_dtype=torch.float16)]}, r"a GradScaler \(float16\)"),
        ({"strategy": SignDDPStrategy(process_group_backend="gloo")}, "SignDDPStrategy"),
        ({"strategy": "ddp"}, "DDPStrategy"),
    ],
)
def test_what_needs_all_gradients_is_refused_before_training(options, obstacle):
    model = Model(StoSignConfig(release_gradients=True))
    model.trainer = trainer(max_steps=2, **options)
    with pytest.raises(ValueError, match=f"release_gradients=True cannot run with {obstacle}; accepted: one device"):
        model.configure_optimizers()


class Scaled:
    scaler = torch.amp.GradScaler("cpu")


class ClipsItself(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


def test_a_scaler_own_clipping_and_manual_optimization_are_refused():
    for model in (Model(), ClipsItself()):
        model.stosign = StoSignConfig(release_gradients=True)
        model.trainer = trainer(max_steps=2)
        if type(model) is Model:
            model.automatic_optimization = False
            model.trainer.strategy._precision_plugin = Scaled()
        with pytest.raises(ValueError, match=r"a GradScaler \(float16\), manual|configure_gradient_clipping of the"):
            model.configure_optimizers()


class ClipsLater(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.gradient_clip_val = 0.5 if batch_idx == 1 else None


def test_what_a_callback_switches_on_later_is_refused_then():
    with pytest.raises(ValueError, match=r"gradient_clip_val=0\.5"):
        fit(StoSignConfig(release_gradients=True), max_steps=3, callbacks=[ClipsLater()])


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sign-adamw", "sign-adamax", "alias"])
def test_optimizers_that_cannot_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"does not go with optimizer='{name}'; accepted: 'stosign', 'signsgd', 'muon"):
        StoSignConfig(name, release_gradients=True)


def test_skipping_steps_is_refused():
    with pytest.raises(ValueError, match=r"does not go with on_nonfinite='skip'.*; accepted: 'raise'"):
        StoSignConfig(release_gradients=True, on_nonfinite="skip")


class Thawed(StoSignMixin, pl.LightningModule):
    def __init__(self, release):
        super().__init__()
        torch.manual_seed(0)
        self.stosign = StoSignConfig(lr=0.05, release_gradients=release)
        self.backbone, self.head = nn.Linear(3, 8), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).square().mean()

    train_dataloader = Model.train_dataloader


def test_layers_that_thaw_release_their_gradients_too():
    weights = []
    for release in (True, False):
        model, watch = Thawed(release), Watch()
        thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        trainer(max_epochs=2, callbacks=[thaw, watch]).fit(model)
        assert set(watch.left) == ({0} if release else {2, 4})
        weights.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def released(params):
    optimizer = StoSignSGD(params, lr=0.1)
    GradientRelease(optimizer)
    return optimizer


def closure(module, x, use=lambda module, x: module(x)):
    def run():
        loss = use(module, x).square().mean()
        loss.backward()
        return loss

    return run


def test_tied_weights_are_updated_once_by_the_whole_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    twin = copy.deepcopy(model)
    x = torch.randn(5, 4)
    for module, optimizer in ((model, released(model.parameters())), (twin, StoSignSGD(twin.parameters(), lr=0.1))):
        for _ in range(3):
            optimizer.step(closure(module, x))
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_gradient_that_comes_in_two_parts_is_an_error():
    layer = nn.Linear(4, 4)

    def in_segments(module, x):
        for _ in range(2):
            x = checkpoint(module, x, use_reentrant=True)
        return x

    run = closure(layer, torch.randn(5, 4, requires_grad=True), in_segments)
    with pytest.raises(RuntimeError, match="a second gradient in one step; accepted: one backward per step"):
        released(layer.parameters()).step(run)


def test_a_value_that_backward_still_needs_is_not_changed_in_silence():
    x = nn.Parameter(torch.ones(3))
    y = nn.Parameter(torch.ones(3))
    # y's gradient needs the value of x, whose own gradient is complete before.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        released([x, y]).step(closure(None, None, lambda *_: (y * x.detach()).exp() + x))


def test_a_backward_outside_of_a_step_leaves_its_gradients():
    layer = nn.Linear(4, 4)
    optimizer = released(layer.parameters())
    optimizer.step(closure(layer, torch.ones(2, 4)))
    before = layer.weight.detach().clone()
    closure(layer, torch.ones(2, 4))()
    assert layer.weight.grad is not None and torch.equal(layer.weight, before)
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_gradient_that_is_not_finite_says_what_was_updated():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r"is not finite; other parameters may have been updated already \(release"):
        released(layer.parameters()).step(closure(layer, torch.full((2, 4), float("nan"))))


def test_a_copy_steps_in_the_ordinary_way_and_the_hooks_keep_nothing_alive():
    layer = nn.Linear(4, 4)
    optimizer = released(layer.parameters())
    optimizer.step(closure(layer, torch.ones(2, 4)))
    twin, copied = copy.deepcopy((layer, optimizer))
    copied.step(closure(twin, torch.ones(2, 4)))
    optimizer.step(closure(layer, torch.ones(2, 4)))
    assert twin.weight.grad is not None and torch.equal(layer.weight, twin.weight)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
