"""Write parcellated runs and the atlases behind them as BIDS derivatives, and find our own again."""

from __future__ import annotations

import gzip
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.bids.derivatives import write_bytes, write_json, write_text, write_tsv
from brainfm_cli.bids.names import atlas_entities, format_name, output_name
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.records import RegionTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from brainfm_cli.records import ParcellatedRun, RunKey

RELATIONSHIP = {"pearson": "Pearson correlation", "fisherz": "Fisher z of the Pearson correlation", "partial": "partial correlation"}


def run_path(root: Path, kind: str, key: RunKey, space: str | None, atlas: str) -> Path:
    """Where one output of a run lies; ``kind`` is a name of :data:`brainfm_cli.bids.names.OUTPUTS`."""
    entities = key.entities | ({"space": space} if space else {}) | atlas_entities(atlas)
    folder = root / f"sub-{key.participant}" / (f"ses-{key.session}" if key.session else "") / "func"
    return folder / output_name(kind, entities)


def write_run(
    root: Path,
    run: ParcellatedRun,
    names: Sequence[str],
    matrices: Mapping[str, NDArray[np.float64]],
    *,
    facts: Mapping[str, Any],
    sources: Sequence[str],
) -> list[Path]:
    """Write one run in one atlas: series, coverage and matrices, each with its sidecar; gives back the files.

    Parameters
    ----------
    matrices
        (regions, regions) by kind: pearson, fisherz, partial.
    facts
        Further fields of the series' sidecar: denoising, frames, motion, notes.
    sources
        BIDS URIs of the files the series was made from.
    """
    space = run.space or None
    series = run_path(root, "timeseries", run.key, space, run.atlas)
    nodes = f"bids::{atlas_path(root, run.atlas, run.space or 'unknown').relative_to(root).as_posix()}"
    common = {"Atlas": run.atlas, **({"SpatialReference": space} if space else {}), "NodeFiles": [nodes]}
    written = [
        write_matrix(series, names, run.series),
        write_json(
            series.with_suffix(".json"),
            {
                "Description": "Mean of each atlas region in every kept frame; n/a where too little of the region lies inside the brain mask",
                "SamplingFrequency": round(1 / run.repetition_time_s, 6),
                "RepetitionTime": run.repetition_time_s,
                **common,
                **facts,
                "Sources": list(sources),
            },
        ),
    ]
    coverage = run_path(root, "coverage", run.key, space, run.atlas)
    described = {"Description": "Share of each region's voxels inside the brain mask; n/a where unknown", "Units": "fraction", **common}
    written += [
        write_matrix(coverage, names, run.coverage[None]),
        write_json(coverage.with_suffix(".json"), {**described, "Sources": list(sources)}),
    ]
    for kind, matrix in matrices.items():
        path = run_path(root, kind, run.key, space, run.atlas)
        sidecar = {
            "RelationshipMeasure": RELATIONSHIP[kind],
            "Weighted": True,
            "Directed": False,
            "ValidDiagonal": False,
            "StorageFormat": "Full",
            "NonNegative": False,
            **common,
            "Sources": [f"bids::{series.relative_to(root).as_posix()}"],
        }
        written += [write_matrix(path, names, matrix, nodes=names), write_json(path.with_suffix(".json"), sidecar)]
    return written


def write_matrix(path: Path, names: Sequence[str], values: NDArray[np.float64], *, nodes: Sequence[str] = ()) -> Path:
    """Write a table of numbers with nine digits, ``n/a`` for NaN, after a first column ``Node`` where ``nodes`` are given."""
    # Thousands of columns: pandas takes ten times as long.
    row_format = "\t".join(["%.9g"] * values.shape[1])
    rows = [(row_format % tuple(row)).replace("nan", "n/a") for row in values.tolist()]
    if nodes:
        rows = [f"{node}\t{row}" for node, row in zip(nodes, rows, strict=True)]
    head = "\t".join([*(["Node"] if nodes else []), *names])
    return write_text(path, "\n".join([head, *rows]) + "\n")


def atlas_path(root: Path, label: str, template: str) -> Path:
    """The region table of an atlas in one of our derivatives."""
    return root / f"tpl-{template}" / format_name({"tpl": template} | atlas_entities(label), "dseg", ".tsv")


def write_atlas(
    root: Path,
    label: str,
    template: str,
    regions: RegionTable,
    *,
    values: Sequence[int] | None = None,
    image: tuple[NDArray[np.int32], NDArray[np.float64]] | bytes | None = None,
    description: Mapping[str, Any],
) -> None:
    """Write an atlas as BIDS-Atlas files, once; files that are there already are left alone.

    Parameters
    ----------
    image
        Label image and affine, the bytes of a ``dlabel.nii``, or none where only names are known.
    description
        Content of ``atlas-<label>_description.json``; ``License`` is required by BIDS.
    """
    table = atlas_path(root, label, template)
    named = root / f"atlas-{atlas_entities(label)['atlas']}_description.json"
    if not named.exists():
        write_json(named, dict(description))
    if isinstance(image, bytes):
        _once(table.with_name(table.name.removesuffix(".tsv") + ".dlabel.nii"), image)
    elif image is not None and not table.with_suffix(".nii.gz").exists():
        _once(table.with_suffix(".nii.gz"), _nifti(*image))
    if not table.with_suffix(".json").exists():
        columns = {
            "index": {"Description": "label value in the image"},
            "name": {"Description": "region name, the column name of every series"},
            "network": {"Description": "functional network"},
            **{axis: {"Description": "centre of the region", "Units": "mm"} for axis in "xyz"},
        }
        write_json(
            table.with_suffix(".json"), {"Description": str(description.get("Name", label)), "SpatialReference": template, **columns}
        )
    if not table.exists():
        write_tsv(table, _region_frame(regions, values))


def read_regions(root: Path, label: str, template: str) -> RegionTable | None:
    """The regions of an atlas that this derivative was made with; none where it holds no such table."""
    import pandas as pd

    path = atlas_path(root, label, template)
    if not path.is_file():
        return None
    try:
        frame = pd.read_csv(path, sep="\t", na_values=["n/a"], dtype={"name": str, "network": str}, keep_default_na=False)
        names = tuple(frame["name"])
        networks = tuple(None if pd.isna(value) else str(value) for value in frame["network"]) if frame["network"].notna().any() else ()
        centroids = frame[["x", "y", "z"]].to_numpy(np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputDatasetError(f"the region table is unreadable: {error}", where=path, fix="run the participant level again") from error
    return RegionTable(names=names, networks=networks, centroids_mm=None if np.isnan(centroids).all() else centroids)


def _region_frame(regions: RegionTable, values: Sequence[int] | None) -> pd.DataFrame:
    import pandas as pd

    number = len(regions.names)
    centroids = np.full((number, 3), np.nan) if regions.centroids_mm is None else np.round(regions.centroids_mm.astype(float), 2)
    return pd.DataFrame(
        {
            "index": list(values) if values is not None else range(1, number + 1),
            "name": regions.names,
            "network": regions.networks or [None] * number,
            **{axis: centroids[:, column] for column, axis in enumerate("xyz")},
        }
    )


def _nifti(labels: NDArray[np.int32], affine: NDArray[np.float64]) -> bytes:
    import nibabel as nib

    image = nib.Nifti1Image(labels.astype(np.int16 if labels.max() < 2**15 else np.int32), affine)
    image.header.set_xyzt_units("mm", "sec")
    packed = io.BytesIO()
    # No time stamp and no file name inside: every job of an array writes the same bytes.
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, compresslevel=6) as stream:
        stream.write(image.to_bytes())
    return packed.getvalue()


def _once(path: Path, data: bytes) -> None:
    if not path.exists():
        write_bytes(path, data)
