"""What a step has to do to one parameter."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_stosign.optim.kernels.eager import Constants, UpdateSpec
from lightning_stosign.optim.numerics.noise import Stream
from lightning_stosign.optim.sharding import Shard, local, shard_of
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, TENSOR_SCALE_SUFFIX

Path = Literal["native", "compiled", "eager"]

SEGMENT = 1 << 32  # elements that share a noise key


@dataclass
class Job:
    """One parameter's update in this step.

    Args:
        whole: the parameter.
        param: this process's part of it.
        grad: likewise of its gradient.
        state: its entry in ``optimizer.state``.
        spec: the update and how it is stored.
        keys: this step's noise keys.
        constants: the numbers of the step.
        path: how to update it where that is possible: else it is updated eagerly.
        numbers: the numbers of the step for the compiled path, from :func:`fused.as_tensor`.
    """

    whole: Tensor
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    spec: UpdateSpec
    keys: dict[Stream, int]
    constants: Constants
    path: Path
    numbers: Tensor | None = None

    def __post_init__(self) -> None:
        names = self.spec.rule.states
        self.stored: list[Tensor] = [local(self.state[name]) for name in names]
        """This process's parts of the state tensors."""
        self.scales: list[Tensor | None] = [self.state.get(name + SCALE_SUFFIX) for name in names]
        """The scales of the state tensors."""
        self.shard: Shard | None = shard_of(self.whole)
        """Which part of the parameter this process has, if not all of it."""
        self.start: int | None = 0
        """The row-major index in the parameter of its first value here; None if they do not follow each other."""
        if self.shard is not None and self.shard.starts.numel() > 0:
            self.start = int(self.shard.starts) if self.shard.starts.numel() == 1 else None

    @property
    def tensor_scales(self) -> list[Tensor]:
        """The scales that depend on all of a state's values, where there are such."""
        suffix = TENSOR_SCALE_SUFFIX if self.spec.precision.is_fp4 else SCALE_SUFFIX
        return [self.state[name + suffix] for name in self.spec.rule.states]
