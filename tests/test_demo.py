"""The demo: made once, then sampled; made anew only when asked; nothing of others is touched."""

import functools
import os
import signal

import pytest

import llama31
import stories
from plumbing.resume import locked


@pytest.fixture
def quick(monkeypatch):
    """The demo with a small corpus and few steps; returns the list of its trainings."""
    trainings = []

    def train(**flags):
        trainings.append(flags)
        real_train(**{**flags, "steps": 2, "eval_interval": 2, "eval_steps": 1, "batch_size": 1})

    real_train = llama31.train
    monkeypatch.setattr(llama31, "train", train)
    monkeypatch.setattr(stories, "write", functools.partial(stories.write, num_stories=800))
    return trainings


def test_the_demo_trains_once_then_samples_and_trains_anew_when_asked(quick, tmp_path, capsys):
    out_dir = tmp_path / "demo"
    llama31.demo(out_dir=out_dir)
    printed = capsys.readouterr().out
    assert all("\n" + prompt in printed for prompt in llama31.PROMPTS)
    assert len(quick) == 1 and {path.name for path in out_dir.iterdir()} == {
        "best", "data", "log.jsonl", "loss.png", "step_000002", "tokenizer.model"}
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    llama31.demo(out_dir=out_dir)
    printed = capsys.readouterr().out
    assert len(quick) == 1 and all(prompt in printed for prompt in llama31.PROMPTS)
    llama31.demo(out_dir=out_dir, retrain=True)
    assert len(quick) == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def fail(**flags):
    raise ValueError("no space left")


def test_a_retraining_that_fails_leaves_the_earlier_demo(quick, tmp_path, monkeypatch):
    out_dir = tmp_path / "demo"
    llama31.demo(out_dir=out_dir)
    before = (out_dir / "log.jsonl").read_text()

    monkeypatch.setattr(llama31, "train", fail)
    with pytest.raises(ValueError, match="no space left"):
        llama31.demo(out_dir=out_dir, retrain=True)
    assert (out_dir / "log.jsonl").read_text() == before and llama31.checkpoints_of_run(out_dir)


@pytest.mark.slow
def test_a_signal_ends_a_retraining_and_leaves_the_earlier_demo(quick, tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / "demo"
    llama31.demo(out_dir=out_dir)
    before = (out_dir / "log.jsonl").read_text()
    optimize = llama31.optimize

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return optimize(*args, **kwargs)
    monkeypatch.setattr(llama31, "optimize", signalled)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        llama31.demo(out_dir=out_dir, retrain=True)
    printed = capsys.readouterr().out
    assert error.value.code == 143 and "SIGTERM after step 1, cut short, start it again" in printed
    assert "--resume" not in printed and (out_dir / "log.jsonl").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_second_demo_in_a_folder_waits_for_the_first(quick, tmp_path, monkeypatch):
    with locked(tmp_path / "demo.lock"), pytest.raises(ValueError, match="demo.lock is held by process"):
        llama31.demo(out_dir=tmp_path / "demo")
    assert not quick


def test_a_folder_with_other_files_is_refused(quick, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "step_000001").mkdir()
    for retrain in (False, True):
        with pytest.raises(ValueError, match="holds no demo but other files"):
            llama31.demo(out_dir=tmp_path, retrain=retrain)
    assert not quick and (tmp_path / "letter.txt").read_text() == "dear"
