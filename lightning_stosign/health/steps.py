"""What a step did to parameters: sums that add up over layers and ranks, of which each statistic is a quotient."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_stosign.health.statistics import sum_dtype

UPDATE_STATISTICS = ("update_to_weight", "parameter_rms", "lost_update_fraction", "update_grad_cosine", "grad_rms")

# The cosine is the product of these two, a mean and a root of a mean: the only quotients that add up.
COSINE = "update_grad_cosine"
COSINE_PARTS = ("_update_grad_dot", "_update_grad_ratio")


class StepSum(NamedTuple):
    """Of each row a sum, and what to divide it by; ``"rms"`` is the root of the quotient."""

    kind: Literal["mean", "rms"]
    value: Tensor
    weight: Tensor

    def __add__(self, other: "StepSum") -> "StepSum":  # type: ignore[override]
        return StepSum(self.kind, self.value + other.value, self.weight + other.weight)


def step_sums(
    wanted: Collection[str], before: Tensor, after: Tensor, grad: Tensor | None, direction: Tensor | None
) -> dict[str, StepSum]:
    """Return the sums behind some of :data:`UPDATE_STATISTICS`, all of shape ``[rows]``.

    Args:
        wanted: names of statistics; ``"grad_rms"``, which is of the gradient before clipping, is not one of this
            function's.
        before: the parameters before the step, ``[rows, numel]``, floating point.
        after: those after it.
        grad: their gradients. None: no cosine.
        direction: nonzero where the step should move a parameter. None: the gradient is.
    """
    dtype = sum_dtype(after)
    old, new = before.to(dtype), after.to(dtype)
    step = new - old
    steps = _squares(step)
    sums = {}
    if "update_to_weight" in wanted:
        sums["update_to_weight"] = StepSum("rms", steps, _squares(old))
    if "parameter_rms" in wanted:
        sums["parameter_rms"] = StepSum("rms", _squares(new), torch.full_like(steps, new.shape[1]))
    if COSINE in wanted and grad is not None:
        slope = grad.to(dtype)
        dot, ratio = COSINE_PARTS
        sums[dot] = StepSum("mean", -(step * slope).sum(1), steps)
        sums[ratio] = StepSum("rms", steps, _squares(slope))
    moves = grad if direction is None else direction
    if "lost_update_fraction" in wanted and moves is not None:
        should = moves != 0
        lost = should & (step == 0)
        sums["lost_update_fraction"] = StepSum("mean", lost.sum(1).to(dtype), should.sum(1).to(dtype))
    return sums


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1)
