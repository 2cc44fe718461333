"""The prompt of the chat: an editor of several lines with history, completion and paste, by prompt_toolkit.

In: keys. Out: turns. A long paste is shown as "[500 lines pasted]" and sent whole. Only this module imports prompt_toolkit;
nothing else runs while it reads.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_focus, is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth, create_output
from prompt_toolkit.styles import Style

from llamacli.cli.chat.lines import SIGN, unfenced, unfinished
from llamacli.cli.console import is_terminal
from llamacli.cli.options import checked
from llamacli.store import Store

PASTE_END = "\x1b[201~"
TORN = 2.0  # seconds without a byte after which a paste counts as complete although its end mark is missing
LONG_PASTE = 10, 2000  # lines and characters from which a paste is shown as a label
LOOK = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "": "bold",
        "bottom-toolbar": "noreverse nobold fg:ansibrightblack",
        "placeholder": "nobold fg:ansibrightblack",
        "completion-menu.completion.current": "reverse",
    }
)


class Pastes:
    """Long texts and the labels that stand for them in the prompt."""

    def __init__(self):
        self._texts: dict[str, str] = {}

    def collapse(self, text: str) -> str:
        """A label for a long text, a short text itself."""
        lines = text.count("\n") + 1
        if lines <= LONG_PASTE[0] and len(text) <= LONG_PASTE[1]:
            return text
        what = f"{lines} lines pasted" if lines > 1 else f"{len(text)} characters pasted"
        label, n = f"[{what}]", 1
        while self._texts.setdefault(label, text) != text:
            label, n = f"[{what}, {n + 1}]", n + 1
        return label

    def expand(self, text: str) -> str:
        """`text` with every label replaced by what it stands for."""
        for label, whole in self._texts.items():
            text = text.replace(label, whole)
        return text


class Turns(History):
    """Whole turns of all chats, in the store; each process adds to them, none overwrites another's."""

    def __init__(self, store: Store | None, pastes: Pastes):
        super().__init__()
        self._store, self._pastes = store, pastes

    def load_history_strings(self) -> Iterable[str]:
        return [self._pastes.collapse(text) for text in self._store.typed()] if self._store else []

    def store_string(self, string: str) -> None:
        if self._store:
            try:
                self._store.remember(self._pastes.expand(string))
            except Exception:  # the turn matters more; the conversation reports errors of the store
                self._store = None


class Words(Completer):
    """`commands`: a word, its help. `arguments(word)`: "path", or what may follow the command."""

    def __init__(self, commands: dict[str, str], arguments: Callable[[str], str | Iterable[str]]):
        self._commands, self._arguments, self._paths = commands, arguments, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event) -> Iterator[Completion]:
        text = document.text_before_cursor
        word, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            for command, words in self._commands.items():
                if command.startswith(word.lower()):
                    yield Completion(command, -len(word), display_meta=words)
            return
        choices = self._arguments(word.lower())
        if choices == "path" or (rest.startswith(("/", "~", ".")) and choices):
            yield from self._paths.get_completions(Document(rest), event)
        else:
            yield from (Completion(choice, -len(rest)) for choice in choices if choice.startswith(rest))


class Prompt:
    """`status` gives the line at the bottom. Turns come from the terminal on stdin."""

    def __init__(self, store: Store | None, words: Words, status: Callable[[], str], coloured: bool):
        self._pastes = Pastes()
        self._session = PromptSession(
            FormattedText([("class:prompt", SIGN)]),
            history=Turns(store, self._pastes),
            completer=words,
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            multiline=True,
            prompt_continuation=" " * len(SIGN),
            key_bindings=self._keys(),
            enable_open_in_editor=True,
            enable_suspend=True,
            search_ignore_case=True,
            reserve_space_for_menu=6,
            tempfile_suffix=".md",
            bottom_toolbar=lambda: [("class:bottom-toolbar", status())],
            placeholder=lambda: (
                [] if get_app().is_done or is_searching() else [("class:placeholder", "Ask something, or /help")]
            ),
            style=LOOK,
            include_default_pygments_style=False,
            color_depth=None if coloured else ColorDepth.DEPTH_1_BIT,
            output=create_output(sys.stdout if is_terminal(sys.stdout) else sys.stderr),
        )
        self._session.app.renderer.cpr_not_supported_callback = None  # the warning would stay on the screen

    def turn(self, default: str = "") -> str:
        """The next turn, `default` ready to be edited. EOFError at the end; KeyboardInterrupt on Ctrl-C."""
        text = self._session.prompt(
            default=self._pastes.collapse(default), pre_run=lambda: get_app().create_background_task(self._end_torn_pastes())
        )
        text = self._pastes.expand(text)
        return unfenced(checked(text, "input"))

    async def _end_torn_pastes(self) -> None:
        """End a paste whose end mark is missing: it would take every later key, Ctrl-C too, since the editor's parser has no
        time limit.
        """
        app, length = self._session.app, 0
        while True:
            await asyncio.sleep(TORN)
            parser = app.input.vt100_parser
            now = len(parser._paste_buffer) if getattr(parser, "_in_bracketed_paste", False) else 0
            if now and now == length:
                parser.feed(PASTE_END)
                app.key_processor.feed_multiple(app.input.read_keys())
                app.key_processor.process_keys()
            length = now

    def type_ahead(self, data: bytes) -> None:
        """Give the editor keys that were pressed while it did not read."""
        keys: list = []
        parser = Vt100Parser(keys.append)
        parser.feed(data.decode("utf-8", "surrogateescape"))
        parser.flush()
        store_typeahead(self._session.app.input, keys)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus("DEFAULT_BUFFER") & ~is_searching

        @keys.add("enter", filter=typing)
        def finish(event) -> None:
            buffer = event.current_buffer
            if buffer.complete_state and buffer.complete_state.current_completion:
                buffer.complete_state = None
            elif buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            elif unfinished(self._pastes.expand(buffer.text)):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        @keys.add("c-j", filter=typing)
        def new_line(event) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-g", filter=typing)
        def edit(event) -> None:
            buffer = event.current_buffer
            buffer.document = Document(self._pastes.expand(buffer.text))
            buffer.open_in_editor()

        @keys.add(Keys.BracketedPaste, filter=typing)
        def paste(event) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
            event.current_buffer.insert_text(self._pastes.collapse(text))

        return keys
