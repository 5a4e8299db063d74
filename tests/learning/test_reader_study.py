"""Reader studies from their table: what is refused, what is found, and how often intervals hold."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from brainfm_cli.errors import BrainFMError, InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.reader_study import Endpoint, ReaderStudy, analyse
from brainfm_cli.learning.reading_table import ReaderStudySettings, read_readings
from brainfm_cli.simulation.reading import ALONE, ASSISTED, ReadingDesign, simulate_readings

_spec = importlib.util.spec_from_file_location("reader_study_benchmark", Path(__file__).parents[2] / "benchmarks" / "reader_study.py")
benchmark = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = benchmark
_spec.loader.exec_module(benchmark)

SETTINGS = ReaderStudySettings(bootstraps=50)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return simulate_readings(ReadingDesign(), np.random.default_rng(3))


def study(table: pd.DataFrame, folder: Path, settings: ReaderStudySettings = SETTINGS) -> ReaderStudy:
    path = folder / "readings.tsv"
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return analyse(read_readings(path, settings), settings)


def endpoint(found: ReaderStudy, name: str) -> Endpoint:
    return next(one for one in found.endpoints if one.name == name)


def test_cells_are_scikit_learn_s_areas(table: pd.DataFrame, tmp_path: Path):
    found = endpoint(study(table, tmp_path), "auc")
    assert len(found.cells) == 16
    for cell in found.cells:
        rows = table[(table["reader"] == cell.reader) & (table["arm"] == cell.arm)]
        assert cell.value == pytest.approx(roc_auc_score(rows["truth"], rows["score"]))
        assert cell.strata == {"seniority": cell.reader[:6]}
    assert found.arms[ALONE].value == pytest.approx(np.mean([cell.value for cell in found.cells if cell.arm == ALONE]))
    assert found.changes[0].design == "the same readers in both arms"
    assert found.model.value == pytest.approx(roc_auc_score(rows["truth"], rows["model_score"]))
    assert found.model_less_readers[ALONE].value == pytest.approx(found.model.value - found.arms[ALONE].value)


def test_every_endpoint_is_there(table: pd.DataFrame, tmp_path: Path):
    found = study(table, tmp_path)
    assert [one.name for one in found.endpoints] == ["auc", "sensitivity", "specificity", "time", "over_reliance", "reliance"]
    rows = table[table["arm"] == ALONE]
    ill = rows[rows["truth"] == 1]
    assert endpoint(found, "sensitivity").arms[ALONE].value == pytest.approx(ill["decision"].mean())
    assert endpoint(found, "specificity").model.value == pytest.approx(1 - rows[rows["truth"] == 0]["model_decision"].mean())
    times = endpoint(found, "time")
    assert times.log10
    assert times.changes[0].random.value == pytest.approx(np.log10(0.8), abs=0.02)
    assert times.changes[0].random.high < 0
    assert len(endpoint(found, "auc").gaps) == 3
    assert found.level == 0.95
    assert ReaderStudy.model_validate_json(found.model_dump_json()) == found


def test_agreement_is_the_mean_kappa_of_pairs(tmp_path: Path):
    table = simulate_readings(
        ReadingDesign(readers={"junior": 3}, cases=40, auc={("junior", ALONE): 0.8, ("junior", ASSISTED): 0.8}), np.random.default_rng(0)
    )
    table["score"] = pd.cut(table["score"], [-9, -0.5, 0.5, 1.0, 9], labels=False)
    found = study(table, tmp_path).agreement[0]
    wide = {column: table[table["arm"] == ALONE].pivot_table(index="case", columns="reader", values=column).to_numpy() for column in ("score", "decision")}  # fmt: skip
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert found.pairs == 3
    assert found.kappa.value == pytest.approx(
        np.mean([cohen_kappa_score(wide["decision"][:, a], wide["decision"][:, b]) for a, b in pairs])
    )
    expected = np.mean([cohen_kappa_score(wide["score"][:, a], wide["score"][:, b], weights="quadratic") for a, b in pairs])
    assert found.weighted_kappa.value == pytest.approx(expected)
    assert found.kappa.low < found.kappa.value < found.kappa.high


def test_over_reliance_is_found_where_it_is_planted(table: pd.DataFrame, tmp_path: Path):
    changed = table.copy()
    wrong = changed["model_decision"] != changed["truth"]
    follows = (changed["arm"] == ASSISTED) & wrong & (changed.index % 2 == 0)
    changed.loc[follows, "decision"] = changed.loc[follows, "model_decision"]
    before, after = (endpoint(study(one, tmp_path), "over_reliance").changes[0].random.value for one in (table, changed))
    assert after > before + 0.2
    untouched = [endpoint(study(one, tmp_path), "reliance").changes[0].random.value for one in (table, changed)]
    assert untouched[0] == untouched[1]


def test_a_model_that_is_never_wrong_leaves_over_reliance_open(table: pd.DataFrame, tmp_path: Path):
    found = endpoint(study(table.assign(model_decision=table["truth"]), tmp_path), "over_reliance")
    assert "wrong on 0 cases" in found.reason
    assert not found.arms


def test_the_model_may_come_as_rows_of_its_own(table: pd.DataFrame, tmp_path: Path):
    one = table[(table["arm"] == ALONE) & (table["reader"] == table["reader"].iloc[0])]
    rows = one.assign(reader="model", arm="model", score=one["model_score"], decision=one["model_decision"], seniority="n/a")
    apart = pd.concat([table.drop(columns=["model_score", "model_decision"]), rows])
    first, second = study(table, tmp_path), study(apart, tmp_path)
    assert first.endpoints == second.endpoints
    assert first.arms == second.arms


def test_concordance_with_follow_up(table: pd.DataFrame, tmp_path: Path):
    from brainfm_cli.learning.survival import Outcome, weighted_harrell

    rng = np.random.default_rng(0)
    cases = table["case"].unique()
    hazard = table.groupby("case")["score"].mean()
    times = pd.Series(rng.exponential(np.exp(-hazard[cases].to_numpy())).round(4), index=cases)
    events = pd.Series((rng.random(len(cases)) < 0.7).astype(int), index=cases)
    followed = table.assign(follow_up=table["case"].map(times), event=table["case"].map(events))
    found = endpoint(study(followed, tmp_path), "concordance")
    rows = table[(table["arm"] == ALONE) & (table["reader"] == found.cells[0].reader)]
    outcome = Outcome(time=times[rows["case"]].to_numpy(), event=events[rows["case"]].to_numpy() == 1)
    assert found.cells[0].value == pytest.approx(weighted_harrell(outcome, rows["score"].to_numpy())(np.ones((1, len(rows))))[0])
    assert found.arms[ALONE].low > 0.5
    assert found.model.value is not None


def test_other_readers_in_each_arm(tmp_path: Path):
    table = simulate_readings(ReadingDesign(nested=True, readers={"junior": 4, "senior": 4}), np.random.default_rng(1))
    found = study(table, tmp_path)
    change = endpoint(found, "auc").changes[0]
    assert change.design == "other readers in each arm"
    assert change.readers == 8
    assert not endpoint(found, "auc").omnibus
    assert any("not read" in note for note in found.notes)
    assert change.random.error > 0


def test_the_reference_arm_is_chosen_and_signs_turn(table: pd.DataFrame, tmp_path: Path):
    plain, turned = study(table, tmp_path), study(table, tmp_path, ReaderStudySettings(bootstraps=50, reference=ASSISTED))
    assert turned.arms == (ASSISTED, ALONE)
    assert endpoint(turned, "auc").changes[0].random.value == pytest.approx(-endpoint(plain, "auc").changes[0].random.value)


def test_a_threshold_makes_decisions(table: pd.DataFrame, tmp_path: Path):
    bare = table.drop(columns=["decision", "model_decision"])
    assert "threshold" in endpoint(study(bare, tmp_path), "sensitivity").reason
    found = study(bare, tmp_path, ReaderStudySettings(bootstraps=50, threshold=0.6))
    assert endpoint(found, "sensitivity").arms[ALONE].value == pytest.approx(
        endpoint(study(table, tmp_path), "sensitivity").arms[ALONE].value, abs=0.01
    )


def test_other_names_of_columns_and_codes(table: pd.DataFrame, tmp_path: Path):
    renamed = table.rename(columns={"arm": "condition", "score": "rating", "seniority": "level"})
    renamed["truth"] = renamed["truth"].map({0: "benign", 1: "metastasis"})
    found = study(renamed, tmp_path, ReaderStudySettings(bootstraps=50, positive="metastasis"))
    assert endpoint(found, "auc") == endpoint(study(table, tmp_path), "auc")


BAD = {
    "no column": (lambda t: t.drop(columns="truth"), "lacks the column 'truth'"),
    "twice": (lambda t: pd.concat([t, t.iloc[:1]]), "twice"),
    "no number": (lambda t: t.assign(score=t["score"].astype(str).where(t.index != 4, "high")), "row 6: 'high'"),
    "infinite": (lambda t: t.assign(score=t["score"].where(t.index != 4, np.inf)), "no number"),
    "truth changes": (lambda t: t.assign(truth=t["truth"].where(t.index != 3, 1 - t["truth"])), "several values of 'truth'"),
    "one class": (lambda t: t.assign(truth=1), "one class"),
    "other codes": (lambda t: t.assign(truth=t["truth"].map({0: "no", 1: "yes"})), "reader_study.positive"),
    "three codes": (lambda t: t.assign(truth=t["truth"].where(t["case"] != "case001", 2)), "more than two"),
    "no truth": (lambda t: t.assign(truth=t["truth"].astype(object).where(t["case"] != "case001", "n/a")), "has no truth"),
    "decision": (lambda t: t.assign(decision=t["decision"] + 1), "neither 0 nor 1"),
    "model decision": (lambda t: t.assign(model_decision=2), "decision of the model"),
    "model score": (lambda t: t.assign(model_score=t["model_score"].where(t.index != 3, 9.0)), "several values of 'model_score'"),
    "time": (lambda t: t.assign(time_s=t["time_s"].where(t.index != 3, -1.0)), "zero or negative"),
    "stratum": (lambda t: t.assign(seniority=t["seniority"].where(t.index != 3, "other")), "several values of 'seniority'"),
    "no stratum": (lambda t: t.assign(seniority=t["seniority"].where(t["reader"] != t["reader"].iloc[0], "n/a")), "has no 'seniority'"),
    "no reader": (lambda t: t.assign(reader=t["reader"].where(t.index != 3, "n/a")), "row 5 has no reader"),
    "empty": (lambda t: t.iloc[:0], "no rows"),
    "only the model": (lambda t: t.assign(reader="model").drop_duplicates(["case", "arm"]), "every row is of the model"),
    "few cases": (lambda t: t[~((t["reader"] == t["reader"].iloc[0]) & (t["truth"] == 1))], "needs two of each"),
    "half a follow-up": (lambda t: t.assign(follow_up=3), "both"),
    "negative follow-up": (lambda t: t.assign(follow_up=-3, event=1), "negative"),
    "event codes": (lambda t: t.assign(follow_up=3, event=np.where(t["truth"] == 1, "dead", "alive")), "never guessed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused(table: pd.DataFrame, tmp_path: Path, name: str):
    spoil, message = BAD[name]
    with pytest.raises(InputDatasetError, match=message) as caught:
        study(spoil(table), tmp_path)
    assert caught.value.exit_code == 65


def test_paths_bytes_and_arms_that_are_wrong(table: pd.DataFrame, tmp_path: Path):
    with pytest.raises(InputNotFoundError, match="no table"):
        read_readings(tmp_path / "absent.tsv", SETTINGS)
    (tmp_path / "bytes.tsv").write_bytes(b"\xff\xfe\x00reader")
    with pytest.raises(InputDatasetError, match="unreadable"):
        read_readings(tmp_path / "bytes.tsv", SETTINGS)
    with pytest.raises(SettingsError, match="reference arm 'doctor'"):
        study(table, tmp_path, ReaderStudySettings(reference="doctor"))
    with pytest.raises(BrainFMError):
        ReaderStudySettings.from_values({"level": 2})


def test_one_reader_alone_is_analysed_as_fixed(table: pd.DataFrame, tmp_path: Path):
    found = study(table[table["reader"] == table["reader"].iloc[0]], tmp_path)
    change = endpoint(found, "auc").changes[0]
    assert "one reader" in change.random.reason
    assert change.fixed_readers.low is not None
    assert not found.agreement
    assert any("1 readers" in note for note in found.notes)


@pytest.mark.parametrize("name", ["seniority, planted", "specialty, null", "trial, other doctors per arm, null"])
def test_planted_and_null_contrasts_are_recovered(name: str):
    """Short form of benchmarks/reader_study.py: 150 studies, 95 % intervals; a nominal one holds in 137 to 148 of them 98 % of the time."""
    design = replace(benchmark.DESIGNS[name], cases=60)
    rows = benchmark.coverage(design, 150)
    shares = [row["coverage"] for row in rows]
    assert min(shares) > 0.89
    assert np.mean(shares) == pytest.approx(0.955, abs=0.025)
    for row in rows:
        assert row["mean"] == pytest.approx(row["planted"], abs=4 * row["spread"] / np.sqrt(150))
    planted = [row["called"] for row in rows if abs(row["planted"]) >= 0.05]
    null = [row["called"] for row in rows if row["planted"] == 0]
    assert not null or np.mean(null) < 0.09
    assert not planted or np.mean(planted) > 0.15
