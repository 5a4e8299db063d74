"""How a model is aligned with texts, and what its config.yaml says of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from brainfm_cli.config import Frozen

Condition = Literal["clauses", "pooled"]


class FitSettings(Frozen):
    """How texts and brains are aligned."""

    condition: Condition = "clauses"
    """clauses: what a text states is matched with networks by their names, so that unseen disorders can be scored; pooled: one vector per
    text switches the graph prompts, as published."""
    steps: int = Field(default=300, ge=0)
    """clauses: longest training, full-batch steps of Adam; how long is chosen on disorders and people left out."""
    stops: int = Field(default=3, ge=1)
    """clauses: number of evenly spaced lengths that are compared, beside not training at all."""
    folds: int = Field(default=4, ge=2)
    """clauses: groups of disorders, each left out once with a share of the people."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Adam's step."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decay."""
    epochs: int = Field(default=5, ge=1)
    """pooled: passes over the people."""
    batch_size: int = Field(default=64, ge=2)
    """pooled: runs per step."""


class AlignmentRecord(Frozen):
    """What an aligned model's config.yaml says of its texts."""

    column: str
    """Column of participants.tsv whose values are disorders."""
    control: tuple[str, ...]
    """Values of people without a disorder."""
    disorders: tuple[str, ...]
    """Disorders it was aligned with, as the column calls them."""
    condition: Condition
    """How texts enter."""
    networks: tuple[str, ...]
    """Networks that couplings are measured between, in order."""
    atlases: tuple[str, ...]
    """Atlases it was aligned in."""
    encoder: str
    """Text encoder, as it was asked for."""
    encoder_sha256: str
    """Hash of the text encoder's weights: no other may be used with the model."""
    people: int
    """People it was aligned with."""


class FrozenTextRecord(Frozen):
    """What a model that was aligned through a frozen language model remembers of it and of the sentence encoder."""

    kind: str
    """What the model was aligned with."""
    language_model: str
    """Name or path of the frozen language model."""
    language_sha256: str
    """Hash of its weights."""
    language_width: int
    """Length of its token vectors."""
    text_encoder: str
    """Name or path of the sentence encoder."""
    text_encoder_sha256: str
    """Hash of its weights."""
    contrast_width: int
    """Length of the contrasted vectors."""
