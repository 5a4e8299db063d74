"""Plain sentences on what an evaluation's numbers allow, and do not allow, to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.learning.scores import METRICS, PRIMARY, Score
from brainfm_cli.learning.uncertainty import detectable_auroc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainfm_cli.learning.results import Difference, PredictorResult
    from brainfm_cli.learning.splits import Split
    from brainfm_cli.learning.targets import Target

_ALPHA = 0.05


def describe_design(split: Split) -> str:
    """How people were divided, in words."""
    tests = split.table[split.table["role"] == "test"]
    how = str(tests["why"].iloc[0]) if tests["why"].nunique() == 1 else "every site left out once"
    return f"{how}; {split.repeats} repetitions" if split.repeats > 1 else how


def state(target: Target, split: Split, results: Sequence[PredictorResult], differences: Sequence[Difference], *, transductive: int) -> str:
    """What may be said of the first model against the best floor, and what may not; floors only: of the best floor."""
    metric = PRIMARY[target.kind]
    people = target.keep(split.tested)
    who = f"On {len(people.participants)} people it was not trained on"
    if target.classes:
        who += f" ({', '.join(f'{count} {name}' for name, count in people.counts().items())})"
    models = [result for result in results if result.role == "model"]
    floors = [result for result in results if result.role == "floor" and result.scores[metric].value is not None]
    subject = models[0] if models else max(floors, key=lambda floor: floor.scores[metric].value or float("-inf"), default=results[0])
    score = subject.scores[metric]
    if score.value is None:
        return f"{who}, {METRICS[metric].label} of {subject.name} is not computed: {score.reason}. These numbers allow no statement."
    sentences = [f"{who}, {subject.name} reaches {METRICS[metric].label} {score}.", _against_chance(target, subject, score)]
    if models:
        sentences += _against_floors(subject, differences, floors, metric)
    if target.kind == "binary":
        counts = list(people.counts().values())
        smallest = detectable_auroc(counts[1], counts[0])
        sentences.append(f"With this many people an independent test would miss (1 time in 5) an AUROC below {smallest:.2f}.")
    sentences.append(_reach(split))
    if transductive:
        sentences.append(
            f"{transductive} of the test people were in the pretraining (transductive): for new people the score may be lower."
        )
    return " ".join(sentences)


def _against_chance(target: Target, subject: PredictorResult, score: Score) -> str:
    chance = 0.0 if target.kind == "continuous" else 0.5
    p = subject.chance_p
    told = f" (permutation p = {p:.2g})" if p is not None else ""
    if score.low is not None and score.low > chance and (p is None or p < _ALPHA):
        return f"That is better than chance{told}."
    if target.kind == "continuous" and p is not None and p < _ALPHA:
        return f"Predictions go along with '{target.name}'{told}, but are not shown to be closer to it than its mean is."
    return f"That is not distinguishable from chance{told}: it does not show that '{target.name}' can be predicted."


def _against_floors(
    subject: PredictorResult, differences: Sequence[Difference], floors: Sequence[PredictorResult], metric: str
) -> list[str]:
    if not floors:
        return ["No floor was computed, so nothing can be said about what the model adds."]
    best = max(floors, key=lambda floor: floor.scores[metric].value or float("-inf"))
    found = next((item for item in differences if item.first == subject.name and item.second == best.name), None)
    if found is None or found.value is None or found.low is None or found.high is None:
        return [f"The best floor is {best.name} ({best.scores[metric]}); the difference is not computed."]
    gap = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    if found.low > 0:
        verdict = "the model adds to it"
    elif found.high < 0:
        verdict = "the model is worse than it, and should not be used in its place"
    else:
        verdict = "these numbers do not show that the model adds anything to it"
    told = [f"The best floor, {best.name}, reaches {best.scores[metric]}; the paired difference is {gap}: {verdict}."]
    if found.detectable is not None and found.low <= 0:
        told.append(f"A true difference smaller than about {found.detectable:.3f} would usually be missed here.")
    return told


def _reach(split: Split) -> str:
    why = split.table.loc[split.table["role"] == "test", "why"].iloc[0]
    if why.endswith("is left out"):
        return "Each site was predicted from the others, so the scores do speak for sites like these that the model has not seen."
    if split.cross_validated:
        return "Training and test people come from the same sites and scanners: the scores do not speak for other sites, scanners or populations."
    return "The scores hold for people like the test people."
