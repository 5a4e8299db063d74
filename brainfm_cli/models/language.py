"""Frozen text encoders: sentences to unit vectors, texts to one vector per token.

Any encoder that transformers loads, from a folder or a hub name. Nothing here is trained or cached, and a missing
encoder is an error: no vectors are ever made up. Sentence encoders tell named networks and regions apart, and
hardly 'increased' from 'decreased' or 'left' from 'right' (cosine 0.98): direction and side are read elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from brainfm_cli.errors import CheckpointMismatchError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

Pooling = Literal["mean", "cls"]

DEFAULT_ENCODER = "all-minilm-l6-v2"
"""Name of the asset that is used where nothing else is asked for."""
HUB_PRESETS = {"bio-clinicalbert": "emilyalsentzer/Bio_ClinicalBERT"}
"""Short names of hub models; Bio_ClinicalBERT (768 wide) is what BrainGFM used."""
_LONGEST = 512


@dataclass(frozen=True, kw_only=True)
class TokenVectors:
    """Texts as sequences of token vectors, padded to the longest."""

    vectors: Tensor
    """(texts, longest, width), zero where no token is."""
    valid: Tensor
    """(texts, longest) bool."""


class TextEncoder:
    """A frozen language model that turns texts into vectors."""

    def __init__(self, name: str, tokenizer: Any, model: torch.nn.Module, *, pooling: Pooling) -> None:  # noqa: ANN401
        self.name = name
        self.pooling = pooling
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)  # noqa: FBT003

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._model.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def fingerprint(self) -> str:
        """SHA-256 over all weights: what a model that was trained with this encoder remembers of it."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Share of tokens that the encoder has no word for; Chinese is unknown to most English ones."""
        unknown = self._tokenizer.unk_token_id
        ids = [one for text in texts for one in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        return 0.0 if unknown is None else sum(one == unknown for one in ids) / max(1, len(ids))

    @torch.no_grad()
    def sentences(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """(texts, width) unit vectors: the mean over a text's tokens, or its first token's. Long texts are read in windows."""
        if not texts:
            return torch.zeros(0, self.width)
        sums, counts = torch.zeros(len(texts), self.width), torch.zeros(len(texts), 1)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            states, valid, owner = self._states([texts[place] for place in places])
            if self.pooling == "cls":
                valid = torch.zeros_like(valid).index_fill_(1, torch.tensor([0]), value=True)
            chosen = torch.tensor(places)[owner]
            sums.index_add_(0, chosen, (states * valid[:, :, None]).sum(dim=1))
            counts.index_add_(0, chosen, valid.sum(dim=1, keepdim=True).float())
        return functional.normalize(sums / counts, dim=-1)

    @torch.no_grad()
    def tokens(self, texts: Sequence[str], *, batch_size: int = 64) -> TokenVectors:
        """One vector per token, the encoder's own special tokens left out; a text's windows follow one another."""
        rows: list[list[Tensor]] = [[] for _ in texts]
        special = torch.tensor(self._tokenizer.all_special_ids)
        for start in range(0, len(texts), batch_size):
            states, valid, owner, ids = self._states_and_ids(texts[start : start + batch_size])
            valid = valid & ~torch.isin(ids, special)
            for state, keep, text in zip(states, valid, owner.tolist(), strict=True):
                rows[start + text].append(state[keep])
        joined = [torch.cat(parts) if parts else torch.zeros(0, self.width) for parts in rows]
        longest = max((len(row) for row in joined), default=0)
        vectors, there = torch.zeros(len(texts), longest, self.width), torch.zeros(len(texts), longest, dtype=torch.bool)
        for place, row in enumerate(joined):
            vectors[place, : len(row)], there[place, : len(row)] = row, True
        return TokenVectors(vectors=vectors, valid=there)

    def _states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        states, valid, owner, _ = self._states_and_ids(texts)
        return states, valid, owner

    def _states_and_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(windows, tokens, width) last hidden states, their validity, the text of each window, and token ids."""
        longest = min(_LONGEST, int(getattr(self._model.config, "max_position_embeddings", _LONGEST)))
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_overflowing_tokens=True, return_tensors="pt"
        )
        owner = batch.get("overflow_to_sample_mapping", torch.arange(len(texts)))
        # the loss or task head of a checkpoint is not used
        states = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return states.float(), batch["attention_mask"].bool(), owner, batch["input_ids"]


def load_text_encoder(source: str | Path, *, name: str | None = None, pooling: Pooling = "mean") -> TextEncoder:
    """The encoder in a folder, or of a hub name (``HF_HUB_OFFLINE`` and the hub's own cache are respected).

    ``name`` is what messages and models call it. Packaged assets are found by the caller, who gives their folder.

    Raises
    ------
    InputNotFoundError
        There is no such folder, the hub does not have it, or the hub may not be asked.
    CheckpointMismatchError
        The files are damaged or are no encoder with a fast tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = HUB_PRESETS.get(str(source), source)
    called = name or str(source)
    local = isinstance(source, Path) or Path(source).expanduser().is_dir()
    if local and not Path(source).expanduser().is_dir():
        raise _missing(called, where=Path(source))
    place = str(Path(source).expanduser()) if local else str(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local)
        model = AutoModel.from_pretrained(place, local_files_only=local, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not local:
            raise _missing(called) from error
        raise CheckpointMismatchError(
            f"the text encoder '{called}' cannot be read: {str(error).splitlines()[0]}",
            where=place,
            fix="copy the whole folder again; it needs config.json, tokenizer.json and model.safetensors",
        ) from error
    if not tokenizer.is_fast or not hasattr(model.config, "hidden_size"):
        raise CheckpointMismatchError(f"'{called}' is no text encoder with a fast tokenizer", where=place, fix="use a BERT-like model")
    return TextEncoder(called, tokenizer, model, pooling=pooling)


def _missing(called: str, *, where: Path | None = None) -> InputNotFoundError:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}
    reason = " (HF_HUB_OFFLINE is set, so that the hub is not asked)" if offline and where is None else ""
    return InputNotFoundError(
        f"the text encoder '{called}' is not here{reason}",
        where=where,
        fix=f"use {DEFAULT_ENCODER} (brainfm assets get {DEFAULT_ENCODER}), give the folder of a downloaded model, "
        "or fetch it once where there is a network: hf download NAME",
    )
