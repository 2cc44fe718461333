"""Measures this machine: memory that is free, memory that this process holds, and the speed of a file's disk.

Out: bytes, bytes a second. Free memory is what the machine has left and, inside a cgroup (v1, v2, nested), what every limit
above this process still allows; page cache that can be reclaimed counts as free.
"""

import os
import random
import re
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamacli.cpu.kernels.cores import cgroups
from llamacli.files import pages

RESERVE_SHARE, RESERVE_MOST = 20, 2 << 30  # of free memory, one part in twenty is left to others, 2 GiB at most


_reserved: dict[object, int] = {}  # bytes that each model of this process may come to hold


def reserve(owner: object, nbytes: int) -> weakref.finalize:
    """Count `nbytes` against the memory of models loaded later, until `owner` is gone or the result is called."""
    key = object()
    _reserved[key] = nbytes
    return weakref.finalize(owner, _reserved.pop, key, None)


def reserved() -> int:
    """Bytes that the models of this process may come to hold, whether they hold them already or not."""
    return sum(list(_reserved.values()))


def budget() -> int:
    """Bytes that a process may use where the user sets no limit: what is free, less a reserve for other processes."""
    free = memory_free()
    return free - min(free // RESERVE_SHARE, RESERVE_MOST)


def memory_free(root: Path = Path("/")) -> int:
    """Bytes that the machine and every cgroup around this process can still give. `root` is where /proc and /sys lie."""
    machine = _vm_stat() if sys.platform == "darwin" else _meminfo(root)
    if machine is None:  # the system does not say: take all there is
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *_cgroups(root)]))


def memory_short(root: Path = Path("/")) -> int:
    """Bytes that are held beyond what a cgroup allows, because its limit was lowered; 0 as a rule."""
    return max(0, -min(_cgroups(root), default=0))


def resident(root: Path = Path("/")) -> int:
    """Bytes of memory that this process holds now, touched pages of mapped files included; 0 where the system does not say."""
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        output = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True)
        return int(output.stdout) * 1024
    except (OSError, ValueError):  # no ps, or one that needs /proc
        return 0


def resident_words() -> str:
    """`resident` in words."""
    nbytes = resident()
    return f"{nbytes / 1e9:.2f} GB resident" if nbytes else "resident memory unknown here"


def resident_peak() -> int:
    """Most bytes of memory that this process held at any time.

    Linux reports it in /proc/self/status. Its getrusage is the larger of this and what the process that started this one held.
    """
    try:
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def private(root: Path = Path("/")) -> int:
    """Bytes of resident memory without shared pages such as those of mapped files; 0 where the system does not say."""
    try:
        held, shared = (root / "proc/self/statm").read_text().split()[1:3]
        return (int(held) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def disk_read_speed(path: os.PathLike | str, seconds: float = 0.3) -> float | None:
    """Bytes a second of direct reads of pieces from anywhere in the file, several in flight, as experts are read.

    Nothing is left in the page cache. None where the file is smaller than a few pieces or lies where direct reads are not
    possible (tmpfs).
    """
    from llamacli.files.reads import IN_FLIGHT, PIECE, open_direct  # it loads NumPy, which help does without

    try:
        fd = open_direct(path)
    except OSError:
        return None
    try:
        offsets = [piece * PIECE for piece in range(os.fstat(fd).st_size // PIECE)]
        if len(offsets) < IN_FLIGHT:
            return None
        random.shuffle(offsets)
        buffers = memoryview(pages.memory(IN_FLIGHT * PIECE))
        # Touching every page makes the memory resident before the time is taken.
        buffers[:: os.sysconf("SC_PAGE_SIZE")] = bytes(-(-len(buffers) // os.sysconf("SC_PAGE_SIZE")))
        began = time.perf_counter()

        def lane(i: int) -> int:
            """Read every IN_FLIGHT-th piece once, until the time is up; returns the bytes read."""
            done, buffer = 0, buffers[i * PIECE : (i + 1) * PIECE]
            for offset in offsets[i::IN_FLIGHT]:
                done += os.preadv(fd, [buffer], offset)
                if time.perf_counter() - began > seconds:
                    break
            return done

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            nbytes = sum(pool.map(lane, range(IN_FLIGHT)))
        return nbytes / (time.perf_counter() - began)
    except OSError:
        return None
    finally:
        os.close(fd)


def _meminfo(root: Path) -> int | None:
    return _field(root / "proc/meminfo", "MemAvailable:", 1024)


def _field(path: Path, name: str, unit: int = 1) -> int | None:
    """The number after `name` in a file of lines."""
    try:
        return next(int(line.split()[1]) * unit for line in path.read_text().splitlines() if line.split()[:1] == [name])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def wired() -> int | None:
    """Bytes that macOS keeps from being moved, a GPU's among them; None elsewhere."""
    pages = _mac_pages() if sys.platform == "darwin" else {}
    return pages.get("Pages wired down")


def _vm_stat() -> int | None:
    """macOS: bytes of free and purgeable pages, and of inactive pages of files. Other inactive pages would be swapped."""
    pages = _mac_pages()
    if "Pages free" not in pages:
        return None
    aged = pages.get("Pages inactive", 0) + pages.get("Pages speculative", 0)
    files = min(aged, pages.get("File-backed pages", aged))
    return pages["Pages free"] + pages.get("Pages purgeable", 0) + files


def _mac_pages() -> dict[str, int]:
    """What `vm_stat` says, in bytes; nothing where it cannot be asked."""
    try:
        output = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=5).stdout
        page = int(re.search(r"page size of (\d+)", output)[1])
    except (OSError, subprocess.SubprocessError, TypeError):
        return {}
    return {name: page * int(n) for name, n in re.findall(r"^(.+?): +(\d+)", output, re.M)}


def _cgroups(root: Path) -> Iterator[int]:
    """What each memory cgroup from this process's own up to the top still allows."""
    for folder, v1 in cgroups("memory", root):
        limits, used, kind = (
            (["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_")
            if v1
            else (["memory.max", "memory.high"], "memory.current", "")
        )
        for limit in limits:
            if (most := _number(folder / limit)) is not None and (held := _number(folder / used)) is not None:
                cached = (_field(folder / "memory.stat", f"{kind}{age}_file") or 0 for age in ("active", "inactive"))
                yield most - held + sum(cached)


def _number(path: Path) -> int | None:
    """The number in a file; None for no such file and for "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
