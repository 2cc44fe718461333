"""Measures how a server with OpenAI's protocol answers several clients at once: `python tests/load.py URL`.

In: the address of a running server of llamacli or another program, such as llama-server. Out: a line for each number of
clients: tokens per second of all together and of the slowest client, seconds to the first token (median and worst), tokens of a
prompt.

Each client sends one chat after the other, each with different words, so that the server reuses no prompt. Tokens are those of
the server's `usage`. A row ends after at most `--limit` seconds, and says if it was cut.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
from contextlib import closing
from typing import NamedTuple
from urllib.parse import urlsplit

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part",
    "place case week company system program question work government number night point home water room mother area money",
    "story fact month lot right study book eye job word business issue side kind head house service friend father power hour",
    "game line end member law car city community name president team minute idea kid body information back parent face level",
)

COLUMNS = (  # head, field of a row's summary, digits
    ("all tok/s", "tokens_per_s", 1),
    ("slowest tok/s", "slowest_tokens_per_s", 1),
    ("first token s", "first_token_median_s", 2),
    ("worst", "first_token_worst_s", 2),
    ("tokens in", "prompt_tokens", 0),
    ("reused", "cached_tokens", 0),
    ("out", "completion_tokens", 0),
)
HEAD = "{:>7} {:>10} {:>14} {:>14} {:>7} {:>10} {:>7} {:>5}"


class Chat(NamedTuple):
    """One chat: seconds since the row began, tokens."""

    began: float
    first: float
    ended: float
    prompt: int
    cached: int
    completion: int


class Failed(Exception):
    """The server gave no answer, or not in time."""


class Server:
    """The server and how to send requests to it."""

    def __init__(self, url: str, key: str | None, raw: bool = False):
        """`raw`: continue texts instead of chats, for a model without a chat template."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise Failed(f"expected an address such as http://127.0.0.1:8080, found {url}")
        self._host, self._port = parts.hostname, parts.port or 80
        self._raw = raw
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def wait(self, until: float) -> None:
        """Wait until the model is loaded, if the server reports that by /health."""
        while True:
            with closing(http.client.HTTPConnection(self._host, self._port, timeout=10)) as connection:
                connection.request("GET", "/health", headers=self._headers)
                if connection.getresponse().status != 503:
                    return
            if time.perf_counter() > until:
                raise Failed("the server still loads its model")
            time.sleep(0.2)

    def post(self, path: str, body: dict, until: float) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request; returns the begun response and its connection."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=max(0.1, until - time.perf_counter()))
        connection.request("POST", path, json.dumps(body), self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Failed(f"{path}: {response.status} {response.read(400).decode(errors='replace')}")
        return connection, response

    def tokens(self, text: str, until: float) -> int:
        """The number of tokens of a text, by /tokenize of llamacli and llama-server; else an estimate."""
        try:
            connection, response = self.post("/tokenize", {"content": text}, until)
            with closing(connection):
                return len(json.loads(response.read())["tokens"])
        except (Failed, OSError, KeyError, ValueError, TypeError, AttributeError):
            return len(text.split()) * 4 // 3

    def chat(self, text: str, n: int, start: float, until: float) -> Chat:
        """Ask for an answer of `n` tokens."""
        path = "/v1/completions" if self._raw else "/v1/chat/completions"
        body = {"prompt": text} if self._raw else {"messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": n, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        began, first, usage = time.perf_counter(), None, None
        connection, response = self.post(path, body, until)
        try:
            for line in response:
                now = time.perf_counter()
                if now > until:
                    raise Failed("out of time")
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise Failed(str(event["error"])[:400])
                if first is None and any(c.get("text") or (c.get("delta") or {}).get("content") for c in event["choices"]):
                    first = now
                usage = event.get("usage") or usage
        finally:
            connection.close()
        if usage is None:
            raise Failed("the server tells no usage")
        ended = time.perf_counter()
        details = usage.get("prompt_tokens_details") or {}
        counts = usage["prompt_tokens"], details.get("cached_tokens", 0), usage["completion_tokens"]
        return Chat(began - start, (first or ended) - start, ended - start, *counts)


def texts(seed: int, n_words: int):
    """Prompts that differ from the first word on."""
    draw, words = random.Random(seed), " ".join(WORDS).split()
    while True:
        yield f"{draw.randrange(10**6)} {' '.join(draw.choices(words, k=n_words))}"


def row(server: Server, n_clients: int, chats: int, n_words: int, n: int, limit: float) -> list[list[Chat]]:
    """The results of each client."""
    found: list[list[Chat]] = [[] for _ in range(n_clients)]
    wrong: list[Exception] = []
    start = time.perf_counter()

    def client(i: int) -> None:
        asked = texts(1000 * n_clients + i, n_words)
        try:
            for _ in range(chats):
                found[i].append(server.chat(next(asked), n, start, start + limit))
        except Exception as error:  # of any kind: the row has failed
            wrong.append(error)

    clients = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(n_clients)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(max(0.0, start + limit + 1 - time.perf_counter()))
    if wrong or any(each.is_alive() for each in clients):
        done = sum(map(len, found))
        raise Failed(f"{n_clients} clients: {done} of {n_clients * chats} chats, then: {wrong[0] if wrong else 'out of time'}")
    return found


def summary(found: list[list[Chat]]) -> dict:
    """The figures of a row."""
    chats = [chat for client in found for chat in client]
    seconds = max(chat.ended for chat in chats) - min(chat.began for chat in chats)
    waits = [chat.first - chat.began for chat in chats]
    return {
        "clients": len(found),
        "tokens_per_s": sum(chat.completion for chat in chats) / seconds,
        "slowest_tokens_per_s": min(
            sum(chat.completion for chat in client) / (client[-1].ended - client[0].began) for client in found
        ),
        "first_token_median_s": statistics.median(waits),
        "first_token_worst_s": max(waits),
        "prompt_tokens": statistics.mean(chat.prompt for chat in chats),
        "cached_tokens": statistics.mean(chat.cached for chat in chats),
        "completion_tokens": statistics.mean(chat.completion for chat in chats),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8080")
    parser.add_argument("--clients", default="1,4,8,16", help="numbers of clients (1,4,8,16)")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt, nearly (200)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--chats", type=int, default=2, help="chats of each client, one after the other (2)")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a row at most (300)")
    parser.add_argument("--raw", action="store_true", help="continue texts, for a model without a chat template")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--json", action="store_true", help="a record a line")
    asked = parser.parse_args()
    try:
        server, until = Server(asked.url, asked.key, asked.raw), time.perf_counter() + asked.limit
        server.wait(until)
        n_words = max(1, asked.prompt * 100 // max(1, server.tokens(next(texts(0, 100)), until)))
        server.chat(next(texts(1, n_words)), 8, 0.0, until)  # not counted: the first request has a higher cost
        if not asked.json:
            print(HEAD.format("clients", *(head for head, _, _ in COLUMNS)))
        for n_clients in map(int, asked.clients.split(",")):
            s = summary(row(server, n_clients, asked.chats, n_words, asked.tokens, asked.limit))
            shown = (s["clients"], *(f"{s[name]:.{digits}f}" for _, name, digits in COLUMNS))
            print(json.dumps(s) if asked.json else HEAD.format(*shown), flush=True)
    except (Failed, OSError, http.client.HTTPException) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
