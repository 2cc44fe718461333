"""Entry point of the program: `llamacli` and `python -m llamacli` both call `start`.

Until cli/signals.py has installed its handlers, Ctrl-C and SIGTERM end the process without a message. The interpreter's own
handler for Ctrl-C would show a traceback of the import under way. So `start` restores the system's handling before other
modules are imported, and this module and its package import little.
"""

import _signal  # built in; `signal` imports more


def start() -> None:
    """Run one command and end the process."""
    for number in (_signal.SIGINT, _signal.SIGTERM):
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, _signal.SIG_DFL)
    from llamacli.cli import enter

    enter()


if __name__ == "__main__":
    start()
