"""Frozen vision encoders: pictures to unit vectors, with any image model that transformers loads from a folder. Nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

# CLIP's, where the folder has no preprocessor_config.json
_MEAN, _SD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder:
    """A frozen image model that turns picture files into vectors."""

    def __init__(self, name: str, model: torch.nn.Module, *, size: int, mean: Sequence[float], sd: Sequence[float]) -> None:
        self.name = name
        self.size = size
        self._model: Any = model.eval().requires_grad_(False)  # noqa: FBT003
        self._mean, self._sd = torch.tensor(mean)[:, None, None], torch.tensor(sd)[:, None, None]

    @torch.no_grad()
    def pictures(self, paths: Sequence[Path], *, batch_size: int = 32) -> Tensor:
        """(pictures, width) unit vectors.

        Raises
        ------
        InputNotFoundError
            A picture is absent.
        InputDatasetError
            A file is no picture.
        """
        found = []
        for start in range(0, len(paths), batch_size):
            pixels = torch.stack([self._read(path) for path in paths[start : start + batch_size]])
            found.append(functional.normalize(self._embed(pixels).float(), dim=1))
        return torch.cat(found)

    def _embed(self, pixels: Tensor) -> Tensor:
        if hasattr(self._model, "get_image_features"):
            found = self._model.get_image_features(pixel_values=pixels)
            return found if isinstance(found, Tensor) else found.pooler_output
        found = self._model(pixel_values=pixels)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    def _read(self, path: Path) -> Tensor:
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                shown = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        except FileNotFoundError as error:
            raise InputNotFoundError("the picture is absent", where=path, fix="check the folder of pictures") from error
        except (OSError, UnidentifiedImageError) as error:
            raise InputDatasetError(f"the file is no picture: {error}", where=path, fix="give PNG or JPEG files") from error
        values = torch.from_numpy(np.asarray(shown, np.float32) / 255).permute(2, 0, 1)
        return (values - self._mean) / self._sd


def load_vision_encoder(folder: Path) -> VisionEncoder:
    """The image model in a folder.

    Raises
    ------
    InputNotFoundError
        There is no such folder.
    CheckpointMismatchError
        It holds no image model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise InputNotFoundError(
            "no vision model here", where=folder, fix="give the folder of a downloaded model, or a table of picture vectors"
        )
    try:
        model = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        settings = folder / "preprocessor_config.json"
        values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        config = getattr(model.config, "vision_config", model.config)
        size = int(config.image_size)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        raise CheckpointMismatchError(
            f"the vision model cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=folder,
            fix="it needs config.json with image_size and model.safetensors",
        ) from error
    return VisionEncoder(folder.name, model, size=size, mean=values.get("image_mean", _MEAN), sd=values.get("image_std", _SD))
