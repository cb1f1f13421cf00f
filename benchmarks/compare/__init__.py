"""Benchmark of optimizer steps against TRL and HF Trainer, on the same weights and samples."""

import os

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in _ENVIRONMENT.items():  # before a module of this package imports libraries that read them
    os.environ.setdefault(_name, _value)
