"""The real `wandb` command line against the loopback server, started from the repository folder as a user does."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from waiting import PATIENCE

from sweeps.wandb_server import LoopbackServer

ROOT = Path(__file__).resolve().parents[2]
# The unchanged command line, but the agent polls every 0.3 s instead of every 5 s
QUICK = "import wandb.wandb_agent as a; a.Agent.POLL_INTERVAL = 0.3; from wandb.cli.cli import cli; cli()"


@dataclass
class Client:
    """Processes of `wandb` that know only this server and write into `folder`."""

    server: LoopbackServer
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        own = {"HOME": str(self.folder), "WANDB_DIR": str(self.folder), "PATH": path, "VIRTUAL_ENV": sys.prefix}
        quick = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "false"}
        return self.server.environment(**own, **quick, **more)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", QUICK, *arguments],
            cwd=ROOT,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, timeout: float = PATIENCE, **environment: str) -> str:
        """Run `wandb` and return its output; require exit status 0."""
        process = self.start(*arguments, **environment)
        text, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, text
        return text

    def create_sweep(self, **file) -> str:
        """Run `wandb sweep` on a file with this content; return the sweep's id."""
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({"program": "run.py", "project": "p", **file}, allow_unicode=True))
        known = set(self.server.sweeps)
        self.run("sweep", str(path))
        (new,) = set(self.server.sweeps) - known
        return new

    def run_agent(self, sweep: str, *arguments: str, **environment: str) -> str:
        return self.run("agent", *arguments, self.server.path(sweep), **environment)
