"""Files of a TemplateFlow folder that the user already has. Never fetches; its client's 0-byte placeholders do not count."""

from __future__ import annotations

import os
from pathlib import Path


def templateflow_home() -> Path:
    """The TemplateFlow folder: ``TEMPLATEFLOW_HOME``, or its client's default."""
    return Path(os.environ.get("TEMPLATEFLOW_HOME") or Path.home() / ".cache" / "templateflow")


def template_file(template: str, rest: str) -> Path | None:
    """``tpl-<template>/tpl-<template>_<rest>``, or none where it is absent or empty."""
    path = templateflow_home() / f"tpl-{template}" / f"tpl-{template}_{rest}"
    return path if path.is_file() and path.stat().st_size > 0 else None


def template_transform(*, moving: str, fixed: str) -> Path | None:
    """The transform that brings images of template ``moving`` onto ``fixed``, or none."""
    return template_file(fixed, f"from-{moving}_mode-image_xfm.h5")
