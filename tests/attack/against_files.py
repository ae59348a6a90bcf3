"""Attacks 1 to 18: files and processes outside the session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack, denied, refused

if TYPE_CHECKING:
    from host import World

denied(1, "reads a canary outside", "open($CANARY).read()", "os.listdir(os.path.dirname($CANARY))")
denied(2, "reads /etc/passwd", "open('/etc/passwd').read()", "open('/proc/1/root/etc/passwd')")
denied(
    3,
    "writes outside",
    "tried(lambda: open($CANARY, 'w'), lambda: open($CANARY, 'a'),"
    " lambda: open($CANARY + '2', 'w'), lambda: os.mkdir($CANARY + '3'),"
    " lambda: open('/tmp/escape', 'w'), lambda: open('../escape', 'w'))",
)
denied(
    4,
    "writes to the installation",
    "found = os.stat(os.__file__)\nos.chmod(os.__file__, 0o777)\nos.utime(os.__file__, (0, 0))\n"
    "assert os.stat(os.__file__) == found\n"  # they say yes and do nothing
    "tried(lambda: open('/usr/escape', 'w'), lambda: open(os.__file__, 'a'),"
    " lambda: os.unlink(os.__file__))",
)
denied(
    5,
    "leaves its folder by links",
    "tried(lambda: os.symlink($CANARY, 'link'), lambda: os.symlink('/', 'top'))",
    "open('../' * 20 + $CANARY.lstrip('/')).read()",
    "os.mkfifo('pipe')",
)
denied(
    6,
    "links, renames, truncates outside",
    "os.chmod($CANARY, 0)\nos.utime($CANARY, (0, 0))\n"  # without effect: the aftermath looks
    "tried(lambda: os.link($CANARY, 'mine'), lambda: os.rename($CANARY, 'mine'),"
    " lambda: os.replace($CANARY, $CANARY + '2'), lambda: os.truncate($CANARY, 0),"
    " lambda: os.unlink($CANARY))",
    "open('mine', 'w').close()\nos.rename('mine', $CANARY)",
)
denied(
    7,
    "lists folders outside",
    "tried(*(lambda p=p: os.listdir(p) for p in ('/', '/root', '/home', '/tmp', '/etc', '..')))",
)
denied(8, "writes to /dev/shm", "open('/dev/shm/escape', 'w')", "os.listdir('/dev/shm')")
denied(
    10,
    "reads the environment of others",
    "tried(*(lambda p=p: open(f'/proc/{p}/environ').read()"
    " for p in ('self', 'thread-self', 1, os.getpid(), os.getppid())))",
)
denied(
    11,
    "opens the memory of others",
    "tried(*(lambda p=p: open(f'/proc/{p}/mem', 'rb')"
    " for p in ('self', 1, os.getpid(), os.getppid())))",
)
denied(
    14, "traces its parent", "raw('ptrace', 16, os.getppid(), 0, 0)", "raw('ptrace', 0, 0, 0, 0)"
)
denied(
    15,
    "reads the parent's memory",
    "here = (ctypes.c_char * 8)()\n"
    "vector = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)\n"
    "raw('process_vm_readv', os.getppid(), vector, 1, vector, 1, 0)",
)
denied(16, "kills its parent", "os.kill(os.getppid(), 9)", "os.kill(os.getppid(), 15)")
denied(17, "kills everybody", "os.kill(-1, 9)", "os.kill(-1, 15)", "os.kill(1, 9)")
denied(
    18,
    "stops its parent",
    "os.kill(os.getppid(), 19)",
    "os.kill(0, 19)",
    "os.pidfd_open(os.getppid())",
    "import signal\nsignal.pidfd_send_signal(0, 19)",
    "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
)

ALLOWED_ENVIRONMENT = {
    "HOME", "JE_ARROW_MALLOC_CONF", "LANG", "LC_CTYPE", "MALLOC_ARENA_MAX", "MKL_NUM_THREADS",
    "MPLBACKEND", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "TMPDIR",
}  # fmt: skip


@attack(9, "looks for secrets in the environment")
async def environment(world: World) -> None:
    result = await world.call("import os\nprint(*os.environ)\n' '.join(os.environ.values())")
    assert set(result.stdout.split()) <= ALLOWED_ENVIRONMENT, result
    assert world.secret not in str(result)


REACH = """
import resource
tried(lambda: os.kill(PID, 9), lambda: os.kill(PID, 0), lambda: os.kill(PID, 19),
      lambda: open('/proc/PID/mem', 'rb'), lambda: open('/proc/PID/cwd/note'),
      lambda: os.listdir('/proc/PID/fd'), lambda: os.listdir('/proc/PID'),
      lambda: resource.prlimit(PID, resource.RLIMIT_CPU, (0, 0)),
      lambda: raw('ptrace', 16, PID, 0, 0), lambda: open(WHERE).read(),
      lambda: open(WHERE, 'w'), lambda: os.listdir(os.path.dirname(WHERE)))
"""


async def _reach(world: World, *, same_tree: bool) -> None:
    async with world.session() as victim:
        await victim.call("import os\nopen('note', 'w').write('mine')\nown = 7")
        state = victim.state if same_tree else None
        pid = (await victim.call("os.getpid()")).value or ""
        where = (await victim.call("os.path.abspath('note')")).value or ""
        async with world.session(at=state) as attacker:
            own = (await attacker.call("__import__('os').getpid()")).value
            if own == pid:  # process ids of a namespace of its own name nobody else
                pid = str(int(pid) + 1)
            here = (await attacker.call("__import__('os').path.abspath('note')")).value
            attempts = REACH.replace("PID", pid).replace("WHERE", where)
            if here == where:  # its own note, under the name that the other one has
                attempts = REACH.replace("PID", pid).replace("WHERE", "'../note'")
            refused(await attacker.call(PRELUDE + attempts))
            if not same_tree:
                assert (await attacker.call("own")).error_type == "NameError"
        after = await victim.call("open('note').read(), own")
        assert after.value == "('mine', 7)", after


@attack(12, "reaches for a sibling branch")
async def sibling(world: World) -> None:
    await _reach(world, same_tree=True)


@attack(13, "reaches for another tree")
async def stranger(world: World) -> None:
    await _reach(world, same_tree=False)
