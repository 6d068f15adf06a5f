"""A child process that the kernel kills when its parent dies: `python leash.py PARENT COMMAND...`.

Owns the one system call for that, made by the child itself before it becomes COMMAND: no code runs
between fork and exec in a parent that has threads. Refuses to know ranks; imports nothing heavy,
for it is run by path. The kernel remembers the parent's *thread*: whoever starts a leashed child
does so on a thread that outlives it. Grandchildren are not on the leash: `guard.py` is for them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

NOT_EXECUTABLE, NOT_FOUND, PARENT_GONE = 126, 127, 128 + signal.SIGKILL
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> bool:
    """Have this process killed when its parent ends; False where that has happened already.

    Raises OSError where the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent_pid


def main() -> int:
    """Become the command; returns only where that is not possible."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if not die_with_parent(parent_pid):
        return PARENT_GONE
    # Python ignores these, and a program would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}; limit a program; check the command\n")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main())
