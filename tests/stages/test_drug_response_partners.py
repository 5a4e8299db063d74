"""Drug-response with what stands beside it: a graph encoder as donor, networks without pretraining, alignment with connectivity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import EXIT_SETTINGS
from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.learning.joined import Joined
from brainfm_cli.learning.tuned import prepare_inputs
from brainfm_cli.learning.tuning import embed
from brainfm_cli.programs.validator import validate
from brainfm_cli.systems import load_system
from tests.stages.command import brainfm_on_cpu as brainfm
from tests.stages.command import only

SERIES = ("system.preset=tiny", "system.width=32", "system.windows.patch_s=20", "system.windows.window_s=80", "system.windows.min_s=40")
TRAINING = ("epochs=1", "batch_size=8", "where.cohort=[drug-free]", "optimiser.learning_rate=0.001")
TUNE = ("--target", "response", "--set", "where.cohort=[trial]", "tuning.epochs=0", "tuning.inner_folds=2")
QUICK = (
    "refit=always", "design.folds=2", "floors.kinds=[majority]", "evaluation.bootstraps=100", "evaluation.permutations=99",
    "evaluation.inner_folds=2", "evaluation.groups=[arm]", "where.cohort=[trial]",
)  # fmt: skip
RIVALS = (
    "rivals.kinds=[brain-network-transformer,series-cnn,same-encoder]", "rivals.training.epochs=1", "rivals.training.stops=1",
    "rivals.training.inner_folds=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("partners")
    options = ("--participants", 40, "--seed", 2, "--atlases", "Schaefer100", "--set", "frames=70", "trial.drug_free=24")
    assert brainfm("simulate", root / "sim", "--kind", "drug", "--level", "series", *options) == 0
    assert brainfm("pretrain", root / "sim", root / "series", "group", "--system", "drug-response", "--set", *SERIES, *TRAINING) == 0
    graph = ("system.preset=tiny", "epochs=1", "batch_size=8", "where.cohort=[drug-free]")
    assert brainfm("pretrain", root / "sim", root / "graph", "group", "--system", "brain-graph", "--set", *graph) == 0
    model = ("--model", only(root / "series" / "models"))
    donor = f"donor={only(root / 'graph' / 'models')}"
    assert brainfm("prompt-tune", root / "sim", root / "tuned", "group", *model, *TUNE, donor) == 0
    return root


def test_a_graph_encoder_beside_the_series_encoder_is_one_more_block(root: Path) -> None:
    validate(root / "tuned")
    tuned = only(root / "tuned" / "models")
    system = load_system(tuned)
    assert isinstance(system, Joined)
    assert (tuned / "donor" / "model.safetensors").read_bytes() == (only(root / "graph" / "models") / "model.safetensors").read_bytes()
    cohort = Cohort.open(root / "sim")
    people = sorted(cohort.participants.index)[:6]
    (atlas,) = cohort.atlases
    block = prepare_inputs(system, cohort, people, [atlas])[atlas].blocks["donor"]
    alone = load_system(only(root / "graph" / "models"))
    inputs = prepare_inputs(alone, cohort, people, [atlas])[atlas]
    np.testing.assert_allclose(block, embed(alone, inputs, alone.new_prompt(atlas).state_dict()), atol=1e-5)
    assert any("donor" in name for name in read_tensors(tuned / "head.safetensors"))
    provenance = json.loads((tuned / "provenance.json").read_text())
    assert provenance["donor"] == only(root / "graph" / "models").name


def test_whom_the_donor_has_seen_the_model_has_seen(root: Path, tmp_path: Path) -> None:
    other = ("pretrain", root / "sim", tmp_path / "graph", "group", "--system", "brain-graph")
    assert brainfm(*other, "--set", "system.preset=tiny", "epochs=1", "batch_size=8", "where.cohort=[trial]") == 0
    donor = f"donor={only(tmp_path / 'graph' / 'models')}"
    model = ("--model", only(root / "series" / "models"))
    assert brainfm("prompt-tune", root / "sim", tmp_path / "tuned", "group", *model, *TUNE, donor) == 0
    given = ("--model", only(tmp_path / "tuned" / "models"))
    assert brainfm("predict", root / "sim", tmp_path / "scored", "group", *given, "--set", *QUICK) != 0
    assert not (tmp_path / "scored" / "metrics.json").exists()


def test_networks_without_pretraining_stand_on_the_same_folds(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ("--model", only(root / "tuned" / "models"))
    assert brainfm("predict", root / "sim", root / "scored", "group", *given, "--set", *QUICK, *RIVALS) == 0
    table = pd.read_csv(root / "scored" / "predictions.tsv", sep="\t", dtype={"participant_id": str})
    folds = table.pivot_table(index="participant_id", columns="predictor", values="fold")
    for name in ("Brain Network Transformer", "1-D CNN on series", "Same encoder, trained from scratch"):
        assert folds[name].equals(folds["Majority"].rename(name)), name
        assert table.loc[table["predictor"] == name, "p1"].nunique() > 20
    assert brainfm("predict", root / "sim", root / "inside", "group", *given, "--set", *QUICK, "pretraining=inside") == EXIT_SETTINGS
    assert "the donor is given" in caplog.text


def test_alignment_changes_the_encoder_alone_and_says_whom_it_has_seen(root: Path, tmp_path: Path) -> None:
    model = only(root / "series" / "models")
    options = ("--set", "epochs=2", "batch_size=8", "where.cohort=[drug-free]", "pair.width=8", "log_every=1")
    assert brainfm("align", root / "sim", tmp_path / "aligned", "group", "--model", model, *options) == 0
    validate(tmp_path / "aligned")
    aligned = only(tmp_path / "aligned" / "models")
    before, after = read_tensors(model / "model.safetensors"), read_tensors(aligned / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any("encoder" in name for name in changed)
    assert not any("scaler" in name for name in changed)
    assert read_model_config(aligned) == read_model_config(model)
    assert len(json.loads((aligned / "provenance.json").read_text())["aligned_on"]) == 24
    log = pd.read_csv(aligned / "log.csv")
    assert {"contrast", "patch", "monitor_own_first"} <= set(log.columns)
    assert brainfm("prompt-tune", root / "sim", tmp_path / "tuned", "group", "--model", aligned, *TUNE) == 0
