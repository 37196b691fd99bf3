"""StateCollapseGuard: notices that an optimizer's state has died, and acts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign._lightning_names import is_a, under_both_names
from lightning_stosign._plain import plain
from lightning_stosign._tags import PREFIX
from lightning_stosign.callbacks._collapse_look import DEAD, EXPLODING, Look, Sickness, look_at
from lightning_stosign.callbacks._collapse_report import table
from lightning_stosign.callbacks._logging_gate import OwnSteps, check_every_n_steps, record_step
from lightning_stosign.callbacks._saved_state import state_of_only_one
from lightning_stosign.optim.emulation import emulated_precision
from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.promotion import next_wider, promote_state, state_precision_of

_ACTIONS = ("warn", "stop", "raise", "promote")

_EVERY_N_STEPS = 50  # Lightning's own default, for a Trainer(log_every_n_steps=0)

_MOST_FINDINGS = 3  # that a message puts in words; its table has them all


class StateCollapseError(RuntimeError):
    """An optimizer's state has collapsed, and ``StateCollapseGuard(action="raise")`` was asked to say so."""


@under_both_names
class StateCollapseGuard(Callback):
    """Acts when too much of an optimizer's state is zero, dead or exploding, or any of it NaN or inf.

    Looks at the states after every n-th optimizer step. A share beyond its limit on ``patience`` looks in a row is a
    collapse; a value that is not finite is one at once. It acts once for each condition (and layer), and says why in a
    table after the paper's Table 12: which layers, since which step, zeros of each state, the largest gradient and its
    square beside the smallest number that the state's storage can hold. The table is part of the warning or exception,
    and a text record in TensorBoard.

    ============== ====================================================================================================
    ``"warn"``     a warning
    ``"stop"``     a warning, and training ends after this step, in order
    ``"raise"``    a :class:`StateCollapseError` out of ``fit``
    ``"promote"``  a warning, and the states of the sick layers move to the next wider storage: fp8-raw, fp8, fp8-block,
                   bfloat16, float32 (:func:`promote_state`). Training goes on; a layer that is still sick ``patience``
                   looks later is moved again. What cannot be moved is warned about. For this package's optimizers, and
                   any other under :func:`emulate_state_precision`.
    ============== ====================================================================================================

    A look costs a few passes over the states and one transfer to the host. All ranks see the same and act in the same
    step. Promotions are part of the optimizer's state, so a resumed run equals the uninterrupted one.

    Args:
        max_zero_fraction: the largest healthy share of zeros in a watched state; this and the next two in [0, 1], where
            1 lets everything pass.
        patience: how many looks in a row, at least 1.
        action: what to do, as above.
        states: names of the states whose zeros count, e.g. ``("exp_avg_sq",)``; with several optimizers each name has
            to be a state of one of them. None: what each parameter's update is divided by or, where there is no such
            state, the state that gives the update its direction.
        max_dead_fraction: the largest healthy share of coordinates with numerator 0 and denominator 0: they cannot move.
        max_exploding_fraction: the largest healthy share with denominator 0 and numerator not: Adam's quotient explodes.
        per_layer: whether each layer has to keep to the limits, not only all of them together.
        every_n_steps: look after every n-th optimizer step. None: as ``Trainer(log_every_n_steps)``, or every 50th where
            that is 0.

    Attributes:
        collapsed_at: the optimizer's own step of the first collapse by condition: ``"exp_avg_sq"`` (a state's zeros),
            ``"dead_fraction"``, ``"exploding_fraction"``, with ``per_layer`` followed by ``"/<parameter name>"``; with
            several optimizers after ``"<number>-<class>/"``.
        promotions: for each promotion the ``step``, the ``layer``, and what it went ``from`` and ``to``.
        report: what was said at the latest collapse, or None.

    All three are part of checkpoints.

    Raises:
        ValueError: an argument is out of range; no optimizer has a state of a name in ``states``.
        TypeError: an argument is of the wrong type.

    Example::

        trainer = Trainer(callbacks=[StateCollapseGuard(action="promote", per_layer=True, every_n_steps=10)])

    Source:
        arXiv 2604.15416, Section 3.2 and Table 12.
    """  # noqa: E501

    def __init__(
        self,
        max_zero_fraction: float = 0.5,
        patience: int = 3,
        action: Literal["warn", "stop", "raise", "promote"] = "warn",
        states: Sequence[str] | None = None,
        *,
        max_dead_fraction: float = 1.0,
        max_exploding_fraction: float = 0.01,
        per_layer: bool = False,
        every_n_steps: int | None = None,
    ) -> None:
        fractions = plain((max_zero_fraction, max_dead_fraction, max_exploding_fraction))
        max_zero_fraction, max_dead_fraction, max_exploding_fraction = fractions
        patience, per_layer, every_n_steps = plain((patience, per_layer, every_n_steps))
        limits = {"zero": max_zero_fraction, "dead": max_dead_fraction, "exploding": max_exploding_fraction}
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"max_{name}_fraction={value!r} must be a number")
            if not 0 <= value <= 1:
                raise ValueError(f"max_{name}_fraction={value} must be in [0, 1]")
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
        if not isinstance(per_layer, bool):
            raise TypeError(f"per_layer={per_layer!r} must be a bool")
        check_every_n_steps(every_n_steps)
        self.max_zero_fraction = max_zero_fraction
        self.max_dead_fraction = max_dead_fraction
        self.max_exploding_fraction = max_exploding_fraction
        self.patience = patience
        self.action = action
        self.states = None if states is None else tuple(states)
        self.per_layer = per_layer
        self.every_n_steps = every_n_steps
        self._names: dict[Tensor, str] = {}
        self._handles: list[RemovableHandle] = []
        self._steps = OwnSteps()
        self._forget()

    def _forget(self) -> None:
        self.collapsed_at: dict[str, int] = {}
        self.promotions: list[dict[str, Any]] = []
        self.report: str | None = None
        self._sick: dict[str, tuple[int, int]] = {}  # key: since which step, and for how many looks
        self._done: set[str] = set()  # keys of which nothing more is to be said
        self._states_of: dict[str, set[str]] = {}  # by the optimizers' labels

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Start anew: ``fit`` makes new optimizers. A resumed run gets its past from the checkpoint after this."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch the trainer's optimizers."""
        self._names = {param: name for name, param in pl_module.named_parameters()}
        for number, optimizer in enumerate(trainer.optimizers):
            label = "" if len(trainer.optimizers) == 1 else f"{number}-{type(optimizer).__name__}/"

            self._steps.watch(optimizer)

            def look(optimizer: Optimizer, args: Any, kwargs: Any, label: str = label) -> None:
                every_n_steps = self.every_n_steps or trainer.log_every_n_steps or _EVERY_N_STEPS  # type: ignore[attr-defined]
                if self._steps.is_due(trainer, optimizer, every_n_steps):
                    self._look(trainer, optimizer, label, self._steps.number(trainer, optimizer))
                self._steps.advance(optimizer)

            self._handles.append(optimizer.register_step_post_hook(look))
            own = isinstance(optimizer, LowPrecisionOptimizer)
            if self.action == "promote" and not own and emulated_precision(optimizer) is None:
                rank_zero_warn(
                    f"StateCollapseGuard(action='promote') can only warn about {type(optimizer).__name__}: its states "
                    "are stored in a way of its own; emulate_state_precision(...) makes them ones that can be promoted"
                )

    def _look(self, trainer: "pl.Trainer", optimizer: Optimizer, label: str, step: int) -> None:
        if not optimizer.state and any(group.get("on_nonfinite") == "skip" for group in optimizer.param_groups):
            return  # every step so far was skipped
        look = look_at(optimizer, self._names, self.states)
        self._check_states(trainer, label, look)
        limits = {DEAD: self.max_dead_fraction, EXPLODING: self.max_exploding_fraction}
        sick = {label + sickness.key: sickness for sickness in look.sicknesses(limits, self.max_zero_fraction)}
        for key in [key for key in self._sick if key.startswith(label) and key not in sick]:
            del self._sick[key]
        for key in sick:
            since, looks = self._sick.get(key, (step, 0))
            self._sick[key] = since, looks + 1
        collapsed = {
            key: sickness
            for key, sickness in sick.items()
            if (sickness.layer is not None) == self.per_layer
            and key not in self._done
            and (self._sick[key][1] >= self.patience or not sickness.finite)
        }
        if collapsed:
            for key in collapsed:
                self.collapsed_at.setdefault(key, step)
            self._act(trainer, optimizer, label, step, look, collapsed, sick)

    def _check_states(self, trainer: "pl.Trainer", label: str, look: Look) -> None:
        """Raise if all optimizers have been looked at, and a name in ``states`` was a state of none."""
        if label in self._states_of:
            return
        self._states_of[label] = set(look.states)
        present = set().union(*self._states_of.values())
        if len(self._states_of) == len(trainer.optimizers) and (missing := set(self.states or ()) - present):
            optimizers = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            subject = " and ".join(optimizers) + (" has" if len(optimizers) == 1 else " have")
            raise ValueError(f"states: {subject} no state {sorted(missing)}; accepted: {sorted(present)}")

    def _act(
        self,
        trainer: "pl.Trainer",
        optimizer: Optimizer,
        label: str,
        step: int,
        look: Look,
        collapsed: dict[str, Sickness],
        sick: dict[str, Sickness],
    ) -> None:
        """Report, and do what was asked for.

        Args:
            trainer: the trainer.
            optimizer: the optimizer.
            label: what its keys begin with.
            step: the number of the optimizer's step.
            look: what has been seen of its states.
            collapsed: the conditions to act upon, by key.
            sick: those and all others that are beyond their limit.
        """
        conditions = {sickness.condition for sickness in collapsed.values()}
        # Of a collapse of all layers together, those that are beyond the limit themselves: at least one is.
        chosen = collapsed if self.per_layer else {key: s for key, s in sick.items() if s.condition in conditions}
        layers: dict[str, list[str]] = {}
        for key in sorted(chosen, key=lambda key: (chosen[key].finite, -chosen[key].share)):
            if (layer := chosen[key].layer) is not None:
                layers.setdefault(layer, []).append(key)
        since = {layer: min(self._sick[key][0] for key in keys) for layer, keys in layers.items()}

        name = type(optimizer).__name__
        found = "; ".join(map(str, list(collapsed.values())[:_MOST_FINDINGS]))
        if len(collapsed) > _MOST_FINDINGS:
            found += f"; and {len(collapsed) - _MOST_FINDINGS} more"
        self.report = (
            f"The state of {label.rstrip('/') or name} has collapsed at step {step} (patience "
            f"{self.patience}): {found}.\n\n{table(optimizer, look, since)}"
        )
        if self.action == "promote":
            healable = {layer: keys for layer, keys in layers.items() if all(chosen[key].finite for key in keys)}
            self.report += f"\n\n{self._promote(optimizer, step, look, collapsed, healable)}"
        else:
            self._done.update(collapsed)
        if self.action == "stop":
            self.report += f"\n\n{_announced(trainer)}"
            trainer.should_stop = True
        self._log(trainer, label)
        if self.action == "raise":
            raise StateCollapseError(self.report)
        rank_zero_warn(self.report, category=RuntimeWarning)

    def _promote(
        self,
        optimizer: Optimizer,
        step: int,
        look: Look,
        collapsed: dict[str, Sickness],
        layers: dict[str, list[str]],
    ) -> str:
        """Move the states of these layers (with the keys of what they suffer from) to wider storage, and say so."""
        moves: dict[str, tuple[str, str]] = {}
        for layer in layers:
            old = state_precision_of(optimizer, look.params[layer])
            if old is not None and next_wider(old) is not None:
                moves[layer] = str(old), str(promote_state(optimizer, look.params[layer]))
        self.promotions += [
            {"step": step, "layer": layer, "from": old, "to": new} for layer, (old, new) in moves.items()
        ]
        stuck = {key for key, s in collapsed.items() if s.layer is not None and s.layer not in moves}
        self._done |= stuck if moves else collapsed.keys()
        for key in {*collapsed, *(key for layer in moves for key in layers[layer])}:
            self._sick[key] = self._sick[key][0], 0  # the wider storage gets its own looks
        if not moves:
            return (
                "Nothing can be promoted: these states are in float32 already, hold values that are not finite, or are "
                f"stored by {type(optimizer).__name__} in a way of its own."
            )
        kinds = Counter(moves.values())
        return "Promoted: " + "; ".join(f"{n} layer(s) from {a} to {b}" for (a, b), n in kinds.items()) + "."

    def _log(self, trainer: "pl.Trainer", label: str) -> None:
        prefix, step = f"{PREFIX}/{label}", record_step(trainer)
        for logger in trainer.loggers:
            if is_a(logger, TensorBoardLogger):
                logger.experiment.add_text(f"{prefix}collapse", self.report, step)
            if self.action == "promote":
                logger.log_metrics({f"{prefix}promotions": len(self.promotions)}, step=step)

    @property
    def state_key(self) -> str:
        """The name of this guard's state in checkpoints: guards with different options may stand side by side."""
        limits = self.max_zero_fraction, self.max_dead_fraction, self.max_exploding_fraction
        return self._generate_state_key(
            action=self.action,
            states=self.states,
            limits=limits,
            patience=self.patience,
            per_layer=self.per_layer,
            every_n_steps=self.every_n_steps,
        )

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of the one guard in a checkpoint whose options were other ones."""
        saved = state_of_only_one(self, checkpoint)
        if saved is not None:
            self.load_state_dict(saved)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know: plain values."""
        return {
            "action": self.action,
            "collapsed_at": dict(self.collapsed_at),
            "promotions": [dict(promotion) for promotion in self.promotions],
            "report": self.report,
            "sick": {key: list(pair) for key, pair in self._sick.items()},
            "done": sorted(self._done),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it. A run that is resumed with another action takes that one for what has collapsed already."""
        # With defaults for what checkpoints of version 0.1.0 lack.
        self.collapsed_at = dict(state_dict["collapsed_at"])
        self.promotions = [dict(promotion) for promotion in state_dict.get("promotions", [])]
        self.report = state_dict.get("report")
        self._sick = {key: (since, looks) for key, (since, looks) in state_dict.get("sick", {}).items()}
        same_action = state_dict.get("action", self.action) == self.action
        self._done = set(state_dict.get("done", self.collapsed_at)) if same_action else set()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steps.clear()
        self._names.clear()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the optimizers: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")


def _announced(trainer: "pl.Trainer") -> str:
    """Say when training stops: Lightning goes on until ``min_steps`` and ``min_epochs`` are reached."""
    waits = []
    if trainer.min_steps and trainer.global_step + 1 < trainer.min_steps:
        waits.append(f"min_steps={trainer.min_steps}")
    if trainer.min_epochs and trainer.current_epoch < trainer.min_epochs:
        waits.append(f"min_epochs={trainer.min_epochs}")
    if not waits:
        return "Training stops."
    return f"Training will stop once Trainer({', '.join(waits)}) allows it."
