"""Serves the functions of a Python file as tools, over stdin and stdout: `python -m llamacli.tools.serve FILE`.

In: requests as process.py sends them. Out: answers. The functions run in this process, so one that hangs or dies ends this
server and not the process of the model; their output goes to stderr. A function is a tool if it is defined in the file and its
name does not begin with an underscore.
"""

import importlib.util
import inspect
import json
import os
import sys
import traceback

from llamacli.errors import LlamacliError
from llamacli.tools.tool import as_text, described


def main() -> None:
    """Answer requests until stdin ends."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a function must not write into the answers or read the requests
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        functions = load(sys.argv[1])
        definitions = [dict(zip(("name", "description", "inputSchema"), described(f), strict=True)) for f in functions.values()]
    except LlamacliError as error:
        sys.exit(str(error))
    for line in requests:
        request = json.loads(line)
        if "id" not in request:
            continue
        method, params = request["method"], request["params"]
        if method == "tools/list":
            result = {"tools": definitions}
        elif method == "tools/call":
            result = call(functions[params["name"]], params["arguments"])
        else:
            result = {"protocolVersion": params.get("protocolVersion"), "capabilities": {"tools": {}}, "serverInfo": {}}
        answers.write(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}) + "\n")
        answers.flush()


def load(path: str) -> dict:
    """The functions of a file by name."""
    spec = importlib.util.spec_from_file_location("functions", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["functions"] = module
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        sys.exit(f"the file ends the program ({error.code})")
    except BaseException as error:
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == spec.origin), None)
        sys.exit(f"{type(error).__name__}: {error}" + (f", in line {line}" if line else ""))
    public = [value for name, value in vars(module).items() if not name.startswith("_")]
    return {f.__name__: f for f in public if inspect.isfunction(f) and f.__module__ == "functions"}


def call(function, arguments: dict) -> dict:
    """The result of a call in the protocol's form."""
    try:
        return {"content": [{"type": "text", "text": as_text(function(**arguments))}]}
    except Exception as error:
        return {"content": [{"type": "text", "text": f"{type(error).__name__}: {error}"}], "isError": True}


if __name__ == "__main__":
    main()
