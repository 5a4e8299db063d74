"""SLURM without a cluster: sizes and times, scripts that bash accepts, submission to a fake sbatch, and what became of tasks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from brainfm_cli.bids.derivatives import write_text
from brainfm_cli.errors import MissingProgramError, ProgramFailedError, SettingsError
from brainfm_cli.programs.slurm import (
    FOLDER,
    Job,
    Resources,
    clock,
    job_script,
    megabytes,
    read_submissions,
    seconds,
    submit_jobs,
)
from brainfm_cli.programs.slurm_tasks import tasks_of
from brainfm_cli.provenance import UnitRecord, record_path
from tests import synthetic_bids as synthetic
from tests.bad_input_bench import make_raw
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

ARRAY = Job(
    role="participants", job_id="", labels=("01", "02", "03"), argv=("parcellate", "/in", "/o ut", "participant"), resources=Resources()
)
GROUP = Job(role="group", job_id="", argv=("parcellate", "/in", "/o ut", "group"), resources=Resources())


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fake programs, alone on PATH with the basics; each writes its arguments to calls.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "sed", "hostname", "mv", "sleep", "env"):
        (folder / name).symlink_to(shutil.which(name) or "/bin/true")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >> {folder / "calls.txt"}\n{body}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("text", "expected"), [("500", 500), ("4G", 4096), ("1.5g", 1536), ("2048K", 2), ("1T", 1048576), ("700M", 700), ("4GB", 4096)]
)
def test_memory_sizes(text: str, expected: int) -> None:
    assert megabytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 1800), ("1:30", 90), ("02:00:00", 7200), ("1-0", 86400), ("1-12", 129600), ("0-01:30", 5400), ("2-03:04:05", 183845)],
)
def test_time_limits(text: str, expected: int) -> None:
    assert seconds(text) == expected
    assert seconds(clock(expected)) == expected


@pytest.mark.parametrize(
    "pair",
    [
        "nothing",
        "=x",
        "mem=lots",
        "mem=0",
        "time=soon",
        "time=1:2:3:4",
        "time=-5",
        "throttle=0",
        "array=1-5",
        "output=x",
        "job name=x",
        "comment=a\nb",
    ],
)
def test_bad_options_are_refused(pair: str) -> None:
    with pytest.raises(SettingsError):
        Resources.parse([pair])


def test_options_of_sbatch_and_our_own() -> None:
    found = Resources.parse(
        ["partition=short", "--mem=4G", "cpus_per_task=2", "throttle=9", "modules=a/1,b", "extra=x=1", "extra=y=2", "requeue=no"]
    )
    assert found.options == {"partition": "short", "mem": "4G", "cpus-per-task": "2"}
    assert (found.throttle, found.modules, found.extra, found.requeue) == (9, ("a/1", "b"), ("x=1", "y=2"), False)
    more = found.with_more(memory=True, time=True)
    assert more.options["mem"] == "8192M"
    assert "time" not in more.options  # the cluster's own limit is not known


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("job", [ARRAY, GROUP])
def test_scripts_are_bash(tmp_path: Path, job: Job, resumes: bool) -> None:
    resources = Resources.parse(["time=10", "modules=x y", "extra=export A='b c'"])
    folder = tmp_path / "with blank"
    script = job_script(
        job.model_copy(update={"resources": resources}),
        folder,
        1,
        brainfm=("py thon", "-m", "brainfm_cli"),
        resumes=resumes,
        behind=["7", "8"],
    )
    path = tmp_path / "job.sh"
    path.write_text(script)
    subprocess.run(["bash", "-n", path], check=True)
    assert ("--signal=B:USR1@120" in script) is resumes
    assert ("--array=1-3" in script) is (job.role == "participants")
    assert "--dependency=afterany:7:8" in script
    assert "'py thon' -m brainfm_cli parcellate /in '/o ut'" in script
    assert script.index("export A='b c'") < script.index("parcellate /in")
    assert '--output="' in script  # the folder has a blank


@pytest.mark.parametrize(
    ("code", "asked", "requeued"), [(0, False, False), (75, False, False), (75, True, True), (0, True, False), (65, True, False)]
)
def test_a_script_requeues_what_was_stopped_in_time(tmp_path: Path, fake: Path, code: int, asked: bool, requeued: bool) -> None:
    program(fake, "scontrol", "exit 0")
    program(fake, "brainfm", f"trap 'exit {code}' USR1\nfor i in 1 2 3 4 5 6 7 8 9; do sleep 0.1; done\nexit {code}")
    folder = tmp_path / "job"
    folder.mkdir()
    script = folder / "job.sh"
    script.write_text(job_script(GROUP, folder, 1, brainfm=(str(fake / "brainfm"),), resumes=True))
    process = subprocess.Popen(["bash", script], env={**os.environ, "SLURM_JOB_ID": "7"})
    if asked:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.4)
        process.send_signal(10)  # SIGUSR1
    ended = process.wait(20)
    assert ("scontrol requeue 7" in calls(fake)) is requeued
    assert (folder / "exit-7").exists() is not requeued
    assert ended == (0 if requeued else code)
    if not requeued:
        assert (folder / "exit-7").read_text().split()[0] == str(code)


def test_a_submission_is_written_as_it_goes(tmp_path: Path, fake: Path) -> None:
    program(fake, "sbatch", f'n=$(cat {fake / "n"} 2>/dev/null || echo 40); n=$((n + 1)); echo $n > {fake / "n"}; echo "$n;cluster"')
    found = submit_jobs(tmp_path / "out", [ARRAY, GROUP], brainfm=("brainfm",), resumes=False)
    assert [job.job_id for job in found.jobs] == ["41", "42"]
    folder = tmp_path / "out" / FOLDER / found.name
    assert "--dependency=afterany:41" in (folder / "job-2-group.sh").read_text()
    assert (folder / "participants-1.txt").read_text().split() == ["01", "02", "03"]
    assert read_submissions(tmp_path / "out") == [found]
    again = submit_jobs(tmp_path / "out", [ARRAY], brainfm=("brainfm",), resumes=False)
    assert again.name != found.name  # within one second too


def test_what_sbatch_refuses_leaves_no_half(tmp_path: Path, fake: Path) -> None:
    program(fake, "sbatch", 'case "$2" in *group*) echo "sbatch: error: invalid partition" >&2; exit 1;; esac; echo 41')
    program(fake, "scancel", "exit 0")
    with pytest.raises(ProgramFailedError, match="invalid partition"):
        submit_jobs(tmp_path / "out", [ARRAY, GROUP], brainfm=("brainfm",), resumes=False)
    assert "scancel 41" in calls(fake)


def test_without_slurm(tmp_path: Path, fake: Path) -> None:
    with pytest.raises(MissingProgramError, match="login node"):
        submit_jobs(tmp_path / "out", [ARRAY], brainfm=("brainfm",), resumes=False)


def test_what_became_of_tasks(tmp_path: Path, fake: Path) -> None:
    """Queue, exit codes, logs, accounting, in this order; the last attempt counts."""
    out = tmp_path / "out"
    labels = ("wait", "run", "done", "data", "bug", "mem", "time", "oom", "node", "gone")
    program(fake, "sbatch", "echo 50")
    job = ARRAY.model_copy(update={"labels": labels})
    folder = out / FOLDER / submit_jobs(out, [job], brainfm=("brainfm",), resumes=False).name
    number = {label: place for place, label in enumerate(labels, 1)}
    for label, code in {"done": 0, "data": 65, "bug": 1, "mem": 137}.items():
        (folder / f"exit-50_{number[label]}").write_text(f"{code} node7\n")
    (folder / f"task-50_{number['mem']}.out").write_text("slurmstepd: error: Detected 1 oom-kill event(s)\n")
    (folder / f"task-50_{number['time']}.out").write_text("slurmstepd: error: *** JOB 5 ON n CANCELLED AT 2026 DUE TO TIME LIMIT ***\n")
    program(fake, "squeue", f"echo '50_{number['wait']}|PENDING|Resources|'; echo '50_{number['run']}|RUNNING|None|node3'")
    program(fake, "sacct", f'echo "50_{number["oom"]}|OUT_OF_MEMORY|node1"; echo "50_{number["node"]}|NODE_FAIL|node2"')
    found = {task.unit.removeprefix("sub-"): task for task in tasks_of(out, read_submissions(out))}
    assert {label: task.status for label, task in found.items() if task.status != "failed"} == {
        "wait": "pending",
        "run": "running",
        "done": "done",
    }
    assert {label: task.failure for label, task in found.items() if task.status == "failed"} == {
        "data": "data", "bug": "program", "mem": "memory", "time": "time", "oom": "memory", "node": "node", "gone": "unknown",
    }  # fmt: skip
    assert (found["wait"].reason, found["run"].node, found["data"].node, found["node"].node) == ("Resources", "node3", "node7", "node2")

    program(fake, "squeue", "exit 1")  # as where another user asks
    program(fake, "sacct", f'echo "50_{number["run"]}|RUNNING|node3"; echo "50_[{number["wait"]},77-99%5]|PENDING|"')
    seen = {task.unit.removeprefix("sub-"): task.status for task in tasks_of(out, read_submissions(out))}
    assert (seen["run"], seen["wait"]) == ("running", "pending")

    program(fake, "sbatch", "echo 60")
    second = out / FOLDER / submit_jobs(out, [job.model_copy(update={"labels": ("mem",)})], brainfm=("brainfm",), resumes=False).name
    (second / "exit-60_1").write_text("0 node9\n")
    assert {task.unit: task.status for task in tasks_of(out, read_submissions(out))}["sub-mem"] == "done"


def test_resubmitting_asks_for_more_where_that_was_the_cause(tmp_path: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    program(fake, "sbatch", "echo 50")
    job = ARRAY.model_copy(update={"labels": ("a", "b", "c", "d"), "resources": Resources.parse(["mem=1G", "time=10"])})
    folder = out / FOLDER / submit_jobs(out, [job], brainfm=("brainfm",), resumes=False).name
    for place, (code, words) in enumerate(((137, "oom-kill"), (143, "DUE TO TIME LIMIT"), (65, ""), (0, "")), 1):
        (folder / f"exit-50_{place}").write_text(f"{code} n\n")
        (folder / f"task-50_{place}.out").write_text(words)
    program(fake, "sbatch", "echo 60")
    assert brainfm("submit", "--resubmit", "failed", out, "--slurm", "partition=long") == 0
    said = capsys.readouterr().out
    assert "sub-c: not submitted again: data" in " ".join(said.split())
    (new,) = [one for one in read_submissions(out) if one.name != folder.name]
    asked = {job.labels: job.resources.options for job in new.jobs}
    assert asked == {
        ("a",): {"mem": "2048M", "time": "10", "partition": "long"},
        ("b",): {"mem": "1G", "time": "00:20:00", "partition": "long"},
    }


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("submit",), 2, "a command is needed"),
        (("submit", "simulate", "out"), 2, "cannot be run elsewhere"),
        (("submit", "parcellate", "INPUT", "out", "participant", "--no-such-flag", "x"), 2, "no-such-flag"),
        (("submit", "parcellate", "INPUT", "out", "nobody"), 2, "no level 'nobody'"),
        (("submit", "parcellate", "--atlases", "A", "--", "INPUT", "out", "participant"), 2, "behind the command's name"),
        (("submit", "parcellate", "INPUT", "out", "participant", "--participant-label", "99"), 66, "no data for participant 99"),
        (("submit", "parcellate", "INPUT", "out", "participant", "--slurm", "mem=lots"), 78, "no memory size"),
        (("submit", "--resubmit", "all", "out"), 2, "the word 'failed'"),
        (("submit", "--resubmit", "failed", "out"), 66, "nothing was submitted"),
        (("submit", "parcellate", "INPUT", "out", "participant"), 127, "sbatch is not there"),
    ],
)
def test_wrong_calls(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, told: str
) -> None:  # fmt: skip
    del fake
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "sub-01").mkdir(parents=True)
    assert brainfm(*(text.replace("INPUT", "in") for text in arguments)) == code
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("01", "02", "03"):
        (tmp_path / "in" / f"sub-{label}").mkdir(parents=True)
    options = ("--atlases", "AAL116", "Power264", "--participant-label", "01", "03", "--slurm", "time=5", "throttle=2", "--dry-run")
    assert brainfm("submit", "parcellate", tmp_path / "in", tmp_path / "out", "participant", *options) == 0
    said = capsys.readouterr().out
    assert "# 2 participants, one task each: 01, 03" in said
    assert "#SBATCH --array=1-2%2" in said
    assert said.count("--atlases AAL116 --atlases Power264") == 2
    assert "--participant-label 01" not in said
    assert "# group" in said
    assert not (tmp_path / "out").exists()
    assert (
        brainfm(
            "submit",
            "parcellate",
            tmp_path / "in",
            tmp_path / "out",
            "participant",
            "--container",
            "apptainer",
            "--image",
            "b.sif",
            "--dry-run",
        )
        == 0
    )
    assert capsys.readouterr().out.count("--container apptainer --image b.sif") == 2
    assert brainfm("submit", "pretrain", tmp_path / "in", tmp_path / "out", "group", "--system", "brain-graph", "--dry-run") == 0
    assert "#SBATCH --requeue" in capsys.readouterr().out


def test_large_datasets_are_several_arrays_and_memory_is_asked_for_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1001):
        (tmp_path / "in" / f"sub-{number:04d}").mkdir(parents=True)
    assert brainfm("submit", "parcellate", tmp_path / "in", tmp_path / "out", "participant", "--slurm", "mem-per-cpu=2G", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "--array=1-1000" in said
    assert "--array=1-1\n" in said
    assert "--dependency=afterany:JOB1:JOB2" in said
    assert "--mem=" not in said
    assert Resources.parse(["mem-per-cpu=2G"]).with_more(memory=True, time=False).options == {"mem-per-cpu": "4096M"}


def test_status_shows_jobs_before_anything_is_done(tmp_path: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(fake, "sbatch", "echo 50")
    program(fake, "squeue", "echo '50_1|PENDING|Priority|'; echo '50_2|RUNNING|None|node3'; echo '50_3|PENDING|Priority|'")
    submit_jobs(tmp_path / "out", [ARRAY], brainfm=("brainfm",), resumes=False)
    assert brainfm("status", tmp_path / "out", "--json") == 0
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert [job["status"] for job in jobs] == ["pending", "running", "pending"]
    assert brainfm("status", tmp_path / "out") == 0
    assert "2 pending, 1 running" in capsys.readouterr().out


def test_the_scheduler_is_asked_once_whatever_the_number_of_tasks(tmp_path: Path, fake: Path) -> None:
    program(fake, "sbatch", "echo 50")
    out = tmp_path / "out"
    job = ARRAY.model_copy(update={"labels": tuple(f"{number:03d}" for number in range(200))})
    submit_jobs(out, [job], brainfm=("brainfm",), resumes=False)
    program(fake, "sacct", "exit 1")
    program(fake, "squeue", "exit 0")
    lines = "; ".join(f"echo 'JobId={90 + n} ArrayJobId=50 ArrayTaskId={n} JobState=OUT_OF_MEMORY NodeList=n{n}'" for n in range(1, 200))
    program(fake, "scontrol", f"{lines}; echo 'JobId=50 ArrayJobId=50 ArrayTaskId=200 JobState=TIMEOUT NodeList=(null)'")
    found = tasks_of(out, read_submissions(out))
    assert [task.failure for task in found] == ["memory"] * 199 + ["time"]
    assert found[6].node == "n7"
    assert sorted(call.split()[0] for call in calls(fake)) == ["sacct", "sbatch", "scontrol", "squeue"]


def test_a_group_job_that_waits_is_replaced_and_not_doubled(tmp_path: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    counter = f'n=$(cat {fake / "n"} 2>/dev/null || echo 40); n=$((n + 1)); echo $n > {fake / "n"}; echo "$n"'
    program(fake, "sbatch", counter)
    resources = Resources.parse(["mem=1G", "time=10"])
    jobs = [one.model_copy(update={"resources": resources, "labels": one.labels and ("a", "b", "c")}) for one in (ARRAY, GROUP)]
    folder = out / FOLDER / submit_jobs(out, jobs, brainfm=("brainfm",), resumes=False).name
    (folder / "exit-41_1").write_text("137 n\n")
    (folder / "task-41_1.out").write_text("oom-kill")
    program(fake, "squeue", "echo '41_2|RUNNING|None|n1'; echo '41_3|PENDING|Resources|'; echo '42|PENDING|Dependency|'")
    program(fake, "scancel", "exit 0")
    assert brainfm("submit", "--resubmit", "failed", out, "--dry-run") == 0
    assert "job 42: would be cancelled" in capsys.readouterr().out
    assert not [call for call in calls(fake) if call.startswith("scancel")]
    assert brainfm("submit", "--resubmit", "failed", out) == 0
    (new,) = [one for one in read_submissions(out) if one.name != folder.name]
    assert [(job.role, job.job_id, job.labels) for job in new.jobs] == [("participants", "43", ("a",)), ("group", "44", ())]
    assert "--dependency=afterany:41:43" in (out / FOLDER / new.name / "job-2-group.sh").read_text()  # of the first array some still run
    assert [call for call in calls(fake) if call.startswith("scancel")] == ["scancel 42"]
    program(fake, "squeue", "echo '41_2|RUNNING|None|n1'; echo '43_1|PENDING|Resources|'; echo '44|PENDING|Dependency|'")
    assert [task.job for task in tasks_of(out, read_submissions(out)) if task.role == "group"] == ["44"]


@pytest.mark.parametrize(("limit", "signal"), [("5", 120), ("3", 120), ("2:30", 50), ("2", 40)])
def test_short_limits_are_announced_later(tmp_path: Path, limit: str, signal: int) -> None:
    job = GROUP.model_copy(update={"resources": Resources.parse([f"time={limit}"])})
    assert f"#SBATCH --signal=B:USR1@{signal}" in job_script(job, tmp_path, 1, brainfm=("brainfm",), resumes=True)


def test_limits_in_which_nothing_is_done_are_refused(tmp_path: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    line = ("submit", "pretrain", tmp_path / "in", tmp_path / "out", "group", "--system", "brain-graph", "--slurm", "time=1")
    assert brainfm(*line) == 78
    assert "at least two minutes" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    program(fake, "sbatch", "echo 41")
    assert brainfm(*line, "requeue=no") == 0


@pytest.mark.parametrize("value", ["a b", 'say "hi" to me', "it's", "50% # of", "back\\slash", '"', "plain"])
def test_values_come_back_as_sbatch_reads_them(tmp_path: Path, value: str) -> None:
    job = GROUP.model_copy(update={"resources": Resources.parse([f"comment={value}"])})
    script = job_script(job, tmp_path / "100% x", 1, brainfm=("brainfm",), resumes=False)
    (line,) = [line for line in script.splitlines() if "--comment" in line]
    assert sbatch_reads(line.removeprefix("#SBATCH ")) == [f"--comment={value}"]
    (line,) = [line for line in script.splitlines() if "--output" in line]
    assert sbatch_reads(line.removeprefix("#SBATCH ")) == [f"--output={tmp_path}/100%% x/task-%j.out"]


def sbatch_reads(line: str) -> list[str]:
    """Words of an #SBATCH line, by the rules of SLURM's own parser (get_argument of its source): quotes, backslashes, comments."""
    words: list[str] = []
    word, quote, escaped = "", "", False
    for character in line:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif not quote and character == "#":
            break
        elif not quote and character.isspace():
            words, word = [*words, word], ""
        else:
            word += character
    return [one for one in [*words, word] if one]


def test_two_people_who_submit_at_once_get_a_folder_each(tmp_path: Path, fake: Path) -> None:
    program(fake, "sbatch", "echo 41")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: submit_jobs(tmp_path / "out", [ARRAY], brainfm=("brainfm",), resumes=False).name, range(16)))
    assert len(set(made)) == 16
    assert len(read_submissions(tmp_path / "out")) == 16


def test_what_participants_need_is_estimated_from_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against what parcellate really leaves: files within a tenth, bytes within a factor of two."""
    made = synthetic.write_fmriprep(tmp_path / "fmriprep", participants=("01", "02", "03"), frames=60, seed=1)
    line = ("parcellate", made.root, tmp_path / "out", "participant", "--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}")
    assert brainfm("submit", *line, "--slurm", "mem=100M", "time=0:05", "--dry-run") == 0
    said = capsys.readouterr().out
    found = re.search(
        r"each of 3 participants: about (\d+) MB of memory and (\d+) s.*\n# in all: about ([\d.]+) MB of disk in (\d+) files", said
    )
    assert found is not None, said
    assert "# mem=100M is less than that" in said
    assert "# time=0:05 is less than that" in said
    assert brainfm(*line) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and ("sub-" in path.name)]
    assert int(found[4]) == pytest.approx(len(files), rel=0.1)
    assert 0.5 < float(found[3]) * 1e6 / sum(path.stat().st_size for path in files) < 2


def test_raw_participants_are_estimated_from_their_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_raw(tmp_path / "raw")
    assert brainfm("submit", "preprocess", tmp_path / "raw", tmp_path / "out", "participant", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "each of 2 participants: about 1200 MB of memory" in said
    assert "is less than that" not in said
    (tmp_path / "in" / "sub-01").mkdir(parents=True)
    assert brainfm("submit", "preprocess", tmp_path / "in", tmp_path / "out", "participant", "--dry-run") == 0
    assert "nothing here says what they will need" in capsys.readouterr().out


def test_status_of_a_large_dataset_shows_what_needs_something(tmp_path: Path, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(fake, "sbatch", "echo 50")
    out = tmp_path / "out"
    submit_jobs(
        out,
        [ARRAY.model_copy(update={"labels": tuple(f"{number:03d}" for number in range(250))})],
        brainfm=("brainfm",),
        resumes=False,
    )
    for number in range(300):
        record = UnitRecord(
            unit=f"sub-{number:03d}", command="parcellate", status="running" if number < 3 else "done", configuration_hash="0"
        )
        write_text(record_path(out, record.unit), record.model_dump_json())
    write_text(out / "dataset_description.json", json.dumps({"GeneratedBy": [{"ConfigurationHash": "0"}]}))
    program(fake, "squeue", 'for i in $(seq 250); do echo "50_$i|PENDING|Priority|"; done')
    (fake / "seq").symlink_to(shutil.which("seq") or "/bin/true")
    assert brainfm("status", out) == 0
    said = capsys.readouterr().out
    assert said.count("interrupted") == 4  # three lines and their number
    assert "297 more, those that are current left out first" in said
    assert "50 more of them; --json lists all" in said
