"""Running another optimizer on shadows of the parameters, to have its updates instead of its new parameters."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_stosign._plain import plain
from lightning_stosign.optim.base import StrictOptimizer, Updates, loss_of
from lightning_stosign.optim.numerics.noise import Stream, noise_key

# What builds the other optimizer of param groups: its class, or a functools.partial of it.
BaseFactory: TypeAlias = Callable[..., Optimizer]

OUTER_STEP = "outer_step"  # the base counts its own steps as "step"


class ShadowOptimizer(StrictOptimizer):
    """Base of the optimizers that let another one, the base, step on shadows of their parameters.

    The base's state of a shadow *is* this optimizer's state of the parameter, and the base's options are options of
    this one's param groups. So torch's state_dict holds both, and whatever reads or changes states and options
    (checkpoints, monitors, schedulers of betas) reaches the base.

    Args:
        params: parameters or param groups; options that are not this optimizer's own go to the base.
        factory: builds the base from param groups.
        defaults: this optimizer's own options, ``seed`` among them.
    """

    base: Optimizer
    _argument = "base"  # what a subclass calls the factory

    def __init__(self, params: ParamsT, factory: BaseFactory, defaults: dict[str, Any]) -> None:
        if not callable(factory):
            raise TypeError(f"{self._argument}={factory!r} must be a function of param groups, e.g. an optimizer class")
        self._factory = factory
        self._shadows: dict[Tensor, Tensor] = {}
        self._own_options = frozenset({"params", "param_names", *defaults})
        super().__init__(params, defaults)
        self.defaults = {**self.base.defaults, **self.defaults}

    _count = OUTER_STEP

    @abstractmethod
    def _shadow(self, param: Tensor) -> Tensor:
        """Return the values that the base shall change in its next step on a parameter, in at least float32."""

    @abstractmethod
    def _set_base_options(self, group: dict[str, Any], base_group: dict[str, Any]) -> None:
        """Set the base's learning rate and weight decay; its other options are already the group's."""

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._check_param(param, group)
        if isinstance(param, DTensor):
            raise ValueError(
                f"params: a parameter of shape {list(param.shape)} is a DTensor; accepted by "
                f"{type(self).__name__}: unsharded parameters, since the base steps on plain copies, and a base may "
                "compute on a shard what it does not compute on the whole"
            )

    @abstractmethod
    def _step_param(
        self, index: int, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and this optimizer's own states of it; ``grad`` is the base's shadow after its step."""

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = loss_of(closure)
        updates = list(self._params_with_grad())
        if updates and self._gradients_are_finite(updates):
            self._step_on(updates)
        return loss

    def _step_on(self, updates: Updates) -> None:
        """Step on parameters whose gradients are finite."""
        shadows = self._step_base([param for _, param, _ in updates])
        for index, param, group in updates:
            self._advance([param])
            self._step_param(index, param, shadows[param], self.state[param], group)

    def _steps_taken(self, param: Tensor) -> int:
        return int(self.state[param][OUTER_STEP])

    def _advance(self, params: Sequence[Tensor]) -> None:
        """Count a step, after the base's: to one that initialises empty states, these must have looked empty."""
        for param in params:
            state = self.state[param]
            if OUTER_STEP not in state:
                state[OUTER_STEP] = torch.zeros((), dtype=torch.int64, device="cpu")
            state[OUTER_STEP] += 1

    def _step_base(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """Let the base step on the shadows of parameters with gradients; return what it made of them."""
        for group, base_group in zip(self.param_groups, self.base.param_groups, strict=True):
            base_group.update(self._base_options(group))
            self._set_base_options(group, base_group)
        shadows = {param: self._shadows[param] for param in params}
        for param, shadow in shadows.items():
            assert param.grad is not None
            if OUTER_STEP in self.state[param] and self.state[param][OUTER_STEP] == 0:
                self.state[param].clear()  # of a rehearsal: the base makes its own again
            if shadow.is_meta:  # made before its parameter was materialised
                torch.utils.swap_tensors(shadow, torch.nn.Parameter(new_shadow(param)))
            shadow.data = self._shadow(param)
            shadow.grad = param.grad.to(shadow.dtype)
            self.base.state[shadow] = self.state[param]
        self.base.step()
        values = {param: shadow.detach() for param, shadow in shadows.items()}
        for shadow in shadows.values():
            shadow.grad = None
            if not isinstance(shadow, DTensor):
                shadow.data = shadow.new_empty(0)  # between steps it takes no memory
        for group, base_group in zip(self.param_groups, self.base.param_groups, strict=True):
            group.update(self._base_options(base_group))  # some optimizers count steps in a param group
        return values

    def _key(self, index: int, state: dict[str, Any], group: dict[str, Any], stream: Stream) -> int:
        """Return a parameter's noise key at this step."""
        return noise_key(group["seed"], int(state[OUTER_STEP]), index, stream)

    def _groups_changed(self, changed: list[dict[str, Any]]) -> None:
        """Let the base have shadows of this optimizer's parameters, grouped alike."""
        super()._groups_changed(changed)
        old = {tuple(map(id, group["params"])): group for group in self.base.param_groups} if self._shadows else {}
        base_groups = []
        for group in self.param_groups:
            new = [param for param in group["params"] if param not in self._shadows]
            if new or "base" not in self.__dict__:
                self._add_to_base(group, new)
            shadows = [self._shadows[param] for param in group["params"]]
            base_group = old.get(tuple(map(id, shadows)), {**self.base.defaults, "params": shadows})
            base_group.update(self._base_options(group))
            base_groups.append(base_group)
        self.base.param_groups[:] = base_groups
        present = {param for group in self.param_groups for param in group["params"]}
        for param in [param for param in self._shadows if param not in present]:
            self.base.state.pop(self._shadows.pop(param), None)

    def _add_to_base(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Make shadows of new parameters; options and states that a base makes of them become this optimizer's."""
        shadows: list[Tensor] = [torch.nn.Parameter(new_shadow(param)) for param in params]
        # A new base, of which only states and options stay: many an optimizer makes states in its constructor alone.
        base = build_base(self._factory, {"params": shadows, **self._base_options(group)}, self._argument)
        if "base" not in self.__dict__:
            self.base = base
        for option, value in self._base_options(base.param_groups[-1]).items():
            group.setdefault(option, plain(value))
        for param, shadow in zip(params, shadows, strict=True):
            self._shadows[param] = shadow
            if shadow in base.state and param not in self.state:
                self.state[param] = base.state[shadow]

    def _base_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a group, this optimizer's or the base's, that are the base's."""
        return {option: value for option, value in group.items() if option not in self._own_options}

    def __getstate__(self) -> dict[str, Any]:
        # The base is built anew instead: many an optimizer loses attributes when it is copied or pickled.
        return {**super().__getstate__(), "_factory": self._factory, "_own_options": self._own_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_factory" in state:  # a copy or pickle; load_state_dict, which also comes here, keeps the base
            self._shadows = {}
            self._follow_groups()


def build_base(factory: BaseFactory, group: dict[str, Any], argument: str = "base") -> Optimizer:
    """Return the base of one param group.

    Raises:
        TypeError: ``factory`` does not build a torch optimizer.
    """
    base = factory([group])
    if not isinstance(base, Optimizer):
        raise TypeError(f"{argument} must build a torch.optim.Optimizer, not {type(base).__name__}")
    return base


def new_shadow(param: Tensor) -> Tensor:
    """Return zeros for a parameter, in at least float32."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
