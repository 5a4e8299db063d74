"""caption group for brain-caption: what the participant level said, scored beside floors and ceilings on the same pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console

from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.learning.checkpoints import model_files
from brainfm_cli.learning.voxel_samples import select_trials
from brainfm_cli.reports.captions import captions_page
from brainfm_cli.stages.caption.viewing import CaptionSettings, Loaded, load, open_output, read_captions
from brainfm_cli.systems.brain_caption.decoding import list_viewings, scaled_responses, speak
from brainfm_cli.systems.brain_caption.encoder import CREDITS
from brainfm_cli.systems.brain_caption.floors import fit_ridge, picture_vectors, retrieval_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.config import Invocation

PredictorRole = Literal["model", "floor", "ceiling"]
_MODEL = "brain-caption"


@dataclass(kw_only=True)
class Predictor:
    """Captions of one predictor for viewings of several participants."""

    name: str
    """What it is called."""
    role: PredictorRole
    """Model, floor or ceiling."""
    average: Literal["repeats", "none"] = "repeats"
    """Whether repeats were averaged."""
    captions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """(picture, caption) of every viewing, by participant."""
    references: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    """Where these are not all captions of the picture, by participant: of the human ceiling."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One score of captions."""

    name: str
    """What it is called."""
    meaning: str
    """One sentence for the report."""
    of: Callable[[Sequence[str], Sequence[Sequence[str]]], NDArray[np.float64]]
    """(items,) scores of captions against the references of each; the score of a set is their mean."""


def score_group(call: Invocation, model: Path, settings: CaptionSettings, cohort: VoxelCohort, people: Sequence[str]) -> int:
    """Score the captions of participants that are done; gives back the exit code."""
    dataset = open_output(call, model, settings)
    truth = call.datasets.get("truth")
    said = [dataset.root / f"sub-{name}" / f"sub-{name}_desc-brainfm_caption.json" for name in people]
    for name in people:
        read_captions(dataset.root, name)
    if call.dry_run:
        Console().print(f"score captions of {len(people)} participants beside {', '.join(settings.floors)}", highlight=False)
        return 0
    inputs = (*cohort.files, *model_files(model), *said, *([truth / "bayes.tsv"] if truth is not None else []))
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "root": dataset.root,
        "settings": settings,
        "device": call.execution.device,
        "people": tuple(people),
        "truth": truth,
    }
    unit = Unit(name="group", inputs=tuple(dict.fromkeys(inputs)), work=write_scores, arguments=arguments)
    return run_units(dataset, [unit], call.execution)


def write_scores(
    cohort_dir: Path, model: Path, root: Path, settings: CaptionSettings, device: str, people: tuple[str, ...], truth: Path | None
) -> UnitResult:
    """Write captions.tsv, metrics.json and report.html."""
    loaded = load(cohort_dir, model, device, settings.llm)
    said = {name: read_captions(root, name) for name in people}
    vectors = _Vectors(loaded)
    predictors = [*_models(said), *_floors(loaded, said, settings, vectors), *_ceilings(loaded, said, truth)]
    measures = list_measures(loaded)
    names = sorted({row["stimulus"] for one in said.values() for row in one["captions"]})
    counts = _resamples(len(names), settings)
    scored = _score(loaded, predictors, measures, names, counts)
    metrics: dict[str, Any] = {
        "model": model.name,
        "role": settings.role,
        "split_unit": loaded.split.unit,
        "captions_of_training": said[people[0]]["captions_of_training"],
        "participants": list(people),
        "pictures": len(names),
        "bootstraps": settings.bootstraps,
        "seed": settings.seed,
        "metrics": {one.name: one.meaning for one in measures},
        "rows": scored,
        "retrieval": _retrieval(loaded, said, predictors, names, counts, vectors, truth),
    }
    table = pd.DataFrame(
        [
            (f"sub-{name}", one.name, one.average, picture, text)
            for one in predictors if one.role != "ceiling"
            for name, rows in one.captions.items()
            for picture, text in rows
        ],
        columns=["participant_id", "predictor", "average", "stimulus", "caption"],
    )  # fmt: skip
    page = captions_page(
        metrics,
        _examples(loaded, predictors, measures[0]),
        title="Captions of what was seen",
        subtitle=f"brainfm caption, model {model.name}",
        notes=_notes(loaded, settings),
        methods=CREDITS.methods,
        citations=(CREDITS.citation,),
    )
    outputs = (
        write_tsv(root / "captions.tsv", table),
        write_json(root / "metrics.json", metrics),
        write_text(root / "report.html", page.render()),
    )
    return UnitResult(outputs=outputs, notes=_notes(loaded, settings), seed=settings.seed)


def list_measures(loaded: Loaded) -> list[Measure]:
    """The scores that are computed."""

    def cosine(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        own = loaded.sentences.sentences([text or "." for text in candidates])
        flat = loaded.sentences.sentences([text for said in references for text in said])
        ends = np.cumsum([len(said) for said in references])
        return np.array([float((flat[end - len(said) : end] @ one).mean()) for one, said, end in zip(own, references, ends, strict=True)])

    return [
        Measure(
            name="sentence cosine",
            meaning=f"cosine of sentence vectors ({loaded.sentences.name}), mean over the references of a picture",
            of=cosine,
        )
    ]


def _models(said: Mapping[str, Mapping[str, Any]]) -> list[Predictor]:
    found = []
    for average, key in (("repeats", "captions"), ("none", "single_trials")):
        if all(key in one for one in said.values()):
            captions = {name: [(row["stimulus"], row["caption"]) for row in one[key]] for name, one in said.items()}
            found.append(Predictor(name=_MODEL, role="model", average="repeats" if average == "repeats" else "none", captions=captions))
    return found


def _floors(loaded: Loaded, said: Mapping[str, Mapping[str, Any]], settings: CaptionSettings, vectors: _Vectors) -> list[Predictor]:
    constant = loaded.bank.constant()
    made = {
        "constant": Predictor(name="constant caption", role="floor"),
        "shuffled captions": Predictor(name="shuffled captions", role="floor"),
        "zeroed voxels": Predictor(name="zeroed voxels", role="floor"),
        "shuffled voxels": Predictor(name="shuffled voxels", role="floor"),
        "ridge": Predictor(name="ridge to nearest training caption", role="floor"),
    }
    chosen: list[Predictor] = [made[name] for name in settings.floors]
    for place, (participant, one) in enumerate(said.items()):
        rows = [(row["stimulus"], row["caption"]) for row in one["captions"]]
        made["constant"].captions[participant] = [(name, constant) for name, _ in rows]
        # moved on by at least one: nobody keeps their own caption
        step = int(np.random.default_rng([settings.seed, place]).integers(1, max(2, len(rows))))
        made["shuffled captions"].captions[participant] = [
            (name, rows[(number + step) % len(rows)][1]) for number, (name, _) in enumerate(rows)
        ]
        (trials,) = select_trials(loaded.cohort, loaded.split, [participant], settings.role)
        viewings = list_viewings(trials, "repeats")
        for altered, key in (("zeroed", "zeroed voxels"), ("shuffled", "shuffled voxels")):
            if key in settings.floors:
                spoken = speak(
                    loaded.captioner, loaded.cohort, viewings, altered="zeroed" if altered == "zeroed" else "shuffled", seed=settings.seed,
                    beams=settings.beams, max_tokens=settings.max_tokens, batch_size=settings.batch_size,
                )  # fmt: skip
                made[key].captions[participant] = [(one.viewing.name, one.caption) for one in spoken]
        if "ridge" in settings.floors:
            nearest = loaded.bank.nearest(vectors.ridge(participant, settings.role)[1])
            made["ridge"].captions[participant] = [(one.name, text) for one, (text, _) in zip(viewings, nearest, strict=True)]
    return chosen


def _ceilings(loaded: Loaded, said: Mapping[str, Mapping[str, Any]], truth: Path | None) -> list[Predictor]:
    found = []
    stimuli = loaded.cohort.stimuli
    pictures = {name: [row["stimulus"] for row in one["captions"]] for name, one in said.items()}
    if all(len(stimuli[picture].captions) > 1 for rows in pictures.values() for picture in rows):
        human = Predictor(name="first caption against the others", role="ceiling")
        for name, rows in pictures.items():
            human.captions[name] = [(picture, stimuli[picture].captions[0]) for picture in rows]
            human.references[name] = [stimuli[picture].captions[1:] for picture in rows]
        found.append(human)
    if truth is not None:
        table = _bayes(truth)
        if (table["caption"] != "n/a").all():
            known = table.set_index(["participant_id", "stim_id"])["caption"]
            bayes = Predictor(name="generator's own likelihood", role="ceiling")
            for name, rows in pictures.items():
                bayes.captions[name] = [(picture, str(known[name, picture])) for picture in rows]
            found.append(bayes)
    return found


def _score(
    loaded: Loaded, predictors: Sequence[Predictor], measures: Sequence[Measure], names: Sequence[str], counts: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Rows of metrics.json: every predictor for every participant and for their mean, and the model's lead over each floor."""
    place = {name: number for number, name in enumerate(names)}
    means: dict[tuple[int, str, str], tuple[float, NDArray[np.float64]]] = {}
    rows = []
    people = list(predictors[0].captions)
    for number, one in enumerate(predictors):
        for participant, said in one.captions.items():
            references = one.references.get(participant) or [loaded.cohort.stimuli[picture].captions for picture, _ in said]
            where = np.array([place[picture] for picture, _ in said])
            for measure in measures:
                values = measure.of([text for _, text in said], references)
                means[number, participant, measure.name] = (float(values.mean()), _resampled(values, where, counts))
        for measure in measures:
            parts = [means[number, participant, measure.name] for participant in people]
            means[number, "mean", measure.name] = (
                float(np.mean([part[0] for part in parts])),
                np.mean([part[1] for part in parts], axis=0),
            )
    for number, one in enumerate(predictors):
        for participant in (*people, "mean"):
            scores = {measure.name: _interval(*means[number, participant, measure.name]) for measure in measures}
            row: dict[str, Any] = {"name": one.name, "role": one.role, "average": one.average, "participant": participant, "scores": scores}
            if one.role == "floor":
                pairs = {
                    measure.name: (means[0, participant, measure.name], means[number, participant, measure.name]) for measure in measures
                }
                row["difference"] = {name: _interval(first[0] - other[0], first[1] - other[1]) for name, (first, other) in pairs.items()}
            rows.append(row)
    return rows


def _retrieval(
    loaded: Loaded,
    said: Mapping[str, Mapping[str, Any]],
    predictors: Sequence[Predictor],
    names: Sequence[str],
    counts: NDArray[np.int64],
    vectors: _Vectors,
    truth: Path | None,
) -> list[dict[str, Any]]:
    """Rank of the own picture among a participant's test pictures: by the brain's vector, by the caption, by ridge, by perfect knowledge."""
    import torch

    rows = []
    place = {name: number for number, name in enumerate(names)}
    floors = {one.name: one for one in predictors}
    for participant, one in said.items():
        pictures = [row["stimulus"] for row in one["captions"]]
        wanted = vectors.pictures(pictures)
        found: list[tuple[str, PredictorRole, NDArray[np.float64]]] = []
        own = list(range(len(pictures)))
        spoken = {"what it said": [row["caption"] for row in one["captions"]]}
        if loaded.record.contrast_with == "sentences":
            brains = torch.tensor([row["vector"] for row in one["captions"]])
            found.append(("the brain's vector", "model", retrieval_ranks(brains, wanted, own).numpy()))
            if "single_trials" in one:
                brains = torch.tensor([row["vector"] for row in one["single_trials"]])
                where = [pictures.index(row["stimulus"]) for row in one["single_trials"]]
                ranks = retrieval_ranks(brains, wanted, where).numpy()
                averaged = np.array([ranks[np.array(where) == number].mean() for number in own])
                rows.append(
                    _rank_row("the brain's vector, single trials", "model", participant, averaged, ranks, pictures, place, counts, where)
                )
        found += [
            (name, "model", retrieval_ranks(loaded.sentences.sentences([text or "." for text in texts]), wanted, own).numpy())
            for name, texts in spoken.items()
        ]
        if "ridge to nearest training caption" in floors:
            found.append(
                ("ridge to sentence vectors", "floor", retrieval_ranks(vectors.ridge(participant, one["role"])[1], wanted, own).numpy())
            )
        ranks_of_truth = _true_ranks(truth, participant, pictures)
        if ranks_of_truth is not None:
            found.append(("generator's own likelihood", "ceiling", ranks_of_truth))
        found.append(("chance", "floor", np.full(len(pictures), (len(pictures) + 1) / 2)))
        rows += [_rank_row(name, role, participant, ranks, ranks, pictures, place, counts, own) for name, role, ranks in found]
    return rows


def _rank_row(
    name: str,
    role: PredictorRole,
    participant: str,
    by_picture: NDArray[np.float64],
    ranks: NDArray[np.float64],
    pictures: Sequence[str],
    place: Mapping[str, int],
    counts: NDArray[np.int64],
    own: Sequence[int],
) -> dict[str, Any]:
    first = np.full(len(ranks), 1 / len(pictures)) if name == "chance" else (ranks <= 1).astype(float)
    where = np.array([place[pictures[number]] for number in own])
    return {
        "participant": participant,
        "name": name,
        "role": role,
        "candidates": len(pictures),
        "first": _interval(float(first.mean()), _resampled(first, where, counts)),
        "mean_rank": round(float(by_picture.mean()), 4),
        "percentile": round(float(((len(pictures) - ranks) / max(1, len(pictures) - 1)).mean()), 5),
    }


def _true_ranks(truth: Path | None, participant: str, pictures: Sequence[str]) -> NDArray[np.float64] | None:
    """Ranks by perfect knowledge, where its candidates are the same pictures."""
    if truth is None:
        return None
    table = _bayes(truth)
    table = table[table["participant_id"] == participant].set_index("stim_id")
    if not set(pictures) <= set(table.index):
        return None
    for rank, of in (("shared_rank", "shared_of"), ("rank", "of")):
        rows = table[table[of].astype(str) == str(len(pictures))]
        if set(rows.index) == set(pictures):
            return rows.loc[list(pictures), rank].to_numpy(np.float64)
    return None


def _bayes(truth: Path) -> pd.DataFrame:
    path = truth / "bayes.tsv"
    try:
        return pd.read_csv(io.StringIO(path.read_text(encoding="utf-8")), sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputNotFoundError(
            "there is no bayes.tsv", where=truth, fix="give the folder that 'brainfm simulate --kind viewing' wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"bayes.tsv is unreadable: {error}", where=path, fix="simulate again") from error


class _Vectors:
    """Sentence vectors of pictures, and ridge predictions, computed once."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._captions = {name: one.captions for name, one in loaded.cohort.stimuli.items()}
        self._targets: dict[str, Tensor] = {}
        self._ridge: dict[tuple[str, str], tuple[float, Tensor]] = {}

    def pictures(self, names: Sequence[str]) -> Tensor:
        """(pictures, width) unit mean vectors of the captions of each."""
        self._know([text for name in names for text in self._captions[name]])
        return picture_vectors(names, self._captions, self._targets)

    def ridge(self, participant: str, role: str) -> tuple[float, Tensor]:
        """Penalty, and (pictures, width) vectors that ridge regression predicts for a participant's pictures of a role."""
        if (participant, role) not in self._ridge:
            loaded = self._loaded
            parts = {name: select_trials(loaded.cohort, loaded.split, [participant], name)[0] for name in ("train", "validation", role)}
            self._know([text for one in parts.values() for name in one.names for text in self._captions[name]])
            scale = loaded.captioner.model.scale
            fitted = fit_ridge(scale, loaded.cohort, parts["train"], parts["validation"], self._captions, self._targets)
            scaled = scaled_responses(scale, loaded.cohort, list_viewings(parts[role], "repeats"))
            self._ridge[participant, role] = (fitted.penalty, fitted.predict(scaled))
        return self._ridge[participant, role]

    def _know(self, texts: Sequence[str]) -> None:
        new = sorted(set(texts) - set(self._targets))
        self._targets |= dict(zip(new, self._loaded.sentences.sentences(new), strict=True))


def _resamples(pictures: int, settings: CaptionSettings) -> NDArray[np.int64]:
    """(resamples, pictures) how often each picture is drawn."""
    draw = np.random.default_rng(settings.seed).multinomial
    return draw(pictures, np.full(pictures, 1 / pictures), size=settings.bootstraps)


def _resampled(values: NDArray[np.float64], where: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(resamples,) means over items whose pictures were drawn; all items of a picture come together."""
    weights = counts[:, where].astype(float)
    total = weights.sum(1)
    return np.where(total > 0, weights @ values / np.where(total > 0, total, 1.0), values.mean())


def _interval(value: float, resampled: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": round(value, 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def _examples(loaded: Loaded, predictors: Sequence[Predictor], measure: Measure, count: int = 9) -> pd.DataFrame:
    model = predictors[0]
    rows = []
    for participant, said in model.captions.items():
        references = [loaded.cohort.stimuli[picture].captions for picture, _ in said]
        values = measure.of([text for _, text in said], references)
        for number, (picture, text) in enumerate(said):
            others = {
                one.name: one.captions[participant][number][1] for one in predictors if one.role == "floor" and participant in one.captions
            }
            rows.append((values[number], participant, picture, references[number][0], text, *others.values()))
        names = list(others)
    rows.sort(key=lambda row: -row[0])
    kept = [rows[int(place)] for place in np.unique(np.linspace(0, len(rows) - 1, count).round())]
    return pd.DataFrame([row[1:] for row in kept], columns=["participant", "picture", "said by people", "said by the model", *names])


def _notes(loaded: Loaded, settings: CaptionSettings) -> tuple[str, ...]:
    notes = []
    if settings.role != "test":
        notes.append(f"Pictures of role {settings.role}: the model has learnt from them, so that this is no test.")
    if loaded.record.templates:
        notes.append("Captions were made from category names by a template: only the category says anything.")
    if loaded.split.unit == "run":
        notes.append("Runs were held out, not pictures: the categories of the test were all seen in training.")
    return tuple(notes)
