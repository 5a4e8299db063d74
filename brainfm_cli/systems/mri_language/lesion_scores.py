"""Lesion masks of people in the grid of their files against what was drawn there, for a model and its floors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scan_tuning import NO_SCORES, mean_scores
from brainfm_cli.learning.segmentation import score_masks
from brainfm_cli.systems.mri_language.segmentation import SMALLEST_LESIONS, ScanSegmenter, lesion_chances
from brainfm_cli.systems.mri_language.tuning import MeanMask, fit_mean_mask, fit_segmenter

if TYPE_CHECKING:
    from brainfm_cli.learning.loop import TrainingPlan, TrainingResult
    from brainfm_cli.learning.scan_tuning import TuningPeople
    from brainfm_cli.models.mri_encoder import MriEncoder

Grid = TypeVar("Grid", bound="NativeGrid")
Chances = Callable[[str, Sequence[PackedScan]], NDArray[np.float32]]
SCORES = ("dice", "hd95", "nsd", "lesion_f1", "volume error (mL)")
MEAN_MASK, TWIN_DECODER = "mean mask", "no pretraining, same decoder"


class NativeGrid(Protocol):
    """Probabilities in the grid of a file."""

    @property
    def reference(self) -> PackedScan:
        """The scan whose grid it is."""

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Voxel size."""

    def millilitres(self, labels: NDArray[np.uint8], value: int | None = None) -> float:
        """Volume of one label, or of all."""


class NativeTruth(Protocol[Grid]):
    """What was drawn, and how probabilities of slices come to its grids: :class:`brainfm_cli.signals.drawn_lesions.DrawnLesions`."""

    @property
    def tolerance_mm(self) -> float:
        """Tolerance of the surface Dice."""

    def labels(self, label: str, scan: str) -> NDArray[np.uint8] | None:
        """(x, y, z) labels drawn on a scan; none where there is no mask."""

    def grids(self, scans: Sequence[PackedScan], chances_of: Callable[[Sequence[PackedScan]], NDArray[np.float32]]) -> list[Grid]:
        """Probabilities on every native grid."""

    def decide(self, grid: Grid, values: Sequence[int], *, smallest: int) -> NDArray[np.uint8]:
        """(x, y, z) labels of probabilities."""


def masked_people(cohort: SliceCohort, chosen: Sequence[str]) -> dict[str, str]:
    """Of people whose scans have masks, whether they hold a lesion.

    Raises
    ------
    InputDatasetError
        No mask holds a voxel.
    """
    lesions, wanted = cohort.slices.groupby("participant", observed=True)["lesion"].max(), set(chosen)
    found = {str(label): "with lesion" if most > 0 else "free" for label, most in lesions.items() if most >= 0 and str(label) in wanted}
    if not cohort.labels or "with lesion" not in found.values():
        raise InputDatasetError(
            "no scan has a lesion mask with voxels", where=cohort.root, fix="put masks under derivatives/ or give their dataset with -d"
        )
    return found


def chances_of(segmenter: ScanSegmenter, cohort: SliceCohort) -> Chances:
    """A segmenter as a function of person and of scans on one grid."""
    return lambda label, scans: lesion_chances(segmenter, cohort, label, scans)


def mean_chances(cohort: SliceCohort, people: Sequence[str], values: Sequence[int]) -> Chances:
    """The mean mask of these people as a function of person and of scans on one grid: the mean over the scans, as heights differ a little."""
    mean: MeanMask = fit_mean_mask(cohort, people, values)
    classes, table = len(values) + 1, cohort.slices

    def of_scan(label: str, scan: PackedScan) -> NDArray[np.float32]:
        rows = np.flatnonzero(((table["participant"] == label) & (table["scan"] == scan.name)).to_numpy())
        out = np.zeros((classes, cohort.num_items(scan), *cohort.item_shape), np.float32)
        out[0] = 1
        out[:, table["slice"].to_numpy()[rows]] = mean.chances(
            scan.grid["plane"], table["z_mm"].to_numpy()[rows], classes, cohort.item_shape
        )
        return out

    def chances(label: str, scans: Sequence[PackedScan]) -> NDArray[np.float32]:
        return np.mean([of_scan(label, scan) for scan in scans], axis=0, dtype=np.float32)

    return chances


def lesion_rows(
    fits: Mapping[str, tuple[Chances, int]], cohort: SliceCohort, people: Sequence[str], values: Sequence[int], truth: NativeTruth[Grid]
) -> pd.DataFrame:
    """One row per method, person and grid; ``fits`` gives chances and the smallest lesion kept by method."""
    return pd.DataFrame(
        [
            {"participant_id": f"sub-{label}", "predictor": name, **row}
            for name, (chances, least) in fits.items()
            for label in people
            for row in _score_person(cohort, label, chances, values, least, truth)
        ]
    )


def lesion_scores(rows: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Means over people of every method's scores, and of the model's Dice less each other's."""
    if rows.empty:
        return NO_SCORES
    methods = list(dict.fromkeys(rows["predictor"]))
    by_person = {
        (name, score): rows.loc[rows["predictor"] == name].groupby("participant_id")[score].mean() for score in SCORES for name in methods
    }
    collected = {f"{name}|{score}": _optional(found) for (name, score), found in by_person.items()}
    for other in methods[1:]:
        collected[f"{methods[0]} − {other}|dice"] = _optional(by_person[methods[0], "dice"] - by_person[other, "dice"])
    return mean_scores(collected, seed=seed)


def _optional(found: pd.Series) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in found]


def _score_person(
    cohort: SliceCohort, label: str, chances: Chances, values: Sequence[int], smallest: int, truth: NativeTruth[Grid]
) -> list[dict[str, Any]]:
    rows = []
    for grid, observed in _drawn(cohort, label, chances, truth):
        predicted = truth.decide(grid, values, smallest=smallest)
        found = score_masks(predicted > 0, observed > 0, voxel_mm=grid.voxel_mm, tolerance_mm=truth.tolerance_mm)
        row: dict[str, Any] = {"grid": grid.reference.name, **{name: one.value for name, one in found.items()}}
        row["volume error (mL)"] = abs(grid.millilitres(predicted) - grid.millilitres(observed))
        rows.append(row | {"predicted (mL)": grid.millilitres(predicted), "observed (mL)": grid.millilitres(observed)})
    return rows


def _drawn(cohort: SliceCohort, label: str, chances: Chances, truth: NativeTruth[Grid]) -> Iterator[tuple[Grid, NDArray[np.uint8]]]:
    """Probabilities on every native grid of a person on which something was drawn, and what."""
    for grid in truth.grids([scan for scan in cohort.scans(label) if scan.mask is not None], partial(chances, label)):
        observed = truth.labels(label, grid.reference.name)
        if observed is not None:
            yield grid, observed


def fit_lesions(
    encoder: MriEncoder,
    cohort: SliceCohort,
    people: TuningPeople,
    plan: TrainingPlan,
    truth: NativeTruth[Grid],
    **fit: Any,  # noqa: ANN401
) -> tuple[ScanSegmenter, TrainingResult, tuple[Chances, int]]:
    """A decoder of :func:`~brainfm_cli.systems.mri_language.tuning.fit_segmenter`, its chances, and the smallest lesion to keep of them."""
    segmenter, result = fit_segmenter(encoder, cohort, people, plan, **fit)
    return segmenter, result, (chances_of(segmenter, cohort), smallest_lesion(segmenter, cohort, people.role("validation"), truth))


def smallest_lesion(segmenter: ScanSegmenter, cohort: SliceCohort, people: Sequence[str], truth: NativeTruth[Grid]) -> int:
    """Voxels below which predicted lesions are dropped, for the best Dice of these (validation) people."""
    dice: dict[int, list[float]] = {size: [] for size in SMALLEST_LESIONS}
    for label in people:
        for grid, observed in _drawn(cohort, label, chances_of(segmenter, cohort), truth):
            for size in SMALLEST_LESIONS:
                predicted = truth.decide(grid, segmenter.values, smallest=size) > 0
                both = int(predicted.sum()) + int((observed > 0).sum())
                dice[size].append(2 * int((predicted & (observed > 0)).sum()) / both if both else 1.0)
    return max(SMALLEST_LESIONS, key=lambda size: (float(np.mean(dice[size])) if dice[size] else 0.0, -size))
