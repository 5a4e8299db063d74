"""predict group --reader-study and --lock, through the command line: from a table of readings to the page, and what is refused."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.learning.reader_study import ReaderStudy
from brainfm_cli.programs.validator import validate
from brainfm_cli.simulation.reading import ALONE, ReadingDesign, simulate_readings
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ("--set", "reader_study.bootstraps=50")
PEOPLE = 60


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated people with a tuned model and its predictions of those who were held back."""
    root = tmp_path_factory.mktemp("readers")
    series = ("--participants", PEOPLE, "--seed", 3, "--atlases", "Schaefer100", "--set", "frames=80", "population.disorders=[Arvel]")
    training = ("system.preset=tiny", "epochs=1", "steps=1", "batch_size=16", "where.split=[discovery]")
    tuning = ("where.split=[discovery]", "tuning.epochs=0", "tuning.inner_folds=2", "tuning.blocks=[groups_log]")
    codes = [
        brainfm("simulate", root / "series", "--kind", "rest", "--level", "series", *series),
        brainfm("pretrain", root / "series", root / "pre", "group", "--system", "brain-graph", "--device", "cpu", "--set", *training),
        brainfm("prompt-tune", root / "series", root / "tuned", "group", "--model", only(root / "pre"), "--target", "diagnosis_binary", "--device", "cpu", "--set", *tuning),
        brainfm("predict", root / "series", root / "predicted", "participant", "--model", only(root / "tuned"), "--device", "cpu", "--set", "where.split=[holdout]"),
    ]  # fmt: skip
    assert codes == [0] * 4
    return root


def only(folder: Path) -> Path:
    (found,) = (folder / "models").iterdir()
    return found


def predictions(root: Path) -> dict[str, dict[str, object]]:
    found = [json.loads(path.read_text()) for path in sorted((root / "predicted").glob("sub-*/*_prediction.json"))]
    return {str(one["participant"]): one for one in found}


def lock(root: Path, out: Path, *options: object) -> int:
    return brainfm("predict", root / "series", out, "group", "--model", only(root / "tuned"), "--lock", *options)


@pytest.fixture
def locked(cohort: Path, tmp_path: Path) -> Path:
    """A copy of the predictions, locked."""
    out = tmp_path / "locked"
    for path in (cohort / "predicted").glob("sub-*/*_prediction.json"):
        (out / path.parent.name).mkdir(parents=True)
        (out / path.parent.name / path.name).write_bytes(path.read_bytes())
    assert lock(cohort, out) == 0
    return out


def readings_of(cases: list[str], *, with_model: bool) -> pd.DataFrame:
    table = simulate_readings(ReadingDesign(cases=len(cases)), np.random.default_rng(3))
    table["case"] = table["case"].map(dict(zip(sorted(set(table["case"])), cases, strict=True)))
    return table if with_model else table.drop(columns=["model_score", "model_decision"])


def write(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path, sep="\t", index=False)
    return path


def test_a_table_becomes_a_study(cohort: Path, tmp_path: Path) -> None:
    table = write(readings_of([f"case{number}" for number in range(40)], with_model=True), tmp_path / "readings.tsv")
    out = tmp_path / "out"
    assert brainfm("predict", cohort / "series", out, "group", "--reader-study", table, *QUICK) == 0
    study = ReaderStudy.model_validate_json((out / "reader_study.json").read_text())
    assert (study.readers, study.cases, study.arms[0]) == (8, 40, ALONE)
    assert study.endpoints[0].model is not None
    assert any("not in participants.tsv" in note for note in study.notes)
    page = (out / "reader_study.html").read_text()
    assert all(text in page for text in ("With and without", "Kinds of readers", "Model alone", "Agreement", "Obuchowski"))
    schema = json.loads((out / "logs" / "reader_study.schema.json").read_text())
    assert schema["title"] == "ReaderStudy"
    validate(out)
    (out / "reader_study.html").unlink()
    assert brainfm("predict", cohort / "series", out, "group", "--reader-study", table, "--reports-only") == 0
    assert (out / "reader_study.html").read_text() == page


def test_a_plan_writes_nothing(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(readings_of([f"case{number}" for number in range(40)], with_model=False), tmp_path / "readings.tsv")
    assert brainfm("predict", cohort / "series", tmp_path / "out", "group", "--reader-study", table, "--dry-run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 readers, 40 cases (20 with the condition)" in said
    assert "seniority (2)" in said
    assert "model absent" in said
    assert not (tmp_path / "out").exists()


def test_a_changed_table_makes_the_study_stale(cohort: Path, tmp_path: Path) -> None:
    rows, out = readings_of([f"case{number}" for number in range(40)], with_model=True), tmp_path / "out"
    table = write(rows, tmp_path / "readings.tsv")
    call = ("predict", cohort / "series", out, "group", "--reader-study", table, *QUICK)
    assert brainfm(*call) == 0
    before = (out / "reader_study.json").read_bytes()
    write(rows[rows["reader"] != rows["reader"].iloc[0]], table)
    assert brainfm(*call) == 0
    assert (out / "reader_study.json").read_bytes() != before
    assert ReaderStudy.model_validate_json((out / "reader_study.json").read_text()).readers == 7


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (lambda table: table.drop(columns="truth"), 65, "lacks the column 'truth'"),
        (lambda table: table.assign(truth=1), 65, "one class"),
        (lambda table: pd.concat([table, table.iloc[:1]]), 65, "twice"),
        (lambda table: table.assign(score="high"), 65, "is no number"),
        (lambda table: table.assign(time_s=-3), 65, "reading time"),
        (lambda table: table.assign(decision=2), 65, "neither 0 nor 1"),
        (lambda table: table[table["reader"] == "junior01"].assign(reader="model"), 65, "every row is of the model"),
        (lambda table: table.iloc[:0], 65, "no rows"),
        (lambda table: table.assign(follow_up=3), 65, "follow_up"),
        (lambda table: table.assign(seniority=[str(place) for place in range(len(table))]), 65, "several values of 'seniority'"),
    ],
)
def test_bad_tables_are_said(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, code: int, told: str
) -> None:
    table = write(change(readings_of([f"case{number}" for number in range(40)], with_model=True)), tmp_path / "readings.tsv")  # type: ignore[operator]
    assert brainfm("predict", cohort / "series", tmp_path / "out", "group", "--reader-study", table, *QUICK) == code
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "reader_study.json").exists()


def test_wrong_calls_are_said(cohort: Path, locked: Path, tmp_path: Path) -> None:
    table = write(readings_of([f"case{number}" for number in range(40)], with_model=True), tmp_path / "readings.tsv")
    series = cohort / "series"
    assert brainfm("predict", series, tmp_path / "a", "participant", "--reader-study", table) == 2
    assert brainfm("predict", series, tmp_path / "a", "group", "--reader-study", tmp_path / "absent.tsv") == 66
    assert brainfm("predict", series, tmp_path / "a", "group", "--reader-study", table, "--reports-only") == 66
    assert brainfm("predict", series, tmp_path / "a", "group", "--reader-study", table, "--set", "reader_study.reference=nobody") == 78
    assert brainfm("predict", series, tmp_path / "a", "group", "--reader-study", table, "-d", f"locked={tmp_path}") == 66
    # the model's scores are in the table and locked as well
    assert brainfm("predict", series, tmp_path / "a", "group", "--reader-study", table, "-d", f"locked={locked}", *QUICK) == 65
    assert lock(cohort, tmp_path / "nothing") == 66
    assert brainfm("predict", series, locked, "participant", "--model", only(cohort / "tuned"), "--lock") == 2
    assert brainfm("predict", series, locked, "group", "--lock") == 2


def test_a_lock_holds_everybodys_prediction(cohort: Path, locked: Path) -> None:
    seal = json.loads((locked / "locked_predictions.json").read_text())
    content = (locked / "locked_predictions.tsv").read_bytes()
    assert seal["sha256"] == hashlib.sha256(content).hexdigest()
    made = predictions(cohort)
    table = pd.read_csv(locked / "locked_predictions.tsv", sep="\t", dtype={"participant_id": str})
    assert list(table["participant_id"]) == [f"sub-{name}" for name in sorted(made)]
    np.testing.assert_allclose(table["value"], [made[name]["value"] for name in sorted(made)], rtol=1e-5)
    assert seal["outcomes_known"] == len(made)  # simulated people are all diagnosed
    validate(locked)


@pytest.mark.parametrize("changed", [{"date": "2020-01-01T00:00:00+00:00"}, {"model": "another"}, {"outcomes_known": 0}])
def test_a_lock_holds_what_it_says_of_itself(
    cohort: Path, locked: Path, changed: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = locked / "locked_predictions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert lock(cohort, locked) == 65
    assert "the lock was changed after it was made" in " ".join(capsys.readouterr().err.split())


def test_a_lock_is_never_rewritten(cohort: Path, locked: Path) -> None:
    before = {name: (locked / name).read_bytes() for name in ("locked_predictions.json", "locked_predictions.tsv")}
    assert lock(cohort, locked) == 0  # the same predictions: nothing to do
    path = next(locked.glob("sub-*/*_prediction.json"))
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "value": 0.123}))
    assert lock(cohort, locked) == 73
    path.write_text(json.dumps({**values, "model": "another"}))
    assert lock(cohort, locked) == 65
    assert {name: (locked / name).read_bytes() for name in before} == before


def test_locked_predictions_enter_as_the_models_reading(cohort: Path, locked: Path, tmp_path: Path) -> None:
    cases = sorted(predictions(cohort))[: 2 * (len(predictions(cohort)) // 2)]
    table = write(readings_of(cases, with_model=False), tmp_path / "readings.tsv")
    call = ("predict", cohort / "series", tmp_path / "out", "group", "--reader-study", table, "-d", f"locked={locked}", *QUICK)
    assert brainfm(*call) == 0
    study = ReaderStudy.model_validate_json((tmp_path / "out" / "reader_study.json").read_text())
    assert study.endpoints[0].model is not None
    assert study.predictions_sha256 == json.loads((locked / "locked_predictions.json").read_text())["lock_sha256"]
    assert any("for those it is no prospective prediction" in note for note in study.notes)
    changed = (locked / "locked_predictions.tsv").read_text().replace("\t0.", "\t0.9", 1)
    (locked / "locked_predictions.tsv").write_text(changed)
    assert brainfm(*call[:2], tmp_path / "again", *call[3:]) == 65
