"""Optimizer states in a flat table of tensors: the parameter and the state are both in the name."""

import re
from collections.abc import Mapping
from typing import Any

# Names that torch's, this package's and other common optimizers have for their states.
_NAMES = """
    step exp_avg exp_avg_sq max_exp_avg_sq exp_inf exp_avg_slow exp_avg_var momentum_buffer square_avg grad_avg
    acc_delta sum ax eta mu mu_product prev step_size row_var col_var variance exp_avg_sq_row exp_avg_sq_col z
    state1 state2 qmap1 qmap2 absmax1 absmax2 max1 max2 new_max1 new_max2 master_param
"""
STATE_NAMES = frozenset(_NAMES.split())
_SUFFIXES = ("_scale", "_tensor_scale", "_shape")


def optimizer_of_tensors(tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return an optimizer's state_dict made of tensors named ``<parameter>.<state>`` or ``<state>.<parameter>``.

    Args:
        tensors: by name, whose parts are joined by ``.`` or ``/``.

    Returns:
        A state_dict without options; None where no name has a state in it.

    Example:
        >>> found = optimizer_of_tensors({"state/0/exp_avg": 1, "state/0/exp_avg_sq": 2})
        >>> found["state"]
        {'0': {'exp_avg': 1, 'exp_avg_sq': 2}}
    """
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parts = re.split(r"[./|]", name)
        if _is_state(parts[-1]) and len(parts) > 1:
            parameter, state = parts[:-1], parts[-1]
        elif _is_state(parts[0]) and len(parts) > 1:
            parameter, state = parts[1:], parts[0]
        else:
            continue
        for prefix in ("optimizer", "state"):
            if parameter[0] == prefix and len(parameter) > 1:
                parameter = parameter[1:]
        states.setdefault(".".join(parameter), {})[state] = tensor
    if not any(set(state) - {"step"} for state in states.values()):
        return None
    return {"state": states, "param_groups": [{"params": list(states)}]}


def _is_state(name: str) -> bool:
    return name in STATE_NAMES or any(name.removesuffix(suffix) in STATE_NAMES for suffix in _SUFFIXES)
