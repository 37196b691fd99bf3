"""What was found, as one CSV file that grows line by line, so that an interrupted measurement goes on where it was."""

import csv
from pathlib import Path
from typing import NamedTuple

COLUMNS = ["measure", "size", "workers", "mbit", "method", "lr", "seed", "step", "quantity", "value"]


class Key(NamedTuple):
    """What a measurement was of.

    Args:
        measure: "traffic", "steps", "loss" or "quality".
        size: of the GPT.
        workers: number of hosts.
        mbit: the link's rate in Mbit/s; None: not limited.
        method: a name of ``TIMED``.
        lr: the learning rate, where several were tried; else None.
        seed: of the run.
    """

    measure: str
    size: str
    workers: int
    mbit: float | None
    method: str
    lr: float | None = None
    seed: int = 0


class Store:
    """Measurements in a CSV file: a row a value, with the number of steps before it.

    Args:
        path: of the file; made by the first addition.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[Key, dict[str, dict[int, float]]] = {}
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {COLUMNS}")
            for row in reader:
                mbit, lr = (float(row[name]) if row[name] else None for name in ("mbit", "lr"))
                key = Key(row["measure"], row["size"], int(row["workers"]), mbit, row["method"], lr, int(row["seed"]))
                self._values(key, row["quantity"])[int(row["step"])] = float(row["value"])

    def __contains__(self, key: Key) -> bool:
        return key in self.found

    def add(self, key: Key, values: list[tuple[int, str, float]]) -> None:
        """Append what was measured, as (step, quantity, value), in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            mbit, lr = ("" if value is None else f"{value:g}" for value in (key.mbit, key.lr))
            what = [key.measure, key.size, key.workers, mbit, key.method, lr, key.seed]
            for step, quantity, value in values:
                writer.writerow([*what, step, quantity, f"{value:.6g}"])
                self._values(key, quantity)[step] = value

    def series(self, key: Key, quantity: str) -> dict[int, float]:
        """Return a quantity's values by step; empty if it was not measured."""
        return self.found.get(key, {}).get(quantity, {})

    def value(self, key: Key, quantity: str) -> float | None:
        """Return a quantity's last value; None if it was not measured."""
        values = self.series(key, quantity)
        return values[max(values)] if values else None

    def _values(self, key: Key, quantity: str) -> dict[int, float]:
        return self.found.setdefault(key, {}).setdefault(quantity, {})
