"""What was seen: stimulus names of trial tables made comparable, and the captions that belong to them.

A trial names its picture by ``stim_id`` (BEP044), ``stim_file``, or the column of a preset for a public dataset. Captions
come from COCO-format JSON or from caption columns of a stimulus table; sets that only name categories get sentences from a
template, and say so. Nothing here reads pictures or brains.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from brainfm_cli.config import Frozen
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

Preset = Literal["bids", "nsd", "nod", "bold5000", "things", "god"]
Source = Literal["captions", "template"]
_CAPTION_COLUMN = re.compile(r"caption(_?\d+)?")
_NAME_COLUMNS = ("stim_id", "stimulus_id", "stim_file", "filename", "stim_filename")
_MISSING = {"", "n/a", "nan", "None"}


class StimulusSettings(Frozen):
    """How trials name their pictures, and where the captions are."""

    preset: Preset = "bids"
    """bids: stim_id, then stim_file. nsd: column 73KID, which counts from 1 where the stimulus table counts from 0. nod: COCO file names in
    ``condition``. bold5000: COCO file names in ``stim_file``. things: object names in ``file_path``. god: ``stimulus_name``."""
    column: str | None = None
    """Column of the trial tables that names the picture, in place of the preset's."""
    table: Path | None = None
    """Stimulus table, TSV or CSV: stim_id and caption columns, or NSD's nsd_stim_info_merged.csv; unset takes the dataset's stimuli/stimuli.tsv."""
    captions: Path | None = None
    """COCO-format JSON of captions, or a mapping from image to sentences; unset takes caption columns of the stimulus table."""
    template: str | None = None
    """Sentence for sets that only name categories, e.g. 'a photo of {category}'; such captions are marked in every result."""
    category: str | None = None
    """Column of the trial tables that names the category of the template; unset takes the stimulus' name."""
    skip: tuple[str, ...] = ()
    """Names of trials without a picture (catch trials, rest), which are left out."""
    keep: tuple[str, ...] = Field(default=())
    """Further columns of the stimulus table that the packed cohort keeps, e.g. those that a split asks for; all where empty."""


@dataclass(frozen=True, kw_only=True)
class Stimulus:
    """One picture, as a packed cohort knows it."""

    name: str
    """Unique name."""
    captions: tuple[str, ...]
    """Sentences that people said of it."""
    source: Source
    """Whether they are people's sentences or made from a category name."""
    file: str
    """Path of the picture below the dataset's ``stimuli`` folder; empty where unknown."""
    fields: dict[str, str]
    """Further columns of the stimulus table."""


@dataclass(frozen=True, kw_only=True)
class _Preset:
    columns: tuple[str, ...]
    key: Callable[[str], str]


def _plain(value: str) -> str:
    return value


def _coco_number(value: str) -> str:
    """COCO image number of a file name: ``coco/000000000139.jpg`` and ``COCO_train2014_000000000139.jpg`` → ``139``."""
    match = re.search(r"(\d+)$", PurePosixPath(value).stem)
    return str(int(match[1])) if match else value


def _nsd_number(value: str) -> str:
    # 73KID counts from 1, nsdId from 0
    return str(int(float(value)) - 1)


def _object_name(value: str) -> str:
    return PurePosixPath(value).stem


_PRESETS: dict[str, _Preset] = {
    "bids": _Preset(columns=("stim_id", "stim_file"), key=_plain),
    "nsd": _Preset(columns=("73KID",), key=_nsd_number),
    "nod": _Preset(columns=("condition",), key=_coco_number),
    "bold5000": _Preset(columns=("stim_file",), key=_coco_number),
    "things": _Preset(columns=("file_path",), key=_object_name),
    "god": _Preset(columns=("stimulus_name", "stimulus_id"), key=_plain),
}


def name_stimuli(trials: pd.DataFrame, settings: StimulusSettings, where: Path) -> list[str]:
    """Name of the picture of each trial; empty for trials that the settings skip.

    Raises
    ------
    InputDatasetError
        No column names pictures, or a row has no name.
    """
    preset = _PRESETS[settings.preset]
    columns = (settings.column,) if settings.column else preset.columns
    column = next((name for name in columns if name in trials), None)
    if column is None:
        raise InputDatasetError(
            f"no column names the picture of each trial (looked for {', '.join(columns)}; there are {', '.join(map(str, trials.columns))})",
            where=where,
            fix="set stimuli.preset or stimuli.column",
        )
    names = []
    for row, value in enumerate(trials[column].astype(str)):
        if value in settings.skip:
            names.append("")
            continue
        if value in _MISSING:
            raise InputDatasetError(
                f"row {row + 1} names no picture in column '{column}'", where=where, fix="mend the table, or list the value in stimuli.skip"
            )
        try:
            names.append(preset.key(value))
        except ValueError as error:
            raise InputDatasetError(
                f"row {row + 1}: '{value}' in column '{column}' is no picture of preset {settings.preset}",
                where=where,
                fix="set stimuli.preset or stimuli.column, or list the value in stimuli.skip",
            ) from error
    return names


@dataclass(frozen=True, kw_only=True)
class StimulusBook:
    """Captions and fields of stimuli by name."""

    captions: Mapping[str, tuple[str, ...]]
    """Sentences by stimulus name."""
    fields: Mapping[str, Mapping[str, str]]
    """Rows of the stimulus table by stimulus name."""
    files: Mapping[str, str]
    """Picture of each stimulus, where the table states it."""
    template: str | None
    """Sentence for stimuli that only have a category."""
    where: Path | None
    """File that the captions are from, for messages."""

    def find(self, name: str, category: str | None, *, row: int, table: Path) -> Stimulus:
        """The stimulus of a trial.

        Raises
        ------
        InputDatasetError
            The stimulus is in no table, or nothing is said of it.
        """
        fields = dict(self.fields.get(name, {}))
        said = self.captions.get(name, ())
        source: Source = "captions"
        if not said and self.template is not None:
            said, source = (self.template.format(category=(category or name).replace("_", " ")),), "template"
        if not said:
            known = name in self.fields or name in self.captions
            raise InputDatasetError(
                f"row {row}: stimulus '{name}' " + ("has no caption" if known else f"is in no stimulus table (captions: {self.where})"),
                where=table,
                fix="give stimuli.captions or stimuli.table that describe it, or stimuli.template for a set that only names categories",
            )
        return Stimulus(name=name, captions=said, source=source, file=self.files.get(name, ""), fields=fields)


def read_stimuli(dataset: Path, settings: StimulusSettings) -> StimulusBook:
    """What is known of a dataset's stimuli.

    Raises
    ------
    InputNotFoundError
        A file of the settings is absent.
    InputDatasetError
        A file is unreadable.
    SettingsError
        The template has another placeholder than ``{category}``.
    """
    if settings.template is not None:
        try:
            placeholders = {(name, form) for _, name, form, _ in Formatter().parse(settings.template) if name is not None}
            if placeholders - {("category", "")}:
                raise ValueError("another placeholder")
        except ValueError as error:
            raise SettingsError(f"stimuli.template '{settings.template}' cannot be filled", fix="write {category} and nothing else in braces") from error  # fmt: skip
    table = settings.table or next(
        (path for path in (dataset / "stimuli" / "stimuli.tsv", dataset / "stimuli.tsv") if path.is_file()), None
    )
    frame = None if table is None else _read_table(table)
    nsd = settings.preset == "nsd"
    fields, files, captions = {}, {}, {}
    if frame is not None:
        column = "nsdId" if nsd and "nsdId" in frame else next((name for name in _NAME_COLUMNS if name in frame), None)
        if column is None:
            raise InputDatasetError("the stimulus table names no stimuli", where=table, fix="add a column stim_id")
        said = [str(name) for name in frame if _CAPTION_COLUMN.fullmatch(str(name))]
        for values in frame.to_dict("records"):
            name = str(values[column])
            fields[name] = {
                str(key): str(value) for key, value in values.items() if key not in {column, *said} and _wanted(str(key), settings)
            }
            files[name] = next((str(values[key]) for key in _NAME_COLUMNS[2:] if key in values and values[key] not in _MISSING), "")
            texts = tuple(str(values[key]).strip() for key in said if str(values[key]) not in _MISSING)
            if texts:
                captions[name] = texts
    if settings.captions is not None:
        captions = _read_captions(settings.captions)
        if nsd and frame is not None and "cocoId" in frame:
            by_coco = captions
            numbers = zip(frame["nsdId"].astype(str), frame["cocoId"].astype(str), strict=True)
            captions = {name: by_coco[coco] for name, coco in numbers if coco in by_coco}
    return StimulusBook(captions=captions, fields=fields, files=files, template=settings.template, where=settings.captions or table)


def _wanted(column: str, settings: StimulusSettings) -> bool:
    return not settings.keep or column in settings.keep


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8")
        separator = "," if path.suffix == ".csv" else "\t"
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputNotFoundError("the stimulus table is absent", where=path, fix="check stimuli.table") from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the stimulus table is unreadable: {error}", where=path, fix="it must be a UTF-8 TSV or CSV") from error


def _read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        values: Any = read_json(path)
        found: dict[str, list[str]] = {}
        if isinstance(values, dict) and "annotations" in values:
            for annotation in values["annotations"]:
                found.setdefault(str(annotation["image_id"]), []).append(_sentence(annotation["caption"]))
        else:
            found = {str(name): [_sentence(text) for text in texts] for name, texts in values.items()}
    except FileNotFoundError as error:
        raise InputNotFoundError("the caption file is absent", where=path, fix="check stimuli.captions") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputDatasetError(f"the caption file is unreadable: {error}", where=path, fix="give COCO-format JSON") from error
    return {name: tuple(text for text in texts if text) for name, texts in found.items()}


def _sentence(text: Any) -> str:  # noqa: ANN401
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no sentence")
    return " ".join(text.split())


def unique_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """Captions without repetitions, in order."""
    return tuple(dict.fromkeys(captions))
