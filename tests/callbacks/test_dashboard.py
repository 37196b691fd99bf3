import copy
import io
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callbacks.fits import Regression, events, fit, trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch import nn

from lightning_stosign import OptimizerDashboard, OptimizerStateMonitor
from lightning_stosign.callbacks import _zero_history
from lightning_stosign.callbacks._scalars_layout import scalars_layout
from lightning_stosign.callbacks._zero_history import ZeroHistory
from lightning_stosign.health.sharding import Layout


def images(folder):
    """Return {tag: {step: pixels}}."""
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return {
        tag: {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in accumulator.Images(tag)}
        for tag in accumulator.Tags()["images"]
    }


def test_figures_are_drawn_at_the_end(tmp_path):
    fit(Regression("adamw"), tmp_path, callbacks=[OptimizerDashboard()])
    drawn = images(tmp_path)
    assert {tag: list(by_step) for tag, by_step in drawn.items()} == {
        "optimizer_state/magnitudes": [3],
        "optimizer_state/zeros_by_layer/exp_avg": [3],
        "optimizer_state/zeros_by_layer/exp_avg_sq": [3],
    }
    for by_step in drawn.values():
        pixels = by_step[3]
        assert min(pixels.shape[:2]) >= 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is on it


def test_figures_are_drawn_at_the_chosen_interval_too(tmp_path):
    fit(Regression(), tmp_path, max_steps=7, callbacks=[OptimizerDashboard(draw_every_n_steps=3)])
    assert list(images(tmp_path)["optimizer_state/magnitudes"]) == [2, 5, 6]


def test_the_heat_map_holds_what_the_monitor_logs(tmp_path):
    dashboard = OptimizerDashboard(every_n_steps=2)
    monitor = OptimizerStateMonitor(every_n_steps=1, forecast=(), histograms=False)
    module = Regression("adamw")
    fit(module, tmp_path, max_steps=5, callbacks=[dashboard, monitor])
    log = events(tmp_path)
    for state in ("exp_avg", "exp_avg_sq"):
        shares, layers, steps = dashboard._histories[""].table(state)
        assert steps == [1, 3, 4]  # every second step, and the last
        assert layers == [name for name, _ in module.named_parameters()]
        for layer, row in zip(layers, shares, strict=True):
            logged = {e.step: e.value for e in log.Scalars(f"per_layer_zero_fraction/{state}/{layer}")}
            assert row == pytest.approx([logged[step] for step in steps])
    assert shares[0][0] == pytest.approx(1 / 3)  # the third input is always 0


def test_the_weights_are_those_of_a_run_without_it(tmp_path):
    watched, plain = Regression("stosign"), Regression("stosign")
    fit(watched, tmp_path, callbacks=[OptimizerDashboard(draw_every_n_steps=2)])
    fit(plain, tmp_path / "plain")
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


class _NoTransfer(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_a_record_does_not_wait_for_the_device():
    values = {("m", layer): (torch.tensor([0.0, 1.0]), Layout(2)) for layer in "ab"}
    history = ZeroHistory()
    with _NoTransfer():
        history.add(0, values)
    shares, layers, _ = history.table("m")
    assert shares.tolist() == [[0.5], [0.5]]
    assert layers == ["a", "b"]


def test_a_run_that_fails_is_drawn(tmp_path):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("the data has gone")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="the data has gone"):
        fit(Failing(), tmp_path, callbacks=[OptimizerDashboard()])
    assert list(images(tmp_path)["optimizer_state/magnitudes"]) == [1]


def test_a_resumed_run_goes_on_with_the_heat_map(tmp_path):
    first = OptimizerDashboard()
    run = fit(Regression(), tmp_path / "first", max_steps=3, callbacks=[first])
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    second = OptimizerDashboard()
    fit(Regression(), tmp_path / "second", max_steps=5, callbacks=[second], ckpt_path=tmp_path / "x.ckpt")
    shares, _, steps = second._histories[""].table("exp_inf")
    assert steps == [0, 1, 2, 3, 4]
    assert shares[:, :3].tolist() == first._histories[""].table("exp_inf")[0].tolist()


def test_a_second_fit_starts_anew(tmp_path):
    dashboard = OptimizerDashboard()
    for name in ("first", "second"):
        fit(Regression(), tmp_path / name, callbacks=[dashboard])
    assert dashboard._histories[""].table("exp_avg")[2] == [0, 1, 2, 3]


class TwoOptimizers(Regression):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.first.parameters()), torch.optim.SGD(self.head.parameters(), momentum=0.9)]


def test_each_of_several_optimizers_has_its_figures(tmp_path):
    fit(TwoOptimizers(), tmp_path, callbacks=[OptimizerDashboard()])
    assert set(images(tmp_path)) == {
        "optimizer_state/0-AdamW/magnitudes",
        "optimizer_state/0-AdamW/zeros_by_layer/exp_avg",
        "optimizer_state/0-AdamW/zeros_by_layer/exp_avg_sq",
        "optimizer_state/1-SGD/magnitudes",
        "optimizer_state/1-SGD/zeros_by_layer/momentum_buffer",
    }


def test_an_optimizer_without_states_has_no_figures(tmp_path):
    fit(Regression("plain-sgd"), tmp_path, callbacks=[OptimizerDashboard()])
    assert images(tmp_path) == {}


class ImageLogger(CSVLogger):
    """Takes images as WandbLogger does."""

    def __init__(self, folder):
        super().__init__(folder)
        self.images = []

    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, [image.shape[2] for image in images], step))


def test_other_loggers_take_images_too(tmp_path):
    logger = ImageLogger(tmp_path)
    fit(Regression("sgd"), logger=logger, callbacks=[OptimizerDashboard()])
    assert logger.images == [
        ("optimizer_state/magnitudes", [3], 3),
        ("optimizer_state/zeros_by_layer/momentum_buffer", [3], 3),
    ]


def test_a_long_run_keeps_a_bounded_record(monkeypatch):
    monkeypatch.setattr(_zero_history, "_MOST_COLUMNS", 8)
    history = ZeroHistory()
    for step in range(100):
        history.add(step, {("m", "a"): (torch.zeros(2), Layout(2))})
        history = ZeroHistory.from_state_dict(copy.deepcopy(history.state_dict()))
    steps = history.table("m")[2]
    assert len(steps) <= 8
    assert len(set(np.diff(steps))) == 1 and steps[0] == 0 and steps[-1] > 80


def test_a_layer_that_joins_later_has_no_past():
    history = ZeroHistory()
    history.add(0, {("m", "a"): (torch.zeros(2), Layout(2))})
    history.add(1, {("m", "a"): (torch.ones(2), Layout(2)), ("m", "b"): (torch.ones(0), Layout(0))})
    shares, layers, _ = history.table("m")
    assert layers == ["a", "b"]
    np.testing.assert_array_equal(shares, [[1.0, 0.0], [np.nan, 0.0]])


def _layout_in(folder):
    log = events(folder)
    (event,) = log.Tensors(metadata.CONFIG_SUMMARY_TAG)
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


@pytest.mark.parametrize("module", [Regression("adamw"), Regression("stosign"), TwoOptimizers()], ids=str)
def test_every_panel_shows_what_the_monitor_logs(tmp_path, module):
    fit(module, tmp_path, callbacks=[OptimizerDashboard(), OptimizerStateMonitor(forecast=("fp8-raw:min_numel=0",))])
    layout = _layout_in(tmp_path)
    assert [category.title for category in layout.category] == list(scalars_layout())
    tags = events(tmp_path).Tags()["scalars"]
    empty = {
        chart.title
        for category in layout.category
        for chart in category.chart
        if not any(re.match(pattern, tag) for pattern in chart.multiline.tag for tag in tags)
    }
    only_stochastic = {"step: noise of the random sign"}
    assert empty <= {*only_stochastic, "loss"} if module.automatic_optimization is False else empty <= only_stochastic
    per_layer = {tag for tag in tags if any(tag.endswith(name) for name in ("weight", "bias"))}
    for chart in layout.category[0].chart:
        assert not [t for t in per_layer for pattern in chart.multiline.tag if re.match(pattern, t)], chart.title


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps=0 must be at least 1, or None"),
        ({"every_n_steps": 1.5}, TypeError, "every_n_steps=1.5 must be an int or None"),
        ({"draw_every_n_steps": 0}, ValueError, "draw_every_n_steps=0 must be at least 1, or None for the end only"),
        ({"draw_every_n_steps": True}, TypeError, "draw_every_n_steps=True must be an int or None"),
    ],
)
def test_a_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        OptimizerDashboard(**arguments)


@pytest.mark.parametrize(("logger", "named"), [(False, "logger=False"), (CSVLogger, "['CSVLogger']")])
def test_a_logger_without_images_is_refused(tmp_path, logger, named):
    run = trainer(logger=logger and logger(tmp_path), callbacks=[OptimizerDashboard()])
    message = f"needs a logger that takes images, but the Trainer has {named}; accepted: TensorBoardLogger"
    with pytest.raises(ValueError, match=re.escape(message)):
        run.fit(Regression())


def test_it_can_be_pickled_and_copied():
    dashboard = copy.deepcopy(OptimizerDashboard(every_n_steps=3))
    assert dashboard.every_n_steps == 3


class Sharded(pl.LightningModule):
    """Three rows over two ranks, of which the first two have no gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def configure_model(self):
        torch.manual_seed(0)
        self.layer.reset_parameters()
        torch.distributed.fsdp.fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(2, 4))[:, 2].sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self):
        return torch.utils.data.DataLoader([0.0] * 8)


def _train_sharded(rank, port, folder):
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    from lightning.pytorch.strategies import ModelParallelStrategy

    dashboard = OptimizerDashboard()
    fit(
        Sharded(),
        folder,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=[dashboard],
        max_steps=2,
    )
    shares, layers, _ = dashboard._histories[""].table("exp_avg")
    assert layers == ["layer.weight"]
    np.testing.assert_allclose(shares, [[2 / 3, 2 / 3]], rtol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_run_is_drawn_as_a_whole(tmp_path):
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    torch.multiprocessing.spawn(_train_sharded, (find_free_network_port(), tmp_path), nprocs=2)
    assert set(images(tmp_path)) == {
        "optimizer_state/magnitudes",
        "optimizer_state/zeros_by_layer/exp_avg",
        "optimizer_state/zeros_by_layer/exp_avg_sq",
    }
