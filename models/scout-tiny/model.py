"""scout-tiny's training module in PyTorch: Llama 4 Scout's layers, each expert run only on its own tokens.

In: token ids of whole documents, concatenated, and their layout. Out: logits, how often each expert was chosen, the
balancing loss. Computes what transformers' Llama4ForCausalLM computes, under the same weight names (`export` only casts
and saves); evaluate.py compares the logits of both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes. Every row length is a multiple of 256, the largest block of the quantized formats."""

    n_vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 128
    experts: int = 16
    width: int = 256
    eps: float = 1e-5
    theta: float = 500000.0
    context: int = 8192  # RoPE's original context: longer wavelengths are stretched by `stretch`
    stretch: float = 16.0


def hf_config(shape: Shape, ids: dict[str, int | list[int]]) -> dict:
    """config.json of the exported folder. `ids`: bos_token_id, eos_token_id, pad_token_id."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": "bfloat16",
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.width,
        "intermediate_size_mlp": shape.width,
        "hidden_act": "silu",
        "num_local_experts": shape.experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "moe_layers": list(range(shape.layers)),
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(shape.layers)],
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": shape.stretch,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": shape.context,
        },
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
        **ids,
    }


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@dataclass
class Layout:
    """The layout of concatenated documents: `positions` (n,), and groups of equally padded documents for attention."""

    positions: Tensor
    groups: list[tuple[Tensor, Tensor]]  # (index (docs, longest) into the tokens, which of them are real)
    order: Tensor  # position in the concatenated real tokens of all groups for each token

    @staticmethod
    def of(lengths: list[int], group_tokens: int = 2048) -> "Layout":
        """The layout of documents of these lengths. Sorted lengths need the least padding."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        groups, real, i = [], [], 0
        while i < len(lengths):
            j, longest = i, 0
            while j < len(lengths) and (j == i or max(longest, lengths[j]) * (j - i + 1) <= group_tokens):
                longest, j = max(longest, lengths[j]), j + 1
            column = torch.arange(longest)
            held = column < torch.tensor(lengths[i:j])[:, None]
            index = torch.where(held, torch.tensor(starts[i:j])[:, None] + column, 0)
            groups.append((index, held))
            real.append(index[held])
            i = j
        order = torch.empty(starts[-1], dtype=torch.long)
        order[torch.cat(real)] = torch.arange(starts[-1])
        return Layout(torch.cat([torch.arange(n) for n in lengths]), groups, order)


class Attention(nn.Module):
    def __init__(self, shape: Shape, rope: bool):
        super().__init__()
        self.shape, self.rope = shape, rope
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)

    def turned(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """RoPE over interleaved pairs, then the QK norm, which has no weights. x: (n, heads, head_dim)."""
        cos, sin = turn
        even, odd = x[..., 0::2], x[..., 1::2]
        x = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return F.rms_norm(x, x.shape[-1:], None, self.shape.eps)

    def forward(self, x: Tensor, layout: Layout, turn: tuple[Tensor, Tensor]) -> Tensor:
        shape, n = self.shape, len(x)
        q = self.q_proj(x).view(n, shape.heads, shape.head_dim)
        k = self.k_proj(x).view(n, shape.kv_heads, shape.head_dim)
        v = self.v_proj(x).view(n, shape.kv_heads, shape.head_dim)
        if self.rope:
            q, k = self.turned(q, turn), self.turned(k, turn)
        # The temperature of NoPE layers is 1 below position 8191, and no document is that long.
        seen = []
        for index, held in layout.groups:
            parts = [part[index].transpose(1, 2) for part in (q, k, v)]
            parts[1:] = [part.expand(-1, shape.heads, -1, -1) for part in parts[1:]]
            seen.append(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)[held])
        return self.o_proj(torch.cat(seen)[layout.order].reshape(n, -1))


class Mlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.width, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.width, bias=False)
        self.down_proj = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, 2 * shape.width))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.width, shape.hidden))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x: tokens sorted by expert, `counts` of them for each."""
        out = []
        # unbind: indexing one expert at a time would allocate a gradient of full size for each
        for part, gate_up, down in zip(x.split(counts), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
            gate, up = (part @ gate_up).chunk(2, -1)
            out.append((F.silu(gate) * up) @ down)
        return torch.cat(out)


class Moe(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.experts, self.shared_expert = Experts(shape), Mlp(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, tokens per expert, balancing loss (1 when all experts are used alike)."""
        logits = self.router(x)
        best, chosen = logits.max(-1)
        counts = torch.bincount(chosen, minlength=logits.shape[-1])
        order = chosen.argsort(stable=True)
        routed = self.experts((torch.sigmoid(best)[:, None] * x)[order], counts.tolist())
        share = counts / len(x)
        balance = logits.shape[-1] * (share * logits.softmax(-1).mean(0)).sum()
        return self.shared_expert(x) + routed[order.argsort()], counts, balance


class Layer(nn.Module):
    def __init__(self, shape: Shape, rope: bool):
        super().__init__()
        self.self_attn, self.feed_forward = Attention(shape, rope), Moe(shape)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)


class Trunk(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.n_vocab, shape.hidden)
        self.layers = nn.ModuleList([Layer(shape, (i + 1) % 4 != 0) for i in range(shape.layers)])
        self.norm = Norm(shape.hidden, shape.eps)


class ScoutTiny(nn.Module):
    """The whole model; attribute names are those of the Hugging Face checkpoint."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.model = shape, Trunk(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.n_vocab, bias=False)
        frequency = shape.theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
        slow = 2 * torch.pi / frequency > shape.context
        self.frequency = torch.where(slow, frequency / shape.stretch, frequency)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                deep = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if deep else 0.02 if "router" in name else 0.04)

    def forward(self, ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states (n, hidden), expert counts (layers, experts), mean balancing loss."""
        return self.follow(self.model.embed_tokens(ids), layout)

    def follow(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` from embeddings (n, hidden) on, among which rows of pictures may stand."""
        angle = (layout.positions[:, None] * self.frequency)[:, None]
        turn = angle.cos().float(), angle.sin().float()
        counts, balance = [], 0.0
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), layout, turn)
            out, count, loss = layer.feed_forward(layer.post_attention_layernorm(x))
            x, balance = x + out, balance + loss / self.shape.layers
            counts.append(count)
        return self.model.norm(x), torch.stack(counts), balance


def export(model: ScoutTiny, folder: Path, ids: dict[str, int | list[int]]) -> None:
    """Writes model.safetensors (bf16) and config.json into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().to(torch.bfloat16).contiguous() for name, w in model.state_dict().items()}
    part = folder / "model.safetensors.part"  # renamed when complete, so that a reader never maps half a file
    save_file(weights, str(part), metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model.shape, ids), indent=2) + "\n")


def load_gguf(path: Path) -> ScoutTiny:
    """The model with the weights of a GGUF, in float32: what an engine that runs the file computes with."""
    from llamacli.files.ggml import dequantize
    from llamacli.files.gguf import open_gguf
    from llamacli.llama4.config import Config
    from llamacli.llama4.tensors import tensors

    gguf, found = open_gguf(path), {}
    for spec in tensors(Config.from_gguf(gguf)):
        if spec.hf is not None:
            stored = gguf.tensors[spec.name]
            rows = stored.data.reshape(-1, stored.type.row_bytes(stored.shape[-1]))
            values = torch.from_numpy(dequantize(rows, stored.type, spec.name).reshape(stored.shape).copy())
            found.setdefault(spec.hf, []).append(values.transpose(1, 2) if spec.row.part else values)
    model = ScoutTiny(Shape())
    model.load_state_dict({name: torch.cat(parts, -1) if len(parts) > 1 else parts[0] for name, parts in found.items()})
    return model


def load(folder: Path) -> ScoutTiny:
    """The model with the weights of an exported folder, in float32."""
    model = ScoutTiny(Shape())
    model.load_state_dict({name: w.float() for name, w in load_file(str(folder / "model.safetensors")).items()})
    return model
