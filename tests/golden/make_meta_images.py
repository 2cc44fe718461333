"""Golden pictures: what Meta's own code makes of them, step by step.

    python tests/golden/make_meta_images.py     needs torch, torchvision and, without their dependencies, llama-models 0.3.0,
                                                fairscale and tiktoken; writes meta_images.npz next to this file

The pictures, sizes and weights are those of make_images.py. Stored are the grid and the size shown of its sizes at 336 pixels;
the bytes of each picture's tiles; ids of conversations with pictures, for scout-tiny's vocabulary, whose words stand in for
Meta's; rows of small towers. Meta's attention moves tensors to a GPU, which its results do not depend on: here they stay on the
CPU.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
import make_images  # noqa: E402
import tiny_tower  # noqa: E402

KEPT = make_images.declared()  # before torchvision is imported
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem  # noqa: E402
from llama_models.llama4.args import Size, VisionArgs  # noqa: E402
from llama_models.llama4.chat_format import ChatFormat, convert_image_to_rgb  # noqa: E402
from llama_models.llama4.preprocess import ResizeNormalizeImageTransform, VariableSizeImageTransform  # noqa: E402

from llamacli.environment import SMALL_MODEL  # noqa: E402
from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.text.tokenizer import Tokenizer  # noqa: E402

TOWERS = ("plain", "heads-of-12")  # those whose adapter has one width, as Meta's has
TALKS = {  # messages of a role and parts: texts, and pictures by name in brackets
    "one": [("user", ["[wide]", "What is it?"])],
    "two": [("system", ["Look."]), ("user", ["[small]", "and ", "[tall]", "differ?"])],
    "five": [("user", ["[pixel]", "[gray]", "a", "[photo]", "b ", "[line]", "[alpha]", "?"])],
    "again": [("user", ["[small]", "One?"]), ("assistant", ["Yes."]), ("user", ["[photo]", "Two?"])],
}


class Words:
    """scout-tiny's vocabulary as Meta's code asks for it."""

    def __init__(self):
        self._tokenizer = Tokenizer.from_gguf(open_gguf(SMALL_MODEL))
        self.special_tokens = self._tokenizer.special_names.ids

    def encode(self, text, bos=False, eos=False):
        """Ids of a text, never of special tokens."""
        return self._tokenizer.encode(text, bos=bos)


def vision(case):
    """Meta's arguments for one of make_images' towers."""
    s = tiny_tower.Shape(**{key: value for key, value in case.items() if key != "seed"})
    sides = {name: Size(height=side, width=side) for name, side in (("image_size", s.image_size), ("patch_size", s.patch_size))}
    sizes = {"dim": s.n_embd, "n_layers": s.n_layers, "n_heads": s.heads, "mlp_ratio": s.n_ff / s.n_embd}
    return VisionArgs(**sides, **sizes, output_dim=s.n_out, pixel_shuffle_ratio=0.5)


def geometry(pairs, size=336, most=16):
    """int32 [n, 4]: rows and columns of the grid, height and width shown."""
    made, found = VariableSizeImageTransform(size), []
    possible = torch.tensor(made.find_supported_resolutions(most, size))
    for height, width in pairs:
        across, down = made.get_best_fit((width, height), possible)
        limit = min(max(width, size), across), min(max(height, size), down)
        wide, high = made.get_max_res_without_distortion((width, height), limit)
        found.append((down // size, across // size, max(high, 1), max(wide, 1)))
    return np.array(found, np.int32)


def tiles(image, size=make_images.TILE, most=16):
    """uint8 [n, size, size, 3], the whole picture last, and the grid."""
    image = convert_image_to_rgb(image)
    found, grid = VariableSizeImageTransform(size)(image, most, normalize_img=False)
    if len(found) > 1:
        whole = ResizeNormalizeImageTransform(size, size)(image)
        found = torch.cat([found, (whole * 0.5 + 0.5)[None]])
    return (found * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8), tuple(grid)


def ids(words, talk):
    """The ids of a conversation up to the answer."""

    def part(text):
        if not text.startswith("["):
            return RawTextItem(text=text)
        file = io.BytesIO()
        make_images.picture(text[1:-1]).save(file, "PNG")
        return RawMediaItem(data=file.getvalue())

    chat = ChatFormat(words, vision(make_images.TOWERS["plain"]))
    messages = [RawMessage(role=role, content=[*map(part, parts)]) for role, parts in talk]
    return np.array(chat.encode_dialog_prompt(messages).tokens, np.int32)


def tower(case):
    """A function from numbers of tiles to rows."""
    import fairscale.nn.model_parallel.initialize as parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29571", rank=0, world_size=1)
        parallel.initialize_model_parallel(1)
    torch.Tensor.cuda = lambda self, *_, **__: self
    from llama_models.llama4.vision.embedding import VisionEmbeddings

    model = VisionEmbeddings(vision(case)).float().eval()
    shape = {key: value for key, value in case.items() if key != "seed"}
    weights = {name: torch.from_numpy(w) for name, w in tiny_tower.tensors(case["seed"], **shape).items()}
    projector = weights.pop("mm.model.fc.weight")
    model.load_state_dict({meta_name(name): w for name, w in weights.items()})

    def rows(values):
        with torch.no_grad():
            return (model.vision_adapter(model.vision_encoder(values[:, None, None])) @ projector.T).numpy()

    return rows


META = {
    "v.class_embd": "class_embedding",
    "v.patch_embd": "conv1._linear",
    "v.position_embd.weight": "positional_embedding_vlm",
    "v.pre_ln": "ln_pre",
    "v.post_ln": "ln_post",
    "mm.model.mlp.1": "c_fc",
    "mm.model.mlp.2": "c_proj",
    **{f"attn_{part}": f"attn.w{part}" for part in "qkv"},
    "attn_out": "attn.wo",
    "ln1": "ln_1",
    "ln2": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def meta_name(name):
    """Meta's name of a tensor."""
    if name in META:
        return f"vision_encoder.{META[name]}"
    stem, end = name.rsplit(".", 1)
    if stem.startswith("mm."):
        return f"vision_adapter.mlp.{META[stem]}.{end}"
    if stem in META:
        return f"vision_encoder.{META[stem]}.{end}"
    _, _, layer, kind = stem.split(".", 3)
    return f"vision_encoder.transformer.resblocks.{layer}.{META[kind]}.{end}"


def main():
    stored, words = {"geometry": geometry(make_images.sizes())}, Words()
    for name in make_images.PICTURES:
        found, grid = tiles(make_images.picture(name))
        stored |= {f"tiles.{name}": found, f"grid.{name}": np.array(grid, np.int32)}
    for name, talk in TALKS.items():
        stored[f"ids.{name}"] = ids(words, talk)
    for name in TOWERS:
        some = make_images.tower_tiles(name)
        stored[f"rows.{name}"] = tower(make_images.TOWERS[name])(make_images.values_of(some))
    np.savez_compressed(HERE / "meta_images.npz", **stored)


if __name__ == "__main__":
    main()
