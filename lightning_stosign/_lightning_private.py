"""What this package uses of Lightning that Lightning does not call public: all of it, each with its reason.

``SignDDPStrategy`` also overrides ``_register_ddp_hooks`` (DDPStrategy ignores hooks on the CPU) and
``_configure_launcher`` (the first method of a strategy that a Trainer calls once the strategy has its accelerator).
"""

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lightning_stosign._lightning_names import like

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger


def batches_that_stepped(trainer: "pl.Trainer") -> int:
    """Return the step that Lightning logs under: ``global_step`` counts one per optimizer under manual optimization."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def rng_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's random generators: what a Lightning checkpoint would hold."""
    return _collect_rng_states()


def set_rng_states(states: dict[str, Any]) -> None:
    """Restore what :func:`rng_states` returned."""
    _set_rng_states(states)


def end_of_tuning(trainer: "pl.Trainer") -> Exception:
    """Return the exception with which a callback ends ``fit`` before training, as Lightning's own finders do."""
    return like(trainer, _TunerExitException)()


def loaded_data(trainer: "pl.Trainer") -> tuple[Any, Any, Any]:
    """Return the fit loop's data: the loop keeps loaders, with their positions, from one run to the next."""
    loop = trainer.fit_loop
    return loop._combined_loader, loop._data_fetcher, loop.epoch_loop.val_loop._combined_loader


def set_loaded_data(trainer: "pl.Trainer", data: tuple[Any, Any, Any]) -> None:
    """Set what :func:`loaded_data` returned; None for each lets the loop load them anew."""
    loop = trainer.fit_loop
    loop._combined_loader, loop._data_fetcher, loop.epoch_loop.val_loop._combined_loader = data


def restore_checkpoint(trainer: "pl.Trainer", path: str) -> None:
    """Restore a running Trainer from a checkpoint, which the public ``fit(ckpt_path=...)`` does at its start only."""
    trainer._checkpoint_connector.restore(path)


def checkpoint_path(trainer: "pl.Trainer") -> Any:
    """Return the checkpoint that the present ``fit`` resumes from: restoring another one replaces it."""
    return trainer._checkpoint_connector._ckpt_path


def set_checkpoint_path(trainer: "pl.Trainer", path: Any) -> None:
    """Restore what :func:`checkpoint_path` returned."""
    trainer._checkpoint_connector._ckpt_path = path


def forget_metrics(trainer: "pl.Trainer") -> None:
    """Drop what the module has logged so far in this run of the loop."""
    trainer._logger_connector.reset_metrics()


def set_module_dtype(module: "pl.LightningModule", dtype: torch.dtype) -> None:
    """Set ``LightningModule.dtype``, which Lightning keeps up to date in ``float()`` and not in ``bfloat16()``."""
    module._dtype = dtype


def tag_prefix(logger: "TensorBoardLogger") -> str:
    """Return what a TensorBoardLogger puts before each tag: its ``prefix`` argument, joined as it joins it."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
