"""The adapter of TRL's losses, with a real DPOTrainer of the pinned release, loss by loss."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from lit_vlm.losses.loss_types import LABEL_SMOOTHING, PREFERENCE_LOSSES, PreferenceLossType
from lit_vlm.losses.next_token import compute_token_log_probs
from lit_vlm.losses.preference import PreferenceLoss, make_answer_mask, pad_answer_scores
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


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_first_loss_is_that_of_margin_zero(name):
    logits, targets = make_logits(0)
    loss = PreferenceLoss(loss_type=[name], beta=0.1, **get_options(name))
    scores = compute_scores(logits, targets, LENGTHS)
    output = loss(scores, scores, LENGTHS)
    expected = loss.compute_loss_at_zero_margin()
    if name == "sft":
        assert expected is None and output.pair_loss is None
    else:
        assert float(output.loss) == pytest.approx(expected, abs=1e-6 * max(1, expected))
        mixed = PreferenceLoss(loss_type=[name, "sft"], beta=0.1, **get_options(name))
        assert mixed.compute_loss_at_zero_margin() == expected
        assert float(mixed(scores, scores, LENGTHS).pair_loss) == float(output.pair_loss)
    assert not output.rewards.any() and len(output.rewards) == len(LENGTHS)
    if name == "sigmoid":
        assert expected == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if not name.startswith("aot")])
def test_k_micro_batches_of_pairs_equal_one_batch(name):
    loss = PreferenceLoss(loss_type=[name, "sft"] if name != "sft" else ["sft"], beta=0.2, **get_options(name))
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


def compute_slic_hf(pairs, settings):
    """Compute SLiC-HF without its regularizer (arXiv 2305.10425), which TRL does not have."""
    return (settings.beta - pairs.policy_chosen + pairs.policy_rejected).relu()


@pytest.fixture
def own_losses(monkeypatch):
    """Losses that TRL lacks: one of the field, and a copy of TRL's `sigmoid` for a comparison."""
    own = {
        "slic": PreferenceLossType(compute=compute_slic_hf, compute_zero_margin=None),
        "own_sigmoid": PreferenceLossType(
            compute=lambda pairs, settings: -logsigmoid(settings.beta * get_margin(pairs)),
            compute_zero_margin=lambda settings: math.log(2),
        ),
        "own_robust": PreferenceLossType(
            compute=lambda pairs, settings: (1 - settings.label_smoothing) * get_margin(pairs).exp(),
            compute_zero_margin=lambda settings: 1 - settings.label_smoothing,
            options=frozenset({LABEL_SMOOTHING}),
        ),
    }
    for name, loss in own.items():
        monkeypatch.setitem(PREFERENCE_LOSSES, name, loss)


def get_margin(pairs):
    return (pairs.policy_chosen - pairs.reference_chosen) - (pairs.policy_rejected - pairs.reference_rejected)


def compute_output(policy, reference, targets, **settings):
    loss = PreferenceLoss(**settings)
    return loss(compute_scores(policy, targets, LENGTHS), compute_scores(reference, targets, LENGTHS), LENGTHS)


def test_a_loss_that_trl_lacks_gives_the_loss_and_the_metrics_of_the_same_one_of_trl(own_losses):
    policy, targets = make_logits(1)
    reference, _ = make_logits(2)
    gradients = []
    for names in (["sigmoid", "sft"], ["own_sigmoid", "sft"], ["own_sigmoid"]):
        logits = policy.clone().requires_grad_()
        output = compute_output(logits, reference, targets, loss_type=names, loss_weights=[2.0, 0.5][: len(names)])
        output.loss.backward()
        gradients.append((output, logits.grad))
    (trl, trl_gradient), (own, own_gradient), (alone, _) = gradients
    torch.testing.assert_close(own.loss, trl.loss)
    torch.testing.assert_close(own_gradient, trl_gradient)
    assert own.metrics == trl.metrics == alone.metrics and torch.equal(alone.rewards, trl.rewards)
    torch.testing.assert_close(alone.pair_loss, trl.pair_loss)
    torch.testing.assert_close(alone.loss, trl.pair_loss)


def test_a_loss_that_trl_lacks_adds_to_the_losses_of_trl(own_losses):
    policy, targets = make_logits(1)
    reference, _ = make_logits(2)

    def compute(*names):
        return float(compute_output(policy, reference, targets, loss_type=list(names)).loss)

    assert compute("hinge", "slic") == pytest.approx(compute("hinge") + compute("slic"), rel=1e-6)
    policy_chosen, policy_rejected = compute_scores(policy, targets, LENGTHS).log_probs.sum(1).chunk(2)
    assert compute("slic") == pytest.approx(float((0.1 - policy_chosen + policy_rejected).relu().mean()), rel=1e-6)


def test_the_value_at_zero_margin_of_a_loss_that_trl_lacks_is_known_or_not_checked(own_losses):
    assert PreferenceLoss(loss_type=["own_sigmoid", "hinge"]).compute_loss_at_zero_margin() == math.log(2) + 1.0
    assert PreferenceLoss(loss_type=["own_robust"], label_smoothing=0.2).compute_loss_at_zero_margin() == 0.8
    assert PreferenceLoss(loss_type=["slic", "hinge"]).compute_loss_at_zero_margin() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing: has no effect.*robust, aot, aot_unpaired, own_robust look at it"),
        ({"ld_alpha": 0.5}, "ld_alpha: applies to losses of TRL, not to own_sigmoid"),
        ({"use_weighting": True}, "use_weighting: applies to losses of TRL, not to own_sigmoid"),
        ({"f_divergence_type": "forward_kl"}, "not for own_sigmoid"),
    ],
)
def test_a_setting_that_does_not_apply_to_a_loss_is_refused(own_losses, settings, message):
    with pytest.raises(UserError, match=message):
        PreferenceLoss(loss_type=["own_sigmoid"], **settings)
