"""Optimizer steps of this library beside those of TRL and HF Trainer, on the same weights and samples."""

import os

_WANTED = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in _WANTED.items():  # before any module of this package imports what reads them
    os.environ.setdefault(_name, _value)
