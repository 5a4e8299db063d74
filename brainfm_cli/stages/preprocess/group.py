"""Group level: one quality table and page of the participants that are done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import list_participants, run_key, walk_files
from brainfm_cli.bids.names import parse_name
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.documents import read_json
from brainfm_cli.errors import EXIT_OK, InputDatasetError, InputNotFoundError
from brainfm_cli.provenance import brainfm_version, read_record, record_path
from brainfm_cli.stages.preprocess.measures import measures_path
from brainfm_cli.stages.preprocess.output import open_dataset, planned_dataset

if TYPE_CHECKING:
    from collections.abc import Mapping

    from brainfm_cli.config import Invocation
    from brainfm_cli.stages.preprocess.settings import PreprocessSettings

_CONFOUNDS = "_desc-confounds_timeseries.tsv"


def summarise(call: Invocation, settings: PreprocessSettings) -> int:
    """Write the quality table and page unless they are current; gives back the exit code."""
    root = call.output_dir
    labels = [label for label in list_participants(root) if _is_done(root, label)] if root.is_dir() else []
    tables = [path for label in labels for path in walk_files(root / f"sub-{label}") if path.name.endswith(_CONFOUNDS)]
    measures = [path for label in labels if (path := measures_path(root, label)).is_file()]
    if not tables and not any(_read_json(path) for path in measures):
        raise InputNotFoundError(
            "no finished participant has a confounds table or measures of images", where=root, fix="run the participant level first (fMRIPrep: at --level full)"
        )  # fmt: skip
    waiting = sorted(set(list_participants(call.input_dir)) - set(labels))
    unit = Unit(
        name="group",
        inputs=tuple(sorted([*tables, *measures])),
        work=write_group,
        arguments={
            "root": root,
            "tables": tuple(tables),
            "labels": tuple(labels),
            "waiting": tuple(waiting),
            "methods": _methods(settings, bold=bool(tables)),
        },
    )
    if call.dry_run:
        state = plan_units(planned_dataset(call, settings), [unit])["group"]
        sys.stdout.write(f"group: {state}; {len(tables)} runs of {len(labels)} participants, {len(waiting)} participants not done\n")
        return EXIT_OK
    return run_units(open_dataset(call, settings), [unit], call.execution)


def write_group(root: Path, tables: tuple[Path, ...], labels: tuple[str, ...], waiting: tuple[str, ...], methods: str) -> UnitResult:
    """Write ``group_qc.tsv``, its description and ``group.html``: a row per run, or per participant who has only structural images."""
    from brainfm_cli.reports.preprocess_group import QC_COLUMNS, build_table, quality_page

    measured: dict[str, Any] = {}
    for label in labels:
        measured |= _read_json(measures_path(root, label))
    having_runs = {parse_name(path.name)[0]["sub"] for path in tables}
    structural = [_structural_row(name, values) for name, values in measured.items() if parse_name(name)[0]["sub"] not in having_runs]
    frame = build_table([*(_row(path, measured) for path in tables), *structural])
    notes = (f"{len(waiting)} participants of the dataset are not done: {', '.join(waiting[:20])}",) if waiting else ()
    page = quality_page(frame, title=f"Quality of {root.name}", notes=notes, methods=methods)
    outputs = (
        write_tsv(root / "group_qc.tsv", frame),
        write_json(root / "group_qc.json", {name: {"Description": text} for name, text in QC_COLUMNS.items()}),
        write_text(root / "group.html", page.render()),
    )
    return UnitResult(outputs=outputs, notes=notes)


def _methods(settings: PreprocessSettings, *, bold: bool) -> str:
    if settings.engine == "embedded" and not bold:
        return (
            f"Structural images were preprocessed with the embedded engine of brainfm {brainfm_version()}; correlation and Dice compare the reference "
            "image and its brain mask with the template's."
        )
    if settings.engine == "embedded":
        return (
            f"Runs were preprocessed with the embedded engine of brainfm {brainfm_version()}. Brain volume is of the structural image, temporal SNR "
            "of the series in template space; correlation and Dice compare the structural image and its brain mask with the template's."
        )
    return f"Runs were preprocessed with fMRIPrep {settings.fmriprep_version}, driven by brainfm {brainfm_version()}."


def _is_done(root: Path, label: str) -> bool:
    record = read_record(record_path(root, f"sub-{label}"))
    return record is not None and record.status == "done"


def _structural_row(name: str, values: Mapping[str, float]) -> dict[str, object]:
    entities, suffix, _ = parse_name(name)
    image = "_".join([*(f"{entity}-{value}" for entity, value in entities.items() if entity not in {"sub", "ses"}), suffix])
    return {"participant_id": f"sub-{entities['sub']}", "session": entities.get("ses"), "run": image, **values}


def _row(path: Path, measured: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    from brainfm_cli.reports.preprocess_group import assess_confounds

    key = run_key(parse_name(path.name)[0])
    name = "_".join(f"{entity}-{value}" for entity, value in key.entities.items() if entity not in {"sub", "ses"})
    row: dict[str, object] = {"participant_id": f"sub-{key.participant}", "session": key.session, "run": name}
    return {**row, **assess_confounds(_read_table(path), _repetition_time(path)), **measured.get(key.name, {})}


def _read_table(path: Path) -> Any:  # noqa: ANN401  (pandas is imported where it is used)
    import pandas as pd

    try:
        return pd.read_csv(path, sep="\t", na_values="n/a")
    except (OSError, ValueError) as error:
        raise InputDatasetError(
            f"the confounds table is unreadable: {error}", where=path, fix="preprocess this participant again"
        ) from error


def _repetition_time(path: Path) -> float | None:
    """From the JSON of any series of the same run."""
    key = run_key(parse_name(path.name)[0])
    for other in sorted(path.parent.glob(f"sub-{key.participant}_*_bold.json")):
        if run_key(parse_name(other.name)[0]) == key and (time := _read_json(other).get("RepetitionTime")):
            return float(time)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
