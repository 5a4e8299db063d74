"""Write simulated viewers as BIDS: single-trial maps and masks per person; pictures, captions and truth once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainfm_cli.bids.derivatives import write_bytes, write_json, write_tsv
from brainfm_cli.bids.trials import write_trials
from brainfm_cli.records import RunKey
from brainfm_cli.simulation import viewing_scenes as grammar
from brainfm_cli.simulation.viewing import bayes_decode, draw_stimuli, draw_viewer, nuisance_names, view

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from brainfm_cli.simulation.viewing import Decoded, Stimulus, Trials, Viewer, ViewingSettings

TASK = "viewing"
SPACE = "MNI152NLin2009cAsym"
MASK = "visual"
_ESTIMATOR = "simulated: tuning to semantic features, nuisance and noise"


def write_viewer(root: Path, settings: ViewingSettings, *, label: str, seed: int, index: int, effect: float) -> list[Path]:
    """Write one person's runs; gives back the files."""
    viewer = draw_viewer(settings, seed=seed, index=index, effect=effect)
    stimuli = draw_stimuli(settings, seed=seed, index=index)
    trials = view(viewer, stimuli, settings, seed=seed)
    written: list[Path] = []
    runs = np.array(trials.run)
    for run in range(1, int(runs.max()) + 1):
        rows = np.flatnonzero(runs == run)
        written += write_trials(
            root,
            RunKey(participant=label, task=TASK, run=str(run)),
            SPACE,
            iter(trials.responses[rows]),
            _table(trials, stimuli, rows, pictures=settings.caption_file is None),
            viewer.mask,
            viewer.affine,
            facts={"Units": "percent signal change", "Estimator": _ESTIMATOR},
            mask_label=MASK,
        )
    return written


def write_stimuli_and_truth(root: Path, settings: ViewingSettings, *, labels: Mapping[int, str], seed: int, effect: float) -> list[Path]:
    """Write the stimulus table, pictures, participants and what perfect knowledge can decode; everybody is drawn again."""
    seen: dict[str, Stimulus] = {}
    people, rows = [], []
    for index, label in labels.items():
        viewer = draw_viewer(settings, seed=seed, index=index, effect=effect)
        stimuli = draw_stimuli(settings, seed=seed, index=index)
        seen |= {stimulus.name: stimulus for stimulus in reversed(stimuli)}
        trials = view(viewer, stimuli, settings, seed=seed)
        decoded = bayes_decode(viewer, stimuli, trials, np.stack([one.features for one in stimuli]))
        people.append(_person(label, viewer, stimuli, decoded))
        rows += _decoded_rows(label, viewer, stimuli, trials, decoded)
    table = pd.DataFrame({"participant_id": [f"sub-{label}" for label in labels.values()], "voxels": [one["voxels"] for one in people]})
    truth = {
        "kind": "viewing",
        "seed": seed,
        "effect": effect,
        "settings": settings.model_dump(mode="json"),
        "note": (
            "Ceilings of a decoder that knows the generator: tuning, noise and the spread of the nuisance. 'retrieval' tells a picture from "
            "all that the person saw; bayes.tsv says how it ranks among shared pictures and, for the own grammar, what it would say"
        ),
        "people": people,
    }
    return [
        *_write_stimuli(root, settings, list(seen.values())),
        write_tsv(root / "participants.tsv", table),
        write_json(root / "participants.json", {"voxels": {"Description": "Voxels of the mask of visual cortex"}}),
        write_tsv(root / "bayes.tsv", pd.DataFrame(rows)),
        write_json(root / "truth.json", truth),
    ]


def _table(trials: Trials, stimuli: list[Stimulus], rows: np.ndarray, *, pictures: bool) -> pd.DataFrame:
    names = [stimuli[trials.stimuli[row]].name for row in rows]
    values: dict[str, Any] = {"stim_id": names}
    if pictures:
        values["stim_file"] = [f"{name}.png" for name in names]
    values["repeat"] = [trials.repeat[row] for row in rows]
    values |= {name: np.round(trials.nuisance[rows, place], 4) for place, name in enumerate(nuisance_names())}
    return pd.DataFrame(values)


def _write_stimuli(root: Path, settings: ViewingSettings, stimuli: list[Stimulus]) -> list[Path]:
    stimuli = sorted(stimuli, key=lambda one: one.name)
    most = max(len(one.captions) for one in stimuli)
    values: dict[str, Any] = {"stim_id": [one.name for one in stimuli]}
    written = []
    if settings.caption_file is None:
        values["filename"] = [f"{one.name}.png" for one in stimuli]
        for one in stimuli:
            assert one.scene is not None  # noqa: S101  (pictures of the grammar have scenes)
            written.append(write_bytes(root / "stimuli" / f"{one.name}.png", grammar.draw_picture(one.scene, settings.picture_px)))
        values |= {slot: [getattr(one.scene, slot) for one in stimuli] for slot in grammar.SLOTS}
    values["shared"] = ["yes" if one.shared else "no" for one in stimuli]
    for place in range(most):
        values[f"caption_{place + 1}"] = [one.captions[place] if place < len(one.captions) else "n/a" for one in stimuli]
    images = [{"id": one.name, "file_name": f"{one.name}.png"} for one in stimuli]
    annotations = [
        {"image_id": one.name, "id": f"{one.name}-{place}", "caption": text} for one in stimuli for place, text in enumerate(one.captions)
    ]
    return [
        *written,
        write_tsv(root / "stimuli" / "stimuli.tsv", pd.DataFrame(values)),
        write_json(root / "stimuli" / "captions.json", {"images": images, "annotations": annotations}),
    ]


def _person(label: str, viewer: Viewer, stimuli: list[Stimulus], decoded: Decoded) -> dict[str, Any]:
    count = len(stimuli)
    values: dict[str, Any] = {
        "participant": label,
        "voxels": len(viewer.ceilings),
        "noise_ceiling": round(float(viewer.ceilings.mean()), 4),
        "pictures": count,
        "retrieval": {
            "averaged": {"first": round(float((decoded.rank == 1).mean()), 4), "mean_rank": round(float(decoded.rank.mean()), 3)},
            "single": {"first": round(float((decoded.first_trial_rank == 1).mean()), 4), "mean_rank": round(float(decoded.first_trial_rank.mean()), 3)},
            "chance_first": round(1 / count, 6),
        },
    }  # fmt: skip
    if decoded.scenes:
        right = {
            slot: float(
                np.mean([getattr(said, slot) == getattr(one.scene, slot) for said, one in zip(decoded.scenes, stimuli, strict=True)])
            )
            for slot in grammar.SLOTS
        }
        values["slots"] = {slot: round(share, 4) for slot, share in right.items()}
    return values


def _decoded_rows(label: str, viewer: Viewer, stimuli: list[Stimulus], trials: Trials, decoded: Decoded) -> list[dict[str, Any]]:
    shared = [place for place, one in enumerate(stimuli) if one.shared]
    pool = dict(zip(shared, _ranks_within(viewer, stimuli, trials, shared), strict=True))
    rows = []
    for place, one in enumerate(stimuli):
        row: dict[str, Any] = {"participant_id": label, "stim_id": one.name, "rank": float(decoded.rank[place]), "of": len(stimuli)}
        row |= {"shared_rank": pool.get(place, "n/a"), "shared_of": len(shared) if place in pool else "n/a"}
        row["caption"] = grammar.full_caption(decoded.scenes[place]) if decoded.scenes else "n/a"
        rows.append(row)
    return rows


def _ranks_within(viewer: Viewer, stimuli: list[Stimulus], trials: Trials, places: list[int]) -> list[float]:
    if not places:
        return []
    kept = {old: new for new, old in enumerate(places)}
    rows = [row for row, stimulus in enumerate(trials.stimuli) if stimulus in kept]
    part = type(trials)(
        stimuli=tuple(kept[trials.stimuli[row]] for row in rows),
        repeat=tuple(trials.repeat[row] for row in rows),
        run=tuple(trials.run[row] for row in rows),
        responses=trials.responses[rows],
        nuisance=trials.nuisance[rows],
    )
    few = [stimuli[place] for place in places]
    return [float(rank) for rank in bayes_decode(viewer, few, part, np.stack([one.features for one in few]), scenes=False).rank]
