"""Simulated patients: sides, volumes and places are those of the masks and the reports; outcomes follow what is planted, or nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from brainfm_cli.config import Selection
from brainfm_cli.learning.radiology_reports import affirmed, check_report, language_of, parse_report
from brainfm_cli.programs.validator import validate
from brainfm_cli.simulation.mri import DISEASES, HEALTHY, PLACES, MriSettings, ceilings, draw_patient, draw_scans, report_of
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = MriSettings(voxel_mm=5.0, slice_mm=6.0)


def patients(count: int, *, effect: float = 1.0, settings: MriSettings = SETTINGS) -> list:
    return [draw_patient(settings, seed=4, index=index, effect=effect) for index in range(1, count + 1)]


def test_masks_and_reports_say_what_is_planted() -> None:
    seen = set()
    for patient in patients(24):
        scans = draw_scans(patient, SETTINGS, seed=4)
        report = report_of(patient, scans)
        assert language_of(report.findings) == patient.language
        assert check_report(report.text, scans.facts, known_places=PLACES) == ()
        found = affirmed(parse_report(report.findings))
        assert [one.disease for one in found] == ([] if patient.disease == HEALTHY else [patient.disease])
        if patient.disease == HEALTHY:
            assert not scans.mask.any()
            continue
        seen.add((patient.side, scans.affine[0, 0] < 0))
        assert scans.facts.side == patient.side
        assert scans.facts.regions[0][0] == patient.place
        assert scans.facts.volume_ml == pytest.approx(scans.mask.sum() * 0.15 * (1 if scans.affine[2, 2] == 6 else scans.affine[2, 2] / 6))
        assert found[0].places[0] == patient.place
        left = (np.argwhere(scans.mask) @ scans.affine[:3, :3].T + scans.affine[:3, 3])[:, 0] < 0
        assert left.all() == (patient.side == "left")
    assert seen == {("left", False), ("left", True), ("right", False), ("right", True)}


def test_a_lesion_is_seen_and_its_rim_tells_malignancy() -> None:
    heights, malignancy = [], []
    for patient in patients(60):
        if patient.disease != "glioblastoma":
            continue
        scans = draw_scans(patient, SETTINGS, seed=4)
        image, lesion = scans.images["FLAIR"], scans.mask > 0
        other = (image > 0) & ~lesion
        heights.append((image[lesion].mean() - image[other].mean()) / image[other].std())
        malignancy.append(patient.malignancy)
    assert min(heights) > 1
    assert stats.spearmanr(heights, malignancy).statistic > 0.6


def test_outcomes_follow_malignancy_and_at_effect_0_nothing() -> None:
    for effect, follows in ((1.0, True), (0.0, False)):
        people = [one for one in patients(500, effect=effect) if one.disease != HEALTHY]
        shown = [one.malignancy for one in people]
        assert (abs(stats.spearmanr([one.grade for one in people], shown).statistic) > 0.7) == follows
        hazards = [one.log_hazard for one in people]
        assert stats.spearmanr(hazards, shown).statistic > 0.9 if follows else len(set(hazards)) == 1
        same = np.mean([one.diagnosis == one.disease for one in people])
        assert same == 1.0 if follows else same < 0.3
        best = ceilings(people, effect=effect)
        assert (best["metastasis_concordance"] is not None and best["metastasis_concordance"] > 0.55) == follows
        ends = {ending: np.mean([one.ending == ending for one in people]) for ending in ("metastasis", "death", "alive")}
        assert min(ends.values()) > 0.1


def test_a_disease_can_be_held_out() -> None:
    people = patients(200, settings=SETTINGS.model_copy(update={"held_out": "meningioma"}))
    by_split = {split: {one.disease for one in people if one.split == split} for split in ("discovery", "holdout")}
    assert by_split["discovery"] == {HEALTHY, *DISEASES} - {"meningioma"}
    assert "meningioma" in by_split["holdout"]


def test_the_dataset_is_valid_bids_and_read_by_the_rooms(tmp_path: Path) -> None:
    settings = ("--set", "mri.voxel_mm=8", "mri.slice_mm=10", "mri.sequences=[T1w,ce-gadolinium_T1w,FLAIR,dwi]")
    command = ["simulate", tmp_path / "out", "--kind", "mri", "--participants", 4, "--seed", 2, *settings]
    assert brainfm(*command) == 0
    validate(tmp_path / "out")
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.nii.gz")}
    truth = json.loads((tmp_path / "out" / "truth.json").read_text())
    table = pd.read_csv(tmp_path / "out" / "participants.tsv", sep="\t")
    reports = pd.read_csv(tmp_path / "out" / "phenotype" / "reports.tsv", sep="\t")
    assert list(table["participant_id"]) == list(reports["participant_id"])
    from brainfm_cli.bids.scans import read_studies

    (studies, *_) = [read_studies(tmp_path / "out", one["participant"], Selection()) for one in truth["people"][:1]]
    assert {scan.sequence for study in studies for scan in study.scans} == {"T1w", "T1w+ce", "FLAIR", "dwi"}
    for person in truth["people"]:
        (mask,) = (tmp_path / "out" / "derivatives" / "lesions").glob(f"sub-{person['participant']}/anat/*_mask.nii.gz")
        image = nib.load(mask)
        volume = np.asarray(image.dataobj).sum() * np.prod(image.header.get_zooms()) / 1000
        assert volume == pytest.approx(person["volume_ml"], rel=1e-3)
    assert brainfm(*command) == 0  # nothing to do
    assert {path: path.read_bytes() for path in first} == first
    assert brainfm(*command[:2], "--kind", "mri", "--level", "series") == 78
