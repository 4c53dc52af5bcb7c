"""Training under real torchrun: several processes learn what one would, and a failing one ends the job."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import llama31
import reference
from llama31 import Llama, ModelArgs, Transformer, save_checkpoint
from plumbing.files import write_tokens
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
    write_tokens(folder / "train.bin", documents)
    write_tokens(folder / "val.bin", documents[:60])
    return folder


def words(folder, processes, out_dir, *flags, script=ROOT / "llama31.py"):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            script, "train", f"--train_data={folder}/train.bin", f"--val_data={folder}/val.bin",
            f"--ckpt_dir={folder}/ckpt", f"--out_dir={out_dir}", "--seq_len=16", "--device=cpu",
            *([] if any(flag.startswith("--steps") for flag in flags) else ["--steps=20"]),
            *([] if any(flag.startswith("--eval_interval") for flag in flags) else ["--eval_interval=10"]),
            "--eval_steps=0", *flags]


def torchrun(folder, processes, out_dir, *flags, **settings):
    return subprocess.run(words(folder, processes, out_dir, *flags, **settings), capture_output=True,
                          text=True, timeout=120, cwd=ROOT), out_dir


def records(out_dir):
    log = out_dir / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def untimed(out_dir):
    """What a log says of the training itself."""
    return [{name: record[name] for name in record.keys() - {"tokens_per_s", "mfu", "memory"}}
            for record in records(out_dir)]


EXACT = ("--lr=1e-3", "--total_batch_tokens=128", "--dtype=float32")


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    result, out_dir = torchrun(folder, 1, tmp_path_factory.mktemp("one"), "--batch_size=4", *EXACT)
    assert result.returncode == 0, result.stderr[-6000:]
    assert len(records(out_dir)) == 20
    return out_dir


def assert_same_run(one, several):
    for a, b in zip(records(one), records(several), strict=True):
        assert a.keys() == b.keys()
        for field in a.keys() & {"loss", "grad_norm", "val_loss", "val_bpb"}:
            assert a[field] == pytest.approx(b[field], rel=1e-4), field
    a, b = (torch.load(path / "step_000020" / "consolidated.00.pth", weights_only=True)
            for path in (one, several))
    assert a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-4 for name in a)


@pytest.mark.parametrize("processes, flags", [
    (4, ["--activation_checkpointing"]), (1, ["--fsdp"]), (4, ["--fsdp", "--activation_checkpointing"])],
    ids=str)
def test_several_processes_have_the_losses_of_one(folder, tmp_path, one_process, processes, flags):
    result, out_dir = torchrun(folder, processes, tmp_path, "--batch_size=2", "--sample_interval=10", *EXACT,
                               *flags)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_run(one_process, out_dir)
    assert result.stdout.count("Once upon a time") == 2
    assert Llama.build(out_dir / "step_000020", device="cpu").tokenizer.n_words == 513
    assert reference.Llama.build(out_dir / "step_000020").tokenizer.n_words == 513


@pytest.mark.parametrize("before, after", [
    ((2, "--fsdp"), (4, "--fsdp")), ((4, "--fsdp"), (1, "--fsdp=False")),
    ((2, "--fsdp=False"), (2, "--fsdp"))], ids=str)
def test_a_run_resumes_on_another_number_of_ranks(folder, tmp_path, one_process, before, after):
    for processes, flag in (before, after):
        for late in ("step_000014", "step_000020"):
            shutil.rmtree(tmp_path / late, ignore_errors=True)
        result, out_dir = torchrun(folder, processes, tmp_path, "--batch_size=2", "--resume", flag,
                                   "--save_interval=7", "--keep=9", *EXACT)
        assert result.returncode == 0, result.stderr[-6000:]
    assert_same_run(one_process, out_dir)
    if "--fsdp" in before:
        assert len(list((out_dir / "step_000007" / "optimizer").glob("*.distcp"))) == before[0]


RANKS = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, os.getcwd())
import llama31
optimizer_step = torch.optim.AdamW.step
def step(self, *args, **kwargs):
    result = optimizer_step(self, *args, **kwargs)
    for group in self.param_groups:
        for p in group["params"]:
            gathered = [torch.empty_like(p) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, p.detach())
            assert all(torch.equal(p, other) for other in gathered), "ranks differ"
    return result
torch.optim.AdamW.step = step
llama31.main()
"""


def test_the_ranks_parameters_stay_equal(folder, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    result, _ = torchrun(folder, 2, tmp_path / "out", "--batch_size=2", "--dtype=float32",
                         script=tmp_path / "ranks.py")
    assert result.returncode == 0, result.stderr[-6000:]


def test_bfloat16_of_fsdp_learns_like_autocast(folder, tmp_path):
    losses = []
    for flags in ([], ["--fsdp"]):
        result, out_dir = torchrun(folder, 2, tmp_path / str(len(flags)), "--batch_size=2", "--lr=1e-2",
                                   *flags)
        assert result.returncode == 0, result.stderr[-6000:]
        losses.append([record["loss"] for record in records(out_dir)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    saved = torch.load(out_dir / "step_000020" / "consolidated.00.pth", weights_only=True)
    assert {p.dtype for p in saved.values()} == {torch.float32}


def test_a_signal_saves_and_ends_all_ranks_and_the_run_goes_on_exactly(folder, tmp_path):
    common = ["--batch_size=2", "--steps=200", "--save_interval=0", "--eval_interval=200", "--resume",
              *EXACT, "--fsdp"]
    whole, _ = torchrun(folder, 2, tmp_path / "whole", *common)
    assert whole.returncode == 0, whole.stderr[-6000:]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = len(records(tmp_path / "parts"))
        process = subprocess.Popen(words(folder, 2, tmp_path / "parts", *common), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        while len(records(tmp_path / "parts")) < before + 10:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=60)
        done = len(records(tmp_path / "parts"))
        assert before + 10 <= done < 199 and f"{number.name} after step {done + 1}, which is saved" in stdout
        assert llama31.checkpoints_of_run(tmp_path / "parts")[-1].name == f"step_{done + 1:06d}"
    result, _ = torchrun(folder, 2, tmp_path / "parts", *common)
    assert result.returncode == 0, result.stderr[-6000:]
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=str)
def test_a_rank_that_alone_fails_ends_the_job_with_its_own_error(folder, tmp_path, flags):
    shard = np.fromfile(folder / "train.bin", dtype="<u4")
    shard[256 + 18 * 16 + 5] = 600  # in window 18, which rank 1 of 2 reads in step 5
    for name, content in (("train", shard), ("val", np.fromfile(folder / "val.bin", dtype="<u4"))):
        content.tofile(tmp_path / f"{name}.bin")
    shutil.copytree(folder / "ckpt", tmp_path / "ckpt")
    result, _ = torchrun(tmp_path, 2, tmp_path / "out", "--batch_size=2", *flags)
    assert result.returncode != 0 and "holds token 600, the vocabulary ends at 512" in result.stderr
    assert 0 < len(records(tmp_path / "out")) < 6


def test_an_error_of_all_ranks_ends_the_job(folder, tmp_path):
    result, _ = torchrun(folder, 2, tmp_path, "--lr=1e30", "--grad_clip=0", "--batch_size=4")
    assert result.returncode != 0 and "expected finite" in result.stderr
    result, _ = torchrun(folder, 2, tmp_path / "b", "--batch_size=3", "--total_batch_tokens=128")
    assert result.returncode != 0 and "expected a multiple of" in result.stderr
