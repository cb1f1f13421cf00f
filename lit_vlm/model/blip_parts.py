"""Vision towers of BLIP from other models, images of another size, and the models of BLIP's fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
    ViTModel,
)

from lit_vlm.losses.contrastive import compute_caption_loss
from lit_vlm.model.blip import MATCHING_TOKEN, BlipForRetrieval, load_blip_tokenizer
from lit_vlm.model.hub import disable_transformers_logging, raise_folder_errors
from lit_vlm.model.qformer.build import tokenize_captions
from lit_vlm.types import IGNORE_INDEX, UserError

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


# ---- fine-tuning


def build_blip_retrieval(
    folder: str, *, global_batch_size: int, queue_size: int, image_size: int | None = None, seed: int = 0
) -> tuple[BlipForRetrieval, PreTrainedTokenizerBase]:
    """Build the model that is fine-tuned on retrieval from a `BlipForImageTextRetrieval`, ours or a release.

    Args:
        image_size: height and width in pixels, to which the positions are resized; None: the model's.

    Raises:
        UserError: the folder cannot be read, or the queue is no multiple of the global batch size.
    """
    tokenizer = load_blip_tokenizer(folder)
    with disable_transformers_logging(), raise_folder_errors(folder, "no BlipForImageTextRetrieval can be read"):
        retrieval = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
    resize_positions(retrieval.vision_model, image_size or retrieval.config.vision_config.image_size)
    model = BlipForRetrieval(
        retrieval,
        int(tokenizer.bos_token_id),
        int(tokenizer.convert_tokens_to_ids(MATCHING_TOKEN)),
        queue_size=queue_size,
        global_batch_size=global_batch_size,
        seed=seed,
    )
    return model, tokenizer


def load_captioner(
    folder: str, image_size: int | None = None
) -> tuple[BlipForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a captioner, ours or a release, with its positions resized to images of another size.

    Raises:
        UserError: the folder cannot be read.
    """
    tokenizer = load_blip_tokenizer(folder)
    with disable_transformers_logging(), raise_folder_errors(folder, "no BlipForConditionalGeneration can be read"):
        model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    resize_positions(model.vision_model, image_size or model.config.vision_config.image_size)
    return model, tokenizer


def tokenize_with_prompt(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: str, max_tokens: int = 40
) -> tuple[Tensor, Tensor]:
    """Tokenize captions after a prompt, to ids and mask [B, max_tokens]; `[DEC]` is the first token, as BLIP captions."""
    ids, mask = tokenize_captions(tokenizer, [prompt + text for text in texts], max_tokens)
    ids[:, 0] = tokenizer.bos_token_id
    return ids, mask


def count_prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Count the tokens of a prompt, the first token of the text included; they have no loss."""
    return len(tokenizer(prompt)["input_ids"]) - 1


def compute_prompted_loss(
    model: BlipForConditionalGeneration,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_prompt_tokens: int,
) -> tuple[Tensor, int]:
    """Compute the mean loss of the captions' tokens after the prompt, [] nats, and their number."""
    logits = model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask).logits
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, :num_prompt_tokens] = IGNORE_INDEX
    return compute_caption_loss(logits, labels), int((labels[:, 1:] != IGNORE_INDEX).sum())


@torch.no_grad()
def caption_images(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pixel_values: Tensor,
    prompt: str,
    **options: Any,
) -> list[str]:
    """Caption images [B, 3, H, W] after a prompt, which is taken away.

    Args:
        options: of `generate`, such as num_beams.
    """
    start = tokenizer(prompt)["input_ids"]
    input_ids = torch.tensor([start] * len(pixel_values), device=pixel_values.device)
    output = model.generate(pixel_values, input_ids=input_ids, **options)
    shown = tokenizer.decode(start, skip_special_tokens=True)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text.removeprefix(shown).strip() for text in texts]
