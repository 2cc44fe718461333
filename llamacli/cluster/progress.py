"""Detects a node without progress: a process whose disk hangs still answers pings.

In: the work under way. Out: the seconds without progress, which are sent with the answers to pings. A process makes progress if
it reads from a disk, by the system's count, or computes. A node without progress for STALLED seconds counts as lost: no disk
takes so long for its next bytes, and every batch does one of the two.
"""

import resource
import sys
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from os import sysconf
from pathlib import Path

STALLED = 60.0  # seconds without progress after which a node counts as lost
BUSY = 0.01  # share of a core: computing uses more, waiting with pings less

WHY = f"no progress for {STALLED:.0f} s: it answers, but neither computes nor reads, as where a disk hangs"


def _look() -> tuple[int, dict[int, float]]:
    """Reads and page faults of this process from disks; seconds that its threads have computed.

    Ray's threads, among them the main thread, are not counted. If the system does not show threads, they are, and a hanging
    node may not be detected.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    if sys.platform != "linux":
        return used.ru_inblock + used.ru_majflt, {0: used.ru_utime + used.ru_stime}
    seconds = {}
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            with suppress(OSError):  # it has ended
                fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
                seconds[thread.native_id] = (int(fields[11]) + int(fields[12])) / sysconf("SC_CLK_TCK")
    return used.ru_inblock + used.ru_majflt, seconds


def hangs(head: dict) -> bool:
    """Whether the answer to a ping says that a node has made no progress for too long."""
    seconds = head.get("stalled")
    return isinstance(seconds, float) and seconds > STALLED


class Progress:
    """Progress of a node; `stalled` is called about once a second."""

    def __init__(self, look: Callable[[], tuple[int, dict[int, float]]] = _look):
        self._look = look
        self._work: Hashable = None
        self._reads, self._seconds, self._computed, self._since = 0, {}, 0.0, time.monotonic()

    def stalled(self, work: Hashable) -> float:
        """Seconds without progress of the work under way, which any value identifies; 0 for None, which means no work."""
        now = time.monotonic()
        if work is None:
            self._work, self._since = None, now
            return 0.0
        reads, seconds = self._look()
        self._computed += sum(max(0.0, each - self._seconds.get(thread, 0.0)) for thread, each in seconds.items())
        self._seconds = seconds
        if work != self._work or reads != self._reads or self._computed >= BUSY * STALLED:
            self._work, self._reads, self._computed, self._since = work, reads, 0.0, now
        return now - self._since
