"""The sampling options of `run` and `chat`, and the sampler made from them.

In: what the parser found. Out: a sampler. There is an option for each setting of text/settings.py, which has their defaults and
ranges.
"""

import dataclasses
import math
import re
import time
from enum import StrEnum
from typing import Annotated

from llamacli.cli.console import Console
from llamacli.cli.grammar import meant, option
from llamacli.errors import UsageError
from llamacli.text.settings import DEFAULT_ORDER, SETTINGS

HELP = {  # setting: metavar, help, names of other programs
    "temp": ("T", "Temperature; 0 takes the likeliest (default: the model's, else {default:g}).", "--temperature"),
    "top_k": ("K", "Sample among the K likeliest; 0 is off."),
    "top_p": ("P", "Nucleus sampling; 1 is off."),
    "min_p": ("P", "Least share of the likeliest token's probability; 0 is off."),
    "typical_p": ("P", "Locally typical sampling; 1 is off.", "--typical", "--typical-p"),
    "top_n_sigma": ("N", "Logits at most N standard deviations below the best; 0 is off.", "--top-nsigma"),
    "repeat_penalty": ("X", "Penalty on repetition, from {least:g} to {most:g}; 1 is off."),
    "presence_penalty": ("X", "Subtracted from the logit of a token that occurred; 0 is off."),
    "frequency_penalty": ("X", "Subtracted for each time that a token occurred; 0 is off."),
    "repeat_last_n": ("N", "Tokens that the three penalties look back on; -1 is all."),
    "dry_multiplier": ("X", "DRY: penalty on carrying on a repetition; 0 is off."),
    "dry_base": ("X", "DRY: factor for each further token of a repetition."),
    "dry_allowed_length": ("N", "DRY: length from which a repetition is penalized."),
    "dry_penalty_last_n": ("N", "DRY: tokens to look back on; -1 is all."),
    "xtc_probability": ("P", "XTC: how often the top choices are excluded; 0 is off."),
    "xtc_threshold": ("P", "XTC: least probability of a top choice."),
    "dynatemp_range": ("X", "Dynamic temperature: from temp - X to temp + X; 0 is off."),
    "dynatemp_exponent": ("X", "Dynamic temperature: exponent of the entropy.", "--dynatemp-exp"),
    "mirostat_tau": ("X", "Mirostat: the surprise to aim at.", "--mirostat-ent"),
    "mirostat_eta": ("X", "Mirostat: its rate of learning.", "--mirostat-lr"),
}
OTHER_NAMES = {  # names of steps in other programs
    **{"temp": "temperature", "nucleus": "top_p"},
    **dict.fromkeys(("typical", "typical_p", "typ"), "typ_p"),
}
_BIAS = re.compile(r"([0-9]{1,9})(?:=|(?=[+-]))([+-]?[0-9]{1,9}(?:\.[0-9]*)?|-inf)")


def _option(name: str) -> tuple[str, object, dataclasses.Field]:
    metavar, text, *aliases = HELP[name]
    default, least, most = SETTINGS[name]
    long = f"--{name.replace('_', '-')}"
    aliases = {*aliases, f"--{name}"} - {long}
    spec = option(
        long,
        metavar=metavar,
        group="Sampling",
        aliases=tuple(sorted(aliases)),
        least=least,
        most=None if math.isinf(most) else most,
        setting=True,
        help=(text if "default" in text else f"{text[:-1]} (default: {{default:g}}).").format(
            default=default, least=least, most=most
        ),
    )
    return name, Annotated[type(default) | None, spec], dataclasses.field(default=None)


_Numbers = dataclasses.make_dataclass("_Numbers", [_option(name) for name in HELP], eq=False, repr=False)


class Mirostat(StrEnum):
    """Version of mirostat."""

    off = "0"
    second = "2"


def order(text: str, where: str) -> str:
    """Checks --samplers: names of steps in their order. UsageError for an unknown name, or one given twice."""
    names = _names(text)
    for name in names:
        if name not in DEFAULT_ORDER:
            raise UsageError(
                f"{where}: expected steps among {', '.join(DEFAULT_ORDER)}, found {name!r}{meant(name, DEFAULT_ORDER)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"{where}: expected each step once, found {name} twice")
    return text


def _names(text: str) -> list[str]:
    names = [name.lower().replace("-", "_") for name in re.split(r"[;,\s]+", text.strip(" ;,"))]
    return [OTHER_NAMES.get(name, name) for name in names]


def bias(text: str, where: str) -> str:
    """Checks --logit-bias: ID+X, ID-X, ID=X or ID=-inf, which bans the token."""
    _id_and_bias(text, where)
    return text


def _id_and_bias(text: str, where: str = "--logit-bias") -> tuple[int, float]:
    found = _BIAS.fullmatch(text.strip())
    if not found:
        raise UsageError(
            f"{where}: expected a token's id and what is added to its logit, such as 15043+1.5 or 15043=-inf, found {text!r}"
        )
    return int(found[1]), float(found[2])


@dataclasses.dataclass
class Sampling(_Numbers):
    """A field for each setting; None: the model's default."""

    mirostat: Annotated[
        Mirostat,
        option(
            "--mirostat", group="Sampling", setting=True, help="2: mirostat in place of all steps that choose (default: 0)."
        ),
    ] = Mirostat.off
    samplers: Annotated[
        str | None,
        option(
            "--samplers",
            metavar="NAMES",
            group="Sampling",
            setting=True,
            check=order,
            complete=lambda start: DEFAULT_ORDER,
            help=f"The steps in their order; one that is not named is off (default: {', '.join(DEFAULT_ORDER)}).",
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        option(
            "--logit-bias",
            metavar="ID+X",
            group="Sampling",
            aliases=("-l",),
            check=bias,
            help="Add X to the logit of token ID, such as 15043+1.5; ID=-inf bans it; repeatable.",
        ),
    ] = None
    dry_sequence_breaker: Annotated[
        list[str] | None,
        option(
            "--dry-sequence-breaker",
            metavar="TEXT",
            group="Sampling",
            help="DRY: a text that ends a repetition (default: line break, colon, quotation mark, star); repeatable.",
        ),
    ] = None
    ignore_eos: Annotated[
        bool, option("--ignore-eos", group="Sampling", help="Never end an answer; only a limit or --stop does.")
    ] = False
    seed: Annotated[
        int | None,
        option(
            "--seed",
            metavar="N",
            group="Sampling",
            least=0,
            setting=True,
            help="Same seed, same text (default: a new one each time).",
        ),
    ] = None

    def sampler(self, model, console: Console, logprobs: int | None = None, **more):
        """The sampler of the options and the model's defaults. `logprobs`, `more`: for Model.sampler."""
        seed = time.time_ns() % (1 << 32) if self.seed is None else self.seed
        if console.verbose:
            console.note(f"seed {seed}")
        biases = dict(map(_id_and_bias, self.logit_bias or ()))
        if beyond := next((id for id in biases if id >= model.config.n_vocab), None):
            raise UsageError(f"--logit-bias: expected an id below {model.config.n_vocab}, found {beyond}")
        breakers = self.dry_sequence_breaker
        return model.sampler(
            **{name: getattr(self, name) for name in SETTINGS},
            mirostat=int(self.mirostat),
            samplers=_names(self.samplers) if self.samplers else None,
            logit_bias=biases or None,
            dry_sequence_breakers=[] if breakers and "none" in breakers else breakers or None,
            ignore_eos=self.ignore_eos,
            seed=seed,
            logprobs=logprobs,
            **more,
        )
