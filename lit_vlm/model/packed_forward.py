"""Language-model head that computes log-probabilities of given tokens in training, without writing down all logits."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from lit_vlm.anyres import ImageSettings, ModelClass, TileLayout
from lit_vlm.cost.model_shape import MODELS_WITH_PRUNED_LAST_LAYER
from lit_vlm.losses.next_token import compute_token_log_probs
from lit_vlm.model import packed_attention as attention
from lit_vlm.model.classes import get_transformers_class
from lit_vlm.model.packed_attention import Segments, flat_attention_forward
from lit_vlm.types import Batch

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel
    from lit_vlm.model.vocabulary import TrainableTokens


# Shapes: R positions, D width, V vocabulary size.


class LogProbHead(nn.Linear):
    """`lm_head` of transformers that, called with `targets`, returns their log-probabilities (negative cross-entropy).

    Attributes:
        new_tokens: trainable rows that replace some rows of the matrix; see `TrainableTokens`.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, statistics: bool = False) -> Any:
        """Return logits [..., V] of hidden [..., D], or with targets [R] the token log-probabilities.

        Those are the result of `compute_token_log_probs` for hidden [R, D].
        """
        if targets is None:
            return super().forward(hidden)
        new_tokens: TrainableTokens | None = getattr(self, "new_tokens", None)
        if new_tokens is None:
            return compute_token_log_probs(hidden, self.weight, targets, statistics=statistics)
        return new_tokens.compute_log_probs(hidden, self.weight, targets, statistics)


# Shapes: T tokens, D width, R positions that are read, Q queries: these and the positions between them in a segment.


class PrunedLastLayer(nn.Module):
    """Decoder layer of transformers that returns only the positions of `segments.last_layer`, when it is set.

    For families whose layer is norm, attention, norm, MLP, with or without a norm behind attention and MLP and with or
    without a factor on each residual.
    """

    def forward(self, hidden_states: Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> Tensor:
        """Return transformers' result, or [1, R, D] of hidden_states [1, T, D]."""
        if segments is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if segments.last_layer is None:
            return super().forward(hidden_states, *args, segments=segments, **kwargs)  # type: ignore[misc]
        query_segments, positions = segments.last_layer
        layer: Any = self
        factor = getattr(layer, "residual_multiplier", 1.0)
        normed = layer.input_layernorm(hidden_states)
        attended = _compute_attention(
            layer.self_attn, normed, query_segments, positions, *kwargs["position_embeddings"]
        )
        residual = (
            hidden_states.index_select(1, positions) + _apply_optional_norm(layer, "post_norm1", attended) * factor
        )
        mlp_out = layer.mlp(layer.post_attention_layernorm(residual))
        return residual + _apply_optional_norm(layer, "post_norm2", mlp_out) * factor


def _compute_attention(
    attention: Any, normed: Tensor, segments: Segments, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Compute attention of the queries: [1, R, D] of normed [1, T, D]; cos and sin [1, T, head width]."""
    queries = segments.query_positions
    q, k, v = (
        projection(states).unflatten(-1, (-1, attention.head_dim))
        for projection, states in (
            (attention.q_proj, normed.index_select(1, queries)),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (states.transpose(1, 2) for states in (q, k, v))
    rotate = sys.modules[
        type(attention).__module__
    ].apply_rotary_pos_emb  # rotates queries and keys together; here their lengths differ
    q, _ = rotate(q, q[:, :0], cos.index_select(1, queries), sin.index_select(1, queries))
    k, _ = rotate(k, k[:, :0], cos, sin)
    out, _ = flat_attention_forward(
        attention,
        q,
        k,
        v,
        None,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
        segments=segments,
        # Qwen's layers each have their own window, Mistral's use the one of the model's config
        sliding_window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )
    index = torch.searchsorted(queries, positions)
    return attention.o_proj(out.index_select(1, index).flatten(2))


def _apply_optional_norm(layer: Any, name: str, states: Tensor) -> Tensor:
    return getattr(layer, name)(states) if hasattr(layer, name) else states


def prune_last_layer(model: VisionLanguageModel) -> bool:
    """Patch the last layer of a supported family to skip positions that are not read; return True if it is patched."""
    layer = model.model.language_model.layers[-1]
    if not isinstance(layer, PrunedLastLayer) and model.config.text_config.model_type in MODELS_WITH_PRUNED_LAST_LAYER:
        layer.__class__ = _make_pruned_class(type(layer))  # type: ignore[arg-type]
    return isinstance(layer, PrunedLastLayer)


@lru_cache
def _make_pruned_class(layer_class: Any) -> Any:
    return type(
        layer_class.__name__, (PrunedLastLayer, layer_class), {}
    )  # keep the name: transformers looks layers up by it


# Shapes: T tokens, N tiles, M images, P patches of a tile, Q tokens that the projector makes of them, C channels of the
# tower, D width of the language model, V vocabulary size, R supervised positions.


class FlatModel(nn.Module):
    """Model of the LLaVA family, without its head, that also takes a flat packed micro-batch.

    It stands before transformers' class in the bases of the classes below.
    """

    image_settings: ImageSettings
    config: Any
    language_model: Any
    vision_tower: Any
    multi_modal_projector: Any
    image_newline: Any
    get_input_embeddings: Any

    def forward(
        self,
        *args: Any,
        batch: Batch | None = None,
        embeddings_only: bool = False,
        positions: Tensor | None = None,
        vision_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return transformers' output, or with `batch` the language model's last hidden states [T, D].

        Args:
            embeddings_only: return the input embeddings [T, D] of the language model instead.
            positions: [R] positions whose hidden states are needed; returns [R, D]. When it is empty, the hidden state
                of the first position is returned, because the same modules must run on every rank.
            vision_features: [N, P, C] output of the vision tower for the batch's tiles, when another pass has computed
                it.
        """
        if batch is None:
            return super().forward(*args, **kwargs)
        embeddings = self.compute_embeddings(
            batch, self.encode_images(batch) if vision_features is None else vision_features
        )
        if embeddings_only:
            return embeddings
        segments = Segments(batch.segment_lengths, embeddings.device, batch.prefix_segments)
        query_lengths = batch.trailing_tokens
        if positions is not None and not len(positions):
            positions, query_lengths = (
                positions.new_zeros(1),
                [batch.segment_lengths[0], *[0] * (len(batch.segment_lengths) - 1)],
            )
        if positions is not None and self.prunes_last_layer:
            segments.last_layer = (
                Segments(batch.segment_lengths, embeddings.device, batch.prefix_segments, query_lengths),
                positions,
            )
        output = self.language_model(
            inputs_embeds=embeddings[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            segments=segments,
        )
        hidden = output.last_hidden_state[0]
        return hidden if positions is None or segments.last_layer else hidden.index_select(0, positions)

    def compute_embeddings(self, batch: Batch, vision_features: Tensor) -> Tensor:
        """Compute [T, D]: token embeddings, with image features at the positions of their placeholders.

        A batch without images adds the features of the dummy tile, multiplied by zero, so that ranks with and without
        images make the same collective calls in the same order.
        """
        embeddings = self.get_input_embeddings()(batch.input_ids)
        if not batch.num_tiles:
            features = self.compute_image_features(vision_features, [TileLayout(1, 0)])
            return embeddings + 0.0 * features[0].sum().to(embeddings.dtype)
        features = self.compute_image_features(vision_features, batch.layouts)
        row = torch.cat([features[i] for i in batch.image_index])
        mask = batch.input_ids == self.config.image_token_id
        return embeddings.masked_scatter(mask[:, None], row.to(embeddings.dtype))

    def compute_image_features(self, vision_features: Tensor, layouts: list[TileLayout]) -> list[Tensor]:
        """Compute the features of each image, [its tokens, D]: projector, unpadding, pooling and newlines.

        Args:
            vision_features: [N, P, C] output of the vision tower.
            layouts: of each image, in the order of the tiles.
        """
        projected = self.multi_modal_projector(vision_features)  # [N, Q, D]
        by_layout: dict[TileLayout, list[int]] = defaultdict(list)
        for number, layout in enumerate(layouts):
            by_layout[layout].append(number)
        starts = torch.tensor([0, *(layout.num_tiles for layout in layouts)]).cumsum(0).tolist()
        features: list[Tensor] = [projected] * len(layouts)
        for layout, members in by_layout.items():  # images of one layout are merged together
            if len(by_layout) == 1:
                stack = projected.unflatten(0, (len(members), layout.num_tiles))
            else:
                stack = torch.stack([projected[starts[i] : starts[i] + layout.num_tiles] for i in members])
            for number, image in zip(members, self._merge_tiles(stack, layout).unbind(), strict=True):
                features[number] = image
        return features

    def encode_images(self, batch: Batch) -> Tensor:
        """Encode the batch's images: [N, P, C] of its tiles, or [1, P, C] of a dummy tile when there are none.

        The vision tower runs exactly once, with any batch.
        """
        side = self.image_settings.tile_size
        dummy = batch.tiles.new_zeros((1, 3, side, side))
        return self.encode_tiles(batch.tiles if batch.num_tiles else dummy)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """Encode tiles with the vision tower: [N, P, C] of the selected layer. A frozen tower runs without autograd."""
        settings = self.image_settings
        parameter = next(self.vision_tower.parameters())
        mean, std = (
            torch.tensor(values, device=tiles.device, dtype=torch.float32)[:, None, None]
            for values in (settings.mean, settings.std)
        )
        pixels = ((tiles.float() * settings.do_rescale - mean) / std).to(parameter.dtype)
        layer = self.config.vision_feature_layer
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_tower_trainable):
            hidden = self.vision_tower(pixels, output_hidden_states=layer, return_dict=True).hidden_states[layer]
        return hidden[:, 1:] if self.config.vision_feature_select_strategy == "default" else hidden

    @property
    def is_tower_trainable(self) -> bool:
        """True when some parameter of the vision tower trains."""
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    @property
    def prunes_last_layer(self) -> bool:
        """True when the last layer is computed only at the positions that are read."""
        return isinstance(self.language_model.layers[-1], PrunedLastLayer)

    def _merge_tiles(self, stack: Tensor, layout: TileLayout) -> Tensor:
        """Merge [M, tiles, Q, D] into [M, tokens, D]: base view, then the stitched grid with a newline after each row."""
        if not self.image_settings.has_newline:
            return stack[:, 0]
        base, newline = stack[:, 0], self.image_newline.to(stack.dtype)
        if not layout.rows:
            return torch.cat([base, newline.expand(len(stack), 1, -1)], dim=1)
        side = self.image_settings.side
        grid = stack[:, 1:].unflatten(1, (layout.rows, layout.columns)).unflatten(3, (side, side))
        grid = grid.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)  # [M, D, rows * side, columns * side]
        top, bottom, left, right = layout.crop
        grid = grid[:, :, top:bottom, left:right]
        if layout.pooled:
            grid = F.interpolate(grid, list(layout.pooled), mode="bilinear")
        grid = torch.cat([grid, newline[:, None, None].expand(len(grid), -1, grid.shape[2], 1)], dim=-1)
        return torch.cat([base, grid.flatten(2).transpose(1, 2)], dim=1)


class FlatConditionalGeneration(nn.Module):
    """Model of the LLaVA family that also takes a flat packed micro-batch; it stands before transformers' class."""

    model: Any
    lm_head: Any

    def forward(
        self,
        *args: Any,
        batch: Batch | None = None,
        embeddings_only: bool = False,
        vision_only: bool = False,
        statistics: bool = False,
        return_hidden: bool = False,
        hidden: Tensor | None = None,
        vision_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return transformers' output, or with `batch` the log-probability of each supervised token, [R].

        They are in the order of the row. A micro-batch without supervised tokens returns one value, which the loss must
        multiply by zero, because the head must run on all ranks. With `embeddings_only` as well: the input embeddings
        of the language model, [T, D]. With `vision_only`: the output of the vision tower for the tiles, [N, P, C]. With
        `hidden`: the head's logits [R, V] of these hidden states [R, D]. All go through this method and not through a call
        of an inner module, so that hooks around the whole model (FSDP2) run.

        Args:
            statistics: return more about each position, see `losses.next_token.compute_token_log_probs`.
            return_hidden: also return the hidden states that the head reads, [R, D], detached.
            vision_features: [N, P, C] output of a frozen vision tower for the batch's tiles, from another pass
                (`encode_images`).

        Returns:
            ([R] log-probabilities, and with `statistics` [R] of each statistic, ..., and the [N, P, C] output of the
            vision tower, to be given to another pass; last the hidden states, if they are wanted).
        """
        if hidden is not None:
            return self.lm_head(hidden)
        if batch is None:
            return super().forward(*args, **kwargs)
        if embeddings_only:
            return self.model(batch=batch, embeddings_only=True)
        if vision_only:
            return self.model.encode_images(batch)
        vision_features = self.model.encode_images(batch) if vision_features is None else vision_features
        hidden = self.model(batch=batch, positions=batch.loss_positions, vision_features=vision_features)
        targets = (
            batch.input_ids.index_select(0, batch.loss_positions + 1)
            if len(batch.loss_positions)
            else batch.input_ids[:1]
        )
        scores = self.lm_head(hidden, targets, statistics)
        features = (vision_features.detach(),) if statistics else ()
        return (*scores, *features, hidden.detach()) if return_hidden else (*scores, *features)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the model, but keep the type of float buffers, as `from_pretrained(dtype=)` does.

        Rotary frequencies in bfloat16 would be other positions.
        """
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if name in before and buffer.dtype != before[name].dtype:
                buffer.data = before[name].to(buffer.device)
        return self


class FlatLlavaModel(FlatModel, LlavaModel):
    """LlavaModel that also takes a flat packed micro-batch."""


class FlatLlavaNextModel(FlatModel, LlavaNextModel):
    """LlavaNextModel that also takes a flat packed micro-batch."""


class FlatOnevisionModel(FlatModel, LlavaOnevisionModel):
    """LlavaOnevisionModel that also takes a flat packed micro-batch."""


class FlatLlava(FlatConditionalGeneration, LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration that also takes a flat packed micro-batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class FlatLlavaNext(FlatConditionalGeneration, LlavaNextForConditionalGeneration):
    """LlavaNextForConditionalGeneration that also takes a flat packed micro-batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class FlatOnevision(FlatConditionalGeneration, LlavaOnevisionForConditionalGeneration):
    """LlavaOnevisionForConditionalGeneration that also takes a flat packed micro-batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


# With and without head, by the class of transformers
FLAT_CLASSES: dict[ModelClass, tuple[Any, Any]] = {
    ModelClass.llava: (FlatLlava, FlatLlavaModel),
    ModelClass.llava_next: (FlatLlavaNext, FlatLlavaNextModel),
    ModelClass.llava_onevision: (FlatOnevision, FlatOnevisionModel),
}
for _model_class, (_flat_class, _) in FLAT_CLASSES.items():
    # transformers' generation reads from the signature what a forward pass supports (logits of the last position only)
    _flat_class.forward.__signature__ = inspect.signature(get_transformers_class(_model_class).forward)


def use_flat_forward(model: VisionLanguageModel, settings: ImageSettings) -> None:
    """Patch a built model with the flat packed forward pass and the attention that it needs."""
    flat_class, flat_model_class = FLAT_CLASSES[ModelClass(model.config.model_type)]
    model.__class__, model.model.__class__ = flat_class, flat_model_class
    model.lm_head.__class__ = LogProbHead
    prune_last_layer(model)
    model.model.image_settings = settings
    model.set_attn_implementation({"text_config": attention.FLAT_ATTENTION, "vision_config": "sdpa"})
    model.config.text_config.use_cache = True  # for generation; the flat forward pass uses no cache
