"""Validation of stage=dpo: settings that TRL's preference losses reject, ignore or fail on."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import DPOStageConfig
from lit_vlm.config.settings import find_nearest, format_suggestion
from lit_vlm.types import format_count

# trl.DPOConfig.loss_type, TRL 1.16
LOSS_TYPES = tuple(
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
    " sigmoid_norm".split()
)
SORTING_LOSS_TYPES = ("aot", "aot_unpaired")
LABEL_SMOOTHING_LOSS_TYPES = ("exo_pair", "robust", "aot", "aot_unpaired")  # losses that use label_smoothing
F_DIVERGENCE_TYPES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
F_DIVERGENCE_LOSS_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


def find_preference_loss_errors(stage: DPOStageConfig) -> Iterator[str]:
    """Yield an error message for each setting with which TRL cannot compute the loss as intended."""
    names = stage.loss_type
    if not names:
        yield "stage.loss_type: is empty; name a loss, e.g. [sigmoid]."
    for name in names:
        if name not in LOSS_TYPES:
            detail = format_suggestion(find_nearest(name, LOSS_TYPES))
            yield f"stage.loss_type: there is no loss {name}; there are {', '.join(LOSS_TYPES)}.{detail}"
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield f"stage.loss_type: names {', '.join(repeated)} twice; give it one weight in loss_weights."
    weights = stage.loss_weights
    if weights is not None and len(weights) != len(names):
        detail = f"{format_count(len(weights), 'weight')} for {format_count(len(names), 'loss', 'losses')}"
        yield f"stage.loss_weights: {detail}; give one for each of loss_type."
    elif weights and not any(weights):
        yield "stage.loss_weights: every weight is 0, so nothing would be learnt."
    if "exo_pair" in names and stage.label_smoothing == 0:
        yield "stage.label_smoothing: must be above 0 for loss_type=exo_pair, found 0; its paper takes 1e-3."
    if stage.label_smoothing and not set(names) & set(LABEL_SMOOTHING_LOSS_TYPES):
        yield (
            f"stage.label_smoothing: has no effect on stage.loss_type={names}; in this TRL {', '.join(LABEL_SMOOTHING_LOSS_TYPES)} look at it."
            " For a DPO loss with flipped labels take loss_type=[robust]."
        )
    yield from _find_divergence_errors(stage)
    yield from _find_weighting_errors(stage)


def _find_divergence_errors(stage: DPOStageConfig) -> Iterator[str]:
    divergence = stage.f_divergence_type
    if divergence not in F_DIVERGENCE_TYPES:
        suggestion = format_suggestion(find_nearest(divergence, F_DIVERGENCE_TYPES))
        yield f"stage.f_divergence_type: expected one of {', '.join(F_DIVERGENCE_TYPES)}, found {divergence}.{suggestion}"
        return
    unsupported = [name for name in stage.loss_type if name in LOSS_TYPES and name not in F_DIVERGENCE_LOSS_TYPES]
    if divergence != "reverse_kl" and unsupported:
        yield (
            f"stage.f_divergence_type: {divergence} is defined for {', '.join(F_DIVERGENCE_LOSS_TYPES)}, not for {', '.join(unsupported)}."
            " Leave it at reverse_kl, or take other losses."
        )


def _find_weighting_errors(stage: DPOStageConfig) -> Iterator[str]:
    if not stage.use_weighting:
        return
    sorting = [name for name in stage.loss_type if name in SORTING_LOSS_TYPES]
    if sorting:
        yield (
            f"stage.use_weighting: WPO weights pairs, and {', '.join(sorting)} sorts the pairs' scores, so the weights would fall on"
            " other pairs. Leave one of them out."
        )
    if "sft" in stage.loss_type:
        yield (
            "stage.use_weighting: WPO weights pairs, and the loss type sft has none: TRL cannot compute the two together."
            " Leave one of them out."
        )
