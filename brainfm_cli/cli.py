"""The command line: parsing and help only; every body imports its stage when it is called.

Options are defined once in :data:`OPTIONS` and named by each command; a test freezes the list.
"""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from brainfm_cli.bids.names import strip_prefix
from brainfm_cli.errors import EXIT_SIGINT, EXIT_SIGTERM, UsageError, classify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from brainfm_cli.config import Invocation

app = typer.Typer(
    name="brainfm",
    help="Brain foundation models on BIDS datasets: brainfm COMMAND INPUT_DIR OUTPUT_DIR {participant,group}. "
    "With --container docker|apptainer --image IMAGE the same line runs inside an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(stderr=True, highlight=False)

Strings = list[str]
_PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # what Typer raises for unknown options and bad values
# name: (annotation, default). The only place where an option is declared.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "participant_label": (Annotated[Strings, typer.Option("--participant-label", help="Participants, with or without sub-; all by default.")], ()),
    "session_label": (Annotated[Strings, typer.Option("--session-label", "--session-id", help="Sessions, with or without ses-.")], ()),
    "task_id": (Annotated[Strings, typer.Option("--task-id", "-t", help="Tasks, with or without task-.")], ()),
    "bids_filter_file": (Annotated[Path | None, typer.Option("--bids-filter-file", help="JSON of pybids filters, as in fMRIPrep.")], None),
    "bids_database_dir": (Annotated[Path | None, typer.Option("--bids-database-dir", help="Accepted and ignored: no index is shared between jobs.")], None),
    "skip_bids_validation": (Annotated[bool, typer.Option("--skip-bids-validation", "--skip-bids-validator", help="Accepted: validation runs only with --validate.")], False),
    "validate": (Annotated[bool, typer.Option("--validate", help="Run the BIDS validator on the input first; errors end with 16.")], False),
    "datasets": (Annotated[Strings, typer.Option("--datasets", "--derivatives", "-d", help="Further datasets, NAME=DIR or DIR.")], ()),
    "nprocs": (Annotated[int, typer.Option("--nprocs", "--nthreads", "--n-cpus", min=1, help="Units of work at the same time.")], 1),
    "omp_nthreads": (Annotated[int | None, typer.Option("--omp-nthreads", min=1, help="Threads per unit.")], None),
    "mem_mb": (Annotated[int | None, typer.Option("--mem-mb", "--mem", min=1, help="Memory for the run, megabytes.")], None),
    "work_dir": (Annotated[Path | None, typer.Option("--work-dir", "-w", help="Scratch folder.")], None),
    "clean_workdir": (Annotated[bool, typer.Option("--clean-workdir", help="Empty the scratch folder first.")], False),
    "device": (Annotated[str, typer.Option("--device", help="cpu, cuda, mps or auto.")], "auto"),
    "engine": (Annotated[str | None, typer.Option("--engine", help="embedded (default), or fMRIPrep: fmriprep, docker, apptainer or singularity.")], None),
    "output_spaces": (Annotated[Strings, typer.Option("--output-spaces", help="Spaces as fMRIPrep writes them, e.g. MNI152NLin6Asym:res-2.")], ()),
    "anat_only": (Annotated[bool, typer.Option("--anat-only", help="Structural images only.")], False),
    "fmriprep_level": (Annotated[str | None, typer.Option("--level", help="fMRIPrep's minimal, resampling or full.")], None),
    "ignore": (Annotated[Strings, typer.Option("--ignore", help="fieldmaps, slicetiming, sbref, t2w, flair or fmap-jacobian.")], ()),
    "fs_no_reconall": (Annotated[bool, typer.Option("--fs-no-reconall", help="No FreeSurfer surfaces.")], False),
    "fs_license_file": (Annotated[Path | None, typer.Option("--fs-license-file", help="FreeSurfer's licence; FS_LICENSE otherwise.")], None),
    "fs_subjects_dir": (Annotated[Path | None, typer.Option("--fs-subjects-dir", help="Existing FreeSurfer subjects.")], None),
    "image": (Annotated[str | None, typer.Option("--image", help="fMRIPrep's Docker tag or Apptainer file.")], None),
    "atlases": (Annotated[Strings, typer.Option("--atlases", "--atlas", help="Atlas names; see 'brainfm assets list'.")], ()),
    "min_coverage": (Annotated[float | None, typer.Option("--min-coverage", min=0.0, max=1.0, help="Smallest share of a region inside the brain mask.")], None),
    "denoise_strategy": (Annotated[str | None, typer.Option("--denoise-strategy", help="none, simple, scrubbing or compcor, each with or without +gsr.")], None),
    "trials": (Annotated[bool, typer.Option("--trials", help="Single-trial responses: participant estimates them from BOLD and events, group packs them.")], False),
    "system": (Annotated[str | None, typer.Option("--system", help="brain-graph, drug-response, brain-caption or mri-language.")], None),
    "model": (Annotated[Path | None, typer.Option("--model", help="A models/<id> folder.")], None),
    "target": (Annotated[str | None, typer.Option("--target", help="Column of participants.tsv to predict.")], None),
    "reader_study": (Annotated[Path | None, typer.Option("--reader-study", help="group: analyse this table of doctors' readings instead (docs/reader_study.md).")], None),
    "lock": (Annotated[bool, typer.Option("--lock", help="group: lock the participants' predictions, with hash and date, before outcomes exist.")], False),
    "slurm": (Annotated[Strings, typer.Option("--slurm", help="Options of sbatch, KEY=VALUE; also throttle, modules, extra, requeue.")], ()),
    "resubmit": (Annotated[str | None, typer.Option("--resubmit", help="failed: submit again what lacked memory, time or a node, with more of it.")], None),
    "chat": (Annotated[Strings, typer.Option("--chat", help="Questions, each in quotes, answered in words for every picture or scan.")], ()),
    "kind": (Annotated[str | None, typer.Option("--kind", help="rest, drug or viewing.")], None),
    "sim_level": (Annotated[str | None, typer.Option("--level", help="raw (as scanned), bold (voxel images) or series (packed region series).")], None),
    "raw": (Annotated[bool, typer.Option("--raw", help="The same as --level raw: raw BIDS, as scanned.")], False),
    "effect": (Annotated[float | None, typer.Option("--effect", min=0.0, help="Size of the planted effects; 0 gives a null cohort.")], None),
    "participants": (Annotated[int | None, typer.Option("--participants", min=1, help="Number of people to simulate.")], None),
    "seed": (Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")], None),
    "config": (Annotated[Path | None, typer.Option("--config", "--config-file", help="YAML settings; see docs/settings.md.")], None),
    "overrides": (Annotated[Strings, typer.Option("--set", help="One setting, a.b=c; wins over --config.")], ()),
    "stop_on_first_crash": (Annotated[bool, typer.Option("--stop-on-first-crash", help="Stop at the first failed unit.")], False),
    "reports_only": (Annotated[bool, typer.Option("--reports-only", help="Rebuild reports from existing results.")], False),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")], False),
    "verbose": (Annotated[int, typer.Option("--verbose", "-v", count=True, help="More messages; repeat for debugging.")], 0),
    "json": (Annotated[bool, typer.Option("--json", help="Machine-readable output.")], False),
    "verify": (Annotated[bool, typer.Option("--verify", help="Hash the contents of inputs and outputs again.")], False),
}  # fmt: skip
# Flags that change outputs are settings; the flag wins over --config and --set.
SETTING_OF_FLAG = {
    "atlases": "atlases",
    "min_coverage": "min_coverage",
    "denoise_strategy": "denoise.strategy",
    "trials": "trials",
    "chat": "chat",
    "system": "system.kind",
    "kind": "kind",
    "sim_level": "level",
    "effect": "effect",
    "participants": "participants",
    "seed": "seed",
    "target": "target",
    "engine": "engine",
    "output_spaces": "output_spaces",
    "anat_only": "anat_only",
    "fmriprep_level": "level",
    "ignore": "ignore",
    "fs_no_reconall": "fs_no_reconall",
}
LIST_OPTIONS = {"--participant-label", "--session-label", "--session-id", "--task-id", "-t", "--datasets", "--derivatives", "-d", "--atlases", "--atlas", "--set", "--output-spaces", "--ignore", "--chat", "--slurm"}  # fmt: skip
RUN = ("nprocs", "omp_nthreads", "mem_mb", "work_dir", "clean_workdir", "stop_on_first_crash", "verbose", "dry_run")
MACHINE = ("device", "fs_license_file", "fs_subjects_dir", "image")
SETTINGS = ("config", "overrides")
SELECT = ("participant_label", "session_label", "task_id", "bids_filter_file", "bids_database_dir", "skip_bids_validation", "validate", "datasets")  # fmt: skip
TRAIN = ("device", "seed", *SELECT, *SETTINGS, *RUN)

InputDir = Annotated[Path, typer.Argument(metavar="INPUT_DIR", help="BIDS dataset, or the derivative of the stage before.")]
OutputDir = Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Folder of the derivative to write.")]
LevelArgument = Annotated[str, typer.Argument(metavar="{participant,group}", help="Level of analysis.")]


_LEVELS: dict[str, tuple[str, ...]] = {}
"""Commands with levels, as they are registered."""


def command(
    name: str,
    *,
    levels: Sequence[str] = (),
    options: Sequence[str] = (),
    positionals: dict[str, Any] | None = None,
    wraps: bool = False,
) -> Callable[..., Any]:
    """Register a command whose function takes an :class:`Invocation` and gives back an exit code.

    With ``levels`` the command has the BIDS-app positionals; otherwise ``positionals`` (or only OUTPUT_DIR). One that ``wraps``
    takes another command with its options; they are the function's ``arguments``.
    """
    if levels:
        _LEVELS[name] = tuple(levels)
    places = (
        {"input_dir": InputDir, "output_dir": OutputDir, "level": LevelArgument}
        if levels
        else {"output_dir": OutputDir}
        if positionals is None
        else positionals
    )

    def register(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def run(**values: Any) -> None:  # noqa: ANN401
            extra = {
                key: values.pop(key)
                for key in [*places, "json", "verify"]
                if key in values and key not in ("input_dir", "output_dir", "level")
            }
            if wraps:
                extra |= {"arguments": tuple(values["context"].args), **{key: values.pop(key) for key in ("slurm", "resubmit")}}
            raise typer.Exit(_guarded(lambda: function(_invocation(name, levels, values), **extra), verbose=values.get("verbose", 0)))

        parameters = [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for key, kind in places.items()]
        parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        for key in options:
            annotation, default = OPTIONS[key]
            default = [] if default == () else default
            parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        del run.__wrapped__
        app.command(name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True} if wraps else {})(run)
        return function

    return register


@command("simulate", options=("kind", "sim_level", "raw", "participants", "effect", "seed", "atlases", "datasets", *SETTINGS, *RUN))
def simulate(call: Invocation) -> int:
    """Write a BIDS dataset with known truth."""
    from brainfm_cli.stages.simulate import SimulateSettings, simulate

    return simulate(call, SimulateSettings.read(call.config, call.overrides))


@command(
    "preprocess",
    levels=("participant", "group"),
    options=(
        "engine",
        "output_spaces",
        "anat_only",
        "fmriprep_level",
        "ignore",
        "fs_no_reconall",
        *MACHINE[1:],
        "seed",
        *SELECT,
        *SETTINGS,
        *RUN,
    ),
)
def preprocess(call: Invocation) -> int:
    """Preprocess raw BIDS; options after -- go to fMRIPrep; group sums up the quality of finished participants."""
    from brainfm_cli.stages.preprocess import PreprocessSettings, preprocess

    return preprocess(call, PreprocessSettings.read(call.config, call.overrides))


@command(
    "parcellate",
    levels=("participant", "group"),
    options=("atlases", "denoise_strategy", "min_coverage", "trials", *SELECT, *SETTINGS, "reports_only", *RUN),
)
def parcellate(call: Invocation) -> int:
    """Turn preprocessed runs into region series and connectivity, all atlases in one pass; group packs the cohort."""
    from brainfm_cli.stages.parcellate import ParcellateSettings, parcellate

    return parcellate(call, ParcellateSettings.read(call.config, call.overrides))


@command("pretrain", levels=("group",), options=("system", "model", *TRAIN))
def pretrain(call: Invocation) -> int:
    """Pretrain a foundation model on a packed cohort, or teach a finished one (--model) further atlases."""
    from brainfm_cli.stages.pretrain import pretrain

    return pretrain(call)


@command("align", levels=("group",), options=("model", "target", *TRAIN))
def align(call: Invocation) -> int:
    """Align a pretrained model with texts: of disorders, so that unseen ones can be scored; with captions; with reports."""
    from brainfm_cli.stages.align import align

    return align(call)


@command("prompt-tune", levels=("group",), options=("system", "model", "target", *TRAIN))
def prompt_tune(call: Invocation) -> int:
    """Learn prompts and a head for one target; the backbone stays frozen."""
    from brainfm_cli.stages.prompt_tune import prompt_tune

    return prompt_tune(call)


@command("predict", levels=("participant", "group"), options=("model", "target", "reader_study", "lock", "reports_only", *TRAIN))
def predict(call: Invocation) -> int:
    """Apply a model to participants; group evaluates it beside its floors, locks predictions, or analyses doctors' readings."""
    from brainfm_cli.stages.predict import PredictSettings, predict

    return predict(call, PredictSettings.read(call.config, call.overrides))


@command("caption", levels=("participant", "group"), options=("model", "chat", "reports_only", *TRAIN))
def caption(call: Invocation) -> int:
    """Say in words what participants saw, or write reports of their scans; group scores both beside their floors."""
    from brainfm_cli.stages.caption import caption

    return caption(call)


@command("demo", options=("seed", "nprocs", "verbose"))
def demo(call: Invocation) -> int:
    """Run the whole chain on a simulated cohort and print the score, its floors and the best possible score."""
    from brainfm_cli.stages.demo import DemoSettings, demo

    return demo(call, DemoSettings.read(call.config, call.overrides))


@command("status", options=("json", "verify", "verbose"))
def status(call: Invocation, *, json: bool, verify: bool) -> int:
    """List what is done, current, stale or failed, and why."""
    from brainfm_cli.stages.status import status

    return status(call.output_dir, as_json=json, verify=verify)


@command("submit", positionals={}, options=("slurm", "resubmit", "dry_run", "verbose"), wraps=True)
def submit(call: Invocation, *, arguments: tuple[str, ...], slurm: list[str], resubmit: str | None) -> int:
    """Submit a command as SLURM jobs: brainfm submit COMMAND INPUT OUTPUT LEVEL [its options] --slurm KEY=VALUE ..."""
    from brainfm_cli.stages import submit as stage

    if resubmit is not None:
        if resubmit != "failed" or len(arguments) != 1:
            raise UsageError("--resubmit takes the word 'failed' and one folder", fix="brainfm submit --resubmit failed OUTPUT_DIR")
        return stage.resubmit(Path(arguments[0]), slurm, dry_run=call.dry_run)
    kind, image, line = take_container(arguments)
    inner = _parsed(line)
    reading = _invocation(line[0], _LEVELS[line[0]], {**inner.params, "context": inner})
    named = () if kind is None else ("--container", kind, *(() if image is None else ("--image", image)))
    return stage.submit(reading, (*line, *named), slurm, dry_run=call.dry_run)


Action = Annotated[str, typer.Argument(metavar="{list,get,verify,where}", help="What to do.")]
Names = Annotated[list[str], typer.Argument(metavar="[NAME]...", help="Assets; all by default.", default_factory=list)]


@command("assets", positionals={"action": Action, "names": Names}, options=("json", "verbose"))
def assets(call: Invocation, *, action: str, names: list[str], json: bool) -> int:  # noqa: ARG001
    """List, install, verify or locate atlases, templates and language models."""
    from brainfm_cli.stages.assets import assets

    return assets(action, names, as_json=json)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``brainfm`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    atexit.register(gc.freeze)  # else Python collects what is about to vanish anyway: 0.3 s of a plan
    arguments = normalise(list(sys.argv[1:] if argv is None else argv))
    if arguments[:1] == ["--version"]:
        from brainfm_cli.provenance import brainfm_version

        typer.echo(f"brainfm {brainfm_version()}")
        return
    kind, image, inside = take_container(arguments)
    if kind is not None and arguments[:1] != ["submit"]:  # whose jobs run inside the image, not the submission
        raise SystemExit(_guarded(lambda: _run_inside(kind, image, inside), verbose=0))
    passthrough: tuple[str, ...] = ()
    if arguments[:1] == ["preprocess"] and "--" in arguments:
        place = arguments.index("--")
        arguments, passthrough = arguments[:place], tuple(arguments[place + 1 :])
    app(args=arguments, prog_name="brainfm", obj=passthrough)


def take_container(tokens: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """``--container KIND [--image IMAGE]`` of a command line, and the line without them; all that stands behind ``--`` stays."""
    end = list(tokens).index("--") if "--" in tokens else len(tokens)
    line = [*tokens[:end]]
    found: dict[str, str | None] = {"--container": None, "--image": None}
    if not any(token.partition("=")[0] == "--container" for token in line):
        return None, None, list(tokens)
    for flag in found:
        for place, token in enumerate(line):
            name, separator, value = token.partition("=")
            if name == flag:
                found[flag] = value if separator else (line[place + 1] if place + 1 < len(line) else "")
                del line[place : place + (1 if separator else 2)]
                break
    return found["--container"], found["--image"], [*line, *tokens[end:]]


def _run_inside(kind: str, image: str | None, arguments: list[str]) -> int:
    """Give this process over to the same command inside an image; comes back only where that cannot be."""
    from brainfm_cli.config import parse_datasets
    from brainfm_cli.programs.own_image import container_command

    values = _parsed(arguments[: arguments.index("--")] if "--" in arguments else arguments).params
    paths = {key: value for key, value in values.items() if isinstance(value, Path)}
    written = [paths.pop(key) for key in ("output_dir", "work_dir") if key in paths]
    read = [*paths.values(), *parse_datasets(values.get("datasets") or ()).values()]
    command = container_command(kind, image, arguments, read=read, written=written, gpu=values.get("device") == "cuda")
    sys.stderr.flush()
    os.execvp(command.argv[0], command.argv)  # noqa: S606  (no shell: exactly these words; signals and exit code are the container's)


def _parsed(arguments: Sequence[str]) -> Any:  # noqa: ANN401  (a context of Typer's parser)
    """A command line of a command with levels, read as it would be, without running it.

    Raises
    ------
    UsageError
        The command has no levels, or would refuse an option or a value.
    """
    commands = {name: one for name, one in typer.main.get_command(app).commands.items() if name in _LEVELS}  # type: ignore[attr-defined]
    if not arguments or arguments[0] not in commands:
        named = f"'{arguments[0]}' cannot be" if arguments else "a command is needed to be"
        raise UsageError(f"{named} run elsewhere", fix=f"use one of: {', '.join(sorted(commands))}")
    try:
        return commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
    except _PARSER_ERROR as error:
        raise UsageError(f"'{arguments[0]}': {error}", fix=f"see brainfm {arguments[0]} --help") from error


def normalise(tokens: Sequence[str]) -> list[str]:
    """BIDS-app spellings as Typer reads them: ``_`` in flags becomes ``-``, list flags are repeated per value."""
    result: list[str] = []
    flag: str | None = None
    for position, token in enumerate(tokens):
        if token == "--":  # noqa: S105
            return [*result, *tokens[position:]]
        if token.startswith("--") and len(token) > 2:
            name, separator, value = token.partition("=")
            name = name.replace("_", "-")
            result.append(name + separator + value)
            flag = name if name in LIST_OPTIONS and not separator else None
            waiting = flag is not None
        elif token.startswith("-") and len(token) > 1 and not _is_number(token):
            result.append(token)
            flag = token if token in LIST_OPTIONS else None
            waiting = flag is not None
        elif flag is not None:
            result += [token] if waiting else [flag, token]
            waiting = False
        else:
            result.append(token)
    return result


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _invocation(name: str, levels: Sequence[str], values: dict[str, Any]) -> Invocation:
    from brainfm_cli.config import Invocation, Selection, parse_datasets, read_execution  # pydantic: a third of the time of --help

    level = values.get("level", levels[0] if levels else "group")
    if levels and level not in levels:
        raise UsageError(f"'{name}' has no level '{level}'", fix=f"use: {' or '.join(levels)}")
    if values.get("bids_database_dir"):
        logging.getLogger(__name__).warning("--bids-database-dir is ignored: no index is shared between jobs")
    overrides = [*values.get("overrides", [])]
    for flag, setting in SETTING_OF_FLAG.items():
        value = values.get(flag)
        if value not in (None, [], ()) and value is not False:
            overrides.append(f"{setting}={_listed(value)}" if isinstance(value, list | tuple) else f"{setting}={value}")
    if values.get("raw"):
        overrides.append("level=raw")
    flags = {key: values[key] for key in (*RUN, *MACHINE) if key in values and key != "dry_run"}
    config = values.get("config")
    output_dir = values.get("output_dir", Path())
    return Invocation(
        command=name,
        input_dir=values.get("input_dir", output_dir),
        output_dir=output_dir,
        level="participant" if level == "participant" else "group",
        selection=Selection(
            participant_label=strip_prefix(values.get("participant_label", ()), "sub"),
            session_label=strip_prefix(values.get("session_label", ()), "ses"),
            task_id=strip_prefix(values.get("task_id", ()), "task"),
            bids_filter_file=values.get("bids_filter_file"),
        ),
        execution=read_execution(config, overrides, flags),
        config=config,
        overrides=tuple(text for text in overrides if not text.startswith("execution.")),
        datasets=parse_datasets(values.get("datasets", ())),
        model=values.get("model"),
        target=values.get("target"),
        dry_run=values.get("dry_run", False),
        reports_only=values.get("reports_only", False),
        reader_study=values.get("reader_study"),
        lock=values.get("lock", False),
        validate_input=values.get("validate", False),
        passthrough=values["context"].obj or (),
        arguments=tuple(sys.argv[1:]),
    )


def _listed(values: Sequence[str]) -> str:
    """A YAML list; JSON's quotes keep commas and question marks inside a value."""
    return f"[{', '.join(json.dumps(str(value), ensure_ascii=False) for value in values)}]"


def _guarded(call: Callable[[], int], *, verbose: int) -> int:
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False, show_time=False)]
    )
    logging.getLogger("brainfm_cli").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    try:
        return call()
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes", style="yellow")
        return EXIT_SIGINT
    except Exception as error:  # noqa: BLE001  (the one place where an error becomes a sentence and a code)
        known = classify(error)
        console.print(f"error ({known.failure_class}): {known}", style="red", markup=False, soft_wrap=True)
        if known.exit_code == 1 or os.environ.get("BRAINFM_DEBUG"):
            console.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
        return known.exit_code


def _terminate(_signal: int, _frame: object) -> None:
    raise SystemExit(EXIT_SIGTERM)
