"""JSON and YAML that others wrote: whatever is in the file, it is read within bounds or refused with one kind of error.

The parsers of the standard library and of PyYAML leak other errors than their own on hostile text: brackets that are nested a
hundred thousand deep, dates that do not exist, numbers of a million digits, and aliases that stand for a billion values.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

MOST_VALUES = 1_000_000
"""Values of a YAML text once its aliases are written out; a settings file has some hundred, a model's config.yaml some ten thousand."""
_LEAKED = (ValueError, RecursionError, KeyError, AttributeError, IndexError, TypeError, OverflowError)


def parse_json(text: str) -> Any:  # noqa: ANN401
    """The value of a JSON text.

    Raises
    ------
    ValueError
        It is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:  # noqa: ANN401
    """The value of a UTF-8 JSON file.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is no UTF-8, no JSON, or nested too deeply to be read.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """The value of a YAML text of plain types.

    Raises
    ------
    yaml.YAMLError
        It is no YAML, holds a value that no type has, is nested too deeply, refers to itself, or stands for more than
        :data:`MOST_VALUES` values.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # counted before anything is made: merge keys would copy what aliases only point to
        if node is not None and _count(node, {}, set()) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except _LEAKED as error:  # from constructors, e.g. of dates and numbers
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Nodes below and including this one, each alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    place = id(node)
    if place in above:
        raise yaml.YAMLError("it refers to itself")
    if place not in known:
        above.add(place)
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[place] = 1 + sum(_count(part, known, above) for part in parts)
        above.discard(place)
    return known[place]
