"""Facts of masks as a study holds them: the same from either orientation on disk, and true on real studies by plain counting of voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainfm_cli.config import Selection
from brainfm_cli.learning.radiology_reports import check_report, write_report
from brainfm_cli.signals.slice_packing import SliceSettings
from brainfm_cli.signals.study_facts import study_facts
from tests.real_studies import MASKS, counted
from tests.synthetic_scans import VOXEL_MM, write_scans


def test_sides_and_volumes_of_planted_lesions(tmp_path: Path) -> None:
    made = write_scans(tmp_path / "raw", participants=4)
    for label, side in made.sides.items():
        facts = study_facts(made.root, label, Selection(), SliceSettings())
        assert facts is not None
        assert facts.side == side
        assert facts.volume_ml == pytest.approx(made.voxels[label] * np.prod(VOXEL_MM) / 1000)
        assert dict(facts.signals) == {"FLAIR": "hyperintense", "T1w": "hypointense"}


def test_without_a_mask_nothing_is_known_and_an_empty_one_says_that_nothing_is_there(tmp_path: Path) -> None:
    write_scans(tmp_path / "none", participants=1, masks=False)
    assert study_facts(tmp_path / "none", "01", Selection(), SliceSettings()) is None
    write_scans(tmp_path / "empty", participants=1, lesions=False)
    facts = study_facts(tmp_path / "empty", "01", Selection(), SliceSettings())
    assert facts is not None
    assert facts.volume_ml == 0


@pytest.mark.parametrize(("dataset", "label"), MASKS)
def test_reports_of_real_studies_state_true_facts(test_data: Path, dataset: str, label: str) -> None:
    facts = study_facts(test_data / dataset, label, Selection(), SliceSettings())
    assert facts is not None
    volume, side = counted(test_data, dataset, label)
    assert facts.volume_ml == pytest.approx(volume, rel=0.05)
    assert facts.side == side
    written = write_report(facts)
    assert check_report(written.text, facts) == ()
    assert f"a volume of {facts.volume_ml:.2f} mL" in written.text
