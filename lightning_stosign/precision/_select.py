"""Which FP8 library a run uses."""

from typing import Any

from lightning_stosign.precision._backend import Float8Backend
from lightning_stosign.precision.te_backend import TransformerEngineBackend, missing_for_transformer_engine
from lightning_stosign.precision.torchao_backend import TorchAOBackend

BACKENDS = ("auto", TransformerEngineBackend.name, TorchAOBackend.name)


def select_backend(backend: str, recipe: Any) -> Float8Backend:
    """Make the backend, checking that this machine has it and that it has the recipe.

    Args:
        backend: ``"transformer-engine"``, ``"torchao"``, or ``"auto"`` for the first that this machine can run.
        recipe: The name of a recipe, or a Transformer Engine recipe object.

    Raises:
        ValueError: Unknown backend or recipe, or one that is not to be had here.
        TypeError: An argument of the wrong type.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be one of {list(BACKENDS)}, got {backend!r} of type {type(backend).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    known = list(dict.fromkeys(TransformerEngineBackend.recipes + TorchAOBackend.recipes))
    if isinstance(recipe, str) and recipe not in known:
        raise ValueError(f"recipe must be one of {known}, got {recipe!r}")

    # Nothing is imported or asked of a GPU for a choice that does not depend on it.
    only_torchao = backend == TorchAOBackend.name or (
        backend == "auto" and isinstance(recipe, str) and recipe not in TransformerEngineBackend.recipes
    )
    obstacle = None if only_torchao else missing_for_transformer_engine()
    if backend == TransformerEngineBackend.name and obstacle is not None:
        raise ValueError(
            f"backend={backend!r} cannot be used here: {obstacle}. Use backend='torchao', or backend='auto', "
            "which takes Transformer Engine where it runs and torchao elsewhere"
        )

    chosen: type[Float8Backend] = TorchAOBackend if only_torchao or obstacle else TransformerEngineBackend
    why = f" (backend='auto' found no Transformer Engine: {obstacle})" if obstacle else ""
    if isinstance(recipe, str):
        if recipe not in chosen.recipes:
            raise ValueError(
                f"recipe={recipe!r} is not offered by backend={chosen.name!r}, which has {list(chosen.recipes)}{why}"
            )
    elif chosen is TorchAOBackend:
        raise TypeError(
            f"recipe must be one of {list(chosen.recipes)} for backend={chosen.name!r}, "
            f"got {recipe!r} of type {type(recipe).__name__}{why}"
        )
    return chosen(recipe)
