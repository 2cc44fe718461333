"""Progress: a bar that fits any width, text for a log, speeds of the last seconds."""

import pytest
from wcwidth import wcswidth

from llamacli.cli.progress import WINDOW, Meter, clock_time

WIDTHS = range(1, 200)


def meter_at(second, *, rate=125_000_000, weights=230_000_000, total=10_000_000_000, label="blk.12.ffn_gate_exps"):
    """A meter that was told once a second, at an even pace."""
    now = 0
    meter = Meter("quantize", lambda: now)
    for now in range(second + 1):
        meter.update(now * rate, total, label, None if weights is None else now * weights)
    return meter


def test_a_bar_with_all_there_is_to_tell():
    bar = meter_at(40).bar(100)
    assert bar.startswith("blk.12.ffn_gate_exps  ━")
    assert bar.endswith("─   50 %  230 M weights/s  125 MB/s  0:40 left")
    assert bar.count("━") == pytest.approx(bar.count("─"), abs=1)


@pytest.mark.parametrize("second", [0, 1, 40, 80])
def test_a_bar_is_never_wider_than_it_may_be(second):
    for width in WIDTHS:
        assert len(meter_at(second).bar(width)) <= width


@pytest.mark.parametrize("label", ["模型.gguf 的第一部分", "a 🙂 name.gguf", "e\u0301te\u0301.gguf"])
def test_a_bar_counts_the_columns_of_a_terminal_and_not_characters(label):
    """A line that is wider than the terminal would be drawn below itself, again and again."""
    bars = {width: meter_at(40, label=label).bar(width) for width in WIDTHS}
    assert all(wcswidth(bar) <= width for width, bar in bars.items())
    assert wcswidth(bars[100].partition("━")[0]) == wcswidth(label) + 2


def test_the_least_important_parts_are_omitted_first():
    meter = meter_at(40)
    shown = [[part in meter.bar(width) for part in (" %", " left", "━", "MB/s", "M weights/s")] for width in reversed(WIDTHS)]
    assert shown[0] == [True] * 5
    assert all(parts == sorted(parts, reverse=True) for parts in shown[:-10])
    assert shown == sorted(shown, reverse=True)


def test_80_columns_hold_everything_and_40_the_tensor_and_the_time():
    meter = meter_at(40)
    assert all(part in meter.bar(79) for part in ("ffn_gate_exps", "━", " 50 %", "M weights/s", "MB/s", "0:40 left"))
    assert meter.bar(39) == "blk.12.ffn_gate_exps   50 %  0:40 left"
    assert meter.bar(30) == "blk.12.ffn_…   50 %  0:40 left"


def test_the_bar_stays_in_its_place_when_labels_change():
    meter = meter_at(40)
    before = meter.bar(79).index("━")
    meter.update(5_100_000_000, 10_000_000_000, "output", 9_500_000_000)
    assert meter.bar(79).index("━") == before


def test_a_bar_can_be_painted_and_be_of_other_signs():
    painted = meter_at(40).bar(100, "#", "-", lambda text, part: f"<{part}>{text}</>")
    assert "<filled>###" in painted
    assert "<empty>---" in painted
    assert "<speed>125 MB/s</>" in painted


def test_words_for_a_log():
    assert meter_at(40).words() == "quantize: 50 %, blk.12.ffn_gate_exps, 230 M weights/s, 125 MB/s, 0:40 left"
    assert meter_at(40, weights=None, label="pp512").words() == "quantize: 50 %, pp512, 0:40 left"


def test_speed_and_time_left_are_shown_once_known():
    assert meter_at(0).words() == "quantize: 0 %, blk.12.ffn_gate_exps"
    assert meter_at(5, rate=0).words().endswith("0 MB/s")
    assert meter_at(0, total=0).words() == "quantize: 0 %, blk.12.ffn_gate_exps"


def test_speeds_are_those_of_the_last_seconds():
    now, done = 0, 0
    meter = Meter("quantize", lambda: now)
    for now in range(100):
        done += 1_000_000 if now < 50 else 5_000_000
        meter.update(done, 10**9, "x", done)
    assert now - 50 > WINDOW
    assert "5.0 MB/s" in meter.words()


def test_work_of_an_earlier_run_does_not_count_for_the_speed():
    now = 0
    meter = Meter("quantize", lambda: now)
    for now in (0, 10):
        meter.update(9 * 10**9 + now * 10**7, 10**10, "x", 0)
    assert "10 MB/s" in meter.words()
    assert "1:30 left" in meter.words()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (-3, "0:00")])
def test_times(seconds, text):
    assert clock_time(seconds) == text
