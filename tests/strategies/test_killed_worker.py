"""A worker that is killed: the others end with a clear error, and the run resumes from its last checkpoint."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_sign_ddp import QUIET, fit, outcome
from workers import run_workers

from lightning_stosign import SignDDPStrategy

TIMEOUT = 20  # seconds


class Die(Callback):
    """Ends the last worker as a power cut would."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(rank, workers, folder):
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1), Die()]
    strategy = SignDDPStrategy("mean", timeout=timedelta(seconds=TIMEOUT))
    began = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        fit(workers, strategy, 8, batches=1, callbacks=callbacks, **QUIET | {"enable_checkpointing": True})
    return {"error": str(raised.value), "seconds": time.monotonic() - began}


def resume(rank, workers, folder):
    return outcome(*fit(workers, SignDDPStrategy("mean"), 8, batches=1, ckpt_path=f"{folder}/step=4.ckpt"))


@pytest.fixture(scope="module")
def after_the_kill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return folder, run_workers(killed, 3, str(folder))


def test_others_end_in_time_and_say_what_happened(after_the_kill):
    _, results = after_the_kill
    assert results[2] is None  # it was killed
    for rank, result in enumerate(results[:2]):
        assert f"SignDDPStrategy: worker {rank} of 3 could not exchange the updates of step 6" in result["error"]
        assert "Another worker has probably ended" in result["error"]
        assert result["seconds"] < TIMEOUT + 10


def test_last_checkpoint_is_whole(after_the_kill):
    folder, _ = after_the_kill
    assert sorted(path.name for path in folder.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    saved = torch.load(folder / "step=4.ckpt", weights_only=True)["SignDDPStrategy"]
    assert saved["steps"] == [4] and len(saved["states"]) == 3


@pytest.mark.parametrize("workers", [pytest.param(3, marks=pytest.mark.slow), 2])
def test_run_resumes_with_as_many_workers_or_fewer(after_the_kill, workers):
    folder, _ = after_the_kill
    results = run_workers(resume, workers, str(folder))
    for result in results:
        assert result["step"] == 8
        for name, weight in results[0]["weights"].items():
            assert torch.equal(weight, result["weights"][name])
