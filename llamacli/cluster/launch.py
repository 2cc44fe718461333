"""Runs Ray's own command `ray start` in this process: `python -m llamacli.cluster.launch start ...` (processes.py).

Ray replaces a loopback address by one that others can reach and then listens on all interfaces. If the address asked for is on
the loopback, it is kept here, and Ray listens there alone. Ray Client, which nothing here uses and which would always listen at
port 10001, is not started.

Ray removes a node that was disconnected or stopped for a while, and the node's processes end when they learn of it. A node that
had joined then joins again as soon as the cluster accepts connections.
"""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from llamacli import environment
from llamacli.errors import DeviceError

AGAIN = 3.0  # seconds between two attempts to join again
ADDRESS = "--address="
TESTED = "2.60.0"  # the version of Ray that tests ran with


def check_private(holder, *names: str) -> None:
    """DeviceError unless this version of Ray has these private names, for which it has no public ones."""
    if missing := [name for name in names if not hasattr(holder, name)]:
        from ray import __version__

        raise DeviceError(
            f"ray {__version__}: expected a version with {', '.join(missing)}, found one without; install ray {TESTED}, with "
            f"which llamacli was tested"
        )


def keep_loopback() -> None:
    """Make Ray use 127.0.0.1 as this machine's address."""
    from ray._private import services

    check_private(services, "get_node_ip_address")
    services.get_node_ip_address = lambda address=None: "127.0.0.1"


def main() -> None:
    """The arguments are those of `ray`."""
    address = next((word.removeprefix(ADDRESS) for word in sys.argv if word.startswith(ADDRESS)), None)
    if address:
        _stay(address)  # returns in children
    sys.modules["grpc"] = None  # Ray has no option to disable its Client, but it does not start it without this package
    from ray.scripts.scripts import main as ray

    if "--node-ip-address=127.0.0.1" in sys.argv:
        keep_loopback()
    ray()


def record(pid: int) -> Path:
    """The file that records a started node, and whether it has joined (processes.py)."""
    return environment.state_folder() / "cluster" / f"{pid}.json"


def _stay(address: str) -> None:
    """Return in a child process; return in a new one whenever that ended without `stop` after it had joined."""
    child, stopped = 0, False

    def stop(number: int, _) -> None:
        nonlocal stopped
        stopped = True
        with suppress(ProcessLookupError):
            if child:
                os.kill(child, number)

    signal.signal(signal.SIGTERM, stop)
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return
        _, status = os.waitpid(child, 0)
        while not stopped and record(os.getpid()).exists():
            time.sleep(AGAIN)
            if _answers(address):
                break
        else:
            os._exit(max(1, os.waitstatus_to_exitcode(status)))


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), AGAIN).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
