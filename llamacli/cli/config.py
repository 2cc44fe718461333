"""`llamacli config`: shows and edits the settings file (settings.py)."""

import json
from typing import Annotated

from llamacli.cli import settings
from llamacli.cli.grammar import argument, option, read_value, refuse
from llamacli.cli.options import Json, Output
from llamacli.errors import UsageError


def config(
    key: Annotated[str | None, argument("[KEY]", "A setting.", complete=lambda _: [*settings.known()])] = None,
    value: Annotated[str | None, argument("[VALUE]", "Its new value.", empty=True)] = None,
    unset: Annotated[bool, option("--unset", help="Remove KEY from the file.")] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Show or change the settings: what you would otherwise repeat on every command line.

    A setting is named like its long option. The file is TOML, in the configuration folder (XDG_CONFIG_HOME, else ~/.config).
    An option on the command line comes first, then a variable LLAMACLI_NAME, then this file, then the model's own default.

    Examples:
    llamacli config                     # all settings, and where each comes from
    llamacli config model scout-tiny    # this model when -m is absent
    llamacli config temp 0.3
    llamacli config --unset temp
    """
    console = output.console()
    if key is not None:
        settings.check_key(key, "KEY")
    if unset or value is not None:
        if key is None or (unset and value is not None):
            raise UsageError("config: expected KEY VALUE, or --unset KEY")
        refuse(("as_json",), "nothing to write with it, found a setting")
        settings.write(key, None if unset else _checked(key, value))
        console.note(f"{'removed from' if unset else 'written to'} {settings.path()}")
        return
    found = {name: settings.current(name) for name in ([key] if key else settings.known())}
    if as_json:
        console.result(json.dumps({name: value for name, (value, _) in found.items()}, ensure_ascii=False))
    elif key:
        console.result(str(found[key][0]) if found[key][0] is not None else "")
    else:
        rows = [(name, "-" if value is None else str(value), where) for name, (value, where) in found.items()]
        console.table(str(settings.path()), rows, ("setting", "value", "from"))


def _checked(key: str, value: str):
    """The value as TOML has it. UsageError if the option does not accept it."""
    kind, spec = settings.known()[key]
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UsageError(f"{key}: expected true or false, found {value!r}")
        return value.lower() == "true"
    taken = read_value(kind, spec, value, key)
    return taken if kind in (int, float) and not isinstance(taken, str) and taken is not None else value
