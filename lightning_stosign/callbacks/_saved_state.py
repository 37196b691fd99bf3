"""States of callbacks in checkpoints, by the keys under which Lightning keeps them."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback


def state_of_only_one(callback: Callback, checkpoint: Mapping[str, Any]) -> Any | None:
    """Return the state of the only callback of this class in a checkpoint, if it was saved under another key.

    Lightning restores by the key, in which a callback's options are: a run that resumes with another option would lose
    its past.
    """
    states = checkpoint.get("callbacks", {})
    if callback.state_key in states:
        return None
    name = type(callback).__qualname__
    found = [key for key in states if key == name or (isinstance(key, str) and key.startswith(f"{name}{{"))]
    return states[found[0]] if len(found) == 1 else None
