"""`run --template NAME`: a prompt with places for parameters, as a TOML file.

In: NAME.toml of the user's templates folder, or a file; parameters. Out: the prompt and the system prompt, filled in.

    system = "You review code in {{language}}."
    prompt = "Review this for {{what}}:\\n\\n{{input}}"
    [defaults]
    what = "mistakes"

`{{input}}` is the text of the command line, files and pipes; it is appended to a prompt without this place. Places inside a
value are not filled.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamacli import environment
from llamacli.cli.grammar import meant
from llamacli.cli.inputs import Limit, read_file
from llamacli.errors import PromptError, UsageError

LARGEST = Limit(16 << 20)
INPUT = "input"
_PLACE = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


def names() -> list[str]:
    """The templates in the user's folder, for completion."""
    return sorted(path.stem for path in environment.templates_folder().glob("*.toml"))


def parameters(words: Sequence[str]) -> dict[str, str]:
    """--param NAME=VALUE, one or several."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--param: expected NAME=VALUE, found {word!r:.80}")
        if name == INPUT:
            raise UsageError(f"--param {INPUT}: expected another name; {{{{{INPUT}}}}} is the prompt, its files and stdin")
        found[name] = value
    return found


@dataclass
class Template:
    """A prompt, an optional system prompt, and default values of places."""

    path: Path
    prompt: str
    system: str | None
    defaults: dict[str, str]

    @classmethod
    def find(cls, name: str, console) -> "Template":
        """Find a template by its name or its file. PromptError if there is none, or if the file is not a template."""
        path = environment.templates_folder() / f"{name}.toml"
        if name.endswith(".toml") or len(Path(name).parts) != 1:
            path = Path(name).expanduser()
        elif not path.exists():
            raise PromptError(f"--template: expected a file or a name, found no {path}{meant(name, names())}")
        return cls._parsed(path, read_file(str(path), console, LARGEST))

    @classmethod
    def _parsed(cls, path: Path, text: str) -> "Template":
        import tomllib

        try:
            found = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise PromptError(f"{path}: expected TOML, found: {error or 'too much nesting'}; mend it") from None
        prompt, system, defaults = found.pop("prompt", None), found.pop("system", None), found.pop("defaults", {})
        if found:
            raise PromptError(f"{path}: expected prompt, system and defaults, found {next(iter(found))!r:.80}; remove it")
        if not isinstance(prompt, str) or not isinstance(system, str | None) or not isinstance(defaults, dict):
            raise PromptError(f"{path}: expected prompt and system as texts, defaults as a table, found something else")
        values = {}
        for key, value in defaults.items():
            if not isinstance(value, str | int | float):
                raise PromptError(f"{path}: expected texts and numbers as defaults, found {key} = {value!r:.40}")
            values[key] = str(value)
        return cls(path, prompt, system, values)

    def fill(self, text: str, given: Mapping[str, str]) -> tuple[str, str | None]:
        """The prompt and the system prompt. UsageError for a place without a value, and for a value without a place."""
        wanted = set(_PLACE.findall(self.prompt)), set(_PLACE.findall(self.system or ""))
        places = wanted[0] | wanted[1]
        if unknown := next((name for name in given if name not in places), None):
            known = sorted(places - {INPUT})
            near = meant(unknown, known)
            raise UsageError(f"{self.path}: expected parameters among {', '.join(known) or 'none'}, found {unknown}{near}")
        values = {**self.defaults, **given} | ({INPUT: text} if text else {})
        if missing := sorted(places - values.keys()):
            how = "a prompt, -f FILE or a pipe" if missing[0] == INPUT else f"--param {missing[0]}=..."
            raise UsageError(f"{self.path}: expected {how}, found none for {{{{{missing[0]}}}}}")
        prompt = self.prompt if INPUT in wanted[0] or not text else f"{self.prompt.rstrip()}\n\n{{{{{INPUT}}}}}"
        filled, system = (_PLACE.sub(lambda place: values[place[1]], part or "") for part in (prompt, self.system))
        return filled, system or None
