"""One table of every output name; parse and format BIDS names. Nothing here touches the disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from brainfm_cli.errors import InputDatasetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# Order of BIDS 1.11 for the entities we read and write (derivative entities last).
ENTITY_ORDER = (
    "tpl", "sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo", "part", "hemi", "from", "to", "mode",
    "space", "cohort", "atlas", "seg", "scale", "res", "den", "label", "stat", "feature", "measure", "meas", "desc",
)  # fmt: skip

_LABEL = re.compile(r"[A-Za-z0-9+]+")
_ATLAS = re.compile(r"[A-Za-z0-9+]+(_[a-z]+-[A-Za-z0-9+]+)*")
_PAIR = re.compile(r"([a-z]+)-([A-Za-z0-9+]+)")


@dataclass(frozen=True, slots=True)
class OutputName:
    """One kind of file that brainfm writes."""

    suffix: str
    """BIDS suffix."""
    extension: str
    """With its dot."""
    folder: str
    """func, anat, or empty for the dataset root."""
    meaning: str
    """One line for docs/outputs.md."""
    entities: tuple[tuple[str, str], ...] = ()
    """Fixed entities of this kind."""


OUTPUTS: dict[str, OutputName] = {
    "preproc_bold": OutputName("bold", ".nii.gz", "func", "preprocessed BOLD series", (("desc", "preproc"),)),
    "brain_mask": OutputName("mask", ".nii.gz", "func", "brain mask on the BOLD grid", (("desc", "brain"),)),
    "confounds": OutputName("timeseries", ".tsv", "func", "confounds table, fMRIPrep's columns", (("desc", "confounds"),)),
    "timeseries": OutputName("timeseries", ".tsv", "func", "region series: one row per kept frame, one column per region", (("stat", "mean"),)),
    "pearson": OutputName("relmat", ".tsv", "func", "Pearson correlation between regions", (("stat", "pearsoncorrelation"),)),
    "fisherz": OutputName("relmat", ".tsv", "func", "Fisher z of the Pearson correlation", (("stat", "fisherz"),)),
    "partial": OutputName("relmat", ".tsv", "func", "partial correlation between regions", (("stat", "partialcorrelation"),)),
    "coverage": OutputName("bold", ".tsv", "func", "share of each region inside the brain mask", (("stat", "coverage"),)),
    "trial_map": OutputName("statmap", ".nii.gz", "func", "single-trial responses: volume = trial", (("stat", "effect"), ("desc", "singletrial"))),
    "trials": OutputName("trials", ".tsv", "func", "what was shown in each volume of the single-trial map", (("desc", "singletrial"),)),
    "trial_mask": OutputName("mask", ".nii.gz", "func", "voxels whose single-trial responses are used"),
    "caption": OutputName("caption", ".json", "", "what a model says that a participant saw", (("desc", "brainfm"),)),
    "report": OutputName("report", ".json", "", "what a model writes of one participant's study, with what was measured", (("desc", "brainfm"),)),
    "prediction": OutputName("prediction", ".json", "", "what a model says of one participant", (("desc", "brainfm"),)),
    "survival": OutputName("survival", ".tsv", "", "what a model says of one participant's risk over time", (("desc", "brainfm"),)),
    "cam": OutputName("statmap", ".nii.gz", "anat", "where a scan speaks for the answer (class activation map), in the grid of the scan", (("desc", "cam"),)),
    "lesions": OutputName("dseg", ".nii.gz", "anat", "lesions that a model sees, in the grid of the scan", (("seg", "brainfm"),)),
    "embedding": OutputName("embedding", ".tsv", "func", "what a model's encoder makes of one run", (("desc", "brainfm"),)),
}  # fmt: skip

FILES: dict[str, str] = {
    "dataset_description.json": "BIDS description; GeneratedBy holds the hash of the settings and of the input",
    "config.yaml": "the settings with which the folder was made",
    "logs/CITATION.md": "how it was made, and what to cite",
    "logs/records/<unit>.json": "completion record of a unit: inputs, outputs, versions, seconds, memory, or how it failed",
    "logs/slurm/<time>/": "a submission to SLURM: scripts, logs and exit codes (docs/cluster.md)",
    "group_qc.tsv": "preprocess group: quality of every run",
    "cohort/": "parcellate group: the packed cohort",
    "models/<id>/": "pretrain, align, prompt-tune: a model, rebuilt from this folder alone",
    "split.tsv": "who is learnt from and who is tested, written before anything is learnt",
    "metrics.json": "predict group: every score beside its floors, with intervals",
    "predictions.tsv": "predict group: what each predictor says of each person, and in which fold",
    "phenotype/": "predictions as BIDS phenotype tables",
    "interaction.json": "predict group: whether a score predicts the effect of a treatment",
    "few-shot/<people>/": "predict group: the same after learning from few people",
    "explanation/": "predict group: what predictions rest on",
    "zero_shot.json": "predict by text: disorders that nobody was labelled with",
    "locked_predictions.tsv": "predict group --lock: predictions as they were locked, before outcomes were known",
    "locked_predictions.json": "date, model and hashes of that lock; lock_sha256 covers the table and everything else here (docs/reader_study.md)",
    "reader_study.json": "predict group --reader-study: doctors with and without the model, with intervals and p values (docs/reader_study.md)",
    "captions.tsv": "caption group: what was said beside what people said",
    "reports.tsv": "caption group: reports that a model and its floors wrote",
    "report.html": "the same for people",
}
"""Files of an output folder that are no images or tables of one participant."""

BIDSIGNORE = """\
*.html
figures
log
models
checkpoints
config.yaml
provenance.json
*_xfm.*
*_boldref.*
*_timeseries.*
*_relmat.*
*_stat-coverage_bold.*
*_embedding.*
*_caption.*
*_report.*
*_prediction.*
*_survival.*
scan-evaluation
*_statmap.*
*_trials.*
*_captions.*
stimuli
bayes.tsv
captions.tsv
/reports.tsv
reconstructions
cohort
group_qc.*
metrics.json
predictions.tsv
interaction.json
locked_predictions.*
reader_study.json
explanation
few-shot
zero-shot
zero_shot.json
truth.json
disorders.tsv
planted.tsv
split.tsv
"""


def format_name(entities: Mapping[str, str], suffix: str, extension: str) -> str:
    """A file name with its entities in BIDS order.

    Raises
    ------
    InputDatasetError
        An entity is unknown, or a label holds other characters than letters, digits and ``+``.
    """
    unknown = [key for key in entities if key not in ENTITY_ORDER]
    if unknown:
        raise InputDatasetError(f"unknown BIDS entity '{unknown[0]}'", fix="use the entities of BIDS 1.11")
    parts = [f"{key}-{check_label(entities[key], key)}" for key in ENTITY_ORDER if key in entities]
    return "_".join([*parts, suffix]) + extension


def output_name(kind: str, entities: Mapping[str, str]) -> str:
    """File name of one kind of output, e.g. ``output_name("timeseries", {...})``."""
    output = OUTPUTS[kind]
    return format_name({**entities, **dict(output.entities)}, output.suffix, output.extension)


def parse_name(name: str) -> tuple[dict[str, str], str, str]:
    """Entities, suffix and extension of a file name; entities that are not ``key-label`` are dropped."""
    stem, dot, extension = name.partition(".")
    *pairs, suffix = stem.split("_")
    return dict(filter(None, map(_pair, pairs))), suffix, dot + extension


@lru_cache(maxsize=8192)  # a large dataset repeats few pairs many thousand times
def _pair(text: str) -> tuple[str, str] | None:
    match = _PAIR.fullmatch(text)
    return (match[1], match[2]) if match else None


def check_label(label: str, entity: str) -> str:
    """The label itself, once it is known to be safe in a path."""
    if not _LABEL.fullmatch(label):
        raise InputDatasetError(f"'{label}' is no BIDS label for '{entity}-'", fix="labels hold letters, digits and '+' only")
    return label


def check_keys(keys: Iterable[object], *, where: Path, atlases: bool = False) -> None:
    """See that participants' keys (or labels of ``atlases``) in a packed index are safe in paths and pages.

    Raises
    ------
    InputDatasetError
        One holds other characters than BIDS allows.
    """
    allowed = _ATLAS if atlases else _LABEL
    for key in keys:
        if not isinstance(key, str) or not allowed.fullmatch(key):
            what = "atlas" if atlases else "participant"
            raise InputDatasetError(f"the index has the {what} {key!r}, which is no BIDS label", where=where, fix="pack the cohort again")


def strip_prefix(labels: Iterable[str], entity: str) -> tuple[str, ...]:
    """Labels with or without ``sub-`` (``ses-``, ``task-``), without it, safe in paths.

    Raises
    ------
    UsageError
        A label holds characters that BIDS does not allow.
    """
    clean = tuple(dict.fromkeys(label.removeprefix(f"{entity}-") for label in labels))
    for label in clean:
        if not _LABEL.fullmatch(label):
            raise UsageError(f"'{label}' is no BIDS label", fix=f"write {entity}-01 or 01, letters and digits only")
    return clean


def atlas_entities(label: str) -> dict[str, str]:
    """Entities of an atlas label in entity form: ``Schaefer2018_seg-7n_scale-100`` → atlas, seg, scale."""
    entities, suffix, _ = parse_name(f"atlas-{label}_x")
    if suffix != "x" or "atlas" not in entities or f"atlas-{label}" != "_".join(f"{k}-{v}" for k, v in entities.items()):
        raise InputDatasetError(f"'{label}' is no atlas label", fix="write it like Schaefer2018_seg-7n_scale-100")
    return entities


def atlas_label(entities: Mapping[str, str]) -> str | None:
    """The atlas label in entity form; none where the name carries no atlas."""
    if "atlas" not in entities:
        return None
    tail = "".join(f"_{key}-{entities[key]}" for key in ("seg", "scale") if key in entities)
    return entities["atlas"] + tail
