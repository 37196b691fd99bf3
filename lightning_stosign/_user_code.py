"""Warnings that point at the user's line, however deep in torch, Lightning or this package they arise."""

import os
import sys
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

_NOT_THE_USER = ("lightning_stosign", "torch", "lightning", "pytorch_lightning", "lightning_fabric")


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line that is neither torch's, nor Lightning's, nor this package's."""
    level = 2  # of the caller
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_folders()):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


@lru_cache(maxsize=1)
def _folders() -> tuple[str, ...]:
    specs = (find_spec(name) for name in _NOT_THE_USER)
    files = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return tuple(str(Path(file).parent) + os.sep for file in files)
