"""The loop of answers and calls: the model answers, its calls are run, it is given the results, and it answers again.

In: a model, messages, a `Toolbox`. Out: the pieces of all answers, without the calls. Nothing runs that `ask` does not allow. A
call that fails, hangs or is refused also gives a result: the model is told the error and continues.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llamacli.errors import UsageError
from llamacli.piece import Piece
from llamacli.text.calls import END, START, Call, CallParser
from llamacli.tools.binding import answer_grammar, call_schema
from llamacli.tools.tool import Tool, ToolError, from_function

ROUNDS, TIMEOUT = 10, 60.0  # rounds of calls in a turn; seconds for a call
LEAST_RESULT, LONGEST_RESULT = 200, 32_768  # most characters of a result for the model, if the context has room


class Result(NamedTuple):
    """A call and its result text; `failed`: it was refused or ended with an error, which is the text."""

    call: Call
    text: str
    failed: bool


class Toolbox:
    """Tools and how they are run.

    `ask(call)`: whether a call may run. `tell(result)`: called with every result. `rounds`: the most rounds of calls in a turn.
    `timeout`: seconds for a call. `results`: those of the latest turn; `calls`: its calls to tools that cannot run here, which
    the caller has to run. `choice`: "required", or the name of a tool: a turn begins with a call that fits its schema. `bound`:
    all calls fit their schemas; an answer is then either a text or calls.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable],
        ask: Callable[[Call], bool] = lambda call: True,
        tell: Callable[[Result], None] = lambda result: None,
        rounds: int = ROUNDS,
        timeout: float = TIMEOUT,
        choice: str | None = None,
        bound: bool = False,
    ):
        made = [tool if isinstance(tool, Tool) else from_function(tool) for tool in tools]
        self.tools = {tool.name: tool for tool in made}
        if len(self.tools) < len(made):
            names = [tool.name for tool in made]
            raise UsageError(f"tools: expected different names, found {next(n for n in names if names.count(n) > 1)} twice")
        if choice not in (None, "required", *self.tools):
            raise UsageError(f"choice: expected required, or a tool among {', '.join(self.tools)}, found {choice!r}")
        self._ask, self._tell, self.rounds, self._timeout = ask, tell, rounds, timeout
        self._choice, self._bound = choice, bound
        self.begin()

    def begin(self) -> None:
        """Begin a turn: clear the results of the latest one."""
        self.results: list[Result] = []
        self.calls: list[Call] = []
        self.turn: list[dict] = []  # the messages of its rounds
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0}

    def count(self, stats) -> None:
        """Add the token counts of a round."""
        for name in self.usage:
            self.usage[name] += getattr(stats, name)

    @property
    def record(self) -> list[dict]:
        """The calls of the latest turn as records fit for JSON, with results if they ran."""
        ran = [(result.call, {"result": result.text, "failed": result.failed}) for result in self.results]
        return [
            {"name": call.name, "parameters": call.arguments} | more for call, more in [*ran, *((c, {}) for c in self.calls)]
        ]

    @property
    def definitions(self) -> list[dict]:
        """The tools as chat templates take them."""
        return [tool.definition for tool in self.tools.values()]

    def parser(self) -> CallParser:
        """A parser that finds calls to these tools in an answer."""
        return CallParser({name: tool.order for name, tool in self.tools.items()})

    def runs(self, calls: Sequence[Call]) -> bool:
        """Whether all of the calls can be run here."""
        return all(self.tools[call.name].run for call in calls)

    def bind(self, model, sampler, number: int) -> None:
        """Set the constraint of the answer of round `number`."""
        tools = list(self.tools.values())
        if self._choice and number == 0:
            named = [tool for tool in tools if tool.name == self._choice]
            sampler.constraint = model.constraint(schema=call_schema(named or tools))
        elif self._bound:
            sampler.constraint = model.constraint(grammar=answer_grammar(tools))
        elif self._choice:
            sampler.constraint = None

    @property
    def runs_all(self) -> bool:
        """Whether every tool can be run here."""
        return all(tool.run for tool in self.tools.values())

    def run(self, call: Call, longest: int) -> Result:
        """Run a call if it is allowed; the result has at most `longest` characters."""
        tool = self.tools[call.name]
        try:
            tool.check(call.arguments)
            if not self._ask(call):
                raise ToolError("the user does not allow this call")
            text, failed = tool.run(call.arguments, self._timeout), False
        except ToolError as error:
            text, failed = f"error: {error}", True
        text = text.encode("utf-8", "replace").decode()  # JSON can contain a lone surrogate, a prompt cannot
        if len(text) > longest:
            text = f"{text[:longest]}\n[cut here: {longest} of {len(text)} characters]"
        result = Result(call, text, failed)
        self.results.append(result)
        self._tell(result)
        return result


def answer(
    model,
    session,
    sampler,
    messages: Sequence[dict],
    box: Toolbox,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    image_tiles: int | None = None,
) -> Iterator[Piece]:
    """Answer a conversation, with as many rounds of calls as it takes. The pieces do not contain the text of calls.

    The last piece's reason is one of Session's; "tool_calls": the caller has to run the calls in `box.calls`; or "rounds": the
    limit of rounds is reached.
    """
    before = sampler.constraint
    try:
        yield from _rounds(model, session, sampler, list(messages), box, max_tokens, stop, image_tiles)
    finally:
        sampler.constraint = before


def _rounds(model, session, sampler, messages: list[dict], box: Toolbox, left, stop, image_tiles) -> Iterator[Piece]:
    box.begin()
    for number in range(box.rounds + 1):
        box.bind(model, sampler, number)
        parser, said = box.parser(), []
        reason = None
        for piece in session.stream(model.prompt_ids(messages, image_tiles, box.definitions, session.ctx), sampler, left, stop):
            reason = piece.finish_reason
            text = parser.push(piece.text) + (parser.close() if reason else "")
            said.append(text)
            if reason in (None, "interrupt"):
                yield piece._replace(text=text)
        box.count(session.stats)
        calls = parser.calls
        if reason == "interrupt":
            return
        if calls and reason != "stop":  # cut by a limit: no room is left for the results
            box.calls = calls
        elif calls and not box.runs(calls):
            box.calls, reason = calls, "tool_calls"
        elif calls and number == box.rounds:
            reason = "rounds"
        elif calls:
            yield Piece(text + "\n" * ("".join(said)[-1:] not in ("", "\n")), None)
            room = (session.ctx - len(session.ids)) // 2 // len(calls)  # a character is usually at most one token
            longest = max(LEAST_RESULT, min(LONGEST_RESULT, room))
            box.turn += (new := _turn("".join(said), calls, [box.run(call, longest) for call in calls]))
            messages += new
            left = None if left is None else left - session.stats.completion_tokens
            if left is None or left > 0:
                continue
            text, reason = "", "length"
        yield Piece(text, None, reason)
        return


def _turn(said: str, calls: Sequence[Call], results: Sequence[Result]) -> list[dict]:
    """The messages of a round: the calls, then a result each."""
    functions = ({"name": call.name, "arguments": call.arguments} for call in calls)
    asked = {
        "role": "assistant",
        "content": said.replace(START, "").replace(END, "").strip(),
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }
    return [asked, *({"role": "ipython", "content": result.text} for result in results)]
