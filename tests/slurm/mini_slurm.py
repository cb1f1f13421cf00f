"""A real Slurm on one machine for the time of a test: a controller and some nodes, all children of the test process.

Nodes are loopback addresses, so the first node's name, at which ranks rendezvous, is reachable without /etc/hosts. There is
no munge, no cgroup, no database and no file outside of `root`; started processes are ended by their process ids.
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
PR_SET_CHILD_SUBREAPER = 36  # prctl: orphans of a slurmstepd become children of this process, not of init

# A requeued job waits `cred_expire` seconds until it may start again, 120 by default. `preempt_send_user_signal`: a job
# that is preempted gets the signal that it requested with --signal. Job ids are unique: ranks rendezvous at a port derived
# from them, and several of these clusters may run on one machine.
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

# submitit queries the accounting database, which does not exist here; this script answers from the controller's memory
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
    """`with MiniSlurm(tmp_path) as slurm:` starts two nodes with two CPUs and one fake GPU each, idle after a second."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        self.root, self.names = root, [f"127.0.0.{11 + number}" for number in range(nodes)]
        self.daemons: dict[str, subprocess.Popen] = {}
        self.spool = root
        self._stack = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which sbatch and the other commands find this Slurm."""
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
        # the socket of a step is there, and its path may have at most 107 characters; pytest's folders are longer
        self.spool = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        self._stack.callback(self._stop_all)
        with ExitStack() as cleanup:
            cleanup.callback(self._stack.close)
            self._write_config()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for name in self.names:
                self.start_node(name)
            self._wait_until_idle()
            cleanup.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # ---- jobs

    def run(self, *arguments: str, **options) -> str:
        options = {
            "env": self.environment,
            "capture_output": True,
            "text": True,
            "timeout": 60,
            "check": True,
            **options,
        }
        return subprocess.run(arguments, **options).stdout

    def sbatch(self, *arguments: str) -> str:
        return self.run("sbatch", "--parsable", *map(str, arguments)).strip()

    def get_job(self, number: str) -> dict[str, str]:
        """Return JobState, ExitCode, Restarts, ... of a job, running or ended."""
        output = self.run("scontrol", "--oneliner", "show", "job", number, check=False)
        return dict(word.split("=", 1) for word in output.split() if "=" in word)

    def wait(self, number: str, states: tuple[str, ...] = ENDED, limit: float = PATIENCE) -> dict[str, str]:
        """Wait until the job is in one of the states. TimeoutError reports its last state."""
        end, job = time.monotonic() + limit, {}
        while time.monotonic() < end:
            job = self.get_job(number)
            if job.get("JobState") in states:
                return job
            time.sleep(0.2)
        raise TimeoutError(f"job {number}: {job.get('JobState')}, {job.get('Reason')}")

    def kill_node(self, name: str) -> None:
        """Kill the node's daemon and all its processes at the same time, as a power cut does."""
        pids = [pid for pid in self._list_descendants() if f"SLURMD_NODENAME={name}".encode() in _read_environment(pid)]
        steps = [
            pid
            for pid in self._list_descendants()
            if _read_command(pid).startswith("slurmstepd") and self._is_on(pid, name)
        ]
        for pid in [self.daemons.pop(name).pid, *steps, *pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        (self.spool / name).mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)

    # ---- daemons

    def _write_config(self) -> None:
        for folder in ("bin", "state"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        port, *ports = _find_free_ports(1 + len(self.names))
        host, user = socket.gethostname(), pwd.getpwuid(os.geteuid()).pw_name
        resources = "CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} {resources}"
            for name, own in zip(self.names, ports, strict=True)
        )
        (self.root / "slurm.conf").write_text(
            CONF.format(host=host, port=port, user=user, root=self.root, spool=self.spool, nodes=nodes)
        )
        # a GPU must have a device file; without cgroups any file will do
        (self.root / "gres.conf").write_text(
            "".join(f"NodeName={name} Name=gpu File=/dev/null\n" for name in self.names)
        )
        (self.root / "plugstack.conf").touch()
        (self.root / "bin/sacct").write_text(SACCT)
        (self.root / "bin/sacct").chmod(0o755)

    def _start(self, key: str, *arguments: str) -> None:
        with open(self.root / f"{key}.out", "ab") as log:
            self.daemons[key] = subprocess.Popen(
                [*arguments, "-f", f"{self.root}/slurm.conf"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def _wait_until_idle(self, limit: float = PATIENCE) -> None:
        end, states = time.monotonic() + limit, []
        while time.monotonic() < end:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False).split()
            if states == ["idle"] * len(self.names):
                return
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-1500:] for path in self.root.glob("*.log"))
        raise TimeoutError(f"nodes are {states}\n{logs}")

    def _stop_all(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", f"--user={os.geteuid()}", check=False)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.run("squeue", "--noheader", check=False).strip():
            time.sleep(0.1)
        for number, grace_seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            for pid in self._list_descendants():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + grace_seconds
            while self._list_descendants() and time.monotonic() < end:
                time.sleep(0.05)
        for daemon in self.daemons.values():
            daemon.wait(timeout=PATIENCE)

    def _list_descendants(self) -> list[int]:
        """Return the descendants of this process that belong to this Slurm; reap those that have ended."""
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
        return [pid for pid in found if mine in _read_environment(pid)]

    def _is_on(self, pid: int, name: str) -> bool:
        """Return whether a slurmstepd belongs to that node: it has the node's log or spool folder open."""
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if name in os.readlink(link):
                    return True
        return False


def _read_environment(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _read_command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _find_free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
