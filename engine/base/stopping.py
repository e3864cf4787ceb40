"""Whether this process is to stop: by a signal, because its time is over, or because who started it is gone.

The `deepspeed` command passes no signal on: it ends, and its ranks would train on.  So every process looks whether
those who started it are alive, and where they are not it signals itself.  A handler notes the signal and does nothing
else; what trains looks at a step's end, and what does not listen ends as by any signal.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

from engine.base.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PERIOD = 0.5  # seconds between looks

_LAUNCHERS = re.compile(rb"deepspeed|torch\.distributed|torchrun")
_UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


class Asked:
    """Set from the first signal on that `listen` hears; a second SIGINT ends the process, as people expect."""

    def __init__(self) -> None:
        self.now = False

    def listen(self, seconds: float | None = None) -> None:
        """From now on SIGNALS only ask, and so does the end of so many seconds."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        if seconds is not None:
            timer = threading.Timer(seconds, self._note)
            timer.daemon = True
            timer.start()

    def _note(self, number: int = 0, frame: object = None) -> None:
        self.now = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


ASKED = Asked()


def parse_time(text: str) -> float:
    """Seconds of "3h50m", "1d", "90s", "45" (minutes).  Raises ConfigError."""
    found = re.fullmatch(r"(?:\d+[dhms])+", text)
    if not found and not text.isdecimal():
        raise ConfigError(f"--max-time {text}: write it as 3h50m, 45m, 1d2h or 90s")
    parts = re.findall(r"(\d+)([dhms])", text) or [(text, "m")]
    seconds = float(sum(int(number) * _UNITS[unit] for number, unit in parts))
    if not seconds:
        raise ConfigError(f"--max-time {text}: no time to train in")
    return seconds


def follow_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it, or who started that one, is gone.

    A parent that is no launcher (a shell, a scheduler) may end without it.
    """
    followed = launchers_of(os.getpid())
    if followed:
        threading.Thread(target=_follow, args=(followed,), name="follow-launcher", daemon=True).start()


def _follow(followed: list[tuple[int, str]]) -> None:
    wait = threading.Event()
    while all(_begun(process) == begun for process, begun in followed):
        wait.wait(PERIOD)
    os.kill(os.getpid(), signal.SIGTERM)


def launchers_of(process: int) -> list[tuple[int, str]]:
    """The launchers above a process, nearest first: number, and when each began (numbers are used again)."""
    found = []
    parent = _parent(process)
    while parent > 1 and _LAUNCHERS.search(_command(parent)):
        found.append((parent, _begun(parent)))
        parent = _parent(parent)
    return found


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _fields(process: int) -> list[str]:
    """Of /proc/PID/stat behind the name, which may hold anything; proc(5)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(process: int) -> int:
    fields = _fields(process)
    return int(fields[1]) if fields else 0


def _begun(process: int) -> str:
    """In ticks since the machine began; empty for one that is no more, or ended and is not yet waited for."""
    fields = _fields(process)
    return fields[19] if fields and fields[0] not in "ZX" else ""
