"""Retrieval of texts by images and of images by texts: recall at 1, 5 and 10, as a torchmetrics metric.

Recall at k is the share of queries with a right candidate among the k best, as COCO and Flickr30k report it (torchmetrics'
RetrievalHitRate). A right candidate whose score equals that of a wrong one stands behind it, so a model that gives all
candidates one score has recall 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_vlm.data.caption_pairs import PairBatch
from lit_vlm.losses.contrastive import compute_query_similarities

# Shapes: I images, J texts, Q queries of an image, E width of the shared features.

CUTOFFS = (1, 5, 10)
ROWS_PER_CHUNK = 64  # images whose similarities with all texts and queries exist at a time
UNRANKED = -100.0  # score of candidates that are not re-ranked, as in LAVIS; below every similarity and matching logit

PairScorer = Callable[[Tensor, Tensor], Tensor]  # of the numbers of images [n] and of texts [n]; returns scores [n]


class RetrievalRecall(Metric):
    """Recall at k in both directions over all images and texts of an evaluation, on all ranks.

    An image and a text with the same id belong together. Give texts that several images share, such as equal captions,
    one id with all these images: each of them is then right.

    `compute()` returns `image_to_text_r1`, `text_to_image_r1`, ..., 0 to 1.
    """

    higher_is_better = True
    full_state_update = False

    image_features: list[Tensor]
    image_ids: list[Tensor]
    text_features: list[Tensor]
    text_ids: list[Tensor]

    def __init__(self, cutoffs: Sequence[int] = CUTOFFS) -> None:
        super().__init__()
        self.cutoffs = tuple(cutoffs)
        for name in ("image_features", "image_ids", "text_features", "text_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image_features: Tensor, image_ids: Tensor, text_features: Tensor, text_ids: Tensor) -> None:
        """Add images with ids [I] and features [I, Q, E] (or [I, E]), and texts with ids [J] and features [J, E]."""
        if image_features.dim() == 2:
            image_features = image_features[:, None]
        self.image_features.append(image_features.detach())
        self.text_features.append(text_features.detach())
        self.image_ids.append(image_ids.long())
        self.text_ids.append(text_ids.long())

    def compute(self) -> dict[str, Tensor]:
        """Compute the recalls of both directions."""
        matches = dim_zero_cat(self.image_ids)[:, None] == dim_zero_cat(self.text_ids)[None]
        return compute_recalls(self.compute_similarities(), matches, self.cutoffs)

    def compute_similarities(self) -> Tensor:
        """Compute the similarities of all images and texts, [I, J], a chunk of images at a time."""
        texts = dim_zero_cat(self.text_features)
        chunks = dim_zero_cat(self.image_features).split(ROWS_PER_CHUNK)
        return torch.cat([compute_query_similarities(chunk, texts) for chunk in chunks])


def compute_recalls(
    similarities: Tensor, matches: Tensor, cutoffs: Sequence[int] = CUTOFFS, text_similarities: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute recall at each cutoff in both directions, [] each, 0 to 1.

    Args:
        similarities: [I, J], higher is more similar.
        matches: [I, J] bool; an image without a right text, or a text without a right image, does not count.
        text_similarities: [I, J] for text to image, after re-ranking; None: `similarities`.
    """
    directions = {
        "image_to_text": (similarities, matches),
        "text_to_image": ((similarities if text_similarities is None else text_similarities).T, matches.T),
    }
    return {
        f"{name}_r{cutoff}": (compute_ranks(scores, right) <= cutoff).float().mean()
        for name, (scores, right) in directions.items()
        for cutoff in cutoffs
    }


def compute_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Compute the rank of the best right candidate of each query, from 1, [queries with one].

    Args:
        scores: [queries, candidates].
        right: [queries, candidates] bool.
    """
    has_right = right.any(1)
    scores, right = scores[has_right], right[has_right]
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right).sum(1)


@torch.no_grad()
def evaluate_retrieval(
    model: Any, batches: Iterable[PairBatch], *, num_candidates: int = 128, pairs_per_pass: int = 64
) -> dict[str, float]:
    """Evaluate retrieval among all pairs of some batches, by features alone and re-ranked by matching, on one process.

    Pairs with equal texts count as right for each other.

    Args:
        model: `Blip2ForPretraining` or `BlipForPretraining`, in eval mode.
        num_candidates: see `rerank_candidates`.
        pairs_per_pass: pairs that are matched in one pass.

    Returns:
        The recalls of `compute_recalls`, 0 to 1, and the same with the prefix `reranked_`.
    """
    recall, parts = RetrievalRecall(), []
    for batch in batches:
        embeds, text_ids = model.encode_images(batch.pixel_values), batch.pair_ids[:, 1]
        texts = model.compute_text_features(batch.input_ids, batch.attention_mask)
        recall.update(model.compute_image_features(embeds), text_ids, texts, text_ids)
        parts.append((embeds, batch.input_ids, batch.attention_mask, text_ids))
    embeds, input_ids, mask, text_ids = (torch.cat(column) for column in zip(*parts, strict=True))

    def score_pairs(images: Tensor, texts: Tensor) -> Tensor:
        passes = zip(images.split(pairs_per_pass), texts.split(pairs_per_pass), strict=True)
        return torch.cat([model.match(embeds[i], input_ids[j], mask[j])[:, 1] for i, j in passes])

    similarities, matches = recall.compute_similarities(), text_ids[:, None] == text_ids[None]
    by_image, by_text = rerank_candidates(similarities, score_pairs, num_candidates)
    reranked = compute_recalls(by_image, matches, recall.cutoffs, text_similarities=by_text)
    values = recall.compute() | {f"reranked_{name}": value for name, value in reranked.items()}
    return {name: float(value) for name, value in values.items()}


def rerank_candidates(similarities: Tensor, score_pairs: PairScorer, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Re-rank the most similar candidates of each query by another score, such as matching, in both directions.

    The new score is added to the similarity, as in LAVIS; all other candidates get UNRANKED.

    Args:
        similarities: [I, J].
        score_pairs: scores n pairs from the numbers of their images [n] and of their texts [n].
        num_candidates: candidates of each query; LAVIS has 128 for COCO and Flickr30k.

    Returns:
        Scores [I, J] for image to text, and scores [I, J] for text to image.
    """
    by_image = torch.full_like(similarities, UNRANKED)
    by_text = torch.full_like(similarities, UNRANKED)
    for scores, dimension in ((by_image, 1), (by_text, 0)):
        number = min(num_candidates, similarities.shape[dimension])
        best = similarities.topk(number, dim=dimension).indices
        chosen = torch.zeros_like(similarities, dtype=torch.bool).scatter_(dimension, best, True)
        images, texts = chosen.nonzero(as_tuple=True)
        scores[images, texts] = similarities[images, texts] + score_pairs(images, texts).to(similarities)
    return by_image, by_text
