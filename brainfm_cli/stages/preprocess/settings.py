"""Settings of ``brainfm preprocess``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from brainfm_cli.config import Settings, digest_of
from brainfm_cli.programs.fmriprep import LTS_VERSION

EngineName = Literal["fmriprep", "docker", "apptainer"]
Ignorable = Literal["fieldmaps", "slicetiming", "sbref", "t2w", "flair", "fmap-jacobian"]


class PreprocessSettings(Settings):
    """Settings of ``brainfm preprocess``."""

    engine: EngineName = "apptainer"
    """How fMRIPrep runs: fmriprep (installed on this machine), docker, or apptainer (singularity is the same)."""
    fmriprep_docker: bool = False
    """With engine docker: let the fmriprep-docker package build the container's command."""
    fmriprep_version: str = Field(default=LTS_VERSION, pattern=r"^\d+\.\d+\.\d+\S*$")
    """Release of fMRIPrep; one dataset, one version. The default is of the series with long-term support."""
    output_spaces: tuple[str, ...] = Field(default=("MNI152NLin2009cAsym",), min_length=1)
    """Spaces as fMRIPrep writes them, e.g. MNI152NLin6Asym:res-2, T1w, fsaverage5."""
    anat_only: bool = False
    """Structural images only."""
    level: Literal["minimal", "resampling", "full"] = "full"
    """How much fMRIPrep writes: full has series and confounds, the others only what both can be made from."""
    fs_no_reconall: bool = False
    """No surface reconstruction; saves hours."""
    ignore: tuple[Ignorable, ...] = ()
    """Aspects of the data that fMRIPrep leaves out."""
    seed: int | None = Field(default=None, ge=0)
    """Seed; unset lets fMRIPrep draw one."""
    options: tuple[str, ...] = ()
    """Further options of fMRIPrep; what is typed after ``--`` is added."""

    @field_validator("engine", mode="before")
    @classmethod
    def _singularity_is_apptainer(cls, value: object) -> object:
        return "apptainer" if value == "singularity" else value

    @field_validator("output_spaces")
    @classmethod
    def _spaces(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for space in value:
            if not space or space.startswith("-") or "/" in space or space.split() != [space]:
                raise ValueError(f"'{space}' is no output space; write e.g. MNI152NLin6Asym:res-2")
        return value

    @model_validator(mode="after")
    def _package_is_for_docker(self) -> PreprocessSettings:
        if self.fmriprep_docker and self.engine != "docker":
            raise ValueError("fmriprep_docker goes with engine docker only")
        return self

    def digest(self) -> str:
        """As for every command, but the way fMRIPrep is started is left out: it changes no result."""
        return digest_of(self.model_dump(mode="json", exclude={"engine", "fmriprep_docker"}) | {"engine": "fmriprep"})
