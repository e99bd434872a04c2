"""Calls of Linux that isolate a process, by number: Python's library has none of them.

Only the standard library is imported here: a process that is about to be confined imports it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 24, 36
_FILTER = 2


class IsolationError(OSError):
    """The kernel does not allow a step of the isolation."""


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise IsolationError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process (its next child, for process numbers) into namespaces of its own."""
    _checked("unshare", _libc.unshare(flags))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mount as mount(2) does."""
    values = [None if text is None else text.encode() for text in (source, target, kind, data)]
    result = _libc.mount(values[0], values[1], values[2], ctypes.c_ulong(flags), values[3])
    _checked(f"mount of {target}", result)


def enter_root(new: str) -> None:
    """Make the mount point `new` the root directory, and detach the old one."""
    os.mkdir(f"{new}/.old")
    result = _libc.syscall(_NUMBERS["pivot_root"], new.encode(), f"{new}/.old".encode())
    _checked("pivot_root", result)
    os.chdir("/")
    _checked("umount", _libc.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")


def prctl(option: int, *values: int) -> None:
    """Call prctl(2)."""
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _checked(f"prctl {option}", _libc.prctl(option, *arguments))


def drop_rights() -> None:
    """Give up every capability, for good; a program that is executed gains none."""
    for number in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) < 0:
            break  # there are no more, or this process may not: it has none
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, of this thread
    _checked("capset", _libc.syscall(_NUMBERS["capset"], header, bytes(24)))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


# A seccomp filter: a program for the kernel's packet-filter machine (linux/filter.h)

_CALLS = {
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "socket": (41, 198),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "io_uring_setup": (425, 425),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "personality": (135, 92),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "capset": (126, 91),
}
"""Refused calls: their numbers on x86_64 and aarch64, -1 where there is no such call."""

_ARCHITECTURES = {"x86_64": (0xC000003E, 0, 56), "aarch64": (0xC00000B7, 1, 220)}
"""Machine -> audit's number of it, its column of `_CALLS`, and the number of `clone`."""

_CLONE3, _CLONE_THREAD, _X32 = 435, 0x00010000, 0x40000000
_COLUMN = _ARCHITECTURES.get(platform.machine(), (0, 0, 0))[1]
_NUMBERS = {name: numbers[_COLUMN] for name, numbers in _CALLS.items()}

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def filter_program(machine: str) -> Sequence[bytes]:
    """Return the filter's instructions: no new processes or programs, sockets, mounts, namespaces,
    tracing or keys; threads stay allowed. `clone3` counts as unknown, so that the library falls
    back on `clone`, whose flags a filter can read.

    Raises:
        IsolationError: the machine is of another kind.
    """
    if machine not in _ARCHITECTURES:
        raise IsolationError(errno.ENOSYS, f"no filter of system calls for {machine}")
    audit, column, clone = _ARCHITECTURES[machine]
    refused = _instruction(_RETURN, _REFUSE | errno.EPERM)
    program = [
        _instruction(_LOAD, 4),  # the architecture of the call
        _instruction(_EQUAL, audit, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, 0),  # its number
        _instruction(_AT_LEAST, _X32, 0, 1),
        refused,
        _instruction(_EQUAL, _CLONE3, 0, 1),
        _instruction(_RETURN, _REFUSE | errno.ENOSYS),
    ]
    for numbers in _CALLS.values():
        if numbers[column] >= 0:
            program += [_instruction(_EQUAL, numbers[column], 0, 1), refused]
    program += [
        _instruction(_EQUAL, clone, 0, 3),
        _instruction(_LOAD, 16),  # the lower half of its flags
        _instruction(_AND, _CLONE_THREAD, 1, 0),
        refused,
        _instruction(_RETURN, _ALLOW),
    ]
    return program


def filter_calls() -> None:
    """Refuse system calls of this process from now on, see `filter_program`.

    Raises:
        IsolationError: the kernel has no such filters.
    """
    instructions = b"".join(filter_program(platform.machine()))
    code = ctypes.create_string_buffer(instructions, len(instructions))
    length = len(instructions) // 8
    program = struct.pack("HxxxxxxP", length, ctypes.addressof(code))
    held = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SET_SECCOMP, _FILTER, ctypes.addressof(held))
