"""The participant's report: what is drawn, in which order, and that dataset text stays text."""

from __future__ import annotations

import re

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.records import RegionTable, RunKey
from brainfm_cli.reports.drawing import draw_connectome, network_order, scale_limit, strongest_edges
from brainfm_cli.reports.parcellation import AtlasSummary, RunSummary, carpet_values, participant_page
from brainfm_cli.signals.connectivity import pearson
from tests.reports.pages import parse

HOSTILE = "<script>alert(1)</script> $\\frac{"


def summary(generator, *, regions=20, frames=60, kept=None, networks=True, centres=True, lost=(), label="Atlas", notes=()):
    kept = np.ones(frames, bool) if kept is None else kept
    series = generator.normal(size=(int(kept.sum()), regions))
    series[:, list(lost)] = np.nan
    table = RegionTable(
        names=tuple(f"region {HOSTILE} {i}" for i in range(regions)),
        networks=tuple((HOSTILE, "Visual", None)[i % 3] for i in range(regions)) if networks else (),
        centroids_mm=generator.uniform(-50, 50, (regions, 3)).astype(np.float32) if centres else None,
    )
    coverage = np.ones(regions)
    coverage[list(lost)] = 0.1
    return AtlasSummary(atlas=label, series=series, coverage=coverage, regions=table, correlation=pearson(series), notes=notes)


def run_of(*atlases, kept, fd=None, run="1"):
    key = RunKey(participant="01", task="rest", run=run)
    return RunSummary(key=key, space="MNI152NLin2009cAsym", repetition_time_s=2.0, fd=fd, kept=kept, atlases=atlases)


@pytest.fixture
def runs(generator):
    kept = np.ones(60, bool)
    kept[20:25] = False
    fd = np.abs(generator.normal(0.2, 0.05, 60))
    fd[0] = np.nan
    full = summary(generator, kept=kept, lost=(3, 7), notes=(HOSTILE,), label=HOSTILE)
    plain = summary(generator, kept=kept, networks=False, centres=False, label="Plain")
    return [run_of(full, plain, kept=kept, fd=fd), run_of(plain, kept=kept, fd=None, run="2")]


def page_of(runs, **settings):
    return participant_page("01", runs, **{"methods": "How.", "citations": ["Who"], "notes": [], **settings}).render()


def test_page_parses_and_shows_each_picture_once(runs):
    page = parse(page_of(runs))
    assert page.external == []
    # carpet, matrix, connectome, coverage of the first atlas; matrix and coverage of the one without centres; the second run
    assert page.pictures == 1 + 3 + 2 + 1 + 2
    assert [heading for heading in page.headings if "rest" in heading] == ["task-rest run-1", "task-rest run-2"]
    assert "110 of 120 (92 %)" in page.text
    assert "unknown" not in page.text


def test_text_of_the_dataset_stays_text(runs):
    html = page_of(runs, notes=[HOSTILE], citations=[HOSTILE], methods=HOSTILE)
    page = parse(html)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 5
    assert f"Lost (2): region {HOSTILE} 3, region {HOSTILE} 7." in page.text
    assert all("<" not in alt or HOSTILE in alt for alt in page.alts)


def test_page_is_the_same_when_drawn_again_and_another_when_the_series_change(runs, generator):
    first = page_of(runs)
    assert first == page_of(runs)
    other = summary(generator, kept=runs[1].kept, networks=False, centres=False, label="Plain")
    assert first != page_of([runs[0], run_of(other, kept=runs[1].kept, run="2")])


def test_unknown_motion_is_said(runs):
    assert "unknown" in parse(page_of(runs[1:])).text


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, of a layout that does not fit
def test_eight_large_atlases_stay_below_three_megabytes(generator):
    kept = np.ones(400, bool)
    atlases = [summary(generator, regions=400, frames=400, label=f"Atlas{i}") for i in range(8)]
    assert len(page_of([run_of(*atlases, kept=kept, fd=np.full(400, 0.1))])) < 3_000_000


def test_carpet_has_gaps_where_frames_were_left_out(generator):
    kept = np.array([True, True, False, True, True, False, True, True])
    series = generator.normal(size=(6, 3))
    series[:, 1] = np.nan
    values = carpet_values(series, kept)
    assert np.isnan(values[~kept]).all()
    assert np.isnan(values[:, 1]).all()
    expected = (series[:, 0] - series[:, 0].mean()) / series[:, 0].std()
    np.testing.assert_allclose(values[kept, 0], expected)
    whole = generator.normal(size=(8, 3))  # a series with all frames gives the same gaps
    assert (np.isnan(carpet_values(whole, kept)).all(axis=1) == ~kept).all()


def test_series_that_fit_neither_all_nor_kept_frames_are_refused(generator):
    with pytest.raises(InputDatasetError, match="60 frames of series, 50 of 55 kept"):
        run_of(summary(generator), kept=np.arange(55) < 50)


def test_regions_stand_together_by_network_and_unassigned_ones_last():
    table = RegionTable(names=tuple("abcdef"), networks=("Vis", None, "Default", "Vis", "Default", None))
    order = network_order(table)
    assert order.names == ("Vis", "Default", "no network")
    assert order.starts == (0, 2, 4, 6)
    assert list(order.order) == [0, 3, 2, 4, 1, 5]
    plain = network_order(RegionTable(names=tuple("abc")))
    assert plain.names == ()
    assert list(plain.order) == [0, 1, 2]


def test_strongest_edges_leave_out_what_has_no_value_or_no_centre(generator):
    matrix = np.array([[1, 0.9, -0.95, 0.2], [0.9, 1, np.nan, 0.5], [-0.95, np.nan, 1, 0.99], [0.2, 0.5, 0.99, 1]])
    centres = generator.uniform(-50, 50, (4, 3))
    rows, columns, values = strongest_edges(matrix, centres, 2)
    assert list(zip(rows, columns, values, strict=True)) == [(0, 2, -0.95), (2, 3, 0.99)]
    centres[3] = np.nan
    rows, columns, values = strongest_edges(matrix, centres, 5)
    assert list(zip(rows, columns, strict=True)) == [(0, 1), (0, 2)]


def test_connectome_lies_where_nilearn_draws_it():
    """The same two regions, drawn by nilearn and by us, darken the same places of the picture."""
    from matplotlib.figure import Figure
    from nilearn.plotting import plot_connectome

    centres = np.array([[-42.0, -60.0, 30.0], [38.0, 45.0, -10.0], [0.0, 0.0, 0.0]])
    matrix = np.eye(3)
    matrix[0, 1] = matrix[1, 0] = 1.0
    ours = _red(draw_connectome(np.where(matrix == 0, np.nan, matrix), centres, strongest=5, limit=1.0))
    theirs = Figure(figsize=(7.2, 2.7))
    plot_connectome(matrix, centres, figure=theirs, node_size=7, annotate=False, colorbar=False, edge_vmin=-1, edge_vmax=1)
    theirs = _red(theirs)
    for part in np.array_split(np.arange(theirs.shape[1]), 3):  # one view each
        middle = [np.argwhere(image[:, part]).mean(axis=0) for image in (ours, theirs)]
        np.testing.assert_allclose(*middle, atol=3.0)


def test_scale_leaves_out_the_extreme_percent():
    values = np.r_[np.full(990, 0.42), np.full(5, 0.99), np.nan]
    assert scale_limit(values) == pytest.approx(0.5)
    assert scale_limit(np.array([np.nan])) == 1.0


def test_no_picture_names_a_program_or_a_date(runs):
    import base64

    for data in re.findall(r"base64,([^\"]+)", page_of(runs)):
        png = base64.b64decode(data)
        assert png.startswith(b"\x89PNG")
        assert not re.search(rb"tEXt|iTXt|tIME", png)


def _red(drawing):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(int)
    return (pixels[..., 0] - pixels[..., 1]) > 50
