"""align → predict through the command line: a disorder that nobody was labelled with is scored by its text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.learning.checkpoints import read_model_config
from brainfm_cli.learning.texts import read_disorders
from brainfm_cli.learning.tuned import prepare_inputs
from brainfm_cli.programs.validator import validate
from brainfm_cli.provenance import file_sha256
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph.texts import Aligned
from tests.stages.command import brainfm_on_cpu as brainfm

QUICK = (
    "floors.kinds=[majority,covariates]",
    "evaluation.bootstraps=100",
    "evaluation.permutations=99",
    "evaluation.groups=[]",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A cohort with four disorders, a model pretrained on a few of its people, aligned with two of them."""
    root = tmp_path_factory.mktemp("align")
    cohort = ["population.num_disorders=4", "population.case_share=0.75", "effect=3", "frames=120"]
    assert brainfm("simulate", root / "series", "--level", "series", "--participants", 140, "--atlases", "Schaefer100", "--seed", 5, "--set", *cohort) == 0  # fmt: skip
    quick = ["system.preset=tiny", "epochs=1", "batch_size=16", "validation_fraction=0.2", "where.split=[discovery]"]
    assert brainfm("pretrain", root / "series", root / "pretrained", "group", "--system", "brain-graph", "--set", *quick) == 0
    settings = {
        "disorders": str(root / "series" / "disorders.tsv"),
        "where": {"split": ["discovery"]},
        "exclude": ["Caldor", "Dornish"],
        "fit": {"steps": 20, "stops": 1, "folds": 2},
    }
    (root / "align.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert align(root, "aligned") == 0
    return root


def model(root: Path, name: str) -> Path:
    (folder,) = (root / name / "models").iterdir()
    return folder


def align(root: Path, out: str, *options: object) -> int:
    return brainfm("align", root / "series", root / out, "group", "--model", model(root, "pretrained"), "--target", "diagnosis", "--config", root / "align.yaml", *options)  # fmt: skip


def predict(root: Path, out: str, level: str, *options: object, split: str = "holdout") -> int:
    table = f"text.table={root / 'series' / 'disorders.tsv'}"
    return brainfm("predict", root / "series", root / out, level, "--model", model(root, "aligned"), "--set", f"where.split=[{split}]", table, *QUICK, *options)  # fmt: skip


def test_disorders_nobody_was_labelled_with_are_told_by_their_texts(chain):
    assert predict(chain, "scored", "group") == 0
    summary = json.loads((chain / "scored" / "zero_shot.json").read_text(encoding="utf-8"))
    assert [(one["name"], one["seen"]) for one in summary["disorders"]] == [("Caldor", False), ("Dornish", False)]
    for one in summary["disorders"]:
        assert one["auroc"]["value"] > 0.8
        assert one["auroc"]["value"] > one["shuffled"]["mean"] + 0.2
        assert one["neutral_spread"] == 0
        assert {"Majority", "Motion, age, sex, site", "Random vectors for the text", "Text, connectivity only"} <= set(one["others"])
    assert summary["retrieval"]["first"] > summary["retrieval"]["chance_first"]
    metrics = json.loads((chain / "scored" / "zero-shot" / "Caldor" / "metrics.json").read_text(encoding="utf-8"))
    assert any("Nobody among them has Caldor" in note for note in metrics["notes"])
    assert (chain / "scored" / "zero-shot" / "Caldor" / "report.html").is_file()
    before = (chain / "scored" / "report.html").read_bytes()
    (chain / "scored" / "report.html").unlink()
    assert predict(chain, "scored", "group", "--reports-only") == 0
    assert (chain / "scored" / "report.html").read_bytes() == before


def first_of(chain: Path) -> str:
    lines = (chain / "series" / "participants.tsv").read_text(encoding="utf-8").splitlines()
    return next(line.split("\t")[0].removeprefix("sub-") for line in lines[1:] if line.split("\t")[-1] == "holdout")


def test_a_person_is_scored_by_prose(chain):
    label = first_of(chain)
    prose = "text.texts={melancholy: The default mode network is excessively coupled with the salience network.}"
    assert predict(chain, "single", "participant", prose, "--participant-label", label) == 0
    (path,) = (chain / "single").rglob("*_prediction.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["texts"]["melancholy"]["statements"] == 1
    assert 0 < values["texts"]["melancholy"]["value"] < 1
    assert values["seen_in"] == []


def test_outputs_are_a_valid_derivative(chain):
    assert predict(chain, "scored", "group") == 0
    for name in ("aligned", "scored", "single"):
        validate(chain / name)


def test_the_backbone_is_copied_unchanged_and_the_texts_are_kept(chain):
    own, pretrained = model(chain, "aligned"), model(chain, "pretrained")
    assert file_sha256(own / "model.safetensors") == file_sha256(pretrained / "model.safetensors")
    assert read_model_config(own).alignment["disorders"] == ["Arvel", "Brennic"]
    described = yaml.safe_load((own / "disorders.yaml").read_text(encoding="utf-8"))["disorders"]
    assert [one["name"] for one in described] == ["Arvel", "Brennic", "Caldor", "Dornish"]


def test_the_same_seed_gives_the_same_alignment(chain):
    assert align(chain, "again") == 0
    assert file_sha256(model(chain, "again") / "text.safetensors") == file_sha256(model(chain, "aligned") / "text.safetensors")


def tune(root: Path, out: str, *options: object, base: str = "aligned") -> int:
    coding = ("coding.classes=[control, Caldor]", "coding.positive=Caldor", "tuning.epochs=0", "tuning.inner_folds=2")
    return brainfm("prompt-tune", root / "series", root / out, "group", "--model", model(root, base), "--target", "diagnosis", "--set", "where.split=[discovery]", *coding, *options)  # fmt: skip


def test_a_text_helps_where_labels_are_few(chain):
    assert tune(chain, "guided", "text=Caldor") == 0
    assert tune(chain, "plain") == 0
    config = read_model_config(model(chain, "guided"))
    assert config.tuning["text"] == "Caldor"
    assert config.alignment == {}
    few = ("where.split=[holdout]", "few_shot.shots=[3]", "few_shot.draws=4", "random_encoder=false", *QUICK)
    found = {}
    for name in ("guided", "plain"):
        assert brainfm("predict", chain / "series", chain / f"{name}-few", "group", "--model", model(chain, name), "--set", *few) == 0
        metrics = json.loads((chain / f"{name}-few" / "few-shot" / "3" / "metrics.json").read_text(encoding="utf-8"))
        found[name] = metrics["predictors"][0]["scores"]["auroc"]["value"]
    assert found["guided"] > found["plain"] + 0.05


def test_the_direction_kept_for_tuning_is_that_of_the_zero_shot_score(chain):
    assert tune(chain, "guided", "text=Caldor") == 0
    cohort, system = Cohort.open(chain / "series" / "cohort"), load_system(model(chain, "aligned"))
    people = list(cohort.participants.index[:12])
    aligned = Aligned.load(model(chain, "aligned"), system)
    text = read_disorders(chain / "series" / "disorders.tsv").text_of("Caldor")
    expected = aligned.logits(aligned.inputs(cohort, people), people, aligned.vectors([text]), encoder=False)[:, 0]
    guided = load_system(model(chain, "guided"))
    (atlas,) = cohort.atlases
    found = prepare_inputs(guided, cohort, people, [atlas])[atlas].blocks["text"][:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert "text" not in prepare_inputs(load_system(model(chain, "plain")), cohort, people, [atlas])[atlas].blocks


def test_people_of_the_alignment_cannot_be_tested(chain, caplog):
    assert tune(chain, "guided", "text=Caldor") == 0
    code = brainfm("predict", chain / "series", chain / "leak", "group", "--model", model(chain, "guided"), "--set", "where.split=[discovery]", "design.folds=2", *QUICK)  # fmt: skip
    assert code == 65
    assert "pretrain" in caplog.text


@pytest.mark.parametrize(
    ("base", "text", "code"), [("pretrained", "ADHD", 2), ("aligned", "A disorder of which nothing is known at all.", 65)]
)
def test_a_text_that_cannot_be_read_is_refused(chain, base, text, code):
    assert tune(chain, f"refused-{base}", f"text={text}", base=base) == code


def test_the_published_variant_runs(chain):
    assert align(chain, "pooled", "--set", "fit.condition=pooled", "fit.epochs=1") == 0
    own = model(chain, "pooled")
    table = f"text.table={chain / 'series' / 'disorders.tsv'}"
    assert brainfm("predict", chain / "series", chain / "pooled-scored", "group", "--model", own, "--set", "where.split=[holdout]", "text.disorders=[Caldor]", table, *QUICK) == 0  # fmt: skip
    (one,) = json.loads((chain / "pooled-scored" / "zero_shot.json").read_text(encoding="utf-8"))["disorders"]
    assert 0 <= one["auroc"]["value"] <= 1


@pytest.mark.parametrize(
    ("options", "split", "code"),
    [
        (("text.disorders=[Nobody]",), "holdout", 66),
        ((), "discovery", 65),
        (("text.disorders=[Caldor]", "text.table=absent.tsv"), "holdout", 66),
    ],
)
def test_what_cannot_be_scored_is_refused(chain, options, split, code):
    assert predict(chain, f"refused-{len(options)}-{split}", "group", *options, split=split) == code


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["control=[healthy]"], "nobody without a disorder"),
        (["exclude=[Arvel, Brennic, Caldor, Dornish]"], "no disorder to learn from"),
        (["encoder=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_aligned_is_refused(chain, options, words, capsys, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else the hub is asked, for a minute where there is no network
    assert align(chain, "refused", "--set", *options) != 0
    assert words in capsys.readouterr().err + caplog.text
