"""lit_vlm: from a vision tower, a language model and folders of image-text data to a vision-language model.

python run.py                          the tiny recipe, all four stages, on a CPU
python run.py experiment=tiny/2_sft    one stage
python run.py --help                   choices, settings, examples
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # blocked until handlers are installed: by default these signals end the process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

from lit_vlm.engine.signals import handle_signals

if __name__ == "__main__":
    handle_signals()

import os
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig

from lit_vlm.config.compose import CONF, VERSION_BASE, register
from lit_vlm.config.help import help_text
from lit_vlm.config.multirun import check_multirun, launcher_in, refuse_launcher, refuse_secrets
from lit_vlm.config.overrides import ConfigError, read_arguments, split_flags, with_implied
from lit_vlm.config.parse import parse, refuse_typed_secrets, wrong_words
from lit_vlm.secrets import redact_terminal
from lit_vlm.tasks import TASKS
from lit_vlm.types import UserError


def main() -> None:
    """Run the command line. A UserError is shown without a traceback, exit status 1."""
    handle_signals()
    redact_terminal()
    try:
        start(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(str(error) or 1)  # an empty message on a rank whose error another rank reports
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start(arguments: list[str]) -> None:
    """Run one job in this process, or the command that a flag asks for."""
    flags, overrides = split_flags(arguments)
    if {"--help", "-h"} & set(flags):
        print(help_text([*flags, *overrides]))
    elif flags:
        through_hydra(flags, overrides)
    else:
        refuse_launcher(read_arguments(overrides))
        run = parse(overrides)
        TASKS[run.config.task](run)


def through_hydra(flags: list[str], words: list[str]) -> None:
    """Run with Hydra's own flags: --cfg job, -m, shell completion. All errors are reported before Hydra stops at the first."""
    names = {flag.partition("=")[0] for flag in flags}
    is_multirun, is_completing = bool({"-m", "--multirun"} & names), bool({"-sc", "--shell-completion"} & names)
    if not is_completing:
        refuse_typed_secrets([*flags, *words])
        words = with_implied(read_arguments(words))
        if errors := wrong_words(words, sweep=is_multirun):
            raise ConfigError([error for group in errors.values() for error in group])
        if is_multirun:
            check_multirun(words)
        else:
            refuse_secrets(words)
            if not {"--cfg", "-c", "--info", "-i"} & names:
                refuse_launcher(words)
    register()
    sys.argv = [sys.argv[0], *flags, *words]
    if launcher_in(words) == "submitit_slurm" and not is_completing:
        grid(words, submits=is_multirun)
    else:
        one_job()


def grid(words: list[str], submits: bool) -> None:
    """Submit the jobs of -m as a Slurm job array, or show its config for `--cfg hydra`."""
    from lit_vlm.config.launcher import errors_told, register_launcher
    from lit_vlm.tasks.submit import require_slurm

    if submits:
        remedy = "leave it out, and -m runs the jobs here one by one"
        require_slurm("hydra/launcher=submitit_slurm", remedy, "sbatch", "srun")
    register_launcher(words)
    with errors_told():
        one_job()


@hydra.main(version_base=VERSION_BASE, config_path=str(CONF), config_name="config")
def one_job(_: object) -> None:
    """Run a job of -m. Its overrides are parsed as if they were given alone on a command line."""
    handle_signals()  # a submitit job does not start run.py
    redact_terminal()  # a submitit job starts without `main`
    try:
        overrides = HydraConfig.get().overrides
        run = parse(
            [*overrides.task, *(override for override in overrides.hydra if override.startswith("hydra.searchpath="))]
        )
        TASKS[run.config.task](run)
    except UserError as error:
        sys.exit(str(error) or 1)  # an exception would be shown with Hydra's traceback
    except Exception:
        if "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        traceback.print_exc()  # Hydra would return it to submitit as a result, and Slurm would see a successful job
        sys.exit(1)


if __name__ == "__main__":
    main()
    handle_signals().settled = 0
