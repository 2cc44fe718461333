"""Requests to a hub: one GET after the other, redirects followed by hand, failures told apart.

In: a URL. Out: an open response with status 200 or 206, or a DownloadError; `Busy` if another try may succeed. The token goes
to the hub alone: a redirect to another host is followed without it. The standard library does it: its client knows proxies and
certificates of the system, and one connection at a time is all that is needed.
"""

import email.utils
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from llamacli import __version__
from llamacli.errors import DownloadError

T = TypeVar("T")
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 6
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dead
TRIES, TRIES_OF_A_LIST = 8, 4  # failures in a row, without a byte in between, before giving up
LONGEST_PAUSE = 60.0  # seconds between tries, where the server names no other
LONGEST_ASKED = 900.0  # seconds that a server may ask to wait
LARGEST_ANSWER, LONGEST_ANSWER = 32 << 20, 120.0  # bytes of JSON, and seconds for it


class Busy(Exception):
    """Another try may succeed; `after`: seconds that the server asks to wait."""

    def __init__(self, what: str, after: float | None = None):
        super().__init__(what)
        self.after = after


class Hub:
    """A hub at `endpoint`. `sleep` and `timeout` are parameters for tests; `tell` is told of every pause."""

    def __init__(
        self,
        endpoint: str,
        token: str | None = None,
        tell: Callable[[str], None] = lambda words: None,
        sleep: Callable[[float], None] | None = None,
        timeout: float = TIMEOUT,
    ):
        try:
            scheme, host, _ = _origin(endpoint)
            sound = (
                scheme in ("http", "https") and host and endpoint.isascii() and endpoint.isprintable() and " " not in endpoint
            )
        except ValueError:  # no port, no address of version 6
            sound = False
        if not sound:
            raise DownloadError(f"HF_ENDPOINT: expected an address such as https://huggingface.co, found {endpoint!r:.200}")
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise DownloadError("HF_TOKEN: expected printable ASCII without spaces, found something else; copy the token again")
        self.endpoint, self._token, self._tell, self._sleep, self._timeout = endpoint, token, tell, sleep or time.sleep, timeout
        self._opener = urllib.request.build_opener(_Unchanged)

    def open(self, url: str, **headers: str) -> http.client.HTTPResponse:
        """The answer to a GET, 200 or 206 (416 also, for a range that is beyond the end). Busy or DownloadError else."""
        for _ in range(MOST_REDIRECTS):
            response = self._ask(url, headers)
            if response.status not in REDIRECTS:
                break
            location = response.headers.get("Location")
            response.close()
            if not location:
                raise DownloadError(f"{_host(url)}: expected where to go on, found a redirect without it; try again later")
            url = self.following(url, location)
        else:
            raise DownloadError(f"{_host(url)}: expected a file, found more than {MOST_REDIRECTS} redirects; try again later")
        if response.status in (200, 206, 416):
            return response
        try:
            raise self._failure(response, url)
        finally:
            response.close()

    def json(self, url: str):
        """(what a JSON document says, the response's headers), with patience."""

        def once():
            with self.open(url, Accept="application/json") as response:
                data = self._whole(response, url)
                try:
                    return json.loads(data), response.headers
                except (ValueError, RecursionError):
                    raise DownloadError(f"{_host(url)}: expected JSON, found other text; check HF_ENDPOINT") from None

        return self.patiently(once, tries=TRIES_OF_A_LIST)

    def _whole(self, response: http.client.HTTPResponse, url: str) -> bytes:
        """All that a response says, if that is not too much and does not come too slowly."""
        data, until = bytearray(), time.monotonic() + LONGEST_ANSWER
        try:
            while part := response.read1(1 << 20):
                data += part
                if len(data) > LARGEST_ANSWER:
                    raise DownloadError(f"{_host(url)}: expected at most {LARGEST_ANSWER >> 20} MB of JSON, found more")
                if time.monotonic() > until:
                    raise Busy(f"{_host(url)}: the answer takes more than {LONGEST_ANSWER:.0f} s")
        except (OSError, http.client.HTTPException) as error:
            raise Busy(f"{_host(url)}: the answer broke off ({_words(error)})") from None
        return bytes(data)

    def patiently(self, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0, tries: int | None = None) -> T:
        """What `attempt` returns, tried again after a pause as long as it is Busy; failures are counted anew when
        `progress` has grown.
        """
        failures, before = 0, progress()
        while True:
            try:
                return attempt()
            except Busy as busy:
                failures = 1 if progress() > before else failures + 1
                before = progress()
                if failures >= (tries or TRIES):
                    raise DownloadError(f"{busy}; {failures} tries in a row failed, run the command again to go on") from None
                if busy.after is not None and busy.after > LONGEST_ASKED:
                    raise DownloadError(
                        f"{busy}; the hub asks to wait {busy.after:.0f} seconds, run the command again then"
                    ) from None
                pause = min(LONGEST_PAUSE, 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
                pause = pause if busy.after is None else busy.after
                self._tell(f"{busy}; again in {pause:.0f} s")
                self._sleep(pause)

    def _ask(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        sent = {"User-Agent": f"llamacli/{__version__}", "Accept-Encoding": "identity", **headers}
        if self._token and _origin(url) == _origin(self.endpoint):
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            return self._opener.open(urllib.request.Request(url, headers=sent), timeout=self._timeout)
        except (ValueError, http.client.InvalidURL) as error:
            raise DownloadError(f"{url!r:.120}: expected an address, found: {error}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DownloadError(
                    f"{_host(url)}: expected a certificate that this system trusts, found: {_words(error)}; set SSL_CERT_FILE "
                    f"to a file of certificates"
                ) from None
            raise Busy(f"{_host(url)}: no answer ({_words(error)})") from None

    def following(self, url: str, location: str) -> str:
        """Where a link at `url` leads: to no other scheme than the web's, and never from https back to http."""
        allowed = ("https",) if self.endpoint.startswith("https:") else ("http", "https")
        try:
            found = urljoin(url, location)
            if urlsplit(found).scheme in allowed and _origin(found)[1]:
                return found
        except ValueError:
            pass
        raise DownloadError(
            f"{_host(url)}: expected a redirect to {' or '.join(allowed)}, found {location!r:.120}; not followed"
        )

    def _failure(self, response: http.client.HTTPResponse, url: str) -> Exception:
        status, host = response.status, _host(url)
        if status == 429 or status >= 500 or status == 408:
            return Busy(
                f"{host}: HTTP {status} {_REASONS.get(status, '')}".strip(), _after(response.headers.get("Retry-After"))
            )
        gated = response.headers.get("X-Error-Code") == "GatedRepo"
        return Refused(status, f"{host}: HTTP {status}", bool(self._token), gated)


class Refused(DownloadError):
    """The hub refuses a request; hub.py makes the error for the user."""

    def __init__(self, status: int, words: str, with_token: bool, gated: bool):
        super().__init__(f"{words}; expected a file, found none there")
        self.status, self.with_token, self.gated = status, with_token, gated


class _Unchanged(urllib.request.HTTPErrorProcessor):
    """Every status is an answer: redirects are followed by hand, so that the token stays where it belongs."""

    def http_response(self, request, response):
        return response

    https_response = http_response


_REASONS = {429: "too many requests", 500: "the server failed", 502: "bad gateway", 503: "unavailable", 504: "timed out"}


def _after(text: str | None) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text)) if len(text) < 10 else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _origin(url: str) -> tuple:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _host(url: str) -> str:
    return urlsplit(url).hostname or url[:80]


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)[:120]
