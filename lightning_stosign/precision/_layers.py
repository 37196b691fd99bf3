"""Swap layers of a model in place, so that nobody who holds on to a parameter, a hook or a name notices."""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeGuard, TypeVar, cast

from torch import nn
from torch.nn import Parameter

LayerT = TypeVar("LayerT", bound=nn.Module)


class HollowLayer(nn.Module):
    """Computes through an inner layer that has no parameters of its own: it is given them for each call.

    The inner layer is no submodule, so that neither its name nor its parameters are the model's.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = inner

    @property
    def inner(self) -> nn.Module:
        """The layer that computes."""
        return cast(nn.Module, self.__dict__["inner"])


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module computes ``x @ weight.T + bias`` and nothing else.

    Subclasses (LoRA, the output projection of ``nn.MultiheadAttention``), parametrized layers and layers with a
    ``forward`` of their own compute something else, or elsewhere: an FP8 layer in their place would be wrong or idle.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and {name for name, _ in module.named_parameters(recurse=False)} in ({"weight"}, {"weight", "bias"})
        and not list(module.buffers())
        and not list(module.children())
    )


def is_excluded(name: str, exclude: Sequence[str]) -> bool:
    """Whether a glob matches the module's name or the name of a module it lies in."""
    parts = name.split(".")
    lineage = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(fnmatchcase(ancestor, glob) for ancestor in lineage for glob in exclude)


def unmatched_globs(root: nn.Module, exclude: Sequence[str]) -> list[str]:
    """The globs that match no module of ``root``: most likely misspelt."""
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    return [glob for glob in exclude if not any(fnmatchcase(name, glob) for name in names)]


def shared_parameters(root: nn.Module) -> set[Parameter]:
    """The parameters that more than one module holds: tied weights."""
    holders = Counter(parameter for module in root.modules() for parameter in module.parameters(recurse=False))
    return {parameter for parameter, count in holders.items() if count > 1}


def names_of_modules(root: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below ``root`` with all of its names: a shared module has several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if module is not root:
            names.setdefault(module, []).append(name)
    return names


def swap(
    root: nn.Module,
    originals: Mapping[LayerT, list[str]],
    convert: Callable[[LayerT], nn.Module | None],
    own: Callable[[nn.Module], set[str]] = lambda replacement: set(),
) -> list[str]:
    """Put ``convert(original)`` in the place of each original, under all of its names.

    Args:
        root: The model; changed in place.
        originals: The modules to swap, with all their names below ``root``.
        convert: Makes the replacement, from the same parameters. None leaves the original where it is.
        own: The names of the parameters that a replacement has made itself and keeps.

    Returns:
        The first name of every module that was swapped.
    """
    swapped = []
    for original, names in originals.items():
        replacement = convert(original)
        if replacement is None:
            continue
        take_over(original, replacement, own(replacement))
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(root.get_submodule(parent), attribute, replacement)
        swapped.append(names[0])
    return swapped


def take_over(original: nn.Module, replacement: nn.Module, own: Collection[str] = ()) -> None:
    """Give the replacement all that belongs to the original: parameters, mode, hooks and attributes set by users.

    Args:
        original: The module that goes.
        replacement: The module that takes its place.
        own: The names of parameters that the replacement keeps.
    """
    for name, parameter in original.named_parameters(recurse=False):
        if name not in own:
            setattr(replacement, name, parameter)
    replacement.train(original.training)
    for name in vars(nn.Module()):
        if "hook" in name:
            _take_over_hooks(name, original, replacement)
    for name, value in vars(original).items():
        # A compiled call of the original would run the original.
        if name != "_compiled_call_impl" and name not in vars(replacement):
            vars(replacement)[name] = value


def _take_over_hooks(name: str, original: nn.Module, replacement: nn.Module) -> None:
    hooks = vars(original)[name]
    if isinstance(hooks, dict):
        # The dictionary itself moves, because the handles that users keep refer to it weakly and must still remove.
        hooks.update(vars(replacement)[name])
        for hook in hooks.values():
            if getattr(hook, "with_module", False):
                hook.module = weakref.ref(replacement)
    vars(replacement)[name] = hooks


def keep_to_the_layers(root: nn.Module, is_converted: Callable[[nn.Module], bool]) -> None:
    """Keep torch's transformer layers from their fused path, which reads the weights of linear layers by itself.

    In eval mode without gradients ``nn.TransformerEncoderLayer`` calls none of its linear layers: their FP8 would be
    skipped where a model is validated or used.
    """
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(map(is_converted, module.children())):
            # A condition of the fused path, also of nn.TransformerEncoder's; the layer itself calls `activation`.
            module.activation_relu_or_gelu = 0
