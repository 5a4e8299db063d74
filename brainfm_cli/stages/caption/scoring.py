"""caption group for brain-caption: what the participant level said, scored beside floors and ceilings on the same pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from brainfm_cli.stages.caption.tables import (
    Predictor,
    PredictorRole,
    Ranked,
    rank_pictures,
    resample_pictures,
    score_predictors,
    score_texts,
    show_examples,
    similarity,
)
from brainfm_cli.stages.caption.viewing import CaptionSettings, Loaded, load, open_output, read_captions
from brainfm_cli.systems.brain_caption.decoding import list_viewings, scaled_responses
from brainfm_cli.systems.brain_caption.encoder import CREDITS
from brainfm_cli.systems.brain_caption.floors import fit_ridge, picture_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.config import Invocation
    from brainfm_cli.systems.brain_caption.decoding import Alteration

_MODEL = "brain-caption"
_RIDGE = "ridge to sentence vectors"
_TRUTH = "generator's own likelihood"


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
    names = sorted({row["stimulus"] for one in said.values() for row in one["captions"]})
    counts = resample_pictures(len(names), settings.bootstraps, settings.seed)
    references = {name: one.captions for name, one in loaded.cohort.stimuli.items()}
    scored = score_predictors(partial(score_texts, loaded.sentences), references, predictors, names, counts)
    metrics: dict[str, Any] = {
        "model": model.name,
        "role": settings.role,
        "split_unit": loaded.split.unit,
        "captions_of_training": said[people[0]]["captions_of_training"],
        "participants": list(people),
        "pictures": len(names),
        "bootstraps": settings.bootstraps,
        "seed": settings.seed,
        "metrics": scored.meanings,
        "rows": scored.rows,
        "retrieval": _retrieval(loaded, said, names, counts, vectors, settings, truth),
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
        show_examples(references, predictors, scored),
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
        alterations: dict[str, Alteration] = {"zeroed voxels": "zeroed", "shuffled voxels": "shuffled"}
        for key, altered in alterations.items():
            if key in settings.floors:
                spoken = loaded.speak(viewings, settings, altered)
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
            bayes = Predictor(name=_TRUTH, role="ceiling")
            for name, rows in pictures.items():
                bayes.captions[name] = [(picture, str(known[name, picture])) for picture in rows]
            found.append(bayes)
    return found


def _retrieval(
    loaded: Loaded,
    said: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    counts: NDArray[np.int64],
    vectors: _Vectors,
    settings: CaptionSettings,
    truth: Path | None,
) -> list[dict[str, Any]]:
    """The own picture among a participant's test pictures: by the brain's vector, by what was said, by ridge, by perfect knowledge."""
    import torch

    place = {name: number for number, name in enumerate(names)}
    ranked, candidates = [], {}
    for participant, one in said.items():
        pictures = [str(row["stimulus"]) for row in one["captions"]]
        candidates[participant] = [place[name] for name in pictures]
        wanted = vectors.pictures(pictures)

        def add(
            name: str, role: PredictorRole, found: Tensor, seen: Sequence[int], *, participant: str = participant, wanted: Tensor = wanted
        ) -> None:
            ranked.append(Ranked(name=name, role=role, participant=participant, own=tuple(seen), similarity=similarity(found, wanted)))

        for key, suffix in (("captions", "repeats averaged"), ("single_trials", "single trials")):
            rows = one.get(key, [])
            if not rows:
                continue
            seen = [pictures.index(row["stimulus"]) for row in rows]
            if loaded.record.contrast_with == "sentences":
                add(f"the brain's vector, {suffix}", "model", torch.tensor([row["vector"] for row in rows]), seen)
            add(f"what was said, {suffix}", "model", loaded.sentences.sentences([row["caption"] or "." for row in rows]), seen)
        everything = list(range(len(pictures)))
        if "ridge" in settings.floors:
            add(_RIDGE, "floor", vectors.ridge(participant, one["role"])[1], everything)
        ranks = _true_ranks(truth, participant, pictures)
        if ranks is not None:  # as similarities that give these ranks
            best = np.zeros((len(pictures), len(pictures)))
            for row, rank in enumerate(ranks):
                others = [column for column in everything if column != row]
                best[row, row] = 0.5
                best[row, others[: round(rank - 1)]] = 1.0
            ranked.append(Ranked(name=_TRUTH, role="ceiling", participant=participant, own=tuple(everything), similarity=best))
    return rank_pictures(ranked, candidates, counts, floor=_RIDGE, ceiling=_TRUTH)


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


def _notes(loaded: Loaded, settings: CaptionSettings) -> tuple[str, ...]:
    notes = []
    if settings.role != "test":
        notes.append(f"Pictures of role {settings.role}: the model has learnt from them, so that this is no test.")
    if loaded.record.templates:
        notes.append("Captions were made from category names by a template: only the category says anything.")
    if loaded.split.unit == "run":
        notes.append("Runs were held out, not pictures: the categories of the test were all seen in training.")
    return tuple(notes)
