"""A hub on this machine, which can fail in the ways in which a real hub or the network fails.

`FakeHub(files)` serves {path: bytes} as the repository me/model: the tree API and ranges. `faults` is a list; each request for
a file takes one entry: ("cut", n) sends n bytes and ends; ("stall", n) sends n and then nothing; ("wrong", n) changes the byte
n; ("status", code, headers); ("redirect", url); ("whole",) ignores the range. None: no fault.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    def __init__(self, files, token=None):
        self.files, self.faults, self.token = files, [], token
        self.requests = []  # (path, headers)
        self.sent = 0  # bytes of files
        self.tree = None  # instead of what the files are
        self.over = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def listing(self):
        return self.tree or [
            {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": hashlib.sha1(path.encode()).hexdigest(),  # of the pointer file in git
                "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135},
            }
            for path, data in self.files.items()
        ]

    def answer(self, request):
        path = request.path.partition("?")[0]
        self.requests.append((path, dict(request.headers)))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply(request, 401, b"no")
        if path.startswith("/api/models/"):
            if path != "/api/models/me/model/tree/main":
                return self.reply(request, 404, b"no")
            return self.reply(request, 200, json.dumps(self.listing()).encode())
        data = self.files.get(path.removeprefix("/me/model/resolve/main/").removeprefix("/cdn/"))
        if data is None:
            return self.reply(request, 404, b"no")
        return self.file(request, data, self.faults.pop(0) if self.faults else None)

    def file(self, request, data, fault):
        kind, *details = fault or ("none",)
        if kind == "status":
            return self.reply(request, details[0], b"no", details[1])
        if kind == "redirect":
            return self.reply(request, 302, b"", {"Location": details[0]})
        first, _, last = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
        if kind == "whole":
            first, last = 0, len(data) - 1
        body = bytearray(data[first : last + 1])
        request.send_response(200 if kind == "whole" else 206)
        request.send_header("Content-Length", str(len(body)))
        if kind != "whole":
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        request.end_headers()
        if kind == "wrong":
            body[details[0] - first] ^= 255
        if kind in ("cut", "stall"):
            body = body[: details[0]]
        self.sent += len(body)
        request.wfile.write(body)
        request.wfile.flush()
        if kind == "stall":
            self.over.wait(300)
        request.close_connection = True
        return None

    def reply(self, request, status, body, headers=None):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
