"""Cost model of training, from a model's `config.json` alone: FLOPs, memory of a device, traffic between devices, seconds.

FLOPs are used to pack samples into micro-batches of equal work, and to convert seconds to utilisation (MFU). Bytes and
seconds are estimates for preflight, and they choose the strategy of a stage.
"""

from lit_vlm.cost.communication import Cluster, CommunicationScheme, Fabric, simulate_step
from lit_vlm.cost.memory import (
    DEVICES,
    Device,
    MemoryEstimate,
    MicroBatchSize,
    ParameterCounts,
    TrainingOptions,
    estimate_memory,
)
from lit_vlm.cost.model_shape import Flops, ModelShape
from lit_vlm.cost.strategy import StrategyChoice, TrainingSetup, choose_level, choose_strategy, describe_level

__all__ = [
    "DEVICES",
    "Cluster",
    "CommunicationScheme",
    "Device",
    "Fabric",
    "Flops",
    "MemoryEstimate",
    "MicroBatchSize",
    "ModelShape",
    "ParameterCounts",
    "StrategyChoice",
    "TrainingOptions",
    "TrainingSetup",
    "choose_level",
    "choose_strategy",
    "describe_level",
    "estimate_memory",
    "simulate_step",
]
