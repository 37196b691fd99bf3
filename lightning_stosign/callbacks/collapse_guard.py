"""StateCollapseGuard: notices that an optimizer's state has died, and acts."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign.callbacks._logging_gate import is_due
from lightning_stosign.health.readers import read_moments
from lightning_stosign.health.snapshot import parameters_of, zero_fractions

_ACTIONS = ("warn", "stop", "raise")


class StateCollapseError(RuntimeError):
    """An optimizer's state has collapsed, and ``StateCollapseGuard(action="raise")`` was asked to say so."""


class StateCollapseGuard(Callback):
    """Acts when too much of an optimizer's state has become zero, or any of it NaN or inf.

    Looks after every ``Trainer(log_every_n_steps)``-th optimizer step at the share of zeros of each state over all
    layers. A share above ``max_zero_fraction`` on ``patience`` looks in a row is a collapse; a value that is not finite
    is one at once. It acts once for each state. The look costs one pass over the states and one transfer to the host.

    Args:
        max_zero_fraction: the largest share of zeros that is healthy, in [0, 1].
        patience: how many looks in a row, at least 1.
        action: ``"warn"``; ``"stop"``: end training after this step, in order; ``"raise"``: a
            :class:`StateCollapseError` out of ``fit``.
        states: names of the states to watch, e.g. ``("exp_avg_sq",)``. None: what each parameter's update is divided by
            or, where there is no such state, the state that gives the update its direction.

    Attributes:
        collapsed_at: the optimizer step of the collapse by state; part of checkpoints.

    Raises:
        ValueError: an argument is out of range; the optimizer has no state of a name in ``states``.
        TypeError: an argument is of the wrong type.

    Example::

        trainer = Trainer(callbacks=[StateCollapseGuard(max_zero_fraction=0.5, patience=3, action="stop")])

    Source:
        arXiv 2604.15416, Section 3.2 and Table 12.
    """

    def __init__(
        self,
        max_zero_fraction: float = 0.5,
        patience: int = 3,
        action: Literal["warn", "stop", "raise"] = "warn",
        states: Sequence[str] | None = None,
    ) -> None:
        if isinstance(max_zero_fraction, bool) or not isinstance(max_zero_fraction, (int, float)):
            raise TypeError(f"max_zero_fraction={max_zero_fraction!r} must be a number")
        if not 0 <= max_zero_fraction <= 1:
            raise ValueError(f"max_zero_fraction={max_zero_fraction} must be in [0, 1]")
        if isinstance(patience, bool) or not isinstance(patience, int):
            raise TypeError(f"patience={patience!r} must be an int")
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1")
        if action not in _ACTIONS:
            raise ValueError(f"action={action!r} is unknown; accepted: {', '.join(map(repr, _ACTIONS))}")
        if isinstance(states, str) or not isinstance(states, (Sequence, type(None))):
            raise TypeError(f"states={states!r} must be a list of names or None")
        if states is not None and not states:
            raise ValueError("states=[] watches nothing; accepted: names of states, or None for the decisive ones")
        self.max_zero_fraction = max_zero_fraction
        self.patience = patience
        self.action = action
        self.states = None if states is None else tuple(states)
        self.collapsed_at: dict[str, int] = {}
        self._looks_above: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Start anew: ``fit`` makes new optimizers. A resumed run gets its past from the checkpoint after this."""
        if stage == "fit":
            self.collapsed_at.clear()
            self._looks_above.clear()

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch the trainer's optimizers."""
        for number, optimizer in enumerate(trainer.optimizers):
            label = "" if len(trainer.optimizers) == 1 else f"{number}-{type(optimizer).__name__}/"

            def look(optimizer: Optimizer, args: Any, kwargs: Any, label: str = label) -> None:
                if is_due(trainer, None):
                    self._look(trainer, optimizer, label)

            self._handles.append(optimizer.register_step_post_hook(look))

    def _look(self, trainer: "pl.Trainer", optimizer: Optimizer, label: str) -> None:
        if not optimizer.state and any(group.get("on_nonfinite") == "skip" for group in optimizer.param_groups):
            return  # every step so far was skipped
        fractions = zero_fractions(optimizer, self.states)
        if missing := set(self.states or ()) - fractions.keys():
            present = sorted(
                {n for p, group in parameters_of(optimizer) for n in read_moments(optimizer, p, group).states}
            )
            optimizer_name = type(optimizer).__name__
            raise ValueError(f"states: {optimizer_name} has no state {sorted(missing)}; accepted: {present}")
        for name, (fraction, finite) in fractions.items():
            key = label + name
            above = not finite or fraction > self.max_zero_fraction
            self._looks_above[key] = self._looks_above.get(key, 0) + 1 if above else 0
            if key not in self.collapsed_at and (not finite or self._looks_above[key] >= self.patience):
                self.collapsed_at[key] = trainer.global_step + 1  # counts this step only after its hooks
                self._act(trainer, key, fraction, finite)

    def _act(self, trainer: "pl.Trainer", key: str, fraction: float, finite: bool) -> None:
        found = "it holds values that are not finite"
        if finite:
            limit = f"more than {self.max_zero_fraction:.1%}, {self.patience} looks in a row"
            found = f"{fraction:.1%} of its entries are zero ({limit})"
        message = f"The optimizer state {key!r} has collapsed at step {self.collapsed_at[key]}: {found}."
        if self.action == "raise":
            raise StateCollapseError(message)
        if self.action == "stop":
            message += " Training stops."
            trainer.should_stop = True
        rank_zero_warn(message, category=RuntimeWarning)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {"collapsed_at": dict(self.collapsed_at), "looks_above": dict(self._looks_above)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.collapsed_at = dict(state_dict["collapsed_at"])
        self._looks_above = dict(state_dict["looks_above"])

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the optimizers: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")
