"""Bytes of one device while a stage trains: what stays (states) and what a micro-batch brings (activations).

States are exact arithmetic. Activations count what autograd keeps of transformers' own layers, tensor by tensor; a test
holds them against what it really keeps. Kernels that fuse keep less, so they are an upper estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.cost.shape import Shape, TextShape, VisionShape
from lit_vlm.types import HEAD_ROWS

WORKSPACE = 1.5e9  # bytes, assumed: CUDA context, cuBLAS and cuDNN work space, gaps between the allocator's blocks
LIVE = 1_000_000_000  # weights that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters, its default
AGAIN = {
    Level.none: 0.0,
    Level.selective: 0.2,
    Level.full: 1.0,
}  # of a layer's forward pass, in time, what the backward pass
# does again. The second is assumed: what it computes again are no products but passes over memory, which take a fifth of
# an eager 7B layer by its bytes and a GPU's memory
ADAM = 2  # AdamW's moments per trainable weight, each in the weight's own type
LOSS_BYTES = 8  # per logit beside itself, float32 each: the probabilities, and what they are made from


class Sharding(StrEnum):
    """How the states are shared by the devices."""

    single = "single"  # one device
    ddp = "ddp"  # a whole copy on each
    zero2 = "zero2"  # gradients and optimizer shared out
    zero3 = "zero3"  # weights as well (DeepSpeed)
    fsdp2 = "fsdp2"  # weights as well (PyTorch's fully_shard)
    hsdp = "hsdp"  # the same within a group of devices, each group a whole copy
    offload = "offload"  # ZeRO-3, and what is shared out lies in the host's memory


SHARDS_WEIGHTS = (Sharding.zero3, Sharding.fsdp2, Sharding.hsdp, Sharding.offload)
ZERO = (Sharding.zero2, Sharding.zero3, Sharding.offload)  # DeepSpeed's


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per value under one of Lightning's precisions."""

    weight: int  # weights, their gradients, and AdamW's moments
    residual: int  # the stream that the layers add to
    compute: int  # what the matrices multiply
    mixed: bool = False  # autocast computes with copies of the weights
    holds: bool = False  # frozen matrices are held in the type that computes

    @classmethod
    def named(cls, name: str) -> Precision:
        """Lightning's name: 32-true, bf16-mixed, bf16-true, ..."""
        if name.startswith(("32", "64")):
            size = 8 if name.startswith("64") else 4
            return cls(size, size, size)
        return cls(2, 2, 2) if name.endswith("true") else cls(4, 4, 2, mixed=True, holds=name == "bf16-mixed")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    trainable: int
    cast: int  # in matrices that gradients cross: everything but a frozen tower
    cast_frozen: int = 0  # of those, the ones that do not train
    held: int = 0  # frozen ones that are held in the type that computes, where a precision does (`model/frozen.py`)
    held_cast: int = 0  # of those, the ones that gradients cross
    reference: int = 0  # of a preference stage's frozen copy; 0 where it has none
    reference_matrices: int = 0  # of those, the ones that are held in the type that computes, where a precision does
    largest_layer: int = 0  # gathered at once where weights are shared out


@dataclass(frozen=True, slots=True)
class Training:
    """What of a stage decides how much memory it needs."""

    precision: Precision
    trains_language_model: bool
    trains_tower: bool
    checkpointing: Level = Level.none
    reference: int = 0  # parameters of a preference stage's frozen copy; 0 where it has none
    reference_held: int = 0  # of those, the ones that are held in the type that computes, where a precision does

    @property
    def again(self) -> float:
        """Of the layers' forward pass, what the backward pass does again, in time."""
        return AGAIN[self.checkpointing]


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what holds them, on one device at the peak: the end of the largest forward pass."""

    sharding: Sharding
    world_size: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory_of(
    shape: Shape, parameters: Parameters, training: Training, load: Load, sharding: Sharding, world_size: int = 1
) -> Memory:
    """The estimate for one device; `world_size` as in `states_of`."""
    states = states_of(parameters, training, sharding, world_size)
    activations = {
        "activations of text": load.tokens * activations_of_text(shape.text, training),
        "activations of images": load.tiles * activations_of_tile(shape, training),
        "logits": float(training.precision.compute + LOSS_BYTES) * min(load.supervised, HEAD_ROWS) * shape.text.vocab,
    }
    return Memory(sharding, world_size, states | activations | {"work space (assumed)": WORKSPACE})


def states_of(parameters: Parameters, training: Training, sharding: Sharding, world_size: int = 1) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and copies on one device.

    Args:
        world_size: devices that share one copy of the model; of `hsdp` those of a group.
    """
    if sharding in (Sharding.single, Sharding.ddp):
        return _whole_states(parameters, training, ddp=sharding is Sharding.ddp)
    if sharding in ZERO:
        return _zero_states(parameters, training, sharding, 1 / world_size)
    return _fsdp_states(parameters, training, 1 / world_size)


def _zero_states(parameters: Parameters, training: Training, sharding: Sharding, share: float) -> dict[str, float]:
    """DeepSpeed's: weights in the type that computes, beside float32 masters of those that train.

    "ZeRO", arXiv 1910.02054, section 3.1: 16 bytes per trainable weight, of them 2 for its gradient; here 4, for gradients
    are summed in float32.
    """
    compute, trainable = float(training.precision.compute), parameters.trainable
    kept = 0.0 if sharding is Sharding.offload else 1.0  # on the device
    spread = 1.0 if sharding is Sharding.zero2 else share * kept
    return {
        "weights": compute * parameters.total * spread,
        "float32 masters": 4.0 * trainable * share * kept,
        "gradients": 4.0 * trainable * share * kept,
        "AdamW's moments": 4.0 * ADAM * trainable * share * kept,
        "reference model": compute * training.reference * spread,
        "gathered layers": 0.0 if sharding is Sharding.zero2 else compute * min(parameters.total, LIVE),
    }


def _fsdp_states(parameters: Parameters, training: Training, share: float) -> dict[str, float]:
    """`fully_shard`'s: weights that train in their own type, cast as they are gathered; frozen ones as they are gathered."""
    size, trainable = float(training.precision.weight), parameters.trainable
    compute = float(training.precision.compute)
    return {
        "weights": (size * trainable + compute * (parameters.total - trainable)) * share,
        "gradients": size * trainable * share,
        "AdamW's moments": size * ADAM * trainable * share,
        "reference model": compute * training.reference * share,
        "gathered layers": 2
        * compute
        * parameters.largest_layer,  # two layers, or one and the head, which stays gathered
    }


def host_bytes(parameters: Parameters, training: Training, world_size: int, devices_per_node: int) -> float:
    """Of a node's memory under `offload`: what its devices would hold otherwise."""
    states = _zero_states(parameters, training, Sharding.zero3, 1 / world_size)
    return min(devices_per_node, world_size) * sum(size for name, size in states.items() if name != "gathered layers")


def _whole_states(parameters: Parameters, training: Training, *, ddp: bool) -> dict[str, float]:
    precision, trainable = training.precision, parameters.trainable
    size, saved = float(precision.weight), (precision.weight - precision.compute) * precision.holds
    # A frozen float32 weight's copy hangs on the graph of its layer, which checkpointing does not keep.
    hanging = parameters.cast_frozen - parameters.held_cast * precision.holds
    copied = parameters.cast - parameters.cast_frozen + hanging * (training.checkpointing is Level.none)
    return {
        "weights": size * parameters.total - saved * parameters.held,
        "half-precision copies": 2.0 * copied if precision.mixed else 0.0,
        "gradients": size * trainable,
        "DDP's buckets": size * trainable if ddp else 0.0,  # gradients once more, in the order they are sent
        "AdamW's moments": size * ADAM * trainable,
        "reference model": size * training.reference - saved * training.reference_held,
    }


def activations_of_text(text: TextShape, training: Training) -> float:
    """Bytes that are kept per token of the language model until its backward pass."""
    once = _norm(text, training) + 2 * training.precision.residual * text.head_dim  # the last norm; cosines and sines
    layer = _text_layer(text, training)
    if training.checkpointing is Level.none:
        return text.layers * layer + once
    kept = float(
        training.precision.residual * text.hidden
    )  # each layer's input, and one layer while it is computed again
    if training.checkpointing is Level.selective:
        kept += _text_products(text, training)
    return text.layers * kept + layer + once


def _text_products(text: TextShape, training: Training) -> float:
    """Results of a layer's products but the last, and of attention with its log-sums."""
    width = 2 * (text.query + text.key) + text.hidden + 2 * text.ffn
    return training.precision.compute * width + 4 * text.heads


def _text_layer(text: TextShape, training: Training) -> float:
    """Two norms, attention, and a gated feed-forward layer.

    A frozen matrix needs no input for its backward pass, a trained one does; under autocast each of the matrices that
    share an input (queries, keys, values; gate, up) keeps a copy of its own.
    """
    size = training.precision.compute
    attention = size * 2 * (text.query + text.key) + 4 * text.heads  # q, k, v, output; log-sums
    feed_forward = size * 3 * text.ffn  # gate, its activation, up
    kept = 2 * _norm(text, training) + attention + feed_forward
    if training.trains_language_model:
        inputs = (5 if training.precision.mixed else 2) * text.hidden
        kept += size * (inputs + text.query + text.ffn)
    return kept


def _norm(text: TextShape, training: Training) -> float:
    """RMSNorm: its input and scale in float32; the normed input where the gain trains."""
    return 4 * text.hidden + 4 + (training.precision.residual * text.hidden if training.trains_language_model else 0)


def activations_of_tile(shape: Shape, training: Training) -> float:
    """Bytes that are kept per tile: the tower where it trains, the projector, the features among the embeddings.

    A frozen tower keeps nothing: what its layers need for a moment is gone before the language model begins.
    """
    size, vision, hidden = training.precision.compute, shape.vision, shape.text.hidden
    projector = vision.patches * (size * (vision.width + 2 * hidden))  # two matrices' inputs and the activation's
    if not training.trains_tower:
        return projector
    pixels = size * 3 * vision.image_size**2
    layer = vision.positions * _tower_layer(vision, training)
    if training.checkpointing is Level.none:
        return pixels + projector + vision.layers * layer
    kept = float(training.precision.residual * vision.width)
    if training.checkpointing is Level.selective:  # products but the last, and attention
        kept += size * (5 * vision.width + vision.ffn)
    return pixels + projector + layer + vision.layers * vision.positions * kept


def _tower_layer(vision: VisionShape, training: Training) -> float:
    """Per position: two norms, attention, two matrices with an activation between them."""
    precision = training.precision
    norms = 2 * (precision.residual * vision.width + 8)
    inputs = (4 if precision.mixed else 2) * vision.width
    return norms + precision.compute * (inputs + 4 * vision.width + 2 * vision.ffn)
