"""At scale: what a rank reads of a checkpoint and of the data, and in how many files weights are saved."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import fake_group, random_model, read_weights, tensor_bytes, write_checkpoint

import convert
import llama31
from llama31 import PRESETS, DistributedShardedDataLoader, ModelArgs, Transformer, open_checkpoint
from plumbing import checkpoint, mapped, parallel
from plumbing.config_json import write_config
from plumbing.files import write_tokens
from plumbing.huggingface import tensor_names

CPU = torch.device("cpu")
SHAPE = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=96, multiple_of=32)


def folders(tmp_path):
    """A model's checkpoint directories in each layout: (folder, its name)."""
    model = random_model(**SHAPE)
    for number in (1, 2, 4):
        yield write_checkpoint(tmp_path / f"meta{number}", model, number)
    convert.to_hf(tmp_path / "meta1", tmp_path / "hf")
    yield tmp_path / "hf"


def test_any_part_of_a_tensor_is_that_of_the_whole(tmp_path):
    whole = read_weights(next(folders(tmp_path)))
    rng = np.random.default_rng(0)
    for folder in folders(tmp_path / "all"):
        _, pieces = open_checkpoint(folder)
        for name, parts in pieces.items():
            assert torch.equal(parts.whole(), whole[name])
            assert parts.shape == list(whole[name].shape)
            for _ in range(12):
                begins, ends = zip(*(sorted(rng.integers(0, size + 1, 2).tolist()) for size in parts.shape),
                                   strict=True)
                part = parts.part(begins, [b - a for a, b in zip(begins, ends, strict=True)])
                slices = tuple(slice(a, b) for a, b in zip(begins, ends, strict=True))
                assert torch.equal(part, whole[name][slices])


def test_shards_of_three_ranks_are_the_checkpoints_rows(tmp_path):
    whole = read_weights(next(folders(tmp_path)))
    for folder in folders(tmp_path / "all"):
        for rank in range(3):
            with fake_group(3, rank):
                model, pieces = open_checkpoint(folder)
                parallel.shard_parameters(model, CPU, torch.bfloat16, 3)
                checkpoint.load_weights(model, mapped.pop_pieces(pieces, False), CPU)
                for name, p in model.named_parameters():
                    [begin, *_], [rows, *_] = parallel.own_part(p)
                    assert torch.equal(p.to_local(), whole[name][begin:begin + rows])


def resident_bytes(folder):
    """How much of a folder's files this process has mapped and touched."""
    found = 0
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_there = str(folder) in line
        elif is_there and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def write_hollow(folder, args):
    """A Hugging Face folder of a shape, in bfloat16, a file per tensor, which take no room on the disk."""
    folder.mkdir()
    write_config(folder, args, torch.bfloat16, {"bos_token_id": 0, "eos_token_id": 1})
    names = tensor_names(args)
    files = {}
    for i, (name, p) in enumerate(Transformer.on_meta(args).state_dict().items()):
        files[names[name]] = f"model-{i:05d}.safetensors"
        size = 2 * p.numel()
        header = {names[name]: {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [0, size]}}
        text = json.dumps(header).encode().ljust(256)
        content = len(text).to_bytes(8, "little") + text
        # The output is not the embedding.
        content += b"\x01" if name == "output.weight" else b""
        path = folder / files[names[name]]
        path.write_bytes(content)
        os.truncate(path, 8 + 256 + size)
    (folder / convert.INDEX).write_text(json.dumps({"weight_map": files}))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="there is no /proc/self/smaps")
def test_a_rank_of_1024_reads_its_share_of_405b(tmp_path, monkeypatch):
    args = ModelArgs(**PRESETS["llama3.1-405b"])
    folder = tmp_path / "405b"
    write_hollow(folder, args)
    read = []
    real = mapped.Pieces.part

    def part(self, offsets, sizes):
        result = real(self, offsets, sizes)
        read.append(result.nbytes)
        return result
    monkeypatch.setattr(mapped.Pieces, "part", part)
    with fake_group(1024, rank=777):
        model, pieces = open_checkpoint(folder)
        before = resident_bytes(folder)
        parallel.shard_parameters(model, CPU, torch.bfloat16, 1024)
        most, _ = tensor_bytes(lambda: checkpoint.load_weights(
            model, mapped.pop_pieces(pieces, False), CPU))
        whole = Transformer.on_meta(args).parameters()
        share = sum(math.ceil(p.size(0) / 1024) * p[0].numel() for p in whole)
        parameters = sum(p.numel() for p in model.parameters())
    assert parameters > 405e9 and share < 1.01 * parameters / 1024
    assert sum(read) == 2 * share
    # The system reads 64 KB at once, and whole heads of wq and wk are read for their order.
    heads = args.n_layers * 2 * args.head_dim * args.dim * 2
    assert resident_bytes(folder) - before < 2 * share + heads + 1200 * 2**17
    assert most < 1.1 * 4 * share + 2 * heads / args.n_layers


@pytest.mark.parametrize("rank", [0, 1, 500, 1023])
def test_of_1024_ranks_each_has_its_windows(tmp_path, rank):
    tokens = np.arange(4 * 1024 * 2 * 8 + 1) % 50
    write_tokens(tmp_path / "train.bin", [tokens.astype(np.uint32)])
    loader = DistributedShardedDataLoader(str(tmp_path / "train.bin"), 2, 8, rank, 1024)
    for batch in range(4):
        x, _ = loader.next_batch()[:2]
        begin = (batch * 1024 + rank) * 2 * 8
        assert np.array_equal(np.asarray(x).flatten(), tokens[begin:begin + 16])


def test_weights_are_saved_in_files_of_bounded_size(tmp_path, monkeypatch):
    model = random_model(**SHAPE)
    total = sum(p.nbytes for p in model.parameters())
    for bound, number in ((total, 1), (total - 1, 2), (total // 2 - 1, 4), (1, 4)):
        monkeypatch.setattr(mapped, "FILE_BYTES", bound)
        folder = tmp_path / str(bound)
        llama31.save_checkpoint(folder, model.args, mapped.weights_of_files(model, torch.float32))
        files = sorted(folder.glob("consolidated.*.pth"))
        assert [path.name for path in files] == [f"consolidated.{i:02d}.pth" for i in range(number)]
        assert all(path.stat().st_size < total / number + 20000 for path in files)
        again = llama31.load_checkpoint(folder)
        assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_70b_is_saved_in_metas_eight_files():
    def number(preset, dtype):
        return mapped.number_of_files(Transformer.on_meta(ModelArgs(**PRESETS[preset])), dtype)
    assert number("llama3.1-8b", torch.float32) == number("llama3.2-1b", torch.float32) == 1
    assert number("llama3.1-70b", torch.bfloat16) == number("llama3.1-70b", torch.float32) == 8


@pytest.mark.parametrize("sharded", [False, True])
def test_saving_holds_the_weights_of_one_file_at_a_time(monkeypatch, sharded):
    """Under a fake group, whose gathered tensors have the sizes of real ones."""
    args = ModelArgs(**SHAPE | dict(dim=256, n_layers=8))
    monkeypatch.setattr(mapped, "FILE_BYTES", 1)
    with fake_group(4):
        model = Transformer.on_meta(args)
        if sharded:
            parallel.shard_parameters(model, CPU, torch.bfloat16, 4)
        model.to_empty(device=CPU)
        total = sum(p.nbytes for p in Transformer.on_meta(args).parameters())
        largest = max(p.numel() * 4 for p in model.parameters())

        def save():
            for state in mapped.weights_of_files(model, torch.float32):
                del state
        most, left = tensor_bytes(save)
    # Of one tensor there are the ranks' parts, the whole and its piece.
    assert left == 0 and most < total / 4 + 3 * largest


def test_no_rank_but_the_first_gets_weights():
    with fake_group(4, rank=1):
        model = Transformer(ModelArgs(**SHAPE))
        assert list(mapped.weights_of_files(model, torch.float32)) == [{}]
        assert dist.get_rank() == 1


def test_the_optimizers_state_is_written_without_a_copy(tmp_path):
    model = Transformer(ModelArgs(**dataclasses.asdict(ModelArgs(**SHAPE | dict(dim=256)))))
    optimizer = model.configure_optimizers(1e-3)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    optimizer.step()
    optimizer.zero_grad()
    states = 2 * sum(p.nbytes for p in model.parameters())
    most, _ = tensor_bytes(lambda: checkpoint.save_training(tmp_path / "step_1", model, optimizer, None, {}))
    assert most < 0.1 * states
