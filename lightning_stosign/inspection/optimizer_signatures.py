"""Which optimizer saved this, and whose update rule does it follow?"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.signatures import BITSANDBYTES, CONVERTED, signature_of
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.stosign import StoSignSGD
from lightning_stosign.optim.wrappers.muon_sign import MuonSign
from lightning_stosign.optim.wrappers.online_to_nonconvex import OnlineToNonconvex


class Identified(NamedTuple):
    """An optimizer that was recognised.

    Attributes:
        name: what to call it.
        optimizer_class: whose update rule it follows; ``Optimizer`` where there is no one rule.
        states: states by which it was recognised.
    """

    name: str
    optimizer_class: type[Optimizer]
    states: frozenset[str] = frozenset()

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


UNKNOWN = Identified("unknown optimizer", Optimizer)


def _stand_in(package: str, name: str) -> type[Optimizer]:
    """Return a class that goes by the name of one in a package that need not be installed."""
    return type(name, (Optimizer,), {"__module__": package})


_NAMES = {"adam": "Adam", "ademamix": "AdEMAMix", "rmsprop": "RMSprop", "adagrad": "Adagrad", "lion": "Lion"}
_NAMES["momentum"] = "SGD"

_CLASSES: dict[str, type[Optimizer]] = {
    "StoSignSGD": StoSignSGD,
    "SignSGD": SignSGD,
    "ALIAS": ALIAS,
    "MuonSign": MuonSign,
    "OnlineToNonconvex": OnlineToNonconvex,
    "Muon and AdamW": Optimizer,
    "Adam or AdamW": torch.optim.Adam,
    "FusedAdam": torch.optim.Adam,
    BITSANDBYTES: _stand_in("bitsandbytes", "Optimizer8bit"),
    "ScheduleFree AdamW": _stand_in("schedulefree", "AdamWScheduleFree"),
    "ScheduleFree SGD": _stand_in("schedulefree", "SGDScheduleFree"),
    "Lion": _stand_in("pytorch_optimizer", "Lion"),
}


def identify(groups: Sequence[Mapping[str, Any]], states: Iterable[str]) -> Identified:
    """Return the optimizer that saved these.

    Args:
        groups: the param groups of its state_dict.
        states: the names of its parameters' states; none before the first step.

    Returns:
        The optimizer, or ``UNKNOWN``.

    Example:
        >>> adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        >>> identify(adamw.state_dict()["param_groups"], ["step", "exp_avg", "exp_avg_sq"]).name
        'AdamW'
    """
    present = frozenset(states)
    signature = signature_of(groups, present)
    name, base = signature.name, signature.name.removeprefix(CONVERTED)
    if name == UNKNOWN.name:
        return UNKNOWN
    if base == BITSANDBYTES and groups[0]:
        name = f"{_NAMES[_bitsandbytes_algorithm(groups[0], present)]} of bitsandbytes"
    found = _CLASSES[base] if base in _CLASSES else getattr(torch.optim, base, Optimizer)
    return Identified(name, found, signature.states)
