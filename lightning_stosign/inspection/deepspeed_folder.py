"""DeepSpeed's ZeRO checkpoints: each rank's optimizer states are a run of all parameters' values, flattened."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_stosign.inspection.checkpoint import Checkpoint, dangerous_names, read_content, states_of
from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.layouts import facts_of, unread_objects
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.parameter_names import plain_name
from lightning_stosign.inspection.stored_tensor import (
    FileTensor,
    FlatPart,
    JoinedTensor,
    check_size,
    is_file_tensor,
    numel,
)

_RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_FORMAT = "DeepSpeed ZeRO checkpoint"


def rank_files(folder: Path) -> list[Path]:
    """Return the files with the ranks' optimizer states, in the order of the ranks."""
    found = [(match, path) for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda entry: (int(entry[0][2]), int(entry[0][1])))]


def is_rank_content(content: Any) -> bool:
    """Return whether this is what a rank saves of its optimizer."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("optimizer_state_dict"), dict)
        and "base_optimizer_state" in content["optimizer_state_dict"]
    )


def read_deepspeed(path: Path, files: Sequence[Path]) -> Checkpoint:
    """Open a ZeRO checkpoint, or what one rank has saved.

    Where the model's file lists the parameters' shapes and the ranks' parts together are as long as these, each
    parameter has its own part of the flat states; else the numbers are those of whole param groups.

    Args:
        path: what was asked for, the folder or a file.
        files: the ranks' files, all or one.

    Raises:
        CheckpointError: the files are damaged or contradict each other.
    """
    contents = [read_content(InputFile(file)) for file in files]
    for file, content in zip(files, contents, strict=True):
        if not is_rank_content(content.value):
            raise CheckpointError(f"{file} is not what DeepSpeed saves of an optimizer")
    per_rank = [_base_groups(content.value["optimizer_state_dict"], files[0]) for content in contents]
    stage = contents[0].value["optimizer_state_dict"].get("zero_stage")
    complete = len(files) == len(rank_files(files[0].parent)) and _is_one_model_part(files)
    model = _model_content(files[0].parent)
    shapes = _parameter_shapes(model) if complete and stage != 3 else None
    groups, states = [], {}
    is_split = True
    for number, parts in enumerate(zip(*per_rank, strict=True)):
        options, flat = parts[0][0], _joined([part for _, part in parts])
        named = _split(flat, shapes[number]) if shapes is not None and number < len(shapes) else None
        if named is None:
            is_split = False
            named = {f"param group {number}, flattened": flat}
        groups.append({**options, "params": list(named)})
        states.update(named)
    state_dict = {"state": states, "param_groups": groups}
    size = sum(InputFile(file).size for file in files)
    check_size(list(states_of(state_dict)), size, path)
    notes = []
    if not complete:
        notes.append(f"{len(files)} of the checkpoint's parts; the other ranks' states are not counted")
    if not is_split:
        notes.append("the states are flattened: the numbers are those of whole param groups, padding included")
    return Checkpoint(
        path=path,
        size=size,
        format=f"{_FORMAT}, stage {stage}" if type(stage) is int else _FORMAT,
        optimizers={"": state_dict},
        facts=facts_of(model if model is not None else contents[0].value),
        left_unread=tuple(sorted({name for content in contents for name in unread_objects(content.value)})),
        dangerous=dangerous_names(name for content in contents for name in content.globals),
        notes=tuple(notes),
    )


def _is_one_model_part(files: Sequence[Path]) -> bool:
    """Return whether the ranks share one part of the model: no tensor parallelism."""
    return len({match[2] for file in files if (match := _RANK_FILE.fullmatch(file.name))}) == 1


def _base_groups(zero: Mapping[str, Any], path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (options, flat states) of each param group of a rank."""
    base = zero["base_optimizer_state"]
    if isinstance(base, list):  # "elastic": a state for each group
        states: list[Any] = base
        options: list[dict[str, Any]] = [{}] * len(base)
    elif isinstance(base, dict) and isinstance(base.get("state"), dict) and isinstance(base.get("param_groups"), list):
        states = [base["state"].get(key) for key in sorted(base["state"], key=str)]
        options = [
            {k: v for k, v in group.items() if k != "params"}
            for group in base["param_groups"]
            if isinstance(group, dict)
        ]
        options += [{}] * (len(states) - len(options))
    else:
        raise CheckpointError(f"{path} is not what DeepSpeed saves of an optimizer")
    if not all(isinstance(state, dict) for state in states):
        raise CheckpointError(f"{path} is not what DeepSpeed saves of an optimizer")
    # Each group's parameters are one flat parameter; options of groups without any are of no use.
    return list(zip(options, states, strict=False))


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the ranks' runs of a group's states."""
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        values: list[Any] = [part.get(name) for part in parts]
        if all(is_file_tensor(value) and len(value.shape) == 1 for value in values):
            places, start = [], 0
            for value in values:
                places.append(((start,), value))
                start += numel(value)
            try:
                joined[name] = JoinedTensor(values[0].dtype, (start,), places)
            except ValueError as error:
                raise CheckpointError(f"the ranks' parts of {name} do not fit together: {error}") from error
        else:
            joined[name] = first
    return joined


def _parameter_shapes(model: Any) -> list[list[tuple[str, tuple[int, ...]]]] | None:
    """Return names and shapes of each param group's parameters, in their order."""
    shapes = model.get("param_shapes") if isinstance(model, dict) else None
    if isinstance(shapes, dict):
        shapes = [shapes]
    if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
        return None
    groups = [list(group.items()) for group in shapes]
    sound = all(
        isinstance(name, str) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        for group in groups
        for name, shape in group
    )
    return groups if sound else None


def _split(flat: Mapping[str, Any], shapes: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, dict[str, Any]] | None:
    """Give each parameter its part of a group's flat states; None where these are not as long as their parameters."""
    total = sum(math.prod(shape) for _, shape in shapes)
    tensors = {name: value for name, value in flat.items() if is_file_tensor(value) and len(value.shape) == 1}
    # The end is padded so that each rank has as much as the others, aligned to a few values.
    if not tensors or not all(total <= numel(value) < total + 4096 for value in tensors.values()):
        return None
    rest = {name: value for name, value in flat.items() if name not in tensors}
    named, start = {}, 0
    for name, shape in shapes:
        parts: dict[str, FileTensor] = {state: FlatPart(value, start, shape) for state, value in tensors.items()}
        named[plain_name(name)] = {**rest, **parts}
        start += math.prod(shape)
    return named


def _model_content(folder: Path) -> Any:
    """Return what the model's file says, None without one."""
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    return read_content(InputFile(files[0])).value if files else None
