"""Where the main thread of this process stands, said by it and read by the thread that watches (`engine.base.watch`).

All ranks enter the same sections and send the same messages in the same order, so who has counted fewest is behind.
"""

from __future__ import annotations


class Sections:
    """For the main thread alone, as often as it likes: nothing is locked, sent or waited for."""

    def __init__(self) -> None:
        self.now = 0, ""  # in one: steps that all ranks take alike, and the section's name
        self.alive = 0

    def enter(self, name: str) -> None:
        """"": one in which no rank is missed."""
        self.now = self.now[0] + 1, name

    def passed(self) -> None:
        """Before a message to all ranks: who waits in it is ahead of those that have not come there."""
        self.now = self.now[0] + 1, self.now[1]

    def moved(self) -> None:
        """A sign of life from what ranks do each by itself, such as a chip checked."""
        self.alive += 1


HERE = Sections()
