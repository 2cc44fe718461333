"""Reads tools from files: definitions with or without a command, MCP servers, functions of a Python file.

In: the text of a JSON file, or the path of a Python file. Out: a `Source`, which must be closed after use.

    [{"name": "f", "description": "...", "parameters": {...}, "command": ["python", "f.py"]}]      also as OpenAI has it
    {"mcpServers": {"files": {"command": "npx", "args": ["..."], "env": {"KEY": "..."}}}}
"""

import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from llamacli.errors import UsageError
from llamacli.tools.process import Server, run_once
from llamacli.tools.tool import Tool, check_definition

INHERITED = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER")  # by servers: no secrets


class Source(NamedTuple):
    """Tools, and a function that ends their programs."""

    tools: list[Tool]
    close: Callable[[], None] = lambda: None


def from_json(text: str, where: str) -> Source:
    """The tools of a --tools file. UsageError if it is invalid or a server does not start."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected JSON, found: {error}; mend the file") from None
    if isinstance(found, dict) and "mcpServers" in found:
        return _servers(found["mcpServers"], where)
    entries = found.get("tools", [found]) if isinstance(found, dict) else found
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{where}: expected a list of tools or an object with "mcpServers", found {text.strip()!r:.60}')
    return Source([_tool(entry, f"{where}: tool {i}") for i, entry in enumerate(entries, 1)])


def from_python(path: str) -> Source:
    """The functions of a Python file, which run in their own process."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: expected a Python file, found none; check the path after --functions")
    server = Server(path, [sys.executable, "-m", "llamacli.tools.serve", path])
    tools = server.tools()
    if not tools:
        server.close()
        raise UsageError(f"{path}: expected functions, found none; names that begin with _ do not count")
    return Source(tools, server.close)


def _tool(entry, where: str) -> Tool:
    inner = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(inner, dict):
        raise UsageError(f'{where}: expected {{"name": ..., "description": ..., "parameters": ...}}, found {entry!r:.60}')
    schema = inner.get("parameters", inner.get("inputSchema"))
    name, description, schema = check_definition(inner.get("name"), inner.get("description"), schema, where)
    command = entry.get("command", inner.get("command"))
    if command is None:
        return Tool(name, description, schema)
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise UsageError(f'{where}: expected "command" as a list such as ["python", "f.py"], found {command!r:.60}')
    return Tool(name, description, schema, lambda arguments, timeout: run_once(command, arguments, timeout))


def _servers(servers, where: str) -> Source:
    if not isinstance(servers, dict) or not all(isinstance(each, dict) for each in servers.values()):
        raise UsageError(f'{where}: expected "mcpServers" to name servers, found {servers!r:.60}')
    started: list[Server] = []

    def close() -> None:
        for server in started:
            server.close()

    tools: list[Tool] = []
    try:
        for name, entry in servers.items():
            if entry.get("disabled") is not True:
                server = _server(name, entry, where)
                started.append(server)
                tools += _distinct(server, {tool.name for tool in tools})
    except BaseException:
        close()
        raise
    if not tools:
        close()
        raise UsageError(f"{where}: expected servers that offer tools, found none")
    return Source(tools, close)


def _server(name: str, entry: dict, where: str) -> Server:
    command, args, env = entry.get("command"), entry.get("args", []), entry.get("env", {})
    if not isinstance(command, str) or not command:
        found = "one at an address" if "url" in entry else f"the command {command!r:.40}"
        raise UsageError(f"{where}: {name}: expected a server with a command, found {found}; only stdio is spoken here")
    texts = [*args, *env, *env.values()] if isinstance(args, list) and isinstance(env, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: {name}: expected args as a list and env as an object of texts, found something else")
    inherited = {key: os.environ[key] for key in INHERITED if key in os.environ}
    cwd = entry.get("cwd")
    return Server(name, [command, *args], inherited | env, cwd if isinstance(cwd, str) else None)


def _distinct(server: Server, taken: set[str]) -> list[Tool]:
    """A server's tools; a name that is already in use gets the server's name as a prefix."""
    found = []
    for tool in server.tools():
        if tool.name in taken:
            name, _, _ = check_definition(f"{server.name}_{tool.name}", None, None, server.name)
            tool = Tool(name, tool.description, tool.parameters, tool.run)
        taken.add(tool.name)
        found.append(tool)
    return found
