"""The grammar of the command line: functions with annotated parameters become commands of the parser (click).

In: a command's function; each parameter is annotated with `option(...)` or `argument(...)`, dataclass parameters stand for
shared groups of options. Out: a click command whose values come from the command line, else from the environment, else from the
settings file, else from the function's default. Help is printed in groups; errors of the parser become one line in this
project's form.
"""

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

import click
from click.core import ParameterSource

from llamacli.errors import UsageError

OTHER = "Output and help"  # the group of options without another one
COLUMNS = {"col_max": 26, "col_spacing": 2}  # columns of names and of explanations
FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
GROUPS = ("Server", "Text", "Model", "Answer", "Sampling", "Tools", "Options", OTHER)  # in the order of the help


class Given(str):
    """A text value with its source: an option, a variable, or a line of the settings file."""

    where: str
    typed: bool  # on the command line

    def __new__(cls, text: str, where: str, typed: bool = True):
        given = super().__new__(cls, text)
        given.where, given.typed = where, typed
        return given


@dataclasses.dataclass(frozen=True)
class Spec:
    """The names of a parameter and the values that it takes. `least`, `most`: bounds of a number."""

    names: tuple[str, ...]  # as the help shows them; none for an argument
    help: str
    metavar: str | None = None
    group: str = "Options"
    aliases: tuple[str, ...] = ()  # names that other programs use; accepted, not shown
    least: float | None = None
    most: float | None = None
    unlimited: bool = False  # -1 stands for no limit, which is None
    tokens: bool = False  # a count of tokens: 8192, 128K, 1M
    empty: bool = False  # an empty text is a value
    hidden: bool = False  # accepted, not shown
    setting: bool = False  # LLAMACLI_NAME and the settings file may give it, too
    check: Callable[[str, str], typing.Any] | None = None  # (text, where) -> value, or UsageError
    complete: Callable[[str], Sequence[str]] | str | None = None  # the words that this parameter accepts, or "file"


def option(*names: str, help: str, metavar: str | None = None, **more) -> Spec:
    """An option, for `Annotated`; see Spec."""
    return Spec(names, help, metavar, **more)


def argument(metavar: str, help: str, **more) -> Spec:
    """A word without an option's name, for `Annotated`; see Spec."""
    return Spec((), help, metavar, **more)


# values


class _Type(click.ParamType):
    """Converts a word by its Spec; an error names the word and its source."""

    name = "text"

    def __init__(self, spec: Spec, kind: type):
        self.spec, self.kind = spec, kind

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            if isinstance(value, bool) or not isinstance(value, int | float):
                if ctx and ctx.get_parameter_source(param.name) is ParameterSource.DEFAULT_MAP:
                    raise UsageError(f"{written(param, ctx)[0]}: expected {self._expected()}, found {value!r:.80}")
                return value
            value = str(value)  # a number of the settings file
        return self.read(value, *written(param, ctx))

    def read(self, value: str, where: str, typed: bool = True):
        """The value of a word. UsageError that begins with `where`."""
        if not value and not self.spec.empty:
            raise UsageError(f"{where}: expected {self._expected()}, found ''; a variable that is not set, perhaps?")
        if self.spec.check:
            value = self.spec.check(value, where)
            return Given(value, where, typed) if isinstance(value, str) else value
        if issubclass(self.kind, Enum):
            return self._choice(value, where)
        if self.kind in (int, float):
            return self._number(value, where)
        return Path(value) if self.kind is Path else Given(value, where, typed)

    def _choice(self, value: str, where: str):
        known = [each.value for each in self.kind]
        found = next((each for each in self.kind if each.value == value.lower()), None)
        if found is None:
            raise UsageError(f"{where}: expected {_or(known)}, found {value!r}{meant(value, known)}")
        return found

    def _number(self, value: str, where: str):
        if self.spec.tokens:
            return token_count(value, where, int(self.spec.least or 1))
        try:
            number = self.kind(value)
        except ValueError:
            raise UsageError(f"{where}: expected {self._expected()}, found {value!r}") from None
        if self.spec.unlimited and number == -1:
            return None
        low = -math.inf if self.spec.least is None else self.spec.least
        high = math.inf if self.spec.most is None else self.spec.most
        if not (math.isfinite(number) and low <= number <= high):
            raise UsageError(f"{where}: expected {self._expected()}, found {value}")
        return number

    def _expected(self) -> str:
        if issubclass(self.kind, Enum):
            return _or([each.value for each in self.kind])
        if self.spec.tokens:
            return f"a number of tokens from {int(self.spec.least or 1)} up, such as 8192, 128K or 1M"
        if self.kind not in (int, float):
            return {"FILE": "a file's name", None: "some text"}.get(self.spec.metavar, "some text")
        what = "a whole number" if self.kind is int else "a number"
        low, high = self.spec.least, self.spec.most
        if low is None:
            return what
        text = f"{what} from {low:g}" + (" up" if high is None else f" to {high:g}")
        return text + (", or -1 for no limit" if self.spec.unlimited else "")

    def shell_complete(self, ctx, param, incomplete):
        from click.shell_completion import CompletionItem

        complete = self.spec.complete
        if issubclass(self.kind, Enum):
            words = [each.value for each in self.kind]
        elif callable(complete):
            words = complete(incomplete)
        elif complete == "file" or self.spec.metavar == "FILE" or self.kind is Path:
            return [CompletionItem(incomplete, type="file")]
        else:
            words = ()
        return [CompletionItem(word) for word in words if word.lower().startswith(incomplete.lower())]


class _Flag(click.types.BoolParamType):
    """On or off, where a variable or the settings file says so."""

    def convert(self, value, param, ctx):
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word not in FLAGS:
            raise UsageError(f"{written(param, ctx)[0]}: expected true or false, found {value!r:.80}")
        return FLAGS[word]


def read_value(kind: type, spec: Spec, text: str, where: str):
    """The value of `text` for an option of this kind and Spec, from any source. UsageError that begins with `where`."""
    return _Type(spec, kind).read(text, where)


_UNITS = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate("KMGT", 1)},
    **{f"{unit}I": 1024**n for n, unit in enumerate("KMGT", 1)},
}


def byte_count(text: str, where: str) -> int:
    """A size such as 48G, 500 MB or 2GiB in bytes; G is 10^9, Gi 2^30. UsageError for anything else, such as a number without a
    unit.
    """
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([KMGT]?I?)B?", text.strip().upper())
    if found and not found[2] and text.strip()[-1:].isdigit():
        raise UsageError(
            f"{where}: expected a size like 48G, 500M or 2GiB, with its unit, found {text!r}, which is bytes; "
            f"{text.strip()}G, perhaps?"
        )
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size <= 0:
        raise UsageError(f"{where}: expected a size like 48G, 500M or 2GiB, found {text!r}")
    return size


def size(text: str, where: str) -> str:
    """Check of an option: returns the text if it is a size."""
    byte_count(text, where)
    return text


def token_count(text: str, where: str, least: int = 1) -> int:
    """A number of tokens such as 8192, 128K or 1M, which is 1,048,576. UsageError for anything else."""
    word = text.strip().upper()
    digits, unit = (word[:-1], word[-1]) if word[-1:] in ("K", "M") else (word, "")
    count = int(digits) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit] if digits.isascii() and digits[:13].isdigit() else 0
    if not least <= count < 1 << 40 or len(digits) > 12:
        raise UsageError(f"{where}: expected a number of tokens from {least} up, such as 8192, 128K or 1M, found {text!r}")
    return count


def written(param: click.Parameter, ctx: click.Context | None) -> tuple[str, bool]:
    """The name by which the user gave a parameter its value, and whether that was on the command line."""
    source = ctx.get_parameter_source(param.name) if ctx else None
    if source is ParameterSource.ENVIRONMENT:
        return param.envvar, False
    if source is ParameterSource.DEFAULT_MAP:
        from llamacli.cli import settings

        return f"{settings.path()}: {_setting_name(param)}", False
    if isinstance(param, click.Argument):
        return param.metavar.strip("[].") if param.metavar else param.name, True
    words = ctx.meta.get("llamacli.words", ()) if ctx else ()
    names = [*param.opts, *getattr(param, "aliases", ())]
    used = (name for word in words for name in names if word == name or (name[:2] == "--" and word.startswith(f"{name}=")))
    return next(used, "/".join(param.opts)), True


def typed(names: Sequence[str]) -> list[str]:
    """Of these parameters of the running command, those given on the command line, by the names that were used there."""
    ctx = click.get_current_context(silent=True)
    given = ParameterSource.COMMANDLINE
    params = [p for p in ctx.command.params if p.name in names and ctx.get_parameter_source(p.name) is given] if ctx else []
    return [written(p, ctx)[0] for p in params]


def refuse(names: Sequence[str], expected: str) -> None:
    """UsageError if one of these parameters is on the command line but has no effect; `expected`: where it has one."""
    if given := typed(names):
        raise UsageError(f"{given[0]}: expected {expected}; leave it out")


def _setting_name(param: click.Parameter) -> str:
    return next(name for name in param.opts if name.startswith("--"))[2:]


def meant(word: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" where one of `known` resembles the word."""
    upper = {name.upper().replace("_", ""): name for name in known}
    near = difflib.get_close_matches(word.upper().replace("_", ""), upper, 1, 0.6)
    return f"; did you mean {upper[near[0]]}?" if near else ""


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


# commands


class Option(click.Option):
    """An option with a group in the help and with hidden aliases."""

    def __init__(self, *args, spec: Spec, **more):
        self.spec, self.aliases = spec, spec.aliases
        super().__init__(*args, **more)

    def add_to_parser(self, parser, ctx):
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown

    def get_help_record(self, ctx):
        names = ", ".join(self.opts) + (f" {self.metavar}" if self.metavar else "")
        return names, self.help or ""


class Command(click.Command):
    """A command of ours: help in groups with examples, settings as defaults."""

    examples = notes = ""

    def make_context(self, info_name, args, parent=None, **extra):
        if any(p.envvar for p in self.params):
            from llamacli.cli import settings

            extra["default_map"] = settings.defaults(self)
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx, args):
        ctx.meta["llamacli.words"] = [*args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx, formatter):
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        arguments = [(p.metavar, p.help) for p in self.params if isinstance(p, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments, **COLUMNS)
        for group, options in self.grouped(ctx):
            with formatter.section(group):
                formatter.write_dl([each.get_help_record(ctx) for each in options], **COLUMNS)
        for title, text in (("Examples", self.examples), ("", self.notes)):
            if text:
                formatter.write_paragraph()
                formatter.write(f"{title}:\n" if title else "")
                formatter.write("".join(f"  {line}".rstrip() + "\n" for line in text.splitlines()))

    def grouped(self, ctx) -> list[tuple[str, list[click.Option]]]:
        """Options by the groups of the help, in their order."""
        found: dict[str, list] = {}
        for p in self.get_params(ctx):
            if isinstance(p, click.Option) and not p.hidden:
                found.setdefault(p.spec.group if isinstance(p, Option) else OTHER, []).append(p)
        return [(group, found[group]) for group in GROUPS if group in found]


class Argument(click.Argument):
    """A word without a name, with help."""

    def __init__(self, *args, help: str = "", **more):
        super().__init__(*args, **more)
        self.help = help

    def make_metavar(self, *_):
        return self.metavar


def command(function: Callable) -> Command:
    """The click command of a function. "Examples:" in its docstring begins lines that the help shows as they are."""
    parameters, groups = _flat(function)

    def call(**values):
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
        return function(**values)

    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("Examples:\n")
    made = Command(
        function.__name__,
        params=[_parameter(*p) for p in parameters],
        callback=call,
        help=text.strip(),
        short_help=text.partition("\n")[0],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    made.examples, made.notes = inspect.cleandoc(examples), getattr(function, "notes", "")
    return made


def _flat(function: Callable) -> tuple[list[tuple], dict[str, type]]:
    """(name, annotation, default) of all parameters, dataclasses replaced by their fields; and the dataclasses by their
    parameter's name.

    A dataclass's own fields come before inherited ones, so that the help shows the model before its cluster.
    """
    parameters, groups = [], {}
    for p in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(p.annotation):
            groups[p.name] = p.annotation
            fields = sorted(dataclasses.fields(p.annotation), key=lambda f: f.name not in inspect.get_annotations(p.annotation))
            parameters += [(f.name, f.type, f.default) for f in fields]
        else:
            parameters.append((p.name, p.annotation, p.default))
    return parameters, groups


def kind_of(annotation) -> tuple[type, Spec, bool]:
    """From a parameter's annotation: the type of a value, the Spec, and whether the parameter takes several values."""
    kind, spec = typing.get_args(annotation)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    multiple = typing.get_origin(kind) is list
    return (typing.get_args(kind)[0] if multiple else kind), spec, multiple


def _parameter(name: str, annotation, default) -> click.Parameter:
    kind, spec, multiple = kind_of(annotation)
    required = default in (..., inspect.Parameter.empty, dataclasses.MISSING)
    if not spec.names:
        return Argument(
            [name],
            type=_Type(spec, kind),
            required=required,
            nargs=-1 if multiple else 1,
            metavar=spec.metavar,
            help=spec.help,
            **({} if required or multiple else {"default": default}),
        )
    envvar = f"LLAMACLI_{name.upper()}" if spec.setting else None
    if kind is bool:
        return Option(
            [name, *spec.names],
            type=_Flag(),
            is_flag=True,
            default=False,
            help=spec.help,
            envvar=envvar,
            hidden=spec.hidden,
            spec=spec,
        )
    return Option(
        [name, *spec.names],
        type=_Type(spec, kind),
        required=required,
        multiple=multiple,
        metavar=spec.metavar or ("|".join(each.value for each in kind) if issubclass(kind, Enum) else kind.__name__.upper()),
        help=spec.help,
        envvar=envvar,
        hidden=spec.hidden,
        spec=spec,
        **({} if required else {"default": default}),
    )


def explain(error: click.ClickException) -> str:
    """An error of the parser as one line in this project's form."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "llamacli"
    see = f"(see {where} --help)"
    if isinstance(error, click.NoSuchOption):
        known = [name for p in context.command.get_params(context) for name in p.opts] if context else []
        near = difflib.get_close_matches(error.option_name, known, 2, 0.6) or [
            name for name in known if len(error.option_name) > 3 and name.startswith(error.option_name)
        ]
        return f"{error.option_name}: no such option{f'; did you mean {_or(near)}?' if near else ''} {see}"
    if isinstance(error, click.BadOptionUsage):
        found = "none" if "requires" in error.message else "one that it does not take"
        return f"{error.option_name}: expected {'a value after it' if found == 'none' else 'no value'}, found {found} {see}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name = error.param.metavar if isinstance(error.param, Argument) else "/".join(error.param.opts)
        return f"expected {name}, found none {see}"
    if isinstance(error, click.UsageError) and context and "extra" in error.message:
        *_, taken = "options alone", *[p.metavar for p in context.command.params if isinstance(p, Argument)]
        return f"expected {taken} as the last word, found one too many: {error.message.partition('(')[2].rstrip(')')} {see}"
    return f"{error.format_message()} {see}"
