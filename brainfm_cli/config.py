"""Settings, execution and invocation: what a run does, how it is carried out, and on which data.

Only :class:`Settings` enters the configuration hash. No torch, no imaging library.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from brainfm_cli.documents import parse_yaml
from brainfm_cli.errors import SettingsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Level = Literal["participant", "group"]


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown fields; each is documented by its docstring, which docs/generate.py reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:  # noqa: ANN401
        """Who changes one field of a part keeps the others as this class, not the part's own, has them by default."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: _over(defaults.get(name), value) for name, value in values.items()}

    @classmethod
    def from_values(cls, values: dict[str, Any], *, where: Path | None = None) -> Self:
        """An instance from plain values, with errors turned into sentences."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(
                f"invalid settings for {cls.__name__.removesuffix('Settings').lower()}: {_sentences(cls, error)}",
                where=where,
                fix="see docs/settings.md for every field; change with --config FILE or --set a.b=c",
            ) from error


def _over(default: object, value: Any) -> Any:  # noqa: ANN401
    """``value`` with what it does not say taken from ``default``, where that is a part with settings of its own."""
    if not isinstance(default, Frozen) or not isinstance(value, dict):
        return value
    kept = {name: getattr(default, name) for name in default.model_fields_set}
    return kept | {name: _over(kept.get(name), one) for name, one in value.items()}


class Settings(Frozen):
    """Everything that changes an output. One subclass per command; its digest guards output folders."""

    @classmethod
    def read(cls, config: Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """Settings from a YAML file and ``a.b=c`` overrides, the later winning.

        Raises
        ------
        SettingsError
            The file is not readable YAML, or a field is unknown or has a bad value.
        """
        values = _values(config, overrides)
        values.pop("execution", None)
        return cls.from_values(values, where=config)

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of all fields."""
        return digest_of(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The settings as YAML, in declaration order."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Execution(Frozen):
    """How a run is carried out. Never hashed: it must not change any output beyond rounding."""

    nprocs: int = Field(default=1, ge=1)
    """Units of work done at the same time."""
    omp_nthreads: int | None = None
    """Threads per unit; unset leaves the libraries' default."""
    mem_mb: int | None = None
    """Memory the run may use, in megabytes; used for planning and refused when too small."""
    work_dir: Path | None = None
    """Scratch folder; unset uses a private temporary folder."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    precision: str = "auto"
    """32-true, bf16-mixed, 16-mixed or auto (bf16 on GPUs that have it, 32 bits elsewhere)."""
    compile: bool = False
    """Compile the repeated parts of a model for the GPU: some minutes per atlas at the start, a faster training after (docs/performance.md)."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes of the training loop."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines that train together."""
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """GPUs (or CPU processes) that train together on each machine."""
    stop_on_first_crash: bool = False
    """Stop at the first failed unit instead of going on with the others."""
    clean_workdir: bool = False
    """Empty the scratch folder before starting."""
    verbose: int = 0
    """0 warnings, 1 progress, 2 debugging."""
    fs_license_file: Path | None = None
    """FreeSurfer's licence, for fMRIPrep; unset looks at FS_LICENSE and FREESURFER_HOME."""
    fs_subjects_dir: Path | None = None
    """Existing FreeSurfer subjects that fMRIPrep uses and extends; unset keeps them in the output."""
    image: str | None = None
    """fMRIPrep's image: a Docker tag or an Apptainer file; unset is the official image of the release."""
    max_hours: float | None = None
    """Stop a wrapped program after so many hours; the same command resumes."""


class Selection(Frozen):
    """Which part of the input a run looks at. Never hashed."""

    participant_label: tuple[str, ...] = ()
    """Labels without ``sub-``; empty means everybody."""
    session_label: tuple[str, ...] = ()
    """Labels without ``ses-``; empty means all."""
    task_id: tuple[str, ...] = ()
    """Labels without ``task-``; empty means all."""
    bids_filter_file: Path | None = None
    """JSON of pybids filters per query name, as in fMRIPrep."""


class Invocation(Frozen):
    """One command line: positionals, selection, execution, and where settings come from."""

    command: str
    """Name of the command, e.g. ``parcellate``."""
    input_dir: Path
    """BIDS dataset or derivative of the stage before; for simulate and demo the output folder itself."""
    output_dir: Path
    """Folder the derivative is written to."""
    level: Level = "participant"
    """participant or group."""
    selection: Selection = Selection()
    """Participants, sessions, tasks and filters."""
    execution: Execution = Execution()
    """Processes, memory, device."""
    config: Path | None = None
    """Settings file."""
    overrides: tuple[str, ...] = ()
    """``a.b=c`` overrides; flags that change outputs are translated into these."""
    datasets: dict[str, Path] = {}
    """Named extra datasets of ``-d/--datasets``."""
    model: Path | None = None
    """A ``models/<id>`` folder."""
    target: str | None = None
    """Column of participants.tsv."""
    dry_run: bool = False
    """Print the plan and stop."""
    reports_only: bool = False
    """Rebuild reports from existing results."""
    reader_study: Path | None = None
    """Table of readings that is analysed instead of a model's predictions."""
    lock: bool = False
    """Lock predictions with hash and date, and stop."""
    validate_input: bool = False
    """Run the BIDS validator on the input first."""
    passthrough: tuple[str, ...] = ()
    """Options for a wrapped program, as typed after ``--``."""
    arguments: tuple[str, ...] = ()
    """The command line as typed, for the record."""


def read_execution(config: Path | None, overrides: Sequence[str], flags: dict[str, Any]) -> Execution:
    """Execution from the ``execution:`` part of a settings file, ``--set execution.x=y`` and flags, flags winning.

    A flag left at its default does not overrule the file.
    """
    values = _values(config, [text for text in overrides if text.startswith("execution.")]).get("execution") or {}
    if not isinstance(values, dict):
        raise SettingsError("'execution' must be a mapping", where=config, fix="write 'execution:' and indented fields")
    typed = {key: value for key, value in flags.items() if value != Execution.model_fields[key].default}
    return Execution.from_values(values | typed, where=config)


def read_value(config: Path | None, overrides: Sequence[str], name: str) -> Any:  # noqa: ANN401
    """One field as it is written in the settings file or behind ``--set``, not checked; none where it is not set."""
    return _values(config, overrides).get(name)


def digest_of(values: object) -> str:
    """SHA-256 of the canonical JSON of plain values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_datasets(tokens: Iterable[str]) -> dict[str, Path]:
    """Named folders from ``name=DIR`` or ``DIR`` tokens; a folder without name is called after itself.

    Raises
    ------
    UsageError
        Two datasets carry the same name.
    """
    named: dict[str, Path] = {}
    for token in tokens:
        name, separator, folder = token.partition("=")
        if not separator:
            name, folder = Path(token).resolve().name, token
        if name in named:
            raise UsageError(f"two datasets are called '{name}'", fix="name them: --datasets a=DIR b=DIR")
        named[name] = Path(folder)
    return named


def _values(config: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    values = _read_yaml(config) if config else {}
    for override in overrides:
        _merge(values, _parse_override(override))
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError("the settings file does not exist", where=path, fix="check the path of --config") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"the settings file cannot be read: {error}", where=path, fix="it must be UTF-8 YAML of 'field: value' lines"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError("the settings file holds no mapping", where=path, fix="write 'field: value' lines")
    return values


def _parse_override(override: str) -> dict[str, Any]:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise SettingsError(f"'--set {override}' is not of the form a.b=c", fix="write e.g. --set system.num_layers=8")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"the value of '--set {override}' is not YAML", fix="quote it, e.g. --set 'a=[1, 2]'") from error
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _sentences(cls: type[BaseModel], error: ValidationError) -> str:
    known = sorted(_field_paths(cls))
    parts = []
    for problem in error.errors():
        path, message = _path_and_message(cls, problem)
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(path.rsplit(".", 1)[-1], [name.rsplit(".", 1)[-1] for name in known], n=1)
            parts.append(f"unknown field '{path}'" + (f" (did you mean '{close[0]}'?)" if close else ""))
        else:
            parts.append(f"'{path or 'settings'}': {message}")
    return "; ".join(parts)


def _path_and_message(cls: type[BaseModel], problem: Mapping[str, Any]) -> tuple[str, str]:
    """Where as typed on the command line, and what: pydantic puts the member's name into the paths of a union."""
    place, message = list(problem["loc"]), str(problem["msg"])
    field = cls.model_fields.get(str(place[0])) if place else None
    if field is not None and field.discriminator is not None:
        del place[1:2]
        if problem["type"] in {"union_tag_invalid", "union_tag_not_found"}:
            place.append(str(field.discriminator))
            expected = problem.get("ctx", {}).get("expected_tags")
            message = f"Input should be {' or '.join(expected.split(', '))}" if expected else "Field required"
    return ".".join(map(str, place)), message


def _field_paths(cls: type[BaseModel], prefix: str = "") -> set[str]:
    paths: set[str] = set()
    for name, field in cls.model_fields.items():
        paths.add(prefix + name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                paths |= _field_paths(part, f"{prefix}{name}.")
    return paths
