"""Registry of preference losses: what each name of `stage.loss_type` needs, and the losses that TRL lacks.

TRL's own code computes its losses (`losses/preference.py`). To add a loss that TRL lacks, add an entry with `compute` to
`PREFERENCE_LOSSES`: settings, checks and the preference loss read this registry.

The module does not import torch, so that the configuration can read the names without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

# Settings of the stage that apply to some losses only.
LABEL_SMOOTHING, F_DIVERGENCE = "label_smoothing", "f_divergence_type"
PreferenceSettings: TypeAlias = Any  # `DPOStageConfig`: beta, label_smoothing, ...


@dataclass(frozen=True, slots=True)
class PairLogProbs:
    """Log-probabilities of P pairs, [P] nats each: sums over the tokens of an answer."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLossType:
    """A preference loss.

    Attributes:
        compute_zero_margin: computes the loss of a pair while policy and reference model are equal, which the first step
            must have; None: it depends on the data.
        options: settings that apply to it, of the two above.
        compute: computes the loss of each pair, [P]; None: TRL computes it, also with `use_weighting` and `ld_alpha`.
        sorts_batch: it sorts the scores of all pairs, so it needs the whole batch at once.
        is_token_mean: it is a mean over tokens of the chosen answers, and not over pairs.
    """

    compute_zero_margin: Callable[[PreferenceSettings], float] | None
    options: frozenset[str] = frozenset()
    compute: Callable[[PairLogProbs, PreferenceSettings], Tensor] | None = None
    sorts_batch: bool = False
    is_token_mean: bool = False


def _make_trl_loss(
    compute_zero_margin: Callable[[PreferenceSettings], float] | float | None,
    *options: str,
    sorts_batch: bool = False,
    is_token_mean: bool = False,
) -> PreferenceLossType:
    """Make the entry of a loss of TRL, from the function of its value at zero margin or the value itself."""
    compute = (lambda _: compute_zero_margin) if isinstance(compute_zero_margin, float) else compute_zero_margin
    return PreferenceLossType(
        compute_zero_margin=compute,
        options=frozenset(options),
        sorts_batch=sorts_batch,
        is_token_mean=is_token_mean,
    )


def _compute_exo_zero_margin(settings: PreferenceSettings) -> float:
    smooth = settings.label_smoothing
    return math.log(0.5) - 0.5 * (math.log(1 - smooth) + math.log(smooth))


# Names of trl.DPOConfig.loss_type, TRL 1.16.
PREFERENCE_LOSSES: dict[str, PreferenceLossType] = {
    "sigmoid": _make_trl_loss(math.log(2), F_DIVERGENCE),
    "hinge": _make_trl_loss(1.0, F_DIVERGENCE),
    "ipo": _make_trl_loss(lambda settings: 1 / (4 * settings.beta**2), F_DIVERGENCE),
    "exo_pair": _make_trl_loss(_compute_exo_zero_margin, LABEL_SMOOTHING, F_DIVERGENCE),
    "nca_pair": _make_trl_loss(2 * math.log(2)),
    "robust": _make_trl_loss(math.log(2), LABEL_SMOOTHING, F_DIVERGENCE),
    "bco_pair": _make_trl_loss(2 * math.log(2)),
    "sppo_hard": _make_trl_loss(lambda settings: 0.5 / settings.beta**2),
    "aot": _make_trl_loss(math.log(2), LABEL_SMOOTHING, sorts_batch=True),
    "aot_unpaired": _make_trl_loss(math.log(2), LABEL_SMOOTHING, sorts_batch=True),
    "apo_zero": _make_trl_loss(1.0),
    "apo_down": _make_trl_loss(1.0),
    "discopop": _make_trl_loss(0.5 * math.log(2) + 0.5, F_DIVERGENCE),
    "sft": _make_trl_loss(None, F_DIVERGENCE, is_token_mean=True),
    "sigmoid_norm": _make_trl_loss(math.log(2), F_DIVERGENCE),
}


def list_losses_with(option: str) -> list[str]:
    """List the losses to which a setting applies."""
    return [name for name, loss in PREFERENCE_LOSSES.items() if option in loss.options]


def find_sorting_losses(names: list[str]) -> list[str]:
    """Find the losses among `names` that sort the whole batch."""
    return [name for name in names if name in PREFERENCE_LOSSES and PREFERENCE_LOSSES[name].sorts_batch]
