"""BLIP's pretraining model: transformers' retrieval model and caption decoder, tied, with momentum encoders and a queue.

As in LAVIS 1.0.2, encoder and decoder share embeddings, cross-attention and feed-forward layers; only their self-attention
differs. The decoder's head is the table of word embeddings.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextLMHeadModel

from lit_vlm.files import atomic_folder
from lit_vlm.losses.contrastive import (
    ContrastiveLosses,
    FeatureQueue,
    compute_caption_loss,
    compute_itm_loss,
    compute_momentum_itc_loss,
    compute_negative_weights,
    find_local_matches,
    find_matches,
    find_queue_matches,
    gather_constant,
    gather_with_gradient,
    limit_temperature,
    sample_negatives,
    update_momentum,
)
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.qformer.build import load_caption_tokenizer, load_text_encoder, write_image_config
from lit_vlm.types import IGNORE_INDEX, UserError

# Shapes: B pairs of this rank, P patches of an image, C width of the vision tower, T tokens of a text, E width of the
# shared features, N entries of the queue.

TEMPERATURE = 0.07  # initial value
MOMENTUM = 0.995
QUEUE_SIZE = 57_600
MATCHING_TOKEN = "[ENC]"  # first token of a text that is matched with an image


class BlipForPretraining(nn.Module):
    """BLIP's pretraining model.

    Args:
        retrieval: transformers' model with vision tower, text encoder, projections and matching head.
        bos_token_id: `[DEC]`, the first token of a caption that is predicted.
        enc_token_id: `[ENC]`, the first token of a text that is matched.
        queue_size, global_batch_size: see `FeatureQueue`.
        seed: for the decoder and the queue.
    """

    NUM_IDS = 0  # ids that the queue keeps of each pair

    def __init__(
        self,
        retrieval: BlipForImageTextRetrieval,
        bos_token_id: int,
        enc_token_id: int,
        *,
        queue_size: int = QUEUE_SIZE,
        global_batch_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        text_config = retrieval.config.text_config
        if not all(0 <= token < text_config.vocab_size for token in (bos_token_id, enc_token_id)):
            raise UserError(
                f"bos_token_id={bos_token_id} or enc_token_id={enc_token_id} is not among the {text_config.vocab_size:,} rows of the "
                "vocabulary. Add [DEC] and [ENC] to the tokenizer before the model is built (build_blip does it)."
            )
        self.retrieval, self.bos_token_id, self.enc_token_id = retrieval, bos_token_id, enc_token_id
        self._make_decoder(seed)
        self.temperature = nn.Parameter(torch.tensor([TEMPERATURE]))  # [1]: FSDP2 shards no scalars
        self.momentum = nn.ModuleDict(
            {
                name: copy.deepcopy(getattr(retrieval, name))
                for name in ("vision_model", "text_encoder", "vision_proj", "text_proj")
            }
        ).requires_grad_(False)
        width = retrieval.config.image_text_hidden_size
        self.queue = FeatureQueue(queue_size, width, global_batch_size, seed, self.NUM_IDS)

    def _make_decoder(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.text_decoder = BlipTextLMHeadModel(self.retrieval.config.text_config)
        _tie_decoder(self.text_decoder, self.retrieval.text_encoder)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float,
        pair_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> ContrastiveLosses:
        """Compute the three losses of this rank's pairs, and push their momentum features into the queue.

        Call it once per optimizer step, after `prepare_step`. Ranks must have equally many pairs.

        Args:
            pixel_values: [B, 3, H, W], normalised.
            input_ids: [B, T], from `[CLS]` to `[SEP]`, padded.
            attention_mask: [B, T], 1 for a token and 0 for padding.
            alpha: see `compute_alpha`.
            pair_ids: see `find_matches`; pairs of this rank that share an id are no negatives of each other.
            negatives: rows [B] of the negative images, and of the negative texts, among the pairs of this rank; None:
                they are sampled, similar ones more often.

        Raises:
            UserError: a pair has no negative on this rank.
        """
        image_embeds = self.encode_images(pixel_values)
        with torch.no_grad():
            momentum_embeds = self.momentum["vision_model"](pixel_values=pixel_values).last_hidden_state
        return self.compute_losses(
            (image_embeds, momentum_embeds), input_ids, attention_mask, alpha, pair_ids, negatives
        )

    def list_shard_units(self) -> list[nn.Module]:
        """List the modules that FSDP2 shards one by one: layers, and the parts of layers that encoder and decoder share."""
        layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        parts = [list(layer.children()) if isinstance(layer, BlipTextLayer) else [layer] for layer in layers]
        return list(dict.fromkeys(unit for units in parts for unit in units))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] by the vision tower, [B, P, C]."""
        return self.retrieval.vision_model(pixel_values=pixel_values).last_hidden_state

    @property
    def state_without_gradient(self) -> dict[str, Tensor]:
        """Momentum encoders and queue, which training changes without a gradient."""
        return {
            name: value
            for name, value in [*self.named_parameters(), *self.named_buffers()]
            if name.startswith(("momentum.", "queue."))
        }

    def prepare_step(self) -> None:
        """Limit the temperature and move all momentum encoders by one step.

        Not a part of `forward`: under FSDP2 and ZeRO-3 that sees gathered copies of the weights, in which a change would be lost.
        """
        limit_temperature(self.temperature)
        for name, module in self.momentum.items():
            update_momentum(module, getattr(self.retrieval, name), MOMENTUM)

    def compute_losses(
        self,
        image_embeds: tuple[Tensor, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float,
        pair_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> ContrastiveLosses:
        """Compute the losses from images encoded by the vision tower and by its momentum copy, [B, P, C] each; see `forward`."""
        embeds, momentum_embeds = image_embeds
        features = self._compute_features(self.retrieval, embeds, input_ids, attention_mask)
        with torch.no_grad():
            momentum_features = self._compute_features(self.momentum, momentum_embeds, input_ids, attention_mask)
        itc, image_logits, text_logits = compute_momentum_itc_loss(
            features, momentum_features, self.queue, self.temperature, alpha
        )
        self.queue.push(*momentum_features)
        if negatives is None:
            matches, num_pairs = find_local_matches(len(input_ids), pair_ids), len(input_ids)
            negatives = (
                sample_negatives(compute_negative_weights(text_logits[:, :num_pairs], matches)),
                sample_negatives(compute_negative_weights(image_logits[:, :num_pairs], matches)),
            )
        images, texts = negatives
        matching_logits = self.match(
            torch.cat([embeds, embeds[images], embeds]),
            torch.cat([input_ids, input_ids, input_ids[texts]]),
            torch.cat([attention_mask, attention_mask, attention_mask[texts]]),
        )
        caption_ids = _replace_first(input_ids, self.bos_token_id)
        captions = self.text_decoder(caption_ids, attention_mask=attention_mask, encoder_hidden_states=embeds).logits
        labels = caption_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        return ContrastiveLosses(itc, compute_itm_loss(matching_logits), compute_caption_loss(captions, labels))

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits of (no match, match) of each image and text, [B, 2]."""
        ids = _replace_first(input_ids, self.enc_token_id)
        hidden = self.retrieval.text_encoder(
            ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds
        ).last_hidden_state
        return self.retrieval.itm_head(hidden[:, 0])

    def compute_image_features(self, image_embeds: Tensor) -> Tensor:
        """Compute the shared features of encoded images [B, P, C], [B, E] of length 1."""
        return F.normalize(self.retrieval.vision_proj(image_embeds[:, 0]), dim=-1)

    def compute_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the shared features of texts [B, T], [B, E] of length 1; a text sees no image."""
        hidden = self.retrieval.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.retrieval.text_proj(hidden[:, 0]), dim=-1)

    @staticmethod
    def _compute_features(
        model: Any, embeds: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the shared features of images and texts, [B, E] each, by the model or by its momentum copies."""
        parts = model if isinstance(model, nn.ModuleDict) else dict(model.named_children())
        hidden = parts["text_encoder"](input_ids, attention_mask=attention_mask).last_hidden_state
        return (
            F.normalize(parts["vision_proj"](embeds[:, 0]), dim=-1),
            F.normalize(parts["text_proj"](hidden[:, 0]), dim=-1),
        )


class BlipForRetrieval(BlipForPretraining):
    """BLIP's model for fine-tuning on retrieval: contrast and matching, without a decoder.

    As in LAVIS 1.0.2, all pairs with an equal id are right for each other, those of the queue included, and the negatives of
    matching come from all ranks. The arguments are those of `BlipForPretraining`.
    """

    NUM_IDS = 2

    def _make_decoder(self, seed: int) -> None:
        """Make none."""

    def compute_losses(
        self,
        image_embeds: tuple[Tensor, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float,
        pair_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> ContrastiveLosses:
        """Compute contrast and matching; see `BlipForPretraining.compute_losses`. There are no captions, so `itg` is 0.

        Args:
            pair_ids: [B, 2], see `find_matches`.
            negatives: columns [B] among the pairs of all ranks.
        """
        assert pair_ids is not None
        embeds, momentum_embeds = image_embeds
        features = self._compute_features(self.retrieval, embeds, input_ids, attention_mask)
        with torch.no_grad():
            momentum_features = self._compute_features(self.momentum, momentum_embeds, input_ids, attention_mask)
        itc, _, _ = compute_momentum_itc_loss(
            features, momentum_features, self.queue, self.temperature, alpha, find_queue_matches(pair_ids, self.queue)
        )
        self.queue.push(*momentum_features, pair_ids)
        if negatives is None:
            matches = find_matches(len(input_ids), pair_ids)
            images, texts = (gather_constant(one) for one in features)
            negatives = (
                sample_negatives(compute_negative_weights(features[1].detach() @ images.T / self.temperature, matches)),
                sample_negatives(compute_negative_weights(features[0].detach() @ texts.T / self.temperature, matches)),
            )
        ids, mask = gather_constant(input_ids), gather_constant(attention_mask)
        logits = self.match(
            torch.cat([embeds, gather_with_gradient(embeds)[negatives[0]], embeds]),
            torch.cat([input_ids, input_ids, ids[negatives[1]]]),
            torch.cat([attention_mask, attention_mask, mask[negatives[1]]]),
        )
        return ContrastiveLosses(itc, compute_itm_loss(logits), itc.new_zeros(()))


def _replace_first(input_ids: Tensor, token_id: int) -> Tensor:
    return torch.cat([torch.full_like(input_ids[:, :1], token_id), input_ids[:, 1:]], dim=1)


def _tie_decoder(decoder: BlipTextLMHeadModel, encoder: Any) -> None:
    """Tie embeddings, cross-attention and feed-forward layers; self-attention stays the decoder's own."""
    decoder.bert.embeddings = encoder.embeddings
    decoder.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
    for own, shared in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention, own.intermediate, own.output = shared.crossattention, shared.intermediate, shared.output


def make_blip_config(
    vision_config: BlipVisionConfig, text_config: Any, *, feature_width: int = 256, **tokens: int
) -> BlipConfig:
    """Make the config of BLIP from those of a vision tower and of a BERT-like text encoder.

    Args:
        feature_width: E, width of the features that images and texts share.
        tokens: ids by the names of the config, such as `bos_token_id`.
    """
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings initializer_range layer_norm_eps pad_token_id"
    ).split()
    text = BlipTextConfig(
        **{name: getattr(text_config, name) for name in names},
        encoder_hidden_size=vision_config.hidden_size,
        projection_dim=feature_width,
        label_smoothing=0.1,
        **tokens,
    )
    return BlipConfig(
        vision_config=vision_config.to_dict(), text_config=text.to_dict(), image_text_hidden_size=feature_width
    )


def build_blip(
    text_encoder: str,
    vision_tower: BlipVisionConfig | BlipVisionModel,
    *,
    global_batch_size: int,
    queue_size: int = QUEUE_SIZE,
    feature_width: int = 256,
    seed: int = 0,
) -> tuple[BlipForPretraining, PreTrainedTokenizerBase]:
    """Build a pretraining model, and its tokenizer with `[DEC]` and `[ENC]`.

    Embeddings, self-attention and feed-forward layers start from the text encoder; cross-attention, projections and the
    matching head are new.

    Args:
        text_encoder: folder or hub id of a BERT-like masked language model in any language.
        vision_tower: a tower, see `load_blip_vision`, or the config of a new one.

    Raises:
        UserError: the folder is not what is needed, or the queue is no multiple of the global batch size.
    """
    tokenizer = load_blip_tokenizer(text_encoder)
    enc_token_id = int(tokenizer.convert_tokens_to_ids(MATCHING_TOKEN))
    encoder = load_text_encoder(text_encoder, len(tokenizer), seed)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    is_config = isinstance(vision_tower, BlipVisionConfig)
    vision_config = vision_tower if is_config else vision_tower.config
    config = make_blip_config(vision_config, encoder.config, feature_width=feature_width, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        retrieval = BlipForImageTextRetrieval(config)
        for layer in (retrieval.vision_proj, retrieval.text_proj, retrieval.itm_head):
            layer.reset_parameters()  # PyTorch's initialisation, as in LAVIS; transformers has another
    if not is_config:
        retrieval.vision_model.load_state_dict(vision_tower.state_dict())
    _copy_bert(retrieval.text_encoder, encoder.bert)
    model = BlipForPretraining(
        retrieval,
        tokenizer.bos_token_id,
        enc_token_id,
        queue_size=queue_size,
        global_batch_size=global_batch_size,
        seed=seed,
    )
    _copy_bert(model.text_decoder.bert, encoder.bert)
    head = model.text_decoder.cls.predictions
    head.transform.load_state_dict(encoder.cls.predictions.transform.state_dict())
    with torch.no_grad():
        head.bias.copy_(encoder.cls.predictions.bias)
    return model, tokenizer


def load_blip_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a BERT-like text encoder, and add `[DEC]` and `[ENC]` unless they are there.

    Raises:
        UserError: a token that BLIP needs is missing.
    """
    tokenizer = load_caption_tokenizer(folder)
    if MATCHING_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [MATCHING_TOKEN]})
    return tokenizer


def _copy_bert(target: Any, bert: Any) -> None:
    """Copy the weights of a BERT that a text model of BLIP has; it has no token types."""
    names = target.state_dict().keys()
    target.load_state_dict({name: value for name, value in bert.state_dict().items() if name in names}, strict=False)


def save_blip(model: BlipForPretraining, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save two folders that transformers loads: `retrieval` (`BlipForImageTextRetrieval`) and `captions` (`BlipForConditionalGeneration`).

    transformers' retrieval model matches the texts that it gets: put `[ENC]` in the place of their first token.
    """
    for name, part in (("retrieval", model.retrieval), ("captions", make_captioner(model))):
        save_blip_part(part, tokenizer, folder / name)


def save_blip_run(model: BlipForPretraining, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a folder that transformers loads as `BlipForImageTextRetrieval`, with the captioner in `captions` below it."""
    with atomic_folder(folder, replace=True) as temporary:
        save_blip_part(make_captioner(model), tokenizer, temporary / "captions")
        _write_part(model.retrieval, tokenizer, temporary)


def make_captioner(model: BlipForPretraining) -> BlipForConditionalGeneration:
    """Make transformers' captioner from vision tower and text decoder, whose weights are copied."""
    with disable_transformers_logging():
        captioner = BlipForConditionalGeneration(copy.deepcopy(model.retrieval.config))
    captioner.vision_model.load_state_dict(model.retrieval.vision_model.state_dict())
    captioner.text_decoder.load_state_dict(model.text_decoder.state_dict())
    return captioner


def save_blip_part(part: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model of transformers with tokenizer and image settings."""
    with atomic_folder(folder, replace=True) as temporary:
        _write_part(part, tokenizer, temporary)


def _write_part(part: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with disable_transformers_logging():
        part.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_image_config(folder, part.config.vision_config.image_size)
