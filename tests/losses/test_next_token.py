"""Chunked log-probabilities of rows against plain logits and autograd."""

import pytest
import torch

from lit_vlm.losses import next_token
from lit_vlm.losses.next_token import compute_token_log_probs
from lit_vlm.types import LOGITS_CHUNK_TOKENS

ROWS, WIDTH, VOCAB = 23, 12, 50


def make_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    own = torch.randn(3, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[:4] = torch.tensor([7, 7, 31, 49])
    return hidden, weight, own, targets


def compute_plainly(hidden, weight, targets, token_ids=None, token_rows=None):
    logits = hidden @ weight.T
    if token_ids is not None:
        logits = logits.index_copy(-1, token_ids, hidden @ token_rows.T)
    return logits.float(), logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("chunk", [LOGITS_CHUNK_TOKENS, ROWS, 8, 1])
@pytest.mark.parametrize("with_own", [False, True])
def test_chunked_log_probs_and_gradients_equal_those_of_all_logits_at_once(chunk, with_own):
    hidden, weight, own, targets = make_tensors()
    factors = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    more = {"token_ids": torch.tensor([7, 31, 49]), "token_rows": own} if with_own else {}
    logits, expected = compute_plainly(hidden, weight, targets, **more)
    wanted = (hidden, weight, own) if with_own else (hidden, weight)
    theirs = torch.autograd.grad((expected * factors).sum(), wanted)
    scores = compute_token_log_probs(hidden, weight, targets, statistics=True, chunk_size=chunk, **more)
    ours = torch.autograd.grad((scores[0] * factors).sum(), wanted)
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    probs = logits.softmax(-1)
    torch.testing.assert_close(scores[1], -(probs * probs.log()).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[2], logits.mean(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(scores[3], logits.argmax(-1) == targets)
    torch.testing.assert_close(scores[4], (probs**2).sum(-1).log(), atol=1e-5, rtol=1e-5)
    assert not any(statistic.requires_grad for statistic in scores[1:])


def test_frozen_tensors_get_no_gradient():
    hidden, weight, _, targets = make_tensors()
    (log_probs,) = compute_token_log_probs(hidden, weight.detach(), targets, chunk_size=8)
    log_probs.sum().backward()
    assert hidden.grad is not None and weight.grad is None
    (log_probs,) = compute_token_log_probs(hidden.detach(), weight, targets, chunk_size=8)
    log_probs.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("chunk", [LOGITS_CHUNK_TOKENS, 8])
def test_under_autocast_products_use_its_type_and_sums_stay_in_float32(chunk):
    hidden, weight, _, targets = make_tensors()
    with torch.autocast("cpu", torch.bfloat16):
        logits = (hidden @ weight.T).float()
        (log_probs,) = compute_token_log_probs(hidden, weight, targets, chunk_size=chunk)
    assert log_probs.dtype == torch.float32
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    ours = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert torch.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > 0.9999


def test_the_sum_over_the_vocabulary_is_taken_in_parts_of_the_same_value(monkeypatch):
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    for elements in (1, 100, 10_000):
        monkeypatch.setattr(next_token, "LOGSUMEXP_ELEMENTS", elements)
        assert torch.equal(next_token._compute_log_normalizer(logits), logits.logsumexp(-1))


def test_a_second_backward_pass_through_overwritten_logits_is_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    (log_probs,) = next_token.compute_token_log_probs(hidden, weight, torch.tensor([1, 2, 8]))
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        log_probs.sum().backward()


def test_no_more_than_a_chunk_of_logits_is_saved_for_the_backward_pass():
    hidden, weight, _, targets = make_tensors()
    largest = {}
    for chunk in (ROWS, 4):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            compute_token_log_probs(hidden, weight, targets, chunk_size=chunk)
        largest[chunk] = max(sizes)
    assert largest[ROWS] == ROWS * VOCAB and largest[4] == VOCAB * WIDTH
