"""Results as CSV files, appended run by run, so that an interrupted study goes on where it was."""

import csv
import math
from dataclasses import asdict, fields
from pathlib import Path
from threading import Lock
from typing import Any

from evidence.runs import Result, Run

_SETTINGS = [f.name for f in fields(Run)]
_OUTCOMES = ["val_loss", "diverged_at", "collapsed_at", "seconds", "report"]


class Store:
    """The results in a folder.

    ``runs.csv`` has one row a run; ``curves.csv`` and ``histograms.csv`` have the points of its curves and histograms,
    by the run's name.

    Args:
        folder: created if it does not exist.

    Raises:
        ValueError: a file there has other columns.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = Lock()
        self._files = {
            "runs": [*_SETTINGS, *_OUTCOMES],
            "curves": ["run", "tag", "step", "value"],
            "histograms": ["run", "state", "log10_limit", "count"],
        }
        self.results: dict[Run, Result] = {}
        curves: dict[str, dict[str, dict[int, float]]] = {}
        for row in self._read("curves"):
            tags = curves.setdefault(row["run"], {})
            tags.setdefault(row["tag"], {})[int(row["step"])] = float(row["value"])
        histograms: dict[str, dict[str, dict[float, float]]] = {}
        for row in self._read("histograms"):
            states = histograms.setdefault(row["run"], {})
            states.setdefault(row["state"], {})[float(row["log10_limit"])] = float(row["count"])
        for row in self._read("runs"):
            settings: dict[str, Any] = {name: row[name] for name in _SETTINGS}
            settings.update(lr=float(row["lr"]), seed=int(row["seed"]), steps=int(row["steps"]))
            run = Run(**settings)
            self.results[run] = Result(
                val_loss=float(row["val_loss"]),
                diverged_at=int(row["diverged_at"]) if row["diverged_at"] else None,
                collapsed_at=int(row["collapsed_at"]) if row["collapsed_at"] else None,
                report=row["report"],
                seconds=float(row["seconds"]),
                curves=curves.get(run.name, {}),
                histograms=histograms.get(run.name, {}),
            )

    def add(self, run: Run, result: Result) -> None:
        """Append a result; the row in ``runs.csv`` comes last, and with it the run counts as done."""
        with self._lock:
            curves = [
                (run.name, tag, step, f"{value:.6g}")
                for tag, points in result.curves.items()
                for step, value in points.items()
            ]
            histograms = [
                (run.name, state, f"{limit:.4g}", f"{count:g}")
                for state, buckets in result.histograms.items()
                for limit, count in buckets.items()
            ]
            self._append("curves", curves)
            self._append("histograms", histograms)
            settings = asdict(run)
            outcome = [f"{result.val_loss:.5f}", result.diverged_at, result.collapsed_at, f"{result.seconds:.1f}"]
            self._append("runs", [(*settings.values(), *outcome, result.report)])
            self.results[run] = result

    def losses(self, **settings: Any) -> dict[Run, float]:
        """Return the validation losses of the runs with these settings; inf for those that diverged."""
        return {
            run: math.inf if math.isnan(result.val_loss) else result.val_loss
            for run, result in self.results.items()
            if all(getattr(run, name) == value for name, value in settings.items())
        }

    def _read(self, name: str) -> list[dict[str, str]]:
        path = self.folder / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != self._files[name]:
                raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {self._files[name]}")
            # A process that was killed may have left half a row, which its run repeats.
            return [row for row in reader if None not in row.values()]

    def _append(self, name: str, rows: list[tuple[Any, ...]]) -> None:
        path = self.folder / f"{name}.csv"
        new = not path.exists()
        if not new and not path.read_bytes().endswith(b"\n"):
            raise ValueError(f"{path} ends in the middle of a row: remove that row")
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self._files[name])
            writer.writerows(rows)
