"""One preprocessed run: averaged over regions, denoised, and correlated, in every atlas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.records import ParcellatedRun
from brainfm_cli.signals import connectivity
from brainfm_cli.signals.cifti import average_grayordinates
from brainfm_cli.signals.denoise import clean_series, read_nuisance
from brainfm_cli.signals.parcellation import average_regions
from brainfm_cli.signals.spaces import space_note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.atlases.atlas import Atlas
    from brainfm_cli.records import RunFiles
    from brainfm_cli.signals.denoise import Denoising, Nuisance
    from brainfm_cli.signals.parcellation import RegionAverages

Matrix = Literal["pearson", "fisherz", "partial"]


@dataclass(frozen=True, kw_only=True)
class CleanRun:
    """One run in every atlas."""

    runs: tuple[ParcellatedRun, ...]
    """In the order of the atlases."""
    nuisance: Nuisance
    """What was regressed, which frames were kept, how the head moved."""
    notes: tuple[tuple[str, ...], ...]
    """Sentences for the reader, per atlas."""


def parcellate_run(files: RunFiles, atlases: Sequence[Atlas], denoising: Denoising, *, min_coverage: float) -> CleanRun:
    """Average, clean and judge one run; regions below ``min_coverage`` or without variance become NaN.

    Raises
    ------
    InputDatasetError
        The image, its mask or its confounds cannot be used, or no region is left.
    InputNotFoundError
        One of them does not exist.
    SettingsError
        A filter does not fit the repetition time.
    """
    if files.mask is None:
        averages = average_grayordinates(files.bold, atlases, space=files.space)
    else:
        averages = average_regions(files.bold, atlases, space=files.space, mask=files.mask)
    nuisance = read_nuisance(files.confounds, denoising, num_frames=len(averages[0].series), repetition_time_s=files.repetition_time_s)
    runs, notes = [], []
    for atlas, average in zip(atlases, averages, strict=True):
        run, lost = _clean(files, atlas, average, nuisance, denoising, min_coverage)
        space = space_note(atlas, files.space)
        runs.append(run)
        notes.append(tuple(note for note in (space, lost) if note))
    return CleanRun(runs=tuple(runs), nuisance=nuisance, notes=tuple(notes))


def matrices(series: NDArray[np.float64], kinds: Sequence[Matrix]) -> dict[str, NDArray[np.float64]]:
    """(regions, regions) matrices of (frames, regions) series; NaN rows and columns for NaN regions."""
    correlation = connectivity.pearson(series)
    made: dict[str, NDArray[np.float64]] = {}
    for kind in kinds:
        if kind == "pearson":
            made[kind] = correlation
        elif kind == "fisherz":
            made[kind] = connectivity.fisher_z(correlation)
        else:
            made[kind] = connectivity.partial(series)
    return made


def _clean(
    files: RunFiles, atlas: Atlas, average: RegionAverages, nuisance: Nuisance, denoising: Denoising, min_coverage: float
) -> tuple[ParcellatedRun, str | None]:
    thin = (average.coverage < min_coverage) | (average.coverage == 0)
    with np.errstate(invalid="ignore"):
        flat = ~thin & ~(np.ptp(average.series[nuisance.kept], axis=0) > 0)
    usable = ~thin & ~flat
    if not usable.any():
        raise InputDatasetError(
            f"no region of atlas {atlas.name} has enough voxels inside the brain mask",
            where=files.bold, fix="check that the image, its mask and its space- label belong together; lower --min-coverage with care",
        )  # fmt: skip
    series = np.full((int(nuisance.kept.sum()), atlas.num_regions), np.nan)
    series[:, usable] = clean_series(average.series[:, usable], nuisance, denoising, repetition_time_s=files.repetition_time_s)
    run = ParcellatedRun(
        key=files.key,
        atlas=atlas.label,
        space=files.space,
        series=series,
        coverage=average.coverage,
        repetition_time_s=files.repetition_time_s,
    )
    return run, _lost_note(files, atlas, thin, flat, min_coverage)


def _lost_note(files: RunFiles, atlas: Atlas, thin: NDArray[np.bool_], flat: NDArray[np.bool_], min_coverage: float) -> str | None:
    parts = []
    for which, reason in ((thin, f"less than {min_coverage:.0%} inside the brain mask"), (flat, "no variation over time")):
        names = [name for name, gone in zip(atlas.regions.names, which, strict=True) if gone]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            parts.append(f"{len(names)} of {atlas.num_regions} regions are n/a, {reason} ({shown})")
    return f"{files.key.name}, {atlas.name}: {'; '.join(parts)}" if parts else None
