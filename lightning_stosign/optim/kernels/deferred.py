"""Checking gradients on an accelerator without making the host wait."""

from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.sharding import local_grad, max_over_shards


def defers(updates: list[tuple[int, Tensor, dict[str, Any]]]) -> bool:
    """Return whether the answer would have to come from one accelerator."""
    devices = {param.device for _, param, _ in updates}
    return len(devices) == 1 and devices.pop().type != "cpu"


class DeferredCheck:
    """Whether all gradients of a step are finite: known on their device at once, on the host when it next asks.

    Args:
        updates: (index, parameter, group) of the parameters with gradients, on one device.
    """

    def __init__(self, updates: list[tuple[int, Tensor, dict[str, Any]]]) -> None:
        grads = [local_grad(param) for _, param, _ in updates]
        grads = [grad if grad.numel() > 0 else grad.new_zeros(1) for grad in grads]  # an empty shard has no norm
        nonfinite = torch.stack(torch._foreach_norm(grads, torch.inf)).isfinite().logical_not().to(torch.float32)
        max_over_shards((param, flag) for (_, param, _), flag in zip(updates, nonfinite.unbind(), strict=True))
        finite = nonfinite == 0
        self.finite = finite.all()
        """0-dimensional bool tensor, on the gradients' device."""
        self._updates = [(param, group) for _, param, group in updates]
        self._each = finite.to("cpu", non_blocking=True)
        self._copied: torch.Event | None = None
        if finite.device.type != "cpu":
            self._copied = torch.Event(finite.device.type)
            self._copied.record()

    def offending(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return (parameter, group) of the gradients that were not finite.

        Waits for the device to have finished the step that was checked, not for anything queued after it.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return [update for update, ok in zip(self._updates, self._each.tolist(), strict=True) if not ok]
