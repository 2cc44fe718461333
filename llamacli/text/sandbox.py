"""Runs an untrusted chat template: without access to Python, in limited time and memory, with errors of one line.

In: the source of a Jinja template (`LONGEST_SOURCE` characters at most), `Marks`, its variables. Out: the rendered text, the
template's own special tokens marked.

Jinja's sandbox keeps templates from Python's internals. It does not bound their work, so the parsed template is rewritten
before it is compiled: every loop, comparison, slice, operator, call, filter, test and output goes through this module, which
charges its cost (budget.py). Features of Jinja that are not in the lists at the end are refused by name. Strings in the
template's source are marked (marks.py); comparisons and searches ignore the marks.
"""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType, FunctionType, MethodType

from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from llamacli.errors import PromptError
from llamacli.text.budget import NODE, STEP, TooMuch, budget, charged, format_price, price, spend, weigh
from llamacli.text.marks import Marks

LONGEST_SOURCE = 1 << 17  # characters; real templates have up to some 30,000
_BITS = 4096  # of an integer


def render(source: str, marks: Marks, variables: dict) -> str:
    """The text that the template makes of `variables`.

    PromptError if it fails, refuses, costs too much or does not use the variable `messages`.
    """
    try:
        with budget(variables) as longest:
            text = _compiled(source, marks).render(variables)
            if len(text) > longest:
                raise TooMuch
            return text
    except PromptError:
        raise
    except Exception as error:  # any error of a template: syntax, undefined names, sandbox, recursion, memory
        message = " ".join(marks.plain(str(error)).split())[:200] or type(error).__name__
        raise PromptError(
            f"the model's chat template cannot render this conversation: {message}; --raw goes without it"
        ) from None


@lru_cache(8)
def _compiled(source: str, marks: Marks):
    environment = Sandbox(marks)
    tree = environment.parse(source)
    if not any(node.name == "messages" and node.ctx == "load" for node in tree.find_all(nodes.Name)):
        raise PromptError("the model's chat template never uses the messages; --raw goes without it")
    tree = _Rewriter(marks).visit(tree)
    tree.set_environment(environment)
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: marks the assistant's text for transformers' trainer. The tags have no effect
    here.
    """

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Rewriter(NodeTransformer):
    """Replaces operations that Jinja compiles to plain Python by filters of this module."""

    def __init__(self, marks: Marks):
        self._marks = marks

    def visit_TemplateData(self, node):
        return nodes.Const(self._marks.mark(node.data), lineno=node.lineno)  # an expression, so `finalize` sees it

    def visit_Const(self, node):
        if isinstance(node.value, str):
            return nodes.Const(self._marks.mark(node.value), lineno=node.lineno)
        return node

    def visit_For(self, node):
        node = self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Compare(self, node):
        node.expr = self._plain(node.expr)
        for operand in node.ops:
            operand.expr = self._plain(operand.expr)
        return node

    def visit_Pair(self, node):
        node.key, node.value = self._plain(node.key), self.visit(node.value)
        return node

    def visit_Getitem(self, node):
        if isinstance(node.arg, nodes.Slice):
            return _filtered(self.generic_visit(node), "_cut")
        node.node, node.arg = self.visit(node.node), self._plain(node.arg)
        return node

    def visit_ScopedEvalContextModifier(self, node):
        raise PromptError("the model's chat template uses autoescape, which prompts know nothing of; --raw goes without it")

    visit_EvalContextModifier = visit_ScopedEvalContextModifier

    def _plain(self, node):
        """A filter for a value that is compared or looked up: charged, and without marks."""
        return node if isinstance(node, nodes.Const) else _filtered(self.visit(node), "_plain")


def _filtered(node, name: str):
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with a charge for every operation."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, marks: Marks):
        loops = "jinja2.ext.loopcontrols"
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize, extensions=[loops, _Generation]
        )
        self.marks = marks
        self._globals = {"range": safe_range, "dict": dict, "namespace": Namespace, "cycler": Cycler, "joiner": Joiner}
        self._globals |= {"raise_exception": self._raise, "strftime_now": _strftime_now}
        self.globals = dict(self._globals)
        self.filters = {name: _priced(name, FILTERS[name]) for name in _FILTERS}
        self.filters |= {"tojson": _priced("tojson", self._to_json), "string": self._text, "replace": self._replace}
        self.filters |= {"_each": _Each, "_concat": self._concat, "_plain": self._plain, "_cut": charged}
        self.tests = {name: test if name in _LIGHT_TESTS else self._compared(test) for name, test in TESTS.items()}

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str):
            spend(format_price(left, right if isinstance(right, tuple) else (right,)))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            sizes = [len(side) if hasattr(side, "__len__") else abs(int(side)) for side in (left, right)]
            spend(STEP + 2 * sizes[0] * sizes[1])
        elif isinstance(left, int) and isinstance(right, int):
            bits = max(left.bit_length(), right.bit_length())
            if bits > _BITS or (operator == "**" and left.bit_length() * abs(right) > _BITS):
                raise TooMuch
        return charged(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args, **kwargs):  # names that no keyword of a template can have
        spend(STEP + NODE * (len(args) + len(kwargs)))
        if isinstance(__obj, BuiltinMethodType):
            return __self._method(__context, __obj, args, kwargs)
        if isinstance(__obj, Macro):
            spend(2 * STEP)
        if isinstance(__obj, LoopContext):  # {% for ... recursive %}
            args = (_Each(args[0]), *args[1:]) if args else args
        elif isinstance(__obj, MethodType) and isinstance(__obj.__self__, LoopContext | Cycler):
            spend(weigh((args, kwargs)))
        elif isinstance(__obj, FunctionType) and isinstance(getattr(__obj, "__wrapped__", None), BuiltinMethodType):
            spend(format_price(__obj.__wrapped__.__self__, (*args, *kwargs.values())))  # str.format in the sandbox
        elif not isinstance(__obj, Macro | BlockReference | Undefined | Joiner) and not any(
            __obj == known for known in __self._globals.values()
        ):
            raise SecurityError(f"{type(__obj).__name__} objects are not called by chat templates")
        return charged(super().call(__context, __obj, *args, **kwargs))

    def _method(self, context, method, args, kwargs):
        owner, name = method.__self__, method.__name__
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is None or name not in _METHODS[kind]:
            raise SecurityError(f"the method {name} of {type(owner).__name__} is not for chat templates")
        if kind is str:
            if name in _ASKS:  # marks do not change lengths, so positions in the plain text are the same
                method = getattr(self.marks.plain(owner), name)
                args = tuple(map(self._unmarked, args))
            elif name in _SEARCHES:
                args = tuple(self._as_in(owner, arg) for arg in args)
            elif name == "replace":
                args = (self._as_in(owner, args[0]), *args[1:]) if args else args
            spend(price(name, owner, args, kwargs))
        else:
            args = tuple(map(self._plain, args)) if kind is dict else args
            spend(len(owner) if kind is dict else weigh((owner, args)))
        return charged(super().call(context, method, *args, **kwargs))

    def _as_in(self, text: str, wanted):
        """The text to search for, with marks if the searched text has it with marks."""
        if not isinstance(wanted, str):
            return wanted
        plain = self.marks.plain(wanted)
        if self.marks.marked(text) and (marked := self.marks.mark(plain)) in text:
            return marked
        return plain

    def _plain(self, value):
        """A value to compare: charged, without marks."""
        if isinstance(value, str):
            spend(8 + len(value) // 8)
            return self.marks.plain(value)
        if value is None or isinstance(value, int | float | Undefined):
            return value
        spend(weigh(value))
        return self._unmarked(value) if isinstance(value, list | tuple) else value

    def _unmarked(self, value):
        if isinstance(value, str):
            return self.marks.plain(value)
        if isinstance(value, list | tuple):
            items = [self._unmarked(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {self._unmarked(key): self._unmarked(item) for key, item in value.items()}
        return value

    def _text(self, value) -> str:
        """`str(value)`, charged. Marks are removed from lists and dictionaries, which would show them as escapes."""
        if not isinstance(value, str):
            spend(weigh(value))
            value = str(self._unmarked(value))
        spend(NODE + len(value))
        return value

    def _concat(self, values: list) -> str:
        return "".join(map(self._text, values))

    def _replace(self, text, old, new, count=-1) -> str:
        text, old, new = self._text(text), self._text(old), self._text(new)
        old = self._as_in(text, old)
        spend(price("replace", text, (old, new), {}))
        return text.replace(old, new, -1 if count is None else count)

    def _compared(self, test):
        @wraps(test)
        def compared(*args):
            first = hasattr(test, "jinja_pass_arg")
            return test(*args[:first], *map(self._plain, args[first:]))

        return compared

    def _to_json(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """Jinja's own escapes <, > and & for HTML; transformers' does not, and neither does this."""
        value = self._unmarked(value) if ensure_ascii else value  # marks would be escaped
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _raise(self, message):
        message = " ".join(self.marks.plain(self._text(message)).split())[:200]
        raise PromptError(f"the model's chat template refuses this conversation: {message}")


@pass_context
def _finalize(context, value) -> str:
    return context.environment._text(value)


class _Each:
    """The items of a loop, each charged as a step."""

    def __init__(self, items):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator:
        for item in self._items:
            spend(STEP)
            yield item


def _priced(name: str, function):
    """A filter of Jinja, charged before and after."""
    first = hasattr(function, "jinja_pass_arg")  # the context or the environment comes before the value

    @wraps(function)
    def priced(*args, **kwargs):
        spend(STEP)
        before, subject, rest = args[:first], args[first], args[first + 1 :]
        if isinstance(subject, Iterator):
            subject = list(_Each(subject))
        if name in _LIGHT_FILTERS:
            spend(NODE * len(subject) if hasattr(subject, "__len__") and not isinstance(subject, str) else 0)
        else:
            spend(weigh(subject) + weigh((rest, kwargs)))
        spend(price(name, subject, rest, kwargs))
        return charged(function(*before, subject, *rest, **kwargs))

    return priced


def _strftime_now(form: str) -> str:
    if len(form) > 1000 or re.search(r"%[^a-zA-Z%]*\d{3}", form):
        raise TooMuch
    return datetime.now().strftime(form)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = frozenset(FILTERS) - _words("pprint striptags urlize wordwrap xmlattr")  # for HTML, and slow on some texts
_LIGHT_FILTERS = _words(
    "length count first last list reverse select selectattr reject rejectattr map items default d attr batch slice"
)
_LIGHT_TESTS = _words(
    "defined undefined none boolean false true integer float number string mapping iterable sequence callable odd even sameas"
    " filter test escaped"
)
_ASKS = _words("startswith endswith find rfind index rindex count")
_SEARCHES = _words("split rsplit partition rpartition strip lstrip rstrip removeprefix removesuffix")
_TEXT = _words(
    "replace join center ljust rjust zfill lower upper title capitalize casefold swapcase splitlines isalnum isalpha isascii"
    " isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper"
)
_METHODS = {
    str: _ASKS | _SEARCHES | _TEXT,
    dict: _words("get items keys values copy"),
    list: _words("index count copy"),
    tuple: _words("index count"),
    float: _words("is_integer"),
}
