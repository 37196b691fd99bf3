"""ALIAS: sign descent that finds its step size by itself."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_stosign.optim.alias.estimates import CHECK_BOUND_EVERY, check_bound, first_estimates, next_estimates
from lightning_stosign.optim.alias.same_batch import gradients_at
from lightning_stosign.optim.alias.totals import Part, totals
from lightning_stosign.optim.base import StrictOptimizer, check_beta, check_choice, check_number, loss_of
from lightning_stosign.optim.numerics.noise import Stream, noise_key
from lightning_stosign.optim.sharding import local, local_grad
from lightning_stosign.optim.states.storage import round_by_noise

# Options of the whole optimizer. They live in the param groups, as all options do, but cannot differ between them.
_GLOBAL = ("loss_lower_bound", "d0", "same_batch", "curvature", "measure_every", "accumulate_grad_batches")


class ALIAS(StrictOptimizer):
    r"""Moves each coordinate against the sign of its gradient, by a step size that it finds itself: there is no ``lr``.

    .. math::
        \eta_t &= \eta_{t-1} + \frac{\|g_t - g_{t-1}\|_1}{\|x_t - x_{t-1}\|_\infty} \\
        \tilde d_t &= \tilde d_{t-1} + \langle g_t, x_{t-1} - x_t \rangle, \qquad d_t = \max(d_{t-1}, \tilde d_t) \\
        x_{t+1} &= x_t - \gamma_t \, \mathrm{sign}(g_t), \qquad \gamma_t = \sqrt{d_t / \eta_t}

    :math:`\eta_t` adds up the curvature met so far, :math:`d_t` estimates by how much the loss can fall (Option I).
    With ``loss_lower_bound`` it is known instead: :math:`d_t = f(x_0) - f_{low}` (Option II). Norms and inner product
    are over all parameters of the optimizer, on all processes.

    **The same mini-batch.** Both gradients of a difference must come from one mini-batch, otherwise their noise is
    taken for curvature and the step size dies. So ``step`` runs the closure twice, first at :math:`x_{t-1}` and then at
    :math:`x_t`, with the same random numbers (torch's; draw others outside of the closure). Lightning's automatic
    optimization hands the closure over by itself; in a loop of your own, or in manual optimization, pass a closure that
    clears the gradients, computes the loss, calls ``backward`` and returns the loss. What Lightning does around a
    closure (``training_step``, ``on_before_optimizer_step``, clipping) it does both times; logged is the loss at
    :math:`x_t`. Between the measurements the last curvature counts on: ``measure_every=10`` costs 1.1 gradients a step
    instead of 2. :math:`x_{t-1}` is not stored but computed back from :math:`x_t` and the direction of the step; a
    measurement takes memory for two copies of the parameters and one of the gradients.

    **A sharper step size.** The paper's :math:`\eta_t` bounds what any step of one size can meet, its
    :math:`\tilde d_t` what has been gained if the loss is convex, and its :math:`\gamma_t` is :math:`\sqrt 2` below the
    one that makes its bound least. Over many parameters all three make the steps too small. ``curvature="step"``
    measures what the steps did meet, at the same cost:

    .. math::
        c_t = \frac{\langle g_t - g_{t-1}, x_t - x_{t-1} \rangle}{\|x_t - x_{t-1}\|_\infty^2}, \qquad
        \eta_t = \eta_{t-1} + \max(c_t, 0), \qquad \gamma_t = \sqrt{2 d_t / \eta_t}

    and adds :math:`c_t \|x_t - x_{t-1}\|_\infty^2 / 2` to :math:`\tilde d_t`, which then is the decrease of the loss to
    the second order. This is the package's own, not the paper's.

    **Variants.** ``momentum`` takes the sign of the averaged gradients. ``beta2`` makes the step Adam's,
    :math:`m_t / \sqrt{v_t}`, with averages in which a gradient weighs :math:`d_t` (no bias correction). Without
    momentum the optimizer stores one byte a parameter (the sign), with momentum 4, with ``beta2`` 8.

    **The first step** has no difference yet: it is the one that would lower a linear loss by ``d0``, and so is every
    step until a curvature greater than 0 has been met.

    **Schedules** set the group's ``lr``, which starts at 1 and multiplies :math:`\gamma_t`. The step size of the last
    step is ``param_groups[0]["step_size"]``, a tensor.

    Args:
        params: parameters or param groups (float64, float32, bfloat16 or float16, dense).
        momentum: :math:`\beta_1` in [0, 1).
        beta2: None for sign steps, or Adam-style steps with this :math:`\beta_2` in [0, 1), for instance 0.999.
        loss_lower_bound: None for Option I; else a number >= 0 that the loss cannot go below (Option II). Of a loss
            that can be negative no such number is known: use Option I.
        d0: > 0, the first estimate of how far the loss can fall; only few steps depend on it. None: a thousandth of
            the magnitude of the first loss, or 0.001 where the closure returns none.
        weight_decay: decoupled weight decay :math:`\lambda`, >= 0: subtracts :math:`\gamma_t \lambda x_t` too.
        same_batch: False compares with the stored gradient of the step before (4 bytes a parameter), without a
            closure. Right only where every step sees the same data, as with full gradients.
        curvature: ``"norm"``, the paper's, or ``"step"``: along the step only (above).
        measure_every: the curvature is measured in the first ``measure_every`` steps and then in every so many, >= 1.
        accumulate_grad_batches: as in the Trainer. The closure sees the last micro-batch only, a share of 1 / n of the
            gradient, so the measured difference counts n times. :class:`StoSignMixin` sets it.
        on_nonfinite: what to do about a gradient with inf or NaN: ``"raise"`` a RuntimeError or ``"skip"`` the step
            with a warning. Parameters and states stay untouched either way.

    Raises:
        ValueError: an option is out of range, or an option of the whole optimizer differs between param groups; a
            parameter is sparse, complex or not floating point.
        TypeError: an option is of the wrong type.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = ALIAS([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(200)]
        >>> losses[0], losses[-1] < 0.1
        (13.0, True)

    Source:
        arXiv 2506.03725, Algorithms 2 (Options I and II) and 3.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        momentum: float = 0.0,
        beta2: float | None = None,
        loss_lower_bound: float | None = None,
        d0: float | None = None,
        weight_decay: float = 0.0,
        same_batch: bool = True,
        curvature: Literal["norm", "step"] = "norm",
        measure_every: int = 10,
        accumulate_grad_batches: int = 1,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        defaults = {
            "lr": 1.0,
            "momentum": momentum,
            "beta2": beta2,
            "loss_lower_bound": loss_lower_bound,
            "d0": d0,
            "weight_decay": weight_decay,
            "same_batch": same_batch,
            "curvature": curvature,
            "measure_every": measure_every,
            "accumulate_grad_batches": accumulate_grad_batches,
            "on_nonfinite": on_nonfinite,
            "step_size": None,  # of the last step, lr included: a tensor
            "estimates": None,  # what all groups share, see estimates.py
            "accumulated_batches": None,  # micro-batches in this step's gradient, if not accumulate_grad_batches
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_beta("momentum", group["momentum"])
        if group["beta2"] is not None:
            check_beta("beta2", group["beta2"])
        if group["loss_lower_bound"] is not None:
            check_number("loss_lower_bound", group["loss_lower_bound"])
        if group["d0"] is not None:
            check_number("d0", group["d0"])
            if group["d0"] == 0:
                raise ValueError(f"d0={group['d0']} must be greater than 0, or None")
        check_choice("same_batch", group["same_batch"], (True, False))
        check_choice("curvature", group["curvature"], ("norm", "step"))
        for name in ("measure_every", "accumulate_grad_batches"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an int")
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in _GLOBAL:
            for first in getattr(self, "param_groups", [])[:1]:
                if group[name] != first[name]:
                    raise ValueError(f"{name}={group[name]!r} must be {first[name]!r} as in the first param group")

    def _groups_changed(self, changed: list[dict[str, Any]]) -> None:
        super()._groups_changed(changed)
        # Any group may be the first to go.
        estimates = next((g["estimates"] for g in self.param_groups if g["estimates"] is not None), None)
        for group in self.param_groups:
            group["estimates"] = estimates
            if group["step_size"] is None:
                group["step_size"] = next(
                    (g["step_size"] for g in self.param_groups if g["step_size"] is not None), None
                )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: clears the gradients, reevaluates the model, calls ``backward`` and returns the loss. In steps that
                measure the curvature it is called twice, last at the parameters as they are.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: there is no closure, or it returns no loss where one is needed; a gradient is sparse, or is
                not finite under ``on_nonfinite="raise"``. No parameter and no state has been touched then.
        """
        return super().step(closure)

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        options = self.param_groups[0]
        if closure is None and options["same_batch"] and any(float(group["lr"]) != 0 for group in self.param_groups):
            raise RuntimeError(
                "ALIAS needs optimizer.step(closure): it measures the curvature by a second gradient on the same "
                "mini-batch. Lightning passes a closure in automatic optimization, except under precision='16-mixed' "
                "(use 'bf16-mixed'). With full gradients, same_batch=False does without."
            )
        points: dict[Tensor, Tensor] = {}
        before: dict[Tensor, Tensor | None] = {}
        if closure is not None and self._measures():
            moved = ((param, self._point_before(index, param, group)) for index, param, group in self._params())
            points = {param: point for param, point in moved if point is not None}
            before = dict(zip(points, gradients_at(list(points), list(points.values()), closure), strict=True))
        # Without a closure: a step of size 0, by which torch.distributed.checkpoint makes the states that it loads.
        assumed = options["loss_lower_bound"] if options["same_batch"] else None
        loss = loss_of(closure)
        updates = list(self._params_with_grad())
        if updates and self._gradients_are_finite(updates):
            self._estimate(assumed if closure is None else loss, points, before)
            for index, param, group in updates:
                grad = local_grad(param).to(torch.promote_types(param.dtype, torch.float32))
                self._step_param(index, param, grad, self.state[param], group)
        return loss

    def _measures(self) -> bool:
        """Return whether this step computes a second gradient."""
        options = self.param_groups[0]
        if not options["same_batch"] or options["estimates"] is None:
            return False
        step, every = options["estimates"]["step"], options["measure_every"]
        return step <= every or step % every == 0

    def _params(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Yield (index in the optimizer, parameter, group) of all parameters."""
        everything = ((param, group) for group in self.param_groups for param in group["params"])
        return ((index, param, group) for index, (param, group) in enumerate(everything))

    def _point_before(self, index: int, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return this process's part of x_{t-1} = (x_t + s direction) / (1 - s lambda), None if the step left it alone.

        Args:
            index: the parameter's position among all parameters of the optimizer.
            param: the parameter.
            group: its param group, which still has the last step's size s.
        """
        state, estimates = self.state.get(param), self.param_groups[0]["estimates"]
        if not state or estimates is None or int(state["step"]) != estimates["step"]:
            return None
        s = group["step_size"].to(param.device)
        value = self._direction(state, param, group).mul_(s).add_(local(param)).div_(1 - s * group["weight_decay"])
        return _rounded(value, param, index, estimates["step"])

    def _direction(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the direction of a parameter's last step, as its states tell."""
        if group["beta2"] is not None:
            # m_t / sqrt(v_t), 0 where v_t = 0
            v = local(state["exp_avg_sq"])
            return local(state["exp_avg"]).div(v.sqrt()).masked_fill_(v == 0, 0)
        state_name = next(name for name in ("exp_avg", "prev_grad", "sign") if name in state)
        return local(state[state_name]).sign().to(_compute_dtype(param))

    def _estimate(self, loss: Any, points: dict[Tensor, Tensor], before: dict[Tensor, Tensor | None]) -> None:
        """Update what is known of curvature and gap, and each group's step size."""
        options, device = self.param_groups[0], next(param.device for _, param, _ in self._params())
        parts = [self._part(index, param, group, points, before) for index, param, group in self._params()]
        grad_sum, decrease, difference, motion = totals(parts, device).unbind()
        loss = None if loss is None else torch.as_tensor(loss, dtype=grad_sum.dtype, device=device).detach()
        estimates = options["estimates"]
        if estimates is None:
            estimates = first_estimates(loss, options, grad_sum)
        elif estimates["step"] % CHECK_BOUND_EVERY == 0:
            estimates = check_bound(estimates, loss, options)
        # The measured difference is that of the last micro-batch, one of so many that make the gradient.
        batches = options["accumulated_batches"] or options["accumulate_grad_batches"]
        estimates, gamma = next_estimates(
            estimates,
            grad_sum,
            decrease,
            difference * batches if before or not options["same_batch"] else None,
            motion,
            along_step=options["curvature"] == "step",
        )
        for group in self.param_groups:
            group["estimates"] = estimates
            group["step_size"] = gamma * local(group["lr"])

    def _part(
        self,
        index: int,
        param: Tensor,
        group: dict[str, Any],
        points: dict[Tensor, Tensor],
        before: dict[Tensor, Tensor | None],
    ) -> Part:
        """Return what a parameter adds to :func:`next_estimates`' gradient, decrease, difference and motion."""
        zero = torch.zeros((), device=param.device)
        grad_sum = decrease = difference = largest = zero
        grad = None
        if param.grad is not None and param.numel() > 0:
            grad = local_grad(param).to(_compute_dtype(param))
            grad_sum = grad.abs().sum()
        point = points.get(param) if points else self._point_before(index, param, group)
        if point is not None and point.numel() > 0:
            motion = point.to(_compute_dtype(param)) - local(param)
            largest = motion.abs().amax()
            if grad is not None:
                decrease = (motion * grad).sum()
                other = before.get(param) if group["same_batch"] else local(self.state[param].get("prev_grad"))
                if other is not None:
                    along = group["curvature"] == "step"
                    difference = ((other - grad) * motion).sum() if along else (grad - other).abs().sum()
        return Part(param, (grad_sum, decrease, difference), largest)

    def _step_param(
        self, index: int, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        beta1, beta2, step = group["momentum"], group["beta2"], self.param_groups[0]["estimates"]["step"]
        self._init_state(state, param, group)
        # The optimizer's step that moved the parameter last. On the CPU, where reading it costs no synchronisation.
        state["step"] = torch.tensor(step, dtype=torch.int64, device="cpu")
        if not group["same_batch"]:
            local(state["prev_grad"]).copy_(grad)
        if beta2 is not None:
            # m_t = beta1 m_{t-1} + (1 - beta1) d_t g_t,  v_t = beta2 v_{t-1} + (1 - beta2) d_t^2 g_t^2
            grad = grad * self.param_groups[0]["estimates"]["d"].to(param.device)
            local(state["exp_avg_sq"]).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if "exp_avg" in state:
            # m_t = beta1 m_{t-1} + (1 - beta1) g_t
            local(state["exp_avg"]).lerp_(grad, 1 - beta1)
        elif "sign" in state:
            local(state["sign"]).copy_(grad.sign())
        # x_{t+1} = x_t - gamma_t direction - gamma_t lambda x_t
        s = group["step_size"].to(param.device)
        x = local(param).to(_compute_dtype(param))
        value = x.mul(1 - s * group["weight_decay"]).sub_(self._direction(state, param, group).mul_(s))
        local(param).copy_(_rounded(value, param, index, step))

    def _init_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        names = [] if group["same_batch"] else ["prev_grad"]
        if group["momentum"] > 0 or group["beta2"] is not None:
            names.append("exp_avg")
        if group["beta2"] is not None:
            names.append("exp_avg_sq")
        for name in names or ["sign"]:
            if name not in state:
                dtype = torch.int8 if name == "sign" else _compute_dtype(param)
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _compute_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _rounded(value: Tensor, param: Tensor, index: int, step: int) -> Tensor:
    """Return values in the parameter's dtype; in 16 bits rounded stochastically, or small steps would be lost."""
    if param.dtype == value.dtype:
        return value
    return round_by_noise(value, param.dtype, noise_key(0, step, index, Stream.ROUND_PARAM))
