"""Numbers of other packages, such as numpy's, as Python's: only these load with ``weights_only=True``."""

from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Return an option with each number as a Python number; anything else as it is.

    Example:
        >>> import numpy
        >>> plain((numpy.float32(0.5), numpy.int64(2), numpy.bool_(True), "fp8"))
        (0.5, 2, True, 'fp8')
    """
    kind = type(value)
    if kind in (bool, int, float, str):
        return value
    if kind in (tuple, list):
        return kind(plain(each) for each in value)
    if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"):  # numpy does not register them as numbers
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def make_plain(options: dict[str, Any]) -> None:
    """Replace the options of a param group, all but its parameters, by :func:`plain` ones."""
    for name, value in options.items():
        if name not in ("params", "param_names"):
            options[name] = plain(value)


def make_fields_plain(dataclass: Any) -> None:
    """Replace the fields of a dataclass, which may be frozen, by :func:`plain` ones."""
    for field in fields(dataclass):
        object.__setattr__(dataclass, field.name, plain(getattr(dataclass, field.name)))
