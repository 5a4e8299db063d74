"""Every parser of files that others wrote, fed with damaged and hostile bytes: it reads them, or names what is wrong; nothing else.

A short search runs with the suite; the long one (marked long) is noted in docs/reliability.md.
"""

from __future__ import annotations

import gzip
import json
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_tensors

from brainfm_cli.atlases.datasets import dataset_atlases, read_region_table
from brainfm_cli.bids.cohort import Cohort, open_store, read_participants
from brainfm_cli.bids.images import load_image, read_voxels
from brainfm_cli.bids.names import ENTITY_ORDER, atlas_entities, format_name, parse_name, strip_prefix
from brainfm_cli.bids.people import copy_participants, linked_datasets
from brainfm_cli.bids.raw_headers import check_run, check_volume
from brainfm_cli.bids.stimuli import StimulusSettings, read_stimuli
from brainfm_cli.bids.trials import read_trial_table
from brainfm_cli.config import Settings, read_execution
from brainfm_cli.errors import BrainFMError
from brainfm_cli.learning.checkpoints import read_model_config, read_provenance, read_tensors
from brainfm_cli.learning.reading_table import ReaderStudySettings, read_readings
from brainfm_cli.learning.texts import read_disorders, read_networks
from brainfm_cli.learning.tuned import read_held_out, read_seen
from brainfm_cli.programs.slurm import Resources, read_submissions, seconds
from brainfm_cli.provenance import read_record
from brainfm_cli.signals.denoise import Denoising, read_nuisance
from brainfm_cli.signals.volumes import open_series
from brainfm_cli.stages.parcellate import ParcellateSettings
from brainfm_cli.stages.simulate import SimulateSettings
from tests import synthetic_bids as synthetic

SHORT, LONG = 25, 300


@dataclass(frozen=True)
class Parser:
    """One parser, and a file that it likes."""

    file: str
    """Where the file lies in a private folder."""
    good: bytes
    """A file that it reads, from which damaged ones are made."""
    read: Callable[[Path, Path], object]
    """Called with the file and the folder."""
    packed: bool = False
    """Whether the file is damaged before it is compressed, so that the damage reaches the parser."""


def text(values: object) -> bytes:
    return json.dumps(values).encode()


def image() -> bytes:
    made = nib.Nifti1Image(np.arange(4 * 4 * 4 * 3, dtype=np.int16).reshape(4, 4, 4, 3), synthetic.AFFINE)
    made.header.set_xyzt_units("mm", "sec")
    return made.to_bytes()


def all_frames(path: Path) -> int:
    with open_series(path) as (_, volumes):
        return sum(1 for _ in volumes)


def confounds() -> bytes:
    table, _ = synthetic.confounds(40, 2.0, np.random.default_rng(1))
    return table.to_csv(sep="\t", index=False, na_rep="n/a").encode()


def npy() -> bytes:
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 4), }"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n" + np.arange(20, dtype="<f4").tobytes()


def cohort(folder: Path) -> Cohort:
    """A cohort of two runs, of which one file has been damaged."""
    root = folder / "cohort"
    rows = {"dataset": "a", "participant": ["01", "02"], "session": "", "run": "task-rest", "site": "", "repetition_time": 2.0}
    rows |= {"atlas": "Four", "frames": [2, 3], "offset": [0, 2], "mean_fd": 0.1, "kept_fraction": 1.0}
    others = {
        "participants.tsv": b"participant_id\tage\n01\t3\n02\t4\n",
        "atlas-Four.npy": npy(),
        "atlas-Four.json": text({"names": list("abcd"), "networks": [], "centroids_mm": None, "template": "T"}),
    }
    for name, content in others.items():
        if not (root / name).exists():
            (root / name).write_bytes(content)
    if not (root / "index.parquet").exists():
        pd.DataFrame(rows).to_parquet(root / "index.parquet")
    found = Cohort.open(folder)
    for row in found.index.itertuples():
        found.series(row)
    return found


def atlases(folder: Path) -> object:
    """The atlas dataset around a damaged file."""
    if not (folder / "tpl-T").exists():
        (folder / "tpl-T").mkdir()
    if not (folder / "tpl-T" / "tpl-T_atlas-A_dseg.nii.gz").exists():
        (folder / "tpl-T" / "tpl-T_atlas-A_dseg.nii.gz").write_bytes(b"")
    if not (folder / "tpl-T" / "tpl-T_atlas-A_dseg.tsv").exists():
        (folder / "tpl-T" / "tpl-T_atlas-A_dseg.tsv").write_text("index\tname\n1\ta\n")
    return dataset_atlases(folder)


MODEL = yaml.safe_dump({"format": 1, "system": {"kind": "brain-graph", "preset": "tiny"}, "atlases": {"A": {"template": "T", "regions": ["a", "b"]}}}).encode()  # fmt: skip
SETTINGS = ParcellateSettings().to_yaml().encode()
LABELS = b"labels:\n  sick:\n    a: {column: dx, classes: {1: ill, 0: well}, missing: [-9], where: {group: [x]}}\n    b: null\n"
SUBMISSION = text({"name": "s", "submitted": "now", "jobs": [{"role": "single", "job_id": "7", "argv": ["pretrain"], "resources": {"options": {"mem": "4G"}}}]})  # fmt: skip
READINGS = ("reader\tcase\tarm\tscore\ttruth\n" + "".join(f"r{r}\tc{c}\t{arm}\t0.{c}{r}\t{c % 2}\n" for r in (1, 2) for c in range(8) for arm in ("alone", "aided"))).encode()  # fmt: skip
PARSERS = {
    "participants table": Parser("participants.tsv", b"participant_id\tage\nsub-01\t3\nsub-02\tn/a\n", lambda p, _: read_participants(p)),
    "participants copied": Parser("a/participants.tsv", b"participant_id\tage\nsub-01\t3\n", lambda p, f: copy_participants(p, f / "o", ["01"])),
    "region table": Parser("r.tsv", b"index\tname\tnetwork\n0\tair\tn/a\n1\ta\tVis\n2\tb\tDefault\n", lambda p, _: read_region_table(p)),
    "atlas description": Parser("atlas-A_description.json", text({"Name": "A", "License": "CC0", "ReferencesAndLinks": ["x"]}), lambda _, f: atlases(f)),
    "atlas table": Parser("tpl-T/tpl-T_atlas-A_dseg.tsv", b"index\tname\n1\ta\n", lambda _, f: atlases(f)),
    "dataset description": Parser("dataset_description.json", text({"DatasetLinks": {"a": "../a"}, "SourceDatasets": [{"URL": "file://b"}]}), lambda _, f: linked_datasets(f)),
    "confounds": Parser("c.tsv", confounds(), lambda p, _: read_nuisance(p, Denoising(), num_frames=40, repetition_time_s=2.0)),
    "trials": Parser("t.tsv", b"stim_id\tonset\na\t1\nb\t2\n", lambda p, _: read_trial_table(p)),
    "stimuli": Parser("stimuli/stimuli.tsv", b"stim_id\tstim_file\tcaption_1\na\ta.png\tA cat.\n", lambda _, f: read_stimuli(f, StimulusSettings())),
    "captions": Parser("k.json", text({"a": ["A cat."], "b": []}), lambda p, f: read_stimuli(f, StimulusSettings(captions=p))),
    "readings": Parser("r.tsv", READINGS, lambda p, _: read_readings(p, ReaderStudySettings())),
    "disorders, TSV": Parser("d.tsv", b"name\tabbreviation\tdescription\nA\ta\tless\n", lambda p, _: read_disorders(p)),
    "disorders, YAML": Parser("d.yaml", b"disorders:\n- {name: A, abbreviation: a, description: less}\n", lambda p, _: read_disorders(p)),
    "words of networks": Parser("n.yaml", b"networks:\n- {name: Vis, words: visual, labels: [Vis], aliases: [visual]}\n", lambda p, _: read_networks(p)),
    "NIfTI header": Parser("v.nii", image(), lambda p, _: (check_volume(p, diffusion=True), check_run(p, {"RepetitionTime": 2.0}))),
    "NIfTI voxels": Parser("v.nii", image(), lambda p, _: read_voxels(p, load_image(p))),
    "NIfTI, compressed": Parser("v.nii.gz", image(), lambda p, _: read_voxels(p, load_image(p)), packed=True),
    "NIfTI, damaged gzip": Parser("v.nii.gz", gzip.compress(image(), mtime=0), lambda p, _: read_voxels(p, load_image(p))),
    "NIfTI series": Parser("s.nii", image(), lambda p, _: all_frames(p)),
    "NIfTI series, compressed": Parser("s.nii.gz", image(), lambda p, _: all_frames(p), packed=True),
    "NIfTI series, damaged gzip": Parser("s.nii.gz", gzip.compress(image(), mtime=0), lambda p, _: all_frames(p)),
    "settings": Parser("c.yaml", SETTINGS, lambda p, _: (ParcellateSettings.read(p), read_execution(p, (), {}))),
    "labels and codings": Parser("c.yaml", LABELS, lambda p, _: ParcellateSettings.read(p)),
    "settings of another command": Parser("c.yaml", SimulateSettings().to_yaml().encode(), lambda p, _: SimulateSettings.read(p)),
    "store": Parser("a.npy", npy(), lambda p, _: open_store(p, "the store", fix="pack again")),
    "cohort's atlas": Parser("cohort/atlas-Four.json", text({"names": list("abcd"), "networks": [], "centroids_mm": None, "template": "T"}), lambda _, f: cohort(f)),
    "cohort's store": Parser("cohort/atlas-Four.npy", npy(), lambda _, f: cohort(f)),
    "cohort's participants": Parser("cohort/participants.tsv", b"participant_id\tage\n01\t3\n02\t4\n", lambda _, f: cohort(f)),
    "model configuration": Parser("config.yaml", MODEL, lambda _, f: read_model_config(f)),
    "model provenance": Parser("provenance.json", text({"pretrained_on": ["a"], "validated_on": [], "tuned_on": ["b"]}), lambda _, f: (read_provenance(f), read_seen(f))),
    "checkpoint": Parser("model.safetensors", save_tensors({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int64)}), lambda p, _: read_tensors(p)),
    "held-out predictions": Parser("held_out.tsv", b"participant_hash\tobserved\tpredicted0\tpredicted1\nab\t1\t0.2\t0.8\n", lambda p, _: read_held_out(p, ["x"], {"x": "d"})),
    "submission": Parser("logs/slurm/s/submission.json", SUBMISSION, lambda _, f: read_submissions(f)),
    "record": Parser("r.json", text({"unit": "a", "command": "b", "status": "done", "configuration_hash": "0"}), lambda p, _: read_record(p)),
}  # fmt: skip
SPICE = st.sampled_from(
    [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 1200, b"{" * 1200, b"&a [*a]", b"!!python/name:os.system", b"\t", b"\n", b"\r", b'"', b"-1", b"1e999",
     b"nan", b"null", b"true", b"2001-99-99", b"9" * 5000, b"../../x", b"<script>", b"=1+1", b"n/a", b"{}", b"[]", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff"]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """``good`` with parts cut, doubled, overwritten or filled with what parsers dislike; sometimes nothing of it is left."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | SPICE)
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 2, 4, 16, len(data)])))
        data[start:end] = draw(SPICE | st.binary(max_size=8) | st.just(bytes(data[start:end]) * 2))
    return bytes(data)


def named(call: Callable[[], object]) -> None:
    """The call succeeds or ends with an error of ours that can be shown."""
    try:
        call()
    except BrainFMError as caught:
        error = caught
    else:
        return
    assert str(error)
    assert error.exit_code not in {0, 1}


def search(parser: Parser, examples: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = folder / parser.file
        path.parent.mkdir(parents=True, exist_ok=True)

        def put(data: bytes) -> None:
            path.write_bytes(gzip.compress(data, 1) if parser.packed else data)

        put(parser.good)
        parser.read(path, folder)  # without damage it is read

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=examples == SHORT, suppress_health_check=list(HealthCheck)
        )
        @given(damaged(parser.good))
        def run(data: bytes) -> None:
            put(data)
            named(lambda: parser.read(path, folder))

        run()


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_are_read_or_named(name: str) -> None:
    search(PARSERS[name], SHORT)


@pytest.mark.long
@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_are_read_or_named_long(name: str) -> None:
    search(PARSERS[name], LONG)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_is_a_file_name(name: str) -> None:
    entities, _, extension = parse_name(name)
    assert all(set(label) <= {*string.ascii_letters, *string.digits, "+"} for label in entities.values())
    assert name.endswith(extension)
    named(lambda: atlas_entities(name))
    named(lambda: strip_prefix([name], "sub"))


LABEL = st.text(string.ascii_letters + string.digits + "+", min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(ENTITY_ORDER), LABEL, min_size=1),
    st.sampled_from(["bold", "T1w", "relmat"]),
    st.sampled_from([".nii.gz", ".tsv", ""]),
)
def test_names_come_back(entities: dict[str, str], suffix: str, extension: str) -> None:
    assert parse_name(format_name(entities, suffix, extension)) == (entities, suffix, extension)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.sampled_from(["mem", "time", "throttle", "extra", "comment"]))
def test_options_of_a_job_are_read_or_named(value: str, key: str) -> None:
    named(lambda: Resources.parse([value]))
    named(lambda: Resources.parse([f"{key}={value}"]))
    named(lambda: seconds(value))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.sampled_from(["min_coverage", "denoise.strategy", "labels.x.y", "execution.nprocs", ""]))
def test_settings_of_a_command_line_are_read_or_named(value: str, key: str) -> None:
    def read() -> Settings:
        read_execution(None, [f"{key}={value}"], {})
        return ParcellateSettings.read(None, [f"{key}={value}"])

    named(read)
