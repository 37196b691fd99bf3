"""FSDP2 through Lightning's ModelParallelStrategy, with FP8 layers, on two gloo processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("fsdp2_script.py")

pytestmark = pytest.mark.slow


def run(folder: Path, devices: int, steps: int, *options: str) -> list[dict[str, Any]]:
    """Return what each rank has left behind."""
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), f"--devices={devices}", f"--steps={steps}", *options]
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "in low precision (backend 'torchao'; recipe 'current')" in result.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), 1, 5)[0]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run(folder, 2, 3)


def test_two_ranks_train_what_one_trains(sharded: Any, unsharded: dict[str, Any]) -> None:
    _, ranks = sharded
    assert set(ranks[0]["shards"]) == set(unsharded["weights"])
    assert not unsharded["shards"]
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    # The scales of activations are those of each rank's half of the batch: equal up to FP8 rounding.
    torch.testing.assert_close(losses, torch.tensor(unsharded["losses"][:3]), rtol=0.03, atol=0)
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])


def test_one_process_resumes_what_two_saved(sharded: Any, unsharded: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = sharded
    resumed = run(tmp_path, 1, 5, f"--resume={folder / 'end.ckpt'}")[0]
    torch.testing.assert_close(resumed["losses"], unsharded["losses"][3:], rtol=0.05, atol=0)


def test_one_process_resumes_the_sharded_files_of_two(sharded: Any, tmp_path: Path) -> None:
    _, ranks = sharded
    options = ("--distributed_checkpoint",)
    assert run(tmp_path / "two", 2, 3, *options)[0]["losses"] == ranks[0]["losses"]
    files = tmp_path / "two" / "end.ckpt"
    assert len(list(files.glob("*.distcp"))) == 2
    resumed = run(tmp_path / "one", 1, 3, *options, f"--resume={files}")[0]  # no step is left
    assert not resumed["losses"]
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, resumed["weights"][name])


def test_weights_gathered_in_fp8_are_those_cast_after_gathering(sharded: Any, tmp_path: Path) -> None:
    _, plain = sharded
    ranks = run(tmp_path, 2, 3, "--float8_all_gather")
    # The tied weight, the biases and the layer that is padded are gathered as they are.
    gathered = {name for name, kind in ranks[0]["shards"].items() if kind == "WeightWithDynamicFloat8CastTensor"}
    assert gathered == {"up.weight"}
    for one, other in zip(ranks, plain, strict=True):
        assert one["losses"] == other["losses"]
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert {type(value) for value in checkpoint["state_dict"].values()} == {torch.Tensor}


def test_stosign_with_fp8_states_trains_sharded_and_resumes_on_one(tmp_path: Path) -> None:
    # Sharded files: gloo cannot gather FP8 tensors (RuntimeError: Invalid scalar type).
    options = ("--stosign", "--distributed_checkpoint")
    alone = run(tmp_path / "one", 1, 5, *options)[0]
    ranks = run(tmp_path / "two", 2, 3, *options)
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"][:3]), rtol=0.03, atol=0)
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])
    assert ranks[0]["state_dtypes"] == {"exp_avg": torch.float8_e4m3fn, "exp_inf": torch.float8_e4m3fn}
    resumed = run(tmp_path / "on", 1, 5, *options, f"--resume={tmp_path / 'two' / 'end.ckpt'}")[0]
    torch.testing.assert_close(resumed["losses"], alone["losses"][3:], rtol=0.05, atol=0)
    assert resumed["state_dtypes"] == ranks[0]["state_dtypes"]
