"""Which optimizer saved this? Told by the options of its param groups and the names of its states."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.stosign import StoSignSGD


class Signature(NamedTuple):
    """What tells one optimizer from others.

    Attributes:
        name: what to call it.
        optimizer_class: whose update rule it follows; ``Optimizer`` where there is no one rule.
        options: options of its param groups.
        states: states of its parameters.
        without: options that it does not have.
        exact: whether its parameters have no state besides ``states`` and a step count.
    """

    name: str
    optimizer_class: type[Optimizer]
    options: frozenset[str]
    states: frozenset[str]
    without: frozenset[str]
    exact: bool = False

    def fits(self, options: Set[str], states: Set[str]) -> bool:
        """Return whether an optimizer with these options and states is this one; before its first step it has none."""
        if not self.options <= options or self.without & options:
            return False
        if not states:
            return bool(self.options) and not self.exact
        return self.states <= states and not (self.exact and states - self.states - {"step"})

    def attributes(self, options: Mapping[str, Any], states: Set[str]) -> dict[str, Any]:
        """Return attributes of the optimizer itself that its rule asks for, as far as options and states tell them."""
        if "state1" in self.states:
            return {"optimizer_name": _bitsandbytes_algorithm(options, states)}
        return {}


def _bitsandbytes_algorithm(options: Mapping[str, Any], states: Set[str]) -> str:
    """Return which algorithm of bitsandbytes' it was: all have the same options, and one of them uses each."""
    first, second = [*(options.get("betas") or ()), 0.0, 0.0][:2]
    if "state2" in states:
        return "ademamix" if options.get("alpha") else "adam"
    if options.get("eps"):  # Lion and SGD divide by nothing
        return "rmsprop" if first else "adagrad"
    return "lion" if second else "momentum"


UNKNOWN = Signature("unknown optimizer", Optimizer, frozenset(), frozenset(), frozenset())

# Options that SignConverted adds to those of the optimizer that it converts.
_OF_SIGN_CONVERTED = frozenset(["stochastic", "seed", "normalize", "on_nonfinite"])


def _stand_in(package: str, name: str) -> type[Optimizer]:
    """Return a class that goes by the name of one in a package that need not be installed."""
    return type(name, (Optimizer,), {"__module__": package})


def _signature(
    optimizer: type[Optimizer],
    options: str,
    states: str = "",
    without: str = "",
    name: str | None = None,
    exact: bool = False,
) -> Signature:
    return Signature(
        name or optimizer.__name__,
        optimizer,
        frozenset(options.split()),
        frozenset(states.split()),
        frozenset(without.split()),
        exact,
    )


_BITSANDBYTES = "optimizer of bitsandbytes"
_NAMES = {"adam": "Adam", "ademamix": "AdEMAMix", "rmsprop": "RMSprop", "adagrad": "Adagrad", "lion": "Lion"}
_NAMES["momentum"] = "SGD"

# The first that fits counts.
_SIGNATURES = [
    _signature(Optimizer, "use_muon", name="Muon and AdamW"),
    _signature(StoSignSGD, "stochastic seed state_precision", "exp_avg exp_inf"),
    _signature(SignSGD, "momentum state_precision", "exp_avg"),
    _signature(ALIAS, "loss_lower_bound d0 same_batch"),
    _signature(torch.optim.NAdam, "momentum_decay", "exp_avg exp_avg_sq"),
    _signature(torch.optim.Adam, "betas eps amsgrad decoupled_weight_decay", "exp_avg exp_avg_sq"),
    # torch before 2.8, torchao: the same options for both
    _signature(torch.optim.Adam, "betas eps amsgrad", "exp_avg exp_avg_sq", name="Adam or AdamW"),
    _signature(torch.optim.RAdam, "betas eps decoupled_weight_decay", "exp_avg exp_avg_sq"),
    _signature(torch.optim.SparseAdam, "betas eps", "exp_avg exp_avg_sq", without="weight_decay"),
    _signature(torch.optim.Adamax, "betas eps weight_decay", "exp_avg exp_inf"),
    _signature(torch.optim.RMSprop, "alpha centered", "square_avg"),
    _signature(torch.optim.Adadelta, "rho", "square_avg acc_delta"),
    _signature(torch.optim.Adagrad, "lr_decay initial_accumulator_value", "sum"),
    _signature(torch.optim.Adafactor, "beta2_decay d"),
    _signature(torch.optim.ASGD, "lambd t0", "ax"),
    _signature(torch.optim.Rprop, "etas step_sizes", "prev step_size"),
    _signature(torch.optim.LBFGS, "history_size tolerance_grad"),
    _signature(torch.optim.SGD, "dampening nesterov"),
    _signature(torch.optim.Adam, "betas bias_correction", "exp_avg exp_avg_sq", name="FusedAdam"),
    _signature(_stand_in("bitsandbytes", "Optimizer8bit"), "", "state1", name=_BITSANDBYTES),
    _signature(
        _stand_in("schedulefree", "AdamWScheduleFree"), "r weight_lr_power", "z exp_avg_sq", name="ScheduleFree AdamW"
    ),
    _signature(_stand_in("schedulefree", "SGDScheduleFree"), "r weight_lr_power", "z", name="ScheduleFree SGD"),
    _signature(_stand_in("pytorch_optimizer", "Lion"), "betas", "exp_avg", name="Lion", exact=True),
]
if hasattr(torch.optim, "Muon"):  # torch >= 2.9
    _SIGNATURES.append(_signature(torch.optim.Muon, "ns_steps momentum", "momentum_buffer"))


def identify(groups: Sequence[Mapping[str, Any]], states: Iterable[str]) -> Signature:
    """Return the signature of the optimizer that saved these.

    Args:
        groups: the param groups of its state_dict.
        states: the names of its parameters' states; none before the first step.

    Returns:
        The signature, or ``UNKNOWN``.

    Example:
        >>> adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        >>> identify(adamw.state_dict()["param_groups"], ["step", "exp_avg", "exp_avg_sq"]).name
        'AdamW'
    """
    options, present = frozenset(groups[0]), frozenset(states)
    if options >= _OF_SIGN_CONVERTED:
        base = identify([{key: groups[0][key] for key in options - _OF_SIGN_CONVERTED}], present)
        return base._replace(name=f"SignConverted {base.name}")
    signature = next((each for each in _SIGNATURES if each.fits(options, present)), UNKNOWN)
    if signature.name == _BITSANDBYTES and options:
        algorithm = _bitsandbytes_algorithm(groups[0], present)
        return signature._replace(name=f"{_NAMES[algorithm]} of bitsandbytes")
    if signature.name == "Adam" and groups[0]["decoupled_weight_decay"]:
        return signature._replace(name="AdamW", optimizer_class=torch.optim.AdamW)
    return signature
