"""Memory and speed of the devices that `preflight.device` names, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import DeviceName
from lit_vlm.cost.model_shape import ModelShape, TextShape, VisionShape
from lit_vlm.types import LOGITS_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Device:
    """Accelerator with its memory and its peak speed."""

    name: str
    memory_bytes: float  # bytes; the sheet's GB as 10^9 bytes: drivers report a little more, CUDA contexts use a little
    peak_flops_per_second: (
        float  # FLOP/s, bfloat16 on tensor cores, dense (data sheets also give twice that, with sparsity)
    )

    def estimate_seconds(self, flops: float, *, devices: int, utilisation: float, balance: float = 1.0) -> float:
        """Estimate the seconds for a number of FLOPs.

        Args:
            flops: FLOPs of all devices together.
            devices: number of devices.
            utilisation: share of the peak that a device reaches while it computes.
            balance: mean work of the devices divided by the largest work, because devices wait for each other.
        """
        return flops / (devices * self.peak_flops_per_second * utilisation * balance)


DEVICES = {
    # nvidia.com/en-us/data-center/h200: 141 GB, 1,979 TFLOPS with sparsity (SXM)
    DeviceName.h200: Device("NVIDIA H200", 141e9, 989e12),
    # nvidia.com/en-us/data-center/h100: 80 GB, 1,979 TFLOPS with sparsity (SXM)
    DeviceName.h100: Device("NVIDIA H100 80 GB", 80e9, 989e12),
    # nvidia.com/en-us/data-center/a100: 312 TFLOPS without sparsity, PCIe and SXM
    DeviceName.a100_80gb: Device("NVIDIA A100 80 GB", 80e9, 312e12),
    DeviceName.a100_40gb: Device("NVIDIA A100 40 GB", 40e9, 312e12),
    # nvidia.com/en-us/data-center/l40s: 48 GB, 362 TFLOPS without sparsity
    DeviceName.l40s: Device("NVIDIA L40S", 48e9, 362e12),
    # "NVIDIA Ada GPU Architecture", appendix A: 24 GB, 165.2 TFLOPS with float32 accumulation
    DeviceName.rtx4090: Device("NVIDIA RTX 4090", 24e9, 165.2e12),
}


WORKSPACE_BYTES = 1.5e9  # bytes, assumed: CUDA context, cuBLAS and cuDNN workspace, fragmentation of the allocator
MAX_LIVE_PARAMETERS = (
    1_000_000_000  # maximum gathered weights under ZeRO-3: DeepSpeed's default of stage3_max_live_parameters
)
RECOMPUTED_SHARES = {
    Level.none: 0.0,
    Level.selective: 0.2,
    Level.full: 1.0,
}  # share of a layer's forward time that the backward pass
# computes again. The share of `selective` is assumed: it recomputes no matrix products, only memory-bound operations. These
# take a fifth of an eager 7B layer, by its bytes and a GPU's memory bandwidth
NUM_ADAM_MOMENTS = 2  # AdamW's moments per trainable weight, each in the weight's dtype
LOSS_BYTES_PER_LOGIT = 8  # per logit, in addition to the logit itself: probabilities and their input, float32 each


class Sharding(StrEnum):
    """Distribution of the model states over the devices."""

    single = "single"  # one device
    ddp = "ddp"  # a full copy on each device
    zero2 = "zero2"  # gradients and optimizer state are partitioned
    zero3 = "zero3"  # weights as well (DeepSpeed)
    fsdp2 = "fsdp2"  # weights as well (PyTorch's fully_shard)
    hsdp = "hsdp"  # the same within a group of devices; each group has a full copy
    offload = "offload"  # ZeRO-3, with the partitioned state in host memory


WEIGHT_SHARDINGS = (Sharding.zero3, Sharding.fsdp2, Sharding.hsdp, Sharding.offload)
ZERO_SHARDINGS = (Sharding.zero2, Sharding.zero3, Sharding.offload)  # DeepSpeed's


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per value under one of Lightning's precisions."""

    weight_bytes: int  # weights, their gradients, and AdamW's moments
    residual_bytes: int  # the residual stream
    compute_bytes: int  # inputs of matrix products
    is_mixed: bool = False  # autocast makes low-precision copies of the weights
    stores_frozen_in_compute_dtype: bool = False  # frozen matrices are stored in the compute dtype

    @classmethod
    def from_name(cls, name: str) -> Precision:
        """Make the precision from Lightning's name: 32-true, bf16-mixed, bf16-true, ..."""
        if name.startswith(("32", "64")):
            size = 8 if name.startswith("64") else 4
            return cls(size, size, size)
        return (
            cls(2, 2, 2)
            if name.endswith("true")
            else cls(4, 4, 2, is_mixed=True, stores_frozen_in_compute_dtype=name == "bf16-mixed")
        )


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters, by their treatment."""

    total: int
    trainable: int
    autocast: int  # in matrices through which gradients pass: all except a frozen vision tower
    autocast_frozen: int = 0  # the frozen ones among `autocast`
    frozen_matrices: int = 0  # frozen matrices, which some precisions store in the compute dtype (`model/frozen.py`)
    autocast_frozen_matrices: int = 0  # the ones among `frozen_matrices` through which gradients pass
    reference: int = 0  # of a preference stage's reference model; 0 without one
    reference_matrices: int = 0  # its matrices, which some precisions store in the compute dtype
    largest_layer: int = 0  # largest unit that is gathered at once when weights are sharded


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Options of a stage that determine its memory."""

    precision: Precision
    trains_language_model: bool
    trains_tower: bool
    checkpointing: Level = Level.none
    reference_parameters: int = 0  # parameters of a preference stage's reference model; 0 without one
    reference_matrices: int = 0  # parameters in its matrices, which some precisions store in the compute dtype

    @property
    def recomputed_share(self) -> float:
        """Share of the layers' forward time that the backward pass computes again."""
        return RECOMPUTED_SHARES[self.checkpointing]


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """Size of a micro-batch: tokens, image tiles and loss positions."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of one device at its peak, the end of the largest forward pass: bytes by purpose."""

    sharding: Sharding
    world_size: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


def estimate_memory(
    shape: ModelShape,
    parameters: ParameterCounts,
    training: TrainingOptions,
    micro_batch: MicroBatchSize,
    sharding: Sharding,
    world_size: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of one device.

    Args:
        micro_batch: the largest micro-batch.
        world_size: as in `compute_state_bytes`.
    """
    states = compute_state_bytes(parameters, training, sharding, world_size)
    activations = {
        "activations of text": micro_batch.tokens * compute_text_activation_bytes(shape.text, training),
        "activations of images": micro_batch.tiles * compute_tile_activation_bytes(shape, training),
        "logits": float(training.precision.compute_bytes + LOSS_BYTES_PER_LOGIT)
        * min(micro_batch.supervised, LOGITS_CHUNK_TOKENS)
        * shape.text.vocab_size,
    }
    return MemoryEstimate(sharding, world_size, states | activations | {"work space (assumed)": WORKSPACE_BYTES})


def compute_state_bytes(
    parameters: ParameterCounts, training: TrainingOptions, sharding: Sharding, world_size: int = 1
) -> dict[str, float]:
    """Compute the bytes of weights, gradients, optimizer state and copies on one device.

    Args:
        world_size: number of devices that share one copy of the model; for `hsdp` the devices of a group.
    """
    if sharding in (Sharding.single, Sharding.ddp):
        return _compute_replicated_state_bytes(parameters, training, ddp=sharding is Sharding.ddp)
    if sharding in ZERO_SHARDINGS:
        return _compute_zero_state_bytes(parameters, training, sharding, 1 / world_size)
    return _compute_fsdp_state_bytes(parameters, training, 1 / world_size)


def _compute_zero_state_bytes(
    parameters: ParameterCounts, training: TrainingOptions, sharding: Sharding, share: float
) -> dict[str, float]:
    """Compute the state bytes under DeepSpeed: weights in the compute dtype, and float32 master weights of the trainable ones.

    "ZeRO", arXiv 1910.02054, section 3.1: 16 bytes per trainable weight, 2 of them for its gradient. Here the gradient
    takes 4, because gradients are summed in float32.
    """
    compute, trainable = float(training.precision.compute_bytes), parameters.trainable
    on_device = 0.0 if sharding is Sharding.offload else 1.0  # factor for states that offload moves to the host
    weight_share = 1.0 if sharding is Sharding.zero2 else share * on_device
    return {
        "weights": compute * parameters.total * weight_share,
        "float32 masters": 4.0 * trainable * share * on_device,
        "gradients": 4.0 * trainable * share * on_device,
        "AdamW's moments": 4.0 * NUM_ADAM_MOMENTS * trainable * share * on_device,
        "reference model": compute * training.reference_parameters * weight_share,
        "gathered layers": 0.0 if sharding is Sharding.zero2 else compute * min(parameters.total, MAX_LIVE_PARAMETERS),
    }


def _compute_fsdp_state_bytes(parameters: ParameterCounts, training: TrainingOptions, share: float) -> dict[str, float]:
    """Compute the state bytes under `fully_shard`.

    Trainable weights have their own dtype and are cast when they are gathered. Frozen weights are stored in the dtype in
    which they are gathered.
    """
    size, trainable = float(training.precision.weight_bytes), parameters.trainable
    compute = float(training.precision.compute_bytes)
    return {
        "weights": (size * trainable + compute * (parameters.total - trainable)) * share,
        "gradients": size * trainable * share,
        "AdamW's moments": size * NUM_ADAM_MOMENTS * trainable * share,
        "reference model": compute * training.reference_parameters * share,
        "gathered layers": 2
        * compute
        * parameters.largest_layer,  # two layers, or one and the head, which stays gathered
    }


def compute_host_bytes(
    parameters: ParameterCounts, training: TrainingOptions, world_size: int, devices_per_node: int
) -> float:
    """Compute the host memory of a node under `offload`: the states that its devices would hold otherwise."""
    states = _compute_zero_state_bytes(parameters, training, Sharding.zero3, 1 / world_size)
    return min(devices_per_node, world_size) * sum(size for name, size in states.items() if name != "gathered layers")


def _compute_replicated_state_bytes(
    parameters: ParameterCounts, training: TrainingOptions, *, ddp: bool
) -> dict[str, float]:
    precision, trainable = training.precision, parameters.trainable
    size, saved_bytes = (
        float(precision.weight_bytes),
        (precision.weight_bytes - precision.compute_bytes) * precision.stores_frozen_in_compute_dtype,
    )
    # The copy of a frozen float32 weight belongs to the graph of its layer, which activation checkpointing does not keep.
    graph_copies = (
        parameters.autocast_frozen - parameters.autocast_frozen_matrices * precision.stores_frozen_in_compute_dtype
    )
    copied = parameters.autocast - parameters.autocast_frozen + graph_copies * (training.checkpointing is Level.none)
    return {
        "weights": size * parameters.total - saved_bytes * parameters.frozen_matrices,
        "half-precision copies": 2.0 * copied if precision.is_mixed else 0.0,
        "gradients": size * trainable,
        "DDP's buckets": size * trainable if ddp else 0.0,  # a second copy of the gradients, in the order of sending
        "AdamW's moments": size * NUM_ADAM_MOMENTS * trainable,
        "reference model": size * training.reference_parameters - saved_bytes * training.reference_matrices,
    }


def compute_text_activation_bytes(text: TextShape, training: TrainingOptions) -> float:
    """Compute the activation bytes per token of the language model, which are stored until its backward pass."""
    once = (
        _compute_norm_bytes(text, training) + 2 * training.precision.residual_bytes * text.head_dim
    )  # final norm; RoPE
    layer = _compute_text_layer_bytes(text, training)
    if training.checkpointing is Level.none:
        return text.num_layers * layer + once
    stored = float(
        training.precision.residual_bytes * text.hidden_size
    )  # the input of each layer, plus one full layer while it is recomputed
    if training.checkpointing is Level.selective:
        stored += _compute_text_matmul_bytes(text, training)
    return text.num_layers * stored + layer + once


def _compute_text_matmul_bytes(text: TextShape, training: TrainingOptions) -> float:
    """Compute the bytes per token of a layer's matrix products except the last, and of attention with its log-sum-exp."""
    width = 2 * (text.query_width + text.key_width) + text.hidden_size + 2 * text.intermediate_size
    return training.precision.compute_bytes * width + 4 * text.num_attention_heads


def _compute_text_layer_bytes(text: TextShape, training: TrainingOptions) -> float:
    """Compute the activation bytes per token of one layer: two norms, attention, and a gated feed-forward layer.

    A trained matrix stores its input for the backward pass, a frozen one does not. Under autocast, matrices that share an
    input (queries, keys, values; gate, up) store one copy each.
    """
    size = training.precision.compute_bytes
    attention = (
        size * 2 * (text.query_width + text.key_width) + 4 * text.num_attention_heads
    )  # q, k, v, output; log-sum-exp
    feed_forward = size * 3 * text.intermediate_size  # gate, its activation, up
    stored = 2 * _compute_norm_bytes(text, training) + attention + feed_forward
    if training.trains_language_model:
        inputs = (5 if training.precision.is_mixed else 2) * text.hidden_size
        stored += size * (inputs + text.query_width + text.intermediate_size)
    return stored


def _compute_norm_bytes(text: TextShape, training: TrainingOptions) -> float:
    """Compute the bytes per token of an RMSNorm: input and scale in float32, and the normed input if the gain trains."""
    return (
        4 * text.hidden_size
        + 4
        + (training.precision.residual_bytes * text.hidden_size if training.trains_language_model else 0)
    )


def compute_tile_activation_bytes(shape: ModelShape, training: TrainingOptions) -> float:
    """Compute the activation bytes per tile: a trained vision tower, the projector, the features among the embeddings.

    A frozen tower stores nothing: its temporary tensors are freed before the language model begins.
    """
    size, vision = training.precision.compute_bytes, shape.vision
    projector = size * shape.projector_activations
    if not training.trains_tower:
        return projector
    pixels = size * 3 * vision.image_size**2
    layer = vision.num_positions * _compute_tower_layer_bytes(vision, training)
    if training.checkpointing is Level.none:
        return pixels + projector + vision.num_layers * layer
    stored = float(training.precision.residual_bytes * vision.hidden_size)
    if training.checkpointing is Level.selective:  # matrix products except the last, and attention
        stored += size * (5 * vision.hidden_size + vision.intermediate_size)
    return pixels + projector + layer + vision.num_layers * vision.num_positions * stored


def _compute_tower_layer_bytes(vision: VisionShape, training: TrainingOptions) -> float:
    """Compute the bytes per position of a tower layer: two norms, attention, two matrices with an activation between them."""
    precision = training.precision
    norms = 2 * (precision.residual_bytes * vision.hidden_size + 8)
    inputs = (4 if precision.is_mixed else 2) * vision.hidden_size
    return norms + precision.compute_bytes * (inputs + 4 * vision.hidden_size + 2 * vision.intermediate_size)
