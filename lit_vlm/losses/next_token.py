"""Next-token loss: cross-entropy as log-probabilities of the supervised tokens, computed in chunks of rows.

Logits of 16 thousand rows over 152 thousand tokens take 10 GB in float32, and their gradient as much again. Here at
most one chunk of them exists at a time: forward keeps one number per row, and backward recomputes the logits of a
chunk. When all rows fit into one chunk, its logits are kept and nothing is recomputed. A chunk is large enough for the
matrix product to run at full speed.

Nothing is averaged here. Micro-batches and ranks hold different numbers of supervised tokens, so the stage divides the
sum once, by the count over the whole optimizer step. A mean of means would give short answers too much weight.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_vlm.types import LOGITS_CHUNK_TOKENS

# Shapes: R rows (supervised positions), C rows of a chunk, D width, V vocabulary size, n tokens with rows of their own.

TokenScores: TypeAlias = tuple[Tensor, ...]
LOGSUMEXP_ELEMENTS = 1 << 24  # logits whose log-sum-exp is computed at a time


def compute_next_token_loss(token_losses: Tensor, num_step_tokens: int) -> Tensor:
    """Compute a micro-batch's part of the next-token loss, [] nats: cross_entropy, a mean over the optimizer step's tokens.

    Args:
        token_losses: [R], `F.cross_entropy(..., reduction="none")`: the negative of `compute_token_log_probs`.
        num_step_tokens: supervised tokens of the whole step, on all ranks.
    """
    return token_losses.sum() / max(1, num_step_tokens)


def compute_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_ids: Tensor | None = None,
    token_rows: Tensor | None = None,
    statistics: bool = False,
    chunk_size: int = LOGITS_CHUNK_TOKENS,
) -> TokenScores:
    """Compute the log-probability of each row's target token, [R] float32: `-F.cross_entropy(..., reduction="none")`.

    Under autocast the matrix products run in its type.

    Args:
        hidden: [R, D].
        weight: [V, D], the head's matrix.
        targets: [R] token ids.
        token_ids: [n] tokens whose rows are those of `token_rows` [n, D] and not the matrix's.
        statistics: return more about each row, without gradients.
        chunk_size: maximum number of rows whose logits exist at a time.

    Returns:
        log-probabilities [R]; with `statistics` also the entropy in nats, the mean logit, whether the target is the
        most likely token, and the log of the sum of squared probabilities, [R] each.
    """
    return _ChunkedLogProbs.apply(hidden, weight, targets, token_ids, token_rows, statistics, chunk_size)  # type: ignore[no-any-return]


class _ChunkedLogProbs(torch.autograd.Function):
    """Autograd function of the log-probabilities, with logits computed in chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_ids: Tensor | None,
        token_rows: Tensor | None,
        statistics: bool,
        chunk_size: int,
    ) -> TokenScores:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            matrix, token_matrix = weight.to(dtype), None if token_rows is None else token_rows.to(dtype)
            parts, log_normalizers, kept = [], [], []
            for start in range(0, len(hidden), chunk_size):
                logits = _compute_logits(hidden[start : start + chunk_size].to(dtype), matrix, token_ids, token_matrix)
                log_normalizer = _compute_log_normalizer(logits)
                parts.append(
                    _compute_chunk_scores(logits, targets[start : start + chunk_size], log_normalizer, statistics)
                )
                log_normalizers.append(log_normalizer)
                kept.append(logits)
                if len(hidden) > chunk_size:
                    kept.clear()
        scores = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, token_ids, token_rows, torch.cat(log_normalizers), *kept)
        ctx.dtype, ctx.chunk = dtype, chunk_size
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        hidden, weight, targets, token_ids, token_rows, log_normalizers, *kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_token_rows = (ctx.needs_input_grad[i] for i in (0, 1, 4))
        dtype, chunk_size = ctx.dtype, ctx.chunk
        matrix, token_matrix = weight.to(dtype), None if token_rows is None else token_rows.to(dtype)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = d_token_rows = d_new = None  # sums over chunks are in float32, whatever type multiplies
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            inputs = hidden[part].to(dtype)
            logits = kept[0] if kept else _compute_logits(inputs, matrix, token_ids, token_matrix)
            # in place: logits that were kept, or computed just now, are not needed again
            d_logits = logits.float().sub_(log_normalizers[part, None]).exp_().neg_()
            d_logits[torch.arange(len(d_logits), device=d_logits.device), targets[part]] += 1
            d_logits = d_logits.mul_(gradient[part, None]).to(dtype)
            if token_ids is not None:
                d_new = d_logits[:, token_ids]
                d_logits.index_fill_(1, token_ids, 0.0)
            if d_hidden is not None:
                product = d_logits @ matrix
                no_rows = d_new is None or token_matrix is None
                d_hidden[part] = product if no_rows else product + d_new @ token_matrix  # type: ignore[operator]
            if wants_weight:
                d_weight = _accumulate(d_weight, d_logits.T @ inputs)
            if wants_token_rows and d_new is not None:
                d_token_rows = _accumulate(d_token_rows, d_new.T @ inputs)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None,
            None if d_token_rows is None else d_token_rows.to(token_rows.dtype),
            None,
            None,
        )


def _accumulate(total: Tensor | None, part: Tensor) -> Tensor:
    return part.float() if total is None else total.add_(part)


def _compute_logits(hidden: Tensor, matrix: Tensor, token_ids: Tensor | None, token_rows: Tensor | None) -> Tensor:
    """Compute logits [C, V] of one chunk, with the logits of tokens that have rows of their own."""
    logits = F.linear(hidden, matrix)
    if token_ids is None or token_rows is None:
        return logits
    return logits.index_copy_(-1, token_ids, F.linear(hidden, token_rows))


def _compute_log_normalizer(logits: Tensor) -> Tensor:
    """Compute the log-sum-exp of each row in float32, [C]. Its temporary tensor is as large as what it gets."""
    rows = max(1, LOGSUMEXP_ELEMENTS // logits.shape[-1])
    return torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])


def _compute_chunk_scores(logits: Tensor, targets: Tensor, log_normalizer: Tensor, statistics: bool) -> TokenScores:
    """Compute the scores of one chunk, [C] each."""
    log_probs = logits.gather(-1, targets[:, None]).squeeze(-1).float() - log_normalizer
    if not statistics:
        return (log_probs,)
    logits = logits.float()
    log_probs_all = logits - log_normalizer[:, None]
    return (
        log_probs,
        -(log_probs_all.exp() * log_probs_all).sum(-1),
        logits.mean(-1),
        logits.argmax(-1) == targets,
        (2 * log_probs_all).logsumexp(-1),
    )
