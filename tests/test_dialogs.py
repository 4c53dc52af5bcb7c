"""Windows of shards with masked targets: whole dialogs, packed, counted, and learned as if apart."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_close, random_model, shard_bytes

import llama31
from llama31 import DistributedShardedDataLoader
from plumbing.dialogs import find_documents

MASKED, START = 2**31, 2**30
BOS = 90


def stored(documents, version=9):
    """What a shard holds of documents, lists of (id, whether it is masked)."""
    tokens = []
    for document in documents:
        for i, (token, is_masked) in enumerate(document):
            tokens.append(token + MASKED * is_masked + START * (i == 0 and version == 9))
    return tokens


def loader_of(folder, documents, T, version=9, B=1, **flags):
    Path(folder, "a.bin").write_bytes(shard_bytes(stored(documents, version), version=version))
    return DistributedShardedDataLoader(f"{folder}/a.bin", B, T, 0, 1, **flags)


def chat(*turns, bos=BOS):
    """BOS, then (length, whether it is learned) turns of ids from 1; BOS is masked."""
    ids = iter(range(1, 80))
    return [(bos, True), *((next(ids), not learned) for length, learned in turns for _ in range(length))]


def windows_of(loader):
    """Each window's x, y, starts as lists, in order."""
    return [tuple(t[0].tolist() for t in loader.next_batch(starts=True)) for _ in range(loader.num_windows)]


def model_of(documents, T):
    """The contract, window by window: the (token, whether it is a target) of each of its segments."""
    windows, filled = [], T + 1
    for document in documents:
        is_dialog = any(masked for _, masked in document[1:])
        row = [(token, i > 0 and not masked) for i, (token, masked) in enumerate(document)]
        pieces = [row[:T + 1]]
        if not is_dialog:
            pieces = [[(row[k][0], False), *row[k + 1:k + T + 1]] for k in range(0, max(len(row) - 1, 1), T)]
        for piece in pieces:
            if not any(is_target for _, is_target in piece):
                continue
            if filled + len(piece) > T + 1:
                windows.append([])
                filled = 0
            windows[-1].append(piece)
            filled += len(piece)
    return windows


masks = st.lists(st.booleans(), min_size=1, max_size=12)
many = settings(max_examples=150, deadline=None, derandomize=True)


@many
@given(st.lists(masks, min_size=1, max_size=8), st.integers(1, 9), st.sampled_from([8, 9]))
def test_windows_are_the_whole_dialogs_of_the_contract(shapes, T, version):
    documents = [[(BOS, True), (1, True), (2, False)]]  # so that something is masked and something learned
    documents += [[(BOS, mask[0]), *((3 + i, m) for i, m in enumerate(mask[1:]))] for mask in shapes]
    expected = model_of(documents, T)
    with tempfile.TemporaryDirectory() as folder:
        if not expected:
            with pytest.raises(llama31.NoTargetError, match=rf"a.bin: .* T \+ 1 = {T + 1}"):
                loader_of(folder, documents, T, version, bos_id=BOS)
            return
        loader = loader_of(folder, documents, T, version, bos_id=BOS)
        assert loader.num_windows == len(expected)
        for (x, y, starts), window in zip(windows_of(loader), expected, strict=True):
            flat = [entry for segment in window for entry in segment]
            flat += [(0, False)] * (T + 1 - len(flat))
            assert x == [token for token, _ in flat[:-1]]
            assert y == [token if is_target else -100 for token, is_target in flat[1:]]
            begins = np.cumsum([0, *map(len, window)])[:-1].tolist()
            assert starts == [i in begins for i in range(T)]


@many
@given(st.lists(masks, min_size=1, max_size=8), st.integers(1, 5))
def test_documents_are_found_alike_whatever_is_read_at_once(shapes, block):
    documents = [[(7, m) for m in mask] for mask in shapes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.bin")
        path.write_bytes(shard_bytes(stored(documents), version=9))
        begins, lengths, targets, is_dialog = find_documents(path, block=block)
    assert lengths.tolist() == list(map(len, documents))
    assert begins.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    for mask, target, dialog in zip(shapes, targets, is_dialog, strict=True):
        assert target == next((i for i, m in enumerate(mask) if i and not m), len(mask))
        assert dialog == any(mask[1:])


def test_packed_dialogs_have_the_loss_and_gradients_of_dialogs_apart(tmp_path):
    """Also where BOS stands within a message: the marks alone say where dialogs begin."""
    documents = [chat((3, False), (4, True)), chat((2, False), (1, True), (2, False), (3, True)),
                 chat((5, False), (2, True)), chat((9, False), (1, True)), chat((1, False), (12, True))]
    documents[1][2] = (BOS, True)
    documents[2][7] = (BOS, False)
    loader = loader_of(tmp_path, documents, 16, B=2)
    assert loader.num_windows < len(documents)
    model = random_model()
    nats = sum(model(x, y, starts=starts, reduction="sum")
               for x, y, starts in (loader.next_batch(starts=True) for _ in range(loader.num_windows // 2)))
    nats.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    apart = 0
    for document in documents:
        ids = torch.tensor([[token for token, _ in document]])
        y = torch.tensor([[-100 if masked else token for token, masked in document]])[:, 1:]
        apart += model(ids[:, :-1], y, reduction="sum")
    apart.backward()
    assert_close(nats, apart)
    for name, p in model.named_parameters():
        assert_close(packed[name], p.grad, name)


def test_ranks_share_out_the_windows_of_dialogs_and_shards_stay_apart(tmp_path):
    for name in "ab":
        documents = [chat((1 + i % 3, False), (2, True)) for i in range(9)]
        (tmp_path / f"{name}.bin").write_bytes(shard_bytes(stored(documents), version=9))
    pattern = tmp_path / "*.bin"
    alone = windows_of(DistributedShardedDataLoader(pattern, 1, 10, 0, 1))
    assert alone[0] == alone[len(alone) // 2]  # the second shard begins a window of its own
    ranks = [DistributedShardedDataLoader(pattern, 1, 10, rank, 2) for rank in range(2)]
    for i, window in enumerate(alone):
        assert tuple(t[0].tolist() for t in ranks[i % 2].next_batch(starts=True)) == window


def test_what_is_cut_left_out_and_padded_is_said(tmp_path):
    turns = [(1, 3), (2, 20), (20, 1)]  # tokens of a question and of its answer
    documents = [chat((question, False), (answer, True)) for question, answer in turns]
    loader = loader_of(tmp_path, documents, 9)
    assert loader.remark == (f"{tmp_path}/a.bin: of 3 documents 1 are cut at T + 1 = 10 tokens and 1 have "
                             "no target left; 25% of the windows is padding")
    assert loader_of(tmp_path, [[(BOS, False), (1, False), (2, False)]], 1).remark == ""


@pytest.mark.parametrize("version", [7, 8, 9])
def test_without_masks_windows_are_cut_from_one_token_to_the_next(tmp_path, version):
    documents = [[(BOS, False), *((i, False) for i in range(1, 6))], [(BOS, False), (7, False), (8, False)]]
    loader = loader_of(tmp_path, documents, 4, version, bos_id=BOS)
    assert windows_of(loader) == [([BOS, 1, 2, 3], [1, 2, 3, 4], [True, False, False, False]),
                                  ([4, 5, BOS, 7], [5, -100, 7, 8], [False, False, True, False])]
    loader.reset()
    assert loader.next_batch()[1].tolist() == [[1, 2, 3, 4]]
    assert loader.next_batch()[1].tolist() == [[5, BOS, 7, 8]]  # Only with starts is BOS no target.


def test_documents_begin_at_marks_and_at_no_id_in_version_9(tmp_path):
    documents = [[(BOS, False), (BOS, False), (3, False)], [(4, False), (BOS, False)]]
    loader = loader_of(tmp_path, documents, 4, bos_id=BOS)
    assert windows_of(loader) == [([BOS, BOS, 3, 4], [BOS, 3, -100, BOS], [True, False, False, True])]


@pytest.mark.parametrize("version", [7, 9])
def test_a_short_split_is_one_padded_window_with_the_loss_of_its_text(tmp_path, version):
    document = [(BOS, False), *((i, False) for i in range(1, 8))]
    loader = loader_of(tmp_path, [document], 30, version)
    assert loader.num_windows == 1 and "8 tokens in 1 files" in loader.remark
    x, y = loader.next_batch()
    assert x.shape == y.shape == (1, 30) and (y[0, 7:] == -100).all()
    model = random_model()
    ids = torch.tensor([[token for token, _ in document]])
    assert_close(model(x, y), model(ids[:, :-1], ids[:, 1:]))


def test_starts_mask_as_bos_does():
    model = random_model()
    tokens = torch.randint(BOS, (2, 20), generator=torch.Generator().manual_seed(1))
    tokens[0, 7] = tokens[1, 0] = tokens[1, 12] = tokens[1, 19] = BOS
    x, y = tokens[:, :-1], tokens[:, 1:]
    by_marks = y.clone()
    by_marks[1, -1] = -100  # its mark is none of x's
    assert torch.equal(model(x, by_marks, starts=x == BOS), model(x, y, BOS))
    assert not torch.equal(model(x, by_marks), model(x, y, BOS))


def test_a_step_without_targets_changes_nothing():
    model = random_model()
    optimizer = model.configure_optimizers(0.1)
    x = torch.arange(8).view(1, 8)
    autocast = torch.autocast("cpu", enabled=False)
    llama31.optimize(model, optimizer, [(x, x, None)], 0.1, 1.0, autocast)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = {i: each["exp_avg"].clone() for i, each in optimizer.state_dict()["state"].items()}
    none = torch.full_like(x, -100)
    assert llama31.optimize(model, optimizer, [(x, none, None)] * 2, 0.1, 1.0, autocast) == (None, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(each["exp_avg"], state[i])
               for i, each in optimizer.state_dict()["state"].items())
