"""Find an atlas by name: packaged ones, TemplateFlow files on disk, BIDS-Atlas datasets. The only place where atlases are named."""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.atlases.atlas import Atlas, Source
from brainfm_cli.atlases.datasets import dataset_atlases, read_region_table
from brainfm_cli.atlases.templateflow import template_file, templateflow_home
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.records import RegionTable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = ["DEFAULT_ATLASES", "Atlas", "atlas_labels", "find_atlas", "known_atlases"]

DEFAULT_ATLASES = ("Schaefer100", "AAL116")
"""Atlases of images where none is asked for."""
_RESOLUTIONS = ("02", "01")


def find_atlas(name: str, datasets: Mapping[str, Path] = {}) -> Atlas:
    """The atlas called ``name``; no image is loaded.

    ``name`` is a short name (``Schaefer100``) or a label in entity form (``Schaefer2018_seg-7n_scale-100``), in any case,
    with ``@TEMPLATE`` behind it to choose a template and ``DATASET:`` before it to choose a dataset. Packaged atlases come
    before datasets, and datasets before TemplateFlow.

    Raises
    ------
    InputNotFoundError
        No atlas has that name, or TemplateFlow's file is not on disk.
    InputDatasetError
        Two datasets hold an atlas of that name, or the atlas's table cannot be used.
    """
    prefix, separator, rest = name.rpartition(":")
    wanted, _, template = rest.partition("@")
    if separator and prefix not in datasets:
        raise InputNotFoundError(f"atlas '{name}' names the dataset '{prefix}', which was not given", fix=f"add --datasets {prefix}=DIR")
    if not separator:
        for atlas in _packaged():
            if _matches(atlas, wanted, template):
                return atlas
    chosen = {prefix: datasets[prefix]} if separator else datasets
    found = [(key, atlas) for key, folder in chosen.items() for atlas in dataset_atlases(folder) if _matches(atlas, wanted, template)]
    if len(found) > 1:
        choices = ", ".join(f"{key}:{atlas.label}@{atlas.template}" for key, atlas in found)
        raise InputDatasetError(f"several atlases are called '{name}'", fix=f"choose one of: {choices}")
    if found:
        return found[0][1]
    if not separator and (member := _templateflow_member(wanted)) is not None:
        return _from_templateflow(*member, template)
    raise _unknown(name, datasets)


def atlas_labels(names: Sequence[str], known: Collection[str], datasets: Mapping[str, Path]) -> tuple[str, ...]:
    """Labels of atlases named in short or in entity form; labels in ``known`` pass as they are.

    Raises
    ------
    InputNotFoundError
        A name is neither.
    """
    return tuple(name if name in known else find_atlas(name, datasets).label for name in names)


def known_atlases(datasets: Mapping[str, Path] = {}) -> list[Atlas]:
    """Every atlas that can be named: packaged ones (installed or not), those of datasets, and TemplateFlow's on disk."""
    found = list(_packaged())
    for folder in datasets.values():
        found += dataset_atlases(folder)
    for family in _families():
        for member in family["members"]:
            for template in family["source"]["templates"]:
                if _templateflow_image(member, template) is not None:
                    found.append(_from_templateflow(family, member, template))
    return found


def _matches(atlas: Atlas, wanted: str, template: str) -> bool:
    names = {atlas.name.casefold(), atlas.label.casefold()}
    return wanted.casefold() in names and (not template or atlas.template.casefold() == template.casefold())


@cache
def _descriptions() -> tuple[dict[str, Any], ...]:
    files = sorted(entry.name for entry in resources.files(__package__).iterdir() if entry.name.endswith(".json"))
    return tuple(json.loads((resources.files(__package__) / name).read_text(encoding="utf-8")) for name in files)


@cache
def _packaged() -> tuple[Atlas, ...]:
    return tuple(_from_json(values) for values in _descriptions() if "family" not in values)


def _families() -> list[dict[str, Any]]:
    return [values for values in _descriptions() if "family" in values]


def _from_json(values: dict[str, Any]) -> Atlas:
    source = Source(**values["source"])
    if len(values["names"]) != values["num_regions"]:
        raise InputDatasetError(f"atlas {values['name']} has {len(values['names'])} names", fix="reinstall brainfm-cli")
    return Atlas(
        name=values["name"],
        label=values["label"],
        template=values["template"],
        regions=RegionTable(
            names=tuple(values["names"]),
            networks=tuple(values["networks"] or ()),
            centroids_mm=np.asarray(values["centroids_mm"], np.float32),
        ),
        values=tuple(values["values"]),
        description=values["description"],
        licence=values["licence"],
        citation=values["citation"],
        source=source,
        kind="spheres" if source.kind == "spheres" else "volume",
    )


def _templateflow_member(wanted: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    for family in _families():
        for member in family["members"]:
            if wanted.casefold() in {member["name"].casefold(), member["label"].casefold()}:
                return family, member
    return None


def _templateflow_image(member: dict[str, Any], template: str) -> Path | None:
    for resolution in _RESOLUTIONS:
        path = template_file(template, f"res-{resolution}_{member['file']}.nii.gz")
        if path is not None:
            return path
    return None


def _from_templateflow(family: dict[str, Any], member: dict[str, Any], template: str) -> Atlas:
    templates = [known for known in family["source"]["templates"] if not template or known.casefold() == template.casefold()]
    home = templateflow_home()
    for known in templates:
        image = _templateflow_image(member, known)
        if image is None:
            continue
        tables = [
            home / f"tpl-{known}" / table.format(template=known, file=member["file"], atlas=member["file"].split("_")[0])
            for table in family["source"]["tables"]
        ]
        usable = [path for path in tables if path.is_file() and path.stat().st_size > 0]
        if not usable:
            raise InputNotFoundError(
                f"the region table of {member['name']} is absent", where=tables[0], fix="download it with TemplateFlow, too"
            )
        regions, values = read_region_table(usable[0])
        if len(values) != member["num_regions"]:
            raise InputDatasetError(
                f"{member['name']} should have {member['num_regions']} regions, the table has {len(values)}", where=usable[0], fix="download it again"
            )  # fmt: skip
        return Atlas(
            name=member["name"], label=member["label"], template=known, regions=regions, values=values, description=member["description"],
            licence=family["licence"], citation=family["citation"], source=Source(kind="templateflow", path=image),
        )  # fmt: skip
    raise InputNotFoundError(
        f"atlas {member['name']} is in TemplateFlow, and its file is not on this machine{f' for {template}' if template else ''}",
        where=home,
        fix="download it once with TemplateFlow on a machine with network (0-byte placeholders do not count), and set TEMPLATEFLOW_HOME",
    )


def _unknown(name: str, datasets: Mapping[str, Path]) -> InputNotFoundError:
    names = {atlas.name for atlas in known_atlases(datasets)} | {atlas.label for atlas in known_atlases(datasets)}
    names |= {member["name"] for family in _families() for member in family["members"]}
    by_lower = {known.casefold(): known for known in names}
    close = [by_lower[key] for key in difflib.get_close_matches(name.casefold(), by_lower, n=4, cutoff=0.5)]
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return InputNotFoundError(
        f"no atlas is called '{name}'",
        fix=f"{hint}See 'brainfm assets list'; add your own as a BIDS-Atlas dataset with --datasets NAME=DIR "
        "(tpl-X/tpl-X_atlas-Y_dseg.nii.gz, a .tsv with index and name, atlas-Y_description.json)",
    )
