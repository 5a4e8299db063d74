"""Intensity bias of a structural image, by the algorithm of N4 (Tustison 2010). Pure numbers, nothing is written.

The log-intensities are sharpened towards a histogram from which a Gaussian has been deconvolved, a smooth B-spline is
fitted to what that took away (Lee 1997), and so on, with finer and finer splines. ITK's own N4 needs minutes and
gigabytes on a 0.7 mm head; the field is smooth, so here few points on a coarse grid determine it, and the splines at those
points are a matrix, made once for each fineness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_SPANS = (1, 2, 4)  # spline intervals along each axis, coarse to fine
_ITERATIONS = 30
_STOP = 1e-4  # change of the field, as a coefficient of variation
_BINS, _FWHM, _NOISE = 200, 0.15, 0.01  # of log-intensity, as in ITK
_POINTS = 12_000
_MIN_POINTS = 500


def fit_bias(data: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(x, y, z) multiplicative bias field, of geometric mean 1 inside the mask.

    Raises
    ------
    InputDatasetError
        The mask holds next to no positive intensities.
    """
    index = np.flatnonzero(mask & (data > 0))
    if len(index) < _MIN_POINTS:
        raise InputDatasetError(
            f"only {len(index)} voxels of the structural image are above the background",
            fix="look at the image: it seems to be empty, or its intensities to be negative",
        )
    if len(index) > _POINTS:
        index = index[np.linspace(0, len(index) - 1, _POINTS).astype(int)]
    places = np.unravel_index(index, data.shape)
    logs = np.log(data.ravel()[index].astype(np.float64))
    field = np.zeros(len(index))
    whole = np.zeros(data.shape, np.float32)
    for spans in _SPANS:
        axes = [_basis(size, spans) for size in data.shape]
        design = np.einsum("pi,pj,pk->pijk", *(axis[place] for axis, place in zip(axes, places, strict=True))).reshape(len(index), -1)
        # Lee's approximation, as in N4: each point asks of each control point its own share, and these are averaged. A
        # least-squares fit would follow anatomy too.
        squared = design**2
        share = design**3 / squared.sum(1, keepdims=True)
        weight = np.maximum(squared.sum(0), 1e-12)
        total = np.zeros(design.shape[1])
        for _ in range(_ITERATIONS):
            current = logs - field
            coefficients = share.T @ (current - _sharpened(current)) / weight
            change = design @ coefficients
            field, total = field + change, total + coefficients
            ratio = np.exp(change)
            if ratio.std() / ratio.mean() < _STOP:
                break
        cube = total.reshape([axis.shape[1] for axis in axes]).astype(np.float32)
        for axis in axes:  # contracts the first dimension and puts the image's axis last, three times
            cube = np.tensordot(cube, axis.astype(np.float32), (0, 1))
        whole += cube
    # Beyond the points that were fitted the splines may go anywhere.
    return np.exp(np.clip(whole, field.min(), field.max()) - np.float32(field.mean()))


def _basis(size: int, spans: int) -> Floats:
    """(size, spans + 3) cubic B-splines over one axis of the grid."""
    place = np.linspace(0, spans, size)[:, None] - (np.arange(spans + 3)[None] - 1)
    distance = np.abs(place)
    near = 2 / 3 - distance**2 + distance**3 / 2
    return np.where(distance < 1, near, np.where(distance < 2, (2 - distance) ** 3 / 6, 0))


def _sharpened(logs: Floats) -> Floats:
    """Each log-intensity replaced by what is expected of it under the deconvolved histogram (Sled 1998)."""
    low, high = float(logs.min()), float(logs.max())
    if high - low < 1e-6:
        return logs
    width = (high - low) / (_BINS - 1)
    place = (logs - low) / width
    floor = np.minimum(place.astype(int), _BINS - 2)
    part = place - floor
    counts = np.bincount(floor, 1 - part, _BINS) + np.bincount(floor + 1, part, _BINS)
    length = 1 << int(np.ceil(np.log2(2 * _BINS)))
    offset = (length - _BINS) // 2
    padded = np.zeros(length)
    padded[offset : offset + _BINS] = counts
    steps = np.minimum(np.arange(length), length - np.arange(length)) * width
    kernel = np.exp(-4 * np.log(2) * steps**2 / _FWHM**2)
    blur = np.fft.fft(kernel / kernel.sum()).real
    sharp = np.maximum(np.fft.ifft(np.fft.fft(padded) * blur / (blur**2 + _NOISE)).real, 0)
    centres = low + (np.arange(length) - offset) * width
    above = np.fft.ifft(np.fft.fft(sharp * centres) * blur).real
    below = np.fft.ifft(np.fft.fft(sharp) * blur).real
    expected = np.where(below > 1e-9 * below.max(), above / np.where(below == 0, 1, below), centres)[offset : offset + _BINS]
    return expected[floor] * (1 - part) + expected[floor + 1] * part
