"""A real person's category blocks through the brain-caption chain: plumbing only, nothing is said of how often the captions are right.

Events are a second apart, in blocks of one category, so that the block is the unit. One run, twelve blocks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.learning.image_split import ImageSplit
from tests.models.tiny_language import write_bert, write_llama
from tests.stages.command import brainfm

STEM = "sub-02_task-oneback_run-1"
CATEGORIES = {"body", "face", "house", "object", "scene", "scramble"}


def as_it_is(raw: Path, out: Path) -> Path:
    """The run named as a derivative, with a mask of what is bright."""
    folder = out / "sub-02" / "func"
    folder.mkdir(parents=True)
    described = {"Name": "localizer", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "copied"}]}
    (out / "dataset_description.json").write_text(json.dumps(described))
    given = raw / "sub-02" / "func"
    shutil.copy(given / f"{STEM}_bold.nii.gz", folder / f"{STEM}_space-T1w_desc-preproc_bold.nii.gz")
    shutil.copy(given / f"{STEM}_bold.json", folder / f"{STEM}_space-T1w_desc-preproc_bold.json")
    image = nib.load(given / f"{STEM}_bold.nii.gz")
    mean = np.asarray(image.dataobj[..., :20], np.float32).mean(-1)
    bright = (mean > 2 * np.median(mean)).astype(np.uint8)
    nib.save(nib.Nifti1Image(bright, image.affine), folder / f"{STEM}_space-T1w_desc-brain_mask.nii.gz")
    return out


def preprocessed(raw: Path, out: Path) -> Path:
    """What ``brainfm preprocess`` makes of it."""
    assert brainfm("preprocess", raw, out, "participant") == 0
    return out


@pytest.mark.long
@pytest.mark.parametrize("made", [as_it_is, preprocessed])
def test_blocks_become_captions(made: object, test_data: Path, tmp_path: Path) -> None:
    raw = test_data / "bids_localizer"
    source = made(raw, tmp_path / "derivative")  # type: ignore[operator]
    motion = made is preprocessed
    blocks = [
        "single_trial.unit=block", f"single_trial.motion={str(motion).lower()}", "stimuli.template=a photo of a {category}",
        "stimuli.category=trial_type", *(["space=T1w"] if made is as_it_is else []),
    ]  # fmt: skip
    trials = tmp_path / "trials"
    assert brainfm("parcellate", source, trials, "participant", "--trials", "-d", f"raw={raw}", "--set", *blocks) == 0
    assert brainfm("parcellate", source, trials, "group", "--trials", "--set", *blocks) == 0
    cohort = VoxelCohort.open(trials)
    assert cohort.templated
    table = cohort.trials_of("02")
    assert len(table) == 12  # two blocks of each category
    said = [text for name in table["stimulus"] for text in cohort.stimuli[name].captions]
    assert {text.removeprefix("a photo of a ") for text in said} == CATEGORIES
    assert np.isfinite(cohort.responses("02")).all()

    encoder = ["system.preset=nano", "system.patch_voxels=512", "epochs=1", "batch_size=4", "split.test_fraction=0.3", "split.validation_fraction=0.2"]  # fmt: skip
    assert brainfm("pretrain", trials, tmp_path / "p", "group", "--system", "brain-caption", "--device", "cpu", "--set", *encoder) == 0
    (model,) = (tmp_path / "p" / "models").iterdir()
    settings = {
        "llm": str(write_llama(tmp_path / "llama")),
        "text_encoder": str(write_bert(tmp_path / "bert")),
        "fit": {"q_former": {"num_queries": 2, "width": 32, "num_heads": 2}, "judge": "loss"},
        "schedule": {"epochs": 1, "batch_size": 4},
    }
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(settings))
    config = ("--config", tmp_path / "align.yaml", "--device", "cpu")
    assert brainfm("align", trials, tmp_path / "a", "group", "--model", model, *config) == 0
    (model,) = (tmp_path / "a" / "models").iterdir()
    out = tmp_path / "c"
    assert brainfm("caption", trials, out, "participant", "--model", model, "--device", "cpu", "--set", "max_tokens=6") == 0
    values = json.loads((out / "sub-02" / "sub-02_desc-brainfm_caption.json").read_text())
    assert values["captions_of_training"] == "template"
    assert {one["stimulus"] for one in values["captions"]} == set(ImageSplit.read(model / "split.tsv").names("test"))
