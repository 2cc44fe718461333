"""Tools that a request offers, and the calls in its answer.

In: definitions as the protocols have them; events of answers. Out: an `Offer`; the same events with the calls taken out of the
text, each as a `Called`. Nothing is run here: the client runs the tools and sends the results in its next request.
"""

import json
from collections.abc import AsyncIterator, Sequence
from secrets import token_hex
from typing import NamedTuple

from llamacli.errors import UsageError
from llamacli.piece import Piece
from llamacli.serve.fields import Fields, Refusal
from llamacli.serve.scheduler import Begun
from llamacli.text.calls import Call, CallParser
from llamacli.tools.binding import call_schema
from llamacli.tools.tool import Tool, check_definition

MOST_TOOLS = 1024


class Called(NamedTuple):
    """A complete call. `index`: its number in the answer."""

    index: int
    id: str
    call: Call

    @property
    def arguments(self) -> str:
        """As JSON."""
        return json.dumps(self.call.arguments, ensure_ascii=False)


class Offer(NamedTuple):
    """The tools of a request. `must`: names of the tools of which one must be called; empty: the model decides. `several`: an
    answer may have several calls.
    """

    tools: Sequence[Tool]
    must: Sequence[str] = ()
    several: bool = True

    @property
    def definitions(self) -> list[dict]:
        """The tools as chat templates take them."""
        return [tool.definition for tool in self.tools]

    def binding(self) -> dict:
        """The keyword for Model.sampler that makes the answer a call, if one is required."""
        named = [tool for tool in self.tools if tool.name in self.must]
        return {"schema": call_schema(named)} if named else {}


def offer(tools: Sequence[Fields], schema: str, choice: tuple[str, str | None], several: bool) -> Offer | None:
    """The offer of some definitions; `schema` is the field with parameters, `choice` auto, none, any, or tool and its name.

    None if there are none. Refusal for an invalid definition or choice.
    """
    if len(tools) > MOST_TOOLS:
        raise Refusal(f"tools: expected at most {MOST_TOOLS}, found {len(tools)}", param="tools", code="invalid_value")
    made = []
    for tool in tools:
        try:
            checked = check_definition(tool.raw("name"), tool.raw("description"), tool.raw(schema), "tools")
        except UsageError as error:
            raise Refusal(str(error), param="tools", code="invalid_value") from None
        made.append(Tool(*checked))
    names = [tool.name for tool in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refusal(f"tools: expected different names, found {twice} twice", param="tools", code="invalid_value")
    how, name = choice
    if how in ("any", "tool") and (not made or (how == "tool" and name not in names)):
        raise Refusal(
            f"tool_choice: expected one of the tools, found {name or 'none'}", param="tool_choice", code="invalid_value"
        )
    if how == "none" or not made:
        return None
    return Offer(made, names if how == "any" else [name] if how == "tool" else [], several)


def arguments(call: Fields, name: str) -> dict:
    """The arguments of an earlier call: an object, or its JSON text."""
    value = call.raw(name, {})
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise call.wrong(name, "a JSON object")
    return value


def earlier(name: str, arguments: dict) -> dict:
    """An earlier call as the chat template takes it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


async def calls(events, offered: Offer) -> AsyncIterator[tuple[int, Begun | Piece | Called]]:
    """Events of answers with each call as a Called. The reason of an answer that stops after a call becomes "tool_calls"."""
    orders = {tool.name: tool.order for tool in offered.tools}
    parsers: dict[int, CallParser] = {}
    told: dict[int, int] = {}
    async for choice, event in events:
        if isinstance(event, Begun):
            yield choice, event
            continue
        parser = parsers.setdefault(choice, CallParser(orders))
        text = parser.push(event.text) + (parser.close() if event.finish_reason else "")
        whole = parser.calls if offered.several else parser.calls[:1]
        if text or event.id is not None:
            yield choice, event._replace(text=text, finish_reason=None)
        for index in range(told.get(choice, 0), len(whole)):
            yield choice, Called(index, f"call_{token_hex(12)}", whole[index])
        told[choice] = len(whole)
        if event.finish_reason:
            reason = "tool_calls" if whole and event.finish_reason == "stop" else event.finish_reason
            yield choice, Piece("", None, reason)
