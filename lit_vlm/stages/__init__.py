"""Training stages by name."""

from lit_vlm.stages.base import Stage
from lit_vlm.stages.dpo import DPOStage
from lit_vlm.stages.next_token import AlignStage, HighresStage, SFTStage

STAGES: dict[str, type[Stage]] = {stage.name.value: stage for stage in (AlignStage, SFTStage, HighresStage, DPOStage)}

__all__ = ["STAGES", "AlignStage", "DPOStage", "HighresStage", "SFTStage", "Stage"]
