"""Counters of the server in Prometheus's text format 0.0.4.

In: requests as they end, the scheduler's totals. Out: the text of /metrics.
"""

import threading
from collections import Counter

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # upper ends of the histogram, seconds


class Metrics:
    """Counters of requests; threads may share it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._first, self._first_sum = Counter(), 0.0

    def request(self, route: str, status: int) -> None:
        """Count an answered request. `route`: the path of a known route."""
        with self._lock:
            self._requests[route, status] += 1

    def first_token(self, seconds: float) -> None:
        """Count the seconds from a request to the first token of its answer."""
        with self._lock:
            self._first[next((end for end in FIRST_TOKEN if seconds <= end), float("inf"))] += 1
            self._first_sum += seconds

    def text(self, scheduler) -> str:
        """All counters as text."""
        t = scheduler.totals
        lines = []

        def show(name: str, kind: str, help: str, *values: tuple[str, float]) -> None:
            lines.append(f"# HELP llamacli_{name} {help}\n# TYPE llamacli_{name} {kind}")
            lines.extend(f"llamacli_{name}{labels} {value}" for labels, value in values)

        with self._lock:
            requests, first, total = sorted(self._requests.items()), dict(self._first), self._first_sum
        show(
            "requests_total",
            "counter",
            "Requests answered.",
            *((f'{{route="{route}",status="{status}"}}', n) for (route, status), n in requests),
        )
        show("prompt_tokens_total", "counter", "Tokens of prompts.", ("", t.prompt_tokens))
        show("cached_tokens_total", "counter", "Prompt tokens that were reused.", ("", t.cached_tokens))
        show("completion_tokens_total", "counter", "Tokens of answers.", ("", t.completion_tokens))
        show("prompt_seconds_total", "counter", "Seconds in which prompts were evaluated.", ("", t.prompt_seconds))
        show("decode_seconds_total", "counter", "Seconds in which answers were generated.", ("", t.decode_seconds))
        ends = (("finished", t.finished), ("cancelled", t.cancelled), ("failed", t.failed))
        show("answers_total", "counter", "Answers by finish reason.", *((f'{{end="{end}"}}', n) for end, n in ends))
        show("answers_active", "gauge", "Answers under way.", ("", scheduler.active))
        show("answers_waiting", "gauge", "Answers in the queue.", ("", scheduler.waiting))
        name, below = "first_token_seconds", 0
        lines.append(f"# HELP llamacli_{name} Seconds to the first token.\n# TYPE llamacli_{name} histogram")
        for end in (*FIRST_TOKEN, float("inf")):
            below += first.get(end, 0)
            lines.append(f'llamacli_{name}_bucket{{le="{"+Inf" if end == float("inf") else f"{end:g}"}"}} {below}')
        lines += [f"llamacli_{name}_sum {total}", f"llamacli_{name}_count {below}"]
        return "\n".join(lines) + "\n"
