"""predict for mri-language: class, grade or risk over time with the slices it rests on, or lesions in the grid of each scan; group makes one table."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from brainfm_cli.bids.cohort import read_participants
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_tsv
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.names import output_name
from brainfm_cli.bids.people import find_participants_table
from brainfm_cli.bids.scans import study_files
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UnsupportedStageError
from brainfm_cli.learning.checkpoints import model_files, read_model_config, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.outcome_scores import at_time, median_class
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.signals.drawn_lesions import DrawnLesions
from brainfm_cli.signals.segmentations import native_chances, to_labels
from brainfm_cli.signals.slice_packing import SliceSettings, pack_participant
from brainfm_cli.stages.predict.scan_cam import Explained, beside_scan, write_cams
from brainfm_cli.systems.mri_language import NOT_CLINICAL, MriLanguage
from brainfm_cli.systems.mri_language.adaptation import load_adapted
from brainfm_cli.systems.mri_language.classification import encode_studies, load_head, study_scores
from brainfm_cli.systems.mri_language.segmentation import ScanSegmenter, lesion_chances, load_segmenter
from brainfm_cli.systems.mri_language.tuning import ScanTuningRecord, encoder_hash, random_twin, sharpen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.config import Invocation, Selection
    from brainfm_cli.models.mri_encoder import MriEncoder
    from brainfm_cli.models.study_head import GatedAttentionHead
    from brainfm_cli.stages.predict import PredictSettings

_SHOWN_SLICES = 5
_FEATURES = 3  # class token, mean and maximum


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A tuned model, loaded once per process."""

    system: MriLanguage
    encoder: MriEncoder
    record: ScanTuningRecord
    head: GatedAttentionHead | None
    segmenter: ScanSegmenter | None
    seen: dict[str, set[str]]


def predict_scans(call: Invocation, settings: PredictSettings) -> int:
    """Apply to participants, tabulate what they got, or evaluate the encoder on tasks; gives back the exit code."""
    model = call.model
    assert model is not None  # noqa: S101  (checked by the caller)
    if call.lock or call.reports_only:
        flag = "--lock" if call.lock else "--reports-only"
        raise UnsupportedStageError(f"{flag} is not there for mri-language models yet", where=model, fix="leave it out")
    if call.level == "group" and settings.scans.tasks:
        from brainfm_cli.stages.predict.scan_evaluation import evaluate_scans

        return evaluate_scans(call, model, settings)
    record = read_record_of(model)
    people = choose_participants(call.input_dir, call.selection)
    if call.dry_run:
        Console().print(f"predict {model.name}: {record.task} of '{record.target}' for {len(people)} participants", highlight=False)
        return 0
    choose_device(call.execution.device)
    dataset = OutputDataset.open(call.output_dir, command="predict", settings=settings, sources=[call.input_dir, source_of_model(model)])
    if call.level == "group":
        inputs = tuple(path for label in people if (path := _prediction(dataset.root, label)).is_file())
        if not inputs:
            raise InputNotFoundError(
                "nobody has a prediction yet", where=dataset.root, fix="run the same command at participant level first"
            )
        unit = Unit(name="group", inputs=inputs, work=write_table, arguments={"root": dataset.root, "files": inputs, "record": record})
        return run_units(dataset, [unit], call.execution)
    table = find_participants_table(call.input_dir) if record.clinical.variables else None
    tables = () if table is None else (table,)
    roots = tuple(folder for name, folder in call.datasets.items() if name != "raw")
    units = [
        Unit(
            name=f"sub-{label}",
            inputs=(*study_files(call.input_dir, label, call.selection), *model_files(model), *tables),
            work=write_prediction,
            arguments={"raw": call.input_dir, "model": model, "root": dataset.root, "label": label, "selection": call.selection, "device": call.execution.device,
                       "cam": settings.scans.cam, "mask_roots": roots},
        )
        for label in people
    ]  # fmt: skip
    return run_units(dataset, units, call.execution)


def read_record_of(model: Path) -> ScanTuningRecord:
    """What a model folder was tuned for.

    Raises
    ------
    InputNotFoundError
        It was not tuned.
    """
    config = read_model_config(model)
    if not config.tuning:
        raise InputNotFoundError("the model was pretrained, not tuned", where=model, fix="run 'brainfm prompt-tune' first")
    return ScanTuningRecord.from_values(config.tuning, where=model / "config.yaml")


@lru_cache(maxsize=1)
def _load(model: Path, device: str) -> _Tuned:
    record, system = read_record_of(model), MriLanguage.load(model)
    if encoder_hash(system.model.encoder) != record.encoder_sha256:
        raise InputDatasetError(
            "the encoder is not the one that was tuned on", where=model / "model.safetensors", fix="copy the model folder again"
        )
    encoder = load_adapted(system.model.encoder, model, record.tune, record.adaptation)
    head, segmenter = None, None
    if record.task == "segmentation":
        segmenter = load_segmenter(encoder, model, tuple(record.labels), together=record.together)
    else:
        features = _FEATURES * system.settings.shape.widths[2]
        head = load_head(model, record.task_of_studies, features, len(record.clinical.names))
    chosen = choose_device(device)
    encoder.to(chosen)
    if segmenter is not None:
        segmenter.model.to(chosen)
    return _Tuned(system=system, encoder=encoder, record=record, head=head, segmenter=segmenter, seen=read_seen(model))


def write_prediction(
    raw: Path,
    model: Path,
    root: Path,
    label: str,
    selection: Selection,
    device: str,
    *,
    cam: Literal["none", "gradcam", "hirescam"] = "none",
    mask_roots: tuple[Path, ...] = (),
) -> UnitResult:
    """Write what the model says of one participant; sequences that are absent are simply not read, and named."""
    tuned = _load(model, device)
    record = tuned.record
    settings = SliceSettings.from_values({"plane": record.plane, "sequences": list(record.sequences), "masks": False})
    key = participant_hash(raw.resolve().name, label)
    with tempfile.TemporaryDirectory(prefix="brainfm-") as folder:
        work = Path(folder)
        packed = pack_participant(raw, work, label, "", selection, settings, record.size, tuned.system.settings.dims, ())
        cohort = SliceCohort.of_participant(work, label, size=record.size, dims=tuned.system.settings.dims)
        if cohort.slices.empty:
            raise InputDatasetError(f"no slice of sub-{label} holds enough brain", where=raw / f"sub-{label}", fix="check the images")
        values: dict[str, Any] = {
            "participant": label,
            "target": record.target,
            "kind": record.task,
            "model": model.name,
            "sequences": sorted(map(str, cohort.slices["sequence"].unique())),
            "seen_in": [name for name, hashes in tuned.seen.items() if key in hashes],
            "note": NOT_CLINICAL,
        }
        notes = list(packed.notes)
        if tuned.head is None:
            said, files = _lesions(tuned, cohort, label, root)
        else:
            clinical, missing = _clinical(record, raw, label)
            notes += missing
            said, files = _answer(tuned, cohort, label, root, clinical)
            if cam != "none":
                truth = DrawnLesions(raw=raw, mask_roots=mask_roots, slices=settings, tolerance_mm=0.0)
                explained = Explained(
                    encoder=tuned.encoder, twin=random_twin(tuned.system, seed=0).model.encoder.to(next(tuned.encoder.parameters()).device),
                    head=tuned.head, task=record.task_of_studies, truth=truth, method=cam,
                )  # fmt: skip
                maps, further = write_cams(explained, cohort, label, root, clinical)
                said["attribution"], files = maps, [*files, *further]
    if "tuned_on" in values["seen_in"]:
        notes.append(f"{label} was among the people the model was tuned on: this is no prediction")
    written = write_json(_prediction(root, label), values | said)
    return UnitResult(outputs=(written, *files), notes=tuple(notes))


def _prediction(root: Path, label: str) -> Path:
    return root / f"sub-{label}" / output_name("prediction", {"sub": label})


def _clinical(record: ScanTuningRecord, raw: Path, label: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """(variables,) of one participant and what was missing.

    Raises
    ------
    InputNotFoundError
        The model reads clinical variables, and there is no table of participants or it lacks one of the columns.
    InputDatasetError
        A value is no number, or is missing where the model was told to refuse that.
    """
    if not record.clinical.variables:
        return record.clinical.encode(pd.DataFrame(index=[label]), [label])[0], ()
    table = find_participants_table(raw)
    if table is None:
        columns = ", ".join(one.name for one in record.clinical.variables)
        raise InputNotFoundError(f"the model reads {columns}, and there is no participants.tsv", where=raw, fix="write the table")
    people = read_participants(table)
    return record.clinical.encode(people, [label], str(table))[0], record.clinical.notes(people, [label], str(table))


def _answer(tuned: _Tuned, cohort: SliceCohort, label: str, root: Path, clinical: NDArray[Any]) -> tuple[dict[str, Any], list[Path]]:
    assert tuned.head is not None  # noqa: S101  (the caller asked for it)
    record, task = tuned.record, tuned.record.task_of_studies
    features = encode_studies(tuned.encoder, cohort, [label])
    scores, weights = study_scores(tuned.head, features, {label: clinical}, [label])
    baseline = torch.tensor(record.baseline) if record.baseline else None
    found = task.answer(scores.float(), tuned.head.link, baseline)
    table, order = cohort.slices, weights[label].argsort()[::-1][:_SHOWN_SLICES]
    slices = [
        {
            "scan": str(table["scan"].iloc[features.rows[label][place]]),
            "slice": int(table["slice"].iloc[features.rows[label][place]]),
            "weight": round(float(weights[label][place]), 6),
        }
        for place in order
    ]
    beside = {"clinical": {name: round(float(value), 6) for name, value in zip(record.clinical.names, clinical, strict=True)}} if len(clinical) else {}  # fmt: skip
    if task.is_survival:
        said, files = _survival(record, found[0], root, label)
        return said | beside | {"slices": slices}, files
    shares = sharpen(found, record.temperature)[0] if task.kind == "classification" else found[0]
    graded = task.kind == "grading"
    said = {
        "probabilities": {name: round(float(value), 6) for name, value in zip(record.classes, shares, strict=True)},
        "value": round(float(shares @ range(len(shares)) if graded else shares[1] if len(shares) == 2 else shares.max()), 6),
        "decided": record.classes[int(median_class(shares[None])[0] if graded else shares.argmax())],
    }
    return said | beside | {"slices": slices}, []


def _survival(record: ScanTuningRecord, incidences: NDArray[Any], root: Path, label: str) -> tuple[dict[str, Any], list[Path]]:
    """(times, causes) incidences as a table, and the risk at horizons."""
    times = np.array(record.times, np.float64)
    columns = {f"incidence_{cause}": incidences[:, number].round(6) for number, cause in enumerate(record.causes)}
    curve = pd.DataFrame({"time": times, "free": (1 - incidences.sum(axis=1)).round(6), **columns})
    path = root / f"sub-{label}" / output_name("survival", {"sub": label})
    described: dict[str, Any] = {
        "time": {"Description": "time since the start of follow-up", "Units": record.unit},
        "free": {"Description": "probability that nothing has happened by then"},
        **{f"incidence_{cause}": {"Description": f"probability that {cause} has happened by then"} for cause in record.causes},
    }
    risk = {
        cause: {f"{when:g}": round(float(at_time(incidences[None, :, number], times, when)[0]), 6) for when in record.horizons}
        for number, cause in enumerate(record.causes)
    }
    said = {"value": round(float(incidences[-1, 0]), 6), "risk": risk, "unit": record.unit, "curve": path.relative_to(root).as_posix()}
    return said, [write_tsv(path, curve), write_json(path.with_suffix(".json"), described)]


def _lesions(tuned: _Tuned, cohort: SliceCohort, label: str, root: Path) -> tuple[dict[str, Any], list[Path]]:
    assert tuned.segmenter is not None  # noqa: S101  (the caller asked for it)
    files: list[Path] = []
    found: list[dict[str, Any]] = []
    for grid in native_chances(cohort.scans(label), partial(lesion_chances, tuned.segmenter, cohort, label)):
        labels = to_labels(grid.chances, tuned.segmenter.values, smallest=tuned.record.smallest_lesion)
        image = grid.save(labels, beside_scan(root, label, grid.reference, "lesions"))
        stem = image.with_name(image.name.partition(".")[0])
        described = {"SpatialReference": f"bids::{grid.reference.path}", "Sources": list(grid.scans), "Manual": False, "Description": f"Lesions by brainfm, {NOT_CLINICAL}"}  # fmt: skip
        names = pd.DataFrame({"index": [0, *tuned.record.labels], "name": ["no lesion", *tuned.record.labels.values()]})
        files += [image, write_json(stem.with_suffix(".json"), described), write_tsv(stem.with_suffix(".tsv"), names)]
        volumes = {name: round(grid.millilitres(labels, value), 4) for value, name in tuned.record.labels.items()}
        found.append({"image": image.relative_to(root).as_posix(), "scans": list(grid.scans), "volumes_ml": volumes, "volume_ml": round(grid.millilitres(labels), 4)})  # fmt: skip
    return {"value": max(one["volume_ml"] for one in found), "segmentations": found}, files


def write_table(root: Path, files: tuple[Path, ...], record: ScanTuningRecord) -> UnitResult:
    """``phenotype/brainfm_<target>.tsv`` of everybody's predictions."""
    rows = []
    for path in files:
        values = read_json(path)
        row: dict[str, Any] = {"participant_id": f"sub-{values['participant']}", "value": values["value"]}
        if "probabilities" in values:
            row |= {"decided": values["decided"], **{f"p_{name}": share for name, share in values["probabilities"].items()}}
        row |= {f"risk_{cause}_{when}": share for cause, told in values.get("risk", {}).items() for when, share in told.items()}
        rows.append(row | {"tuned_on": "tuned_on" in values["seen_in"], "model": values["model"]})
    slug = "".join(character for character in record.target if character.isalnum())
    meaning, unit = {
        "classification": ("probability of the decided class, or of the second of two", {}),
        "grading": ("expected grade, counted from 0", {}),
        "survival": ("probability of the event by the last time of the curves", {}),
        "segmentation": ("volume of all lesions, largest of the grids", {"Units": "mL"}),
    }[record.task]
    described: dict[str, Any] = {
        "MeasurementToolMetadata": {"Description": f"brainfm predict, {record.task} of '{record.target}', {NOT_CLINICAL}"},
        "value": {"Description": meaning, **unit},
        "tuned_on": {"Description": "the model was tuned on this person: no prediction"},
        "model": {"Description": "model folder"},
    }
    table = pd.DataFrame(rows)
    for name in map(str, table.columns):
        if name.startswith("p_"):
            described[name] = {"Description": "probability of the class"}
        elif name == "decided":
            described[name] = {"Description": "median grade" if record.task == "grading" else "most probable class"}
        elif name.startswith("risk_"):
            described[name] = {"Description": f"probability that it has happened by the time at the end of the name, {record.unit}"}
    folder = root / "phenotype"
    return UnitResult(outputs=(write_tsv(folder / f"brainfm_{slug}.tsv", table), write_json(folder / f"brainfm_{slug}.json", described)))
