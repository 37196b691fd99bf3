"""The monitor's arguments, loggers, and unusual modules."""

import re
from types import SimpleNamespace

import pytest
import torch
from fits import Regression, fit, histograms, scalars, trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

from lightning_stosign import OptimizerStateMonitor
from lightning_stosign.callbacks._records import log_records
from lightning_stosign.health import log10_histogram

LAYERS = ["first.weight", "first.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["*.bias"], {"first.bias", "head.bias"}),
        (["first.*", "head.weight"], {"first.weight", "first.bias", "head.weight"}),
        (["head.weight"], {"head.weight"}),
    ],
)
def test_layers_are_chosen_by_globs(tmp_path, globs, expected):
    fit(Regression(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(layers=globs)])
    found = {tag.rpartition("/")[2] for tag in scalars(tmp_path) if tag.startswith("per_layer_update_rms/")}
    assert found == expected


def test_global_records_are_of_the_chosen_layers_only(tmp_path):
    fit(Regression(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(layers=["first.weight"])])
    found = scalars(tmp_path)
    assert found["optimizer_state/zero_fraction/exp_inf"][0] == pytest.approx(1 / 3)
    assert found["optimizer_state/grad_abs_max"] == found["per_layer_grad_abs_max/first.weight"]


@pytest.mark.parametrize("globs", [["nothing.*"], []])
def test_globs_that_match_nothing_are_an_error(tmp_path, globs):
    with pytest.raises(ValueError, match=re.escape(f"layers={globs} matches no parameter of Regression")):
        fit(Regression(), tmp_path, callbacks=[OptimizerStateMonitor(layers=globs)])


def test_a_trainer_without_a_logger_is_an_error():
    with pytest.raises(ValueError, match=r"logger=False; accepted: Trainer\(logger="):
        fit(Regression(), callbacks=[OptimizerStateMonitor()])


def test_validation_needs_no_logger():
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return self.train_dataloader()

    trainer(callbacks=[OptimizerStateMonitor()]).validate(Validated(), verbose=False)


def test_fast_dev_run_works(tmp_path):
    run = fit(Regression(), tmp_path, fast_dev_run=2, callbacks=[OptimizerStateMonitor()])
    assert run.global_step == 2


def test_log_every_n_steps_0_records_nothing(tmp_path):
    fit(Regression(), tmp_path, log_every_n_steps=0, callbacks=[OptimizerStateMonitor()])
    assert not any(tag.startswith(("optimizer_state", "per_layer")) for tag in scalars(tmp_path))


def test_other_loggers_get_the_scalars(tmp_path):
    run = fit(Regression(), logger=CSVLogger(tmp_path), max_steps=2, callbacks=[OptimizerStateMonitor()])
    assert "per_layer_update_rms/head.bias" in run.logger.experiment.metrics_keys


class Kept:
    """Instead of what a logger does with metrics: keeps them."""

    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)


class KeptByMLFlow(Kept, MLFlowLogger):
    pass


class KeptByWandb(Kept, WandbLogger):
    pass


SCALARS = {"per_layer_underflow_fraction/exp_avg/fp8-raw:static_scale=1024,min_numel=0/layer.weight": 0.5}


def test_mlflow_gets_names_that_it_accepts():
    logger = KeptByMLFlow()
    log_records([logger], SCALARS, {}, 3)
    name = "per_layer_underflow_fraction/exp_avg/fp8-raw_static_scale_1024_min_numel_0/layer.weight"
    assert logger.metrics == {name: 0.5}


def test_wandb_gets_histograms():
    pytest.importorskip("wandb")
    logger = KeptByWandb()
    counts = log10_histogram(torch.tensor([1.0, 1.0, 1e-3])).tolist()
    log_records([logger], SCALARS, {"optimizer_state/log10_abs/exp_avg": counts}, 3)
    histogram = logger.metrics.pop("optimizer_state/log10_abs/exp_avg")
    assert sum(histogram.histogram) == 3
    assert len(histogram.bins) == len(counts) + 1
    assert list(logger.metrics.values()) == [0.5]


HISTOGRAMS = {"optimizer_state/log10_abs/exp_avg": log10_histogram(torch.tensor([1.0, 1.0, 1e-3])).tolist()}


def test_tensorboard_gets_a_step_s_records_in_one_event(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix="run")
    log_records([logger], {**SCALARS, "update_rms": 2.0}, HISTOGRAMS, 3)
    logger.save()
    logger.finalize("success")
    (file,) = tmp_path.glob("events.*")
    with_values = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert [(event.step, len(event.summary.value)) for event in with_values] == [(3, 3)]
    assert {tag: by_step[3] for tag, by_step in scalars(tmp_path).items()} == {
        f"run-{tag}": value for tag, value in {**SCALARS, "update_rms": 2.0}.items()
    }
    assert histograms(tmp_path)["run-optimizer_state/log10_abs/exp_avg"][3].num == 3


class KeptByTensorBoard(Kept, TensorBoardLogger):
    def __init__(self, folder):
        TensorBoardLogger.__init__(self, folder, name="", version="")
        self.metrics = {}


def test_a_tensorboard_logger_with_a_way_of_its_own_gets_the_scalars(tmp_path):
    logger = KeptByTensorBoard(tmp_path)
    log_records([logger], SCALARS, HISTOGRAMS, 3)
    logger.finalize("success")
    assert list(logger.metrics.values()) == [0.5]
    assert (set(scalars(tmp_path)), set(histograms(tmp_path))) == (set(), {"optimizer_state/log10_abs/exp_avg"})


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_their_shards_are_refused(strategy):
    trainer = SimpleNamespace(loggers=["a logger"], strategy=object.__new__(strategy))
    with pytest.raises(ValueError, match=rf"cannot read the shards of {strategy.__name__}; accepted: ModelParallel"):
        OptimizerStateMonitor().setup(trainer, None, "fit")


@pytest.mark.parametrize(("depth", "expected"), [(1, {"first", "head"}), (2, set(LAYERS)), (None, set(LAYERS))])
def test_layers_are_taken_together_by_depth(tmp_path, depth, expected):
    fit(Regression(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(depth=depth)])
    prefix = "per_layer_zero_fraction/exp_inf/"
    assert {tag.removeprefix(prefix) for tag in scalars(tmp_path) if tag.startswith(prefix)} == expected


def test_without_quantiles_none_are_logged(tmp_path):
    fit(Regression(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(quantiles=[])])
    assert not any("quantile" in tag for tag in scalars(tmp_path))


class FrozenHead(Regression):
    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)


def test_parameters_without_a_gradient_are_passed_over(tmp_path):
    fit(FrozenHead(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    found = {tag.rpartition("/")[2] for tag in scalars(tmp_path) if tag.startswith("per_layer_update_rms/")}
    assert found == {"first.weight", "first.bias"}


class NoLr(torch.optim.Optimizer):
    """A parameter-free optimizer: its param groups have no lr."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        for param in self.param_groups[0]["params"]:
            self.state[param]["trend"] = param.grad.clone()


class ParameterFree(Regression):
    def configure_optimizers(self):
        return NoLr(self.parameters())


def test_an_optimizer_without_lr_has_no_update_rms(tmp_path):
    fit(ParameterFree(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    found = scalars(tmp_path)
    assert "optimizer_state/rms/trend" in found
    assert "optimizer_state/update_rms" not in found


class Embedded(Regression):
    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(6, 8, sparse=True)

    def loss(self, batch):
        return self.first(batch[0].abs().long().clamp(max=5)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SparseAdam(self.first.parameters())


def test_sparse_gradients_are_monitored(tmp_path):
    fit(Embedded(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    assert scalars(tmp_path)["optimizer_state/zero_fraction/exp_avg_sq"][0] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, r"every_n_steps=0 must be at least 1"),
        ({"every_n_steps": -3}, ValueError, r"every_n_steps=-3 must be at least 1"),
        ({"every_n_steps": 1.5}, TypeError, r"every_n_steps=1\.5 must be an int"),
        ({"every_n_steps": True}, TypeError, r"every_n_steps=True must be an int"),
        ({"forecast": "fp8"}, TypeError, r"forecast='fp8' must be a list of strings"),
        ({"forecast": None}, TypeError, r"forecast=None must be a list of strings"),
        ({"forecast": ["fp9"]}, ValueError, r"'fp9' is unknown; accepted"),
        ({"layers": "*.bias"}, TypeError, r"layers='\*\.bias' must be a list of strings"),
        ({"layers": 3}, TypeError, r"layers=3 must be a list of strings"),
        ({"depth": 0}, ValueError, r"depth=0 must be at least 1, or None"),
        ({"depth": True}, TypeError, r"depth=True must be an int or None"),
        ({"depth": 1.5}, TypeError, r"depth=1\.5 must be an int or None"),
        ({"quantiles": 0.5}, TypeError, r"quantiles=0\.5 must be a list of numbers"),
        ({"quantiles": ["a"]}, TypeError, r"quantiles=\['a'\] must be a list of numbers"),
        ({"quantiles": [1.5]}, ValueError, r"quantiles=\[1\.5\]: each must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused_in_the_user_s_words(options, error, message):
    with pytest.raises(error, match=message):
        OptimizerStateMonitor(**options)


class Many(Regression):
    """70 parameters in 35 modules of one list, or side by side."""

    def __init__(self, listed):
        super().__init__()
        self.rest = nn.ModuleList(nn.Linear(2, 2) for _ in range(33)) if listed else nn.ParameterList()
        for number in range(0 if listed else 66):
            self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(())))

    def loss(self, batch):
        return super().loss(batch) + sum(param.sum() for param in self.parameters())


@pytest.mark.parametrize(
    ("listed", "depth", "labels"), [(True, None, 4 + 33), (True, 3, 4 + 66), (False, None, 0), (True, 1, 3)]
)
def test_more_than_64_layers_are_grouped_by_module_unless_a_depth_is_given(
    monkeypatch, tmp_path, listed, depth, labels
):
    said = []
    monkeypatch.setattr("lightning_stosign.callbacks.state_monitor.rank_zero_info", said.append)
    fit(Many(listed), tmp_path, max_steps=2, callbacks=[OptimizerStateMonitor(depth=depth, forecast=())])
    found = {tag for tag in scalars(tmp_path) if tag.startswith("per_layer_rms/exp_avg/")}
    assert len(found) == labels
    assert len(said) == (depth is None)
    if said:
        assert "70 parameters" in said[0] and f"depth={3 if listed else 2}) logs each by itself" in said[0]


def test_tensorboard_is_told_what_each_tag_means_once(tmp_path):
    fit(Regression("adamw"), tmp_path, max_steps=2, callbacks=[OptimizerStateMonitor()])
    (file,) = tmp_path.glob("events.*")
    records = [event.summary.value for event in EventFileLoader(str(file)).Load() if len(event.summary.value) > 20]
    first, second = ({value.tag: value.metadata.summary_description for value in values} for values in records)
    assert all(first.values()) and first.keys() == second.keys()
    assert first["per_layer_zero_fraction/exp_avg/head.bias"] == first["optimizer_state/zero_fraction/exp_avg"]
    assert "equal to 0" in first["optimizer_state/zero_fraction/exp_avg"]
