"""Layer costs of a model: the units that a strategy gathers one by one, each with its compute seconds."""

from __future__ import annotations

from lit_vlm.cost.communication import Layer
from lit_vlm.cost.memory import Load, Parameters, Training
from lit_vlm.cost.shape import Shape

SEGMENT = 2048  # tokens of a sample, assumed for attention if unknown: attention is 3 % to 8 % of a layer's work


def layers_of(
    shape: Shape, parameters: Parameters, training: Training, load: Load, rate: float, segment: float = SEGMENT
) -> list[Layer]:
    """Build the costs of all layers in forward order: vision tower, projector, embeddings, language model, head.

    A reference model is appended as layers without a backward pass.

    Args:
        micro_batch: size of a micro-batch on one device.
        flops_per_second: speed that the device reaches.
        segment_tokens: tokens of a sample.
    """
    text, vision = shape.text, shape.vision
    trains_language_model, trains_tower = training.trains_language_model, training.trains_tower
    table, projector = float(text.hidden * text.vocab), float(shape.projector)
    remaining_parameters = (
        parameters.total - vision.layers * vision.layer - projector - text.layers * text.layer - table
    )
    untied_head = table if remaining_parameters > table / 2 else 0.0  # 0 if the head is tied
    trains = (
        projector
        + vision.layers * vision.layer * trains_tower
        + (text.layers * text.layer + table + untied_head) * trains_language_model
    )
    share = min(1.0, parameters.trainable / trains)  # far below 1 with LoRA

    def layer(size: float, flops: float, *, trained: bool, crossed: bool = True, again: bool = False) -> Layer:
        backward = crossed * (1 + trained + again * training.again)
        return Layer(size, share * size * trained, flops / rate, backward * flops / rate)

    patches = load.tiles * vision.patches
    tower_flops = 2.0 * patches * (vision.layer + 2.0 * vision.patches * vision.width)
    text_flops = 2.0 * load.tokens * (text.layer + segment * text.query)
    policy = [
        *[layer(float(vision.layer), tower_flops, trained=trains_tower, crossed=trains_tower, again=True)]
        * vision.layers,
        layer(projector, 2.0 * patches * projector, trained=True),
        layer(table, 0.0, trained=trains_language_model),
        *[layer(float(text.layer), text_flops, trained=trains_language_model, again=True)] * text.layers,
        layer(untied_head, 2.0 * load.supervised * table, trained=trains_language_model),
    ]
    return [*policy, *map(_only_forward, policy)] if training.reference else policy


def _only_forward(layer: Layer) -> Layer:
    """Return the same layer for a reference model: without a backward pass and without trainable parameters."""
    return Layer(layer.parameters, 0.0, layer.forward, 0.0)
