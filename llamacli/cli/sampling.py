"""The sampling options of `run` and `chat`, one for each setting of text/settings.py, which has their defaults and ranges."""

import dataclasses
import math
from typing import Annotated

from llamacli.cli.grammar import option
from llamacli.text.settings import SETTINGS

HELP = {  # setting: metavar, help, names of other programs
    "temp": ("T", "Temperature; 0 takes the likeliest (default: the model's, else 0.6).", "--temperature"),
    "top_k": ("K", "Sample among the K likeliest; 0 is off."),
    "top_p": ("P", "Nucleus sampling; 1 is off."),
    "min_p": ("P", "Least share of the likeliest token's probability; 0 is off."),
    "typical_p": ("P", "Locally typical sampling; 1 is off.", "--typical", "--typical-p"),
    "top_n_sigma": ("N", "Logits at most N standard deviations below the best; 0 is off.", "--top-nsigma"),
    "repeat_penalty": ("X", "Penalty on repetition, from 0.01 to 100; 1 is off."),
    "presence_penalty": ("X", "Taken off the logit of a token that occurred; 0 is off."),
    "frequency_penalty": ("X", "Taken off for each time that a token occurred; 0 is off."),
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
        help=text if "default" in text else f"{text[:-1]} (default: {default:g}).",
    )
    return name, Annotated[type(default) | None, spec], dataclasses.field(default=None)


Sampling = dataclasses.make_dataclass("Sampling", [_option(name) for name in HELP])
Sampling.__doc__ = "A field for each setting, None where the model decides."
