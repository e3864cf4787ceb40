from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.data.selection.folds import kfold, load_folds, save_folds, stratified
from tests.conftest import SHARED


@pytest.fixture(scope="module")
def challenge_ids() -> list[str]:
    path = SHARED / "train_agbm_metadata.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist on this machine")
    with gzip.open(path, "rt") as handle:
        return [row["chip_id"] for row in csv.DictReader(handle)]


def test_kfold_is_the_winner_s(challenge_ids: list[str]) -> None:
    folds = kfold(challenge_ids)
    assert [len(fold) for fold in folds] == [869] * 9 + [868]
    assert sorted(chip for fold in folds for chip in fold) == sorted(challenge_ids)
    # SHA-256 of scikit-learn 1.7's KFold(10, shuffle=True, random_state=314159) over the sorted ids
    digest = hashlib.sha256(json.dumps(folds).encode()).hexdigest()
    assert digest == "4d2f6616ea6f94639512198fab4b792d0f275ab3dab274db0e2afc87a6a4ec5e"


def test_kfold_does_not_depend_on_order_or_repeats() -> None:
    ids = [f"{i:08x}" for i in range(25)]
    assert kfold(ids, 4, 1) == kfold([*reversed(ids), ids[3]], 4, 1)


@given(st.integers(10, 80), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_stratified_is_a_partition_of_even_folds(n: int, n_folds: int, seed: int) -> None:
    rng = np.random.default_rng(n)
    ids = [f"{i:08x}" for i in range(n)]
    missing = {chip: (rng.random(3) < 0.3).tolist() for chip in ids}
    biomass = {chip: float(rng.gamma(2, 30)) for chip in ids}
    folds = stratified(ids, missing, biomass, n_folds, seed)
    assert sorted(chip for fold in folds for chip in fold) == ids
    assert max(map(len, folds)) - min(map(len, folds)) <= 1


def test_stratified_folds_look_alike() -> None:
    rng = np.random.default_rng(0)
    ids = [f"{i:08x}" for i in range(1000)]
    missing = {chip: [bool(rng.random() < 0.2)] * 6 + [False] * 6 for chip in ids}
    biomass = {chip: float(rng.gamma(2, 30)) for chip in ids}
    stratum, plain = stratified(ids, missing, biomass), kfold(ids)

    def spread(folds: list[list[str]], value: dict[str, float]) -> float:
        return float(np.ptp([np.mean([value[chip] for chip in fold]) for fold in folds]))

    holes = {chip: float(missing[chip][0]) for chip in ids}
    assert spread(stratum, holes) <= 0.011 < spread(plain, holes)
    assert spread(stratum, biomass) < 0.4 * spread(plain, biomass)


def test_too_few_chips_name_the_key_to_change() -> None:
    with pytest.raises(DataError, match=r"3 chips cannot make 10 folds; set data.split.folds"):
        kfold(["a", "b", "c"])


def test_published_folds_come_back(tmp_path: Path) -> None:
    folds = kfold([f"{i:08x}" for i in range(20)], 5)
    save_folds(tmp_path / "s.json", folds, {"scheme": "kfold"})
    assert load_folds(tmp_path / "s.json") == folds


@pytest.mark.parametrize(("content", "message"), [
    ("{", "not a split file"), ('{"fold": []}', "not a split file"), ('{"folds": [[1]]}', "are strings"),
    ('{"folds": [["a"], ["a"]]}', "listed twice"), ('{"folds": 3}', "not a split file")])
def test_a_bad_split_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_folds(path)
    assert str(path) in str(caught.value)


def test_a_missing_split_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepare.py splits"):
        load_folds(tmp_path / "none.json")
