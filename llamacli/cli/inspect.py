"""`llamacli inspect`: shows what a GGUF contains and the memory it needs, without loading it; or evaluates a routing log.

In: a path. Out: a table or one JSON object on stdout. `describe` gathers, `_show` lays out. A sound GGUF of another
architecture is described too, with the reason why it cannot be run. cli/routing.py shows a log.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated

from llamacli.cli.console import amount, count
from llamacli.cli.grammar import argument, option
from llamacli.cli.images import cost_rows
from llamacli.cli.options import Json, ModelName, Output, find_model, model_names, one_model
from llamacli.cli.routing import show_routing
from llamacli.errors import LlamacliError, UsageError
from llamacli.llama4.tensors import Role, role_of

CONTEXTS = (4096, 8192, 32768, 131072, 1048576)


def inspect(
    file: Annotated[
        str | None, argument("[FILE]", "A GGUF file or a model's name, as after -m.", complete=lambda start: model_names())
    ] = None,
    model: ModelName = None,
    routing: Annotated[
        Path | None,
        option(
            "--routing", metavar="LOG", complete="file", help="Draw how often each expert was used, by a log of --routing-log."
        ),
    ] = None,
    plot: Annotated[
        Path | None, option("--plot", metavar="FILE", help="Draw that as an image, too (needs matplotlib).")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Say what is inside a GGUF and how much memory it will need.

    Examples:
    llamacli inspect scout.gguf
    llamacli inspect --json scout.gguf | jq .memory.weights_bytes
    llamacli run --routing-log a.log "Hello" && llamacli inspect --routing a.log
    """
    from llamacli.files.gguf import open_gguf

    console = output.console()
    if routing is not None:
        if file is not None or model is not None:
            raise UsageError("--routing: expected a log alone, found a model's file beside it; leave one of them out")
        show_routing(routing, plot, as_json, console)
        return
    if plot is not None:
        raise UsageError("--plot: expected --routing LOG with it, found none; there is nothing else to draw")
    record = describe(open_gguf(find_model(one_model(file, model), console)))
    if as_json:
        console.result(json.dumps(record, ensure_ascii=False))
    else:
        _show(record, console)


def describe(gguf) -> dict:
    """Everything known about the file as a record fit for JSON. Sizes in bytes."""
    meta, tensors = gguf.metadata, gguf.tensors.values()
    record = {
        "file": str(gguf.path),
        "name": _text(meta.get("general.name")),
        "architecture": _text(meta.get("general.architecture")),
        "license": _license(meta),
        "attribution": _text(meta.get("general.attribution")),
        "gguf_version": gguf.version,
        "file_bytes": gguf.nbytes,
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "tensors": {"count": len(gguf.tensors), "by_type": _by_type(tensors)},
        "tokenizer": _tokenizer(meta),
    }
    from llamacli.llama4.vision import has_tower
    from llamacli.vision.sight import cost, cost_beside

    if record["architecture"] == "clip" and has_tower(gguf):
        try:
            why = "it is a vision tower; run the model that it belongs to, with --mmproj and this file"
            return record | {"runnable": False, "why_not": why, "vision": cost(gguf)}
        except LlamacliError as error:
            return record | {"runnable": False, "why_not": str(error)}
    try:
        from llamacli.llama4.config import Config

        config = Config.from_gguf(gguf)
    except LlamacliError as error:
        return record | {"runnable": False, "why_not": str(error)}
    share = config.n_experts_used / config.n_experts if config.n_experts else 1.0
    active = sum(math.prod(t.shape) * (share if role_of(t.name) is Role.EXPERTS else 1) for t in tensors)
    return record | {
        "runnable": True,
        "parameters_active": round(active),
        "layers": config.n_layers,
        "embedding": config.n_embd,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_size": config.head_dim,
        "experts": config.n_experts,
        "experts_used": config.n_experts_used,
        "expert_layers": sum(map(config.is_moe, range(config.n_layers))),
        "rope_layers": sum(map(config.uses_rope, range(config.n_layers))),
        "chunk": config.chunk_size,
        "context": config.context_length,
        "vocabulary": config.n_vocab,
        "memory": _memory(config, gguf),
        "vision": cost_beside(gguf),
    }


def _memory(config, gguf) -> dict:
    from llamacli.cpu.kvcache import nbytes

    longest = config.context_length or CONTEXTS[0]
    contexts = [ctx for ctx in CONTEXTS if ctx < longest] + [longest]
    return {
        "weights_bytes": sum(t.nbytes for t in gguf.tensors.values()),
        "kv": [
            {"ctx": ctx, "bytes": nbytes(config, ctx), "without_chunks_bytes": nbytes(config, ctx, False)} for ctx in contexts
        ],
    }


def _by_type(tensors) -> list[dict]:
    count, weights, nbytes = Counter(), Counter(), Counter()
    for t in tensors:
        count[t.type.name] += 1
        weights[t.type.name] += math.prod(t.shape)
        nbytes[t.type.name] += t.nbytes
    return [
        {"type": name, "count": count[name], "parameters": weights[name], "bytes": size} for name, size in nbytes.most_common()
    ]


def _tokenizer(meta) -> dict:
    tokens = meta.get("tokenizer.ggml.tokens")
    return {
        "model": _text(meta.get("tokenizer.ggml.model")),
        "pre": _text(meta.get("tokenizer.ggml.pre")),
        "tokens": len(tokens) if hasattr(tokens, "__len__") else 0,
        "chat_template": isinstance(meta.get("tokenizer.chat_template"), str),
    }


def _license(meta) -> str | None:
    """The licence's identifier or own name, and its address."""
    found = (_text(meta.get(f"general.license{end}")) for end in ("", ".name", ".link"))
    return ", ".join(text for text in found if text) or None


def _text(value) -> str | None:
    return value if isinstance(value, str) else None


def _show(r: dict, console) -> None:
    general = [("architecture", r["architecture"] or "?"), ("name", r["name"] or "-")]
    general.append(("file", f"{amount(r['file_bytes'])}, GGUF version {r['gguf_version']}"))
    general += [(key, r[key]) for key in ("license", "attribution") if r[key]]
    if r["runnable"]:
        general.append(("parameters", f"{count(r['parameters'])}, active per token {count(r['parameters_active'])}"))
        general.append(
            ("layers", f"{r['layers']}, {r['expert_layers']} with experts, {r['rope_layers']} with rotary positions")
        )
        general.append(("experts", f"{r['experts']}, {r['experts_used']} used per token" if r["experts"] else "none"))
        general.append(
            ("heads", f"{r['heads']} of {r['head_size']}, {r['kv_heads']} for keys and values; embedding {r['embedding']}")
        )
        general.append(("context", f"{r['context']} tokens, " + (f"chunks of {r['chunk']}" if r["chunk"] else "no chunks")))
    else:
        general.append(("parameters", count(r["parameters"])))
    t = r["tokenizer"]
    template = "with" if t["chat_template"] else "no"
    general.append(("tokenizer", f"{t['model'] or '?'}, {t['pre'] or '?'}, {t['tokens']} tokens, {template} chat template"))
    console.table(r["file"], general)
    rows = [(k["type"], str(k["count"]), count(k["parameters"]), amount(k["bytes"])) for k in r["tensors"]["by_type"]]
    if rows:
        console.table("\nWeights", rows, ("type", "tensors", "parameters", "size"))
    if vision := r.get("vision"):
        console.table("\nVision", cost_rows(vision))
    if not r["runnable"]:
        console.result(f"\nThis file cannot be run: {r['why_not']}")
        return
    from llamacli.plan.machine import memory_free

    weights, free = r["memory"]["weights_bytes"], memory_free()
    rows = []
    for kv in r["memory"]["kv"]:
        need = weights + kv["bytes"]
        fits = "fits" if need <= free else "more than this machine has free"
        rows.append((f"{kv['ctx']}", amount(kv["bytes"]), amount(kv["without_chunks_bytes"]), amount(need), fits))
    console.table("\nMemory by context", rows, ("tokens", "KV cache", "without chunks", "with weights", "here"))
