"""Model sizes of the comparison: released shapes for a GPU, and small twins for a CPU with the same proportions of work.

A tiny model with a real vocabulary would spend nine tenths of its time in the head, and any optimisation there would look
large. A twin has a body of 4 million weights and keeps these ratios of its original: head to body, MLP to width, vision tower to
language model, image tokens to text tokens. The share of attention cannot be kept: it grows with tokens over width, and is
several times that of the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from lit_vlm.anyres import ImageSettings, Tiling, make_grid_pinpoints
from lit_vlm.cost.model_shape import ModelShape
from lit_vlm.model.export import export_model
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.packed_forward import use_flat_forward
from lit_vlm.model.tiny import make_tokenizer
from lit_vlm.model.vocabulary import add_special_tokens
from lit_vlm.types import IMAGE_TOKEN

GRID, MAX_TILES = 6, 9  # LLaVA-OneVision's (1x1),...,(6x6) and anyres_max_9
TEMPLATE = (  # same for all: no role names, to keep captions short; TRL finds responses by the generation tags
    "{%- for message in messages -%}{{ '<|im_start|>' }}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- elif message['role'] == 'assistant' -%}"
    "{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- if message['role'] != 'assistant' -%}{{ '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of language model and vision tower. `vision_layers` counts the layers that run, without the unused last one."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    vision_width: int
    vision_layers: int
    vision_ffn: int
    vision_heads: int
    image_size: int

    def make_config(self, tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionConfig:
        """Make the transformers config."""
        text = Qwen2Config(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=32768,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vision = SiglipVisionConfig(
            hidden_size=self.vision_width,
            num_hidden_layers=self.vision_layers,
            intermediate_size=self.vision_ffn,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=14,
            vision_use_head=False,
        )
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[list(pair) for pair in make_grid_pinpoints(self.image_size, GRID)],
            vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
            tie_word_embeddings=self.tied,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )

    def make_image_settings(self, tiling: Tiling) -> ImageSettings:
        """Make the image settings."""
        pinpoints = make_grid_pinpoints(self.image_size, GRID)
        return ImageSettings(self.image_size, 14, pinpoints, MAX_TILES, (0.5,) * 3, (0.5,) * 3, tiling=tiling)

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(self.make_config(make_chat_tokenizer()).to_dict())


SO400M = (1152, 26, 4304, 16, 384)  # siglip-so400m-patch14-384, without its last layer
SIZES = {
    # Qwen2.5's config.json
    "05b": ModelSize(896, 24, 4864, 14, 2, 151936, True, *SO400M),
    "1_5b": ModelSize(1536, 28, 8960, 12, 2, 151936, True, *SO400M),
    "7b": ModelSize(3584, 28, 18944, 28, 4, 152064, False, *SO400M),
    # 224-pixel tiles of 256 patches instead of 384 and 729
    "twin05b": ModelSize(192, 6, 1040, 6, 1, 8144, True, 176, 12, 656, 4, 224),
    "twin7b": ModelSize(192, 6, 1016, 6, 1, 1752, False, 64, 4, 240, 4, 224),
    # not a twin: small enough for tests
    "smallest": ModelSize(32, 2, 48, 2, 1, 800, False, 16, 2, 24, 2, 56),
    # body of the 7B twin with a real vocabulary, for peak memory
    "wide": ModelSize(192, 6, 1016, 6, 1, 151936, False, 64, 4, 240, 4, 224),
}


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tiny tokenizer with a chat template. The tables of a model may be larger, as in Qwen2.5."""
    tokenizer = make_tokenizer()
    add_special_tokens(tokenizer, [])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_random_model(
    size: ModelSize, tiling: Tiling, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """Make a transformers model with random weights, initialised from a seed on its device, with the flat forward pass.

    On a GPU the weights are initialised in bfloat16 for any dtype, so contenders of both precisions start equal.
    """
    previous = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype if device == "cpu" else torch.bfloat16)
        with disable_transformers_logging(), torch.device(device):
            model = LlavaOnevisionForConditionalGeneration(size.make_config(make_chat_tokenizer()))
    finally:
        torch.set_default_dtype(previous)
    use_flat_forward(model, size.make_image_settings(tiling))
    return model.to(dtype)


def save_model(size: ModelSize, tiling: Tiling, folder: Path, seed: int = 0) -> Path:
    """Save a LLaVA-OneVision folder in the layout of transformers, from which all contenders load."""
    model = make_random_model(size, tiling, seed=seed)
    export_model(model, make_chat_tokenizer(), size.make_image_settings(tiling), folder)
    return folder
