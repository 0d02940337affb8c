"""What holds a hostile program: Linux namespaces, a root of its own, no rights, a filter of system calls.

Runs in the launcher's process only (``launcher.py``), never in ours, and imports nothing but the standard library. All
of it works without being root where the kernel lets users make user namespaces; root gets another user on top.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from typing import Any

NOBODY = 65534  # the program's user inside, and for root outside too
WORK, PROGRAM = "/work", "/program"  # the one writable folder; where its files stand

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET, _NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
_NAMESPACES = _NEWUSER | _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_BIND, _REC, _PRIVATE = 0x1000, 0x4000, 0x40000
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_DETACH = 2
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x8000, 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_DEVICES = ("null", "full", "random", "urandom")  # not zero: what is mapped of it and shared is memory nobody counts

# Calls that reach beyond the sandbox or into the kernel's least tested corners. (x86_64, aarch64)
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_getfd": (438, 438), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "open_tree": (428, 428), "unshare": (272, 97), "setns": (308, 268), "sethostname": (170, 161),
    "setdomainname": (171, 162), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "vmsplice": (278, 75), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "personality": (135, 92),
}  # fmt: skip
_AUDIT = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, the kernel's name of the architecture
_CLONE, _CLONE3, _SOCKET, _PRLIMIT = (56, 220), (435, 435), (41, 198), (302, 261)
_MMAP, _SETSOCKOPT, _SHARED, _ANONYMOUS, _SNDBUF = (9, 222), (54, 208), 1, 0x20, 7

libc: Any = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """A part of the containment that this machine does not offer."""


def _call(what: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise Unavailable(f"{what}: {os.strerror(code)} ({errno.errorcode.get(code, code)})")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    args = (source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), options.encode())
    _call(f"mount {target}", libc.mount(*args))


def _read_only(path: str, recursive: bool, attributes: int = _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV) -> None:
    """Every mount at and below ``path``: no writing, no set-user-id, no devices."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    at = ctypes.c_int(-100)  # AT_FDCWD
    flags = ctypes.c_uint(_AT_RECURSIVE if recursive else 0)
    result = libc.syscall(_SYS_MOUNT_SETATTR, at, path.encode(), flags, wanted, ctypes.c_size_t(len(wanted)))
    _call("read-only mounts (mount_setattr, Linux 5.12 or newer)", result)


def enter_namespaces() -> str:
    """New user, process, network, mount, IPC, host name and cgroup namespaces for this process's next child.

    -> who the program will be outside. Root keeps its user numbers, so that the program can be another user; anybody
    else can only be mapped to himself.
    """
    root = os.geteuid() == 0
    helper, (read, write) = 0, os.pipe()
    own, groups = _map("uid_map"), _map("gid_map")
    if root:  # only a process outside may write a map of several users
        parent, helper = os.getpid(), os.fork()
        if not helper:
            os.read(read, 1)
            with contextlib.suppress(OSError):
                for name, ranges in (("uid_map", own), ("gid_map", groups)):
                    text = "".join(f"{inside} {inside} {count}\n" for inside, _, count in ranges)
                    _write(f"/proc/{parent}/{name}", text)
            os._exit(0)
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call("namespaces (unshare)", libc.unshare(_NAMESPACES))
    finally:
        os.write(write, b"x")
        if helper:
            os.waitpid(helper, 0)
        os.close(read)
        os.close(write)
    if not root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return "own user, without rights"
    if not _map("uid_map"):
        raise Unavailable("the user map of the namespace cannot be written")
    return "another user (nobody)"


def _map(name: str) -> list[list[str]]:
    """Ranges of this process's users or groups: (inside, outside, count)."""
    with open(f"/proc/self/{name}", encoding="ascii") as f:
        return [line.split() for line in f]


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def build_root(prefixes: list[str], files: dict[str, str], disk: int, inodes: int) -> int:
    """A root that holds the system's programs read-only, the program's files and one small writable folder.

    Called by the first process of the namespace. -> a descriptor of its ``/proc``, which the program cannot see.
    """
    os.umask(0o022)
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=16m,mode=0755")
    os.mkdir("/tmp/old")
    _call("pivot_root", _pivot("/tmp", "/tmp/old"))
    os.chdir("/")
    os.mkdir("/new")
    _mount("tmpfs", "/new", "tmpfs", _NOSUID | _NODEV, "size=16m,mode=0755")
    for path in (WORK, PROGRAM, "/proc"):
        os.makedirs(f"/new{path}", exist_ok=True)
    options = f"size={disk},nr_inodes={inodes},mode=0700,uid={NOBODY},gid={NOBODY}"
    _mount("tmpfs", f"/new{WORK}", "tmpfs", _NOSUID | _NODEV, options)
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", *prefixes):
        _show(path)
    for device in _DEVICES:
        _show(f"/dev/{device}", device=True)
    for name, text in files.items():
        with open(f"/new{PROGRAM}/{name}", "w", encoding="utf-8", errors="surrogatepass") as f:
            f.write(text)
    if not os.path.lexists("/new/tmp"):  # where the interpreter may stand
        os.symlink(WORK, "/new/tmp")
    _mount("proc", "/new/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    processes = os.open("/new/proc", os.O_RDONLY | os.O_DIRECTORY)
    _write("/new/proc/sys/user/max_user_namespaces", "0")  # no rights by another namespace
    _call("umount /proc", libc.umount2(b"/new/proc", _DETACH))
    _read_only("/new", recursive=False)
    os.chdir("/new")
    _call("pivot_root", _pivot(".", "."))
    _call("umount of the old root", libc.umount2(b".", _DETACH))
    os.chdir(WORK)
    libc.sethostname(b"sandbox", 7)
    return processes


def _pivot(new: str, old: str) -> int:
    number = {"x86_64": 155}.get(platform.machine(), 41)
    return int(libc.syscall(number, new.encode(), old.encode()))


def _show(path: str, device: bool = False) -> None:
    """A path of the old root at the same place in the new one; a link stays a link."""
    old, new = f"/old{path}", f"/new{path}"
    if os.path.lexists(new) or not os.path.lexists(old):
        return
    os.makedirs(os.path.dirname(new), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), new)
        return
    if os.path.isdir(old):
        os.mkdir(new)
    else:
        open(new, "w").close()
    _mount(old, new, None, _BIND | _REC)
    _read_only(new, True, _ATTR_NOSUID if device else _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)


def guard_supervisor() -> None:
    """The first process dies with its parent, and nobody may look into its memory."""
    libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants that lose their parent become ours, so that they can be found and killed (Linux)."""
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def become_nobody() -> None:
    """Root becomes nobody, without groups; anybody else is already all he can be."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_rights() -> None:
    """No capability, now or after any exec."""
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused for numbers the kernel does not have
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("dropping rights (capset)", libc.capset(header, none))
    _call("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def filter_calls() -> bool:
    """Refuse the calls above, new namespaces, all but Unix sockets, limits of other processes. False: not done here.

    And memory that belongs to no process, so that no limit would count it: shared and anonymous, in sockets' buffers.
    """
    if platform.machine() not in _AUDIT:
        return False
    column, audit = _AUDIT[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    numbers = [pair[column] for pair in _DENIED.values()]
    # The program ends in: allow, refuse, not implemented. Jumps are counted from the next line.
    lines: list[tuple[int, int | str, int | str, int]] = [(load, 0, 0, 4), (equal, 0, "refuse", audit), (load, 0, 0, 0)]
    lines += [(at_least, "refuse", 0, 0x40000000)] if platform.machine() == "x86_64" else []  # the x32 twins
    lines += [(equal, "refuse", 0, n) for n in numbers]
    lines += [(equal, "missing", 0, _CLONE3[column])]  # its flags lie in memory; libraries then use clone
    for number, first in ((_SOCKET[column], 1), (_PRLIMIT[column], 0)):  # a Unix socket; limits of one's own process
        lines += [(equal, 0, 2, number), (load, 0, 0, 16), (equal, "allow", "refuse", first)]
    lines += [(equal, 0, 3, _MMAP[column]), (load, 0, 0, 40), (any_bit, 0, "allow", _SHARED)]
    lines += [(any_bit, "refuse", "allow", _ANONYMOUS)]
    lines += [(equal, 0, 2, _SETSOCKOPT[column]), (load, 0, 0, 32), (equal, "refuse", "allow", _SNDBUF)]
    flags = _NAMESPACES | _NEWTIME
    lines += [(equal, 0, "allow", _CLONE[column]), (load, 0, 0, 16), (any_bit, "refuse", "allow", flags)]
    ends = {"allow": len(lines), "refuse": len(lines) + 1, "missing": len(lines) + 2}
    lines += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x50000 | errno.EPERM), (give, 0, 0, 0x50000 | errno.ENOSYS)]
    place = lambda i, to: ends[to] - i - 1 if isinstance(to, str) else to  # noqa: E731
    code = b"".join(struct.pack("HBBI", op, place(i, yes), place(i, no), k) for i, (op, yes, no, k) in enumerate(lines))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(buffer))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0) == 0)
