"""predict participant for mri-language: class activation volumes in the grid of the files, pictures, and how well they lie on drawn lesions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.bids.derivatives import write_bytes, write_json
from brainfm_cli.bids.names import output_name, parse_name
from brainfm_cli.learning.localisation import Localisation, localise, random_agreement
from brainfm_cli.reports.scan_cam import cam_picture
from brainfm_cli.signals.segmentations import native_chances
from brainfm_cli.systems.mri_language import NOT_CLINICAL
from brainfm_cli.systems.mri_language.cam import cam_chances, study_cam

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort
    from brainfm_cli.models.mri_encoder import MriEncoder
    from brainfm_cli.models.study_head import GatedAttentionHead
    from brainfm_cli.signals.drawn_lesions import DrawnLesions
    from brainfm_cli.systems.mri_language.cam import CamMethod
    from brainfm_cli.systems.mri_language.outcomes import StudyTask


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What is explained, and by what it is checked."""

    encoder: MriEncoder
    """As tuned."""
    twin: MriEncoder
    """With random weights, for the check."""
    head: GatedAttentionHead
    """As tuned."""
    task: StudyTask
    """What was asked."""
    truth: DrawnLesions
    """Lesion masks, where there are any."""
    method: CamMethod
    """How maps are made."""


def write_cams(explained: Explained, cohort: SliceCohort, label: str, root: Path, clinical: NDArray[np.float32]) -> tuple[list[dict[str, Any]], list[Path]]:  # fmt: skip
    """One volume and picture per native grid, and by grid its scores."""
    rows, values = study_cam(explained.encoder, explained.head, explained.task, cohort, label, clinical, method=explained.method)
    _, random = study_cam(explained.twin, explained.head, explained.task, cohort, label, clinical, method=explained.method)
    shown = np.asarray(cohort.items(rows) / np.float32(255), np.float32)
    scans = cohort.scans(label)
    layers: list[NDArray[np.float32]] = [values, random, shown, np.asarray(shown > 0, np.float32)]
    placed = [native_chances(scans, cam_chances(cohort, rows, one)) for one in layers]
    said: list[dict[str, Any]] = []
    files: list[Path] = []
    for cam, twin, image, head in zip(*placed, strict=True):
        inside = head.chances[1] > 0.5
        drawn = explained.truth.labels(label, cam.reference.name)
        mask = None if drawn is None or not (drawn > 0).any() else drawn > 0
        path = cam.save_values(cam.chances[1] * inside, beside_scan(root, label, cam.reference, "cam"))
        stem = path.name.partition(".")[0]
        found: Localisation | None = None if mask is None else localise(cam.chances[1], mask, inside)
        scores = {
            "image": path.relative_to(root).as_posix(),
            "agreement_with_random_encoder": _rounded(random_agreement(cam.chances[1], twin.chances[1], inside)),
            "localisation": None if found is None else {**{key: _rounded(value) for key, value in found.model_dump().items()}, "gain": _rounded(found.gain)},
        }  # fmt: skip
        described = {
            "SpatialReference": f"bids::{cam.reference.path}", "Sources": list(cam.scans),
            "Method": explained.method,
            "Description": f"Where the last convolution map speaks for the answer, 0 to 1 over the study; {NOT_CLINICAL}", **scores,
        }  # fmt: skip
        picture = cam_picture(
            image.chances[1], cam.chances[1] * inside, mask, axis=cam.reference.normal, title=f"{cam.reference.name}; {NOT_CLINICAL}"
        )
        files += [
            path,
            write_json(path.with_name(f"{stem}.json"), described),
            write_bytes(root / f"sub-{label}" / "figures" / f"{stem}.png", picture),
        ]
        said.append(scores)
    return said, files


def _rounded(value: Any) -> Any:  # noqa: ANN401  (numbers, flags or none)
    return round(value, 6) if isinstance(value, float) else value


def beside_scan(root: Path, label: str, scan: PackedScan, kind: str) -> Path:
    """Where an image of ``kind`` in the grid of a scan is written."""
    entities, suffix, _ = parse_name(f"{scan.name}.nii.gz")
    # scans of other grids would have the same name: the space is that of the scan named by its suffix
    kept = {key: value for key, value in entities.items() if key != "desc"}
    name = output_name(kind, {**kept, "space": entities.get("space", suffix)})
    session = f"ses-{scan.session}" if scan.session else ""
    return root / f"sub-{label}" / session / Path(scan.path).parent.name / name
