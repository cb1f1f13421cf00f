"""Weights of LAVIS's first-stage checkpoints by the names of `Blip2ForPretraining`, the text head included.

transformers' own conversion leaves out the text head and the temperature, so the released folders cannot continue the
first stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Applied in this order to the start or the middle of a name.
_RULES = [
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "retrieval.qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "retrieval.embeddings."),
    (r"^Qformer\.bert\.", "retrieval.qformer."),
    (r"attention\.self\.", "attention.attention."),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", "text_head.dense."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", "text_head.layernorm."),
    (r"^Qformer\.cls\.predictions\.bias$", "text_head.bias"),
    (r"^temp$", "temperature"),
    (r"^vision_proj\.", "retrieval.vision_projection."),
    (r"^text_proj\.", "retrieval.text_projection."),
    (r"^(query_tokens$|itm_head\.)", r"retrieval.\1"),
    (r"^ln_vision\.", "retrieval.vision_model.post_layernorm."),
    (r"^visual_encoder\.cls_token$", "retrieval.vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "retrieval.vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "retrieval.vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"retrieval.vision_model.encoder.layers.\1.layer_norm"),
    (
        r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"retrieval.vision_model.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"retrieval.vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.", r"retrieval.vision_model.encoder.layers.\1."),
]
# Copies of other weights, and buffers that transformers computes
_UNUSED = ("Qformer.cls.predictions.decoder.", "Qformer.bert.embeddings.position_ids")


def rename_lavis_weight(name: str) -> str | None:
    """Rename a parameter of LAVIS's `Blip2Qformer`; None for a copy of another one."""
    if name.startswith(_UNUSED):
        return None
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def convert_lavis_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of LAVIS's `Blip2Qformer` (`checkpoint["model"]`) to that of `Blip2ForPretraining`.

    The EVA tower keeps the biases of queries and values only; that of keys is zero.
    """
    converted = {new: value for name, value in weights.items() if (new := rename_lavis_weight(name)) is not None}
    if "temperature" in converted:
        converted["temperature"] = converted["temperature"].reshape(1)
    for name in [name for name in converted if name.endswith("self_attn.q_bias")]:
        query, value = converted.pop(name), converted.pop(name.replace("q_bias", "v_bias"))
        converted[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(value), value])
    return converted
