"""align: teach a pretrained model what texts of disorders mean, so that a disorder nobody was labelled with can be scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import Field
from rich.console import Console

from brainfm_cli.atlases.catalogue import atlas_labels
from brainfm_cli.atlases.membership import near_networks
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Settings
from brainfm_cli.errors import InputDatasetError, UsageError
from brainfm_cli.learning.alignment import AlignmentRecord, FitSettings
from brainfm_cli.learning.checkpoints import copy_backbone, model_files, read_model_config, read_provenance, source_of_model, write_tensors
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.targets import TargetSettings, class_text, participant_table, read_target
from brainfm_cli.learning.texts import read_disorders, read_networks
from brainfm_cli.models.language import DEFAULT_ENCODER
from brainfm_cli.provenance import file_sha256, package_versions
from brainfm_cli.reports.alignment import alignment_page
from brainfm_cli.stages.align.captions import AlignCaptionSettings, align_captions
from brainfm_cli.stages.align.reports import AlignReportSettings, align_reports
from brainfm_cli.stages.align.series import SeriesAlignSettings, align_series
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph import texts as alignment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.facts import NetworkWords
    from brainfm_cli.learning.targets import Target
    from brainfm_cli.learning.texts import DisorderText
    from brainfm_cli.records import RegionTable


class AlignSettings(Settings):
    """Settings of ``brainfm align``."""

    target: str = Field(min_length=1)
    """Column of participants.tsv whose values are disorders (--target)."""
    control: tuple[str, ...] = ("control",)
    """Values of people without a disorder."""
    exclude: tuple[str, ...] = ()
    """Disorders that must not be learnt from, e.g. those to be tested without labels."""
    disorders: Path | None = None
    """Table of texts by disorder, YAML or TSV (name, abbreviation, description); unset takes the packaged one."""
    networks: Path | None = None
    """Words for networks, YAML; unset takes the packaged one."""
    encoder: str = DEFAULT_ENCODER
    """Text encoder: a name of 'brainfm assets list', a folder, or a hub name; bio-clinicalbert is the published choice."""
    where: dict[str, tuple[str, ...]] = {}
    """Columns of participants.tsv and the values that people must have, e.g. {split: [discovery]}."""
    atlases: tuple[str, ...] = ()
    """Atlases to align in; all that the cohort and the model share where empty."""
    fit: FitSettings = FitSettings()
    """How texts and brains are aligned."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""


def align(call: Invocation) -> int:
    """Align and write ``models/<id>``, with the settings of the model's system; gives back the exit code."""
    if call.model is None:
        raise UsageError("align needs a model", fix="give --model OUT/models/<id> of 'brainfm pretrain'")
    choose_device(call.execution.device)
    kind = read_model_config(call.model).system.get("kind")
    if kind == "brain-caption":
        return align_captions(call, call.model, AlignCaptionSettings.read(call.config, call.overrides))
    if kind == "mri-language":
        return align_reports(call, call.model, AlignReportSettings.read(call.config, call.overrides))
    if kind == "drug-response":
        return align_series(call, call.model, SeriesAlignSettings.read(call.config, call.overrides))
    return align_texts(call, call.model, AlignSettings.read(call.config, call.overrides))


def align_texts(call: Invocation, model: Path, settings: AlignSettings) -> int:
    """Align with texts of disorders; gives back the exit code."""
    cohort = Cohort.open(call.input_dir)
    config = read_model_config(model)
    wanted = atlas_labels(settings.atlases, cohort.atlases, call.datasets)
    shared = [label for label in wanted or cohort.choose_atlases(()) if label in config.atlases]
    settings = settings.model_copy(update={"atlases": tuple(shared or wanted)})
    participants = select_participants(cohort, settings.where, call.selection.participant_label)
    target, named = read_people(cohort, settings, participants)
    texts = disorder_texts(named, settings)
    if call.dry_run:
        _print_plan(model, target, settings, texts)
        return 0
    sources = [call.input_dir, source_of_model(model)]
    dataset = OutputDataset.open(call.output_dir, command="align", settings=settings, sources=sources, citation=_CITATION)
    folder = dataset.root / "models" / f"{config.system['kind']}-text-{dataset.configuration_hash[:8]}"
    tables = [path for path in (settings.disorders, settings.networks) if path is not None]
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "folder": folder,
        "settings": settings,
        "execution": call.execution,
        "participants": target.participants,
    }
    inputs = (*cohort.files, *model_files(model), *tables)
    return run_units(dataset, [Unit(name=f"model-{folder.name}", inputs=inputs, work=write_model, arguments=arguments)], call.execution)


def write_model(
    cohort_dir: Path, model: Path, folder: Path, settings: AlignSettings, execution: Execution, participants: tuple[str, ...]
) -> UnitResult:
    """Align on ``participants`` and write a model folder that needs no other."""
    cohort, loaded = Cohort.open(cohort_dir), load_system(model)
    loaded.usable_atlases(cohort)  # refuses an atlas with other regions than the model's
    system = alignment.alignable(loaded, model)
    system.module.to(choose_device(execution.device))
    target, named = read_people(cohort, settings, participants)
    words = read_networks(settings.networks)
    encoder = alignment.load_encoder(settings.encoder)
    texts = disorder_texts(named, settings)
    vectors = alignment.read_texts(texts, words, encoder)
    networks = tuple(network.name for network in words.networks)
    names = alignment.name_networks(networks, words, encoder)
    codes = disorder_codes(target, named)
    table = participant_table(cohort).loc[list(target.participants)]
    groups = pd.factorize(table["dataset"].astype(str))[0]
    fitted = {}
    for label in settings.atlases:
        shares = network_membership(cohort.atlases[label].regions, words)
        inputs = alignment.prepare(system, cohort, target.participants, label, shares, settings.fit.condition)
        rows = np.array([place for place, name in enumerate(target.participants) if name in set(inputs.participants)])
        fitted[label] = alignment.fit(
            system, inputs, codes[rows], groups[rows], vectors, names, shares, settings.fit, seed=settings.seed
        )  # fmt: skip
    record = AlignmentRecord(
        column=settings.target,
        control=settings.control,
        disorders=named,
        condition=settings.fit.condition,
        networks=networks,
        atlases=settings.atlases,
        encoder=settings.encoder,
        encoder_sha256=encoder.fingerprint(),
        people=len(target.participants),
    )
    return UnitResult(outputs=tuple(_write(folder, model, settings, record, target, table, texts, fitted)), seed=settings.seed)


def read_people(cohort: Cohort, settings: AlignSettings, participants: Sequence[str]) -> tuple[Target, tuple[str, ...]]:
    """Who takes part, with the disorders they have; the first class is the absence of one.

    Raises
    ------
    InputDatasetError
        Nobody is without a disorder, or nobody has one that may be learnt from.
    """
    column = participant_table(cohort)[settings.target].map(class_text) if settings.target in participant_table(cohort) else None
    found = sorted(set() if column is None else set(column.loc[[name for name in participants if name in column.index]]) - {""})
    named = tuple(value for value in found if value not in {*settings.control, *settings.exclude})
    controls = tuple(value for value in settings.control if value in found)
    if column is not None and not (named and controls):
        raise InputDatasetError(
            f"column '{settings.target}' names {'no disorder to learn from' if controls else 'nobody without a disorder'}",
            where=cohort.root / "participants.tsv",
            fix=f"it holds {', '.join(found) or 'nothing'}; set control, exclude and where accordingly",
        )
    classes = (*controls, *named)
    return read_target(cohort, settings.target, TargetSettings(type="categorical", classes=classes, positive=named[0] if len(classes) == 2 else None), participants=participants), named  # fmt: skip


def disorder_codes(target: Target, named: Sequence[str]) -> NDArray[np.int64]:
    """(people,) 0 without a disorder, k + 1 with the k-th of ``named``."""
    code = {name: place + 1 for place, name in enumerate(named)}
    return np.array([code.get(target.classes[int(value)], alignment.CONTROL) for value in target.observed], dtype=np.int64)


def disorder_texts(named: Sequence[str], settings: AlignSettings) -> list[DisorderText]:
    """The text of every disorder.

    Raises
    ------
    InputNotFoundError
        The table describes one of them not.
    """
    table = read_disorders(settings.disorders)
    return [table.text_of(name) for name in named]


def network_membership(regions: RegionTable, words: NetworkWords) -> NDArray[np.float64]:
    """(regions, networks) share of every network of ``words`` in each region.

    From the atlas' own table where it names networks; otherwise from the distance to parcels of known network, and the names
    of the regions that are far from all of them (subcortical, cerebellar). A region that neither places has no share.
    """
    names = [network.name for network in words.networks]
    if any(regions.networks):
        own = [words.of_label(label) for label in regions.networks]
        return np.array([[name == network for network in names] for name in own], float)
    shares = near_networks(regions, names)
    for row in np.flatnonzero(shares.sum(1) == 0):
        for place in words.places(words.readable(regions.names[row]))[:1]:
            shares[row, names.index(place.network)] = 1.0
    return shares


def _write(
    folder: Path,
    model: Path,
    settings: AlignSettings,
    record: AlignmentRecord,
    target: Target,
    table: pd.DataFrame,
    texts: Sequence[DisorderText],
    fitted: Mapping[str, alignment.FittedAtlas],
) -> list[Path]:
    weights, *others = copy_backbone(model, folder)
    config = read_model_config(model).model_copy(update={"tuning": {}, "alignment": record.model_dump(mode="json")})
    written = [weights, *others, write_text(folder / "config.yaml", config.to_yaml())]
    written.append(write_tensors(folder / "text.safetensors", alignment.tensors_of({name: one.module for name, one in fitted.items()})))
    # All of the table, also what was excluded: a text is no label.
    kept = {text.name: text for text in (*read_disorders(settings.disorders).disorders, *texts)}
    described = {"disorders": [text.model_dump(mode="json", exclude_none=True) for text in kept.values()]}
    written.append(write_text(folder / "disorders.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True, width=120)))
    words = read_networks(settings.networks)
    written.append(
        write_text(folder / "networks.yaml", yaml.safe_dump(words.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))
    )
    page = alignment_page(
        {name: (one.left_out, one.steps, one.losses) for name, one in fitted.items()},
        statements=[(text.name, text.sentence, [_said(fact) for fact in text.facts(words)]) for text in texts],
        title=f"Alignment of {folder.name}",
        subtitle=f"brainfm align, column '{record.column}', {record.condition}",
        facts={"People": str(record.people), "Disorders": str(len(record.disorders)), "Text encoder": record.encoder},
    )
    return [
        *written,
        write_text(folder / "README.md", _card(folder.name, record)),
        write_text(folder / "report.html", page.render()),
        write_json(folder / "provenance.json", _provenance(model, weights, target, table, settings)),
    ]


def _said(fact: Any) -> str:  # noqa: ANN401  (a Fact)
    places = " – ".join(place.network for place in (fact.first, fact.second) if place is not None) or "(matched by the encoder)"
    return f"{fact.direction}: {places}"


def _provenance(model: Path, weights: Path, target: Target, table: pd.DataFrame, settings: AlignSettings) -> dict[str, Any]:
    values = read_provenance(model)
    tuned = sorted(participant_hash(str(table.loc[name, "dataset"]), name) for name in target.participants)
    return values | {
        "tuned_on": tuned,
        "aligned_on": tuned,
        "target": settings.target,
        "backbone": model.name,
        "backbone_sha256": file_sha256(weights),
        "tuning_seed": settings.seed,
        "versions": package_versions(),
    }


def _card(name: str, record: AlignmentRecord) -> str:
    return (
        f"# {name}\n\nA pretrained model aligned with texts of {len(record.disorders)} disorders (`{record.column}`: {', '.join(record.disorders)}) "
        f"by `brainfm align` on {record.people} people; the backbone in `model.safetensors` is unchanged.\n\n"
        f"* Atlases: {', '.join(record.atlases)}\n* Text encoder: {record.encoder}\n* Texts: `disorders.yaml`\n\n"
        "Use: `brainfm predict COHORT OUTPUT group --model THIS_FOLDER --set text.disorders=[NAME]` scores people by the text of a disorder, "
        "also of one that\nit was not aligned with, beside texts that say nothing or something else. The model is no medical device.\n"
    )


_CITATION = """# How this was made

Aligned with `brainfm align`. Cite brainfm (CITATION.cff), BrainGFM: A Brain Graph Foundation Model (Wei et al., ICLR 2026) for
disorder texts as prompts, and for the loss Sigmoid Loss for Language Image Pre-Training (Zhai et al., ICCV 2023).
"""


def _print_plan(model: Path, target: Target, settings: AlignSettings, texts: Sequence[DisorderText]) -> None:
    console = Console()
    console.print(
        f"align {model.name} with {len(texts)} texts ({settings.fit.condition}) on {len(target.participants)} people", highlight=False
    )
    words = read_networks(settings.networks)
    for text, (name, count) in zip(
        texts, [(name, count) for name, count in target.counts().items() if name not in settings.control], strict=True
    ):
        stated = "; ".join(_said(fact) for fact in text.facts(words)) or "states no coupling"
        console.print(f"  {name} ({count} people): {stated}", highlight=False)
