"""predict group --lock: the participants' predictions in one table, with its hash and the date, before outcomes are known.

A lock shows that predictions are those of that day only to whoever keeps its hash elsewhere: send it to the trial's
registry or steering committee. It is never rewritten.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_tsv
from brainfm_cli.bids.names import output_name
from brainfm_cli.config import digest_of
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, OutputError, UsageError
from brainfm_cli.learning.checkpoints import model_files, source_of_model
from brainfm_cli.learning.targets import participant_table
from brainfm_cli.provenance import brainfm_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.config import Invocation, Settings

TABLE, SEAL = "locked_predictions.tsv", "locked_predictions.json"
WHOLE = "lock_sha256"
"""Hash of all other fields of the lock, that of the table among them: the one to keep elsewhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LockedPredictions:
    """Predictions of a model that were locked."""

    scores: dict[str, float]
    """Participant (without sub-) → probability of the positive class, or predicted value."""
    decisions: dict[str, float]
    """Participant → 1 where the positive class was decided, else 0; NaN where nothing was decided."""
    sha256: str
    """Hash of the lock, that of the table included."""
    date: str
    """When it was locked, UTC."""
    model: str
    """Name of the model."""
    outcomes_known: int
    """Participants whose outcome was in participants.tsv when they were locked."""

    def of(self, cases: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """(cases,) scores, and decisions where there are any.

        Raises
        ------
        InputDatasetError
            A case has no locked prediction.
        """
        names = [case.removeprefix("sub-") for case in cases]
        absent = [name for name in names if name not in self.scores]
        if absent:
            raise InputDatasetError(
                f"{len(absent)} of {len(names)} cases have no locked prediction, e.g. '{absent[0]}'",
                fix="name cases as participants are named, or leave those cases out",
            )
        decisions = np.array([self.decisions[name] for name in names])
        return np.array([self.scores[name] for name in names]), decisions if np.isfinite(decisions).any() else None


def lock_predictions(call: Invocation, settings: Settings) -> int:
    """Write the lock, or find that it is there already; gives back the exit code.

    Raises
    ------
    UsageError
        Asked for at participant level.
    InputNotFoundError
        Somebody has no prediction yet.
    OutputError
        Other predictions were locked here.
    """
    assert call.model is not None  # noqa: S101  (checked by the caller)
    if call.level != "group":
        raise UsageError("--lock is of the group level", fix="run 'predict participant' first, then 'predict group --lock'")
    root = call.output_dir
    found = _read_predictions(root, call.selection.participant_label, call.model)
    table = _table(found)
    text = table.to_csv(sep="\t", index=False, na_rep="n/a", lineterminator="\n")
    console = Console()
    if (root / SEAL).is_file():
        locked = read_lock(root)
        if _read(root / TABLE) != text.encode():
            raise OutputError(
                f"other predictions were locked on {locked.date}",
                where=root / SEAL,
                fix="a lock is never rewritten: choose another OUTPUT_DIR",
            )
        console.print(f"already locked on {locked.date}, sha256 {locked.sha256}", highlight=False, soft_wrap=True)
        return 0
    known = _outcomes_known(call.input_dir, found[0]["target"], list(table["participant_id"]))
    if call.dry_run:
        console.print(f"lock predictions of {len(found)} participants by {call.model.name}; {known} outcomes are known", highlight=False)
        return 0
    OutputDataset.open(root, command="predict", settings=settings, sources=[call.input_dir, source_of_model(call.model)])
    write_tsv(root / TABLE, table)
    sha256 = hashlib.sha256(_read(root / TABLE)).hexdigest()
    seal = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": sha256,
        "table": TABLE,
        "participants": len(found),
        "target": found[0]["target"],
        "positive": _positive(found[0]),
        "model": call.model.name,
        "model_sha256": digest_of([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(model_files(call.model))]),
        "outcomes_known": known,
        "brainfm": brainfm_version(),
    }
    seal[WHOLE] = digest_of(seal)  # date, model and what was known are locked as the table is
    write_json(root / SEAL, seal)  # last: its presence means that the table is whole
    console.print(f"locked {len(found)} predictions, sha256 {seal[WHOLE]}", highlight=False, soft_wrap=True)
    if known:
        console.print(f"note: {known} of them already have an outcome in participants.tsv, which the lock records", highlight=False)
    return 0


def read_lock(root: Path) -> LockedPredictions:
    """The locked predictions of an output folder, once their hash is found to hold.

    Raises
    ------
    InputNotFoundError
        Nothing is locked there.
    InputDatasetError
        The table is not the one that was locked, or is unreadable.
    """
    try:
        seal = read_json(root / SEAL)
        content = _read(root / TABLE)
    except FileNotFoundError as error:
        raise InputNotFoundError("no predictions are locked here", where=root, fix="run 'brainfm predict … group --lock' first") from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the lock is unreadable: {error}", where=root / SEAL, fix="use the folder that --lock wrote") from error
    lacking = [
        key for key in ("date", "sha256", "positive", "model", "outcomes_known", WHOLE) if not isinstance(seal, dict) or key not in seal
    ]
    if isinstance(seal, dict) and lacking:
        raise InputDatasetError(f"the lock lacks '{lacking[0]}'", where=root / SEAL, fix="use the folder that --lock wrote")
    if not isinstance(seal, dict) or hashlib.sha256(content).hexdigest() != seal.get("sha256"):
        raise InputDatasetError(
            f"the predictions were changed after they were locked on {seal.get('date', 'an unknown date') if isinstance(seal, dict) else 'an unknown date'}",
            where=root / TABLE,
            fix="restore the locked table; its hash is in the file beside it",
        )
    if digest_of({key: value for key, value in seal.items() if key != WHOLE}) != seal[WHOLE]:
        raise InputDatasetError("the lock was changed after it was made", where=root / SEAL, fix="restore the file that --lock wrote")
    table = pd.read_csv(root / TABLE, sep="\t", dtype=str, keep_default_na=False)
    names = [str(name).removeprefix("sub-") for name in table["participant_id"]]
    decided = [np.nan if value == "n/a" or not seal["positive"] else float(value == seal["positive"]) for value in table["decided"]]
    return LockedPredictions(
        scores=dict(zip(names, table["value"].astype(float), strict=True)),
        decisions=dict(zip(names, decided, strict=True)),
        sha256=seal[WHOLE],
        date=seal["date"],
        model=seal["model"],
        outcomes_known=int(seal["outcomes_known"]),
    )


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _read_predictions(root: Path, labels: Sequence[str], model: Path) -> list[dict[str, Any]]:
    chosen = labels or sorted(path.name.removeprefix("sub-") for path in root.glob("sub-*") if path.is_dir())
    found = []
    for label in chosen:
        path = root / f"sub-{label}" / output_name("prediction", {"sub": label})
        try:
            values = read_json(path)
            kept = {key: values[key] for key in ("participant", "target", "kind", "model", "value")} | {
                "decided": values.get("decided"),
                "probabilities": values.get("probabilities", {}),
            }
        except FileNotFoundError as error:
            raise InputNotFoundError(
                f"sub-{label} has no prediction", where=path, fix="run 'predict participant' for everybody first"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputDatasetError(f"the prediction is unreadable: {error}", where=path, fix="remove it and predict again") from error
        if kept["model"] != model.name:
            raise InputDatasetError(
                f"the prediction is of model '{kept['model']}'", where=path, fix=f"predict with {model.name}, or give that model"
            )
        found.append(kept)
    if not found:
        raise InputNotFoundError("there are no predictions to lock", where=root, fix="run 'brainfm predict INPUT OUTPUT participant' first")
    return found


def _positive(prediction: dict[str, Any]) -> str | None:
    """The class whose probability is the score, as 'predict participant' writes it."""
    return list(prediction["probabilities"])[1] if prediction["kind"] == "binary" else None


def _table(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    classes = list(found[0]["probabilities"])
    rows = [
        {
            "participant_id": f"sub-{one['participant']}",
            "value": f"{one['value']:.6g}",
            "decided": one["decided"] if one["decided"] is not None else "n/a",
            **{f"probability_{name}": f"{one['probabilities'].get(name, float('nan')):.6g}" for name in classes},
        }
        for one in found
    ]
    return pd.DataFrame(rows)


def _outcomes_known(cohort: Path, target: str, people: Sequence[str]) -> int:
    table = participant_table(Cohort.open(cohort))
    if target not in table:
        return 0
    rows = table.reindex([name.removeprefix("sub-") for name in people])[target]
    return int((rows.notna() & (rows.astype(str) != "n/a") & (rows.astype(str) != "")).sum())
