"""Bad input to every command, a line each: it ends with a named error and its code, without traceback, and leaves nothing half-written.

Rows marked hostile are what an attacker would send: bombs, pickles, paths that leave the dataset, bytes that no parser likes.
"""

from __future__ import annotations

import functools
import gzip
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import typer.main
import yaml

from tests import synthetic_bids as synthetic
from tests.bad_input_bench import ATLAS, Bench, Case, failures, half_written, tree

Spoil = Callable[[Case], object]
SPACE = f"space-{synthetic.TEMPLATE}_res-2"
DEEP = "[" * 100_000
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
PICKLE = pickle.dumps({"weight": print})


@dataclass(frozen=True)
class Row:
    """One bad input."""

    name: str
    """What is wrong."""
    line: str
    """The command line; ``{raw}`` and the like are filled in."""
    code: int
    """Exit code."""
    says: str
    """Words of the error, as they are shown or recorded."""
    spoil: Spoil = lambda case: None
    """What is done to a private copy of the input."""
    hostile: bool = False
    """Whether somebody must have meant it."""


def write(name: str, file: str, content: str | bytes) -> Spoil:
    """Overwrite (or add) a file of a copied input."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def cut(name: str, file: str, share: float = 0.5) -> Spoil:
    """Keep only the first part of a file."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return spoil


def remove(name: str, file: str) -> Spoil:
    return lambda case: (case.copy(name) / file).unlink()


def replace(name: str, file: str, old: str, new: str) -> Spoil:
    """Change a text file."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        text = path.read_text()
        assert old in text, text
        path.write_text(text.replace(old, new))

    return spoil


def values(name: str, file: str, change: Callable[[dict], object]) -> Spoil:
    """Change a JSON or YAML file."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        read = yaml.safe_load(path.read_text())
        change(read)
        path.write_text(json.dumps(read) if path.suffix == ".json" else yaml.safe_dump(read))

    return spoil


def table(name: str, file: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Spoil:
    """Change a TSV or parquet table."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        if path.suffix == ".parquet":
            change(pd.read_parquet(path)).to_parquet(path)
        else:
            change(pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)).to_csv(path, sep="\t", index=False)

    return spoil


def header(name: str, file: str, at: int, form: str, *new: float) -> Spoil:
    """Change fields of a NIfTI header, ``at`` bytes from its start."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        data = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into(form, data, at, *new)
        path.write_bytes(gzip.compress(bytes(data)))

    return spoil


def image(name: str, file: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Change the numbers of an image."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        read = nib.load(path)
        nib.save(nib.Nifti1Image(change(np.asarray(read.dataobj)), read.affine), path)

    return spoil


def link(name: str, file: str, target: str) -> Spoil:
    """Put a symbolic link in a file's place."""

    def spoil(case: Case) -> None:
        path = case.copy(name) / file
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return spoil


def file(name: str, content: str | bytes) -> Spoil:
    """A file in the private folder, ``{place}/name``."""
    return lambda case: case.file(name, content)


def both(*spoils: Spoil) -> Spoil:
    return lambda case: [spoil(case) for spoil in spoils]


def column(frame: pd.DataFrame, name: str, value: object) -> pd.DataFrame:
    """The table with one cell of the first row changed."""
    changed = frame.copy()
    changed[name] = [value, *frame[name][1:]]
    return changed


def npy(shape: str, descr: str = "'<f4'") -> bytes:
    """A .npy file of 128 bytes that claims to hold more."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def safetensors(head: str, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(head) if length is None else length) + head.encode()


# fmt: off
T1W, BOLD, SIDECAR = (f"sub-01/{name}" for name in ("anat/sub-01_T1w.nii.gz", "func/sub-01_task-rest_bold.nii.gz", "func/sub-01_task-rest_bold.json"))
PRE = "preprocess {raw} {out} participant --participant-label 01"
PREPROCESS = [
    Row("absent", "preprocess {place}/none {out} participant", 66, "the input folder does not exist"),
    Row("no description", PRE, 66, "has no dataset_description.json", remove("raw", "dataset_description.json")),
    Row("description is no JSON", PRE, 65, "the dataset description is not readable JSON", write("raw", "dataset_description.json", "{")),
    Row("description bomb", PRE, 65, "nested too deeply", write("raw", "dataset_description.json", DEEP), hostile=True),
    Row("derivative", PRE, 65, "is a derivative", values("raw", "dataset_description.json", lambda v: v.update(DatasetType="derivative"))),
    Row("label leaves the root", "preprocess {raw} {out} participant --participant-label ../../etc", 2, "is no BIDS label", hostile=True),
    Row("unknown participant", "preprocess {raw} {out} participant --participant-label 99", 66, "no data for participant 99"),
    Row("unknown engine", PRE + " --engine magic", 78, "'engine'"),
    Row("unknown setting", PRE + " --set embedded.nonsense=1", 78, "unknown field"),
    Row("no such task", PRE + " --task-id nothing", 66, "there is no BOLD run"),
    Row("empty image", PRE, 65, "the image cannot be read: it has 0 bytes", write("raw", T1W, b"")),
    Row("cut image", PRE, 65, "ended before the end-of-stream", cut("raw", T1W)),
    Row("text instead of an image", PRE, 65, "is not a gzip file", write("raw", T1W, "<html>not found</html>")),
    Row("image of 10^18 voxels", PRE, 65, "the header promises 32767×32767×32767 numbers", header("raw", T1W, 40, "<4h", 3, 32767, 32767, 32767), hostile=True),
    Row("image of negative size", PRE, 65, "the image is empty: its shape is 8×-8×8", header("raw", T1W, 40, "<4h", 3, 8, -8, 8), hostile=True),
    Row("image of no known type", PRE, 65, "data code 12345 not recognized", header("raw", T1W, 70, "<h", 12345), hostile=True),
    Row("structural series", PRE, 65, "must be one volume", image("raw", T1W, lambda d: np.stack([d, d], 3))),
    Row("one volume as BOLD", PRE, 65, "must be a series", image("raw", BOLD, lambda d: d[..., 0])),
    Row("no repetition time", PRE, 65, "RepetitionTime is missing", write("raw", SIDECAR, "{}")),
    Row("repetition time in words", PRE, 65, "RepetitionTime is 'two'", write("raw", SIDECAR, '{"RepetitionTime": "two"}')),
    Row("infinite repetition time", PRE, 65, "RepetitionTime is inf", write("raw", SIDECAR, '{"RepetitionTime": 1e999}')),
    Row("slice timing too short", PRE, 65, "SliceTiming has 2 values", values("raw", SIDECAR, lambda v: v.update(SliceTiming=[0, 1]))),
    Row("slice timing without numbers", PRE, 65, "SliceTiming has", values("raw", SIDECAR, lambda v: v.update(SliceTiming=[None] * 8))),
    Row("sidecar bomb", PRE, 65, "cannot be indexed", write("raw", SIDECAR, DEEP), hostile=True),
    Row("sidecar is a list", PRE, 65, "cannot be indexed", write("raw", SIDECAR, "[1]")),
    Row("sidecar is no UTF-8", PRE, 65, "cannot be indexed", write("raw", SIDECAR, b'{"TaskName": "\xff\xfe"}')),
    Row("sidecar with a NUL byte", PRE, 65, "cannot be indexed", write("raw", SIDECAR, b'{"RepetitionTime"\0: 2}')),
    Row("broken link", PRE, 65, "is a broken link", link("raw", T1W, "../../../gone.nii.gz")),
    Row("link to itself", PRE, 65, "is a broken link", link("raw", T1W, "sub-01_T1w.nii.gz"), hostile=True),
    Row("echo without a number", PRE, 65, "'one' is no number of an echo", lambda c: [(p := c.copy("raw") / BOLD).rename(p.with_name("sub-01_task-rest_echo-one_bold.nii.gz"))]),
    Row("filters absent", PRE + " --bids-filter-file {place}/none.json", 78, "the filter file does not exist"),
    Row("filters bomb", PRE + " --bids-filter-file {place}/f.json", 78, "nested too deeply", file("f.json", DEEP), hostile=True),
    Row("filters are a list", PRE + " --bids-filter-file {place}/f.json", 78, "must map query names", file("f.json", "[]")),
    Row("too little memory", PRE + " --mem-mb 1", 75, "need about 1200 MB"),
    Row("nobody done", "preprocess {raw} {out} group", 66, "no finished participant"),
    Row("output is the input", "preprocess {raw} {raw} participant", 73, "output and input are the same folder"),
    Row("output in a file", "preprocess {raw} {place}/f/out participant", 73, "cannot be written", file("f", "x")),
    Row("fMRIPrep option that it decides", PRE + " -- --participant-label 02", 78, "options cannot be used with engine embedded"),
]

FMRI = "data/sub-01/func/sub-01_task-rest_"
IMAGE, MASK, CONFOUNDS = (f"{FMRI}{end}" for end in (f"{SPACE}_desc-preproc_bold.nii.gz", f"{SPACE}_desc-brain_mask.nii.gz", "desc-confounds_timeseries.tsv"))
META = IMAGE.replace(".nii.gz", ".json")
DSEG = f"atlases/tpl-{synthetic.TEMPLATE}/tpl-{synthetic.TEMPLATE}_atlas-{synthetic.ATLAS}_dseg"
PAR = f"parcellate {{fmriprep}} {{out}} participant --participant-label 01 --atlases {synthetic.ATLAS} --datasets tests={{atlases}}"
PACK = "parcellate {viewing} {out} group --trials"
MAP, TRIALS = (f"sub-0001/func/sub-0001_task-viewing_{end}" for end in ("MAP", "TRIALS"))
PARCELLATE = [
    Row("raw data", "parcellate {raw} {out} participant", 66, "raw BIDS is preprocessed first"),
    Row("input is a file", "parcellate {place}/f {out} participant", 66, "does not exist", file("f", "x")),
    Row("unknown atlas", "parcellate {fmriprep} {out} participant --atlases Schaefer101", 66, "did you mean Schaefer100"),
    Row("atlas that is a path", "parcellate {fmriprep} {out} participant --atlases ../../etc/passwd", 66, "no atlas is called '../../etc/passwd'", hostile=True),
    Row("coverage above one", PAR + " --min-coverage 1.5", 2, "'--min-coverage'"),
    Row("coverage is not a number", PAR + " --min-coverage nan", 2, "'--min-coverage'"),
    Row("unknown strategy", PAR + " --denoise-strategy magic", 78, "denoise.strategy"),
    Row("two datasets of one name", PAR + " other={raw} other={fmriprep}", 2, "two datasets are called 'other'"),
    Row("series of 10^18 voxels", PAR, 65, "the header promises 32767×32767×32767 numbers", header("fmriprep", IMAGE, 40, "<5h", 4, 32767, 32767, 32767, 32767), hostile=True),
    Row("series with a header of text", PAR, 65, "the image is no NIfTI file", write("fmriprep", IMAGE, gzip.compress(b"A" * 1000)), hostile=True),
    Row("series that is a pickle", PAR, 65, "the image is no intact gzip file", write("fmriprep", IMAGE, PICKLE), hostile=True),
    Row("series with data after the end", PAR, 65, "the image ends within frame 0 of 60", header("fmriprep", IMAGE, 108, "<f", 1e9), hostile=True),
    Row("series placed nowhere", PAR, 65, "the image's affine is singular", header("fmriprep", IMAGE, 280, "<4f", np.nan, np.nan, np.nan, np.nan)),
    Row("mask of another grid", PAR, 65, "grid", image("fmriprep", MASK, lambda d: d[:4])),
    Row("no mask", PAR, 65, "no brain mask", remove("fmriprep", MASK)),
    Row("metadata bomb", PAR, 65, "nested too deeply", write("fmriprep", META, DEEP), hostile=True),
    Row("repetition time is true", PAR, 65, "RepetitionTime is True", values("fmriprep", META, lambda v: v.update(RepetitionTime=True))),
    Row("confounds with a formula", PAR, 65, "confound 'trans_x' holds text", table("fmriprep", CONFOUNDS, lambda t: column(t, "trans_x", "=1+cmd|' /C calc'!A0")), hostile=True),
    Row("confounds with NUL bytes", PAR, 65, "the confounds table has 59 rows", write("fmriprep", CONFOUNDS, b"trans_x\ttrans_y\n\0\0\t\0\n" * 30), hostile=True),
    Row("confounds are no UTF-8", PAR, 65, "the confounds table is unreadable", write("fmriprep", CONFOUNDS, "trans_x\né\n".encode("latin-1") * 30)),
    Row("confounds of 0 bytes", PAR, 65, "the confounds table is unreadable", write("fmriprep", CONFOUNDS, b"")),
    Row("compcor bomb", PAR + " --denoise-strategy compcor", 65, "nested too deeply", write("fmriprep", CONFOUNDS.replace(".tsv", ".json"), DEEP), hostile=True),
    Row("atlas table with NUL bytes", PAR, 65, "region table", write("fmriprep", DSEG + ".tsv", b"index\tname\n1\t\0\n\0\tb\n"), hostile=True),
    Row("atlas table is no UTF-8", PAR, 65, "the region table is unreadable", write("fmriprep", DSEG + ".tsv", b"index\tname\n1\t\xff\n")),
    Row("atlas table with half an index", PAR, 65, "an index that is no integer", write("fmriprep", DSEG + ".tsv", "index\tname\n1.5\ta\n")),
    Row("atlas table without rows", PAR, 65, "no rows", write("fmriprep", DSEG + ".tsv", "index\tname\n")),
    Row("atlas image of 10^13 voxels", PAR, 65, "the header promises", header("fmriprep", DSEG + ".nii.gz", 40, "<4h", 3, 32767, 32767, 32767), hostile=True),
    Row("atlas bomb", PAR, 65, "nested too deeply", write("fmriprep", f"atlases/atlas-{synthetic.ATLAS}_description.json", DEEP), hostile=True),
    Row("atlas dataset absent", f"parcellate {{fmriprep}} {{out}} participant --atlases {synthetic.ATLAS} --datasets t={{place}}/none", 66, "no atlas is called 'Quad4'"),
    Row("settings absent", PAR + " --config {place}/none.yaml", 78, "the settings file does not exist"),
    Row("settings laugh a billion times", PAR + " --config {place}/c.yaml", 78, "aliases", file("c.yaml", LAUGHS), hostile=True),
    Row("settings that run code", PAR + " --config {place}/c.yaml", 78, "could not determine a constructor", file("c.yaml", "a: !!python/object/apply:os.system [id]"), hostile=True),
    Row("settings nested too deeply", PAR + " --config {place}/c.yaml", 78, "nested too deeply", file("c.yaml", "a: " + DEEP[:1500]), hostile=True),
    Row("settings are no UTF-8", PAR + " --config {place}/c.yaml", 78, "cannot be read", file("c.yaml", b"a: \xff")),
    Row("settings are a list", PAR + " --config {place}/c.yaml", 78, "holds no mapping", file("c.yaml", "- 1")),
    Row("execution is a list", PAR + " --config {place}/c.yaml", 78, "'execution' must be a mapping", file("c.yaml", "execution: [1]")),
    Row("a day that does not exist", PAR + " --set space=2001-99-99", 78, "is not YAML"),
    Row("labels of another dataset", "parcellate {series} {out} group --set labels={x:{other:{column:a,continuous:true}}}", 78, "'labels.x.other.column': Field required"),
    Row("packed cohort has no participants", "parcellate {series} {out} participant", 2, "which has no participant level"),
    Row("template runs code", PACK + " --set stimuli.template='{category.__class__}'", 78, "cannot be filled", hostile=True),
    Row("caption bomb", PACK + " --set stimuli.captions={place}/c.json", 65, "nested too deeply", file("c.json", DEEP), hostile=True),
    Row("captions are numbers", PACK + " --set stimuli.captions={place}/c.json", 65, "is no sentence", file("c.json", '{"a": [1]}')),
]

TRAIN = "pretrain {series} {out} group --device cpu --set system.kind=brain-graph system.preset=tiny epochs=1 steps=1"
INDEX, STORE, REGIONS, TABLE = (f"cohort/{name}" for name in ("index.parquet", f"atlas-{ATLAS}.npy", f"atlas-{ATLAS}.json", "participants.tsv"))
PRETRAIN = [
    Row("not packed", "pretrain {fmriprep} {out} group --system brain-graph --device cpu", 66, "no packed cohort here"),
    Row("unknown system", "pretrain {series} {out} group --system brain-magic --device cpu", 78, "system.kind"),
    Row("no system", "pretrain {series} {out} group --device cpu", 78, "system"),
    Row("unknown device", "pretrain {series} {out} group --system brain-graph --device quantum", 78, "device 'quantum' is unknown"),
    Row("no level", "pretrain {series} {out} participant", 2, "has no level 'participant'"),
    Row("index of text", TRAIN, 65, "the cohort index is unreadable", write("series", INDEX, "participant")),
    Row("index of 0 bytes", TRAIN, 65, "the cohort index is unreadable", write("series", INDEX, b"")),
    Row("cut index", TRAIN, 65, "the cohort index is unreadable", cut("series", INDEX)),
    Row("index lacks columns", TRAIN, 65, "the cohort index lacks offset", table("series", INDEX, lambda t: t.drop(columns="offset"))),
    Row("offsets in words", TRAIN, 65, "'offset' of the cohort index", table("series", INDEX, lambda t: t.assign(offset="a lot"))),
    Row("negative offset", TRAIN, 65, "'offset' of the cohort index", table("series", INDEX, lambda t: column(t, "offset", -5))),
    Row("participant leaves the root", TRAIN, 65, "the participant '../../evil', which is no BIDS label", both(table("series", INDEX, lambda t: column(t, "participant", "../../evil")), table("series", TABLE, lambda t: column(t, "participant_id", "../../evil"))), hostile=True),
    Row("participant is HTML", TRAIN, 65, "the participant '<script>alert(1)</script>', which is no BIDS label", both(table("series", INDEX, lambda t: column(t, "participant", "<script>alert(1)</script>")), table("series", TABLE, lambda t: column(t, "participant_id", "<script>alert(1)</script>"))), hostile=True),
    Row("atlas leaves the root", TRAIN, 65, "the atlas '../../../etc/passwd', which is no BIDS label", table("series", INDEX, lambda t: column(t, "atlas", "../../../etc/passwd")), hostile=True),
    Row("person without a row", TRAIN, 65, "are not in participants.tsv", table("series", TABLE, lambda t: t.iloc[1:])),
    Row("person twice", TRAIN, 65, "twice", table("series", TABLE, lambda t: pd.concat([t, t.iloc[:1]]))),
    Row("table with NUL bytes", TRAIN, 65, "24 participants of the index are not in participants.tsv", write("series", TABLE, b"participant_id\tage\n\0\t1\n"), hostile=True),
    Row("table is no UTF-8", TRAIN, 65, "participants.tsv is unreadable", write("series", TABLE, b"participant_id\n\xff\n")),
    Row("table absent", TRAIN, 66, "participants.tsv is absent", remove("series", TABLE)),
    Row("cut store", TRAIN, 65, "series store", cut("series", STORE)),
    Row("store of 0 bytes", TRAIN, 65, "the series store is unreadable", write("series", STORE, b"")),
    Row("store is a pickle", TRAIN, 65, "the series store is unreadable", write("series", STORE, PICKLE), hostile=True),
    Row("store of pickled objects", TRAIN, 65, "the series store", write("series", STORE, npy("(2000, 100)", "'|O'")), hostile=True),
    Row("store of 10^18 numbers", TRAIN, 65, "the series store", write("series", STORE, npy("(10**9, 10**9)".replace("10**9", "1000000000"))), hostile=True),
    Row("store of negative size", TRAIN, 65, "the series store", write("series", STORE, npy("(-1, 100)")), hostile=True),
    Row("store of text", TRAIN, 65, "the series store holds <U4, not float32", write("series", STORE, npy("(2000, 100)", "'<U4'") + b"a\0\0\0" * 800_000), hostile=True),
    Row("atlas bomb", TRAIN, 65, "nested too deeply", write("series", REGIONS, DEEP), hostile=True),
    Row("atlas names are one text", TRAIN, 65, "names and template must be texts", values("series", REGIONS, lambda v: v.update(names="x"))),
    Row("atlas centres in words", TRAIN, 65, "the atlas description is unreadable", values("series", REGIONS, lambda v: v.update(centroids_mm="here"))),
    Row("column to choose by is absent", TRAIN + " where.planet=[Mars]", 78, "planet"),
    Row("nobody chosen", TRAIN + " where.split=[nobody]", 66, "no participant with series matches the filters"),
    Row("negative epochs", TRAIN + " epochs=-1", 78, "'epochs'"),
    Row("half a batch", TRAIN + " batch_size=1.5", 78, "'batch_size'"),
    Row("learning rate is not a number", TRAIN + " optimiser.learning_rate=.nan", 78, "learning_rate"),
    Row("no devices", TRAIN + " execution.devices=0", 78, "invalid settings for execution"),
    Row("unknown preset", "pretrain {series} {out} group --system brain-graph --device cpu --set system.preset=vast", 78, "preset"),
    Row("caption system on regions", "pretrain {series} {out} group --system brain-caption --device cpu", 66, "no packed trials here"),
    Row("slices of a folder without scans", "pretrain {series} {out} group --system mri-language --device cpu", 66, "no structural or diffusion images"),
]

ALIGN_LINE = "align {series} {out} group --device cpu --model {model} --target diagnosis"
TUNE = "prompt-tune {series} {out} group --device cpu --model {model} --target diagnosis_binary --set tuning.epochs=0"
MODELS = [
    Row("align without a model", "align {series} {out} group --target diagnosis", 2, "align needs a model"),
    Row("align with no such model", "align {series} {out} group --device cpu --model {place}/none --target diagnosis", 66, "no model here"),
    Row("align without a target", "align {series} {out} group --device cpu --model {model}", 78, "'target'"),
    Row("align to an absent column", "align {series} {out} group --device cpu --model {model} --target mood", 66, "no column 'mood'"),
    Row("disorders absent", ALIGN_LINE + " --set disorders={place}/none.yaml", 66, "the table is absent"),
    Row("disorders laugh a billion times", ALIGN_LINE + " --set disorders={place}/d.yaml", 65, "aliases", file("d.yaml", LAUGHS), hostile=True),
    Row("disorders are a list of lists", ALIGN_LINE + " --set disorders={place}/d.yaml", 78, "the table is wrong", file("d.yaml", "disorders: [[[]]]")),
    Row("disorders table is no UTF-8", ALIGN_LINE + " --set disorders={place}/d.tsv", 65, "the table is unreadable", file("d.tsv", b"name\tdescription\n\xff\ta\n")),
    Row("words of networks absent", ALIGN_LINE + " --set disorders={place}/d.tsv networks={place}/none.yaml", 66, "a file that this needs is absent", file("d.tsv", "name\tabbreviation\tdescription\nArvel\tARV\tweak links between networks\n")),
    Row("control is no list", ALIGN_LINE + " --set control=5", 78, "'control'"),
    Row("tune without a model", "prompt-tune {series} {out} group --target diagnosis_binary", 2, "prompt-tune needs a model"),
    Row("tune without a target", "prompt-tune {series} {out} group --device cpu --model {model}", 78, "target"),
    Row("tune on an absent column", "prompt-tune {series} {out} group --device cpu --model {model} --target mood", 66, "no column 'mood'"),
    Row("tune on one class", TUNE + " where.diagnosis_binary=[control]", 65, "one class cannot be predicted"),
    Row("tune on labels", "prompt-tune {series} {out} group --device cpu --model {model} --target participant_id", 66, "no column 'participant_id'"),
    Row("no donor", TUNE + " donor={place}/none", 66, "no model here"),
    Row("no inner folds", TUNE + " tuning.inner_folds=1", 78, "inner_folds"),
    Row("model of text", TUNE, 65, "is not a brainfm model's", write("model", "config.yaml", "hello")),
    Row("model of 0 bytes", TUNE, 65, "is not a brainfm model's", write("model", "config.yaml", b"")),
    Row("model is no UTF-8", TUNE, 65, "is not a brainfm model's", write("model", "config.yaml", b"system: \xff")),
    Row("model laughs a billion times", TUNE, 65, "aliases", write("model", "config.yaml", "format: 1\nsystem:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines())), hostile=True),
    Row("model that runs code", TUNE, 65, "could not determine a constructor", write("model", "config.yaml", "system: !!python/object/apply:os.system [id]"), hostile=True),
    Row("model nested too deeply", TUNE, 65, "nested too deeply", write("model", "config.yaml", "system: " + DEEP[:1500]), hostile=True),
    Row("model of another layout", TUNE, 65, "the model has layout 99", values("model", "config.yaml", lambda v: v.update(format=99))),
    Row("model of an unknown system", TUNE, 65, "the model's system 'brain-magic' is unknown", values("model", "config.yaml", lambda v: v["system"].update(kind="brain-magic"))),
    Row("model of another width", TUNE, 65, "71 of another shape", values("model", "config.yaml", lambda v: v["system"].update(width=40))),
    Row("model of other regions", TUNE, 65, "has other regions", values("model", "config.yaml", lambda v: v["atlases"][ATLAS]["regions"].reverse())),
    Row("weights of 0 bytes", TUNE, 65, "the weights are unreadable", write("model", "model.safetensors", b"")),
    Row("cut weights", TUNE, 65, "the weights are unreadable", cut("model", "model.safetensors")),
    Row("pickled weights", TUNE, 65, "the weights are unreadable", write("model", "model.safetensors", PICKLE), hostile=True),
    Row("weights with a header of 2^60 bytes", TUNE, 65, "the weights are unreadable", write("model", "model.safetensors", safetensors("{}", 2**60)), hostile=True),
    Row("weights of 10^18 numbers", TUNE, 65, "the weights are unreadable", write("model", "model.safetensors", safetensors('{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}') + b"abcd"), hostile=True),
    Row("weights that hold nothing", TUNE, 65, "the weights do not fit the model", write("model", "model.safetensors", safetensors("{}"))),
    Row("weights absent", TUNE, 66, "the weights are absent", remove("model", "model.safetensors")),
    Row("model without provenance", TUNE, 65, "does not say whom it has seen", remove("model", "provenance.json")),
    Row("provenance bomb", TUNE, 65, "does not say whom it has seen", write("model", "provenance.json", DEEP), hostile=True),
    Row("provenance of text", TUNE, 65, "does not say whom it has seen", write("model", "provenance.json", "hello")),
]

APPLY = "predict {series} {out} participant --device cpu --model {tuned} --stop-on-first-crash --set where.split=[holdout]"
EVALUATE = "predict {series} {out} group --device cpu --model {tuned} --set where.split=[holdout]"
READ = "predict {series} {out} group --reader-study {place}/r.tsv"
PREDICT = [
    Row("predict without a model", "predict {series} {out} participant", 2, "predict needs a model"),
    Row("predict with an untuned model", "predict {series} {out} participant --device cpu --model {model}", 66, "not tuned for a target"),
    Row("predict nobody", APPLY + " --participant-label 9999", 66, "no participant with series matches the filters"),
    Row("no head", APPLY, 66, "the weights are absent", remove("tuned", "head.safetensors")),
    Row("pickled head", APPLY, 65, "the weights are unreadable", write("tuned", "head.safetensors", PICKLE), hostile=True),
    Row("cut head", APPLY, 65, "the weights are unreadable", cut("tuned", "head.safetensors")),
    Row("head of another target", APPLY, 65, "is incomplete", write("tuned", "head.safetensors", safetensors("{}"))),
    Row("tuning without classes", APPLY, 78, "two classes", values("tuned", "config.yaml", lambda v: v["tuning"].pop("classes"))),
    Row("tuning with a weight in words", APPLY, 78, "weights", values("tuned", "config.yaml", lambda v: v["tuning"].update(weights={ATLAS: "much"}))),
    Row("whom it has seen is not said", APPLY, 65, "does not say whom it has seen", write("tuned", "provenance.json", "{}")),
    Row("person of the training", "predict {series} {out} group --device cpu --model {tuned} --set refit=never", 65, "those the model was tuned on"),
    Row("held-out predictions of text", EVALUATE, 65, "the held-out predictions are unreadable", write("tuned", "held_out.tsv", "hello")),
    Row("floor that does not exist", EVALUATE + " floors.kinds=[magic]", 78, "floors.kinds"),
    Row("truth bomb", EVALUATE + " -d truth={place}", 65, "truth.json is unreadable: it is nested too deeply", file("truth.json", DEEP), hostile=True),
    Row("truth absent", EVALUATE + " -d truth={place}", 66, "a file that this needs is absent"),
    Row("lock without predictions", "predict {series} {out} group --model {tuned} --lock", 66, "there are no predictions to lock"),
    Row("readings absent", READ, 66, "there is no table of readings"),
    Row("readings of 0 bytes", READ, 65, "the table is unreadable", file("r.tsv", b"")),
    Row("readings without columns", READ, 65, "the table lacks the column 'reader'", file("r.tsv", "a\tb\n1\t2\n")),
    Row("readings with NUL bytes", READ, 65, "the table lacks the column 'arm'", file("r.tsv", b"case\treader\n\0\t\0\n"), hostile=True),
    Row("readings with formulas", READ, 65, "'=2' in 'score' is no number", file("r.tsv", "case\treader\tcondition\tscore\ttruth\n=1+1\t@SUM(A1)\t+cmd\t=2\t1\n"), hostile=True),
    Row("readings are no UTF-8", READ, 65, "the table is unreadable", file("r.tsv", b"case\treader\n\xff\t1\n")),
    Row("reports of nothing", "predict {series} {out} group --device cpu --model {tuned} --reports-only", 66, "no evaluation here"),
]

CAPTION = [
    Row("caption without a model", "caption {voxels} {out} participant", 2, "caption needs a model"),
    Row("caption with a graph model", "caption {voxels} {out} participant --device cpu --model {model}", 78, "have no captions"),
    Row("caption with no such model", "caption {voxels} {out} group --device cpu --model {place}/none", 66, "no model here"),
    Row("caption of a level that is none", "caption {voxels} {out} cohort", 2, "has no level 'cohort'"),
    Row("voxels: cut index", "pretrain {voxels} {out} group --system brain-caption --device cpu", 65, "the packed trials are unreadable", cut("voxels", "cohort/trials.parquet")),
    Row("voxels: stimulus bomb", "pretrain {voxels} {out} group --system brain-caption --device cpu", 65, "nested too deeply", write("voxels", "cohort/stimuli.json", DEEP), hostile=True),
    Row("voxels: stimuli are a list", "pretrain {voxels} {out} group --system brain-caption --device cpu", 65, "the packed trials are unreadable", write("voxels", "cohort/stimuli.json", "[]")),
    Row("voxels: pickled responses", "pretrain {voxels} {out} group --system brain-caption --device cpu", 65, "the store of responses is unreadable", write("voxels", "cohort/voxels-0001.npy", PICKLE), hostile=True),
    Row("voxels: participant leaves the root", "pretrain {voxels} {out} group --system brain-caption --device cpu", 65, "the participant '../../evil', which is no BIDS label", table("voxels", "cohort/trials.parquet", lambda t: column(t, "participant", "../../evil")), hostile=True),
]

SIM = "simulate {out}"
OTHERS = [
    Row("simulate nobody", SIM + " --participants 0", 2, "participants"),
    Row("simulate a negative effect", SIM + " --effect -1", 2, "effect"),
    Row("simulate an effect that is no number", SIM + " --effect nan", 2, "'--effect'"),
    Row("simulate a kind that is none", SIM + " --kind sleep", 78, "'kind'"),
    Row("simulate a level that is none", SIM + " --level deep", 78, "'level'"),
    Row("simulate a trial as images", SIM + " --kind drug --level bold", 78, "region series only"),
    Row("simulate too few frames", SIM + " --set frames=1", 78, "'frames'"),
    Row("simulate an unknown atlas", SIM + " --atlases Schaefer101", 66, "did you mean Schaefer100"),
    Row("simulate an unknown disorder", SIM + " --set population.disorders=[Nothing]", 78, "no disorder is called Nothing"),
    Row("simulate labels that leave the root", SIM + " --set label_prefix=../../", 78, "'label_prefix'", hostile=True),
    Row("simulate a negative seed", SIM + " --seed -1", 2, "seed"),
    Row("simulate into another dataset", "simulate {raw}", 73, "that brainfm did not make"),
    Row("simulate into a file", "simulate {place}/f", 73, "the output folder cannot be written", file("f", "x")),
    Row("simulate more people than there are", SIM + " --set participants=99999999999999999999", 78, "at most a million"),
    Row("assets: unknown action", "assets burn", 2, "assets cannot 'burn'"),
    Row("assets: unknown name", "assets verify Schaefer101", 66, "did you mean Schaefer100"),
    Row("assets: name that is a path", "assets where ../../etc/passwd", 66, "no atlas is called '../../etc/passwd'", hostile=True),
    Row("status of nothing", "status {place}/none", 66, "the folder does not exist"),
    Row("status of a file", "status {place}/f", 66, "the folder does not exist", file("f", "x")),
    Row("status without records", "status {raw}", 66, "no completion records here"),
    Row("status of broken records", "status {place}/o", 66, "no completion records here", file("o/logs/records/sub-01.json", "{")),
    Row("status of record bombs", "status {place}/o", 66, "no completion records here", file("o/logs/records/sub-01.json", DEEP), hostile=True),
    Row("status of a broken submission", "status {place}/o", 65, "the submission is unreadable", file("o/logs/slurm/1/submission.json", "{")),
    Row("status of a submission bomb", "status {place}/o", 65, "the submission is unreadable", file("o/logs/slurm/1/submission.json", DEEP), hostile=True),
    Row("status of a submission elsewhere", "status {place}/o", 65, "it calls itself '../../../..'", file("o/logs/slurm/1/submission.json", '{"name": "../../../..", "submitted": "now", "jobs": []}'), hostile=True),
    Row("status of a submission with an id of shell", "status {place}/o", 65, "the submission is unreadable", file("o/logs/slurm/1/submission.json", json.dumps({"name": "1", "submitted": "now", "jobs": [{"role": "single", "job_id": "--help", "argv": ["pretrain"], "resources": {}}]})), hostile=True),
    Row("submit nothing", "submit", 2, "a command is needed"),
    Row("submit what is not submitted", "submit simulate {out}", 2, "cannot be run elsewhere"),
    Row("submit a wrong option", "submit parcellate {fmriprep} {out} participant --colour red", 2, "colour"),
    Row("submit an unknown participant", "submit parcellate {fmriprep} {out} participant --participant-label 99", 66, "no data for participant 99"),
    Row("submit without a value", PAR.replace("parcellate", "submit parcellate", 1) + " --slurm mem", 78, "is no KEY=VALUE"),
    Row("submit an array of one's own", PAR.replace("parcellate", "submit parcellate", 1) + " --slurm array=1-9", 78, "is set by the submission itself"),
    Row("submit negative memory", PAR.replace("parcellate", "submit parcellate", 1) + " --slurm mem=-4G", 78, "no memory size"),
    Row("submit a time that is none", PAR.replace("parcellate", "submit parcellate", 1) + " --slurm time=soon", 78, "no time limit"),
    Row("resubmit what was never submitted", "submit --resubmit failed {place}", 66, "nothing was submitted"),
    Row("resubmit everything", "submit --resubmit all {place}", 2, "the word 'failed'"),
]
# fmt: on
ROWS = [*PREPROCESS, *PARCELLATE, *PRETRAIN, *MODELS, *PREDICT, *CAPTION, *OTHERS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", autouse=True)
def _parser_built_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # building it takes longer than most rows
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.line.split()[0]}-{row.name.replace(' ', '_')}" for row in ROWS])
def test_bad_input(row: Row, bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    case = Case(bench, tmp_path)
    row.spoil(case)
    case.argument(row.line)  # makes the inputs
    capfd.readouterr()
    caplog.clear()
    before = {name: tree(folder) for name, folder in case.copies.items()}
    code = case.run(row.line)
    shown = capfd.readouterr()
    said = " ".join(f"{shown.err.replace('│', ' ')} {failures(case.out)}".split())
    assert (code, row.says in said, bool(said)) == (row.code, True, True), f"{code}: {said[:1500]}"
    assert "Traceback" not in shown.out + said
    assert half_written(case.out) == []
    assert {name: tree(folder) for name, folder in case.copies.items()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "f", "o", *case.copies, *(path.name for path in tmp_path.glob("*.*"))}


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 100
    assert sum(row.hostile for row in ROWS) >= 10
    assert len({(row.line.split()[0], row.name) for row in ROWS}) == len(ROWS)
    assert {row.line.split()[0] for row in ROWS} == {
        "preprocess", "parcellate", "pretrain", "align", "prompt-tune", "predict", "caption", "simulate", "assets", "submit", "status",
    }  # fmt: skip
