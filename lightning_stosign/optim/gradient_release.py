"""Steps in the middle of backward: each parameter as soon as its gradient is complete, which is then freed."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_stosign.optim.low_precision import LowPrecisionOptimizer


class GradientRelease:
    """Lets an optimizer take its step, parameter by parameter, during the backward of ``step(closure)``.

    The optimizers of :class:`LowPrecisionOptimizer` update each parameter by its own gradient and states alone, so the
    result has the bits of an ordinary step. No gradient lives longer than it takes to use it. A backward outside of
    ``step(closure)`` leaves its gradients where they are, for the next step.

    Args:
        optimizer: the optimizer. It holds this object; the hooks on its parameters hold neither.
    """

    def __init__(self, optimizer: LowPrecisionOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hooks: dict[Tensor, RemovableHandle] = {}
        # Of the step that is being taken: what is still to be updated, and what has been.
        self._waiting: dict[Tensor, tuple[int, dict[str, Any]]] = {}
        self._updated: set[Tensor] = set()
        optimizer.around_closure = self._around
        optimizer._when_refused = "other parameters may have been updated already (release_gradients=True)."

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self._begin()
            try:
                return closure()
            finally:
                self._waiting, self._updated = {}, set()

        return run

    def _begin(self) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        places = [(param, group) for group in optimizer.param_groups for param in group["params"]]
        self._waiting = {param: (index, group) for index, (param, group) in enumerate(places)}
        this = weakref.ref(self)

        def hook(param: Tensor) -> None:
            release = this()
            if release is not None:
                release._use(param)

        for param in self._waiting:
            if param.requires_grad and param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(hook)
        for param in [param for param in self._hooks if param not in self._waiting]:
            self._hooks.pop(param).remove()

    @torch.compiler.disable
    @torch.no_grad()
    def _use(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if param in self._updated:
            raise RuntimeError(
                f"release_gradients=True: a parameter of shape {list(param.shape)} got a second gradient in one step; "
                "accepted: one backward per step, without reentrant checkpointing (use_reentrant=False)"
            )
        if param not in self._waiting:
            return
        index, group = self._waiting.pop(param)
        self._updated.add(param)
        optimizer.take_step(index, param, group)
        param.grad = None
