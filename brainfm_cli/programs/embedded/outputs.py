"""What the embedded engine publishes: its results under fMRIPrep's names, each with what a reader must know beside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.derivatives import atomic_path, write_json
from brainfm_cli.bids.images import sidecar, write_image
from brainfm_cli.bids.names import format_name
from brainfm_cli.programs.embedded.anatomical import TISSUES
from brainfm_cli.programs.embedded.brain import is_stripped
from brainfm_cli.programs.embedded.grids import read_ras

if TYPE_CHECKING:
    from collections.abc import Mapping

    from brainfm_cli.bids.raw import RawImage, RawParticipant, RawRun
    from brainfm_cli.programs.embedded.settings import EmbeddedSettings
    from brainfm_cli.programs.embedded.template import Template

_LABELS = {"contrast T1w": "T1w", "dwi": "dwiref"}  # modality to suffix, where they differ
_NII = ".nii.gz"


def shared_entities(images: tuple[RawImage, ...]) -> dict[str, str]:
    """Entities that all images have in common, as those of their average."""
    first, *rest = (image.entities for image in images)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in rest)}


def suffix_of(image: RawImage) -> str:
    """Suffix of the derivatives of a structural image."""
    return _LABELS.get(image.modality, image.modality)


@dataclass(kw_only=True)
class Publisher:
    """Writes one participant's results into the dataset; remembers what it wrote."""

    raw: RawParticipant
    """The participant as found."""
    reference: tuple[RawImage, ...]
    """Images whose space everything is in."""
    out: Path
    """Root of the output dataset."""
    template: Template
    """The template used."""
    settings: EmbeddedSettings
    """Settings used."""

    def __post_init__(self) -> None:
        self.written: list[Path] = []

    def publish_anatomy(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Structural images, masks, tissues and transforms."""
        base, suffix = shared_entities(self.reference), suffix_of(self.reference[0])
        folder = self._folder(base, "anat")
        method = results["extract"]["method"]
        sources = [image.path for image in self.reference]
        about = {"SkullStripped": method == "stripped", "Sources": self._raw_uris(sources), "BiasCorrection": "N4 algorithm"}
        mask_about = {"Type": "Brain", "Method": method}
        self._image(folder, {**base, "desc": "preproc"}, suffix, results["unbias"]["out"], about)
        self._image(folder, {**base, "desc": "brain"}, "mask", results["extract"]["mask"], mask_about)
        placed = results["resample"]["images"]
        space = {**base, "space": self.template.name, "res": str(self.settings.resolution)}
        spatial = self._spatial()
        self._image(folder, {**space, "desc": "preproc"}, suffix, placed["image"], about | spatial)
        self._image(folder, {**space, "desc": "brain"}, "mask", placed["mask"], mask_about | spatial)
        if "classify" in results:
            self._publish_tissues(folder, base, results["classify"], space, placed)
        for key, (source, target) in {"forward": (suffix, self.template.name), "inverse": (self.template.name, suffix)}.items():
            self._file(folder, {**base, "from": source, "to": target, "mode": "image"}, "xfm", ".h5", results["normalise"][key])

    def _publish_tissues(
        self, folder: Path, base: Mapping[str, str], found: Mapping[str, Any], space: Mapping[str, str], placed: Mapping[str, str]
    ) -> None:
        labels, spatial = {"Labels": {"GM": 1, "WM": 2, "CSF": 3}}, self._spatial()
        self._image(folder, base, "dseg", found["classes"], labels)
        self._image(folder, space, "dseg", placed["classes"], labels | spatial)
        for label, path in zip(TISSUES, found["probabilities"], strict=True):
            self._image(folder, {**base, "label": label}, "probseg", path, {})
            self._image(folder, {**space, "label": label}, "probseg", placed[label], spatial)

    def publish_other(self, image: RawImage, aligned: Mapping[str, Any], moved: str) -> None:
        """Another sequence in the reference's space and the template's."""
        reference = suffix_of(self.reference[0])
        base, suffix = dict(image.entities), suffix_of(image)
        folder = self._folder(base, "anat")
        stripped = is_stripped(*read_ras(image.path), self.settings.brain_ml)
        about = {"SkullStripped": stripped, "Sources": self._raw_uris([image.path]), "Transform": "rigid"}
        own = {"SpatialReference": self._reference_uri()}
        self._image(folder, {**base, "space": reference, "desc": "preproc"}, suffix, aligned["image"], about | own)
        space = {**base, "space": self.template.name, "res": str(self.settings.resolution), "desc": "preproc"}
        self._image(folder, space, suffix, moved, about | self._spatial())
        self._file(folder, {**base, "from": suffix, "to": reference, "mode": "image"}, "xfm", ".h5", aligned["transform"])

    def publish_run(self, run: RawRun, results: Mapping[str, Mapping[str, Any]], number: int) -> None:
        """Series, references, masks, transforms and confounds of one run."""
        base = dict(run.key.entities)
        folder = self._folder(base, "func")
        files, moment = results[f"sample{number}"]["files"], results[f"slicetiming{number}"]["moment_s"]
        reference, transform = suffix_of(self.reference[0]), results[f"coregister{number}"]["transform"]
        boldref, sources = results[f"realign{number}"]["boldref"], {"Sources": self._raw_uris([run.path])}
        for desc in ("hmc", "coreg"):
            self._image(folder, {**base, "desc": desc}, "boldref", boldref, sources)
        self._brain_mask(folder, base, results[f"masks{number}"]["masks"])
        hmc = {**base, "from": "orig", "to": "boldref", "mode": "image", "desc": "hmc"}
        coreg = {**base, "from": "boldref", "to": reference, "mode": "image", "desc": "coreg"}
        self._file(folder, hmc, "xfm", ".txt", results[f"realign{number}"]["motion"])
        self._file(folder, coreg, "xfm", ".txt", transform)
        timing = {"RepetitionTime": run.repetition_time_s, "SliceTimingCorrected": moment is not None, "StartTime": moment or 0.0}
        about = {**_copied(run.metadata), **timing, "SkullStripped": True, **sources, **self._spatial()}
        space = {**base, "space": self.template.name, "res": str(self.settings.resolution)}
        self._image(folder, {**space, "desc": "preproc"}, "bold", files["bold"], about)
        self._image(folder, space, "boldref", files["boldref"], sources | self._spatial())
        self._image(folder, {**space, "desc": "brain"}, "mask", files["mask"], {"Type": "Brain", **self._spatial()})
        confounds = {**base, "desc": "confounds"}
        self._file(folder, confounds, "timeseries", ".tsv", results[f"confounds{number}"]["table"])
        self._file(folder, confounds, "timeseries", ".json", results[f"confounds{number}"]["description"])

    def _folder(self, entities: Mapping[str, str], kind: str) -> Path:
        session = [f"ses-{entities['ses']}"] if "ses" in entities else []
        return self.out.joinpath(f"sub-{self.raw.label}", *session, kind)

    def _spatial(self) -> dict[str, Any]:
        return {
            "SpatialReference": f"{self.template.name}, {self.template.source}",
            "Resolution": f"{self.settings.resolution} mm isotropic",
        }

    def _reference_uri(self) -> str:
        base = shared_entities(self.reference)
        image = self._folder(base, "anat") / format_name({**base, "desc": "preproc"}, suffix_of(self.reference[0]), _NII)
        return f"bids::{image.relative_to(self.out).as_posix()}"

    def _raw_uris(self, paths: list[Path]) -> list[str]:
        return [f"bids:raw:{path.relative_to(self.raw.root).as_posix()}" for path in paths]

    def _image(self, folder: Path, entities: Mapping[str, str], suffix: str, source: str, about: Mapping[str, Any]) -> None:
        place = folder / format_name(entities, suffix, _NII)
        if source.endswith(".gz"):
            self._take(Path(source), place)
        else:
            values, affine, space, dtype = _stored(Path(source))
            write_image(place, values, affine, space=space, dtype=dtype)
            self.written.append(place)
        if about:
            self.written.append(write_json(sidecar(place), dict(about)))

    def _brain_mask(self, folder: Path, base: Mapping[str, str], masks: str) -> None:
        values, affine, _, _ = _stored(Path(masks))
        place = folder / format_name({**base, "desc": "brain"}, "mask", _NII)
        self.written.append(write_image(place, (values.astype("uint8") & 1), affine))
        self.written.append(write_json(sidecar(place), {"Type": "Brain", "Method": "from the structural image"}))

    def _file(self, folder: Path, entities: Mapping[str, str], suffix: str, extension: str, source: str) -> None:
        self._take(Path(source), folder / format_name(entities, suffix, extension))

    def _take(self, source: Path, place: Path) -> None:
        with atomic_path(place) as temporary:
            shutil.copyfile(source, temporary)
        self.written.append(place)


def _stored(path: Path) -> Any:  # noqa: ANN401
    """Values, affine, kind of space and type of one of our own intermediate images."""
    import nibabel as nib

    image: Any = nib.load(path)
    space = "template" if int(image.header["sform_code"]) == 4 else "scanner"
    return image.get_fdata(dtype="float32"), image.affine, space, image.get_data_dtype()


def _copied(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Raw metadata that still hold of the resampled series."""
    kept = ("TaskName", "EchoTime", "FlipAngle", "MagneticFieldStrength", "Manufacturer")
    return {key: metadata[key] for key in kept if key in metadata}
