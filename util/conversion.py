"""Weights under the published keys, which are also timm's, to transformers' keys and back.

transformers writes the names that it had before version 5, and reads them in every version.
Its modules have had other names since; a state dict that is saved by torch.save has those.
Version 5 writes some of the decoder's names in a third way. All are read.
"""

import re

import torch
from torch import Tensor

_FROM_TRANSFORMERS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(vit|beit)\.", ""),
        (r"^decoder\.(decoder_|mask_token)", r"\1"),
        (r"^decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
        (r"^(encoder\.layer|layers)\.", "blocks."),
        (r"\.attention\.attention\.query\.", ".attn.q."),
        (r"\.attention\.attention\.key\.", ".attn.k."),
        (r"\.attention\.attention\.value\.", ".attn.v."),
        (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^classifier\.", "head."),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
    )
)
_OF_BLOCKS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OF_ENCODER = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",
}


def is_transformers(weights: dict[str, Tensor]) -> bool:
    """Whether these are a vision transformer's weights under transformers' keys."""
    key = "embeddings.patch_embeddings.projection.weight"
    return any(f"{prefix}{key}" in weights for prefix in ("", "vit.", "beit."))


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under the published keys.

    They are those of ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification, or
    BeitForImageClassification without relative positions. Queries, keys and values become one
    tensor. Where no block has a bias for one of the three, it is 0: the same function. A key that
    the published models don't have keeps its name, without the prefix "vit." or "beit.".
    """
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for pattern, replacement in _FROM_TRANSFORMERS:
            name = pattern.sub(replacement, name)
        converted[name] = weight
    return _merge_qkv(converted)


def _merge_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor "attn.qkv" for each "attn.q", "attn.k" and "attn.v", in the place of the first."""
    part_of = re.compile(r"(.*\.attn)\.[qkv]\.(weight|bias)")
    with_bias = {name[-6] for name in weights if re.search(r"\.attn\.[qkv]\.bias$", name)}
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        match = part_of.fullmatch(name)
        if match is None:
            merged[name] = weight
            continue
        attn, kind = match.groups()
        if f"{attn}.qkv.{kind}" in merged:
            continue
        parts = {part: weights.get(f"{attn}.{part}.{kind}") for part in "qkv"}
        if kind == "bias":
            for part in {"q", "k", "v"} - with_bias:
                parts[part] = torch.zeros_like(weight)
        elif not with_bias:
            merged[f"{attn}.qkv.bias"] = weight.new_zeros(3 * len(weight))
        whole = [part for part in parts.values() if part is not None]
        if len(whole) == 3:
            merged[f"{attn}.qkv.{kind}"] = torch.cat(whole)
        else:
            merged[name] = weight
    return merged


def to_transformers(weights: dict[str, Tensor], prefix: str = "vit.") -> dict[str, Tensor]:
    """Weights under the published keys as transformers' files have them.

    Args:
        weights: of an autoencoder, an encoder or a classifier.
        prefix: of the encoder's keys: "vit." in ViTMAEForPreTraining and
            ViTForImageClassification, "beit." in BeitForImageClassification, "" in ViTMAEModel and
            ViTModel. The decoder's begin with "decoder.", the head's with "classifier.".

    Raises:
        KeyError: a key has no counterpart.
    """
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", layer)
        if block is not None:
            decoder, number, layer = block.groups()
            stem = (
                f"decoder.decoder_layers.{number}" if decoder else f"{prefix}encoder.layer.{number}"
            )
            if layer == "attn.qkv":
                for part, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                    converted[f"{stem}.attention.attention.{part}.{kind}"] = third.clone()
            else:
                converted[f"{stem}.{_OF_BLOCKS[layer]}.{kind}"] = weight
        elif name.startswith(("decoder_", "mask_token")):
            converted[f"decoder.{name}"] = weight
        elif layer == "head":
            converted[f"classifier.{kind}"] = weight
        elif layer:
            converted[f"{prefix}{_OF_ENCODER[layer]}.{kind}"] = weight
        else:
            converted[f"{prefix}{_OF_ENCODER[name]}"] = weight
    return converted
