"""The same command line inside an image of brainfm: Docker or Apptainer, every path at its own place, inputs read-only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from brainfm_cli.errors import EngineUnavailableError, InputNotFoundError, MissingProgramError, UsageError
from brainfm_cli.programs.commands import Command, ask
from brainfm_cli.programs.containers import apptainer_program

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["docker", "apptainer", "singularity"]
IMAGE_VARIABLE = "BRAINFM_IMAGE"
"""Environment variable that names the image where --image does not."""
_SCRATCH = "/tmp"  # noqa: S108  (of the container, in memory)


def container_command(
    kind: str, image: str | None, arguments: Sequence[str], *, read: Sequence[Path], written: Sequence[Path], gpu: bool
) -> Command:
    """The command that runs ``brainfm arguments`` inside an image, in this folder, without network.

    Parameters
    ----------
    read
        Files and folders that the command reads; those that do not exist are left out, so that the command itself says so.
    written
        Folders that it writes; made where they do not exist, because engines would make them as root.
    gpu
        Whether GPUs are passed on.

    Raises
    ------
    UsageError
        The kind is unknown, or no image is named.
    InputNotFoundError
        A path holds ``:`` or ``,``, at which engines split.
    MissingProgramError, EngineUnavailableError
        The engine is not installed or does not answer, or the image is not there.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"--container {kind} is unknown", fix=f"use one of: {', '.join(get_args(Kind))}")
    image = image or os.environ.get(IMAGE_VARIABLE)
    if not image:
        raise UsageError(
            "--container needs an image", fix=f"give --image, or set {IMAGE_VARIABLE}; containers/README.md says how one is built"
        )
    program = "docker" if kind == "docker" else apptainer_program()
    if shutil.which(program) is None:
        raise MissingProgramError(f"'{program}' is not on PATH", fix="install it, load its module, or leave --container out")
    # a folder that is also written is bound once, for writing
    places = {_bindable(path): "" for path in written}
    places |= {place: ":ro" for path in read if path.exists() and (place := _bindable(path)) not in places}
    _check_image(kind, image)
    for path in written:
        path.mkdir(parents=True, exist_ok=True)
    binds = [f"{place}:{place}{mode}" for place, mode in sorted(places.items())]
    if kind == "docker":
        return Command(argv=(*_docker(binds, gpu=gpu), image, *arguments))
    return Command(argv=(program, *_apptainer(binds, gpu=gpu), str(Path(image).absolute()), *arguments))


def _docker(binds: Sequence[str], *, gpu: bool) -> list[str]:
    words = [
        "docker",
        "run",
        "--rm",
        "--init",
        "--pull",
        "never",
        "--network",
        "none",
        "--read-only",
        "--tmpfs",
        _SCRATCH,
        "--workdir",
        str(Path.cwd()),
    ]
    words += ["--user", f"{os.getuid()}:{os.getgid()}"] if os.getuid() else []
    words += ["--gpus", "all"] if gpu else []
    return [*words, *(word for bind in binds for word in ("--volume", bind))]


def _apptainer(binds: Sequence[str], *, gpu: bool) -> list[str]:
    # nothing of the user's home comes in: its packages and settings would be taken for the image's
    words = ["run", "--cleanenv", "--no-home", "--pwd", str(Path.cwd())]
    words += ["--nv"] if gpu else []
    return [*words, *(word for bind in binds for word in ("--bind", bind))]


def _check_image(kind: str, image: str) -> None:
    if kind != "docker":
        if not Path(image).exists():
            raise EngineUnavailableError("the image does not exist", where=image, fix="containers/README.md says how one is built")
        return
    code, said = ask("docker", "image", "inspect", "--format", "{{.Id}}", image)
    if code != 0:
        raise EngineUnavailableError(
            f"the image {image} is not on this machine, or Docker does not answer: {said.strip()[-200:]}",
            fix="containers/README.md says how one is built",
        )


def _bindable(path: Path) -> str:
    place = str(path.absolute())
    if ":" in place or "," in place:
        raise InputNotFoundError("a path with ':' or ',' cannot be bound into a container", where=path, fix="rename the folder, or reach it through a link")  # fmt: skip
    return place
