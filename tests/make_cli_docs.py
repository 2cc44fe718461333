"""Write docs/cli.md and docs/man/ from the definitions that `--help` shows. `python tests/make_cli_docs.py`."""

import re
from pathlib import Path

import click

from llamacli.cli import parser
from llamacli.cli.grammar import Argument, Option

DOCS = Path(__file__).resolve().parents[1] / "docs"
LEVELS = "An option on the command line comes first, then the variable, then the settings file (`llamacli config`)."


def pages() -> dict[str, str]:
    """The text of every page, by its path inside docs/."""
    group = parser()
    top = click.Context(group, info_name="llamacli", **group.context_settings)
    commands = [(name, group.get_command(top, name)) for name in group.list_commands(top)]
    contexts = [(click.Context(made, info_name=name, parent=top), made) for name, made in commands]
    found = {"cli.md": _reference(contexts), "man/llamacli.1": _program(group, commands)}
    return found | {f"man/llamacli-{ctx.info_name}.1": _manual(ctx, made) for ctx, made in contexts}


def _groups(ctx, made) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and (names, help) of the arguments and of each group of options, as `--help` shows them, with aliases."""
    arguments = [(p.metavar, p.help) for p in made.params if isinstance(p, Argument)]
    groups = [("Arguments", arguments)] if arguments else []
    for group, options in made.grouped(ctx):
        groups.append((group, [_described(ctx, each) for each in options]))
    return groups


def _described(ctx, option) -> tuple[str, str]:
    names, text = option.get_help_record(ctx)
    also = [f"`{name}`" for name in option.aliases] if isinstance(option, Option) else []
    text += f" Also {', '.join(also)}." if also else ""
    return names, text + (f" Variable `{option.envvar}`." if option.envvar else "")


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _usage(ctx, made) -> str:
    return " ".join([ctx.command_path, *made.collect_usage_pieces(ctx)])


# Markdown


def _reference(contexts) -> str:
    lines = [
        "# Commands and options",
        "",
        "`python tests/make_cli_docs.py` writes this page and the manual pages in `man/` from the definitions of `--help`.",
        f"[usage.md](usage.md) explains how the commands work together. {LEVELS}",
        "",
    ]
    lines += [f"- [{ctx.command_path}](#llamacli-{ctx.info_name}): {_paragraphs(made.help)[0]}" for ctx, made in contexts]
    for ctx, made in contexts:
        lines += ["", f"## llamacli {ctx.info_name}", "", "```", _usage(ctx, made), "```"]
        for part in _paragraphs(made.help):
            lines += ["", _text(part)]
        for title, rows in _groups(ctx, made):
            lines += ["", f"**{title}**", "", *(f"- `{names}`: {_text(text)}" for names, text in rows)]
        for title, text in (("Examples", made.examples), ("Notes", made.notes)):
            if text:
                lines += ["", f"**{title}**", "", "```", *(line.rstrip() for line in text.splitlines()), "```"]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Text with Markdown's special characters escaped outside of `code`."""
    return "".join(part if n % 2 else re.sub(r"([*_<|])", r"\\\1", part) for n, part in enumerate(re.split("(`[^`]*`)", text)))


# roff


def _roff(text: str) -> str:
    text = text.replace("`", "").replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.M)


def _head(name: str, what: str) -> list[str]:
    what = _roff(what.rstrip("."))
    return [f'.TH "{name.upper()}" 1 "" "llamacli" "User Commands"', ".SH NAME", f"{_roff(name)} \\- {what}"]


def _manual(ctx, made) -> str:
    first, *more = _paragraphs(made.help)
    lines = [*_head(f"llamacli-{ctx.info_name}", first), ".SH SYNOPSIS", _roff(_usage(ctx, made)), ".SH DESCRIPTION"]
    lines += [_roff(first), *(line for part in more for line in (".PP", _roff(part)))]
    for title, rows in _groups(ctx, made):
        lines += [f".SH {title.upper()}"]
        lines += [line for names, text in rows for line in (".TP", f"\\fB{_roff(names)}\\fR", _roff(text))]
    for title, text in (("EXAMPLES", made.examples), ("NOTES", made.notes)):
        if text:
            lines += [f".SH {title}", ".nf", _roff("\n".join(line.rstrip() for line in text.splitlines())), ".fi"]
    return "\n".join([*lines, ".SH SEE ALSO", "\\fBllamacli\\fR(1)"]) + "\n"


def _program(group, commands) -> str:
    lines = [*_head("llamacli", group.help), ".SH SYNOPSIS", "\\fBllamacli\\fR COMMAND [OPTIONS] ...", ".SH DESCRIPTION"]
    lines += [_roff(group.epilog), ".PP", _roff(LEVELS), ".SH COMMANDS"]
    for name, made in commands:
        lines += [".TP", f"\\fBllamacli\\-{name}\\fR(1)", _roff(_paragraphs(made.help)[0])]
    return "\n".join(lines) + "\n"


def main():
    (DOCS / "man").mkdir(exist_ok=True)
    written = pages()
    for old in (DOCS / "man").glob("*.1"):
        if f"man/{old.name}" not in written:
            old.unlink()
    for name, text in written.items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
