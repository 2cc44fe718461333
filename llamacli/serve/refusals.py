"""Converts exceptions to responses.

In: an exception. Out: a Refusal. Errors of the machine name files, so they are reported on stderr only; the client is told only
that an error occurred.
"""

import traceback
from collections.abc import Callable

from llamacli import environment
from llamacli.errors import ContextFullError, LlamacliError, MemoryLimitError, PictureError, PromptError, UsageError
from llamacli.serve.fields import Refusal
from llamacli.serve.scheduler import Broken, Busy, Stopping


def refusal_of(error: Exception, report: Callable[[str], None]) -> Refusal:
    """The Refusal for an exception. `report`: called with a line for stderr if the client is not told the details."""
    match error:
        case Refusal():
            return error
        case Busy():
            return Refusal(str(error), 503, "queue_full", retry=5)
        case Stopping():
            return Refusal(str(error), 503, "stopping", retry=10)
        case ContextFullError():
            return Refusal(str(error), 400, "context_length_exceeded")
        case PromptError() | PictureError() | UsageError():
            return Refusal(str(error), 400, "invalid_value")
        case RecursionError():
            return Refusal("expected a body of JSON, found brackets nested too deep", 400, "invalid_json")
        case Broken():
            return Refusal(str(error), 500, "server_error")
        case MemoryLimitError():
            report(str(error))
            return Refusal("the server's memory is too short at the moment; ask again later", 503, "out_of_memory", retry=30)
        case LlamacliError():
            report(str(error))
            return Refusal("the model could not answer; the server's stderr says why", 500, "model_error")
    tell_bug(error, report)
    return Refusal("an unexpected error; the server's stderr says which", 500, "server_error")


def tell_bug(error: Exception, report: Callable[[str], None]) -> None:
    """Report an unexpected error."""
    report(f"{type(error).__name__}: {error} (a bug, please report it; LLAMACLI_DEBUG=1 shows where)")
    if environment.debug():
        report("".join(traceback.format_exception(error)))
