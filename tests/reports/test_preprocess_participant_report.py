"""The participant page of the embedded preprocessing, on results of known geometry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.signal import detrend

from brainfm_cli.bids.derivatives import write_tsv
from brainfm_cli.bids.images import write_image, write_series
from brainfm_cli.programs.embedded.template import output_grid
from brainfm_cli.programs.embedded.workflow import EmbeddedResult
from brainfm_cli.reports.preprocess import Outline, carpet_rows, mosaic, participant_page
from brainfm_cli.reports.preprocess_methods import as_bibtex, as_markdown, cited, methods_paragraph
from tests.programs.heads import AFFINE, SHAPE, t1w, tissues

FACTS = {
    "reference": "T1w", "averaged": 1, "method": "deepbet", "template": "MNI152NLin2009cAsym", "template_source": "TemplateFlow", "slice_timing": True, "tissues": True, "others": [],
}  # fmt: skip
CODES = np.array([0, 3, 1, 2, 0], np.uint8)  # labels of the test head to those of a dseg
SPACE = "space-MNI152NLin2009cAsym_res-2_"


def result_of(out: Path, generator: np.random.Generator, *, bold: bool, flair: bool = False) -> EmbeddedResult:
    """What the engine would publish of the test head."""
    written = []
    for place, shape, affine in (("", SHAPE, AFFINE), (SPACE, *output_grid(2))):
        labels = tissues(shape, affine)
        inside = (labels > 0) & (labels < 4)
        anat = out / "sub-01" / "anat"
        written += [
            write_image(anat / f"sub-01_{place}desc-preproc_T1w.nii.gz", t1w(labels, generator), affine),
            write_image(anat / f"sub-01_{place}desc-brain_mask.nii.gz", inside.astype(np.uint8), affine),
            write_image(anat / f"sub-01_{place}dseg.nii.gz", CODES[labels], affine),
        ]
    gates = {"anat": tuple({"name": name, "meaning": name, "value": 0.9, "low": 0.5, "high": None, "unit": "", "passed": True} for name in ("template_correlation", "template_dice"))}  # fmt: skip
    if flair:
        own = tissues(SHAPE, AFFINE)
        written.append(write_image(anat / "sub-01_space-T1w_desc-preproc_FLAIR.nii.gz", 1500 - t1w(own, generator), AFFINE))
    if bold:
        stem = out / "sub-01" / "func" / "sub-01_task-rest_"
        mean, frames = t1w(labels, generator), 12
        volumes = (mean * np.float32(1 + 0.01 * np.sin(frame)) for frame in range(frames))
        names = ("global_signal", "csf", "framewise_displacement", "std_dvars", "trans_x", "non_steady_state_outlier00")
        confounds = pd.DataFrame(generator.random((frames, len(names))), columns=list(names))
        confounds.loc[0, "framewise_displacement"] = np.nan
        written += [
            write_series(
                Path(f"{stem}{SPACE}desc-preproc_bold.nii.gz"),
                volumes,
                num_frames=frames,
                shape=shape,
                affine=affine,
                repetition_time_s=2.0,
            ),
            write_image(Path(f"{stem}{SPACE}boldref.nii.gz"), mean, affine),
            write_image(Path(f"{stem}{SPACE}desc-brain_mask.nii.gz"), inside.astype(np.uint8), affine),
            write_image(Path(f"{stem}desc-hmc_boldref.nii.gz"), mean, affine),
            write_tsv(Path(f"{stem}desc-confounds_timeseries.tsv"), confounds),
        ]
    return EmbeddedResult(outputs=tuple(sorted(written)), notes=("a <note>",), gates=gates, measures={}, seconds={}, facts=FACTS)


@pytest.mark.parametrize(("bold", "pictures"), [(False, 3), (True, 6)])
def test_the_page_shows_everything(tmp_path: Path, generator: np.random.Generator, bold: bool, pictures: int) -> None:
    page = participant_page("01", result_of(tmp_path, generator, bold=bold)).render()
    assert page.count("<figure>") == pictures
    assert "a &lt;note&gt;" in page
    assert ("task-rest" in page) is bold
    assert ("10.1016/j.neuroimage.2007.04.042" in page) is bold  # CompCor is cited where there are confounds
    assert ("12 frames of 2 s, 1 before the steady state" in page) is bold
    assert page == participant_page("01", result_of(tmp_path, np.random.default_rng(20261121), bold=bold)).render()


def test_the_reference_is_shown_beside_other_sequences_and_without_tissues(tmp_path: Path, generator: np.random.Generator) -> None:
    result = result_of(tmp_path, generator, bold=False)
    kept = [path for path in result.outputs if "dseg" not in path.name]
    shape, affine = output_grid(2)
    other = write_image(tmp_path / f"sub-01/anat/sub-01_ce-gadolinium_{SPACE}desc-preproc_T1w.nii.gz", np.zeros(shape, np.float32), affine)
    alone = participant_page("01", replace(result, outputs=tuple(kept))).render()
    assert alone.count("<figure>") == 2
    assert participant_page("01", replace(result, outputs=tuple(sorted([*kept, other])))).render() == alone


def test_lines_are_drawn_where_the_edge_is() -> None:
    image = np.ones((20, 24, 16), np.float32)
    inside = np.zeros(image.shape, bool)
    inside[5:15, 6:18, 4:12] = True
    drawing = mosaic(image, [Outline(values=inside.astype(np.float32), levels=(0.5,), colours=("red",))], (1.0, 1.0, 1.0), inside=inside)
    assert len(drawing.axes) == 21
    first = drawing.axes[3]  # an axial cut: x to the right, y upwards, window begins 4 voxels before the mask
    line = np.concatenate([path.vertices for path in first.collections[0].get_paths()])
    np.testing.assert_allclose(line.min(0), [3.5, 3.5], atol=0.01)
    np.testing.assert_allclose(line.max(0), [13.5, 15.5], atol=0.01)


def test_the_carpet_is_detrended_and_scaled(generator: np.random.Generator) -> None:
    series = (generator.normal(size=(40, 6)) + np.arange(40)[:, None] * [0.1, -0.2, 0, 1, 5, 0]).astype(np.float32)
    expected = detrend(series, axis=0)
    np.testing.assert_allclose(carpet_rows(series, 0), (expected / expected.std(0)).T, atol=1e-3)
    bright = series.copy()
    bright[:2] += 100  # before the steady state
    np.testing.assert_allclose(carpet_rows(bright, 2)[:, 2:], carpet_rows(series, 2)[:, 2:], atol=1e-3)


def test_other_sequences_are_shown(tmp_path: Path, generator: np.random.Generator) -> None:
    page = participant_page("01", result_of(tmp_path, generator, bold=False, flair=True)).render()
    assert page.count("<figure>") == 4
    assert "Other sequences" in page
    assert "Alignment of FLAIR" in page


def test_methods_say_what_was_done() -> None:
    several = methods_paragraph({**FACTS, "others": ["FLAIR", "T2w"]}, bold=False)
    assert "FLAIR and T2w were each registered rigidly" in several
    assert "registered rigidly" not in methods_paragraph(FACTS, bold=False)
    assert "information" in {work.key for work in cited({**FACTS, "others": ["FLAIR"]}, bold=False)}
    whole = methods_paragraph(FACTS, bold=True)
    assert "slices were moved" in whole
    assert "distortion was not corrected" in whole
    assert "slices" not in methods_paragraph({**FACTS, "slice_timing": False}, bold=True)
    stripped = {**FACTS, "method": "stripped", "averaged": 2}
    assert "skull-stripped before" in methods_paragraph(stripped, bold=False)
    assert "mean of 2 rigidly aligned T1w images" in methods_paragraph(stripped, bold=False)
    assert {"deepbet", "mixture"} <= {work.key for work in cited(FACTS, bold=False)}
    assert not {"deepbet", "mixture"} & {work.key for work in cited({**stripped, "tissues": False}, bold=False)}
    assert "tissue" not in methods_paragraph({**stripped, "tissues": False}, bold=False)
    bibtex, markdown = as_bibtex(FACTS, bold=True), as_markdown(FACTS, bold=True)
    for work in cited(FACTS, bold=True):
        assert f"@article{{{work.key}," in bibtex
        assert work.doi in markdown
    assert bibtex.count("{") == bibtex.count("}")
