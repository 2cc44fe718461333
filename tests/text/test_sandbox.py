"""The sandbox: rendering any chat template ends soon, within little memory, with a text or a one-line error."""

import subprocess
import sys
from pathlib import Path

import pytest

from llamacli.errors import PromptError
from llamacli.plan.machine import resident_peak
from llamacli.text import sandbox
from llamacli.text.budget import TooMuch
from llamacli.text.marks import marks
from llamacli.text.tokenizer import Names

TESTS = Path(__file__).resolve().parents[1]


def render(template, **variables):
    own = marks(Names({"<|eot|>": 7}), [template])
    return own.plain(sandbox.render("{% if messages %}{% endif %}" + template, own, variables))


LONG = "{% set s = 'ab' * 500000 %}"
DOUBLING = "{% set ns = namespace(s=START) %}{% for i in range(90) %}{% set ns.s = STEP %}{% endfor %}"


def doubling(start, step, use):
    return DOUBLING.replace("START", start).replace("STEP", step) + use


NESTS = doubling("(1,)", "(ns.s, ns.s)", "")  # 2 ** 90 ones in 90 tuples
TOO_MUCH = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "loops that do nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "constant text in a loop": "{% set x %}{% for i in range(99999) %}" + "y" * 9999 + "{% endfor %}{% endset %}",
    "recursive loops": "{% for x in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 9 }}{% endfor %}",
    "macros that call themselves twice": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    "a width in %": "{{ '%2000000000d' % 1 }}",
    "a width beside %": "{{ '%*d' % (2000000000, 1) }}",
    "one value often": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "a width in format": "{{ '{:2000000000}'.format(1) }}",
    "a width beside format": "{{ '{:{}}'.format(1, 2000000000) }}",
    "format often": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "format as a filter": "{{ ('%s' * 100000) | format(*range(99999)) | format }}{{ '%2000000000d' | format(1) }}",
    "ljust": "{{ 'x'.ljust(2000000000) }}",
    "center": "{{ 'x' | center(2000000000) }}",
    "center in map": "{{ range(99999) | map('center', 99999) | list }}",
    "zfill": "{{ 'x'.zfill(2000000000) }}",
    "replace": LONG + "{{ s.replace('a', s) }}",
    "replace as a filter": LONG + "{{ s | replace('a', s) }}",
    "replace nothing": LONG + "{{ s.replace('', s) }}",
    "join": LONG + "{{ s.join(s) }}",
    "join as a filter": LONG + "{{ s | join(s) }}",
    "indent": "{{ ('x\\n' * 100000) | indent(100000) }}",
    "indented JSON": "{{ [1, [2, [3]]] | tojson(indent=2000000000) }}",
    "batch": "{{ [1] | batch(2000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(2000000000) | list }}",
    "round": "{{ 5 | round(-1000000000) }}",
    "a sum of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "products": doubling("2", "ns.s * ns.s", ""),
    "sums": DOUBLING.replace("90", "99999").replace("START", "2").replace("STEP", "ns.s + ns.s") + "{{ ns.s // 3 }}",
    "text times": "{{ 'x' * 10 ** 10 }}",
    "lists times": "{{ [1] * 10 ** 10 }}",
    "doubling by ~": doubling("'x'", "ns.s ~ ns.s", "{{ ns.s }}"),
    "doubling by +": doubling("'x'", "ns.s + ns.s", "{{ ns.s }}"),
    "doubling lists": doubling("[1]", "ns.s + ns.s", "{{ ns.s | length }}"),
    "doubling by set": "{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 90,
    "nests as text": NESTS + "{{ ns.s }}",
    "nests by ~": NESTS + "{{ 'x' ~ ns.s }}",
    "nests as JSON": NESTS + "{{ ns.s | tojson }}",
    "nests compared": NESTS + "{% set a = ns.s %}" + NESTS + "{{ a == ns.s }}",
    "nests in a list": NESTS + "{% set a = ns.s %}" + NESTS + "{{ a in [ns.s] }}",
    "nests in a test": NESTS + "{{ ns.s is eq(ns.s) }}",
    "nests as keys": NESTS + "{{ {ns.s: 1} }}",
    "nests looked up": NESTS + "{{ {1: 1}[ns.s] }}",
    "nests got": NESTS + "{{ {1: 1}.get(ns.s) }}",
    "nests unique": NESTS + "{{ [ns.s] | unique | list }}",
    "nests by index": NESTS + "{{ [1].index(ns.s) }}",
    "nests changed": "{% for i in [1, 2] %}" + NESTS + "{{ loop.changed(ns.s) }}{% endfor %}",
    "a namespace in itself": "{% set a = namespace() %}{% set a.x = [a, a] %}{{ a }}",
    "slices in a loop": LONG + "{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "searches in a loop": LONG + "{% for i in range(99999) %}{{ '' if 'c' in s }}{% endfor %}",
    "a search from the end": LONG + "{{ s.rfind('b' ~ s[:400000]) }}",
    "many characters to strip": LONG + "{{ s.strip(s) }}",
    "a width in a date": "{{ strftime_now('%999999999Y') }}",
    "long text": "{% for i in range(99) %}" + "x" * 99999 + "{% endfor %}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused_before_it_is_done(name):
    before = resident_peak()
    with pytest.raises(TooMuch, match="more work or text than a prompt needs"):
        render(TOO_MUCH[name])
    assert resident_peak() - before < 300e6


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1" + "+1" * 60_000 + " }}",
        "{{ x" + ".y" * 60_000 + " }}",
        "{{ x" + "|e" * 60_000 + " }}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{% if x %}" * 9000 + "{% endif %}" * 9000,
        "{{ " + "9" * 99_999 + " }}",
        "{#" * 60_000,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ],
    ids=lambda template: template[:24],
)
def test_templates_too_deep_for_the_parser_or_the_stack_are_one_line_of_error(template):
    with pytest.raises(PromptError) as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template, names",
    [
        ("{{ 'x' | wordwrap(1) }}", "wordwrap"),
        ("{{ 'x'.encode() }}", "encode"),
        ("{{ 'x'.translate({}) }}", "translate"),
        ("{{ (1).to_bytes(9, 'big') }}", "to_bytes"),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ [].append(1) }}", "append"),
        ("{{ x.f() }}", "function"),
        ("{% trans %}x{% endtrans %}", "trans"),
        ("{% autoescape true %}x{% endautoescape %}", "autoescape"),
    ],
)
def test_what_templates_may_not_use_is_refused_by_name(template, names):
    with pytest.raises(PromptError, match=names):
        render(template, x={"f": lambda: 1})


@pytest.mark.parametrize(
    "way_in", ["''.__class__", "x.__class__", "''|attr('__class__')", "range.__self__", "namespace.__init__"]
)
def test_nothing_of_python_s_is_reached(way_in):
    assert render(f"{{{{ {way_in} }}}}", x={}) == ""
    assert render(f"{{{{ '{{0.__class__}}'.format({way_in}) }}}}", x={}) == ""


def test_two_threads_have_a_budget_each():
    from concurrent.futures import ThreadPoolExecutor

    template = "{% for i in range(40000) %}{% if i % 2 %}x{% endif %}{% endfor %}"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: len(render(template)), range(8))) == {20000}


def test_a_larger_conversation_has_a_larger_budget():
    template = "{% for i in range(5) %}{% for m in MESSAGES %}{{ m.replace('x', 'yyyy') | length }}{% endfor %}{% endfor %}"
    assert render(template.replace("MESSAGES", "messages"), messages=["x" * 1_000_000] * 4) == "4000000" * 20
    with pytest.raises(TooMuch):
        render(template.replace("MESSAGES", "['x' * 1000000] * 4"))


def test_a_short_round_of_fuzzing_finds_nothing(tmp_path):
    """fuzz_templates.py runs 10,000; here are 150, with another seed."""
    found = subprocess.run(
        [sys.executable, TESTS / "fuzz_templates.py", "150", "12"], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "150 templates, 0 findings" in found.stdout
