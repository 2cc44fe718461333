"""How many threads suit this machine, and the cgroups around this process.

Out: counts of cores; folders of cgroups. Everything is read from /proc, /sys and, on macOS, sysctl; `root` is where /proc and
/sys lie. What cannot be read limits nothing.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

FAST = 3 / 4  # of the fastest core's speed; threads wait for each other after each step, so slower cores would delay all
_CPUS = "sys/devices/system/cpu"


def default_threads(root: Path = Path("/")) -> int:
    """Threads for computing a model: one for each fast core that this process may use, as far as a cgroup's quota goes."""
    return _within_quota(_mac_cores() if sys.platform == "darwin" else _fast_cores(root), root)


def usable_cpus(root: Path = Path("/")) -> int:
    """Hardware threads that this process may use, of any kind, as far as a cgroup's quota goes."""
    return _within_quota(len(_allowed()), root)


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """The folders of each cgroup of `controller` from this process's own up to the top, and whether they are of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, controllers_path = line.partition(":")
        controllers, _, path = controllers_path.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be one that only the host sees: then what is left of it is the top.
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, bool(controllers)
            if folder == top:
                break


def sysctl(name: str) -> int:
    """A number that macOS knows by this name, or 0."""
    value = ctypes.c_int64(0)
    return value.value if _sysctl(name, value) else 0


def _within_quota(cores: int, root: Path) -> int:
    """`cores`, or fewer if a cgroup allows less time: more threads would all be stopped together until the next period."""
    quotas = [-(-quota // period) for quota, period in _quotas(root) if quota > 0 and period > 0]
    return max(1, min([cores, *quotas]))


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """Microseconds of CPU time that each cgroup allows, and in which period."""
    for folder, v1 in cgroups("cpu", root):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if v1 else ("cpu.max",)
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            yield int(quota), int(period)
        except (OSError, ValueError):  # no such file; "max"
            continue


def _allowed() -> set[int]:
    """The hardware threads that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _fast_cores(root: Path) -> int:
    """Linux: allowed cores of the fast kind. Hardware threads of one core count once, since they share its arithmetic."""
    allowed = _allowed()
    cpus = allowed & _listed(_text(root / "sys/devices/cpu_core/cpus")) or allowed  # x86 with cores of two kinds
    speeds = {cpu: _speed(root, cpu) for cpu in cpus}
    fast = [cpu for cpu, speed in speeds.items() if speed >= FAST * max(speeds.values())]
    return len({_text(root / f"{_CPUS}/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in fast})


def _speed(root: Path, cpu: int) -> int:
    """A core's speed as Linux gives it on ARM: 1024 for the fastest, and where Linux gives none."""
    text = _text(root / f"{_CPUS}/cpu{cpu}/cpu_capacity")
    return int(text) if text.isdecimal() else 1024


def _listed(text: str) -> set[int]:
    """The numbers of a list such as "0-3,8"."""
    found = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    """The text of a file of one line; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _mac_cores() -> int:
    """macOS: cores of the first performance level and of every other one but those for efficiency."""
    levels = range(1, sysctl("hw.nperflevels"))
    others = (sysctl(f"hw.perflevel{k}.physicalcpu") for k in levels if _sysctl_text(f"hw.perflevel{k}.name") != "Efficiency")
    first = sysctl("hw.perflevel0.physicalcpu")
    return first + sum(others) if first else sysctl("hw.physicalcpu") or os.cpu_count() or 1


def _sysctl_text(name: str) -> str:
    """A text that macOS knows by this name; "Efficiency" for a level without a name."""
    value = ctypes.create_string_buffer(64)
    return value.value.decode(errors="replace") if _sysctl(name, value) else "Efficiency"


def _sysctl(name: str, value: ctypes.Array | ctypes.c_int64) -> bool:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    return not ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
