"""``lightning-stosign demo``: the example of the same name, which a wheel carries."""

import importlib
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
_IN_WHEEL, _IN_CLONE = _PACKAGE / "_demo", _PACKAGE.parent / "examples"


def run_demo(**options: Any) -> None:
    """Run ``examples/demo.py``.

    Args:
        options: those of its function ``demo``; the others keep their defaults.
    """
    folder = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CLONE
    sys.path.insert(0, str(folder))  # where the scripts find one another
    importlib.import_module("demo").demo(**options)
