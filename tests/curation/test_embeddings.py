"""Tests of duplicates by the features of a tower: an exact search in blocks, and features that are kept."""

import numpy as np
import pytest

from lit_vlm.curation import embeddings
from lit_vlm.curation.embeddings import match_embeddings, match_other_embeddings


def make_vectors(num: int, width: int, seed: int = 0) -> np.ndarray:
    """Make directions in groups that are near each other."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num // 3 + 1, width))
    values = centres[random.integers(0, len(centres), num)] + random.normal(0, 0.15, (num, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_all_pairs_above_the_cosine_are_found_each_once_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(embeddings, "BLOCK_PICTURES", block)
    values = make_vectors(150, 8)
    cosines = values.astype(np.float64) @ values.T.astype(np.float64)
    threshold = 0.9
    assert np.abs(cosines - threshold).min() > 1e-6  # no pair is on the edge
    first, second = np.nonzero(np.triu(cosines >= threshold, 1))
    found = match_embeddings(values, threshold)
    assert sorted(zip(found.first.tolist(), found.second.tolist(), strict=True)) == list(
        zip(first.tolist(), second.tolist(), strict=True)
    )
    assert len(first) > 50 and found.num_full_buckets == 0


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_all_near_pairs_with_other_pictures_are_found_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(embeddings, "BLOCK_PICTURES", block)
    values, others = np.split(make_vectors(150, 8), [110])
    cosines = values.astype(np.float64) @ others.T.astype(np.float64)
    assert np.abs(cosines - 0.9).min() > 1e-6
    found = match_other_embeddings(3 * values, others, 0.9)
    pairs = dict(zip(zip(found.pictures.tolist(), found.others.tolist(), strict=True), found.cosines, strict=True))
    expected = {(int(one), int(other)) for one, other in zip(*np.nonzero(cosines >= 0.9), strict=True)}
    assert pairs.keys() == expected and len(pairs) > 50
    assert all(abs(cosine - cosines[pair]) < 1e-5 for pair, cosine in pairs.items())
    assert len(match_other_embeddings(values, others[:0], 0.9).pictures) == 0


def test_a_picture_with_many_near_ones_meets_the_nearest(monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_PICTURES", 32)
    values = np.repeat(make_vectors(1, 8), 100, 0)
    found = match_embeddings(values, 0.9)
    assert found.num_full_buckets == 100 - 65  # those with more than 64 earlier ones
    assert np.bincount(found.second, minlength=100).max() == 64
    assert (found.first < found.second).all()
    assert len(match_embeddings(values[:0], 0.9).first) == 0
