"""submit, status and resubmit on a real SLURM of one node (tests/slurm/cluster.sh): arrays, failures of every kind, requeue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import synthetic_bids as synthetic

if TYPE_CHECKING:
    from collections.abc import Iterator

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: {', '.join(MISSING)} (Debian: slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of the test cluster need root"),
]
CLUSTER = Path(__file__).with_name("cluster.sh")
PEOPLE = tuple(f"{number:02d}" for number in range(1, 21))
# What one participant of the array does to itself, by label; the first attempt at 03 has not the memory, at 05 not the time.
TROUBLE = (
    f'if [ "${{label:-}}" = 03 ]; then {sys.executable} -c "x = bytearray(1300 << 20); import time; time.sleep(4)"; fi',
    'if [ "${label:-}" = 05 ]; then sleep 100; fi',  # SLURM looks at limits every half minute
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which SLURM's programs find the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    for above in (folder, *folder.parents):  # munge's socket must be reachable
        if above.owner() == "root" and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", CLUSTER, "start", folder], check=True, env=environment)
    yield environment
    subprocess.run(["bash", CLUSTER, "stop", folder], check=True, env=environment)


def brainfm(environment: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "brainfm_cli", *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def jobs_of(environment: dict[str, str], out: Path) -> dict[str, dict[str, Any]]:
    return {task["unit"]: task for task in json.loads(brainfm(environment, "status", out, "--json"))["jobs"]}


def wait_for_end(environment: dict[str, str], out: Path, *, limit_s: float) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + limit_s
    while True:
        tasks = jobs_of(environment, out)
        if all(task["status"] in {"done", "failed"} for task in tasks.values()):
            return tasks
        assert time.monotonic() < deadline, tasks
        time.sleep(2)


def test_an_array_with_every_kind_of_failure(cluster: dict[str, str], tmp_path: Path) -> None:
    made = synthetic.write_fmriprep(tmp_path / "fmriprep", participants=PEOPLE, frames=60, seed=2)
    bold = next((made.root / "sub-07").rglob("*_bold.nii.gz"))
    bold.write_bytes(bold.read_bytes()[:2000])
    out = tmp_path / "out put"  # blanks must not matter
    asked = [f"extra={line}" for line in TROUBLE]
    said = brainfm(
        cluster, "submit", "parcellate", made.root, out, "participant", "--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}",
        "--slurm", "time=1", "mem=1000M", "partition=debug", *asked,
    )  # fmt: skip
    assert "20 participants" in said
    assert {task["status"] for task in jobs_of(cluster, out).values()} <= {"pending", "running", "done", "failed"}
    tasks = wait_for_end(cluster, out, limit_s=600)
    failed = {unit: task["failure"] for unit, task in tasks.items() if task["status"] == "failed" and unit != "group"}
    assert failed == {"sub-03": "memory", "sub-05": "time", "sub-07": "data"}
    assert tasks["sub-03"]["node"] or tasks["sub-03"]["reason"]
    assert tasks["group"]["status"] == "done"  # it packs those who are done
    page = brainfm(cluster, "status", out)
    assert "memory" in page
    assert "--resubmit failed" in page

    said = brainfm(cluster, "submit", "--resubmit", "failed", out)
    assert "sub-07: not submitted again: data" in said
    tasks = wait_for_end(cluster, out, limit_s=600)
    assert {unit for unit, task in tasks.items() if task["status"] == "failed"} == {"sub-07"}
    assert (out / "cohort" / "index.parquet").is_file()
    records = [json.loads(path.read_text()) for path in (out / "logs" / "records").glob("sub-*.json")]
    assert sum(record["status"] == "done" for record in records) == len(PEOPLE) - 1


def test_training_goes_on_after_its_time_limit(cluster: dict[str, str], tmp_path: Path) -> None:
    sizes = ("--participants", 40, "--seed", 3, "--atlases", "Schaefer100", "AAL116", "--set", "frames=120")
    brainfm(cluster, "simulate", tmp_path / "series", "--kind", "rest", "--level", "series", *sizes)
    settings = ("system.preset=tiny", "epochs=400", "batch_size=8", "log_every=50", "steps=EVER")

    def training(out: Path, steps: int) -> tuple[object, ...]:
        named = [text.replace("EVER", str(steps)) for text in settings]
        return ("pretrain", tmp_path / "series", out, "group", "--system", "brain-graph", "--device", "cpu", "--set", *named)

    alone = {**cluster, "OMP_NUM_THREADS": "1"}  # as a job of one CPU has it: other numbers of threads add in another order

    def timed(steps: int) -> float:
        started = time.monotonic()
        brainfm(alone, *training(tmp_path / f"try-{steps}", steps))
        return time.monotonic() - started

    # as many steps as take far more than the minute after which a limit of three minutes is announced, whatever the start takes
    steps = round(150 * 80 / max(1, timed(100) - timed(20)))
    brainfm(cluster, "submit", *training(tmp_path / "killed", steps), "--slurm", "time=3", "mem=3G", "cpus-per-task=1")
    task = wait_for_end(cluster, tmp_path / "killed", limit_s=3600)["single"]
    assert task["status"] == "done", (tmp_path / "killed" / task["log"]).read_text()
    log = (tmp_path / "killed" / task["log"]).read_text()
    assert "stopped on request after step" in " ".join(log.split())
    assert "resuming after step" in " ".join(log.split())
    brainfm(alone, *training(tmp_path / "whole", steps))
    (first,), (second,) = ((tmp_path / name / "models").glob("*/model.safetensors") for name in ("killed", "whole"))
    weights, expected = load_file(first), load_file(second)
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values, err_msg=name)


def test_a_scheduler_that_is_gone_leaves_the_logs(cluster: dict[str, str], tmp_path: Path) -> None:
    made = synthetic.write_fmriprep(tmp_path / "fmriprep", participants=("01", "02"), frames=60, seed=2)
    out = tmp_path / "out"
    brainfm(
        cluster, "submit", "parcellate", made.root, out, "participant", "--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}",
        "--slurm", "time=10", "mem=1000M",
    )  # fmt: skip
    wait_for_end(cluster, out, limit_s=1200)
    alone = {**cluster, "PATH": str(Path(sys.executable).parent)}
    assert {task["status"] for task in jobs_of(alone, out).values()} == {"done"}


def test_a_signal_saves_the_state(tmp_path: Path) -> None:
    """What the job script relies on, without a scheduler: SIGUSR1 ends a training with 75 at a step border, and it goes on."""
    environment = dict(os.environ)
    sizes = ("--participants", 30, "--seed", 3, "--atlases", "Schaefer100", "--set", "frames=80")
    brainfm(environment, "simulate", tmp_path / "series", "--kind", "rest", "--level", "series", *sizes)
    settings = ("system.preset=tiny", "epochs=30", "steps=60", "batch_size=8", "log_every=20", "checkpoint_every=1000")

    def training(out: Path) -> list[str]:
        named = ("pretrain", tmp_path / "series", out, "group", "--system", "brain-graph", "--device", "cpu", "--set", *settings)
        return [sys.executable, "-m", "brainfm_cli", *map(str, named)]

    subprocess.run(training(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(training(tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 0" in line:
            process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    assert not list((tmp_path / "killed").glob("models/*/provenance.json"))
    subprocess.run(training(tmp_path / "killed"), check=True, capture_output=True)
    (first,), (second,) = ((tmp_path / name / "models").glob("*/model.safetensors") for name in ("killed", "whole"))
    assert first.read_bytes() == second.read_bytes()
