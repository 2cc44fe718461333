"""The exceptions that this project raises on purpose, in one tree.

    LlamacliError                 base class, exit code 1
    |- ModelFileError             damaged or hostile GGUF: wrong magic, truncated, impossible counts, a missing tensor
    |  `- UnsupportedModelError   valid GGUF that this engine cannot run: another architecture, an unknown tensor type
    |- CheckpointError            Hugging Face folder that cannot be converted
    |- PromptError                prompt, message list or chat template that cannot be turned into tokens
    |- PictureError               picture that is damaged, too large, or of a format that is not read
    |- ContextFullError           the conversation reached its context limit
    |- CutAnswerError             an answer that a schema or a grammar binds ended before it was whole
    |- MemoryLimitError           the model does not fit into the memory allowed
    |- DeviceError                a GPU or its driver failed
    |- DownloadError              a model cannot be fetched: no network, no permission, other bytes than promised
    |- ServerError                a server cannot be reached, refuses, or breaks an answer off
    |- OutputError                output file exists, disk full, read-only
    `- UsageError                 wrong or impossible arguments, exit code 2

A message is one line: the file, what was expected, what was found, what to do next. Modules raise these and never print; the
command line prints them on stderr (cli/__init__.py).
"""

import errno


class LlamacliError(Exception):
    """Base of the tree. `str(error)` is one line for the user."""

    exit_code = 1


class ModelFileError(LlamacliError):
    """The file is not a valid GGUF."""


class UnsupportedModelError(ModelFileError):
    """The file is a valid GGUF that this engine cannot run."""


class CheckpointError(LlamacliError):
    """The Hugging Face folder cannot be converted."""


class PromptError(LlamacliError):
    """Text, messages or a template cannot be turned into tokens."""


class PictureError(LlamacliError):
    """A picture cannot be read."""


class ContextFullError(LlamacliError):
    """The context is full. Nothing was dropped."""


class CutAnswerError(LlamacliError):
    """An answer ended before it was all that its schema, grammar or choice requires."""


class MemoryLimitError(LlamacliError):
    """The memory allowed is too small for the weights that every token uses."""


class DeviceError(LlamacliError):
    """A GPU or its driver failed."""


class DownloadError(LlamacliError):
    """A model cannot be fetched. The bytes received are kept, and the next try continues after them."""


class ServerError(LlamacliError):
    """A server cannot be reached, refuses, or breaks an answer off."""


class OutputError(LlamacliError):
    """The output file cannot be written."""


class UsageError(LlamacliError):
    """The arguments are wrong or contradict each other."""

    exit_code = 2


def next_step(error: Exception, otherwise: str) -> str:
    """The advice for a file that could not be opened or mapped because a limit of the process is too low."""
    limits = {errno.ENOMEM: "address space (ulimit -v)", errno.EMFILE: "open files (ulimit -n)"}
    limit = limits.get(getattr(error, "errno", None))
    return f"raise the limit of {limit}" if limit else otherwise
