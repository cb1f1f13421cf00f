"""The adapter of TRL's losses, with a real DPOTrainer of the pinned release, loss by loss."""

import math

import pytest
import torch

from lit_vlm.losses.next_token import compute_token_log_probs
from lit_vlm.losses.preference import LOSS_TYPES, PreferenceLoss, make_answer_mask, pad_answer_scores
from lit_vlm.types import UserError

VOCAB, LENGTHS = 50, [5, 3, 7, 4, 6, 2]  # three pairs: chosen answers, then rejected ones


def make_logits(seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(LENGTHS)
    logits = torch.randn(rows, VOCAB, generator=generator) * scale
    targets = torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(99))
    return logits, targets


def compute_scores(logits, targets, lengths):
    """Return the answer scores. The head is the identity here."""
    return pad_answer_scores(compute_token_log_probs(logits, torch.eye(VOCAB), targets, statistics=True), lengths)


def get_options(name: str) -> dict:
    return {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_first_loss_is_that_of_margin_zero(name):
    logits, targets = make_logits(0)
    loss = PreferenceLoss([name], beta=0.1, **get_options(name))
    scores = compute_scores(logits, targets, LENGTHS)
    output = loss(scores, scores, LENGTHS)
    expected = loss.compute_loss_at_zero_margin()
    if name == "sft":
        assert expected is None and output.pair_loss is None
    else:
        assert float(output.loss) == pytest.approx(expected, abs=1e-6 * max(1, expected))
        mixed = PreferenceLoss([name, "sft"], beta=0.1, **get_options(name))
        assert mixed.compute_loss_at_zero_margin() == expected
        assert float(mixed(scores, scores, LENGTHS).pair_loss) == float(output.pair_loss)
    assert not output.rewards.any() and len(output.rewards) == len(LENGTHS)
    if name == "sigmoid":
        assert expected == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", [name for name in LOSS_TYPES if not name.startswith("aot")])
def test_k_micro_batches_of_pairs_equal_one_batch(name):
    loss = PreferenceLoss([name, "sft"] if name != "sft" else ["sft"], beta=0.2, **get_options(name))
    policy, targets = make_logits(1)
    reference, _ = make_logits(2)
    whole = loss(compute_scores(policy, targets, LENGTHS), compute_scores(reference, targets, LENGTHS), LENGTHS).loss
    spans = torch.tensor([0, *LENGTHS]).cumsum(0)
    total = 0.0
    for pairs in ([0, 1], [2]):
        answers = [*pairs, *(pair + 3 for pair in pairs)]
        rows = torch.cat([torch.arange(spans[a], spans[a + 1]) for a in answers])
        lengths = [LENGTHS[a] for a in answers]
        part = loss(
            compute_scores(policy[rows], targets[rows], lengths),
            compute_scores(reference[rows], targets[rows], lengths),
            lengths,
            pair_share=len(pairs) / 3,
            token_share=sum(LENGTHS[p] for p in pairs) / sum(LENGTHS[:3]),
        )
        total += float(part.loss)
    assert total == pytest.approx(float(whole), rel=1e-6)


def test_scores_are_padded_to_one_row_for_each_answer():
    logits, targets = make_logits(3)
    scores = compute_scores(logits, targets, LENGTHS)
    mask = make_answer_mask(LENGTHS, logits.device)
    assert mask.sum(1).tolist() == LENGTHS
    torch.testing.assert_close(scores.log_probs[mask], logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
    assert not scores.log_probs[~mask].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": ["sigmoide"]}, "there is no loss sigmoide; there are sigmoid, .*Did you mean sigmoid"),
        ({"loss_type": []}, "empty"),
        ({"loss_type": ["sigmoid"], "beta": 0.0}, "above 0"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weight for 2 losses"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing: must be above 0 for loss_type=exo_pair"),
        ({"loss_type": ["sigmoid"], "label_smoothing": 0.1}, "has no effect"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": ["sigmoid"], "f_divergence_type": "js"}, "expected one of reverse_kl"),
        ({"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "js_divergence"}, "not for nca_pair"),
        ({"loss_type": ["sigmoid"], "ld_alpha": 1.5}, "must be within 0 and 1, found 1.5"),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "cannot compute the two together"),
        ({"loss_type": ["aot"], "use_weighting": True}, "WPO weights pairs, and aot sorts"),
        (
            {"loss_type": ["sigmoid", "aot_unpaired"], "use_weighting": True},
            "WPO weights pairs, and aot_unpaired sorts",
        ),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names sigmoid twice"),
        ({"loss_type": ["sigmoid"], "loss_weights": [0.0]}, "every weight is 0"),
        ({"loss_type": ["sigmoid"], "beta": math.nan}, "stage.beta: must be above 0, found nan"),
        ({"loss_type": ["discopop"], "discopop_tau": 0.0}, "stage.discopop_tau: must be above 0"),
    ],
)
def test_invalid_settings_are_refused_with_the_reason(arguments, message):
    with pytest.raises(UserError, match=message):
        PreferenceLoss(**arguments)
