"""A packed slice cohort of given pixels, without any image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort, write_index, write_participant


def write_slice_cohort(
    root: Path, items: dict[str, np.ndarray], *, masks: dict[str, np.ndarray] | None = None, sites: dict[str, str] | None = None, columns: dict[str, list[str]] | None = None
) -> SliceCohort:  # fmt: skip
    """One axial T1w scan per participant; ``items`` (slices, size, size) by label, ``columns`` of participants.tsv."""
    tables = []
    for label, pixels in items.items():
        size, count = pixels.shape[-1], len(pixels)
        drawn = None if masks is None else masks[label]
        scan = PackedScan(
            name=f"sub-{label}_T1w", path=f"sub-{label}/anat/sub-{label}_T1w.nii.gz", session="", sequence="T1w",
            grid={"shape": (size, size, count), "voxel_mm": (1.0, 1.0, 5.0), "plane": "axial", "size": size, "dims": pixels.ndim - 1},
            native_shape=(size, size, count), native_affine=tuple(map(tuple, np.diag([1.0, 1, 5, 1]).tolist())),
            mask=None if drawn is None else "mask", labels={} if drawn is None else {1: "lesion"}, notes=(),
        )  # fmt: skip
        rows = pd.DataFrame(
            {
                "dataset": "tests", "participant": label, "session": "", "site": (sites or {}).get(label, ""), "scan": scan.name,
                "sequence": "T1w", "plane": "axial", "item": np.arange(count, dtype=np.int32), "slice": np.arange(count, dtype=np.int32),
                "z_mm": (np.arange(count) * 5.0).astype(np.float32), "brain": 0.5, "noise": 0.0, "ghosting": 0.0, "entropy": 4.0,
                "lesion": -1 if drawn is None else (drawn.reshape(count, -1) > 0).sum(1), "why": "",
            }
        )  # fmt: skip
        write_participant(root / f"sub-{label}", iter([(scan, rows, pixels, drawn)]))
        tables.append(pd.read_parquet(root / f"sub-{label}" / "items.parquet"))
    size, dims = next(iter(items.values())).shape[-1], next(iter(items.values())).ndim - 1
    people = pd.DataFrame({"participant_id": [f"sub-{label}" for label in items], **(columns or {})})
    described = {"size": size, "dims": dims, "labels": {} if masks is None else {1: "lesion"}, "items_sha256": {}}
    write_index(root, pd.concat(tables, ignore_index=True), people, described)
    return SliceCohort.open(root)
