"""What a folder's content is made of: written once, compared afterwards, by one process at a time."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from engine.base import made
from engine.base.errors import DataError
from engine.base.made import FILE, alone, claim, differences

ABOUT = {"weights": ["a"], "grid": {"width": 3, "height": 4}, "tta": ("id",)}


def test_a_folder_is_claimed_once_and_compared_afterwards(tmp_path: Path) -> None:
    assert claim(tmp_path, ABOUT, "remove it") is False
    assert json.loads((tmp_path / FILE).read_text()) == json.loads(json.dumps(ABOUT))
    assert claim(tmp_path, ABOUT, "remove it") is True
    fewer = {key: value for key, value in ABOUT.items() if key != "tta"}
    for other, words in (({**ABOUT, "grid": {"width": 3, "height": 5}}, "grid.height 5 instead of 4"),
                         (fewer, r'tta null instead of \["id"\]'), ({**ABOUT, "new": 1}, "new 1 instead of null")):
        with pytest.raises(DataError, match=rf"made otherwise \({words}\); remove it"):
            claim(tmp_path, other, "remove it")
    words = "a 1 instead of null; b 1 instead of null; c 1 instead of null and 4 more"
    with pytest.raises(DataError, match=rf"\({words}\); r"):
        claim(tmp_path, dict.fromkeys("abcd", 1), "remove it")


def test_what_differs_is_short() -> None:
    assert list(differences({"a": "x" * 90, "b": 1}, {"a": "y" * 90, "b": 1})) == ["a changed"]
    assert list(differences({"a": "x" * 64}, {"a": "y" * 64})) == [f"a {'y' * 12} instead of {'x' * 12}"]


def test_a_claim_that_is_damaged_or_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(made, "write_text", full)
        with pytest.raises(DataError, match=f"{FILE}: cannot be written \\(No space left on device\\); remove it"):
            claim(tmp_path, ABOUT, "remove it")
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match=f"{FILE}: cannot be read .*; remove it"):
        claim(tmp_path, ABOUT, "remove it")


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    with alone(folder), pytest.raises(DataError, match="another process writes here; wait for it"), alone(folder):
        pass
    with alone(folder):
        assert folder.is_dir()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(made.fcntl, "flock", no_locks)
    with alone(folder):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{tmp_path}/file/x: cannot be made"), alone(tmp_path / "file" / "x"):
        pass
