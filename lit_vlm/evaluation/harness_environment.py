"""Environment of lmms-eval beside the one of this project: made once from pinned versions, and made again when these change.

`python -m lit_vlm.evaluation.harness_environment FOLDER` makes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from lit_vlm.files import lock_file, write_text_atomically
from lit_vlm.redaction import is_secret_name, redact_text
from lit_vlm.types import UserError

HARNESS, VERSION = "lmms-eval", "0.7.3"
PINS = "lmms_eval_requirements.txt"
MARKER = ".lit_vlm_pins"  # in the environment: digest of the pins from which it was made
UNUSED = ("torchvision",)  # see the comment of the pins
MAX_SHOWN_LINES = 6


def get_default_folder() -> Path:
    """Return the folder of the environment beside this Python's own: `.venv-outside/lmms_eval`."""
    return Path(sys.prefix).parent / ".venv-outside" / "lmms_eval"


def read_pins() -> str:
    """Read the pinned versions, one per line."""
    return files("lit_vlm.evaluation").joinpath(PINS).read_text(encoding="utf-8")


def compute_pins_digest() -> str:
    """Compute the digest of the pins and of Python's version, which decide what is in the environment."""
    return hashlib.sha256(f"{read_pins()}{sys.version_info[:2]}".encode()).hexdigest()


def is_current(folder: Path) -> bool:
    """Return True if the environment was made completely from the present pins."""
    try:
        return (folder / MARKER).read_text(encoding="utf-8").strip() == compute_pins_digest()
    except OSError:
        return False


def get_python(folder: Path) -> Path:
    """Return the Python of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_environment(folder: Path, say: Callable[[str], None]) -> Path:
    """Make the environment unless it is there and current. Returns its Python.

    Raises:
        UserError: the folder holds something else, or an installation failed.
    """
    folder = folder.absolute()
    with lock_file(folder.with_name(f".{folder.name}.lock")):
        if is_current(folder):
            return get_python(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
            raise UserError(f"evaluate.environment={folder}: is no Python environment. Name an empty or a new folder.")
        say(f"Making the environment of {HARNESS} {VERSION} in {folder}: once, some minutes, 2.5 GB or more")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], folder)
        pins = folder / PINS
        pins.write_text(read_pins(), encoding="utf-8")
        pip = [str(get_python(folder)), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
        _run([*pip, "install", "-r", str(pins)], folder)
        _run([*pip, "uninstall", "--yes", *UNUSED], folder)
        write_text_atomically(folder / MARKER, f"{compute_pins_digest()}\n")
    return get_python(folder)


def _run(command: list[str], folder: Path) -> None:
    """Run a command of the installation. UserError with the end of its output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in redact_text(done.stdout).splitlines() if line.strip()][-MAX_SHOWN_LINES:]
        shown = "\n".join(f"  {line}" for line in lines)
        raise UserError(
            f"{folder}: the environment of {HARNESS} {VERSION} could not be made:\n{shown}\nIt needs the package index that pip"
            " is set up for, and 2.5 GB or more. Start the same command again when this is solved, or name another folder with"
            " evaluate.environment=..."
        )


def make_process_environment(folder: Path, more: dict[str, str], *, keep_hub_token: bool) -> dict[str, str]:
    """Make the environment variables of the harness: those of this process without keys, and `more`.

    Args:
        folder: folder for the harness's caches.
        keep_hub_token: the harness loads data from the hub itself.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not is_secret_name(name, value) or (keep_hub_token and name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    }
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OPENAI_API_BASE", "OPENAI_API_URL", "MODEL_VERSION"):
        kept.pop(name, None)
    local = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1,localhost"]))
    return kept | {
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_MODE": "disabled",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": local,
        "no_proxy": local,
        "OPENAI_API_KEY": "none",  # its client demands one
        **more,
    }


def list_task_files(folder: Path) -> dict[str, Path]:
    """List tasks, groups and tags of the harness with the YAML file of each; of a tag, one of its tasks' files."""
    (tasks,) = folder.glob("lib/python*/site-packages/lmms_eval/tasks")
    return find_tasks(tasks)


def find_tasks(folder: Path) -> dict[str, Path]:
    """Find the tasks that the YAML files below a folder define: name -> file."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for name in _TASK.findall(text):
            found.setdefault(name, path)
        if tags := _TAGS.search(text):
            for name in _ITEM.findall(tags["items"]):
                found.setdefault(name, path)
    return found


_TASK = re.compile(r"^['\"]?(?:task|group)['\"]?\s*:\s*['\"]?([\w.+-]+)['\"]?\s*(?:#.*)?$", re.MULTILINE)
_TAGS = re.compile(r"^(?:tag|group)\s*:\s*\n(?P<items>(?:\s*-\s*\S+\s*\n)+)", re.MULTILINE)
_ITEM = re.compile(r"-\s*['\"]?([\w.+-]+)")

if __name__ == "__main__":
    ensure_environment(Path(sys.argv[1]) if sys.argv[1:] else get_default_folder(), print)
