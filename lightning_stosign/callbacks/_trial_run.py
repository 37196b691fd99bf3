"""A trial run: some optimizer steps that record the loss and the curvature along the way."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.optim.alias.same_batch import gradients_at
from lightning_stosign.optim.alias.totals import Part, totals
from lightning_stosign.optim.sharding import local, local_grad


class TrialRun:
    """Runs a trainer's fit loop for some steps at one learning rate, on the same mini-batches each time.

    Args:
        optimizer: the trainer's, its learning rate set.
        step_size: that learning rate. With 0 the parameters are left alone and only losses are recorded.
        measure_every: the curvature is measured in the first so many steps and then in every so many.

    Attributes:
        losses: f(x_t) on the mini-batch of step t, the mean over the processes.
        curvatures: ||g_t - g_{t-1}||_1 / ||x_t - x_{t-1}||_inf on that mini-batch; the last one where not measured.
        diverged: a loss or gradient was not finite, and the run ended with that.
    """

    def __init__(self, optimizer: Optimizer, step_size: float, measure_every: int) -> None:
        self.step_size, self.measure_every = step_size, measure_every
        self.losses: list[float] = []
        self.curvatures: list[float] = []
        self.diverged = False
        self._optimizer = optimizer
        self._params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        self._before: list[Tensor] | None = None

    def run(self, trainer: "pl.Trainer", steps: int) -> "TrialRun":
        """Run the loop; the optimizer's ``step`` is replaced meanwhile."""
        self._trainer = trainer
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps = trainer.global_step + steps
        # Where a scheduler has wrapped it, the wrapper is an attribute of the instance.
        wrapped = vars(self._optimizer).get("step")
        self._step_of_optimizer: Callable[..., Any] = self._optimizer.step
        self._optimizer.step = self._step  # type: ignore[method-assign]
        try:
            loop.run()
        finally:
            if wrapped is None:
                del self._optimizer.step
            else:
                self._optimizer.step = wrapped  # type: ignore[method-assign]
        return self

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError(
                "SignStepSizeFinder needs the closure that Lightning passes to optimizer.step, except under "
                "precision='16-mixed': use 'bf16-mixed'"
            )
        step, before = len(self.losses), self._before
        measures = before is not None and (step <= self.measure_every or step % self.measure_every == 0)
        grads_before = gradients_at(self._params, before, closure) if measures and before is not None else None
        with torch.enable_grad():
            loss = closure()
        if loss is None:
            raise RuntimeError("SignStepSizeFinder: training_step returned no loss in a trial run")
        curvature = self.curvatures[-1] if self.curvatures else 0.0
        if grads_before is not None and before is not None:
            difference, motion = totals(map(_part, self._params, before, grads_before), loss.device).tolist()
            curvature = difference / motion if motion > 0 else curvature
        value = self._trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean").item()
        if not (math.isfinite(value) and math.isfinite(curvature) and self._grads_are_finite()):
            self.diverged = self._trainer.should_stop = True
            return loss
        self.losses.append(value)
        if before is not None:
            self.curvatures.append(curvature)
        if self.step_size > 0:
            self._before = [local(param).clone() for param in self._params]
            self._step_of_optimizer()
        return loss

    def _grads_are_finite(self) -> bool:
        zero = torch.zeros((), dtype=torch.float32, device=self._params[0].device)
        parts = [
            Part(param, (zero if param.grad is None else local_grad(param).abs().sum(),), zero)
            for param in self._params
        ]
        return math.isfinite(totals(parts, self._params[0].device)[0].item())


def _part(param: Tensor, before: Tensor, grad_before: Tensor | None) -> Part:
    """Return ||g_t - g_{t-1}||_1 and ||x_t - x_{t-1}||_inf of one parameter."""
    zero = torch.zeros((), dtype=torch.float32, device=param.device)
    if before.numel() == 0:
        return Part(param, (zero,), zero)
    difference = zero
    if param.grad is not None and grad_before is not None:
        difference = (local_grad(param) - grad_before).abs().sum()
    return Part(param, (difference,), (before - local(param)).abs().amax())
