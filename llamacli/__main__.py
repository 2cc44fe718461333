"""The program's door: `llamacli` and `python -m llamacli` both call `start`.

Until the signal handlers of cli/signals.py are there, Ctrl-C and SIGTERM end the process without a word, as they end a program
that has not said anything. The interpreter's own handler would show a traceback of whatever is being imported, so `start` comes
before all imports but those of this module and its package, which are small for that reason.
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
