"""Fetches files from public S3 buckets, verified, on threads: the transfer behind `engine.data.fetch.download`.

A file is 1.4 MB at most.  It is held in memory and compared with its published size and POSIX cksum before anybody
sees it, so nothing unverified reaches the disk, and an interrupted file is fetched again from its start.
Requests are unsigned: the buckets need no account.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from engine.base.errors import ConfigError, DataError, EngineError
from engine.data.biomassters import BIOMASSTERS, FEATURE_NAMES
from engine.data.dataset import LABEL_DTYPE
from engine.data.metadata import Problem
from engine.data.tiff.checksum import posix_cksum

try:
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )
    from botocore.exceptions import ConnectionError as NoConnectionError
    from urllib3.exceptions import HTTPError
except ImportError:
    raise EngineError("downloading needs botocore: pip install -e '.[download]'") from None

_NETWORK = (NoConnectionError, HTTPClientError, IncompleteReadError, HTTPError)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before a retry; doubled each time
LARGEST = 1 << 26  # bytes of a file, which is held in memory
MOST_PROBLEMS = 100  # a wrong bucket or region would otherwise report 250,000
_BANDS_BYTES = [len(sensor.bands) * sensor.values.itemsize for sensor in BIOMASSTERS.sensors]
_TRY_AGAIN = {"RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "InternalError"}  # error codes of S3


class Remote(NamedTuple):
    """One file on S3, with what its metadata row says."""

    name: str
    chip: str
    folder: str  # on S3: train_features, test_features or train_agbm
    bucket: str
    key: str
    size: int | None
    cksum: int | None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def expected(self) -> int:
        """The published size, or that of the pixels where the CSV has none."""
        if self.size is not None:
            return self.size
        pixel = next((size for name, size in zip(FEATURE_NAMES, _BANDS_BYTES) if name.fullmatch(self.name)),
                     LABEL_DTYPE.itemsize)
        return pixel * BIOMASSTERS.tile ** 2


Deliver = Callable[[Remote, bytes | None], None]  # None: this file could not be had


class _Refused(Exception):
    """This file cannot be had; the others may."""


class _Stopped(Exception):
    """Another thread failed, or the user pressed Ctrl-C."""


def connect(workers: int, endpoint_url: str | None = None) -> Any:
    """An anonymous S3 client for `workers` threads; raises ConfigError for an impossible endpoint."""
    style = {"addressing_style": "path"} if endpoint_url else {}  # mirrors rarely have a host name per bucket
    config = Config(signature_version=UNSIGNED, max_pool_connections=workers, connect_timeout=10, read_timeout=30,
                    retries={"total_max_attempts": 1, "mode": "standard"}, s3=style)  # `fetch` retries
    try:
        # The global endpoint finds every bucket, and the client follows it to the bucket's region.
        return botocore.session.Session().create_client("s3", "aws-global", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"--endpoint-url {endpoint_url} or the AWS settings of this account: {error}") from None


def fetch_all(client: Any, files: Iterable[Remote], deliver: Deliver, *, workers: int, retries: int,
              progress: Callable[[int], None]) -> list[Problem]:
    """Fetch `files` on `workers` threads; `deliver(file, data)` runs on them, with data as published.

    `progress` is called with the bytes of each file, one thread at a time.  Returns the files that are not there,
    not public, or differ from what was published, at most MOST_PROBLEMS; `deliver(file, None)` is called for
    these.  Raises DataError naming the file where the connection fails `retries` times in a row after the first
    try, and passes on what `deliver` raises.
    """
    queue, lock, stop = iter(files), threading.Lock(), threading.Event()
    problems: list[Problem] = []

    def work() -> None:
        while not stop.is_set():
            with lock:
                file = next(queue, None)
            if file is None:
                return
            try:
                data = fetch(client, file, retries, stop)
            except _Stopped:
                return
            except _Refused as reason:
                deliver(file, None)
                with lock:
                    problems.append(Problem(Path(file.folder, file.name), str(reason)))
                    if len(problems) >= MOST_PROBLEMS:
                        stop.set()
                continue
            deliver(file, data)
            with lock:
                progress(len(data))

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work) for _ in range(workers)]):
                future.result()
        except BaseException:
            stop.set()
            raise
    return sorted(problems, key=lambda problem: problem.path)


def fetch(client: Any, file: Remote, retries: int, stop: threading.Event) -> bytes:
    """The bytes of `file`, as published; a copy that differs is fetched once more."""
    failures, damaged, delay = 0, "", FIRST_DELAY
    while True:
        try:
            data, wrong = _get(client, file)
            if not wrong:
                return data
            if damaged:
                raise _Refused(f"{wrong}, fetched twice ({file.url})")
            damaged = wrong
        except (*_NETWORK, ClientError) as error:
            if isinstance(error, ClientError) and not _passing(error):
                code = error.response["Error"].get("Code", "?")
                raise _Refused(f"not on the server, or not public: {code} ({file.url})") from None
            failures += 1
            if failures > retries:
                raise DataError(f"{file.name}: {file.url} cannot be fetched, tried {failures} times: {error}; check "
                                f"the connection and run the same command again, it goes on where it stopped") from None
            if stop.wait(delay * random.uniform(0.5, 1)):  # threads that failed together return apart
                raise _Stopped from None
            delay = min(2 * delay, LONGEST_DELAY)


def _get(client: Any, file: Remote) -> tuple[bytes, str]:
    """One try: the bytes, and in words how they differ from what was published."""
    try:
        answer = client.get_object(Bucket=file.bucket, Key=file.key)
        with answer["Body"] as body:
            size = answer["ContentLength"]
            if file.size not in (None, size):
                return b"", f"{size} bytes, published {file.size}"
            if size > LARGEST:
                return b"", f"{size} bytes, far more than an image has"
            data = body.read()
    except FlexibleChecksumError as error:  # S3's own checksum, where the object has one
        return b"", str(error)
    crc = posix_cksum(data) if file.cksum is not None else None
    return data, "" if crc == file.cksum else f"cksum {crc}, published {file.cksum}"


def _passing(error: ClientError) -> bool:
    """Whether S3 may answer otherwise in a moment."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or error.response["Error"].get("Code") in _TRY_AGAIN


class ByChip:
    """Collects the files of each chip in memory and hands complete chips to `consume(chip, {name: bytes})`.

    `consume` runs on the thread that brought the last file.  Files come chip after chip, so few chips (about
    24 MB each) are open at a time, at most one per thread.  A chip with a file that cannot be had is dropped.
    """

    def __init__(self, files: Iterable[Remote], consume: Callable[[str, dict[str, bytes]], object]):
        self._expected, self._consume = Counter(file.chip for file in files), consume
        self._open: dict[str, dict[str, bytes]] = {}
        self.dropped: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, file: Remote, data: bytes | None) -> None:
        with self._lock:
            if data is None:
                self.dropped.add(file.chip)
            if data is None or file.chip in self.dropped:
                self._open.pop(file.chip, None)
                return
            held = self._open.setdefault(file.chip, {})
            held[file.name] = data
            if len(held) < self._expected[file.chip]:
                return
            del self._open[file.chip]
        self._consume(file.chip, held)
