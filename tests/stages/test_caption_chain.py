"""simulate → parcellate --trials → pretrain → align → caption through the command line, with tiny language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.learning.image_split import ImageSplit
from brainfm_cli.programs.validator import validate
from tests.models.tiny_language import trained_llama, write_bert, write_llama
from tests.stages.command import brainfm as run_command

COMMON = {".bidsignore", "config.yaml", "dataset_description.json", "logs/CITATION.md"}
MODEL = {"README.md", "config.yaml", "log.csv", "model.safetensors", "provenance.json", "report.html", "split.tsv"}
VIEWERS = ("participants=2", "viewing.images=30", "viewing.shared=12", "viewing.voxels=60", "viewing.repeats=2", "viewing.captions=3", "viewing.trials_per_run=25", "viewing.noise_ceiling=0.5")  # fmt: skip


def brainfm(*arguments: object) -> int:
    quiet = [] if arguments[0] in {"simulate", "parcellate"} else ["--device", "cpu"]
    return run_command(*arguments, *quiet)


@dataclass
class Chain:
    root: Path
    codes: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, command: str, level: str, *options: object, source: str = "trials") -> int:
        self.codes[name] = brainfm(command, self.root / source, self.root / name, level, *options)
        return self.codes[name]

    def model(self, name: str) -> Path:
        (folder,) = (self.root / name / "models").iterdir()
        return folder

    def tree(self, name: str) -> set[str]:
        root = self.root / name
        models = {path.name for path in (root / "models").iterdir()} if (root / "models").is_dir() else set()
        found = set()
        for path in root.rglob("*"):
            if path.is_file():
                text = path.relative_to(root).as_posix()
                for model in models:
                    text = text.replace(model, "MODEL")
                found.add(text)
        return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("caption"))
    root = chain.root
    chain.codes["raw"] = brainfm("simulate", root / "raw", "--kind", "viewing", "--seed", 3, "--set", *VIEWERS)
    chain.run("trials", "parcellate", "group", "--trials", source="raw")
    chain.run("pretrain", "pretrain", "group", "--system", "brain-caption", "--set", "system.preset=nano", "epochs=2", "batch_size=16", "log_every=1", "split.shared=true", "split.validation_fraction=0.3")  # fmt: skip
    settings = {
        "llm": str(write_llama(root / "llama")),
        "text_encoder": str(write_bert(root / "bert")),
        "fit": {"q_former": {"num_queries": 4, "width": 32, "num_heads": 2}, "contrast_epochs": 1, "judged_images": 4},
        "schedule": {"epochs": 3, "batch_size": 16, "log_every": 1, "optimiser": {"learning_rate": 0.003}},
    }
    (root / "align.yaml").write_text(yaml.safe_dump(settings))
    chain.run("align", "align", "group", "--model", chain.model("pretrain"), "--config", root / "align.yaml")
    model = ("--model", chain.model("align"), "--set", "bootstraps=50", "max_tokens=12")
    chain.run("caption", "caption", "participant", *model)
    chain.run("caption", "caption", "group", *model, "-d", f"truth={root / 'raw'}")
    return chain


def test_every_command_succeeds(chain: Chain) -> None:
    assert chain.codes == dict.fromkeys(("raw", "trials", "pretrain", "align", "caption"), 0)


def test_trees_are_the_documented_ones(chain: Chain) -> None:
    people = ("0001", "0002")
    runs = {
        f"sub-{name}/func/sub-{name}_task-viewing_run-{run}_{end}"
        for name in people
        for run in (1, 2, 3)
        for end in (
            "space-MNI152NLin2009cAsym_stat-effect_desc-singletrial_statmap.nii.gz",
            "space-MNI152NLin2009cAsym_stat-effect_desc-singletrial_statmap.json",
            "desc-singletrial_trials.tsv",
            "space-MNI152NLin2009cAsym_desc-visual_mask.nii.gz",
            "space-MNI152NLin2009cAsym_desc-visual_mask.json",
        )
    }
    found = chain.tree("raw")
    pictures = {name for name in found if name.endswith(".png")}
    assert len(pictures) == len(VoxelCohort.open(chain.root / "trials").stimuli)
    assert found - pictures == COMMON | runs | {
        "participants.tsv", "participants.json", "truth.json", "bayes.tsv", "stimuli/stimuli.tsv", "stimuli/captions.json",
        "logs/records/group.json", *(f"logs/records/sub-{name}.json" for name in people),
    }  # fmt: skip
    stores = {
        f"cohort/{kind}-{name}.{end}"
        for name in people
        for kind, end in (("voxels", "npy"), ("voxels", "json"), ("order", "npy"), ("places", "npy"))
    }
    assert chain.tree("trials") == COMMON | stores | {
        "cohort/trials.parquet", "cohort/stimuli.json", "cohort/participants.tsv", "logs/group.yaml", "logs/records/group.json",
    }  # fmt: skip
    assert chain.tree("pretrain") == COMMON | {f"models/MODEL/{name}" for name in (*MODEL, "normalisation.json", "evaluation.json")} | {
        "logs/records/model-MODEL.json"
    }
    assert chain.tree("align") == COMMON | {f"models/MODEL/{name}" for name in (*MODEL, "captions.json", "captions.safetensors")} | {
        "logs/records/model-MODEL.json"
    }
    assert chain.tree("caption") == COMMON | {
        *(f"sub-{name}/sub-{name}_desc-brainfm_caption.json" for name in people), *(f"logs/records/sub-{name}.json" for name in people),
        "logs/records/group.json", "captions.tsv", "metrics.json", "report.html",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["raw", "trials", "pretrain", "align", "caption"])
def test_outputs_are_valid_bids(chain: Chain, name: str) -> None:
    validate(chain.root / name)


def test_the_cohort_holds_what_was_written(chain: Chain) -> None:
    import nibabel as nib

    cohort = VoxelCohort.open(chain.root / "trials")
    assert len(cohort.trials) == 2 * 60
    row = cohort.trials_of("0001").iloc[31]
    stem = chain.root / "raw" / "sub-0001" / "func" / f"sub-0001_{row['run']}"
    table = pd.read_csv(f"{stem}_desc-singletrial_trials.tsv", sep="\t", dtype=str)
    assert table["stim_id"][row["trial"]] == row["stimulus"]
    volume = nib.load(f"{stem}_space-MNI152NLin2009cAsym_stat-effect_desc-singletrial_statmap.nii.gz").get_fdata()[..., row["trial"]]
    order = np.load(cohort.root / "order-0001.npy")
    np.testing.assert_array_equal(cohort.responses("0001")[row["row"]], volume.ravel()[order].astype(np.float32))


def test_the_split_is_one_for_all_stages(chain: Chain) -> None:
    cohort = VoxelCohort.open(chain.root / "trials")
    shared = {name for name, one in cohort.stimuli.items() if one.fields["shared"] == "yes"}
    splits = [ImageSplit.read(chain.model(name) / "split.tsv") for name in ("pretrain", "align")]
    assert splits[0].sha256 == splits[1].sha256 == read_model_config(chain.model("align")).pretraining["split_sha256"]
    assert set(splits[0].names("test")) == shared
    said = json.loads((chain.root / "caption" / "sub-0001" / "sub-0001_desc-brainfm_caption.json").read_text())
    assert {row["stimulus"] for row in said["captions"]} == shared
    assert len(said["single_trials"]) == 2 * len(shared)
    trained = set(json.loads((chain.model("align") / "captions.json").read_text()))
    tested = {text for name in shared for text in cohort.stimuli[name].captions}
    assert len(trained & tested) < 0.2 * len(tested)  # the same words by chance, no list of test captions


def test_evaluation_of_pretraining_has_its_floors(chain: Chain) -> None:
    rows = json.loads((chain.model("pretrain") / "evaluation.json").read_text())
    assert [row["participant"] for row in rows] == ["0001", "0002"]
    assert all({"model", "predict zero", "mean of neighbours", "correlation"} <= set(row) for row in rows)


def test_captions_are_scored_beside_their_floors(chain: Chain) -> None:
    metrics = json.loads((chain.root / "caption" / "metrics.json").read_text())
    rows = {(row["name"], row["average"], row["participant"]) for row in metrics["rows"]}
    names = {name for name, _, _ in rows}
    assert {
        "brain-caption",
        "constant caption",
        "shuffled captions",
        "zeroed voxels",
        "shuffled voxels",
        "ridge to nearest training caption",
    } <= names
    assert {"first caption against the others", "generator's own likelihood"} <= names
    assert {participant for _, _, participant in rows} == {"0001", "0002", "mean"}
    table = pd.read_csv(chain.root / "caption" / "captions.tsv", sep="\t", dtype=str)
    assert set(table["participant_id"]) == {"sub-0001", "sub-0002"}
    page = (chain.root / "caption" / "report.html").read_text()
    assert "zeroed voxels" in page


def test_what_is_done_is_not_done_again(chain: Chain) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.root.rglob("*") if path.is_file() and "logs" not in path.parts}
    chain.run("trials", "parcellate", "group", "--trials", source="raw")
    chain.run("align", "align", "group", "--model", chain.model("pretrain"), "--config", chain.root / "align.yaml")
    after = {path: path.stat().st_mtime_ns for path in chain.root.rglob("*") if path.is_file() and "logs" not in path.parts}
    assert after == before


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    def words() -> str:
        shown = capfd.readouterr()
        logged = "\n".join(line.getMessage() for line in caplog.records)
        return " ".join((shown.out + shown.err + logged).split())

    return words


def test_another_mask_and_unseen_people_are_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    shutil.copytree(chain.root / "trials", tmp_path / "trials")
    path = tmp_path / "trials" / "cohort" / "voxels-0001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"order_sha256": "0" * 64}))
    assert brainfm("caption", tmp_path / "trials", tmp_path / "out", "participant", "--model", chain.model("align")) == 65
    assert "another order of voxels" in said()
    config = chain.model("align") / "config.yaml"
    shutil.copytree(chain.model("align"), tmp_path / "model")
    values = yaml.safe_load(config.read_text())
    values["viewers"].pop("0002")
    (tmp_path / "model" / "config.yaml").write_text(yaml.safe_dump(values))
    code = brainfm(
        "caption", chain.root / "trials", tmp_path / "out2", "participant", "--model", tmp_path / "model", "--participant-label", "0002"
    )
    assert code == 65
    assert "never seen participant 0002" in said()


def test_another_language_model_is_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    other = write_llama(tmp_path / "other", seed=9)
    code = brainfm(
        "caption", chain.root / "trials", tmp_path / "out", "participant", "--model", chain.model("align"), "--set", f"llm={other}"
    )
    assert code != 0
    record = json.loads((tmp_path / "out" / "logs" / "records" / "sub-0001.json").read_text())
    assert "language_sha256" in record["failure"]["message"]


def test_models_of_other_stages_are_refused(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    assert brainfm("caption", chain.root / "trials", tmp_path / "a", "participant", "--model", chain.model("pretrain")) != 0
    assert brainfm("predict", chain.root / "trials", tmp_path / "b", "participant", "--model", chain.model("align")) != 0
    assert brainfm("caption", chain.root / "trials", tmp_path / "c", "participant") == 2
    assert "Traceback" not in said()


def test_a_new_participant_is_added_and_nobody_else_changes(chain: Chain, tmp_path: Path) -> None:
    viewers = (*VIEWERS[1:], "participants=3")
    assert brainfm("simulate", tmp_path / "raw", "--kind", "viewing", "--seed", 3, "--set", *viewers) == 0
    assert brainfm("parcellate", tmp_path / "raw", tmp_path / "trials", "group", "--trials") == 0
    tune = ("--set", "schedule.epochs=2", "schedule.batch_size=16", "share=0.5")
    assert brainfm("prompt-tune", tmp_path / "trials", tmp_path / "tuned", "group", "--model", chain.model("align"), *tune) == 0
    (folder,) = (tmp_path / "tuned" / "models").iterdir()
    before, after = (read_tensors(path / "model.safetensors") for path in (chain.model("align"), folder))
    assert all((after[name] == value).all() for name, value in before.items())
    assert {name.rpartition("_")[2].rpartition(".")[2] for name in set(after) - set(before)} == {"0003"}
    split, known = ImageSplit.read(folder / "split.tsv"), ImageSplit.read(chain.model("align") / "split.tsv")
    roles = split.table.set_index("unit")["role"]
    assert all(roles[unit] == role for unit, role in zip(known.table["unit"], known.table["role"], strict=True))
    out = tmp_path / "caption"
    model = ("--model", folder, "--participant-label", "0003", "--set", "max_tokens=6", "bootstraps=20")
    assert brainfm("caption", tmp_path / "trials", out, "participant", *model) == 0
    assert brainfm("caption", tmp_path / "trials", out, "group", *model) == 0
    # who is known already is not tuned again
    assert brainfm("prompt-tune", tmp_path / "trials", tmp_path / "again", "group", "--model", folder, "--participant-label", "0003") != 0


def test_low_rank_weights_are_saved_and_the_brain_s_vector_chooses(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    trials, again = chain.root / "trials", ("--model", chain.model("pretrain"), "--config", chain.root / "align.yaml")
    assert (
        brainfm("align", trials, tmp_path / "lora", "group", *again, "--set", "fit.lora=2", "schedule.epochs=2", f"llm={trained_llama()}")
        == 0
    )
    (folder,) = (tmp_path / "lora" / "models").iterdir()
    added = [name for name in read_tensors(folder / "model.safetensors") if name.startswith("language_parts.")]
    assert added
    values = {}
    for weight in (0, 1000):
        out, asked = tmp_path / f"out{weight}", ("beams=3", f"vector_weight={weight}", "single_trials=false", "max_tokens=6", "bootstraps=20")  # fmt: skip
        for level in ("participant", "group"):
            assert brainfm("caption", trials, out, level, "--model", folder, "--participant-label", "0001", "--set", *asked) == 0
        values[weight] = json.loads((out / "sub-0001" / "sub-0001_desc-brainfm_caption.json").read_text())["captions"]
    # beside the likeliest of the same beams, the chosen ones are as likely at most, and one at least is another
    pairs = list(zip(values[0], values[1000], strict=True))
    assert all(chosen["log_probability"] <= first["log_probability"] + 1e-4 for first, chosen in pairs)
    assert any(chosen["caption"] != first["caption"] for first, chosen in pairs)
    assert brainfm("caption", trials, tmp_path / "one", "participant", "--model", folder, "--set", "vector_weight=1") == 78
    assert "give beams=2 or more" in said()


def test_the_vector_cannot_choose_where_it_is_no_sentence_s(chain: Chain, tmp_path: Path, said: Callable[[], str]) -> None:
    shutil.copytree(chain.model("align"), tmp_path / "model")
    config = tmp_path / "model" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["alignment"]["contrast_with"] = "nothing"
    config.write_text(yaml.safe_dump(values))
    code = brainfm("caption", chain.root / "trials", tmp_path / "out", "participant", "--model", tmp_path / "model", "--set", "beams=2", "vector_weight=1")  # fmt: skip
    assert code == 78
    assert "not contrasted with sentences" in said()


def test_questions_are_answered(chain: Chain, tmp_path: Path) -> None:
    code = brainfm("caption", chain.root / "trials", tmp_path / "out", "participant", "--model", chain.model("align"), "--participant-label", "0001", "--chat", "what colour is it ?", "is it a dog , or a cat ?", "--set", "single_trials=false", "max_tokens=5")  # fmt: skip
    assert code == 0
    values = json.loads((tmp_path / "out" / "sub-0001" / "sub-0001_desc-brainfm_caption.json").read_text())
    assert "single_trials" not in values
    turns = values["answers"][0]["turns"]
    assert [turn["question"] for turn in turns] == ["what colour is it ?", "is it a dog , or a cat ?"]


def test_weights_of_the_language_model_are_not_in_the_folder(chain: Chain) -> None:
    names = read_tensors(chain.model("align") / "model.safetensors")
    assert all(name.startswith(("scale.", "encoder.", "bridge.")) for name in names)
