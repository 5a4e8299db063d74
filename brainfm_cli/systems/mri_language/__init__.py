"""Brain MRI and language: a masked encoder of scans, tuned for what hospitals ask."""

from __future__ import annotations

from brainfm_cli.systems.mri_language.encoder import MriLanguage, MriLanguageSettings

__all__ = ["NOT_CLINICAL", "MriLanguage", "MriLanguageSettings"]

NOT_CLINICAL = "not for clinical use"
"""Stands with everything that is said of a person."""
