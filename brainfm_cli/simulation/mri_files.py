"""Write simulated patients as raw BIDS: scans and lesion masks per person; tables, reports and truth once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.bids.images import sidecar, write_image
from brainfm_cli.simulation.mri import HEALTHY, ceilings, clinical_columns, draw_patient, draw_scans, report_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from brainfm_cli.simulation.mri import MriSettings, Patient, Scans

_MASKS = "derivatives/lesions"
_REPORTS = {
    "MeasurementToolMetadata": {"Description": "Reports written from the planted facts, by the words of brainfm's lexicon"},
    "language": {"Description": "Language of the report", "Levels": {"en": "English", "zh": "Chinese"}},
    "findings": {"Description": "What is seen"},
    "impression": {"Description": "What it means"},
}


def write_patient(root: Path, settings: MriSettings, *, label: str, seed: int, index: int, effect: float) -> list[Path]:
    """Write one person's scans and mask; gives back the files."""
    patient = draw_patient(settings, seed=seed, index=index, effect=effect)
    scans = draw_scans(patient, settings, seed=seed)
    name, written = f"sub-{label}", []
    paths = {sequence: root / name / _place(name, sequence) for sequence in scans.images}
    for sequence, path in paths.items():
        written.append(write_image(path, scans.images[sequence], scans.affine, dtype=np.float32))
        written += _gradients(path) if sequence == "dwi" else []
        written.append(write_json(sidecar(path), {"Manufacturer": "simulated", "InstitutionName": patient.site}))
    mask = root / _MASKS / name / "anat" / f"{name}_label-lesion_mask.nii.gz"
    drawn_on = paths[next((one for one in paths if one != "dwi"), "dwi")]
    described = {"Type": "Lesion", "SpatialReference": f"bids:raw:{drawn_on.relative_to(root).as_posix()}", "Manual": False}
    return [*written, write_image(mask, scans.mask, scans.affine, dtype=np.uint8), write_json(sidecar(mask), described)]


def _place(name: str, sequence: str) -> str:
    return f"dwi/{name}_dwi.nii.gz" if sequence == "dwi" else f"anat/{name}_{sequence}.nii.gz"


def write_tables(root: Path, settings: MriSettings, *, labels: Mapping[int, str], seed: int, effect: float) -> list[Path]:
    """Write participants, reports and truth; everybody is drawn again."""
    patients = {index: draw_patient(settings, seed=seed, index=index, effect=effect) for index in labels}
    scans = {index: draw_scans(patient, settings, seed=seed) for index, patient in patients.items()}
    reports = {index: report_of(patient, scans[index]) for index, patient in patients.items()}
    people = pd.DataFrame([_row(labels[index], patient) for index, patient in patients.items()])
    told = pd.DataFrame(
        [
            {
                "participant_id": f"sub-{labels[index]}",
                "language": patients[index].language,
                "findings": report.findings,
                "impression": report.impression,
            }
            for index, report in reports.items()
        ]
    )
    truth = {
        "kind": "mri",
        "seed": seed,
        "effect": effect,
        "settings": settings.model_dump(mode="json"),
        "note": "Best possible: of a predictor that knows malignancy and hazard. Masks and diseases can be known without error.",
        "best_possible": ceilings(list(patients.values()), effect=effect),
        "people": [_truth(labels[index], patient, scans[index]) for index, patient in patients.items()],
    }
    lesions = {
        "Name": "Lesion masks of the simulation",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brainfm"}],
        "DatasetLinks": {"raw": "../../"},
    }
    return [
        write_tsv(root / "participants.tsv", people),
        write_json(root / "participants.json", dict(clinical_columns(settings))),
        write_tsv(root / "phenotype" / "reports.tsv", told),
        write_json(root / "phenotype" / "reports.json", _REPORTS),
        write_json(root / _MASKS / "dataset_description.json", lesions),
        write_json(root / "truth.json", truth),
    ]


def _gradients(path: Path) -> list[Path]:
    """One weighted volume along x: what the validator asks of every diffusion image."""
    stem = path.name.removesuffix(".nii.gz")
    return [write_text(path.with_name(f"{stem}.bval"), "1000\n"), write_text(path.with_name(f"{stem}.bvec"), "1\n0\n0\n")]


def _row(label: str, patient: Patient) -> dict[str, object]:
    return {
        "participant_id": f"sub-{label}",
        "age": patient.age,
        "sex": patient.sex,
        "site": patient.site,
        "split": patient.split,
        "diagnosis": patient.diagnosis,
        "grade": patient.grade,
        "follow_up_days": patient.days,
        "ending": patient.ending,
    }


def _truth(label: str, patient: Patient, scans: Scans) -> dict[str, object]:
    facts = scans.facts
    return {
        "participant": label,
        "disease": patient.disease,
        "malignancy": round(patient.malignancy, 6),
        "log_hazard": round(patient.log_hazard, 6),
        "side": patient.side if patient.disease != HEALTHY else None,
        "volume_ml": round(facts.volume_ml, 4),
        "places": {name: round(share, 4) for name, share in facts.regions},
    }
