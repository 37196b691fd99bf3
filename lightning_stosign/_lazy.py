"""Packages whose modules wait until they are needed: Lightning alone takes longer to import than torch."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LazyPackage:
    """Imports a package's modules when one of their names is first asked of the package (PEP 562).

    Args:
        package: the package's name.
        names: its public names.
        modules: the modules that have those of them that the package has not, and which each of them has.
        optional: those of the modules that :meth:`load` leaves out: they need what not everybody has installed.
    """

    def __init__(
        self, package: str, names: Sequence[str], modules: Mapping[str, Sequence[str]], optional: Sequence[str] = ()
    ) -> None:
        self._package = package
        self._names = names
        self._modules = modules
        self._optional = optional
        self._home = {name: module for module, of_module in modules.items() for name in of_module}

    def get(self, name: str) -> Any:
        """Be the package's ``__getattr__``."""
        if name in self._modules:
            return self._import(name)
        if name not in self._home:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        value = getattr(self._import(self._home[name]), name)
        self._namespace()[name] = value
        return value

    def dir(self) -> list[str]:
        """Be the package's ``__dir__``."""
        return sorted({*self._namespace(), *self._names, *self._modules})

    def load(self) -> list[ModuleType]:
        """Import all modules now but the optional ones."""
        return [self._import(module) for module in self._modules if module not in self._optional]

    def _import(self, module: str) -> ModuleType:
        return importlib.import_module(f"{self._package}.{module}")

    def _namespace(self) -> dict[str, Any]:
        return vars(sys.modules[self._package])


def after_import(name: str, then: Callable[[], object]) -> None:
    """Call a function as soon as a module has been imported, at once if it has been already."""
    if name in sys.modules:
        then()
        return
    watches = (finder for finder in sys.meta_path if isinstance(finder, _Watch) and finder.name == name)
    watch = next(watches, None)
    if watch is None:
        watch = _Watch(name)
        sys.meta_path.insert(0, watch)
    watch.then.append(then)


class _Watch(MetaPathFinder):
    """Finds one module the way all other finders do, and calls functions after the module has run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.then: list[Callable[[], object]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_call(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                run(module)
                for then in self.then:
                    then()

            spec.loader.exec_module = run_then_call  # type: ignore[method-assign]
        return spec
