"""Preprocessing with what pip installs: antspyx, deepbet, scipy, in a nipype workflow. No distortion correction, no surfaces."""

from __future__ import annotations

from brainfm_cli.programs.embedded.settings import EmbeddedSettings
from brainfm_cli.programs.embedded.workflow import EmbeddedResult, preprocess_participant

__all__ = ["EmbeddedResult", "EmbeddedSettings", "preprocess_participant"]
