"""Settings of ``brainfm preprocess``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from brainfm_cli.config import Settings, digest_of
from brainfm_cli.programs.embedded.settings import EmbeddedSettings
from brainfm_cli.programs.fmriprep import CODE_URL, LTS_VERSION

EngineName = Literal["embedded", "fmriprep", "docker", "apptainer"]
_FMRIPREP_ONLY = {"fmriprep_docker", "fmriprep_version", "output_spaces", "level", "fs_no_reconall", "ignore", "options"}
Ignorable = Literal["fieldmaps", "slicetiming", "sbref", "t2w", "flair", "fmap-jacobian"]


class PreprocessSettings(Settings):
    """Settings of ``brainfm preprocess``."""

    engine: EngineName = "embedded"
    """embedded (what pip installs), or fMRIPrep: fmriprep (on this machine), docker, or apptainer (singularity is the same)."""
    embedded: EmbeddedSettings = EmbeddedSettings()
    """How the embedded engine works."""
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
    """Seed; unset lets fMRIPrep draw one, and is 1 in the embedded engine."""
    options: tuple[str, ...] = ()
    """Further options of fMRIPrep; what is typed after ``--`` is added."""

    @property
    def made_with(self) -> tuple[dict[str, str], ...]:
        """The program beside brainfm that makes the output, as in ``GeneratedBy``."""
        if self.engine == "embedded":
            return ()
        return ({"Name": "fMRIPrep", "Version": self.fmriprep_version, "CodeURL": CODE_URL},)

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

    @model_validator(mode="after")
    def _nothing_is_for_another_engine(self) -> PreprocessSettings:
        # What the engine does not know would change nothing, and whoever wrote it would not notice.
        foreign = _FMRIPREP_ONLY if self.engine == "embedded" else {"embedded"}
        defaults: dict[str, Any] = {name: field.default for name, field in type(self).model_fields.items()}
        if changed := sorted(name for name in foreign if getattr(self, name) != defaults[name]):
            raise ValueError(f"{', '.join(changed)} cannot be used with engine {self.engine}")
        if self.engine == "embedded" and self.seed == 0:
            raise ValueError("seed of the embedded engine must be at least 1: its programs take 0 as none")
        return self

    def digest(self) -> str:
        """As for every command, but the way fMRIPrep is started and what the engine does not use are left out."""
        if self.engine == "embedded":
            return digest_of(self.model_dump(mode="json", exclude=_FMRIPREP_ONLY))
        return digest_of(self.model_dump(mode="json", exclude={"engine", "fmriprep_docker", "embedded"}) | {"engine": "fmriprep"})
