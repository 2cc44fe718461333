"""The documentation: commands shown with output give that output; the reference of commands equals `--help`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import make_cli_docs
import pytest

from llamacli.cli import COMMANDS, parser

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"\d+(?:\.\d+)?")
LLAMACLI = f"llamacli() {{ {sys.executable} -c 'import sys; from llamacli.cli import main; sys.exit(main())' \"$@\"; }}; "
SCOUT = {  # what differs from the small model's config.json
    **{"vocab_size": 202048, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8},
    **{"intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760},
}


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/*/README.md"))]


def shown():
    """(page, command, output) of every `$ command` in a fenced block that is followed by output; in a chat, `> ` is typed."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.S | re.M):
            for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M):
                if output.strip():
                    yield pytest.param(command, output, id=f"{page.name}: {command[:60]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the commands name: the project's models, and Scout's config.json."""
    here = tmp_path_factory.mktemp("docs")
    (here / "models").symlink_to(ROOT / "models")
    config = json.loads((ROOT / "models" / "scout-tiny" / "hf" / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("moe_layers", "no_rope_layers")} | SCOUT
    (here / "Llama-4-Scout-17B-16E-Instruct").mkdir()
    (here / "Llama-4-Scout-17B-16E-Instruct" / "config.json").write_text(json.dumps(config))
    return here


@pytest.mark.parametrize("command, output", list(shown()))
def test_a_command_gives_the_output_that_the_page_shows(command, output, folder):
    if "| jq" in command and not shutil.which("jq"):
        pytest.skip("needs jq")
    typed = "\n".join(re.findall(r"^> (.*)", output, re.M))
    env = {name: value for name, value in os.environ.items() if name not in ("LLAMACLI_MODEL", "NO_COLOR")}
    done = subprocess.run(
        ["bash", "-c", LLAMACLI + command + " 2>&1"],
        cwd=folder,
        env=env,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )
    expected = "".join(line for line in output.splitlines(keepends=True) if not line.startswith("> "))
    if command.startswith("llamacli plan"):
        # buffers differ a little between the variants of a CPU, and with them the room for experts
        found, page = ([float(number) for number in NUMBER.findall(text)] for text in (done.stdout, expected))
        assert NUMBER.sub("N", done.stdout).split() == NUMBER.sub("N", expected).split()
        assert found == pytest.approx(page, rel=0.05)
    else:
        assert _untimed(done.stdout) == _untimed(expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_has_the_options_that_stand_behind_it(page):
    unknown, group = [], parser()
    names = {name: group.get_command(click.Context(group), name).params for name in COMMANDS}
    for command, rest in re.findall(rf"(?<!\[)\bllamacli ({'|'.join(COMMANDS)})\b([^\n`]*)", page.read_text()):
        words = re.split(r"\s#\s| [|>;&]|\.\.\.", rest.replace("\\", ""))[0].split()
        options = {word.partition("=")[0].rstrip(",.:)]") for word in words if re.match(r"--?[a-z]", word)}
        known = {"-h", "--help"}.union(*(p.opts for p in names[command]))
        unknown += [(command, option) for option in sorted(options - known)]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_headings(page):
    wanted = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text())
    assert [(name, anchor) for name, anchor in wanted if anchor not in _anchors(page.parent / name if name else page)] == []


def test_the_reference_and_the_manual_pages_are_those_of_the_commands():
    written = make_cli_docs.pages()
    on_disk = {f"man/{path.name}" for path in (ROOT / "docs" / "man").iterdir()} | {"cli.md"}
    stale = [name for name in written if name in on_disk and (ROOT / "docs" / name).read_text() != written[name]]
    assert (stale, on_disk ^ written.keys()) == ([], set()), "run `python tests/make_cli_docs.py`"


def test_the_manual_pages_have_what_the_help_has():
    page = (ROOT / "docs" / "man" / "llamacli-run.1").read_text()
    assert r"\fB\-n, \-\-max\-tokens N\fR" in page and r"\-\-n\-predict" in page and "Summarize in five points" in page


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "man").glob("*.1")), ids=lambda path: path.name)
def test_groff_reads_a_manual_page_without_a_warning(page):
    done = subprocess.run(["groff", "-ww", "-man", "-Tutf8", page], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def _anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _untimed(text):
    """A text without measured seconds."""
    return re.sub(r"\bin \d+:\d\d$", "in TIME", text, flags=re.M).strip()
