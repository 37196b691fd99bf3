"""AtomicCheckpointIO: a checkpoint is the old one or the new one, whatever happens while it is written."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_stosign._lightning_names import under_both_names


@under_both_names
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, makes sure that it is on the disk, and renames it.

    A kill, a full disk or a power cut leaves the previous file as it was. Lightning writes to the folder of temporary
    files and moves the result: where that folder is on another filesystem the move is a copy over the target, and what
    interrupts it leaves a torn checkpoint. It also holds the whole checkpoint in memory, which this does not.

    Files that are not local go the way of Lightning's own.

    Raises:
        OSError: the file cannot be written; the target is untouched and nothing is left beside it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: what to save.
            path: the target, which is replaced in one step.
            storage_options: not supported, as in Lightning's own.
        """
        filesystem, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(filesystem, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(local)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name that neither ModelCheckpoint nor a glob for checkpoints takes for one.
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _mode_of_new_files())
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(target.parent)


def _mode_of_new_files() -> int:
    """Return the mode that open() would give a file: mkstemp's is for the user alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make sure that the new name is on the disk, where folders can be synchronised."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
