"""The whole embedded engine: what it asks for, what it publishes, how it goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.derivatives import write_text
from brainfm_cli.bids.images import write_image
from brainfm_cli.bids.names import BIDSIGNORE
from brainfm_cli.bids.raw import RawParticipant, RawRun, read_raw_participant
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.programs.embedded.anatomical import unbias
from brainfm_cli.programs.embedded.outputs import Publisher, shared_entities
from brainfm_cli.programs.embedded.settings import EmbeddedSettings
from brainfm_cli.programs.embedded.steps import empty_workflow, node
from brainfm_cli.programs.embedded.template import Template
from brainfm_cli.programs.embedded.workflow import build_workflow, choose_reference, others, preprocess_participant
from brainfm_cli.programs.validator import validate
from brainfm_cli.records import RunKey
from brainfm_cli.signals.transforms import read_itk
from tests.programs.heads import AFFINE, t1w, tissues

SETTINGS = EmbeddedSettings()


def save(path: Path, generator: np.random.Generator) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(t1w(tissues(), generator), AFFINE), path)
    return path


@pytest.fixture
def dataset(tmp_path: Path, generator: np.random.Generator) -> Path:
    root = tmp_path / "raw"
    for name in (
        "ses-1/anat/sub-01_ses-1_run-1_T1w",
        "ses-1/anat/sub-01_ses-1_run-2_T1w",
        "ses-2/anat/sub-01_ses-2_T1w",
        "ses-1/anat/sub-01_ses-1_FLAIR",
    ):
        save(root / "sub-01" / f"{name}.nii.gz", generator)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.9.0"}))
    return root


def participant(root: Path, label: str = "01") -> RawParticipant:
    return read_raw_participant(root, label, Selection())


def test_t1w_images_of_one_session_are_averaged(dataset: Path) -> None:
    raw = participant(dataset)
    reference = choose_reference(raw)
    assert [image.path.name for image in reference] == ["sub-01_ses-1_run-1_T1w.nii.gz", "sub-01_ses-1_run-2_T1w.nii.gz"]
    assert shared_entities(reference) == {"sub": "01", "ses": "1"}
    assert {image.path.name for image in others(raw, reference)} == {"sub-01_ses-1_FLAIR.nii.gz", "sub-01_ses-2_T1w.nii.gz"}


def test_what_is_missing_is_said(dataset: Path) -> None:
    raw = participant(dataset)
    without = replace(raw, images=raw.of("FLAIR"))
    assert choose_reference(without) == raw.of("FLAIR")  # for the brain-MRI system any sequence will do
    run = RawRun(path=dataset, key=RunKey(participant="01", task="rest"), metadata={}, repetition_time_s=2.0, sbref=None)
    with pytest.raises(InputNotFoundError, match="no T1w image"):
        choose_reference(replace(without, bold=(run,)))
    with pytest.raises(InputNotFoundError, match="no structural image"):
        choose_reference(replace(raw, images=(), bold=()))


def test_only_t1w_contrast_is_divided_into_tissues(dataset: Path, tmp_path: Path) -> None:
    raw = participant(dataset)
    template = Template(name="x", source="x", brain=tmp_path / "x", mask=None)
    for images, wanted in ((raw.images, True), (raw.of("FLAIR"), False)):
        one = replace(raw, images=images)
        chain = build_workflow(one, choose_reference(one), tmp_path / "work", template, SETTINGS, seed=1, threads=1)
        assert ("classify" in chain.list_node_names()) is wanted


def test_another_sequence_says_what_the_validator_asks_for(dataset: Path, tmp_path: Path) -> None:
    raw, out = participant(dataset), tmp_path / "out"
    reference = choose_reference(raw)
    template = Template(name="MNI152NLin2009cAsym", source="x", brain=tmp_path / "x", mask=None)
    publisher = Publisher(raw=raw, reference=reference, out=out, template=template, settings=SETTINGS)
    (flair,) = raw.of("FLAIR")
    moved = write_image(tmp_path / "moved.nii", tissues().astype(np.float32), AFFINE, space="template")
    transform = write_text(tmp_path / "transform.h5", "x")
    for image in others(raw, reference):
        publisher.publish_other(image, {"image": str(flair.path), "transform": str(transform)}, str(moved))
    about = json.loads((out / "sub-01/ses-1/anat/sub-01_ses-1_space-T1w_desc-preproc_FLAIR.json").read_text())
    assert about["SkullStripped"] is False
    assert about["SpatialReference"] == "bids::sub-01/ses-1/anat/sub-01_ses-1_desc-preproc_T1w.nii.gz"
    description = {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "x"}]}
    (out / "dataset_description.json").write_text(json.dumps(description))
    write_text(out / ".bidsignore", BIDSIGNORE)
    validate(out)


def test_a_done_step_is_not_done_again_and_errors_keep_their_kind(
    tmp_path: Path, generator: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    image = save(tmp_path / "image.nii", generator)

    def run() -> int:
        workflow = empty_workflow("chain", tmp_path / "work")
        first, second = node(unbias, name="first", image=str(image), mask=None), node(unbias, name="second", mask=None)
        workflow.connect(first, "out", second, "image")
        finished = {one.name: one.result.outputs.out for one in workflow.run(plugin="Linear").nodes()}
        return Path(finished["second"]).stat().st_mtime_ns

    made = run()
    assert run() == made
    os.utime(image, ns=(1, 1))  # another image
    changed = run()
    assert changed != made
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.float32), AFFINE), image)
    with pytest.raises(InputDatasetError, match="one value"):
        run()
    assert "Traceback" not in "".join(capfd.readouterr())  # the sentence is enough


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = os.environ.get("BRAINFM_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BRAINFM_TEST_DATA is not set to the folder of the public test data")
    root = Path(folder) / "bids_rest_mini"
    base = tmp_path_factory.mktemp("mini")
    raw = participant(root, "001")
    killed = _kill_in_the_middle(root, base)
    started = time.time()
    result = preprocess_participant(raw, base / "out", base / "work", SETTINGS, seed=1, nthreads=1)
    return {"base": base, "raw": raw, "result": result, "killed": killed, "started": started}


def _kill_in_the_middle(root: Path, base: Path) -> list[str]:
    """Start in another process, kill it once the brain is extracted; gives back the steps that were done."""
    program = (
        "from pathlib import Path; from brainfm_cli.bids.raw import read_raw_participant; from brainfm_cli.config import Selection;"
        "from brainfm_cli.programs.embedded.settings import EmbeddedSettings;"
        "from brainfm_cli.programs.embedded.workflow import preprocess_participant;"
        f"raw = read_raw_participant(Path({str(root)!r}), '001', Selection());"
        f"preprocess_participant(raw, Path({str(base / 'out')!r}), Path({str(base / 'work')!r}), EmbeddedSettings(), seed=1, nthreads=1)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 600
    while child.poll() is None and time.time() < deadline and not list((base / "work").glob("embedded/normalise/_inputs.pklz")):
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return sorted(path.parent.name for path in (base / "work").glob("embedded/*/result_*.pklz"))


@pytest.mark.long
def test_a_killed_participant_goes_on_where_it_was(mini: dict[str, object]) -> None:
    base, started = mini["base"], mini["started"]
    assert isinstance(base, Path)
    assert isinstance(started, float)
    assert "extract" in mini["killed"]  # type: ignore[operator]
    assert "normalise" not in mini["killed"]  # type: ignore[operator]
    assert (base / "work/embedded/extract/mask.nii").stat().st_mtime < started
    assert (base / "work/embedded/normalise/template_forward.h5").stat().st_mtime > started


@pytest.mark.long
def test_outputs_are_complete_and_named_as_fmriprep_does(mini: dict[str, object]) -> None:
    result, base = mini["result"], mini["base"]
    names = {str(path.relative_to(base / "out")) for path in result.outputs}  # type: ignore[operator,attr-defined]
    anat, func = "sub-001/anat/sub-001_", "sub-001/func/sub-001_task-rest_"
    space = "space-MNI152NLin2009cAsym_res-2_"
    wanted = {
        *(f"{anat}{name}.nii.gz" for place in ("", space) for name in (
            f"{place}desc-preproc_T1w", f"{place}desc-brain_mask", f"{place}dseg", *(f"{place}label-{one}_probseg" for one in ("CSF", "GM", "WM")),
        )),
        f"{anat}from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.h5",
        f"{anat}from-MNI152NLin2009cAsym_to-T1w_mode-image_xfm.h5",
        *(f"{func}{name}" for name in (
            "desc-hmc_boldref.nii.gz", "desc-coreg_boldref.nii.gz", "desc-brain_mask.nii.gz", "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt",
            "from-boldref_to-T1w_mode-image_desc-coreg_xfm.txt", f"{space}boldref.nii.gz", f"{space}desc-brain_mask.nii.gz",
            f"{space}desc-preproc_bold.nii.gz", f"{space}desc-preproc_bold.json", "desc-confounds_timeseries.tsv", "desc-confounds_timeseries.json",
        )),
    }  # fmt: skip
    assert wanted <= names
    assert all(path.stat().st_size > 0 for path in result.outputs)  # type: ignore[attr-defined]
    gates = {gate["name"]: gate for found in result.gates.values() for gate in found}  # type: ignore[attr-defined]
    assert gates["template_dice"]["value"] > 0.92
    assert gates["template_correlation"]["value"] > 0.55
    assert gates["coverage"]["value"] > 0.9


@pytest.mark.long
def test_nilearn_reads_the_run_and_its_confounds(mini: dict[str, object]) -> None:
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    result = mini["result"]
    bold = next(path for path in result.outputs if path.name.endswith("desc-preproc_bold.nii.gz"))  # type: ignore[attr-defined]
    for strategy in ("simple", "scrubbing", "compcor"):
        confounds, _ = load_confounds_strategy(str(bold), denoise_strategy=strategy)
        assert len(confounds) == 20
        assert np.isfinite(confounds.to_numpy()).all()
    about = json.loads(bold.with_name(bold.name.replace(".nii.gz", ".json")).read_text())
    assert about["SliceTimingCorrected"] is True
    assert about["StartTime"] == pytest.approx(2.4325 / 2, abs=1e-3)
    image = nib.load(bold)
    assert image.shape == (97, 115, 97, 20)
    np.testing.assert_allclose(image.affine[:3, 3], [-96.5, -132.5, -78.5])


@pytest.mark.long
def test_grey_matter_lies_where_the_template_has_it(mini: dict[str, object]) -> None:
    from nilearn.datasets import load_mni152_gm_template
    from nilearn.image import resample_to_img

    result = mini["result"]
    path = next(path for path in result.outputs if path.name.endswith("res-2_label-GM_probseg.nii.gz"))  # type: ignore[attr-defined]
    ours = nib.load(path)
    theirs = resample_to_img(load_mni152_gm_template(resolution=2), ours, force_resample=True, copy_header=True)
    one, other = ours.get_fdata() > 0.5, theirs.get_fdata() > 0.5
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.7


@pytest.mark.long
def test_motion_agrees_with_itks_own(mini: dict[str, object]) -> None:
    """The transforms of three frames against antspyx's rigid registration of the same frames."""
    import ants

    from brainfm_cli.programs.embedded import itk

    result, raw = mini["result"], mini["raw"]
    path = next(path for path in result.outputs if path.name.endswith("desc-hmc_xfm.txt"))  # type: ignore[attr-defined]
    reference = nib.load(next(path for path in result.outputs if path.name.endswith("desc-hmc_boldref.nii.gz")))  # type: ignore[attr-defined]
    run = nib.load(raw.bold[0].path)  # type: ignore[attr-defined]
    moves = read_itk(path)
    assert len(moves) == 20
    table = pd.read_csv(next(one for one in result.outputs if one.name.endswith("timeseries.tsv")), sep="\t", na_values="n/a")  # type: ignore[attr-defined]
    assert len(table) == 20
    corners = np.array([[-60, -80, -30, 1], [60, 60, 50, 1], [0, 0, 0, 1.0]]).T
    assert ants is not None
    for frame in (0, 10, 19):
        fixed, moving = (reference.get_fdata(dtype=np.float32), run.dataobj[..., frame].astype(np.float32))
        forward, _ = itk.register(
            (fixed, reference.affine), (moving, run.affine), "Rigid", path.parent.parent, name=f"f{frame}", seed=1,
            options={"aff_metric": "GC", "aff_iterations": (200, 100), "aff_shrink_factors": (2, 1), "aff_smoothing_sigmas": (1, 0)},
        )  # fmt: skip
        assert np.abs((itk.matrix_of(forward) - moves[frame]) @ corners).max() < 0.5  # mm, of voxels of 5 mm
