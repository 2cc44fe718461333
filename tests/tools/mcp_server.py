"""A small server of the Model Context Protocol with a fault that a test chooses: `python mcp_server.py [FAULT]`.

It shares no code with the client. FAULT: noise (prints what is no message, and asks in turn), old (an older protocol, pages),
dies, hangs, junk, deaf, unsound, many (tools without end), stderr (writes there without end).
"""

import json
import os
import sys
import time

fault = sys.argv[1] if len(sys.argv) > 1 else ""
ADD = {"type": "object", "properties": {"a": {"type": "number"}, "b": {}}, "required": ["a"]}
TOOLS = [{"name": "add", "description": "Adds.", "inputSchema": ADD}]
TOOLS += [{"name": name, "inputSchema": {"type": "object"}} for name in ("fail", "sleep", "exit", "where")]


def send(message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def text(words, **more):
    return {"content": [{"type": "text", "text": words}], **more}


def call(name, arguments):
    if name == "add":
        return text(str(arguments["a"] + arguments.get("b", 0)))
    if name == "fail":
        return text("it is broken", isError=True)
    if name == "sleep":
        time.sleep(60)
    if name == "exit":
        sys.stderr.write("out of cheese\n")
        os._exit(3)
    if name == "where":
        return {"content": [{"type": "image", "data": ""}], "structuredContent": {}} | text(json.dumps(sorted(os.environ)))
    return None


if fault == "stderr":
    for _ in range(400):
        sys.stderr.write("x" * 1000 + "\n")
    sys.stderr.flush()
for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request or "method" not in request:
        continue
    method, params = request["method"], request.get("params", {})
    if fault == "dies":
        sys.exit("no licence")
    if fault == "hangs" or (fault == "deaf" and method != "initialize"):
        time.sleep(60)
    if fault == "junk":
        print("x" * (20 << 20), flush=True)
    if fault == "noise":
        print("starting ...\n[1, 2]\n{}", flush=True)
        send({"method": "notifications/message", "params": {}})
        send({"id": "mine", "method": "ping"})
        send({"id": "other", "method": "roots/list"})
    if method == "initialize":
        result = {
            "protocolVersion": "2024-11-05" if fault == "old" else params["protocolVersion"],
            "capabilities": {"tools": {}},
        }
        send({"id": request["id"], "result": result})
    elif method == "tools/list":
        tools = [{"name": "a b", "inputSchema": 3}] if fault == "unsound" else TOOLS
        if fault == "many":
            send({"id": request["id"], "result": {"tools": TOOLS * 100, "nextCursor": "more"}})
        elif fault == "old":
            at = int(params.get("cursor", 0))
            tools, more = TOOLS[at : at + 2], {"nextCursor": str(at + 2)} if at + 2 < len(TOOLS) else {}
            send({"id": request["id"], "result": {"tools": tools, **more}})
        else:
            send({"id": request["id"], "result": {"tools": tools}})
    elif method == "tools/call":
        result = call(params["name"], params["arguments"])
        if result is None:
            send({"id": request["id"], "error": {"code": -32602, "message": f"no tool {params['name']}"}})
        else:
            send({"id": request["id"], "result": result})
