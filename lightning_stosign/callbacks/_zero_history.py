"""The shares of zeros of every layer over time, kept on the device until somebody wants to see them."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.optim import Optimizer

from lightning_stosign.health.sharding import Layout

_MOST_COLUMNS = 400  # then every second one goes: a figure has no room for more

Key = tuple[str, str]  # state, layer


class ZeroHistory:
    """Shares of zeros by step, state and layer.

    Keeps at most 400 steps: a longer run keeps every second, fourth, ... of its records.
    """

    def __init__(self) -> None:
        self._columns: list[tuple[int, tuple[Key, ...], Tensor]] = []
        self._every = 1
        self._seen = 0

    @property
    def last_step(self) -> int | None:
        """The step of the last record, None without one."""
        return self._columns[-1][0] if self._columns else None

    def add(self, step: int, values: dict[Key, tuple[Tensor, Layout]], keep: bool = False) -> None:
        """Count the zeros of a step, without waiting for the device.

        Args:
            step: the record's number.
            values: by state and layer, the values on this rank and where they lie.
            keep: keep this record, whatever its turn; for the last one.
        """
        self._seen += 1
        if not values or not (keep or (self._seen - 1) % self._every == 0):
            return
        self._columns.append((step, tuple(values), _zero_shares(list(values.values()))))
        if len(self._columns) > _MOST_COLUMNS:
            self._columns = self._columns[::2]
            self._every *= 2

    def table(self, state: str) -> tuple[np.ndarray[Any, Any], list[str], list[int]]:
        """Return the shares of a state's zeros on the host.

        Returns:
            Shares ``[layers, steps]``, NaN where a layer had no such state yet; the layers; the steps.
        """
        layers = list(dict.fromkeys(layer for _, keys, _ in self._columns for name, layer in keys if name == state))
        rows = {layer: row for row, layer in enumerate(layers)}
        shares = np.full((len(layers), len(self._columns)), np.nan)
        on_host = [column.cpu().tolist() for *_, column in self._columns]
        for place, ((_, keys, _), column) in enumerate(zip(self._columns, on_host, strict=True)):
            for (name, layer), share in zip(keys, column, strict=True):
                if name == state:
                    shares[rows[layer], place] = share
        return shares, layers, [step for step, *_ in self._columns]

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        columns = [{"step": step, "keys": list(keys), "shares": column.cpu()} for step, keys, column in self._columns]
        return {"columns": columns, "every": self._every, "seen": self._seen}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> "ZeroHistory":
        """Restore it."""
        history = cls()
        history._columns = [
            (column["step"], tuple(map(tuple, column["keys"])), column["shares"]) for column in state_dict["columns"]
        ]
        history._every, history._seen = state_dict["every"], state_dict["seen"]
        return history


def _zero_shares(values: list[tuple[Tensor, Layout]]) -> Tensor:
    """Return the share of zeros of each, over all ranks; float32, on the device."""
    device = values[0][0].device
    zeros = torch.stack([(value.numel() - torch.count_nonzero(value)).to(device, torch.float32) for value, _ in values])
    by_group: dict[ProcessGroup, list[int]] = defaultdict(list)
    for place, (_, layout) in enumerate(values):
        if layout.group is not None:
            by_group[layout.group].append(place)
    for group, places in by_group.items():
        mine = zeros[places]
        all_reduce(mine, group=group)
        zeros[places] = mine
    sizes = torch.tensor([max(layout.numel, 1) for _, layout in values], dtype=torch.float32, device="cpu")
    return zeros / sizes.to(device, non_blocking=True)


def optimizer_label(optimizers: list[Optimizer], optimizer: Optimizer) -> str:
    """Return what tells an optimizer from the module's others: ``"0-AdamW/"``; nothing where it is the only one."""
    if len(optimizers) == 1:
        return ""
    number = next(i for i, other in enumerate(optimizers) if other is optimizer)
    return f"{number}-{type(optimizer).__name__}/"
