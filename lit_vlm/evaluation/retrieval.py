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

from lit_vlm.config.pair_stages import RECALL_CUTOFFS
from lit_vlm.data.caption_pairs import PairBatch
from lit_vlm.losses.contrastive import compute_query_similarities

# Shapes: I images, J texts, Q queries of an image, E width of the shared features.

CUTOFFS = RECALL_CUTOFFS
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


class PairRetrieval(Metric):
    """Retrieval among all image-text pairs of an evaluation, on all ranks, by features and re-ranked by matching.

    Pairs with one image id are one image with several texts, as in COCO and Flickr30k. A text is right for an image if one
    of the image's own texts has its id, so equal texts are all right.

    Each rank keeps its own encoded images in host memory and matches the candidates of these images.

    Args:
        num_candidates: best candidates of each query that are re-ranked; 0: none.
    """

    higher_is_better = True
    full_state_update = False

    image_features: list[Tensor]
    text_features: list[Tensor]
    image_ids: list[Tensor]
    text_ids: list[Tensor]
    STATES = ("image_features", "text_features", "input_ids", "attention_mask", "image_ids", "text_ids", "ranks")

    def __init__(self, num_candidates: int = 128) -> None:
        super().__init__()
        self.num_candidates = num_candidates
        for name in self.STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.embeds: list[Tensor] = []  # of this rank

    def update(self, model: Any, batch: PairBatch, rank: int = 0) -> None:
        """Encode a batch of pairs with the model, on the rank that has them."""
        embeds = model.encode_images(batch.pixel_values)
        image_features = model.compute_image_features(embeds)
        if image_features.dim() == 2:
            image_features = image_features[:, None]
        values = {
            "image_features": widen(image_features),
            "text_features": widen(model.compute_text_features(batch.input_ids, batch.attention_mask)),
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "image_ids": batch.pair_ids[:, 0],
            "text_ids": batch.pair_ids[:, 1],
            "ranks": torch.full_like(batch.pair_ids[:, 0], rank),
        }
        for name, value in values.items():
            getattr(self, name).append(value.detach())
        if self.num_candidates:
            self.embeds.append(embeds.detach().cpu())

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        self.embeds = []

    def compute(self) -> dict[str, Tensor]:
        """Compute the recalls by features, 0 to 1."""
        _, similarities, matches = self._compare()
        return compute_recalls(similarities, matches)

    @torch.no_grad()
    def rerank(
        self, model: Any, rank: int = 0, *, pairs_per_pass: int = 64, pulse: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Compute the recalls after re-ranking, with the prefix `reranked_`. All ranks must call it at the same point.

        Args:
            model: with `match`, in eval mode.
            pulse: called after each pass.
        """
        with self.sync_context():
            images, similarities, matches = self._compare()
            states = {name: dim_zero_cat(getattr(self, name)) for name in ("input_ids", "attention_mask", "ranks")}
        own = torch.cat(self.embeds) if self.embeds else torch.empty(0)
        offset = int((states["ranks"] < rank).sum())  # the pairs of all ranks stand in the order of the ranks

        def score_pairs(rows: Tensor, texts: Tensor) -> Tensor:
            scores = similarities.new_zeros(len(rows))
            mine = (states["ranks"][images[rows]] == rank).nonzero()[:, 0]
            for part in mine.split(pairs_per_pass) if len(mine) else ():  # all candidates may be of other ranks
                embeds = own[(images[rows[part]] - offset).cpu()].to(similarities.device)
                tokens = (states[name][texts[part]] for name in ("input_ids", "attention_mask"))
                scores[part] = model.match(embeds, *tokens)[:, 1].to(scores.dtype)
                pulse()
            return sum_over_ranks(scores)

        by_image, by_text = rerank_candidates(similarities, score_pairs, self.num_candidates)
        recalls = compute_recalls(by_image, matches, text_similarities=by_text)
        return {f"reranked_{name}": value for name, value in recalls.items()}

    def _compare(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs [I] that stand for the images, and similarities [I, J] and matches [I, J] with all texts."""
        image_ids, text_ids = dim_zero_cat(self.image_ids), dim_zero_cat(self.text_ids)
        unique, rows = image_ids.unique(return_inverse=True)
        images = torch.full_like(unique, len(rows)).scatter_reduce(
            0, rows, torch.arange(len(rows), device=rows.device), "amin"
        )
        unique_texts, columns = text_ids.unique(return_inverse=True)
        belongs = torch.zeros(len(unique), len(unique_texts), dtype=torch.bool, device=rows.device)
        belongs[rows, columns] = True
        texts = dim_zero_cat(self.text_features)
        chunks = dim_zero_cat(self.image_features)[images].split(ROWS_PER_CHUNK)
        similarities = torch.cat([compute_query_similarities(chunk, texts) for chunk in chunks])
        return images, similarities, belongs[:, columns]


def widen(values: Tensor) -> Tensor:
    """Convert half precision to float32, in which fewer scores are equal; float32 and float64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


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
    retrieval = PairRetrieval(num_candidates)
    for batch in batches:
        retrieval.update(model, batch)
    values = retrieval.compute() | retrieval.rerank(model, pairs_per_pass=pairs_per_pass)
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
