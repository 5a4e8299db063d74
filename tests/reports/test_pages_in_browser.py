"""Every report opened in headless Chromium, on a wide and on a narrow screen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.learning.log import TrainingLog
from brainfm_cli.records import RegionTable, RunKey
from brainfm_cli.reports.page import Page, Section, paragraph, table
from brainfm_cli.reports.parcellation import AtlasSummary, RunSummary, participant_page
from brainfm_cli.reports.preprocess_group import build_table
from brainfm_cli.reports.preprocess_group import quality_page as preprocess_page
from brainfm_cli.reports.quality import OUTLIER_SIDES, QC_COLUMNS, Assessment, AtlasQuality, quality_page
from brainfm_cli.reports.training import training_page
from brainfm_cli.reports.tuning import AtlasTuning, tuning_page
from brainfm_cli.signals.connectivity import pearson
from brainfm_cli.signals.quality import edge_distances
from tests.reports.browser import browser, find_chromium

pytestmark = pytest.mark.browser
LONG = "a_name_of_a_dataset_that_somebody_made_without_any_space_" * 4


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium), or name one in CHROMIUM")
    with browser(program, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def regions(generator, count):
    return RegionTable(
        names=tuple(f"{LONG}{i}" if i < 3 else f"region{i}" for i in range(count)),
        networks=tuple(("Visual", "Default", LONG)[i * 3 // count] for i in range(count)),
        centroids_mm=generator.uniform(-50, 50, (count, 3)).astype(np.float32),
    )


def parcellation(generator):
    kept = generator.uniform(size=150) > 0.1
    atlases = []
    for count in (60, 120):
        series = generator.normal(size=(int(kept.sum()), count))
        series[:, :3] = np.nan
        atlases.append(
            AtlasSummary(
                atlas=f"Atlas{LONG}{count}", series=series, coverage=generator.uniform(0.4, 1, count), regions=regions(generator, count),
                correlation=pearson(series), notes=(LONG,),
            )
        )  # fmt: skip
    run = RunSummary(
        key=RunKey(participant="01", task=LONG), space=LONG, repetition_time_s=2.0, fd=generator.uniform(0, 1, 150), kept=kept,
        atlases=tuple(atlases),
    )  # fmt: skip
    return participant_page("01", [run], methods=f"{LONG}.", citations=[LONG], notes=[LONG]), 1 + 2 * 3


def quality(generator):
    rows = 1000
    values = {name: generator.uniform(size=rows) for name in OUTLIER_SIDES}
    names = {"participant_id": [f"{LONG}{i}" if i == 0 else f"p{i}" for i in range(rows)], "site": [f"site {i % 40}" for i in range(rows)]}
    text = {name: [LONG if name == "run" else "A"] * rows for name in ("session", "run", "atlas", "dataset")}
    flags = {"frames": [200] * rows, "outlier_in": ["mean_fd, typicality" if i % 3 == 0 else None for i in range(rows)]}
    frame = pd.DataFrame({**values, **names, **text, **flags})[list(QC_COLUMNS)]
    table_of_regions = regions(generator, 50)
    edges = edge_distances(table_of_regions.centroids_mm, 50)
    atlas = AtlasQuality(
        atlas="A", regions=table_of_regions, runs=rows, mean_fisherz=generator.normal(size=len(edges)),
        motion=generator.normal(0, 0.1, len(edges)), distances_mm=edges,
    )  # fmt: skip
    return quality_page(Assessment(table=frame, atlases=(atlas,)), title=f"Quality of {LONG}", notes=[LONG], methods=LONG), 4


def preprocessing(generator):
    names = ("mean_fd", "moving_fraction", "still_minutes", "mean_std_dvars", "tsnr", "brain_ml", "template_correlation", "template_dice")
    rows = [
        {
            "participant_id": f"{LONG}{i}",
            "session": None,
            "run": LONG,
            "frames": 200,
            **dict(zip(names, generator.uniform(size=8), strict=True)),
        }
        for i in range(400)
    ]
    return preprocess_page(build_table(rows), title=LONG, notes=[LONG], methods=LONG), None


def training(generator):
    log = TrainingLog()
    for step in range(30):
        log.add("train", step=step, epoch=0, learning_rate=1e-3, loss=1.0 / (step + 1), contrast=0.5, gradient_norm=1.0, monitor_spread=0.3)
        log.add("validation", step=step, epoch=0, loss=1.1 / (step + 1))
    return training_page(log, title=LONG, subtitle=LONG, facts={"Atlas": LONG}, people=pd.DataFrame({"who": [LONG]})), 3


def tuning(generator):
    names = {"motion": 0.3, "embedding": 0.7}
    one = AtlasTuning(atlas=LONG, epochs=3, score=0.4, scores=names, shares=names, losses=[[1.0, 0.5, 0.3], [1.0, 0.4, 0.2]])
    return tuning_page([one], title=LONG, subtitle=LONG, facts={"Target": LONG}), 1


def plain(generator):
    wide = pd.DataFrame({f"{LONG}{i}": [LONG] * 3 for i in range(12)})
    return Page(title=LONG, subtitle=LONG, sections=(Section(title=LONG, blocks=(paragraph(LONG), table(wide, caption=LONG))),)), 0


def check(tab, path, width, pictures=None, keep=""):
    """Nothing fetched, nothing complained of, every picture drawn, nothing wider than the screen."""
    tab.open(path, width=width)
    if folder := os.environ.get("BRAINFM_SCREENSHOTS"):
        tab.screenshot(Path(folder) / f"{keep}-{width}.png")
    assert [url for url in tab.requested if not url.startswith(("data:", path.as_uri()))] == []
    assert tab.complaints == []
    drawn = tab.evaluate("Array.from(document.images, image => image.naturalWidth > 0 && image.clientWidth > 100)")
    assert all(drawn)
    assert pictures is None or len(drawn) == pictures
    assert tab.evaluate("window.innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # a wide picture scrolls in its own box; every other one and every box is seen whole
    hidden = "Array.from(document.querySelectorAll('figure > div, figure > div:not(.wide) > img'))"
    hidden += ".filter(part => part.getBoundingClientRect().right > window.innerWidth).length"
    assert tab.evaluate(hidden) == 0


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("build", [parcellation, quality, preprocessing, training, tuning, plain], ids=lambda build: build.__name__)
def test_report_opens_offline_and_fits_the_screen(tab, build, width, tmp_path, generator):
    page, pictures = build(generator)
    path = tmp_path / "report.html"
    path.write_text(page.render(), encoding="utf-8")
    check(tab, path, width, pictures, keep=build.__name__)


@pytest.mark.parametrize("width", [1200, 390])
def test_reports_of_a_finished_run_open_too(tab, width):
    """Every report below a folder, e.g. the one that 'brainfm demo' filled."""
    folder = os.environ.get("BRAINFM_TEST_REPORTS")
    if not folder:
        pytest.skip("BRAINFM_TEST_REPORTS is not set to a folder with reports, e.g. the output of 'brainfm demo'")
    pages = sorted(Path(folder).resolve().rglob("*.html"))
    assert pages
    for page in pages:
        check(tab, page, width, keep=f"{page.parent.name}-{page.stem}")


def test_the_browser_would_notice(tab, tmp_path):
    """A page with what reports must not have: a remote picture, a script that fails, a line that is too wide."""
    path = tmp_path / "bad.html"
    path.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><img src="http://127.0.0.1:9/x.png">'
        '<script>console.error("no")</script><div style="width:2000px">x</div>'
    )
    tab.open(path, width=390)
    assert "http://127.0.0.1:9/x.png" in tab.requested
    assert any("no" in text for text in tab.complaints)
    assert tab.evaluate("document.documentElement.scrollWidth") > 390
    assert tab.evaluate("document.images[0].naturalWidth") == 0
