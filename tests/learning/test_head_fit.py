"""The head against scikit-learn; what is chosen never depends on labels it must not see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from brainfm_cli.learning import head_fit
from brainfm_cli.learning.head_fit import PENALTIES, SMALLEST_SLOPE, Choice, Component, Outcome, Told, choose, fit, probabilities_of

PEOPLE = 60
Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


def folds_of(labels: NDArray, number: int = 3) -> Folds:
    splitter = StratifiedKFold(number, shuffle=True, random_state=0)
    return [(train, test) for train, test in splitter.split(np.zeros(len(labels)), labels)]


def blocks_of(rng: np.random.Generator, signal: NDArray | None = None, *, strength: float = 0.6) -> dict[str, NDArray[np.float32]]:
    """A block that tells the signal, with an offset and its own scale, and one of noise."""
    signal = np.zeros(PEOPLE) if signal is None else (signal - signal.mean()) / signal.std()
    told = rng.normal(size=(PEOPLE, 30))
    told[:, :8] += strength * signal[:, None]
    return {"told": (40 * told + 300).astype(np.float32), "noise": rng.normal(size=(PEOPLE, 200)).astype(np.float32)}


def binary(rng: np.random.Generator, *, cases: int = 30) -> Outcome:
    return Outcome(values=rng.permutation((np.arange(PEOPLE) < cases).astype(float)), num_classes=2)


def continuous(rng: np.random.Generator) -> Outcome:
    return Outcome(values=rng.normal(30, 8, PEOPLE), num_classes=0)


def chosen(*components: Component, outputs: int = 1) -> Choice:
    """A choice made by hand; held-out scores of the right size for calibration."""
    held_out = np.random.default_rng(1).normal(size=(PEOPLE, outputs))
    return Choice(step=0, components=components, score=0.5, scores={}, steps=(0.5,), held_out=held_out)


def one(name: str, penalty: float) -> Component:
    return Component(blocks=(name,), penalty=penalty, weight=1.0, scale=1.0)


def scaled(block: NDArray, weights: NDArray | None = None) -> NDArray:
    """Centred by weighted mean, mean squared norm one."""
    centred = block.astype(np.float64) - np.average(block.astype(np.float64), axis=0, weights=weights)
    return centred / np.sqrt(np.square(centred).sum(1).mean())


@pytest.mark.parametrize("penalty", [PENALTIES[0], PENALTIES[5], PENALTIES[-1]])
def test_one_block_is_ridge(generator: np.random.Generator, penalty: float) -> None:
    outcome = continuous(generator)
    blocks = blocks_of(generator, outcome.values)
    head = fit(blocks, outcome, chosen(one("told", penalty)))
    features = scaled(blocks["told"])
    ridge = Ridge(alpha=penalty).fit(features, outcome.values)
    np.testing.assert_allclose(head.predict(blocks)[:, 0], ridge.predict(features), rtol=1e-5)
    kernel = KernelRidge(alpha=penalty).fit(features, outcome.values - outcome.values.mean())
    np.testing.assert_allclose(head.predict(blocks)[:, 0], kernel.predict(features) + outcome.values.mean(), rtol=1e-5)
    assert set(head.weights) == {"told"}
    assert (head.slope, head.shift.tolist()) == (1.0, [0.0])


def test_classes_weigh_the_same(generator: np.random.Generator) -> None:
    outcome = binary(generator, cases=12)
    blocks = blocks_of(generator, outcome.values)
    head = fit(blocks, outcome, chosen(one("told", 1.0)))
    weights = np.where(outcome.values == 1, PEOPLE / 12, PEOPLE / 48) / 2
    np.testing.assert_allclose(outcome.weights(), weights)
    features = scaled(blocks["told"], weights)
    ridge = Ridge(alpha=1.0).fit(features, 2 * outcome.values - 1, sample_weight=weights)
    np.testing.assert_allclose(head.scores(blocks)[:, 0], ridge.predict(features), atol=1e-5)
    plain = fit(blocks, replace(outcome, balanced=False), chosen(one("told", 1.0)))
    features = scaled(blocks["told"])
    np.testing.assert_allclose(
        plain.scores(blocks)[:, 0], Ridge(alpha=1.0).fit(features, 2 * outcome.values - 1).predict(features), atol=1e-5
    )


def test_several_classes_are_one_ridge_each(generator: np.random.Generator) -> None:
    outcome = Outcome(values=(np.arange(PEOPLE) % 3).astype(float), num_classes=3)
    blocks = blocks_of(generator, outcome.values)
    head = fit(blocks, outcome, chosen(one("told", 1.0), outputs=3))
    features = scaled(blocks["told"])
    signs = np.where(outcome.values[:, None] == np.arange(3), 1.0, -1.0)
    np.testing.assert_allclose(head.scores(blocks), Ridge(alpha=1.0).fit(features, signs).predict(features), atol=1e-5)
    probabilities = head.predict(blocks)
    assert probabilities.shape == (PEOPLE, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_an_average_of_heads_is_the_average_of_their_scores(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = blocks_of(generator, outcome.values)
    parts = [
        Component(blocks=("told",), penalty=1.0, weight=0.6, scale=1.3),
        Component(blocks=("noise", "told"), penalty=10.0, weight=0.4, scale=0.7),
    ]
    signs = 2 * outcome.values - 1
    joined = np.concatenate([scaled(blocks["noise"]), scaled(blocks["told"])], axis=1) / np.sqrt(2)
    expected = 0.6 * 1.3 * Ridge(alpha=1.0).fit(scaled(blocks["told"]), signs).predict(scaled(blocks["told"]))
    expected += 0.4 * 0.7 * Ridge(alpha=10.0).fit(joined, signs).predict(joined)
    np.testing.assert_allclose(fit(blocks, outcome, chosen(*parts)).scores(blocks)[:, 0], expected, atol=1e-5)
    choice = chosen(*parts)
    assert choice.shares() == pytest.approx({"told": 0.6 + 0.2, "noise": 0.2})


def test_new_people_get_the_same_linear_function(generator: np.random.Generator) -> None:
    outcome = continuous(generator)
    blocks = blocks_of(generator, outcome.values)
    head = fit(blocks, outcome, chosen(one("told", 1.0)))
    some = {name: values[:7] for name, values in blocks.items()}
    np.testing.assert_allclose(head.predict(some), head.predict(blocks)[:7])


@pytest.mark.parametrize("kind", ["binary", "continuous", "multiclass"])
def test_held_out_scores_are_those_of_ridge_in_each_fold(generator: np.random.Generator, kind: str) -> None:
    outcome = {
        "binary": binary(generator, cases=20),
        "continuous": continuous(generator),
        "multiclass": Outcome(values=(np.arange(PEOPLE) % 3).astype(float), num_classes=3),
    }[kind]
    blocks = {"told": blocks_of(generator, outcome.values, strength=1.5)["told"]}
    folds = folds_of(outcome.values if outcome.num_classes else np.arange(PEOPLE) % 3)
    choice = choose(blocks, [], outcome, folds)
    expected = np.zeros_like(choice.held_out)
    targets = outcome.targets()
    for component in choice.components:
        for train, test in folds:
            part = outcome.take(train)
            weights = part.weights()
            raw = blocks["told"].astype(np.float64)
            centre = np.average(raw[train], axis=0, weights=weights)
            size = np.sqrt(np.square(raw[train] - centre).sum(1).mean())
            ridge = Ridge(alpha=component.penalty).fit((raw[train] - centre) / size, targets[train], sample_weight=weights)
            predicted = ridge.predict((raw[test] - centre) / size).reshape(len(test), -1)
            # values are stretched around the mean of those trained on, as the head is; what is added up over components has weight 1
            around = targets[train].mean(0) if kind == "continuous" else 0.0
            expected[test] += component.weight * (around + component.scale * (predicted - around))
    np.testing.assert_allclose(choice.held_out, expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_weights_sum_to_one_and_tell_signal_from_noise(kind: str) -> None:
    shares = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        outcome = binary(rng) if kind == "binary" else continuous(rng)
        blocks = blocks_of(rng, outcome.values)
        choice = choose(blocks, [], outcome, folds_of(outcome.values > np.median(outcome.values)))
        assert sum(component.weight for component in choice.components) == pytest.approx(1)
        assert sum(choice.shares().values()) == pytest.approx(1)
        assert set(choice.scores) == {"told", "noise", "told+noise"}
        assert choice.scores["told"] > choice.scores["noise"] + 0.2
        assert all(component.scale >= 0 for component in choice.components)
        shares.append(choice.shares()["told"])
    assert np.mean(shares) > 0.7


def test_a_block_of_noise_does_not_hurt_much() -> None:
    gaps = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        outcome = binary(rng)
        blocks = blocks_of(rng, outcome.values)
        train, test = np.arange(0, PEOPLE, 2), np.arange(1, PEOPLE, 2)
        scores = []
        for names in (["told"], ["told", "noise"]):
            part = {name: blocks[name][train] for name in names}
            learnt = outcome.take(train)
            head = fit(part, learnt, choose(part, [], learnt, folds_of(learnt.values)))
            scores.append(np.corrcoef(head.scores({name: blocks[name][test] for name in names})[:, 0], outcome.values[test])[0, 1])
        assert scores[0] > 0.4
        gaps.append(scores[0] - scores[1])
    assert np.mean(gaps) < 0.05


def test_labels_of_a_validation_part_do_not_reach_its_own_scores(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = {"told": blocks_of(generator, outcome.values, strength=1.0)["told"]}
    folds = folds_of(outcome.values, 5)
    part = folds[1][1]
    flipped = outcome.values.copy()
    flipped[part] = 1 - flipped[part]
    before, after = choose(blocks, [], outcome, folds), choose(blocks, [], replace(outcome, values=flipped), folds)
    # one scale and one set of weights for all folds depend on everybody; the order inside a part depends on who trained
    r = [np.corrcoef(before.held_out[people, 0], after.held_out[people, 0])[0, 1] for _, people in folds]
    assert r[1] > 0.995
    assert max(r[:1] + r[2:]) < 0.98


def test_people_outside_the_folds_never_matter(generator: np.random.Generator) -> None:
    """The outer test people: not in the folds' people, so neither labels nor features may count for what is chosen."""
    outcome = binary(generator)
    blocks = blocks_of(generator, outcome.values)
    inside = np.arange(40)
    folds = folds_of(outcome.values[inside])
    choice = choose({name: values[inside] for name, values in blocks.items()}, [], outcome.take(inside), folds)
    changed = replace(outcome, values=np.r_[outcome.values[:40], 1 - outcome.values[40:]])
    same = choose({name: values[inside] for name, values in blocks.items()}, [], changed.take(inside), folds)
    assert choice.components == same.components
    np.testing.assert_array_equal(choice.held_out, same.held_out)


def test_random_labels_predict_nobody_new() -> None:
    scores, confidence = [], []
    train, test = np.arange(0, PEOPLE, 2), np.arange(1, PEOPLE, 2)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        outcome, blocks = binary(rng), blocks_of(rng)
        learnt = outcome.take(train)
        part = {name: values[train] for name, values in blocks.items()}
        choice = choose(part, [], learnt, folds_of(learnt.values))
        assert all(component.scale >= 0 for component in choice.components)
        head = fit(part, learnt, choice)
        new = {name: values[test] for name, values in blocks.items()}
        signs = 2 * outcome.values[test] - 1
        scores.append(float(np.mean(np.sign(head.scores(new)[:, 0] - np.median(head.scores(new))) * signs)))
        confidence.append(float(np.abs(head.predict(new)[:, 1] - 0.5).mean()))
    assert abs(np.mean(scores)) < 4 / np.sqrt(30 * len(test))
    assert np.mean(confidence) < 0.2


def test_the_better_candidate_is_taken_and_static_blocks_count_once(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    folds = folds_of(outcome.values)
    shared = {"noise": blocks_of(generator)["noise"]}
    poor = {"tuned": blocks_of(generator)["told"]}
    good = {"tuned": blocks_of(generator, outcome.values)["told"]}
    for order, step in (([poor, good, poor], 1), ([good, poor], 0)):
        choice = choose(shared, [order] * 3, outcome, folds)
        assert choice.step == step
        assert len(choice.steps) == len(order)
        assert choice.steps[step] == max(choice.steps)
        assert set(choice.scores) == {"noise", "tuned", "noise+tuned"}
        assert len({(part.blocks, part.penalty) for part in choice.components}) == len(choice.components)


def test_people_in_no_validation_part_have_no_held_out_score(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = blocks_of(generator, outcome.values)
    folds = [(np.arange(20, 60), np.arange(20))]
    choice = choose(blocks, [], outcome, folds)
    assert np.isnan(choice.held_out[20:]).all()
    assert np.isfinite(choice.held_out[:20]).all()
    assert np.isfinite(fit(blocks, outcome, choice).predict(blocks)).all()


def test_a_constant_block_has_no_say(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = blocks_of(generator, outcome.values) | {"flat": np.full((PEOPLE, 4), 7.0, np.float32)}
    choice = choose(blocks, [], outcome, folds_of(outcome.values))
    assert choice.scores["flat"] == pytest.approx(0)
    head = fit(blocks, outcome, choice)
    assert np.isfinite(head.predict(blocks)).all()
    nothing = {"flat": blocks["flat"]}
    alone = fit(nothing, outcome, choose(nothing, [], outcome, folds_of(outcome.values)))
    np.testing.assert_allclose(alone.predict(nothing), 0.5, atol=1e-6)


def said(rng: np.random.Generator, outcome: Outcome, strength: float) -> NDArray[np.float32]:
    """(people, 1) what a text says of people, ``strength`` spreads higher in the positive class than in the other."""
    return (3 + 5 * (strength * outcome.values + rng.normal(size=len(outcome.values))))[:, None].astype(np.float32)


def test_a_belief_counts_as_people_seen_before(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = {"text": said(generator, outcome, 1.0)}
    folds = folds_of(outcome.values)
    none, some = (choose(blocks, [], outcome, folds, told={"text": Told(correlation=0.7, people=people)}) for people in (1e-9, 30))
    signs = 2 * outcome.values - 1
    text = np.zeros(PEOPLE)
    for train, test in folds:
        text[test] = (blocks["text"][test, 0] - blocks["text"][train, 0].mean()) / blocks["text"][train, 0].std()
        text[test] -= text[test].mean()
    # people with the same spreads, of whom the correlation is as believed, put beside those seen
    others = generator.normal(size=(2, 100_000))
    others = np.linalg.solve(np.linalg.cholesky(np.cov(others, bias=True)), others - others.mean(1, keepdims=True))
    believed = np.stack([others[0], 0.7 * others[0] + np.sqrt(1 - 0.49) * others[1]]) * np.array([[text.std()], [signs.std()]])
    repeats = 200_000 // PEOPLE  # twice as many seen as believed: 60 and 30
    together = np.hstack([np.tile([text, signs], repeats), believed])
    slope = together[0] @ together[1] / (together[0] @ together[0])
    assert [part.penalty for part in some.components] == [None]
    assert some.components[0].scale == pytest.approx(slope, rel=1e-3)
    assert none.components[0].scale == pytest.approx(text @ signs / (text @ text), rel=1e-3)
    assert none.score == pytest.approx(some.score)  # what is reported is what was seen
    assert some.scores == {"text": pytest.approx(np.corrcoef(text, signs)[0, 1], abs=1e-3)}
    head = fit(blocks, outcome, some)
    whole = (blocks["text"] - blocks["text"].mean()) / blocks["text"].std()
    np.testing.assert_allclose(head.scores(blocks), some.components[0].scale * whole, atol=1e-5)


def test_ten_labels_do_not_drown_a_text_and_many_overrule_it() -> None:
    areas: dict[str, list[float]] = {"alone": [], "few": [], "unbelieved": [], "wrong, many": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        outcome = Outcome(values=(np.arange(400) % 2).astype(float), num_classes=2)
        edges = rng.normal(size=(400, 300)) + 0.15 * outcome.values[:, None]
        right = {"text": said(rng, outcome, 1.0), "edges": edges.astype(np.float32)}
        wrong = right | {"text": said(rng, outcome, 0.0)}
        test = np.arange(200, 400)

        def area(blocks: dict[str, NDArray], people: int, belief: float, outcome: Outcome = outcome, test: NDArray = test) -> float:
            learnt = outcome.take(np.arange(people))
            part = {name: values[:people] for name, values in blocks.items()}
            told = {"text": Told(correlation=0.4, people=belief)} if belief else {}
            head = fit(part, learnt, choose(part, [], learnt, folds_of(learnt.values), told=told))
            return float(roc_auc_score(outcome.values[test], head.scores({name: values[test] for name, values in blocks.items()})[:, 0]))

        areas["alone"].append(float(roc_auc_score(outcome.values[test], right["text"][test, 0])))
        areas["few"].append(area(right, 10, 40))
        areas["unbelieved"].append(area(right, 10, 0))
        areas["wrong, many"].append(area(wrong, 200, 40) - area({"edges": wrong["edges"]}, 200, 0))
    mean = {name: float(np.mean(values)) for name, values in areas.items()}
    assert mean["few"] > mean["alone"] - 0.03
    assert mean["few"] > mean["unbelieved"] + 0.03
    assert mean["wrong, many"] > -0.03


def test_a_told_block_is_one_number_about_one_output(generator: np.random.Generator) -> None:
    outcome, belief = binary(generator), {"text": Told(correlation=0.4, people=40)}
    two = {"text": generator.normal(size=(PEOPLE, 2)).astype(np.float32)}
    with pytest.raises(ValueError, match="one feature"):
        choose(two, [], outcome, folds_of(outcome.values), told=belief)
    three = Outcome(values=(np.arange(PEOPLE) % 3).astype(float), num_classes=3)
    with pytest.raises(ValueError, match="one output"):
        choose({"text": two["text"][:, :1]}, [], three, folds_of(three.values), told=belief)


def test_a_text_that_says_the_same_of_everybody_is_not_believed(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = blocks_of(generator, outcome.values) | {"text": np.full((PEOPLE, 1), 7.0, np.float32)}
    with_text = choose(blocks, [], outcome, folds_of(outcome.values), told={"text": Told(correlation=0.4, people=40)})
    assert with_text.score > 0.3
    assert with_text.shares().get("text", 0.0) < 0.5


def test_probabilities_are_calibrated_to_the_samples_own_frequencies(generator: np.random.Generator) -> None:
    people = 600
    outcome = Outcome(values=(generator.random(people) < 0.2).astype(float), num_classes=2)
    features = (generator.normal(size=(people, 3)) + outcome.values[:, None]).astype(np.float32)
    blocks = {"told": features}
    choice = choose(blocks, [], outcome, folds_of(outcome.values))
    head = fit(blocks, outcome, choice)
    probability = head.predict(blocks)[:, 1]
    assert probability.mean() == pytest.approx(outcome.values.mean(), abs=0.02)  # although both classes weighed the same
    logistic = LogisticRegression().fit(features, outcome.values).predict_proba(features)[:, 1]
    assert np.abs(probability - logistic).mean() < 0.03


def test_calibration_never_turns_scores_round(generator: np.random.Generator) -> None:
    outcome = binary(generator)
    blocks = blocks_of(generator, outcome.values)
    against = replace(chosen(one("told", 1.0)), held_out=-(2 * outcome.values - 1)[:, None])
    head = fit(blocks, outcome, against)
    assert head.slope == pytest.approx(SMALLEST_SLOPE / against.held_out.std())
    assert np.corrcoef(head.predict(blocks)[:, 1], head.scores(blocks)[:, 0])[0, 1] > 0.99


def test_probabilities_of_scores() -> None:
    scores = np.array([[0.0], [2.0], [-70.0]])
    expected = 1 / (1 + np.exp(-(1.5 * scores[:, 0] + 0.25)))
    np.testing.assert_allclose(probabilities_of(scores, 1.5, np.array([0.25]))[:, 1], expected)
    three = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(probabilities_of(three, 1.0, np.zeros(3)), np.exp(three) / np.exp(three).sum())


def test_few_people_give_no_steep_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    def excess(seed: int) -> float:
        """Squared error on new people, over that of the training people's mean; the blocks tell nothing."""
        rng = np.random.default_rng(seed)
        outcome = Outcome(values=rng.normal(10, 3, 200), num_classes=0)
        blocks = {name: rng.normal(size=(200, 50)).astype(np.float32) for name in ("a", "b", "c")}
        few, new = np.arange(6), np.arange(6, 200)
        part = {name: values[few] for name, values in blocks.items()}
        folds = [(np.setdiff1d(few, pair), pair) for pair in np.split(few, 3)]
        head = fit(part, outcome.take(few), choose(part, [], outcome.take(few), folds))
        error = head.predict({name: values[new] for name, values in blocks.items()})[:, 0] - outcome.values[new]
        return float(np.mean(error**2) / np.mean((outcome.values[few].mean() - outcome.values[new]) ** 2))

    kept = np.mean([excess(seed) for seed in range(20)])
    monkeypatch.setattr(head_fit, "SLOPE_PEOPLE", 0)
    free = np.mean([excess(seed) for seed in range(20)])
    assert kept < 2
    assert free > 2 * kept
