"""Vectors of the pictures that were seen: read from a table, or made by a vision model from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UsageError
from brainfm_cli.models.vision import load_vision_encoder

if TYPE_CHECKING:
    from torch import Tensor

    from brainfm_cli.bids.voxel_cohort import VoxelCohort


def read_picture_vectors(source: Path, pictures: Path | None, cohort: VoxelCohort) -> dict[str, Tensor]:
    """(width,) unit vector of every picture of a cohort, by name.

    ``source`` is a TSV (first column the name, then numbers) or the folder of a vision model, which embeds the files below ``pictures``.

    Raises
    ------
    InputNotFoundError
        The table, the model or a picture is absent.
    InputDatasetError
        The table is unreadable, or the cohort does not know the files of its pictures.
    UsageError
        A vision model was given without the folder of pictures.
    """
    if source.is_file():
        return _from_table(source)
    if pictures is None:
        raise UsageError(
            "a vision model needs the pictures", fix="set pictures to the folder of the stimuli, or give a table of vectors as vision"
        )
    names = sorted(set(cohort.trials["stimulus"]))
    nameless = [name for name in names if not cohort.stimuli[name].file]
    if nameless:
        raise InputDatasetError(
            f"the cohort does not know the file of picture '{nameless[0]}'",
            where=cohort.root,
            fix="add a column filename to stimuli.tsv and pack again",
        )
    encoder = load_vision_encoder(source)
    vectors = encoder.pictures([pictures / cohort.stimuli[name].file for name in names])
    return dict(zip(names, vectors, strict=True))


def _from_table(path: Path) -> dict[str, Tensor]:
    try:
        table = pd.read_csv(path, sep="\t", index_col=0, dtype={0: str})
        values = table.to_numpy(np.float32)
    except FileNotFoundError as error:
        raise InputNotFoundError("the table of picture vectors is absent", where=path, fix="check vision") from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(
            f"the table of picture vectors is unreadable: {error}", where=path, fix="TSV: name, then numbers"
        ) from error
    if not np.isfinite(values).all() or not values.size:
        raise InputDatasetError("the table of picture vectors holds cells that are no numbers", where=path, fix="TSV: name, then numbers")
    unit = functional.normalize(torch.from_numpy(values), dim=1)
    return dict(zip(map(str, table.index), unit, strict=True))
