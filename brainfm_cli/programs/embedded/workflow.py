"""The embedded engine: one participant's raw images to derivatives with fMRIPrep's names, in one resumable nipype workflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfm_cli.errors import InputNotFoundError
from brainfm_cli.programs.embedded import anatomical, functional, itk, sampling
from brainfm_cli.programs.embedded.brain import volume_ml
from brainfm_cli.programs.embedded.grids import read_ras
from brainfm_cli.programs.embedded.outputs import Publisher, suffix_of
from brainfm_cli.programs.embedded.template import find_template

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from nipype import Node, Workflow
    from numpy.typing import NDArray

    from brainfm_cli.bids.raw import Modality, RawImage, RawParticipant, RawRun
    from brainfm_cli.programs.embedded.settings import EmbeddedSettings
    from brainfm_cli.programs.embedded.template import Template

log = logging.getLogger(__name__)
Results = dict[str, dict[str, Any]]
_REFERENCES: tuple[Modality, ...] = ("T1w", "contrast T1w", "T2w", "FLAIR", "dwi")


@dataclass(frozen=True, kw_only=True)
class EmbeddedResult:
    """What came out of one participant."""

    outputs: tuple[Path, ...]
    """Files in the dataset, sorted."""
    notes: tuple[str, ...]
    """What a reader of the results must know."""
    gates: dict[str, tuple[dict[str, Any], ...]]
    """Measures with their limits, by what they are about: ``anat``, the name of another sequence, or of a run."""
    measures: dict[str, dict[str, float]]
    """By run, or by the reference image where there are no runs, for the group's quality table."""
    seconds: dict[str, float]
    """How long each step took, by its name; what a killed call had done counts as it did there."""
    facts: dict[str, Any]
    """What was done, for the methods paragraph: reference modality, extraction method, template source and the like."""


def preprocess_participant(
    raw: RawParticipant, out: Path, work: Path, settings: EmbeddedSettings, *, seed: int, nthreads: int
) -> EmbeddedResult:
    """Preprocess one participant; a killed call goes on where it was when it is made again with the same ``work``.

    Parameters
    ----------
    out
        Root of the output dataset.
    work
        Folder of this participant's own, kept between calls.
    seed
        Of registration, at least 1.
    nthreads
        Threads of registration and resampling; results are bit-identical between repeats at one.

    Raises
    ------
    BrainFMError
        Something needed is missing, cannot be read, or the result does not pass a gate; then nothing is published.
    """
    from threadpoolctl import threadpool_limits

    itk.prepare(nthreads, seed)
    template = find_template()
    reference = choose_reference(raw)
    work.mkdir(parents=True, exist_ok=True)
    with threadpool_limits(nthreads):
        results, seconds = _run(build_workflow(raw, reference, work, template, settings, seed=seed, threads=nthreads), f"sub-{raw.label}")
    publisher = Publisher(raw=raw, reference=reference, out=out, template=template, settings=settings)
    publisher.publish_anatomy(results)
    for number, image in enumerate(others(raw, reference)):
        publisher.publish_other(image, results[f"align{number}"], results[f"move{number}"]["out"])
    for number, run in enumerate(raw.bold):
        publisher.publish_run(run, results, number)
    gates = {"anat": tuple(results["resample"]["gates"])}
    sequences = {_name(image): tuple(results[f"align{number}"]["gates"]) for number, image in enumerate(others(raw, reference))}
    gates |= sequences
    gates |= {run.key.name: (results[f"sample{number}"]["gate"],) for number, run in enumerate(raw.bold)}
    brain_ml = volume_ml(*_inside(results["extract"]["mask"]))  # the person's own: in template space all brains are of one size
    measures = {"brain_ml": round(brain_ml, 1), **{gate["name"]: round(gate["value"], 4) for gate in gates["anat"]}}
    alignments = [gate["value"] for found in sequences.values() for gate in found if gate["name"] == "sequence_alignment"]
    if alignments:
        measures["sequence_alignment"] = round(min(alignments), 4)
    about = [run.key.name for run in raw.bold] or [_name(reference[0])]
    return EmbeddedResult(
        outputs=tuple(sorted(publisher.written)),
        notes=tuple(_notes(raw, reference, results)),
        gates=gates,
        measures={name: dict(measures) for name in about},
        seconds=seconds,
        facts={
            "reference": reference[0].modality,
            "averaged": len(reference),
            "others": sorted(
                {suffix_of(image) if image.modality != "contrast T1w" else image.modality for image in others(raw, reference)}
            ),
            "method": results["extract"]["method"],
            "tissues": "classify" in results,
            "template": template.name,
            "template_source": template.source,
            "slice_timing": any(results[f"slicetiming{number}"]["moment_s"] is not None for number in range(len(raw.bold))),
        },
    )


def choose_reference(raw: RawParticipant) -> tuple[RawImage, ...]:
    """The images whose space everything is brought into: the T1w images, or else the first modality that is there.

    Raises
    ------
    InputNotFoundError
        There is no structural image, or only others than T1w where there are BOLD runs.
    """
    where = raw.root / f"sub-{raw.label}"
    if raw.bold and not raw.t1w:
        raise InputNotFoundError("there is no T1w image", where=where, fix="preprocess structural images of any kind with --anat-only")
    for modality in _REFERENCES:
        if found := raw.of(modality):
            # Averages are of one session: between sessions brains change.
            alike = tuple(image for image in found if image.session == found[0].session)
            return alike if modality == "T1w" else alike[:1]
    raise InputNotFoundError("there is no structural image", where=where, fix="leave this participant out")


def build_workflow(
    raw: RawParticipant,
    reference: tuple[RawImage, ...],
    work: Path,
    template: Template,
    settings: EmbeddedSettings,
    *,
    seed: int,
    threads: int,
) -> Workflow:
    """The nodes of one participant: a structural chain, other sequences, and a chain for each run."""
    from brainfm_cli.programs.embedded.steps import empty_workflow

    workflow = empty_workflow("embedded", work)
    anatomy = _add_anatomy(workflow, reference, template, settings, seed)
    for number, image in enumerate(others(raw, reference)):
        _add_other(workflow, number, image, anatomy, settings, seed)
    for number, run in enumerate(raw.bold):
        _add_run(workflow, number, run, anatomy, settings, seed, threads)
    return workflow


def others(raw: RawParticipant, reference: tuple[RawImage, ...]) -> tuple[RawImage, ...]:
    """Structural and diffusion images beside the reference."""
    return tuple(image for image in raw.images if image not in reference)


def _add_anatomy(
    workflow: Workflow, reference: tuple[RawImage, ...], template: Template, settings: EmbeddedSettings, seed: int
) -> dict[str, Node]:
    from brainfm_cli.programs.embedded.steps import node

    images = [str(image.path) for image in reference]
    conform = node(anatomical.conform, name="conform", images=images, seed=seed)
    unbias_head = node(anatomical.unbias, name="unbias_head", mask=None)
    extract = node(
        anatomical.extract, name="extract", outputs=("mask", "method"),
        modality=reference[0].modality, template=template, settings=settings, seed=seed,
    )  # fmt: skip
    unbias = node(anatomical.unbias, name="unbias")
    classify = node(anatomical.classify, name="classify", outputs=("probabilities", "classes"))
    normalise = node(
        anatomical.normalise, name="normalise", outputs=("forward", "inverse"), template=template, settings=settings, seed=seed
    )
    resample = node(
        anatomical.resample, name="resample", outputs=("images", "gates"),
        modality=reference[0].modality, template=template, settings=settings, classes=None, probabilities=[],
    )  # fmt: skip
    # Elsewhere than in T1w the darkest class is not CSF, nor the brightest white matter.
    with_tissues = reference[0].modality.endswith("T1w")
    tissue_links = [
        (unbias, classify, [("out", "image")]),
        (extract, classify, [("mask", "mask")]),
        (classify, resample, [("probabilities", "probabilities"), ("classes", "classes")]),
    ]
    workflow.connect(
        [
            (conform, unbias_head, [("out", "image")]),
            (unbias_head, extract, [("out", "image")]),
            (conform, unbias, [("out", "image")]),
            (extract, unbias, [("mask", "mask")]),
            *((unbias, later, [("out", "image")]) for later in (normalise, resample)),
            *((extract, later, [("mask", "mask")]) for later in (normalise, resample)),
            (normalise, resample, [("forward", "forward")]),
            *(tissue_links if with_tissues else ()),
        ]
    )
    return {"unbias": unbias, "extract": extract, "classify": classify, "normalise": normalise, "resample": resample}


def _add_other(
    workflow: Workflow, number: int, image: RawImage, anatomy: Mapping[str, Node], settings: EmbeddedSettings, seed: int
) -> None:
    from brainfm_cli.programs.embedded.steps import node

    align = node(anatomical.align_other, name=f"align{number}", outputs=("image", "transform", "gates"), image=str(image.path), seed=seed)
    move = node(anatomical.move_other, name=f"move{number}", settings=settings)
    workflow.connect(
        [
            (anatomy["unbias"], align, [("out", "reference")]),
            (anatomy["extract"], align, [("mask", "mask")]),
            (align, move, [("image", "image")]),
            (anatomy["normalise"], move, [("forward", "forward")]),
            (anatomy["resample"], move, [("gates", "gates")]),  # nothing is moved onto a template that does not fit
        ]
    )


def _add_run(
    workflow: Workflow, number: int, run: RawRun, anatomy: Mapping[str, Node], settings: EmbeddedSettings, seed: int, threads: int
) -> None:
    from brainfm_cli.programs.embedded.steps import node

    times = run.slice_timing_s if settings.slice_timing else None
    direction = str(run.metadata.get("SliceEncodingDirection", "k"))
    store = node(functional.store, name=f"store{number}", bold=str(run.path), repetition_time_s=run.repetition_time_s)
    align = node(functional.align_frames, name=f"realign{number}", outputs=("boldref", "motion"), threads=threads)
    timed = node(
        functional.time_slices, name=f"slicetiming{number}", outputs=("about", "moment_s"),
        times_s=list(times) if times else None, direction=direction,
    )  # fmt: skip
    coregister = node(functional.coregister, name=f"coregister{number}", outputs=("transform", "information"), settings=settings, seed=seed)
    masks = node(functional.native_masks, name=f"masks{number}", outputs=("masks", "fractions"))
    sample = node(sampling.resample_run, name=f"sample{number}", outputs=("files", "gate"), settings=settings, threads=threads)
    confounds = node(functional.tabulate, name=f"confounds{number}", outputs=("table", "description"))
    workflow.connect(
        [
            (store, align, [("out", "about")]),
            (store, timed, [("out", "about")]),
            (align, coregister, [("boldref", "boldref")]),
            (anatomy["unbias"], coregister, [("out", "t1w")]),
            (anatomy["extract"], coregister, [("mask", "mask")]),
            (align, masks, [("boldref", "boldref")]),
            (coregister, masks, [("transform", "coreg")]),
            (anatomy["extract"], masks, [("mask", "mask")]),
            (anatomy["classify"], masks, [("probabilities", "probabilities")]),
            (timed, sample, [("about", "about")]),
            (align, sample, [("motion", "motion")]),
            (coregister, sample, [("transform", "coreg")]),
            (masks, sample, [("masks", "masks")]),
            (anatomy["normalise"], sample, [("forward", "forward")]),
            (anatomy["resample"], sample, [(("images", functional.mask_of), "brain")]),
            (timed, confounds, [("about", "about")]),
            (sample, confounds, [(("files", functional.native_of), "native")]),
            (masks, confounds, [("masks", "masks")]),
            (align, confounds, [("boldref", "boldref"), ("motion", "motion")]),
        ]
    )


def _notes(raw: RawParticipant, reference: tuple[RawImage, ...], results: Results) -> list[str]:
    notes = []
    if results["extract"]["method"] != "deepbet":
        notes.append(f"the brain mask was found by another way than deepbet: {results['extract']['method']}")
    if "classify" not in results:
        notes.append(f"tissues are found in T1w images only: there are none of the {reference[0].modality}")
    if len({image.session for image in raw.t1w}) > 1:
        notes.append(f"T1w images of {len(raw.sessions)} sessions are there; those of session {reference[0].session} are the reference")
    if raw.fieldmaps and raw.bold:
        notes.append(f"{len(raw.fieldmaps)} fieldmap images were not used: the embedded engine does not correct distortion")
    for number, run in enumerate(raw.bold):
        fractions = results[f"masks{number}"]["fractions"]
        if run.echoes:
            notes.append(f"{run.key.name}: {len(run.echoes)} echoes are there, the first was used")
        for tissue, fraction in fractions.items():
            if fraction < 0.95:
                notes.append(f"{run.key.name}: voxels count as {tissue} where {fraction:.0%} of them are, because fewer are purer")
    return notes


def _name(image: RawImage) -> str:
    """File name of a structural image without its extension."""
    return image.path.name.partition(".")[0]


def _inside(mask: str) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    values, affine = read_ras(Path(mask))
    return values > 0, affine


def _run(workflow: Workflow, name: str) -> tuple[Results, dict[str, float]]:
    """Run what is not done yet; outputs and seconds of every node by its name."""

    def tell(node: Node, status: str) -> None:
        if status == "start":
            log.info("%s: %s", name, node.name)

    finished = workflow.run(plugin="Linear", plugin_args={"status_callback": tell})
    results = {node.name: node.result for node in finished.nodes()}
    seconds = {step: round(float(result.runtime.duration), 2) for step, result in results.items()}
    return {step: result.outputs.get() for step, result in results.items()}, seconds
