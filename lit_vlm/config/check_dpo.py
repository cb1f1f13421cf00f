"""Validation of stage=dpo: settings that TRL's preference losses reject, ignore or fail on."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import DPOStageConfig
from lit_vlm.config.settings import did_you_mean, nearest
from lit_vlm.types import counted

# trl.DPOConfig.loss_type, TRL 1.16
LOSSES = tuple(
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
    " sigmoid_norm".split()
)
SORTS_THE_BATCH = ("aot", "aot_unpaired")
SMOOTHS = ("exo_pair", "robust", "aot", "aot_unpaired")  # losses that use label_smoothing
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
OF_THE_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


def mistakes_in_preference_loss(stage: DPOStageConfig) -> Iterator[str]:
    """Yield an error message for each setting with which TRL cannot compute the loss as intended."""
    names = stage.loss_type
    if not names:
        yield "stage.loss_type: is empty; name a loss, e.g. [sigmoid]."
    for name in names:
        if name not in LOSSES:
            detail = did_you_mean(nearest(name, LOSSES))
            yield f"stage.loss_type: there is no loss {name}; there are {', '.join(LOSSES)}.{detail}"
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield f"stage.loss_type: names {', '.join(repeated)} twice; give it one weight in loss_weights."
    weights = stage.loss_weights
    if weights is not None and len(weights) != len(names):
        detail = f"{counted(len(weights), 'weight')} for {counted(len(names), 'loss', 'losses')}"
        yield f"stage.loss_weights: {detail}; give one for each of loss_type."
    elif weights and not any(weights):
        yield "stage.loss_weights: every weight is 0, so nothing would be learnt."
    if "exo_pair" in names and stage.label_smoothing == 0:
        yield "stage.label_smoothing: must be above 0 for loss_type=exo_pair, found 0; its paper takes 1e-3."
    if stage.label_smoothing and not set(names) & set(SMOOTHS):
        yield (
            f"stage.label_smoothing: has no effect on stage.loss_type={names}; in this TRL {', '.join(SMOOTHS)} look at it."
            " For a DPO loss with flipped labels take loss_type=[robust]."
        )
    yield from _divergence(stage)
    yield from _weighting(stage)


def _divergence(stage: DPOStageConfig) -> Iterator[str]:
    divergence = stage.f_divergence_type
    if divergence not in DIVERGENCES:
        suggestion = did_you_mean(nearest(divergence, DIVERGENCES))
        yield f"stage.f_divergence_type: expected one of {', '.join(DIVERGENCES)}, found {divergence}.{suggestion}"
        return
    unsupported = [name for name in stage.loss_type if name in LOSSES and name not in OF_THE_DIFFERENCE]
    if divergence != "reverse_kl" and unsupported:
        yield (
            f"stage.f_divergence_type: {divergence} is defined for {', '.join(OF_THE_DIFFERENCE)}, not for {', '.join(unsupported)}."
            " Leave it at reverse_kl, or take other losses."
        )


def _weighting(stage: DPOStageConfig) -> Iterator[str]:
    if not stage.use_weighting:
        return
    sorting = [name for name in stage.loss_type if name in SORTS_THE_BATCH]
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
