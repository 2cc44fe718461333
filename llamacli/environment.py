"""Every environment variable that the project reads, and where its own files lie.

    LLAMACLI_MODEL   the model when -m is absent            LLAMACLI_DEBUG   1: a traceback with an error
    LLAMACLI_CACHE   folder of compiled kernels             LLAMACLI_SIMD    force one variant of the kernels
    NO_COLOR, TERM   no colour                              LLAMACLI_...     each setting of `llamacli config`
    XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_CACHE_HOME, XDG_DATA_HOME           the user's folders

The kernels read their two themselves, when they are first used (cpu/kernels/__init__.py, cpu/kernels/jit/loader.py), the parser
those of settings (cli/grammar.py); all others are read here only. Importing this costs nothing.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the small model inside the package (pyproject.toml, force-include); a clone keeps it beside the package.
MODELS = _PACKAGE / "models" if (_PACKAGE / "models").is_dir() else _PACKAGE.parent / "models"
SMALL_MODEL = MODELS / "scout-tiny" / "scout-tiny.gguf"


def model() -> str | None:
    """The model that the user prefers, a file or a name."""
    return os.environ.get("LLAMACLI_MODEL") or None


def model_folders() -> list[Path]:
    """Folders in which the name of a model is looked up: the project's `models/`, then the user's own."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return [MODELS, Path(data) / "llamacli" / "models"]


def debug() -> bool:
    """Whether an error shows its traceback."""
    return os.environ.get("LLAMACLI_DEBUG", "") not in ("", "0")


def plain_terminal() -> bool:
    """Whether the user or the terminal asks for no colour."""
    return bool(os.environ.get("NO_COLOR")) or dumb_terminal()


def dumb_terminal() -> bool:
    """Whether the terminal knows no control sequences."""
    return os.environ.get("TERM") == "dumb"


def config_file() -> Path:
    """The user's settings file, which `llamacli config` shows and edits."""
    root = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(root) / "llamacli" / "config.toml"


def state_folder() -> Path:
    """Where the program keeps what should last. Without a home, a folder of this user's in the temporary one."""
    root = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if not os.path.isabs(root):
        root = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"llamacli-{os.getuid()}")
    return Path(root) / "llamacli"


def conversations_file() -> Path:
    """The database of conversations and of what was typed."""
    return state_folder() / "conversations.db"
