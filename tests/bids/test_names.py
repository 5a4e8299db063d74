from __future__ import annotations

import pytest

from brainfm_cli.bids import names
from brainfm_cli.errors import InputDatasetError, UsageError


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_task-rest_space-MNI152NLin2009cAsym_atlas-Schaefer2018_seg-7n_scale-100_stat-mean_timeseries.tsv",
        "sub-01_ses-a_task-rest_run-01_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
        "tpl-MNI152NLin2009cAsym_atlas-AAL116_res-02_dseg.tsv",
    ],
)
def test_parse_and_format_are_inverse(name: str) -> None:
    assert names.format_name(*names.parse_name(name)) == name


@pytest.mark.parametrize("entities", [{"sub": "../x"}, {"sub": ""}, {"sub": "a_b"}, {"nonsense": "1"}, {"sub": "a/b"}])
def test_unsafe_names_are_refused(entities: dict[str, str]) -> None:
    with pytest.raises(InputDatasetError):
        names.format_name(entities, "bold", ".nii.gz")


def test_labels() -> None:
    assert names.strip_prefix(["sub-01", "02", "01"], "sub") == ("01", "02")
    with pytest.raises(UsageError):
        names.strip_prefix(["../01"], "sub")


@pytest.mark.parametrize("label", ["Schaefer2018_seg-7n_scale-100", "AAL116"])
def test_atlas_label_round_trip(label: str) -> None:
    assert names.atlas_label(names.atlas_entities(label)) == label


@pytest.mark.parametrize("label", ["", "a b", "AAL_", "../AAL", "AAL_seg"])
def test_bad_atlas_labels(label: str) -> None:
    with pytest.raises(InputDatasetError):
        names.atlas_entities(label)
