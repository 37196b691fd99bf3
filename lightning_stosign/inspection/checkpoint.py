"""Reading a checkpoint that nobody has to trust: tensors and plain values; nothing in it is executed."""

import importlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Calls that only make a value, and that people keep among their hyperparameters. They become placeholders.
_VALUE_TYPES = frozenset(
    [f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")]
    + [f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")]
    + [f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")]
    + [f"numpy.{module}.multiarray.scalar" for module in ("core", "_core")]
    + ["numpy.dtype"]
)

_SYSTEM_MODULES = frozenset(["os", "posix", "nt", "sys"])

# What torch's readers raise on bytes that are not what they expect.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)


_REASON = "WeightsUnpickler error:"


class CheckpointError(ValueError):
    """A file that cannot be inspected; the message is one line that says why."""


@dataclass(frozen=True)
class Checkpoint:
    """What of a Lightning checkpoint the inspection needs.

    Attributes:
        path: the file.
        size: its size in bytes.
        facts: ``global_step``, ``epoch`` and ``pytorch-lightning_version``, as far as the file has them.
        weights: the module's state_dict; the tensors stay on disk until they are read.
        optimizer_states: a state_dict for each optimizer; likewise.
        placeholders: full names of the classes of objects that were left unread.
    """

    path: Path
    size: int
    facts: dict[str, int | str]
    weights: Mapping[str, Any]
    optimizer_states: list[dict[str, Any]]
    placeholders: tuple[str, ...]


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Lightning checkpoint without the code of its model, and without running any that is in it.

    Objects of classes that torch does not know, such as a config among the hyperparameters, become placeholders. A file
    that wants to call something on loading is refused: that is how a pickle runs code.

    Args:
        path: a ``.ckpt`` file as Lightning's ``ModelCheckpoint`` writes it.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is something else, it holds code, or it holds no
            optimizer states.
    """
    path = Path(path)
    content, placeholders = _load(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is not a Lightning checkpoint: it holds no 'state_dict'")
    if "optimizer_states" not in content:
        raise CheckpointError(
            f"{path} holds no optimizer states: it was saved with ModelCheckpoint(save_weights_only=True)"
        )
    size = path.stat().st_size
    facts = {key: content.get(key) for key in ("global_step", "epoch", "pytorch-lightning_version")}
    _check_layout(path, content["state_dict"], content["optimizer_states"], size)
    return Checkpoint(
        path=path,
        size=size,
        facts={key: value for key, value in facts.items() if isinstance(value, (int, str))},
        weights=content["state_dict"],
        optimizer_states=content["optimizer_states"],
        placeholders=placeholders,
    )


def _load(path: Path) -> tuple[Any, tuple[str, ...]]:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, a sharded checkpoint; make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
        )
    try:
        if not zipfile.is_zipfile(path):
            # is_zipfile says False of what it cannot open
            with path.open("rb"):
                raise CheckpointError(f"{path} is truncated, or not a PyTorch checkpoint: it is no zip archive")
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise CheckpointError(f"{path} is not a PyTorch checkpoint: it is compressed")
        unknown = _unknown_globals(path)
        if system := [name for name in unknown if name.partition(".")[0] in _SYSTEM_MODULES]:
            raise CheckpointError(f"{path} holds code: it refers to {printable(system[0])}; refused")
        stand_ins: list[Any] = [(_placeholder(path, name), name) for name in unknown]
        with safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols: what cannot be read is refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    return content, tuple(sorted(unknown))


def _unknown_globals(path: Path) -> list[str]:
    """Return the full names that the file refers to and that torch's safe loading does not know."""
    unknown = get_unsafe_globals_in_checkpoint(path)
    if any(name.startswith("torchao.") for name in unknown):
        importlib.import_module("torchao.optim")  # makes its low-bit states known
        unknown = get_unsafe_globals_in_checkpoint(path)
    return unknown


class _Placeholder:
    """Stands for an object of an unknown class: takes its fields and forgets them."""

    path: Path
    name: str

    def __new__(cls, *args: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        # Pickle makes an object by __new__ alone; only a call comes here.
        if self.name not in _VALUE_TYPES:
            raise CheckpointError(f"{self.path} holds code: loading it would call {printable(self.name)}; refused")

    def __setstate__(self, state: Any) -> None:
        pass


def _placeholder(path: Path, name: str) -> type[_Placeholder]:
    return type("_Placeholder", (_Placeholder,), {"path": path, "name": name})


def _check_layout(path: Path, weights: Any, optimizer_states: Any, size: int) -> None:
    """Raise unless the checkpoint has the nesting that Lightning gives it and no tensor is larger than the file."""
    sound = (
        isinstance(weights, Mapping)
        and all(isinstance(name, str) for name in weights)
        and isinstance(optimizer_states, list)
        and all(map(_is_optimizer_state, optimizer_states))
    )
    if not sound:
        raise CheckpointError(f"{path} is not a Lightning checkpoint: its optimizer states are not in torch's form")
    for optimizer_state in optimizer_states:
        for state in optimizer_state["state"].values():
            for value in state.values():
                if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
                    raise CheckpointError(f"{path} is damaged: a state of shape {list(value.shape)} exceeds the file")


def _is_optimizer_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(isinstance(state, dict) and all(isinstance(k, str) for k in state) for state in value["state"].values())
        and isinstance(value.get("param_groups"), list)
        and len(value["param_groups"]) > 0
        and all(map(_is_param_group, value["param_groups"]))
    )


def _is_param_group(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(option, str) for option in value)
        and isinstance(value.get("params"), list)
        and all(isinstance(key, (int, str)) for key in value["params"])
    )


def printable(text: str) -> str:
    """Return the text with control characters escaped: a name in a file must not steer the terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def one_line(error: BaseException) -> str:
    """Return what an exception says, in a line."""
    lines = str(error).splitlines() or [type(error).__name__]
    # torch puts advice on trusting the file before the reason
    reason = next((line.partition(_REASON)[2] for line in lines if _REASON in line), lines[0])
    return printable(reason.strip()[:300])
