"""What a backend is handed: the kind of a step, its numbers, and the tensors of one parameter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from lightning_stosign.optim.numerics.noise import Stream
from lightning_stosign.optim.sharding import Shard, local, local_grad, shard_of
from lightning_stosign.optim.states.state_precision import StatePrecision
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, TENSOR_SCALE_SUFFIX

SEGMENT = 1 << 32  # elements that share a noise key


@dataclass(frozen=True)
class Kind:
    r"""What a step does to a parameter, apart from its numbers: all that a kernel is compiled for, besides dtypes.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        G_t &= \max(\beta_2 G_{t-1}, |m_t|) \\
        x_{t+1} &= x_t - \eta \, \mathrm{direction} - \eta \lambda x_t

    A backend must refuse each combination that it does not implement, by these fields.

    Args:
        momentum: whether there is a state ``exp_avg``; else :math:`m_t = g_t`.
        envelope: whether there is a state ``exp_inf``, :math:`G_t`.
        stochastic: the direction is :math:`\mathrm{sign}(m_t + G_t n_t)`. Otherwise it is :math:`m_t / G_t` with an
            envelope, and :math:`\mathrm{sign}(m_t)` without one.
        maximize: whether :math:`-g_t` takes the place of :math:`g_t`.
        decays: whether :math:`\beta_2 < 1`.
        precision: how the states are stored. A float64 parameter's float32 states may be stored in float64 instead.
        round_param: whether a bfloat16 or float16 parameter is rounded stochastically; else to nearest.
    """

    momentum: bool
    envelope: bool
    stochastic: bool
    maximize: bool
    decays: bool
    precision: StatePrecision
    round_param: bool
    states: tuple[str, ...] = field(init=False, compare=False)
    """The names of the states, in the order in which a job lists them."""
    streams: tuple[Stream, ...] = field(init=False, compare=False)
    """What noise is drawn for, in ascending order."""

    def __post_init__(self) -> None:
        if not self.envelope and (self.stochastic or self.decays):
            raise ValueError(f"stochastic={self.stochastic} and decays={self.decays} need envelope=True")
        states = (("exp_avg", self.momentum), ("exp_inf", self.envelope))
        narrow = self.precision.dtype.itemsize < 4
        streams = (
            (Stream.UPDATE, self.stochastic),
            (Stream.ROUND_STATE, self.momentum and self.precision.stochastic_rounding),
            (Stream.ROUND_PARAM, self.round_param),
            # Rounding up would undo the decay. In four bits, it is not kept even on average.
            (Stream.ROUND_ENVELOPE, self.decays and narrow and not self.precision.is_fp4),
        )
        object.__setattr__(self, "states", tuple(name for name, exists in states if exists))
        object.__setattr__(self, "streams", tuple(stream for stream, is_drawn in streams if is_drawn))

    @property
    def gives_signs(self) -> bool:
        """Whether each value of the direction is -1, 0 or 1."""
        return self.stochastic or not self.envelope

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the states have scales that depend on all their values, so that these are seen before the update."""
        return self.precision.has_tensor_scale and bool(self.states)


kind_of = lru_cache(maxsize=256)(Kind)
"""The same, but equal kinds are one object."""


class Numbers(NamedTuple):
    """The numbers of a step: Python numbers, or 0-dimensional tensors on the parameter's device for a tensor ``lr``."""

    lr: Any
    decay: Any  # 1 - lr * weight_decay
    weight: float  # 1 - beta1, the gradient's share of the momentum
    beta2: float


@dataclass(eq=False, slots=True)
class Job:
    """One parameter's update in this step. Tensors hold this process's values and are updated in place.

    Args:
        kind: what to do.
        numbers: with which numbers; jobs of a param group and a device share the object.
        keys: this step's noise key of each of the kind's streams.
        whole: the parameter, a DTensor if it is sharded.
        param: its values, any strides.
        grad: the gradient's values, any strides; usually of the parameter's dtype.
        stored: the values of ``kind.states``, each with the parameter's strides, or packed bytes in four bits.
        scales: the states' scales, float32: ``[]`` under ``scaling="tensor"``, ``[blocks]`` (E4M3 in four bits) under
            ``"block"``, else None.
        tensor_scales: the states' scales that depend on all values of the whole, float32 ``[]``; none if the kind has
            none. The dispatch writes them after the update.
        fused: the param group's option: False for an eager update, True for a backend's wherever it can, None where
            that is worth it.
        start: the row-major index in the whole of the first value; None if they do not follow each other in it.
        shard: which values of the whole they are, if not all.
    """

    kind: Kind
    numbers: Numbers
    keys: Mapping[Stream, int]
    whole: Tensor
    param: Tensor
    grad: Tensor
    stored: list[Tensor]
    scales: list[Tensor | None]
    tensor_scales: list[Tensor]
    fused: bool | None = None
    start: int | None = 0
    shard: Shard | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        numbers: Numbers,
        keys: Mapping[Stream, int],
        param: Tensor,
        state: Mapping[str, Any],
        fused: bool | None,
    ) -> "Job":
        """Return a parameter's job, given its entry in ``optimizer.state``."""
        scales = [state.get(name + SCALE_SUFFIX) for name in kind.states]
        suffix = TENSOR_SCALE_SUFFIX if kind.precision.is_fp4 else SCALE_SUFFIX
        of_tensors = [state[name + suffix] for name in kind.states] if kind.has_tensor_scale else []
        stored = [local(state[name]) for name in kind.states]
        values = local(param), local_grad(param)
        shard = shard_of(param)
        return cls(kind, numbers, keys, param, *values, stored, scales, of_tensors, fused, _start(shard), shard)


def _start(shard: Shard | None) -> int | None:
    """Return the index in the whole of this process's first value, if the others follow it."""
    if shard is None or shard.starts.numel() == 0:
        return 0
    return int(shard.starts) if shard.starts.numel() == 1 else None
