"""Llama 4's forward pass: the order of operations, written once against an operations object.

In: `Operations` of some device, a Config, the weights of a layer. Out: calls in the right order; the device decides what a
value is, such as a register of a recorded program or a lazy array. A device that records calls `layer` once for each layer and
runs the program for every batch; one that executes calls it for every batch.

Sources: Meta's llama-models and Hugging Face's modeling_llama4: router on raw logits, sigmoid score on the expert's input,
interleaved rotary pairs, QK norm after rotation, attention temperature where there is no rotation, chunks where there is.
down(silu(s g) * (s u)) equals feeding s x to the expert, so one h serves router, shared and routed experts.
"""

from typing import Any, Protocol

from llamacli.llama4.config import Config

Value = Any  # rows of activations, [n_tokens, width]


class Operations(Protocol):
    """What a device computes. `w` are weights in the form that the device holds them in; sizes are fields of Config."""

    def norm(self, x: Value, w: Any) -> Value:
        """x / rms(x) * w, row by row, in float32."""

    def qkv(self, h: Value, w: Any) -> tuple[Value, Value, Value]:
        """h times attn_q, attn_k and attn_v of layer weights `w`."""

    def attend(self, i: int, q: Value, k: Value, v: Value, *, rotate: bool, norm: bool, temperature: bool, chunk: int) -> Value:
        """Prepare q and k in the order of the keywords, write k and v to layer i's cache, return softmax(q k^T / sqrt(d)) v.

        `rotate`: turn elements (2j, 2j + 1) of each head of q and k by pos * rope_theta^(-2j / head_dim) / rope_freqs[j], the
        divisors being 1 without the tensor. `norm`: divide each head of q and k by its root mean square (with rms_eps).
        `temperature`: multiply q by 1 + temperature_scale * log(1 + floor((pos + 1) / temperature_length)). `chunk`: a token
        sees the positions from the start of its chunk of so many on, itself included; 0: from position 0 on.
        """

    def add_matmul(self, x: Value, h: Value, w: Any) -> Value:
        """x + h times w."""

    def gate_up(self, h: Value, w: Any) -> Value:
        """silu(h times w.gate) * (h times w.up)."""

    def route(self, h: Value, w: Any) -> Any:
        """The n_experts_used largest elements of h times w for each token, and the sigmoid of each as the expert's score."""

    def expert_gate_up(self, h: Value, w: Any, routed: Any) -> Value:
        """`gate_up` of each token's experts, on h times the expert's score."""

    def add_expert_matmul(self, x: Value, h: Value, w: Any, routed: Any) -> Value:
        """x + the sum over a token's experts of h times the expert's w."""


def layer(ops: Operations, c: Config, i: int, w: Any, x: Value) -> Value:
    """x after layer i: x += attention(norm(x)), then x += ffn(norm(x))."""
    rotates = c.uses_rope(i)
    q, k, v = ops.qkv(ops.norm(x, w.attn_norm), w)
    attended = ops.attend(
        i,
        q,
        k,
        v,
        rotate=rotates,
        norm=rotates and c.use_qk_norm,
        temperature=not rotates and c.temperature_length > 0,
        chunk=c.chunk_size if rotates else 0,
    )
    x = ops.add_matmul(x, attended, w.attn_output)
    h = ops.norm(x, w.ffn_norm)
    if not c.is_moe(i):
        return ops.add_matmul(x, ops.gate_up(h, w.ffn), w.ffn.down)
    routed = ops.route(h, w.ffn.gate_inp)
    shared = ops.gate_up(h, w.ffn.shexp)
    chosen = ops.expert_gate_up(h, w.ffn.exps, routed)
    x = ops.add_matmul(x, shared, w.ffn.shexp.down)
    return ops.add_expert_matmul(x, chosen, w.ffn.exps.down, routed)
