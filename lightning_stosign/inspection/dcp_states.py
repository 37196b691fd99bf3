"""From the entries of a DCP folder to the state_dicts of its optimizers."""

from pathlib import Path
from typing import Any

from lightning_stosign.inspection.checkpoint import Checkpoint, dangerous_names, read_content, states_of
from lightning_stosign.inspection.dcp_folder import DcpFolder, Path_
from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.layouts import facts_of, unread_objects
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.parameter_names import plain_name
from lightning_stosign.inspection.stored_tensor import check_size

_LIGHTNING = "meta.pt"  # where Lightning keeps what is neither weights nor optimizer states
_STATE, _GROUPS = "state", "param_groups"


class _Entries:
    """The entries of one optimizer."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, Any]] = {}
        self.options: dict[str | int, dict[str, Path_]] = {}  # by group or parameter
        self.groups: Path_ | None = None  # of a list that was saved as one object


def read_dcp_folder(folder: Path) -> Checkpoint:
    """Open a folder that torch.distributed.checkpoint has written: Lightning's, torchtitan's, FSDP2's, accelerate's.

    Raises:
        CheckpointError: it is damaged or holds no optimizer states.
    """
    dcp = DcpFolder(folder)
    optimizers: dict[Path_, _Entries] = {}
    weights: dict[str, Any] = {}
    for path, tensor in dcp.tensors.items():
        if (found := _split_state(path)) is not None:
            prefix, parameter, state = found
            optimizers.setdefault(prefix, _Entries()).states.setdefault(parameter, {})[state] = tensor
        else:
            weights[plain_name(str(path[-1] if len(path) > 1 else path[0]))] = tensor
    for path in dcp.objects:
        _sort_object(path, dcp, optimizers)
    optimizers = {prefix: entries for prefix, entries in optimizers.items() if entries.states}
    if not optimizers:
        raise CheckpointError(f"{folder} holds a distributed checkpoint without optimizer states")
    state_dicts = {prefix: _state_dict(entries, dcp) for prefix, entries in optimizers.items()}
    check_size([value for each in state_dicts.values() for value in states_of(each)], dcp.size, folder)
    content, format, unread, dangerous = _rest(folder, dcp)
    labels = [""] if len(state_dicts) == 1 else [".".join(map(str, prefix)) for prefix in state_dicts]
    return Checkpoint(
        path=folder,
        size=dcp.size,
        format=format,
        optimizers=dict(zip(labels, state_dicts.values(), strict=True)),
        weights=weights,
        facts=facts_of(content),
        left_unread=unread,
        dangerous=dangerous,
    )


def _split_state(path: Path_) -> tuple[Path_, str, str] | None:
    """Return (the path to the optimizer, the parameter, the state), None for what is no state."""
    for i, part in enumerate(path):
        if part == _STATE and len(path) >= i + 3:
            return path[:i], plain_name(str(path[i + 1])), ".".join(map(str, path[i + 2 :]))
        if isinstance(part, str):
            # flatten_optimizer_state_dict=True, and folders whose paths were not saved
            head, found, rest = (
                part.partition(f".{_STATE}.") if not part.startswith(f"{_STATE}.") else ("", ".", part[6:])
            )
            parameter, _, state = rest.rpartition(".")
            if found and parameter and state:
                return (*path[:i], *([head] if head else [])), plain_name(parameter), state
    return None


def _sort_object(path: Path_, dcp: DcpFolder, optimizers: dict[Path_, _Entries]) -> None:
    """Sort an entry that is no tensor to the optimizer that it belongs to: an option, or a state that is a number."""
    for i, part in enumerate(path):
        if part == _GROUPS:
            entries = optimizers.get(path[:i])
            if entries is not None and len(path) == i + 1:
                entries.groups = path
            elif entries is not None and len(path) >= i + 3:
                entries.options.setdefault(path[i + 1], {})[str(path[i + 2])] = path
            return
        if isinstance(part, str) and part.startswith(f"{_GROUPS}."):
            entries = optimizers.get(path[:i])
            parameter, _, option = part.removeprefix(f"{_GROUPS}.").rpartition(".")
            if entries is not None and parameter:
                entries.options.setdefault(plain_name(parameter), {})[option] = path
            return


def _state_dict(entries: _Entries, dcp: DcpFolder) -> dict[str, Any]:
    """Return the state_dict; options that differ between parameters are those of the first."""
    groups: list[dict[str, Any]] = []
    if entries.groups is not None:
        saved = dcp.read_object(entries.groups)
        groups = [dict(group) for group in saved if isinstance(group, dict)] if isinstance(saved, list) else []
    elif all(isinstance(key, int) for key in entries.options):
        for key in sorted(entries.options, key=str)[:1000]:
            groups.append({option: dcp.read_object(path) for option, path in entries.options[key].items()})
    elif entries.options:
        first = entries.options[next(iter(entries.options))]
        groups = [{option: dcp.read_object(path) for option, path in first.items()}]
    members = set(entries.states)
    for group in groups:
        listed = group.get("params")
        names = (
            [plain_name(name) for name in listed if isinstance(name, str)] if isinstance(listed, (list, tuple)) else []
        )
        group["params"] = [name for name in names if name in members]
        members -= set(group["params"])
    rest = [name for name in entries.states if name in members]
    if not groups:
        groups = [{"params": rest}]
    else:
        groups[0]["params"] = [*groups[0]["params"], *rest]
    return {"state": entries.states, "param_groups": groups}


def _rest(folder: Path, dcp: DcpFolder) -> tuple[Any, str, tuple[str, ...], tuple[str, ...]]:
    """Return what besides weights and states was saved, and what kind of folder this is."""
    if (folder / _LIGHTNING).exists():
        content = read_content(InputFile(folder / _LIGHTNING))
        return (
            content.value,
            "Lightning sharded checkpoint",
            tuple(unread_objects(content.value)),
            dangerous_names(content.globals | dcp.globals),
        )
    plain = {}
    for path in dcp.objects:
        name = str(path[-1])
        if name in ("step", "global_step", "epoch") and _GROUPS not in path and _STATE not in path:
            plain[name] = dcp.read_object(path)
    return plain, "distributed checkpoint (DCP)", (), dangerous_names(dcp.globals)
