"""A packed slice cohort of given pixels, without any image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort, write_index, write_participant


def write_slice_cohort(
    root: Path, items: Mapping[str, np.ndarray | Mapping[str, np.ndarray]], *, masks: dict[str, np.ndarray] | None = None, sites: dict[str, str] | None = None, columns: dict[str, list[str]] | None = None
) -> SliceCohort:  # fmt: skip
    """One axial T1w scan per participant, or one per sequence on the same grid; ``items`` (slices, size, size) by label [and sequence], ``columns`` of participants.tsv."""
    tables = []
    scans = {label: found if isinstance(found, Mapping) else {"T1w": found} for label, found in items.items()}
    for label, by_sequence in scans.items():
        drawn = None if masks is None else masks[label]
        packed = [_scan(label, sequence, pixels, drawn, (sites or {}).get(label, "")) for sequence, pixels in by_sequence.items()]
        write_participant(root / f"sub-{label}", iter(packed))
        tables.append(pd.read_parquet(root / f"sub-{label}" / "items.parquet"))
    first = next(iter(next(iter(scans.values())).values()))
    people = pd.DataFrame({"participant_id": [f"sub-{label}" for label in items], **(columns or {})})
    described = {"size": first.shape[-1], "dims": first.ndim - 1, "labels": {} if masks is None else {1: "lesion"}, "items_sha256": {}}
    write_index(root, pd.concat(tables, ignore_index=True), people, described)
    return SliceCohort.open(root)


def _scan(
    label: str, sequence: str, pixels: np.ndarray, drawn: np.ndarray | None, site: str
) -> tuple[PackedScan, pd.DataFrame, np.ndarray, np.ndarray | None]:
    size, count = pixels.shape[-1], len(pixels)
    name = f"sub-{label}_{sequence}"
    scan = PackedScan(
        name=name, path=f"sub-{label}/anat/{name}.nii.gz", session="", sequence=sequence,
        grid={"shape": (size, size, count), "voxel_mm": (1.0, 1.0, 5.0), "plane": "axial", "size": size, "dims": pixels.ndim - 1},
        native_shape=(size, size, count), native_affine=tuple(map(tuple, np.diag([1.0, 1, 5, 1]).tolist())),
        mask=None if drawn is None else "mask", labels={} if drawn is None else {1: "lesion"}, notes=(),
    )  # fmt: skip
    rows = pd.DataFrame(
        {
            "dataset": "tests", "participant": label, "session": "", "site": site, "scan": name,
            "sequence": sequence, "plane": "axial", "item": np.arange(count, dtype=np.int32), "slice": np.arange(count, dtype=np.int32),
            "z_mm": (np.arange(count) * 5.0).astype(np.float32), "brain": 0.5, "noise": 0.0, "ghosting": 0.0, "entropy": 4.0,
            "lesion": -1 if drawn is None else (drawn.reshape(count, -1) > 0).sum(1), "why": "",
        }
    )  # fmt: skip
    return scan, rows, pixels, drawn
