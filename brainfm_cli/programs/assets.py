"""Templates and language models that come as the data of a Python package: locate, verify, install.

Atlases have their own catalogue (:mod:`brainfm_cli.atlases.catalogue`). No package's code is imported.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from importlib import resources
from pathlib import Path

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, ProgramFailedError
from brainfm_cli.provenance import file_sha256


class Asset(Frozen):
    """One template or language model."""

    name: str
    """What users call it."""
    kind: str
    """template or language model."""
    meaning: str
    """One line."""
    package: str
    """Python package whose wheel holds the files."""
    version: str
    """Tested version of that package."""
    folder: str
    """Folder inside site-packages."""
    files: dict[str, str]
    """File name to SHA-256."""
    licence: str
    """Licence of the data itself."""


@cache
def known_assets() -> tuple[Asset, ...]:
    """Every template and language model that brainfm knows by name."""
    text = (resources.files(__package__) / "assets.json").read_text(encoding="utf-8")
    return tuple(Asset.model_validate(entry) for entry in json.loads(text))


def find_asset(name: str) -> Asset:
    """The asset called ``name``.

    Raises
    ------
    InputNotFoundError
        No asset has that name.
    """
    for asset in known_assets():
        if asset.name == name:
            return asset
    raise InputNotFoundError(f"no asset is called '{name}'", fix="see 'brainfm assets list'")


def locate(asset: Asset) -> Path:
    """Folder that holds the asset's files.

    Raises
    ------
    InputNotFoundError
        The package is not installed.
    InputDatasetError
        A file is absent or empty.
    """
    module, _, below = asset.folder.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputNotFoundError(f"{asset.kind} '{asset.name}' is not installed", fix=f"run: brainfm assets get {asset.name}")
    folder = Path(spec.submodule_search_locations[0]) / below
    for name in asset.files:
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            raise InputDatasetError("the asset's file is absent or empty", where=path, fix=f"run: brainfm assets get {asset.name}")
    return folder


def source_of(name: str) -> str:
    """Folder of the asset of that name, or the name itself where no asset is called so: a path, or a name of the hub."""
    return str(locate(find_asset(name))) if any(asset.name == name for asset in known_assets()) else name


def verify(asset: Asset) -> Path:
    """Folder of the asset, once every file's SHA-256 was found right.

    Raises
    ------
    InputDatasetError
        A file's contents are not the tested ones.
    """
    folder = locate(asset)
    for name, expected in asset.files.items():
        if file_sha256(folder / name) != expected:
            raise InputDatasetError(
                "the file's checksum is wrong", where=folder / name, fix=f"reinstall it: brainfm assets get {asset.name}"
            )
    return folder


def install_packages(requirements: list[str]) -> None:
    """Install wheels for their data only, without their dependencies, with this Python's pip.

    Raises
    ------
    ProgramFailedError
        pip failed; without network the wheels can be copied and installed by hand.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ProgramFailedError(
            f"pip could not install {' '.join(requirements)}: {' '.join(last)}",
            fix="on a machine without network, copy the wheels there and run: pip install --no-deps FILE.whl",
        )
