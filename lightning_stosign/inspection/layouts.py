"""Where in what a file holds the optimizers are, and the weights that name their parameters."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lightning_stosign.inspection.parameter_names import plain_name
from lightning_stosign.inspection.pickle_reader import Unread
from lightning_stosign.inspection.stored_tensor import WrappedTensor, is_file_tensor

_MOST_PLACES = 200_000  # containers that are searched
_DEEPEST = 8
_WEIGHTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
_STEPS = ("global_step", "global_steps", "step", "iter_num", "step_count", "iteration", "iter", "steps")


# The key of a state_dict with the name of an optimizer that wraps the one that it is of.
WRAPPER = "wrapped_by"
_WRAPPERS = {"lookahead_state": "Lookahead", "schedulefree_state": "ScheduleFree"}


class Found(NamedTuple):
    """What a nest of containers holds.

    Attributes:
        optimizers: the state_dicts of optimizers by the path that leads to them.
        weights: the model's tensors by name, in the model's order; empty where there are none.
    """

    optimizers: dict[tuple[Any, ...], dict[str, Any]]
    weights: dict[str, Any]


def find(content: Any) -> Found:
    """Find every optimizer's state_dict in what was saved, and the weights of its model.

    Args:
        content: plain data.
    """
    optimizers: dict[tuple[Any, ...], dict[str, Any]] = {}
    weights: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for path, value in _containers(content):
        if (wrapped := _unwrapped(value)) is not None:
            optimizers[path] = wrapped
        elif is_optimizer_state(value):
            optimizers[path] = value
        elif isinstance(value, Unread):
            if named := dict(module_tensors(value)):
                weights.append((path, named))
        elif isinstance(value, dict):
            named = {key: x for key, x in value.items() if isinstance(key, str) and _is_tensor(x)}
            if named and not any(path[: len(owner)] == owner for owner in optimizers):
                weights.append((path, named))

    def rank(entry: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[int, int]:
        path, named = entry
        key = next((part for part in reversed(path) if part in _WEIGHTS), None)
        return (_WEIGHTS.index(key) if key is not None else len(_WEIGHTS), -len(named))

    best = min(weights, key=rank, default=((), {}))[1]
    return Found(optimizers, {plain_name(name): value for name, value in best.items()})


def _unwrapped(value: Any) -> dict[str, Any] | None:
    """Return one state_dict of an optimizer that wraps another: pytorch_optimizer's Lookahead and its kin.

    The wrapper's own states, by (group, place in the group), join those of the wrapped one.
    """
    base: Any = value.get("base_optimizer") if isinstance(value, dict) else None
    if not is_optimizer_state(base):
        return None
    states = {key: dict(state) for key, state in base["state"].items() if isinstance(state, dict)}
    name = "wrapper"
    for key, own in value.items():
        if not (isinstance(key, str) and key.endswith("_state") and isinstance(own, dict)):
            continue
        name = _WRAPPERS.get(key, key.removesuffix("_state"))
        for place, state in own.items():
            try:
                group, index = place
                parameter = base["param_groups"][group]["params"][index]
            except (TypeError, ValueError, LookupError):
                continue
            if isinstance(state, dict):
                states.setdefault(parameter, {}).update(state)
    return {"state": states, "param_groups": base["param_groups"], WRAPPER: name}


def _containers(content: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield each dict, list or object once, with the shortest path to it; nothing within an optimizer's state."""
    waiting: deque[tuple[tuple[Any, ...], Any]] = deque()
    if isinstance(content, (dict, list, tuple, Unread)):
        waiting.append(((), content))
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_PLACES:
        path, value = waiting.popleft()
        if id(value) in seen:
            # Lightning may list one optimizer twice, with two state_dicts; one dict in two places counts once.
            continue
        seen.add(id(value))
        yield path, value
        if (
            isinstance(value, Unread)
            or is_optimizer_state(value)
            or _unwrapped(value) is not None
            or len(path) == _DEEPEST
        ):
            continue
        items = value.items() if isinstance(value, dict) else enumerate(value)
        waiting.extend(((*path, key), item) for key, item in items if isinstance(item, (dict, list, tuple, Unread)))


def is_optimizer_state(value: Any) -> bool:
    """Return whether this is the state_dict of a torch optimizer.

    Example:
        >>> is_optimizer_state({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]})
        True
    """
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value.get("param_groups"), list)
        and len(value["param_groups"]) > 0
        and all(map(_is_param_group, value["param_groups"]))
    )


def _is_param_group(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("params"), (list, tuple))
        and all(isinstance(key, (int, str)) for key in value["params"])
    )


def _is_tensor(value: Any) -> bool:
    return is_file_tensor(value) or isinstance(value, WrappedTensor)


def module_tensors(module: Unread, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a pickled ``nn.Module`` by name, without building it.

    Args:
        module: the description of a pickled object; one that is no module has no parameters.
        prefix: of the names.
    """
    waiting = [(prefix, module)]
    seen: set[int] = set()
    while waiting:
        prefix, each = waiting.pop()
        state = each.state
        if id(each) in seen or not isinstance(state, dict) or len(seen) > _MOST_PLACES or len(prefix) > 1000:
            continue
        seen.add(id(each))
        for name, value in _named(state.get("_parameters")):
            if _is_tensor(value):
                yield prefix + name, value
        children = [(f"{prefix}{name}.", value) for name, value in _named(state.get("_modules"))]
        waiting += [(name, child) for name, child in reversed(children) if isinstance(child, Unread)]


def _named(values: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        yield from ((name, value) for name, value in values.items() if isinstance(name, str))


def unread_objects(content: Any) -> list[str]:
    """Return the names of the classes of the outermost objects in what was saved that are not loaded."""
    names: dict[str, None] = {}
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Unread):
            names[value.name] = None
        elif isinstance(value, dict):
            waiting += value.values()
            waiting += [key for key in value if isinstance(key, (Unread, tuple))]
        elif isinstance(value, (list, tuple)):
            waiting += value
    return sorted(names)


def facts_of(content: Any) -> dict[str, int | str]:
    """Return the step, the epoch and Lightning's version, as far as what was saved has them."""
    if not isinstance(content, Mapping):
        return {}
    facts: dict[str, int | str] = {}
    step = next((content[key] for key in _STEPS if type(content.get(key)) is int), None)
    if step is not None:
        facts["global_step"] = step
    if type(content.get("epoch")) is int:
        facts["epoch"] = content["epoch"]
    if isinstance(version := content.get("pytorch-lightning_version"), str):
        facts["pytorch-lightning_version"] = version
    return facts


def layout_of(content: Any) -> str:
    """Return the name of the layout of what was saved, by its keys."""
    if is_optimizer_state(content) or _unwrapped(content) is not None:
        return "optimizer state_dict"
    keys = set(content) if isinstance(content, Mapping) else set()
    for name, needed in _LAYOUTS:
        if needed <= keys:
            return name
    return "PyTorch checkpoint"


_LAYOUTS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (name, frozenset(keys.split()))
    for name, keys in (
        ("Lightning checkpoint", "pytorch-lightning_version"),
        ("Lightning checkpoint", "state_dict optimizer_states"),
        ("nanoGPT checkpoint", "model optimizer model_args iter_num"),
        ("Ultralytics checkpoint", "model ema optimizer train_args"),
        ("LitGPT checkpoint", "model optimizer iter_num step_count"),
        ("checkpoint of model_state_dict and optimizer_state_dict", "model_state_dict optimizer_state_dict"),
        ("checkpoint of model and optimizer", "model optimizer"),
    )
)
