"""SignConverted: any optimizer's update, carried out as an unbiased random sign."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_stosign.optim.base import Updates, check_choice, check_seed, loss_of, update_param
from lightning_stosign.optim.numerics.noise import Stream, noise_key, uniform_noise
from lightning_stosign.optim.voted_step import VotedSteps, worker_seed
from lightning_stosign.optim.voting import Ballot, Entry
from lightning_stosign.optim.wrappers._convertible import refuse_unless_convertible, set_lr
from lightning_stosign.optim.wrappers.shadow import BaseFactory, ShadowOptimizer, new_shadow

ENVELOPE = "sign_envelope"


class SignConverted(ShadowOptimizer, VotedSteps):
    r"""Turns another optimizer into a sign method: each coordinate moves by plus or minus ``lr``, on average as there.

    .. math::
        x_{t+1} = x_t - \eta \, \mathrm{sign}(u_t + n_t) - \eta \lambda x_t, \qquad n_t \sim \mathrm{Unif}(-1, 1)

    with :math:`u_t` the update of the other optimizer, the *base*, at learning rate 1 and without weight decay. Where
    it has the form :math:`u_t = m_t / \sigma_t` with :math:`\sigma_t \ge |m_t|`, this is the paper's
    :math:`\mathrm{sign}(m_t + \sigma_t n_t)`, since a positive factor does not change a sign: AdaMax gives
    :math:`\mathrm{sign}(\hat m_t + (u_t + \epsilon) n_t)`, its Algorithm 9. The mean of the sign is :math:`u_t`. Where
    :math:`|u_t| > 1`, as in Adam's first steps, it is the plain sign. Where :math:`u_t = 0` the coordinate stays: the
    base would not move it either, and a parameter that gets no gradient shall not drift.

    When to use it: to see what the sign alone does to a method you know (:class:`StoSignSGD` is this for momentum over
    its running maximum), or to train with steps of one size, as one-bit communication needs. Start from the base's
    learning rate: the mean step is the same.

    The update is taken from a zero-valued float32 shadow of each parameter, so that no digit is lost in a difference of
    parameters; it exists only during the step. The base's states and options are this optimizer's: ``state_dict``,
    monitors and schedulers see them. The noise is a pure function of (seed, step, parameter index, element index), as
    in :class:`StoSignSGD`.

    Not every optimizer has such an update. A trial on made-up gradients refuses what evaluates closures (L-BFGS, SAM),
    takes sparse gradients (SparseAdam), or has updates that depend on the parameters' values (Adafactor, LAMB), on
    where the parameters have been (schedule-free and learning-rate-free methods), or on chance.

    Args:
        params: parameters or param groups (float64, float32, bfloat16 or float16, dense). Options of a group that are
            not named below are the base's, e.g. ``{"params": [...], "betas": (0.8, 0.99)}`` for Adam.
        base: builds the base from param groups: an optimizer class or a :func:`functools.partial` of one. Its learning
            rate and weight decay are set to 1 and 0.
        lr: learning rate, >= 0; a number or a tensor of one element.
        weight_decay: decoupled weight decay :math:`\lambda`, >= 0.
        stochastic: False leaves the noise out: the in-expectation form :math:`x_{t+1} = x_t - \eta u_t - \eta \lambda
            x_t`, which is the base itself with decoupled weight decay.
        seed: of the noise, an int in [0, 2**64); the same on every replica.
        normalize: divide each coordinate's update by its running maximum :math:`\max_{s \le t} |u_s|`. For a base whose
            updates grow with the gradients, as those of SGD with momentum do; such a base is refused without it.
        on_nonfinite: what to do about a gradient with inf or NaN: ``"raise"`` a RuntimeError or ``"skip"`` the step
            with a warning. Parameters and states stay untouched either way.

    Raises:
        ValueError: an option is out of range; a parameter is unsuitable; the base cannot be converted, and why.
        TypeError: an option is of the wrong type; ``base`` does not build an optimizer.

    Example:
        >>> from functools import partial
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SignConverted(model.parameters(), partial(torch.optim.Adamax, betas=(0.9, 0.99)), lr=1e-3)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> (before - model.weight.detach()).div(1e-3).round()
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_inf', 'outer_step', 'step']

    Source:
        arXiv 2604.15416, Algorithms 8 and 9.
    """

    def __init__(
        self,
        params: ParamsT,
        base: BaseFactory,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        stochastic: bool = True,
        seed: int = 0,
        normalize: bool = False,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        if isinstance(base, partial) and base.keywords.get("weight_decay"):
            raise ValueError(
                f"base: weight_decay={base.keywords['weight_decay']} would act on the shadow, which is 0; pass "
                "weight_decay to SignConverted instead"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "stochastic": stochastic,
            "seed": seed,
            "normalize": normalize,
            "on_nonfinite": on_nonfinite,
        }
        super().__init__(params, base, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("stochastic", group["stochastic"], (True, False))
        check_choice("normalize", group["normalize"], (True, False))
        check_seed(group["seed"])

    def _add_to_base(self, group: dict[str, Any], params: list[Tensor]) -> None:
        bounded = group["stochastic"] and not group["normalize"]
        refuse_unless_convertible(self._factory, self._base_options(group), params, normalised=bounded)
        super()._add_to_base(group, params)

    def _shadow(self, param: Tensor) -> Tensor:
        return new_shadow(param)

    def _set_base_options(self, group: dict[str, Any], base_group: dict[str, Any]) -> None:
        set_lr(base_group, 1.0)

    def _step_param(
        self, index: int, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        direction = self._direction(grad, state, group, self._key(index, state, group, Stream.UPDATE))
        # x_{t+1} = x_t - eta direction - eta lambda x_t
        rounding = self._key(index, state, group, Stream.ROUND_PARAM)
        update_param(param, direction, group["lr"], group["weight_decay"], rounding)

    def _direction(
        self, shadow: Tensor, state: dict[str, Any], group: dict[str, Any], key: int, noise: float = 1.0
    ) -> Tensor:
        """Return the direction of a step, from a shadow of 0 after the base's step; the shadow is used up."""
        u = shadow.neg_()  # 0 - u
        sigma: Tensor | None = None
        if group["normalize"]:
            # sigma_t = max(sigma_{t-1}, |u_t|)
            if ENVELOPE not in state:
                state[ENVELOPE] = torch.zeros_like(u)
            sigma = state[ENVELOPE]
            torch.maximum(sigma, u.abs(), out=sigma)
        if not group["stochastic"]:
            return u if sigma is None else u.div_(sigma).masked_fill_(sigma == 0, 0)
        # sign(u_t + sigma_t n_t)
        n = uniform_noise(key, u.numel(), device=u.device).view(u.shape).to(u.dtype).mul_(noise)
        direction = (n if sigma is None else n.mul_(sigma)).add_(u).sign_()
        return direction if sigma is not None else direction.masked_fill_(u == 0, 0)

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._ballot is None:
            return super()._step(closure)
        loss = loss_of(closure)
        self._step_by_vote(self._ballot)
        return loss

    def _gives_signs(self, group: dict[str, Any]) -> bool:
        return bool(group["stochastic"])

    def _begin_vote(self, entries: Sequence[Entry]) -> None:
        self._options_before = [self._base_options(group) for group in self.param_groups]
        self._stepped = self._step_base([entry.param for entry in entries]) if entries else {}
        for entry in entries:
            if entry.step == 1:
                self._refuse_states_that_cannot_be_gathered(entry.param)

    def _write_signs(self, entries: Sequence[Entry], rooms: Sequence[Tensor], ballot: Ballot) -> None:
        for entry, room in zip(entries, rooms, strict=True):
            key = noise_key(worker_seed(entry.group, ballot.rank), entry.step, entry.index, Stream.UPDATE)
            shadow, state = self._stepped.pop(entry.param), self.state[entry.param]
            direction = self._direction(shadow, state, entry.group, key, ballot.noise)
            room.copy_(direction.where(direction != 0, room))

    def _step_together(self, updates: Updates) -> None:
        before, self._options_before = self._options_before, []
        if updates:
            # The base steps again, on the averaged gradients. To one that counts steps in a param group it is one step.
            for group, options in zip(self.param_groups, before, strict=True):
                group.update(options)
            self._step_on(updates)

    def _refuse_states_that_cannot_be_gathered(self, param: Tensor) -> None:
        for name, value in self.state[param].items():
            if type(value) is not Tensor and not isinstance(value, (bool, int, float, str, type(None))):
                raise ValueError(
                    f"base: {type(self.base).__name__} keeps {name} as {type(value).__name__}, but a checkpoint holds "
                    "only plain tensors of each worker, so workers cannot vote on its updates; use "
                    "signs_of='gradients'"
                )
