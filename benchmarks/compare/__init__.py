"""Optimizer steps of this library beside those of TRL and HF Trainer, on the same weights and samples."""

import os
import warnings

# before transformers, TRL and tokenizers are imported by any module of this package
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false"
)
warnings.filterwarnings("ignore")
