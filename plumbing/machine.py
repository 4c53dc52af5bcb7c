"""What the machine allows: cores and memory of a container, Ctrl-C held back, a terminal's keys."""

import contextlib
import math
import mmap
import os
import select
import signal
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

# -----------------------------------------------------------------------------
# A container's limits
#
# Linux calls what a container or a batch job is a control group. Groups lie in groups, each with its limits.


def groups(controller, root):
    """The folders of this process's control group and of those around it; none elsewhere than on Linux.

    controller: cpu or memory. Version 2 has one tree of folders for all controllers, version 1 one for each.
    root: the folder in which proc and sys lie.
    """
    folders = []
    for line in lines(Path(root, "proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            trees = [controller, controllers]
        else:
            trees = [] if controllers else ["", "unified"]
        for tree in trees:
            top = Path(root, "sys/fs/cgroup", tree)
            group = top / path.lstrip("/")
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return folders


def lines(path):
    """The lines of a file of the system's; none where it is absent or can't be read."""
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


def numbers(folder, *names):
    """The numbers in some files of a folder, without words such as max, and -1, which mean no limit."""
    words = " ".join(line for name in names for line in lines(folder / name)).split()
    return [int(word) for word in words if word.isdecimal()]


def usable_cores(root="/"):
    """How many cores this process may keep busy, as its affinity and its containers' quotas allow."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it.
        cores = len(os.sched_getaffinity(0))
    for folder in groups("cpu", root):
        limit = numbers(folder, "cpu.max") or numbers(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us")
        if len(limit) == 2:  # microseconds of computing, and in how many
            cores = min(cores, math.ceil(limit[0] / limit[1]))
    return max(1, cores)


def free_memory(root="/"):
    """Bytes that this process can still take, of the machine's memory and of its containers' limits."""
    free = psutil.virtual_memory().available
    for folder in groups("memory", root):
        limit = numbers(folder, "memory.max") or numbers(folder, "memory.limit_in_bytes")
        used = numbers(folder, "memory.current") or numbers(folder, "memory.usage_in_bytes")
        if not limit or not used:
            continue
        stat = dict(line.split(maxsplit=1) for line in lines(folder / "memory.stat"))
        for name in ("active_file", "inactive_file"):  # cached files, which give way
            cached = stat.get(f"total_{name}", stat.get(name, 0))  # Version 1 counts inner groups as total.
            used[0] -= int(cached)
        free = min(free, max(0, limit[0] - used[0]))
    return free


def limit_threads(root="/"):
    """Lets torch, where it is loaded, use no more threads than there are usable cores: for commands.

    It knows of no quota, and threads beyond it wait for each other most of the time.
    """
    torch = sys.modules.get("torch")
    if torch and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores(root):
        torch.set_num_threads(usable_cores(root))


def peak_process_memory():
    """Bytes: the most that this process has taken of the machine's memory so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def private_memory(num_bytes):
    """That much memory as a mmap, in pages of 2 MB where the system has them."""
    kind = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}  # Windows has one kind.
    memory = mmap.mmap(-1, num_bytes, **kind)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory

# -----------------------------------------------------------------------------
# Files and processes


def flush_to_disk(path):
    """Returns when all of a file is on its disk; Windows wants a file that can be written, others don't."""
    with open(path, "r+b" if sys.platform == "win32" else "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def interrupts_held():
    """Holds Ctrl-C back, for ever from processes that are started meanwhile; Windows can't."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # If it started later, it would let Ctrl-C through.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

# -----------------------------------------------------------------------------
# The terminal


def has_input(stream, seconds):
    """Whether a terminal has further input, at the latest after so many seconds."""
    if sys.platform == "win32":
        import msvcrt
        time.sleep(seconds)
        return msvcrt.kbhit()
    return bool(select.select([stream], [], [], seconds)[0])


@contextlib.contextmanager
def keys_at_once(stream):
    """Lets a terminal pass on every key at once, not whole lines, which it cuts at 4,095 bytes.

    Windows has no such mode.
    """
    if sys.platform == "win32":
        yield
        return
    import termios
    before = termios.tcgetattr(stream)
    mode = before.copy()
    mode[3] &= ~termios.ICANON
    termios.tcsetattr(stream, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # The terminal may be gone.
            termios.tcsetattr(stream, termios.TCSADRAIN, before)
