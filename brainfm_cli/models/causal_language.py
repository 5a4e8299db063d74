"""A frozen causal language model that continues from vectors: what a bridge puts in front of it, it puts into words.

Any decoder-only model that transformers loads from a folder (safetensors or one GGUF file). Its weights get no gradient and
are part of no checkpoint, but gradients pass through it to the vectors in front (never ``no_grad``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from brainfm_cli.errors import CheckpointMismatchError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_LANGUAGE_MODEL = "smollm2-135m-instruct"
"""Name of the asset that is used where nothing else is asked for."""
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Sentences as token numbers, each followed by the end token, padded on the right."""

    ids: Tensor
    """(texts, longest) int64."""
    valid: Tensor
    """(texts, longest) bool."""

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(ids=self.ids.to(device), valid=self.valid.to(device))


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What the model says."""

    texts: tuple[str, ...]
    """Cut at the end token, stripped."""
    log_probability: Tensor
    """(texts,) mean log-probability of a token, the end token included where it was reached."""


class CausalLanguageModel:
    """A frozen decoder with its tokenizer; not a module, so that no training state ever holds its weights."""

    def __init__(self, name: str, tokenizer: Any, model: Any) -> None:  # noqa: ANN401
        self.name = name
        self._tokenizer = tokenizer
        model.eval().requires_grad_(False)  # noqa: FBT003
        self._model: Any = model
        self._embedding: Any = self._model.get_input_embeddings()
        ids = self._tokenizer.convert_tokens_to_ids("<|im_end|>") if self._tokenizer.eos_token_id is None else self._tokenizer.eos_token_id
        self.end = int(ids)

    @property
    def width(self) -> int:
        """Length of a token's vector."""
        return int(self._embedding.weight.shape[1])

    @property
    def num_parameters(self) -> int:
        """Weights of the model, all frozen."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def token_norm(self) -> float:
        """Mean length of a token's vector: what is put in front must be of that size."""
        return float(self._embedding.weight.float().norm(dim=1).mean())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._embedding.weight.device

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer states how questions are asked."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def to(self, device: torch.device) -> CausalLanguageModel:
        """Move the model; gives back itself."""
        if self.device != device:
            self._model.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 over all weights: what a model that was trained in front of this one remembers of it."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def tokens(self, texts: Sequence[str], *, longest: int = 64, end: bool = True) -> Tokens:
        """Token numbers of sentences, cut to ``longest``, with the end token where ``end``."""
        rows = []
        for text in texts:
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])[: longest - int(end)]
            rows.append([*ids, self.end] if end else ids)
        most = max((len(row) for row in rows), default=0)
        padded = torch.full((len(rows), most), self.end, dtype=torch.long)
        valid = torch.zeros(len(rows), most, dtype=torch.bool)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row, dtype=torch.long)
            valid[place, : len(row)] = True
        return Tokens(ids=padded, valid=valid)

    def vectors(self, ids: Tensor) -> Tensor:
        """(…, width) vectors of token numbers."""
        return self._embedding(ids)

    def loss(self, prefix: Tensor, said: Tokens) -> Tensor:
        """(texts,) mean cross-entropy of each sentence's tokens behind its (texts, length, width) prefix; differentiable in the prefix."""
        scores = self._token_log_probabilities(prefix, said)
        return -(scores * said.valid).sum(dim=1) / said.valid.sum(dim=1).clamp_min(1)

    @torch.no_grad()
    def log_probability(self, prefix: Tensor, said: Tokens) -> Tensor:
        """(texts,) mean log-probability of a token of each sentence behind its prefix."""
        return -self.loss(prefix, said)

    @torch.no_grad()
    def generate(self, prefix: Tensor, *, beams: int = 1, max_tokens: int = 30) -> Generated:
        """What follows (texts, length, width) prefixes: greedy, or the best of ``beams`` beams.

        Prefixes have one length, so that nothing is padded on the left.
        """
        prefix = prefix.to(self._embedding.weight.dtype)
        there = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        ids = self._model.generate(
            inputs_embeds=prefix,
            attention_mask=there,
            max_new_tokens=max_tokens,
            num_beams=beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.end,
            eos_token_id=self.end,
        )
        ended = (ids == self.end).int().cumsum(dim=1)
        valid = (ended == 0) | ((ids == self.end) & (ended == 1))
        texts = tuple(
            " ".join(self._tokenizer.decode(row[kept & (row != self.end)], skip_special_tokens=True).split())
            for row, kept in zip(ids, valid, strict=True)
        )
        return Generated(texts=texts, log_probability=self.log_probability(prefix, Tokens(ids=ids, valid=valid)))

    def chat_prefix(self, before: Tensor, question: str, history: Sequence[tuple[str, str]] = ()) -> Tensor:
        """(1, length, width) what to continue so that ``question`` is answered: the chat template with ``before`` (1, n, width) in the first question.

        Raises
        ------
        CheckpointMismatchError
            The tokenizer has no chat template.
        """
        if not self.has_chat:
            raise CheckpointMismatchError(f"the language model '{self.name}' has no chat template", fix="use an instruction-tuned model")
        mark = "\u2603"  # stands for the vectors while the template is filled
        turns = []
        for place, (asked, answered) in enumerate([*history, (question, "")]):
            turns.append({"role": "user", "content": f"{mark} {asked}" if place == 0 else asked})
            if answered:
                turns.append({"role": "assistant", "content": answered})
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        parts = []
        for half in text.split(mark, 1):
            ids = self._tokenizer(half, add_special_tokens=False, return_tensors="pt")["input_ids"].long().to(self.device)
            parts.append(self.vectors(ids))
        return torch.cat([parts[0], before.to(parts[0].dtype), parts[1]], dim=1)

    def _token_log_probabilities(self, prefix: Tensor, said: Tokens) -> Tensor:
        kind = self._embedding.weight.dtype
        inputs = torch.cat([prefix.to(kind), self.vectors(said.ids)], dim=1)
        there = torch.cat([torch.ones(prefix.shape[:2], dtype=torch.bool, device=prefix.device), said.valid], dim=1)
        states = self._model.base_model(inputs_embeds=inputs, attention_mask=there.long(), use_cache=False).last_hidden_state
        # the state before a token foretells it; only these are compared with the vocabulary
        states = states[:, prefix.shape[1] - 1 : -1]
        logits = self._model.get_output_embeddings()(states).float()
        target = said.ids.masked_fill(~said.valid, IGNORED)
        flat = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
        return -flat.view(target.shape)


def load_language_model(source: Path, *, name: str | None = None, dtype: torch.dtype = torch.float32) -> CausalLanguageModel:
    """The causal language model in a folder (safetensors, or one ``.gguf``) or in a ``.gguf`` file; nothing is fetched.

    Raises
    ------
    InputNotFoundError
        There is no such folder or file.
    CheckpointMismatchError
        The files are damaged or hold no causal language model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    called, source = name or source.name, source.expanduser()
    if not source.exists():
        raise InputNotFoundError(
            f"the language model '{called}' is not here",
            where=source,
            fix=f"give its folder, or use {DEFAULT_LANGUAGE_MODEL} (brainfm assets get)",
        )
    folder, packed = _gguf(source)
    options: dict[str, Any] = {"local_files_only": True} | ({"gguf_file": packed} if packed else {"use_safetensors": True})
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **({"gguf_file": packed} if packed else {}), local_files_only=True)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of a second or two that nothing else turns off
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointMismatchError(
            f"the language model '{called}' cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=source,
            fix="it needs config.json, a tokenizer and model.safetensors, or one .gguf file; copy it again",
        ) from error
    return CausalLanguageModel(called, tokenizer, model)


def _gguf(source: Path) -> tuple[Path, str | None]:
    """Folder of the model, and its GGUF file where it is one."""
    if source.is_file():
        return source.parent, source.name
    if (source / "config.json").is_file():
        return source, None
    packed = sorted(source.glob("*.gguf"))
    return source, packed[0].name if len(packed) == 1 else None
