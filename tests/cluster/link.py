"""A network between namespaces of this machine, with a delay, jitter, loss and bandwidth, for kernels without netem.

Every namespace has a TUN device `net` with the address 10.77.0.k. One process reads the packets that are sent there, holds each
for its time or drops it, and writes it to the device of its receiver; TCP does the rest. For root on Linux.

In: `Network(spaces)`; `set(delay=..., ...)`, `cut(k)`, `mend(k)`. The process takes them as lines of JSON on stdin.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
DEVICE, PREFIX = "net", "10.77.0."
LONGEST = 0.2  # seconds that a packet may wait for those before it where the bandwidth is limited; later ones are dropped


class Network:
    """Namespaces, made here, and the process between them. Nodes are numbered from 1."""

    def __init__(self, spaces: Sequence[str]):
        self.spaces, self.down = spaces, set()
        for space in spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        words = [sys.executable, __file__, *spaces]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdout.readline()
        for k, space in enumerate(spaces, 1):
            _ip("-n", space, "addr", "add", f"{PREFIX}{k}/24", "dev", DEVICE)
            _ip("-n", space, "link", "set", DEVICE, "up")

    def set(self, delay: float = 0, jitter: float = 0, loss: float = 0, bandwidth: float = 0, seed: int = 0) -> None:
        """Seconds one way, and at most so many more; the share of packets that is dropped; bytes a second, 0: no limit."""
        self._tell(delay=delay, jitter=jitter, loss=loss, bandwidth=bandwidth, seed=seed)

    def cut(self, k: int) -> None:
        """Drop all packets to and from node k."""
        self.down.add(k)
        self._tell(cut=k)

    def mend(self, k: int) -> None:
        """Undo `cut`."""
        self.down.discard(k)
        self._tell(mend=k)

    def close(self) -> None:
        """End the process and remove the namespaces."""
        self._process.stdin.close()
        self._process.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def _tell(self, **what) -> None:
        """Send a command; the process answers when it is done."""
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Relay:
    """The process's work: packets from device to device."""

    def __init__(self, devices: Sequence[int]):
        self.devices, self.down = devices, set()
        self.how = {"delay": 0.0, "jitter": 0.0, "loss": 0.0, "bandwidth": 0.0, "seed": 0}
        self._random = random.Random(0)
        self._waiting: list[tuple[float, int, int, bytes]] = []  # when, number, device, packet
        self._number = 0
        self._last: dict[tuple[int, int], float] = {}  # when the last packet of each direction arrives: none overtakes another
        self._free: dict[tuple[int, int], float] = {}  # when each direction has room for the next

    def tell(self, what: dict) -> None:
        """Execute a command of Network."""
        if "cut" in what:
            self.down.add(what["cut"] - 1)
        elif "mend" in what:
            self.down.discard(what["mend"] - 1)
        else:
            self.how, self._random = what, random.Random(what["seed"])

    def take(self, source: int, packet: bytes, now: float) -> None:
        """Drop a packet, or keep it until its time."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        target, how = packet[19] - 1, self.how
        if not 0 <= target < len(self.devices) or {source, target} & self.down or self._random.random() < how["loss"]:
            return
        way, arrives = (source, target), now
        if how["bandwidth"]:
            arrives = max(now, self._free.get(way, 0)) + len(packet) / how["bandwidth"]
            if arrives > now + LONGEST:
                return
            self._free[way] = arrives
        arrives += how["delay"] + self._random.random() * how["jitter"]
        arrives = self._last[way] = max(arrives, self._last.get(way, 0))
        self._number += 1
        heapq.heappush(self._waiting, (arrives, self._number, target, packet))

    def give(self, now: float) -> float | None:
        """Write the packets that are due; returns seconds until the next, None if none is left."""
        while self._waiting and self._waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._waiting)
            if target not in self.down:
                with suppress(OSError):  # the device is down, or its queue full: lost, as on a cable
                    os.write(self.devices[target], packet)
        return max(0.0, self._waiting[0][0] - now) if self._waiting else None


def main(spaces: Sequence[str]) -> None:
    """Relay until stdin ends."""
    with suppress(OSError):
        os.nice(-10)  # so that the network keeps its speed on a busy machine
    devices = [_device(space) for space in spaces]
    relay, pause = Relay(devices), None
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([*devices, 0], [], [], pause)
        now = time.monotonic()
        for source in ready:
            if source == 0:
                line = os.read(0, 4096)
                if not line:
                    return
                relay.tell(json.loads(line))
                print("done", flush=True)
                continue
            with suppress(BlockingIOError):
                while True:
                    relay.take(devices.index(source), os.read(source, 65536), now)
        pause = relay.give(time.monotonic())


def _device(space: str) -> int:
    """A descriptor of a new TUN device in a namespace."""
    here, libc = os.open("/proc/self/ns/net", os.O_RDONLY), ctypes.CDLL(None, use_errno=True)
    there = os.open(f"/run/netns/{space}", os.O_RDONLY)
    _enter(libc, there)
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    finally:
        _enter(libc, here)
        os.close(here)
        os.close(there)
    return device


def _enter(libc, namespace: int) -> None:
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


if __name__ == "__main__":
    main(sys.argv[1:])
