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
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.errors import CheckpointMismatchError, InputNotFoundError
from brainfm_cli.models.lora import add_low_rank, plain_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_LANGUAGE_MODEL = "smollm2-135m-instruct"
"""Name of the asset that is used where nothing else is asked for."""
IGNORED = -100
_QUERIES_AND_VALUES = ("q_proj", "v_proj")


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


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """Conversations as token numbers, padded on the right, with room for vectors in the first question."""

    ids: Tensor
    """(items, longest) int64."""
    room: Tensor
    """(items, longest) bool: where the vectors go."""
    learnt: Tensor
    """(items, longest) bool: answers, each with its end token."""
    valid: Tensor
    """(items, longest) bool."""

    def to(self, device: torch.device) -> Dialogues:
        """The same on a device."""
        return Dialogues(**{name: getattr(self, name).to(device) for name in ("ids", "room", "learnt", "valid")})


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

    def adapt(self, rank: int) -> dict[str, nn.Parameter]:
        """Add low-rank weights to queries and values of every layer; gives back what may be trained, by name. The model's own weights stay.

        Raises
        ------
        CheckpointMismatchError
            The model has no layers of these names.
        """
        if not add_low_rank(self._model, rank, 2.0 * rank, _QUERIES_AND_VALUES):
            raise CheckpointMismatchError(
                f"the language model '{self.name}' has no {' and '.join(_QUERIES_AND_VALUES)}", fix="set fit.lora=0"
            )
        return {name.replace(".", "_"): one for name, one in self._model.named_parameters() if one.requires_grad}

    def fingerprint(self) -> str:
        """SHA-256 over all weights of its own, without what was added: what a model that was trained in front of this one remembers of it."""
        digest = hashlib.sha256()
        for name, weight in sorted(plain_tensors(self._model).items()):
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
        return self._mean_loss(prefix, said, torch.ones(prefix.shape[:2], dtype=torch.bool, device=prefix.device))

    @torch.no_grad()
    def log_probability(self, prefix: Tensor, said: Tokens) -> Tensor:
        """(texts,) mean log-probability of a token of each sentence behind its prefix."""
        return -self.loss(prefix, said)

    @torch.no_grad()
    def generate(
        self, prefix: Tensor, *, beams: int = 1, max_tokens: int = 30, valid: Tensor | None = None, every: bool = False
    ) -> Generated:
        """What follows (texts, length, width) prefixes: greedy, or the best of ``beams`` beams, or ``every`` one of them, those of a prefix in a row.

        Prefixes of several lengths are padded on the left; ``valid`` (texts, length) bool says where they are.
        """
        prefix = prefix.to(self._embedding.weight.dtype)
        there = torch.ones(prefix.shape[:2], dtype=torch.bool, device=prefix.device) if valid is None else valid
        found = self._model.generate(
            inputs_embeds=prefix,
            attention_mask=there.long(),
            max_new_tokens=max_tokens,
            num_beams=beams,
            num_return_sequences=beams if every else 1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.end,
            eos_token_id=self.end,
            return_dict_in_generate=True,
            output_scores=beams > 1,
        )
        ids = found.sequences
        ended = (ids == self.end).int().cumsum(dim=1)
        kept = (ended == 0) | ((ids == self.end) & (ended == 1))
        texts = tuple(
            " ".join(self._tokenizer.decode(row[held & (row != self.end)], skip_special_tokens=True).split())
            for row, held in zip(ids, kept, strict=True)
        )
        if beams > 1:  # the search has added them up already
            return Generated(texts=texts, log_probability=found.sequences_scores)
        return Generated(texts=texts, log_probability=-self._mean_loss(prefix, Tokens(ids=ids, valid=kept), there))

    def dialogues(self, conversations: Sequence[Sequence[tuple[str, str]]], *, room: int, longest: int) -> Dialogues:
        """Conversations of (question, answer) turns in the chat template, with ``room`` vectors before the first question.

        What is longer than ``longest`` tokens is cut.

        Raises
        ------
        CheckpointMismatchError
            The tokenizer has no chat template.
        """
        rows = []
        for turns in conversations:
            pieces = self._pieces(turns, answered=True)
            ids, kinds = list(pieces[0]), [0] * len(pieces[0])
            ids += [self.end] * room
            kinds += [1] * room
            for number, piece in enumerate(pieces[1:]):
                # pieces alternate: question, answer, question … ; an answer ends with the end token, as the template writes it after each
                ids += piece
                kinds += [2 if number % 2 else 0] * len(piece)
            rows.append((ids[:longest], kinds[:longest]))
        most = max(len(ids) for ids, _ in rows)
        filled = torch.full((len(rows), most), self.end, dtype=torch.long)
        kind = torch.full((len(rows), most), -1)
        for place, (ids, kinds) in enumerate(rows):
            filled[place, : len(ids)] = torch.tensor(ids)
            kind[place, : len(ids)] = torch.tensor(kinds)
        return Dialogues(ids=filled, room=kind == 1, learnt=kind == 2, valid=kind >= 0)

    def dialogue_loss(self, before: Tensor, said: Dialogues) -> Tensor:
        """(items,) mean cross-entropy of a token of the answers; differentiable in the (items, room, width) vectors ``before``."""
        inputs = self.vectors(said.ids)
        inputs = inputs.masked_scatter(said.room[:, :, None], before.to(inputs.dtype))
        states = self._model.base_model(inputs_embeds=inputs, attention_mask=said.valid.long(), use_cache=False).last_hidden_state
        learnt = said.learnt[:, 1:]
        logits = self._model.get_output_embeddings()(states[:, :-1][learnt]).float()  # only answers are compared with the vocabulary
        flat = functional.cross_entropy(logits, said.ids[:, 1:][learnt], reduction="none")
        sums = flat.new_zeros(len(said.ids)).index_add_(0, learnt.nonzero()[:, 0], flat)
        return sums / learnt.sum(dim=1).clamp_min(1)

    def chat_prefix(self, before: Tensor, question: str, history: Sequence[tuple[str, str]] = ()) -> Tensor:
        """(1, length, width) what to continue so that ``question`` is answered: the chat template with ``before`` (1, n, width) in the first question.

        Raises
        ------
        CheckpointMismatchError
            The tokenizer has no chat template.
        """
        first, *rest = self._pieces([*history, (question, "")], answered=False)
        halves = [
            self.vectors(torch.tensor([ids], dtype=torch.long, device=self.device)) for ids in (first, [one for ids in rest for one in ids])
        ]
        return torch.cat([halves[0], before.to(halves[0].dtype), halves[1]], dim=1)

    def _pieces(self, turns: Sequence[tuple[str, str]], *, answered: bool) -> list[list[int]]:
        """Token numbers of the filled template: before the vectors, then by turns what leads to an answer and the answer with its end token.

        Without ``answered`` the last answer is what is to come.
        """
        if not self.has_chat:
            raise CheckpointMismatchError(f"the language model '{self.name}' has no chat template", fix="use an instruction-tuned model")
        image, answer = "\u2603", "\u2604"  # stand for vectors and answers while the template is filled
        told = []
        for place, (question, _) in enumerate(turns):
            told.append({"role": "user", "content": f"{image} {question}" if place == 0 else question})
            if answered or place + 1 < len(turns):
                told.append({"role": "assistant", "content": answer})
        text: str = self._tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=not answered)
        first, rest = text.split(image, 1)
        between = rest.split(answer)
        if answered:
            between = between[:-1]
        pieces = [self._ids(first)]
        for place, part in enumerate(between):
            lead = part.removeprefix(self._tokenizer.decode([self.end])) if place else part
            pieces.append(self._ids(lead))
            if answered or place + 1 < len(between):
                pieces.append([*self._ids(turns[place][1]), self.end])
        return pieces

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens_per_character(self, texts: Sequence[str]) -> float:
        """How finely the tokenizer cuts these texts; above one it reads them as bytes and knows none of their words."""
        return sum(len(self._ids(text)) for text in texts) / max(1, sum(map(len, texts)))

    def _mean_loss(self, prefix: Tensor, said: Tokens, before: Tensor) -> Tensor:
        kind = self._embedding.weight.dtype
        inputs = torch.cat([prefix.to(kind), self.vectors(said.ids)], dim=1)
        there = torch.cat([before, said.valid], dim=1)
        states = self._model.base_model(inputs_embeds=inputs, attention_mask=there.long(), use_cache=False).last_hidden_state
        # the state before a token foretells it; only these are compared with the vocabulary
        states = states[:, prefix.shape[1] - 1 : -1]
        logits = self._model.get_output_embeddings()(states).float()
        target = said.ids.masked_fill(~said.valid, IGNORED)
        flat = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
        scores = flat.view(target.shape)
        return (scores * said.valid).sum(dim=1) / said.valid.sum(dim=1).clamp_min(1)


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
