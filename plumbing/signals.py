"""Signals that ask a process to end, noted so that it can first finish and save what it does."""

import contextlib
import os
import signal
import threading
import time

import torch.distributed as dist

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # schedulers', terminals' and people's


@contextlib.contextmanager
def noted(names, is_master):
    """Meanwhile a signal to end only adds its name to a list, which the master says in a line.

    Those that are ignored stay so, as nohup has it for SIGHUP. A second one acts as usual; but bash and
    timeout send theirs twice, so that within a second only Ctrl-C does, and torchrun passes some on twice,
    so that under it none does.
    """
    usual = {}  # number -> the handler before
    times = {}  # number -> when it came first

    def note(number, frame):
        repeated = number in times
        first = times.setdefault(number, time.monotonic())
        names.append(signal.Signals(number).name)
        if not repeated and is_master:
            with contextlib.suppress(OSError):  # print() may be what the signal has interrupted.
                os.write(2, f"\n{names[-1]}: the step ends, and is saved, first\n".encode())
        is_meant = number == signal.SIGINT or time.monotonic() - first > 1
        if repeated and is_meant and not dist.is_initialized():
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread.
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                usual[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
