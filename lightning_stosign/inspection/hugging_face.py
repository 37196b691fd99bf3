"""The model beside an optimizer file of Hugging Face's Trainer or of accelerate: names, shapes, and their order."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stosign.inspection.checkpoint import read_content
from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.layouts import find
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.parameter_names import plain_name
from lightning_stosign.inspection.safetensors_file import is_safetensors, read_safetensors
from lightning_stosign.inspection.stored_tensor import FileTensor

_SHARD = re.compile(r"(model|pytorch_model)(_\d{1,4})?(-\d{5}-of-\d{5})?\.(safetensors|bin)")
_MOST_SECONDS = 30
_MOST_CONFIG = 1 << 20  # bytes


class Model(NamedTuple):
    """What is known of the model.

    Attributes:
        weights: its tensors by name.
        ordered: whether they are in the order of ``model.named_parameters()``.
        facts: the step and the epoch of a Trainer.
    """

    weights: Mapping[str, Any]
    ordered: bool
    facts: dict[str, int | str]


def read_model(folder: Path) -> Model:
    """Read what stands beside an optimizer file: ``model.safetensors``, ``config.json``, ``trainer_state.json``.

    Safetensors files are sorted by name, while an optimizer counts in the order of the model. That order is known from
    the architecture in ``config.json``, of which transformers, if installed, builds the model without its weights.
    """
    weights: dict[str, Any] = {}
    is_sorted = False
    try:
        for path in sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name)):
            file = InputFile(path)
            if path.suffix == ".safetensors" and is_safetensors(file):
                weights.update(read_safetensors(file))
                is_sorted = True
            elif path.suffix == ".bin":
                weights.update(find(read_content(file).value).weights)
    except (CheckpointError, OSError):
        return Model({}, True, {})  # the states are what was asked for; without the model they have numbers
    facts = _facts(folder / "trainer_state.json")
    if is_sorted and weights:
        order = parameter_order(folder / "config.json", weights)
        if order is not None:
            named = {name: weights[name] for name in order if name in weights}
            return Model({plain_name(name): value for name, value in named.items()}, True, facts)
    return Model({plain_name(name): value for name, value in weights.items()}, not is_sorted, facts)


def _facts(path: Path) -> dict[str, int | str]:
    state = _read_json(path)
    facts: dict[str, int | str] = {}
    if isinstance(state, dict):
        if type(state.get("global_step")) is int:
            facts["global_step"] = state["global_step"]
        if isinstance(state.get("epoch"), (int, float)) and float(state["epoch"]).is_integer():
            facts["epoch"] = int(state["epoch"])
    return facts


def _read_json(path: Path) -> Any:
    try:
        file = InputFile(path)
        return json.loads(file.read(0, file.size)) if file.size <= 1 << 26 else None
    except (CheckpointError, ValueError, RecursionError):
        return None


def parameter_order(config: Path, weights: Mapping[str, FileTensor]) -> list[str] | None:
    """Return the names of a model's parameters in its own order.

    transformers builds the architecture on the meta device, in a process of its own that ends after a while; code that
    a checkpoint brings along is never used.

    Args:
        config: the model's ``config.json``.
        weights: its tensors by name.

    Returns:
        The names, or None without transformers, or where the architecture has other parameters.
    """
    content = _read_json(config)
    architectures = content.get("architectures") if isinstance(content, dict) else None
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        return None
    if not re.fullmatch(r"[A-Z]\w{1,100}", architectures[0]) or config.stat().st_size > _MOST_CONFIG:
        return None
    # No model has more layers, experts or heads than can be told from its tensors.
    if any(size > max(4 * len(weights), 1024) for key, size in _counts(content)):
        return None
    command = [sys.executable, "-m", "lightning_stosign.inspection._transformers_order", str(config), architectures[0]]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_MOST_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
        shapes = dict(json.loads(done.stdout)) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError, OSError):
        return None
    known = [name for name in shapes if name in weights]
    sound = known and all(list(weights[name].shape) == shapes[name] for name in known)
    # Tied weights are saved once.
    return known if sound and len(known) >= 0.9 * len(shapes) else None


def _counts(content: Mapping[str, Any]) -> list[tuple[str, int]]:
    found = []
    for key, value in content.items():
        values = [value] if type(value) is int else value if isinstance(value, list) else []
        if re.search(r"layer|expert|head|depth|stage|block|group", str(key)):
            found += [(key, each) for each in values if type(each) is int]
        if isinstance(value, dict):
            found += _counts(value)
    return found
