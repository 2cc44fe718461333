"""Options of tools: what the model may call, which calls need permission, how long a call may take.

In: what the parser found. Out: a Toolbox, or None. At a terminal the user is asked before each call; in a pipe only tools of
--allow-tools run. Calls are shown on stderr, with control characters as escapes.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from llamacli.cli.console import Console, is_terminal, one_line
from llamacli.cli.grammar import option
from llamacli.cli.inputs import Limit, read_file
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.text.calls import Call
    from llamacli.tools.loop import Toolbox

LARGEST_FILE = Limit(16 << 20)  # definitions
SHOWN = 300  # characters of a call or of a result


@dataclasses.dataclass
class Tooling:
    """The same for `run` and `chat`."""

    tools: Annotated[
        list[str] | None,
        option(
            "--tools",
            metavar="FILE",
            group="Tools",
            help="Tools that the model may call, as JSON: definitions, or mcpServers; repeatable.",
        ),
    ] = None
    functions: Annotated[
        list[str] | None,
        option(
            "--functions", metavar="FILE", group="Tools", help="The functions of a Python file, which become tools; repeatable."
        ),
    ] = None
    allow_tools: Annotated[
        str | None,
        option(
            "--allow-tools", metavar="NAMES", group="Tools", help="Tools that run without asking, such as now,search; or all."
        ),
    ] = None
    tool_choice: Annotated[
        str | None,
        option("--tool-choice", metavar="NAME|required", group="Tools", help="Begin with a call: of this tool, or of any."),
    ] = None
    bind_tools: Annotated[
        bool,
        option("--bind-tools", group="Tools", help="Bind the arguments of calls to the tools' schemas (needs llguidance)."),
    ] = False
    tool_rounds: Annotated[
        int | None,
        option("--tool-rounds", metavar="N", group="Tools", least=1, most=1000, help="Rounds of calls for an answer (10)."),
    ] = None
    tool_timeout: Annotated[
        float | None,
        option("--tool-timeout", metavar="SECONDS", group="Tools", least=0.1, most=86400, help="Longest time of a call (60)."),
    ] = None

    @property
    def asked(self) -> bool:
        """Whether the options name tools."""
        return bool(self.tools or self.functions)

    def __post_init__(self) -> None:
        given = {"--allow-tools": self.allow_tools, "--tool-rounds": self.tool_rounds, "--tool-timeout": self.tool_timeout}
        given |= {"--tool-choice": self.tool_choice, "--bind-tools": self.bind_tools or None}
        alone = next((name for name, value in given.items() if value is not None), None)
        if alone and not self.asked:
            raise UsageError(f"{alone}: expected --tools or --functions with it, found neither; add one or leave this out")

    @contextlib.contextmanager
    def box(self, console: Console, suspended=contextlib.nullcontext) -> Iterator["Toolbox | None"]:
        """A context with the tools, ready to run; it ends their programs. None if there are no tools.

        `suspended()` is a context that pauses the display of the answer, for other output and input. UsageError if there is no
        terminal to ask for permission on and a tool could run without it.
        """
        if not self.asked:
            yield None
            return
        from llamacli.tools import files, loop

        if self.tool_choice or self.bind_tools:
            from llamacli.text.constraint import library

            library()

        with contextlib.ExitStack() as stack:
            tools = []
            for path in self.tools or ():
                source = files.from_json(read_file(path, console, LARGEST_FILE), path)
                stack.callback(source.close)
                tools += source.tools
            for path in self.functions or ():
                source = files.from_python(path)
                stack.callback(source.close)
                tools += source.tools
            if suspended is contextlib.nullcontext:  # no display of an answer that a line could disturb
                tools = [_with_sign(tool, console) for tool in tools]
            ask = _asking(console, suspended)
            allowed = self._allowed([tool.name for tool in tools], any(tool.run for tool in tools), ask)

            def may_run(call: "Call") -> bool:
                return allowed is None or call.name in allowed or (ask is not None and ask(call))

            def tell(result) -> None:
                with suspended():
                    console.note(f"{shown(result.call)}: {_short(result.text)}")

            yield loop.Toolbox(
                tools,
                may_run,
                tell,
                self.tool_rounds or loop.ROUNDS,
                self.tool_timeout or loop.TIMEOUT,
                self.tool_choice,
                self.bind_tools,
            )

    def _allowed(self, names: list[str], run: bool, ask) -> set[str] | None:
        """Names of tools that run without asking; None: all."""
        if self.allow_tools == "all":
            return None
        allowed = {name.strip() for name in (self.allow_tools or "").split(",")} - {""}
        if unknown := sorted(allowed - set(names)):
            raise UsageError(f"--allow-tools: expected names among {', '.join(names)}, or all, found {unknown[0]!r}")
        if run and not allowed and ask is None:
            raise UsageError(
                f"tools: expected a terminal, where each call is asked for, found none; --allow-tools {','.join(names)[:60]} "
                f"lets them run, --allow-tools all every one"
            )
        return allowed


def _asking(console: Console, suspended):
    """A function that asks before each call if there is a terminal, else None."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return None
    always: set[str] = set()

    def ask(call: "Call") -> bool:
        if call.name in always:
            return True
        with suspended():
            word = console.question(f"call {_whole(call)}? [y]es, [n]o, [a]lways: ").lower()
        if word in ("a", "always"):
            always.add(call.name)
        return word in ("y", "yes", "a", "always")

    return ask


def _with_sign(tool, console: Console):
    """The tool, with a line on a terminal if it runs for long."""
    if tool.run is None:
        return tool

    def run(arguments: dict, timeout: float) -> str:
        with console.waiting(lambda: f"{tool.name} is running ..."):
            return tool.run(arguments, timeout)

    return dataclasses.replace(tool, run=run)


def shown(call: "Call") -> str:
    """A call on one line, fit for a terminal."""
    return _short(_whole(call))


def _whole(call: "Call") -> str:
    """The whole call on one line: the user must see all of it before allowing it."""
    arguments = ", ".join(f"{one_line(key)}={json.dumps(value, ensure_ascii=False)}" for key, value in call.arguments.items())
    return one_line(f"{call.name}({arguments})")


def _short(text: str) -> str:
    text = one_line(text[: 4 * SHOWN])
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
