"""What Transformer Engine's delayed scaling (TE) remembers from step to step: scales, and histories of magnitudes."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def remembers(layer: nn.Module) -> bool:
    """Whether TE saves something for this layer; containers such as ``te.TransformerLayer`` have nothing to save."""
    return type(layer).get_extra_state is not nn.Module.get_extra_state


@contextmanager
def unchanged_histories(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Forget what the layers see meanwhile, so that an evaluation leaves no trace in the scales of the next step.

    Args:
        layers: The layers, some of which may get their histories only now.
    """
    layers = list(layers)
    before = {id(state): (state.scale.clone(), state.amax_history.clone()) for state in _states(layers)}
    try:
        yield
    finally:
        with torch.no_grad():
            for state in _states(layers):
                if id(state) in before:
                    scale, history = before[id(state)]
                    state.scale.copy_(scale)
                    state.amax_history.copy_(history)
                else:  # as TE makes them
                    state.scale.fill_(1.0)
                    state.amax_history.zero_()


@contextmanager
def no_inference_tensors() -> Iterator[None]:
    """Replace ``torch.inference_mode`` by ``torch.no_grad``.

    TE keeps tensors from one call to the next, and later writes them in place or saves them for backward. Tensors that
    were made in inference mode would refuse both.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def scales_of(layers: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return copies of the scales that a forward pass begins with, for :func:`recomputation`."""
    return {id(state): state.scale.clone() for state in _states(layers, ("scaling_fwd",))}


@contextmanager
def recomputation(layers: Iterable[nn.Module], scales: dict[int, Tensor]) -> Iterator[None]:
    """Let layers compute once more what they computed in forward, and learn nothing from it.

    TE has new scales as soon as the forward pass is over.

    Args:
        layers: The layers.
        scales: What :func:`scales_of` returned before the forward pass.
    """
    after = [(state, state.scale.clone(), state.amax_history.clone()) for state in _states(layers, ("scaling_fwd",))]
    with torch.no_grad():
        for state, _, _ in after:
            state.scale.copy_(scales.get(id(state), torch.ones_like(state.scale)))  # 1, as TE begins
    try:
        yield
    finally:
        with torch.no_grad():
            for state, scale, history in after:
                state.scale.copy_(scale)
                state.amax_history.copy_(history)


def _states(layers: Iterable[Any], keys: Collection[str] = ("scaling_fwd", "scaling_bwd")) -> Iterator[Any]:
    """The layers' objects that hold a scale and a history: modules have one dictionary of them, operations two."""
    for layer in layers:
        metas = [getattr(layer, "fp8_meta", None), *(getattr(layer, "_fp8_metas", None) or {}).values()]
        for meta in metas:
            for key in keys:
                state = (meta or {}).get(key)
                if isinstance(getattr(state, "amax_history", None), Tensor):
                    yield state
