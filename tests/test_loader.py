"""DistributedShardedDataLoader against a model of its numbering, on huge shards, and on damaged ones."""

import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import output, shard_bytes

from llama31 import DistributedShardedDataLoader

HEADER = 1024  # bytes


def write_shard(path, tokens, **header):
    path.write_bytes(shard_bytes(tokens, **header))


def write_shards(folder, sizes):
    """Shards of the given sizes; every token is another number, and needs more than 16 bits."""
    begin = 70_000
    for i, size in enumerate(sizes):
        write_shard(Path(folder, f"{i:02}.bin"), range(begin, begin + size))
        begin += size


def windows_of(sizes, T):
    """The model: the first token of every window, in order."""
    return [70_000 + sum(sizes[:i]) + k * T for i, n in enumerate(sizes) for k in range((n - 1) // T)]


def loaders_of(folder, B, T, N, **flags):
    return [DistributedShardedDataLoader(f"{folder}/*.bin", B, T, r, N, **flags) for r in range(N)]


def read(loaders, calls):
    """The first tokens of the windows that so many calls on every rank give, call by call, rank by rank."""
    firsts = []
    for _ in range(calls):
        for loader in loaders:
            x, y = loader.next_batch()
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (loader.B, loader.T)
            begin = x[:, :1]
            assert torch.equal(x, begin + torch.arange(loader.T)) and torch.equal(y, x + 1)
            firsts += begin[:, 0].tolist()
    return firsts


def calls_for(windows, B, ranks, epochs):
    return math.ceil(epochs * len(windows) / (B * ranks))


@st.composite
def layouts(draw):
    """(T, sizes of shards that hold a window at least)."""
    T = draw(st.integers(1, 6))
    around = [0, 1, 2, T - 1, T, T + 1, T + 2, 2 * T, 2 * T + 1]
    sizes = draw(st.lists(st.one_of(st.sampled_from(around), st.integers(0, 40)), min_size=1, max_size=6))
    return T, sizes if max(sizes) > T else [*sizes, T + 1]


many = settings(max_examples=60, deadline=None, derandomize=True)
batches, ranks_ = st.integers(1, 5), st.integers(1, 4)


@many
@given(layouts(), batches, ranks_, st.integers(1, 3))
@example((4, [0, 1, 4, 5, 9]), 5, 4, 2)  # B * ranks is several epochs
def test_every_row_of_every_rank_has_the_window_of_the_contract(layout, B, N, epochs):
    """Row b of rank r of N has at call s window ((s N + r) B + b) mod W."""
    T, sizes = layout
    windows = windows_of(sizes, T)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, sizes)
        loaders = loaders_of(folder, B, T, N)
        assert {loader.ntok_total for loader in loaders} == {sum(sizes)}
        S = calls_for(windows, B, N, epochs)
        expected = [windows[((s * N + r) * B + b) % len(windows)]
                    for s in range(S) for r in range(N) for b in range(B)]
        assert read(loaders, S) == expected
        for loader in loaders:
            loader.reset()
        assert read(loaders, S) == expected


@many
@given(layouts(), batches, ranks_, ranks_, st.integers(0, 7), st.booleans(), batches)
def test_a_state_of_n_ranks_goes_on_with_m_ranks_where_it_stopped(layout, B, N, M, calls, shuffle, other_B):
    T, sizes = layout
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, sizes)
        length = calls * N * B + 3 * M * other_B
        [alone] = loaders_of(folder, 1, T, 1, shuffle=shuffle)
        expected = read([alone], length)
        before = loaders_of(folder, B, T, N, shuffle=shuffle)
        seen = read(before, calls)
        [state] = {tuple(loader.state_dict().items()) for loader in before}  # the same on every rank
        after = loaders_of(folder, other_B, T, M, shuffle=shuffle)
        for loader in after:
            loader.load_state_dict(dict(state))
        assert seen + read(after, 3) == expected


@many
@given(layouts(), batches, ranks_, st.integers(0, 2**32))
def test_shuffled_windows_come_once_an_epoch_in_an_order_of_the_seed(layout, B, N, seed):
    T, sizes = layout
    windows = windows_of(sizes, T)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, sizes)
        [alone] = loaders_of(folder, 1, T, 1, shuffle=True, seed=seed)
        order = read([alone], 3 * len(windows))
        for epoch in range(3):
            assert sorted(order[epoch * len(windows):(epoch + 1) * len(windows)]) == windows
        together = read(loaders_of(folder, B, T, N, shuffle=True, seed=seed), calls_for(windows, B, N, 2))
        length = min(len(together), len(order))
        assert together[:length] == order[:length]


def test_orders_of_different_seeds_and_epochs_differ(tmp_path):
    write_shards(tmp_path, [65, 3, 200])
    orders = []
    for seed in range(4):
        [loader] = loaders_of(tmp_path, 4, 2, 1, shuffle=True, seed=seed)
        W = len(windows_of([65, 3, 200], 2))
        order = read([loader], 3 * W // 4)
        orders += [tuple(order[:W]), tuple(order[W:2 * W]), tuple(order[2 * W:3 * W])]
    assert len(set(orders)) == 12 and len(orders[0]) == W
    assert tuple(windows_of([65, 3, 200], 2)) not in orders


def test_shards_are_numbered_in_the_order_of_their_names(tmp_path):
    for name, begin in (("b", 300), ("a_1", 100), ("a", 0), ("a_02", 200)):
        write_shard(tmp_path / f"{name}.bin", range(begin, begin + 3))
    [loader] = loaders_of(tmp_path, 4, 2, 1)
    assert read([loader], 1) == [0, 200, 100, 300]


HUGE = """
import resource, sys
import llama31
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
path, T = sys.argv[1], 1024
before = peak()
loader = llama31.DistributedShardedDataLoader(path, 4, T, 0, 1, shuffle=sys.argv[2] == "shuffle")
for _ in range(50):
    loader.next_batch()
loader = llama31.DistributedShardedDataLoader(path, 4, T, 0, 1)
loader.load_state_dict({"counter": loader.num_windows - 4})
x, y = loader.next_batch()
print(peak() - before, loader.ntok_total, loader.num_windows, *map(int, (x.sum(), *x[-1, -2:], y[-1, -1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffle", "plain"])
def test_a_huge_shard_costs_no_memory_and_is_read_right_to_its_end(tmp_path, order):
    T, W = 1024, 830_000
    count = W * T + 1 + 77  # as many bytes as the largest file of TinyStories
    path = tmp_path / "huge.bin"
    write_shard(path, [], count=count)
    with open(path, "r+b") as f:
        f.truncate(HEADER + 4 * count)  # sparse: zeros that take no room on the disk
        f.seek(HEADER + 4 * (W * T - 2))
        f.write(np.array([5, 6, 128_000], dtype="<u4").tobytes())
    assert path.stat().st_size > 3.3e9
    grown, *numbers = map(int, output("-c", HUGE, path, order).split())
    assert numbers == [count, W, 5 + 6, 5, 6, 128_000]
    assert grown < 40  # MiB; the permutation of the windows takes 6


@many
@given(st.lists(st.tuples(st.booleans(), st.lists(st.booleans(), max_size=30)), min_size=1, max_size=4),
       st.integers(1, 5), st.booleans())
def test_a_masked_token_of_a_version_8_shard_is_read_but_no_target(shards, T, shuffle):
    shards = [*shards, (True, [True, False] * 6)]
    expected, begin = {}, 1000
    with tempfile.TemporaryDirectory() as folder:
        for i, (masking, masks) in enumerate(shards):
            ids = np.arange(begin, begin + len(masks))
            stored = ids + 2**31 * np.array(masks, dtype=np.int64) * masking
            write_shard(Path(folder, f"{i}.bin"), stored, version=8 if masking else 7)
            targets = np.where(np.array(masks, dtype=bool) & masking, -100, ids)
            for k in range((len(masks) - 1) // T):
                expected[begin + k * T] = (ids[k * T:][:T].tolist(), targets[k * T + 1:][:T].tolist())
            begin += len(masks)
        [loader] = loaders_of(folder, 1, T, 1, shuffle=shuffle)
        seen = {}
        for _ in expected:
            x, y = loader.next_batch()
            assert x.dtype == y.dtype == torch.int64
            seen[int(x[0, 0])] = (x[0].tolist(), y[0].tolist())
    assert seen == expected


def test_in_a_version_7_shard_bit_31_masks_nothing(tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2**31 + 2, 3])
    [loader] = loaders_of(tmp_path, 1, 2, 1)
    assert [batch.tolist() for batch in loader.next_batch()] == [[[1, 2**31 + 2]], [[2**31 + 2, 3]]]


def test_only_headers_of_1000_shards_are_read_at_start(tmp_path, monkeypatch):
    for i in range(1000):
        with open(tmp_path / f"{i:03}.bin", "wb") as f:
            f.write(np.array([20240801, 7, 2**28], dtype="<i4").tobytes())
            f.truncate(HEADER + 4 * 2**28)  # sparse: 1 GiB that takes no room on the disk
    def refuse(*_, **__):
        raise AssertionError("tokens were read")
    monkeypatch.setattr(np, "fromfile", refuse)
    monkeypatch.setattr(np, "memmap", refuse)
    [loader] = loaders_of(tmp_path, 1, 1024, 1)
    assert loader.ntok_total == 1000 * 2**28 and loader.num_windows == 1000 * (2**18 - 1)


# -----------------------------------------------------------------------------
# Damage


@many
@given(st.binary(max_size=60), st.integers(0, 1100), st.booleans(), st.integers(1, 5))
def test_any_file_is_read_or_is_an_error_that_names_it(content, size, headed, T):
    header = np.array([20240801, 7 + len(content) % 2, len(content) // 4], dtype="<i4").tobytes()
    content = (header.ljust(HEADER, b"\0") if headed else b"") + content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.bin")
        path.write_bytes(content[:size] if size < 1000 else content)
        try:
            [loader] = loaders_of(folder, 2, T, 1)
            x, y = loader.next_batch()
            assert x.shape == y.shape == (2, T)
        except ValueError as error:
            assert "a.bin" in str(error) or "*.bin" in str(error)


def error_of(pattern, B=1, T=4, kind=ValueError):
    with pytest.raises(kind) as error:
        DistributedShardedDataLoader(pattern, B, T, 0, 1)
    return str(error.value)


def assert_names(message, *said):
    for each in said:
        assert re.search(rf"(?<!\d){re.escape(str(each))}(?!\d)", message), f"{each} is not in: {message}"


@pytest.mark.parametrize("damage, said", [
    (dict(magic=3), [3, 20240801]), (dict(version=6), [6, 7]), (dict(version=10), [10, 7, 9]),
    (dict(count=40), [40, HEADER + 160, HEADER + 36]), (dict(count=8), [8, HEADER + 32, HEADER + 36]),
    (dict(count=0), [0, HEADER + 36]), (dict(count=-1), ["-1", HEADER + 36]),
    (dict(count=-2**31), ["-2147483648", HEADER + 36])])
@pytest.mark.parametrize("beside", [False, True])
def test_a_wrong_header_is_named_with_what_it_says_and_what_was_expected(tmp_path, damage, said, beside):
    write_shard(tmp_path / "b.bin", range(9), **damage)
    if beside:  # sound shards do not cover a damaged one
        write_shard(tmp_path / "a.bin", range(9))
        write_shard(tmp_path / "c.bin", range(9))
    assert_names(error_of(tmp_path / "*.bin"), tmp_path / "b.bin", *said)


@pytest.mark.parametrize("cut", [0, 1, 11, 12, HEADER - 1, HEADER, HEADER + 1, HEADER + 35])
def test_a_file_cut_short_anywhere_is_named_with_its_size(tmp_path, cut):
    write_shard(tmp_path / "a.bin", range(9))
    os.truncate(tmp_path / "a.bin", cut)
    assert_names(error_of(tmp_path / "*.bin"), tmp_path / "a.bin", cut)


def test_a_file_with_too_much_is_named_with_its_size(tmp_path):
    write_shard(tmp_path / "a.bin", range(9))
    os.truncate(tmp_path / "a.bin", HEADER + 39)
    assert_names(error_of(tmp_path / "*.bin"), tmp_path / "a.bin", 9, HEADER + 36, HEADER + 39)


@pytest.mark.parametrize("sizes", [[0], [1], [1, 0, 1]])
def test_too_little_data_for_one_window_is_named_with_its_numbers(tmp_path, sizes):
    write_shards(tmp_path, sizes)
    assert_names(error_of(tmp_path / "*.bin"), tmp_path / "*.bin", sum(sizes), 5)


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    assert_names(error_of(tmp_path / "*.none", kind=FileNotFoundError), tmp_path / "*.none")


@pytest.mark.parametrize("left", [0, HEADER, HEADER + 4 * 8])
def test_a_shard_that_shrinks_while_in_use_is_an_error_that_names_it(tmp_path, left):
    write_shard(tmp_path / "a.bin", range(9))
    [loader] = loaders_of(tmp_path, 2, 4, 1)
    loader.next_batch()
    os.truncate(tmp_path / "a.bin", left)
    with pytest.raises(ValueError) as error:
        loader.next_batch()
    assert_names(str(error.value), tmp_path / "a.bin", 5)


def test_a_shard_that_is_removed_while_in_use_is_an_error_that_names_it(tmp_path):
    write_shard(tmp_path / "a.bin", range(9))
    [loader] = loaders_of(tmp_path, 2, 4, 1)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "a.bin"))):
        loader.next_batch()
