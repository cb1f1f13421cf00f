"""Configuration: the schema, and the steps from a command line to a typed Run.

Only this package and run.py depend on Hydra and OmegaConf.
"""

from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.parse import Run, parse
from lit_vlm.config.pipeline import pipeline_overrides
from lit_vlm.config.recipe import is_ladder, stages_of
from lit_vlm.config.schema import RunConfig

__all__ = ["ConfigError", "Run", "RunConfig", "is_ladder", "parse", "pipeline_overrides", "stages_of"]
