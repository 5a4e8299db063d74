"""The exact command of each way to run fMRIPrep: on this machine, Docker, Apptainer (Singularity), fmriprep-docker.

Inputs are bound read-only at fmriprep-docker's places (``/data``, ``/out``, ``/scratch``, ``/deriv/NAME``). There
is no terminal and no question.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from brainfm_cli.errors import EngineUnavailableError, InputNotFoundError, MissingProgramError, SettingsError
from brainfm_cli.programs.commands import Command, ask
from brainfm_cli.programs.fmriprep import Places, arguments, native_places

if TYPE_CHECKING:
    from brainfm_cli.programs.fmriprep import Task

Engine = Literal["fmriprep", "docker", "apptainer", "fmriprep-docker"]
REPOSITORY = "nipreps/fmriprep"
_LICENCE = "/opt/freesurfer/license.txt"
_TEMPLATEFLOW = "/templateflow"
_TEMPLATEFLOW_OF_IMAGE = "/home/fmriprep/.cache/templateflow"
_VERSION = re.compile(r"\d+\.\d+\.\d+\S*")


def official_image(engine: Engine, version: str) -> str | None:
    """The image of a release: Docker's tag, a file of that name in this folder for Apptainer, none on this machine itself."""
    if engine == "fmriprep":
        return None
    return f"fmriprep-{version}.sif" if engine == "apptainer" else f"{REPOSITORY}:{version}"


def apptainer_program() -> str:
    """``apptainer``, or ``singularity`` where only that is installed."""
    return "apptainer" if shutil.which("apptainer") or not shutil.which("singularity") else "singularity"


def build_command(engine: Engine, task: Task, *, image: str | None, rootless: bool = False) -> Command:
    """The command that does a task.

    Parameters
    ----------
    image
        Docker image or Apptainer file; not used on this machine.
    rootless
        Docker's daemon runs as the user, whose files root inside the container owns.

    Raises
    ------
    SettingsError
        fmriprep-docker cannot do what is asked for.
    """
    if engine == "fmriprep":
        return Command(argv=("fmriprep", *arguments(task, native_places(task))), environment=_native_environment(task))
    if image is None:
        raise SettingsError(f"the engine '{engine}' needs an image", fix="give --image")
    if engine == "docker":
        return _docker(task, image, rootless=rootless)
    if engine == "apptainer":
        return _apptainer(task, image)
    return _fmriprep_docker(task, image, rootless=rootless)


def container_name(task: Task) -> str:
    """Name of a participant's Docker container: two jobs never do one participant of one output at the same time."""
    where = hashlib.sha256(str(task.output).encode()).hexdigest()[:8]
    return f"brainfm-sub-{task.label.replace('+', '.')}-{where}"


def check_engine(engine: Engine, *, image: str | None, version: str, pinned: bool) -> bool:
    """See that the engine runs, has its image, and is the version asked for; says whether Docker is rootless.

    Parameters
    ----------
    pinned
        The image carries the version in its tag, and need not be asked.

    Raises
    ------
    MissingProgramError
        The program is not on PATH.
    EngineUnavailableError
        The daemon does not answer, the image is absent, or the version is another.
    """
    program = {"fmriprep": "fmriprep", "docker": "docker", "apptainer": apptainer_program(), "fmriprep-docker": "fmriprep-docker"}[engine]
    _find(program)
    if engine == "fmriprep":
        _check_version(version, "fmriprep", "--version")
        return False
    if engine == "apptainer":
        _check_file(image, version, program)
        return False
    _find("docker")
    code, security = ask("docker", "info", "--format", "{{.SecurityOptions}}")
    if code != 0:
        last = security.rpartition("\n")[2][:200]
        raise EngineUnavailableError(
            f"Docker's daemon does not answer (code {code}): {last}",
            fix="start it, or ask for permission; without one use --engine apptainer or fmriprep",
        )
    code, _ = ask("docker", "image", "inspect", "--format", "{{.Id}}", str(image))
    if code != 0:
        raise EngineUnavailableError(f"the image {image} is not on this machine", fix=f"fetch it with: docker pull {image}")
    if not pinned:
        _check_version(version, "docker", "run", "--rm", str(image), "--version")
    return "rootless" in security


def _find(program: str) -> None:
    if shutil.which(program) is None:
        fixes = {
            "fmriprep": "load its module, or use --engine docker or apptainer",
            "fmriprep-docker": "install it with: pip install fmriprep-docker, or leave fmriprep_docker out",
        }
        raise MissingProgramError(
            f"'{program}' is not on PATH", fix=fixes.get(program, "install it, load its module, or use another --engine")
        )


def _check_file(image: str | None, version: str, program: str) -> None:
    suggested = official_image("apptainer", version)
    build = f"{program} build {suggested} docker://{official_image('docker', version)}"
    if image is None or "://" in image:
        raise EngineUnavailableError(f"{image} would be fetched for every participant", fix=f"make a file once with: {build}; then give --image {suggested}")  # fmt: skip
    path = Path(image)
    if not path.exists():
        raise EngineUnavailableError("the image does not exist", where=path, fix=f"make it once with: {build}; or give --image FILE")
    if path.is_file() and path.stat().st_size == 0:
        raise EngineUnavailableError("the image is empty: its download broke off", where=path, fix=f"make it again with: {build}")
    _check_version(version, program, "run", "--cleanenv", str(path.absolute()), "--version")


def _check_version(version: str, *command: str) -> None:
    code, answer = ask(*command, timeout_s=600)
    found = _VERSION.findall(answer)
    if code != 0 or not found:
        last = answer.rpartition("\n")[2][:200]
        raise EngineUnavailableError(
            f"'{' '.join(command)}' does not say its version (code {code}): {last}", fix="try the same line in a shell"
        )
    if version not in found:
        raise EngineUnavailableError(
            f"this fMRIPrep is version {found[-1]}, the settings say {version}",
            fix=f"give --set fmriprep_version={found[-1]} for the whole dataset, or install {version}; one dataset, one version",
        )


def _native_environment(task: Task) -> dict[str, str]:
    return _offline({"TEMPLATEFLOW_HOME": str(task.templateflow)}) if task.templateflow else {}


def _offline(variables: dict[str, str]) -> dict[str, str]:
    # A home bound read-only cannot be brought up to date, and a node without network must not try.
    return {**variables, "TEMPLATEFLOW_AUTOUPDATE": "off"}


def _in_container(task: Task) -> Places:
    return Places(
        data="/data",
        output="/out",
        scratch="/scratch",
        licence=_LICENCE,
        fs_subjects_dir="/opt/subjects" if task.fs_subjects_dir else None,
        filters=f"/scratch/{task.filters.relative_to(task.scratch).as_posix()}" if task.filters else None,
        datasets=tuple((name, f"/deriv/{name}") for name, _ in task.datasets),
    )


def _binds(task: Task) -> list[str]:
    binds = [f"{task.data}:/data:ro", f"{task.output}:/out", f"{task.scratch}:/scratch", f"{task.licence}:{_LICENCE}:ro"]
    binds += [f"{task.fs_subjects_dir}:/opt/subjects"] if task.fs_subjects_dir else []
    binds += [f"{path}:/deriv/{name}:ro" for name, path in task.datasets]
    return [*binds, *([f"{task.templateflow}:{_TEMPLATEFLOW}:ro"] if task.templateflow else [])]


def check_binds(task: Task) -> None:
    """See that every path can be bound: engines split a bind at colons and commas.

    Raises
    ------
    InputNotFoundError
        A path holds one of them.
    """
    for path in (task.data, task.output, task.scratch, task.licence, task.fs_subjects_dir, task.templateflow, *(path for _, path in task.datasets)):  # fmt: skip
        if path is not None and (":" in str(path) or "," in str(path)):
            raise InputNotFoundError("a path with ':' or ',' cannot be bound into a container", where=path, fix="rename the folder, or reach it through a link")  # fmt: skip


def _user(*, rootless: bool) -> list[str]:
    return [] if rootless or os.getuid() == 0 else ["--user", f"{os.getuid()}:{os.getgid()}"]


def _docker(task: Task, image: str, *, rootless: bool) -> Command:
    words = ["docker", "run", "--rm", "--init", "--name", container_name(task), *_user(rootless=rootless)]
    words += ["--pull", "never"]
    for bind in _binds(task):
        words += ["--volume", bind]
    if task.templateflow:
        for name, value in _offline({"TEMPLATEFLOW_HOME": _TEMPLATEFLOW}).items():
            words += ["--env", f"{name}={value}"]
    return Command(argv=(*words, image, *arguments(task, _in_container(task))))


def _apptainer(task: Task, image: str) -> Command:
    # The user's home would bring its own templates, packages and settings; the container gets an empty one.
    words = [apptainer_program(), "run", "--cleanenv", "--home", f"{task.scratch}/home:/home/brainfm"]
    for bind in _binds(task):
        words += ["--bind", bind]
    home = _TEMPLATEFLOW if task.templateflow else _TEMPLATEFLOW_OF_IMAGE
    for name, value in _offline({"TEMPLATEFLOW_HOME": home}).items():
        words += ["--env", f"{name}={value}"]
    return Command(argv=(*words, str(Path(image).absolute()), *arguments(task, _in_container(task))))


def _fmriprep_docker(task: Task, image: str, *, rootless: bool) -> Command:
    if task.templateflow:
        raise SettingsError(
            "fmriprep-docker cannot bind a TemplateFlow home",
            fix="unset execution.templateflow, or use --engine docker without fmriprep_docker",
        )
    # It binds this machine's paths itself. Its own options stand between fMRIPrep's, in any order.
    places = native_places(task)
    wrapper = ["--image", image, "--no-tty", *_user(rootless=rootless)]
    positionals, options = arguments(task, places)[:3], arguments(task, places)[3:]
    return Command(argv=("fmriprep-docker", *positionals, *wrapper, *options))


def scratch_folders(engine: Engine, task: Task) -> tuple[Path, ...]:
    """Folders that must be there before the engine starts: what Docker makes itself belongs to root."""
    homes = (task.scratch / "home",) if engine == "apptainer" else ()
    return (task.output, task.scratch, *homes)
