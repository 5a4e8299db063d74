"""One spoilt participant beside a healthy one: each fault has a name and an exit code, and the other participant goes on."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_NOT_FOUND, EXIT_OUTPUT, EXIT_PARTIAL, EXIT_SETTINGS, EXIT_USAGE
from tests import synthetic_bids as synthetic
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPACE = f"space-{synthetic.TEMPLATE}_res-2"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Synthetic:
    made = synthetic.write_fmriprep(tmp_path_factory.mktemp("healthy") / "fmriprep", participants=("01", "02"), frames=60, seed=1)
    (made.root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\n")
    return made


@pytest.fixture
def spoilt(tmp_path: Path, healthy: synthetic.Synthetic) -> Path:
    return shutil.copytree(healthy.root, tmp_path / "fmriprep")


def _file(root: Path, end: str) -> Path:
    return root / "sub-02" / "func" / f"sub-02_task-rest_{end}"


BOLD, MASK, TABLE = f"{SPACE}_desc-preproc_bold.nii.gz", f"{SPACE}_desc-brain_mask.nii.gz", "desc-confounds_timeseries.tsv"


def _rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def _zero(root: Path) -> None:
    _file(root, BOLD).write_bytes(b"")


def _truncate(root: Path) -> None:
    path = _file(root, BOLD)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncate_inside(root: Path) -> None:
    path = _file(root, BOLD)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1000]))


def _three_dimensions(root: Path) -> None:
    _rewrite(_file(root, BOLD), lambda data: data[..., 0])


def _one_frame(root: Path) -> None:
    _rewrite(_file(root, BOLD), lambda data: data[..., :1])


def _nan(root: Path) -> None:
    def spoil(data: np.ndarray) -> np.ndarray:
        data = data.astype(float)
        data[2, 2, 2, 7] = np.nan
        return data

    _rewrite(_file(root, BOLD), spoil)


def _no_table(root: Path) -> None:
    _file(root, TABLE).unlink()


def _missing_columns(root: Path) -> None:
    table = pd.read_csv(_file(root, TABLE), sep="\t")
    table.drop(columns=["rot_y", "csf"]).to_csv(_file(root, TABLE), sep="\t", index=False, na_rep="n/a")


def _shuffled_columns(root: Path) -> None:
    table = pd.read_csv(_file(root, TABLE), sep="\t")
    table = table.rename(columns={"trans_x": "trans_y", "trans_y": "trans_x"})
    table.to_csv(_file(root, TABLE), sep="\t", index=False, na_rep="n/a")


def _short_table(root: Path) -> None:
    table = pd.read_csv(_file(root, TABLE), sep="\t")
    table.iloc[:-3].to_csv(_file(root, TABLE), sep="\t", index=False, na_rep="n/a")


def _empty_mask(root: Path) -> None:
    _rewrite(_file(root, MASK), np.zeros_like)


def _other_space(root: Path) -> None:
    for path in list((root / "sub-02" / "func").glob(f"*{SPACE}*")):
        path.rename(path.with_name(path.name.replace(SPACE, "space-MNIInfant_res-2")))


def _no_repetition_time(root: Path) -> None:
    _file(root, BOLD).with_name(_file(root, BOLD).name.replace(".nii.gz", ".json")).write_text("{}")


FAULTS = [
    (_zero, EXIT_BAD_DATA, "0 bytes"),
    (_truncate, EXIT_BAD_DATA, "truncated"),
    (_truncate_inside, EXIT_BAD_DATA, "ends within frame"),
    (_three_dimensions, EXIT_BAD_DATA, "3 dimensions"),
    (_one_frame, EXIT_BAD_DATA, "one frame|dimensions"),
    (_nan, EXIT_BAD_DATA, "no finite number"),
    (_no_table, EXIT_BAD_DATA, "no confounds table"),
    (_missing_columns, EXIT_BAD_DATA, "lacks .* columns"),
    (_shuffled_columns, EXIT_BAD_DATA, "shuffled"),
    (_short_table, EXIT_BAD_DATA, "57 rows"),
    (_empty_mask, EXIT_BAD_DATA, "mask is empty"),
    (_other_space, EXIT_NOT_FOUND, "standard space"),
    (_no_repetition_time, EXIT_BAD_DATA, "RepetitionTime is missing"),
]


@pytest.mark.parametrize(("spoil", "code", "says"), FAULTS, ids=[spoil.__name__.strip("_") for spoil, *_ in FAULTS])
def test_a_spoilt_participant_is_named_and_the_other_goes_on(
    tmp_path: Path, healthy: synthetic.Synthetic, spoilt: Path, spoil: Callable[[Path], None], code: int, says: str
) -> None:
    spoil(spoilt)
    out = tmp_path / "out"
    atlas = ("--atlases", synthetic.ATLAS, "--datasets", f"tests={healthy.atlases}")
    assert brainfm("parcellate", spoilt, out, "participant", *atlas) == EXIT_PARTIAL
    records = {path.stem: json.loads(path.read_text()) for path in (out / "logs" / "records").glob("*.json")}
    assert records["sub-01"]["status"] == "done"
    failure = records["sub-02"]["failure"]
    assert failure["exit_code"] == code
    assert failure["fix"]
    assert re.search(says, failure["message"]), failure["message"]
    left = [path for path in out.rglob("*") if path.is_file() and ("sub-02" in path.name or path.name.endswith(".part"))]
    assert [path.name for path in left] == ["sub-02.json"]  # the record of the failure


def test_regions_cut_by_the_field_of_view_are_not_available(tmp_path: Path, healthy: synthetic.Synthetic) -> None:
    made = synthetic.write_fmriprep(tmp_path / "cut" / "fmriprep", participants=("01",), frames=60, cut={"01": 0.9})
    out = tmp_path / "out"
    code = brainfm("parcellate", made.root, out, "participant", "--atlases", synthetic.ATLAS, "--datasets", f"tests={healthy.atlases}")
    assert code == 0
    (series,) = out.rglob("*_timeseries.tsv")
    table = pd.read_csv(series, sep="\t", na_values=["n/a"])
    assert table["RightFront"].isna().all()
    assert table.drop(columns="RightFront").notna().all(axis=None)


OPTIONS = [
    (("--atlases", "Schaefer101"), EXIT_NOT_FOUND, "did you mean Schaefer100"),
    (("--atlases", "Schaefer100", "Schaefer100"), EXIT_SETTINGS, "twice"),
    (("--set", "denoise.stratgy=simple"), EXIT_SETTINGS, "did you mean 'strategy'"),
    (("--set", "min_coverage=2"), EXIT_SETTINGS, "min_coverage"),
    (("--participant-label", "03"), EXIT_NOT_FOUND, "no data for participant 03"),
    (("--participant-label", "../01"), EXIT_USAGE, "no BIDS label"),
]


@pytest.mark.parametrize(("options", "code", "says"), OPTIONS)
def test_wrong_options_are_named_and_nothing_is_written(
    tmp_path: Path, healthy: synthetic.Synthetic, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, says: str
) -> None:
    out = tmp_path / "out"
    assert brainfm("parcellate", healthy.root, out, "participant", *options) == code
    assert says in " ".join(capfd.readouterr().err.split())
    assert not (out / "dataset_description.json").exists()


def test_duplicate_labels_of_an_atlas_are_refused(tmp_path: Path, healthy: synthetic.Synthetic, capfd: pytest.CaptureFixture[str]) -> None:
    atlases = shutil.copytree(healthy.atlases, tmp_path / "atlases")
    (table,) = atlases.rglob("*_dseg.tsv")
    frame = pd.read_csv(table, sep="\t")
    frame["index"] = [1, 2, 2, 4]
    frame.to_csv(table, sep="\t", index=False)
    arguments = ("--atlases", synthetic.ATLAS, "--datasets", f"tests={atlases}")
    assert brainfm("parcellate", healthy.root, tmp_path / "out", "participant", *arguments) == EXIT_BAD_DATA
    assert "repeats index 2" in capfd.readouterr().err


def test_an_output_of_other_settings_or_of_another_program_is_left_alone(tmp_path: Path, healthy: synthetic.Synthetic) -> None:
    out = tmp_path / "out"
    common = ("parcellate", healthy.root, out, "participant", "--atlases", synthetic.ATLAS, "--datasets", f"tests={healthy.atlases}")
    assert brainfm(*common) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert brainfm(*common, "--denoise-strategy", "none") == EXIT_OUTPUT
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("in the way")
    assert brainfm(*common[:2], tmp_path / "file" / "out", *common[3:]) == EXIT_OUTPUT
