"""Tables of metrics.json: every predictor's scores with intervals over pictures, its distance from the model, and ranks of the own picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from brainfm_cli.learning.text_scores import TextScore, retrieval, sentence_cosine, text_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from brainfm_cli.models.language import TextEncoder

PredictorRole = Literal["model", "floor", "ceiling"]


@dataclass(kw_only=True)
class Predictor:
    """Captions of one predictor for viewings of several participants."""

    name: str
    """What it is called."""
    role: PredictorRole
    """Model, floor or ceiling."""
    average: Literal["repeats", "none", ""] = "repeats"
    """Whether repeats were averaged; empty where nothing is repeated."""
    captions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """(picture, caption) of every viewing, by participant."""
    references: dict[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    """Where these are not all captions of the picture, by participant: of the human ceiling."""


def score_texts(sentences: TextEncoder, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, TextScore]:
    """Every score of captions, CIDEr first as it tells systems apart best; an empty caption counts as a full stop where vectors are compared."""
    found = text_scores(candidates, references)
    own = sentences.sentences([text or "." for text in candidates]).numpy()
    flat = sentences.sentences([text for said in references for text in said]).numpy()
    parts = np.split(flat, np.cumsum([len(said) for said in references])[:-1])
    encoder = Path(sentences.name).name
    cosine = sentence_cosine(own.astype(np.float64), [part.astype(np.float64) for part in parts], encoder=encoder)
    return {"cider": found.pop("cider"), **found, "sentence_cosine": cosine}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of all predictors."""

    rows: list[dict[str, Any]]
    """As in metrics.json: every predictor for every participant and for their mean, and the model's lead over each floor."""
    meanings: dict[str, str]
    """Label of each score → one sentence."""
    first: dict[str, NDArray[np.float64]]
    """(items,) first score of the model's captions, by participant."""


Score = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, TextScore]]
"""Scores of texts against their references."""


def score_predictors(
    score: Score, references_of: Mapping[str, Sequence[str]], predictors: Sequence[Predictor], names: Sequence[str], counts: NDArray[np.int64]
) -> Scored:  # fmt: skip
    """Scores of every predictor; ``counts`` (resamples, pictures) draw the pictures ``names``, the first predictor is the model.

    ``references_of`` are the texts of each picture.
    """
    place = {name: number for number, name in enumerate(names)}
    people = list(predictors[0].captions)
    found: list[dict[str, dict[str, TextScore]]] = []
    weights = []
    for one in predictors:
        by_person, drawn = {}, {}
        for participant, said in one.captions.items():
            references = one.references.get(participant) or [references_of[picture] for picture, _ in said]
            by_person[participant] = score([text for _, text in said], references)
            drawn[participant] = counts[:, [place[picture] for picture, _ in said]].astype(np.float64)
        found.append(by_person)
        weights.append(drawn)
    keys = list(found[0][people[0]])
    labels = {key: found[0][people[0]][key].label for key in keys}
    rows = []
    for one, by_person, drawn in zip(predictors, found, weights, strict=True):
        values = {(participant, key): _drawn(by_person[participant][key], drawn[participant]) for participant in people for key in keys}
        model = {(participant, key): _drawn(found[0][participant][key], weights[0][participant]) for participant in people for key in keys}
        for participant in (*people, "mean"):
            row: dict[str, Any] = {"name": one.name, "role": one.role, "average": one.average, "participant": participant, "scores": {}}
            leads = {}
            for key in keys:
                whose = people if participant == "mean" else [participant]
                own = [values[name, key] for name in whose]
                row["scores"][labels[key]] = _interval(own)
                leads[labels[key]] = _interval([_less(model[name, key], values[name, key]) for name in whose])
            if one.role == "floor":
                row["difference"] = leads
            rows.append(row)
    first = {participant: np.asarray(found[0][participant][keys[0]].items) for participant in people}
    return Scored(rows=rows, meanings={labels[key]: found[0][people[0]][key].meaning for key in keys}, first=first)


@dataclass(frozen=True)
class _Resampled:
    """A value, and the same over resampled pictures; none where it has no interval."""

    value: float | None
    resampled: NDArray[np.float64] | None
    reason: str | None


def _drawn(score: TextScore, weights: NDArray[np.float64]) -> _Resampled:
    value = score.value()
    with_interval = value is not None and score.reason is None and score.weighted is not None
    return _Resampled(value, score.weighted(weights) if with_interval and score.weighted is not None else None, score.reason)


def _less(first: _Resampled, other: _Resampled) -> _Resampled:
    """The difference on the same draws."""
    value = None if first.value is None or other.value is None else first.value - other.value
    paired = first.resampled is not None and other.resampled is not None
    return _Resampled(value, first.resampled - other.resampled if paired else None, first.reason or other.reason)  # type: ignore[operator]


def _interval(parts: Sequence[_Resampled]) -> dict[str, Any]:
    """Mean over participants with its percentile interval; why there is none otherwise."""
    if any(one.value is None for one in parts):
        return {"value": None, "reason": next((one.reason for one in parts if one.reason), "undefined")}
    found: dict[str, Any] = {"value": round(float(np.mean([one.value for one in parts])), 5)}  # type: ignore[arg-type]
    if any(one.resampled is None for one in parts):
        return found | {"reason": next((one.reason for one in parts if one.reason), "no interval")}
    low, high = np.nanpercentile(np.mean([one.resampled for one in parts], axis=0), [2.5, 97.5])  # type: ignore[arg-type]
    return found | {"low": round(float(low), 5), "high": round(float(high), 5)}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Similarities of one predictor's viewings of one participant with that participant's test pictures."""

    name: str
    """What it is called."""
    role: PredictorRole
    """Model, floor or ceiling."""
    participant: str
    """Whose."""
    own: tuple[int, ...]
    """(viewings,) candidate that was seen."""
    similarity: NDArray[np.float64]
    """(viewings, candidates)."""


def rank_pictures(
    ranked: Sequence[Ranked], candidates: Mapping[str, Sequence[int]], counts: NDArray[np.int64], *, floor: str, ceiling: str
) -> list[dict[str, Any]]:
    """Share of viewings whose own picture comes first, for every participant and their mean; the lead over ``floor``, the share of ``ceiling``.

    ``candidates`` are the columns of ``counts`` (resamples, pictures) of each participant's test pictures.
    """
    first: dict[tuple[str, str], _Resampled] = {}
    rows, roles = [], {}
    for one in ranked:
        found = retrieval(one.similarity, one.own, top=(1,))
        weights = counts[:, [candidates[one.participant][place] for place in one.own]].astype(np.float64)
        # with one candidate nothing is told apart
        first[one.name, one.participant] = _drawn(found["top_1"], weights) if "top_1" in found else _Resampled(None, None, "one picture")
        roles[one.name] = one.role
        rows.append(
            {
                "participant": one.participant,
                "name": one.name,
                "candidates": one.similarity.shape[1],
                "mean_rank": found["mean_rank"].value(),
                "percentile": found["percentile"].value(),
            }
        )
    people = list(dict.fromkeys(one.participant for one in ranked))
    table = pd.DataFrame(rows)
    for name in roles:
        means = table[table["name"] == name][["candidates", "mean_rank", "percentile"]].mean()
        rows.append({"participant": "mean", "name": name, **{str(key): value for key, value in means.items()}})
    for row in rows:
        whose = people if row["participant"] == "mean" else [row["participant"]]
        own = [first[row["name"], person] for person in whose]
        row |= {
            "role": roles[row["name"]],
            "candidates": float(row["candidates"]),
            "first": _interval(own),
            "chance": round(1 / row["candidates"], 5),
        }
        row |= {key: None if row[key] is None else round(float(row[key]), 4) for key in ("mean_rank", "percentile")}
        if roles[row["name"]] == "model" and floor in roles:
            row["lead"] = _interval([_less(one, first[floor, person]) for one, person in zip(own, whose, strict=True)])
        if roles[row["name"]] == "model" and ceiling in roles:
            best = float(np.mean([first[ceiling, person].value for person in whose]))
            row["share_of_ceiling"] = round(float(np.mean([one.value for one in own])) / best, 4) if best else None  # type: ignore[arg-type]
    return rows


def similarity(vectors: Tensor, pictures: Tensor) -> NDArray[np.float64]:
    """(viewings, candidates) cosines of vectors with unit vectors of pictures."""
    from torch.nn import functional

    return (functional.normalize(vectors.float(), dim=1) @ pictures.T).double().numpy()


def resample_pictures(pictures: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """(resamples, pictures) how often each picture is drawn; all viewings of a picture come together, in every participant."""
    return np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), size=resamples)


def show_examples(
    references_of: Mapping[str, Sequence[str]], predictors: Sequence[Predictor], scored: Scored, count: int = 9
) -> pd.DataFrame:
    """Captions of the model from best to worst by its first score, evenly spaced, beside people's and the floors'."""
    floors = [one for one in predictors if one.role == "floor"]
    rows = []
    for participant, said in predictors[0].captions.items():
        for number, (picture, text) in enumerate(said):
            others = [one.captions[participant][number][1] for one in floors]
            people = references_of[picture][0]
            rows.append((float(scored.first[participant][number]), (participant, picture, people, text, *others)))
    rows.sort(key=lambda row: -row[0])
    kept = [rows[int(place)][1] for place in np.unique(np.linspace(0, len(rows) - 1, count).round())]
    return pd.DataFrame(kept, columns=["participant", "picture", "said by people", "said by the model", *(one.name for one in floors)])
