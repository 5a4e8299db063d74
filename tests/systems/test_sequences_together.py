"""Lesions from several sequences at once: what one of them shows is found, in any order, with sequences absent and grids that differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm_cli.bids.slice_cohort import SEQUENCES, SliceCohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.scan_tuning import divide_for_tuning
from brainfm_cli.learning.slice_samples import SliceBatches, rows_together
from brainfm_cli.models.mri_decoder import MriSegmenter
from brainfm_cli.models.mri_encoder import Context, MriEncoder
from brainfm_cli.signals.segmentations import native_chances
from brainfm_cli.systems.mri_language import MriLanguageSettings
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings, make_view
from brainfm_cli.systems.mri_language.segmentation import SequenceSettings, lesion_chances
from brainfm_cli.systems.mri_language.tuning import fit_segmenter
from tests.learning.slice_cohorts import write_slice_cohort

CPU = Execution(device="cpu", precision="32-true")
SHOWN = ("FLAIR", "dwi")


def encoder(backbone: str = "hybrid", dims: int = 2) -> MriEncoder:
    torch.manual_seed(0)
    return MriLanguageSettings.from_values({"kind": "mri-language", "preset": "nano", "backbone": backbone, "dims": dims}).build().model.encoder  # fmt: skip


def heads(people: int) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Heads on FLAIR and dwi whose lesion only one of the two shows, every second person in the first."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 32),) * 2, indexing="ij"))
    head = (grid**2).sum(0) < 0.8
    items, masks = {}, {}
    for number in range(people):
        centre = np.array([rng.choice([-0.4, 0.4]), rng.uniform(-0.3, 0.3)])
        lesion = (((grid - centre[:, None, None]) ** 2).sum(0) < 0.05) & head
        shown = SHOWN[number % 2]
        items[f"{number:02d}"] = {
            name: np.stack([
                np.clip(np.where(head, head * (90 + rng.normal(0, 8, head.shape)) + 110 * lesion * (name == shown) * (place in (1, 2)), 0), 0, 255).astype(np.uint8)
                for place in range(4)
            ])
            for name in SHOWN
        }  # fmt: skip
        masks[f"{number:02d}"] = np.stack([lesion.astype(np.uint8) * (place in (1, 2)) for place in range(4)])
    return items, masks


def context(sequence: torch.Tensor) -> Context:
    zeros = torch.zeros(len(sequence), dtype=torch.int64)
    return Context(sequence=sequence, plane=zeros, z_mm=zeros.float())


@pytest.mark.parametrize(("backbone", "dims"), [("hybrid", 2), ("transformer", 2), ("hybrid", 3)])
def test_order_does_not_matter_and_an_absent_sequence_leaves_the_others_alone(backbone: str, dims: int) -> None:
    model = MriSegmenter(encoder(backbone, dims), 2, width=16, together=True).eval()
    for name, join in model.join.items():  # sequences differ once trained
        torch.manual_seed(len(name))
        torch.nn.init.normal_(join.scale.weight)
        torch.nn.init.normal_(join.shift.weight)
    images = torch.rand(5, *(32,) * dims)
    sequence, item = torch.tensor([3, 1, 4, 3, 1]), torch.tensor([0, 0, 0, 1, 1])
    found = model(images, context(sequence), item)
    assert found.shape == (2, 2, *(32,) * dims)
    order = torch.tensor([2, 0, 1, 4, 3])
    torch.testing.assert_close(model(images[order], context(sequence[order]), item), found, atol=1e-5, rtol=1e-4)
    alone = model(images[3:], context(sequence[3:]), torch.tensor([0, 0]))
    torch.testing.assert_close(alone[0], found[1], atol=1e-5, rtol=1e-4)  # padding to three sequences says nothing
    swapped = model(images, context(torch.tensor([1, 3, 4, 3, 1])), item)
    assert (swapped - found)[0].abs().max() > 1e-3  # which sequence an image is does
    assert (swapped - found)[1].abs().max() < 1e-5


def test_a_lesion_that_one_sequence_shows_is_found(tmp_path: Path) -> None:
    items, masks = heads(24)
    cohort = write_slice_cohort(tmp_path / "cohort", items, masks=masks)
    split = divide_for_tuning({label: str(int(label) % 2) for label in items}, dict.fromkeys(items, "tests"), (), test=0.3, validation=0.2, seed=0, transductive=False)  # fmt: skip
    schedule = ScheduleSettings(epochs=14, batch_size=8, patience=None, optimiser=OptimiserSettings(learning_rate=5e-3))
    segmenter, _ = fit_segmenter(
        encoder(), cohort, split, schedule.plan(0), values=(1,), augment=AugmentSettings(), batch_size=8, execution=CPU,
        folder=tmp_path / "fit", sequences=SequenceSettings(together=True),
    )  # fmt: skip
    dice: dict[str, list[float]] = {name: [] for name in (*SHOWN, "hidden")}
    for label in split.role("test"):
        shown, scans = SHOWN[int(label) % 2], cohort.scans(label)
        for key, given in ((shown, scans), ("hidden", [scan for scan in scans if scan.sequence != shown])):
            chances = lesion_chances(segmenter, cohort, label, given)
            assert np.allclose(chances.sum(0), 1, atol=1e-5)
            predicted, true = chances.argmax(0) > 0, masks[label] > 0
            dice[key].append(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))
        backwards = lesion_chances(segmenter, cohort, label, scans[::-1])
        np.testing.assert_array_equal(backwards.argmax(0), lesion_chances(segmenter, cohort, label, scans).argmax(0))
        (grid,) = native_chances(scans, lambda given, label=label: lesion_chances(segmenter, cohort, label, given))
        assert grid.scans == (f"sub-{label}_FLAIR", f"sub-{label}_dwi")
    assert min(np.mean(dice[name]) for name in SHOWN) > 0.8
    assert np.mean(dice["hidden"]) < 0.3  # it was the one sequence that showed it


def cohort_of_two(tmp_path: Path) -> SliceCohort:
    items, masks = heads(4)
    del items["01"]["dwi"]
    return write_slice_cohort(tmp_path / "cohort", items, masks=masks)


def test_slices_of_one_place_are_one_item(tmp_path: Path) -> None:
    cohort = cohort_of_two(tmp_path)
    table = cohort.slices
    together = rows_together(cohort, np.arange(len(table)))
    assert len(together) == 16
    for first, members in together.items():
        assert first == members[0]
        assert len(members) == (1 if table["participant"].iloc[first] == "01" else 2)
        assert table.iloc[members][["participant", "slice"]].drop_duplicates().shape[0] == 1
    turned = {label: [replace(scan, native_shape=(31, 32, 4)) if scan.sequence == "dwi" else scan for scan in cohort.scans(label)] for label in cohort.labels_of_people}  # fmt: skip
    other = replace_scans(cohort, turned)
    assert {len(members) for members in rows_together(other, np.arange(len(table))).values()} == {1}  # another grid is read by itself
    sessions = {label: [replace(scan, session=scan.sequence) for scan in cohort.scans(label)] for label in cohort.labels_of_people}
    assert {len(members) for members in rows_together(replace_scans(cohort, sessions), np.arange(len(table))).values()} == {1}


def replace_scans(cohort: SliceCohort, scans: dict[str, list]) -> SliceCohort:
    class Other(SliceCohort):
        def scans(self, participant: str) -> tuple:
            return tuple(scans[participant])

    return Other(root=cohort.root, slices=cohort.slices, size=cohort.size, dims=2, labels=cohort.labels, participants=cohort.participants)


def test_sequences_are_hidden_in_training_alone_and_never_all(tmp_path: Path) -> None:
    cohort = cohort_of_two(tmp_path)
    together = rows_together(cohort, np.arange(len(cohort.slices)))
    first = np.array(list(together))
    source = SliceBatches(
        cohort=cohort, rows=first, validation_rows=first, batch_size=16, seed=0, masks=True, together=together, hidden=0.5
    )
    held_out = source.batch(first, None)
    assert held_out.item is not None
    assert torch.bincount(held_out.item).tolist() == [len(members) for members in together.values()]
    assert len(held_out.keys) == len(held_out.masks) == 16  # type: ignore[arg-type]
    drawn = [source.batch(first, epoch) for epoch in range(20)]
    counts = np.array([torch.bincount(batch.item, minlength=16).tolist() for batch in drawn])  # type: ignore[arg-type]
    several = np.array([len(members) == 2 for members in together.values()])
    assert counts.min() == 1
    assert 0.3 < (counts[:, several] == 1).mean() < 0.7
    kept = {SEQUENCES[int(one)] for batch in drawn for one in batch.sequence}
    assert kept == set(SHOWN)
    assert not np.array_equal(counts[0], counts[1])  # another draw in each epoch


def test_sequences_of_one_place_move_alike_and_are_seen_differently() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (1, 32, 32), dtype=np.uint8)).expand(2, -1, -1)
    zeros, keys = torch.zeros(2, dtype=torch.int64), torch.tensor([7, 7])
    view = make_view(images, zeros, keys, AugmentSettings(), view=0, light=torch.tensor([8, 9]))
    assert torch.equal(view.clean[0], view.clean[1])
    assert (view.seen[0] - view.seen[1]).abs().max() > 0.01
