"""The chat page: page.html, with headers that allow only what it needs.

Out: a response. The policy lists the hashes of the page's own script and style (W3C, Content Security Policy 3): the browser
runs and loads nothing else, whatever a model writes, and the page can send requests to this server only.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


def page() -> Response:
    """The page with its headers."""
    text, policy = _read()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html")


@cache
def _read() -> tuple[str, str]:
    """The page and its policy."""
    text = FILE.read_text(encoding="utf-8")
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(text, "script"),
        "style-src": _hash(text, "style"),
        "connect-src": "'self'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text can become HTML
        "trusted-types": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in allowed.items())


def _hash(text: str, element: str) -> str:
    """The hash of the only element of this name, as the policy lists it."""
    (inner,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
