"""Memory estimate of one device during training: model states, and activations of a micro-batch, in bytes.

States are computed exactly. Activations count the tensors that autograd stores for transformers' own layers; a test
compares them with the tensors that it really stores. Fused kernels store less, so the estimate is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.cost.shape import Shape, TextShape, VisionShape
from lit_vlm.types import HEAD_ROWS

WORKSPACE = 1.5e9  # bytes, assumed: CUDA context, cuBLAS and cuDNN workspace, fragmentation of the allocator
LIVE = 1_000_000_000  # maximum gathered weights under ZeRO-3: DeepSpeed's default of stage3_max_live_parameters
AGAIN = {
    Level.none: 0.0,
    Level.selective: 0.2,
    Level.full: 1.0,
}  # share of a layer's forward time that the backward pass
# computes again. The share of `selective` is assumed: it recomputes no matrix products, only memory-bound operations. These
# take a fifth of an eager 7B layer, by its bytes and a GPU's memory bandwidth
ADAM = 2  # AdamW's moments per trainable weight, each in the weight's dtype
LOSS_BYTES = 8  # per logit, in addition to the logit itself: probabilities and their input, float32 each


class Sharding(StrEnum):
    """Distribution of the model states over the devices."""

    single = "single"  # one device
    ddp = "ddp"  # a full copy on each device
    zero2 = "zero2"  # gradients and optimizer state are partitioned
    zero3 = "zero3"  # weights as well (DeepSpeed)
    fsdp2 = "fsdp2"  # weights as well (PyTorch's fully_shard)
    hsdp = "hsdp"  # the same within a group of devices; each group has a full copy
    offload = "offload"  # ZeRO-3, with the partitioned state in host memory


SHARDS_WEIGHTS = (Sharding.zero3, Sharding.fsdp2, Sharding.hsdp, Sharding.offload)
ZERO = (Sharding.zero2, Sharding.zero3, Sharding.offload)  # DeepSpeed's


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per value under one of Lightning's precisions."""

    weight: int  # weights, their gradients, and AdamW's moments
    residual: int  # the residual stream
    compute: int  # inputs of matrix products
    mixed: bool = False  # autocast makes low-precision copies of the weights
    holds: bool = False  # frozen matrices are stored in the compute dtype

    @classmethod
    def named(cls, name: str) -> Precision:
        """Make the precision from Lightning's name: 32-true, bf16-mixed, bf16-true, ..."""
        if name.startswith(("32", "64")):
            size = 8 if name.startswith("64") else 4
            return cls(size, size, size)
        return cls(2, 2, 2) if name.endswith("true") else cls(4, 4, 2, mixed=True, holds=name == "bf16-mixed")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters, by their treatment."""

    total: int
    trainable: int
    cast: int  # in matrices through which gradients pass: all except a frozen vision tower
    cast_frozen: int = 0  # the frozen ones among `autocast`
    held: int = 0  # frozen matrices, which some precisions store in the compute dtype (`model/frozen.py`)
    held_cast: int = 0  # the ones among `frozen_matrices` through which gradients pass
    reference: int = 0  # of a preference stage's reference model; 0 without one
    reference_matrices: int = 0  # its matrices, which some precisions store in the compute dtype
    largest_layer: int = 0  # largest unit that is gathered at once when weights are sharded


@dataclass(frozen=True, slots=True)
class Training:
    """Options of a stage that determine its memory."""

    precision: Precision
    trains_language_model: bool
    trains_tower: bool
    checkpointing: Level = Level.none
    reference: int = 0  # parameters of a preference stage's reference model; 0 without one
    reference_held: int = 0  # parameters in its matrices, which some precisions store in the compute dtype

    @property
    def again(self) -> float:
        """Share of the layers' forward time that the backward pass computes again."""
        return AGAIN[self.checkpointing]


@dataclass(frozen=True, slots=True)
class Load:
    """Size of a micro-batch: tokens, image tiles and loss positions."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one device at its peak, the end of the largest forward pass: bytes by purpose."""

    sharding: Sharding
    world_size: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


def memory_of(
    shape: Shape, parameters: Parameters, training: Training, load: Load, sharding: Sharding, world_size: int = 1
) -> Memory:
    """Estimate the memory of one device.

    Args:
        micro_batch: the largest micro-batch.
        world_size: as in `compute_state_bytes`.
    """
    states = states_of(parameters, training, sharding, world_size)
    activations = {
        "activations of text": load.tokens * activations_of_text(shape.text, training),
        "activations of images": load.tiles * activations_of_tile(shape, training),
        "logits": float(training.precision.compute + LOSS_BYTES) * min(load.supervised, HEAD_ROWS) * shape.text.vocab,
    }
    return Memory(sharding, world_size, states | activations | {"work space (assumed)": WORKSPACE})


def states_of(parameters: Parameters, training: Training, sharding: Sharding, world_size: int = 1) -> dict[str, float]:
    """Compute the bytes of weights, gradients, optimizer state and copies on one device.

    Args:
        world_size: number of devices that share one copy of the model; for `hsdp` the devices of a group.
    """
    if sharding in (Sharding.single, Sharding.ddp):
        return _whole_states(parameters, training, ddp=sharding is Sharding.ddp)
    if sharding in ZERO:
        return _zero_states(parameters, training, sharding, 1 / world_size)
    return _fsdp_states(parameters, training, 1 / world_size)


def _zero_states(parameters: Parameters, training: Training, sharding: Sharding, share: float) -> dict[str, float]:
    """Compute the state bytes under DeepSpeed: weights in the compute dtype, and float32 master weights of the trainable ones.

    "ZeRO", arXiv 1910.02054, section 3.1: 16 bytes per trainable weight, 2 of them for its gradient. Here the gradient
    takes 4, because gradients are summed in float32.
    """
    compute, trainable = float(training.precision.compute), parameters.trainable
    on_device = 0.0 if sharding is Sharding.offload else 1.0  # factor for states that offload moves to the host
    weight_share = 1.0 if sharding is Sharding.zero2 else share * on_device
    return {
        "weights": compute * parameters.total * weight_share,
        "float32 masters": 4.0 * trainable * share * on_device,
        "gradients": 4.0 * trainable * share * on_device,
        "AdamW's moments": 4.0 * ADAM * trainable * share * on_device,
        "reference model": compute * training.reference * weight_share,
        "gathered layers": 0.0 if sharding is Sharding.zero2 else compute * min(parameters.total, LIVE),
    }


def _fsdp_states(parameters: Parameters, training: Training, share: float) -> dict[str, float]:
    """Compute the state bytes under `fully_shard`.

    Trainable weights have their own dtype and are cast when they are gathered. Frozen weights are stored in the dtype in
    which they are gathered.
    """
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
    """Compute the host memory of a node under `offload`: the states that its devices would hold otherwise."""
    states = _zero_states(parameters, training, Sharding.zero3, 1 / world_size)
    return min(devices_per_node, world_size) * sum(size for name, size in states.items() if name != "gathered layers")


def _whole_states(parameters: Parameters, training: Training, *, ddp: bool) -> dict[str, float]:
    precision, trainable = training.precision, parameters.trainable
    size, saved_bytes = float(precision.weight), (precision.weight - precision.compute) * precision.holds
    # The copy of a frozen float32 weight belongs to the graph of its layer, which activation checkpointing does not keep.
    graph_copies = parameters.cast_frozen - parameters.held_cast * precision.holds
    copied = parameters.cast - parameters.cast_frozen + graph_copies * (training.checkpointing is Level.none)
    return {
        "weights": size * parameters.total - saved_bytes * parameters.held,
        "half-precision copies": 2.0 * copied if precision.mixed else 0.0,
        "gradients": size * trainable,
        "DDP's buckets": size * trainable if ddp else 0.0,  # a second copy of the gradients, in the order of sending
        "AdamW's moments": size * ADAM * trainable,
        "reference model": size * training.reference - saved_bytes * training.reference_held,
    }


def activations_of_text(text: TextShape, training: Training) -> float:
    """Compute the activation bytes per token of the language model, which are stored until its backward pass."""
    once = _norm(text, training) + 2 * training.precision.residual * text.head_dim  # final norm; RoPE
    layer = _text_layer(text, training)
    if training.checkpointing is Level.none:
        return text.layers * layer + once
    stored = float(
        training.precision.residual * text.hidden
    )  # the input of each layer, plus one full layer while it is recomputed
    if training.checkpointing is Level.selective:
        stored += _text_products(text, training)
    return text.layers * stored + layer + once


def _text_products(text: TextShape, training: Training) -> float:
    """Compute the bytes per token of a layer's matrix products except the last, and of attention with its log-sum-exp."""
    width = 2 * (text.query + text.key) + text.hidden + 2 * text.ffn
    return training.precision.compute * width + 4 * text.heads


def _text_layer(text: TextShape, training: Training) -> float:
    """Compute the activation bytes per token of one layer: two norms, attention, and a gated feed-forward layer.

    A trained matrix stores its input for the backward pass, a frozen one does not. Under autocast, matrices that share an
    input (queries, keys, values; gate, up) store one copy each.
    """
    size = training.precision.compute
    attention = size * 2 * (text.query + text.key) + 4 * text.heads  # q, k, v, output; log-sum-exp
    feed_forward = size * 3 * text.ffn  # gate, its activation, up
    stored = 2 * _norm(text, training) + attention + feed_forward
    if training.trains_language_model:
        inputs = (5 if training.precision.mixed else 2) * text.hidden
        stored += size * (inputs + text.query + text.ffn)
    return stored


def _norm(text: TextShape, training: Training) -> float:
    """Compute the bytes per token of an RMSNorm: input and scale in float32, and the normed input if the gain trains."""
    return 4 * text.hidden + 4 + (training.precision.residual * text.hidden if training.trains_language_model else 0)


def activations_of_tile(shape: Shape, training: Training) -> float:
    """Compute the activation bytes per tile: a trained vision tower, the projector, the features among the embeddings.

    A frozen tower stores nothing: its temporary tensors are freed before the language model begins.
    """
    size, vision, hidden = training.precision.compute, shape.vision, shape.text.hidden
    projector = vision.patches * (size * (vision.width + 2 * hidden))  # two matrices' inputs and the activation's
    if not training.trains_tower:
        return projector
    pixels = size * 3 * vision.image_size**2
    layer = vision.positions * _tower_layer(vision, training)
    if training.checkpointing is Level.none:
        return pixels + projector + vision.layers * layer
    stored = float(training.precision.residual * vision.width)
    if training.checkpointing is Level.selective:  # matrix products except the last, and attention
        stored += size * (5 * vision.width + vision.ffn)
    return pixels + projector + layer + vision.layers * vision.positions * stored


def _tower_layer(vision: VisionShape, training: Training) -> float:
    """Compute the bytes per position of a tower layer: two norms, attention, two matrices with an activation between them."""
    precision = training.precision
    norms = 2 * (precision.residual * vision.width + 8)
    inputs = (4 if precision.mixed else 2) * vision.width
    return norms + precision.compute * (inputs + 4 * vision.width + 2 * vision.ffn)
