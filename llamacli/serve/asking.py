"""The parts of a request that all protocols share: prompts as ids, sampling settings, limits.

In: checked fields and the model. Out: an `Ask`. A field that would change the answer but is not supported is refused; fields
that only describe the request, such as `metadata` and `user`, are ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llamacli.errors import LlamacliError, MemoryLimitError, UsageError
from llamacli.serve.calling import Offer
from llamacli.serve.fields import Fields, Refusal
from llamacli.text.settings import SETTINGS, checked

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_PROMPTS = 64
OTHER_NAMES = {  # of settings, in protocols and other servers
    "temperature": "temp",
    "repetition_penalty": "repeat_penalty",
    "typ_p": "typical_p",
}
ROLES = {**{name: name for name in ("system", "user", "assistant")}, "developer": "system", "tool": "ipython"}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


@dataclass
class Ask:
    """A request for answers: `n` for each prompt. `settings`: for Model.sampler."""

    prompts: Sequence["Sequence[int] | Pictured"]
    settings: dict = field(default_factory=dict)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    offer: Offer | None = None

    def check(self) -> None:
        """Refusal for fields that contradict each other."""
        if self.stop and self.settings.keys() & {"schema", "grammar"}:
            raise Refusal(
                "stop: expected none with a format or a call that must be, which end the answer; leave it out",
                code="invalid_value",
                param="stop",
            )

    def settings_of(self, choice: int) -> dict:
        """The settings of an answer: with a seed each choice has its own."""
        seed = self.settings.get("seed")
        return self.settings if seed is None else {**self.settings, "seed": seed + choice}


def sampling(fields: Fields, n_vocab: int) -> dict:
    """Keywords for Model.sampler: every setting of text/settings.py by its name, and OpenAI's names."""
    found = {}
    for name in (*SETTINGS, *OTHER_NAMES):
        own = OTHER_NAMES.get(name, name)
        if name in fields:
            value = fields.whole(name) if isinstance(SETTINGS[own][0], int) else fields.number(name)
            try:
                found[own] = checked(own, value)
            except UsageError as error:
                raise Refusal(str(error), param=name, code="invalid_value") from None
    if "seed" in fields:
        found["seed"] = fields.whole("seed", least=-(1 << 63), most=(1 << 64) - 1) % (1 << 63)
    if "mirostat" in fields:
        found["mirostat"] = fields.whole("mirostat", least=0, most=2)
    if "samplers" in fields:
        found["samplers"] = fields.texts("samplers", 32)
    if fields.flag("ignore_eos"):
        found["ignore_eos"] = True
    if "logit_bias" in fields:
        found["logit_bias"] = _biases(fields, n_vocab)
    return found


def _biases(fields: Fields, n_vocab: int) -> dict[int, float]:
    biases = fields.object("logit_bias")
    found = {}
    for name in biases.names():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < n_vocab):
            raise biases.wrong(name, f"a token's id below {n_vocab} as the name")
        found[int(name)] = biases.number(name, least=-100, most=100)
    return found


def binding(fields: Fields) -> dict:
    """The constraint of the answer, as a keyword for Model.sampler: from `response_format` or `grammar`."""
    found = {}
    if "response_format" in fields:
        found = response_format(fields.object("response_format"), nested=True)
    if "grammar" in fields:
        if found:
            raise fields.wrong("grammar", "none beside response_format")
        found = {"grammar": fields.text("grammar")}
    return found


def response_format(form: Fields, nested: bool) -> dict:
    """The keyword for a format: text, json_object, json_schema. `nested`: the schema stands in `json_schema`."""
    match form.text("type"):
        case "text":
            return {}
        case "json_object":
            return {"schema": {"type": "object"}}
        case "json_schema":
            inner = form.object("json_schema") if nested else form
            if "schema" not in inner:
                raise inner.wrong("schema", "a JSON schema")
            return {"schema": inner.raw("schema")}
    raise form.wrong("type", "text, json_object or json_schema")


def bound(found: dict, offer: Offer | None) -> dict:
    """The constraint of the answer: by its format, or by a tool call that is required."""
    if found and offer:
        raise Refusal(
            "expected no tools beside an answer with a format, found both; leave one of them out, or set tool_choice to none",
            code="invalid_value",
            param="tools",
        )
    return found or (offer.binding() if offer else {})


def max_tokens(fields: Fields, *names: str) -> int | None:
    """The longest answer, by the first of some names; -1 is no limit, as for llama.cpp."""
    for name in names:
        if name in fields:
            return None if fields.raw(name) == -1 else fields.whole(name, least=1)
    return None


def refuse(fields: Fields, **allowed) -> None:
    """Refuse fields that are not supported; `allowed`: for each name the only value that changes nothing."""
    for name, value in allowed.items():
        if name in fields and fields.raw(name) not in (value, [], {}, False):
            raise Refusal(f"{name}: this server does not support it; leave it out", code="unsupported_parameter", param=name)


def content(part_of: Fields, name: str = "content") -> str | list[dict]:
    """The content of a message: a string, or parts as Model.prompt_ids takes them."""
    value = part_of.raw(name, "")
    if isinstance(value, str):
        return value
    return joined([part(each) for each in part_of.objects(name)])


def joined(parts: list[dict]) -> str | list[dict]:
    """Parts, or one text if all of them are texts."""
    return parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)


def part(part: Fields) -> dict:
    """One part. Pictures come as data only: the server opens no file and no address."""
    kind = part.text("type", "text")
    if kind in TEXT_PARTS:
        text = part.text("refusal" if kind == "refusal" else "text")
        if text is None:
            raise part.wrong("text", "a string")
        return {"type": "text", "text": text}
    if kind in ("image_url", "input_image"):
        url = part.raw("image_url")
        return picture(url.get("url") if isinstance(url, dict) else url)
    raise part.wrong("type", "text or image_url")


def picture(url) -> dict:
    """The part of a picture that is given as a data URL."""
    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise Refusal(
            "image_url: expected a data URL (data:image/png;base64,...), found another address; the server opens no file "
            "and no address",
            param="image_url",
            code="invalid_value",
        )
    return {"type": "image", "image": url}


@dataclass
class Pictured:
    """A conversation with pictures in data URLs that are not yet encoded; it fits the context."""

    messages: Sequence[dict]
    tools: Sequence[dict]

    @property
    def parts(self) -> list[dict]:
        """The parts of messages that are pictures; the caller may replace `image` by a view."""
        contents = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        return [part for content in contents for part in content if part["type"] == "image"]

    def ids(self, model) -> Sequence:
        """The tokens."""
        return model.prompt_ids(self.messages, tools=self.tools)


def prompt(model, messages: Sequence[dict], offer: Offer | None = None) -> Sequence[int] | Pictured:
    """The tokens of a conversation with its tools, if the context has room for an answer after them."""
    found = Pictured(messages, offer.definitions if offer else ())
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        check_text("".join(part.get("text", "") for part in parts), model)
    if found.parts:
        check_count(count(model, messages, offer), model.ctx)
        return found
    return check_room(found.ids(model), model.ctx)


def count(model, messages: Sequence[dict], offer: Offer | None = None) -> int:
    """The number of these tokens; no picture is encoded."""
    found = Pictured(messages, offer.definitions if offer else ())
    if found.parts:
        try:
            model.sight  # noqa: B018  opens the tower, whose file an error names
        except MemoryLimitError:
            raise
        except LlamacliError:
            raise Refusal(
                "this server sees no pictures: leave them out, or start it with --mmproj and the file of a vision tower",
                code="unsupported_parameter",
                param="image_url",
            ) from None
    return model.count_tokens(messages, tools=found.tools)


def check_text(text: str, model) -> None:
    """Refusal for a text that is too long for the context whatever its tokens are, before it is tokenized, which takes long."""
    size = len(text.encode())
    if size > model.ctx * model.tokenizer.most_bytes:
        raise Refusal(
            f"the prompt has a text of {size} bytes and the context holds {model.ctx} tokens: shorten the messages, or start "
            f"the server with a larger --ctx",
            code="context_length_exceeded",
            param="messages",
        )


def check_room(ids: Sequence[int], ctx: int) -> Sequence[int]:
    """The prompt, if an answer of one token fits after it."""
    check_count(len(ids), ctx)
    return ids


def check_count(n: int, ctx: int) -> None:
    """Refusal unless an answer of one token fits after `n`."""
    if n >= ctx:
        raise Refusal(
            f"the prompt has {n} tokens and the context holds {ctx}: shorten the messages, or start the server with a "
            f"larger --ctx",
            code="context_length_exceeded",
            param="messages",
        )
