"""The training log: rows in memory, one CSV; the same run gives the same text however often it was interrupted."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any

PROBE = "monitor_probe_"
"""What probes found stands in columns of this name."""
_FIRST = ("kind", "step", "epoch", "learning_rate", "loss")


@dataclass
class TrainingLog:
    """Rows of training steps and validations. No clock times, which would differ between runs."""

    rows: list[dict[str, str]] = field(default_factory=list)
    """In order; values as text, so that what was read back is written unchanged."""

    @classmethod
    def parse(cls, text: str) -> TrainingLog:
        """The log that ``to_csv`` wrote."""
        rows = csv.DictReader(io.StringIO(text))
        return cls([{name: value for name, value in row.items() if value != ""} for row in rows])

    def add(self, kind: str, **values: float) -> None:
        """Append a row of kind ``train`` or ``validation``."""
        self.rows.append({"kind": kind, **{name: _text(value) for name, value in values.items()}})

    def to_csv(self) -> str:
        """Header and rows; columns that a row lacks are empty."""
        others = sorted({name for row in self.rows for name in row} - set(_FIRST))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [*_FIRST, *others], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return buffer.getvalue()

    def curve(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one column, where it was logged."""
        found: list[Any] = [(int(row["step"]), float(row[name])) for row in self.rows if row["kind"] == kind and name in row]
        return [step for step, _ in found], [value for _, value in found]

    def terms(self) -> list[str]:
        """Names of the logged loss terms and monitors."""
        return sorted({name for row in self.rows for name in row} - set(_FIRST) - {"gradient_norm"})

    def last(self) -> str:
        """The last row in words."""
        row = self.rows[-1] if self.rows else {}
        return ", ".join(f"{name} {float(value):.4g}" for name, value in row.items() if name not in {"kind", "step", "epoch"})


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
