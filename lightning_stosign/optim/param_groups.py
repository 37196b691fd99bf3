"""An optimizer that goes by what its ``param_groups`` say now, however they came about."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lightning_stosign._plain import make_plain
from lightning_stosign.optim.resuming import reconcile, restore_precision, wanted_precisions

GroupRule = Callable[[dict[str, Any]], list[dict[str, Any]]]


class FollowingOptimizer(Optimizer):
    """Base of the package's optimizers: follows changes of its param groups between steps.

    Groups are added (by a finetuning callback, with or without names), removed, replaced as a whole (Lightning assigns
    ``optimizer.param_groups`` on resume) and edited in place. Each step and each ``state_dict()`` begins with a look at
    them: what is new gets the missing options and names and is checked, and the state of a parameter that has left is
    dropped. A subclass builds what it derives from the groups in :meth:`_groups_changed`.

    Attributes:
        group_rule: what becomes of a group that is added: the groups to take in its place. None: the group itself.
    """

    group_rule: GroupRule | None = None
    _is_built = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._is_built = False  # until then, torch's rule that groups are named alike
        super().__init__(params, defaults)
        self._is_built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.optim; its options and parameters are checked.

        Where only some of the groups have names, those that are added without get placeholders, or the earlier ones.
        """
        before = list(self.param_groups)
        try:
            for group in [param_group] if self.group_rule is None else self.group_rule(param_group):
                if self._is_built:
                    _give_names(group, self.param_groups)
                super().add_param_group(group)
            self._follow_groups()
        except Exception:  # whatever is wrong with the group, a base optimizer's reasons included: it is not taken
            self.param_groups[:] = before
            raise

    def _groups_changed(self, changed: list[dict[str, Any]]) -> None:
        """Check the groups that are new or have changed, and rebuild what depends on the groups."""

    def _follow_groups(self) -> None:
        """Take the groups as they are now."""
        now = [_signature(group) for group in self.param_groups]
        known = self.__dict__.get("_signatures", [])
        if now == known:
            return
        old = set(known)
        changed = [group for group, signature in zip(self.param_groups, now, strict=True) if signature not in old]
        named = any("param_names" in group for group in self.param_groups)
        for group in changed:
            params = group["params"]
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
            for option, value in self.defaults.items():
                if option != "differentiable":  # torch's own, of no use here
                    group.setdefault(option, value)
        owners: dict[Tensor, int] = {}
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if owners.setdefault(param, number) != number:
                    raise ValueError(
                        f"param_groups: a parameter of shape {list(param.shape)} is in groups {owners[param]} and "
                        f"{number}; accepted: each parameter in one group"
                    )
        if named:
            self._repair_names()
        for param in [param for param in self.state if isinstance(param, Tensor) and param not in owners]:
            del self.state[param]
        self._groups_changed(changed)
        # Last, so that what raises here raises again at the next step.
        self._signatures = [_signature(group) for group in self.param_groups]

    def _repair_names(self) -> None:
        """Let names follow the parameters that were moved, added or taken out by hand."""
        known: dict[int, str] = self.__dict__.get("_names_by_id", {})
        for number, group in enumerate(self.param_groups):
            names, params = group.get("param_names", []), group["params"]
            if len(names) != len(params) or any(known.get(id(p), n) != n for p, n in zip(params, names, strict=True)):
                group["param_names"] = [known.get(id(p), _placeholder(number, i)) for i, p in enumerate(params)]
        self._names_by_id = {
            id(param): name
            for group in self.param_groups
            for param, name in zip(group["params"], group["param_names"], strict=True)
        }

    reconciles = True  # what loading a state does with it, see resuming.py

    def _reconciled(self, state_dict: StateDict) -> StateDict:
        """Return what to load of a state, after all other hooks."""
        return reconcile(self, state_dict)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state, as in torch.optim; :func:`resume_with` says what of it.

        Raises:
            ValueError: another optimizer has saved the state.
        """
        self._follow_groups()
        wanted: list[Any] | None = None

        def take(_: Optimizer, state_dict: StateDict) -> StateDict:
            nonlocal wanted
            wanted = wanted_precisions(self, state_dict)
            return self._reconciled(state_dict)

        hook = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        if wanted is not None:
            restore_precision(self, wanted)

    def state_dict(self) -> StateDict:
        """Return the state, as in torch.optim; numbers that a scheduler has set are Python numbers in it."""
        self._follow_groups()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            make_plain(group)
        return saved


def add_by_rule(optimizer: Optimizer, rule: GroupRule) -> None:
    """Let an optimizer of any library take added groups by a rule, as :attr:`FollowingOptimizer.group_rule` does."""
    if isinstance(optimizer, FollowingOptimizer):
        optimizer.group_rule = rule
        return
    add = optimizer.add_param_group

    def add_param_group(param_group: dict[str, Any]) -> None:
        for group in rule(param_group):
            _give_names(group, optimizer.param_groups)
            add(group)

    optimizer.add_param_group = add_param_group  # type: ignore[method-assign]


def _give_names(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Give names to a group that joins groups with names, or names to those, as torch wants all groups to be alike."""
    params = group["params"]
    if isinstance(params, set):
        return  # torch says why not
    params = [params] if isinstance(params, Tensor) else list(params)
    group["params"] = params
    is_named = "param_names" in group or any(isinstance(param, tuple) for param in params)
    if is_named and others and "param_names" not in others[0]:
        for number, other in enumerate(others):
            other["param_names"] = [_placeholder(number, i) for i in range(len(other["params"]))]
    elif not is_named and any("param_names" in other for other in others):
        group["param_names"] = [_placeholder(len(others), i) for i in range(len(params))]


def _placeholder(number: int, position: int) -> str:
    return f"params[{position}] of group {number}"


def _signature(group: dict[str, Any]) -> tuple[int, ...]:
    """Return what differs if a group is another one, has other parameters, or more or fewer options."""
    params = group["params"]
    return id(group), len(group), *map(id, [params] if isinstance(params, torch.Tensor) else params)
