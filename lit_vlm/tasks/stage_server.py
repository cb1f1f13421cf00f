"""Server process that starts the stages of a pipeline on one device: it has imported what they need, and done nothing else.

Each stage is a fork of it that runs run.py from its first line, so it saves some seconds of imports. The server makes no
tensor, no thread, no CUDA context and no random number. It differs from multiprocessing's forkserver in two points that a
stage depends on: a stop signal of a scheduler, which every process of a job gets, does not end it, and a stage ends as
Python ends, with its exit handlers and its own exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from lit_vlm.imports import pause_collector
from lit_vlm.types import UserError

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("lit_vlm.tasks.train_steps", "lit_vlm.tasks.exam")  # what a stage and its exam import
SERVER_CODE = """import sys
sys.path[0] = sys.argv[1]
from lit_vlm.tasks.stage_server import serve
serve(int(sys.argv[2]), sys.argv[3:])"""
# Without these, importing numpy, scipy and pyarrow starts threads. A stage has its own environment again.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def can_fork_stages() -> bool:
    """Return True where a process may be forked after it has imported torch: on Linux."""
    return sys.platform == "linux"


class StageServer:
    """Client of the server process, which starts with the first stage. Use it as a context: its end ends the server.

    Args:
        disable_signals: called in the server process before Python starts: stop signals do not end it.
        modules: modules that the server imports.
    """

    def __init__(self, disable_signals: Callable[[], None], modules: Sequence[str] = MODULES) -> None:
        self._disable_signals, self._modules = disable_signals, modules
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def __enter__(self) -> StageServer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()  # the server ends when nobody can ask it any more
            self._process.wait()

    def start(self, command: list[str]) -> ForkedProcess:
        """Start a command in a fork of the server.

        Args:
            command: as of `subprocess.Popen`: Python, the path of a script, its arguments.

        Raises:
            UserError: the server has ended.
        """
        if self._connection is None:
            self._connection = self._start_server()
        request = {"arguments": command[1:], "environment": {name: os.environ.get(name) for name in ONE_THREAD}}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        return ForkedProcess(self._connection)

    def _start_server(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER_CODE, str(ROOT), str(theirs.fileno()), *self._modules],
                pass_fds=[theirs.fileno()],
                env=os.environ | ONE_THREAD,
                preexec_fn=self._disable_signals,
            )
        return ours


class ForkedProcess:
    """Process that the server has forked, with the methods of `subprocess.Popen` that a pipeline uses.

    Attributes:
        pid: process id.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = self._receive()
        self._status: int | None = None

    def wait(self) -> int:
        """Wait for the end of the process; return its exit status, -N after signal N."""
        if self._status is None:
            self._status = self._receive()
        return self._status

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def _receive(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            part = self._connection.recv(64)
            if not part:
                raise UserError(
                    "The process that starts the stages has ended, perhaps because memory was short. The same command resumes."
                )
            line += part
        return int(line)


def serve(descriptor: int, modules: Sequence[str]) -> None:
    """Import modules, then run each requested command in a fork, until the client closes its end of the socket."""
    with pause_collector():  # a fork then shares the modules: a collection would write into their pages
        for module in modules:
            import_module(module)
    connection = socket.socket(fileno=descriptor)
    requests = connection.makefile("rb")
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            requests.close()
            connection.close()
            restore_environment(request["environment"])
            run_script(request["arguments"])
            return
        _send(connection, pid)
        _send(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def restore_environment(variables: dict[str, str | None]) -> None:
    """Set environment variables; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def run_script(arguments: list[str]) -> None:
    """Run a script in this process as `python SCRIPT ARGUMENTS` does; this process then ends as Python ends."""
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _send(connection: socket.socket, number: int) -> None:
    """Send a number to the client. A client that was killed reads it no more."""
    try:
        connection.sendall(f"{number}\n".encode())
    except BrokenPipeError:
        sys.exit()
