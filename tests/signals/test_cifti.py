"""Dense series averaged over dlabel parcels, against plain numpy on the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals import cifti
from brainfm_cli.signals.cifti import average_grayordinates
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.atlases.atlas import Atlas

SPACE = "fsLR"
VERTICES, FRAMES = 60, 40
GRID = np.diag([2.0, 2.0, 2.0, 1.0])
LEFT, RIGHT, THALAMUS = "CIFTI_STRUCTURE_CORTEX_LEFT", "CIFTI_STRUCTURE_CORTEX_RIGHT", "CIFTI_STRUCTURE_THALAMUS_LEFT"
NAMES = ("L1", "L2", "R1", "T1")


def axis(*, left: np.ndarray, thalamus: np.ndarray | None = None) -> nib.cifti2.BrainModelAxis:
    """Left and right cortex of ``VERTICES`` vertices each, of which the left holds some, and voxels of the thalamus."""
    models = nib.cifti2.BrainModelAxis.from_surface(left, VERTICES, LEFT)
    models = models + nib.cifti2.BrainModelAxis.from_surface(np.arange(VERTICES), VERTICES, RIGHT)
    if thalamus is not None:
        volume = np.zeros((6, 6, 6), bool)
        volume[tuple(thalamus.T)] = True
        models = models + nib.cifti2.BrainModelAxis.from_mask(volume, THALAMUS, affine=GRID)
    return models


VOXELS = np.array([[1, 1, 1], [1, 1, 2], [1, 2, 1], [4, 4, 4]])
SERIES_AXIS = axis(left=np.arange(10, 50), thalamus=VOXELS)


def region_of(structure: str, place: int | tuple[int, ...]) -> int:
    """The label of a vertex or voxel, known without any CIFTI code."""
    if structure == LEFT:
        return 1 if place < 25 else 2 if place < 55 else 0
    if structure == RIGHT:
        return 3 if place < 20 else 0
    return 7 if place != (4, 4, 4) else 0


def elements(models: nib.cifti2.BrainModelAxis) -> list[tuple[str, int | tuple[int, ...]]]:
    return [(name, int(vertex) if vertex >= 0 else tuple(int(v) for v in voxel)) for name, vertex, voxel in zip(models.name, models.vertex, models.voxel, strict=True)]  # fmt: skip


def write_dlabel(folder: Path, models: nib.cifti2.BrainModelAxis) -> Atlas:
    place = folder / f"tpl-{SPACE}"
    place.mkdir(parents=True)
    keys = np.array([[region_of(*element) for element in elements(models)]], np.float32)
    table = {0: ("???", (0, 0, 0, 0))} | {value: (name, (1, 0, 0, 1)) for value, name in zip((1, 2, 3, 7), NAMES, strict=True)}
    image = nib.Cifti2Image(keys, (nib.cifti2.LabelAxis(["parcels"], [table]), models))
    image.to_filename(place / f"tpl-{SPACE}_atlas-Parcels_dseg.dlabel.nii")
    rows = pd.DataFrame({"index": [1, 2, 3, 7], "name": NAMES})
    rows.to_csv(place / f"tpl-{SPACE}_atlas-Parcels_dseg.tsv", sep="\t", index=False)
    return find_atlas("Parcels4", {"here": folder})


def write_dtseries(path: Path, data: np.ndarray, models: nib.cifti2.BrainModelAxis = SERIES_AXIS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Cifti2Image(data.astype(np.float32), (nib.cifti2.SeriesAxis(0, 2.0, len(data)), models))
    image.to_filename(path)
    return path


def expected(data: np.ndarray, models: nib.cifti2.BrainModelAxis, dead: set[int] = frozenset()) -> np.ndarray:
    keys = np.array([region_of(*element) for element in elements(models)])
    alive = np.array([position not in dead for position in range(len(keys))])
    return np.column_stack([data[:, (keys == value) & alive].astype(np.float32).astype(float).mean(1) for value in (1, 2, 3, 7)])


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    # The parcellation covers the whole left cortex, in another order of structures' elements than the series has.
    return write_dlabel(tmp_path / "atlases", axis(left=np.arange(VERTICES), thalamus=VOXELS))


@pytest.mark.parametrize("block", [1, 7 * FRAMES, 1 << 22])
def test_means_and_coverage(
    tmp_path: Path, atlas: Atlas, generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(cifti, "_BLOCK_NUMBERS", block)
    data = 100 + generator.standard_normal((FRAMES, len(SERIES_AXIS)))
    (average,) = average_grayordinates(write_dtseries(tmp_path / "x.dtseries.nii", data), [atlas], space=SPACE)
    np.testing.assert_allclose(average.series, expected(data, SERIES_AXIS), rtol=1e-12)
    # vertices 10 to 49 of the left cortex are in the series: 15 of the 25 of L1, 25 of the 30 of L2
    np.testing.assert_allclose(average.coverage, [15 / 25, 25 / 30, 1, 1])


def test_grayordinates_without_signal_count_as_uncovered(tmp_path: Path, atlas: Atlas, generator: np.random.Generator) -> None:
    data = 100 + generator.standard_normal((FRAMES, len(SERIES_AXIS)))
    dead = {0, 3, 20, 101}
    data[:, [0, 20]], data[:, [3, 101]] = 0, np.nan
    (average,) = average_grayordinates(write_dtseries(tmp_path / "x.dtseries.nii", data), [atlas], space=SPACE)
    np.testing.assert_allclose(average.series, expected(data, SERIES_AXIS, dead), rtol=1e-12)
    np.testing.assert_allclose(average.coverage, [13 / 25, 24 / 30, 1, 2 / 3])


def test_a_frame_without_number_is_named(tmp_path: Path, atlas: Atlas, generator: np.random.Generator) -> None:
    data = generator.standard_normal((FRAMES, len(SERIES_AXIS)))
    data[17, 5] = np.nan
    with pytest.raises(InputDatasetError, match="grayordinate 5 holds no finite number in frame 17"):
        average_grayordinates(write_dtseries(tmp_path / "x.dtseries.nii", data), [atlas], space=SPACE)


@pytest.mark.parametrize(("fault", "says"), [("zero", "0 bytes"), ("text", "cannot be read"), ("truncated", "truncated|unreadable"), ("frame", "one frame"), ("mesh", "vertices"), ("space", "cannot be combined")])  # fmt: skip
def test_bad_files_are_named(tmp_path: Path, atlas: Atlas, fault: str, says: str) -> None:
    path = tmp_path / "x.dtseries.nii"
    models = nib.cifti2.BrainModelAxis.from_surface(np.arange(30), 99, LEFT) if fault == "mesh" else SERIES_AXIS
    write_dtseries(path, np.random.default_rng(0).standard_normal((1 if fault == "frame" else FRAMES, len(models))), models)
    if fault == "zero":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("no image")
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputDatasetError, match=says):
        average_grayordinates(path, [atlas], space="fsaverage" if fault == "space" else SPACE)


def test_through_the_command_line(tmp_path: Path, atlas: Atlas, generator: np.random.Generator) -> None:
    from tests import synthetic_bids as synthetic

    made = synthetic.write_fmriprep(tmp_path / "fmriprep", participants=("01",), frames=120)
    folder = made.root / "sub-01" / "func"
    for image in [*folder.glob("*preproc*"), *folder.glob("*mask*")]:
        image.unlink()
    data = 100 + generator.standard_normal((120, len(SERIES_AXIS)))
    write_dtseries(folder / "sub-01_task-rest_space-fsLR_den-91k_bold.dtseries.nii", data)
    synthetic.write_json(folder / "sub-01_task-rest_space-fsLR_den-91k_bold.json", {"RepetitionTime": 2.0})
    out = tmp_path / "out"
    arguments = ("--atlases", "Parcels4", "--datasets", f"here={tmp_path / 'atlases'}", "--denoise-strategy", "none")
    assert brainfm("parcellate", made.root, out, "participant", *arguments) == 0
    (series,) = out.rglob("*_stat-mean_timeseries.tsv")
    assert series.name == "sub-01_task-rest_space-fsLR_atlas-Parcels_stat-mean_timeseries.tsv"
    table = pd.read_csv(series, sep="\t")
    assert tuple(table.columns) == NAMES
    means = expected(data, SERIES_AXIS)
    np.testing.assert_allclose(table.to_numpy(), (means - means.mean(0)) / means.std(0, ddof=1), atol=1e-6)
    assert (out / "tpl-fsLR" / "tpl-fsLR_atlas-Parcels_dseg.dlabel.nii").read_bytes() == atlas.path.read_bytes()
