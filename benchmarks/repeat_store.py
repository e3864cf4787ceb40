"""A packed store whose chips are those of another, several times over under other names: epochs as long as a
measurement wants, without making as many chips.

    python benchmarks/repeat_store.py STORE OUT --times 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
import zlib
from pathlib import Path

from engine.base.cli import main
from engine.data.index import read_manifest
from engine.data.store.chip_file import CHIPS, MANIFEST, SUFFIX, read_head


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=4)
    return parser


def run(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.store)
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / CHIPS).mkdir(parents=True)
    chips = []
    for chip in manifest["chips"]:
        whole = args.store / CHIPS / f"{chip['id']}{SUFFIX}"
        for k in range(args.times):
            name = hashlib.sha256(f"{chip['id']} {k}".encode()).hexdigest()[:len(chip["id"])]
            (args.out / CHIPS / f"{name}{SUFFIX}").write_bytes(renamed(whole, name))
            chips.append({**chip, "id": name})
    (args.out / MANIFEST).write_text(json.dumps({**manifest, "chips": chips}))
    print(f"{len(chips)} chips in {args.out}, {len(manifest['chips'])} of them different")
    return 0


def renamed(path: Path, name: str) -> bytes:
    """The packed file of a chip under a name of the same length; its head ends with the head's checksum."""
    head, data = read_head(path), bytearray(path.read_bytes())
    data[:head.start] = data[:head.start].replace(f'"chip":"{head.chip}"'.encode(), f'"chip":"{name}"'.encode())
    data[head.start - 4:head.start] = struct.pack("<I", zlib.crc32(data[:head.start - 4]))
    return bytes(data)


if __name__ == "__main__":
    main(arguments(), run)
