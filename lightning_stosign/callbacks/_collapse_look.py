"""What StateCollapseGuard sees at one look: how much of each state and layer is sick, and which limits that breaks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.health.readers import read_moments
from lightning_stosign.health.snapshot import Snapshot, parameters_of

DEAD, EXPLODING = "dead_fraction", "exploding_fraction"


class Sickness(NamedTuple):
    """A condition of a layer, or of all layers together, that is beyond its limit.

    Attributes:
        condition: ``"dead_fraction"``, ``"exploding_fraction"``, or the name of a state, for its zeros.
        layer: the parameter's name; None for all layers together.
        share: the share of sick entries.
        limit: the largest healthy share.
        finite: False where the state holds NaN or inf, whatever the share.
    """

    condition: str
    layer: str | None
    share: float
    limit: float
    finite: bool = True

    @property
    def key(self) -> str:
        """The name under which a guard keeps count."""
        return self.condition if self.layer is None else f"{self.condition}/{self.layer}"

    def __str__(self) -> str:
        """Say it in words."""
        where = "" if self.layer is None else f" in {self.layer}"
        if not self.finite:
            return f"{self.condition}{where} holds values that are not finite"
        what = {DEAD: "of the coordinates are dead", EXPLODING: "of the quotients explode"}.get(
            self.condition, f"of {self.condition} is zero"
        )
        return f"{self.share:.1%} {what}{where} (limit {self.limit:.1%})"


class Look(NamedTuple):
    """The statistics of an optimizer's states after a step.

    Attributes:
        params: the parameters that have a state, by name.
        states: the names of all states.
        watched: the names of the states whose zeros count.
        numbers: the records of :class:`Snapshot`, by tag and by tag and layer.
    """

    params: Mapping[str, Tensor]
    states: Sequence[str]
    watched: Sequence[str]
    numbers: Mapping[str, float]

    def number(self, tag: str, layer: str | None) -> float | None:
        """Return a record, or None where the layer has none."""
        return self.numbers.get(tag if layer is None else f"{tag}/{layer}")

    def sicknesses(self, limits: Mapping[str, float], zero_limit: float) -> Iterator[Sickness]:
        """Yield every condition that is beyond its limit: of all layers together, and of each.

        Args:
            limits: the largest healthy share of dead and of exploding coordinates, by condition.
            zero_limit: the largest healthy share of zeros of a watched state.
        """
        for layer in (None, *self.params):
            for state in self.watched:
                share = self.number(f"zero_fraction/{state}", layer)
                largest = self.number(f"abs_max/{state}", layer)
                if share is None or largest is None:
                    continue
                finite = math.isfinite(largest)
                if share > zero_limit or not finite:
                    yield Sickness(state, layer, share, zero_limit, finite)
            for condition, limit in limits.items():
                share = self.number(condition, layer)
                if share is not None and share > limit:
                    yield Sickness(condition, layer, share, limit)


def look_at(optimizer: Optimizer, names: Mapping[Tensor, str], states: Sequence[str] | None) -> Look:
    """Look at an optimizer's states: a few passes over them, and one transfer to the host.

    Args:
        optimizer: any torch optimizer.
        names: the names of the model's parameters; others are named by their number in the optimizer.
        states: the names of the states to watch; None: each parameter's decisive ones.
    """
    params: dict[str, Tensor] = {}
    # Dictionaries as sets that keep the order, the same on every rank.
    seen: dict[str, None] = {}
    watched: dict[str, None] = {}
    snapshot = Snapshot()
    for number, (param, group) in enumerate(parameters_of(optimizer)):
        moments = read_moments(optimizer, param, group)
        if not moments.states:
            continue
        name = names.get(param, f"parameter {number}")
        params[name] = param
        seen.update(dict.fromkeys(moments.states))
        chosen = moments.decisive_names if states is None else moments.states.keys() & set(states)
        watched.update(dict.fromkeys(sorted(chosen)))
        snapshot.add_states(name, moments)
    numbers, _ = snapshot.records(per_layer=True)
    return Look(params, tuple(seen), tuple(watched), numbers)
