"""Where in each slice the last convolution map speaks for the answer: Grad-CAM, or HiResCAM on what differs from the rest of the slice.

Grad-CAM (Selvaraju et al., ICCV 2017) weighs whole channels by their mean gradient. HiResCAM (Draelos and Carin 2020) takes gradient times
activation place by place; here activations count from the slice's median, because what all places share explains no place. All slices of a study share one answer, so the gradient of each slice's map holds its attention weight: values compare across slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort
from brainfm_cli.learning.slice_samples import all_slices
from brainfm_cli.models.mri_encoder import MriEncoder
from brainfm_cli.models.study_head import GatedAttentionHead
from brainfm_cli.systems.mri_language.classification import encode_studies, features_of
from brainfm_cli.systems.mri_language.encoder import context_of
from brainfm_cli.systems.mri_language.outcomes import StudyTask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CamMethod = Literal["gradcam", "hirescam"]
_BATCH = 16


def last_map(encoder: MriEncoder) -> nn.Module:
    """The module that makes the last map of convolutions: of stride 8, or 16 where the whole encoder or none of it convolves."""
    if encoder.shape.backbone == "hybrid":
        return encoder.middle_blocks[-1]
    return encoder.layers[-1] if encoder.shape.backbone == "convnext" else encoder.patch


def study_cam(
    encoder: MriEncoder, head: GatedAttentionHead, task: StudyTask, cohort: SliceCohort, label: str, clinical: NDArray[np.float32],
    *, method: CamMethod,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:  # fmt: skip
    """Places in the cohort's index, and (slices, *pixels) values: 0 and more, at most 1 over the whole study; 0 outside the head."""
    device = next(encoder.parameters()).device
    found = encode_studies(encoder, cohort, [label])
    features, rows = found.slices[label], found.rows[label]
    beside = torch.from_numpy(clinical)[None]
    decided = _decided(head, features, beside) if task.kind == "classification" else 0
    source = all_slices(cohort)
    maps: list[Tensor] = []
    head.eval()
    kept: list[Tensor] = []
    hook = last_map(encoder).register_forward_hook(lambda _module, _inputs, output: _keep(kept, output))
    try:
        for start in range(0, len(rows), _BATCH):
            batch = source.batch(rows[start : start + _BATCH], None).to(device)
            kept.clear()
            with torch.enable_grad():
                made = features_of(encoder((batch.images.float() / 255).requires_grad_(), context_of(batch))).cpu()
                together = torch.cat([features[:start], made, features[start + len(made) :]])
                scores, _ = head(together[None], torch.ones(1, len(together), dtype=torch.bool), beside)
                gradient = torch.autograd.grad(_asked(scores[0], decided), kept[0])[0]
            cam = _cam(kept[0].detach(), gradient, method)
            spread = functional.interpolate(cam[:, None], size=batch.images.shape[1:], mode="bilinear" if cohort.dims == 2 else "trilinear", align_corners=False)  # fmt: skip
            maps.append((spread[:, 0] * (batch.images > 0)).cpu())
    finally:
        hook.remove()
    values = torch.cat(maps).numpy()
    return rows, np.asarray(values / max(float(values.max()), 1e-12), np.float32)


def _cam(activations: Tensor, gradient: Tensor, method: CamMethod) -> Tensor:
    """(slices, *cells) of (slices, channels, *cells)."""
    if method == "gradcam":
        return torch.einsum("nc,nc...->n...", gradient.flatten(2).mean(2), activations).clamp_min(0)
    usual = activations.flatten(2).median(dim=2).values
    usual = usual.view(*usual.shape, *(1,) * (activations.ndim - 2))
    return (gradient * (activations - usual)).sum(dim=1).clamp_min(0)


def _keep(kept: list[Tensor], output: Tensor) -> Tensor:
    kept.append(output)
    return output


@torch.no_grad()
def _decided(head: GatedAttentionHead, features: Tensor, clinical: Tensor) -> int:
    scores, _ = head(features[None], torch.ones(1, len(features), dtype=torch.bool), clinical)
    return int(scores[0].argmax())


def _asked(scores: Tensor, decided: int) -> Tensor:
    """The decided class against the mean of the others; of grades and survival the score, which is higher for worse."""
    if len(scores) < 2:
        return scores[0]
    others = torch.cat([scores[:decided], scores[decided + 1 :]])
    return scores[decided] - others.mean()


def cam_chances(
    cohort: SliceCohort, rows: NDArray[np.int64], values: NDArray[np.float32]
) -> Callable[[Sequence[PackedScan]], NDArray[np.float32]]:
    """The values as :func:`brainfm_cli.signals.segmentations.native_chances` wants them: (2, items, *pixels), the second is the scans' mean map."""
    table = cohort.slices

    def of_scans(scans: Sequence[PackedScan]) -> NDArray[np.float32]:
        out = np.zeros((2, cohort.num_items(scans[0]), *cohort.item_shape), np.float32)
        for scan in scans:
            mine = np.flatnonzero((table["scan"].to_numpy().astype(str) == scan.name)[rows])
            out[1, table["slice"].to_numpy()[rows[mine]]] += values[mine] / len(scans)
        out[0] = 1 - out[1]
        return out

    return of_scans
