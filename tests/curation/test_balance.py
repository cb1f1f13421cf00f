"""Tests of balance: how many records of a group stay, and MetaCLIP's rule for concepts."""

import math

import numpy as np
import pytest

from lit_vlm.curation.balance import compute_targets
from lit_vlm.curation.concepts import ConceptMatcher, count_concepts, is_sampled, read_concepts
from lit_vlm.types import UserError

NAN = float("nan")


@pytest.mark.parametrize(
    ("counts", "shares", "min_kept", "kept"),
    [
        ([900, 100], [0.5, 0.5], 0, [100, 100]),  # the smaller one decides
        ([900, 100], [0.5, NAN], 0, [100, 100]),  # the rest is that of the others
        ([600, 300, 100], [NAN, NAN, 0.2], 0, [267, 133, 100]),  # which keep their proportions
        ([900, 100], [0.5, 0.5], 500, [400, 100]),  # a limit on what leaves: reached in part
        ([900, 100, 0], [0.4, 0.4, 0.2], 0, [100, 100, 0]),  # an empty group's share goes to the others
        ([900, 100], [NAN, 0.0], 0, [900, 0]),
        ([0, 0], [0.5, 0.5], 0, [0, 0]),
    ],
)
def test_groups_get_their_shares_of_as_many_records_as_possible(counts, shares, min_kept, kept):
    assert compute_targets(np.array(counts), np.array(shares), min_kept).tolist() == kept


def test_no_reachable_total_above_the_computed_one_has_the_shares():
    random = np.random.default_rng(0)
    for _ in range(200):
        counts = random.integers(1, 1000, 4)
        shares = random.dirichlet(np.ones(4))
        kept = compute_targets(counts, shares, 0)
        assert (kept <= counts).all() and (kept == counts).any()  # one group is used up
        assert np.abs(kept - shares * kept.sum()).max() <= 3.0  # each rounded by at most a half


def test_words_of_a_concept_follow_each_other_in_a_text():
    concepts = ["red apple", "Apple", "서울", "지하철역", "apple pie", "빨갛다"]
    matcher = ConceptMatcher(concepts)
    assert matcher.unusable == ["빨갛다"]  # no noun
    assert matcher.match("A RED apple, and pie") == [0, 1]  # a comma lies between
    assert matcher.match("pineapples are not it") == []
    assert matcher.match("서울의 지하철역에서 먹은 apple pie") == [1, 2, 3, 4]  # particles do not hide a noun
    assert matcher.match("") == []


def test_a_record_stays_if_any_of_its_concepts_is_sampled_with_t_by_count():
    limit, num_records = 200, 2000
    matches = [[0] if number % 20 else [0, 1] for number in range(num_records)]  # 0 in all, 1 in 100 of them
    counts = count_concepts(matches, 2)
    assert counts.tolist() == [2000, 100]
    probabilities = limit / np.maximum(counts, limit)
    kept = [is_sampled(f"seed\0{number}", found, probabilities) for number, found in enumerate(matches)]
    assert all(
        stays for stays, found in zip(kept, matches, strict=True) if 1 in found
    )  # a rare concept keeps its records
    common = [stays for stays, found in zip(kept, matches, strict=True) if 1 not in found]
    expected, deviation = len(common) * 0.1, math.sqrt(len(common) * 0.1 * 0.9)
    assert abs(sum(common) - expected) < 4 * deviation
    again = [is_sampled(f"other\0{number}", found, probabilities) for number, found in enumerate(matches)]
    assert again != kept


def test_a_list_of_concepts_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file.*one concept a line"):
        read_concepts(tmp_path / "none.txt", "curate.balance.concepts")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="names no concept"):
        read_concepts(tmp_path / "empty.txt", "curate.balance.concepts")
    (tmp_path / "list.txt").write_text("\ufeffdog\n red   apple \ndog\n", "utf-8")
    assert read_concepts(tmp_path / "list.txt", "x") == ["dog", "red apple"]
