"""Layer costs of a model: the units that a strategy gathers one by one, each with its compute seconds."""

from __future__ import annotations

from lit_vlm.cost.communication import LayerCost
from lit_vlm.cost.memory import MicroBatchSize, ParameterCounts, TrainingOptions
from lit_vlm.cost.model_shape import ModelShape

SEGMENT_TOKENS = 2048  # tokens of a sample, assumed for attention if unknown: attention is 3 % to 8 % of a layer's work


def build_layer_costs(
    shape: ModelShape,
    parameters: ParameterCounts,
    training: TrainingOptions,
    micro_batch: MicroBatchSize,
    flops_per_second: float,
    segment_tokens: float = SEGMENT_TOKENS,
) -> list[LayerCost]:
    """Build the costs of all layers in forward order: vision tower, projector, embeddings, language model, head.

    A reference model is appended as layers without a backward pass.

    Args:
        micro_batch: size of a micro-batch on one device.
        flops_per_second: speed that the device reaches.
        segment_tokens: tokens of a sample.
    """
    text, vision = shape.text, shape.vision
    trains_language_model, trains_tower = training.trains_language_model, training.trains_tower
    table, projector = float(text.hidden_size * text.vocab_size), float(shape.projector_parameters)
    remaining_parameters = (
        parameters.total
        - vision.num_layers * vision.layer_parameters
        - projector
        - text.num_layers * text.layer_parameters
        - table
    )
    untied_head = table if remaining_parameters > table / 2 else 0.0  # 0 if the head is tied
    trains = (
        projector
        + vision.num_layers * vision.layer_parameters * trains_tower
        + (text.num_layers * text.layer_parameters + table + untied_head) * trains_language_model
    )
    share = min(1.0, parameters.trainable / trains)  # far below 1 with LoRA

    def make_layer(
        size: float, flops: float, *, is_trained: bool, has_backward: bool = True, is_recomputed: bool = False
    ) -> LayerCost:
        backward = has_backward * (1 + is_trained + is_recomputed * training.recomputed_share)
        return LayerCost(size, share * size * is_trained, flops / flops_per_second, backward * flops / flops_per_second)

    patches = micro_batch.tiles * vision.num_patches
    tower_flops = 2.0 * patches * (vision.layer_parameters + 2.0 * vision.num_patches * vision.hidden_size)
    text_flops = 2.0 * micro_batch.tokens * (text.layer_parameters + segment_tokens * text.query_width)
    tower_size = float(vision.layer_parameters)
    tower_layer = make_layer(
        tower_size, tower_flops, is_trained=trains_tower, has_backward=trains_tower, is_recomputed=True
    )
    policy = [
        *[tower_layer] * vision.num_layers,
        make_layer(projector, float(micro_batch.tiles * shape.projector_flops), is_trained=True),
        make_layer(table, 0.0, is_trained=trains_language_model),
        *[make_layer(float(text.layer_parameters), text_flops, is_trained=trains_language_model, is_recomputed=True)]
        * text.num_layers,
        make_layer(untied_head, 2.0 * micro_batch.supervised * table, is_trained=trains_language_model),
    ]
    return [*policy, *map(_drop_backward, policy)] if training.reference_parameters else policy


def _drop_backward(layer: LayerCost) -> LayerCost:
    """Return the same layer for a reference model: without a backward pass and without trainable parameters."""
    return LayerCost(layer.parameters, 0.0, layer.forward_seconds, 0.0)
