"""Which optimizer saved this? Told by the options of its param groups and the names of its states."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple


class Signature(NamedTuple):
    """What tells one optimizer from others.

    Attributes:
        name: what to call it.
        options: options of its param groups.
        states: states of its parameters.
        without: options that it does not have.
        exact: whether its parameters have no state besides ``states`` and a step count.
    """

    name: str
    options: frozenset[str] = frozenset()
    states: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    exact: bool = False

    def fits(self, options: Set[str], states: Set[str]) -> bool:
        """Return whether an optimizer with these options and states is this one; before its first step it has none."""
        if not self.options <= options or self.without & options:
            return False
        if not states:
            return bool(self.options) and not self.exact
        return self.states <= states and not (self.exact and states - self.states - {"step"})


UNKNOWN = Signature("unknown optimizer")

# Options that SignConverted adds to those of the optimizer that it converts.
_OF_SIGN_CONVERTED = frozenset(["stochastic", "seed", "normalize", "on_nonfinite"])
CONVERTED = "SignConverted "
BITSANDBYTES = "optimizer of bitsandbytes"


def _signature(name: str, options: str, states: str = "", without: str = "", exact: bool = False) -> Signature:
    return Signature(name, frozenset(options.split()), frozenset(states.split()), frozenset(without.split()), exact)


# The first that fits counts.
_SIGNATURES = [
    _signature("MuonSign", "use_muon stochastic state_precision"),
    _signature("Muon and AdamW", "use_muon"),
    _signature("OnlineToNonconvex", "radius window"),
    _signature("StoSignSGD", "stochastic seed state_precision", "exp_avg exp_inf"),
    _signature("SignSGD", "momentum state_precision"),
    _signature("ALIAS", "loss_lower_bound d0 same_batch"),
    _signature("NAdam", "momentum_decay", "exp_avg exp_avg_sq"),
    _signature("Adam", "betas eps amsgrad decoupled_weight_decay", "exp_avg exp_avg_sq"),
    # torch before 2.8, torchao: the same options for both
    _signature("Adam or AdamW", "betas eps amsgrad", "exp_avg exp_avg_sq"),
    _signature("RAdam", "betas eps decoupled_weight_decay", "exp_avg exp_avg_sq"),
    _signature("SparseAdam", "betas eps", "exp_avg exp_avg_sq", without="weight_decay"),
    _signature("Adamax", "betas eps weight_decay", "exp_avg exp_inf"),
    _signature("RMSprop", "alpha centered", "square_avg"),
    _signature("Adadelta", "rho", "square_avg acc_delta"),
    _signature("Adagrad", "lr_decay initial_accumulator_value", "sum"),
    _signature("Adafactor", "beta2_decay d"),
    _signature("ASGD", "lambd t0", "ax"),
    _signature("Rprop", "etas step_sizes", "prev step_size"),
    _signature("LBFGS", "history_size tolerance_grad"),
    _signature("SGD", "dampening nesterov"),
    _signature("FusedAdam", "betas bias_correction", "exp_avg exp_avg_sq"),
    _signature(BITSANDBYTES, "", "state1"),
    _signature("ScheduleFree AdamW", "r weight_lr_power", "z exp_avg_sq"),
    _signature("ScheduleFree SGD", "r weight_lr_power", "z"),
    _signature("Lion", "betas", "exp_avg", exact=True),
    _signature("Muon", "ns_steps momentum", "momentum_buffer"),
]


def signature_of(groups: Sequence[Mapping[str, Any]], states: Iterable[str]) -> Signature:
    """Return the signature of the optimizer that saved these.

    Args:
        groups: the param groups of its state_dict.
        states: the names of its parameters' states; none before the first step.

    Returns:
        The signature, or ``UNKNOWN``.

    Example:
        >>> import torch
        >>> adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        >>> signature_of(adamw.state_dict()["param_groups"], ["step", "exp_avg", "exp_avg_sq"]).name
        'AdamW'
    """
    options, present = frozenset(groups[0]), frozenset(states)
    if options >= _OF_SIGN_CONVERTED:
        base = signature_of([{key: groups[0][key] for key in options - _OF_SIGN_CONVERTED}], present)
        return base._replace(name=f"{CONVERTED}{base.name}", options=base.options | _OF_SIGN_CONVERTED)
    signature = next((each for each in _SIGNATURES if each.fits(options, present)), UNKNOWN)
    if signature.name == "Adam" and groups[0]["decoupled_weight_decay"]:
        return signature._replace(name="AdamW")
    return signature
