"""Runs Ray's own command `ray start` in this process: `python -m llamacli.cluster.launch start ...` (control.py).

Ray replaces a loopback address by one that others can reach and then listens on all interfaces. If the address asked for is on
the loopback, it is kept here, and Ray listens there alone.
"""

import sys


def keep_loopback() -> None:
    """Have Ray take 127.0.0.1 as this machine's address."""
    from ray._private import services

    services.get_node_ip_address = lambda address=None: "127.0.0.1"


def main() -> None:
    """The arguments are those of `ray`."""
    from ray.scripts.scripts import main as ray

    if "--node-ip-address=127.0.0.1" in sys.argv:
        keep_loopback()
    ray()


if __name__ == "__main__":
    main()
