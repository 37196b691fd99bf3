"""Update rules: what each optimizer divides by what, and how its states are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.health.stored_states import Group, State, read_bitsandbytes, read_stored, read_transformer_engine
from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.stosign import StoSignSGD
from lightning_stosign.optim.wrappers.muon_sign import MuonSign
from lightning_stosign.optim.wrappers.sign_converted import SignConverted

# (optimizer, parameter, its group, its state with the values on this rank) -> values of each moment, float32 or wider
Read = Callable[[Optimizer, Tensor, Group, State], dict[str, Tensor]]


def _never(_: Group) -> bool:
    return False


def _always(_: Group) -> bool:
    return True


def _if_decoupled(group: Group) -> bool:
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
        read: returns the values of a parameter's states. By default what is floating point, dequantised.
        decays: by state, where an average's decay is found in a param group, if not under the name torch has for it.
            None: the states are no averages that :func:`lightning_stosign.health.nominal_change` knows.
    """

    numerator: str | None = None
    denominators: tuple[str, ...] = ()
    decoupled_weight_decay: Callable[[Group], bool] = field(default=_never)
    stochastic_sign: Callable[[Group], bool] = field(default=_never)
    read: Read = field(default=read_stored)
    decays: Mapping[str, Callable[[Group], float]] | None = field(default_factory=dict)


RuleOf = UpdateRule | Callable[[Optimizer], UpdateRule]

_ADAM = partial(UpdateRule, "exp_avg", ("max_exp_avg_sq", "exp_avg_sq"))


def _first_beta(group: Group) -> float:
    return float(group["betas"][0])


def _second_beta(group: Group) -> float:
    return float(group["betas"][1])


_LION = UpdateRule("exp_avg", (), _if_decoupled, decays={"exp_avg": _second_beta})


def _fused_adam(optimizer: Optimizer) -> UpdateRule:
    """Transformer Engine's: an AdamW or an Adam by an attribute."""
    decoupled = _always if getattr(optimizer, "adam_w_mode", True) else _never
    return _ADAM(decoupled, read=read_transformer_engine)


def _bitsandbytes(optimizer: Optimizer) -> UpdateRule:
    """One class an algorithm and width, of which the attribute ``optimizer_name`` tells the algorithm."""
    read = read_bitsandbytes
    rules = {
        "adam": _ADAM(_always, read=read),
        "lamb": _ADAM(_always, read=read),
        "ademamix": _ADAM(_always, read=read),
        "lion": UpdateRule("exp_avg", (), _always, read=read, decays={"exp_avg": _second_beta}),
        "momentum": UpdateRule("momentum_buffer", read=read, decays=None),
        "lars": UpdateRule("momentum_buffer", read=read, decays=None),
        "rmsprop": UpdateRule("grad", ("square_avg",), read=read, decays={"square_avg": _first_beta}),
        "adagrad": UpdateRule("grad", ("sum",), read=read),
    }
    return rules.get(getattr(optimizer, "optimizer_name", ""), UpdateRule(read=read, decays=None))


def _alias(optimizer: Optimizer) -> UpdateRule:
    """With beta2 its averages are of gradients times a factor of its own."""
    return _ADAM(_always, decays={} if optimizer.defaults["beta2"] is None else None)


def _sign_converted(optimizer: Optimizer) -> UpdateRule:
    """The states are the base's, the weight decay is not."""
    assert isinstance(optimizer, SignConverted)
    rule = _registered(optimizer.base) or UpdateRule(decays=None)
    return replace(rule, decoupled_weight_decay=_always, stochastic_sign=_never)


_STOSIGN = UpdateRule("exp_avg", ("exp_inf",), _always, lambda group: bool(group["stochastic"]))
_MOMENTUM = UpdateRule("exp_avg", (), _always)
_RULES: dict[type[Optimizer] | str, RuleOf] = {
    SignConverted: _sign_converted,
    ALIAS: _alias,
    StoSignSGD: _STOSIGN,
    SignSGD: _MOMENTUM,
    torch.optim.SGD: UpdateRule("momentum_buffer"),
    torch.optim.AdamW: _ADAM(_always),
    torch.optim.Adam: _ADAM(_if_decoupled),
    torch.optim.NAdam: _ADAM(_if_decoupled),
    torch.optim.RAdam: _ADAM(_if_decoupled),
    torch.optim.SparseAdam: _ADAM(),
    torch.optim.Adamax: UpdateRule("exp_avg", ("exp_inf",)),
    torch.optim.RMSprop: UpdateRule("grad", ("square_avg",)),
    torch.optim.Adagrad: UpdateRule("grad", ("sum",)),
    torch.optim.Adadelta: UpdateRule("grad", ("square_avg",)),
    torch.optim.Adafactor: UpdateRule("grad", ("variance",), _always),
    # By name, as these packages are not always there: the first part of the module's name, and the class's.
    **{f"torchao.Adam{width}": _ADAM() for width in ("8bit", "4bit", "Fp8")},
    **{f"torchao.AdamW{width}": _ADAM(_always) for width in ("8bit", "4bit", "Fp8")},
    "transformer_engine.FusedAdam": _fused_adam,
    "bitsandbytes.Optimizer8bit": _bitsandbytes,
    **{f"pytorch_optimizer.{name}": _ADAM(_if_decoupled) for name in ("AdamP", "RAdam", "AdaBound", "PAdam", "Lamb")},
    "pytorch_optimizer.Lion": _LION,
    "pytorch_optimizer.Tiger": UpdateRule(
        "exp_avg", (), _if_decoupled, decays={"exp_avg": lambda group: float(group["beta"])}
    ),
}
_MUON = UpdateRule("momentum_buffer", (), _always)
if hasattr(torch.optim, "Muon"):  # torch >= 2.9
    _RULES[torch.optim.Muon] = _MUON


def register_update_rule(optimizer_class: type[Optimizer] | str, rule: RuleOf) -> None:
    """Tell the monitor how an optimizer of another library updates.

    Args:
        optimizer_class: the class, or ``"package.Class"`` for one that need not be importable; its subclasses follow
            the rule too, unless they have one of their own.
        rule: its rule, or a function that returns it for an optimizer of the class.

    Raises:
        TypeError: ``optimizer_class`` is not an optimizer class.
        ValueError: it is a string that does not name a package and a class.

    Example:
        >>> class MyAdam(torch.optim.Optimizer): ...
        >>> register_update_rule(MyAdam, UpdateRule("exp_avg", ("exp_avg_sq",)))
        >>> register_update_rule("apex.FusedAdam", UpdateRule("exp_avg", ("exp_avg_sq",)))
    """
    if isinstance(optimizer_class, str):
        if len(optimizer_class.split(".")) != 2:
            raise ValueError(f"optimizer_class={optimizer_class!r} must be 'package.Class', e.g. 'apex.FusedAdam'")
    elif not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class={optimizer_class!r} must be a subclass of torch.optim.Optimizer or its name")
    _RULES[optimizer_class] = rule


def update_rule(optimizer: Optimizer, group: Group, states: Mapping[str, Any]) -> UpdateRule:
    """Return the rule of an optimizer for a parameter.

    Args:
        optimizer: any torch optimizer.
        group: the parameter's group.
        states: the parameter's state, whose names tell what an unknown optimizer does.
    """
    if isinstance(optimizer, MuonSign):
        return _MOMENTUM if group["use_muon"] else _STOSIGN
    if "use_muon" in group:  # one optimizer for Muon's matrices and AdamW's vectors, as is usual with Muon
        return _MUON if group["use_muon"] else _ADAM(_always)
    return _registered(optimizer) or _by_convention(states)


def _registered(optimizer: Optimizer) -> UpdateRule | None:
    for cls in type(optimizer).__mro__:
        rule = _RULES.get(cls) or _RULES.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
        if rule is not None:
            return rule if isinstance(rule, UpdateRule) else rule(optimizer)
    return None


def _by_convention(states: Mapping[str, Any]) -> UpdateRule:
    """Guess the rule of an unknown optimizer from its states, which most call as torch's Adam does."""
    moments = {name: value for name, value in states.items() if isinstance(value, Tensor) and value.dim() > 0}
    denominators = ("max_exp_avg_sq", "exp_avg_sq", "max_exp_avg_var", "exp_avg_var", "exp_inf")
    numerator = next((name for name in ("exp_avg", "momentum_buffer") if name in moments), None)
    present = tuple(
        name
        for name in denominators
        if name in moments and (numerator is None or moments[name].shape == moments[numerator].shape)
    )
    if present or len(moments) == 1:
        return UpdateRule(numerator, present, _if_decoupled, decays=None)
    return UpdateRule(decoupled_weight_decay=_if_decoupled, decays=None)
