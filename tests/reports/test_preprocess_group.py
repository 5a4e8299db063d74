"""The quality table of preprocessed runs against planted motion, and its page."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.reports.preprocess_group import QC_COLUMNS, assess_confounds, build_table, quality_page

FRAMES = 200


def run(generator: np.random.Generator, *, participant: str = "sub-01", fd: float = 0.1, tsnr: float = 50.0) -> dict[str, object]:
    table = pd.DataFrame({"framewise_displacement": fd * generator.uniform(0.9, 1.1, FRAMES), "std_dvars": np.ones(FRAMES)})
    table.loc[0, "framewise_displacement"] = np.nan
    row = assess_confounds(table, 2.0)
    return {"participant_id": participant, "session": None, "run": "task-rest", **row, "tsnr": tsnr}


def test_planted_outliers_and_nothing_else_are_flagged(generator: np.random.Generator) -> None:
    rows = [run(generator, participant=f"sub-{index:02d}", tsnr=50 + index % 5) for index in range(20)]
    rows[3] = run(generator, participant="sub-03", fd=0.4, tsnr=52)  # moves, yet no frame crosses the threshold
    rows[7] = run(generator, participant="sub-07", tsnr=10)
    rows[9] = run(generator, participant="sub-09", tsnr=95)  # a good run is no outlier
    table = build_table(rows)
    assert list(table.columns) == list(QC_COLUMNS)
    flagged = table[table["flagged_for"].notna()].set_index("participant_id")["flagged_for"]
    assert flagged.to_dict() == {"sub-03": "mean_fd", "sub-07": "tsnr"}


def test_little_time_at_rest_is_flagged_whatever_the_others_do(generator: np.random.Generator) -> None:
    table = build_table([run(generator, fd=0.8)])
    assert table.loc[0, "moving_fraction"] == pytest.approx((FRAMES - 1) / FRAMES)
    assert table.loc[0, "still_minutes"] == pytest.approx(2 / 60)
    assert table.loc[0, "flagged_for"] == "still_minutes"


def test_a_table_without_motion_says_so(generator: np.random.Generator) -> None:
    row = assess_confounds(pd.DataFrame({"csf": np.ones(30)}), None)
    assert row["frames"] == 30
    assert all(np.isnan(row[name]) for name in ("mean_fd", "max_fd", "moving_fraction", "still_minutes", "mean_std_dvars"))
    table = build_table([{"participant_id": "sub-01", "session": None, "run": "task-rest", **row}])
    assert table["flagged_for"].isna().all()
    page = quality_page(table, title="T", notes=(), methods="").render()
    assert "unknown" in page


def test_the_page_shows_flagged_runs_first_and_escapes_names(generator: np.random.Generator) -> None:
    rows = [run(generator, participant=f"sub-{index:02d}", fd=0.1 + index / 1000) for index in range(8)]
    rows.append(run(generator, participant="<b>sub-99", fd=0.9))
    page = quality_page(build_table(rows), title="<Q>", notes=("a note",), methods="m").render()
    assert "<b>sub-99" not in page
    assert page.index("&lt;b&gt;sub-99") < page.index("sub-07")
    assert page.count('class="marked"') == 1
    assert "data:image/png" in page
    assert page == quality_page(build_table(rows), title="<Q>", notes=("a note",), methods="m").render()
