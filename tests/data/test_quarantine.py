"""Chips that turn bad while a run trains on them: which step wanted one, and which other comes in its place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.base.errors import DataError
from engine.config import Config
from engine.data.batch import BadChip, Batch, Request, read_for
from engine.data.biomassters import BIOMASSTERS, T
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.loader import Loader
from engine.data.plan import Sharding, draw, order
from engine.data.selection import quarantine
from engine.data.selection.quarantine import MOST, News, Quarantine, Turned
from engine.data.selection.supply import Supply, training_requests
from engine.data.store.pack import pack

N, SEED, EPOCHS = 8, 3, 2
ORDERS = [order(N, SEED, epoch).tolist() for epoch in range(EPOCHS)]
FORMS = ["tiff", "steps", "lossless"]
CONFIG = Config.model_validate({
    "data": {"path": "nowhere"}, "run": {"name": "run", "seed": SEED}, "phases": [{"epochs": EPOCHS}],
    "augment": {"rotate": 0, "month_dropout": 0}})


@pytest.fixture(scope="module")
def few(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample's chips with a month of radar each, in each form."""
    root = tmp_path_factory.mktemp("few")
    for chip in open_index(sample).split("train"):
        for path in (chip.path(0, 0), chip.label):
            assert path is not None
            folder = root / "tiff" / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.name)
    for form in FORMS[1:]:
        pack(root / "tiff", root / form, lossless=form == "lossless", workers=2)
    return {form: root / form for form in FORMS}


@pytest.fixture(params=FORMS)
def root(request: pytest.FixtureRequest, few: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(few[request.param], tmp_path / "data"))


def file_of(chip: Chip) -> Path:
    """One that is read whichever months are kept."""
    path = chip.packed or chip.label
    assert path is not None
    return path


def damage(chip: Chip) -> bytes:
    """Cut its file short.  What it was."""
    path = file_of(chip)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1000])
    return whole


def supply(chips: list[Chip], quarantine: Quarantine | None, step: int = 0, world: int = 1, rank: int = 0) -> Supply:
    """Steps of two chips, one after the other, from `step` of 4 an epoch on."""
    sharding = Sharding(1, 2 // world, world, rank)
    loader = Loader(open_source(chips[::-1]), batch_size=1, device=torch.device("cpu"), backend="cpu",
                    precision="fp32", warp=True, readers=2, threads=1)
    taken = 0

    def requests():  # type: ignore[no-untyped-def]
        now = step + taken
        return training_requests(chips, CONFIG, BIOMASSTERS, sharding, quarantine, epochs=range(now // 4, EPOCHS),
                                 start=now % 4, step=now)

    class Counted(Supply):
        def __next__(self) -> Batch:
            nonlocal taken
            batch = super().__next__()
            taken += self._turn == 0
            return batch

    return Counted(loader, requests, sharding.accumulate, quarantine)


def after(position: int, epoch: int, bad: set[int]) -> int:
    """The chip at a place of the order where `bad` ones are replaced."""
    while ORDERS[epoch][position % N] in bad:
        position += 1
    return ORDERS[epoch][position % N]


def test_the_next_chip_of_the_order_takes_the_place(root: Path, tmp_path: Path) -> None:
    """Of the 5th and 6th of an epoch the 7th, of the last the first; with the place's own augmentation; on two ranks as
    on one."""
    chips = open_index(root).split("train")
    gone = [ORDERS[0][place] for place in (4, 5, 7)]
    plain = open_source(chips)
    for number in gone:
        damage(chips[number])
    one = Quarantine(tmp_path, {}, None)
    places = [(epoch, position) for epoch in range(EPOCHS) for position in range(N)]
    wanted = [after(position, epoch, set(gone)) for epoch, position in places]
    assert wanted[4] == wanted[5] == ORDERS[0][6] and wanted[7] == ORDERS[0][0]
    asked = [[Request(chips[number], draw(BIOMASSTERS, CONFIG.augment, SEED, epoch, position))]
             for number, (epoch, position) in zip(wanted, places)]
    again = Loader(plain, batch_size=1, device=torch.device("cpu"), backend="cpu", precision="fp32", warp=True)
    for batch, expected in zip(supply(chips, one), again.batches(asked), strict=True):
        assert batch.chips == expected.chips
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.label, expected.label)
    steps = [1 + place // 2 for place in (4, 4, 7)]  # the 6th was wanted for the 5th's place already
    news = one.news()
    assert news is not None and one.news() is None
    assert [(said.chip, said.turned.since_step) for said in news] == [
        (chips[number].id, step) for number, step in zip(gone, steps)]
    assert news[1].stand_in == chips[ORDERS[0][6]].id and str(file_of(chips[gone[0]])) in news[0].turned.why
    if plain.form != "direct":  # DALI takes a second to begin anew
        return
    two = [[batch.chips[0] for batch in supply(chips, Quarantine(tmp_path, {}, None), world=2, rank=rank)]
           for rank in range(2)]
    assert [chip for pair in zip(*two) for chip in pair] == [chips[number] for number in wanted]


def test_a_run_that_goes_on_replaces_the_same(few: dict[str, Path], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(few["steps"], tmp_path / "data"))
    chips = open_index(root).split("train")
    never, first, later = (ORDERS[0][place] for place in (0, 3, 5))
    listed = [chip for number, chip in enumerate(chips) if number != never]
    begun = Quarantine(tmp_path, {chips[never].id: "was always bad"}, None)
    begun.begin(0)
    assert begun.kept(chips) == listed
    assert "left out: chip" in capsys.readouterr().out
    whole = damage(chips[first])
    why = Turned(2, f"{file_of(chips[first])}: is truncated")
    begun.hear([[News(chips[first].id, why, chips[later].id)]])
    # the one is whole again, another has turned bad while nobody looked, and is found as a run begins
    file_of(chips[first]).write_bytes(whole)
    damage(chips[later])
    bad_first = sorted(chips, key=lambda chip: chip != chips[later])
    found = quarantine.find(root, bad_first, "fail", workers=2) | {chips[never].id: "is as it was"}
    assert found.keys() == {chips[never].id, chips[later].id}
    again = Quarantine(tmp_path, found, quarantine.load(tmp_path))
    assert again.left_out == {chips[never].id: "was always bad"} and again.kept(chips) == listed
    again.begin(3)
    assert "to be replaced: chip " + chips[later].id in capsys.readouterr().out
    assert again.turned == {chips[first].id: why, chips[later].id: Turned(4, found[chips[later].id])}
    last = Quarantine(tmp_path, found, quarantine.load(tmp_path))
    last.begin(3)
    assert last.turned == again.turned and capsys.readouterr().out == ""
    ask = Request(chips[first], step=1, others=lambda: iter([chips[later], chips[never]]))
    assert [last.settled(ask._replace(step=step)).chip for step in (1, 2, 3, 4)] == [
        chips[first], chips[later], chips[later], chips[never]]


def test_a_run_that_would_not_be_the_same_does_not_go_on(tmp_path: Path) -> None:
    Quarantine(tmp_path, {"a": "bad", "b": "bad"}, None).begin(0)
    before = quarantine.load(tmp_path)
    with pytest.raises(DataError, match=r"quarantine.json: this run was begun with 2 .* 1 of them \(b\) are no longer"):
        Quarantine(tmp_path, {"a": "bad"}, before).begin(4)
    with pytest.raises(DataError, match=r"^chip v: v.tif: is empty; chips that validate are not replaced"):
        Quarantine(tmp_path, {"a": "bad", "b": "bad", "v": "v.tif: is empty"}, before, {"v"}).begin(4)
    for text in ('{"a": ', "[]", '{"a": {"since": 3}}'):
        (tmp_path / "quarantine.json").write_text(text)
        with pytest.raises(DataError, match=r"quarantine.json: is damaged .* another run.name"):
            quarantine.load(tmp_path)


def test_what_cannot_be_written_down_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    begun = Quarantine(tmp_path, {}, None)
    monkeypatch.setattr(quarantine, "write_text", full)
    begun.hear([])
    assert not caplog.text
    begun.hear([[News("a", Turned(7, "a.tif: is empty"), "b")], [News("a", Turned(6, "a.tif: is empty"), "c")]])
    assert "training step 7: chip a: a.tif: is empty; chip b takes its place" in caplog.text
    assert "quarantine.json cannot be written ([Errno 28]" in caplog.text and begun.turned["a"].since_step == 6


def test_what_was_read_ahead_before_others_told_is_no_news(tmp_path: Path) -> None:
    """A later step that finds the same chip bad does not move its first."""
    chip, other = (Chip(name, "train", BIOMASSTERS, ((True,) * T,) * 2, tmp_path, None) for name in "ab")
    run, ask = Quarantine(tmp_path, {}, None), Request(chip, step=12, others=lambda: iter([other]))
    run.hear([[News("a", Turned(10, "a.tif: is empty"), "b")]])
    run.replace(BadChip(ask, DataError("a.tif: is empty")))
    assert run.turned["a"].since_step == 10 and run.news() is None and run.settled(ask).chip.id == "b"


@pytest.mark.parametrize("bad", [MOST, MOST + 1])
def test_too_many_in_a_row_are_no_chance(bad: int, tmp_path: Path) -> None:
    """The chip itself and those after it."""
    chips = [Chip(f"{number:02d}", "train", BIOMASSTERS, ((True,) * T,) * 2, tmp_path, None) for number in range(20)]
    found = Quarantine(tmp_path, {}, None)
    found.hear([[News(chip.id, Turned(5, f"{chip.id}.tif: is empty"), "")] for chip in chips[:bad]])
    ask = Request(chips[0], step=5, others=lambda: iter(chips[1:]))
    if bad == MOST:
        assert found.settled(ask).chip.id == f"{MOST:02d}"
    else:
        with pytest.raises(DataError, match=r"^training step 5: chip 00: 00.tif: is empty; so are the 8 chips that"):
            found.settled(ask)
    with pytest.raises(DataError, match="so are the 3 chips"):
        found.settled(ask._replace(others=lambda: iter(chips[1:4])))


def test_nothing_is_written_where_all_are_bad(few: dict[str, Path], tmp_path: Path) -> None:
    chips = open_index(shutil.copytree(few["steps"], tmp_path / "data")).split("train")
    source_chips, run = chips[::-1], Quarantine(tmp_path, {}, None)
    batches = supply(source_chips, run)
    for chip in chips:
        damage(chip)
    with pytest.raises(DataError, match=r"^training step 1: chip .* so are the 7 chips that could take its place"):
        next(batches)
    assert not (tmp_path / "quarantine.json").exists()


@pytest.mark.parametrize("replaces", [True, False])
def test_what_stops_a_run_names_step_chip_and_file(root: Path, tmp_path: Path, replaces: bool) -> None:
    """Whatever was read ahead: the step that wanted the chip."""
    chips = open_index(root).split("train")
    bad = chips[ORDERS[0][5]]
    batches = supply(chips, Quarantine(tmp_path, {}, None, {bad.id}) if replaces else None)
    damage(bad)
    remedy = "chips that validate are not replaced" if replaces else "truncated"
    with pytest.raises(DataError, match=rf"^training step 3: chip {bad.id}: {file_of(bad)}: .*{remedy}"):
        for _ in batches:
            pass


@pytest.mark.parametrize("how", ["away", "emptied", "a file"])
def test_a_folder_that_is_gone_is_no_bad_chip(root: Path, tmp_path: Path, how: str) -> None:
    chips = open_index(root).split("train")
    run = Quarantine(tmp_path, {}, None)
    batches, folder = supply(chips, run), file_of(chips[0]).parent
    shutil.rmtree(folder)
    if how == "emptied":
        folder.mkdir()
    elif how == "a file":
        folder.touch()
    state = "is empty now" if how == "emptied" else "is gone, or cannot be reached"
    with pytest.raises(DataError, match=rf"^training step 1: chip \w+: {folder}: the folder {state} \({folder}/\w+\.\w+"
                                        r" is wanted: .*\); mount or restore it"):
        next(batches)
    assert not run.turned and run.news() is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("call", ["open", "fstat", "read"])
def test_whatever_the_system_says_is_an_error_that_names_the_file(root: Path, call: str, number: int,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    other, chip = open_index(root).split("train")[:2]
    path, source, system_open, files = file_of(chip), open_source([other]), os.open, set()

    def opened(name: object, *rest: int) -> int:
        if name == path and call == "open":
            raise OSError(number, os.strerror(number))
        files.discard(found := system_open(name, *rest))  # type: ignore[arg-type]
        if name == path:
            files.add(found)
        return found

    def failing(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def fails(file: int, *rest: object) -> object:
            if file in files:
                raise OSError(number, os.strerror(number))
            return real(file, *rest)

        return fails

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        for name in {"fstat": ["fstat"], "read": ["pread", "preadv"]}.get(call, []):
            patch.setattr(os, name, failing(name))
        said = "is missing" if number == errno.ENOENT else rf"cannot be read \({os.strerror(number)}\); check its perm"
        with pytest.raises(BadChip, match=f"^{path}: {said}") as caught:
            read_for(Request(chip), source.stack, chip)
    assert isinstance(caught.value.error, DataError)


def test_a_folder_in_the_place_of_a_file(root: Path) -> None:
    other, chip = open_index(root).split("train")[:2]
    source = open_source([other])
    source.stack(chip)  # a packed file's head is remembered
    file_of(chip).unlink()
    file_of(chip).mkdir()
    with pytest.raises(BadChip, match=f"^{file_of(chip)}: (is not a regular file|cannot be read .Is a directory)"):
        read_for(Request(chip), source.stack, chip)


def test_what_no_reader_foresaw_stops_at_the_chip() -> None:
    def read() -> None:
        raise OSError(errno.EIO, "Input/output error", "f.tif")

    chip = Chip("a", "train", BIOMASSTERS, ((True,) * T,) * 2, Path(), None)
    with pytest.raises(BadChip, match=r"Input/output error: 'f.tif'"):
        read_for(Request(chip), read)
