"""predict group with ``explain``: what the predictions rest on, written beside the evaluation and read again for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.bids.derivatives import write_json, write_tsv
from brainfm_cli.documents import read_json
from brainfm_cli.learning.attributions import Explanation, Maps, mean_maps, summarise
from brainfm_cli.reports.explanation import explanation_sections

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.learning.attributions import ExplanationSettings
    from brainfm_cli.learning.explanation import FoldExplainer
    from brainfm_cli.learning.results import Metrics
    from brainfm_cli.records import RegionTable
    from brainfm_cli.reports.page import Section

_FOLDER = "explanation"


def write_explanation(root: Path, explainer: FoldExplainer, settings: ExplanationSettings, regions: dict[str, RegionTable]) -> list[Path]:
    """Write shares and checks (JSON), maps of regions, and of regions and time (TSV); gives back the files."""
    found = summarise(explainer.found, explainer.random, settings)
    by_region, by_time = [], []
    for one in found:
        maps = mean_maps([run for run in explainer.found if run.atlas == one.atlas and run.baseline == one.baseline])
        table = regions[one.atlas]
        for name, values in maps.regions.items():
            frame = pd.DataFrame({"region": table.names, "share": values, "signed": maps.signed[name]})
            by_region.append(frame.assign(atlas=one.atlas, baseline=one.baseline, modality=name))
        for name, grid in maps.times.items():
            long = pd.DataFrame(grid, columns=list(table.names)).rename_axis("time").reset_index()
            long = long.melt(id_vars="time", var_name="region", value_name="share")
            by_time.append(long.assign(atlas=one.atlas, baseline=one.baseline, modality=name))
    folder = root / _FOLDER
    written = [write_tsv(folder / "regions.tsv", pd.concat(by_region)[["atlas", "baseline", "modality", "region", "share", "signed"]])]
    if by_time:
        written.append(write_tsv(folder / "times.tsv", pd.concat(by_time)[["atlas", "baseline", "modality", "region", "time", "share"]]))
    return [*written, write_json(folder / "summary.json", {"explanations": [one.model_dump(mode="json") for one in found]})]


def read_sections(root: Path, metrics: Metrics, regions: dict[str, RegionTable]) -> list[Section]:
    """The part of the report; nothing where nothing was explained."""
    folder = root / _FOLDER
    if not (folder / "summary.json").is_file():
        return []
    values = read_json(folder / "summary.json")
    found = [Explanation.model_validate(one) for one in values["explanations"]]
    by_region = _table(folder / "regions.tsv")
    by_time = _table(folder / "times.tsv") if (folder / "times.tsv").is_file() else None
    maps = {}
    for one in found:
        mine = _of(by_region, one)
        times = (
            {}
            if by_time is None
            else {str(name): _grid(part, regions[one.atlas]) for name, part in _of(by_time, one).groupby("modality", sort=False)}
        )
        maps[one.atlas, str(one.baseline)] = Maps(
            regions={str(name): part["share"].to_numpy(float) for name, part in mine.groupby("modality", sort=False)},
            signed={str(name): part["signed"].to_numpy(float) for name, part in mine.groupby("modality", sort=False)},
            times=times,
        )
    outcome = f"'{metrics.classes[-1]}'" if metrics.classes else f"a high '{metrics.target}'"
    return explanation_sections(found, maps, regions, outcome=outcome)


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype={"region": str, "atlas": str}, keep_default_na=False)


def _of(table: pd.DataFrame, one: Explanation) -> pd.DataFrame:
    return table[(table["atlas"] == one.atlas) & (table["baseline"] == one.baseline)]


def _grid(part: pd.DataFrame, regions: RegionTable) -> np.ndarray:
    """(time bins, regions)."""
    wide = part.pivot_table(index="time", columns="region", values="share")
    return wide[list(regions.names)].to_numpy(float)
