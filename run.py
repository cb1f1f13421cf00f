"""lit_vlm: from a vision tower, a language model and folders of image-text data to a vision-language model.

python run.py                          the tiny recipe, all four stages, on a CPU
python run.py experiment=tiny/2_sft    one stage
python run.py --help                   choices, settings, examples
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # blocked until handlers are installed: by default these signals end the process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

from lit_vlm.fault_tolerance.signals import handle_signals

if __name__ == "__main__":
    handle_signals()

import os
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig

from lit_vlm.config.compose import CONF_DIR, VERSION_BASE, register_schema
from lit_vlm.config.help import format_help
from lit_vlm.config.overrides import (
    ConfigError,
    add_implied_overrides,
    ensure_known_config_kind,
    parse_arguments,
    split_flags,
)
from lit_vlm.config.parse import collect_override_errors, ensure_no_typed_secrets, parse
from lit_vlm.config.sweep_overrides import ensure_no_launcher, ensure_no_secrets, get_launcher, validate_multirun
from lit_vlm.messages import find_choice, set_language, translate
from lit_vlm.redaction import redact_terminal
from lit_vlm.tasks import TASKS
from lit_vlm.types import UserError


def main() -> None:
    """Run the command line. A UserError is shown without a traceback, exit status 1."""
    handle_signals()
    redact_terminal()
    try:
        set_language(find_choice(sys.argv[1:]))
        dispatch(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(translate(str(error)) or 1)  # an empty message on a rank whose error another rank reports
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(arguments: list[str]) -> None:
    """Run one job in this process, or the command that a flag asks for."""
    flags, overrides = split_flags(arguments)
    if {"--help", "-h"} & set(flags):
        print(format_help([*flags, *overrides]))
    elif flags:
        run_through_hydra(flags, overrides)
    else:
        ensure_no_typed_secrets(overrides)
        ensure_no_launcher(parse_arguments(overrides))
        run = parse(overrides)
        set_language(run.config.language.value)
        TASKS[run.config.task](run)


def run_through_hydra(flags: list[str], overrides: list[str]) -> None:
    """Run with Hydra's own flags: --cfg job, -m, shell completion. All errors are reported before Hydra stops at the first."""
    names = {flag.partition("=")[0] for flag in flags}
    ensure_known_config_kind(flags)
    is_multirun, is_completing = bool({"-m", "--multirun"} & names), bool({"-sc", "--shell-completion"} & names)
    if not is_completing:
        ensure_no_typed_secrets([*flags, *overrides])
        overrides = add_implied_overrides(parse_arguments(overrides))
        if errors := collect_override_errors(overrides, is_multirun=is_multirun):
            raise ConfigError([error for group in errors.values() for error in group])
        if is_multirun:
            validate_multirun(overrides)
        else:
            ensure_no_secrets(overrides)
            if not {"--cfg", "-c", "--info", "-i"} & names:
                ensure_no_launcher(overrides)
    register_schema()
    sys.argv = [sys.argv[0], *flags, *overrides]
    if get_launcher(overrides) == "submitit_slurm" and not is_completing:
        run_grid(overrides, is_submitted=is_multirun)
    else:
        run_job()


def run_grid(overrides: list[str], is_submitted: bool) -> None:
    """Submit the jobs of -m as a Slurm job array, or show its config for `--cfg hydra`."""
    from lit_vlm.config.launcher import handle_launcher_errors, register_launcher
    from lit_vlm.tasks.submit import require_slurm

    if is_submitted:
        remedy = "leave it out, and -m runs the jobs here one by one"
        require_slurm("hydra/launcher=submitit_slurm", remedy, "sbatch", "srun")
    register_launcher(overrides)
    with handle_launcher_errors():
        run_job()


@hydra.main(version_base=VERSION_BASE, config_path=str(CONF_DIR), config_name="config")
def run_job(_: object) -> None:
    """Run a job of -m. Its overrides are parsed as if they were given alone on a command line."""
    handle_signals()  # a submitit job does not start run.py
    redact_terminal()  # a submitit job starts without `main`
    try:
        overrides = HydraConfig.get().overrides
        run = parse(
            [*overrides.task, *(override for override in overrides.hydra if override.startswith("hydra.searchpath="))]
        )
        set_language(run.config.language.value)
        TASKS[run.config.task](run)
    except UserError as error:
        sys.exit(translate(str(error)) or 1)  # an exception would be shown with Hydra's traceback
    except Exception:
        if "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        traceback.print_exc()  # Hydra would return it to submitit as a result, and Slurm would see a successful job
        sys.exit(1)


if __name__ == "__main__":
    main()
    handle_signals().final_status = 0
