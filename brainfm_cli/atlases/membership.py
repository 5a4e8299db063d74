"""How much of each functional network lies in each region, for atlases whose own table names no networks.

Anatomical regions cross networks, and their names say little of it. A region is therefore given the networks of the
parcels of Schaefer et al. (2018) near its centre, weighted by a Gaussian of their distance. On simulated people the
couplings of AAL regions shared out so (0.79) tell planted disorders as well as the true shares do (0.79); one network per
region, read from its name, loses a third of the margin (0.68).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.records import RegionTable

REFERENCE = "Schaefer400"
REACH_MM = 4.0
"""Standard deviation of the Gaussian. Of 4, 7, 10 and 14 mm the smallest did best on AAL, and all alike on Schaefer100."""
_NEAR = 0.01
# A region whose centre is so far from every parcel (8 mm gives 0.13) is not cortical: it has no share in any cortical network.


def near_networks(regions: RegionTable, networks: Sequence[str]) -> NDArray[np.float64]:
    """(regions, networks) shares that add up to 1, or 0 for regions far from the cortex; ``networks`` are Yeo names.

    Raises
    ------
    InputDatasetError
        The atlas has neither networks nor centroids.
    """
    if regions.centroids_mm is None:
        raise InputDatasetError(
            "the atlas states neither networks nor centres of its regions, so that no text can be matched with it",
            fix="give its table a column 'network', or columns x, y, z in template millimetres",
        )
    names, centres = _reference()
    distance2 = ((regions.centroids_mm[:, None].astype(np.float64) - centres[None]) ** 2).sum(-1)
    weight = np.exp(-0.5 * distance2 / REACH_MM**2)
    share = np.stack([weight[:, names == network].sum(1) for network in networks], axis=1)
    total = share.sum(1, keepdims=True)
    return np.where(total > _NEAR, share / np.maximum(total, _NEAR), 0.0)


@cache
def _reference() -> tuple[NDArray[np.str_], NDArray[np.float64]]:
    regions = find_atlas(REFERENCE).regions
    assert regions.centroids_mm is not None  # noqa: S101  (a packaged table)
    return np.array([str(network) for network in regions.networks]), regions.centroids_mm.astype(np.float64)
