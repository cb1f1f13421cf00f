"""Preference metrics: over micro-batches and ranks the same as over all pairs at once, with one reduction."""

from dataclasses import replace

import pytest
import torch
from test_dpo import make_pair

from lit_vlm.data.collate import collate
from lit_vlm.losses.preference import PreferenceOutput, compute_kl
from lit_vlm.stages.preference_metrics import PreferenceMetrics
from lit_vlm.types import Language, SampleKind

CPU = torch.device("cpu")
NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def add_pairs(metrics_sum: PreferenceMetrics, processor, pairs, rewards: list[float]) -> None:
    """Add pairs with these rewards, chosen ones first; a metric of a micro-batch is the mean of its pairs' chosen rewards.

    The policy's log-probabilities are the rewards less 10, the reference model gives every answer half a nat per token more.
    """
    batch = collate(processor, pairs)
    lengths = batch.segment_supervised_tokens[-2 * len(pairs) :]
    mean = sum(rewards[: len(pairs)]) / len(pairs)
    metrics = dict.fromkeys((*NAMES, "logits/chosen", "mean_token_accuracy", "logits/rejected", "entropy"), mean)
    output = PreferenceOutput(torch.zeros(()), None, torch.tensor(rewards), metrics)
    log_probs = torch.cat([torch.full((n,), (reward - 10) / n) for n, reward in zip(lengths, rewards, strict=True)])
    metrics_sum.update(batch, lengths, output, log_probs, log_probs + 0.5)
    metrics_sum.update_kl(torch.tensor(2.0 * sum(lengths)), sum(lengths))


def test_metrics_of_two_ranks_and_several_micro_batches_are_averaged_by_one_reduction(processor):
    pairs = [make_pair("뭐?", "빨간 원", "별", seed=i) for i in range(3)]
    english = replace(make_pair("What?", "a", "b", seed=9), language=Language.en, kind=SampleKind.caption)
    first, second = PreferenceMetrics(), PreferenceMetrics()
    add_pairs(first, processor, pairs[:2], [1.0, 2.0, 0.0, 5.0])
    add_pairs(first, processor, [pairs[2]], [4.0, 1.0])
    add_pairs(second, processor, [english], [9.0, 3.0])
    other = torch.tensor(list(second._sums.values()))
    calls = []

    def reduce(numbers):
        calls.append(numbers.shape)
        return numbers + other

    means = first.compute(reduce, CPU)
    assert len(calls) == 1
    assert means["rewards/chosen"] == pytest.approx((1 + 2 + 4 + 9) / 4)
    assert means["rewards/accuracies_ko"] == pytest.approx(2 / 3) and means["rewards/accuracies_en"] == 1.0
    assert means["rewards/margins_ko"] == pytest.approx((1 - 3 + 3) / 3)
    assert means["rewards/margins_caption"] == pytest.approx(6.0)
    # of pairs with rewards (1, 0), (2, 5), (4, 1), (9, 3), the second one's rejected answer is the likelier one
    assert means["ranking_accuracy"] == 0.75 and means["ranking_accuracy_ko"] == pytest.approx(2 / 3)
    assert means["kl"] == pytest.approx(2.0) and means["drift"] == pytest.approx(-0.5)
    assert "rewards/margins_ocr" not in means and "loss" not in means
    assert not first.compute(lambda numbers: numbers, CPU)  # it starts again from zero


def test_the_kl_is_that_of_the_whole_distributions_and_never_explodes():
    generator = torch.Generator().manual_seed(1)
    logits, other = (3 * torch.randn(20, 50, generator=generator) for _ in range(2))
    probabilities = logits.double().softmax(-1)
    expected = (probabilities * (probabilities.log() - other.double().softmax(-1).log())).sum()
    assert float(compute_kl(logits, other)) == pytest.approx(float(expected), rel=1e-5)
    assert float(compute_kl(logits, logits)) == 0.0
    # a token of the data that the policy has made impossible adds what the distributions differ by, and no ratio
    far = logits.clone()
    far[:, 0] = -1e4
    assert 0 < float(compute_kl(far, logits)) < 20 * 50
