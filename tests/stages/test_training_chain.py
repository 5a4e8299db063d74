"""simulate → pretrain → prompt-tune → predict through the command line: what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.learning.comparison import Request, evaluate_model
from brainfm_cli.learning.evaluation import EvaluationSettings
from brainfm_cli.learning.floors import FloorSettings
from brainfm_cli.learning.splits import DesignSettings, participant_hash
from brainfm_cli.learning.targets import TargetSettings, read_target
from brainfm_cli.learning.tuned import TargetRecord
from brainfm_cli.programs.validator import validate
from brainfm_cli.systems import load_system
from tests.stages.command import brainfm_on_cpu as brainfm

ATLAS = "Schaefer2018_seg-7n_scale-100"
QUICK = (
    "floors.kinds=[majority,covariates,fisherz]",
    "evaluation.bootstraps=100",
    "evaluation.permutations=99",
    "evaluation.inner_folds=2",
    "evaluation.groups=[sex]",
)
COMMON = {".bidsignore", "config.yaml", "dataset_description.json", "logs/CITATION.md"}
MODEL = {"README.md", "config.yaml", "model.safetensors", "normalisation.json", "provenance.json", "report.html"}
EVALUATION = {
    *COMMON,
    "logs/metrics.schema.json",
    "logs/records/group.json",
    "metrics.json",
    "phenotype/brainfm_diagnosis_binary.json",
    "phenotype/brainfm_diagnosis_binary.tsv",
    "predictions.tsv",
    "report.html",
    "split.tsv",
}


@dataclass
class Chain:
    """Folders of a chain that ran once."""

    root: Path
    codes: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, command: str, level: str, *options: object, source: str = "series") -> int:
        self.codes[name] = brainfm(command, self.root / source, self.root / name, level, *options)
        return self.codes[name]

    def model(self, name: str) -> Path:
        (folder,) = (self.root / name / "models").iterdir()
        return folder

    def tree(self, name: str) -> set[str]:
        """Files below a folder, model identifiers written as MODEL."""
        root = self.root / name
        models = {path.name for path in (root / "models").iterdir()} if (root / "models").is_dir() else set()
        found = set()
        for path in root.rglob("*"):
            if path.is_file():
                text = path.relative_to(root).as_posix()
                for model in models:
                    text = text.replace(model, "MODEL")
                found.add(text)
        return found

    def people(self, split: str) -> list[str]:
        table = pd.read_csv(self.root / "series" / "cohort" / "participants.tsv", sep="\t", dtype=str)
        return sorted(table.loc[table["split"] == split, "participant_id"])


TUNE = ("--target", "diagnosis_binary", "--set", "where.split=[discovery]", "tuning.epochs=2", "tuning.stops=1", "tuning.inner_folds=2")
HOLDOUT = "where.split=[holdout]"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("chain"))
    chain.codes["series"] = brainfm(
        "simulate", chain.root / "series", "--kind", "rest", "--level", "series", "--participants", 60, "--seed", 3,
        "--atlases", "Schaefer100", "--set", "frames=80", "population.disorders=[Arvel]",
    )  # fmt: skip
    training = ("system.preset=tiny", "epochs=1", "steps=2", "batch_size=16", "log_every=1", "where.split=[discovery]")
    chain.run("pretrain", "pretrain", "group", "--system", "brain-graph", "--seed", 3, "--set", *training)
    chain.run("tune", "prompt-tune", "group", "--model", chain.model("pretrain"), *TUNE)
    model = ("--model", chain.model("tune"))
    chain.run("participant", "predict", "participant", *model, "--set", HOLDOUT)
    chain.run("applied", "predict", "group", *model, "--set", HOLDOUT, *QUICK)
    chain.run("refitted", "predict", "group", *model, "--set", HOLDOUT, "refit=always", "design.folds=2", *QUICK)
    inside = ("refit=always", "pretraining=inside", "design.folds=2", *QUICK)
    chain.run("inside", "predict", "group", *model, "--set", *inside)
    return chain


def test_every_command_succeeds(chain: Chain) -> None:
    assert chain.codes == dict.fromkeys(("series", "pretrain", "tune", "participant", "applied", "refitted", "inside"), 0)


def test_trees_are_the_documented_ones(chain: Chain) -> None:
    model = {f"models/MODEL/{name}" for name in MODEL}
    assert chain.tree("series") == COMMON | {
        f"cohort/atlas-{ATLAS}.json", f"cohort/atlas-{ATLAS}.npy", "cohort/index.parquet", "cohort/participants.json",
        "cohort/participants.tsv", "disorders.tsv", "logs/records/group.json", "participants.json", "participants.tsv",
        "planted.tsv", "truth.json",
    }  # fmt: skip
    assert chain.tree("pretrain") == COMMON | model | {"models/MODEL/log.csv", "logs/records/model-MODEL.json"}
    tuned = {f"models/MODEL/{name}" for name in ("head.safetensors", "prompts.safetensors", "held_out.tsv")}
    assert chain.tree("tune") == COMMON | model | tuned | {"logs/records/model-MODEL.json"}
    people = chain.people("holdout")
    units = {f"sub-{name}/sub-{name}_desc-brainfm_prediction.json" for name in people} | {
        f"logs/records/sub-{name}.json" for name in people
    }
    assert chain.tree("participant") == COMMON | units
    assert chain.tree("applied") == chain.tree("refitted") == EVALUATION
    fold_models = {f"models/MODEL/{name}" for name in (*MODEL - {"README.md", "report.html"}, "log.csv", "inputs.json")}
    assert chain.tree("inside") == EVALUATION | fold_models


@pytest.mark.parametrize("name", ["series", "pretrain", "tune", "participant", "applied", "inside"])
def test_outputs_are_valid_bids(chain: Chain, name: str) -> None:
    validate(chain.root / name)
    description = json.loads((chain.root / name / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "brainfm"


def test_pretraining_took_the_steps_and_people_asked_for(chain: Chain) -> None:
    folder = chain.model("pretrain")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["steps"] == 2
    seen = {*provenance["pretrained_on"], *provenance["validated_on"]}
    assert seen == {participant_hash("simulated", name) for name in chain.people("discovery")}
    log = pd.read_csv(folder / "log.csv")
    assert list(log["kind"]) == ["train", "train", "validation"]
    assert np.isfinite(log["loss"]).all()
    assert log["monitor_probe_site"].notna().tolist() == [False, False, True]
    assert f"site {log['monitor_probe_site'].iloc[-1]:.2f}" in (folder / "README.md").read_text()
    assert "<h2>Probes</h2>" in (folder / "report.html").read_text()
    assert not read_model_config(folder).tuning


def test_tuning_keeps_the_backbone_byte_for_byte(chain: Chain) -> None:
    before, after = chain.model("pretrain"), chain.model("tune")
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    record = read_model_config(after).tuning
    assert (record["name"], record["kind"], record["classes"]) == ("diagnosis_binary", "binary", ["control", "case"])
    assert record["people"] == len(chain.people("discovery"))
    provenance = json.loads((after / "provenance.json").read_text())
    assert provenance["tuned_on"] == sorted(participant_hash("simulated", name) for name in chain.people("discovery"))
    assert {name.partition(":")[0] for name in read_tensors(after / "head.safetensors")} == {ATLAS}
    shown = (after / "report.html").read_text() + (after / "held_out.tsv").read_text() + (after / "provenance.json").read_text()
    assert not any(f"sub-{name}" in shown for name in chain.people("discovery"))


def predictions(chain: Chain, name: str) -> pd.DataFrame:
    table = pd.read_csv(chain.root / name / "predictions.tsv", sep="\t", dtype={"participant_id": str})
    first = metrics(chain, name)["predictors"][0]["name"]
    return table[table["predictor"] == first].set_index("participant_id")


def metrics(chain: Chain, name: str) -> dict:
    return json.loads((chain.root / name / "metrics.json").read_text())


def test_a_person_gets_the_same_prediction_alone_and_in_the_evaluation(chain: Chain) -> None:
    table = predictions(chain, "applied")
    assert sorted(table.index) == chain.people("holdout")
    for name in chain.people("holdout"):
        values = json.loads((chain.root / "participant" / f"sub-{name}" / f"sub-{name}_desc-brainfm_prediction.json").read_text())
        assert values["probabilities"]["case"] == pytest.approx(table.loc[name, "p1"], abs=2e-6)
        assert values["probabilities"]["control"] == pytest.approx(1 - values["probabilities"]["case"], abs=2e-6)
        assert values["decided"] == ("case" if values["probabilities"]["case"] >= values["threshold"] else "control")
        assert values["seen_in"] == []
        assert values["model"] == chain.model("tune").name


def test_metrics_are_those_of_the_predictions(chain: Chain) -> None:
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    truth = pd.read_csv(chain.root / "series" / "cohort" / "participants.tsv", sep="\t", dtype=str).set_index("participant_id")
    for name, people in (("applied", 19), ("refitted", 19), ("inside", 60)):
        found, table = metrics(chain, name), predictions(chain, name)
        assert found["people"] == len(table) == people
        observed = (truth.loc[table.index, "diagnosis_binary"] == "case").astype(int)
        np.testing.assert_array_equal(table["observed"], observed)
        scores = found["predictors"][0]["scores"]
        assert scores["auroc"]["value"] == pytest.approx(roc_auc_score(observed, table["p1"]))
        assert scores["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(observed, table["decided"]))
        assert [row["role"] for row in found["predictors"]] == ["model"] + ["floor"] * 4
        assert found["transductive_overlap"] == 0


def test_designs_are_as_asked(chain: Chain) -> None:
    assert not metrics(chain, "applied")["cross_validated"]
    split = pd.read_csv(chain.root / "applied" / "split.tsv", sep="\t", dtype=str)
    assert sorted(split.loc[split["role"] == "test", "participant_id"]) == chain.people("holdout")
    assert sorted(split.loc[split["role"] == "train", "participant_id"]) == chain.people("discovery")
    for name in ("refitted", "inside"):
        assert metrics(chain, name)["cross_validated"]
        assert sorted(predictions(chain, name)["fold"].unique()) == [1, 2]


def test_pretraining_inside_a_fold_never_sees_its_test_people(chain: Chain) -> None:
    split = pd.read_csv(chain.root / "inside" / "split.tsv", sep="\t", dtype=str)
    tested = {
        fold: {participant_hash("simulated", name) for name in part.loc[part["role"] == "test", "participant_id"]}
        for fold, part in split.groupby("fold")
    }
    given = read_tensors(chain.model("tune") / "model.safetensors")
    weights = []
    for fold in ("1", "2"):
        folder = chain.root / "inside" / "models" / f"{chain.model('tune').name}-repeat1-fold{fold}"
        provenance = json.loads((folder / "provenance.json").read_text())
        seen = {*provenance["pretrained_on"], *provenance["validated_on"]}
        assert seen
        assert not seen & tested[fold]
        # the statistics of edges are the fold's own, too
        weights.append(read_tensors(folder / "model.safetensors")[f"standardiser.mean_{ATLAS}"])
        assert provenance["steps"] == 2
    assert tested["1"].isdisjoint(tested["2"])
    assert not any(np.array_equal(one, given[f"standardiser.mean_{ATLAS}"]) for one in weights)
    assert not np.array_equal(weights[0], weights[1])


def test_what_is_done_is_not_done_again(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.root.rglob("*") if path.is_file() and "logs" not in path.parts}
    model = ("--model", chain.model("tune"))
    assert chain.run("applied", "predict", "group", *model, "--set", HOLDOUT, *QUICK) == 0
    assert chain.run("tune", "prompt-tune", "group", "--model", chain.model("pretrain"), *TUNE) == 0
    after = {path: path.stat().st_mtime_ns for path in chain.root.rglob("*") if path.is_file() and "logs" not in path.parts}
    assert after == before


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    def words() -> str:
        shown = capfd.readouterr()
        logged = "\n".join(line.getMessage() for line in caplog.records)
        return " ".join((shown.out + shown.err + logged).split())

    return words


def test_people_tuned_on_are_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    model = ("--model", chain.model("tune"))
    some = ("--participant-label", chain.people("discovery")[0], *chain.people("holdout"))
    assert brainfm("predict", chain.root / "series", tmp_path / "out", "group", *model, *some) == 65
    assert "1 of 20 people were among those the model was tuned on" in said()
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert brainfm("predict", chain.root / "series", tmp_path / "out", "group", *model, "--set", "refit=never") == 65
    assert "41 of 60 people were among those" in said()
    # alone, somebody who was tuned on is predicted, and it is said
    one = chain.people("discovery")[0]
    assert brainfm("predict", chain.root / "series", tmp_path / "alone", "participant", *model, "--participant-label", one) == 0
    values = json.loads(next((tmp_path / "alone").glob("sub-*/*_prediction.json")).read_text())
    assert values["seen_in"] == ["pretrained_on", "tuned_on"]
    assert "this is no prediction" in (tmp_path / "alone" / "logs" / "records" / f"sub-{one}.json").read_text()


def test_people_pretrained_on_are_refused_unless_it_is_said(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    refit = ("--model", chain.model("tune"), "--set", "refit=always", "design.folds=2", *QUICK)
    assert brainfm("predict", chain.root / "series", tmp_path / "refused", "group", *refit) == 65
    assert "41 of 60 test people were in the model's pretraining" in said()
    assert not (tmp_path / "refused" / "metrics.json").exists()
    assert brainfm("predict", chain.root / "series", tmp_path / "said", "group", *refit, "design.transductive=true") == 0
    found = json.loads((tmp_path / "said" / "metrics.json").read_text())
    assert found["transductive_overlap"] == 41


def test_models_that_are_none_are_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    series = chain.root / "series"
    for command, level in (("predict", "group"), ("predict", "participant"), ("prompt-tune", "group")):
        options = ("--target", "diagnosis_binary") if command == "prompt-tune" else ()
        assert brainfm(command, series, tmp_path / "out", level, *options) == 2, command
        assert "needs a model" in said()
        assert brainfm(command, series, tmp_path / "out", level, "--model", tmp_path, *options) == 66
        assert "no model here" in said()
    assert brainfm("predict", series, tmp_path / "out", "group", "--model", chain.model("pretrain")) == 66
    assert "pretrained, not tuned for a target" in said()
    broken = shutil.copytree(chain.model("tune"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"half")
    assert brainfm("predict", series, tmp_path / "out", "group", "--model", broken, "--set", HOLDOUT) == 65
    assert "unreadable" in said()
    (broken / "provenance.json").unlink()
    assert brainfm("predict", series, tmp_path / "out2", "group", "--model", broken, "--set", HOLDOUT) == 65
    assert "does not say whom it has seen" in said()


def test_targets_that_are_none_are_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    series, pretrained, tuned = chain.root / "series", ("--model", chain.model("pretrain")), ("--model", chain.model("tune"))
    assert brainfm("prompt-tune", series, tmp_path / "out", "group", *pretrained, "--target", "iq") == 66
    assert "iq" in said()
    assert brainfm("prompt-tune", series, tmp_path / "out", "group", *pretrained) == 78
    assert "target" in said()
    assert brainfm("predict", series, tmp_path / "out", "group", *tuned, "--target", "sex", "--set", HOLDOUT) == 78
    assert "nobody has 'sex' = control, case" in said()
    assert brainfm("pretrain", series, tmp_path / "out", "group", "--system", "brain-unknown") == 78
    assert "'system.kind': Input should be 'brain-graph' or 'drug-response'" in said()
    assert not (tmp_path / "out" / "models").exists()


def test_filters_that_leave_nobody_are_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    common = ("--system", "brain-graph", "--set", "system.preset=tiny")
    assert brainfm("pretrain", chain.root / "series", tmp_path / "out", "group", *common, "where.split=[nobody]") == 66
    assert "no participant with series matches" in said()
    assert brainfm("pretrain", chain.root / "series", tmp_path / "out", "group", *common, "where.spilt=[discovery]") == 78
    assert "'spilt'" in said()
    assert brainfm("pretrain", chain.root / "pretrain", tmp_path / "out", "group", *common) == 66
    assert "no packed cohort here" in said()


def test_plans_are_shown_without_writing(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    series, out = chain.root / "series", tmp_path / "out"
    assert brainfm("pretrain", series, out, "group", "--system", "brain-graph", "--dry-run", "--set", "system.preset=tiny") == 0
    assert "54 train, 6 choose the epoch" in said()
    assert brainfm("prompt-tune", series, out, "group", "--model", chain.model("pretrain"), *TUNE, "--dry-run") == 0
    assert "on 41 people" in said()
    for mode, words in ((HOLDOUT, "applied once"), ("where.split=[discovery]", "tuned again in every fold")):
        assert brainfm("predict", series, out, "group", "--model", chain.model("tune"), "--dry-run", "--set", mode) == 0
        assert words in said()
    assert not out.exists()


def test_reports_are_rebuilt_from_what_is_stored(chain: Chain) -> None:
    report = chain.root / "applied" / "report.html"
    before = report.read_bytes()
    report.write_text("lost")
    model = ("--model", chain.model("tune"))
    assert chain.run("applied", "predict", "group", *model, "--reports-only", "--set", HOLDOUT, *QUICK) == 0
    assert report.read_bytes() == before


def test_fold_models_of_other_people_are_pretrained_anew(chain: Chain, tmp_path: Path) -> None:
    """A cohort that has grown is divided anew: what a fold's model saw before may now be tested."""
    series = shutil.copytree(chain.root / "series", tmp_path / "series")
    cohort, model = Cohort.open(series), chain.model("tune")
    everybody = read_target(cohort, "diagnosis_binary", TargetSettings(classes=("control", "case"), positive="case"))

    def seen_by_fold(people: tuple[str, ...]) -> dict[str, set[str]]:
        request = Request(
            model=model,
            system=load_system(model),
            cohort=cohort,
            record=TargetRecord.from_values(read_model_config(model).tuning, where=model),
            target=everybody.keep(people),
            people=people,
            mode="refit",
            inside=True,
            design=DesignSettings(folds=2),
            floors=FloorSettings(kinds=("majority",)),
            random_encoder=False,
            evaluation=EvaluationSettings(bootstraps=100, permutations=99, inner_folds=2, groups=()),
            seed=0,
            truth=None,
            root=tmp_path / "out",
        )
        evaluate_model(request, Execution(device="cpu"))
        split = pd.read_csv(tmp_path / "out" / "split.tsv", sep="\t", dtype=str)
        tested = split[split["role"] == "test"].groupby("fold")["participant_id"]
        found = {}
        for fold, names in tested:
            provenance = json.loads((tmp_path / "out" / "models" / f"{model.name}-repeat1-fold{fold}" / "provenance.json").read_text())
            found[str(fold)] = {*provenance["pretrained_on"], *provenance["validated_on"]}
            assert not found[str(fold)] & {participant_hash("simulated", name) for name in names}
        return found

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "models").rglob("*")}

    fewer = seen_by_fold(everybody.participants[:50])
    before = stamps()
    assert seen_by_fold(everybody.participants[:50]) == fewer
    assert stamps() == before  # the same people and series: the same models, not trained again
    assert seen_by_fold(everybody.participants) != fewer


def test_learning_curves_stand_beside_the_whole(chain: Chain) -> None:
    curves = ("few_shot.shots=[1, 4]", "few_shot.fractions=[0.5]", "few_shot.draws=3")
    assert chain.run("few", "predict", "group", "--model", chain.model("tune"), "--set", HOLDOUT, *curves, *QUICK) == 0
    assert metrics(chain, "few")["predictors"] == metrics(chain, "applied")["predictors"]
    found = sorted(int(path.name) for path in (chain.root / "few" / "few-shot").iterdir() if path.is_dir())
    truth = pd.read_csv(chain.root / "series" / "cohort" / "participants.tsv", sep="\t", dtype=str).set_index("participant_id")
    smallest = truth.loc[chain.people("discovery"), "diagnosis_binary"].value_counts().min()
    assert found == [1, 4, round(0.5 * smallest)]
    drawn = {}
    for number in found:
        split = pd.read_csv(chain.root / "few" / "few-shot" / str(number) / "split.tsv", sep="\t", dtype=str)
        for draw, part in split.groupby("repeat"):
            drawn[number, draw] = set(part.loc[part["role"] == "train", "participant_id"])
            assert truth.loc[sorted(drawn[number, draw]), "diagnosis_binary"].value_counts().tolist() == [number, number]
            assert sorted(part.loc[part["role"] == "test", "participant_id"]) == chain.people("holdout")
    assert all(drawn[1, draw] < drawn[4, draw] < drawn[found[2], draw] for draw in ("1", "2", "3"))
    one = metrics(chain, "few/few-shot/1")
    assert any("nobody can be held out" in note for note in one["notes"])
    assert all(0 <= row["scores"]["auroc"]["value"] <= 1 for row in one["predictors"])
    few = metrics(chain, "few/few-shot/4")
    assert [row["name"] for row in few["predictors"]] == [row["name"] for row in metrics(chain, "few")["predictors"]]
    assert few["repeats"] == 3
    page = (chain.root / "few" / "few-shot" / "report.html").read_text()
    assert "4 per class" in page
    validate(chain.root / "few")
