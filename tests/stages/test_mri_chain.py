"""pretrain, prompt-tune and predict of mri-language through the command line, down to masks in the grid of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_NOT_FOUND, EXIT_SETTINGS
from brainfm_cli.programs.validator import validate
from tests.real_studies import lies_on_its_source
from tests.stages.command import brainfm
from tests.synthetic_scans import SyntheticScans, write_scans

PACK = ("slices.sequences=[FLAIR]",)
PRETRAIN = ("system.preset=nano", "slices.size=48", "epochs=1", "batch_size=16", "system.evaluated_slices=8", *PACK)
FIT = ("schedule.epochs=12", "schedule.batch_size=8", "schedule.optimiser.learning_rate=0.005", "execution.precision=32-true", *PACK)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScans:
    root = tmp_path_factory.mktemp("chain")
    made = write_scans(root / "raw", participants=16)
    pretrain = ("pretrain", root / "raw", root / "pretrain", "group", "--system", "mri-language", "--device", "cpu")
    assert brainfm(*pretrain, "--participant-label", "01", "02", "03", "04", "--set", *PRETRAIN) == 0
    return made


def tune(made: SyntheticScans, name: str, *options: str) -> int:
    root = made.root.parent
    model = ("--model", only(root / "pretrain" / "models"), "--device", "cpu")
    return brainfm("prompt-tune", made.root, root / name, "group", *model, *options)


def test_lesions_are_found_on_their_side_in_the_grid_of_the_file(made: SyntheticScans) -> None:
    root = made.root.parent
    assert tune(made, "seg", "--set", "task=segmentation", "random_encoder=false", *FIT) == 0
    validate(root / "seg")
    model = only(root / "seg" / "models")
    scores = pd.DataFrame(json.loads((model / "evaluation.json").read_text())).set_index(["method", "score"])
    assert scores.loc[("model", "dice"), "value"] > 0.6
    assert scores.loc[("model", "dice"), "value"] > scores.loc[("mean mask", "dice"), "value"]
    tests = pd.read_csv(model / "split.tsv", sep="\t", dtype=str).query("role == 'test'")["participant_id"].tolist()
    assert not {"01", "02", "03", "04"} & set(tests)  # the encoder's pretraining
    assert (
        brainfm("predict", made.root, root / "lesions", "participant", "--model", model, "--device", "cpu", "--participant-label", *tests)
        == 0
    )
    validate(root / "lesions")
    for label in tests:
        values = json.loads((root / "lesions" / f"sub-{label}" / f"sub-{label}_desc-brainfm_prediction.json").read_text())
        image = nib.load(root / "lesions" / values["segmentations"][0]["image"])
        source = nib.load(made.root / f"sub-{label}" / "anat" / f"sub-{label}_FLAIR.nii.gz")
        truth = nib.load(made.root / "derivatives" / "lesions" / f"sub-{label}" / "anat" / f"sub-{label}_label-L_mask.nii.gz")
        assert image.shape == source.shape
        assert np.allclose(image.affine, source.affine)
        predicted, observed = np.asarray(image.dataobj) > 0, np.asarray(truth.dataobj) > 0
        places = [np.c_[np.argwhere(mask), np.ones(mask.sum())] @ image.affine.T for mask in (predicted, observed)]
        assert np.sign(places[0][:, 0].mean()) == np.sign(places[1][:, 0].mean()) == (-1 if made.sides[label] == "left" else 1)
        assert values["value"] == pytest.approx(predicted.sum() * 0.25)  # 5 × 5 × 10 mm
        assert values["seen_in"] == []
    assert brainfm("predict", made.root, root / "lesions", "group", "--model", model, "--device", "cpu") == 0
    table = pd.read_csv(root / "lesions" / "phenotype" / "brainfm_lesion.tsv", sep="\t")
    assert len(table) == len(tests)
    validate(root / "lesions")


def test_lesions_from_two_sequences_at_once_and_from_the_one_that_is_there(made: SyntheticScans) -> None:
    root = made.root.parent
    both = ("slices.sequences=[T1w, FLAIR]", "segmentation.together=true")
    fit = [one for one in FIT if one not in PACK]
    assert tune(made, "both", "--set", "task=segmentation", "random_encoder=false", *fit, *both) == 0
    validate(root / "both")
    model = only(root / "both" / "models")
    scores = pd.DataFrame(json.loads((model / "evaluation.json").read_text())).set_index(["method", "score"])
    assert scores.loc[("model", "dice"), "value"] > 0.6
    assert "2 at " in (model / "report.html").read_text()
    tests = pd.read_csv(model / "split.tsv", sep="\t", dtype=str).query("role == 'test'")["participant_id"].tolist()[:2]
    fewer = root / "fewer"
    shutil.copytree(made.root, fewer)
    (fewer / f"sub-{tests[1]}" / "anat" / f"sub-{tests[1]}_T1w.nii.gz").unlink()
    one = ("predict", fewer, root / "together", "participant", "--model", model, "--device", "cpu", "--participant-label", *tests)
    assert brainfm(*one) == 0
    for label, names in zip(tests, (["FLAIR", "T1w"], ["FLAIR"]), strict=True):
        values = json.loads((root / "together" / f"sub-{label}" / f"sub-{label}_desc-brainfm_prediction.json").read_text())
        assert values["sequences"] == names
        (found,) = values["segmentations"]
        assert found["scans"] == [f"sub-{label}_{name}" for name in names]
        truth = nib.load(made.root / "derivatives" / "lesions" / f"sub-{label}" / "anat" / f"sub-{label}_label-L_mask.nii.gz")
        predicted, observed = np.asarray(nib.load(root / "together" / found["image"]).dataobj) > 0, np.asarray(truth.dataobj) > 0
        assert 2 * (predicted & observed).sum() / (predicted.sum() + observed.sum()) > 0.5


def test_classes_are_learnt_and_said_with_their_slices(made: SyntheticScans) -> None:
    root = made.root.parent
    longer = tuple(one.replace("epochs=12", "epochs=40") for one in FIT)
    assert tune(made, "class", "--target", "size", "--set", *longer) == 0
    validate(root / "class")
    model = only(root / "class" / "models")
    maps = ("--set", "scans.cam=hirescam")
    scores = pd.DataFrame(json.loads((model / "evaluation.json").read_text())).set_index(["method", "score"])
    assert {"model", "majority", "no pretraining, same head", "intensities and volumes, linear"} == {
        name for name in scores.index.get_level_values(0) if "−" not in name
    }
    assert scores.loc[("model", "AUROC"), "value"] >= scores.loc[("majority", "AUROC"), "value"] == 0.5
    assert "Test people" in (model / "report.html").read_text()
    assert (model / "model.safetensors").read_bytes() == (only(root / "pretrain" / "models") / "model.safetensors").read_bytes()
    assert (
        brainfm(
            "predict",
            made.root,
            root / "said",
            "participant",
            "--model",
            model,
            "--device",
            "cpu",
            "--participant-label",
            "05",
            "06",
            *maps,
        )
        == 0
    )
    validate(root / "said")
    values = json.loads((root / "said" / "sub-05" / "sub-05_desc-brainfm_prediction.json").read_text())
    (cam,) = values["attribution"]
    image, source = nib.load(root / "said" / cam["image"]), nib.load(made.root / "sub-05" / "anat" / "sub-05_FLAIR.nii.gz")
    assert image.shape == source.shape
    assert np.allclose(image.affine, source.affine)
    assert np.asarray(image.dataobj).max() <= 1 + 1e-6
    truth = nib.load(made.root / "derivatives" / "lesions" / "sub-05" / "anat" / "sub-05_label-L_mask.nii.gz")
    drawn, heat = np.asarray(truth.dataobj) > 0, np.asarray(image.dataobj)
    assert cam["localisation"]["energy"] == pytest.approx(
        heat[drawn].sum() / heat.sum(), abs=1e-4
    )  # the volume lies on the scan as the mask does
    assert 0 < cam["localisation"]["chance"] < 0.1
    assert cam["agreement_with_random_encoder"] is not None
    assert (root / "said" / "sub-05" / "figures" / "sub-05_space-FLAIR_desc-cam_statmap.png").stat().st_size > 1000
    assert sum(values["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert values["slices"][0]["weight"] >= values["slices"][-1]["weight"] > 0
    assert values["note"] == "not for clinical use"
    before = (root / "said" / "sub-05" / "sub-05_desc-brainfm_prediction.json").stat().st_mtime_ns
    assert (
        brainfm("predict", made.root, root / "said", "participant", "--model", model, "--device", "cpu", "--participant-label", "05", *maps)
        == 0
    )
    assert (root / "said" / "sub-05" / "sub-05_desc-brainfm_prediction.json").stat().st_mtime_ns == before


def test_bad_input_is_named(made: SyntheticScans, capsys: pytest.CaptureFixture[str]) -> None:
    root = made.root.parent
    pretrained = only(root / "pretrain" / "models")
    assert tune(made, "b1") == EXIT_SETTINGS
    assert tune(made, "b2", "--target", "nothing", "--set", *FIT) == EXIT_NOT_FOUND
    assert tune(made, "b3", "--target", "size", "--set", "slices.size=64", *PACK) == EXIT_SETTINGS
    assert brainfm("predict", made.root, root / "b4", "participant", "--model", pretrained) == EXIT_NOT_FOUND
    assert brainfm("predict", made.root, root / "b8", "group", "--model", pretrained, "--lock") == EXIT_SETTINGS
    few = ("--participant-label", "01", "02", "03", "04", "05")
    assert tune(made, "b5", "--target", "size", *few, "--set", *FIT) == EXIT_BAD_DATA  # four of five were pretrained on
    packed = brainfm("prompt-tune", root / "pretrain", root / "b6", "group", "--model", pretrained, "--set", "task=segmentation")
    assert packed == EXIT_NOT_FOUND
    assert tune(made, "b7", "--target", "size", "--dry-run") == 0
    assert not (root / "b7").exists()
    assert "30%" in capsys.readouterr().out


def test_real_scans_get_masks_in_their_own_grid(made: SyntheticScans, test_data: Path) -> None:
    """Depends on the segmentation above; the model knows simulated heads, so only the way back is tested."""
    root = made.root.parent
    model = only(root / "seg" / "models")
    for name, expected in (("bids_stroke", 1), ("bids_glioma", 2)):
        out = root / f"real-{name}"
        assert brainfm("predict", test_data / name, out, "participant", "--model", model, "--device", "cpu") == 0
        images = sorted(out.rglob("*_dseg.nii.gz"))
        assert len(images) == expected
        for path in images:
            assert lies_on_its_source(path, test_data / name), path.name
        validate(out)
