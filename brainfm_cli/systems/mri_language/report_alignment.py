"""From reports to what is trained, and what an alignment is worth on people who took no part: reports told apart, diseases named without labels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from brainfm_cli.bids.reports import Conversation, StudyReport
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.learning.radiology_reports import Finding, affirmed, parse_report
from brainfm_cli.learning.report_tasks import CLOSED, conversations_of, facts_sentence, main_finding, statement_of
from brainfm_cli.learning.scan_tuning import RESAMPLES, classification_scores
from brainfm_cli.learning.text_scores import retrieval
from brainfm_cli.learning.uncertainty import resample_weights
from brainfm_cli.models.language import TextEncoder
from brainfm_cli.signals.lesions import LesionFacts
from brainfm_cli.systems.mri_language.classification import StudyFeatures
from brainfm_cli.systems.mri_language.speaking import SpeakFitSettings, StudyTeller, context_of_rows
from brainfm_cli.systems.mri_language.told_studies import ToldStudies, Turns

RIDGE_FILE = "floors.safetensors"
SIDES = ("left", "right", "both")
_SIDE = 0.5  # length of the part of a vector that tells the side, which sentence encoders do not (cosine 0.98); the sentence's is 1
_PENALTIES = tuple(10.0**power for power in range(-2, 6))
MODEL, RIDGE = "model", "ridge on mean features"


def report_vectors(reports: Mapping[str, StudyReport], encoder: TextEncoder, fit: SpeakFitSettings) -> dict[str, Tensor]:
    """(encoder width + 3,) unit vector of what each report says: its sentence vector, and its sides."""
    findings = {label: affirmed(parse_report(report.text)) for label, report in reports.items()}
    texts = {label: report.text if fit.contrast_with == "sentences" else statements(findings[label]) for label, report in reports.items()}
    sentences = encoder.sentences(list(texts.values()))
    return {label: _joined(vector, findings[label]) for label, vector in zip(texts, sentences, strict=True)}


def statements(findings: Sequence[Finding]) -> str:
    """What is there, in English sentences."""
    return " ".join(dict.fromkeys(statement_of(one) for one in findings)) or statement_of(None)


def _joined(sentence: Tensor, findings: Sequence[Finding]) -> Tensor:
    sides = torch.zeros(len(SIDES))
    for one in findings:
        if one.side is not None:
            sides[SIDES.index(one.side)] = 1.0
    return functional.normalize(torch.cat([sentence, _SIDE * functional.normalize(sides, dim=0)]), dim=0)


def groups_of(reports: Mapping[str, StudyReport], fit: SpeakFitSettings) -> dict[str, int]:
    """A number for each participant, the same where reports name the same diseases, sides and places."""
    known: dict[object, int] = {}
    found = {}
    for label, report in reports.items():
        key: object = frozenset((one.disease, one.side, frozenset(one.places)) for one in affirmed(parse_report(report.text)))
        found[label] = known.setdefault(key if fit.same_findings else label, len(known))
    return found


def question_vectors(source: ToldStudies, encoder: TextEncoder) -> Tensor:
    """(questions, encoder width) unit vectors of every question that was taught: what resembles none of them is not answered."""
    asked = sorted({question for told in source.without_facts.values() for turns in told for question, _ in turns})
    return encoder.sentences(asked)


def tell_studies(
    features: StudyFeatures, cohort: SliceCohort, reports: Mapping[str, StudyReport], facts: Mapping[str, LesionFacts],
    instructions: Sequence[Conversation], targets: Mapping[str, Tensor], fit: SpeakFitSettings, *,
    people: tuple[str, ...], validation_people: tuple[str, ...], batch_size: int, seed: int,
) -> ToldStudies:  # fmt: skip
    """Training and validation studies with everything that may be taught of them."""
    own: dict[str, list[Turns]] = {}
    for one in instructions:
        own.setdefault(one.participant, []).append(one.turns)
    labels = (*people, *validation_people)

    def taught(label: str, known: LesionFacts | None) -> tuple[Turns, ...]:
        built = tuple(one.turns for one in conversations_of(label, reports[label], known)) if fit.built_in else ()
        given = tuple(_with_facts(turns, known) for turns in own.get(label, ()))
        return (*built, *given)

    without = {label: taught(label, None) for label in labels}
    spoken = tuple(label for label in people if without[label])
    return ToldStudies(
        slices=features.slices,
        contexts={label: context_of_rows(cohort, features.rows[label]) for label in labels},
        targets=targets,
        groups=groups_of(reports, fit),
        conversations={label: taught(label, facts.get(label)) for label in labels},
        without_facts=without,
        people=spoken,
        validation_people=tuple(label for label in validation_people if without[label]),
        batch_size=batch_size,
        seed=seed,
        drop_sequence=fit.drop_sequence,
        drop_facts=fit.drop_facts,
    )


def _with_facts(turns: Turns, facts: LesionFacts | None) -> Turns:
    (question, answer), *rest = turns
    return ((f"{facts_sentence(facts)} {question}".strip(), answer), *rest)


@torch.no_grad()
def closed_dialogue(
    teller: StudyTeller, prefixes: Sequence[Tensor], facts: Sequence[LesionFacts | None], *, max_tokens: int = 24
) -> list[list[tuple[str, str, float]]]:
    """(question, answer, mean log-probability) of the closed questions, asked of every study one after another until one has no lesion."""
    told: list[list[tuple[str, str, float]]] = [[] for _ in prefixes]
    going = list(range(len(prefixes)))
    for question in CLOSED:
        if not going:
            break
        asked = []
        for place in going:
            before = [(f"{facts_sentence(facts[place])} {one}".strip() if number == 0 else one, said) for number, (one, said, _) in enumerate(told[place])]  # fmt: skip
            new = f"{facts_sentence(facts[place])} {question}".strip() if not before else question
            asked.append([*before, (new, "")])
        said = teller.answer([prefixes[place] for place in going], asked, max_tokens=max_tokens)
        for place, text, score in zip(going, said.texts, said.log_probability.tolist(), strict=True):
            told[place].append((question, text, score))
        going = [place for place in going if not told[place][0][1].lower().startswith("no")]
    return told


def abstain_threshold(dialogues: Sequence[Sequence[tuple[str, str, float]]]) -> float:
    """The log-probability that one in twenty answers falls below."""
    found = [score for one in dialogues for _, _, score in one]
    return float(np.quantile(found, 0.05)) if found else float("-inf")


@dataclass(frozen=True, kw_only=True)
class RidgeStudies:
    """Ridge regression of mean slice features to report vectors: what alignment must beat."""

    weights: Tensor
    """(features, width)."""
    offset: Tensor
    """(width,)."""
    mean: Tensor
    """(features,)."""
    spread: Tensor
    """(features,)."""

    def predict(self, slices: Tensor) -> Tensor:
        """(width,) of one study's (slices, features)."""
        return ((slices.mean(dim=0) - self.mean) / self.spread) @ self.weights + self.offset

    def tensors(self) -> dict[str, Tensor]:
        """For the model folder."""
        return {f"ridge_{name}": getattr(self, name).contiguous() for name in ("weights", "offset", "mean", "spread")}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> RidgeStudies:
        """From the model folder."""
        return cls(**{name: tensors[f"ridge_{name}"] for name in ("weights", "offset", "mean", "spread")})


def fit_ridge(slices: Mapping[str, Tensor], targets: Mapping[str, Tensor], people: Sequence[str]) -> RidgeStudies:
    """Ridge on training people; the penalty by generalised cross-validation."""
    from sklearn.linear_model import RidgeCV

    x = torch.stack([slices[label].mean(dim=0) for label in people])
    y = torch.stack([targets[label] for label in people])
    mean, spread = x.mean(dim=0), x.std(dim=0)
    spread = torch.where(spread > 1e-6, spread, torch.inf)
    fitted = RidgeCV(alphas=_PENALTIES).fit(((x - mean) / spread).double().numpy(), y.double().numpy())
    return RidgeStudies(
        weights=torch.from_numpy(np.ascontiguousarray(fitted.coef_.T)).float(),
        offset=torch.from_numpy(np.asarray(fitted.intercept_)).float(),
        mean=mean,
        spread=spread,
    )


def disease_vector(disease: str, encoder: TextEncoder, places: Sequence[str]) -> Tensor:
    """Unit vector of a disease by its name: the mean over sides and places of what a report would say."""
    prompts = [Finding(disease=disease, start=0, end=0, side=side, places=(place,)) for side, place in itertools.product(("left", "right"), places)]  # type: ignore[arg-type]  # fmt: skip
    prompts = prompts or [Finding(disease=disease, start=0, end=0)]
    vectors = encoder.sentences([statement_of(one) for one in prompts])
    return functional.normalize(
        torch.stack([_joined(vector, [one]) for vector, one in zip(vectors, prompts, strict=True)]).mean(dim=0), dim=0
    )


def places_of(reports: Sequence[StudyReport]) -> tuple[str, ...]:
    """Parts of the brain that reports name, sorted."""
    return tuple(sorted({place for report in reports for one in affirmed(parse_report(report.text)) for place in one.places}))


def alignment_scores(
    studies: Mapping[str, Mapping[str, Tensor]],
    reports: Mapping[str, StudyReport],
    targets: Mapping[str, Tensor],
    encoder: TextEncoder,
    *,
    test: Sequence[str],
    train: Sequence[str],
    seed: int,
    written_in: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Scores of test people: own report found among theirs, and each disease told by its name alone; ``studies`` holds vectors by method.

    Where reports were ``written_in`` several languages, those of each are also scored by themselves, among the reports of everybody.
    """
    if len(test) < 2:
        return pd.DataFrame(columns=["score", "method", "value", "low", "high", "reason", "people", "seed"])
    rows = []
    weights = resample_weights(list(test), RESAMPLES, np.random.default_rng(seed))
    wanted = torch.stack([targets[label] for label in test])
    groups = {"reports": np.arange(len(test)), **_languages(test, written_in or {})}
    for method, vectors in studies.items():
        found = functional.normalize(torch.stack([vectors[label] for label in test]), dim=1)
        similarity = (found @ wanted.T).double().numpy()
        for group, mine in groups.items():
            for one in retrieval(similarity[mine], mine.tolist()).values():
                told = one.score(weights[:, mine])
                rows.append({"score": f"{group}: {one.label}", "method": method, "value": told.value, "low": told.low, "high": told.high, "reason": told.reason, "people": len(mine)})  # fmt: skip
    rows += [{"score": f"reports: top {top}", "method": "chance", "value": min(1.0, top / len(test)), "low": None, "high": None, "reason": "by definition", "people": len(test)} for top in (1, 5)]  # fmt: skip
    places, diseases = places_of([reports[label] for label in train]), {label: _disease(reports[label]) for label in (*train, *test)}
    learnt = {diseases[label] for label in train}
    table = pd.DataFrame(rows).assign(seed=seed)
    named = [_named(disease, studies, diseases, encoder, places, test, seed, learnt=disease in learnt) for disease in sorted({diseases[label] for label in test} - {""})]  # fmt: skip
    return pd.concat([table, *named], ignore_index=True)


def _languages(test: Sequence[str], written_in: Mapping[str, str]) -> dict[str, NDArray[np.int64]]:
    """Places of the people whose reports are in each language; nothing where there is but one."""
    languages = sorted({written_in[label] for label in test if label in written_in})
    found = {f"reports in {name}": np.flatnonzero([written_in.get(label) == name for label in test]) for name in languages}
    return found if len(found) > 1 else {}


def _named(
    disease: str, studies: Mapping[str, Mapping[str, Tensor]], diseases: Mapping[str, str], encoder: TextEncoder,
    places: Sequence[str], test: Sequence[str], seed: int, *, learnt: bool,
) -> pd.DataFrame:  # fmt: skip
    """Ranking of test people by the cosine of their vector with a disease's name."""
    observed = np.array([diseases[label] == disease for label in test], np.int64)
    prompt = disease_vector(disease, encoder, places)
    chances: dict[str, NDArray[np.float64]] = {}
    for method, vectors in studies.items():
        cosine = functional.normalize(torch.stack([vectors[label] for label in test]), dim=1) @ prompt
        share = ((1 + cosine.double()) / 2).numpy()
        chances[method] = np.c_[1 - share, share]
    found = classification_scores(observed, chances, classes=2, seed=seed, only="auroc")
    seen = "" if learnt else ", in no training report (zero-shot)"
    found["score"] = f"{disease} by its name{seen}: AUROC ({int(observed.sum())} of {len(test)})"
    return found


def _disease(report: StudyReport) -> str:
    finding = main_finding(report.text)
    return "" if finding is None else finding.disease
