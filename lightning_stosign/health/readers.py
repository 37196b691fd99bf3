"""Readers: the moments of any torch optimizer, as float32 values, and the part each plays in the update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_stosign.optim.emulation import is_moment
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.state_precision import FLOAT32, StatePrecision, precision_of
from lightning_stosign.optim.storage import SCALE_SUFFIX, read_state
from lightning_stosign.optim.stosign import StoSignSGD


def _never(_: Mapping[str, Any]) -> bool:
    return False


def _always(_: Mapping[str, Any]) -> bool:
    return True


def _if_decoupled(group: Mapping[str, Any]) -> bool:
    # torch's name for the option, and pytorch_optimizer's
    return bool(group.get("decoupled_weight_decay", group.get("weight_decouple", False)))


@dataclass(frozen=True)
class UpdateRule:
    """What an optimizer divides by what.

    Args:
        numerator: the state that gives the update its direction, or ``"grad"``.
        denominators: the states that divide it; the first that a parameter has counts. Empty: there is none.
        decoupled_weight_decay: says of a param group whether its weight decay acts on the parameter directly instead
            of through the gradient.
        stochastic_sign: says of a param group whether the update is the sign of numerator plus denominator times
            uniform noise.
    """

    numerator: str | None = None
    denominators: tuple[str, ...] = ()
    decoupled_weight_decay: Callable[[Mapping[str, Any]], bool] = field(default=_never)
    stochastic_sign: Callable[[Mapping[str, Any]], bool] = field(default=_never)


_RULES: dict[type[Optimizer], UpdateRule] = {
    StoSignSGD: UpdateRule("exp_avg", ("exp_inf",), _always, lambda group: bool(group["stochastic"])),
    SignSGD: UpdateRule("exp_avg", (), _always),
    torch.optim.SGD: UpdateRule("momentum_buffer"),
    torch.optim.AdamW: UpdateRule("exp_avg", ("max_exp_avg_sq", "exp_avg_sq"), _always),
    torch.optim.Adam: UpdateRule("exp_avg", ("max_exp_avg_sq", "exp_avg_sq"), _if_decoupled),
    torch.optim.NAdam: UpdateRule("exp_avg", ("exp_avg_sq",), _if_decoupled),
    torch.optim.RAdam: UpdateRule("exp_avg", ("exp_avg_sq",), _if_decoupled),
    torch.optim.SparseAdam: UpdateRule("exp_avg", ("exp_avg_sq",)),
    torch.optim.Adamax: UpdateRule("exp_avg", ("exp_inf",)),
    torch.optim.RMSprop: UpdateRule("grad", ("square_avg",)),
    torch.optim.Adagrad: UpdateRule("grad", ("sum",)),
    torch.optim.Adadelta: UpdateRule("grad", ("square_avg",)),
    torch.optim.Adafactor: UpdateRule("grad", ("variance",), _always),
}
_MUON = UpdateRule("momentum_buffer", (), _always)
if hasattr(torch.optim, "Muon"):  # torch >= 2.9
    _RULES[torch.optim.Muon] = _MUON


def register_update_rule(optimizer_class: type[Optimizer], rule: UpdateRule) -> None:
    """Tell the monitor how an optimizer of another library updates.

    Args:
        optimizer_class: the class; its subclasses follow the rule too, unless they have one of their own.
        rule: its rule.

    Raises:
        TypeError: ``optimizer_class`` is not an optimizer class.

    Example:
        >>> class MyAdam(torch.optim.Optimizer): ...
        >>> register_update_rule(MyAdam, UpdateRule("exp_avg", ("exp_avg_sq",)))
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class={optimizer_class!r} must be a subclass of torch.optim.Optimizer")
    _RULES[optimizer_class] = rule


def update_rule(optimizer: Optimizer, group: Mapping[str, Any]) -> UpdateRule:
    """Return the rule of an optimizer for a param group; for an unknown optimizer one without numerator."""
    if "use_muon" in group:  # one optimizer for Muon's matrices and AdamW's vectors, as is usual with Muon
        return _MUON if group["use_muon"] else _RULES[torch.optim.AdamW]
    for cls in type(optimizer).__mro__:
        if cls in _RULES:
            return _RULES[cls]
    return UpdateRule(decoupled_weight_decay=_if_decoupled)


@dataclass(frozen=True)
class Moments:
    """The states of one parameter.

    Attributes:
        states: values of each floating-point state by name, in float32 or wider; do not change them.
        numerator: what gives the update its direction, or None where unknown.
        denominator: what divides it, or None where there is none.
        decisive_names: the names of the states without which the update fails: the denominator's or, where there is
            none, the numerator's; all states where the rule names neither or there is no rule.
        decoupled_weight_decay: the factor by which ``lr`` times the parameter is subtracted besides the update.
        stochastic_sign: whether the update is ``sign(numerator + denominator * noise)``.
    """

    states: dict[str, Tensor]
    numerator: Tensor | None
    denominator: Tensor | None
    decisive_names: frozenset[str]
    decoupled_weight_decay: float
    stochastic_sign: bool


def read_moments(optimizer: Optimizer, param: Tensor, group: Mapping[str, Any]) -> Moments:
    """Read the states of one parameter, dequantised where they are stored in low precision.

    Args:
        optimizer: any torch optimizer.
        param: one of its parameters.
        group: the parameter's group.

    Raises:
        ValueError: the parameter is sharded.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = StoSignSGD([x], state_precision="fp8")
        >>> x.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> moments = read_moments(optimizer, x, optimizer.param_groups[0])
        >>> moments.states["exp_avg"], set(moments.decisive_names)
        (tensor([0.1016, 0.0000]), {'exp_inf'})
    """
    if isinstance(param, DTensor):
        raise ValueError(
            f"a parameter of shape {list(param.shape)} is sharded (DTensor); accepted: unsharded parameters"
        )
    state = optimizer.state.get(param, {})
    precision = precision_of(state, group) or FLOAT32
    names = [name for name, value in state.items() if is_moment(name, value, param) and not _is_scale(name, state)]
    states = {name: _in_float32(_read(state, name, precision)) for name in names}

    rule = update_rule(optimizer, group)
    available = {**states, "grad": param.grad} if param.grad is not None and not param.grad.is_sparse else states
    denominator_name = next((name for name in rule.denominators if name in states), None)
    decisive = denominator_name or rule.numerator
    return Moments(
        states=states,
        numerator=available.get(rule.numerator) if rule.numerator is not None else None,
        denominator=states.get(denominator_name) if denominator_name is not None else None,
        # All where the rule names none of them: Adafactor keeps a matrix's second moments as row_var and col_var.
        decisive_names=frozenset(name for name in states if name == decisive) or frozenset(states),
        decoupled_weight_decay=float(group.get("weight_decay", 0.0)) if rule.decoupled_weight_decay(group) else 0.0,
        stochastic_sign=rule.stochastic_sign(group),
    )


def _is_scale(name: str, state: Mapping[str, Any]) -> bool:
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in state


def _read(state: dict[str, Any], name: str, precision: StatePrecision) -> Tensor:
    value = state[name]
    if type(value).dequantize is not Tensor.dequantize:  # a tensor subclass, such as torchao's 8-bit states
        return value.dequantize()
    return read_state(state, name, precision)


def _in_float32(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
