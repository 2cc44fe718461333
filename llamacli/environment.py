"""Every environment variable that the project reads, and where its own files lie.

    LLAMACLI_MODEL   the model when -m is absent            LLAMACLI_DEBUG   1: a traceback with an error
    LLAMACLI_MODELS  folder of the user's models            HF_TOKEN, HF_ENDPOINT    of the hub that models come from
    OLLAMA_MODELS, HF_HUB_CACHE, HF_HOME     folders of other programs whose models are used where they lie
    LLAMACLI_CACHE   folder of compiled kernels             LLAMACLI_SIMD    force one variant of the kernels
    LLAMACLI_API_KEY the key of a server                LLAMACLI_WIRED_GB    what a Mac's GPU may wire; by default nothing
    LLAMACLI_CLUSTER_SECRET    what the nodes of a cluster know each other by; else a file has it
    NO_COLOR, TERM   no colour                              LLAMACLI_...     each setting of `llamacli config`
    XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_CACHE_HOME, XDG_DATA_HOME           the user's folders

LLAMACLI_SIMD is read by cpu/kernels/jit/loader.py, the variables of settings by cli/grammar.py, all others here only. Importing
this module costs nothing. Every function works without HOME and for a user without an entry in the password file.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the small model inside the package (pyproject.toml, force-include); a clone keeps it beside the package.
MODELS = _PACKAGE / "models" if (_PACKAGE / "models").is_dir() else _PACKAGE.parent / "models"
SMALL_MODEL = MODELS / "scout-tiny" / "scout-tiny.gguf"


def model() -> str | None:
    """The model used when -m is absent, a file or a name."""
    return os.environ.get("LLAMACLI_MODEL") or None


def model_folders() -> list[Path]:
    """Folders of our own in which the name of a model is looked up: the project's `models/`, then the user's own."""
    return [MODELS, models_folder()]


def models_folder() -> Path:
    """The user's folder of models, which `llamacli models` fills."""
    named = os.environ.get("LLAMACLI_MODELS")
    return Path(os.path.expanduser(named)) if named else _user_folder("XDG_DATA_HOME", ".local/share") / "models"


def ollama_folders() -> list[Path]:
    """Folders of Ollama's models: the user's, and that of a system-wide service."""
    named = os.environ.get("OLLAMA_MODELS")
    usual = [Path(os.path.expanduser("~")) / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    return [Path(named)] if named else usual


def hub_cache() -> Path:
    """The folder in which the package huggingface_hub keeps what it downloads."""
    named = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "huggingface"
    )
    return Path(os.path.expanduser(named or os.path.join(home, "hub")))


def hub_endpoint() -> str:
    """The hub from which models are pulled: Hugging Face's or a mirror."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """What the hub knows the user by; it goes to no other host."""
    return (os.environ.get("HF_TOKEN") or "").strip() or None


def api_key() -> str | None:
    """The key that `serve` asks for, and that clients of ours send."""
    return os.environ.get("LLAMACLI_API_KEY") or None


def cluster_secret() -> str | None:
    """What the nodes of a cluster know each other by."""
    if named := os.environ.get("LLAMACLI_CLUSTER_SECRET"):
        return named
    try:
        return cluster_secret_file().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def cluster_secret_file() -> Path:
    """The file of the secret, which `llamacli cluster start` writes and which the user copies to the other machines."""
    return _user_folder("XDG_CONFIG_HOME", ".config") / "cluster-secret"


def debug() -> bool:
    """Whether an error shows its traceback."""
    return os.environ.get("LLAMACLI_DEBUG", "") not in ("", "0")


def wired_gigabytes() -> float:
    """How many gigabytes a Mac's GPU may wire: macOS can neither swap nor compress them; 0, the default: none.

    Wiring has been reported to panic macOS under load (docs/machines.md), so only this variable asks for it.
    """
    try:
        asked = float(os.environ.get("LLAMACLI_WIRED_GB", "0"))
    except ValueError:
        return 0.0
    return asked if 0 < asked < 1e6 else 0.0


def plain_terminal() -> bool:
    """Whether the user or the terminal asks for no colour."""
    return bool(os.environ.get("NO_COLOR")) or dumb_terminal()


def dumb_terminal() -> bool:
    """Whether the terminal has no control sequences, or unknown ones."""
    return os.environ.get("TERM") in ("dumb", "unknown")


def config_file() -> Path:
    """The user's settings file, which `llamacli config` shows and edits."""
    return _user_folder("XDG_CONFIG_HOME", ".config") / "config.toml"


def templates_folder() -> Path:
    """The user's prompt templates, NAME.toml each, which `run --template NAME` fills in."""
    return _user_folder("XDG_CONFIG_HOME", ".config") / "templates"


def cache_root() -> Path:
    """The folder of files that can be made again: compiled kernels, snapshots, random models of `bench --shape`."""
    named = os.environ.get("LLAMACLI_CACHE")
    return Path(named) if named else _user_folder("XDG_CACHE_HOME", ".cache")


def snapshots_folder() -> Path:
    """The folder of keys and values of prompts."""
    return cache_root() / "snapshots"


def state_folder() -> Path:
    """The folder of files that must be kept, such as conversations."""
    return _user_folder("XDG_STATE_HOME", ".local/state")


def conversations_file() -> Path:
    """The database of conversations and of what was typed."""
    return state_folder() / "conversations.db"


def _user_folder(variable: str, below_home: str) -> Path:
    """Our folder in the one that `variable` names, else below the home (XDG Base Directory Specification).

    Without a home it lies in the temporary folder, under a name that holds the user's number.
    """
    root = os.environ.get(variable) or os.path.join(os.path.expanduser("~"), below_home)
    if not os.path.isabs(root):
        root = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"llamacli-{os.getuid()}", below_home)
    return Path(root) / "llamacli"
