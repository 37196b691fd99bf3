"""One package under both of Lightning's import names: ``lightning.pytorch`` and ``pytorch_lightning``.

The two are the same code with different classes: ``isinstance`` across them is False, and a Trainer of one name refuses
plugins, strategies and single callbacks of the other. This package is written against ``lightning.pytorch``. Here it
learns the other name, without importing what the user has not imported:

* :func:`is_a` is ``isinstance`` for a class of Lightning under either name.
* :func:`like` gives the class or function of the name that a Trainer belongs to, e.g. an exception that it catches.
* :func:`under_both_names` makes a class of ours a subclass of its bases' counterparts as soon as these are imported.
* :func:`adopt` is for objects whose *inherited* code asks ``isinstance`` questions too: it lets that code be the
  Trainer's own.
"""

import sys
from abc import ABCMeta
from functools import cache, partial
from typing import Any, TypeGuard, TypeVar, cast

from lightning_stosign._lazy import after_import

T = TypeVar("T")
ClassT = TypeVar("ClassT", bound=type)

# Lightning's packages by the name that this package imports, and their other names.
OTHER_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def is_a(instance: object, cls: type[T]) -> TypeGuard[T]:
    """Whether the object is an instance of a class of Lightning, under either name.

    Args:
        instance: Any object.
        cls: The class, imported from ``lightning.pytorch`` or ``lightning.fabric``.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger, Logger
        >>> is_a(CSVLogger("logs"), Logger)
        True
    """
    if isinstance(instance, cls):
        return True
    other = counterpart(cls)
    return other is not None and isinstance(instance, other)


def counterpart(thing: T) -> T | None:
    """Return a class or function of Lightning under its other name, or None as long as nobody has imported that."""
    module: str = thing.__module__
    for name, other in OTHER_NAMES.items():
        if _is_within(module, name):
            found = sys.modules.get(other + module.removeprefix(name))
            return cast(T | None, getattr(found, thing.__qualname__, None))  # type: ignore[attr-defined]
    return None


def like(guest: object, thing: T) -> T:
    """Return a class or function of Lightning under the name that an object belongs to.

    Args:
        guest: A Trainer, a LightningModule, or another instance of a class of Lightning.
        thing: The class or function, imported from ``lightning.pytorch`` or ``lightning.fabric``.
    """
    other = counterpart(thing)
    return other if other is not None and has_other_name(guest) else thing


def has_other_name(guest: object) -> bool:
    """Whether the object's class derives from Lightning's under the name that this package does not import."""
    for base in type(guest).__mro__:
        if any(_is_within(base.__module__, name) for name in OTHER_NAMES.values()):
            return True
        if any(_is_within(base.__module__, name) for name in OTHER_NAMES):
            return False
    return False


def under_both_names(cls: ClassT) -> ClassT:
    """Class decorator: Trainers of either name take instances of the class, whichever is imported, and when.

    The class stays one class: once ``pytorch_lightning`` is imported, the counterparts of its bases there join
    ``cls.__bases__``, after the present ones. What is inherited is still ``lightning.pytorch``'s code; see
    :func:`adopt` for where that matters.
    """
    for name in OTHER_NAMES.values():
        after_import(name, partial(_add_counterparts, cls))
    return cls


def adopt(instance: object, guest: object) -> None:
    """Let inherited methods be those of the name of Lightning that an object belongs to.

    Args:
        instance: Of a class that is decorated with :func:`under_both_names`, or of a subclass. Its class is replaced by
            a subclass of the same name that inherits from ``pytorch_lightning`` alone, if that is the guest's name.
        guest: An object of the Trainer that takes the instance.
    """
    cls = type(instance)
    if has_other_name(guest) and not isinstance(cls, _OtherNameOnly):
        instance.__class__ = _other_name_only(cls)  # type: ignore[arg-type]  # mypy: classes are not hashable


class _OtherNameOnly(ABCMeta):
    """Leaves out, of the ancestors of a class, Lightning's under the name that this package imports."""

    def mro(cls) -> list[type]:
        return [base for base in super().mro() if not any(_is_within(base.__module__, name) for name in OTHER_NAMES)]


@cache
def _other_name_only(cls: type) -> type:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return (_blank, (cls,), *object.__reduce_ex__(self, protocol)[2:])

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return _OtherNameOnly(cls.__name__, (cls,), {**names, "__reduce_ex__": reduce})


def _blank(cls: type) -> Any:
    """Return an instance to be filled by the unpickler: a process that is spawned gets the Trainer pickled."""
    return object.__new__(_other_name_only(cls))


def _add_counterparts(cls: type) -> None:
    known = [*cls.__bases__, *filter(None, map(counterpart, cls.__mro__))]
    # Of a class and its subclass, Python wants the subclass only.
    needed = [base for base in known if not any(other is not base and issubclass(other, base) for other in known)]
    cls.__bases__ = tuple(dict.fromkeys(needed))


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
