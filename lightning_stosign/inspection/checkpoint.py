"""Opening a checkpoint that nobody has to trust: tensors and plain values; nothing in it is executed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.layouts import facts_of, find, layout_of, unread_objects
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.safetensors_file import is_safetensors, read_safetensors
from lightning_stosign.inspection.safetensors_states import optimizer_of_tensors
from lightning_stosign.inspection.stored_tensor import check_size
from lightning_stosign.inspection.torch_archive import LEGACY_START, Content, read_legacy_archive, read_torch_archive
from lightning_stosign.inspection.what_it_is import describe

# Modules and functions that pickles which run programs refer to, and checkpoints do not.
_DANGEROUS = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|runpy|importlib|code|ctypes|webbrowser|commands|pickle|_pickle|"
    r"marshal|types|platform|asyncio|multiprocessing)\..*"
    r"|_?io\.open.*|builtins\.(eval|exec|compile|open|__import__|getattr|setattr|delattr|globals|breakpoint|input)"
)


@dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint the inspection needs.

    Attributes:
        path: the file or folder.
        size: its size in bytes; of a folder that of the files that were opened.
        format: what it is, e.g. ``"Lightning checkpoint"``.
        optimizers: the state_dict of each optimizer by what tells it from the others; tensors stay on disk.
        weights: the model's tensors by name.
        ordered: whether the weights are in the model's order.
        facts: ``global_step``, ``epoch`` and ``pytorch-lightning_version``, as far as they are known.
        left_unread: full names of the classes of objects that were not loaded.
        dangerous: full names of functions with which the file would run a program if it were unpickled.
        notes: lines that say what the numbers are of, where that is not each parameter as a whole.
    """

    path: Path
    size: int
    format: str
    optimizers: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Any] = field(default_factory=dict)
    ordered: bool = True
    facts: Mapping[str, int | str] = field(default_factory=dict)
    left_unread: tuple[str, ...] = ()
    dangerous: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_checkpoint_file(path: Path) -> Checkpoint:
    """Open a checkpoint of one file, recognised by what it holds.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is something else, or it holds no optimizer states.
    """
    file = InputFile(path)
    if is_safetensors(file):
        return _from_safetensors(file)
    content = read_content(file)
    found = find(content.value)
    if not found.optimizers:
        raise CheckpointError(f"{path} {_without_optimizer(content.value, bool(found.weights))}")
    labels = _labels(found.optimizers)
    check_size([value for state_dict in found.optimizers.values() for value in states_of(state_dict)], file.size, path)
    return Checkpoint(
        path=path,
        size=file.size,
        format=layout_of(content.value),
        optimizers=dict(zip(labels, found.optimizers.values(), strict=True)),
        weights=found.weights,
        facts=facts_of(content.value),
        left_unread=tuple(unread_objects(content.value)),
        dangerous=dangerous_names(content.globals),
    )


def read_content(file: InputFile) -> Content:
    """Read what ``torch.save`` has written, of any version.

    Raises:
        CheckpointError: the file is damaged or something else.
    """
    head = file.read(0, min(file.size, 64))
    if head.startswith(b"PK\3\4"):
        return read_torch_archive(file)
    if head.startswith(LEGACY_START):
        return read_legacy_archive(file)
    raise CheckpointError(f"{file.path} {describe(file)}")


def states_of(state_dict: Mapping[str, Any]) -> Iterable[Any]:
    """Yield every value of every parameter's state."""
    for state in state_dict["state"].values():
        if isinstance(state, dict):
            yield from state.values()


def dangerous_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of functions and modules that run programs."""
    return tuple(sorted(name for name in names if _DANGEROUS.fullmatch(name)))


def _from_safetensors(file: InputFile) -> Checkpoint:
    tensors = read_safetensors(file)
    state_dict = optimizer_of_tensors(tensors)
    if state_dict is None:
        raise CheckpointError(
            f"{file.path} holds weights and no optimizer states; Hugging Face's Trainer and accelerate keep these in "
            "optimizer.pt or optimizer.bin beside it"
        )
    return Checkpoint(file.path, file.size, "safetensors of states", {"": state_dict})


def _without_optimizer(content: Any, has_weights: bool) -> str:
    """Say why a file has nothing to show."""
    if isinstance(content, dict):
        if "param_shapes" in content and "module" in content:
            return (
                "holds the model of a DeepSpeed checkpoint; its optimizer states are in the zero_pp_rank_* files "
                "beside it: inspect the folder"
            )
        if "pytorch-lightning_version" in content or {"state_dict", "optimizer_states"} <= set(content):
            if "optimizer_states" in content:
                return "holds no optimizer states: it was saved before training, or without an optimizer"
            return "holds no optimizer states: it was saved with ModelCheckpoint(save_weights_only=True)"
        if "optimizer" in content and content["optimizer"] is None:
            return "holds no optimizer states: they were stripped when training ended"
    return "holds weights and no optimizer states" if has_weights else "holds no optimizer's state_dict"


def _labels(paths: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return what tells each optimizer from the others: nothing for the only one, else the path to it."""
    paths = list(paths)
    return [""] if len(paths) == 1 else [".".join(str(part)[:100] for part in path) for path in paths]
