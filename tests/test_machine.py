"""What the machine allows: limits of containers as folders of files, and systems that lack Linux's calls."""

import importlib.util
import mmap
import os
import signal
from multiprocessing import resource_tracker
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

from plumbing import fast, files, machine
from plumbing.workers import run_in_order

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a machine of 8 cores and 64 GB, path -> text, and returns the folder they lie in."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GB}))

    def write(contents):
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path
    return write


V1 = {"proc/self/cgroup": "12:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n1:name=systemd:/x"}
V2 = {"proc/self/cgroup": "0::/job/step"}
TREE = "sys/fs/cgroup"


@pytest.mark.parametrize("contents, cores", [
    ({}, 8), (V1, 8), (V2, 8),
    (V2 | {f"{TREE}/job/step/cpu.max": "max 100000"}, 8),
    (V2 | {f"{TREE}/job/step/cpu.max": "200000 100000"}, 2),
    (V2 | {f"{TREE}/job/step/cpu.max": "150000 100000"}, 2),
    (V2 | {f"{TREE}/job/step/cpu.max": "10000 100000"}, 1),
    (V2 | {f"{TREE}/job/step/cpu.max": "6400000 100000"}, 8),
    (V2 | {f"{TREE}/job/step/cpu.max": "max 100000", f"{TREE}/job/cpu.max": "300000 100000"}, 3),
    (V2 | {f"{TREE}/cpu.max": "400000 100000"}, 4),  # A container sees its own group as the outermost.
    ({"proc/self/cgroup": "0::/", f"{TREE}/cpu.max": "400000 100000"}, 4),
    ({"proc/self/cgroup": "0::/", f"{TREE}/unified/cpu.max": "400000 100000"}, 4),
    (V1 | {f"{TREE}/cpu/docker/a/cpu.cfs_quota_us": "-1",
           f"{TREE}/cpu/docker/a/cpu.cfs_period_us": "100000"}, 8),
    (V1 | {f"{TREE}/cpu/docker/a/cpu.cfs_quota_us": "250000",
           f"{TREE}/cpu/docker/a/cpu.cfs_period_us": "100000"}, 3),
    (V1 | {f"{TREE}/cpu,cpuacct/cpu.cfs_quota_us": "50000",
           f"{TREE}/cpu,cpuacct/cpu.cfs_period_us": "50000"}, 1)])
def test_usable_cores_are_those_of_the_affinity_and_the_quota(contents, cores, system):
    assert machine.usable_cores(system(contents)) == cores


@pytest.mark.parametrize("contents, free", [
    ({}, 64), (V2 | {f"{TREE}/job/step/memory.max": "max", f"{TREE}/job/step/memory.current": 5 * GB}, 64),
    (V2 | {f"{TREE}/job/step/memory.max": 8 * GB, f"{TREE}/job/step/memory.current": 5 * GB}, 3),
    (V2 | {f"{TREE}/job/step/memory.max": 8 * GB, f"{TREE}/job/step/memory.current": 5 * GB,
           f"{TREE}/job/step/memory.stat": f"anon 7\nactive_file {GB}\ninactive_file {2 * GB}"}, 6),
    (V2 | {f"{TREE}/job/step/memory.max": "max", f"{TREE}/job/step/memory.current": 5 * GB,
           f"{TREE}/job/memory.max": 7 * GB, f"{TREE}/job/memory.current": 6 * GB}, 1),
    (V2 | {f"{TREE}/memory.max": 4 * GB, f"{TREE}/memory.current": 5 * GB}, 0),
    (V2 | {f"{TREE}/memory.max": 400 * GB, f"{TREE}/memory.current": 5 * GB}, 64),
    (V1 | {f"{TREE}/memory/docker/a/memory.limit_in_bytes": 2**63 - 4096,
           f"{TREE}/memory/docker/a/memory.usage_in_bytes": 5 * GB}, 64),
    (V1 | {f"{TREE}/memory/memory.limit_in_bytes": 8 * GB, f"{TREE}/memory/memory.usage_in_bytes": 5 * GB,
           f"{TREE}/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB}"}, 4)])
def test_free_memory_is_what_the_machine_and_its_containers_leave(contents, free, system):
    assert machine.free_memory(system(contents)) == free * GB


def test_memory_is_checked_against_the_limit_of_a_container(system, monkeypatch):
    root = system(V2 | {f"{TREE}/memory.max": 3 * GB, f"{TREE}/memory.current": GB})
    free_memory = machine.free_memory
    monkeypatch.setattr(machine, "free_memory", lambda: free_memory(root))
    fast.check_memory("weights", 2 * GB, torch.device("cpu"))
    with pytest.raises(ValueError, match="weights take 2.10 GB, cpu has 2.00 GB free"):
        fast.check_memory("weights", 2.1 * GB, torch.device("cpu"))


@pytest.mark.parametrize("quota, given, before, after", [
    (200000, None, 6, 2), (200000, None, 1, 1), (200000, "6", 6, 6), ("max", None, 6, 6)])
def test_threads_are_no_more_than_a_quota_unless_they_were_given(quota, given, before, after, system,
                                                                 monkeypatch):
    root = system(V2 | {f"{TREE}/cpu.max": f"{quota} 100000"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        machine.limit_threads(root)
        assert torch.get_num_threads() == after
    finally:
        torch.set_num_threads(usual)


def test_a_system_without_affinity_counts_its_cores(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert machine.usable_cores(tmp_path) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores(tmp_path) == 1


def test_workers_do_without_a_mask_of_signals(monkeypatch):
    resource_tracker.ensure_running()  # Python starts it here, not on Windows.
    monkeypatch.delattr(signal, "pthread_sigmask")
    assert list(run_in_order(os.path.basename, [("a/b",), ("c/d",), ("e",)], 2)) == ["b", "d", "e"]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows can't hold Ctrl-C back")
def test_interrupts_are_held_only_meanwhile():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with machine.interrupts_held():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_memory_for_weights_does_without_kinds_of_pages(monkeypatch):
    for name in ("MAP_PRIVATE", "MADV_HUGEPAGE"):
        monkeypatch.delattr(mmap, name, raising=False)
    memory = machine.private_memory(100)
    memory[99] = 7
    assert len(memory) == 100


def test_a_folder_of_files_that_can_only_be_read_is_completed(tmp_path):
    with files.complete_folder(tmp_path / "folder") as part:
        (part / "file").write_text("text")
        (part / "file").chmod(0o444)
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_windows_flushes_files_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    modes = []
    monkeypatch.setattr(machine.sys, "platform", "win32")
    monkeypatch.setattr(machine, "open", lambda path, mode: modes.append(mode) or open(path, mode),
                        raising=False)
    machine.flush_to_disk(tmp_path / "file")
    assert modes == ["r+b"]


def test_kernels_are_found_behind_a_link_to_the_file_beside_them(tmp_path, monkeypatch):
    (tmp_path / "fast.py").symlink_to(fast.__file__)
    spec = importlib.util.spec_from_file_location("linked", tmp_path / "fast.py")
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    asked = []
    monkeypatch.setattr(linked, "compile_library", lambda path: asked.append(path) or mock.MagicMock())
    linked.compile_kernels()
    assert asked == [Path(fast.__file__).resolve().with_name("fast.cpp")]
