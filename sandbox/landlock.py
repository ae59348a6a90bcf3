"""A file layer by Landlock: nothing can be opened but what a rule grants.

Landlock governs opening, creating, removing and listing. It does not govern `stat` and friends,
nor changes of mode and owner; the seccomp filter denies the latter.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_LIBC = ctypes.CDLL(None, use_errno=True)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 16, 32
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 13, 1 << 14

READ = _READ_FILE | _READ_DIR
"""Read files and list folders."""
WORK = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
"""Also write, create, move, remove plain files and folders; no links, pipes, sockets, devices."""
DEVICE = _READ_FILE | _WRITE_FILE

_FILE_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}


def _call(number: int, *arguments: object, what: str) -> int:
    result = _LIBC.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return int(result)


def _handled(abi: int) -> tuple[int, bytes]:
    """File rights that this ABI governs, and the attribute that has all it can govern denied."""
    files = _FILE_RIGHTS_BY_ABI[max(known for known in _FILE_RIGHTS_BY_ABI if known <= abi)]
    tcp = 3 if abi >= 4 else 0
    scopes = 3 if abi >= 6 else 0  # abstract sockets and signals across the border
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    return files, struct.pack("<QQQ", files, tcp, scopes)[:size]


def create(grants: Iterable[tuple[int, int]]) -> int:
    """A ruleset's descriptor. `grants` pairs an O_PATH descriptor with rights. Raises OSError."""
    no_pointer, no_size = ctypes.c_void_p(None), ctypes.c_size_t(0)
    abi = _call(_CREATE_RULESET, no_pointer, no_size, 1, what="landlock_create_ruleset")
    files, attribute = _handled(abi)
    size = ctypes.c_size_t(len(attribute))
    ruleset = _call(_CREATE_RULESET, attribute, size, 0, what="landlock_create_ruleset")
    for descriptor, rights in grants:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= DEVICE | _TRUNCATE
        rule = struct.pack("<Qi", rights & files, descriptor)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0, what="landlock_add_rule")
    return ruleset


def restrict(ruleset: int) -> None:
    """Put the calling thread, for good, under `ruleset`. Needs no_new_privs. Raises OSError."""
    _call(_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
