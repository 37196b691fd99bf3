"""Which checkpoint is this path? Folders by their files, files by what they hold."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_stosign.inspection.checkpoint import Checkpoint, read_checkpoint_file, read_content
from lightning_stosign.inspection.dcp_folder import METADATA
from lightning_stosign.inspection.dcp_states import read_dcp_folder
from lightning_stosign.inspection.deepspeed_folder import is_rank_content, rank_files, read_deepspeed
from lightning_stosign.inspection.hugging_face import read_model
from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.messages import CheckpointError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_OPTIMIZER_FILE = re.compile(r"optimizer(_\d{1,4})?\.(pt|bin)|optimizer(_state)?\.safetensors")
_OPTIMIZER_FOLDER = re.compile(r"optimizer_\d{1,4}")
_CHECKPOINT_FILE = re.compile(r".*\.(ckpt|pt|pth|bin|safetensors)")
_MOST_ENTRIES = 100_000  # of a folder
_MOST_NAMED = 3  # in a message


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint that any of the common trainers has written, without its code.

    Args:
        path: a file or a folder.

    Raises:
        CheckpointError: there is none, it cannot be read, or it holds no optimizer states; the message says what it is
            and, where it can be told, what to inspect instead.
    """
    text = str(path)
    if text == "-":
        raise CheckpointError("standard input is not read: give a file or a folder")
    if _URL.match(text):
        raise CheckpointError(f"{text} is a URL: download it first, then inspect the file")
    path = Path(path)
    try:
        is_folder = path.is_dir()
        return _read_folder(path) if is_folder else _read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error


def _read_file(path: Path) -> Checkpoint:
    if path.suffix == ".distcp" or path.name == METADATA:
        raise CheckpointError(f"{path} is a part of a distributed checkpoint: inspect the folder {path.parent}")
    if path.name.endswith("_optim_states.pt") and is_rank_content(read_content(InputFile(path)).value):
        return read_deepspeed(path, [path])
    checkpoint = read_checkpoint_file(path)
    if _OPTIMIZER_FILE.fullmatch(path.name) and not checkpoint.weights:
        return _with_model(checkpoint, path.parent)
    return checkpoint


def _read_folder(folder: Path) -> Checkpoint:
    names = _names(folder)
    if METADATA in names:
        return read_dcp_folder(folder)
    if files := rank_files(folder):
        return read_deepspeed(folder, files)
    if (inner := _deepspeed_inside(folder, names)) is not None:
        return read_deepspeed(folder, rank_files(inner))
    if files := [folder / name for name in sorted(names) if _OPTIMIZER_FILE.fullmatch(name)]:
        return _read_trainer_folder(folder, files, names)
    if folders := [folder / name for name in sorted(names) if _OPTIMIZER_FOLDER.fullmatch(name)]:
        return dataclasses.replace(_joined(folder, [_read_folder(each) for each in folders]), path=folder)
    raise CheckpointError(f"{folder} {_what_folder(folder, names)}")


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for entry in folder.iterdir():
        names.add(entry.name)
        if len(names) > _MOST_ENTRIES:
            raise CheckpointError(f"{folder} has more than {_MOST_ENTRIES:,} entries: it is no checkpoint")
    return names


def _deepspeed_inside(folder: Path, names: set[str]) -> Path | None:
    """Return the folder that DeepSpeed's file ``latest`` names, or Lightning's ``checkpoint``, if it is one."""
    inner = ["checkpoint"]
    if "latest" in names:
        file = InputFile(folder / "latest")
        inner.insert(0, file.read(0, min(file.size, 255)).decode("utf-8", "replace").strip())
    for name in inner:
        if name in names and (folder / name).is_dir() and rank_files(folder / name):
            return folder / name
    return None


def _read_trainer_folder(folder: Path, files: Sequence[Path], names: set[str]) -> Checkpoint:
    """Open a folder of Hugging Face's Trainer or of accelerate."""
    checkpoint = _with_model(_joined(folder, [read_checkpoint_file(file) for file in files]), folder)
    is_trainer = "trainer_state.json" in names
    kind = "Hugging Face Trainer checkpoint" if is_trainer else "checkpoint folder (accelerate)"
    return dataclasses.replace(checkpoint, path=folder, format=kind)


def _joined(folder: Path, checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Make one checkpoint of several files, each of which holds an optimizer."""
    first = checkpoints[0]
    if len(checkpoints) == 1:
        return first
    optimizers = {}
    for checkpoint in checkpoints:
        for label, state_dict in checkpoint.optimizers.items():
            name = checkpoint.path.name.partition(".")[0]
            optimizers[f"{name}.{label}" if label else name] = state_dict
    return dataclasses.replace(
        first,
        size=sum(each.size for each in checkpoints),
        optimizers=optimizers,
        left_unread=tuple(sorted({name for each in checkpoints for name in each.left_unread})),
        dangerous=tuple(sorted({name for each in checkpoints for name in each.dangerous})),
        notes=tuple(dict.fromkeys(note for each in checkpoints for note in each.notes)),
    )


def _with_model(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    model = read_model(folder)
    return dataclasses.replace(
        checkpoint, weights=model.weights, ordered=model.ordered, facts={**model.facts, **checkpoint.facts}
    )


def _what_folder(folder: Path, names: set[str]) -> str:
    """Say what a folder is that cannot be inspected, and what can be in it."""
    if not names:
        return "is empty"
    inside = [name for name in sorted(names) if _looks_like_checkpoint(folder / name)]
    if inside:
        some = " ".join(str(folder / name) for name in inside[:_MOST_NAMED])
        more = f" and {len(inside) - _MOST_NAMED} more" if len(inside) > _MOST_NAMED else ""
        return f"is a folder with checkpoints in it; inspect one or several of them: {some}{more}"
    if names & {"model.safetensors", "pytorch_model.bin", "config.json"}:
        return "is a model without optimizer states (Hugging Face Trainer: save_only_model=True)"
    if "zarr.json" in names or ".zgroup" in names or "_CHECKPOINT_METADATA" in names:
        return "is an Orbax or Zarr checkpoint (JAX), which is not read"
    return "is a folder without a checkpoint that is known"


def _looks_like_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return (path / METADATA).exists() or any(
            (path / name).exists() for name in ("optimizer.pt", "optimizer.bin", "latest")
        )
    return _CHECKPOINT_FILE.fullmatch(path.name) is not None and path.name not in (
        "model.safetensors",
        "pytorch_model.bin",
    )
