"""Checking gradients on an accelerator without making the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stosign.optim.kernels.job import Job


def defers(jobs: Sequence[Job]) -> bool:
    """Return whether the answer would have to come from one accelerator."""
    devices = {job.param.device for job in jobs}
    return len(devices) == 1 and devices.pop().type != "cpu"


class DeferredCheck:
    """Which gradients of a step are not finite: known on their device at once, on the host when it next asks.

    Args:
        nonfinite: float32 ``[gradients]`` of 0 and 1, on their device, the same on all processes.
        found_inf: what a GradScaler has found, float32 ``[]``, where one is used: it deals with that itself.
    """

    def __init__(self, nonfinite: Tensor, found_inf: Tensor | None) -> None:
        scaler = nonfinite.new_zeros(1) if found_inf is None else found_inf.to(nonfinite).reshape(1)
        each = torch.cat([nonfinite, scaler])
        self.found_inf = each.amax()
        """float32 ``[]`` on the gradients' device: not 0 if the step is not to be taken."""
        self._each = each.to("cpu", non_blocking=True)
        self._copied: torch.Event | None = None
        if each.device.type != "cpu":
            self._copied = torch.Event(each.device.type)
            self._copied.record()

    def answer(self) -> tuple[bool, list[bool]]:
        """Return whether the step was taken, and which gradients are to be reported as not finite.

        Waits for the device to have checked them, not for anything queued after that.
        """
        if self._copied is not None:
            self._copied.synchronize()
        *each, scaler = self._each.tolist()
        return not any(each) and not scaler, [bool(flag) and not scaler for flag in each]
