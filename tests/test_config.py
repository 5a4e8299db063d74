from __future__ import annotations

from pathlib import Path

import pytest

from brainfm_cli.config import Execution, Frozen, Settings, parse_datasets, read_execution
from brainfm_cli.errors import SettingsError, UsageError


class Inner(Frozen):
    num_layers: int = 2
    """Layers."""


class SomeSettings(Settings):
    inner: Inner = Inner()
    """Inner."""
    rate: float = 0.5
    """Rate."""


class Outer(Settings):
    part: SomeSettings = SomeSettings(rate=0.9, inner=Inner(num_layers=7))
    """A part whose defaults here are not its own."""


def test_who_changes_one_field_of_a_part_keeps_the_defaults_that_the_whole_gave_it() -> None:
    settings = Outer.read(None, ["part.rate=0.1"])
    assert (settings.part.rate, settings.part.inner.num_layers) == (0.1, 7)
    deep = Outer.read(None, ["part.inner.num_layers=3"])
    assert (deep.part.rate, deep.part.inner.num_layers) == (0.9, 3)
    assert Outer.read(None, ["part={}"]) == Outer()


def test_a_flip_stays_off_where_another_augmentation_is_changed() -> None:
    from brainfm_cli.systems.mri_language.adaptation import AdaptationSettings

    assert AdaptationSettings.from_values({"augment": {"noise": 0.0}}).augment.flip == 0.0


def test_overrides_win_over_the_file_and_merge_deeply(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("inner:\n  num_layers: 4\nrate: 0.1\nexecution:\n  device: cpu\n")
    settings = SomeSettings.read(path, ["inner.num_layers=8"])
    assert (settings.inner.num_layers, settings.rate) == (8, 0.1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("inner.num_layer=8", "did you mean 'num_layers'"),
        ("rate=fast", "'rate'"),
        ("rate", "a.b=c"),
        ("=1", "a.b=c"),
        ("rate=[1", "not YAML"),
        ("inner=3", "'inner'"),
    ],
)
def test_bad_overrides_are_settings_errors(override: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SomeSettings.read(None, [override])
    assert says in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "- x"])
def test_bad_files_are_settings_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError):
        SomeSettings.read(path)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("!!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(SettingsError):
        SomeSettings.read(path)


def test_digest_depends_on_values_only() -> None:
    assert SomeSettings().digest() == SomeSettings.read(None, ["rate=0.5"]).digest()
    assert SomeSettings().digest() != SomeSettings.read(None, ["rate=0.6"]).digest()


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    settings = SomeSettings.read(None, ["inner.num_layers=3"])
    path.write_text(settings.to_yaml())
    assert SomeSettings.read(path) == settings


def test_execution_flags_win_over_file_and_defaults_do_not(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("execution:\n  nprocs: 4\n  precision: bf16-mixed\n")
    assert read_execution(path, [], {"nprocs": 1}) == Execution(nprocs=4, precision="bf16-mixed")
    assert read_execution(path, ["execution.nprocs=3"], {"nprocs": 8}).nprocs == 8
    with pytest.raises(SettingsError):
        read_execution(None, ["execution.cores=3"], {})


def test_dataset_names() -> None:
    assert parse_datasets(["a=x/y", "z"]) == {"a": Path("x/y"), "z": Path("z")}
    with pytest.raises(UsageError):
        parse_datasets(["a=x", "a=y"])
