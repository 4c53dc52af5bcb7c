"""Training in several processes: they learn what one would, and under torchrun a failure ends the job."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tiny import (
    RESCALED,
    ROOT,
    WIDE,
    forked,
    random_model,
    read_log,
    read_weights,
    run,
    torchrun,
    untimed,
    write_checkpoint,
)

import llama31
import reference
from llama31 import Llama

pytestmark = pytest.mark.slow


def words(folder, processes, out_dir, *flags, script="llama31.py", launch=forked):
    """What python runs to train in so many processes."""
    given = {flag.partition("=")[0] for flag in flags}
    defaults = ("--steps=20", "--eval_interval=10", "--eval_steps=0")
    return launch(processes, script, "train", f"--train_data={folder}/train.bin",
                    f"--val_data={folder}/val.bin", f"--ckpt_dir={folder}/ckpt", f"--out_dir={out_dir}",
                    "--seq_len=16", "--device=cpu",
                    *(flag for flag in defaults if flag.partition("=")[0] not in given), *flags)


def train(folder, processes, out_dir, *flags, **settings):
    """(the finished process, the run's folder)."""
    return run(*words(folder, processes, out_dir, *flags, **settings)), out_dir


EXACT = ("--lr=1e-3", "--total_batch_tokens=128", "--dtype=float32")


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    result, out_dir = train(corpus, 1, tmp_path_factory.mktemp("one"), "--batch_size=4", *EXACT)
    assert result.returncode == 0, result.stderr[-6000:]
    assert len(read_log(out_dir)) == 20
    return out_dir


def assert_same_run(one, several):
    for a, b in zip(read_log(one), read_log(several), strict=True):
        assert a.keys() == b.keys()
        for field in a.keys() & {"loss", "grad_norm", "val_loss", "val_bpb"}:
            assert a[field] == pytest.approx(b[field], rel=1e-6 if field == "loss" else 1e-5), field
    a, b = (read_weights(path / "step_000020") for path in (one, several))
    assert a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-4 for name in a)


@pytest.mark.parametrize("processes, flags", [
    (4, ["--activation_checkpointing"]), (1, ["--fsdp"]), (4, ["--fsdp", "--activation_checkpointing"]),
    (4, ["--fsdp=2"]), (2, ["--fsdp=1"])],
    ids=str)
def test_several_processes_have_the_losses_of_one(corpus, tmp_path, one_process, processes, flags):
    result, out_dir = train(corpus, processes, tmp_path, "--batch_size=2", "--sample_interval=10", *EXACT,
                               *flags)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same_run(one_process, out_dir)
    assert result.stdout.count("Once upon a time") == 2
    assert Llama.build(out_dir / "step_000020", device="cpu").tokenizer.n_words == 560
    assert reference.Llama.build(out_dir / "step_000020").tokenizer.n_words == 560


def test_shards_of_wide_heads_have_the_losses_of_one_process(corpus, tokenizer, tmp_path):
    for name in "train.bin", "val.bin":
        shutil.copy(corpus / name, tmp_path)
    model = random_model(vocab_size=560, **RESCALED | WIDE)
    write_checkpoint(tmp_path / "ckpt", model, tokenizer=tokenizer)
    for processes, flags in (1, []), (3, ["--fsdp"]):
        batch_size = 6 // processes
        result, _ = train(tmp_path, processes, tmp_path / str(processes), f"--batch_size={batch_size}",
                          "--lr=1e-4", "--dtype=float32", *flags)
        assert result.returncode == 0, result.stderr[-6000:]
    assert_same_run(tmp_path / "1", tmp_path / "3")
    assert Llama.build(tmp_path / "3" / "step_000020", device="cpu", compile=False).model.args == model.args


def test_an_evaluation_is_the_same_on_any_number_of_ranks(corpus, tmp_path):
    """It has 7 windows, which 3 ranks don't share out evenly."""
    records = []
    for processes in (1, 3):
        result, out_dir = train(corpus, processes, tmp_path / str(processes), "--batch_size=2",
                                "--eval_steps=7", "--total_batch_tokens=192", "--steps=2",
                                "--eval_interval=1", "--dtype=float32")
        assert result.returncode == 0, result.stderr[-6000:]
        records.append(read_log(out_dir))
    for one, three in zip(*records, strict=True):
        for field in ("loss", "val_loss", "val_bpb"):
            assert one[field] == pytest.approx(three[field], rel=1e-7), field


@pytest.mark.parametrize("before, after", [
    ((2, "--fsdp"), (4, "--fsdp")), ((4, "--fsdp"), (1, "--fsdp=False")),
    ((2, "--fsdp=False"), (2, "--fsdp")), ((4, "--fsdp=2"), (4, "--fsdp")),
    ((4, "--fsdp"), (4, "--fsdp=2")), ((4, "--fsdp=2"), (2, "--fsdp=False")),
    ((2, "--fsdp=False"), (4, "--fsdp=2"))], ids=str)
def test_a_run_resumes_on_another_number_of_ranks(corpus, tmp_path, one_process, before, after):
    for processes, flag in (before, after):
        for late in ("step_000014", "step_000020"):
            shutil.rmtree(tmp_path / late, ignore_errors=True)
        result, out_dir = train(corpus, processes, tmp_path, "--batch_size=2", "--resume", flag,
                                   "--save_interval=7", "--keep=9", *EXACT)
        assert result.returncode == 0, result.stderr[-6000:]
    assert_same_run(one_process, out_dir)
    if before[1] == "--fsdp":
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


def test_the_ranks_parameters_stay_equal(corpus, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    result, _ = train(corpus, 2, tmp_path / "out", "--batch_size=2", "--dtype=float32",
                         script=tmp_path / "ranks.py")
    assert result.returncode == 0, result.stderr[-6000:]


def test_bfloat16_of_fsdp_learns_like_autocast(corpus, tmp_path):
    losses = []
    for flags in ([], ["--fsdp"]):
        result, out_dir = train(corpus, 2, tmp_path / str(len(flags)), "--batch_size=2", "--lr=1e-2",
                                   *flags)
        assert result.returncode == 0, result.stderr[-6000:]
        losses.append([record["loss"] for record in read_log(out_dir)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    saved = read_weights(out_dir / "step_000020")
    assert {p.dtype for p in saved.values()} == {torch.float32}


def test_a_signal_saves_and_ends_all_ranks_and_the_run_goes_on_exactly(corpus, tmp_path):
    common = ["--batch_size=2", "--steps=100", "--save_interval=0", "--eval_interval=100", "--resume",
              *EXACT, "--fsdp"]
    whole, _ = train(corpus, 2, tmp_path / "whole", *common)
    assert whole.returncode == 0, whole.stderr[-6000:]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = len(read_log(tmp_path / "parts"))
        command = [sys.executable, *words(corpus, 2, tmp_path / "parts", *common, launch=torchrun)]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        while len(read_log(tmp_path / "parts")) < before + 10:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=60)
        done = len(read_log(tmp_path / "parts"))
        assert before + 10 <= done < 99 and f"{number.name} after step {done}, which is saved" in stdout
        assert llama31.checkpoints_of_run(tmp_path / "parts")[-1].name == f"step_{done:06d}"
    result, _ = train(corpus, 2, tmp_path / "parts", *common)
    assert result.returncode == 0, result.stderr[-6000:]
    assert untimed(read_log(tmp_path / "whole")) == untimed(read_log(tmp_path / "parts"))


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=str)
def test_a_rank_that_alone_fails_ends_the_job_with_its_own_error(corpus, tmp_path, flags):
    shard = np.fromfile(corpus / "train.bin", dtype="<u4")
    shard[256 + 18 * 16 + 5] = 600  # in window 18, which rank 1 of 2 reads in step 5
    for name, content in (("train", shard), ("val", np.fromfile(corpus / "val.bin", dtype="<u4"))):
        content.tofile(tmp_path / f"{name}.bin")
    shutil.copytree(corpus / "ckpt", tmp_path / "ckpt")
    result, _ = train(tmp_path, 2, tmp_path / "out", "--batch_size=2", *flags, launch=torchrun)
    assert result.returncode != 0 and "holds token 600, the vocabulary ends at 559" in result.stderr
    assert 0 < len(read_log(tmp_path / "out")) < 6


def test_an_error_of_all_ranks_ends_the_job(corpus, tmp_path):
    result, _ = train(corpus, 2, tmp_path, "--lr=1e30", "--grad_clip=0", "--batch_size=4", launch=torchrun)
    assert result.returncode != 0 and "expected finite" in result.stderr
    result, _ = train(corpus, 2, tmp_path / "b", "--batch_size=3", "--total_batch_tokens=128")
    assert result.returncode != 0 and "expected a multiple of" in result.stderr
