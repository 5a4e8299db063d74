"""Simulated patients of several centres: structural and diffusion scans with planted lesions, and all that follows from them.

A head is an ellipsoid with cortex, white matter and ventricles, its folds its own. A lesion is a ball with a wavy border in one lobe
of one hemisphere; its signal by sequence tells the disease, the strength of its rim the malignancy. Malignancy drives grade, survival
and metastasis. Centres differ in gain, noise, bias field and the spacing of slices; every second person is stored from right to left.
At effect 0 nothing that is to be predicted depends on the images: diagnosis, grade and outcome are those of another draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field
from scipy import ndimage

from brainfm_cli.config import Frozen
from brainfm_cli.learning.radiology_reports import Report, write_report
from brainfm_cli.signals.lesions import LesionFacts, lesion_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

SEQUENCES = ("T1w", "ce-gadolinium_T1w", "T2w", "FLAIR", "dwi")
HEALTHY = "none"
DISEASES = ("glioblastoma", "metastasis", "meningioma", "infarct")
GRADES = (1, 2, 3, 4)
PLACES = ("frontal lobe", "parietal lobe", "temporal lobe", "occipital lobe")
_TISSUES = {  # cerebrospinal fluid, grey matter, white matter, scalp
    "T1w": (25.0, 75.0, 105.0, 90.0),
    "ce-gadolinium_T1w": (25.0, 78.0, 105.0, 110.0),
    "T2w": (150.0, 95.0, 70.0, 60.0),
    "FLAIR": (20.0, 95.0, 75.0, 60.0),
    "dwi": (20.0, 80.0, 70.0, 20.0),
}
_SIGNALS = {  # in units of the contrast between grey and white matter, in the core of the lesion
    "glioblastoma": {"T1w": -1.3, "ce-gadolinium_T1w": -1.0, "T2w": 2.0, "FLAIR": 2.0, "dwi": 1.0},
    "metastasis": {"T1w": -0.8, "ce-gadolinium_T1w": 2.2, "T2w": 1.0, "FLAIR": 1.5, "dwi": 0.8},
    "meningioma": {"T1w": 0.2, "ce-gadolinium_T1w": 3.0, "T2w": 0.3, "FLAIR": 0.4, "dwi": 1.2},
    "infarct": {"T1w": -0.9, "ce-gadolinium_T1w": -0.9, "T2w": 1.8, "FLAIR": 1.6, "dwi": 5.0},
}
_RADIUS_MM = {"glioblastoma": (13.0, 22.0), "metastasis": (8.0, 14.0), "meningioma": (10.0, 18.0), "infarct": (10.0, 20.0)}
_CONTRAST = 25.0
_RIM = 3.0  # strength of the rim on contrast T1w and FLAIR at malignancy 1, in contrasts
_HEAD_MM = np.array([70.0, 88.0, 66.0])
_LOBES = {  # centres in shares of the head's radii: lateral, anterior, superior
    "frontal lobe": (0.42, 0.45, 0.15),
    "parietal lobe": (0.42, -0.15, 0.42),
    "temporal lobe": (0.50, 0.05, -0.30),
    "occipital lobe": (0.35, -0.58, -0.02),
}
Ending = Literal["metastasis", "death", "alive"]


class MriSettings(Frozen):
    """What kind mri simulates. Part of the settings of ``simulate``."""

    voxel_mm: float = Field(default=4.0, ge=1, le=8)
    """Size of voxels within slices."""
    slice_mm: float = Field(default=5.0, ge=1, le=10)
    """Distance of slices at the first centre; the others have up to 1 mm more."""
    sequences: tuple[str, ...] = ("T1w", "T2w", "FLAIR")
    """Which of T1w, ce-gadolinium_T1w, T2w, FLAIR and dwi."""
    diseases: tuple[str, ...] = DISEASES
    """Which diseases there are; people without any are 'none'."""
    healthy_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of people without a lesion."""
    held_out: str | None = None
    """A disease that nobody of the discovery split has: for zero-shot tests."""
    num_sites: int = Field(default=3, ge=1, le=26)
    """Centres."""
    holdout_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of people marked 'holdout' in the column 'split'."""
    noise: float = Field(default=5.0, ge=0)
    """Standard deviation of noise at the first centre; grey and white matter differ by about 25."""
    chinese_share: float = Field(default=0.3, ge=0, le=1)
    """Share of reports written in Chinese."""
    hazard: float = Field(default=1.2, ge=0)
    """Log hazard ratio of malignancy from 0 to 1, for metastasis and for death."""
    age_hazard: float = Field(default=0.4, ge=0)
    """Log hazard ratio of ten years of age, for death."""
    followed_days: float = Field(default=1500.0, gt=0)
    """Longest follow-up."""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One person: what the table says and what is planted."""

    index: int
    """Number of the person, from 1."""
    site: str
    """Centre."""
    split: str
    """discovery or holdout."""
    age: float
    """Years."""
    sex: str
    """F or M."""
    disease: str
    """What the images show; 'none' where there is no lesion."""
    diagnosis: str
    """What the table says: the disease, or at effect 0 another draw."""
    malignancy: float
    """0 to 1."""
    grade: int
    """1 to 4."""
    days: float
    """Follow-up."""
    ending: Ending
    """How it ended."""
    log_hazard: float
    """Of metastasis: what a perfect predictor would know."""
    side: str
    """left or right; empty without a lesion."""
    place: str
    """Lobe; empty without a lesion."""
    radius_mm: float
    """Of the planted ball."""
    language: Literal["en", "zh"]
    """Of the report."""


@dataclass(frozen=True, kw_only=True)
class Scans:
    """The images of one person."""

    images: dict[str, NDArray[np.float32]]
    """(x, y, z) by sequence."""
    mask: NDArray[np.uint8]
    """(x, y, z) lesion."""
    affine: NDArray[np.float64]
    """(4, 4) voxels to world millimetres."""
    facts: LesionFacts
    """What is true of the mask; places are lobes."""


def draw_patient(settings: MriSettings, *, seed: int, index: int, effect: float) -> Patient:
    """Person number ``index``, who depends on the seed and the number alone."""
    rng, other = _stream(seed, index, 0), _stream(seed, index, 1)
    split = "holdout" if rng.uniform() < settings.holdout_share else "discovery"
    diseases = [name for name in settings.diseases if split == "holdout" or name != settings.held_out]
    disease = HEALTHY if rng.uniform() < settings.healthy_share else str(rng.choice(diseases))
    others = [HEALTHY, *diseases]
    diagnosis = disease if effect > 0 else str(other.choice(others))
    seen = rng.uniform()  # malignancy as the images show it
    hidden = seen if effect > 0 else other.uniform()  # that which outcomes follow
    age, sex = float(np.clip(rng.normal(58, 13), 18, 90)), str(rng.choice(["F", "M"]))
    grade = int(np.clip(np.ceil(4 * hidden + rng.normal(0, 0.35)), 1, 4)) if disease != HEALTHY else 1
    log_hazard = effect * settings.hazard * (hidden - 0.5) if disease != HEALTHY else -1.0
    death = effect * settings.age_hazard * (age - 58) / 10 + 0.5 * log_hazard
    metastasis_days, death_days = (
        float(other.exponential(scale) / np.exp(risk)) for scale, risk in ((1200.0, log_hazard), (4000.0, death))
    )
    last = float(other.uniform(0.3, 1.0) * settings.followed_days)
    days, ending = min((metastasis_days, "metastasis"), (death_days, "death"), (last, "alive"))
    place = str(rng.choice(PLACES))
    low, high = _RADIUS_MM.get(disease, (1.0, 1.0))
    return Patient(
        index=index,
        site=f"centre{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[int(rng.integers(settings.num_sites))]}",
        split=split,
        age=round(age, 1),
        sex=sex,
        disease=disease,
        diagnosis=diagnosis,
        malignancy=float(seen),
        grade=grade,
        days=round(max(days, 1.0), 1),
        ending=ending,  # type: ignore[arg-type]
        log_hazard=float(log_hazard),
        side="" if disease == HEALTHY else str(rng.choice(["left", "right"])),
        place="" if disease == HEALTHY else place,
        radius_mm=float(rng.uniform(low, high)),
        language="zh" if rng.uniform() < settings.chinese_share else "en",
    )


def draw_scans(patient: Patient, settings: MriSettings, *, seed: int) -> Scans:
    """The person's images, on a grid of the centre's own."""
    rng = _stream(seed, patient.index, 2)
    centre = _Centre.of(patient.site, settings, seed)
    shape, affine = _grid(settings, centre.slice_mm, flipped=patient.index % 2 == 0)
    world = _world(shape, affine)
    radii = _HEAD_MM * rng.normal(1.0, 0.03, 3)
    across = np.sqrt(((world / radii) ** 2).sum(axis=-1))
    folds = _smooth(rng, shape, affine, 7.0)
    tissue = np.zeros(shape, int)  # 0 outside, 1 fluid, 2 grey, 3 white, 4 scalp
    tissue[across < 1.0] = 4
    tissue[across < 0.90] = 1  # around the brain
    brain = across < 0.86 + 0.03 * folds
    tissue[brain] = 2
    tissue[brain & (across < 0.70 + 0.10 * folds)] = 3
    tissue[((world / (radii * [0.16, 0.38, 0.20])) ** 2).sum(axis=-1) < 1 + 0.3 * folds] = 1
    lesion, rim = _lesion(patient, world, radii, brain, rng, shape, affine)
    images = {}
    for name in settings.sequences:
        image = np.array([0.0, *_TISSUES[name]])[tissue]
        image = ndimage.gaussian_filter(image, 0.5) * (tissue > 0)
        if patient.disease != HEALTHY:
            core = _SIGNALS[patient.disease][name] * _CONTRAST * (1 + 0.25 * _smooth(rng, shape, affine, 6.0))
            image = image + lesion * core
            if name in {"FLAIR", "ce-gadolinium_T1w", "T2w"}:
                image = image + rim * (_RIM * patient.malignancy * _CONTRAST)
        field = 1 + centre.bias * world[..., 1] / radii[1]
        image = centre.gain * (image * field + rng.normal(0, centre.noise, shape) * (tissue > 0))
        images[name] = np.where(tissue > 0, np.clip(image, 1.0, None), 0.0).astype(np.float32)
    mask = lesion.astype(np.uint8)
    lobes = _lobes(world, radii)
    facts = lesion_facts(mask, affine, labels=lobes * brain, names=dict(enumerate(PLACES, start=1)))
    return Scans(images=images, mask=mask, affine=affine, facts=facts)


def report_of(patient: Patient, scans: Scans) -> Report:
    """What a radiologist who sees everything would write."""
    measured = scans.facts
    if patient.disease == HEALTHY:
        return write_report(measured, language=patient.language)
    return write_report(measured, language=patient.language, disease=patient.disease)


def ceilings(patients: list[Patient], *, effect: float) -> dict[str, float | None]:
    """How well a predictor that knows malignancy does, by the people simulated: κ of the grade, concordance of metastasis."""
    from sklearn.metrics import cohen_kappa_score

    from brainfm_cli.learning.survival import Outcome, weighted_harrell

    ill = [one for one in patients if one.disease != HEALTHY]
    grade = np.array([one.grade for one in ill])
    guess = np.clip(np.ceil(4 * np.array([one.malignancy for one in ill])), 1, 4).astype(int)
    kappa = float(cohen_kappa_score(grade, guess, weights="quadratic")) if effect > 0 and len(set(grade)) > 1 else None
    outcome = Outcome(
        time=np.array([one.days for one in ill]),
        event=np.array([one.ending == "metastasis" for one in ill]),
        competing=np.array([one.ending == "death" for one in ill]),
    )
    harrell = None
    if effect > 0 and outcome.event.any():
        known = weighted_harrell(outcome, np.array([one.log_hazard for one in ill]))
        harrell = float(known(np.ones((1, len(ill))))[0])
    return {"grade_quadratic_kappa": kappa, "metastasis_concordance": harrell}


@dataclass(frozen=True)
class _Centre:
    gain: float
    noise: float
    bias: float
    slice_mm: float

    @classmethod
    def of(cls, site: str, settings: MriSettings, seed: int) -> _Centre:
        number = ord(site[-1]) - ord("A")
        rng = _stream(seed, number, 3)
        return cls(
            gain=float(np.exp(rng.normal(0, 0.4))),
            noise=settings.noise * float(np.exp(0.3 * number / max(settings.num_sites - 1, 1))),
            bias=float(rng.normal(0, 0.08)),
            slice_mm=settings.slice_mm + (number % 3) * 0.5,
        )


def _grid(settings: MriSettings, slice_mm: float, *, flipped: bool) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    sizes = np.array([settings.voxel_mm, settings.voxel_mm, slice_mm])
    shape = np.ceil(2.2 * _HEAD_MM / sizes).astype(int)
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -sizes * (shape - 1) / 2
    if flipped:
        affine[0] *= -1
    return (int(shape[0]), int(shape[1]), int(shape[2])), affine


def _world(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world: NDArray[np.float64] = grid @ affine[:3, :3].T + affine[:3, 3]
    return world


def _lesion(
    patient: Patient,
    world: NDArray[np.float64],
    radii: NDArray[np.float64],
    brain: NDArray[np.bool_],
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The lesion and its rim."""
    if patient.disease == HEALTHY:
        return np.zeros(shape, bool), np.zeros(shape, bool)
    lateral, anterior, superior = _LOBES[patient.place]
    towards = -1 if patient.side == "left" else 1
    centre = radii * [towards * lateral, anterior, superior] + rng.normal(0, 4.0, 3)
    distance = np.sqrt(((world - centre) ** 2).sum(axis=-1)) * (1 + 0.15 * _smooth(rng, shape, affine, 8.0))
    # no lesion crosses the midline, so that its side is known
    half = world[..., 0] * towards > 1.0
    lesion = (distance < patient.radius_mm) & brain & half
    if not lesion.any():
        nearest = np.unravel_index(np.argmin(np.where(brain & half, distance, np.inf)), shape)
        lesion[nearest] = True
    return lesion, lesion & (distance > 0.7 * patient.radius_mm)


def _lobes(world: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of the nearest lobe's centre, from 1; both hemispheres alike."""
    placed = np.abs(world) * [1, 0, 0] + world * [0, 1, 1]
    distances = [((placed - radii * np.array(_LOBES[name])) ** 2).sum(axis=-1) for name in PLACES]
    nearest: NDArray[np.int64] = np.argmin(np.stack(distances), axis=0) + 1
    return nearest


def _smooth(rng: np.random.Generator, shape: tuple[int, int, int], affine: NDArray[np.float64], sigma_mm: float) -> NDArray[np.float64]:
    """Smooth noise of unit spread."""
    sizes = np.abs(np.diag(affine)[:3])
    values = ndimage.gaussian_filter(rng.standard_normal(shape), sigma_mm / sizes)
    unit: NDArray[np.float64] = values / max(float(values.std()), 1e-12)
    return unit


def _stream(seed: int, number: int, purpose: int) -> np.random.Generator:
    """0 who someone is, 1 what befalls them, 2 how they look, 3 a centre."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3, number, purpose)))


def clinical_columns(settings: MriSettings) -> Mapping[str, object]:
    """participants.json of what is simulated."""
    return {
        "age": {"Description": "Age", "Units": "year"},
        "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
        "site": {"Description": "Centre of the scanner"},
        "split": {"Description": "Random parts of unequal size", "Levels": {"discovery": "to learn from", "holdout": "to test on"}},
        "diagnosis": {"Description": "Simulated disease", "Levels": {name: name for name in (*settings.diseases, HEALTHY)}},
        "grade": {
            "Description": "Grade of the lesion, in rising order; 1 without a lesion",
            "Levels": {str(one): f"grade {one}" for one in GRADES},
        },
        "follow_up_days": {"Description": "Follow-up after the scan", "Units": "day"},
        "ending": {
            "Description": "How the follow-up ended",
            "Levels": {
                "metastasis": "metastasis",
                "death": "death without metastasis",
                "alive": "alive and free of metastasis when last seen",
            },
        },
    }
