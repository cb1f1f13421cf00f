"""What training costs, from a model's `config.json` alone: FLOPs, bytes of a device, seconds.

FLOPs deal samples into equal packs and turn seconds into utilisation; bytes and seconds are estimates for preflight.
"""

from lit_vlm.cost.devices import DEVICES, Device
from lit_vlm.cost.flops import Flops
from lit_vlm.cost.memory import Load, Memory, Parameters, Training, memory_of
from lit_vlm.cost.shape import Shape

__all__ = ["DEVICES", "Device", "Flops", "Load", "Memory", "Parameters", "Shape", "Training", "memory_of"]
