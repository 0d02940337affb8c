"""The program that tries what a sandbox must not let it do. Runs inside; prints, as JSON, which attempts were held.

Its input says where to look: a port that listens outside, a file outside, the limits.
"""

import ctypes
import json
import mmap
import os
import socket
import sys


def refused(attempt):
    """True if the attempt raises."""
    try:
        attempt()
    except (OSError, MemoryError):
        return True
    return False


def write_much(total, piece):
    """Files of ``piece`` bytes, more than ``total`` in all."""
    for i in range(2 * total // piece + 1):
        with open(f"big{i}", "wb") as f:
            f.write(bytes(piece))


def forks(wanted):
    """How many processes can be had beside this one, of those wanted."""
    children, (read, write) = [], os.pipe()
    for _ in range(wanted):
        try:
            pid = os.fork()
        except OSError:
            break
        if not pid:
            os.close(write)
            os.read(read, 1)  # until the parent is done
            os._exit(0)
        children.append(pid)
    os.close(write)
    for pid in children:
        os.waitpid(pid, 0)
    return len(children)


def main():
    """Try everything."""
    asked, libc = json.load(sys.stdin), ctypes.CDLL(None, use_errno=True)
    outside = ("/x", "/usr/x", "/program/main.py", "/dev/x")
    held = {
        "network": refused(lambda: socket.create_connection(("127.0.0.1", asked["port"]), 2).close()),
        "files outside": not os.path.exists(asked["file"]) and not os.path.exists("/etc/passwd"),
        "writing outside": all(refused(lambda p=p: open(p, "w").close()) for p in outside),
        "processes outside": os.getppid() == 1 and not os.path.exists("/proc/self"),
        "user": os.geteuid() == 65534,
        "new rights": libc.unshare(0x10000000) != 0 and libc.mount(b"x", b"/work", b"tmpfs", 0, None) != 0,
        "environment": set(os.environ) <= {"PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE"},
        "descriptors": all(refused(lambda n=n: os.fstat(n)) for n in range(4, asked["open_files"])),
        "memory": refused(lambda: bytearray(2 * asked["memory"])),
        "disk": refused(lambda: write_much(asked["disk"], asked["file_size"])),
        "process number": forks(asked["processes"] + 2) < asked["processes"],
        "system calls": refused(lambda: os.memfd_create("x")) and refused(lambda: mmap.mmap(-1, 1)),
    }
    print(json.dumps(held))


if __name__ == "__main__":
    main()
