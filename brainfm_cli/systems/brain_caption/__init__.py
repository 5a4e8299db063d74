"""Brain-caption: says in words what a person saw (MindSemantix). A cross-subject masked encoder of voxels, a Q-Former, a frozen language model."""

from __future__ import annotations

from brainfm_cli.systems.brain_caption.encoder import BrainCaption, BrainCaptionSettings

__all__ = ["BrainCaption", "BrainCaptionSettings"]
