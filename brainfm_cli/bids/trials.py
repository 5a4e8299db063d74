"""Single-trial responses as a BIDS derivative: find them, check what belongs together, write them.

A run is ``…_stat-effect_desc-singletrial_statmap.nii.gz`` (volume = trial), a row-aligned ``…_trials.tsv``, and a mask.
The images are read in :mod:`brainfm_cli.signals.trial_maps`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.bids.derivatives import write_json, write_tsv
from brainfm_cli.bids.images import Space, sidecar, write_image, write_series
from brainfm_cli.bids.inputs import in_selection, list_participants, run_key, walk_files
from brainfm_cli.bids.names import output_name, parse_name
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from brainfm_cli.config import Selection
    from brainfm_cli.records import RunKey

_IMAGES = (".nii.gz", ".nii")
_OF_ANATOMY = ("sub", "ses", "task", "acq", "dir", "run", "space", "res")


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """Single-trial responses of one run, as found in a derivative."""

    key: RunKey
    """Which run."""
    space: str
    """Label of ``space-``; empty where the name has none."""
    image: Path
    """(x, y, z, trials) responses."""
    table: Path
    """One row per trial."""
    mask: Path
    """(x, y, z) voxels that are used."""
    segmentation: Path | None
    """(x, y, z) region numbers on the same grid, by which voxels are ordered; none where there is none."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that the responses depend on."""
        beside = sidecar(self.image)
        files = (self.image, self.table, self.mask, self.segmentation, beside if beside.is_file() else None)
        return tuple(path for path in files if path is not None)


def holds_trials(dataset: Path) -> bool:
    """Whether one of the first participants has single-trial maps."""
    return any(_maps(dataset, label) for label in (list_participants(dataset) if dataset.is_dir() else [])[:20])


def find_trials(dataset: Path, label: str, selection: Selection, *, mask: str | None = None) -> list[TrialRun]:
    """The single-trial runs of one participant, in the order of their names.

    ``mask`` is the ``desc-`` label of the mask; unset takes the only one that fits.

    Raises
    ------
    InputNotFoundError
        There is no map, or one without its table or mask.
    InputDatasetError
        Several masks fit.
    """
    found = []
    files = [(parse_name(path.name), path) for path in walk_files(dataset / f"sub-{label}")]
    for image in _maps(dataset, label):
        entities = parse_name(image.name)[0]
        if not in_selection(entities, selection):
            continue
        key = run_key(entities)
        tables = [
            path for (other, suffix, extension), path in files if suffix == "trials" and extension == ".tsv" and run_key(other) == key
        ]
        if len(tables) != 1:
            raise InputNotFoundError(f"{len(tables)} tables of trials belong to this map, not one", where=image, fix="add …_trials.tsv with one row per volume")  # fmt: skip
        found.append(
            TrialRun(
                key=key,
                space=entities.get("space", ""),
                image=image,
                table=tables[0],
                mask=_one_mask(image, entities, files, mask),
                segmentation=next((path for path in _beside(entities, files, "dseg")), None),
            )
        )
    if not found:
        raise InputNotFoundError(
            f"participant {label} has no single-trial maps", where=dataset, fix="it needs …_stat-effect_desc-singletrial_statmap.nii.gz"
        )
    return found


def read_trial_table(path: Path) -> pd.DataFrame:
    """The table of a run's trials, every cell as text.

    Raises
    ------
    InputDatasetError
        It is unreadable or empty.
    """
    import pandas as pd

    try:
        table = pd.read_csv(io.StringIO(path.read_text(encoding="utf-8")), sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the table of trials is unreadable: {error}", where=path, fix="it must be a UTF-8 TSV") from error
    if table.empty:
        raise InputDatasetError("the table of trials has no row", where=path, fix="it needs one row per volume of the map")
    return table


def read_scale(run: TrialRun) -> float | None:
    """``Scale`` of the map's sidecar, by which stored numbers are multiplied; none where it states none.

    Raises
    ------
    InputDatasetError
        The sidecar is unreadable, or Scale is no positive number.
    """
    path = sidecar(run.image)
    if not path.is_file():
        return None
    try:
        value = read_json(path).get("Scale")
    except (OSError, ValueError, AttributeError) as error:
        raise InputDatasetError(f"the sidecar is unreadable: {error}", where=path, fix="it must be a JSON object") from error
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputDatasetError(f"Scale is {value!r}", where=path, fix="state a positive number, e.g. 0.0033333 for NSD's int16 betas")
    return float(value)


def write_trials(
    root: Path,
    key: RunKey,
    space: str,
    responses: Iterable[NDArray[np.float32]],
    table: pd.DataFrame,
    mask: NDArray[np.bool_],
    affine: NDArray[np.float64],
    *,
    facts: Mapping[str, Any],
    mask_label: str,
) -> list[Path]:
    """Write one run: map, table, mask and sidecars; gives back the files.

    Parameters
    ----------
    responses
        (voxels,) in C order of the mask, one for each row of ``table``, streamed.
    facts
        Further fields of the map's sidecar: estimator, units.
    """
    folder = root / f"sub-{key.participant}" / (f"ses-{key.session}" if key.session else "") / "func"
    placed = {**key.entities, **({"space": space} if space else {})}
    image, trials = folder / output_name("trial_map", placed), folder / output_name("trials", key.entities)
    masked = folder / output_name("trial_mask", {**placed, "desc": mask_label})

    def volumes() -> Iterable[NDArray[np.float32]]:
        for response in responses:
            volume = np.zeros(mask.shape, np.float32)
            volume[mask] = response
            yield volume

    form: Space = "template" if space.startswith("MNI") else "scanner"
    described = {
        "TrialOrder": "row i of the table of trials is volume i",
        **({"SpatialReference": space} if space.startswith("MNI") else {}),
    }
    return [
        write_series(
            image, volumes(), num_frames=len(table), shape=mask.shape, affine=affine, repetition_time_s=0.0, space=form, dtype=np.float32
        ),
        write_json(sidecar(image), {**described, **facts}),
        write_tsv(trials, table),
        write_image(masked, mask.astype(np.uint8), affine, space=form),
        write_json(sidecar(masked), {"Type": "ROI", **({"SpatialReference": space} if space.startswith("MNI") else {})}),
    ]


def _maps(dataset: Path, label: str) -> list[Path]:
    found = []
    for path in walk_files(dataset / f"sub-{label}"):
        entities, suffix, extension = parse_name(path.name)
        if suffix == "statmap" and extension in _IMAGES and entities.get("desc") == "singletrial":
            found.append(path)
    return found


def _beside(entities: Mapping[str, str], files: list[tuple[tuple[dict[str, str], str, str], Path]], suffix: str) -> list[Path]:
    """Images of one suffix whose entities the map shares, e.g. a mask of the whole session."""
    found = []
    for (other, ending, extension), path in files:
        if (
            ending == suffix
            and extension in _IMAGES
            and all(other.get(name, entities.get(name)) == entities.get(name) for name in _OF_ANATOMY)
        ):
            found.append(path)
    return found


def _one_mask(
    image: Path, entities: Mapping[str, str], files: list[tuple[tuple[dict[str, str], str, str], Path]], label: str | None
) -> Path:
    masks = [path for path in _beside(entities, files, "mask") if label is None or parse_name(path.name)[0].get("desc") == label]
    named = {parse_name(path.name)[0].get("desc", "") for path in masks}
    if not masks:
        raise InputNotFoundError(
            "no mask belongs to this map", where=image, fix="add …_desc-<label>_mask.nii.gz on the same grid, or set mask"
        )
    if len(named) > 1:
        raise InputDatasetError(
            f"several masks belong to this map: desc-{', desc-'.join(sorted(named))}",
            where=image,
            fix="say which: --set single_trial.mask=LABEL",
        )
    return max(masks, key=lambda path: len(parse_name(path.name)[0]))
