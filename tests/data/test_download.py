"""`launch/prepare.py download` against a real S3 server (moto's, over HTTP) that can be made slow, flaky or wrong."""

from __future__ import annotations

import filecmp
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.base.errors import ConfigError, DataError
from tests.conftest import ROOT, SHARED, Command, command_line, environment

pytest.importorskip("moto", reason="the S3 server of these tests: pip install -e '.[dev]'")

BUCKET = "drivendata-competition-biomassters-public-"


class Server:
    """moto's S3 on loopback.  `fault(key, nth)` may delay a GET, or name what goes wrong with the nth one of a key."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: object) -> None:
                pass

        self._app = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.reset()
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.gets: Counter[str] = Counter()  # per path
        self.fault: Callable[[str, int], str | None] = lambda key, nth: None

    def close(self) -> None:
        self._http.shutdown()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] != "GET":
            return self._app(environ, start)
        path = environ["PATH_INFO"]
        self.gets[path] += 1
        fault = self.fault(path.rsplit("/")[-1], self.gets[path])
        if fault == "busy":
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if fault == "silence":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        body = b"".join(self._app(environ, start))
        if fault == "flip":
            return [bytes([body[0] ^ 1]) + body[1:]]
        return self._cut(body, environ["werkzeug.socket"]) if fault == "cut" else [body]

    @staticmethod
    def _cut(body: bytes, connection: socket.socket) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def uploaded(sample: Path) -> Iterator[tuple[Server, Any]]:
    """The server with three chips of the sample, one of them without label, and a client that may write."""
    import boto3
    from botocore.config import Config

    server = Server()
    client = boto3.client("s3", "us-east-1", endpoint_url=server.url, aws_access_key_id="a", aws_secret_access_key="b",
                          config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"))
    for region in ("us", "eu"):
        client.create_bucket(Bucket=BUCKET + region)
    for path in of_chips(sample):
        put(client, sample, path)
    yield server, client
    server.close()


@pytest.fixture
def server(uploaded: tuple[Server, Any]) -> Server:
    uploaded[0].reset()
    return uploaded[0]


@pytest.fixture
def client(uploaded: tuple[Server, Any], sample: Path) -> Iterator[Any]:
    """To change objects with; afterwards they are as they were."""
    yield uploaded[1]
    for path in of_chips(sample)[:2]:
        put(uploaded[1], sample, path)


def put(client: Any, sample: Path, path: Path, data: bytes | None = None, acl: str = "public-read",
        region: str = "us") -> None:
    client.put_object(Bucket=BUCKET + region, Key=path.relative_to(sample).as_posix(), ACL=acl,
                      Body=path.read_bytes() if data is None else data)


def ids(sample: Path) -> list[str]:
    """Two training chips and a test chip."""
    train, test = (sorted({path.name[:8] for path in (sample / f"{split}_features").iterdir()})
                   for split in ("train", "test"))
    return [*train[:2], test[0]]


def of_chips(sample: Path) -> list[Path]:
    chosen = ids(sample)
    return sorted((path for path in sample.glob("*/*.tif") if path.name[:8] in chosen), key=lambda path: path.name)


@pytest.fixture
def listed(sample: Path, tmp_path: Path) -> Path:
    """A file with the chips that are on the server."""
    path = tmp_path / "chips.txt"
    path.write_text("\n".join(ids(sample)) + "\n")
    return path


def same_tree(sample: Path, out: Path, expected: list[Path]) -> bool:
    """`out` holds these files of the sample and nothing else but the CSVs."""
    names = {path.relative_to(sample) for path in expected}
    found = {path.relative_to(out) for path in out.glob("**/*") if path.is_file() and path.suffix != ".csv"}
    return found == names and all(filecmp.cmp(sample / name, out / name, shallow=False) for name in names)


def test_full_fetch_then_nothing_left_to_do(server: Server, sample: Path, listed: Path, tmp_path: Path,
                                            command: Command) -> None:
    from engine.data.index import open_index

    out = tmp_path / "new" / "out"
    words = ("download", "--out", out, "--metadata", sample, "--chips", listed, "--endpoint-url", server.url,
             "--workers", 4)
    first = command("prepare", *words)
    assert first.returncode == 0, first.stderr
    expected = of_chips(sample)
    assert f"{len(expected)} files in {out} are as published, {len(expected)} of them new" in first.stdout
    megabytes = sum(path.stat().st_size for path in expected) // 10**6
    assert f"downloading: {megabytes}/{megabytes} megabytes" in first.stderr
    assert same_tree(sample, out, expected)
    index = open_index(out)  # reads the CSVs that came along
    assert [chip.id for chip in index.chips] == sorted(ids(sample)) and len(index.labelled()) == 2

    server.reset()
    again = command("prepare", *words[:3], "--chips", listed, "--endpoint-url", server.url)  # now with its own CSVs
    assert again.returncode == 0 and "0 of them new" in again.stdout, again.stderr
    assert not server.gets

    damaged, lost = out / expected[0].relative_to(sample), out / expected[5].relative_to(sample)
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])  # of the right size
    lost.unlink()
    assert command("prepare", *words).returncode == 0
    assert sorted(Path(path).name for path in server.gets) == sorted((damaged.name, lost.name))
    assert same_tree(sample, out, expected)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_download_leaves_whole_files_and_goes_on(number: signal.Signals, server: Server, sample: Path,
                                                             listed: Path, tmp_path: Path, command: Command) -> None:
    out, expected = tmp_path / "out", of_chips(sample)
    words = ("download", "--out", out, "--metadata", sample, "--chips", listed, "--endpoint-url", server.url,
             "--workers", 3)
    server.fault = lambda key, nth: time.sleep(0.1)
    running = subprocess.Popen(command_line("prepare", *words), cwd=ROOT, env=environment(), text=True,
                               stderr=subprocess.PIPE)
    give_up = time.monotonic() + 30
    while len(list(out.glob("*/*.tif"))) < 8:
        assert running.poll() is None and time.monotonic() < give_up, running.communicate()
        time.sleep(0.02)
    running.send_signal(number)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    kept = [path for path in expected if (out / path.relative_to(sample)).exists()]
    assert 8 <= len(kept) < len(expected)
    assert all(filecmp.cmp(path, out / path.relative_to(sample), shallow=False) for path in kept)

    (out / "train_features" / f".{expected[-1].name}.1.part").write_bytes(b"half")  # as a kill while writing leaves it
    server.reset()
    assert command("prepare", *words).returncode == 0
    assert sum(server.gets.values()) == len(expected) - len(kept)
    assert same_tree(sample, out, expected)


def test_what_cannot_be_had_is_listed_and_the_rest_arrives(server: Server, client: Any, sample: Path, listed: Path,
                                                           tmp_path: Path, command: Command) -> None:
    out, (wrong, gone, *rest) = tmp_path / "out", of_chips(sample)
    data = wrong.read_bytes()
    put(client, sample, wrong, data[:-1] + bytes([data[-1] ^ 1]))
    client.delete_object(Bucket=BUCKET + "us", Key=gone.relative_to(sample).as_posix())
    done = command("prepare", "download", "--out", out, "--metadata", sample, "--chips", listed, "--endpoint-url",
                   server.url, "--retries", 0)
    assert done.returncode == 2
    lines = {Path(line.split(":")[0]).name: line for line in done.stderr.splitlines() if ".tif" in line}
    assert lines.keys() == {wrong.name, gone.name}
    assert "published" in lines[wrong.name] and "cksum" in lines[wrong.name]
    assert "not on the server" in lines[gone.name] and f"s3://{BUCKET}us/" in lines[gone.name]
    assert "2 files are not as published" in done.stderr
    gets = {Path(path).name: count for path, count in server.gets.items()}
    assert gets.pop(wrong.name) == 2 and set(gets.values()) == {1}
    assert same_tree(sample, out, rest)


def fetched(server: Server, files: list[Any], retries: int = 3, workers: int = 3) -> tuple[dict[str, Any], list[Any]]:
    """(what was delivered, the problems)"""
    from engine.data.fetch import s3

    got: dict[str, Any] = {}
    problems = s3.fetch_all(s3.connect(workers, server.url), files, lambda file, data: got.update({file.name: data}),
                            workers=workers, retries=retries, progress=lambda count: None)
    return got, problems


@pytest.fixture
def files(sample: Path, listed: Path) -> list[Any]:
    from engine.data.fetch.download import select

    return select(sample, chips=str(listed))[:12]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.fetch.s3.FIRST_DELAY", 0.01)


def test_flaky_server_is_tried_again(server: Server, sample: Path, files: list[Any], quick: None) -> None:
    faults = ("busy", "cut", "silence", "flip")
    kind = {file.name: faults[number % 4] for number, file in enumerate(files)}
    server.fault = lambda key, nth: kind[key] if nth <= (1 if kind[key] == "flip" else 2) else None
    got, problems = fetched(server, files)
    assert problems == []
    assert got == {file.name: (sample / file.folder / file.name).read_bytes() for file in files}
    assert set(server.gets.values()) == {2, 3}


@pytest.mark.parametrize("fault", ["busy", "cut", "silence"])
def test_last_retry_names_the_file(fault: str, server: Server, files: list[Any], quick: None) -> None:
    bad = files[4].name
    server.fault = lambda key, nth: fault if key == bad else None
    with pytest.raises(DataError, match=f"{bad}: .*tried 3 times"):
        fetched(server, files, retries=2)
    assert {Path(path).name: count for path, count in server.gets.items()}[bad] == 3


def test_no_server_at_all(files: list[Any], quick: None) -> None:
    class Nobody:
        url = "http://127.0.0.1:9"

    with pytest.raises(DataError, match=r"tried 2 times.*connection"):
        fetched(Nobody(), files, retries=1)  # type: ignore[arg-type]


def test_shorter_or_private_objects_are_refused(server: Server, client: Any, sample: Path, files: list[Any]) -> None:
    short, private = of_chips(sample)[:2]
    put(client, sample, short, short.read_bytes()[:-1])
    put(client, sample, private, acl="private")
    got, problems = fetched(server, files)
    assert [problem.path.name for problem in problems] == [short.name, private.name]
    assert f"{short.stat().st_size - 1} bytes, published {short.stat().st_size}" in problems[0].what
    assert "not public: 403" in problems[1].what or "not public: AccessDenied" in problems[1].what
    assert got[short.name] is None and got[private.name] is None and got[files[2].name] is not None


def test_a_wrong_bucket_stops_early(server: Server, files: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.fetch.s3.MOST_PROBLEMS", 4)
    _, problems = fetched(server, [file._replace(bucket="no-such-bucket") for file in files], workers=1)
    assert len(problems) == 4 and "NoSuchBucket" in problems[0].what


def test_full_disk_is_refused_before_the_first_byte(server: Server, sample: Path, listed: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from launch.prepare import arguments

    args = arguments().parse_args(["download", "--out", str(tmp_path / "out"), "--metadata", str(sample), "--chips",
                                   str(listed), "--endpoint-url", server.url])
    needed = sum(path.stat().st_size for path in of_chips(sample))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))  # less the last blocks' rest
    with pytest.raises(DataError, match=rf"{needed / 1e6:.0f}\.\d MB are to be written and .* free; make room"):
        args.run(args)
    assert not server.gets and not list(tmp_path.glob("out/**/*.tif"))


def test_region_and_split_choose_the_files(server: Server, uploaded: tuple[Server, Any], sample: Path, listed: Path,
                                           tmp_path: Path, command: Command) -> None:
    test = [path for path in of_chips(sample) if path.parent.name == "test_features"]
    for path in test:
        put(uploaded[1], sample, path, region="eu")
    chips = tmp_path / "one.txt"
    chips.write_text(ids(sample)[2])
    done = command("prepare", "download", "--out", tmp_path / "out", "--metadata", sample, "--chips", chips, "--split",
                   "test", "--region", "eu", "--endpoint-url", server.url)
    assert done.returncode == 0, done.stderr
    assert same_tree(sample, tmp_path / "out", test)
    assert all(path.startswith(f"/{BUCKET}eu/") for path in server.gets)


def test_chips_reach_the_packer_whole(server: Server, client: Any, sample: Path, listed: Path) -> None:
    from engine.data.fetch import s3
    from engine.data.fetch.download import select

    files = select(sample, chips=str(listed))
    gone = of_chips(sample)[1]
    client.delete_object(Bucket=BUCKET + "us", Key=gone.relative_to(sample).as_posix())
    got: dict[str, dict[str, bytes]] = {}
    collect = s3.ByChip(files, got.__setitem__)
    problems = s3.fetch_all(s3.connect(4, server.url), files, collect, workers=4, retries=0,
                            progress=lambda count: None)
    assert [problem.path.name for problem in problems] == [gone.name]
    assert collect.dropped == {gone.name[:8]}
    whole = [path for path in of_chips(sample) if path.name[:8] != gone.name[:8]]
    assert got.keys() == {path.name[:8] for path in whole}
    assert {name: data for held in got.values() for name, data in held.items()} == {
        path.name: path.read_bytes() for path in whole}


def test_into_store_is_what_packing_the_tree_gives(server: Server, client: Any, sample: Path, tmp_path: Path,
                                                   command: Command) -> None:
    from engine.data.fetch.download import Store, select
    from engine.data.index import open_index
    from engine.data.store.pack import pack

    chips, tree, packed, out = (tmp_path / name for name in ("chips", "tree", "packed", "out"))
    train, _, test = ids(sample)
    chips.write_text(f"{train} {test}")
    some = [path for path in of_chips(sample) if path.name[:8] in (train, test)]
    for path in some:
        (tree / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tree / path.parent.name / path.name).hardlink_to(path)
    pack(tree, packed)
    words = ("download", "--into-store", out, "--metadata", sample, "--chips", chips, "--endpoint-url", server.url)
    gone = of_chips(sample)[0]
    client.delete_object(Bucket=BUCKET + "us", Key=gone.relative_to(sample).as_posix())
    partly = command("prepare", *words)
    assert partly.returncode == 2 and gone.name in partly.stderr
    with pytest.raises(DataError, match="not finished"):
        open_index(out)
    put(client, sample, gone)
    server.reset()
    done = command("prepare", *words)
    assert done.returncode == 0, done.stderr
    assert {Path(path).name[:8] for path in server.gets} == {gone.name[:8]}  # the other chip was there
    written = {path.relative_to(packed) for path in packed.glob("**/*") if path.is_file()}
    assert written == {path.relative_to(out) for path in out.glob("**/*") if path.is_file()}
    assert filecmp.cmpfiles(packed, out, [str(path) for path in written], shallow=False)[1:] == ([], [])

    files = select(sample, chips=str(chips))
    assert Store(out, lossless=False).missing(files, 2, lambda count: None) == []
    chip = out / "chips" / f"{test}.safetensors"
    data = chip.read_bytes()
    chip.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    damaged = Store(out, lossless=False).missing(files, 2, lambda count: None)
    assert [file.name for file in damaged] == [path.name for path in some if path.name[:8] == test]
    other = command("prepare", *words, "--lossless")
    assert other.returncode == 2 and "packed without --lossless" in other.stderr


def test_two_downloads_into_one_folder(tmp_path: Path) -> None:
    from engine.base.made import alone

    with alone(tmp_path), pytest.raises(DataError, match="another process writes here"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_flat_folders_stay_flat(sample: Path, files: list[Any], tmp_path: Path) -> None:
    from engine.data.fetch import download

    first = files[0]
    (tmp_path / first.name).write_bytes((sample / first.folder / first.name).read_bytes())
    tree = download.Tree(tmp_path, sample)
    assert tree.missing(files, 2, lambda count: None) == files[1:]
    tree.deliver(files)(files[1], b"data")
    assert (tmp_path / files[1].name).read_bytes() == b"data"


def test_select_refuses_what_it_cannot_serve(sample: Path, tmp_path: Path) -> None:
    from engine.data.fetch.download import select

    with pytest.raises(DataError, match=r"no features_metadata\.csv here.*drivendata\.org"):
        select(tmp_path)
    rows = (sample / "features_metadata.csv").read_text().splitlines()
    csv = tmp_path / "features_metadata.csv"
    csv.write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"no train_agbm_metadata\.csv here"):
        select(tmp_path)
    chips = {row.split(",")[1] for row in rows[1:] if ",test," in row}
    assert {file.chip for file in select(tmp_path, split="test")} == chips
    assert {file.chip for file in select(tmp_path, split="test", chips="1")} == {min(chips)}
    with pytest.raises(ConfigError, match="there are 2"):
        select(tmp_path, split="test", chips="3")
    (tmp_path / "ids").write_text("deadbeef")
    with pytest.raises(DataError, match="1 of its 1 chips .* deadbeef"):
        select(tmp_path, split="test", chips=str(tmp_path / "ids"))
    csv.write_text("\n".join(rows).replace("s3path_eu", "elsewhere"))
    with pytest.raises(DataError, match=r"no s3path_eu \(it has: us, as\)"):
        select(tmp_path, "eu", split="test")
    csv.write_text("\n".join([*rows, rows[1]]))
    with pytest.raises(DataError, match="twice"):
        select(tmp_path, split="test")
    for wrong in ("s3://bucket/train_features/../x.tif", "https://bucket/train_features/", "s3://bucket/elsewhere/"):
        csv.write_text("\n".join([rows[0], rows[1].replace("s3://drivendata-competition-biomassters-public-us/"
                                                           "train_features/", wrong)]))
        with pytest.raises(DataError, match="its place"):
            select(tmp_path, split="test")


def test_the_real_metadata() -> None:
    """Counts and sizes as in DrivenData's instructions (there in GiB: 215.9, 73.0 and 2.1)."""
    from engine.data.fetch.download import select

    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist on this machine")
    files = select(SHARED)
    for folder, count, gib in (("train_features", 189078, 215.9), ("test_features", 63348, 73.0),
                               ("train_agbm", 8689, 2.1)):
        some = [file for file in files if file.folder == folder]
        assert len(some) == count
        assert sum(file.expected for file in some) / 2**30 == pytest.approx(gib, abs=0.25)
