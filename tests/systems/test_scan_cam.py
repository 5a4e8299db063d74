"""Maps find planted lesions, more than chance and more than a random encoder does; Grad-CAM is that of captum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm_cli.config import Execution
from brainfm_cli.learning.localisation import localise, random_agreement
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.scan_tuning import divide_for_tuning
from brainfm_cli.systems.mri_language import MriLanguageSettings
from brainfm_cli.systems.mri_language.cam import cam_chances, last_map, study_cam
from brainfm_cli.systems.mri_language.outcomes import StudyTask
from brainfm_cli.systems.mri_language.tuning import fit_studies, random_twin
from tests.learning.slice_cohorts import write_slice_cohort

CPU = Execution(device="cpu", precision="32-true")


def planted(people: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """Every second head has a bright lesion in one or two of its slices."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 64),) * 2, indexing="ij"))
    head = (grid**2).sum(0) < 0.8
    items, masks, labels = {}, {}, {}
    for number in range(people):
        centre = rng.uniform(-0.4, 0.4, 2)
        lesion = head & (((grid - centre[:, None, None]) ** 2).sum(0) < 0.06) & bool(number % 2)
        drawn = np.stack([lesion & (place in (1, 2)) for place in range(4)])
        image = np.where(head, 90 + rng.normal(0, 8, (4, 64, 64)), 0) + 120 * drawn
        items[f"{number:02d}"], masks[f"{number:02d}"] = np.clip(image, 0, 255).astype(np.uint8), drawn.astype(np.uint8)
        labels[f"{number:02d}"] = number % 2
    return items, masks, labels


def test_the_map_lies_on_planted_lesions_and_passes_the_randomisation_check(tmp_path: Path) -> None:
    items, masks, labels = planted(40)
    cohort = write_slice_cohort(tmp_path / "cohort", items, masks=masks)
    torch.manual_seed(0)
    system = MriLanguageSettings.from_values({"kind": "mri-language", "preset": "nano"}).build()
    task = StudyTask(kind="classification", labels=labels, count=2)
    people = divide_for_tuning({k: str(v) for k, v in labels.items()}, dict.fromkeys(labels, "tests"), (), test=0.3, validation=0.2, seed=0, transductive=False)  # fmt: skip
    plan = ScheduleSettings(epochs=10, batch_size=8, patience=10, optimiser=OptimiserSettings(learning_rate=3e-3)).plan(0)
    encoder = system.model.encoder
    fitted = fit_studies(encoder, cohort, task, people, plan, batch_size=8, execution=CPU, folder=tmp_path / "a")
    twin = random_twin(system, seed=3).model.encoder
    nothing = np.zeros(0, np.float32)
    for method in ("gradcam", "hirescam"):
        found, random, agreement = [], [], []
        for label in (one for one in people.role("test") if labels[one]):
            head, mask = items[label] > 0, masks[label] > 0
            rows, values = study_cam(encoder, fitted.head, task, cohort, label, nothing, method=method)
            _, other = study_cam(twin, fitted.head, task, cohort, label, nothing, method=method)
            assert rows.tolist() == np.flatnonzero(cohort.slices["participant"] == label).tolist()
            assert values.min() >= 0
            assert values.max() == pytest.approx(1)
            assert not values[~head].any()
            found.append(localise(values, mask, head).gain)
            random.append(localise(other, mask, head).gain or 0.0)
            agreement.append(random_agreement(values, other, head) or 0.0)
        assert np.mean(found) > 3
        assert np.mean(found) > 2 * np.mean(random)
        assert np.mean(agreement) < 0.7
    scan = cohort.scans(people.role("test")[0])[0]
    rows, values = study_cam(encoder, fitted.head, task, cohort, people.role("test")[0], nothing, method="hirescam")
    np.testing.assert_allclose(cam_chances(cohort, rows, values)([scan])[1], values)


@pytest.mark.parametrize("backbone", ["hybrid", "convnext", "transformer"])
def test_the_weights_are_mean_gradients_of_the_last_map(backbone: str, tmp_path: Path) -> None:
    """One slice, against captum."""
    from captum.attr import LayerGradCam

    from brainfm_cli.models.mri_encoder import Context
    from brainfm_cli.systems.mri_language.classification import encode_studies, features_of, new_head

    items, _, labels = planted(2)
    cohort = write_slice_cohort(tmp_path / "cohort", {label: pixels[1:2] for label, pixels in items.items()})
    torch.manual_seed(0)
    encoder = MriLanguageSettings.from_values({"kind": "mri-language", "preset": "nano", "backbone": backbone}).build().model.encoder.eval()
    task = StudyTask(kind="grading", labels=labels, count=2)
    head = new_head(task, encode_studies(encoder, cohort, ["01"]).slices["01"].shape[1], 0, ("00", "01"), seed=0).eval()
    nothing = torch.zeros(1, 0)

    def forward(images: torch.Tensor) -> torch.Tensor:
        context = Context(sequence=torch.zeros(1, dtype=torch.int64), plane=torch.zeros(1, dtype=torch.int64), z_mm=torch.zeros(1))
        return head(features_of(encoder(images, context))[None], torch.ones(1, 1, dtype=torch.bool), nothing)[0]

    pixels = torch.from_numpy(items["01"][1:2]).float() / 255
    oracle = LayerGradCam(forward, last_map(encoder)).attribute(pixels, target=0, relu_attributions=True)
    expected = torch.nn.functional.interpolate(oracle, size=(64, 64), mode="bilinear", align_corners=False)[0, 0] * (pixels[0] > 0)
    _, values = study_cam(encoder, head, task, cohort, "01", np.zeros(0, np.float32), method="gradcam")
    np.testing.assert_allclose(values[0], (expected / expected.max().clamp_min(1e-12)).detach().numpy(), atol=1e-4)
