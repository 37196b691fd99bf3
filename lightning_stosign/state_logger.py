"""OptimizerStateLogger: the monitor's records in a training loop of your own, without Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stosign._plain import plain
from lightning_stosign._tags import PREFIX, full_tags, warn_of_old_tags
from lightning_stosign.health.forecast import check_format
from lightning_stosign.health.readers import read_moments
from lightning_stosign.health.snapshot import Snapshot, parameters_of


class ScalarWriter(Protocol):
    """What records are written to: TensorBoard's ``SummaryWriter``, or anything else with this method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write one number."""


class OptimizerStateLogger:
    """Logs what is in an optimizer's state, after every n-th call of :meth:`step`.

    The tags are those of :class:`OptimizerStateMonitor`, but for what that sees before the update (``update_rms`` and
    the gradients). Changes nothing.

    Args:
        writer: where to write, e.g. ``torch.utils.tensorboard.SummaryWriter``.
        every_n_steps: record every n-th step, at least 1.
        names: the parameters' names: a module, or pairs as of ``module.named_parameters()``. None: those that the
            optimizer knows, else the parameter's number.
        per_layer: also record each parameter.
        forecast: formats for ``underflow_fraction`` and ``stalled_fraction``, by :class:`StatePrecision` name.
        prefix: the group of the global tags; layers go under ``per_layer_<tag>``, after another prefix
            ``<prefix>_per_layer_<tag>``.
        old_tags: deprecated: log layers as ``<prefix>/<tag>/<name>``, as version 0.1 did.

    Raises:
        ValueError: ``every_n_steps`` is not an int of at least 1; a format is unknown.

    Example:
        >>> import torch
        >>> class Print:
        ...     def add_scalar(self, tag, value, step):
        ...         if tag == "optimizer_state/zero_fraction/exp_avg_sq":
        ...             print(step, tag, value)
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> logger = OptimizerStateLogger(Print(), every_n_steps=2)
        >>> for _ in range(2):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     records = logger.step(optimizer)
        2 optimizer_state/zero_fraction/exp_avg_sq 0.0
    """

    def __init__(
        self,
        writer: ScalarWriter,
        every_n_steps: int = 50,
        *,
        names: nn.Module | Sequence[tuple[str, Tensor]] | None = None,
        per_layer: bool = True,
        forecast: Sequence[str] = ("fp8", "fp8-raw"),
        prefix: str = PREFIX,
        old_tags: bool = False,
    ) -> None:
        every_n_steps = plain(every_n_steps)
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} must be an int of at least 1")
        for format_name in forecast:
            check_format(format_name)
        pairs = names.named_parameters() if isinstance(names, nn.Module) else names or ()
        self._names = {param: name for name, param in pairs}
        self._writer, self._every = writer, every_n_steps
        self._per_layer, self._forecast, self._prefix = per_layer, tuple(forecast), prefix
        self._old_tags = old_tags
        if old_tags:
            warn_of_old_tags("OptimizerStateLogger")
        self._calls = 0

    def step(self, optimizer: Optimizer, global_step: int | None = None) -> dict[str, float]:
        """Record the states after an update; call it once after each ``optimizer.step()``.

        Args:
            optimizer: any torch optimizer.
            global_step: what to record under. None: the number of calls so far.

        Returns:
            What was recorded, by tag; empty where nothing was due.
        """
        self._calls += 1
        if self._calls % self._every:
            return {}
        scalars = state_records(optimizer, self._names, per_layer=self._per_layer, forecast=self._forecast)
        names = full_tags(scalars, prefix=self._prefix, old=self._old_tags)
        records = {names[tag]: value for tag, value in scalars.items()}
        for tag, value in records.items():
            self._writer.add_scalar(tag, value, self._calls if global_step is None else global_step)
        return records


def state_records(
    optimizer: Optimizer, names: Mapping[Tensor, str], *, per_layer: bool, forecast: Sequence[str]
) -> dict[str, float]:
    """Return the statistics of an optimizer's states by tag; one transfer to the host.

    Args:
        optimizer: any torch optimizer.
        names: the parameters' names; others go by what the optimizer calls them, or by their number.
        per_layer: also those of each parameter, as ``<tag>/<name>``.
        forecast: formats to forecast.
    """
    snapshot = Snapshot(forecast)
    for number, (param, group) in enumerate(parameters_of(optimizer)):
        snapshot.add_states(names.get(param) or _own_name(param, group, number), read_moments(optimizer, param, group))
    scalars, _ = snapshot.records(per_layer)
    return scalars


def _own_name(param: Tensor, group: Mapping[str, Any], number: int) -> str:
    for name, other in zip(group.get("param_names", ()), group["params"], strict=False):
        if other is param:
            return name
    return f"parameter {number}"
