"""Projectors that no class of transformers has, and LLaVA models with them, for `trust_remote_code`.

This file is copied beside the weights of an exported model, so it imports only torch and transformers. transformers'
`AutoModelForImageTextToText.from_pretrained` then loads the folder if it is allowed to (`trust_remote_code`). It does not
know the model types below, so that without the code nothing is loaded, instead of a random projector.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

# Shapes: N tiles, P = S * S patches of a tile, Q = T * T tokens of a tile, C width of the vision tower, D width of the
# language model, W width of the Q-Former.


class LDPNetV2(nn.Module):
    """MobileVLM V2's projector: an MLP on each patch, average pooling to T x T, and a depthwise residual convolution.

    Source: arXiv 2402.03766, section 3.2.

    Args:
        token_side: T, 12 in MobileVLM V2.
    """

    def __init__(self, vision_width: int, text_width: int, token_side: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(vision_width, text_width), nn.Linear(text_width, text_width)
        self.pool = nn.AdaptiveAvgPool2d(token_side)
        self.conv = nn.Conv2d(text_width, text_width, 3, padding=1, groups=text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Project [N, P, C] to [N, Q, D]."""
        grid = _make_grid(self.linear_2(F.gelu(self.linear_1(patches))))
        pooled = self.pool(grid)
        return (self.conv(pooled) + pooled).flatten(2).transpose(1, 2)


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: RegNet blocks on S x S patches, average pooling to T x T, RegNet blocks, and an MLP.

    Source: arXiv 2312.06742, section 4.2, and the authors' code: a learned position for each patch; blocks of width C
    with depthwise convolutions, squeeze-and-excitation, LayerNorm and SiLU.

    Args:
        patch_side: S.
        token_side: T, 12 for Honeybee's 144 tokens.
        depth: blocks before the pooling, and after it.
    """

    def __init__(self, vision_width: int, text_width: int, patch_side: int, token_side: int, depth: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(patch_side**2, vision_width)
        self.before = nn.Sequential(*(RegNetBlock(vision_width) for _ in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(token_side)
        self.after = nn.Sequential(*(RegNetBlock(vision_width) for _ in range(depth)))
        self.linear_1, self.linear_2 = nn.Linear(vision_width, text_width), nn.Linear(text_width, text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Project [N, P, C] to [N, Q, D]."""
        positions = self.positions(torch.arange(patches.shape[1], device=patches.device))
        patches = self.before(patches + positions)
        pooled = self.pool(_make_grid(patches)).flatten(2).transpose(1, 2)
        return self.linear_2(F.silu(self.linear_1(self.after(pooled))))


class RegNetBlock(nn.Module):
    """RegNet's bottleneck block with squeeze-and-excitation on a square grid, [N, P, C] to [N, P, C].

    Source: arXiv 2003.13678; with one channel per group, LayerNorm and SiLU, as Honeybee builds it from timm.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = nn.Linear(width, width, bias=False), nn.LayerNorm(width)  # 1 x 1
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm_2 = nn.LayerNorm(width)
        self.squeeze, self.excite = nn.Linear(width, round(width / 4)), nn.Linear(round(width / 4), width)
        self.conv_3, self.norm_3 = nn.Linear(width, width, bias=False), nn.LayerNorm(width)  # 1 x 1

    def forward(self, inputs: Tensor) -> Tensor:
        states = F.silu(self.norm_1(self.conv_1(inputs)))
        states = self.conv_2(_make_grid(states)).flatten(2).transpose(1, 2)
        states = F.silu(self.norm_2(states))
        gate = self.excite(F.silu(self.squeeze(states.mean(dim=1, keepdim=True)))).sigmoid()
        return F.silu(self.norm_3(self.conv_3(states * gate)) + inputs)


class QFormer(nn.Module):
    """BLIP-2's Q-Former without text: Q learned queries attend to each other and to the patches of a tile, then Linear.

    Source: arXiv 2301.12597, section 3.1; its layers are those of transformers' Blip2QFormerModel, without dropout.

    Args:
        num_queries: Q, tokens of a tile.
        width: W, 768 in BLIP-2.
        depth: layers; each has cross-attention.
        num_heads: attention heads of a layer.
    """

    def __init__(
        self, vision_width: int, text_width: int, num_queries: int, width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            encoder_hidden_size=vision_width,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self.queries = nn.Parameter(torch.empty(1, num_queries, width))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = Blip2QFormerEncoder(config)
        self.linear = nn.Linear(width, text_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Project [N, P, C] to [N, Q, D]."""
        queries = self.norm(self.queries).expand(len(patches), -1, -1)
        output = self.encoder(queries, encoder_hidden_states=patches, query_length=queries.shape[1])
        return self.linear(output.last_hidden_state)


def _make_grid(states: Tensor) -> Tensor:
    """Make the grid [N, C, S, S] of the states [N, S * S, C], row by row."""
    side = round(states.shape[1] ** 0.5)
    return states.transpose(1, 2).unflatten(2, (side, side))


def build_projector(config: Any) -> nn.Module:
    """Build the projector that a model's config names: `config.projector`, `config.projector_token_side`."""
    vision, text_width = config.vision_config, config.text_config.hidden_size
    if config.projector == "ldpnetv2":
        return LDPNetV2(vision.hidden_size, text_width, config.projector_token_side)
    if config.projector == "c_abstractor":
        side = vision.image_size // vision.patch_size
        return CAbstractor(vision.hidden_size, text_width, side, config.projector_token_side, config.projector_depth)
    if config.projector == "qformer":
        sizes = config.projector_width, config.projector_depth, config.projector_heads
        return QFormer(vision.hidden_size, text_width, config.projector_token_side**2, *sizes)
    raise ValueError(f"projector={config.projector!r}: there is no such projector in this file")


def _view_tokens_as_patches(config: Any) -> Any:
    """Return a copy of the config with patches as large as the tokens that a tile becomes."""
    view = copy.copy(config)
    view.vision_config = copy.copy(config.vision_config)
    view.vision_config.patch_size = config.vision_config.image_size // config.projector_token_side
    return view


class _TokenGrid:
    """Arrangement of tiles by transformers, with the projector's tokens in the place of the tower's patches."""

    def pack_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, self.config = self.config, _view_tokens_as_patches(self.config)
        try:
            return super().pack_image_features(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config = config


class TokenGridLlavaNextModel(_TokenGrid, LlavaNextModel):
    """LlavaNextModel whose tiles have fewer tokens than patches."""


class TokenGridLlavaOnevisionModel(_TokenGrid, LlavaOnevisionModel):
    """LlavaOnevisionModel whose tiles have fewer tokens than patches."""


class ProjectorLlavaConfig(LlavaConfig):
    """Config of a LLaVA 1.x model with a projector of this file."""

    model_type = "lit_vlm_llava"


class ProjectorLlavaNextConfig(LlavaNextConfig):
    """Config of a LLaVA-NeXT model with a projector of this file."""

    model_type = "lit_vlm_llava_next"


class ProjectorLlavaOnevisionConfig(LlavaOnevisionConfig):
    """Config of a LLaVA-OneVision model with a projector of this file."""

    model_type = "lit_vlm_llava_onevision"


class ProjectorLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA 1.x model with a projector of this file."""

    config_class = ProjectorLlavaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = build_projector(config)


class ProjectorLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT model with a projector of this file."""

    config_class = ProjectorLlavaNextConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = TokenGridLlavaNextModel
        self.model.multi_modal_projector = build_projector(config)


class ProjectorLlavaOnevisionForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision model with a projector of this file."""

    config_class = ProjectorLlavaOnevisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = TokenGridLlavaOnevisionModel
        self.model.multi_modal_projector = build_projector(config)
