"""predict for mri-language: a class for each person with the slices it rests on, or lesions in the grid of each scan; group makes one table."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_tsv
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.names import output_name, parse_name
from brainfm_cli.bids.scans import study_files
from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UnsupportedStageError
from brainfm_cli.learning.checkpoints import model_files, read_model_config, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.signals.segmentations import native_chances, to_labels
from brainfm_cli.signals.slice_packing import SliceSettings, pack_participant
from brainfm_cli.systems.mri_language import MriLanguage
from brainfm_cli.systems.mri_language.classification import classify, encode_studies, load_head
from brainfm_cli.systems.mri_language.segmentation import ScanSegmenter, lesion_chances, load_segmenter
from brainfm_cli.systems.mri_language.tuning import ScanTuningRecord, encoder_hash, sharpen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.config import Invocation, Selection
    from brainfm_cli.models.study_head import GatedAttentionHead
    from brainfm_cli.stages.predict import PredictSettings

_SHOWN_SLICES = 5
_FEATURES = 3  # class token, mean and maximum
NOT_CLINICAL = "not for clinical use"


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A tuned model, loaded once per process."""

    system: MriLanguage
    record: ScanTuningRecord
    head: GatedAttentionHead | None
    segmenter: ScanSegmenter | None
    seen: dict[str, set[str]]


def predict_scans(call: Invocation, settings: PredictSettings) -> int:
    """Apply to participants, or tabulate what they got; gives back the exit code."""
    model = call.model
    assert model is not None  # noqa: S101  (checked by the caller)
    if call.lock or call.reports_only:
        flag = "--lock" if call.lock else "--reports-only"
        raise UnsupportedStageError(f"{flag} is not there for mri-language models yet", where=model, fix="leave it out")
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
    units = [
        Unit(
            name=f"sub-{label}",
            inputs=(*study_files(call.input_dir, label, call.selection), *model_files(model)),
            work=write_prediction,
            arguments={"raw": call.input_dir, "model": model, "root": dataset.root, "label": label, "selection": call.selection, "device": call.execution.device},
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
    width = system.settings.shape.widths[2]
    head = load_head(model, _FEATURES * width, len(record.classes)) if record.task == "classification" else None
    segmenter = load_segmenter(system.model.encoder, model, tuple(record.labels)) if record.task == "segmentation" else None
    chosen = choose_device(device)
    system.model.to(chosen)
    if segmenter is not None:
        segmenter.model.to(chosen)
    return _Tuned(system=system, record=record, head=head, segmenter=segmenter, seen=read_seen(model))


def write_prediction(raw: Path, model: Path, root: Path, label: str, selection: Selection, device: str) -> UnitResult:
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
        said, files = (_class(tuned, cohort, label), []) if tuned.head is not None else _lesions(tuned, cohort, label, root)
    notes = list(packed.notes)
    if "tuned_on" in values["seen_in"]:
        notes.append(f"{label} was among the people the model was tuned on: this is no prediction")
    written = write_json(_prediction(root, label), values | said)
    return UnitResult(outputs=(written, *files), notes=tuple(notes))


def _prediction(root: Path, label: str) -> Path:
    return root / f"sub-{label}" / output_name("prediction", {"sub": label})


def _class(tuned: _Tuned, cohort: SliceCohort, label: str) -> dict[str, Any]:
    assert tuned.head is not None  # noqa: S101  (the caller asked for it)
    features = encode_studies(tuned.system.model.encoder, cohort, [label])
    chances, weights = classify(tuned.head, features, [label])
    shares = sharpen(chances, tuned.record.temperature)[0]
    table, order = cohort.slices, weights[label].argsort()[::-1][:_SHOWN_SLICES]
    return {
        "probabilities": {name: round(float(value), 6) for name, value in zip(tuned.record.classes, shares, strict=True)},
        "value": round(float(shares[1] if len(shares) == 2 else shares.max()), 6),
        "decided": tuned.record.classes[int(shares.argmax())],
        "slices": [
            {
                "scan": str(table["scan"].iloc[features.rows[label][place]]),
                "slice": int(table["slice"].iloc[features.rows[label][place]]),
                "weight": round(float(weights[label][place]), 6),
            }
            for place in order
        ],
    }


def _lesions(tuned: _Tuned, cohort: SliceCohort, label: str, root: Path) -> tuple[dict[str, Any], list[Path]]:
    assert tuned.segmenter is not None  # noqa: S101  (the caller asked for it)
    files: list[Path] = []
    found: list[dict[str, Any]] = []
    for grid in native_chances(cohort.scans(label), partial(_chances, tuned.segmenter, cohort, label)):
        labels = to_labels(grid.chances, tuned.segmenter.values, smallest=tuned.record.smallest_lesion)
        image = grid.save(labels, _segmentation(root, label, grid.reference))
        stem = image.with_name(image.name.partition(".")[0])
        described = {"SpatialReference": f"bids::{grid.reference.path}", "Sources": list(grid.scans), "Manual": False, "Description": f"Lesions by brainfm, {NOT_CLINICAL}"}  # fmt: skip
        names = pd.DataFrame({"index": [0, *tuned.record.labels], "name": ["no lesion", *tuned.record.labels.values()]})
        files += [image, write_json(stem.with_suffix(".json"), described), write_tsv(stem.with_suffix(".tsv"), names)]
        volumes = {name: round(grid.millilitres(labels, value), 4) for value, name in tuned.record.labels.items()}
        found.append({"image": image.relative_to(root).as_posix(), "scans": list(grid.scans), "volumes_ml": volumes, "volume_ml": round(grid.millilitres(labels), 4)})  # fmt: skip
    return {"value": max(one["volume_ml"] for one in found), "segmentations": found}, files


def _chances(segmenter: ScanSegmenter, cohort: SliceCohort, label: str, scan: PackedScan) -> NDArray[Any]:
    return lesion_chances(segmenter, cohort, label, scan.name)


def _segmentation(root: Path, label: str, scan: PackedScan) -> Path:
    entities, suffix, _ = parse_name(f"{scan.name}.nii.gz")
    # scans of other grids would have the same name: the space is that of the scan named by its suffix
    name = output_name(
        "lesions", {**{key: value for key, value in entities.items() if key != "desc"}, "space": entities.get("space", suffix)}
    )
    session = f"ses-{scan.session}" if scan.session else ""
    return root / f"sub-{label}" / session / Path(scan.path).parent.name / name


def write_table(root: Path, files: tuple[Path, ...], record: ScanTuningRecord) -> UnitResult:
    """``phenotype/brainfm_<target>.tsv`` of everybody's predictions."""
    rows = []
    for path in files:
        values = read_json(path)
        row: dict[str, Any] = {"participant_id": f"sub-{values['participant']}", "value": values["value"]}
        if record.task == "classification":
            row |= {"decided": values["decided"], **{f"p_{name}": share for name, share in values["probabilities"].items()}}
        rows.append(row | {"tuned_on": "tuned_on" in values["seen_in"], "model": values["model"]})
    slug = "".join(character for character in record.target if character.isalnum())
    meaning = (
        "probability of the decided class, or of the second of two"
        if record.task == "classification"
        else "volume of all lesions, largest of the grids"
    )
    described: dict[str, Any] = {
        "MeasurementToolMetadata": {"Description": f"brainfm predict, {record.task} of '{record.target}', {NOT_CLINICAL}"},
        "value": {"Description": meaning, **({} if record.task == "classification" else {"Units": "mL"})},
        "tuned_on": {"Description": "the model was tuned on this person: no prediction"},
        "model": {"Description": "model folder"},
    }
    table = pd.DataFrame(rows)
    for name in map(str, table.columns):
        if name.startswith(("p_", "decided")):
            described[name] = {"Description": "probability of the class" if name.startswith("p_") else "most probable class"}
    folder = root / "phenotype"
    return UnitResult(outputs=(write_tsv(folder / f"brainfm_{slug}.tsv", table), write_json(folder / f"brainfm_{slug}.json", described)))
