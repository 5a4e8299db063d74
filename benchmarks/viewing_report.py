"""What benchmarks/viewing.py reports: CIDEr and retrieval of every job beside floors and ceilings, with intervals over pictures.

Pictures are resampled, all participants and seeds of one together; differences are taken on the same draws. CIDEr is of repeat-averaged
responses unless a row says single trials; document frequencies are those of the test pictures' captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from brainfm_cli.learning.image_split import make_split
from brainfm_cli.learning.text_scores import cider, own_ranks
from brainfm_cli.learning.voxel_samples import select_trials, voxel_statistics
from brainfm_cli.models.voxel_encoder import VoxelScale
from brainfm_cli.systems.brain_caption.aligned import load_sentences
from brainfm_cli.systems.brain_caption.decoding import list_viewings, scaled_responses
from brainfm_cli.systems.brain_caption.floors import CaptionBank, fit_ridge, picture_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_RESAMPLES = 2000


class Report:
    """Scores of the lines that a run has written."""

    def __init__(self, study: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        self.study, self.rows = study, rows
        self.cohort = study.cohort
        self.people = sorted(self.cohort.spaces)
        self.split = make_split(self.cohort, study.split)
        self.names = sorted(self.split.names("test"))
        self.place = {name: number for number, name in enumerate(self.names)}
        generator = np.random.default_rng(0)
        self.counts = generator.multinomial(len(self.names), np.full(len(self.names), 1 / len(self.names)), size=_RESAMPLES)

    def tables(self) -> dict[str, Any]:
        """The full model with floors, ceilings and leads; ablations; new participants."""
        found: dict[str, Any] = {"pictures": len(self.names), "participants": len(self.people), "resamples": _RESAMPLES}
        found["seconds"] = {f"{row['job']}, seed {row['seed']}": row["seconds"] for row in self.rows}
        found["device"] = sorted({row["device"] for row in self.rows})
        full = [row for row in self.rows if row["job"] == "full"]
        if full:
            found["full"] = self._full(full)
            found["ablations"] = self._ablations(full)
        found["new participants"] = self._new()
        return found

    def _full(self, full: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        model = self._cider([row["said"] for row in full])
        rows: dict[str, Any] = {"seeds": [row["seed"] for row in full], "CIDEr": {"brain-caption": self.interval(model)}}
        floors = {
            "constant caption": self._constant(self.people),
            "shuffled captions": self._cider([_moved_on(row["said"]) for row in full]),
            **{
                f"{name} voxels": self._cider([row[name] for row in full])
                for name in ("zeroed", "shuffled")
                if all(name in row for row in full)
            },
            "ridge to nearest training caption": self._cider([self._ridge_captions(dict.fromkeys(self.people, 1.0))]),
        }
        rows["CIDEr"] |= {name: self.interval(values) | {"lead": self.interval(model - values)} for name, values in floors.items()}
        if all("single" in row for row in full):
            rows["CIDEr"]["single trials"] = self.interval(self._cider([row["single"] for row in full]))
        rows["CIDEr"]["first caption against the others"] = self.interval(self._human())
        bayes = self._bayes_captions()
        if bayes is not None:
            rows["CIDEr"]["generator's own likelihood"] = self.interval(self._cider([bayes]))
        rows["retrieval"] = self._retrieval(full)
        rows["pretraining"] = [row["pretraining"] for row in full]
        rows["examples"] = [[*row, self.cohort.stimuli[row[0]].captions[0]] for row in full[0]["said"][self.people[0]][:8]]
        return rows

    def _retrieval(self, full: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        model, ridge = self._first([row["said"] for row in full]), self._ridge_first(dict.fromkeys(self.people, 1.0))
        said = self._said_first([row["said"] for row in full])
        ceiling = float(np.nanmean(self._bayes_first()))
        found = {
            "chance": round(1 / len(self.names), 5),
            "the brain's vector": self.interval(model) | {"lead over ridge": self.interval(model - ridge)},
            "what was said": self.interval(said),
            "ridge to sentence vectors": self.interval(ridge),
            "generator's own likelihood": round(ceiling, 4),
        }
        if all("shuffled" in row for row in full):
            found["the brain's vector, voxels shuffled"] = self.interval(self._first([row["shuffled"] for row in full]))
        if all("single" in row for row in full):
            found["the brain's vector, single trials"] = self.interval(self._first([row["single"] for row in full]))
        found["share of the ceiling"] = self.interval(model / ceiling)
        return found

    def _ablations(self, full: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for job in dict.fromkeys(row["job"] for row in self.rows if row["share"] is None):
            own = [row for row in self.rows if row["job"] == job]
            seeds = sorted({row["seed"] for row in own} & {row["seed"] for row in full})
            beside = [row["said"] for row in full if row["seed"] in seeds]
            said = [row["said"] for row in own if row["seed"] in seeds]
            line: dict[str, Any] = {"job": job, "seeds": seeds, "CIDEr": self.interval(self._cider(said))}
            line["what was said, first"] = self.interval(self._said_first(said))
            ranked = all(one[2] is not None for one in said[0][self.people[0]])
            line["the vector, first"] = self.interval(self._first(said)) if ranked else None
            if job != "full":
                line["CIDEr less than full"] = self.interval(self._cider(beside) - self._cider(said))
                line["said, less than full"] = self.interval(self._said_first(beside) - self._said_first(said))
            rows.append(line)
        return rows

    def _new(self) -> list[dict[str, Any]]:
        rows = []
        for share in sorted({row["share"] for row in self.rows if row["share"] is not None}):
            own = [row for row in self.rows if row["share"] == share]
            people = sorted({name for row in own for name in row["said"]})
            by_seed: dict[int, dict[str, Any]] = {}
            for row in own:
                by_seed.setdefault(row["seed"], {}).update(row["said"])
            said = list(by_seed.values())
            given = dict.fromkeys(people, share)
            model, ridge = self._cider(said), self._cider([self._ridge_captions(given)])
            first, ridge_first = self._first(said), self._ridge_first(given)
            trials = {name: self._trials(name, share)[0] for name in people}
            rows.append(
                {
                    "share": share,
                    "left out": people,
                    "seeds": sorted(by_seed),
                    "trials": {name: len(one.rows) for name, one in trials.items()},
                    "CIDEr": self.interval(model),
                    "CIDEr, lead over ridge on the same data": self.interval(model - ridge),
                    "CIDEr, lead over constant": self.interval(model - self._constant(people)),
                    "first": self.interval(first),
                    "first, lead over ridge on the same data": self.interval(first - ridge_first),
                }
            )
        return rows

    def interval(self, values: NDArray[np.float64]) -> dict[str, Any]:
        """Mean of (pictures,) values with its 95 % interval over pictures."""
        drawn = self.counts @ values / len(self.names)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return {"value": round(float(values.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}

    def _by_picture(
        self, said: Sequence[Mapping[str, Sequence[Any]]], score: Callable[[str, Sequence[Any]], Sequence[float]]
    ) -> NDArray[np.float64]:
        """(pictures,) mean score over participants, seeds and trials of each test picture."""
        sums, counts = np.zeros(len(self.names)), np.zeros(len(self.names))
        for one in said:
            for participant, rows in one.items():
                places = [self.place[row[0]] for row in rows]
                np.add.at(sums, places, score(participant, rows))
                np.add.at(counts, places, 1)
        return sums / counts

    def _cider(self, said: Sequence[Mapping[str, Sequence[Any]]]) -> NDArray[np.float64]:
        stimuli = self.cohort.stimuli
        documents = [stimuli[name].captions for name in self.names]

        def score(_: str, rows: Sequence[Any]) -> NDArray[np.float64]:
            found = cider([row[1] for row in rows], [stimuli[row[0]].captions for row in rows], documents=documents).items
            assert found is not None
            return found

        return self._by_picture(said, score)

    def _first(self, said: Sequence[Mapping[str, Sequence[Any]]]) -> NDArray[np.float64]:
        """Whether the own picture is nearest to the brain's vector."""
        return self._by_picture(said, lambda _, rows: [float(row[2] == 1) for row in rows])

    def _said_first(self, said: Sequence[Mapping[str, Sequence[Any]]]) -> NDArray[np.float64]:
        """Whether the own picture is nearest to the sentence vector of what was said; ties count by their share."""

        def score(_: str, rows: Sequence[Any]) -> NDArray[np.float64]:
            pictures = [row[0] for row in rows]
            return self._ranked_first(self._know([row[1] or "." for row in rows]), pictures)

        return self._by_picture(said, score)

    def _ranked_first(self, vectors: Tensor, pictures: Sequence[str]) -> NDArray[np.float64]:
        similarity = (functional.normalize(vectors.float(), dim=1) @ self._pictures(pictures).T).double().numpy()
        return (own_ranks(similarity, list(range(len(pictures)))) == 1).astype(np.float64)

    def _constant(self, people: Sequence[str]) -> NDArray[np.float64]:
        text = self._bank(people).constant()
        return self._cider([{name: [(picture, text) for picture in self.names] for name in people}])

    def _human(self) -> NDArray[np.float64]:
        stimuli = [self.cohort.stimuli[name] for name in self.names]
        found = cider([one.captions[0] for one in stimuli], [one.captions[1:] for one in stimuli]).items
        assert found is not None
        return found

    def _ridge_captions(self, shares: Mapping[str, float]) -> dict[str, list[tuple[str, str]]]:
        bank = self._bank(self.people)
        found = {}
        for name, share in shares.items():
            pictures, vectors = self._ridge(name, share)
            found[name] = [(picture, text) for picture, (text, _) in zip(pictures, bank.nearest(vectors), strict=True)]
        return found

    def _ridge_first(self, shares: Mapping[str, float]) -> NDArray[np.float64]:
        found = {}
        for name, share in shares.items():
            pictures, vectors = self._ridge(name, share)
            found[name] = [
                (picture, "", 1 if hit else 2) for picture, hit in zip(pictures, self._ranked_first(vectors, pictures), strict=True)
            ]
        return self._first([found])

    def _ridge(self, participant: str, share: float) -> tuple[list[str], Tensor]:
        """Test pictures, and (pictures, width) vectors that ridge regression predicts from the same share of training pictures."""
        if (participant, share) not in self._known_ridge:
            train, validation = self._trials(participant, share)
            (test,) = select_trials(self.cohort, self.split, [participant], "test")
            captions = {name: self.cohort.stimuli[name].captions for one in (train, validation) for name in one.names}
            targets = {text: self._know([text])[0] for said in captions.values() for text in said}
            scale = VoxelScale()
            scale.add(participant, self.cohort.spaces[participant].num_voxels)
            scale.set(participant, *voxel_statistics(self.cohort, train))
            viewings = list_viewings(test, "repeats")
            fitted = fit_ridge(scale, self.cohort, train, validation, captions, targets)
            predicted = fitted.predict(scaled_responses(scale, self.cohort, viewings))
            self._known_ridge[participant, share] = ([one.name for one in viewings], predicted)
        return self._known_ridge[participant, share]

    def _trials(self, participant: str, share: float) -> tuple[Any, Any]:
        (train,) = select_trials(self.cohort, self.split, [participant], "train", share=share)
        (validation,) = select_trials(self.cohort, self.split, [participant], "validation")
        return train, validation

    def _bank(self, people: Sequence[str]) -> CaptionBank:
        names = dict.fromkeys(name for one in select_trials(self.cohort, self.split, people, "train") for name in one.names)
        captions = tuple(dict.fromkeys(text for name in names for text in self.cohort.stimuli[name].captions))
        return CaptionBank(captions=captions, vectors=self._know(captions))

    def _pictures(self, names: Sequence[str]) -> Tensor:
        captions = {name: self.cohort.stimuli[name].captions for name in names}
        return picture_vectors(names, captions, {text: self._know([text])[0] for said in captions.values() for text in said})

    def _know(self, texts: Sequence[str]) -> Tensor:
        new = sorted(set(texts) - set(self._vectors))
        if new:
            self._vectors.update(zip(new, self._encoder.sentences(new), strict=True))
        return torch.stack([self._vectors[text] for text in texts])

    @cached_property
    def _encoder(self) -> Any:
        return load_sentences(self.study.sentences.name)

    @cached_property
    def _vectors(self) -> dict[str, Tensor]:
        texts = json.loads((self.study.folder / "sentences.json").read_text(encoding="utf-8"))["texts"]
        return dict(zip(texts, self.study.sentences.sentences(texts), strict=True))

    @cached_property
    def _known_ridge(self) -> dict[tuple[str, float], tuple[list[str], Tensor]]:
        return {}

    @cached_property
    def _bayes(self) -> pd.DataFrame:
        table = pd.read_csv(self.study.folder / "bayes.tsv", sep="\t", dtype=str, keep_default_na=False)
        return table[table["stim_id"].isin(self.names)]

    def _bayes_first(self) -> NDArray[np.float64]:
        return (self._bayes["shared_rank"].astype(float) == 1).to_numpy(float)

    def _bayes_captions(self) -> dict[str, list[tuple[str, str]]] | None:
        if (self._bayes["caption"] == "n/a").any():
            return None
        return {str(name): list(zip(rows["stim_id"], rows["caption"], strict=True)) for name, rows in self._bayes.groupby("participant_id")}


def _moved_on(said: Mapping[str, Sequence[Any]]) -> dict[str, list[tuple[str, str]]]:
    """Every picture with the caption of another one: the 37th after it."""
    return {name: [(row[0], rows[(place + 37) % len(rows)][1]) for place, row in enumerate(rows)] for name, rows in said.items()}
