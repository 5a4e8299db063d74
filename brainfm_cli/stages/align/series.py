"""align for drug-response: the series encoder learns, without labels, which connectivity is of the same scan."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console

from brainfm_cli.atlases.catalogue import atlas_labels
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_bytes, write_json, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import UnsupportedStageError
from brainfm_cli.learning.checkpoints import model_files, read_model_config, read_provenance, source_of_model, write_tensors
from brainfm_cli.learning.loop import OptimiserSettings, train
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, whole_training_scans
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.provenance import file_sha256, package_versions
from brainfm_cli.reports.training import training_page
from brainfm_cli.systems import load_system
from brainfm_cli.systems.drug_response import DrugResponse
from brainfm_cli.systems.drug_response.pairs import PairFactory, PairSettings

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.pretraining import Prepared

_CITATION = """# How this was made

Aligned with `brainfm align`. Cite brainfm (CITATION.cff) and, for the contrast of two views of one scan,
A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020).
"""


class SeriesAlignSettings(PretrainingSettings):
    """Settings of ``brainfm align`` for a drug-response model."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the data."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=2e-4)
    """Learning rate and decay; lower than in pretraining, whose weights are refined."""
    pair: PairSettings = PairSettings()
    """How series and connectivity are drawn together."""


def align_series(call: Invocation, model: Path, settings: SeriesAlignSettings) -> int:
    """Align and write ``models/<id>``; gives back the exit code."""
    cohort = Cohort.open(call.input_dir)
    config = read_model_config(model)
    if config.tuning:
        raise UnsupportedStageError("the model was tuned for a target: its encoder must stay as it is", where=model, fix="give the model of 'brainfm pretrain'")  # fmt: skip
    wanted = atlas_labels(settings.atlases, cohort.atlases, call.datasets) or tuple(label for label in sorted(cohort.atlases) if label in config.atlases)  # fmt: skip
    settings = settings.model_copy(update={"atlases": wanted or tuple(sorted(cohort.atlases))})
    people = select_participants(cohort, settings.where, call.selection.participant_label)
    if call.dry_run:
        prepared = _prepared(model, settings, cohort, people)
        Console().print(f"align {model.name}: series and connectivity of {len(prepared.training)} people, {len(prepared.validation)} held out, {settings.epochs} epochs", highlight=False)  # fmt: skip
        return 0
    dataset = OutputDataset.open(
        call.output_dir, command="align", settings=settings, sources=[call.input_dir, source_of_model(model)], citation=_CITATION
    )
    folder = dataset.root / "models" / f"{config.system['kind']}-pairs-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "folder": folder,
        "settings": settings,
        "execution": call.execution,
        "people": tuple(people),
    }
    unit = Unit(name=f"model-{folder.name}", inputs=(*cohort.files, *model_files(model)), work=write_series_model, arguments=arguments)
    code = run_units(dataset, [unit], call.execution)
    if code == 0:  # only now: until the record is written, a killed run must be able to go on
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


def write_series_model(
    cohort_dir: Path, model: Path, folder: Path, settings: SeriesAlignSettings, execution: Execution, people: tuple[str, ...]
) -> UnitResult | None:
    """Align on ``people`` and write a model folder that needs no other."""
    prepared = _prepared(model, settings, Cohort.open(cohort_dir), people)
    result = train(prepared.system, prepared.source, settings.plan, execution, folder / "checkpoints")
    if not result.is_first_rank:
        result.barrier()
        return None
    prepared.system.module.load_state_dict(result.weights)
    given = prepared.system.given
    given.module.eval()
    given.fit_readout(whole_training_scans(prepared))  # the encoder is another one now
    weights = write_tensors(folder / "model.safetensors", given.module.state_dict())
    written = [
        weights,
        write_text(folder / "config.yaml", read_model_config(model).to_yaml()),
        write_bytes(folder / "normalisation.json", (model / "normalisation.json").read_bytes()),
        write_text(folder / "log.csv", result.log.to_csv()),
        write_text(folder / "README.md", _card(folder.name, model, prepared)),
        write_text(folder / "report.html", _report(folder.name, prepared, result)),
        write_json(folder / "provenance.json", _provenance(model, weights, prepared, settings)),
    ]
    result.barrier()
    return UnitResult(outputs=tuple(written), seed=settings.seed)


def _prepared(model: Path, settings: SeriesAlignSettings, cohort: Cohort, people: list[str] | tuple[str, ...]) -> Prepared:
    system = load_system(model)
    if not isinstance(system, DrugResponse):
        raise UnsupportedStageError(
            "only a drug-response model is aligned with connectivity", where=model, fix="give the model of 'brainfm pretrain'"
        )
    system.module.train()
    return prepare(PairFactory(given=system, settings=settings.pair), settings, cohort, people)


def _provenance(model: Path, weights: Path, prepared: Prepared, settings: SeriesAlignSettings) -> dict[str, object]:
    values = read_provenance(model)
    datasets = prepared.source.cohort.dataset_of
    seen = {participant_hash(datasets[name], name) for name in (*prepared.training, *prepared.validation)}
    return values | {
        # Series of these people shaped the encoder, without any label.
        "aligned_on": sorted({*values.get("aligned_on", ()), *seen}),
        "backbone": model.name,
        "backbone_sha256": file_sha256(weights),
        "alignment_seed": settings.seed,
        "versions": package_versions(),
    }


def _card(name: str, model: Path, prepared: Prepared) -> str:
    return (
        f"# {name}\n\nThe series encoder of `{model.name}`, aligned by `brainfm align` with the connectivity of {len(prepared.training)} people's own scans, "
        f"without labels.\n\n* Atlases: {', '.join(prepared.atlases)}\n\nUse it like the pretrained model: `brainfm prompt-tune COHORT OUTPUT group --model THIS_FOLDER "
        "--target COLUMN`.\nWhether alignment helps must be measured: evaluate both models on the same people. The model is no medical device.\n"
    )


def _report(name: str, prepared: Prepared, result: TrainingResult) -> str:
    facts = {"People": str(len(prepared.training)), "Held out": str(len(prepared.validation)), "Steps": str(result.position.step)}
    note = "monitor_own_first: share of scans whose own connectivity is nearest to their series; chance is one over the scans of a batch."
    page = training_page(
        result.log,
        title=f"Alignment of {name}",
        subtitle="brainfm align, series with connectivity of the same scan",
        facts=facts,
        notes=(note,),
    )
    return page.render()
