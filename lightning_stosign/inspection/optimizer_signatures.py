"""Which optimizer saved this? Told by the options of its param groups and the names of its states."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

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
    """

    name: str
    optimizer_class: type[Optimizer]
    options: frozenset[str]
    states: frozenset[str]
    without: frozenset[str]


UNKNOWN = Signature("unknown optimizer", Optimizer, frozenset(), frozenset(), frozenset())


def _signature(
    optimizer: type[Optimizer], options: str, states: str = "", without: str = "", name: str | None = None
) -> Signature:
    words = (frozenset(text.split()) for text in (options, states, without))
    return Signature(name or optimizer.__name__, optimizer, *words)


# The first that fits counts.
_SIGNATURES = [
    _signature(Optimizer, "use_muon", name="Muon and AdamW"),
    _signature(StoSignSGD, "stochastic seed state_precision", "exp_avg exp_inf"),
    _signature(SignSGD, "momentum state_precision", "exp_avg"),
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
    options = groups[0].keys() if groups else frozenset()
    present = frozenset(states)
    for signature in _SIGNATURES:
        fits = signature.options <= options and not signature.without & options
        if fits and (signature.states <= present or not present):
            if signature.name == "Adam" and groups[0]["decoupled_weight_decay"]:
                return signature._replace(name="AdamW", optimizer_class=torch.optim.AdamW)
            return signature
    return UNKNOWN
