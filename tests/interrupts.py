"""Ctrl-C at a chosen line: a trace function that raises KeyboardInterrupt inside one module."""

import inspect
import sys


def run_traced(action, module, interrupt_at=None, skip=()) -> int:
    """Run `action` and count the events (calls, lines, returns) in `module`, functions named in `skip` left out.

    At event `interrupt_at`, counted from 1, KeyboardInterrupt is raised where the module's code is.
    """
    events = 0

    def trace(frame, event, argument):
        nonlocal events
        if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name in skip:
            return None
        if frame.f_code.co_flags & inspect.CO_GENERATOR:  # a generator closed while memory is freed would lose the exception
            return None
        events += 1
        if events == interrupt_at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return events
