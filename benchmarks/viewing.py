"""Simulated viewers through the whole brain-caption chain, on pictures never seen: captions and retrieval beside floors, ceilings and ablations.

Four people see pictures of the simulator's own grammar (or of any caption file); shared pictures are held out. Three steps, so that the
middle one can be done on another machine, which needs no imaging library:

    python benchmarks/viewing.py prepare STUDY                     simulate, pack, embed captions and pictures (needs the sentence encoder)
    python benchmarks/viewing.py run STUDY RUNS --device cuda      pretrain, align, tune, speak: one JSON line per job and seed, resumes
    python benchmarks/viewing.py report STUDY RUNS/said.jsonl      scores with paired intervals over pictures (needs the sentence encoder)

``run`` imports torch, lightning, transformers, safetensors, numpy, pandas, pyarrow, scikit-learn, pydantic, pyyaml, rich and jinja2, and gguf
where the language model is a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.checkpoints import read_tensors, write_tensors
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.image_split import ImageSplit, ImageSplitSettings
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.pretraining import PretrainingSettings
from brainfm_cli.learning.voxel_samples import select_trials
from brainfm_cli.models.language import TextEncoder
from brainfm_cli.systems.brain_caption import BrainCaptionSettings
from brainfm_cli.systems.brain_caption.aligned import AlignedCaptioner, CaptionFitSettings, load_language, load_sentences
from brainfm_cli.systems.brain_caption.decoding import Alteration, Average, BeamChoice, Spoken, list_viewings, speak
from brainfm_cli.systems.brain_caption.fitting import fit_captioner, prepare_alignment, prepare_person, read_split, write_captioner
from brainfm_cli.systems.brain_caption.floors import CaptionBank, picture_vectors
from brainfm_cli.systems.brain_caption.pretraining import prepare, pretrain_encoder

PEOPLE = ("0001", "0002", "0003", "0004")
_PIXELS = 16  # side of a picture that is compared
_PIXEL_COMPONENTS = 96


@dataclass(frozen=True)
class Job:
    """One model and what it is asked to say."""

    name: str
    """As in the table."""
    fit: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the alignment's settings."""
    vision: bool = False
    """Brains are contrasted with pictures in place of sentences."""
    left_out: str | None = None
    """Person whom pretraining and alignment do not know."""
    shares: tuple[float, ...] = ()
    """Shares of that person's pictures with which they are added."""
    through_language: bool = False
    """Every epoch goes through the language model: there are fewer of them (``--language-epochs``)."""


JOBS = (
    Job("full"),
    Job("no pretraining", {"pretrained": False}),
    Job("no alignment", {"alignment": False, "contrast_epochs": 0.0}, through_language=True),
    Job("left out 0004", left_out="0004", shares=(0.03, 0.1, 0.3, 1.0)),
    Job("one caption per picture", {"captions_per_image": 1}),
    Job("pictures in place of sentences", vision=True),
    *(Job(f"left out {name}", left_out=name, shares=(0.1, 1.0)) for name in PEOPLE[:3]),
)


class SentenceTable:
    """Vectors of the study's captions, in place of the encoder that made them."""

    def __init__(self, study: Path) -> None:
        described = json.loads((study / "sentences.json").read_text(encoding="utf-8"))
        self.name, self._fingerprint = described["encoder"], described["sha256"]
        vectors = read_tensors(study / "sentences.safetensors")["vectors"].float()
        self._vectors = dict(zip(described["texts"], functional.normalize(vectors, dim=1), strict=True))
        self.width = vectors.shape[1]

    def fingerprint(self) -> str:
        """Of the encoder's weights."""
        return str(self._fingerprint)

    def sentences(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, width) unit vectors of captions of the study; of no other sentences."""
        return torch.stack([self._vectors[text] for text in texts])


@dataclass(frozen=True)
class Study:
    """What ``prepare`` wrote."""

    folder: Path
    """Where."""

    @cached_property
    def cohort(self) -> VoxelCohort:
        """Responses and captions."""
        return VoxelCohort.open(self.folder)

    @property
    def split(self) -> ImageSplitSettings:
        """Pictures of test.txt, which everybody saw, test."""
        return ImageSplitSettings(test_list=self.folder / "test.txt", validation_fraction=0.1)

    @cached_property
    def sentences(self) -> SentenceTable:
        """Vectors of the captions."""
        return SentenceTable(self.folder)

    @cached_property
    def pictures(self) -> dict[str, torch.Tensor] | None:
        """Vectors of the pictures; a caption file has none."""
        path = self.folder / "pictures.safetensors"
        if not path.is_file():
            return None
        names = json.loads((self.folder / "pictures.json").read_text(encoding="utf-8"))
        return dict(zip(names, read_tensors(path)["vectors"].float(), strict=True))


def prepare_study(arguments: argparse.Namespace) -> None:
    """Simulate, pack and embed; the study folder holds all that ``run`` needs."""
    study, scratch = arguments.study, arguments.study / "scratch"
    values = ["participants=4", *(f"viewing.{name}={getattr(arguments, name)}" for name in ("images", "shared", "repeats", "voxels"))]
    if arguments.caption_file is not None:
        values.append(f"viewing.caption_file={arguments.caption_file.resolve()}")
    _brainfm("simulate", scratch / "raw", "--kind", "viewing", "--seed", arguments.seed, "--set", *values)
    _brainfm("parcellate", scratch / "raw", scratch / "packed", "group", "--trials")
    shutil.rmtree(study / "cohort", ignore_errors=True)
    shutil.copytree(scratch / "packed" / "cohort", study / "cohort")
    shutil.copy(scratch / "raw" / "bayes.tsv", study / "bayes.tsv")
    cohort = VoxelCohort.open(study)
    shared = sorted(name for name, one in cohort.stimuli.items() if one.fields["shared"] == "yes")
    (study / "test.txt").write_text("\n".join(shared[: arguments.tested]) + "\n", encoding="utf-8")
    encoder = load_sentences("all-minilm-l6-v2")
    texts = sorted({text for one in cohort.stimuli.values() for text in one.captions})
    described = {"encoder": encoder.name, "sha256": encoder.fingerprint(), "texts": texts}
    (study / "sentences.json").write_text(json.dumps(described), encoding="utf-8")
    write_tensors(study / "sentences.safetensors", {"vectors": encoder.sentences(texts).half()})
    if arguments.caption_file is None:
        names = sorted(cohort.stimuli)
        (study / "pictures.json").write_text(json.dumps(names), encoding="utf-8")
        vectors = pixel_vectors([scratch / "raw" / "stimuli" / f"{name}.png" for name in names])
        write_tensors(study / "pictures.safetensors", {"vectors": vectors.half()})
    shutil.rmtree(scratch)
    size = sum(path.stat().st_size for path in study.rglob("*") if path.is_file())
    print(json.dumps({"study": str(study), "megabytes": round(size / 1e6, 1), "captions": len(texts), "pictures": len(cohort.stimuli)}))


def pixel_vectors(paths: Sequence[Path]) -> torch.Tensor:
    """(pictures, components) unit principal components of small pictures' colours: a vision leg without a pretrained vision model."""
    from PIL import Image

    rows = []
    for path in paths:
        with Image.open(path) as image:
            rows.append(np.asarray(image.convert("RGB").resize((_PIXELS, _PIXELS)), np.float32).ravel())
    values = torch.from_numpy(np.stack(rows))
    values = values - values.mean(dim=0)
    left, sizes, _ = torch.linalg.svd(values, full_matrices=False)
    return functional.normalize((left * sizes.sqrt())[:, :_PIXEL_COMPONENTS], dim=1)


@dataclass(frozen=True)
class Runner:
    """Trains the models of jobs, one after another."""

    study: Study
    """What is learnt."""
    runs: Path
    """Where models and lines go."""
    sentences: TextEncoder | None
    """The sentence encoder, where it chooses among beams."""
    arguments: argparse.Namespace
    """Sizes and lengths."""

    @property
    def execution(self) -> Execution:
        """Device and precision."""
        return Execution(device=self.arguments.device, precision=self.arguments.precision)

    def pretrained(self, people: Sequence[str], seed: int) -> Path:
        """Folder of the encoder of these people, trained where it is not there."""
        given = self.arguments
        folder = self.runs / "models" / f"encoder-{'-'.join(people)}-{seed}"
        if (folder / "provenance.json").is_file():
            return folder
        rate = OptimiserSettings(learning_rate=given.pretrain_rate)
        settings = PretrainingSettings(epochs=given.pretrain_epochs, batch_size=given.pretrain_batch, seed=seed, optimiser=rate)
        factory = BrainCaptionSettings(kind="brain-caption", preset=given.preset)
        prepared = prepare(factory, settings, self.study.split, self.study.cohort, people)
        pretrain_encoder(prepared, settings, self.execution, folder)
        return folder

    def aligned(self, job: Job, people: Sequence[str], seed: int) -> tuple[Path, AlignedCaptioner]:
        """An aligned model and its folder."""
        given, encoder = self.arguments, self.pretrained(people, seed)
        folder = self.runs / "models" / f"{job.name.replace(' ', '-')}-{seed}"
        fit = CaptionFitSettings.from_values(json.loads(given.fit) | dict(job.fit))
        language = load_language(given.llm)  # anew for every job: low-rank weights may be added to it
        prepared = prepare_alignment(
            encoder, self.study.cohort, people, fit, batch_size=given.batch, seed=seed, language=language,
            sentences=self.study.sentences, pictures=self.study.pictures if job.vision else None,  # type: ignore[arg-type]
        )  # fmt: skip
        epochs = given.language_epochs if job.through_language else given.epochs
        result = fit_captioner(prepared, self._schedule(epochs, given.rate).plan(seed), self.execution, folder, new_people=False)
        write_captioner(prepared, result, encoder, folder, seed)
        return folder, prepared.captioner

    def tuned(self, model: Path, person: str, share: float, seed: int) -> AlignedCaptioner:
        """The model with a person added from a share of their pictures."""
        given = self.arguments
        prepared = prepare_person(
            model, self.study.cohort, [person], share=share, batch_size=given.batch, seed=seed,
            sentences=self.study.sentences, language_model=given.llm,  # type: ignore[arg-type]
        )  # fmt: skip
        epochs = round(given.tune_epochs / share**0.5)
        plan = self._schedule(epochs, given.tune_rate).plan(seed)
        fit_captioner(prepared, plan, self.execution, model.with_name(f"{model.name}-{person}-{share:g}"), new_people=True)
        return prepared.captioner

    def _schedule(self, epochs: int, rate: float) -> ScheduleSettings:
        return ScheduleSettings(epochs=epochs, batch_size=self.arguments.batch, patience=self.arguments.patience, optimiser=OptimiserSettings(learning_rate=rate, warmup_epochs=0.5, final_fraction=0.2))  # fmt: skip

    def say(self, captioner: AlignedCaptioner, people: Sequence[str], average: Average, altered: Alteration) -> dict[str, list[Any]]:
        """(picture, caption, rank of the own picture among the test pictures) of every viewing of test pictures, by participant."""
        cohort, found = self.study.cohort, {}
        captioner.model.to(choose_device(self.arguments.device))  # training leaves it on the CPU
        for trials in select_trials(cohort, self._split, people, "test"):
            pictures = [one.name for one in list_viewings(trials, "repeats")]
            most = 1 if self.arguments.nearest else self.arguments.max_tokens
            spoken = speak(captioner, cohort, list_viewings(trials, average), altered=altered, beams=self.arguments.beams, max_tokens=most, batch_size=self.arguments.speak_batch, choice=self._choice(captioner))  # fmt: skip
            wanted = self._wanted(captioner, pictures)
            if self.arguments.nearest:
                spoken = self._nearest(captioner, spoken)
            rows = []
            for one in spoken:
                rank = None
                if wanted is not None:
                    cosines = wanted @ one.vector.float().cpu()
                    rank = int(1 + (cosines > cosines[pictures.index(one.viewing.name)]).sum())
                rows.append((one.viewing.name, one.caption, rank))
            found[trials.participant] = rows
        return found

    @property
    def _split(self) -> ImageSplit:
        return read_split(next((self.runs / "models").glob("encoder-*")), self.study.cohort)

    def _reads_sentences(self, captioner: AlignedCaptioner) -> bool:
        """Whether the model was contrasted with sentences, and not with pictures."""
        return captioner.model.bridge.to_contrast.out_features == self.study.sentences.width

    def _nearest(self, captioner: AlignedCaptioner, spoken: Sequence[Spoken]) -> list[Spoken]:
        """The same with the training caption nearest to the brain's vector, or of the training picture nearest to it, in place of what was said."""
        stimuli, names = self.study.cohort.stimuli, sorted(self._split.names("train"))
        if self._reads_sentences(captioner):
            texts = [text for name in names for text in stimuli[name].captions[: captioner.fit.captions_per_image]]
            vectors = self.study.sentences.sentences(texts)
        else:
            assert self.study.pictures is not None, "it was contrasted with them"
            texts, vectors = [stimuli[name].captions[0] for name in names], torch.stack([self.study.pictures[name] for name in names])
        bank = CaptionBank(captions=tuple(texts), vectors=vectors)
        return [replace(one, caption=bank.nearest(one.vector[None].cpu())[0][0]) for one in spoken]

    def _choice(self, captioner: AlignedCaptioner) -> BeamChoice | None:
        if self.sentences is None or not captioner.fit.alignment or not self._reads_sentences(captioner):
            return None
        return BeamChoice(sentences=self.sentences, weight=self.arguments.vector_weight)

    def _wanted(self, captioner: AlignedCaptioner, pictures: Sequence[str]) -> torch.Tensor | None:
        """Vectors of pictures that the model's are compared with; none where nothing was contrasted."""
        if not captioner.fit.alignment:
            return None
        if self._reads_sentences(captioner):
            stimuli = self.study.cohort.stimuli
            captions = {name: stimuli[name].captions for name in pictures}
            texts = [text for said in captions.values() for text in said]
            return picture_vectors(pictures, captions, dict(zip(texts, self.study.sentences.sentences(texts), strict=True)))
        assert self.study.pictures is not None, "it was contrasted with them"
        return torch.stack([self.study.pictures[name] for name in pictures])

    def work(self, job: Job, seed: int) -> list[dict[str, Any]]:
        """The lines of one job."""
        started = time.perf_counter()
        people = [name for name in PEOPLE if name != job.left_out]
        folder, captioner = self.aligned(job, people, seed)
        trained = round(time.perf_counter() - started, 1)
        common = {"job": job.name, "seed": seed, "device": self._device, "language_sha256": captioner.language.fingerprint()}
        if job.left_out is None:
            line: dict[str, Any] = {**common, "share": None, "said": self.say(captioner, people, "repeats", "none")}
            if job.name == "full":
                if self.arguments.single:
                    line["single"] = self.say(captioner, people, "none", "none")
                if not self.arguments.said_alone:
                    line |= {altered: self.say(captioner, people, "repeats", altered) for altered in ("zeroed", "shuffled")}
                encoder = self.pretrained(people, seed)
                line["pretraining"] = json.loads((encoder / "evaluation.json").read_text(encoding="utf-8"))
            lines = [line]
        else:
            lines = []
            for share in job.shares:
                tuned = self.tuned(folder, job.left_out, share, seed)
                lines.append({**common, "share": share, "said": self.say(tuned, [job.left_out], "repeats", "none")})
        return [{**line, "trained_seconds": trained, "seconds": round(time.perf_counter() - started, 1)} for line in lines]

    @property
    def _device(self) -> str:
        return torch.cuda.get_device_name() if self.arguments.device == "cuda" else "cpu"


def report(arguments: argparse.Namespace) -> None:
    """Print the table of all jobs, and of the full model beside its floors and ceilings."""
    from viewing_report import Report

    rows = [json.loads(line) for line in arguments.said.read_text(encoding="utf-8").splitlines()]
    print(json.dumps(Report(Study(arguments.study), rows).tables(), indent=1))


def run_jobs(arguments: argparse.Namespace) -> None:
    """Append lines of the jobs that are not done; stops starting new ones when the time is up."""
    started = time.monotonic()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    path = arguments.runs / "said.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    done = {(row["job"], row["seed"]) for row in rows}
    study = Study(arguments.study)
    jobs = [job for job in JOBS if (not arguments.jobs or job.name in arguments.jobs) and (study.pictures is not None or not job.vision)]
    sentences = load_sentences(study.sentences.name) if arguments.vector_weight else None
    runner = Runner(study, arguments.runs, sentences, arguments)
    for seed, job in [(seed, job) for seed in arguments.seeds for job in jobs]:
        if (job.name, seed) in done:
            continue
        if arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes:
            print(f"time is up before {job.name}, seed {seed}", flush=True)
            break
        lines = runner.work(job, seed)
        with path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
        print(json.dumps({"job": job.name, "seed": seed, "seconds": lines[-1]["seconds"]}), flush=True)


def _brainfm(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "brainfm_cli", *map(str, arguments)], check=True)


def main() -> None:
    """Prepare, run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("prepare")
    first.add_argument("study", type=Path)
    first.add_argument("--images", type=int, default=600)
    first.add_argument("--shared", type=int, default=150)
    first.add_argument("--tested", type=int, help="of the shared pictures; the others train. All where unset")
    first.add_argument("--repeats", type=int, default=3)
    first.add_argument("--voxels", type=int, default=400)
    first.add_argument("--seed", type=int, default=1)
    first.add_argument("--caption-file", type=Path, help="captions of people in place of the grammar's")
    second = steps.add_parser("run")
    second.add_argument("study", type=Path)
    second.add_argument("runs", type=Path)
    second.add_argument("--device", default="cpu")
    second.add_argument("--precision", default="auto", help="fp32, bf16 or auto")
    second.add_argument("--llm", default="smollm2-135m-instruct")
    second.add_argument("--jobs", nargs="+", default=[], choices=[job.name for job in JOBS])
    second.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    second.add_argument("--minutes", type=float, help="start no further job after so many")
    second.add_argument("--preset", default="nano")
    second.add_argument("--pretrain-epochs", type=int, default=30)
    second.add_argument("--pretrain-batch", type=int, default=64)
    second.add_argument("--pretrain-rate", type=float, default=1e-3)
    second.add_argument("--fit", default="{}", help="settings of the alignment, as JSON")
    second.add_argument("--epochs", type=int, default=30)
    second.add_argument("--language-epochs", type=int, default=12, help="of the job without contrast, all through the language model")
    second.add_argument("--batch", type=int, default=64)
    second.add_argument("--rate", type=float, default=1e-3)
    second.add_argument("--patience", type=int)
    second.add_argument("--tune-epochs", type=int, default=20, help="of all of a person's data; more for less data")
    second.add_argument("--tune-rate", type=float, default=2e-3)
    second.add_argument("--speak-batch", type=int, default=150)
    second.add_argument("--beams", type=int, default=1)
    second.add_argument(
        "--vector-weight", type=float, default=0.0, help="of the brain's vector in choosing among beams (needs the sentence encoder)"
    )
    second.add_argument("--max-tokens", type=int, default=24)
    second.add_argument(
        "--nearest",
        action="store_true",
        help="the training caption nearest to the vector, no language model: for ablations of what the vector holds",
    )
    second.add_argument("--said-alone", action="store_true", help="without zeroed and shuffled voxels; a third of the captions")
    second.add_argument("--single", action="store_true", help="also say what single trials show; three times the captions")
    third = steps.add_parser("report")
    third.add_argument("study", type=Path)
    third.add_argument("said", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "run":
        arguments.precision = {"fp32": "32-true", "bf16": "bf16-mixed"}.get(arguments.precision, arguments.precision)
    {"prepare": prepare_study, "run": run_jobs, "report": report}[arguments.step](arguments)


if __name__ == "__main__":
    main()
