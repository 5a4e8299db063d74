"""brainfm from Python: load a model, embed a packed cohort, walk through its graphs (docs/python.md). The command line needs none of this."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import UsageError
from brainfm_cli.learning.samples import list_scans, whole_scans
from brainfm_cli.learning.tuning import embed, prepare, select_rows
from brainfm_cli.models.graphs import build_graphs, correlate
from brainfm_cli.systems import System, load_system

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch_geometric.data import Data

    from brainfm_cli.models.graphs import Connectivity, Edges
    from brainfm_cli.systems.brain_graph import BrainGraph

_AT_ONCE = 32


def load_model(folder: str | Path) -> System:
    """The model of a ``models/<id>`` folder, frozen and in evaluation mode.

    Raises
    ------
    InputNotFoundError
        There is no model.
    CheckpointMismatchError
        The folder holds no brainfm model, a damaged one, or one of an unknown system.
    UnsupportedStageError
        The model reads voxels, not regions (brain-caption).
    """
    system = load_system(Path(folder))
    system.module.eval()
    system.module.requires_grad_(False)  # noqa: FBT003  (torch's signature)
    return system


def load_cohort(folder: str | Path) -> Cohort:
    """A cohort that ``brainfm parcellate … group`` packed; series stay on disk until they are read.

    Raises
    ------
    InputNotFoundError
        There is no packed cohort.
    InputDatasetError
        Its files do not fit together.
    """
    return Cohort.open(Path(folder))


def embed_cohort(model: System, cohort: Cohort, atlas: str | None = None, *, participants: Sequence[str] = ()) -> pd.DataFrame:
    """Embedding of whole runs, averaged over each participant's runs.

    Parameters
    ----------
    atlas
        Label of an atlas that model and cohort share; may be left out where they share one.
    participants
        Participant keys; everybody who has the atlas where empty.

    Returns
    -------
    One row per participant (index ``participant``), columns ``e000``, ``e001`` … float32. No label was used; people the model
    was pretrained on are in ``provenance.json`` by hash.

    Raises
    ------
    UsageError
        Model and cohort share several atlases and none was chosen.
    CheckpointMismatchError
        They share none, or the atlas has other regions.
    InputDatasetError
        Nobody has a usable run in it.
    """
    shared = model.usable_atlases(cohort)
    if atlas is None and len(shared) > 1:
        raise UsageError(f"model and cohort share {len(shared)} atlases", fix=f"choose one of: {', '.join(shared)}")
    label = shared[0] if atlas is None else atlas
    if label not in shared:
        raise UsageError(f"model and cohort do not share the atlas '{label}'", fix=f"choose one of: {', '.join(shared)}")
    inputs = prepare(model, cohort, list(participants) or list(cohort.participants.index), label)
    values = embed(model, inputs, model.new_prompt(label).state_dict())
    columns = [f"e{column:03d}" for column in range(values.shape[1])]
    return pd.DataFrame(values, index=pd.Index(inputs.participants, name="participant"), columns=columns)


def attention_rollout(model: BrainGraph, cohort: Cohort, atlas: str, *, participants: Sequence[str] = ()) -> pd.DataFrame:
    """Attention rollout of a brain-graph model: from which regions what is read out can come, mean over each participant's runs.

    Returns
    -------
    One row per participant, columns ``disorder token``, ``atlas token`` and the names of the regions; rows add up to 1. It says
    where a model looks, not what speaks for an answer: that is ``predict group --set explain…``.

    Raises
    ------
    CheckpointMismatchError
        The atlas has other regions than the model's.
    UsageError
        Model and cohort do not share the atlas.
    """
    if atlas not in model.usable_atlases(cohort):
        raise UsageError(
            f"model and cohort do not share the atlas '{atlas}'", fix=f"choose one of: {', '.join(model.usable_atlases(cohort))}"
        )
    inputs = prepare(model, cohort, list(participants) or list(cohort.participants.index), atlas)
    prompt, rows = model.new_prompt(atlas), torch.arange(len(inputs.owner))
    with torch.no_grad():
        parts = [
            model.model.rollout(select_rows(inputs.graphs, part), prompt=prompt.graph, disorder=prompt.token)
            for part in rows.split(_AT_ONCE)
        ]
    columns = ["disorder token", "atlas token", *cohort.atlases[atlas].regions.names]
    return pd.DataFrame(inputs.average(torch.cat(parts)), index=pd.Index(inputs.participants, name="participant"), columns=columns)


def cohort_graphs(
    cohort: Cohort,
    atlas: str,
    *,
    connectivity: Connectivity = "fisher-z",
    edges: Edges = "top-k",
    density: float = 0.1,
    threshold: float = 0.3,
    participants: Sequence[str] = (),
) -> Iterator[Data]:
    """Every run of a cohort as a ``torch_geometric`` graph, one after the other, for models of one's own.

    Each has ``x`` (regions, regions) connectivity rows, ``edge_index`` (2, edges) both ways, ``edge_attr`` (edges, 1)
    correlation, ``present`` (regions,) bool, and the run's ``participant``, ``dataset``, ``session``, ``run`` and ``site``;
    graphs and edges as in the brain-graph model (settings ``system.graph``). Columns of participants.tsv are in
    ``cohort.participants.loc[graph.participant]``.

    Raises
    ------
    InputNotFoundError
        The cohort lacks the atlas.
    """
    from torch_geometric.data import Data

    (label,) = cohort.choose_atlases([atlas])
    scans = list_scans(cohort, list(participants) or list(cohort.participants.index), [label])
    for start in range(0, len(scans), _AT_ONCE):
        chunk = scans[start : start + _AT_ONCE]
        windows = whole_scans(cohort, chunk, label)
        correlation, present = correlate(windows.series, windows.frames)
        graphs = build_graphs(label, correlation, present, connectivity=connectivity, edges=edges, density=density, threshold=threshold)
        for row, scan in enumerate(chunk):
            index = graphs.adjacency[row].nonzero().T
            run = scan.rows[label]
            yield Data(
                x=graphs.features[row],
                edge_index=index,
                edge_attr=correlation[row][index[0], index[1]][:, None],
                present=present[row],
                participant=scan.participant,
                dataset=scan.dataset,
                session=run.session,
                run=run.run,
                site=run.site,
            )
