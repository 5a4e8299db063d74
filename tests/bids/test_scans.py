"""Scans and lesion masks are found under every naming convention, and what cannot be right is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm_cli.bids.scans import read_studies, sites_of, study_files
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

EVERYTHING = Selection()


def put(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_sequence_comes_from_the_name(tmp_path: Path) -> None:
    put(
        tmp_path,
        *(f"sub-a/ses-1/anat/sub-a_ses-1_{end}.nii.gz" for end in ("T1w", "ce-gd_T1w", "T2w", "FLAIR", "T2starw", "PDw", "angio")),
        *(f"sub-a/ses-1/dwi/sub-a_ses-1_{end}.nii.gz" for end in ("rec-TRACE_dwi", "rec-ADC_dwi", "acq-b1000_dwi")),
        "sub-a/ses-1/swi/sub-a_ses-1_swi.nii.gz",
        "sub-a/ses-1/func/sub-a_ses-1_task-rest_bold.nii.gz",
        "sub-a/ses-2/anat/sub-a_ses-2_T1w.nii.gz",
        "sub-a/ses-2/anat/sub-a_ses-2_space-MNI_T1w.nii.gz",
    )
    first, second = read_studies(tmp_path, "a", EVERYTHING)
    assert {scan.name.removeprefix("sub-a_ses-1_"): scan.sequence for scan in first.scans} == {
        "T1w": "T1w", "ce-gd_T1w": "T1w+ce", "T2w": "T2w", "FLAIR": "FLAIR", "T2starw": "T2star", "PDw": "other",
        "rec-TRACE_dwi": "dwi", "rec-ADC_dwi": "adc", "acq-b1000_dwi": "dwi", "swi": "T2star",
    }  # fmt: skip
    assert (first.name, second.name) == ("sub-a_ses-1", "sub-a_ses-2")
    assert [scan.name for scan in second.scans] == ["sub-a_ses-2_T1w"]
    assert len(read_studies(tmp_path, "a", Selection(session_label=("2",)))) == 1
    assert [s.sequence for s in read_studies(tmp_path, "a", EVERYTHING, sequences=("FLAIR",))[0].scans] == ["FLAIR"]


@pytest.mark.parametrize(
    ("mask", "reference"),
    [
        ("sub-a_label-L_mask", None),
        ("sub-a_space-T2w_label-lesion_mask", "sub-a_T2w"),
        ("sub-a_T2w_desc-lesion_mask", "sub-a_T2w"),
        ("sub-a_space-TRACE_desc-lesionAcute_mask", "sub-a_rec-TRACE_dwi"),
        ("sub-a_space-TRACE_label-lesion_mask", "sub-a_rec-TRACE_dwi"),
        ("sub-a_label-L_desc-T1lesion_mask", None),
        ("sub-a_msk", None),
    ],
)
def test_masks_follow_their_conventions(tmp_path: Path, mask: str, reference: str | None) -> None:
    put(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz", "sub-a/anat/sub-a_T2w.nii.gz", "sub-a/dwi/sub-a_rec-TRACE_dwi.nii.gz")
    put(tmp_path, f"derivatives/lesions/sub-a/anat/{mask}.nii.gz", "derivatives/lesions/sub-a/anat/sub-a_desc-brain_mask.nii.gz")
    (study,) = read_studies(tmp_path, "a", EVERYTHING)
    (found,) = study.masks
    assert found.path.name == f"{mask}.nii.gz"
    assert set(found.labels) == {1}
    assert (found.reference and found.reference.name.partition(".")[0]) == reference
    assert found.path in study_files(tmp_path, "a", EVERYTHING)


def test_a_segmentation_counts_by_its_table(tmp_path: Path) -> None:
    put(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz")
    put(tmp_path, "derivatives/t/sub-a/anat/sub-a_seg-BraTS_dseg.nii.gz", "derivatives/t/sub-a/anat/sub-a_seg-aparc_dseg.nii.gz")
    with pytest.raises(InputDatasetError, match="no table"):
        read_studies(tmp_path, "a", EVERYTHING)
    put(tmp_path, "derivatives/t/seg-BraTS_dseg.tsv", text="index\tname\n1\tnecrotic core\n2\toedema\n4\tenhancing tumour\n")
    put(tmp_path, "derivatives/t/seg-aparc_dseg.tsv", text="index\tname\n1\tcuneus\n7\tputamen\n")
    (study,) = read_studies(tmp_path, "a", EVERYTHING)
    assert [mask.labels for mask in study.masks] == [{1: "necrotic core", 2: "oedema", 4: "enhancing tumour"}]
    # an anatomical table with a lesion row: only that row counts, the others are known
    put(tmp_path, "derivatives/t/seg-aparc_dseg.tsv", text="index\tname\tabbreviation\n1\tcuneus\tC\n7\tdamage\tL\n")
    first = read_studies(tmp_path, "a", EVERYTHING)[0].masks[1]
    assert (first.labels, first.others) == ({7: "damage"}, frozenset({1}))
    put(tmp_path, "derivatives/t/seg-BraTS_dseg.tsv", text="value\tname\n1\tcore\n")
    with pytest.raises(InputDatasetError, match="label table"):
        read_studies(tmp_path, "a", EVERYTHING)


def test_what_a_json_says_is_the_reference(tmp_path: Path) -> None:
    put(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz", "sub-a/anat/sub-a_FLAIR.nii.gz", "sub-a/anat/sub-a_label-L_mask.nii.gz")
    put(tmp_path, "sub-a/anat/sub-a_label-L_mask.json", text='{"SpatialReference": "bids::sub-a/anat/sub-a_FLAIR.nii.gz"}')
    assert read_studies(tmp_path, "a", EVERYTHING)[0].masks[0].reference == tmp_path / "sub-a/anat/sub-a_FLAIR.nii.gz"
    put(tmp_path, "sub-a/anat/sub-a_label-L_mask.json", text='{"SpatialReference": "bids::sub-b/anat/sub-b_FLAIR.nii.gz"}')
    with pytest.raises(InputDatasetError, match="scan of sub-b"):
        read_studies(tmp_path, "a", EVERYTHING)


def test_a_mask_of_another_patient_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz", "derivatives/lesions/sub-a/anat/sub-b_label-L_mask.nii.gz")
    with pytest.raises(InputDatasetError, match="named for sub-b"):
        read_studies(tmp_path, "a", EVERYTHING)


def test_missing_sequences_and_broken_links_are_named(tmp_path: Path) -> None:
    put(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz")
    with pytest.raises(InputNotFoundError, match=r"none of the sequences FLAIR.*found: T1w"):
        read_studies(tmp_path, "a", EVERYTHING, sequences=("FLAIR",))
    with pytest.raises(InputNotFoundError, match="no structural"):
        read_studies(tmp_path, "a", EVERYTHING, space="MNI152")
    (tmp_path / "sub-a/anat/sub-a_T2w.nii.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputDatasetError, match="broken link"):
        read_studies(tmp_path, "a", EVERYTHING)


def test_sites_come_from_the_participants_table(tmp_path: Path) -> None:
    assert sites_of(tmp_path, ["a"], "site") == {"a": ""}
    put(tmp_path, "participants.tsv", text="participant_id\tsite\nsub-a\tLeiden\nsub-b\tn/a\n")
    assert sites_of(tmp_path, ["a", "b", "c"], "site") == {"a": "Leiden", "b": "", "c": ""}


def test_real_datasets(test_data: Path) -> None:
    glioma = read_studies(test_data / "bids_glioma", "TCGADU7294", EVERYTHING)[0]
    assert {scan.sequence for scan in glioma.scans} == {"T1w", "T1w+ce", "T2w", "FLAIR"}
    assert glioma.masks[0].labels == {1: "necrotic or non-enhancing core", 2: "peritumoural oedema", 4: "enhancing tumour"}
    stroke = read_studies(test_data / "bids_stroke", "strokecase0009", EVERYTHING)[0]
    assert {scan.sequence for scan in stroke.scans} == {"FLAIR", "dwi", "adc"}
    assert stroke.masks[0].reference is not None
    assert stroke.masks[0].reference.name.endswith("rec-TRACE_dwi.nii.gz")
