"""Every error this project raises on purpose, in one tree.

    LlamacliError                 the base: one sentence for the user, exit code 1
    |- ModelFileError             a GGUF that cannot be trusted: not one, truncated, absurd counts, missing or misshapen tensor
    |  `- UnsupportedModelError   a sound GGUF that is not for this engine: another architecture, an unknown tensor type
    |- CheckpointError            a Hugging Face folder that cannot be converted
    |- PromptError                a prompt, message list or chat template that cannot be turned into tokens
    |- ContextFullError           the conversation has reached its context limit
    |- MemoryLimitError           the model does not fit the memory that it may take
    |- OutputError                the result cannot be written: exists already, no room, read-only
    `- UsageError                 the command line asks for something impossible, exit code 2

A message says file, what was expected, what was found and what to do next, in one line. Modules raise these and never print;
the command line turns them into one line on stderr (cli/__init__.py). Knows nothing of files, models or terminals.
"""


class LlamacliError(Exception):
    """Base of the tree. `str(error)` is one line fit for a user."""

    exit_code = 1


class ModelFileError(LlamacliError):
    """The file is no sound GGUF."""


class UnsupportedModelError(ModelFileError):
    """The file is a sound GGUF that this engine cannot run."""


class CheckpointError(LlamacliError):
    """The Hugging Face folder cannot be converted."""


class PromptError(LlamacliError):
    """Text, messages or template that do not become tokens."""


class ContextFullError(LlamacliError):
    """No room is left in the context; nothing was dropped silently."""


class MemoryLimitError(LlamacliError):
    """The memory allowed does not hold what every token needs."""


class OutputError(LlamacliError):
    """The output file cannot be written."""


class UsageError(LlamacliError):
    """The command line cannot be obeyed."""

    exit_code = 2
