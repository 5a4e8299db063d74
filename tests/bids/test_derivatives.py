from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.derivatives import OutputDataset, atomic_path, write_json, write_tsv
from brainfm_cli.config import Settings
from brainfm_cli.errors import ConfigurationConflictError, InputNotFoundError, OutputError


class SomeSettings(Settings):
    rate: float = 0.5
    """Rate."""


def opened(tmp_path: Path, *, rate: float = 0.5) -> OutputDataset:
    (tmp_path / "in").mkdir(exist_ok=True)
    return OutputDataset.open(tmp_path / "out", command="parcellate", settings=SomeSettings(rate=rate), sources=[tmp_path / "in"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tsv_reads_back_equal(tmp_path: Path, generator: np.random.Generator) -> None:
    table = pd.DataFrame({"a": generator.normal(size=50), "b": [np.nan, *range(49)]})
    path = write_tsv(tmp_path / "t.tsv", table)
    back = pd.read_csv(path, sep="\t", na_values="n/a", float_precision="round_trip")
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    assert "n/a" in path.read_text()


def test_same_settings_reopen_and_others_are_refused(tmp_path: Path) -> None:
    first = opened(tmp_path)
    before = (tmp_path / "out" / "dataset_description.json").read_bytes()
    assert opened(tmp_path).configuration_hash == first.configuration_hash
    with pytest.raises(ConfigurationConflictError) as caught:
        opened(tmp_path, rate=0.7)
    assert caught.value.exit_code == 73
    assert (tmp_path / "out" / "dataset_description.json").read_bytes() == before


def test_the_inputs_configuration_is_part_of_the_hash(tmp_path: Path) -> None:
    first = opened(tmp_path)
    write_json(tmp_path / "in" / "dataset_description.json", {"GeneratedBy": [{"ConfigurationHash": "x"}]})
    with pytest.raises(ConfigurationConflictError):
        opened(tmp_path)
    assert first.configuration_hash


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        OutputDataset.open(tmp_path / "out", command="x", settings=SomeSettings(), sources=[tmp_path / "absent"])
    with pytest.raises(OutputError):
        OutputDataset.open(tmp_path, command="x", settings=SomeSettings(), sources=[tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        OutputDataset.open(tmp_path / "file", command="x", settings=SomeSettings())


def test_a_foreign_dataset_is_not_overwritten(tmp_path: Path) -> None:
    description = tmp_path / "out" / "dataset_description.json"
    write_json(description, {"Name": "somebody's work"})
    with pytest.raises(ConfigurationConflictError):
        opened(tmp_path)
    assert json.loads(description.read_text()) == {"Name": "somebody's work"}


def _open_many(root: Path) -> None:
    for _ in range(20):
        OutputDataset.open(root, command="parcellate", settings=SomeSettings())


def test_concurrent_opening_gives_one_consistent_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_open_many, args=(tmp_path / "out",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".bidsignore", "config.yaml", "dataset_description.json", "logs"]


def test_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    import os
    import subprocess

    from brainfm_cli.bids.derivatives import sweep, temporary_path

    ours = temporary_path(tmp_path / "a.tsv")
    ours.touch()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / "sub" / ours.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    left.parent.mkdir()
    left.touch()
    foreign = tmp_path / ".b.tsv.00000000-1-00000000.part"
    foreign.touch()
    other = tmp_path / ".hidden.part"
    other.touch()
    sweep(tmp_path, recursive=True)
    assert (ours.exists(), left.exists(), foreign.exists(), other.exists()) == (True, False, True, True)
    os.utime(foreign, (0, 0))
    sweep(tmp_path)
    assert not foreign.exists()
