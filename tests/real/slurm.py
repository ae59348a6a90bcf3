"""A real Slurm of two nodes on one machine, in namespaces that take everything with them.

Each node has a network address, a host name, process numbers and a scratch disk of its own; the
file system is shared, as on a cluster. One outer process number namespace holds it all: when its
first process ends, so does every daemon, job and Ray process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare", "nsenter")
NODES = ("n1", "n2")
START_S = 60.0

CONF = """
ClusterName=elpo
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=30
MinJobAge=3600
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
NodeName=n1 NodeAddr=10.77.0.11 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.12 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""

BRING_UP = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
hostname ctl
mount --bind {base}/hosts /etc/hosts
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
munged --foreground --force --key-file={base}/munge/key --socket={base}/munge/socket \\
  --pid-file={base}/munge/pid --log-file={base}/munge/log --seed-file={base}/munge/seed &
for i in 1 2; do
  ip netns add n$i
  ip link add v$i type veth peer name eth0 netns n$i
  ip link set v$i master br0
  ip link set v$i up
  ip -n n$i addr add 10.77.0.1$i/24 dev eth0
  ip -n n$i link set eth0 up
  ip -n n$i link set lo up
  ip -n n$i route add default via 10.77.0.1
done
while [ ! -S {base}/munge/socket ]; do sleep 0.1; done
slurmctld -D -f {base}/slurm.conf &
for i in 1 2; do
  nsenter --net=/run/netns/n$i unshare --uts --pid --fork --mount --mount-proc sh -c "
    hostname n$i; mount -t tmpfs tmpfs {base}/scratch; exec slurmd -D -f {base}/slurm.conf" &
done
wait
"""


def missing() -> str | None:
    """Why there can be no such cluster here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "needs root, for namespaces with addresses of their own"
    trial = "ip link add e0 type veth peer name e1 && ip link add e2 type bridge"
    done = subprocess.run(["unshare", "--net", "sh", "-c", trial], capture_output=True, text=True)
    return f"no virtual network here: {done.stderr.strip()}" if done.returncode else None


class Slurm:
    """The running cluster, as its users see it."""

    def __init__(self, base: Path, inside: int) -> None:
        self.base = base
        """Shared by all nodes; its folder `scratch` is each node's own."""
        self._inside = inside

    def run(self, *command: str, check: bool = True) -> str:
        """stdout of a command on the login node."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._inside), "--net", "--mount", "--pid", "--",
             "env", "-C", str(ROOT), *command],
            capture_output=True, text=True, timeout=60,
            env=os.environ | {"SLURM_CONF": str(self.base / "slurm.conf")},
        )  # fmt: skip
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The daemons' last words, for a failure's report."""
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for log in sorted(self.base.glob("*.log"))
        )


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Start it, wait until both nodes are idle; end everything."""
    base = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: sockets lie below it
    for name in ("munge", "state", "scratch"):
        (base / name).mkdir(mode=0o700)
    base.chmod(0o755)
    (base / "munge" / "key").write_bytes(os.urandom(1024))
    (base / "munge" / "key").chmod(0o400)
    (base / "hosts").write_text(
        "127.0.0.1 localhost\n10.77.0.1 ctl\n10.77.0.11 n1\n10.77.0.12 n2\n"
    )
    (base / "slurm.conf").write_text(CONF.format(base=base))
    script = BRING_UP.format(base=base)
    outer = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child",
             "--mount-proc", "sh", "-c", script]  # fmt: skip
    with (base / "daemons.log").open("w") as log:
        process = subprocess.Popen(outer, stdout=log, stderr=log, start_new_session=True)
    try:
        cluster = Slurm(base, _first_child(process.pid))
        deadline = time.monotonic() + START_S
        while cluster.run("sinfo", "-h", "-o", "%T %D", check=False).split() != ["idle", "2"]:
            assert process.poll() is None and time.monotonic() < deadline, cluster.logs()
            time.sleep(0.5)
        yield cluster
    finally:
        process.send_signal(signal.SIGKILL)  # --kill-child: the namespace's first process goes too
        process.wait()
        shutil.rmtree(base, ignore_errors=True)


def _first_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + START_S
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline, "the namespace did not come up"
        time.sleep(0.05)
    return int(found[0])
