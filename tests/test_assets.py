from __future__ import annotations

import json
from pathlib import Path

import pytest

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UsageError
from brainfm_cli.programs import assets as packaged
from brainfm_cli.stages.assets import assets


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, contents: bytes | None) -> packaged.Asset:
    package = tmp_path / "fake_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a data package must not be imported')")
    if contents is not None:
        (package / "w.bin").write_bytes(contents)
    monkeypatch.syspath_prepend(tmp_path)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of b"abc" (FIPS 180-2)
    return packaged.Asset(
        name="fake", kind="language model", meaning="m", package="fake", version="1", folder="fake_weights", files={"w.bin": digest}, licence="l"
    )  # fmt: skip


def test_a_good_file_verifies_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = fake(tmp_path, monkeypatch, contents=b"abc")
    assert packaged.verify(asset) == tmp_path / "fake_weights"


@pytest.mark.parametrize(("contents", "says"), [(b"", "empty"), (None, "absent"), (b"abd", "checksum")])
def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: bytes | None, says: str) -> None:
    asset = fake(tmp_path, monkeypatch, contents=contents)
    with pytest.raises(InputDatasetError, match=says) as caught:
        packaged.verify(asset)
    assert "brainfm assets get fake" in caught.value.fix


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    asset = packaged.known_assets()[0].model_copy(update={"folder": "no_such_package_at_all/x"})
    with pytest.raises(InputNotFoundError) as caught:
        packaged.locate(asset)
    assert caught.value.fix == f"run: brainfm assets get {asset.name}"


def test_unknown_names_and_actions() -> None:
    with pytest.raises(InputNotFoundError, match="no atlas is called"):
        assets("where", ["Schaefer99"])
    with pytest.raises(UsageError):
        assets("steal", [])


def test_list_is_complete_and_all_installed_assets_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert assets("list", [], as_json=True) == 0
    listed = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert {"Schaefer100", "AAL116", "AAL3v1", "Power264", "smollm2-135m-instruct", "all-minilm-l6-v2"} <= set(listed)
    assert all(line["licence"] for line in listed.values())
    assert assets("verify", ["AAL116", "mni152nlin2009casym-brain"], as_json=True) == 0
    assert {line["state"] for line in json.loads(capsys.readouterr().out)} == {"verified"}
