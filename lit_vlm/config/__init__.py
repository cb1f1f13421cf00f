"""Configuration: the schema, and the steps from a command line to a typed Run.

Only this package and run.py depend on Hydra and OmegaConf.
"""

from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.parse import Run, parse
from lit_vlm.config.pipeline import build_stage_overrides
from lit_vlm.config.recipe import is_pipeline, list_stages
from lit_vlm.config.schema import RunConfig

__all__ = ["ConfigError", "Run", "RunConfig", "build_stage_overrides", "is_pipeline", "list_stages", "parse"]
