"""OnlineToNonconvex: an online learner proposes the steps, random scaling makes them count for non-convex functions."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_stosign.optim.base import check_number, check_seed, update_param
from lightning_stosign.optim.numerics.noise import Stream, noise_key, uniform_noise
from lightning_stosign.optim.stosign import StoSignSGD
from lightning_stosign.optim.wrappers.shadow import OUTER_STEP, BaseFactory, ShadowOptimizer, new_shadow

_ALL_PARAMETERS = -1  # the index under which noise is drawn that is one for all parameters


class OnlineToNonconvex(ShadowOptimizer):
    r"""Trains by the steps of an online learner, each stretched by a random factor.

    .. math::
        \Delta_{t+1} &= \mathrm{clip}(\mathrm{learner}(\Delta_t, \nabla f(x_t)), -D, D) \\
        x_{t+1} &= x_t + s_t \Delta_{t+1}, \qquad s_t \sim \mathrm{Exp}(1)

    The learner treats the step :math:`\Delta` as its parameter, and the gradients as those of linear losses. Because
    :math:`s` is exponentially distributed, :math:`\langle \nabla f(x + s \Delta), \Delta \rangle` is an unbiased
    estimate of the change of :math:`f`, without any smoothness. So a learner of small regret finds points
    of small generalised stationarity (:class:`~lightning_stosign.health.GeneralizedStationarity`): on average over a
    window of N steps, which stay within about N D of their mean.

    When to use it: for functions that are neither smooth nor convex, such as a ReLU network's loss, where this comes
    with a guarantee. As in momentum methods :math:`\Delta` remembers past gradients; ``lr / radius`` is how fast it
    turns around. A window of :math:`N \propto T^{4/7}` steps and a radius of :math:`D \propto T^{-5/7}` balance the
    bound for T steps in all, which then falls as :math:`T^{-2/7}`; the learner's step is
    :math:`\eta \propto D / \sqrt{N}`.

    The random factor is one for all parameters, and a pure function of (seed, step). States: the learner's,
    ``delta`` and, with a window, ``window_mean``, all in float32 at least.

    Args:
        params: parameters or param groups. Options of a group that are not named below are the learner's.
        learner: builds the online learner from param groups: an optimizer class or a :func:`functools.partial` of one.
            Its learning rate, weight decay and seed are the ones given here.
        lr: the learner's learning rate :math:`\eta`, >= 0: how far :math:`\Delta` moves in a step.
        weight_decay: of :math:`\Delta`, >= 0: the learner's regularisation, which forgets old gradients.
        radius: :math:`D` > 0, the largest magnitude of a coordinate of :math:`\Delta`.
        window: N >= 1: keep the mean of the parameters at which the gradients of the current window of N steps were
            taken, for :meth:`averaged`. None: keep none.
        seed: of the random factors and of the learner's noise, an int in [0, 2**64); the same on every replica.
        on_nonfinite: what to do about a gradient with inf or NaN: ``"raise"`` a RuntimeError or ``"skip"`` the step
            with a warning. Parameters and states stay untouched either way.

    Raises:
        ValueError: an option is out of range; a parameter is unsuitable.
        TypeError: an option is of the wrong type; ``learner`` does not build an optimizer.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = OnlineToNonconvex([x], lr=0.01, radius=0.02, window=50)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     x.abs().sum().backward()
        ...     optimizer.step()
        >>> with optimizer.averaged():
        ...     print(bool((x.abs() < 0.2).all()))
        True

    Source:
        arXiv 2604.15416, Algorithm 12; A. Cutkosky, H. Mehta, F. Orabona, "Optimal Stochastic Non-smooth Non-convex
        Optimization through Online-to-Non-convex Conversion", ICML 2023; Q. Zhang, A. Cutkosky, "Random Scaling and
        Momentum for Non-smooth Non-convex Optimization", ICML 2024.
    """

    _argument = "learner"
    _scale: float  # this step's s

    def __init__(
        self,
        params: ParamsT,
        learner: BaseFactory = StoSignSGD,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        radius: float = 1e-2,
        window: int | None = None,
        seed: int = 0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "radius": radius,
            "window": window,
            "seed": seed,
            "on_nonfinite": on_nonfinite,
        }
        super().__init__(params, learner, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_seed(group["seed"])
        check_number("radius", group["radius"])
        if group["radius"] == 0:
            raise ValueError("radius=0 must be greater than 0")
        window = group["window"]
        if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
            raise TypeError(f"window={window!r} must be an int or None")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1")

    def _shadow(self, param: Tensor) -> Tensor:
        state = self.state[param]
        return state["delta"] if "delta" in state else new_shadow(param)

    def _set_base_options(self, group: dict[str, Any], base_group: dict[str, Any]) -> None:
        for option in ("lr", "weight_decay", "seed"):
            if option in base_group:
                base_group[option] = group[option]

    def _step_base(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        finished = max(int(self.state[param].get(OUTER_STEP, 0)) for param in params)
        key = noise_key(self.param_groups[0]["seed"], finished + 1, _ALL_PARAMETERS)
        uniform = (1 + uniform_noise(key, 1).item()) / 2
        self._scale = -math.log(uniform)
        return super()._step_base(params)

    def _step_param(
        self, index: int, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if group["window"] is not None:
            self._average(param, state, group["window"])
        delta = grad.clamp_(-group["radius"], group["radius"])  # the shadow, as the learner left it
        state["delta"] = delta
        # x <- x + s Delta
        rounding = self._key(index, state, group, Stream.ROUND_PARAM)
        update_param(param, delta.neg(), self._scale, 0.0, rounding)

    def _average(self, param: Tensor, state: dict[str, Any], window: int) -> None:
        """Take the parameter, still where its gradient was taken, into the window's mean."""
        seen = (int(state[OUTER_STEP]) - 1) % window
        value = param.detach().to(torch.promote_types(param.dtype, torch.float32))
        if seen == 0:
            state["window_mean"] = value.clone()
        else:
            state["window_mean"].lerp_(value, 1 / (seen + 1))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context, let each parameter be its mean over the window so far; afterwards, itself again.

        Parameters without a mean (no window, or no gradient yet) keep their values.
        """
        own: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            for param, state in self.state.items():
                if "window_mean" in state:
                    own[param] = param.detach().clone()
                    param.copy_(state["window_mean"])
        try:
            yield
        finally:
            with torch.no_grad():
                for param, value in own.items():
                    param.copy_(value)
