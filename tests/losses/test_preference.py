"""The adapter against a real DPOTrainer of the pinned TRL, loss by loss."""

import math

import pytest
import torch

from lit_vlm.losses.preference import LOSSES, PreferenceLoss, answer_mask, score_answers
from lit_vlm.types import UserError

VOCAB, LENGTHS = 50, [5, 3, 7, 4, 6, 2]  # three pairs: chosen answers, then rejected ones


def drawn(seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(LENGTHS)
    logits = torch.randn(rows, VOCAB, generator=generator) * scale
    targets = torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(99))
    return logits, targets


def options_of(name: str) -> dict:
    return {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}


@pytest.mark.parametrize("name", LOSSES)
def test_first_loss_is_that_of_margin_zero(name):
    logits, targets = drawn(0)
    loss = PreferenceLoss([name], beta=0.1, **options_of(name))
    scores = score_answers(logits, targets, LENGTHS)
    value, _ = loss(scores, scores, LENGTHS)
    expected = loss.at_margin_zero()
    if name == "sft":
        assert expected is None
    else:
        assert float(value) == pytest.approx(expected, abs=1e-6 * max(1, expected))
    if name == "sigmoid":
        assert expected == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("aot")])
def test_k_micro_batches_of_pairs_equal_one_batch(name):
    loss = PreferenceLoss([name, "sft"] if name != "sft" else ["sft"], beta=0.2, **options_of(name))
    policy, targets = drawn(1)
    reference, _ = drawn(2)
    whole, _ = loss(score_answers(policy, targets, LENGTHS), score_answers(reference, targets, LENGTHS), LENGTHS)
    spans = torch.tensor([0, *LENGTHS]).cumsum(0)
    total = 0.0
    for pairs in ([0, 1], [2]):
        answers = [*pairs, *(pair + 3 for pair in pairs)]
        rows = torch.cat([torch.arange(spans[a], spans[a + 1]) for a in answers])
        lengths = [LENGTHS[a] for a in answers]
        part, _ = loss(
            score_answers(policy[rows], targets[rows], lengths),
            score_answers(reference[rows], targets[rows], lengths),
            lengths,
            pair_share=len(pairs) / 3,
            token_share=sum(LENGTHS[p] for p in pairs) / sum(LENGTHS[:3]),
        )
        total += float(part)
    assert total == pytest.approx(float(whole), rel=1e-6)


def test_scores_are_spread_over_the_answers_they_belong_to():
    logits, targets = drawn(3)
    scores = score_answers(logits, targets, LENGTHS)
    mask = answer_mask(LENGTHS, logits.device)
    assert mask.sum(1).tolist() == LENGTHS
    torch.testing.assert_close(scores.log_probs[mask], logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
    assert not scores.log_probs[~mask].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": ["sigmoide"]}, "TRL knows sigmoid"),
        ({"loss_type": []}, "empty"),
        ({"loss_type": ["sigmoid"], "beta": 0.0}, "above 0"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 loss types"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing between"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(arguments, message):
    with pytest.raises(UserError, match=message):
        PreferenceLoss(**arguments)
