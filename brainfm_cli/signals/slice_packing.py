"""Pack the scans of a BIDS dataset into a slice cohort: one unit of work per participant, then the index of everybody."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from brainfm_cli.bids.cohort import read_participants
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.people import find_participants_table
from brainfm_cli.bids.scans import LesionMask, StudyScan, read_studies, sites_of, study_files
from brainfm_cli.bids.slice_cohort import PackedScan, ScanSequence, SliceCohort, read_scans, write_index, write_participant
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Execution, Frozen, Selection
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.provenance import file_sha256, read_record, record_path
from brainfm_cli.signals.segmentations import joined_labels
from brainfm_cli.signals.slices import SliceGrid, Volume, artefact_scores, find_head, grid_of, outliers, read_volume, to_uint8

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.bids.derivatives import OutputDataset

log = logging.getLogger(__name__)
_SCORES = ("noise", "ghosting", "entropy")
LOW_BRAIN = "less brain than min_brain"


class SliceSettings(Frozen):
    """How scans become slices."""

    size: int | None = Field(default=None, ge=16, le=1024, multiple_of=16)
    """Pixels along each side; the preset's where unset (nano 64, others 256; cubes 64 and 96)."""
    plane: Literal["acquired", "axial", "coronal", "sagittal"] = "acquired"
    """Which way slices run; acquired takes thick slices as they were acquired, and axial ones of volumes with near-cubic voxels."""
    sequences: tuple[ScanSequence, ...] = ()
    """Sequences that take part; all where empty."""
    space: str | None = None
    """Label of ``space-`` of the images; unset takes those without one."""
    site: str = "site"
    """Column of participants.tsv that names the centre."""
    min_brain: float = Field(default=0.05, ge=0, lt=1)
    """Smallest share of a slice's pixels inside the head."""
    outlier_limit: float = Field(default=6.0, gt=0)
    """Slices whose background noise, ghosting or entropy lies more robust standard deviations from the median of their centre, sequence and plane are left out."""
    masks: bool = True
    """Whether lesion masks are packed with the scans."""
    skip_failed: bool = False
    """Go on without participants whose images cannot be used; each is named in the log and in its record."""


def pack_cohort(
    dataset: OutputDataset,
    root: Path,
    settings: SliceSettings,
    *,
    size: int,
    dims: int,
    selection: Selection,
    execution: Execution,
    mask_roots: Sequence[Path] = (),
) -> tuple[int, SliceCohort | None]:
    """Pack ``root`` into ``dataset.root/cohort``, what is packed already left alone; gives back the exit code, and the cohort where it is 0."""
    labels = choose_participants(root, selection)
    folder = dataset.root / "cohort"
    shared: dict[str, Any] = {
        "root": root, "cohort": folder, "selection": selection, "settings": settings, "size": size, "dims": dims, "mask_roots": tuple(mask_roots),
    }  # fmt: skip
    sites = sites_of(root, labels, settings.site)
    units = [
        Unit(
            name=f"slices-sub-{label}",
            inputs=study_files(root, label, selection, mask_roots=mask_roots),
            work=pack_participant,
            arguments={**shared, "label": label, "site": sites[label]},
        )
        for label in labels
    ]
    code = run_units(dataset, units, execution)
    if code != 0:
        failed = [label for label in labels if not _packed(dataset, label)]
        log.error("%d participants could not be packed: %s", len(failed), ", ".join(failed[:10]))
        if not settings.skip_failed or len(failed) == len(labels):
            log.error("mend their images, leave them out with --participant-label, or go on without them: --set slices.skip_failed=true")
            return code, None
        labels = [label for label in labels if label not in set(failed)]
    index = Unit(
        name="slices-index",
        inputs=tuple(folder / f"sub-{label}" / "items.parquet" for label in labels),
        work=index_cohort,
        arguments={"root": root, "cohort": folder, "labels": tuple(labels), "settings": settings, "size": size, "dims": dims},
    )
    code = run_units(dataset, [index], execution)
    return code, SliceCohort.open(folder) if code == 0 else None


def _packed(dataset: OutputDataset, label: str) -> bool:
    record = read_record(record_path(dataset.root, f"slices-sub-{label}"))
    return record is not None and record.status == "done"


def pack_participant(
    root: Path,
    cohort: Path,
    label: str,
    site: str,
    selection: Selection,
    settings: SliceSettings,
    size: int,
    dims: int,
    mask_roots: tuple[Path, ...],
) -> UnitResult:
    """Pack every scan of one participant, one volume in memory at a time.

    Raises
    ------
    BrainFMError
        A scan or mask cannot be used; the message names the file.
    """
    studies = read_studies(root, label, selection, sequences=settings.sequences, space=settings.space, mask_roots=mask_roots)
    notes: list[str] = []

    def batches() -> Iterator[tuple[PackedScan, pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8] | None]]:
        for study in studies:
            for scan in study.scans:
                packed = pack_scan(root, scan, study.masks if settings.masks else (), site, settings, size, dims)
                notes.extend(f"{scan.name}: {text}" for text in packed[0].notes)
                yield packed

    files = write_participant(cohort / f"sub-{label}", batches())
    return UnitResult(outputs=tuple(files), notes=tuple(notes))


def pack_scan(
    root: Path, scan: StudyScan, masks: Sequence[LesionMask], site: str, settings: SliceSettings, size: int, dims: int
) -> tuple[PackedScan, pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8] | None]:
    """A scan's description, a row per slice, the slices that have enough brain, and their labels where the study has a mask."""
    volume = read_volume(scan.path, gradients=scan.gradients)
    head = find_head(volume.data)
    grid = grid_of(volume, size=size, plane=settings.plane, dims=dims)
    lesions, notes = joined_labels(masks, volume)
    items = np.rint(grid.cut(to_uint8(volume.data, head))).astype(np.uint8)
    items[grid.cut(head.astype(np.float32)) < 0.5] = 0
    drawn = None if lesions is None else grid.cut(lesions, nearest=True)
    rows = _rows(scan, site, volume, head, grid, items, drawn)
    enough = np.ones(len(rows), bool) if dims == 3 else (rows["brain"] >= settings.min_brain).to_numpy()
    rows = rows.assign(item=np.where(enough, np.cumsum(enough) - 1, -1).astype(np.int32), why=np.where(enough, "", LOW_BRAIN))
    packed = PackedScan(
        name=scan.name,
        path=scan.path.relative_to(root).as_posix(),
        session=scan.session,
        sequence=scan.sequence,
        grid=asdict(grid),
        native_shape=volume.native_shape,
        native_affine=tuple(map(tuple, volume.native_affine.tolist())),
        mask=", ".join(mask.path.name for mask in masks) if lesions is not None else None,
        labels={value: name for mask in masks for value, name in mask.labels.items()} if lesions is not None else {},
        notes=(*volume.notes, *notes),
    )
    return packed, rows, items[enough], None if drawn is None else drawn[enough]


def _rows(
    scan: StudyScan,
    site: str,
    volume: Volume,
    head: NDArray[np.bool_],
    grid: SliceGrid,
    items: NDArray[np.uint8],
    drawn: NDArray[np.uint8] | None,
) -> pd.DataFrame:
    scores = artefact_scores(volume.data, head, grid)
    centres = np.arange(head.shape[grid.normal]) * volume.voxel_mm[grid.normal]
    weight = np.moveaxis(head, grid.normal, 0).sum((1, 2))
    places = centres - float((centres * weight).sum() / weight.sum())
    if grid.dims == 3:
        scores = {
            name: np.array([np.nanmedian(values)]) if np.isfinite(values).any() else np.array([np.nan]) for name, values in scores.items()
        }
        places = np.zeros(1)
    flat = items.reshape(len(items), -1)
    return pd.DataFrame(
        {
            "dataset": "",
            "participant": scan.participant,
            "session": scan.session,
            "site": site,
            "scan": scan.name,
            "sequence": scan.sequence,
            "plane": grid.plane,
            "slice": np.arange(len(items), dtype=np.int32),
            "z_mm": places.astype(np.float32),
            "brain": (flat > 0).mean(1).astype(np.float32),
            **{name: scores[name].astype(np.float32) for name in _SCORES},
            "lesion": -1 if drawn is None else (drawn.reshape(len(items), -1) > 0).sum(1).astype(np.int32),
        }
    )


def index_cohort(root: Path, cohort: Path, labels: tuple[str, ...], settings: SliceSettings, size: int, dims: int) -> UnitResult:
    """The index of everybody's slices; artefact outliers are found here, as they are outliers of their centre and sequence."""
    slices = pd.concat([pd.read_parquet(cohort / f"sub-{label}" / "items.parquet") for label in labels], ignore_index=True)
    slices = slices.assign(dataset=root.resolve().name)
    stored = np.flatnonzero((slices["item"] >= 0).to_numpy())
    why = slices["why"].to_numpy(object, copy=True)
    part = slices.iloc[stored]
    groups = (part["site"] + "|" + part["sequence"] + "|" + part["plane"]).tolist()
    for name in _SCORES:
        odd = outliers(part[name].to_numpy(np.float64), groups, limit=settings.outlier_limit)
        if name == "noise":  # little noise is no artefact
            odd &= (part[name] > part.groupby(["site", "sequence", "plane"])[name].transform("median")).to_numpy()
        for place in stored[odd]:
            why[place] = (why[place] + "; " if why[place] else "") + f"outlier of {name}"
    slices = slices.assign(why=why)
    kept = slices["why"] == ""
    if not kept.any():
        raise InputDatasetError(
            "no slice is left", where=cohort, fix="lower slices.min_brain or raise slices.outlier_limit; see dropped.tsv"
        )
    left_out = {str(reason): int(count) for reason, count in slices.loc[~kept, "why"].value_counts().items()}
    described = {
        "size": size,
        "dims": dims,
        "labels": _joint_labels(cohort, labels),
        "slices": {"kept": int(kept.sum()), **left_out},
        "items_sha256": {label: file_sha256(cohort / f"sub-{label}" / "items.npy") for label in labels},
    }
    files = write_index(cohort, slices, _people(root, labels), described)
    return UnitResult(outputs=tuple(files), notes=tuple(f"{count} slices left out: {reason}" for reason, count in left_out.items()))


def _joint_labels(cohort: Path, labels: Sequence[str]) -> dict[int, str]:
    joint: dict[int, str] = {}
    for label in labels:
        for scan in read_scans(cohort / f"sub-{label}"):
            for value, name in scan.labels.items():
                if joint.setdefault(value, name) != name:
                    raise InputDatasetError(
                        f"label {value} is '{joint[value]}' in one mask and '{name}' in another", where=scan.path, fix="give equal lesions equal values and names"
                    )  # fmt: skip
    return dict(sorted(joint.items()))


def _people(root: Path, labels: Sequence[str]) -> pd.DataFrame:
    table = find_participants_table(root)
    if table is None:
        return pd.DataFrame({"participant_id": [f"sub-{label}" for label in labels]})
    people = read_participants(table).reindex(list(labels))
    return people.set_axis([f"sub-{label}" for label in people.index]).rename_axis("participant_id").reset_index()
