"""A picture of where a scan speaks for an answer."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHOWN = 4


def cam_picture(
    image: NDArray[np.floating], values: NDArray[np.floating], mask: NDArray[np.bool_] | None, *, axis: int, title: str
) -> bytes:
    """PNG of the slices along ``axis`` with the highest values, the map in colour and a drawn lesion as a line; all (x, y, z) in RAS order."""
    order = np.sort(np.argsort(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).sum(1))[::-1][:_SHOWN])
    drawing = Figure(figsize=(2.1 * len(order), 2.4), layout="constrained")
    axes = drawing.subplots(1, len(order), squeeze=False)[0]
    for place, number in zip(axes, order, strict=True):
        under, over = (np.take(one, number, axis=axis) for one in (image, values))
        place.imshow(under.T, origin="lower", cmap="gray", vmin=0, vmax=max(float(image.max()), 1e-6))
        place.imshow(np.ma.masked_less(over.T, 0.05), origin="lower", cmap="inferno", alpha=0.5, vmin=0, vmax=1)
        if mask is not None and np.take(mask, number, axis=axis).any():
            place.contour(np.take(mask, number, axis=axis).T.astype(float), levels=[0.5], colors="cyan", linewidths=0.8)
        place.set_title(f"slice {number}", fontsize=7)
        place.set_xticks([])
        place.set_yticks([])
    drawing.suptitle(title, fontsize=8, parse_math=False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
