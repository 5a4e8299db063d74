"""What parcellate has of one run in one atlas, and its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.bids.derivatives import link_name
from brainfm_cli.bids.inputs import find_runs, root_sidecars
from brainfm_cli.bids.parcellations import atlas_path, read_regions, write_atlas, write_run
from brainfm_cli.bids.series_inputs import as_run, find_series, read_series
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.records import RegionTable
from brainfm_cli.signals.runs import matrices, parcellate_run
from brainfm_cli.signals.spaces import labels_on_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.atlases.atlas import Atlas
    from brainfm_cli.bids.inputs import Source
    from brainfm_cli.bids.series_inputs import ReadySeries, SeriesFiles
    from brainfm_cli.config import Selection
    from brainfm_cli.records import ParcellatedRun, RunFiles
    from brainfm_cli.signals.denoise import Denoising
    from brainfm_cli.signals.runs import CleanRun
    from brainfm_cli.stages.parcellate.settings import ParcellateSettings


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run in one atlas, ready to be written."""

    run: ParcellatedRun
    """Series and coverage."""
    regions: RegionTable
    """The atlas's regions."""
    atlas: Atlas | None
    """Where its image comes from; none where only names are known."""
    facts: dict[str, Any]
    """Fields of the series' sidecar."""
    sources: tuple[str, ...]
    """BIDS URIs of the files it was made from."""
    notes: tuple[str, ...]
    """Sentences for the reader."""


def parcellate_images(
    source: Source, label: str, selection: Selection, settings: ParcellateSettings, atlases: Sequence[Atlas]
) -> list[RunResult]:
    """Every preprocessed run of one participant in every atlas."""
    located = [atlas.located() for atlas in atlases]
    results = []
    for files in find_runs(source.root, label, selection, space=settings.space, resolution=settings.resolution):
        made = parcellate_run(files, located, settings.denoise, min_coverage=settings.min_coverage)
        sources = tuple(_uri(source, path) for path in (files.bold, files.mask, files.confounds) if path)
        for atlas, run, notes in zip(located, made.runs, made.notes, strict=True):
            facts = _facts(files, made, settings.denoise, notes)
            results.append(RunResult(run=run, regions=atlas.regions, atlas=atlas, facts=facts, sources=sources, notes=notes))
    return results


def take_series(
    source: Source, label: str, selection: Selection, settings: ParcellateSettings, datasets: Mapping[str, Path]
) -> list[RunResult]:
    """Every ready-made series of one participant, as it is."""
    regions_of = region_lookup(datasets)
    found = find_series(source.root, label, selection, sidecars=root_sidecars(source.root))
    results = []
    for files in wanted_series(found, settings.atlases, datasets):
        ready = read_series(files, repetition_time_s=settings.repetition_time_s)
        run, notes = as_run(ready, min_coverage=settings.min_coverage)
        regions = regions_of(run, ready.names, ready.named, source.root)
        facts = {
            "Denoising": f"taken as delivered by {source.producer or files.producer} {source.version}".rstrip(),
            **_motion_facts(ready.fd, _kept_of(ready)),
            "Notes": notes,
        }
        sources = tuple(_uri(source, path) for path in (files.series, files.coverage, files.motion, files.outliers) if path)
        results.append(RunResult(run=run, regions=regions, atlas=None, facts=facts, sources=sources, notes=tuple(notes)))
        _check_ready(results, files)
    return results


def _check_ready(results: Sequence[RunResult], files: SeriesFiles) -> None:
    """Refuse a run without any signal, or as long in one atlas as it is not in another."""
    last = results[-1].run
    if np.isnan(last.series).all():
        raise InputDatasetError("no region has a usable signal", where=files.series, fix="make the series again, or leave the run out")
    for other in results:
        if other.run.key == last.key and len(other.run.series) != len(last.series):
            raise InputDatasetError(
                f"the series has {len(last.series)} frames in {last.atlas} and {len(other.run.series)} in {other.run.atlas}",
                where=files.series, fix="make both again with the same denoising",
            )  # fmt: skip


def wanted_series(found: Sequence[SeriesFiles], names: Sequence[str], datasets: Mapping[str, Path]) -> list[SeriesFiles]:
    """The series in the atlases asked for; all where ``names`` is empty.

    Raises
    ------
    InputNotFoundError
        There are none in one of them.
    """
    if not names:
        return list(found)
    labels = atlas_labels(names, datasets)
    present = {files.atlas for files in found}
    absent = [label for label in labels if label not in present]
    if absent:
        raise InputNotFoundError(
            f"there are no ready-made series in atlas {absent[0]}; there are {', '.join(sorted(present))}",
            where=found[0].series.parent, fix="choose --atlases from these; series of other programs cannot be moved to another atlas",
        )  # fmt: skip
    return [files for files in found if files.atlas in labels]


def atlas_labels(names: Sequence[str], datasets: Mapping[str, Path]) -> tuple[str, ...]:
    """Labels in file names of atlases; a name that brainfm does not know stands for itself, other programs have their own."""
    labels = []
    for name in names:
        try:
            labels.append(find_atlas(name, datasets).label)
        except InputNotFoundError:
            labels.append(name)
    return tuple(labels)


def region_lookup(datasets: Mapping[str, Path]) -> Callable[[ParcellatedRun, tuple[str, ...], bool, Path], RegionTable]:
    """How the regions of a ready-made series are found: its own derivative's table, then an atlas of that label, then its names."""

    def look_up(run: ParcellatedRun, names: tuple[str, ...], named: bool, root: Path) -> RegionTable:  # noqa: FBT001  (the packer's signature)
        own = read_regions(root, run.atlas, run.space or "unknown")
        if own is not None and own.names == names:
            return own
        try:
            atlas = find_atlas(run.atlas, datasets)
        except InputNotFoundError:
            return RegionTable(names=names)
        # Unnamed columns of known atlases are numbered in the order of the labels.
        unnamed = not named or _numbered(names, run.atlas)
        if atlas.regions.names == names or (unnamed and atlas.num_regions == len(names)):
            return (atlas.located() if atlas.available else atlas).regions
        return RegionTable(names=names)

    return look_up


def _numbered(names: Sequence[str], label: str) -> bool:
    """Whether names only count the regions of an atlas, as AAL116_001, AAL116_002, … do."""
    return all(re.fullmatch(rf"{re.escape(label)}[_-]?0*{place}", name) for place, name in enumerate(names, start=1))


def write(root: Path, result: RunResult, settings: ParcellateSettings) -> list[Path]:
    """Write one result and, once per output folder, its atlas; gives back the result's own files."""
    template = result.run.space or "unknown"
    if not atlas_path(root, result.run.atlas, template).exists():
        _write_atlas(root, result, template)
    made = matrices(result.run.series, settings.matrices)
    return write_run(root, result.run, result.regions.names, made, facts=result.facts, sources=result.sources)


def _write_atlas(root: Path, result: RunResult, template: str) -> None:
    atlas = result.atlas
    if atlas is None:
        description: dict[str, Any] = {"Name": result.run.atlas, "License": "that of the atlas; it came with the input's series"}
        write_atlas(root, result.run.atlas, template, result.regions, description=description)
        return
    description = {"Name": atlas.name, "License": atlas.licence, "Description": atlas.description, "ReferencesAndLinks": [atlas.citation]}
    image: tuple[NDArray[np.int32], NDArray[np.float64]] | bytes
    if atlas.kind == "cifti":
        if atlas.path is None:
            raise InputNotFoundError(f"the image of atlas {atlas.name} is absent", fix=atlas.remedy)
        image = atlas.path.read_bytes()
    else:
        labels, affine = atlas.load()
        # On its own grid, moved only where the transform was used: the same file whichever participant comes first.
        image = labels_on_grid(atlas, template, (labels.shape[0], labels.shape[1], labels.shape[2]), affine)[0], affine
    write_atlas(root, atlas.label, template, result.regions, values=atlas.values, image=image, description=description)


def _facts(files: RunFiles, made: CleanRun, denoising: Denoising, notes: Sequence[str]) -> dict[str, Any]:
    nuisance = made.nuisance
    return {
        "Denoising": denoising.model_dump(mode="json"),
        "Confounds": list(nuisance.names),
        **_motion_facts(nuisance.fd, nuisance.kept),
        **({} if files.confounds else {"ConfoundsTable": "absent"}),
        "Notes": list(notes),
    }


def _motion_facts(fd: NDArray[np.float64] | None, kept: NDArray[np.bool_] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if kept is not None:
        facts |= {
            "FramesTotal": len(kept),
            "FramesKept": int(kept.sum()),
            "KeptFraction": round(float(kept.mean()), 6),
            "FramesLeftOut": np.flatnonzero(~kept).tolist(),
        }
    if fd is not None:
        if np.isfinite(fd).any():
            facts["MeanFramewiseDisplacement"] = round(float(np.nanmean(fd)), 9)
        facts["FramewiseDisplacement"] = [round(float(value), 6) if np.isfinite(value) else None for value in fd]
    return facts


def _kept_of(ready: ReadySeries) -> NDArray[np.bool_] | None:
    if ready.kept is not None or "FramesTotal" not in ready.metadata:
        return ready.kept
    kept = np.ones(int(ready.metadata["FramesTotal"]), bool)
    kept[list(ready.metadata.get("FramesLeftOut", ()))] = False
    return kept


def _uri(source: Source, path: Path) -> str:
    return f"bids:{link_name(source.given, 0)}:{path.relative_to(source.given).as_posix()}"
