"""Attacks 19 to 32 and 68: the network, and what the kernel might be talked into."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack, denied

from sandbox.results import Kind

if TYPE_CHECKING:
    from host import World

denied(
    19,
    "connects by TCP",
    "import socket\nsocket.create_connection(('127.0.0.1', $PORT), 1)",
    "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)",
    "import socket\nsocket.create_server(('', 0))",
    "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:$PORT', timeout=1)\n"
    "except urllib.error.URLError as error: raise error.reason",
)
denied(
    20,
    "sends by UDP",
    "import socket\nsocket.socket(2, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $PORT))",
    "import socket\nsocket.socket(10, socket.SOCK_DGRAM).sendto(b'x', ('::1', $PORT))",
    "import socket\ntry: socket.getaddrinfo('example.org', 80)\n"
    "except socket.gaierror as error: raise PermissionError(1, str(error))",
)
denied(
    21,
    "opens other kinds of socket",
    "import socket\ntried(*(lambda f=f, k=k: socket.socket(f, k)"
    " for f in (1, 16, 17, 40, 38, 44) for k in (1, 2, 3, 5)))",
    "import socket\nsocket.socketpair(1, socket.SOCK_DGRAM)",
)
denied(
    23,
    "executes a program",
    "os.execv('/bin/sh', ['sh', '-c', 'id'])",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "import subprocess\nsubprocess.run([sys.executable, '-c', '1'])",
    "import subprocess\nsubprocess.run('id', shell=True)",
    "if os.system('id') == 0: raise SystemExit\nraise PermissionError(1, 'no')",
    "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
)
denied(
    24,
    "executes from memory",
    "os.memfd_create('x')",
    "open('tool', 'wb').write(b'#!/bin/sh\\n')\nos.execv('tool', ['tool'])",
    "open('tool', 'wb').write(b'#!/bin/sh\\n')\nos.execve(os.open('tool', 0), ['tool'], {})",
)
NUMBERS = {  # x86_64, aarch64
    "bpf": (321, 280), "clone": (56, 220), "clone3": (435, 435), "fsopen": (430, 430),
    "init_module": (175, 105), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "mount_setattr": (442, 442), "perf_event_open": (298, 241), "pivot_root": (155, 41),
    "reboot": (169, 142), "request_key": (249, 218), "setns": (308, 268), "swapon": (167, 224),
    "userfaultfd": (323, 282),
}  # fmt: skip
COLUMN = 0 if platform.machine() == "x86_64" else 1
NUMBER = {name: numbers[COLUMN] for name, numbers in NUMBERS.items()}
denied(
    25,
    "makes namespaces",
    *(f"raw('unshare', {kind:#x})" for kind in (0x10000000, 0x20000, 0x40000000, 0x20000000)),
    f"raw({NUMBER['clone']}, 0x10000011, 0, 0, 0, 0)",
    f"raw({NUMBER['clone']}, 0x00008011 | 0x10000000, 0, 0, 0, 0)",
    f"raw({NUMBER['clone3']}, ctypes.create_string_buffer(88), 88)",
    f"raw({NUMBER['setns']}, 0, 0)",
)
denied(
    26,
    "changes what is mounted",
    "raw('mount', b'none', b'.', b'tmpfs', 0, None)",
    "raw('umount2', b'/', 2)",
    "os.chroot('.')",
    f"raw({NUMBER['pivot_root']}, b'.', b'.')",
    f"raw({NUMBER['fsopen']}, b'tmpfs', 0)",
    f"raw({NUMBER['mount_setattr']}, -100, b'/', 0, ctypes.create_string_buffer(32), 32)",
)
denied(
    27,
    "becomes another user",
    "tried(lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setresuid(0, 0, 0),"
    " lambda: os.setgroups([0]), lambda: os.setsid(), lambda: os.setpgid(0, 0))",
    "header, data = ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20', 8), (ctypes.c_uint * 6)"
    "(*[2**32 - 1] * 6)\nraw('capset', header, data)",
)
denied(29, "undoes no_new_privs", "raw('prctl', 38, 0, 0, 0, 0)", "raw('prctl', 4, 1, 0, 0, 0)")
denied(
    30,
    "uses risky parts of the kernel",
    *(
        f"raw({NUMBER[name]}, 8, ctypes.create_string_buffer(256), 64, 0, 0)"
        for name in ("io_uring_setup", "bpf", "perf_event_open", "keyctl", "init_module", "reboot")
    ),
    f"raw({NUMBER['userfaultfd']}, 1)",
)
denied(
    68,
    "sets the clock, hurries itself",
    "__import__('time').clock_settime(0, 1)",
    "os.nice(-20)",
    "os.sched_setscheduler(0, 1, os.sched_param(50))",
    "os.sched_setaffinity(0, {0})",
)


@attack(22, "uses inherited descriptors")
async def descriptors(world: World) -> None:
    result = await world.call(
        "import os, stat\ndef kind(n):\n    try: return stat.S_IFMT(os.fstat(n).st_mode)\n"
        "    except OSError: return 0\n"
        "{n: oct(kind(n)) for n in range(4096) if kind(n)}"
    )
    # a pipe with nothing to read, two to print to, the control channel, and where there are
    # branches the session's own folder
    seen = str(result.value).removesuffix(", 4: '0o40000'}").removesuffix("}")
    assert seen == "{0: '0o10000', 1: '0o10000', 2: '0o10000', 3: '0o140000'", result


@attack(28, "raises its limits")
async def raises_limits(world: World) -> None:
    for name in ("AS", "NPROC", "NOFILE", "FSIZE", "CORE", "MEMLOCK"):
        for wanted in ("(1 << 40, 1 << 40)", "(r.RLIM_INFINITY, r.RLIM_INFINITY)"):
            code = f"import resource as r\nr.setrlimit(r.RLIMIT_{name}, {wanted})"
            result = await world.call(code)
            assert result.kind is Kind.ERROR and "limit" in result.traceback, result


MACHINE_CODE = """
import mmap
page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
page.write(bytes.fromhex("{code}"))
ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


@attack(31, "calls the kernel by other doors")
async def other_doors(world: World) -> None:
    if platform.machine() == "x86_64":
        getpid_by_int80 = "b814000000cd80c3"  # mov eax, 20; int 0x80; ret
        getpid_by_x32 = "b8270000400f05c3"  # mov eax, 0x40000000 + 39; syscall; ret
        codes = [getpid_by_int80, getpid_by_x32]
    else:
        codes = ["00000000"]  # no other door: an undefined instruction
    for code in codes:
        result = await world.call(PRELUDE + MACHINE_CODE.replace("{code}", code))
        assert result.kind is Kind.KILLED, result


@attack(32, "tries every system call that is not allowed")
async def every_call(world: World) -> None:
    from sandbox.seccomp import _CONDITIONAL
    from sandbox.syscalls import ALLOWED, FEIGNED, NUMBERS

    may = {NUMBERS[name][COLUMN] for name in (*ALLOWED, *_CONDITIONAL, *FEIGNED)}
    beyond_filters = {335, 336} if COLUMN == 0 else set()  # uretprobe, uprobe: SIGILL by themselves
    others = sorted(set(range(470)) - may - beyond_filters)
    code = (
        f"passed = []\nfor number in {others}:\n"
        "    if libc.syscall(number, *[ctypes.c_long(0)] * 6) != -1"
        " or ctypes.get_errno() not in (1, 11, 38, 95):\n"
        "        passed.append(number)\npassed"
    )
    result = await world.call(PRELUDE + code)
    assert result.value == "[]" and len(others) > 250, result
