"""Slice cohorts: packed whole, resumed where they stopped, split and read back without reading more than is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.derivatives import OutputDataset
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.config import Execution, Selection, Settings
from brainfm_cli.errors import EXIT_BAD_DATA, InputDatasetError, InputNotFoundError
from brainfm_cli.signals.slice_packing import SliceSettings, pack_cohort
from brainfm_cli.signals.slices import SliceGrid
from tests.synthetic_scans import SHAPE, SyntheticScans, save, write_scans


@pytest.fixture
def made(tmp_path: Path) -> SyntheticScans:
    return write_scans(tmp_path / "raw", participants=4)


def pack(root: Path, out: Path, settings: SliceSettings | None = None, *, dims: int = 2, labels: tuple[str, ...] = ()) -> tuple[int, SliceCohort | None]:  # fmt: skip
    dataset = OutputDataset.open(out, command="pretrain", settings=Settings(), sources=[root])
    selection = Selection(participant_label=labels)
    return pack_cohort(dataset, root, settings or SliceSettings(), size=48, dims=dims, selection=selection, execution=Execution())


def stamps(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in sorted((out / "cohort").rglob("*")) if path.is_file()}


def test_what_is_packed_is_what_was_scanned(made: SyntheticScans, tmp_path: Path) -> None:
    code, cohort = pack(made.root, tmp_path / "out")
    assert code == 0
    assert cohort is not None
    table = cohort.slices
    assert set(table["participant"]) == set(made.sides)
    assert set(table["sequence"]) == {"T1w", "FLAIR"}
    assert dict(zip(table["participant"], table["site"], strict=True))["02"] == "centre1"
    assert cohort.labels == {1: "lesion"}
    for label, side in made.sides.items():
        rows = np.flatnonzero(((table["participant"] == label) & (table["sequence"] == "FLAIR")).to_numpy())
        items, masks = cohort.items(rows), cohort.masks(rows)
        assert items.shape == masks.shape == (len(rows), 48, 48)
        assert (masks > 0).sum((1, 2)).tolist() == table["lesion"].to_numpy()[rows].tolist()
        columns = np.argwhere(masks)[:, 1]
        assert (columns.mean() < 23.5) == (side == "left")  # whichever side the file stores first
        assert items[masks > 0].mean() > items[(items > 0) & (masks == 0)].mean() + 50
        scan = next(one for one in cohort.scans(label) if one.sequence == "FLAIR")
        grid = SliceGrid(**scan.grid)
        stack = np.zeros((SHAPE[2], 48, 48), np.uint8)
        stack[table["slice"].to_numpy()[rows]] = masks
        assert (grid.restore(stack, nearest=True) > 0).sum() == pytest.approx(made.voxels[label], rel=0.12)


def test_slices_without_brain_are_left_out_and_logged(made: SyntheticScans, tmp_path: Path) -> None:
    _, cohort = pack(made.root, tmp_path / "out")
    assert cohort is not None
    dropped = pd.read_csv(tmp_path / "out" / "cohort" / "dropped.tsv", sep="\t", dtype={"participant": str})
    assert len(cohort.slices) + len(dropped) == 4 * 2 * SHAPE[2]
    assert set(dropped["why"]) == {"less brain than min_brain"}
    assert cohort.slices["brain"].min() >= 0.05 > dropped["brain"].max()


def test_a_ghosted_slice_is_left_out(tmp_path: Path) -> None:
    made = write_scans(tmp_path / "raw", participants=8, sites=1, masks=False)
    generator = np.random.default_rng(0)
    for path in sorted(made.root.glob("sub-*/anat/*_T1w.nii.gz")):
        image = nib.load(path)
        data = image.get_fdata(dtype=np.float32) + generator.random(SHAPE).astype(np.float32)  # air is no longer exactly zero
        if path.name.startswith("sub-03"):
            data[:, :, 6] += 0.5 * np.roll(data[:, :, 6], SHAPE[1] // 2, axis=1)
        nib.save(nib.Nifti1Image(data, image.affine), path)
    _, cohort = pack(made.root, tmp_path / "out")
    assert cohort is not None
    dropped = pd.read_csv(tmp_path / "out" / "cohort" / "dropped.tsv", sep="\t", dtype={"participant": str})
    odd = dropped[dropped["why"].str.contains("ghosting")]
    assert ("sub-03_T1w", 6) in set(zip(odd["scan"], odd["slice"], strict=True))


def test_packing_again_does_nothing_and_a_new_participant_is_added(made: SyntheticScans, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(made.root, out, labels=("01", "02"))
    before = stamps(out)
    pack(made.root, out, labels=("01", "02"))
    assert stamps(out) == before
    _, cohort = pack(made.root, out)
    after = stamps(out)
    assert cohort is not None
    assert cohort.labels_of_people == ["01", "02", "03", "04"]
    assert {name: after[name] for name in before if "sub-0" in name} == {name: time for name, time in before.items() if "sub-0" in name}


def test_a_changed_scan_is_packed_again(made: SyntheticScans, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(made.root, out)
    before = stamps(out)
    path = made.root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = nib.load(path)
    save(path, image.get_fdata(dtype=np.float32) * 2 + 1)
    pack(made.root, out)
    after = stamps(out)
    changed = {name for name in before if before[name] != after[name]}
    assert "cohort/sub-01/items.npy" in changed
    assert not any("sub-02" in name for name in changed)


def test_what_a_killed_run_left_is_swept(made: SyntheticScans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    import brainfm_cli.signals.slice_packing as room

    real, calls = room.pack_scan, []

    def dies(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "pack_scan", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(made.root, out)
    assert [path.name for path in (out / "cohort").iterdir()] == ["sub-01"]
    monkeypatch.setattr(room, "pack_scan", real)
    assert pack(made.root, out)[0] == 0
    pack(made.root, tmp_path / "whole")
    for path in sorted((out / "cohort").rglob("*.npy")):
        assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(out)).read_bytes()


def test_an_unusable_participant_stops_or_is_left_out_by_name(
    made: SyntheticScans, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (made.root / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_bytes(b"no image")
    code, cohort = pack(made.root, tmp_path / "out")
    assert code not in (0, 1)
    assert cohort is None
    assert "1 participants could not be packed: 02" in caplog.text
    code, cohort = pack(made.root, tmp_path / "out2", SliceSettings(skip_failed=True))
    assert code == 0
    assert cohort is not None
    assert cohort.labels_of_people == ["01", "03", "04"]
    shutil.rmtree(made.root / "sub-01")
    assert pack(made.root, tmp_path / "out3", labels=("02",))[0] == EXIT_BAD_DATA


def test_cubes(made: SyntheticScans, tmp_path: Path) -> None:
    _, cohort = pack(made.root, tmp_path / "out", dims=3)
    assert cohort is not None
    assert cohort.items(np.array([0, 3])).shape == (2, 48, 48, 48)
    assert len(cohort.slices) == 8


def test_damaged_cohorts_are_named(made: SyntheticScans, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no packed slices"):
        SliceCohort.open(made.root)
    _, cohort = pack(made.root, tmp_path / "out")
    assert cohort is not None
    store = cohort.root / "sub-01" / "items.npy"
    store.write_bytes(store.read_bytes()[:500])
    with pytest.raises(InputDatasetError, match="damaged"):
        cohort.items(np.arange(3))
    (cohort.root / "cohort.json").write_text("{}")
    with pytest.raises(InputDatasetError, match="unreadable"):
        SliceCohort.open(tmp_path / "out")
