"""A real Slurm on this machine for the time of a test: one controller and some nodes, all children of the test's process.

Nodes are loopback addresses, so the first node's name, which ranks meet at, leads somewhere without /etc/hosts. There is
no munge, no cgroup, no database and nothing outside of `root`; what was started is ended by its process id.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from waiting import PATIENCE

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
MISSING = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
PR_SET_CHILD_SUBREAPER = 36  # prctl: what a slurmstepd leaves behind becomes a child of ours, not of init

# A requeued job waits `cred_expire` seconds until it may start again, 120 by default. `preempt_send_user_signal`: a job
# that must make room gets the signal that it asked for with --signal. Job ids of its own: ranks meet at a port made of them,
# and several of these may run on one machine.
CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,requeue_delay=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
MinJobAge=900
KillWait=10
SlurmdTimeout=5
MessageTimeout=10
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
"""

# submitit asks the accounting database, which is not there; this answers from the controller's memory
SACCT = r"""#!/bin/bash
echo 'JobID|State|NodeList'
for word in "$@"; do
  [[ $word =~ ^[0-9]+ ]] || continue
  scontrol --oneliner show job "${word%%_*}" 2>/dev/null | while read -r line; do
    declare -A f=()
    for pair in $line; do [[ $pair == *=* ]] && f[${pair%%=*}]=${pair#*=}; done
    id=${f[JobId]}; task=${f[ArrayTaskId]:-}
    [[ -n $task ]] && { [[ $task =~ [-,%] ]] && task="[$task]"; id=${f[ArrayJobId]}_$task; }
    echo "$id|${f[JobState]}|${f[NodeList]}"
  done
done
"""


class MiniSlurm:
    """`with MiniSlurm(tmp_path) as slurm:` two nodes of two CPUs and one pretended GPU are idle after a second."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        self.root, self.names = root, [f"127.0.0.{11 + number}" for number in range(nodes)]
        self.daemons: dict[str, subprocess.Popen] = {}
        self.spool = root
        self._stack = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """In which sbatch and its like find this Slurm."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        path = f"{self.root}/bin:{PATH}"
        return {
            **own,
            "SLURM_CONF": f"{self.root}/slurm.conf",
            "PATH": path,
            "GLOO_SOCKET_IFNAME": "lo",
            "NO_COLOR": "1",
        }

    def __enter__(self) -> MiniSlurm:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # the path of a step's socket, which lies there, may have 107 letters; pytest's folders have more
        self.spool = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        self._stack.callback(self._end)
        with ExitStack() as failed:
            failed.callback(self._stack.close)
            self._write()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for name in self.names:
                self.start_node(name)
            self._until_idle()
            failed.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # ---- jobs

    def run(self, *words: str, **options) -> str:
        options = {
            "env": self.environment,
            "capture_output": True,
            "text": True,
            "timeout": 60,
            "check": True,
            **options,
        }
        return subprocess.run(words, **options).stdout

    def sbatch(self, *words: str) -> str:
        return self.run("sbatch", "--parsable", *map(str, words)).strip()

    def job(self, number: str) -> dict[str, str]:
        """JobState, ExitCode, Restarts, ... of a job, ended or not."""
        said = self.run("scontrol", "--oneliner", "show", "job", number, check=False)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, number: str, states: tuple[str, ...] = ENDED, limit: float = PATIENCE) -> dict[str, str]:
        """Until the job is in one of the states. TimeoutError says where it was."""
        end, job = time.monotonic() + limit, {}
        while time.monotonic() < end:
            job = self.job(number)
            if job.get("JobState") in states:
                return job
            time.sleep(0.2)
        raise TimeoutError(f"job {number}: {job.get('JobState')}, {job.get('Reason')}")

    def kill_node(self, name: str) -> None:
        """As a power cut: the node's daemon and all that runs below it are gone at once."""
        pids = [pid for pid in self._descendants() if f"SLURMD_NODENAME={name}".encode() in _environment_of(pid)]
        steps = [
            pid for pid in self._descendants() if _command_of(pid).startswith("slurmstepd") and self._is_on(pid, name)
        ]
        for pid in [self.daemons.pop(name).pid, *steps, *pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        (self.spool / name).mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)

    # ---- daemons

    def _write(self) -> None:
        for folder in ("bin", "state"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        port, *ports = _free_ports(1 + len(self.names))
        host, user = socket.gethostname(), pwd.getpwuid(os.geteuid()).pw_name
        shape = "CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} {shape}"
            for name, own in zip(self.names, ports, strict=True)
        )
        (self.root / "slurm.conf").write_text(
            CONF.format(host=host, port=port, user=user, root=self.root, spool=self.spool, nodes=nodes)
        )
        # a gpu must have a device file; without cgroups any will do
        (self.root / "gres.conf").write_text(
            "".join(f"NodeName={name} Name=gpu File=/dev/null\n" for name in self.names)
        )
        (self.root / "plugstack.conf").touch()
        (self.root / "bin/sacct").write_text(SACCT)
        (self.root / "bin/sacct").chmod(0o755)

    def _start(self, key: str, *words: str) -> None:
        with open(self.root / f"{key}.out", "ab") as log:
            self.daemons[key] = subprocess.Popen(
                [*words, "-f", f"{self.root}/slurm.conf"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def _until_idle(self, limit: float = PATIENCE) -> None:
        end, states = time.monotonic() + limit, []
        while time.monotonic() < end:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False).split()
            if states == ["idle"] * len(self.names):
                return
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-1500:] for path in self.root.glob("*.log"))
        raise TimeoutError(f"nodes are {states}\n{logs}")

    def _end(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", f"--user={os.geteuid()}", check=False)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.run("squeue", "--noheader", check=False).strip():
            time.sleep(0.1)
        for number, grace in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            for pid in self._descendants():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + grace
            while self._descendants() and time.monotonic() < end:
                time.sleep(0.05)
        for daemon in self.daemons.values():
            daemon.wait(timeout=PATIENCE)

    def _descendants(self) -> list[int]:
        """Processes below this one that belong to this Slurm; the dead among them are reaped."""
        for daemon in self.daemons.values():
            daemon.poll()
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(path.parent.name))
                if fields[0] == "Z" and int(fields[1]) == os.getpid() and "slurmstepd" in path.read_text():
                    os.waitpid(int(path.parent.name), os.WNOHANG)
        found, waiting = [], [os.getpid()]
        while waiting:
            below = children.get(waiting.pop(), [])
            found += below
            waiting += below
        mine = f"SLURM_CONF={self.root}/slurm.conf".encode()
        return [pid for pid in found if mine in _environment_of(pid)]

    def _is_on(self, pid: int, name: str) -> bool:
        """Whether a slurmstepd is of that node: its log or its spool folder is open in it."""
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if name in os.readlink(link):
                    return True
        return False


def _environment_of(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
