"""The quality table against numbers worked out by hand, with numpy and scipy; the page parsed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter
from brainfm_cli.records import RegionTable
from brainfm_cli.reports.quality import OUTLIER_SIDES, QC_COLUMNS, assess, chance_motion, quality_page
from tests.reports.pages import parse

REGIONS = 12
BAD_RUN = 5
HOSTILE = "<script>alert(1)</script> $\\frac{"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Sixteen people, two atlases (one without centres); one moves much, lacks a region and looks like noise."""
    generator = np.random.default_rng(5)
    centres = np.round(generator.uniform(-60, 60, (REGIONS, 3)).astype(np.float32), 2)  # as a cohort stores them
    names = tuple(f"region{i}" for i in range(REGIONS))
    placed = RegionTable(names=names, networks=(HOSTILE, "Visual") * (REGIONS // 2), centroids_mm=centres)
    root = tmp_path_factory.mktemp("packed") / "cohort"
    mixing = generator.normal(size=(3, REGIONS)) * 1.5
    series, fds = {}, generator.uniform(0.1, 0.2, 16)
    fds[BAD_RUN] = 1.5
    with CohortWriter(root=root) as writer:
        writer.add_atlas(CohortAtlas(label="A", regions=placed, template="MNI152NLin2009cAsym"))
        writer.add_atlas(CohortAtlas(label="B", regions=RegionTable(names=names[:6]), template="MNI152NLin2009cAsym"))
        for person in range(16):
            values = generator.normal(size=(80, REGIONS)) + fds[person] * generator.normal(size=(80, 1))
            if person != BAD_RUN:
                values += generator.normal(size=(80, 3)) @ mixing
            else:
                values[:, 3] = np.nan
            row = {
                "dataset": HOSTILE, "participant": f"p{person:02}", "session": "", "run": "task-rest", "site": HOSTILE,
                "repetition_time": 2.0, "mean_fd": fds[person], "kept_fraction": 0.5 if person == BAD_RUN else 0.9 + person / 1000,
            }  # fmt: skip
            series[person] = values.astype(np.float32)
            writer.add_run("A", series[person], row)
            writer.add_run("B", series[person][:, 6:], row)
        writer.finish(pd.DataFrame({"participant_id": [f"p{person:02}" for person in range(16)]}).set_index("participant_id"))
    coverage = {(f"p{person:02}", "", "task-rest", "A"): (0.98, 0) for person in range(16)}
    coverage["p05", "", "task-rest", "A"] = (0.6, 1)
    return Cohort.open(root), coverage, series, fds, centres


def by_hand(series):
    """(runs, edges) Fisher z from numpy's own correlation."""
    upper = np.triu_indices(REGIONS, 1)
    return np.stack([np.arctanh(np.corrcoef(series[person].astype(float), rowvar=False)[upper]) for person in sorted(series)])


def test_table_has_one_row_per_run_and_atlas_and_every_described_column(packed):
    cohort, coverage, *_ = packed
    table = assess(cohort, coverage).table
    assert list(table.columns) == list(QC_COLUMNS)
    assert len(table) == 32
    assert not table.duplicated(["participant_id", "session", "run", "atlas"]).any()


def test_values_equal_those_worked_out_by_hand(packed):
    cohort, coverage, series, fds, centres = packed
    assessment = assess(cohort, coverage)
    z, upper = by_hand(series), np.triu_indices(REGIONS, 1)
    distances = np.array([np.linalg.norm(centres[i].astype(float) - centres[j].astype(float)) for i, j in zip(*upper, strict=True)])
    rows = assessment.table[assessment.table["atlas"] == "A"].reset_index(drop=True)
    for person in range(16):
        ok = np.isfinite(z[person])
        others = np.nanmean(np.delete(z, person, axis=0), axis=0)
        assert rows["mean_fisherz"][person] == pytest.approx(z[person][ok].mean(), abs=1e-9)
        assert rows["distance_dependence"][person] == pytest.approx(stats.pearsonr(z[person][ok], distances[ok]).statistic, abs=1e-9)
        assert rows["typicality"][person] == pytest.approx(stats.pearsonr(z[person][ok], others[ok]).statistic, abs=1e-9)
    np.testing.assert_allclose(rows["mean_fd"], fds)
    quality = assessment.atlases[0]
    np.testing.assert_allclose(quality.mean_fisherz, np.nanmean(z, axis=0), atol=1e-9)
    expected = [stats.pearsonr(z[ok, edge], fds[ok]).statistic for edge in range(z.shape[1]) if (ok := np.isfinite(z[:, edge])).any()]
    np.testing.assert_allclose(quality.motion, expected, atol=1e-9)
    assert quality.median_motion == pytest.approx(np.median(np.abs(expected)))
    assert quality.motion_by_distance == pytest.approx(stats.pearsonr(expected, distances).statistic, abs=1e-9)


def test_coverage_is_taken_over_and_lost_regions_are_counted_where_it_is_unknown(packed):
    cohort, coverage, *_ = packed
    table = assess(cohort, coverage).table.set_index(["participant_id", "atlas"])
    assert table.loc[("p05", "A"), "mean_coverage"] == 0.6
    assert table.loc[("p05", "A"), "missing_regions"] == 1
    assert np.isnan(table.loc[("p05", "B"), "mean_coverage"])
    emptied = assess(cohort, {}).table.set_index(["participant_id", "atlas"])
    assert emptied.loc[("p05", "A"), "missing_regions"] == 1
    assert emptied.loc[("p04", "A"), "missing_regions"] == 0


def test_the_planted_bad_run_is_flagged_for_its_reasons_and_by_the_robust_z_score(packed):
    cohort, coverage, *_ = packed
    table = assess(cohort, coverage).table
    rows = table[table["atlas"] == "A"].set_index("participant_id")
    assert {"mean_fd", "kept_fraction", "typicality", "mean_coverage", "missing_regions"} <= set(rows.loc["p05", "outlier_in"].split(", "))
    for name, side in OUTLIER_SIDES.items():
        values = rows[name].to_numpy(float)
        deviation = values - np.median(values)
        spread = stats.median_abs_deviation(values) / 0.6745
        z = deviation / (spread if spread > 1e-9 else 1.2533141 * np.abs(deviation).mean())  # coverage: fifteen of sixteen alike
        expected = (np.abs(z) if side == 0 else side * z) > 3.5
        found = rows["outlier_in"].fillna("").str.split(", ").map(lambda names, name=name: name in names)
        assert list(found) == list(expected), name


def test_page_shows_the_figures_flags_the_run_and_escapes_what_the_dataset_says(packed):
    cohort, coverage, *_ = packed
    assessment = assess(cohort, coverage)
    html = quality_page(assessment, title=HOSTILE, notes=[HOSTILE], methods="How.").render()
    page = parse(html)
    assert "<script" not in html
    assert page.external == []
    assert page.pictures == 2 + 2 * 2  # motion and coverage; mean matrix and QC-FC of each atlas
    assert "p05" in page.text
    assert HOSTILE in page.text
    assert html == quality_page(assessment, title=HOSTILE, notes=[HOSTILE], methods="How.").render()


def test_unknown_motion_is_said_and_not_drawn(packed, tmp_path):
    cohort, coverage, *_ = packed
    blind = Cohort(root=cohort.root, index=cohort.index.assign(mean_fd=np.nan), participants=cohort.participants, atlases=cohort.atlases)
    assessment = assess(blind, coverage)
    assert np.isnan(assessment.atlases[0].motion).all()
    text = parse(quality_page(assessment, title="QC", notes=[], methods="").render()).text
    assert "No run has a motion table" in text
    assert "at least 10 runs" in text


def test_the_table_of_flagged_runs_is_cut_where_a_thousand_are_flagged(packed):
    cohort, coverage, *_ = packed
    assessment = assess(cohort, coverage)
    many = pd.concat(
        [assessment.table.assign(participant_id=lambda t, n=n: t["participant_id"] + f"x{n}", outlier_in="mean_fd") for n in range(63)]
    )
    page = parse(quality_page(type(assessment)(table=many, atlases=assessment.atlases), title="QC", notes=[], methods="").render())
    assert page.rows < 220
    assert "808 more are in group_qc.tsv" in page.text


def test_chance_is_what_unrelated_numbers_give(generator):
    for runs in (10, 40):
        left, right = generator.normal(size=(2, 20_000, runs))
        sizes = np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(left[:4000], right[:4000], strict=True)])
        assert chance_motion(runs) == pytest.approx(np.median(sizes), rel=0.05)
    assert np.isnan(chance_motion(9))


def test_few_people_are_drawn_without_boxes(packed):
    cohort, coverage, *_ = packed
    few = {key: value for key, value in coverage.items() if key[0] in {"p00", "p01"}}
    assessment = assess(cohort, few)
    assert assessment.table["mean_coverage"].notna().sum() == 2
    assert parse(quality_page(assessment, title="t", notes=(), methods="").render())
