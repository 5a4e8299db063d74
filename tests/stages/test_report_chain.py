"""mri-language from scans and reports to written, checked and scored reports, through the command line; what cannot be used is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_NOT_FOUND, EXIT_SETTINGS
from brainfm_cli.programs.validator import validate
from brainfm_cli.stages.align.reports import AlignReportSettings
from brainfm_cli.stages.prompt_tune.scan_settings import TuneScansSettings
from tests.models.tiny_language import trained_llama, write_bert
from tests.stages.command import brainfm, brainfm_on_cpu, only
from tests.stages.test_mri_chain import PRETRAIN
from tests.synthetic_scans import SyntheticScans, write_scans

PEOPLE = 14
FIT = (
    "fit.contrast_epochs=2",
    "schedule.epochs=4",
    "schedule.batch_size=4",
    "fit.language_items=2",
    "test_fraction=0.3",
    "execution.precision=32-true",
)
SAY = ("max_tokens=12", "answer_tokens=6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScans:
    root = tmp_path_factory.mktemp("reports")
    made = write_scans(root / "raw", participants=PEOPLE)
    rows = []
    for label, side in made.sides.items():
        disease = "glioblastoma" if int(label) % 2 else "meningioma"
        rows.append((f"sub-{label}", f"There is a {disease} in the {side} frontal lobe.", f"{disease.capitalize()}, {side}."))
    table = pd.DataFrame(rows, columns=["participant_id", "findings", "impression"])
    (root / "raw" / "phenotype").mkdir()
    table.to_csv(root / "raw" / "phenotype" / "reports.tsv", sep="\t", index=False)
    pretrain = ("pretrain", root / "raw", root / "pretrain", "group", "--system", "mri-language", "--participant-label", "01", "02")
    assert brainfm_on_cpu(*pretrain, "--set", *(one.replace("batch_size=16", "batch_size=4") for one in PRETRAIN)) == 0
    write_bert(root / "bert")
    return made


def align(root: Path, name: str, *settings: str, raw: Path | None = None) -> int:
    texts = (f"llm={trained_llama()}", f"text_encoder={root / 'bert'}")
    model = only(root / "pretrain" / "models")
    return brainfm_on_cpu("align", raw or root / "raw", root / name, "group", "--model", model, "--set", *texts, *FIT, *settings)


@pytest.fixture(scope="module")
def aligned(made: SyntheticScans) -> Path:
    root = made.root.parent
    assert align(root, "aligned") == 0
    return only(root / "aligned" / "models")


def test_alignment_leaves_encoder_and_language_model_alone_and_keeps_no_report(made: SyntheticScans, aligned: Path) -> None:
    pretrained = only(made.root.parent / "pretrain" / "models")
    assert (aligned / "model.safetensors").read_bytes() == (pretrained / "model.safetensors").read_bytes()
    validate(made.root.parent / "aligned")
    split = pd.read_csv(aligned / "split.tsv", sep="\t", dtype=str)
    counts = split["role"].value_counts()
    assert counts["test"] == 4
    assert not set(split.loc[split["role"] == "test", "participant_id"]) & {"01", "02", "sub-01", "sub-02"}  # the encoder has seen them
    scores = pd.DataFrame(json.loads((aligned / "evaluation.json").read_text()))
    assert {"model", "ridge on mean features", "chance"} <= set(scores["method"])
    for path in aligned.iterdir():
        assert b"There is a" not in path.read_bytes(), path.name


def test_reports_are_written_checked_and_scored_beside_floors(made: SyntheticScans, aligned: Path) -> None:
    root = made.root.parent
    split = pd.read_csv(aligned / "split.tsv", sep="\t", dtype=str).set_index("participant_id")["role"]
    labels = [str(name).removeprefix("sub-") for name in split.index]
    people = [label for label, role in zip(labels, split, strict=True) if role == "test"]
    learnt = next(label for label, role in zip(labels, split, strict=True) if role == "train")
    out = root / "said"
    command = ("caption", made.root, out)
    asked = ("--model", aligned, "--participant-label", *people, learnt, "--chat", "Is there a lesion?", "Who won the cup?", "--set", *SAY)
    assert brainfm_on_cpu(*command, "participant", *asked) == 0
    for label in people:
        values = json.loads((out / f"sub-{label}" / f"sub-{label}_desc-brainfm_report.json").read_text())
        assert values["facts"]["side"] == made.sides[label]  # on both orientations on disk
        assert values["facts"]["volume_ml"] == pytest.approx(made.voxels[label] * 0.25, rel=1e-6)
        assert f"{values['facts']['volume_ml']:.2f} mL" in values["question"]
        assert made.sides[label] in values["measured_report"]["findings"]
        assert values["note"] == "not for clinical use"
        assert values["chat"][1]["withheld"]
        assert values["seen_in"] == []
    assert json.loads((out / f"sub-{learnt}" / f"sub-{learnt}_desc-brainfm_report.json").read_text())["seen_in"]
    assert brainfm_on_cpu(*command, "group", *asked) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["people"] == len(people)  # whom it learnt from is no test
    names = {row["name"] for row in metrics["rows"]}
    assert {
        "mri-language",
        "reports of others",
        "the model without images",
        "measured facts, commonest disease",
        "most central training report",
    } <= names
    by_name = {row["name"]: row["scores"] for row in metrics["rows"] if row["participant"] == "mean"}
    assert by_name["measured facts, commonest disease"]["contradicts the mask"]["value"] == 0
    assert by_name["measured facts, commonest disease"]["side errors"]["value"] == 0
    assert {row["question"] for row in metrics["closed"]} >= {"Is there a lesion?", "On which side is it?"}
    assert "Closed questions" in (out / "report.html").read_text()
    table = pd.read_csv(out / "reports.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert len(table) == len(names) * len(people)
    validate(out)
    assert metrics["languages"] == {}
    # the same reports, those of half the people in Chinese: scored apart, beside the same floors
    known = pd.read_csv(made.root / "phenotype" / "reports.tsv", sep="\t", dtype=str)
    chinese = {f"sub-{label}" for label in people[:2]}
    for place, name in enumerate(known["participant_id"]):
        if name in chinese:
            disease, side = ("胶质母细胞瘤" if int(name[4:]) % 2 else "脑膜瘤"), ("左" if made.sides[name[4:]] == "left" else "右")
            known.loc[place, ["findings", "impression"]] = [f"{side}侧额叶见{disease}。", f"{side}侧{disease}。"]
    known.to_csv(root / "bilingual.tsv", sep="\t", index=False)
    for label in people:
        shutil.copytree(out / f"sub-{label}", root / "bilingual" / f"sub-{label}")
    assert brainfm_on_cpu("caption", made.root, root / "bilingual", "group", *asked, f"reports={root / 'bilingual.tsv'}") == 0
    by_language = json.loads((root / "bilingual" / "metrics.json").read_text())
    assert {name: rows[0]["people"] for name, rows in by_language["languages"].items()} == {"en": len(people) - 2, "zh": 2}
    for row in by_language["rows"]:  # a share of everybody is that of both languages, weighted by their people
        if row["participant"] == "mean":
            apart = [(other["people"], other["scores"]["disease right"]["value"]) for rows in by_language["languages"].values() for other in rows if other["name"] == row["name"]]  # fmt: skip
            assert sum(count * value for count, value in apart) / len(people) == pytest.approx(row["scores"]["disease right"]["value"])
    facts = {name: next(row for row in rows if row["name"].startswith("measured facts")) for name, rows in by_language["languages"].items()}
    assert {row["scores"]["side errors"]["value"] for row in facts.values()} == {0}  # sides are read in both languages
    assert "2 reports in zh" in (root / "bilingual" / "report.html").read_text()


def test_an_excluded_disease_is_never_learnt_from(made: SyntheticScans) -> None:
    root = made.root.parent
    assert (
        align(root, "excluded", "exclude=[meningioma]", "fit.contrast_epochs=4", "fit.lora=2", "fit.speaker.bridge=mlp") == 0
    )  # contrast alone: the language model is not asked
    model = only(root / "excluded" / "models")
    split = pd.read_csv(model / "split.tsv", sep="\t", dtype=str)
    assert set(split.loc[split["stratum"] == "meningioma", "role"]) == {"test"}
    names = {row["score"] for row in json.loads((model / "evaluation.json").read_text())}
    said = ("caption", made.root, root / "excluded-said", "participant", "--model", model, "--participant-label", "04", "--set", *SAY)
    assert brainfm_on_cpu(*said) == 0
    assert any(name.startswith("meningioma by its name, in no training report (zero-shot)") for name in names)


def test_alignment_does_not_depend_on_when_its_state_is_saved(made: SyntheticScans, aligned: Path) -> None:
    root = made.root.parent
    assert align(root, "again", "schedule.checkpoint_every=1") == 0
    one, other = (only(root / name / "models") for name in ("aligned", "again"))
    assert (one / "speaker.safetensors").read_bytes() == (other / "speaker.safetensors").read_bytes()


def bad(made: SyntheticScans, tmp_path: Path, change) -> Path:  # type: ignore[no-untyped-def]
    raw = tmp_path / "raw"
    shutil.copytree(made.root, raw)
    change(raw / "phenotype" / "reports.tsv")
    return raw


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda path: path.unlink(), EXIT_NOT_FOUND, "no reports"),
        (lambda path: path.write_text(path.read_text().replace("sub-03", "sub-77")), EXIT_BAD_DATA, "sub-77"),
        (lambda path: path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n"), EXIT_BAD_DATA, "5 are needed"),
    ],
)
def test_reports_that_cannot_be_used_are_named(made: SyntheticScans, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, change, code: int, says: str) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    raw = bad(made, tmp_path, change)
    texts = (f"llm={trained_llama()}", f"text_encoder={made.root.parent / 'bert'}")
    model = only(made.root.parent / "pretrain" / "models")
    assert brainfm_on_cpu("align", raw, tmp_path / "out", "group", "--model", model, "--set", *texts, *FIT) == code
    assert says in " ".join((capsys.readouterr().err + caplog.text).split())


def test_models_that_say_nothing_are_refused(made: SyntheticScans, aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = made.root.parent
    pretrained = only(root / "pretrain" / "models")
    assert brainfm_on_cpu("caption", made.root, root / "none", "participant", "--model", pretrained) == EXIT_BAD_DATA
    assert "was not aligned with reports" in " ".join(capsys.readouterr().err.split())
    assert brainfm_on_cpu("align", made.root, root / "twice", "group", "--model", aligned) == EXIT_SETTINGS
    assert brainfm_on_cpu("caption", made.root, root / "early", "group", "--model", aligned) == EXIT_NOT_FOUND
    assert "has no report yet" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_writes_nothing(made: SyntheticScans, aligned: Path) -> None:
    root = made.root.parent
    assert brainfm("align", made.root, root / "dry", "group", "--model", only(root / "pretrain" / "models"), "--dry-run") == 0
    assert brainfm("caption", made.root, root / "dry", "participant", "--model", aligned, "--dry-run") == 0
    assert not (root / "dry").exists()


def test_settings_of_the_example_are_read() -> None:
    folder = Path(__file__).parents[2] / "examples" / "brain-mri"
    assert AlignReportSettings.read(folder / "align.yaml").fit.lora == 16
    follow_up = TuneScansSettings.read(folder / "survival.yaml").follow_up
    assert (follow_up.event, follow_up.competing) == ("ending", ("death",))
