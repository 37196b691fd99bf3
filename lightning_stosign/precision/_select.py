"""Which FP8 library a run uses."""

from typing import Any

import torch

from lightning_stosign.precision._backend import Float8Backend
from lightning_stosign.precision._recipes import parse_recipe
from lightning_stosign.precision.emulated_backend import EmulationBackend
from lightning_stosign.precision.te_backend import TransformerEngineBackend, missing_for_transformer_engine
from lightning_stosign.precision.torchao_backend import TorchAOBackend

_BACKENDS: dict[str, type[Float8Backend]] = {
    backend.name: backend for backend in (TransformerEngineBackend, TorchAOBackend, EmulationBackend)
}
BACKENDS = ("auto", *_BACKENDS)


def select_backend(backend: str, recipe: Any) -> tuple[Float8Backend, str]:
    """Make the backend, checking that this machine has it and that it has the recipe.

    Args:
        backend: Its name, or ``"auto"``: Transformer Engine where it runs, else torchao, else, on a machine without a
            GPU, the emulation.
        recipe: The ``recipe`` argument of Float8Precision.

    Returns:
        The backend, and why ``"auto"`` chose it: empty where nothing had to be chosen.

    Raises:
        ValueError: Unknown backend or recipe, or one that is not to be had here.
        TypeError: An argument of the wrong type.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be one of {list(BACKENDS)}, got {backend!r} of type {type(backend).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    choice = parse_recipe(recipe)
    name = choice.name

    # Nothing is imported or asked of a GPU for a choice that does not depend on it.
    te_has_it = name is None or name in TransformerEngineBackend.recipes
    asks_te = backend == TransformerEngineBackend.name or (backend == "auto" and te_has_it)
    obstacle = missing_for_transformer_engine() if asks_te else None
    if backend == TransformerEngineBackend.name and obstacle is not None:
        raise ValueError(
            f"backend={backend!r} cannot be used here: {obstacle}. Use backend='torchao', or backend='auto', "
            "which takes Transformer Engine where it runs and torchao elsewhere"
        )

    if backend != "auto":
        chosen = _BACKENDS[backend]
    elif asks_te and obstacle is None:
        chosen = TransformerEngineBackend
    elif name in EmulationBackend.recipes and (name not in TransformerEngineBackend.recipes or not _has_gpu()):
        # Where there is a GPU, nobody wants a slow run by surprise.
        chosen = EmulationBackend
    else:
        chosen = TorchAOBackend

    remark = f" (backend='auto' found no Transformer Engine: {obstacle})" if obstacle else ""
    if name is None and chosen is not TransformerEngineBackend:
        raise TypeError(
            f"recipe must be one of {list(chosen.recipes)} for backend={chosen.name!r}, "
            f"got {recipe!r} of type {type(recipe).__name__}{remark}"
        )
    if name is not None and name not in chosen.recipes:
        elsewhere = [other.name for other in _BACKENDS.values() if name in other.recipes]
        raise ValueError(
            f"recipe={name!r} is not offered by backend={chosen.name!r}, which has {list(chosen.recipes)}; "
            f"backend={' or '.join(map(repr, elsewhere))} has it{remark}"
        )
    if backend != "auto":
        return chosen(choice), ""
    why = "Transformer Engine runs here" if chosen is TransformerEngineBackend else f"only {chosen.name} offers it"
    return chosen(choice), obstacle or why


def _has_gpu() -> bool:
    return torch.cuda.is_available()
