"""Memory and speed of the devices that `preflight.device` names, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from lit_vlm.config.schema import DeviceName


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
