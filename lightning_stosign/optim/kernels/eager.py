"""The arithmetic of one step on rows of values: one source for the eager and the compiled path, and the same bits."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stosign.optim.numerics.fp8 import decode, encode, widen
from lightning_stosign.optim.numerics.noise import (
    Stream,
    fraction_from_bits,
    hash_bits,
    noise_from_bits,
    uniform_fraction,
    uniform_noise,
)
from lightning_stosign.optim.numerics.rounding import (
    nearest_in_float32,
    power_of_two_scale,
    round_stochastically,
    round_to_nearest,
    round_up,
)
from lightning_stosign.optim.states.state_precision import FP8_DTYPES, StatePrecision


class Constants(NamedTuple):
    """The numbers of a step: Python numbers, or 0-dimensional tensors so that a change of one does not recompile."""

    lr: Any
    decay: Any  # 1 - lr * weight_decay
    weight: Any  # 1 - beta1, the gradient's share of the momentum
    beta2: Any  # the envelope's decay
    finite: Any = True  # a bool tensor where the host does not wait for it: whether to take the step at all


class Noise(ABC):
    """What rows draw: a value an element, a pure function of the stream's key and the element's index."""

    @abstractmethod
    def uniform(self, stream: Stream) -> Tensor:
        """Return ``n ~ Unif(-1, 1)`` in the rows' shape."""

    @abstractmethod
    def fraction(self, stream: Stream) -> Tensor:
        """Return ``r ~ Unif[0, 1)`` in the rows' shape."""


class RunNoise(Noise):
    """The noise of consecutive elements of one parameter, hashed in place.

    Args:
        keys: a noise key a stream.
        start: the first element's index.
        like: the rows.
    """

    def __init__(self, keys: dict[Stream, int], start: int, like: Tensor) -> None:
        self._keys, self._start, self._like = keys, start, like

    def uniform(self, stream: Stream) -> Tensor:
        """Return noise in the rows' shape."""
        like = self._like
        return uniform_noise(self._keys[stream], like.numel(), start=self._start, device=like.device).view(like.shape)

    def fraction(self, stream: Stream) -> Tensor:
        """Return fractions in the rows' shape."""
        like = self._like
        values = uniform_fraction(self._keys[stream], like.numel(), start=self._start, device=like.device)
        return values.view(like.shape)


class RowNoise(Noise):
    """The noise of rows that each have their own key and first index; made of torch operations, to be compiled.

    Args:
        streams: the streams in ``words``.
        words: int32, ``[rows, 2 * streams]``: the ``hash_words`` of each row's parameter.
        sequence: int32, ``[rows]``: the Weyl sequence at each row's first element.
        row: the Weyl sequence of a row's elements, int32.
    """

    def __init__(self, streams: Sequence[Stream], words: Tensor, sequence: Tensor, row: Tensor) -> None:
        self._streams, self._words, self._sequence, self._row = tuple(streams), words, sequence, row

    def _bits(self, stream: Stream) -> Tensor:
        at = 2 * self._streams.index(stream)
        origin, high = (self._words[:, i].unsqueeze(1) for i in (at, at + 1))
        return hash_bits(self._sequence.unsqueeze(1) + self._row, origin, high)

    def uniform(self, stream: Stream) -> Tensor:
        """Return noise in the rows' shape."""
        return noise_from_bits(self._bits(stream))

    def fraction(self, stream: Stream) -> Tensor:
        """Return fractions in the rows' shape."""
        return fraction_from_bits(self._bits(stream))


class StoredRows:
    """Rows of one state during its update.

    Args:
        stored: ``[rows, ...]`` in the storage's dtype, FP8 to be compiled as its bits in int8; changed in place.
        precision: how they are stored.
        scale: float32: 0-dimensional under ``scaling="tensor"``, ``[rows]`` under ``"block"`` (changed in place: a
            row is a block), else None.
        new_scale: under ``scaling="tensor"`` the scale to store with.
        compute_dtype: float32, or float64 for a float64 parameter.
    """

    def __init__(
        self,
        stored: Tensor,
        precision: StatePrecision,
        scale: Tensor | None,
        new_scale: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> None:
        self._stored, self._precision, self._scale, self._new_scale = stored, precision, scale, new_scale
        self._in_place, self._compute_dtype = stored.dtype == compute_dtype, compute_dtype
        self._as_bits = stored.dtype == torch.int8
        self._dtype = precision.dtype if self._as_bits else stored.dtype

    def read(self) -> Tensor:
        """Return the values, to be changed in place and then handed to a write method."""
        if self._in_place:
            return self._stored
        value = decode(self._stored, self._dtype) if self._as_bits else self._widened(self._stored)
        if self._precision.scaling == "none":
            static_scale = self._precision.static_scale
            return value.mul_(1 / static_scale) if static_scale != 1 else value
        assert self._scale is not None
        return value.mul_(self._per_value(self._scale))

    def write(self, value: Tensor, noise: Noise) -> Tensor:
        """Store values to nearest, or at random if the precision says so; return them as stored."""
        if self._in_place:
            return value
        scaled, scale = self._scaled(value)
        if self._precision.stochastic_rounding and self._dtype.itemsize < 4:
            rounded = round_stochastically(scaled, self._dtype, noise.fraction(Stream.ROUND_STATE))
        else:
            rounded = (nearest_in_float32 if self._as_bits else round_to_nearest)(scaled, self._dtype)
        self._store(rounded)
        return self._unscaled(self._widened(rounded), scale)

    def write_up(self, value: Tensor) -> Tensor:
        """Store values >= 0 rounded up and return them as stored."""
        if self._in_place:
            return value
        scaled, scale = self._scaled(value)
        rounded = round_up(scaled, self._dtype) if self._dtype.itemsize < 4 else scaled
        self._store(rounded)
        return self._unscaled(rounded.to(self._compute_dtype), scale)

    def write_decayed(self, value: Tensor, at_least: Tensor, noise: Noise) -> Tensor:
        """Store values >= 0 rounded at random, or ``at_least`` rounded up where that is more; return them as stored.

        Rounding up would undo a decay that does not reach the next lower number, at every step again.
        """
        if self._in_place or self._dtype.itemsize >= 4:
            return self.write_up(value.clamp_min_(at_least))
        scale = self._next_scale(torch.maximum(value, at_least))
        fraction = noise.fraction(Stream.ROUND_ENVELOPE)
        at_random = round_stochastically(self._divided(value, scale), self._dtype, fraction)
        rounded = torch.maximum(at_random, round_up(self._divided(at_least, scale), self._dtype))
        self._store(rounded)
        return self._unscaled(rounded.to(self._compute_dtype), scale)

    def _widened(self, value: Tensor) -> Tensor:
        return (widen(value) if value.dtype in FP8_DTYPES else value).to(self._compute_dtype)

    def _store(self, rounded: Tensor) -> None:
        self._stored.copy_(encode(rounded, self._dtype) if self._as_bits else rounded)

    def _scaled(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self._next_scale(value)
        return self._divided(value, scale), scale

    def _next_scale(self, value: Tensor) -> Tensor | None:
        """Return the scale to store values with; a block's is stored itself."""
        if self._precision.scaling != "block":
            return self._new_scale
        assert self._scale is not None
        amax = value.to(torch.float32).abs().amax(dim=tuple(range(1, value.dim())))
        scale = power_of_two_scale(amax, torch.finfo(self._dtype).max)
        self._scale.copy_(scale)
        return scale

    def _divided(self, value: Tensor, scale: Tensor | None) -> Tensor:
        value = value.to(torch.float32)
        if scale is not None:
            return value * self._per_value(1 / scale)
        static_scale = self._precision.static_scale
        return value * static_scale if static_scale != 1 else value

    def _unscaled(self, rounded: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            return rounded * self._per_value(scale)
        static_scale = self._precision.static_scale
        return rounded * (1 / static_scale) if static_scale != 1 else rounded

    def _per_value(self, scale: Tensor) -> Tensor:
        return scale.view(-1, *(1 for _ in self._stored.shape[1:])) if self._precision.scaling == "block" else scale


class Rule(ABC):
    """An optimizer's update rule; a frozen dataclass of its choices, so that a kernel can be kept for each."""

    maximize: bool

    @property
    @abstractmethod
    def states(self) -> tuple[str, ...]:
        """The names of its states."""

    @property
    @abstractmethod
    def gives_signs(self) -> bool:
        """Whether each value of the direction is -1, 0 or 1."""

    @abstractmethod
    def streams(self) -> tuple[Stream, ...]:
        """Return the noise that the direction draws, besides that of the rounding."""

    @abstractmethod
    def direction(self, grad: Tensor, states: Sequence[StoredRows], noise: Noise, constants: Constants) -> Tensor:
        """Update the states and return the direction to step against, a new tensor that may be changed."""

    @abstractmethod
    def largest(self, grad: Tensor, states: Sequence[StoredRows], constants: Constants) -> Tensor:
        """Return, changing nothing, what :meth:`cover` needs to know of the next states: float32 ``[states]``."""

    @abstractmethod
    def cover(self, largest: Tensor, precision: StatePrecision) -> Tensor:
        """Return each state's next scale under ``scaling="tensor"``, from the :meth:`largest` of all its rows."""


@dataclass(frozen=True)
class UpdateSpec:
    """All that a compiled step is specialised on, besides dtypes."""

    rule: Rule
    precision: StatePrecision
    round_param: bool  # stochastically, a parameter of less than float32
    streams: tuple[Stream, ...] = field(init=False, compare=False)
    """The streams that are drawn from."""

    def __post_init__(self) -> None:
        rounding = ((Stream.ROUND_STATE, self.precision.stochastic_rounding), (Stream.ROUND_PARAM, self.round_param))
        streams = self.rule.streams() + tuple(stream for stream, used in rounding if used)
        object.__setattr__(self, "streams", streams)

    def stored(
        self,
        param: Tensor,
        states: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        new_scales: Tensor | None = None,
    ) -> list[StoredRows]:
        """Return the rows of the states; ``scales`` and ``new_scales`` as in :class:`StoredRows`."""
        compute_dtype = torch.promote_types(param.dtype, torch.float32)
        return [
            StoredRows(
                stored,
                self.precision,
                scale,
                None if new_scales is None else new_scales[i],
                compute_dtype,
            )
            for i, (stored, scale) in enumerate(zip(states, scales, strict=True))
        ]

    def update(
        self, param: Tensor, grad: Tensor, states: Sequence[StoredRows], noise: Noise, constants: Constants
    ) -> None:
        """Update rows of a parameter and of its states in place: ``x = x - lr * weight_decay * x - lr * direction``."""
        grad = usable(grad, param, constants)
        direction = self.rule.direction(grad, states, noise, constants)
        in_place = param.dtype in (torch.float32, torch.float64)
        value = param if in_place else param.to(torch.float32)
        if not is_one(constants.decay):
            value.mul_(constants.decay)
        if self.rule.gives_signs and not isinstance(constants.lr, Tensor):
            value.sub_(direction, alpha=constants.lr)  # one pass instead of two: times a sign is exact
        else:
            value.sub_(direction.mul_(constants.lr))
        if self.round_param and not in_place:
            # A step of lr is often below half the spacing of the parameter's numbers, and would be lost each time.
            value = round_stochastically(value, param.dtype, noise.fraction(Stream.ROUND_PARAM))
        if not in_place:
            param.copy_(value)

    def largest(self, param: Tensor, grad: Tensor, states: Sequence[StoredRows], constants: Constants) -> Tensor:
        """Return :meth:`Rule.largest` of these rows."""
        return self.rule.largest(usable(grad, param, constants), states, constants)


def usable(grad: Tensor, param: Tensor, constants: Constants) -> Tensor:
    """Return the gradient in the dtype to compute in, and 0 in a step that is not to be taken."""
    grad = grad.to(torch.promote_types(param.dtype, torch.float32))
    return grad if constants.finite is True else torch.where(constants.finite, grad, 0.0)


def is_one(factor: Any) -> bool:
    """Return whether a constant is the number 1, so that a pass can be spared."""
    return not isinstance(factor, Tensor) and factor == 1
