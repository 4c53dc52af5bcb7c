"""Jobs shared out to processes, with results in the order of the jobs."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types

from plumbing.machine import interrupts_held


def run_in_order(function, jobs, num_workers):
    """Yields function(*job) for each job, in order; with one worker, all of it happens in this process.

    jobs: tuples of arguments, of which the first is a path that errors can name. What the function raises is
    raised here, and OSError if a worker was killed. However this ends, no worker is left.
    """
    if num_workers == 1:
        yield from itertools.starmap(function, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # The caller may have threads (torch's), which fork breaks.
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, initializer=end_with_parent)
    path = None
    try:
        results = []
        with interrupts_held():  # Ctrl-C interrupts this process alone, which then kills the workers.
            for job in jobs:
                path = job[0]
                try:
                    with script_hidden(function):  # The pool starts workers as jobs come.
                        results.append(pool.submit(function, *job))
                except (OSError, ValueError):  # A worker has died, and the pool is closing its pipes.
                    raise concurrent.futures.BrokenExecutor from None
        for job, result in zip(jobs, results, strict=True):
            path = job[0]
            yield result.result()
    except concurrent.futures.BrokenExecutor:
        raise OSError(f"{path}: its worker, or that of a later shard, was killed; if memory ran out, try "
                      "fewer --num_workers") from None
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown()


@contextlib.contextmanager
def script_hidden(function):
    """Keeps workers that start here from running the caller's script, unless the function stands in it.

    A script that isn't guarded by `if __name__ == "__main__":` would do everything again in every worker.
    """
    script = sys.modules["__main__"]
    if function.__module__ != "__main__":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def end_with_parent():
    """Ends this worker when its parent is killed; it would otherwise wait for jobs for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows can't hold Ctrl-C back from a worker.
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
