"""Training under real torchrun: several processes learn what one would, and a failing one ends the job."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import llama31
from llama31 import Llama, ModelArgs, Transformer, save_checkpoint
from tiny_stories import write_datafile
from tokenizer import train_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(llama31.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny checkpoint and token files of random documents."""
    folder = tmp_path_factory.mktemp("distributed")
    tokenizer = train_tokenizer(["a b a b"], 513, folder / "tokenizer.model")
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=513, multiple_of=16)
    model = Transformer(args)
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(folder / "ckpt", model.args, model.state_dict(), tokenizer.model_path)
    rng = np.random.default_rng(0)
    documents = [[tokenizer.bos_id, *rng.integers(97, 110, 9), tokenizer.eos_id] for _ in range(500)]
    write_datafile(folder / "train.bin", documents)
    write_datafile(folder / "val.bin", documents[:60])
    return folder


def torchrun(folder, processes, out_dir, *flags):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
             ROOT / "llama31.py", f"--train_data={folder}/train.bin", f"--val_data={folder}/val.bin",
             f"--ckpt_dir={folder}/ckpt", f"--out_dir={out_dir}", "--seq_len=16", "--steps=20",
             "--device=cpu", "--eval_interval=10", "--eval_steps=0", *flags]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    return result, out_dir


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_have_the_losses_of_one(folder, tmp_path, processes):
    runs = []
    for n, batch_size in ((1, 4), (processes, 2)):
        result, out_dir = torchrun(folder, n, tmp_path / str(n), f"--batch_size={batch_size}", "--lr=1e-3",
                                   "--total_batch_tokens=128", "--dtype=float32")
        assert result.returncode == 0, result.stderr[-2000:]
        runs.append(records(out_dir))
    assert len(runs[0]) == 20
    for one, several in zip(*runs, strict=True):
        assert one.keys() == several.keys()
        for field in one.keys() & {"loss", "grad_norm", "val_loss", "val_bpb"}:
            assert one[field] == pytest.approx(several[field], rel=1e-4), field
    one, several = (torch.load(tmp_path / str(n) / "step_000020" / "consolidated.00.pth", weights_only=True)
                    for n in (1, processes))
    assert all((one[name] - several[name]).abs().max() < 1e-4 for name in one)
    assert Llama.build(tmp_path / str(processes) / "step_000020", device="cpu").tokenizer.n_words == 513


def test_a_rank_that_fails_ends_the_job_with_its_own_error(folder, tmp_path):
    result, _ = torchrun(folder, 2, tmp_path, "--lr=1e30", "--grad_clip=0", "--batch_size=4")
    assert result.returncode != 0 and "expected finite" in result.stderr
    result, _ = torchrun(folder, 2, tmp_path / "b", "--batch_size=3", "--total_batch_tokens=128")
    assert result.returncode != 0 and "expected a multiple of" in result.stderr
