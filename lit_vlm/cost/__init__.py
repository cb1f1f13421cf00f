"""Cost model of training, from a model's `config.json` alone: FLOPs, memory of a device, traffic between devices, seconds.

FLOPs are used to pack samples into micro-batches of equal work, and to convert seconds to utilisation (MFU). Bytes and
seconds are estimates for preflight, and they choose the strategy of a stage.
"""

from lit_vlm.cost.choice import Choice, choose, level_for, why_level
from lit_vlm.cost.communication import Cluster, Fabric, Scheme, simulate
from lit_vlm.cost.devices import DEVICES, Device
from lit_vlm.cost.flops import Flops
from lit_vlm.cost.memory import Load, Memory, Parameters, Training, memory_of
from lit_vlm.cost.shape import Shape
from lit_vlm.cost.situation import Situation

__all__ = [
    "DEVICES",
    "Choice",
    "Cluster",
    "Device",
    "Fabric",
    "Flops",
    "Load",
    "Memory",
    "Parameters",
    "Scheme",
    "Shape",
    "Situation",
    "Training",
    "choose",
    "level_for",
    "memory_of",
    "simulate",
    "why_level",
]
