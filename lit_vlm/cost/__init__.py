"""What training costs, from a model's `config.json` alone: FLOPs, bytes of a device, bytes between devices, seconds.

FLOPs deal samples into equal packs and turn seconds into utilisation; bytes and seconds are estimates for preflight, and
choose the strategy of a stage.
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
