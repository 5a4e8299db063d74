from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main

from brainfm_cli import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "brainfm_cli", *arguments], capture_output=True, text=True, check=False)


def test_the_flag_list_is_frozen() -> None:
    flags = sorted(
        {
            flag
            for command in typer.main.get_command(cli.app).commands.values()
            for parameter in command.params
            for flag in parameter.opts
            if flag.startswith("-")
        }
    )
    assert flags == [
        "--anat-only", "--atlas", "--atlases", "--bids-database-dir", "--bids-filter-file", "--chat", "--clean-workdir", "--config", "--config-file",
        "--datasets", "--denoise-strategy", "--derivatives", "--device", "--dry-run", "--effect", "--engine", "--fs-license-file",
        "--fs-no-reconall", "--fs-subjects-dir", "--ignore", "--image", "--json", "--kind", "--level", "--lock", "--mem", "--mem-mb",
        "--min-coverage", "--model", "--n-cpus", "--nprocs", "--nthreads", "--omp-nthreads", "--output-spaces", "--participant-label",
        "--participants", "--raw", "--reader-study", "--reports-only", "--resubmit", "--seed", "--session-id", "--session-label", "--set", "--skip-bids-validation",
        "--skip-bids-validator", "--slurm", "--stop-on-first-crash", "--system", "--target", "--task-id", "--trials", "--validate", "--verbose", "--verify",
        "--work-dir", "-d", "-t", "-v", "-w",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--participant_label", "01", "02", "-v"], ["--participant-label", "01", "--participant-label", "02", "-v"]),
        (["in", "out", "group", "-d", "a=x", "b=y"], ["in", "out", "group", "-d", "a=x", "-d", "b=y"]),
        (["--set=a_b=1", "--min_coverage", "0.5"], ["--set=a_b=1", "--min-coverage", "0.5"]),
        (["--atlases", "A", "B", "--", "--raw_flag"], ["--atlases", "A", "--atlases", "B", "--", "--raw_flag"]),
        (["--set", "a=-1", "b=2"], ["--set", "a=-1", "--set", "b=2"]),
    ],
)
def test_bids_app_spellings(typed: list[str], read: list[str]) -> None:
    assert cli.normalise(typed) == read


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv=['brainfm','--help']\nfrom brainfm_cli.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print('HEAVY', sorted({'torch','nipype','nilearn','nibabel','pandas','bids','lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["pretrain", "a", "b", "participant"], 2, "use: group"),
        (["parcellate", "a", "b", "cohort"], 2, "participant or group"),
        (["parcellate", "a", "b", "participant", "--no-such-flag"], 2, "No such option"),
        (["parcellate", "a", "b", "participant", "--participant-label", "../x"], 2, "no BIDS label"),
        (["nothing"], 2, "No such command"),
        (["parcellate", "a"], 2, "Missing argument"),
        (["parcellate", "a", "b", "participant", "--set", "nonsense=1"], 78, "unknown field 'nonsense'"),
        (["status", "no-such-folder"], 66, "does not exist"),
    ],
)
def test_usage_errors_have_codes_and_sentences(arguments: list[str], code: int, says: str) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("brainfm ")


def test_torchvision_is_absent() -> None:
    import importlib.util

    assert importlib.util.find_spec("torchvision") is None
