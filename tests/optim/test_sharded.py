"""A sharded parameter takes the unsharded one's steps, bit for bit: real processes, see sharded_runs.py."""

import json
import multiprocessing

import pytest
import sharded_runs
import torch.multiprocessing


def run(folder, which):
    # Forked from a process that has imported all that they need: four imports would take most of the time.
    multiprocessing.set_forkserver_preload(["sharded_runs"])
    torch.multiprocessing.start_processes(
        sharded_runs.main, (str(folder), which), sharded_runs.WORLD, start_method="forkserver"
    )
    return json.loads((folder / "results.json").read_text())


def names(which):
    """The scenarios' names, without processes."""
    return list(which(dict.fromkeys((1, 2, 4, "2x2"), _NoMesh()), ""))


class _NoMesh:
    def size(self):
        return 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sharded"), sharded_runs.scenarios)


@pytest.fixture(scope="module")
def compiled_results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("compiled"), sharded_runs.compiled_scenarios)


@pytest.mark.parametrize("name", names(sharded_runs.scenarios))
def test_sharded_run_equals_the_unsharded_one(results, name):
    assert not results[name], results[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", names(sharded_runs.compiled_scenarios))
def test_compiled_sharded_run_equals_the_eager_unsharded_one(compiled_results, name):
    assert not compiled_results[name], compiled_results[name]
