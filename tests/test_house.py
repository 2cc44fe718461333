"""Rules of the code base: what may import what, every module says what it is for, docs/design.md shows the tree as it is."""

import ast
import fnmatch
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted([*ROOT.glob("llamacli/**/*.py"), *ROOT.glob("quantize/**/*.py")])
HEAVY = {
    "llama_cpp": ("llamacli/bench/peer.py",),
    "mlx": ("llamacli/mlx/",),
    "matplotlib": ("llamacli/bench/plot.py",),
    "numba": ("llamacli/cpu/kernels/", "quantize/encoders/"),
    "llvmlite": ("llamacli/cpu/kernels/", "quantize/encoders/", "llamacli/bench/limits.py"),
    "markdown_it": ("llamacli/cli/chat/", "llamacli/cli/code.py"),
    "PIL": ("llamacli/vision/",),
    "prompt_toolkit": ("llamacli/cli/chat/prompt.py",),
    "pygments": ("llamacli/cli/chat/markdown.py",),
    "ray": ("llamacli/cluster/",),
    "rich": ("llamacli/cli/console.py", "llamacli/cli/chat/"),
    "starlette": ("llamacli/serve/",),
    "uvicorn": ("llamacli/serve/listen.py",),
    "sqlite3": ("llamacli/store.py", "llamacli/conversation.py"),
    "click": ("llamacli/cli/",),
}
FLOORS = [  # a module may import from its own floor and those above it in this list; the longest matching name counts
    "errors environment",
    "cpu.kernels",
    "files",
    "llama4 plan.machine mlx.runtime",
    "text device prompt positions caches piece client cpu.weights cpu.kvcache cpu.kvfile cpu.experts cpu.buffers",
    "plan.offload",
    "plan.placement plan.nodes library",
    "cpu mlx",
    "vision",
    "engine",
    "snapshots speculation",
    "session",
    "tools",
    "together",
    "store",
    "conversation",
    "bench",
    "serve cluster",
    "cli",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def floor(module):
    """The floor of `llamacli.<module>`, or None if it has none (the package itself)."""
    parts = module.split(".")
    return next((FLOOR[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOOR), None)


@cache
def imports(path):
    """Names of all modules imported anywhere in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_says_what_it_is_for_and_stays_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "expected a docstring at the top"
    assert text.count("\n") < 450


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_heavy_packages_are_imported_only_in_their_folders(path):
    for package in {module.partition(".")[0] for module in imports(path)} & set(HEAVY):
        assert name(path).startswith(HEAVY[package]), f"{package} is imported"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down_only(path):
    package, *inner = path.relative_to(ROOT).with_suffix("").parts
    here = floor(".".join(inner))
    for module in imports(path):
        other, _, rest = module.partition(".")
        if package == "quantize" and other == "llamacli":
            assert rest.startswith(("errors", "files", "llama4", "text", "cpu.kernels")), f"{module} is imported"
        elif package == "llamacli":
            assert other != "quantize" or inner[0] in ("cli", "cluster"), f"{module} is imported"
            if other == "llamacli" and None not in (here, floor(rest)):
                assert floor(rest) <= here, f"{module} is imported"


def test_the_tree_in_the_docs_is_the_tree_on_disk():
    tree = re.search(r"```\n(llamacli/.*?)```", (ROOT / "docs" / "design.md").read_text(), re.S).group(1)
    folders, shown = [], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        if opened := re.match(r" *([\w-]+/) ", line):
            folders[depth:] = [opened.group(1)]
        else:
            shown.update("".join(folders[:depth]) + file for file in re.findall(r"\S+\.py", line))
    on_disk = {name(path) for path in MODULES if path.name != "__init__.py"}
    shown = {pattern: set(fnmatch.filter(on_disk, pattern)) for pattern in shown if not pattern.endswith("__init__.py")}
    assert on_disk == set().union(*shown.values())
    assert all(shown.values()), "the tree shows what is not there"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("quantize/*.md")]), ids=name)
def test_links_of_the_docs_lead_to_files_that_exist(path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_contributing_names_every_test_file_and_no_other():
    named = set(re.findall(r"tests/((?:\w+/)?test_\w+\.py)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named == {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]  # pytest imports them by it
    assert sorted(set(names)) == sorted(names)
