"""Small packed voxel cohorts with planted responses, written in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from brainfm_cli.bids.stimuli import Stimulus
from brainfm_cli.bids.voxel_cohort import VoxelCohort, VoxelCohortWriter, VoxelSpace, order_hash
from brainfm_cli.simulation.viewing import ViewingSettings, draw_stimuli, draw_viewer, view

SETTINGS = ViewingSettings(images=40, shared=16, voxels=70, repeats=2, captions=3, noise_ceiling=0.5, trials_per_run=40)


def write_cohort(
    root: Path, *, people: int = 2, settings: ViewingSettings = SETTINGS, seed: int = 1, template: bool = False
) -> VoxelCohort:
    """A cohort of simulated viewers, without images in between."""
    with VoxelCohortWriter(root / "cohort") as writer:
        for index in range(1, people + 1):
            label = f"{index:02d}"
            viewer, stimuli = draw_viewer(settings, seed=seed, index=index), draw_stimuli(settings, seed=seed, index=index)
            trials = view(viewer, stimuli, settings, seed=seed)
            order = np.flatnonzero(viewer.mask).astype(np.int32)
            writer.add_participant(
                VoxelSpace(
                    participant=label, space="T1w", mask_sha256=f"mask{label}", order_sha256=order_hash(f"mask{label}", order),
                    places_mm=viewer.positions_mm,
                ),
                order,
            )  # fmt: skip
            for one in stimuli:
                writer.add_stimulus(
                    Stimulus(
                        name=one.name, captions=one.captions, source="template" if template else "captions", file=f"{one.name}.png",
                        fields={"shared": "yes" if one.shared else "no"},
                    )
                )  # fmt: skip
            rows = [
                {"dataset": "simulated", "session": "", "run": f"task-view_run-{trials.run[row]}", "trial": row, "stimulus": stimuli[place].name, "repeat": trials.repeat[row]}
                for row, place in enumerate(trials.stimuli)
            ]  # fmt: skip
            writer.add_trials(label, iter(trials.responses), rows)
        writer.finish(pd.DataFrame(index=pd.Index([f"{index:02d}" for index in range(1, people + 1)])))
    return VoxelCohort.open(root)
