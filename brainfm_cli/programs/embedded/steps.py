"""The border to nipype: a function of ours as a node that runs in its own folder and is skipped where its inputs are unchanged."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from brainfm_cli.provenance import brainfm_version

# Before nipype is imported: it would ask a server whether it is the newest.
os.environ.setdefault("NIPYPE_NO_ET", "1")
os.environ.setdefault("NO_ET", "1")

from nipype import Function, Node, Workflow, config, logging

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def _call(step: str, version: str, **inputs):  # type: ignore[no-untyped-def]  # noqa: ANN003, ANN202, ARG001
    """Runs where nothing is imported, from this text: nipype copies the source of a function into the node."""
    import importlib
    import pathlib

    module, _, name = step.rpartition(".")
    return getattr(importlib.import_module(module), name)(pathlib.Path.cwd(), **inputs)


class Step(Function):  # type: ignore[misc]  # nipype has no types
    """A function whose first parameter is the folder to write into; its errors pass through as they are."""

    def __init__(self, function: Callable[..., Any] | None = None, outputs: Sequence[str] = ("out",), **inputs: Any) -> None:  # noqa: ANN401
        if function is None:  # nipype makes empty copies
            super().__init__(**inputs)
            return
        names = list(inspect.signature(function).parameters)[1:]
        super().__init__(input_names=["step", "version", *names], output_names=list(outputs), function=_call, **inputs)
        self.inputs.step = f"{function.__module__}.{function.__qualname__}"
        self.inputs.version = brainfm_version()  # another version's results are made again

    def run(self, cwd: str | None = None, ignore_exception: bool | None = None, **inputs: Any) -> Any:  # noqa: ANN401, ARG002, FBT001
        """As nipype's, but an exception is not turned into text."""
        return super().run(cwd=cwd, ignore_exception=False, **inputs)


def node(function: Callable[..., Any], *, name: str, outputs: Sequence[str] = ("out",), **inputs: Any) -> Node:  # noqa: ANN401
    """A node of one step; what is None in ``inputs`` is passed on as None."""
    made = Node(Step(function, outputs), name=name)
    for key, value in inputs.items():
        setattr(made.inputs, key, value)
    return made


def empty_workflow(name: str, folder: Path) -> Workflow:
    """A workflow that keeps everything in ``folder`` and stops at the first error."""
    config.update_config(
        {
            "execution": {
                "stop_on_first_crash": "true",
                "stop_on_first_rerun": "false",
                "hash_method": "timestamp",
                "remove_unnecessary_outputs": "false",
                "check_version": "false",
                "crashdump_dir": str(folder),
                "crashfile_format": "txt",
            },
            # Progress and errors are told by our own log; nipype would print tracebacks of errors that are sentences.
            "logging": {"log_to_file": "false", "workflow_level": "CRITICAL", "utils_level": "CRITICAL", "interface_level": "CRITICAL"},
        }
    )
    logging.update_logging(config)
    workflow = Workflow(name=name, base_dir=str(folder))
    workflow.config["execution"]["crashdump_dir"] = str(folder)
    return workflow
