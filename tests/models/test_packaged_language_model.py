"""The packaged language model (SmolLM2 as GGUF) behind trained vectors: says what they were trained for, and stays as it was."""

from __future__ import annotations

import pytest
import torch

from brainfm_cli.models.causal_language import DEFAULT_LANGUAGE_MODEL, load_language_model
from brainfm_cli.programs.assets import find_asset, locate


@pytest.mark.long
def test_packaged_model_is_steered_and_unchanged() -> None:
    language = load_language_model(locate(find_asset(DEFAULT_LANGUAGE_MODEL)), name=DEFAULT_LANGUAGE_MODEL)
    assert (language.width, language.num_parameters) == (576, 134_515_008)
    assert language.has_chat
    before = language.fingerprint()
    torch.manual_seed(0)
    said = language.tokens(["A red dog under a table.", "Two boats on the sea."])
    prefix = (0.1 * torch.randn(2, 8, language.width)).requires_grad_()
    optimiser = torch.optim.Adam([prefix], lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        loss = language.loss(prefix, said).mean()
        loss.backward()
        optimiser.step()
    assert float(loss) < 0.5
    assert language.generate(prefix.detach(), max_tokens=15).texts == ("A red dog under a table.", "Two boats on the sea.")
    assert language.fingerprint() == before
