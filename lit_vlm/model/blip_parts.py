"""Vision towers of BLIP from other models, and images of another size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BlipForImageTextRetrieval, BlipVisionConfig, BlipVisionModel, ViTModel

from lit_vlm.model.hub import disable_transformers_logging, raise_folder_errors
from lit_vlm.types import UserError

# Names of ViT's weights in transformers, and of the same ones in BLIP's tower; q, k and v are one matrix there
_VIT_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "attention.o_proj": "self_attn.projection",
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
}


def make_blip_vision_config(folder: str, image_size: int | None = None) -> BlipVisionConfig:
    """Make the config of BLIP's vision tower from a BLIP model or a ViT, such as DeiT. Reads no weights.

    Args:
        image_size: height and width in pixels; None: the model's.

    Raises:
        UserError: the folder cannot be read, or holds another model, or the size is no multiple of the patches.
    """
    with disable_transformers_logging(), raise_folder_errors(folder, "no vision tower can be read"):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type == "blip":
        vision = config.vision_config
    elif config.model_type == "vit":
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act layer_norm_eps"
        vision = BlipVisionConfig(**{name: getattr(config, name) for name in names.split()})
    else:
        raise UserError(
            f"model.vision_tower={folder}: its model type is {config.model_type}. BLIP's tower is a ViT: give a model of type vit, such as"
            " facebook/deit-base-patch16-224, or blip."
        )
    size = image_size or vision.image_size
    if size % vision.patch_size:
        raise UserError(
            f"stage.image_size={size}: no multiple of the {vision.patch_size} pixels of a patch of {folder}. Choose a multiple."
        )
    vision.image_size = size
    return vision


def load_blip_vision(folder: str, image_size: int | None = None) -> BlipVisionModel:
    """Load BLIP's vision tower from a BLIP model or a ViT, with its positions resized to images of another size.

    Raises:
        UserError: see `make_blip_vision_config`.
    """
    config = make_blip_vision_config(folder, image_size)
    with disable_transformers_logging(), raise_folder_errors(folder, "no vision tower can be read"):
        if AutoConfig.from_pretrained(folder).model_type == "blip":
            tower = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).vision_model
        else:
            vit = ViTModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
            tower = BlipVisionModel(make_blip_vision_config(folder))
            tower.load_state_dict(_convert_vit(vit.state_dict(), config.num_hidden_layers))
    resize_positions(tower, config.image_size)
    return tower


def _convert_vit(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Convert the weights of a ViT to those of BLIP's tower, which is the same but for the names."""
    converted = {}
    for name, value in state.items():
        for old, new in _VIT_NAMES.items():
            name = name.replace(old, new)
        converted[
            f"encoder.{name}" if name.startswith("layers.") else name.replace("layernorm.", "post_layernorm.")
        ] = value
    for layer in range(num_layers):
        for kind in ("weight", "bias"):
            parts = [converted.pop(f"encoder.layers.{layer}.attention.{one}_proj.{kind}") for one in "qkv"]
            converted[f"encoder.layers.{layer}.self_attn.qkv.{kind}"] = torch.cat(parts)
    return converted


@torch.no_grad()
def resize_positions(tower: BlipVisionModel, image_size: int) -> None:
    """Resize the learnt positions of a tower to images of another size, bicubic, as BLIP's fine-tuning does."""
    embeddings = tower.embeddings
    if image_size == embeddings.image_size:
        return
    num_patches = (image_size // embeddings.patch_size) ** 2
    shape = embeddings.position_embedding.new_empty(1, num_patches + 1, embeddings.embed_dim)
    positions = embeddings.interpolate_pos_encoding(shape, image_size, image_size)
    embeddings.position_embedding = nn.Parameter(positions.clone())
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = image_size, num_patches, num_patches + 1
    tower.config.image_size = image_size
