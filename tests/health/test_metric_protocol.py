"""torchmetrics' protocol for every public metric: each way to a value gives the float64 oracle's."""

import copy
import pickle
import subprocess
import sys

import metric_cases
import pytest
import torch
from metric_cases import CASES, RAW, case, check
from torchmetrics import Metric, MetricCollection

from lightning_stosign import health
from lightning_stosign.health import DeadFraction, ExplodingFraction, RootMeanSquare, UnderflowFraction, ZeroFraction


def filled(metric, batches):
    for batch in batches:
        metric.update(*batch)
    return metric


def test_every_public_metric_has_a_case():
    public = [getattr(health, name) for name in health.__all__]
    assert {cls.__name__ for cls in public if isinstance(cls, type) and issubclass(cls, Metric)} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_forward_returns_the_batch_and_accumulates_all(name):
    make, batches, oracle = case(name)
    metric = make()
    for batch in batches:
        check(metric(*batch), oracle([batch]))
    check(metric.compute(), oracle(batches))
    metric.reset()
    check(filled(metric, batches[:2]).compute(), oracle(batches[:2]))


@pytest.mark.parametrize("name", CASES)
def test_merged_states_have_the_batches_of_both(name):
    make, batches, oracle = case(name)
    metric = filled(make(), batches[:1])
    metric.merge_state(filled(make(), batches[1:]))
    check(metric.compute(), oracle(batches))


@pytest.mark.parametrize("name", CASES)
def test_copies_go_on_by_themselves(name):
    make, batches, oracle = case(name)
    metric = filled(make(), batches[:2])
    for twin in (copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))):
        check(filled(twin, batches[2:]).compute(), oracle(batches))
        assert hash(twin) != hash(metric)
    check(metric.compute(), oracle(batches[:2]))


@pytest.mark.parametrize("name", CASES)
def test_a_persistent_state_comes_back(name):
    make, batches, oracle = case(name)
    metric, twin = filled(make(), batches), make()
    metric.persistent(True)
    twin.persistent(True)
    twin.load_state_dict(metric.state_dict())
    check(twin.compute(), oracle(batches))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_value_of_what_it_holds(name, dtype):
    make, batches, oracle = case(name)
    halves = [tuple(value.to(dtype) for value in batch) for batch in batches]
    check(filled(make(), halves).compute(), oracle(halves))


def test_a_collection_computes_what_its_metrics_do():
    for width in (1, 2):
        names = [name for name, (arguments, *_) in CASES.items() if arguments == width]
        collection = MetricCollection({name: case(name)[0]() for name in names})
        batches = metric_cases.batches(width)
        for batch in batches:
            collection.update(*batch)
        for name, value in collection.compute().items():
            check(value, case(name)[2](batches), name)


def test_only_metrics_that_update_alike_share_a_compute_group():
    collection = MetricCollection({"dead": DeadFraction(), "exploding": ExplodingFraction()})
    collection.update(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    assert len(collection.compute_groups) == 1


def test_metrics_whose_first_values_agree_are_not_taken_for_one():
    pairs = {"zeros": ZeroFraction(), "rms": RootMeanSquare(), "raw": UnderflowFraction(RAW)}
    collection = MetricCollection({**pairs, "bf16": UnderflowFraction("bfloat16:min_numel=0")})
    collection.update(torch.tensor([0.0, 1.0]))  # one zero, and a sum of squares of one; no format loses anything
    collection.update(torch.tensor([1e-4, 4.0]))
    found = {name: value.item() for name, value in collection.compute().items()}
    assert found == {"zeros": 0.25, "rms": pytest.approx(17**0.5 / 2), "raw": pytest.approx(1 / 3), "bf16": 0.0}


def test_two_ranks_add_up_and_replicas_count_once(tmp_path):
    command = [sys.executable, metric_cases.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
