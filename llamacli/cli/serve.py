"""`llamacli serve`: a model for other programs, by OpenAI's and Anthropic's protocols.

In: requests on a socket. Out: on stdout one line, the address; on stderr errors and notes.
"""

from typing import Annotated

from llamacli import environment
from llamacli.cli import signals
from llamacli.cli.console import one_line
from llamacli.cli.grammar import byte_count, option, size
from llamacli.cli.inputs import Limit
from llamacli.cli.keeping import Storing
from llamacli.cli.nodes import OnCluster
from llamacli.cli.options import (
    Context,
    DeviceName,
    Experts,
    GpuLayers,
    Memory,
    ModelName,
    Output,
    Placing,
    Threads,
    Tower,
    find_model,
    load_model,
    memory_bytes,
    placement,
    read_file,
)
from llamacli.errors import UsageError

LONGEST_KEY = 1 << 12


def serve(
    host: Annotated[
        str, option("--host", metavar="ADDRESS", group="Server", help="Address to listen at (127.0.0.1).")
    ] = "127.0.0.1",
    port: Annotated[
        int, option("--port", metavar="N", group="Server", least=0, most=65535, help="Port (8080); 0 takes a free one.")
    ] = 8080,
    api_key: Annotated[
        list[str] | None,
        option(
            "--api-key",
            metavar="KEY",
            group="Server",
            help="Require this key from clients; repeatable. Other users cannot see it in LLAMACLI_API_KEY.",
        ),
    ] = None,
    api_key_file: Annotated[
        str | None, option("--api-key-file", metavar="FILE", group="Server", help="Keys, a line each.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        option("--cors", metavar="ORIGIN", group="Server", help="Allow web pages of this origin, such as https://a.example."),
    ] = None,
    parallel: Annotated[
        int,
        option(
            "--parallel",
            metavar="N",
            group="Server",
            aliases=("-np",),
            least=1,
            most=64,
            help="Answers at a time (4); each holds a context.",
        ),
    ] = 4,
    queue: Annotated[
        int, option("--queue", metavar="N", group="Server", least=0, most=100000, help="Answers that may wait (64).")
    ] = 64,
    rate: Annotated[
        int | None,
        option("--rate", metavar="N", group="Server", least=1, help="Requests a minute of each client (default: no limit)."),
    ] = None,
    max_body: Annotated[
        str, option("--max-body", metavar="SIZE", group="Server", check=size, help="Largest request (16MiB).")
    ] = "16MiB",
    model: ModelName = None,
    ctx: Context = None,
    threads: Threads = None,
    memory: Memory = None,
    device: DeviceName = None,
    gpu_layers: GpuLayers = None,
    experts: Experts = Placing.auto,
    mmproj: Tower = None,
    nodes: OnCluster = None,
    storing: Storing = None,
    output: Output = None,
) -> None:
    """Serve a model by the protocols of OpenAI and Anthropic.

    The address goes to stdout once requests are answered; Ctrl-C ends. Needs pip install 'llamacli[serve]'.

    Examples:
    llamacli serve -m scout.gguf
    llamacli serve --host 0.0.0.0 --api-key-file keys.txt --parallel 8
    curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    try:
        from llamacli.serve.app import Limits, Server
        from llamacli.serve.guard import LOCAL
        from llamacli.serve.listen import Listener, bind, is_local
    except ImportError as error:
        raise UsageError(f"serve needs the package {error.name}, found none; pip install 'llamacli[serve]'") from None
    console = output.console()
    keys = _keys(api_key, api_key_file, console)
    local = is_local(host)
    if not local and not keys:
        raise UsageError(
            f"--host {host}: expected --api-key with an address that others reach, found none; a key of your own choice, such "
            f"as `openssl rand -hex 16` makes, or --host 127.0.0.1"
        )
    bound = bind(host, port)
    found = load_model(
        find_model(model, console),
        threads,
        ctx,
        console,
        memory=memory_bytes(memory),
        experts=experts.value,
        kv=storing.kv.value,
        kv_file=storing.kv_file,
        sessions=parallel,
        **placement(device, gpu_layers),
        mmproj=mmproj or False,
        **nodes.on_cluster,
    )
    limits = Limits(parallel, queue, byte_count(max_body, "--max-body"), rate=rate)
    server = Server(
        found,
        one_line(found.gguf.path.stem),
        limits,
        keys,
        cors or (),
        hosts=(*LOCAL, host) if local else None,
        snapshots=storing.snapshots(found),
        report=console.warn,
        log=console.note if console.verbose else None,
    )
    listener = Listener(server.app, bound)
    try:
        console.result(listener.url)
        console.note(f"{server.name}, {parallel} answers at a time, {found.ctx} tokens each")
        console.note(f"a browser chats at {listener.url}, programs at {listener.url}/v1")
        listener.wait()
    finally:
        with signals.unhurried():
            server.close()
            listener.close()


def _keys(given: list[str] | None, file: str | None, console) -> list[str]:
    """The keys of all sources; UsageError for one that a header cannot hold."""
    keys = [*(given or ())]
    if file is not None:
        keys += [line.strip() for line in read_file(file, console, Limit(1 << 20)).splitlines() if line.strip()]
        if not keys:
            raise UsageError(f"--api-key-file: expected a key in {file}, found none; a line each")
    if (key := environment.api_key()) is not None:
        keys.append(key)
    for key in keys:
        if not (key.isascii() and key.isprintable() and " " not in key and len(key) <= LONGEST_KEY):
            raise UsageError("--api-key: expected printable ASCII without spaces, found something else; choose another key")
    return keys
