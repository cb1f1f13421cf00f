"""transformers without progress bars and warnings, and its errors as errors for the user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pickle import UnpicklingError

import torch
from transformers.utils import logging

from lit_vlm.types import UserError


@contextlib.contextmanager
def disable_transformers_logging() -> Iterator[None]:
    """Disable progress bars and reports of unused layers; missing weights are checked elsewhere."""
    set_deepspeed_accelerator()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def raise_folder_errors(name: str, problem: str) -> Iterator[None]:
    """Raise a UserError that names the folder when its files cause an error in a library.

    Any value in these files may cause an error, of any type and in any place.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{name}: {problem}: its weights are pickled, and hold more than tensors ({get_first_line(error)}); code of a folder is "
            "never run. Give a folder with model.safetensors."
        ) from error
    except Exception as error:
        what = get_first_line(error)
        raise UserError(f"{name}: {problem} ({what}). Give a whole folder of a model that belongs together.") from error


def get_first_line(error: BaseException) -> str:
    """Return the first line of an error message, with the error's type where the message alone says little."""
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(".") if text else ""
    is_clear = isinstance(error, OSError | ValueError | RuntimeError) and first
    return first if is_clear else f"{type(error).__name__}: {first}".rstrip(": ")


def set_deepspeed_accelerator() -> None:
    """Set DeepSpeed's accelerator to the CPU where there is no GPU.

    transformers imports DeepSpeed when it saves, and DeepSpeed would print a warning.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
