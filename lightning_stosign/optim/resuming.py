"""Loading a state that was saved with other options, or by another optimizer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from lightning_stosign._user_code import warn_user
from lightning_stosign.optim.signatures import CONVERTED, UNKNOWN, signature_of
from lightning_stosign.optim.states.conversion import store_anew
from lightning_stosign.optim.states.state_precision import FLOAT32, OVERRIDE, StatePrecision, precision_of
from lightning_stosign.optim.states.storage import is_packed, read_state

# What param groups hold besides options: it is loaded, and nobody has configured it.
# Option of a group: which addition during training it came from, counted from 1. What added it sets its learning rate.
ADDITION = "addition"

_OF_TORCH = {"params", "param_names", "initial_lr", "differentiable"}
_OF_OURS = {"step_size", "estimates", "use_muon", "accumulate_grad_batches", "accumulated_batches"}
_NO_OPTIONS = _OF_TORCH | _OF_OURS


class Resumption(NamedTuple):
    """How an optimizer takes a state that it did not save itself.

    Attributes:
        keep: options whose values stay those of the optimizer's construction.
        convert: whether to convert another optimizer's state.
    """

    keep: tuple[str, ...] = ()
    convert: bool = False


def resume_with(optimizer: Optimizer, keep: Iterable[str] = (), *, convert: bool = False) -> None:
    """Say what ``load_state_dict`` shall do where a checkpoint and this optimizer's construction differ.

    By default the checkpoint's options win, as in torch, with a warning that names them, and another optimizer's state
    is refused. Call this before ``load_state_dict``, or in ``configure_optimizers`` before Lightning's ``ckpt_path``
    is loaded. :class:`StoSignConfig` has both arguments as ``keep_on_resume`` and ``convert_on_resume``.

    Args:
        optimizer: any torch optimizer; one of another library refuses and warns from now on as this package's do.
        keep: names of options that keep their new values, e.g. ``("lr", "state_precision")``. A learning rate keeps its
            place in the schedule: the new peak, times the factor that had been reached. States are converted to a new
            ``state_precision``.
        convert: take another optimizer's averaged gradient (``exp_avg``) as the momentum of :class:`StoSignSGD`,
            :class:`SignSGD` or :class:`MuonSign`, with all options as constructed. StoSignSGD's envelope is then the
            denominator of Adam's update, so that its mean step starts as Adam's. :class:`SignConverted` takes its
            base's own state.

    Raises:
        ValueError: the optimizer has no option of a name in ``keep``.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> adamw = torch.optim.AdamW([x])
        >>> x.grad = torch.tensor([1.0, 2.0, -3.0])
        >>> adamw.step()
        >>> from lightning_stosign import StoSignSGD
        >>> optimizer = StoSignSGD([x], lr=5e-4)
        >>> resume_with(optimizer, convert=True)
        >>> optimizer.load_state_dict(adamw.state_dict())
        >>> optimizer.state[x]["exp_avg"]
        tensor([ 0.1000,  0.2000, -0.3000])
    """
    keep = tuple(keep)
    unknown = [option for option in keep if option not in optimizer.defaults]
    if unknown:
        accepted = sorted(set(optimizer.defaults) - _NO_OPTIONS)
        raise ValueError(f"keep={unknown}: no option of {type(optimizer).__name__}; accepted: {', '.join(accepted)}")
    is_new = "_resumption" not in optimizer.__dict__
    optimizer._resumption = Resumption(keep, convert)  # type: ignore[attr-defined]
    if is_new and not getattr(optimizer, "reconciles", False):  # this package's do without a hook
        optimizer.register_load_state_dict_pre_hook(lambda this, saved: reconcile(this, saved))


def reconcile(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Return the state that an optimizer is to load: warns of options that change, refuses or converts other states.

    Raises:
        ValueError: the state is another optimizer's, and conversion was not asked for or is not possible.
    """
    resumption: Resumption = getattr(optimizer, "_resumption", Resumption())
    groups = state_dict["param_groups"]
    if not groups or len(groups) != len(optimizer.param_groups):
        return state_dict  # torch says what is wrong
    old, new = _saved_name(optimizer, state_dict), _own_name(optimizer)
    if old is not None:
        if not resumption.convert:
            ask = "resume_with(optimizer, convert=True) or StoSignConfig(convert_on_resume=True) converts it"
            raise ValueError(
                f"this state was saved by {old}, and {new} cannot continue it"
                f"{'; ' + ask if _is_convertible(old, new) else ''}"
            )
        state_dict = {**state_dict, "state": _converted(optimizer, state_dict, old, new)}
        kept: Sequence[str] = [option for option in optimizer.defaults if option not in _NO_OPTIONS]
    else:
        if not _has_stepped(optimizer):  # or else it goes back to a state of its own
            _warn_of_changes(optimizer, groups, resumption.keep)
        kept = [option for option in resumption.keep if option != "state_precision"]
    if old is None and not kept:
        return state_dict
    merged = []
    for own, saved in zip(optimizer.param_groups, groups, strict=True):
        options = dict(own) if old is not None else dict(saved)
        options["params"] = saved["params"]
        if old is not None and "state_precision" in own:
            options["state_precision"] = None  # as converted, see restore_precision
        for option in kept:
            if option == "lr":
                options.update(_lr_in_its_place(own, saved))
            elif option in own and option != "state_precision":
                options[option] = own[option]
        merged.append(options)
    return {**state_dict, "param_groups": merged}


def wanted_precisions(optimizer: Optimizer, state_dict: StateDict) -> list[Any] | None:
    """Return each group's ``state_precision`` if it is to survive loading this state; None where the saved one wins."""
    resumption: Resumption = getattr(optimizer, "_resumption", Resumption())
    groups = state_dict["param_groups"]
    keeps = "state_precision" in resumption.keep or (resumption.convert and _saved_name(optimizer, state_dict))
    if not keeps or len(groups) != len(optimizer.param_groups):
        return None
    return [group.get("state_precision") for group in optimizer.param_groups]


def restore_precision(optimizer: Optimizer, wanted: Sequence[Any]) -> None:
    """Convert the states just loaded to each group's wanted ``state_precision``."""
    for group, spec in zip(optimizer.param_groups, wanted, strict=True):
        if "state_precision" not in group or group["state_precision"] == spec:
            continue
        saved = group["state_precision"]
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if OVERRIDE in state:  # promoted by hand or by the guard: stays so
                continue
            before, after = _applied(saved, param), _applied(spec, param)
            if before != after:
                for name in ("exp_avg", "exp_inf"):
                    if name in state:
                        store_anew(state, name, param, before, after)
        group["state_precision"] = spec


def _applied(spec: Any, param: Tensor) -> StatePrecision:
    precision = None if spec is None else StatePrecision.parse(spec)
    return FLOAT32 if precision is None or not precision.applies_to(param) else precision


def _own_name(optimizer: Optimizer) -> str:
    name = signature_of(optimizer.param_groups, _state_names(optimizer.state.values())).name
    return type(optimizer).__name__ if name == UNKNOWN.name else name


def _saved_name(optimizer: Optimizer, state_dict: StateDict) -> str | None:
    """Return the name of the optimizer that saved a state, if it is another than this one."""
    groups = state_dict["param_groups"]
    saved = signature_of(groups, _state_names(state_dict["state"].values())).name
    own = signature_of(optimizer.param_groups, ())
    kind = type(optimizer).__name__
    if any(saved == name or {saved, name} in _SAME for name in (own.name, kind)) and saved != UNKNOWN.name:
        return None
    if own.name == f"{CONVERTED}{saved}" and {"stochastic", "seed"} <= groups[0].keys():
        return None  # of a version that had fewer options of its own beside the base's
    is_known = own.name == kind or getattr(optimizer, "reconciles", False)
    if not is_known and not saved.startswith(CONVERTED) and set(optimizer.defaults) - _NO_OPTIONS <= groups[0].keys():
        return None  # of an optimizer that only its user knows, with all of its options
    if saved != UNKNOWN.name:
        return saved
    # Of an optimizer that nobody knows; or of this one, in a version with other options or with fewer.
    is_own = own.options <= groups[0].keys() or set(groups[0]) - _NO_OPTIONS <= optimizer.defaults.keys()
    return None if is_own else f"another optimizer (options {_listed(groups[0])})"


# Older versions of torch, and other libraries, do not tell them apart.
_SAME = [{"Adam or AdamW", "Adam"}, {"Adam or AdamW", "AdamW"}, {"Adam", "AdamW"}]


def _has_stepped(optimizer: Optimizer) -> bool:
    state = next((state for state in optimizer.state.values() if state), None)
    if state is None:
        return False
    counts = [state[name] for name in ("step", "outer_step") if name in state]
    return all(int(count) > 0 for count in counts)


def _state_names(states: Iterable[Any]) -> set[str]:
    return {name for state in states if isinstance(state, Mapping) for name in state}


def _listed(group: Mapping[str, Any]) -> str:
    return ", ".join(sorted(set(group) - _NO_OPTIONS))


def _warn_of_changes(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], keep: Sequence[str]) -> None:
    changes: dict[str, list[str]] = {}
    for own, saved in zip(optimizer.param_groups, groups, strict=True):
        for option in optimizer.defaults:
            if option in _NO_OPTIONS or option in keep or option not in own or option not in saved:
                continue
            if option == "lr" and ADDITION in saved:
                continue
            ours, theirs = (_peak_lr(g) if option == "lr" else g[option] for g in (own, saved))
            if _plain(ours) != _plain(theirs):
                change = f"{option}={_plain(theirs)!r} (not {_plain(ours)!r})"
                if change not in changes.setdefault(option, []):
                    changes[option].append(change)
    if changes:
        listed = ", ".join(change for of_option in changes.values() for change in of_option)
        names = ", ".join(repr(option) for option in changes)
        warn_user(
            f"{type(optimizer).__name__}: the checkpoint's options replace those of this configuration: {listed}. To "
            f"keep the new ones: resume_with(optimizer, keep=[{names}]) before loading, or "
            "StoSignConfig(keep_on_resume=...).",
            UserWarning,
        )


def _peak_lr(group: Mapping[str, Any]) -> Any:
    """Return a group's learning rate before any schedule."""
    return group.get("initial_lr", group["lr"])


def _lr_in_its_place(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the new learning rate where the saved one was in its schedule."""
    peak = _peak_lr(own)
    if "initial_lr" not in saved:
        return {"lr": peak, **({"initial_lr": peak} if "initial_lr" in own else {})}
    start = float(saved["initial_lr"])
    reached = float(saved["lr"]) / start if start > 0 else 1.0
    return {"lr": peak * reached, "initial_lr": peak}


def _plain(value: Any) -> Any:
    """Return an option in a form that compares: tuples and lists alike, tensors as numbers."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return tuple(_plain(item) for item in value) if isinstance(value, (tuple, list)) else value


def _is_convertible(old: str, new: str) -> bool:
    # ALIAS's averages are of gradients times a factor of its own.
    return new == f"{CONVERTED}{old}" or (
        new in ("StoSignSGD", "SignSGD", "MuonSign") and old not in ("ALIAS", "OnlineToNonconvex")
    )


def _converted(optimizer: Optimizer, state_dict: StateDict, old: str, new: str) -> dict[Any, Any]:
    """Return the states, by the saved parameters' numbers, that an optimizer can continue from."""
    if not _is_convertible(old, new):
        raise ValueError(
            f"convert=True: {old}'s state cannot be converted to {new}'s; possible are averaged gradients to "
            "StoSignSGD, SignSGD and MuonSign, and a base's state to SignConverted of it"
        )
    if new == f"{CONVERTED}{old}":
        return {key: _wrapped(state) for key, state in state_dict["state"].items()}
    converted = {}
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for key in saved["params"]:
            state = state_dict["state"].get(key)
            if state:
                converted[key] = _sign_state(state, saved, old, new, own)
    return converted


def _sign_state(
    state: Mapping[str, Any], saved: Mapping[str, Any], old: str, new: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    step = state.get("step", 0)
    converted: dict[str, Any] = {"step": torch.tensor(int(step), dtype=torch.int64, device="cpu")}
    if new == "SignSGD" and own["momentum"] == 0:
        return converted
    name = "momentum_buffer" if "Muon" in old and "exp_avg" not in state else "exp_avg"
    if not isinstance(state.get(name), Tensor):
        raise ValueError(f"convert=True: {old}'s state has no averaged gradient exp_avg to start {new} from")
    m = converted["exp_avg"] = _values(state, name, saved)
    if new == "StoSignSGD" or (new == "MuonSign" and not own["use_muon"]):
        G = m.abs()
        if "exp_inf" in state:
            G = torch.maximum(G, _values(state, "exp_inf", saved))
        elif "exp_avg_sq" in state and int(step) > 0:
            # |m| / G is then Adam's |m hat| / sqrt(v hat).
            beta1, beta2 = saved["betas"]
            v = _values(state, "exp_avg_sq", saved) / (1 - beta2 ** int(step))
            G = torch.maximum(G, v.sqrt() * (1 - beta1 ** int(step)))
        converted["exp_inf"] = G
    return converted


def _values(state: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> Tensor:
    """Return a saved state's values, in float32 at least."""
    stored = state[name]
    if type(stored).dequantize is not Tensor.dequantize:
        return stored.dequantize().float()
    if is_packed(state, name) or stored.dtype.itemsize < 4:
        return read_state(state, name, precision_of(state, group) or FLOAT32)
    return stored.detach().clone()


def _wrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "outer_step": torch.tensor(int(state.get("step", 0)), dtype=torch.int64, device="cpu")}
