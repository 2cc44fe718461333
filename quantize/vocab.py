"""Reads the tokenizer of a Hugging Face folder and translates it to GGUF fields.

In: the folder (tokenizer.json, or tiktoken's tokenizer.model, and the files beside it), the vocabulary's size, the text model's
config. Out: metadata under `tokenizer.` and sampling hints under `general.`, and notices. Tokens stay in the GPT-2 byte
alphabet that tokenizer.json and llama.cpp share; merges become "a b" however they are stored.
"""

import base64
import binascii
from pathlib import Path

import numpy as np

from llamacli.errors import CheckpointError
from llamacli.llama4.vocabulary import BYTE_LETTERS, CONTROL, NORMAL, SPLIT, UNUSED, USER_DEFINED
from quantize.folder import optional_json, read_file, read_json


def read_vocab(folder: Path, n_vocab: int, config: dict) -> tuple[dict[str, object], list[str]]:
    """Every tokenizer field; CheckpointError if the tokenizer is no byte-level BPE or does not fit the vocabulary."""
    path, ranked = folder / "tokenizer.json", folder / "tokenizer.model"
    if ranked.exists() and not path.exists():
        path, tokenizer = ranked, _from_ranks(ranked, n_vocab)
    else:
        tokenizer = read_json(path)
    settings, generation = optional_json(folder / "tokenizer_config.json"), optional_json(folder / "generation_config.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        found = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{path}: expected a BPE tokenizer, found {found!r:.40}; this is no Llama 4 tokenizer")
    if not _nodes(tokenizer, "ByteLevel"):
        raise CheckpointError(f"{path}: expected a byte-level tokenizer, found none of ByteLevel; this is no Llama 4 tokenizer")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: expected a list of added_tokens, found {type(added).__name__}; download it again")
    tokens, types, ids = _tokens(path, model["vocab"], added, n_vocab)
    fields: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(path, model.get("merges")),
    }
    notices = _not_expressed(tokenizer)
    if [node.get("pattern") for node in _nodes(tokenizer.get("pre_tokenizer"), "Split")] != [{"Regex": SPLIT}]:
        notices.append("tokenizer.json splits text by another pattern than Llama 4's; the GGUF will say llama4 all the same")
    bos = _special(settings, "bos", ids, generation, config)
    eos = _special(settings, "eos", ids, generation, config)
    fields |= {f"tokenizer.ggml.{key}_token_id": value for key, value in (("bos", bos), ("eos", eos)) if value is not None}
    ends = _ends(eos, ids, generation, config)
    if len(ends) > 1:
        fields["tokenizer.ggml.eos_token_ids"] = np.array(ends, np.int32)  # Ollama's key: every token that ends an answer
    fields |= {f"tokenizer.ggml.{key}_token_id": ids[f"<|{key}|>"] for key in ("eot", "eom") if f"<|{key}|>" in ids}
    pad = _special(settings, "pad", ids, generation, config)
    if pad is not None:
        fields["tokenizer.ggml.padding_token_id"] = pad
    fields["tokenizer.ggml.add_bos_token"] = _adds_bos(tokenizer, settings, tokens, bos)
    fields["tokenizer.ggml.add_eos_token"] = False
    template, notice = _chat_template(folder, settings)
    if template:
        fields["tokenizer.chat_template"] = template
    if notice:
        notices.append(notice)
    for key, (field, kind, most) in SAMPLING.items():
        value = generation.get(key)
        if value is None or not generation.get("do_sample", True):
            continue
        if type(value) in (int, float) and 0 <= value <= most:  # NaN fails the comparison
            fields[f"general.sampling.{field}"] = kind(value)
        else:
            notices.append(f"generation_config.json: {key} {value!r:.20} left out, which is not a number from 0 to {most}")
    return fields, notices


def _reserved(name: str, first: int, stop: int) -> list[str]:
    return [f"{name}reserved_special_token_{i}" for i in range(first, stop)]


# Values of generation_config.json that this engine uses: field, type, largest value.
SAMPLING = {"temperature": ("temp", float, 5), "top_p": ("top_p", float, 1), "top_k": ("top_k", int, 1 << 20)}
SPECIALS = [  # in the order of their ids, from the first one after the ranks
    *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *("header_start", "header_end", "eom", "eot", "step", *_reserved("text_post_train_", 0, 6)),
    *("python_start", "python_end", "finetune_right_pad", *_reserved("text_post_train_", 8, 69)),
    *("image_start", "image_end", *_reserved("vision_", 0, 2), "tile_x_separator", "tile_y_separator"),
    *(*_reserved("vision_", 2, 6), "image", *_reserved("vision_", 6, 7), "patch", *_reserved("vision_", 7, 1048)),
    *(*_reserved("reasoning_", 0, 8), "reasoning_thinking_start", "reasoning_thinking_end"),
]
N_SPECIALS = 2048  # what follows the named ones is reserved
MAX_RANKS, LONGEST_TOKEN, MAX_TEMPLATE = 1 << 27, 512, 1 << 20  # bytes


def _from_ranks(path: Path, n_vocab: int) -> dict:
    """A tiktoken file (a line for each token: its bytes in base64 and its rank) in the form of tokenizer.json.

    Two tokens merge if they make a token together; merges are ordered by the rank of the result.
    """
    try:
        lines = [line.split() for line in read_file(path, MAX_RANKS).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        raise CheckpointError(
            f"{path}: expected lines of a token in base64 and its rank, found others; download it again"
        ) from None
    tokens = sorted(ranks, key=ranks.get)
    if not tokens or [ranks[token] for token in tokens] != list(range(len(lines))) or not min(map(len, tokens)) > 0:
        raise CheckpointError(f"{path}: expected each token once, ranked 0, 1, 2, ..., found others; download it again")
    if max(map(len, tokens)) > LONGEST_TOKEN:
        raise CheckpointError(
            f"{path}: expected tokens of at most {LONGEST_TOKEN} bytes, found a longer one; download it again"
        )
    merges, text = [], {token: "".join(map(BYTE_LETTERS.__getitem__, token)) for token in tokens}
    for token in tokens:
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [[text[a], text[b]] for a, b in sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    count = min(N_SPECIALS, max(0, n_vocab - len(tokens)))
    names = [*SPECIALS, *_reserved("", 0, N_SPECIALS - len(SPECIALS))][:count]
    added = [{"id": len(tokens) + i, "content": f"<|{name}|>", "special": True} for i, name in enumerate(names)]
    return {
        "added_tokens": added,
        "pre_tokenizer": [{"type": "Split", "pattern": {"Regex": SPLIT}}, {"type": "ByteLevel"}],
        "model": {"type": "BPE", "vocab": {text[token]: rank for token, rank in ranks.items()}, "merges": merges},
    }


def _nodes(tree, kind: str) -> list[dict]:
    """Every JSON object of `type` kind within the upper levels, where tokenizer.json puts them."""
    found, level = [], [tree]
    for _ in range(4):
        found += [node for node in level if isinstance(node, dict) and node.get("type") == kind]
        children = [list(node.values()) if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [c for child in children for c in child if isinstance(c, (dict, list)) and len(c) < 64]
    return found


def _tokens(path: Path, vocab: dict, added: list, n_vocab: int) -> tuple[list[str], np.ndarray, dict[str, int]]:
    """Texts and types by id; ids without a token get a text of their own and the type unused."""
    tokens: list[str] = [""] * n_vocab
    types = np.full(n_vocab, UNUSED, np.int32)
    ids: dict[str, int] = {}

    def put(text, i, kind: int) -> None:
        if not isinstance(text, str) or type(i) is not int or not 0 <= i < n_vocab:
            raise CheckpointError(
                f"{path}: expected ids below the vocabulary's {n_vocab}, found {i!r:.40} for {str(text)[:40]!r}"
            )
        if types[i] == NORMAL and kind == NORMAL:
            raise CheckpointError(f"{path}: expected one token for each id, found {i} for {tokens[i][:40]!r} and {text[:40]!r}")
        if ids.get(text, i) != i:
            raise CheckpointError(f"{path}: expected one id for each token, found {ids[text]} and {i} for {text[:40]!r}")
        tokens[i], types[i], ids[text] = text, kind, i

    for text, i in vocab.items():
        put(text, i, NORMAL)
    for token in added:
        if not isinstance(token, dict):
            raise CheckpointError(f"{path}: expected objects in added_tokens, found {type(token).__name__}; download it again")
        text = token.get("content")
        looks_special = isinstance(text, str) and text.startswith("<|") and text.endswith("|>")
        put(text, token.get("id"), CONTROL if token.get("special") or looks_special else USER_DEFINED)
    for i in np.flatnonzero(types == UNUSED).tolist():
        tokens[i] = f"[PAD{i}]" if f"[PAD{i}]" not in ids else f"[PAD{i} unused]"
    return tokens, types, ids


def _not_expressed(tokenizer: dict) -> list[str]:
    """Notices of steps that a GGUF cannot express."""
    notices, normalizer = [], tokenizer.get("normalizer")
    if isinstance(normalizer, dict) and (normalizer.get("type") != "Sequence" or normalizer.get("normalizers")):
        kind = str(normalizer.get("type"))[:20]
        notices.append(f"tokenizer.json normalizes text ({kind}), which a GGUF cannot say: some text gets other tokens")
    if any(node.get("add_prefix_space") for node in _nodes(tokenizer.get("pre_tokenizer"), "ByteLevel")):
        notices.append("tokenizer.json puts a space before text, which a GGUF cannot say: the first token may differ")
    return notices


def _merges(path: Path, merges) -> list[str]:
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: expected a list of merges, found {type(merges).__name__}; download it again")
    found = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p and " " not in p for p in pair):
            raise CheckpointError(f"{path}: expected merges of two parts, found {str(merge)[:40]!r}; download it again")
        found.append(f"{pair[0]} {pair[1]}")
    if not found:
        raise CheckpointError(f"{path}: expected merges, found none; this is no Llama 4 tokenizer")
    return found


def _special(settings: dict, key: str, ids: dict[str, int], *fallbacks: dict) -> int | None:
    """The id of the bos, eos or pad token: by its text, else by number; of several ends <|eot|>, which ends a turn."""
    text = settings.get(f"{key}_token")
    text = text.get("content") if isinstance(text, dict) else text
    if isinstance(text, str) and text in ids:
        return ids[text]
    for source in fallbacks:
        value = source.get(f"{key}_token_id")
        if isinstance(value, list) and value:
            value = ids.get("<|eot|>") if ids.get("<|eot|>") in value else value[0]
        if type(value) is int and value in ids.values():
            return value
    return None


def _ends(eos: int | None, ids: dict[str, int], *sources: dict) -> list[int]:
    """`eos` and every id that generation_config.json and config.json call an end: transformers stops at any of them."""
    found = [] if eos is None else [eos]
    known = set(ids.values())
    for source in sources:
        value = source.get("eos_token_id")
        found += [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i in known]
    return list(dict.fromkeys(found))


def _adds_bos(tokenizer: dict, settings: dict, tokens: list[str], bos: int | None) -> bool:
    """Whether text starts with BOS: what the post-processor says, else the settings, else yes, as Llama 4 does."""
    for node in _nodes(tokenizer.get("post_processor"), "TemplateProcessing"):
        match node.get("single"):
            case [{"SpecialToken": {"id": name}}, *_]:
                return bos is not None and name == tokens[bos]
            case _:
                return False
    return bos is not None and bool(settings.get("add_bos_token", True))


def _chat_template(folder: Path, settings: dict) -> tuple[str | None, str | None]:
    """The template from chat_template.jinja, else chat_template.json, else tokenizer_config.json; and a notice or None.

    Of several templates it is the one named default, else the only one that is for chat.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            text = read_file(file, MAX_TEMPLATE).decode("utf-8-sig")
            template = text.replace("\r\n", "\n").replace("\r", "\n")  # transformers reads it as text, too
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: expected a template in UTF-8, found: {error}; download it again") from None
    else:
        template = optional_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):
        template = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        chat = [name for name in template if name not in ("tool_use", "rag")]
        name = "default" if "default" in template else "chat" if "chat" in template else chat[0] if len(chat) == 1 else None
        if name is None:
            found = ", ".join(template)[:80] or "none"
            return None, f"expected a chat template named default, found {found}: Llama 4's own will be used"
        template = template[name]
    if not isinstance(template, str) or not template.strip():
        return None, "no chat template in the checkpoint: Llama 4's own will be used"
    return template.removeprefix("\ufeff"), None
