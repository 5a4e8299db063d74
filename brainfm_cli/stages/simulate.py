"""``brainfm simulate``: a BIDS dataset with known truth, as voxel images or as a packed cohort of region series."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator
from rich.console import Console

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.bids.cohort import CohortAtlas, CohortWriter
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_once, write_text, write_tsv
from brainfm_cli.bids.images import sidecar, write_image, write_series
from brainfm_cli.bids.names import BIDSIGNORE, OUTPUTS, format_name, output_name
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Settings
from brainfm_cli.signals.transforms import itk_text
from brainfm_cli.simulation.anatomy import TEMPLATE
from brainfm_cli.simulation.fmriprep import brain_mask, simulate_run, volumes
from brainfm_cli.simulation.mri import MriSettings
from brainfm_cli.simulation.population import CONTROL, DISORDER_NAMES, PopulationSettings
from brainfm_cli.simulation.raw import RawSettings, bold_frames, draw_head
from brainfm_cli.simulation.rest import build_rest, simulate_series
from brainfm_cli.simulation.sources import Scan
from brainfm_cli.simulation.trial import COLUMNS as TRIAL_COLUMNS
from brainfm_cli.simulation.trial import (
    Planted,
    TrialSettings,
    build_trial,
    build_trial_truth,
    draw_drug_free,
    draw_patient,
    latents,
    patient_series,
)
from brainfm_cli.simulation.trial import participants as trial_participants
from brainfm_cli.simulation.truth import Couplings, build_truth
from brainfm_cli.simulation.viewing import ViewingSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from brainfm_cli.config import Frozen, Invocation
    from brainfm_cli.simulation.population import Person, Population
    from brainfm_cli.simulation.rest import PersonSeries, RestSimulation
    from brainfm_cli.simulation.trial import Trial

DATASET = "simulated"
TASK = "rest"
Datasets = tuple[tuple[str, Path], ...]
_COLUMNS = {
    "age": {"Description": "Age", "Units": "year"},
    "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
    "site": {"Description": "Site of the scanner"},
    "diagnosis": {
        "Description": "Diagnosis; disorders are invented, see disorders.tsv",
        "Levels": {CONTROL: "no disorder"} | dict.fromkeys(DISORDER_NAMES, "see disorders.tsv"),
    },
    "diagnosis_binary": {
        "Description": "Any disorder or none",
        "Levels": {CONTROL: "no disorder", "case": "any disorder"},
        "PositiveClass": "case",
    },
    "split": {"Description": "Random halves of unequal size", "Levels": {"discovery": "to learn from", "holdout": "to test on"}},
}


class SimulateSettings(Settings):
    """Settings of ``brainfm simulate``."""

    kind: Literal["rest", "drug", "viewing", "mri"] = "rest"
    """What is simulated: rest (resting-state fMRI of people with and without disorders), drug (patients of a trial, whose
    response to treatment is planted in connectivity and in dynamics, and drug-free people; written as series), viewing (people
    who see captioned pictures, written as single-trial maps), or mri (patients of several centres with lesions, grades, survival and
    reports, written as raw structural scans)."""
    level: Literal["raw", "bold", "series"] = "bold"
    """raw writes T1w and BOLD as scanned, bold fMRIPrep-named voxel images, series a packed cohort of denoised region series."""
    participants: int = Field(default=20, ge=1)
    """Number of people."""
    first_participant: int = Field(default=1, ge=1)
    """Number of the first person. Person i depends on the seed and i alone: ranges apart are different people of one population."""
    label_prefix: str = Field(default="", pattern="^[A-Za-z]*$")
    """Letters before the number in participant labels."""
    seed: int = Field(default=0, ge=0)
    """Seed of the population and of everybody in it."""
    effect: float = Field(default=1.0, ge=0)
    """Size of every planted shift, in SDs between people; 0 gives a null cohort, where diagnosis is independent of all else."""
    atlases: tuple[str, ...] = Field(default=("Schaefer100", "AAL116"), min_length=1)
    """Atlases of the region series and of the planted features."""
    frames: int = Field(default=200, ge=20)
    """Frames per scan, non-steady ones included."""
    repetition_time_s: float = Field(default=2.0, gt=0.1, le=10)
    """Seconds between frames."""
    non_steady_frames: int = Field(default=1, ge=0, le=10)
    """Bright frames at the beginning; the region series leave them out."""
    resolution_mm: float = Field(default=4.0, ge=2, le=8)
    """Voxel size of the template grid."""
    population: PopulationSettings = PopulationSettings()
    """Sites, disorders, confounding."""
    raw: RawSettings = RawSettings()
    """What is planted in raw images, where nobody has a disorder."""
    trial: TrialSettings = TrialSettings()
    """The trial of kind drug: arms, sites, effects, drug-free people."""
    viewing: ViewingSettings = ViewingSettings()
    """Pictures and responses of kind viewing."""
    mri: MriSettings = MriSettings()
    """Centres, sequences, diseases and outcomes of kind mri."""

    @field_validator("participants")
    @classmethod
    def _bounded(cls, value: int) -> int:
        if value > 1_000_000:
            raise ValueError("at most a million people")
        return value

    @model_validator(mode="after")
    def _trials_are_series(self) -> SimulateSettings:
        if self.kind == "drug" and self.level != "series":
            raise ValueError("kind drug is written as region series only: add --level series")
        if self.kind == "viewing" and self.level != "bold":
            raise ValueError("kind viewing is written as single-trial maps: leave --level out")
        if self.kind == "mri" and self.level != "bold":
            raise ValueError("kind mri is written as structural scans: leave --level out")
        return self

    @model_validator(mode="after")
    def _known_disorders(self) -> SimulateSettings:
        drawn = DISORDER_NAMES[: self.population.num_disorders]
        unknown = sorted(set(self.population.disorders) - set(drawn))
        if unknown:
            raise ValueError(f"no disorder is called {', '.join(unknown)}; this seed has {', '.join(drawn)}")
        return self


def simulate(call: Invocation, settings: SimulateSettings) -> int:
    """Write the dataset; gives back the exit code."""
    for name in settings.atlases:
        find_atlas(name, call.datasets)
    if call.dry_run:
        _print_plan(call.output_dir, settings)
        return 0
    kind = "raw" if settings.level == "raw" or settings.kind == "mri" else "derivative"
    dataset = OutputDataset.open(call.output_dir, command="simulate", settings=settings, dataset_type=kind)
    if settings.level == "series":  # the validator wants a folder for each person of participants.tsv, and there is none
        write_once(dataset.root / ".bidsignore", f"{BIDSIGNORE}participants.tsv\nparticipants.json\nlatents.tsv\n")
    units = _units(dataset.root, settings, dict(call.datasets))
    return run_units(dataset, units, call.execution)


def _units(root: Path, settings: SimulateSettings, datasets: dict[str, Path]) -> list[Unit]:
    if settings.kind in {"viewing", "mri"}:
        labels = {index: _label(settings, index) for index in _indices(settings)}
        return [
            *(
                Unit(
                    name=f"sub-{label}",
                    inputs=(),
                    work=write_simulated_person,
                    arguments={"root": root, "settings": settings, "index": index},
                )
                for index, label in labels.items()
            ),
            Unit(name="group", inputs=(), work=write_simulated_group, arguments={"root": root, "settings": settings}),
        ]
    common = {"root": root, "settings": settings, "datasets": tuple(sorted(datasets.items()))}
    if settings.level == "series":
        work = write_cohort if settings.kind == "rest" else write_trial
        return [Unit(name="group", inputs=(), work=work, arguments=common)]
    if settings.level == "raw":
        common = {"root": root, "settings": settings}
    people = [
        Unit(
            name=f"sub-{_label(settings, index)}",
            inputs=(),
            work=write_raw_person if settings.level == "raw" else write_person,
            arguments={**common, "index": index},
        )
        for index in _indices(settings)
    ]
    if settings.level == "raw":
        return people
    return [*people, Unit(name="group", inputs=(), work=write_group, arguments=common)]


def write_person(root: Path, settings: SimulateSettings, datasets: Datasets, index: int) -> UnitResult:
    """Write one person's image, mask and confounds, named as fMRIPrep names them."""
    simulation = _build(settings, datasets)
    run = simulate_run(simulation, index)
    anatomy = simulation.anatomy
    resolution = f"{settings.resolution_mm:g}"
    entities = {"sub": _label(settings, index), "task": TASK}
    in_template = {**entities, "space": TEMPLATE, "res": resolution.replace(".", "p")}
    folder = root / f"sub-{_label(settings, index)}" / OUTPUTS["preproc_bold"].folder
    image, mask, table = (
        folder / output_name(kind, where)
        for kind, where in (("preproc_bold", in_template), ("brain_mask", in_template), ("confounds", entities))
    )
    grid = {"Resolution": f"{resolution} mm isotropic", "SpatialReference": TEMPLATE}
    described = {
        "TaskName": TASK,
        "RepetitionTime": settings.repetition_time_s,
        "StartTime": 0.0,
        "SliceTimingCorrected": False,
        "SkullStripped": True,
        **grid,
    }
    outputs = (
        write_series(
            image,
            volumes(anatomy, run.series),
            num_frames=settings.frames,
            shape=anatomy.shape,
            affine=anatomy.affine,
            repetition_time_s=settings.repetition_time_s,
            space="template",
        ),
        write_json(sidecar(image), described),
        write_image(mask, brain_mask(anatomy), anatomy.affine, space="template"),
        write_json(sidecar(mask), {"Type": "Brain", **grid}),
        write_tsv(table, run.confounds),
        write_json(sidecar(table), run.descriptions),
    )
    return UnitResult(outputs=outputs, seed=settings.seed)


def write_raw_person(root: Path, settings: SimulateSettings, index: int) -> UnitResult:
    """Write one person's T1w image and BOLD run as scanned, and what is true of them under ``sourcedata/truth``."""
    seconds = settings.repetition_time_s
    head = draw_head(settings.raw, seed=settings.seed, index=index, frames=settings.frames, repetition_time_s=seconds)
    label = _label(settings, index)
    anat, func, truth = (root / place for place in (f"sub-{label}/anat", f"sub-{label}/func", f"sourcedata/truth/sub-{label}"))
    base, run = {"sub": label}, {"sub": label, "task": TASK}
    placed, grid = head.placed
    frames = bold_frames(
        head, settings.raw, seed=settings.seed, index=index,
        repetition_time_s=seconds, non_steady_frames=settings.non_steady_frames,
    )  # fmt: skip
    times = {} if head.slice_times_s is None else {"SliceTiming": head.slice_times_s.tolist(), "SliceEncodingDirection": "k"}
    described = {"TaskName": TASK, "RepetitionTime": seconds, "Manufacturer": "simulated", **times}
    t1w, bold = anat / format_name(base, "T1w", ".nii.gz"), func / format_name(run, "bold", ".nii.gz")
    motion = {**run, "from": "orig", "to": "boldref", "mode": "image", "desc": "hmc"}
    coregistration = {**run, "from": "boldref", "to": "T1w", "mode": "image", "desc": "coreg"}
    outputs = (
        write_image(t1w, head.t1w.data, head.t1w.affine, dtype=np.int16),
        write_json(sidecar(t1w), {"Manufacturer": "simulated"}),
        write_series(
            bold, frames, num_frames=settings.frames, shape=head.bold_shape, affine=head.bold_affine, repetition_time_s=seconds,
        ),
        write_json(sidecar(bold), described),
        write_image(truth / format_name({**base, "desc": "brain"}, "mask", ".nii.gz"), head.brain.data.astype(np.uint8), head.brain.affine),
        write_series(
            truth / format_name({**base, "from": TEMPLATE, "to": "T1w", "desc": "points"}, "map", ".nii.gz"),
            np.moveaxis(placed, -1, 0), num_frames=3, shape=placed.shape[:3], affine=grid, repetition_time_s=0.0, dtype=np.float32,
        ),
        write_text(truth / format_name(motion, "xfm", ".txt"), itk_text(head.motion)),
        write_text(truth / format_name(coregistration, "xfm", ".txt"), itk_text(head.coregistration[None])),
    )  # fmt: skip
    return UnitResult(outputs=outputs, seed=settings.seed)


def write_simulated_person(root: Path, settings: SimulateSettings, index: int) -> UnitResult:
    """Write one viewer's single-trial maps, or one patient's scans and lesion mask."""
    (write, _), own = _files_of(settings)
    written = write(root, own, label=_label(settings, index), seed=settings.seed, index=index, effect=settings.effect)
    return UnitResult(outputs=tuple(written), seed=settings.seed)


def write_simulated_group(root: Path, settings: SimulateSettings) -> UnitResult:
    """Write the tables and the truth of everybody: pictures and captions of viewers, reports of patients."""
    (_, write), own = _files_of(settings)
    labels = {index: _label(settings, index) for index in _indices(settings)}
    written = write(root, own, labels=labels, seed=settings.seed, effect=settings.effect)
    return UnitResult(outputs=tuple(written), seed=settings.seed)


def _files_of(settings: SimulateSettings) -> tuple[tuple[Callable[..., list[Path]], Callable[..., list[Path]]], Frozen]:
    """What writes one person and the whole group of a kind that has files of its own, and its settings."""
    if settings.kind == "viewing":
        from brainfm_cli.simulation.viewing_files import write_stimuli_and_truth, write_viewer

        return (write_viewer, write_stimuli_and_truth), settings.viewing
    from brainfm_cli.simulation.mri_files import write_patient, write_tables

    return (write_patient, write_tables), settings.mri


def write_group(root: Path, settings: SimulateSettings, datasets: Datasets) -> UnitResult:
    """Write the tables and the truth of people whose images others write: each person's series are drawn again."""
    simulation = _build(settings, datasets)
    couplings = Couplings(simulation)
    people = [couplings.add(_label(settings, index), simulate_series(simulation, index)) for index in _indices(settings)]
    outputs = _write_tables(root, settings, simulation, _participants(settings, people), couplings.table())
    return UnitResult(outputs=outputs, seed=settings.seed)


def write_cohort(root: Path, settings: SimulateSettings, datasets: Datasets) -> UnitResult:
    """Write the packed cohort, the tables and the truth: one person at a time, so that memory does not grow with people."""
    simulation = _build(settings, datasets)
    couplings, people = Couplings(simulation), []
    with CohortWriter(root / "cohort") as writer:
        for atlas in simulation.atlases:
            writer.add_atlas(CohortAtlas(label=atlas.label, regions=atlas.regions, template=TEMPLATE))
        for index in _indices(settings):
            seen = simulate_series(simulation, index)
            people.append(couplings.add(_label(settings, index), seen))
            _add_runs(writer, simulation, _label(settings, index), seen)
        table = _participants(settings, people)
        outputs = writer.finish(table.set_index("participant_id"), _COLUMNS)
    return UnitResult(outputs=(*outputs, *_write_tables(root, settings, simulation, table, couplings.table())), seed=settings.seed)


def write_trial(root: Path, settings: SimulateSettings, datasets: Datasets) -> UnitResult:
    """Write the packed cohort of a trial and its drug-free people, the tables and the truth."""
    trial = _build_trial(settings, datasets)
    drawn = {_label(settings, index): draw_patient(trial, index) for index in _indices(settings)}
    others = range(settings.first_participant, settings.first_participant + settings.trial.drug_free)
    drawn |= {f"{settings.label_prefix}free{index:04d}": draw_drug_free(trial, index) for index in others}
    planted = Planted(trial)
    with CohortWriter(root / "cohort") as writer:
        for atlas in trial.simulation.atlases:
            writer.add_atlas(CohortAtlas(label=atlas.label, regions=atlas.regions, template=TEMPLATE))
        for label, patient in drawn.items():
            seen = patient_series(trial, patient)
            planted.add(label, patient, seen)
            _add_runs(writer, trial.sites[patient.site], label, seen)
        table = trial_participants(trial, list(drawn), list(drawn.values()))
        outputs = writer.finish(table.set_index("participant_id"), TRIAL_COLUMNS)
    truth = build_trial_truth(trial, table, planted.table(), settings=settings.model_dump(mode="json"))
    written = (
        write_tsv(root / "participants.tsv", table.assign(participant_id="sub-" + table["participant_id"])),
        write_json(root / "participants.json", TRIAL_COLUMNS),
        write_tsv(root / "planted.tsv", planted.table().round(6)),
        write_tsv(root / "latents.tsv", latents(trial, list(drawn), list(drawn.values()))),
        write_json(root / "truth.json", truth),
    )
    return UnitResult(outputs=(*outputs, *written), seed=settings.seed)


def _add_runs(writer: CohortWriter, simulation: RestSimulation, label: str, seen: PersonSeries) -> None:
    scan = simulation.scan
    row = {
        "dataset": DATASET,
        "participant": label,
        "session": "",
        "run": f"task-{TASK}",
        "site": seen.person.site,
        "repetition_time": scan.repetition_time_s,
        "mean_fd": seen.mean_fd_mm,
        "kept_fraction": 1 - scan.non_steady_frames / scan.frames,
    }
    for atlas, series in zip(simulation.atlases, seen.series, strict=True):
        writer.add_run(atlas.label, series, row)


def _write_tables(
    root: Path, settings: SimulateSettings, simulation: RestSimulation, table: pd.DataFrame, planted: pd.DataFrame
) -> tuple[Path, ...]:
    truth = build_truth(simulation, table.set_index("participant_id"), planted, settings=settings.model_dump(mode="json"))
    public = table.assign(participant_id="sub-" + table["participant_id"])
    return (
        write_tsv(root / "participants.tsv", public),
        write_json(root / "participants.json", _COLUMNS),
        write_tsv(root / "disorders.tsv", _disorders(simulation.population)),
        write_tsv(root / "planted.tsv", planted.round(6)),
        write_json(root / "truth.json", truth),
    )


@lru_cache(maxsize=1)
def _build(settings: SimulateSettings, datasets: Datasets) -> RestSimulation:
    """Built once per process: a worker writes many people."""
    scan = Scan(frames=settings.frames, repetition_time_s=settings.repetition_time_s, non_steady_frames=settings.non_steady_frames)
    return build_rest(
        settings.population,
        seed=settings.seed,
        effect=settings.effect,
        scan=scan,
        resolution_mm=settings.resolution_mm,
        atlases=settings.atlases,
        datasets=dict(datasets),
    )


def _build_trial(settings: SimulateSettings, datasets: Datasets) -> Trial:
    scan = Scan(frames=settings.frames, repetition_time_s=settings.repetition_time_s, non_steady_frames=settings.non_steady_frames)
    return build_trial(
        settings.trial,
        settings.population,
        seed=settings.seed,
        effect=settings.effect,
        scan=scan,
        resolution_mm=settings.resolution_mm,
        atlases=settings.atlases,
        datasets=dict(datasets),
    )


def _indices(settings: SimulateSettings) -> range:
    return range(settings.first_participant, settings.first_participant + settings.participants)


def _label(settings: SimulateSettings, index: int) -> str:
    return f"{settings.label_prefix}{index:04d}"


def _participants(settings: SimulateSettings, people: list[Person]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "participant_id": [_label(settings, person.index) for person in people],
            "age": [person.age for person in people],
            "sex": [person.sex for person in people],
            "site": [person.site for person in people],
            "diagnosis": [person.diagnosis for person in people],
            "diagnosis_binary": [CONTROL if person.diagnosis == CONTROL else "case" for person in people],
            "split": [person.split for person in people],
        }
    )


def _disorders(population: Population) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "name": [disorder.name for disorder in population.disorders],
            "abbreviation": [disorder.abbreviation for disorder in population.disorders],
            "description": [disorder.description for disorder in population.disorders],
            "present": ["yes" if disorder in population.present else "no" for disorder in population.disorders],
        }
    )


def _print_plan(root: Path, settings: SimulateSettings) -> None:
    console = Console()
    console.print(f"simulate {settings.kind}, level {settings.level}, into {root}", highlight=False)
    console.print(f"{settings.participants} people from {_label(settings, settings.first_participant)}, seed {settings.seed}, effect {settings.effect:g}", highlight=False)  # fmt: skip
    console.print(f"{settings.frames} frames of {settings.repetition_time_s:g} s; atlases: {', '.join(settings.atlases)}", highlight=False)
