"""The spawner's walls by bubblewrap: its namespaces and its root are made by `bwrap`.

For machines where ordinary users may not make namespaces but a setuid `bwrap` may, or where a site
wants one tool to draw that line. What happens inside stays the spawner's work: the layers of each
session, and a look whether anything outside can be seen (`namespaces.look_around`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from sandbox import namespaces
from sandbox.results import SandboxUnavailable

_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETUID", "SETGID")
"""What the spawner, as root, needs to give each session a user of its own, and to end it."""
_TRIAL_S = 30.0
REMEDY = (
    "install bubblewrap (apt install bubblewrap), setuid where ordinary users may not make user "
    "namespaces; in a container use a seccomp profile that lets unshare and mount pass; or leave "
    "bubblewrap=False"
)


def command(readable: Sequence[str], devices: Sequence[str], writable: str) -> list[str]:
    """What to put before a command of Python's for it to run as the first process inside: with the
    named paths, /proc, and nothing else.

    Raises SandboxUnavailable if there is no `bwrap`, or if it does not work here.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxUnavailable(f"bubblewrap: there is no bwrap on the path; {REMEDY}")
    privileged = os.geteuid() == 0
    words = [program, "--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "sandbox"]
    words += [f"--unshare-{kind}" for kind in ("pid", "net", "ipc", "uts")]
    if privileged:
        words += [word for name in _CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
    else:
        words.append("--unshare-user")
    links: dict[str, str] = {}
    paths = [namespaces.resolve(path, links) for path in (*readable, sys.executable)]
    for path in namespaces.outermost(paths):
        words += ["--ro-bind", path, path]
    for path in devices:
        words += ["--dev-bind", path, path]
    folder = namespaces.resolve(writable, links)
    words += ["--bind", folder, folder, "--proc", "/proc"]
    for link, target in links.items():
        if not any(link.startswith(f"{path}/") for path in paths):
            words += ["--symlink", target, link]
    words += ["--remount-ro", "/", "--chdir", "/", "--"]
    trial = [*words, sys.executable, "-S", "-s", "-P", "-B", "-c", ""]
    tried = subprocess.run(
        trial, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_S, check=False
    )
    if tried.returncode:
        said = tried.stderr.decode(errors="replace").strip() or f"status {tried.returncode}"
        raise SandboxUnavailable(f"bubblewrap: {said}; {REMEDY}")
    return words
