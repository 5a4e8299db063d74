"""Heads on the frozen MRI encoder: who tests, what attention weighs, what the decoder learns, and the encoder that stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm_cli.config import Execution
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.image_objectives import dice_and_entropy
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.scan_tuning import classification_scores, divide_for_tuning, mean_scores
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.models.mri_decoder import MriSegmenter
from brainfm_cli.models.mri_encoder import Context
from brainfm_cli.models.study_head import GatedAttentionHead
from brainfm_cli.signals.segmentations import to_labels
from brainfm_cli.systems.mri_language import MriLanguageSettings
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings
from brainfm_cli.systems.mri_language.outcomes import StudyTask
from brainfm_cli.systems.mri_language.tuning import encoder_hash, fit_mean_mask, fit_segmenter, fit_studies, fit_temperature, sharpen
from tests.learning.slice_cohorts import write_slice_cohort

CPU = Execution(device="cpu", precision="32-true")


def encoder(backbone: str = "hybrid", dims: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return (
        MriLanguageSettings.from_values({"kind": "mri-language", "preset": "nano", "backbone": backbone, "dims": dims})
        .build()
        .model.encoder
    )


def test_only_unseen_people_test_and_classes_are_spread() -> None:
    strata = {f"{n:02d}": "ab"[n % 2] for n in range(40)}
    datasets = dict.fromkeys(strata, "d")
    seen = {participant_hash("d", f"{n:02d}") for n in range(20)}
    split = divide_for_tuning(strata, datasets, seen, test=0.3, validation=0.2, seed=0, transductive=False)
    test = split.role("test")
    assert len(test) == 12
    assert all(int(label) >= 20 for label in test)
    assert sum(strata[label] == "a" for label in test) == 6
    assert (len(split.role("validation")), len(split.role("train")), split.seen_in_test) == (6, 22, 0)
    everybody = {participant_hash("d", label) for label in strata}
    with pytest.raises(InputDatasetError, match="0 are left to test, 12 are needed"):
        divide_for_tuning(strata, datasets, everybody, test=0.3, validation=0.2, seed=0, transductive=False)
    assert divide_for_tuning(strata, datasets, everybody, test=0.3, validation=0.2, seed=0, transductive=True).seen_in_test == 12


def test_attention_ignores_absent_slices_and_finds_the_telling_one() -> None:
    torch.manual_seed(0)
    head = GatedAttentionHead(8, 2, width=16, dropout=0.0)
    slices, present = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    present[:, 3:] = False
    first, weights = head(slices, present)
    slices[:, 3:] = 1e3
    second, _ = head(slices, present)
    assert torch.equal(first, second)
    assert torch.allclose(weights.sum(1), torch.ones(3))
    assert weights[:, 3:].abs().max() == 0
    optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(150):
        given = 0.3 * torch.randn(32, 6, 8)
        labels = torch.arange(32) % 2
        given[torch.arange(32), torch.randint(6, (32,)), 0] = torch.where(labels == 1, 4.0, -4.0)
        logits, weights = head(given, torch.ones(32, 6, dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    telling = given[:, :, 0].abs().argmax(1)
    assert weights[torch.arange(32), telling].mean() > 0.5  # one of six


@pytest.mark.parametrize(("backbone", "dims"), [("hybrid", 2), ("convnext", 2), ("transformer", 2), ("hybrid", 3)])
def test_the_decoder_learns_a_mask_and_the_encoder_stays(backbone: str, dims: int) -> None:
    frozen = encoder(backbone, dims)
    before = encoder_hash(frozen)
    model = MriSegmenter(frozen, 2, width=16)
    images = torch.rand(2, *(32,) * dims) * 0.3
    labels = torch.zeros(images.shape, dtype=torch.int64)
    labels[:, 8:20, 10:24] = 1
    images = images + 0.5 * labels
    context = Context(sequence=torch.zeros(2, dtype=torch.int64), plane=torch.zeros(2, dtype=torch.int64), z_mm=torch.zeros(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(25 if dims == 2 else 12):
        dice, entropy = dice_and_entropy(model(images, context), labels)
        optimiser.zero_grad()
        (dice + entropy).backward()
        optimiser.step()
    predicted = model(images, context).argmax(1)
    found = 2 * (predicted & labels).sum() / (predicted.sum() + labels.sum())
    assert found > 0.9
    assert encoder_hash(frozen) == before


def test_dice_loss_against_its_definition() -> None:
    labels = torch.tensor([[[0, 1], [2, 1]]])
    sure = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float() * 40
    dice, entropy = dice_and_entropy(sure, labels)
    assert float(dice) == pytest.approx(0, abs=1e-4)
    assert float(entropy) == pytest.approx(0, abs=1e-4)
    wrong = torch.zeros(1, 4, 2, 2)
    wrong[:, 0] = 40
    dice, _ = dice_and_entropy(wrong, labels)
    assert float(dice) == pytest.approx(((1 - 1 / 3) + (1 - 1 / 2)) / 2, abs=1e-4)  # classes 1 and 2 occur, 3 does not


def heads(people: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """Slices of heads with a bright lesion on the left or, for the other class, on the right; and its mask."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 32),) * 2, indexing="ij"))
    items, masks, labels = {}, {}, {}
    for number in range(people):
        label, kind = f"{number:02d}", number % 2
        centre = np.array([0.4 if kind else -0.4, rng.uniform(-0.3, 0.3)])
        lesion = ((grid - centre[:, None, None]) ** 2).sum(0) < 0.05
        head = (grid**2).sum(0) < 0.8
        stack = []
        for place in range(4):
            image = head * (90 + rng.normal(0, 8, head.shape)) + (110 * lesion if place in (1, 2) else 0)
            stack.append(np.clip(np.where(head, image, 0), 0, 255).astype(np.uint8))
        items[label] = np.stack(stack)
        masks[label] = np.stack([(lesion & head).astype(np.uint8) * (place in (1, 2)) for place in range(4)])
        labels[label] = kind
    return items, masks, labels


def test_sides_are_told_apart_and_lesions_found_on_a_frozen_encoder(tmp_path: Path) -> None:
    items, masks, labels = heads(24)
    cohort = write_slice_cohort(tmp_path / "cohort", items, masks=masks)
    split = divide_for_tuning(
        {k: str(v) for k, v in labels.items()}, dict.fromkeys(labels, "tests"), (), test=0.3, validation=0.2, seed=0, transductive=False
    )
    frozen = encoder()
    before = encoder_hash(frozen)
    schedule = ScheduleSettings(epochs=25, batch_size=8, patience=25, optimiser=OptimiserSettings(learning_rate=3e-3))
    task = StudyTask(kind="classification", labels=labels, count=2)
    fitted = fit_studies(frozen, cohort, task, split, schedule.plan(0), batch_size=8, execution=CPU, folder=tmp_path / "c")  # type: ignore[arg-type]
    test = split.role("test")
    truth = np.array([labels[label] for label in test])
    scores = classification_scores(truth, {"model": fitted.answer(test)}, classes=2, seed=0)
    auroc = scores[scores["score"] == "AUROC"].iloc[0]
    assert auroc["value"] > 0.9
    short = ScheduleSettings(epochs=8, batch_size=8, patience=8, optimiser=OptimiserSettings(learning_rate=5e-3))
    segmenter, _ = fit_segmenter(
        frozen, cohort, split, short.plan(0), values=(1,), augment=AugmentSettings(), batch_size=8, execution=CPU, folder=tmp_path / "s"
    )  # type: ignore[arg-type]
    assert encoder_hash(frozen) == before
    common = both = floor = claimed = 0.0
    mean = fit_mean_mask(cohort, split.role("train"), (1,))
    from brainfm_cli.systems.mri_language.segmentation import lesion_chances

    for label in test:
        chances = lesion_chances(segmenter, cohort, label, cohort.scans(label))
        assert np.allclose(chances.sum(0), 1, atol=1e-5)
        predicted = chances.argmax(0) > 0
        common += 2 * (predicted & (masks[label] > 0)).sum()
        both += predicted.sum() + (masks[label] > 0).sum()
        rows = cohort.slices[cohort.slices["participant"] == label]
        guess = mean.chances("axial", rows["z_mm"].to_numpy(), 2, (32, 32)).argmax(0) > 0
        floor += 2 * (guess & (masks[label] > 0)).sum()
        claimed += guess.sum() + (masks[label] > 0).sum()
    assert common / both > 0.8
    assert 0.1 < floor / claimed < common / both


def test_a_temperature_mends_overconfidence() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    logit = np.where(truth == 1, 1.0, -1.0) + rng.normal(0, 1.5, 400)
    p = 1 / (1 + np.exp(-4 * logit))
    chances = np.stack([1 - p, p], 1)
    temperature = fit_temperature(chances, truth)
    assert temperature > 2
    assert np.allclose(sharpen(chances, 1.0), chances, atol=1e-9)
    assert fit_temperature(chances[:5], truth[:5]) == 1.0


def test_small_lesions_are_dropped() -> None:
    chances = np.zeros((2, 8, 8, 8), np.float32)
    chances[0] = 1
    chances[0, 1, 1, 1] = chances[0, 4:7, 4:7, 4:7] = 0
    chances[1, 1, 1, 1] = chances[1, 4:7, 4:7, 4:7] = 1
    labels = to_labels(chances, (4,), smallest=3)
    assert (labels == 4).sum() == 27
    assert (to_labels(chances, (4,), smallest=0) == 4).sum() == 28


def test_means_leave_out_and_count_undefined_people() -> None:
    table = mean_scores({"model|dice": [0.5, None, 0.7], "floor|dice": [None, None, 0.1]}, seed=0)
    assert table["value"].tolist() == pytest.approx([0.6, 0.1])
    assert table["people"].tolist() == [2, 1]
