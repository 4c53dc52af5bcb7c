"""The memory that bench.py says training takes, against what training takes here."""

import ctypes
import os
from pathlib import Path

import pytest
from tiny import output, random_model, write_checkpoint

import bench
from llama31 import PRESETS, ModelArgs

MEASURE = """
import sys
import llama31, psutil, torch
from llama31 import ModelArgs, Transformer

llama31.keep_freed_memory = lambda device: None  # so that the peak is of what is in use

def train(args, batch_size, seq_len, activation_checkpointing):
    model = Transformer(args)
    model.activation_checkpointing = activation_checkpointing
    optimizer = model.configure_optimizers(1e-3)
    tokens = torch.randint(args.vocab_size, (batch_size, seq_len))
    for micro_batches in (1, 2):  # the last finds AdamW's averages and the gradients of the one before it
        for _ in range(micro_batches):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, tokens)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

for recomputed in (False, True):  # loads all code
    train(ModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=100), 1, 8, recomputed)
before = psutil.Process().memory_info().rss
train(eval(sys.argv[1]), *map(int, sys.argv[2:]))
[line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) * 1024 - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("args, batch_size, seq_len, recomputed", [
    (ModelArgs(dim=512, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=4000), 2, 192, False),
    pytest.param(ModelArgs(dim=384, n_layers=3, n_heads=6, vocab_size=20000, tie_word_embeddings=True),
                 1, 512, True, marks=pytest.mark.slow)])
def test_training_takes_the_memory_that_is_computed(args, batch_size, seq_len, recomputed):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # for the same
    printed = output("-c", MEASURE, repr(args), batch_size, seq_len, int(recomputed), env=environment)
    computed = bench.training_memory(args, batch_size, seq_len, activation_checkpointing=recomputed,
                                     bytes_per_logit=2)
    assert int(printed) == pytest.approx(computed, rel=0.1)


def test_fsdp_shares_out_the_states_and_checkpointing_keeps_less():
    args = ModelArgs(**PRESETS["llama3.2-1b"])

    def size(**settings):
        return bench.training_memory(args, 1, 512, **settings)
    parameters, recomputed = 1_235_814_400, size(activation_checkpointing=True)
    assert 16 * parameters < recomputed < 20 * parameters
    assert recomputed < size() - 500e6
    two, eight = (size(processes=n, fsdp=True) for n in (2, 8))
    assert two - eight == 16 * parameters * 3 / 8


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
@pytest.mark.parametrize("begin", ["model.configure_optimizers(1e-3)",
                                   "Llama.build(ckpt_dir, device='cpu')"])
def test_memory_of_freed_tensors_serves_the_next_ones(begin, tmp_path):
    """Counted in page faults, one for each fresh page, before and after the call that changes it."""
    write_checkpoint(tmp_path / "ckpt", random_model())
    code = f"""
import resource, torch
from llama31 import Llama, load_checkpoint
ckpt_dir = {str(tmp_path / "ckpt")!r}
model = load_checkpoint(ckpt_dir)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (1, 9, 40, 80, 40, 9) * 3:
        torch.ones(megabytes * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
{begin}
faults()
print(fresh, faults())
"""
    fresh, kept = map(int, output("-c", code).split())
    assert kept < 0.1 * fresh


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_kept_memory_counts_as_free():
    code = """
import psutil, torch
from plumbing.fast import check_memory, keep_freed_memory
cpu = torch.device("cpu")
keep_freed_memory(cpu)
torch.ones(2**30, dtype=torch.uint8)
check_memory("keys and values", psutil.virtual_memory().available + 2**28, cpu)
"""
    output("-c", code)
