"""The settings file: defaults of options, as TOML in the user's configuration folder.

In: config.toml with keys such as `model`, `temp`, `max-tokens`. Out: values for the parser, which takes an option first, then a
LLAMACLI_NAME variable, then this file, then the model's own default. `llamacli config` (config.py) shows and edits the file.
"""

import os
from contextlib import suppress
from pathlib import Path

from llamacli import environment
from llamacli.errors import OutputError, UsageError


def path() -> Path:
    """The file's path, whether it exists or not."""
    return environment.config_file()


def read() -> dict:
    """Its keys and values, empty without a file. UsageError if it cannot be read, is not TOML or has unknown keys."""
    try:
        data = path().read_bytes()
    except OSError as error:
        if os.path.exists(path()):  # `exists` would be False in a folder that this user may not enter
            raise UsageError(
                f"{path()}: expected a file of settings, found: {error.strerror}; make it readable or move it away"
            ) from None
        return {}
    import tomllib

    try:
        found = tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path()}: expected TOML, found: {error}; mend or remove the file") from None
    for key in found:
        check_key(key, f"{path()}: {key}")
    return found


def known() -> dict:
    """The option of each setting by its key, which is the long option's name without dashes."""
    from llamacli.cli.options import SETTINGS

    return SETTINGS


def check_key(key: str, where: str) -> None:
    """UsageError unless `key` names a setting."""
    from llamacli.cli.grammar import meant

    if key not in known():
        raise UsageError(f"{where}: expected one of {', '.join(known())}, found {key!r}{meant(key, [*known()])}")


def defaults(command) -> dict:
    """The file's values for the options of a click command, by parameter name."""
    found = read()
    by_key = {name[2:]: p.name for p in command.params if p.envvar for name in p.opts if name.startswith("--")}
    return {by_key[key]: value for key, value in found.items() if key in by_key}


def current(key: str) -> tuple[object, str]:
    """A setting's value and its source: None and "" if it is not set."""
    variable = f"LLAMACLI_{key.upper().replace('-', '_')}"
    if os.environ.get(variable):
        return os.environ[variable], variable
    value = read().get(key)
    return value, "" if value is None else "file"


def model() -> str | None:
    """The file's model, a path or a name."""
    value = read().get("model")
    if value is not None and (not isinstance(value, str) or not value):
        raise UsageError(f"{path()}: model: expected a file or a name, found {value!r}")
    return value


def write(key: str, value) -> None:
    """Set `key`, or remove it if `value` is None. Comments and order are preserved, and only the user can read the file.

    If it is a symbolic link, its target is written.
    """
    import tomlkit

    read()  # an invalid file is not overwritten
    file = Path(os.path.realpath(path()))
    document = tomlkit.parse(file.read_text("utf-8-sig")) if file.exists() else tomlkit.document()
    if value is None:
        document.pop(key, None)
    else:
        document[key] = value
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
            out.write(tomlkit.dumps(document))
        os.replace(part, file)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"{file}: expected a file that can be written, found: {error.strerror}; check the folder") from None
