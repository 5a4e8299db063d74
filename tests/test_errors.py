from __future__ import annotations

import errno
import pickle

import pytest

from brainfm_cli import errors


@pytest.mark.parametrize(
    ("raised", "code", "failure_class"),
    [
        (MemoryError(), 75, "memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 75, "disk"),
        (OSError(errno.EDQUOT, "Quota", "/x"), 75, "disk"),
        (OSError(errno.EROFS, "Read-only", "/x"), 73, "disk"),
        (PermissionError(errno.EACCES, "Denied", "/x"), 73, "disk"),
        (ModuleNotFoundError("no", name="torch"), 127, "engine"),
        (ModuleNotFoundError("no", name="brainfm_cli.nothing"), 1, "bug"),
        (ZeroDivisionError("x"), 1, "bug"),
        (errors.LicenceError("a", fix="b"), 126, "licence"),
        (errors.ConfigurationConflictError("a", fix="b"), 73, "settings"),
    ],
)
def test_classify(raised: BaseException, code: int, failure_class: str) -> None:
    known = errors.classify(raised)
    assert (known.exit_code, known.failure_class) == (code, failure_class)
    assert known.fix


def test_missing_package_names_the_extra() -> None:
    assert "brainfm-cli[train]" in errors.missing_package("lightning.pytorch").fix
    assert "brainfm-cli[preprocess]" in errors.missing_package("nipype").fix


def test_message_has_three_parts_and_survives_pickling() -> None:
    error = errors.InputDatasetError("the image is empty", where="sub-01.nii.gz", fix="copy it again")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "the image is empty [sub-01.nii.gz] — copy it again"
    assert type(copy) is errors.InputDatasetError


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([], 0), ([0, 0], 0), ([65], 65), ([65, 65], 65), ([65, 0], 3), ([65, 75], 3), ([75, 75, 75], 75)],
)
def test_combined_exit_code(codes: list[int], expected: int) -> None:
    assert errors.combined_exit_code(codes) == expected


def test_every_error_class_has_a_documented_code() -> None:
    def below(cls: type[errors.BrainFMError]) -> set[type[errors.BrainFMError]]:
        return {cls}.union(*(below(child) for child in cls.__subclasses__()))

    assert {cls.exit_code for cls in below(errors.BrainFMError)} <= set(errors.EXIT_CODES)
