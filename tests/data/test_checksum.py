"""engine.data.tiff.checksum against the definition, the published checksums and the `cksum` program."""

from __future__ import annotations

import csv
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.data.tiff import checksum
from engine.data.tiff.checksum import cksum_file, posix_cksum
from tests.conftest import SHARED

REAL = SHARED / "biomassters"


def by_definition(data: bytes) -> int:
    """POSIX's cksum, bit by bit."""
    length = len(data)
    while length:
        data, length = data + bytes([length & 255]), length >> 8
    crc = 0
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x104C11DB7 if crc >> 31 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("data", "crc"), [(b"", 4294967295), (b"123456789", 930766865)])
def test_known_values(data: bytes, crc: int) -> None:
    assert posix_cksum(data) == crc == by_definition(data)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 1000])
def test_equals_the_definition_across_chunks(size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checksum, "_CHUNK", 64)
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert posix_cksum(data) == by_definition(data)
    assert cksum_file(tmp_path / "file") == (by_definition(data), size)


def test_takes_arrays() -> None:
    array = np.arange(60, dtype="<u2").reshape(3, 4, 5)
    assert posix_cksum(array) == by_definition(array.tobytes())


@pytest.mark.skipif(shutil.which("cksum") is None, reason="no cksum program here")
@pytest.mark.parametrize("size", [0, checksum._CHUNK, 3 * checksum._CHUNK + 5])
def test_equals_the_program(size: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(np.random.default_rng(size).bytes(size))
    crc, length, _ = subprocess.run(["cksum", file], capture_output=True, check=True, text=True).stdout.split()
    assert cksum_file(file) == (int(crc), int(length)) == (posix_cksum(file.read_bytes()), size)


@pytest.mark.skipif(not REAL.exists(), reason="the real chips (../shared/data) are not here")
@pytest.mark.parametrize(("table", "folder"), [("features_metadata.csv", "train_features"),
                                               ("train_agbm_metadata.csv", "train_agbm")])
def test_equals_the_published(table: str, folder: str) -> None:
    with (REAL / table).open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows
    for row in rows:
        assert cksum_file(REAL / folder / row["filename"]) == (int(row["cksum"]), int(row["size"]))


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tif: is missing; download"):
        cksum_file(tmp_path / "gone.tif")
    with pytest.raises(DataError, match="cannot be read"):
        cksum_file(tmp_path)


def test_speed() -> None:
    data = bytes(1 << 24)
    best = min(_seconds(data) for _ in range(5))
    assert len(data) / best > 150e6, "slower than 150 MB of processor time: is there Python per byte?"


def _seconds(data: bytes) -> float:
    start = time.process_time()
    posix_cksum(data)
    return time.process_time() - start
