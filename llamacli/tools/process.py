"""Programs that run tools: one for each call, or servers of the Model Context Protocol over stdin and stdout.

In: a command. Out: results as text; ToolError if it hangs, dies or sends an invalid answer. Every program has its own process
group, which is killed with it. Its output is limited in size and is used only as text.

Protocol: https://modelcontextprotocol.io/specification, the stdio transport: a JSON-RPC message a line. This client uses only
initialize, tools/list and tools/call, which every version has; the package `mcp` takes seconds to import and depends on a web
server.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from llamacli import __version__
from llamacli.errors import UsageError
from llamacli.tools.tool import Tool, ToolError, as_text, check_definition

VERSION = "2025-06-18"  # of the protocol; a server may answer with an older one
LARGEST_LINE, LARGEST_OUTPUT = 16 << 20, 1 << 20  # bytes
MOST_TOOLS = 1000  # of a server, and pages of its list; a context holds fewer
GRACE = 1.0  # seconds for a program to end by itself
START_SECONDS = 60.0  # seconds for a server to start: some download themselves first


class Program:
    """A running program. `name`: its name in errors."""

    def __init__(self, command: Sequence[str], name: str, env: Mapping[str, str] | None = None, cwd: str | None = None):
        """ToolError if it cannot be started. `env` None: that of this process."""
        self.name, self._read, self._said = name, bytearray(), b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ToolError(f"{name}: expected to start {command[0]}, found: {getattr(error, 'strerror', error)}") from None
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            os.set_blocking(stream.fileno(), False)

    def send(self, data: bytes, until: float) -> None:
        """Write all of it by `until` (time.monotonic)."""
        fd = self._process.stdin.fileno()
        while data:
            if not self._ready([], [fd], until):
                raise ToolError("it does not read its input")
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise ToolError(self.end()) from None

    def end_input(self) -> None:
        """Close its input."""
        with suppress(OSError):
            self._process.stdin.close()

    def some(self, until: float) -> bytes | None:
        """The next bytes of its output, b"" at the end, None if there are none by `until`."""
        fd = self._process.stdout.fileno()
        while self._ready([fd], [], until):
            with suppress(BlockingIOError):
                return os.read(fd, 1 << 16)
        return None

    def _ready(self, readable: list[int], writable: list[int], until: float) -> bool:
        """Wait for a descriptor; False at `until`, even if there is more to read, so that endless output cannot extend the
        wait.

        Output on stderr is read meanwhile, and its end is kept.
        """
        waited, wanted = select.poll(), {*readable, *writable}  # select() takes no descriptor from 1024 on
        errors = None if self._process.stderr.closed else self._process.stderr.fileno()
        for fd, events in [(fd, select.POLLIN) for fd in readable] + [(fd, select.POLLOUT) for fd in writable]:
            waited.register(fd, events)
        if errors is not None:
            waited.register(errors, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            ready = {fd for fd, _ in waited.poll(1000 * left)}
            if errors in ready and not self._complaint_read():
                waited.unregister(errors)
                errors = None
            if ready & wanted:
                return True
        return False

    def _complaint_read(self) -> bool:
        """Read what is available on stderr; False at its end."""
        with suppress(BlockingIOError):
            data = os.read(self._process.stderr.fileno(), 1 << 16)
            self._said = (self._said + data)[-4096:]
            return bool(data)
        return True

    def line(self, until: float) -> bytes:
        """The next line of its output. ToolError if it is too long, late, or there is none."""
        end = self._read.find(b"\n")
        while end < 0:
            data = self.some(until)
            if data is None:
                raise TimeoutError
            if not data:
                raise ToolError(self.end())
            end = data.find(b"\n")
            end += len(self._read) if end >= 0 else 0
            self._read += data
            if len(self._read) > LARGEST_LINE:
                raise ToolError(f"it writes a line of more than {LARGEST_LINE >> 20} MB")
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        return line

    def wait(self, until: float) -> int | None:
        """Wait for its exit code; None if it still runs at `until`."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(0.0, until - time.monotonic()))
        return None

    def end(self) -> str:
        """Wait shortly for its end; returns a text that says how it ended, with its last line on stderr."""
        code = self.wait(time.monotonic() + GRACE)
        how = (
            "it closed its output"
            if code is None
            else f"it ended with code {code}"
            if code >= 0
            else f"it died of signal {-code}"
        )
        return how + (f": {said}" if (said := self.complaint()) else "")

    def complaint(self) -> str:
        """The last line of its stderr."""
        self._ready([], [], time.monotonic() + 0.05)
        lines = [line.strip() for line in self._said.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def close(self) -> None:
        """End it and its descendants: first by closing its input, then by killing them."""
        self.end_input()
        if self.wait(time.monotonic() + GRACE) is None:
            self.kill()
        with suppress(ProcessLookupError, PermissionError):  # descendants that are left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._process.stderr.close()

    def kill(self) -> None:
        """Kill it and its descendants at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_once(command: Sequence[str], arguments: dict, timeout: float) -> str:
    """Run a program with the arguments as JSON on its stdin; its stdout is the result."""
    until, name = time.monotonic() + timeout, os.path.basename(command[0])
    program, output = Program(command, name), b""
    try:
        with suppress(ToolError):  # it need not read its input
            program.send(json.dumps(arguments).encode() + b"\n", until)
        program.end_input()
        while len(output) <= LARGEST_OUTPUT and (data := program.some(until)):
            output += data
        if len(output) > LARGEST_OUTPUT:
            raise ToolError(f"it writes more than {LARGEST_OUTPUT >> 20} MB")
        code = program.wait(until)
        if code is None:
            raise ToolError(f"no result after {timeout:g} seconds")
        if code:
            raise ToolError(program.end())
        return output.decode("utf-8", "replace").rstrip("\n")
    finally:
        program.kill()
        program.close()


class Server:
    """A server of tools. It is started by its first request, and again after it hung or died."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | None = None):
        self.name, self._command, self._env, self._cwd = name, command, env, cwd
        self._program: Program | None = None
        self._number = 0

    def tools(self, timeout: float = START_SECONDS) -> list[Tool]:
        """The tools that it offers. UsageError if it cannot be started or sends an invalid answer."""
        try:
            found, cursor, until = [], None, time.monotonic() + timeout
            for _ in range(MOST_TOOLS):
                page = self._ask("tools/list", {"cursor": cursor} if cursor else {}, max(0.0, until - time.monotonic()))
                if not isinstance(page.get("tools"), list):
                    raise ToolError("it lists no tools")
                if len(found) + len(page["tools"]) > MOST_TOOLS:
                    raise ToolError(f"it lists more than {MOST_TOOLS} tools")
                found += [self._tool(entry) for entry in page["tools"]]
                cursor = page.get("nextCursor")
                if not isinstance(cursor, str) or not cursor:
                    break
            return found
        except ToolError as error:
            self.close()
            raise UsageError(f"{self.name}: expected a server of tools, found: {error}; check its command") from None

    def call(self, name: str, arguments: dict, timeout: float) -> str:
        """The result of a tool as text."""
        result = self._ask("tools/call", {"name": name, "arguments": arguments}, timeout)
        parts = result.get("content")
        texts = [_content(part) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        if not texts and "structuredContent" in result:
            texts = [as_text(result["structuredContent"])]
        text = "\n".join(texts)
        if result.get("isError"):
            raise ToolError(text or "it failed without a message")
        return text

    def close(self) -> None:
        """End it, if it runs."""
        if self._program is not None:
            self._program.close()
            self._program = None

    def _tool(self, entry) -> Tool:
        entry = entry if isinstance(entry, dict) else {}
        name, description, schema = check_definition(
            entry.get("name"), entry.get("description"), entry.get("inputSchema"), self.name
        )
        return Tool(name, description, schema, lambda arguments, timeout: self.call(name, arguments, timeout))

    def _ask(self, method: str, params: dict, timeout: float) -> dict:
        """The result of a request. ToolError if there is none; a server that did not answer is ended."""
        try:
            if self._program is None:
                self._start()
            return self._request(method, params, time.monotonic() + timeout)
        except TimeoutError:
            self._stop()
            raise ToolError(f"no result after {timeout:.3g} seconds") from None
        except _Refused:
            raise
        except BaseException:  # it died or broke the protocol; after a Ctrl-C a late answer must not reach the next call
            self._stop()
            raise

    def _start(self) -> None:
        self._program = Program(self._command, self.name, self._env, self._cwd)
        until = time.monotonic() + START_SECONDS
        client = {"name": "llamacli", "version": __version__}
        self._request("initialize", {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}, until)
        self._send({"method": "notifications/initialized"}, until)

    def _stop(self) -> None:
        if self._program is not None:
            self._program.kill()
            self.close()

    def _send(self, message: dict, until: float) -> None:
        self._program.send(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n", until)

    def _request(self, method: str, params: dict, until: float) -> dict:
        self._number += 1
        self._send({"id": self._number, "method": method, "params": params}, until)
        while True:
            message = _message(self._program.line(until))
            if message.get("id") == self._number and "method" not in message:
                break
            if "method" in message and "id" in message:  # the server sends a request of its own
                answer = {"result": {}} if message["method"] == "ping" else {"error": {"code": -32601, "message": "not here"}}
                self._send({"id": message["id"], **answer}, until)
        if isinstance(error := message.get("error"), dict):
            raise _Refused(f"{error.get('message', 'it refuses')}"[:2000])
        if not isinstance(message.get("result"), dict):
            raise ToolError("it answers without a result")
        return message["result"]


class _Refused(ToolError):
    """The server works but answered with an error."""


def _message(line: bytes) -> dict:
    """A message; {} for a line that is not one, since some servers print other lines."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _content(part: dict) -> str:
    """A part of a result as text."""
    if isinstance(part.get("text"), str):
        return part["text"]
    inner = part.get("resource")
    if isinstance(inner, dict) and isinstance(inner.get("text"), str):
        return inner["text"]
    return f"[{part.get('type', 'something')} that is no text]"[:80]
