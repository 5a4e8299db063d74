"""Pages of participants, always built from the files, so that ``--reports-only`` gives the same page."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.bids.derivatives import write_text
from brainfm_cli.bids.parcellations import read_regions
from brainfm_cli.bids.series_inputs import find_series, read_series
from brainfm_cli.config import Selection
from brainfm_cli.errors import EXIT_OK, InputNotFoundError, combined_exit_code
from brainfm_cli.provenance import outputs_hold, read_record, record_path, stamp_output
from brainfm_cli.records import RegionTable
from brainfm_cli.signals.connectivity import pearson

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.bids.derivatives import OutputDataset
    from brainfm_cli.bids.series_inputs import ReadySeries
    from brainfm_cli.provenance import UnitRecord
    from brainfm_cli.reports.parcellation import AtlasSummary, RunSummary
    from brainfm_cli.stages.parcellate.settings import ParcellateSettings

log = logging.getLogger(__name__)
_CITATIONS = (
    "Esteban, O., et al. (2019). fMRIPrep: a robust preprocessing pipeline for functional MRI. Nature Methods, 16, 111-116.",
    "Abraham, A., et al. (2014). Machine learning for neuroimaging with scikit-learn. Frontiers in Neuroinformatics, 8, 14.",
    "Power, J. D., et al. (2014). Methods to detect, characterize, and remove motion artifact in resting state fMRI. NeuroImage, 84, 320-341.",
)


def write_participant_page(root: Path, label: str, settings: ParcellateSettings) -> Path:
    """Write ``sub-<label>.html`` from the participant's series files; gives back its path."""
    from brainfm_cli.reports.parcellation import participant_page

    ready = [read_series(files) for files in find_series(root, label, Selection())]
    notes = list(dict.fromkeys(note for one in ready for note in one.metadata.get("Notes", ())))
    labels = sorted({one.files.atlas for one in ready})
    page = participant_page(
        label,
        _summaries(root, ready, settings),
        methods=methods(settings, labels, ready[0].metadata),
        citations=citations(labels),
        notes=tuple(notes),
    )
    return write_text(root / f"sub-{label}.html", page.render())


def rebuild_participants(dataset: OutputDataset, labels: Sequence[str], settings: ParcellateSettings) -> int:
    """Write the pages of finished participants again; gives back the exit code."""
    codes = []
    for label in labels:
        record = read_record(record_path(dataset.root, f"sub-{label}"))
        if record is None or record.status != "done":
            error = InputNotFoundError(
                f"sub-{label} has no finished results to report on", where=dataset.root, fix="run without --reports-only first"
            )
            log.error("%s", error)
            codes.append(error.exit_code)
            continue
        if not outputs_hold(record, dataset.root):
            log.warning("sub-%s: results of its record are missing or changed; run without --reports-only", label)
        restamp(dataset, record, [write_participant_page(dataset.root, label, settings)])
        codes.append(EXIT_OK)
    return combined_exit_code(codes)


def restamp(dataset: OutputDataset, record: UnitRecord, written: Sequence[Path]) -> None:
    """Let a record know that some of its outputs were written again."""
    stamps = {stamp.path: stamp for stamp in record.outputs}
    stamps |= {stamp.path: stamp for stamp in (stamp_output(path, root=dataset.root) for path in written)}
    dataset.write_record(record.model_copy(update={"outputs": tuple(stamps[path] for path in sorted(stamps))}))


def methods(settings: ParcellateSettings, labels: Sequence[str], metadata: dict[str, Any]) -> str:
    """The methods paragraph of a paper."""
    atlases = ", ".join(labels)
    rule = f"Regions with less than {settings.min_coverage:.0%} of their voxels inside the brain mask were left out."
    measures = {"pearson": "Pearson correlation", "fisherz": "its Fisher z transform", "partial": "partial correlation from the Ledoit-Wolf covariance"}  # fmt: skip
    edges = f"Connectivity was measured as {', '.join(measures[kind] for kind in settings.matrices)}." if settings.matrices else ""
    if isinstance(metadata.get("Denoising"), str):
        return f"Region series in {atlases} were {metadata['Denoising']}. {rule} {edges}".strip()
    denoise, columns = settings.denoise, metadata.get("Confounds", ())
    band = f" Series were filtered ({denoise.high_pass or 0:g} to {denoise.low_pass or 'no upper limit'} Hz)." if denoise.high_pass or denoise.low_pass else ""  # fmt: skip
    scrubbed = f" Frames with framewise displacement above {denoise.fd_threshold:g} mm or standardised DVARS above {denoise.std_dvars_threshold:g} were left out." if denoise.base == "scrubbing" else ""  # fmt: skip
    return (
        f"Preprocessed BOLD series were averaged over the regions of {atlases} within the brain mask. {rule} "
        f"The averages were denoised with the strategy '{denoise.strategy}' of nilearn ({len(columns)} confound regressors); "
        f"non-steady-state frames were left out.{scrubbed}{band} {edges}"
    ).strip()


def citations(labels: Sequence[str]) -> tuple[str, ...]:
    """What to cite for these atlases and for the methods."""
    found = []
    for label in labels:
        try:
            found.append(find_atlas(label).citation)
        except InputNotFoundError:
            continue  # an atlas of a dataset: its description in the output names the reference
    return tuple(dict.fromkeys([*_CITATIONS, *(text for text in found if text)]))


def _summaries(root: Path, ready: Sequence[ReadySeries], settings: ParcellateSettings) -> tuple[RunSummary, ...]:
    from brainfm_cli.reports.parcellation import RunSummary

    by_run: dict[str, list[ReadySeries]] = {}
    for one in ready:
        by_run.setdefault(f"{one.files.key.name}_{one.files.space}", []).append(one)
    return tuple(
        RunSummary(
            key=group[0].files.key,
            space=group[0].files.space or "unknown",
            repetition_time_s=group[0].repetition_time_s,
            fd=_fd(group[0].metadata),
            kept=kept_frames(group[0].metadata, len(group[0].values)),
            atlases=tuple(_atlas_summary(root, one) for one in group),
            fd_threshold_mm=settings.denoise.fd_threshold,
        )
        for group in by_run.values()
    )


def _atlas_summary(root: Path, ready: ReadySeries) -> AtlasSummary:
    from brainfm_cli.reports.parcellation import AtlasSummary

    regions = read_regions(root, ready.files.atlas, ready.files.space or "unknown") or RegionTable(names=ready.names)
    return AtlasSummary(
        atlas=ready.files.atlas,
        series=ready.values,
        coverage=ready.coverage,
        regions=regions,
        correlation=pearson(ready.values),
        notes=tuple(ready.metadata.get("Notes", ())),
    )


def kept_frames(metadata: dict[str, Any], frames: int) -> NDArray[np.bool_]:
    """(all frames,) which frames of the run are in the series, from its sidecar."""
    kept = np.ones(int(metadata.get("FramesTotal", frames)), bool)
    kept[list(metadata.get("FramesLeftOut", ()))] = False
    return kept


def _fd(metadata: dict[str, Any]) -> NDArray[np.float64] | None:
    values = metadata.get("FramewiseDisplacement")
    return None if values is None else np.array([np.nan if value is None else value for value in values], float)
