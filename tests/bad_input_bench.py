"""Small healthy datasets and models, made once per process, and private copies of them that a bad input may spoil."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from tests import synthetic_bids as synthetic
from tests.models.tiny_language import write_bert, write_llama
from tests.stages.command import brainfm, brainfm_on_cpu, only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ATLAS = "Schaefer2018_seg-7n_scale-100"
ROOT_FILES = {".bidsignore", "config.yaml", "dataset_description.json", "split.tsv"}
"""What an output folder holds before its first unit is done, beside its logs; the split is sealed before anything is learnt."""


def make_raw(root: Path) -> None:
    """Two people with a structural image and a short run, as scanned."""
    root.mkdir()
    synthetic.write_json(root / "dataset_description.json", {"Name": "raw", "BIDSVersion": "1.10.0"})
    generator = np.random.default_rng(1)
    for label in ("01", "02"):
        anat, func = root / f"sub-{label}" / "anat", root / f"sub-{label}" / "func"
        anat.mkdir(parents=True)
        func.mkdir()
        nib.save(nib.Nifti1Image(generator.random((8, 8, 8)).astype(np.float32), synthetic.AFFINE), anat / f"sub-{label}_T1w.nii.gz")
        image = nib.Nifti1Image(generator.random((8, 8, 8, 12)).astype(np.float32), synthetic.AFFINE)
        image.header.set_zooms((20, 20, 20, 2.0))
        image.header.set_xyzt_units("mm", "sec")
        nib.save(image, func / f"sub-{label}_task-rest_bold.nii.gz")
        synthetic.write_json(func / f"sub-{label}_task-rest_bold.json", {"RepetitionTime": 2.0, "TaskName": "rest"})


def make_fmriprep(root: Path) -> None:
    """Two people as fMRIPrep leaves them, with the four-region atlas beside."""
    synthetic.write_fmriprep(root / "data", participants=("01", "02"), frames=60, seed=1)


def make_series(root: Path) -> None:
    """A packed cohort of 24 simulated people."""
    sizes = ("--participants", 24, "--seed", 3, "--atlases", "Schaefer100", "--set", "frames=70", "population.disorders=[Arvel]")
    assert brainfm("simulate", root, "--kind", "rest", "--level", "series", *sizes) == 0


def make_viewing(root: Path) -> None:
    """Single-trial maps of one person who saw captioned pictures, not packed yet."""
    sizes = ("participants=1", "viewing.images=12", "viewing.shared=4", "viewing.voxels=40", "viewing.repeats=2", "viewing.captions=2")
    assert brainfm("simulate", root, "--kind", "viewing", "--seed", 1, "--set", *sizes) == 0


HEAD_FRAMES = 30
"""Length of the run of :func:`make_head`."""


def make_head(root: Path) -> None:
    """One simulated person as scanned, head and short run, small enough to be preprocessed within a minute."""
    sizes = ("raw.t1w_mm=2", "raw.bold_mm=4.5", f"frames={HEAD_FRAMES}", "raw.deformation_mm=2")
    assert brainfm("simulate", root, "--raw", "--participants", 1, "--set", *sizes) == 0


@dataclass
class Bench:
    """Healthy inputs by name, each made when it is first asked for."""

    root: Path
    """Where they lie."""
    _made: dict[str, Path] = field(default_factory=dict)

    def healthy(self, name: str) -> Path:
        """The shared input of this name; never written to."""
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Path:
        makers: dict[str, Callable[[Path], None]] = {
            "raw": make_raw,
            "fmriprep": make_fmriprep,
            "series": make_series,
            "viewing": make_viewing,
            "head": make_head,
        }
        place = self.root / name
        if name in makers:
            makers[name](place)
            return place
        if name == "voxels":
            assert brainfm("parcellate", self.healthy("viewing"), place, "group", "--trials") == 0
            return place
        if name == "captioner":
            training = ("system.preset=nano", "epochs=1", "batch_size=16", "split.validation_fraction=0.3")
            voxels = self.healthy("voxels")
            assert brainfm_on_cpu("pretrain", voxels, self.root / "seen", "group", "--system", "brain-caption", "--set", *training) == 0
            settings = (
                f"llm={write_llama(self.root / 'llama')}",
                f"text_encoder={write_bert(self.root / 'bert')}",
                "fit.q_former.num_queries=4",
                "fit.q_former.width=32",
                "fit.q_former.num_heads=2",
                "fit.contrast_epochs=1",
                "fit.judged_images=4",
                "schedule.epochs=2",
                "schedule.batch_size=16",
            )
            options = ("--model", only(self.root / "seen" / "models"), "--set", *settings)
            assert brainfm_on_cpu("align", voxels, self.root / "bridge", "group", *options) == 0
            return only(self.root / "bridge" / "models")
        if name == "model":
            training = ("system.preset=tiny", "epochs=1", "steps=1", "batch_size=16", "where.split=[discovery]")
            series = self.healthy("series")
            assert brainfm_on_cpu("pretrain", series, self.root / "pre", "group", "--system", "brain-graph", "--set", *training) == 0
            return only(self.root / "pre" / "models")
        assert name == "tuned", name
        tuning = ("where.split=[discovery]", "tuning.epochs=0", "tuning.inner_folds=2", "tuning.blocks=[groups_log]")
        options = ("--model", self.healthy("model"), "--target", "diagnosis_binary", "--set", *tuning)
        assert brainfm_on_cpu("prompt-tune", self.healthy("series"), self.root / "tune", "group", *options) == 0
        return only(self.root / "tune" / "models")


@dataclass
class Case:
    """One bad input being set up: shared inputs, and private copies of those that it spoils."""

    bench: Bench
    """Healthy inputs."""
    place: Path
    """Private folder of this case."""
    copies: dict[str, Path] = field(default_factory=dict)
    """Private copies by name."""

    @property
    def out(self) -> Path:
        """The output folder of the command."""
        return self.place / "out"

    def copy(self, name: str) -> Path:
        """A private copy of a healthy input, which the command then gets instead."""
        if name not in self.copies:
            # a model lies in OUT/models/<id>, by which its derivative is found
            target = self.place / name / "models" / "abc" if name in {"model", "tuned"} else self.place / name
            self.copies[name] = shutil.copytree(self.bench.healthy(name), target, symlinks=True)
        return self.copies[name]

    def file(self, name: str, content: str | bytes) -> Path:
        """A file in the private folder."""
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def argument(self, text: str) -> str:
        """One word of a command line, with ``{name}`` filled by an input's path, ``{out}`` and ``{place}``."""
        for name in ("raw", "fmriprep", "series", "viewing", "voxels", "model", "tuned", "head", "captioner"):
            if f"{{{name}}}" in text:
                folder = self.copies.get(name) or self.bench.healthy(name)
                text = text.replace(f"{{{name}}}", str(folder / "data" if name == "fmriprep" else folder))
        if "{atlases}" in text:
            text = text.replace("{atlases}", str((self.copies.get("fmriprep") or self.bench.healthy("fmriprep")) / "atlases"))
        return text.replace("{out}", str(self.out)).replace("{place}", str(self.place))

    def run(self, line: str) -> int:
        """Exit code of a command line whose words are separated by blanks."""
        return brainfm(*(self.argument(word) for word in line.split()))


def tree(root: Path) -> dict[str, str]:
    """Hash of every file below ``root``, and where every link points to."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def half_written(out: Path) -> list[str]:
    """Files of an output folder that are neither its root files nor logs; records of failures and warnings of logs are allowed."""
    if not out.is_dir():
        return []
    names = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file() or path.is_symlink()]
    kept = ("logs/", ".work/")  # the work folder of preprocessing, with which it goes on
    return [name for name in names if (name not in ROOT_FILES and not name.startswith(kept)) or name.endswith(".part")]


def failures(out: Path) -> str:
    """Messages of the failures that an output folder records."""
    records = [json.loads(path.read_text()) for path in sorted((out / "logs" / "records").glob("*.json"))]
    return " ".join(f"{one['failure']['message']} {one['failure']['fix']}" for one in records if one.get("failure"))
