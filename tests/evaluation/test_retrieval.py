"""Recalls of retrieval against sorting by hand, over ranks of an evaluation, and after re-ranking."""

import pytest
import torch
import torch.nn.functional as F

from lit_vlm.evaluation.retrieval import UNRANKED, RetrievalRecall, compute_ranks, compute_recalls, rerank_candidates


def make_features(num_images: int, num_texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(num_texts, 6, generator=generator, dtype=torch.float64)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def count_by_hand(similarities: list[list[float]], right: list[list[bool]], cutoff: int) -> float:
    """Count the queries with a right candidate among the first ones."""
    found = 0
    for row, row_right in zip(similarities, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        found += any(row_right[j] for j in order[:cutoff])
    return found / len(similarities)


def test_recall_is_the_share_of_queries_with_a_right_candidate_among_the_first():
    images, texts = make_features(20, 40)
    ids = torch.arange(40) % 20  # two captions for each image, as COCO has five
    metric = RetrievalRecall()
    for rows in (slice(0, 7), slice(7, 20)):
        columns = torch.cat([torch.arange(40)[rows], torch.arange(20, 40)[rows]])
        metric.update(images[rows], torch.arange(20)[rows], texts[columns], ids[columns])
    values = metric.compute()
    similarities = (images @ texts.T).amax(1)
    matches = torch.arange(20)[:, None] == ids
    for cutoff in (1, 5, 10):
        expected = count_by_hand(similarities.tolist(), matches.tolist(), cutoff)
        assert float(values[f"image_to_text_r{cutoff}"]) == pytest.approx(expected)
        expected = count_by_hand(similarities.T.tolist(), matches.T.tolist(), cutoff)
        assert float(values[f"text_to_image_r{cutoff}"]) == pytest.approx(expected)
    assert 0 < float(values["image_to_text_r5"]) < 1


def test_a_model_that_cannot_tell_candidates_apart_has_recall_zero():
    metric = RetrievalRecall()
    metric.update(torch.ones(20, 1, 2), torch.arange(20), torch.ones(20, 2), torch.arange(20))
    assert not any(float(value) for value in metric.compute().values())


def test_equal_texts_count_as_right():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    ids = torch.tensor([7, 7, 8])  # the first two images have one caption
    assert float(compute_recalls(scores, ids[:2, None] == ids)["image_to_text_r1"]) == 1.0
    assert float(compute_recalls(scores, torch.eye(2, 3).bool())["image_to_text_r1"]) == 0.0


def test_a_query_without_a_right_candidate_does_not_count():
    ranks = compute_ranks(torch.tensor([[0.2, 0.9], [0.7, 0.1]]), torch.tensor([[True, False], [False, False]]))
    assert ranks.tolist() == [2]


def test_reranking_scores_only_the_best_candidates_of_each_query():
    similarities = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.2, 0.7]])
    matching = torch.tensor([[0.0, 3.0, 9.0], [1.0, 2.0, 4.0]])
    asked = []

    def score_pairs(images, texts):
        asked.append(list(zip(images.tolist(), texts.tolist(), strict=True)))
        return matching[images, texts]

    by_image, by_text = rerank_candidates(similarities, score_pairs, 1)
    assert asked == [[(0, 0), (1, 2)], [(0, 0), (0, 1), (1, 2)]]
    assert by_image.tolist() == [pytest.approx([0.9, UNRANKED, UNRANKED]), pytest.approx([UNRANKED, UNRANKED, 4.7])]
    assert by_text[0].tolist() == pytest.approx([0.9, 3.8, UNRANKED])
    by_image, _ = rerank_candidates(similarities, score_pairs, 2)
    assert by_image[0].tolist() == pytest.approx([0.9, 3.8, UNRANKED])  # the second is first now
    recalls = compute_recalls(by_image, torch.eye(2, 3).roll(1, 1).bool(), (1,), text_similarities=by_text)
    assert recalls.keys() == {"image_to_text_r1", "text_to_image_r1"}
