"""Tiny random language models in folders, as users would give them: a causal Llama, a BERT sentence encoder, a vision transformer."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTModel

from brainfm_cli.simulation import viewing_scenes as grammar

_EXTRA = [
    "a",
    "an",
    "the",
    "is",
    "there",
    ".",
    ",",
    "?",
    "what",
    "colour",
    "it",
    "of",
    "photo",
    "user",
    "assistant",
    "house",
    "face",
    "cat",
    "chair",
    "shoe",
    "bottle",
    "scissors",
]
_CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"


def words() -> list[str]:
    found = {
        word
        for table in (grammar.OBJECTS, grammar.RELATIONS, grammar.PLACES)
        for said in table.values()
        for text in said
        for word in text.split()
    }
    found |= {*grammar.COLOURS, *_EXTRA}
    return sorted(found | {word.capitalize() for word in found})


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<pad>", "<end>", *words()])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", chat_template=_CHAT)


def write_llama(folder: Path, *, seed: int = 0, width: int = 48, steps: int = 0) -> Path:
    """A random Llama, which nothing in front of it can steer; with ``steps`` it has learnt to put words of the grammar into a sentence."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words()) + 3, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=2, pad_token_id=1, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model, words_to_ids = LlamaForCausalLM(config), tokenizer()
    generator = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        said = [grammar.captions(scene, 1, generator)[0] for scene in grammar.draw_scenes(32, generator)]
        asked = [" ".join(generator.permutation(text.strip(".").split())) for text in said]  # words in any order, then the sentence
        ids = [words_to_ids(f"{one} ? {text}<end>", add_special_tokens=False)["input_ids"] for one, text in zip(asked, said, strict=True)]
        own = [len(words_to_ids(f"{one} ?", add_special_tokens=False)["input_ids"]) for one in asked]
        longest = max(map(len, ids))
        batch = torch.tensor([row + [1] * (longest - len(row)) for row in ids])
        labels = batch.masked_fill(batch == 1, -100)
        for row, count in enumerate(own):
            labels[row, :count] = -100
        optimiser.zero_grad()
        model(input_ids=batch, attention_mask=(batch != 1).long(), labels=labels).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    words_to_ids.save_pretrained(folder)
    return folder


@cache
def trained_llama() -> Path:
    """A Llama that has learnt to speak, made once per process (10 s)."""
    folder = Path(tempfile.mkdtemp(prefix="brainfm-llama-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_llama(folder, steps=500)


def write_bert(folder: Path, *, seed: int = 1, width: int = 32) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words()) + 3, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_vit(folder: Path, *, seed: int = 2, width: int = 16) -> Path:
    torch.manual_seed(seed)
    config = ViTConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=width, image_size=32, patch_size=8)
    ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder
