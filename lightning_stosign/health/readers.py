"""Readers: the moments of any torch optimizer, as float32 values, and the part each plays in the update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_stosign.health.changes import decay_of, is_known, nominal_change
from lightning_stosign.health.forecast import Change
from lightning_stosign.health.rules import UpdateRule, update_rule
from lightning_stosign.health.sharding import Layout, localize
from lightning_stosign.health.stored_states import in_float32
from lightning_stosign.optim.emulation import state_degree
from lightning_stosign.optim.nested import group_of, keeper_of


@dataclass(frozen=True)
class Moments:
    """The states of one parameter; of a sharded one the values that this rank holds.

    Attributes:
        states: values of each floating-point state by name, in float32 or wider; do not change them.
        numerator: what gives the update its direction, or None where unknown.
        denominator: what divides it, or None where there is none.
        decisive_names: the names of the states without which the update fails: the denominator's or, where there is
            none, the numerator's; all states where the rule names neither or there is no rule.
        decoupled_weight_decay: the factor by which ``lr`` times the parameter is subtracted besides the update.
        stochastic_sign: whether the update is ``sign(numerator + denominator * noise)``.
        layouts: where a state's values lie in the whole state; without an entry this rank has it all.
        step_size: the step size that a self-tuning optimizer found, learning rate included; None for others.
        changes: by state, what its next step adds to a slice of the flat values, for a gradient like the last one.
    """

    states: dict[str, Tensor]
    numerator: Tensor | None
    denominator: Tensor | None
    decisive_names: frozenset[str]
    decoupled_weight_decay: float | Tensor
    stochastic_sign: bool
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    step_size: Tensor | None = None

    def layout(self, name: str) -> Layout:
        """Return where a state's values lie in the whole state."""
        return self.layouts.get(name) or Layout(self.states[name].numel())


def read_moments(optimizer: Optimizer, param: Tensor, group: Mapping[str, Any]) -> Moments:
    """Read the states of one parameter, dequantised where they are stored in low precision.

    Args:
        optimizer: any torch optimizer; one that wraps others (Lookahead, ZeroRedundancyOptimizer) is looked through.
        param: one of its parameters. Of a DTensor each rank reads its own values.
        group: the parameter's group.

    Example:
        >>> import torch
        >>> from lightning_stosign import StoSignSGD
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = StoSignSGD([x], state_precision="fp8:min_numel=0")
        >>> x.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> moments = read_moments(optimizer, x, optimizer.param_groups[0])
        >>> moments.states["exp_avg"], set(moments.decisive_names)
        (tensor([0.1016, 0.0000]), {'exp_inf'})
    """
    keeper = keeper_of(optimizer, param)
    if keeper is not optimizer:
        group, optimizer = group_of(keeper, param) or group, keeper
    state = optimizer.state.get(param, {})
    rule = update_rule(optimizer, group, state)
    local = {name: localize(value) for name, value in state.items() if isinstance(value, DTensor)}
    states = rule.read(optimizer, param, group, {**state, **{name: value for name, (value, _) in local.items()}})
    whole, param_layout = localize(param.detach())
    layouts = {
        name: local[name][1] if name in local else param_layout
        for name, value in states.items()
        if name in local or value.numel() == whole.numel()
    }
    grad = _local_gradient(param)
    numerator_name, denominator_name = rule.numerator, next((n for n in rule.denominators if n in states), None)
    decisive = denominator_name or numerator_name
    return Moments(
        states=states,
        numerator=grad if numerator_name == "grad" else states.get(numerator_name or ""),
        denominator=states.get(denominator_name or ""),
        # Where the rule names none of them, the second moments (Adafactor's are row_var and col_var), or all.
        decisive_names=frozenset(name for name in states if name == decisive)
        or frozenset(name for name in states if state_degree(name) == 2)
        or frozenset(states),
        decoupled_weight_decay=_decoupled_weight_decay(rule, group),
        stochastic_sign=rule.stochastic_sign(group),
        layouts=layouts,
        changes=_changes(rule, states, group, grad),
        step_size=group["step_size"] if isinstance(group.get("step_size"), Tensor) else None,
    )


def _local_gradient(param: Tensor) -> Tensor | None:
    if param.grad is None or param.grad.is_sparse:
        return None
    return localize(param.grad)[0]


def _decoupled_weight_decay(rule: UpdateRule, group: Mapping[str, Any]) -> float | Tensor:
    if not rule.decoupled_weight_decay(group):
        return 0.0
    weight_decay = float(group.get("weight_decay", 0.0))
    if group.get("fixed_decay", False) and weight_decay != 0:  # pytorch_optimizer's: without the factor lr
        lr = group["lr"]
        return weight_decay / lr if isinstance(lr, Tensor) or lr > 0 else 0.0
    if isinstance(group.get("step_size"), Tensor) and weight_decay != 0:  # ALIAS's, which has lr as a factor
        return weight_decay * group["step_size"] / group["lr"]
    return weight_decay


def _changes(
    rule: UpdateRule, states: Mapping[str, Tensor], group: Mapping[str, Any], grad: Tensor | None
) -> dict[str, Change]:
    """Return the nominal changes of the states that have one: averages, sums and maxima of the gradient."""
    if rule.decays is None or grad is None:
        return {}
    flat_grad = in_float32(grad).reshape(-1)
    changes: dict[str, Change] = {}
    for name, value in states.items():
        if value.numel() != flat_grad.numel():
            continue
        read_decay = rule.decays.get(name)
        decay = None if read_decay is None else read_decay(group)
        if decay is None:
            decay = decay_of(name, group)
        if decay is not None and is_known(name):
            changes[name] = _NominalChange(name, value.reshape(-1), group, flat_grad, decay)
    return changes


@dataclass(frozen=True, eq=False)
class _NominalChange:
    """The nominal change of a state, of the flat values that are asked for."""

    name: str
    value: Tensor
    group: Mapping[str, Any]
    grad: Tensor
    decay: float

    def __call__(self, part: slice) -> Tensor:
        return self.of(self.value[part], self.grad[part])

    def of(self, value: Tensor, grad: Tensor) -> Tensor:
        added = nominal_change(self.name, value, self.group, grad, decay=self.decay)
        assert added is not None
        return added


def changes_of_rows(changes: Sequence[Change], rows: Tensor) -> Tensor:
    """Return the changes of states of one size and name, a row each; at once where the options are the same.

    Args:
        changes: of :attr:`Moments.changes`.
        rows: the states' values, ``[states, numel]``.
    """
    first = changes[0]
    if isinstance(first, _NominalChange) and all(
        isinstance(each, _NominalChange) and each.group is first.group and each.decay == first.decay for each in changes
    ):
        grads = torch.stack([each.grad for each in changes if isinstance(each, _NominalChange)])
        return first.of(rows, grads)
    return torch.stack([each(slice(None)) for each in changes])
