"""BLIP-2's first-stage model: transformers' `Blip2ForImageTextRetrieval` with what its training needs in addition.

transformers has all modules but two: the head that predicts tokens (`QFormerTextHead`) and the learnt temperature. They
stand beside the retrieval model, which is saved as it is, so that the saved folder gives the same scores in transformers.

A training step runs the Q-Former three times. The pass over queries and caption gives the features of the image and the
caption's logits at once: under the mask of `make_itg_mask` queries do not see the caption. LAVIS runs two passes for that.
What no loss reads is not computed: logits of padding, and outputs of texts in the last layer (`limit_text_outputs`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval
from transformers.activations import ACT2FN

from lit_vlm.losses.contrastive import (
    ContrastiveLosses,
    compute_itc_loss,
    compute_itm_loss,
    compute_negative_weights,
    compute_query_similarities,
    compute_token_loss,
    find_matches,
    gather_constant,
    gather_with_gradient,
    make_itg_mask,
    sample_negatives,
)
from lit_vlm.types import UserError

# Shapes: B pairs of this rank, W pairs of all ranks, P patches of an image, C width of the vision tower, Q queries, T tokens
# of a text, D width of the Q-Former, E width of the shared features, V vocabulary size.

TEMPERATURE = 0.07  # initial value


class QFormerTextHead(nn.Module):
    """Head that predicts tokens from the Q-Former's outputs, as BERT's: its matrix is the table of word embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Compute the logits [B, T, V] of outputs [B, T, D] with the table of embeddings [V, D]."""
        return F.linear(self.layernorm(self.activation(self.dense(hidden))), word_embeddings, self.bias)


class Blip2ForPretraining(nn.Module):
    """BLIP-2's first-stage model: retrieval model, text head and temperature.

    Args:
        retrieval: transformers' model; its Q-Former must read texts (`use_qformer_text_input=True`).
        bos_token_id: `[DEC]`, the first token of a caption that is predicted.
        freeze_vision_tower: only the vision tower's last layer norm trains, as in BLIP-2, whose tower has none of its own.

    Raises:
        UserError: the Q-Former has no weights for texts, or the token is not in its vocabulary.
    """

    def __init__(
        self, retrieval: Blip2ForImageTextRetrieval, bos_token_id: int, *, freeze_vision_tower: bool = True
    ) -> None:
        super().__init__()
        config = retrieval.config.qformer_config
        if not config.use_qformer_text_input:
            raise UserError(
                "The Q-Former has no weights for texts, which the first stage trains: its qformer_config has "
                "use_qformer_text_input=false. Give a folder of Blip2ForImageTextRetrieval, or build one with build_blip2."
            )
        if not 0 <= bos_token_id < config.vocab_size:
            raise UserError(
                f"bos_token_id={bos_token_id} is not among the {config.vocab_size:,} rows of the Q-Former's vocabulary. Add [DEC] to "
                "the tokenizer (add_caption_token) before the model is built."
            )
        self.retrieval, self.bos_token_id = retrieval, bos_token_id
        self.text_head = QFormerTextHead(config)
        self.temperature = nn.Parameter(torch.tensor([TEMPERATURE]))  # [1]: FSDP2 shards no scalars
        self.freezes_vision_tower = freeze_vision_tower
        if freeze_vision_tower:
            for name, parameter in retrieval.vision_model.named_parameters():
                parameter.requires_grad = name.startswith("post_layernorm.")

    @property
    def num_queries(self) -> int:
        """Number of learnt queries Q."""
        return int(self.retrieval.query_tokens.shape[1])

    def train(self, mode: bool = True) -> Blip2ForPretraining:
        """Set train mode; a frozen vision tower stays in eval mode."""
        super().train(mode)
        if self.freezes_vision_tower:
            self.retrieval.vision_model.eval()
        return self

    # ---- passes of the Q-Former

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] by the vision tower, [B, P, C]."""
        return self.retrieval.vision_model(pixel_values=pixel_values).last_hidden_state

    def compute_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the shared features of texts [B, T], [B, E] of length 1; a text sees no image."""
        model = self.retrieval
        embeddings = model.embeddings(input_ids=input_ids)
        with limit_text_outputs(model.qformer, 1):
            hidden = model.qformer(
                query_embeds=embeddings, query_length=0, attention_mask=attention_mask
            ).last_hidden_state
        return F.normalize(model.text_projection(hidden[:, 0]), dim=-1)

    def compute_image_features(self, image_embeds: Tensor) -> Tensor:
        """Compute the shared features of each query from the encoded images [B, P, C], [B, Q, E] of length 1."""
        model = self.retrieval
        queries = model.query_tokens.expand(len(image_embeds), -1, -1)
        hidden = model.qformer(query_embeds=queries, encoder_hidden_states=image_embeds).last_hidden_state
        return F.normalize(model.vision_projection(hidden), dim=-1)

    def caption_images(
        self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the shared features [B, Q, E] and the caption's logits [B, T, V] in one pass.

        Args:
            input_ids: [B, T]; the first token is replaced by `bos_token_id`.
            positions: [B, T] bool, N positions whose logits alone are computed, [N, V]; None: all.
        """
        model = self.retrieval
        hidden = self._run_both(
            image_embeds, self._start_caption(input_ids), make_itg_mask(attention_mask, self.num_queries)
        )
        features = F.normalize(model.vision_projection(hidden[:, : self.num_queries]), dim=-1)
        texts = hidden[:, self.num_queries :]
        return features, self.text_head(
            texts if positions is None else texts[positions], model.embeddings.word_embeddings.weight
        )

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits of (no match, match) of each image and text, [B, 2]: the mean over the queries."""
        mask = torch.cat([attention_mask.new_ones(len(attention_mask), self.num_queries), attention_mask], dim=1)
        with limit_text_outputs(self.retrieval.qformer, 0):
            hidden = self._run_both(image_embeds, input_ids, mask)
        return self.retrieval.itm_head(hidden[:, : self.num_queries]).mean(1)

    def _run_both(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run queries and text together, [B, Q + T, D]; queries also see the image."""
        model = self.retrieval
        queries = model.query_tokens.expand(len(image_embeds), -1, -1)
        return model.qformer(
            query_embeds=model.embeddings(input_ids=input_ids, query_embeds=queries),
            query_length=self.num_queries,
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
        ).last_hidden_state

    def _start_caption(self, input_ids: Tensor) -> Tensor:
        return torch.cat([torch.full_like(input_ids[:, :1], self.bos_token_id), input_ids[:, 1:]], dim=1)

    # ---- losses

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> ContrastiveLosses:
        """Compute the three losses of this rank's pairs; negatives and classes are the pairs of all ranks.

        The mean over the ranks is the loss of the step. Ranks must have equally many pairs and texts of equal length.

        Args:
            pixel_values: [B, 3, H, W], normalised.
            input_ids: [B, T], from `[CLS]` to `[SEP]`, padded.
            attention_mask: [B, T], 1 for a token and 0 for padding.
            pair_ids: see `find_matches`.
            negatives: columns [B] of the negative images, and of the negative texts, among the pairs of all ranks; None:
                they are sampled, similar ones more often.

        Raises:
            UserError: a pair has no negative.
        """
        return self.compute_losses(self.encode_images(pixel_values), input_ids, attention_mask, pair_ids, negatives)

    def compute_losses(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> ContrastiveLosses:
        """Compute the three losses from encoded images [B, P, C]; see `forward`."""
        predicted = attention_mask[:, 1:].bool()
        image_features, caption_logits = self.caption_images(
            image_embeds, input_ids, attention_mask, F.pad(predicted, (0, 1))
        )
        # Before the matching, so that its gradients do not exist beside what the matching keeps for its backward pass
        itg = compute_token_loss(caption_logits, input_ids[:, 1:][predicted])
        del caption_logits
        text_features = self.compute_text_features(input_ids, attention_mask)
        image_logits = compute_query_similarities(image_features, gather_constant(text_features)) / self.temperature
        text_logits = compute_query_similarities(gather_constant(image_features), text_features).T / self.temperature
        matches = find_matches(len(input_ids), pair_ids)
        if negatives is None:
            negatives = (
                sample_negatives(compute_negative_weights(text_logits, matches)),
                sample_negatives(compute_negative_weights(image_logits, matches)),
            )
        images, texts = negatives
        ids, mask = gather_constant(input_ids), gather_constant(attention_mask)
        matching_logits = self.match(
            torch.cat([image_embeds, gather_with_gradient(image_embeds)[images], image_embeds]),
            torch.cat([input_ids, input_ids, ids[texts]]),
            torch.cat([attention_mask, attention_mask, mask[texts]]),
        )
        itc = compute_itc_loss(image_logits, text_logits, matches)
        return ContrastiveLosses(itc, compute_itm_loss(matching_logits), itg)


@contextlib.contextmanager
def limit_text_outputs(qformer: Any, num_tokens: int) -> Iterator[None]:
    """Compute the Q-Former's outputs for the first tokens of each text alone; the outputs of the others do not exist.

    They depend on no other output of the last layer, whose feed-forward layers would compute them for nothing.

    Args:
        num_tokens: of each text; 0: only queries have outputs.
    """
    layer = qformer.encoder.layer[-1]
    compute_outputs = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda hidden: compute_outputs(hidden[:, :num_tokens])
    try:
        yield
    finally:
        del layer.feed_forward_chunk  # the method of the class again


def make_blip2_config(
    vision_config: Any,
    text_config: Any,
    *,
    num_queries: int = 32,
    feature_width: int = 256,
    cross_attention_frequency: int = 2,
) -> Blip2Config:
    """Make the config of a first-stage model from those of a vision tower and of a BERT-like text encoder.

    Args:
        feature_width: E, width of the features that images and texts share.
        cross_attention_frequency: every n-th layer of the Q-Former, from the first, sees the image.
    """
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings initializer_range layer_norm_eps pad_token_id"
    ).split()
    qformer = {name: getattr(text_config, name) for name in names}
    qformer |= {
        "use_qformer_text_input": True,
        "cross_attention_frequency": cross_attention_frequency,
        "encoder_hidden_size": vision_config.hidden_size,
    }
    return Blip2Config(
        vision_config=vision_config.to_dict(),
        qformer_config=qformer,
        num_query_tokens=num_queries,
        image_text_hidden_size=feature_width,
    )
