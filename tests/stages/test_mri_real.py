"""mri-language on real studies (two gliomas, a stroke, a healthy head): every stage, in the grid of the files; what is written is true of the masks.

The models are tiny and know these few scans and simulated heads: what they think of a real lesion is not judged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.programs.validator import validate
from tests.models.tiny_language import trained_llama, write_bert
from tests.real_studies import MASKS, counted, lies_on_its_source
from tests.stages.command import brainfm_on_cpu, only
from tests.synthetic_scans import write_scans

pytestmark = pytest.mark.long
PRETRAIN = (
    "system.preset=nano",
    "slices.size=96",
    "epochs=1",
    "batch_size=16",
    "system.evaluated_slices=16",
    "execution.precision=32-true",
)
FIT = ("schedule.epochs=4", "schedule.batch_size=4", "execution.precision=32-true")
DATASETS = ("bids_stroke", "bids_glioma", "bids_localizer")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Path:
    """One encoder of the four real heads; a segmentation and a speaker on it, learnt from simulated heads."""
    root = tmp_path_factory.mktemp("real")
    everyone = root / "everyone"
    everyone.mkdir()
    shutil.copy(test_data / "bids_glioma" / "dataset_description.json", everyone)
    for name in DATASETS:
        for person in sorted((test_data / name).glob("sub-*")):
            (everyone / person.name).symlink_to(person)
    packing = ("--set", *PRETRAIN)
    assert brainfm_on_cpu("pretrain", everyone, root / "pretrained", "group", "--system", "mri-language", *packing) == 0
    made = write_scans(root / "raw", participants=14)
    rows = [(f"sub-{label}", f"There is a glioma in the {side} frontal lobe.", f"Glioma, {side}.") for label, side in made.sides.items()]
    (root / "raw" / "phenotype").mkdir()
    table = pd.DataFrame(rows, columns=["participant_id", "findings", "impression"])
    table.to_csv(root / "raw" / "phenotype" / "reports.tsv", sep="\t", index=False)
    encoder = ("--model", only(root / "pretrained" / "models"))
    masks = ("task=segmentation", "random_encoder=false", "slices.sequences=[FLAIR]", *FIT)
    assert brainfm_on_cpu("prompt-tune", root / "raw", root / "tuned", "group", *encoder, "--set", *masks) == 0
    texts = (f"llm={trained_llama()}", f"text_encoder={write_bert(root / 'bert')}", "fit.contrast_epochs=2", "fit.language_items=2")
    assert brainfm_on_cpu("align", root / "raw", root / "aligned", "group", *encoder, "--set", *texts, *FIT) == 0
    return root


def test_the_encoder_shows_what_it_hides(root: Path) -> None:
    model = only(root / "pretrained" / "models")
    scores = {(row["method"], row["score"]): row["mean"] for row in json.loads((model / "evaluation.json").read_text())}
    assert {method for method, _ in scores} >= {"model", "mean fill", "inpainting"}
    assert np.isfinite(list(scores.values())).all()
    assert (model / "report.html").read_text().count("data:image/png;base64") >= 1
    people = pd.read_csv(model / "split.tsv", sep="\t", dtype=str)
    assert len(people) == 4


@pytest.mark.parametrize(("dataset", "images"), [("bids_stroke", 1), ("bids_glioma", 2), ("bids_localizer", 0)])
def test_lesions_are_written_in_the_grid_of_the_file(root: Path, test_data: Path, dataset: str, images: int) -> None:
    out = root / f"segmented-{dataset}"
    code = brainfm_on_cpu("predict", test_data / dataset, out, "participant", "--model", only(root / "tuned" / "models"))
    found = sorted(out.rglob("*_dseg.nii.gz"))
    assert len(found) == images
    assert (code == 0) == (images > 0)  # the healthy head has no FLAIR, and that is an error
    for path in found:
        assert lies_on_its_source(path, test_data / dataset), path.name


@pytest.mark.parametrize("dataset", DATASETS)
def test_reports_state_what_the_mask_says(root: Path, test_data: Path, dataset: str) -> None:
    out = root / f"said-{dataset}"
    asked = ("--chat", "Is there a lesion?", "--set", "max_tokens=12", "answer_tokens=6")
    assert brainfm_on_cpu("caption", test_data / dataset, out, "participant", "--model", only(root / "aligned" / "models"), *asked) == 0
    validate(out)
    reports = sorted(out.rglob("*_desc-brainfm_report.json"))
    assert len(reports) == len(list((test_data / dataset).glob("sub-*")))
    for path in reports:
        values, label = json.loads(path.read_text()), path.name.split("_")[0].removeprefix("sub-")
        if (dataset, label) not in MASKS:
            assert values["facts"] is None
            continue
        volume, side = counted(test_data, dataset, label)
        assert values["facts"]["volume_ml"] == pytest.approx(volume, rel=0.05)
        assert values["facts"]["side"] == side
        assert f"{values['facts']['volume_ml']:.2f} mL" in values["measured_report"]["findings"]
        assert values["report"]["contradictions"] == []  # what these models write names no side, place or size
