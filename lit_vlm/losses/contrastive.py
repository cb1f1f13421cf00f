"""Losses that align images and texts: contrastive (ITC), matching (ITM) and image-grounded captions (ITG, LM).

The definitions are those of BLIP-2's first stage (arXiv 2301.12597) and BLIP's pretraining (arXiv 2201.12086) as LAVIS 1.0.2
computes them; `make oracle` compares whole losses with its code. All are functions of tensors: the model, the ranks and the
random numbers stay outside, except for `gather_constant` and `gather_with_gradient`, which concatenate over ranks.

A contrastive loss compares every pair with all others of the global batch. So it is no sum over micro-batches: with
gradient accumulation, features must be cached, or accumulation refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.types import IGNORE_INDEX, UserError

# Shapes: B pairs of this rank, W pairs of all ranks, N negatives of the queue, Q queries, T tokens of a text, E width of
# the features, V vocabulary size. Pair b of rank r is column r * B + b of a [B, W] matrix.

LABEL_SMOOTHING = 0.1  # of ITC, ITG and LM in BLIP-2, and of LM in BLIP
NO_ID = -(1 << 63)  # id of an entry of a queue without a pair
NEGATIVE_FLOOR = 1e-4  # added to the probability of each negative, so that every other pair can be one
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # range of BLIP's temperature; BLIP-2 does not limit it


class ContrastiveLosses(NamedTuple):
    """Losses of a batch, [] each: image-text contrast, image-text matching, and captions given the image.

    A tuple, because DeepSpeed finds the tensors of a module's output in tuples, lists and dicts alone.
    """

    itc: Tensor
    itm: Tensor
    itg: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the three, as BLIP and BLIP-2 train it."""
        return self.itc + self.itm + self.itg


# ---- ranks


def gather_constant(tensor: Tensor) -> Tensor:
    """Gather the rows of all ranks in their order, [B, ...] to [W, ...], without gradients.

    Every rank must have the same number of rows.
    """
    tensor = tensor.detach()
    if _get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Gather the rows of all ranks in their order, [B, ...] to [W, ...]; a row's gradient is the sum over all ranks."""
    return tensor if _get_world_size() == 1 else _Gather.apply(tensor)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """Autograd function that concatenates over ranks, and in backward returns to each rank the gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = len(tensor)
        return gather_constant(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        first = torch.distributed.get_rank() * ctx.num_rows
        return total[first : first + ctx.num_rows]


def _get_world_size() -> int:
    is_on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_on else 1


def find_matches(num_pairs: int, pair_ids: Tensor | None = None) -> Tensor:
    """Find the pairs of all ranks that match those of this rank, [B, W] bool; each pair matches at least itself.

    Args:
        num_pairs: B.
        pair_ids: [B] or [B, n] integers; pairs that share an id in one column match each other, for several texts of one
            image, or equal texts. None: a pair matches only itself, as in the pretraining of BLIP and BLIP-2.
    """
    world_size = _get_world_size()
    if pair_ids is not None:
        columns = pair_ids.reshape(num_pairs, -1)
        return (columns[:, None] == gather_constant(columns)[None]).any(-1)
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    own = torch.arange(num_pairs) + rank * num_pairs
    return own[:, None] == torch.arange(world_size * num_pairs)[None]


def find_local_matches(num_pairs: int, pair_ids: Tensor | None = None) -> Tensor:
    """Find the pairs of this rank that match each other, [B, B] bool; see `find_matches`."""
    if pair_ids is None:
        return torch.eye(num_pairs, dtype=torch.bool)
    columns = pair_ids.reshape(num_pairs, -1)
    return (columns[:, None] == columns[None]).any(-1)


# ---- BLIP-2: image-text contrast with queries


def compute_query_similarities(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Compute the cosine similarity of each image and text, [I, J]: the largest over the queries of the image.

    Args:
        image_features: [I, Q, E], of length 1.
        text_features: [J, E], of length 1.
    """
    return torch.einsum("iqe,je->ijq", image_features, text_features).amax(-1)


def compute_itc_loss(
    image_logits: Tensor, text_logits: Tensor, matches: Tensor, label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Compute BLIP-2's image-text contrastive loss, [] nats: the mean of both directions over the pairs of this rank.

    Each text is a class for an image, and each image for a text. The target is equal for all matches of a pair.

    Args:
        image_logits: [B, W], similarities of the images with all texts, divided by the temperature.
        text_logits: [B, W], similarities of the texts with all images, divided by the temperature.
        matches: [B, W] bool, see `find_matches`.
        label_smoothing: share of the target that all W columns get.
    """
    matches = matches.to(image_logits.device)
    shares = matches.to(image_logits.dtype) / matches.sum(1, keepdim=True)
    targets = (1 - label_smoothing) * shares + label_smoothing / matches.shape[1]
    return (compute_soft_cross_entropy(image_logits, targets) + compute_soft_cross_entropy(text_logits, targets)) / 2


def compute_soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy of logits [B, W] with target probabilities [B, W], [] nats."""
    return -(F.log_softmax(logits, dim=1) * targets).sum(1).mean()


# ---- image-text matching


def compute_negative_weights(logits: Tensor, matches: Tensor) -> Tensor:
    """Compute the weights with which hard negatives are sampled, [B, W]: similar pairs are likely, matches impossible.

    Args:
        logits: [B, W], similarities divided by the temperature.
        matches: [B, W] bool, pairs that are no negatives.

    Raises:
        UserError: a pair has no negative at all.
    """
    matches = matches.to(logits.device)
    if bool(matches.all(1).any()):
        raise UserError(
            f"Image-text matching needs a negative for each pair, and all {matches.shape[1]:,} pairs of the global batch match one of "
            "them. Raise the global batch size, to 2 at least, or mix sources so that not all pairs have one picture or text."
        )
    weights = logits.detach().softmax(1) + NEGATIVE_FLOOR
    return weights.masked_fill(matches, 0.0)


def sample_negatives(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample one negative for each row of weights [B, W], [B] int64 columns.

    Args:
        generator: None: PyTorch's own of the device.
    """
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def compute_itm_loss(logits: Tensor) -> Tensor:
    """Compute the matching loss of B pairs and their 2 B negatives, [] nats.

    Args:
        logits: [3 B, 2], of (no match, match): first the B pairs, then the negatives.
    """
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: len(logits) // 3] = 1
    return F.cross_entropy(logits, labels)


# ---- captions


def make_itg_mask(text_mask: Tensor, num_queries: int) -> Tensor:
    """Make the attention mask of image-grounded text generation in one pass, [B, 1, Q + T, Q + T] bool.

    Queries see only queries, so their outputs are those without a text. A token sees all queries, itself and earlier tokens.

    Args:
        text_mask: [B, T], 1 for a token and 0 for padding.
    """
    num_tokens = text_mask.shape[1]
    size = num_queries + num_tokens
    visible = torch.ones(size, size, dtype=torch.bool, device=text_mask.device).tril()
    visible[:num_queries, :num_queries] = True
    keys = torch.cat([text_mask.new_ones(len(text_mask), num_queries), text_mask], dim=1).bool()
    return (visible[None] & keys[:, None])[:, None]


def compute_caption_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float = LABEL_SMOOTHING, num_tokens: int | None = None
) -> Tensor:
    """Compute the loss of captions given their images, [] nats: ITG of BLIP-2 and LM of BLIP.

    Args:
        logits: [B, T, V]; position t predicts token t + 1.
        labels: [B, T], not shifted; IGNORE_INDEX is padding.
        num_tokens: divisor; None: the predicted tokens of this batch, as LAVIS divides on each rank.
    """
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets,
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    return total / ((targets != IGNORE_INDEX).sum() if num_tokens is None else num_tokens)


def compute_token_loss(logits: Tensor, targets: Tensor, label_smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """Compute the loss of captions from the logits [N, V] of their predicted tokens [N] alone, [] nats; see `compute_caption_loss`."""
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


# ---- BLIP: momentum encoder, queue and soft labels


def compute_alpha(step: int, steps_per_epoch: int, alpha: float = 0.4) -> float:
    """Compute the share of the momentum encoder in BLIP's targets; it grows linearly over the first two epochs.

    Args:
        step: optimizer steps before this one.
        alpha: the share after two epochs.
    """
    return alpha * min(1.0, step / (2 * steps_per_epoch))


def compute_soft_targets(momentum_logits: Tensor, alpha: float, matches: Tensor | None = None) -> Tensor:
    """Compute BLIP's targets, [B, B + N]: alpha of the momentum encoder's probabilities, the rest on the own pair.

    Args:
        momentum_logits: [B, B + N], similarities of momentum features with those of the batch, then of the queue.
        matches: [B, B + N] bool, pairs among which the rest is divided; None: the own pair alone.
    """
    momentum_logits = momentum_logits.detach()
    if matches is None:
        own = torch.eye(*momentum_logits.shape, dtype=momentum_logits.dtype, device=momentum_logits.device)
    else:
        own = matches.to(momentum_logits) / matches.sum(1, keepdim=True)
    return alpha * momentum_logits.softmax(1) + (1 - alpha) * own


def compute_momentum_itc_loss(
    features: tuple[Tensor, Tensor],
    momentum_features: tuple[Tensor, Tensor],
    queue: FeatureQueue,
    temperature: Tensor,
    alpha: float,
    matches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute BLIP's image-text contrastive loss, and the logits [B, B + N] of images and of texts.

    Features of the momentum encoder and of the queue are the classes. The caller pushes them into the queue afterwards.

    Args:
        features: of images and of texts, [B, E] each, of length 1.
        momentum_features: the same of the momentum encoder.
        temperature: [1], see `limit_temperature`.
        alpha: see `compute_alpha`.
        matches: see `compute_soft_targets`.

    Returns:
        Loss [] nats, image logits, text logits.
    """
    image, text = features
    image_m, text_m = (tensor.detach() for tensor in momentum_features)
    all_images, all_texts = torch.cat([image_m, queue.images]), torch.cat([text_m, queue.texts])
    image_logits, text_logits = image @ all_texts.T / temperature, text @ all_images.T / temperature
    image_targets = compute_soft_targets(image_m @ all_texts.T / temperature, alpha, matches)
    text_targets = compute_soft_targets(text_m @ all_images.T / temperature, alpha, matches)
    losses = (
        compute_soft_cross_entropy(image_logits, image_targets),
        compute_soft_cross_entropy(text_logits, text_targets),
    )
    return (losses[0] + losses[1]) / 2, image_logits, text_logits


class FeatureQueue(nn.Module):
    """Queue of the last N momentum features of images and texts; its buffers are part of a checkpoint.

    All ranks push the features of all ranks, so that the queues stay equal.

    Args:
        size: N; BLIP has 57,600.
        width: E.
        global_batch_size: pairs that one push adds over all ranks; N must be a multiple of it.
        num_ids: ids that are kept of each pair, to find equal ones.

    Raises:
        UserError: the queue cannot be filled with whole batches.
    """

    images: Tensor  # [N, E]
    texts: Tensor  # [N, E]
    position: Tensor  # [], next row to replace
    ids: Tensor  # [N, num_ids] int64; NO_ID where no pair was pushed yet

    def __init__(self, size: int, width: int, global_batch_size: int, seed: int = 0, num_ids: int = 0) -> None:
        super().__init__()
        if global_batch_size < 1 or size < 1 or size % global_batch_size:
            raise UserError(
                f"The queue has {size:,} entries and a step adds {global_batch_size:,} pairs, which does not divide it. Choose a queue "
                "that is a multiple of the global batch size."
            )
        generator = torch.Generator().manual_seed(seed)
        for name in ("images", "texts"):
            self.register_buffer(name, F.normalize(torch.randn(size, width, generator=generator), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        if num_ids:
            self.register_buffer("ids", torch.full((size, num_ids), NO_ID))

    @torch.no_grad()
    def push(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None = None) -> None:
        """Replace the oldest entries by the features of all ranks, [B, E] each on this rank.

        Args:
            ids: [B, num_ids] of the pairs, for a queue that keeps them.

        Raises:
            UserError: the last batch of an epoch is smaller, and does not fit.
        """
        images, texts = gather_constant(image_features), gather_constant(text_features)
        first = int(self.position)
        if first + len(images) > len(self.images):
            raise UserError(
                f"A batch of {len(images):,} pairs does not fit at entry {first:,} of {len(self.images):,} of the queue: all batches must "
                "have one size. Leave out the last incomplete batch."
            )
        self.images[first : first + len(images)] = images.to(self.images)
        self.texts[first : first + len(texts)] = texts.to(self.texts)
        if ids is not None:
            self.ids[first : first + len(images)] = gather_constant(ids)
        self.position.fill_((first + len(images)) % len(self.images))


def find_queue_matches(pair_ids: Tensor, queue: FeatureQueue) -> Tensor:
    """Find the pairs of this rank's batch and of the queue that share an id with each pair, [B, B + N] bool.

    Args:
        pair_ids: [B, num_ids].
    """
    return (pair_ids[:, None] == torch.cat([pair_ids, queue.ids])[None]).any(-1)


@torch.no_grad()
def limit_temperature(temperature: Tensor) -> None:
    """Limit BLIP's temperature to MIN_TEMPERATURE to MAX_TEMPERATURE, in place, before each step."""
    for values in list_held_values(temperature):
        values.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)


@torch.no_grad()
def update_momentum(momentum_model: nn.Module, model: nn.Module, momentum: float = 0.995) -> None:
    """Move the parameters of the momentum encoder towards those of the model, once per optimizer step.

    Of parameters that FSDP2 or ZeRO-3 shards, each rank moves its own part, because both models are sharded alike. All ranks
    must call it.
    """
    slow_parameters: list[Any] = list(momentum_model.parameters())
    for slow, fast in zip(slow_parameters, model.parameters(), strict=True):
        own = get_own_part(slow)
        own.mul_(momentum).add_(get_own_part(fast).to(own), alpha=1 - momentum)
    if any(hasattr(slow, "ds_tensor") for slow in slow_parameters):
        from lit_vlm.compat.deepspeed import gather_again  # late: it imports Lightning

        gather_again(slow_parameters)


def get_own_part(parameter: Any) -> Tensor:
    """Return this rank's part of a parameter that FSDP2 or ZeRO-3 shards, or a whole parameter, as a live view."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()  # type: ignore[no-any-return]
    return getattr(parameter, "ds_tensor", parameter)


def list_held_values(parameter: Any) -> list[Tensor]:
    """List live views of all that this rank holds of a parameter: its part, and under ZeRO its float32 master, too."""
    if hasattr(parameter, "ds_tensor") or hasattr(
        parameter, "get_full_hp_param"
    ):  # partitioned by ZeRO-3, or of ZeRO-2
        from lit_vlm.compat import deepspeed  # late: it imports Lightning

        return deepspeed.list_held_values(parameter)
    return [get_own_part(parameter)]
