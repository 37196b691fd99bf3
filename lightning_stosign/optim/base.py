"""What the sign optimizers share: argument checks, finite gradients, and a state_dict that loses nothing."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lightning_stosign._plain import make_plain
from lightning_stosign._user_code import warn_user
from lightning_stosign.optim.param_groups import FollowingOptimizer
from lightning_stosign.optim.rehearsal import is_rehearsal, rehearse
from lightning_stosign.optim.sharding import local_grad, max_over_shards, shard_of
from lightning_stosign.optim.states.state_precision import FP8_DTYPES
from lightning_stosign.optim.states.storage import SHAPE_SUFFIX, round_by_noise

Updates = list[tuple[int, Tensor, dict[str, Any]]]
"""(index in the optimizer, parameter, group) of the parameters to update."""


class StrictOptimizer(FollowingOptimizer, ABC):
    """Base of the package's optimizers: refuses bad options and gradients, and loads a state as it was saved.

    A subclass implements :meth:`_check_group` and :meth:`step`. All options live in the param groups, as plain
    values, so that pickling, deepcopy and ``torch.load(weights_only=True)`` keep them.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        make_plain(defaults)
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _groups_changed(self, changed: list[dict[str, Any]]) -> None:
        for group in changed:
            make_plain(group)
            self._check_group(group)
            for param in group["params"]:
                self._check_param(param, group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for an option out of range; subclasses check their own options too."""
        check_number("weight_decay", group["weight_decay"])
        check_lr(group["lr"])
        check_choice("on_nonfinite", group["on_nonfinite"], ("raise", "skip"))

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter that cannot be updated."""
        described = f"params: a parameter of shape {list(param.shape)}"
        if param.layout != torch.strided:
            raise ValueError(f"{described} is sparse ({param.layout}); accepted: dense parameters")
        if not param.is_floating_point() or param.dtype.itemsize < 2:
            raise ValueError(f"{described} has dtype {param.dtype}; accepted: float64, float32, bfloat16, float16")
        shard_of(param)  # refuses what is neither sharded nor replicated

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or is not finite under ``on_nonfinite="raise"``; no parameter and no
                state has been touched then.
        """
        self._follow_groups()
        if is_rehearsal(self, closure):
            return rehearse(self, partial(self._step, None), self._count)
        return self._step(closure)

    _count = "step"  # the name of the count of steps in a parameter's state

    @abstractmethod
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Perform a step: an implementation is under ``torch.no_grad()`` and ``torch.compiler.disable``.

        A torch.compile around a step leaves it as it is: the step brings its own kernels, and its noise keys change
        each time, so that a trace would hold once. Apart from step(), which torch wraps: it would lose the mark.
        """

    def _params_with_grad(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Yield (index in the optimizer, parameter, group) of the parameters to update."""
        index = -1
        for group in self.param_groups:
            for param in group["params"]:
                index += 1
                if param.is_meta and param.requires_grad:
                    raise RuntimeError(
                        f"{type(self).__name__}: {self._name(param)} is still on the meta device; materialise the "
                        "model, then create the optimizer (or move the very same parameters, by "
                        "torch.utils.swap_tensors)"
                    )
                if self._has_update(param):
                    yield index, param, group

    def _has_update(self, param: Tensor) -> bool:
        """Return whether a parameter has a gradient and values; raise where the gradient is sparse."""
        if param.grad is None or param.numel() == 0:
            return False
        if param.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients ({self._name(param)})")
        return True

    def _gradients_are_finite(self, updates: Updates) -> bool:
        """Return whether to take the step; raise or warn where a gradient is not finite.

        Costs one reduction over the gradients, one communication if they are sharded and, on an accelerator, one host
        synchronisation a step.
        """
        return self._are_finite(updates, nonfinite([local_grad(param) for _, param, _ in updates]))

    def _are_finite(self, updates: Updates, nonfinite: Sequence[bool]) -> bool:
        """Return the same, knowing for each update whether this process's part of its gradient is not finite."""
        flags = torch.tensor(nonfinite, dtype=torch.float32, device="cpu")
        max_over_shards((param, flag) for (_, param, _), flag in zip(updates, flags.unbind(), strict=True))
        offending = [(param, group) for (_, param, group), flag in zip(updates, flags.tolist(), strict=True) if flag]
        if offending:
            self._report_nonfinite([self._name(param) for param, _ in offending], [group for _, group in offending])
        return not offending

    _when_refused = "nothing was updated. To skip such steps, pass on_nonfinite='skip'."

    def _report_nonfinite(self, names: list[str], groups: list[dict[str, Any]]) -> None:
        """Raise or warn about a step that was not taken, as the groups of the parameters named ask for."""
        message = f"{type(self).__name__}: the gradient of {', '.join(names)} is not finite"
        if any(group["on_nonfinite"] == "raise" for group in groups):
            raise RuntimeError(f"{message}; {self._when_refused}")
        warn_user(f"{message}; this step was skipped (on_nonfinite='skip').", RuntimeWarning)

    def _name(self, wanted: Tensor) -> str:
        """Name a parameter in an error message."""
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param is wanted:
                    name = group["param_names"][i] if "param_names" in group else f"params[{i}] of group {g}"
                    return f"{name} {list(param.shape)}"
        raise KeyError("the parameter is not in this optimizer")

    def _reconciled(self, state_dict: StateDict) -> StateDict:
        self._loading = super()._reconciled(state_dict)
        return self._loading

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state, as in torch.optim, but with every state tensor in the dtype it was saved in.

        Options in the state_dict's param groups replace the current ones, ``state_precision`` included, with a warning
        that names them; :func:`resume_with` says which to keep.

        Raises:
            ValueError: another optimizer has saved the state.
        """

        # torch casts states to the parameter's dtype (float8 to float32, the scale to bfloat16), so they are put back
        # from the state_dict as torch used it: after the last pre-hook, before the first post-hook.
        def restore(_: Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            saved_ids = [i for group in self._loading["param_groups"] for i in group["params"]]
            for saved_id, param in zip(saved_ids, params, strict=True):
                for name, value in self._loading["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor):
                        # The package's own counts stay on the CPU; torch knows where another optimizer's belong.
                        is_count = value.dtype == torch.int64 and (value.dim() == 0 or name.endswith(SHAPE_SUFFIX))
                        device = torch.device("cpu") if is_count else self.state[param][name].device
                        self.state[param][name] = value.detach().to(device=device, copy=True)

        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            after.remove()
            self.__dict__.pop("_loading", None)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; FP8 tensors as bytes, since torch (2.13) cannot unpickle them."""
        kept = super().__getstate__()
        packed = {
            param: {name: _pack(value) for name, value in state.items()} for param, state in kept["state"].items()
        }
        return {**kept, "state": defaultdict(dict, packed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or state_dict; options that did not exist when it was made take their defaults."""
        super().__setstate__(state)
        for values in self.state.values():
            for name, value in values.items():
                values[name] = value.unpack() if isinstance(value, _Bytes) else value
        for group in self.param_groups:
            for option, value in self.defaults.items():
                if option != "differentiable":  # torch's own, of no use here
                    group.setdefault(option, value)


def update_param(param: Tensor, direction: Tensor, lr: float | Tensor, weight_decay: float, key: int | None) -> None:
    """``param = param - lr * weight_decay * param - lr * direction``, in place; ``direction`` is used up.

    A bfloat16 or float16 parameter is updated in float32 and rounded stochastically, by the noise of ``key``: a step of
    ``lr`` is often below half the spacing of its numbers, and would be lost each time if rounded to nearest, which is
    what None does.
    """
    if isinstance(lr, Tensor):
        lr = lr.to(param.device).reshape(())
    value = param if param.dtype in (torch.float32, torch.float64) else param.float()
    if weight_decay != 0:
        value.mul_(1 - lr * weight_decay)
    value.sub_(direction.mul_(lr))
    if value is not param:
        param.copy_(value if key is None else round_by_noise(value, param.dtype, key))


class _Bytes(NamedTuple):
    """An FP8 tensor on its way through a pickle."""

    data: Tensor
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        return self.data.view(self.dtype)


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in FP8_DTYPES:
        return _Bytes(value.view(torch.uint8), value.dtype)
    return value


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        accepted = f"finite and at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name}={value} must be {accepted}")


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Evaluate a step's closure, whose backward needs gradients that the step itself does without; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_lr(lr: Any) -> None:
    """Raise unless ``lr`` is a finite number >= 0, or a tensor of one such."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr of shape {list(lr.shape)}: a Tensor lr must be 1-element")
        lr = lr.item()
    check_number("lr", lr)


def check_pair(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tuple or list of two."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}={value!r} must be a pair of numbers")


def check_beta(name: str, value: Any, *, one: bool = False) -> None:
    """Raise unless 0 <= value < 1, or with ``one`` 0 < value <= 1."""
    check_number(name, value, 0.0, 1.0)
    if value == (0 if one else 1):
        raise ValueError(f"{name}={value} must be in {'(0, 1]' if one else '[0, 1)'}")


def check_seed(seed: Any) -> None:
    """Raise unless ``seed`` is an int in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} must be an int")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} must be in [0, 2**64)")


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not supported; accepted: {', '.join(map(repr, accepted))}")


def nonfinite(grads: Sequence[Tensor]) -> list[bool]:
    """Return for each gradient whether it holds inf or NaN."""
    # A sum is not finite if one value is not, and several times faster than a largest magnitude, whose kernels run on
    # one thread on the CPU. But a sum of finite values can overflow.
    if _sums_are_finite(grads):
        return [False] * len(grads)
    return [not bool(grad.isfinite().all()) for grad in grads]


def _sums_are_finite(grads: Sequence[Tensor]) -> bool:
    sums: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        total = grad.sum(dtype=torch.promote_types(torch.float32, grad.dtype))
        sums.setdefault(grad.device, []).append(total.to(torch.float64))
    return all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values())
