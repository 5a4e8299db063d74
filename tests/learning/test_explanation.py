"""Integrated gradients: exact on linear scores, doubled steps where needed, modality shares, agreement of folds, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from brainfm_cli.errors import UnsupportedStageError
from brainfm_cli.learning.attributions import Attribution, ExplanationSettings, agreement, mean_maps, summarise
from brainfm_cli.learning.explanation import FoldExplainer, Modality, integrated_gradients
from brainfm_cli.learning.head_fit import FittedHead
from brainfm_cli.learning.samples import Windows
from brainfm_cli.models.graphs import correlate
from tests.learning.cohorts import case_cohort

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

QUICK = ExplanationSettings(steps=16)


def test_a_linear_score_is_attributed_exactly() -> None:
    weights, inputs = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 3.0, -2.0]])
    (found,), change, gap, steps = integrated_gradients(lambda x: (x * weights).sum(1), [inputs], [torch.ones(1, 3)], QUICK)
    torch.testing.assert_close(found, (weights * (inputs - 1)).double())
    assert change == pytest.approx(float((weights * (inputs - 1)).sum()))
    assert gap < 1e-6
    assert steps == 16


def test_steps_are_doubled_until_the_gap_is_small_and_a_gap_that_stays_is_told() -> None:
    def sharp(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(400 * (x.sum(1) - 0.713))

    inputs, baseline = [torch.ones(1, 1)], [torch.zeros(1, 1)]
    *_, gap, steps = integrated_gradients(sharp, inputs, baseline, ExplanationSettings(steps=8, most_steps=1024))
    assert gap <= 0.05
    assert steps > 8
    *_, gap, steps = integrated_gradients(sharp, inputs, baseline, ExplanationSettings(steps=8, most_steps=16))
    assert gap > 0.05
    assert steps == 16


def test_baselines_tell_nothing_of_any_region() -> None:
    present = torch.tensor([True, True, False, True])
    series = Modality(values=torch.randn(1, 6, 4) * present, present=present, symmetric=False)
    mean = series.baseline("mean-signal")
    assert not mean[..., 2].any()
    torch.testing.assert_close(mean[0, :, 0], series.values[0, :, present].mean(1))
    torch.testing.assert_close(mean[0, :, 0], mean[0, :, 3])
    matrix = torch.zeros(1, 4, 4)
    for (row, column), value in {(0, 1): 0.6, (0, 3): 0.0, (1, 3): 0.3}.items():
        matrix[0, row, column] = matrix[0, column, row] = value
    pairs = Modality(values=matrix, present=present, symmetric=True)
    flat = pairs.baseline("mean-signal")[0]
    assert flat[0, 1] == flat[1, 3] == pytest.approx(0.3)
    assert not flat[2].any()
    assert not flat.diagonal().any()
    assert not pairs.baseline("zero").any()
    assert (series.elements, pairs.elements) == (18, 3)


class Toy:
    """Reads the power of each region, and the correlations, without any weights but a scale."""

    def __init__(self, scale: float = 1.0) -> None:
        self.module = nn.Linear(1, 1)
        self.scale = scale

    def new_prompt(self, atlas: str) -> nn.Module:
        return nn.Identity()

    def modalities(self, windows: Windows) -> dict[str, Modality]:
        correlation, present = correlate(windows.series, windows.frames)
        return {
            "series": Modality(values=windows.series, present=present[0], symmetric=False),
            "connectivity": Modality(values=correlation, present=present[0], symmetric=True),
        }

    def blocks_of(self, values: Mapping[str, torch.Tensor], windows: Windows, prompt: nn.Module) -> dict[str, torch.Tensor]:
        matrix = (values["connectivity"] + values["connectivity"].transpose(1, 2)) / 2
        return {"embedding": self.scale * values["series"].square().mean(1), "edges": matrix.flatten(1)}

    def randomised(self, seed: int) -> Toy:
        return Toy(-3.0)


def head(embedding: np.ndarray, edges: np.ndarray) -> SimpleNamespace:
    weights = {"embedding": embedding[:, None], "edges": edges.ravel()[:, None]}
    fitted = FittedHead(num_classes=2, weights=weights, bias=np.zeros(1), slope=2.0, shift=np.zeros(1))
    return SimpleNamespace(prompt={}, head=fitted)


def explained(cohort: object, model: SimpleNamespace, settings: ExplanationSettings = QUICK) -> FoldExplainer:
    explainer = FoldExplainer(cohort, settings)
    for fold in (1, 2):
        explainer(Toy(), {"Toy": model}, [f"p{fold}0{one}" for one in range(3)], repeat=1, fold=fold)
        explainer(Toy(), {"Toy": model}, ["p001"], repeat=2, fold=fold)  # only the first repetition is explained
    return explainer


def test_regions_and_modality_are_recovered_and_their_share_moves_with_what_is_read(tmp_path: Path) -> None:
    cohort = case_cohort(tmp_path / "c", people=300)
    region, pair = np.zeros(8), np.zeros((8, 8))
    region[5], pair[0, 1], pair[1, 0] = 1.0, 1.0, 1.0
    for model, name, regions in ((head(region, 0.001 * pair), "series", [5]), (head(0.001 * region, pair), "connectivity", [0, 1])):
        explainer = explained(cohort, model)
        assert len(explainer.found) == 2 * 2 * 3  # folds, baselines, people
        zero, signal = summarise(explainer.found, explainer.random, QUICK)
        assert (zero.baseline, signal.baseline, zero.people) == ("zero", "mean-signal", 6)
        assert max(zero.largest_gap, signal.largest_gap) < 0.05
        shares = {part.modality: part for part in zero.modalities}
        assert shares[name].share.value > 0.95
        assert shares[name].share_per_element.value > 0.9
        assert sum(part.share.value for part in zero.modalities) == pytest.approx(1)
        assert shares[name].fold_agreement == pytest.approx(1)
        maps = mean_maps([one for one in explainer.found if one.baseline == "zero"])
        assert sorted(np.flatnonzero(maps.regions[name] > 0.1)) == regions
        assert sum(values.sum() for values in maps.regions.values()) == pytest.approx(1)
        np.testing.assert_allclose(maps.times["series"].sum(0), maps.regions["series"], atol=1e-9)
        assert maps.times["series"].shape == (10, 8)


def test_attributions_of_one_run_add_up_to_its_log_odds(tmp_path: Path) -> None:
    cohort = case_cohort(tmp_path / "c", people=300)
    rng = np.random.default_rng(0)
    model = head(rng.normal(size=8), rng.normal(size=(8, 8)))
    explainer = explained(cohort, model)
    series = torch.from_numpy(np.array(cohort.series(next(row for row in cohort.index.itertuples() if row.participant == "p100"))))
    windows = Windows(atlas="Toy", series=series[None], frames=torch.tensor([len(series)]), seconds=torch.tensor([160.0]))
    blocks = Toy().blocks_of({name: one.values for name, one in Toy().modalities(windows).items()}, windows, nn.Identity())
    score = 2.0 * sum(float((blocks[name].double() @ torch.from_numpy(weight)).sum()) for name, weight in model.head.weights.items())
    (run,) = [one for one in explainer.found if one.participant == "p100" and one.baseline == "zero"]
    assert run.change == pytest.approx(score, rel=1e-5)
    assert sum(values.sum() for values in run.signed.values()) == pytest.approx(score, rel=0.05)


def test_random_weights_are_compared_and_people_can_be_few(tmp_path: Path) -> None:
    cohort = case_cohort(tmp_path / "c", people=300)
    explainer = explained(cohort, head(np.arange(8.0), np.zeros((8, 8))), ExplanationSettings(steps=8, people=1, baselines=("zero",)))
    assert [one.participant for one in explainer.found] == ["p100", "p200"]
    (found,) = summarise(explainer.found, explainer.random, QUICK.model_copy(update={"baselines": ("zero",)}))
    series, connectivity = found.modalities
    assert series.random_agreement == pytest.approx(1)  # this system has no weights that could be random
    assert connectivity.random_agreement is None  # a map of zeros
    assert agreement(np.arange(4.0), np.ones(4)) is None


def test_a_score_that_nothing_moves_has_no_share() -> None:
    flat = Attribution(
        participant="p", atlas="Toy", fold=1, baseline="zero", regions={"series": np.zeros(3)}, signed={"series": np.zeros(3)}, times={},
        totals={"series": 0.0}, elements={"series": 9}, change=0.0, gap=0.0, steps=8,
    )  # fmt: skip
    assert np.isnan(flat.share("series", per_element=False))


def test_a_system_that_cannot_be_explained_is_refused(tmp_path: Path) -> None:
    explainer = FoldExplainer(case_cohort(tmp_path / "c", people=12), QUICK)
    with pytest.raises(UnsupportedStageError, match="cannot be explained"):
        explainer(SimpleNamespace(), {}, [], repeat=1, fold=1)
