"""The processes that confine a program: what `sandbox.run` starts.

The first process (outside of all namespaces) makes a second one in new namespaces of users, mounts,
network and processes; its child is process 1 there, builds a file system of its own, gives up all
rights, sets limits and a filter of system calls, and runs the program. If one of them ends, those
below it are killed by the kernel, and with process 1 everything that it has started.

Only the standard library and `sandbox.kernel` are imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spmdrl.sandbox import kernel

FAILED = 125
"""Exit code where the isolation failed; the reason is the last line on standard error."""

NOBODY = 65534
"""User that programs of root run as."""

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
_FILES = ("/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def main() -> NoReturn:
    """Confine this process's children as the JSON in its first argument says, and run the program.

    Its keys are `parent` (the process that starts this one), `isolated` (False: limits only),
    `root` (an empty directory for the file system's root), `memory_mb`, `disk_mb`, `cpu_s`, `paths`
    (readable besides the system's), and `program` (`module:function` of this package, called with
    the strings of `arguments`).
    """
    settings = json.loads(sys.argv[1])
    _die_with_parent(parent=settings["parent"])
    try:
        code = _in_namespaces(settings) if settings["isolated"] else _with_limits(settings)
    except OSError as error:
        _fail(error)
    os._exit(code)


def _with_limits(settings: Mapping[str, Any]) -> int:
    """Run the program with limits only; what it leaves behind becomes this process's child."""
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    first = os.getpid()
    pid = os.fork()
    if pid == 0:
        _die_with_parent(parent=first)
        os.chdir(settings["root"])
        _limit(settings, processes=True)
        _run(settings)
    return _wait(pid)


def _in_namespaces(settings: Mapping[str, Any]) -> int:
    """Start the second process, say who it is inside, and wait for it."""
    is_root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    ready, mapped = os.pipe(), os.pipe()
    first = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(mapped[1])
            _die_with_parent(parent=first)
            kernel.unshare(kernel.NAMESPACES)
            os.write(ready[1], b"1")
            if not os.read(mapped[0], 1):
                os._exit(FAILED)
            for end in (*ready, mapped[0]):
                os.close(end)
            os._exit(_first_process(settings, is_root=is_root))
        except OSError as error:
            _fail(error)
    os.close(ready[1])
    if os.read(ready[0], 1):
        own = Path(f"/proc/{pid}")
        more = f"\n{NOBODY} {NOBODY} 1" if is_root else ""
        if not is_root:
            (own / "setgroups").write_text("deny")
        (own / "uid_map").write_text(f"0 {user} 1{more}")
        (own / "gid_map").write_text(f"0 {group} 1{more}")
        os.write(mapped[1], b"1")
    for end in (ready[0], *mapped):
        os.close(end)
    return _wait(pid)


def _first_process(settings: Mapping[str, Any], *, is_root: bool) -> int:
    """Start process 1 of the new namespaces, which runs the program, and wait for it."""
    lifeline, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(held)
            _make_root(settings["root"], settings["paths"], settings["disk_mb"])
            os.setsid()
            if is_root:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            kernel.drop_rights()
            _die_with_parent(lifeline)  # now, since a change of user undoes it
            _limit(settings, processes=False)
            kernel.filter_calls()
        except OSError as error:
            _fail(error)
        _run(settings)
    return _wait(pid)


def _make_root(root: str, paths: Sequence[str], disk_mb: int) -> None:
    """Make a root directory of what may be read, and one place that may be written: /tmp."""
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    plain = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", root, "tmpfs", plain, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")  # before the others: Python itself may lie there
    kernel.mount("tmpfs", f"{root}/tmp", "tmpfs", plain, f"size={disk_mb}m,mode=1777")
    for path in dict.fromkeys([*_SYSTEM, *_FILES, *_DEVICES, *paths]):
        source = Path(path)
        inside = Path(f"{root}{path}")
        if source.is_symlink() and path in _SYSTEM:  # /lib -> usr/lib
            inside.symlink_to(os.readlink(source))
        elif source.exists() and not inside.exists():
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.mkdir() if source.is_dir() else inside.touch()
            _bind(str(source), str(inside), plain)
    os.mkdir(f"{root}/proc")
    with contextlib.suppress(OSError):  # some containers hide parts of it, and so forbid a new one
        kernel.mount("proc", f"{root}/proc", "proc", plain | kernel.MS_NOEXEC)
    kernel.enter_root(root)
    locked = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | plain
    kernel.mount(None, "/", None, locked)
    os.chdir("/tmp")


def _bind(source: str, target: str, flags: int) -> None:
    """Show a file or directory at another place, read-only (devices: as they are)."""
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    if not source.startswith("/dev/"):
        # flags that are locked in the source must be kept
        kept = os.statvfs(source).f_flag & (kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
        options = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | flags | kept
        kernel.mount(None, target, None, options)


def _limit(settings: Mapping[str, Any], *, processes: bool) -> None:
    """Limit the memory, CPU time, files and (without a filter) processes of this process."""
    limits = {
        resource.RLIMIT_AS: settings["memory_mb"] << 20,
        resource.RLIMIT_CPU: settings["cpu_s"] + 1,
        resource.RLIMIT_FSIZE: settings["disk_mb"] << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        **({resource.RLIMIT_NPROC: 256} if processes else {}),
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


def _run(settings: Mapping[str, Any]) -> NoReturn:
    module, _, name = settings["program"].partition(":")
    function = getattr(importlib.import_module(f"spmdrl.sandbox.{module}"), name)
    function(*settings["arguments"])
    sys.stdout.flush()
    os._exit(0)


def _die_with_parent(lifeline: int | None = None, parent: int | None = None) -> None:
    """Be killed when the parent ends, and end now if it has ended already.

    Args:
        lifeline: the reading end of a pipe that the parent holds open, where its number is not
            visible; or `parent`, its number.
    """
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    is_gone = parent is not None and os.getppid() != parent
    if lifeline is not None:
        is_gone = bool(select.select([lifeline], [], [], 0)[0])
        os.close(lifeline)
    if is_gone:
        os._exit(FAILED)


def _wait(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code


def _fail(error: OSError) -> NoReturn:
    os.write(2, f"\n{error}".encode())
    os._exit(FAILED)
