"""How a run goes on: by its own record, alone in its folder, with its best checkpoint kept."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import read_log, run, untimed

import llama31
from llama31 import checkpoints_of_run, learning_rate_at, train
from plumbing import checkpoint, parallel
from plumbing.resume import locked

pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.fixture
def corpus(corpus, tmp_path):
    """A copy of the corpus that the test may change."""
    return shutil.copytree(corpus, tmp_path / "corpus")


def begin(corpus, out_dir, **flags):
    """The log of a new run, all of whose flags differ from train's defaults."""
    settings = dict(train_data=corpus / "train.bin", val_data=corpus / "val.bin", ckpt_dir=corpus / "ckpt",
                    batch_size=2, seq_len=16, steps=6, lr=1e-2, min_lr=2e-3, warmup_steps=2,
                    weight_decay=0.2, betas=(0.8, 0.9), grad_clip=0.5, eval_interval=2, eval_steps=3,
                    save_interval=4, keep=9, seed=3, shuffle=True, doc_mask=False, dtype="float32",
                    device="cpu")
    train(**{**settings, **flags}, out_dir=out_dir)
    return read_log(out_dir)


def resume(out_dir, **flags):
    """The log of a run that goes on with what is given, and nothing else."""
    train(resume=True, out_dir=out_dir, device="cpu", **flags)
    return read_log(out_dir)


def drop_after(out_dir, step):
    """Leaves a run as a kill would, some steps after a checkpoint."""
    for path in checkpoints_of_run(out_dir):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def progress_of(folder):
    return torch.load(folder / "progress.pt", weights_only=True)


# -----------------------------------------------------------------------------
# The record


def test_flags_that_are_not_given_come_from_the_runs_own_record(corpus, tmp_path, capsys, monkeypatch):
    whole = begin(corpus, tmp_path / "run[1]")
    drop_after(tmp_path / "run[1]", 2)
    monkeypatch.chdir(tmp_path)  # The record's paths don't depend on where it was made.
    assert untimed(resume(Path("run[1]"))) == untimed(whole)
    assert "resuming" not in capsys.readouterr().err


def test_the_steps_of_epochs_are_recorded(corpus, tmp_path):
    begin(corpus, tmp_path / "run", steps=None, epochs=1, batch_size=32)
    drop_after(tmp_path / "run", 6)
    assert len(resume(tmp_path / "run")) == len(read_log(tmp_path / "run")) == progress_of(
        checkpoints_of_run(tmp_path / "run")[-1])["flags"]["steps"]


@pytest.mark.parametrize("flags, said", [
    (dict(seq_len=8), "seq_len 16; found seq_len 8"),
    (dict(shuffle=False), "shuffle True; found shuffle False"),
    (dict(seed=1337), "seed 3; found seed 1337"),
    (dict(doc_mask=True), "doc_mask False; found doc_mask True"),
    (dict(steps=5), "steps 6; found steps 5")])
def test_what_has_to_stay_is_refused_with_old_and_new_named(corpus, tmp_path, flags, said):
    before = begin(corpus, tmp_path / "run")
    with pytest.raises(ValueError, match=f"step_000006 has step 6 and {said}: resume with the same"):
        resume(tmp_path / "run", **flags)
    assert read_log(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["train", "val"])
def test_other_data_at_the_same_path_is_refused(corpus, tmp_path, name):
    begin(corpus, tmp_path / "run")
    data = np.fromfile(corpus / f"{name}.bin", dtype="<u4")
    data[-1] -= 1  # one token, of the same file
    data.tofile(corpus / f"{name}.bin")
    said = rf"and {name}_data .*bin \(SHA-256 \w+\); found {name}_data .*: resume"
    with pytest.raises(ValueError, match=said):
        resume(tmp_path / "run", steps=8)


def test_a_further_shard_is_refused(corpus, tmp_path):
    begin(corpus, tmp_path / "run", train_data=corpus / "train*.bin")
    shutil.copy(corpus / "train.bin", corpus / "train2.bin")
    with pytest.raises(ValueError, match=r"train_data no file .*; found train_data .*train2.bin"):
        resume(tmp_path / "run", steps=8)


def test_the_same_data_elsewhere_is_said_and_taken(corpus, tmp_path, capsys):
    begin(corpus, tmp_path / "run")
    (corpus / "train.bin").rename(corpus / "moved.bin")
    assert len(resume(tmp_path / "run", train_data=corpus / "moved.bin", steps=7)) == 7
    assert f"with train_data {corpus}/moved.bin, not {corpus}/train.bin" in capsys.readouterr().err


def test_unchanged_files_are_not_read_again(corpus, tmp_path, monkeypatch):
    begin(corpus, tmp_path / "run")
    read = []
    monkeypatch.setattr("plumbing.resume.sha256_of", lambda path: read.append(path) or "other")
    resume(tmp_path / "run", tokenizer_path=corpus / "ckpt" / "tokenizer.model")
    assert not read


def test_another_vocabulary_of_the_same_size_is_refused(corpus, tmp_path):
    begin(corpus, tmp_path / "run")
    lines = (corpus / "tokenizer.model").read_text().splitlines()
    (first, a), (second, b) = (line.split() for line in lines[-2:])
    (corpus / "other.model").write_text("\n".join([*lines[:-2], f"{second} {a}", f"{first} {b}"]) + "\n")
    with pytest.raises(ValueError, match="vocabulary .*tokenizer.model .*; found vocabulary .*other.model"):
        resume(tmp_path / "run", steps=8, tokenizer_path=corpus / "other.model")


def test_every_other_flag_that_is_given_and_differs_is_said_in_a_line(corpus, tmp_path, capsys):
    begin(corpus, tmp_path / "run")
    capsys.readouterr()
    resume(tmp_path / "run", weight_decay=0.3, betas=(0.8, 0.95), min_lr=1e-3, keep=3, grad_clip=0.5,
           steps=7, batch_size=1, dtype="bfloat16")
    said = [line.partition("step_000006 ")[2] for line in capsys.readouterr().err.splitlines()
            if line.startswith("resuming")]
    assert said == ["with weight_decay 0.3, not 0.2", "with betas [0.8, 0.95], not [0.8, 0.9]",
                    "with min_lr 0.001, not 0.002", "with keep 3, not 9", "with steps 7, not 6"]
    flags = progress_of(tmp_path / "run" / "step_000007")["flags"]
    assert flags["weight_decay"] == 0.3 and flags["total_batch_tokens"] == 32 and flags["keep"] == 3


@pytest.mark.parametrize("given, taken", [(4, 2), (3, 2), (1, 1)])
def test_a_batch_size_that_does_not_divide_a_step_becomes_one_that_does(corpus, tmp_path, given, taken,
                                                                        capsys):
    whole = begin(corpus, tmp_path / "run")
    drop_after(tmp_path / "run", 4)
    parts = resume(tmp_path / "run", batch_size=given)
    assert (f"with batch_size {taken}, not {given}" in capsys.readouterr().err) == (given != taken)
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], rel=1e-6)


def test_a_batch_becomes_one_window_where_a_step_has_no_more(corpus, tmp_path, capsys):
    begin(corpus, tmp_path / "run", batch_size=1, total_batch_tokens=16)
    assert len(resume(tmp_path / "run", batch_size=2, steps=7)) == 7
    assert "with batch_size 1, not 2: a step has 1 windows" in capsys.readouterr().err


def test_a_run_goes_on_when_the_checkpoint_it_began_with_is_gone(corpus, tmp_path):
    shutil.copytree(corpus / "ckpt", tmp_path / "ckpt")
    begin(corpus, tmp_path / "run", ckpt_dir=tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt")
    assert len(resume(tmp_path / "run", steps=7)) == 7


def test_flags_of_a_notebook_are_recorded_as_plain_values(corpus, tmp_path):
    begin(corpus, tmp_path / "run", lr=np.float64(1e-2), seed=np.int64(3))
    assert progress_of(tmp_path / "run" / "step_000006")["flags"]["lr"] == 1e-2
    assert len(resume(tmp_path / "run", steps=7, lr=np.float64(1e-2))) == 7


def test_a_checkpoint_of_an_earlier_version_resumes_by_the_flags_given(corpus, tmp_path):
    whole = begin(corpus, tmp_path / "whole", doc_mask=True)
    begin(corpus, tmp_path / "run", doc_mask=True)
    drop_after(tmp_path / "run", 4)
    folder = tmp_path / "run" / "step_000004"
    progress = progress_of(folder)
    order = {name: progress["flags"][name] for name in ("seq_len", "shuffle", "seed")}
    torch.save({"step": 4, "loader": progress["loader"], "order": order}, folder / "progress.pt")
    assert untimed(begin(corpus, tmp_path / "run", doc_mask=True, resume=True)) == untimed(whole)


# -----------------------------------------------------------------------------
# The schedule


def rates(records):
    return [record["lr"] for record in records]


def test_added_steps_run_at_the_schedules_last_rate(corpus, tmp_path, capsys):
    begun = rates(begin(corpus, tmp_path / "run"))
    for steps in (8, 9):
        records = resume(tmp_path / "run", steps=steps, lr=1e-2)  # the same rate begins nothing new
        assert rates(records) == begun + [pytest.approx(2e-3)] * (steps - 6)
        assert f"steps up to {steps} keep its last rate" in capsys.readouterr().err
    assert begun[-1] == pytest.approx(2e-3)


def test_added_steps_with_another_rate_begin_a_schedule_of_their_own(corpus, tmp_path):
    begun = rates(begin(corpus, tmp_path / "run"))
    fresh = [learning_rate_at(step, 5, 5e-3, 2e-3, 2) for step in range(1, 6)]
    assert rates(resume(tmp_path / "run", steps=11, lr=5e-3)) == begun + fresh
    drop_after(tmp_path / "run", 8)  # as a kill leaves it
    assert rates(resume(tmp_path / "run", steps=11, lr=5e-3)) == begun + fresh
    drop_after(tmp_path / "run", 8)
    assert rates(resume(tmp_path / "run")) == begun + fresh


def test_another_rate_within_the_schedule_keeps_its_place(corpus, tmp_path):
    begun = rates(begin(corpus, tmp_path / "run"))
    drop_after(tmp_path / "run", 4)
    assert rates(resume(tmp_path / "run", lr=5e-3)) == begun[:4] + [
        learning_rate_at(step, 6, 5e-3, 2e-3, 2) for step in (5, 6)]


def test_fewer_steps_than_recorded_end_within_the_schedule(corpus, tmp_path):
    begun = rates(begin(corpus, tmp_path / "run"))
    drop_after(tmp_path / "run", 4)
    assert rates(resume(tmp_path / "run", steps=5)) == begun[:5]


@pytest.mark.parametrize("warmup_steps", [0, 2, 6, 9])
def test_the_rate_beyond_the_schedule_is_its_last_one(warmup_steps):
    last = learning_rate_at(6, 6, 1.0, 0.1, warmup_steps)
    assert [learning_rate_at(step, 6, 1.0, 0.1, warmup_steps) for step in (7, 9, 99)] == [last] * 3


def test_a_finished_run_says_so_and_stays_as_it_is(corpus, tmp_path, capsys):
    begin(corpus, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("step_*/*")}
    resume(tmp_path / "run")
    assert "run has all its 6 steps; more --steps go on" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("step_*/*")} == before


# -----------------------------------------------------------------------------
# One run at a time


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(corpus, tmp_path, monkeypatch):
    refusals = []
    evaluate = llama31.evaluate

    def second(*args, **kwargs):
        (tmp_path / "run" / "optimizer.part").mkdir(exist_ok=True)
        for call in (begin, lambda *args: resume(args[1])):
            held = rf"run.lock is held by process {os.getpid()} on .*--out_dir"
            with pytest.raises(ValueError, match=held):
                call(corpus, tmp_path / "run")
        refusals.append((tmp_path / "run" / "optimizer.part").exists())
        return evaluate(*args, **kwargs)
    monkeypatch.setattr(llama31, "evaluate", second)
    assert len(begin(corpus, tmp_path / "run")) == 6
    assert refusals == [True] * 3 and not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
def test_a_lock_whose_owner_has_been_killed_holds_nobody_up(tmp_path):
    holding = ("import os, signal, sys; from plumbing.resume import locked\n"
               "with locked(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)")
    path = tmp_path / "a" / "b" / "run.lock"
    assert run("-c", holding, path).returncode == -signal.SIGKILL
    assert path.exists()
    with locked(path), pytest.raises(ValueError, match="is held by process"), locked(path):
        pass
    assert not path.exists()


def test_a_lock_leaves_no_folder_that_it_made(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b" / "run.lock"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_without_locks_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path / "run.lock"):
        assert "run.lock can't be locked" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# The best checkpoint


@pytest.fixture
def losses(monkeypatch):
    """The validation losses of the evaluations to come."""
    losses = []
    monkeypatch.setattr(llama31, "evaluate", lambda *args, **kwargs: (losses.pop(0), 1.0))
    return losses


@pytest.mark.parametrize("save_interval", [0, 1])
def test_the_best_checkpoint_stays_beside_the_newest_and_is_named(corpus, tmp_path, losses, capsys,
                                                                  save_interval):
    losses[:] = [3.0, 2.0, 2.0, 2.5]
    begin(corpus, tmp_path / "run", steps=8, keep=1, save_interval=save_interval)
    assert [path.name for path in checkpoints_of_run(tmp_path / "run")] == ["step_000004", "step_000008"]
    best = tmp_path / "run" / "best"
    assert os.readlink(best) == "step_000004"
    assert f"best at step 4, validation 2.000 nats per token: {best}" in capsys.readouterr().out
    llama31.sample(ckpt_dir=str(best), prompt="the cat", max_gen_len=2, device="cpu")
    assert checkpoint.newest_checkpoint(tmp_path).name == "step_000008"
    losses[:] = [1.9, 2.2]
    resume(tmp_path / "run", steps=12)
    assert os.readlink(best) == "step_000010"
    assert [path.name for path in checkpoints_of_run(tmp_path / "run")] == ["step_000010", "step_000012"]


def test_resuming_remembers_the_best_and_a_link_that_leads_nowhere_goes(corpus, tmp_path, losses):
    losses[:] = [2.0, 3.0, 2.5]
    begin(corpus, tmp_path / "run", keep=1)
    losses[:] = [2.1]
    resume(tmp_path / "run", steps=8)
    assert os.readlink(tmp_path / "run" / "best") == "step_000002"
    shutil.rmtree(tmp_path / "run" / "step_000002")
    resume(tmp_path / "run")
    assert not (tmp_path / "run" / "best").is_symlink()
    losses[:] = [2.2]
    resume(tmp_path / "run", steps=10)
    assert os.readlink(tmp_path / "run" / "best") == "step_000010"


def test_where_there_are_no_links_the_best_is_kept_and_named(corpus, tmp_path, losses, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(os, "symlink", fail)
    losses[:] = [2.0, 3.0, 2.5]
    begin(corpus, tmp_path / "run", keep=1)
    out, err = capsys.readouterr()
    assert "best can't be a symbolic link" in err
    assert f"nats per token: {tmp_path}/run/step_000002" in out
    assert [path.name for path in checkpoints_of_run(tmp_path / "run")] == ["step_000002", "step_000006"]


def test_a_checkpoint_that_cannot_be_removed_is_said_and_ends_nothing(corpus, tmp_path, monkeypatch, capsys):
    def fail(path, ignore_errors=False):
        if "step_" not in str(path):
            rmtree(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", fail)
    assert len(begin(corpus, tmp_path / "run", keep=1, save_interval=2, steps=8)) == 8
    assert "step_000002 can't be removed, and stays: " in capsys.readouterr().err
    assert len(resume(tmp_path / "run", steps=9)) == 9  # and what is left in part holds nobody up


def test_a_run_that_may_fill_the_disk_is_refused_at_its_start(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(OSError, match=r"--keep 2 with the best and the next, 4 checkpoints more, takes"):
        begin(corpus, tmp_path / "run", keep=2, save_interval=1)
    assert not (tmp_path / "run").exists()
    assert len(begin(corpus, tmp_path / "run", keep=2, steps=1)) == 1


# -----------------------------------------------------------------------------
# Launchers


@pytest.mark.parametrize("variables, said", [
    (dict(SLURM_PROCID="1", SLURM_NTASKS="2"), "found SLURM_NTASKS 2, .*srun"),
    (dict(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="2"), "found SLURM_STEP_NUM_TASKS 2"),
    (dict(OMPI_COMM_WORLD_SIZE="4"), "OMPI_COMM_WORLD_SIZE 4, .*mpirun"), (dict(PMI_SIZE="2"), "PMI_SIZE 2"),
    (dict(RANK="0"), "expected RANK and WORLD_SIZE"), (dict(WORLD_SIZE="2"), "expected RANK and WORLD_SIZE"),
    (dict(RANK="2", WORLD_SIZE="2"), "the first the smaller"), (dict(RANK="a", WORLD_SIZE="2"), "numbers"),
    (dict(RANK="0", WORLD_SIZE="2"), "no MASTER_ADDR")])
def test_processes_that_would_each_train_alone_are_refused(monkeypatch, variables, said, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        train(out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [
    {}, dict(SLURM_NTASKS="4"), dict(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1"),
    dict(OMPI_COMM_WORLD_SIZE="1"), dict(RANK="0", WORLD_SIZE="1")])
def test_one_process_in_an_allocation_of_several_may_train(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.launched() == (0, 1)


def test_an_unknown_flag_is_an_error_that_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword"):
        train(speed=3, out_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_resuming_where_nothing_is_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match="out_dir is .*none, without a checkpoint; expected"):
        resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()
