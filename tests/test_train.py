"""Training: the schedule, what a run leaves on disk, exact resuming, and errors before any work."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from tiny import (
    NARROW,
    RESCALED,
    ROOT,
    WIDE,
    assert_close,
    random_model,
    random_tokens,
    read_log,
    read_weights,
    shard_bytes,
    shard_tokens,
    untimed,
    write_checkpoint,
)
from torch.utils._python_dispatch import TorchDispatchMode

import llama31
import reference
from llama31 import Llama, ModelArgs, Transformer, train
from plumbing import attention, fast
from plumbing.attention import first_seen
from plumbing.files import write_tokens
from tokenizer import Tokenizer, train_tokenizer

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch, quick_training):
    monkeypatch.setitem(llama31.PRESETS, "small", SHAPE)


def run(corpus, out_dir, **flags):
    settings = dict(train_data=str(corpus / "train.bin"), val_data=str(corpus / "val.bin"),
                    out_dir=str(out_dir), preset="small", tokenizer_path=str(corpus / "tokenizer.model"),
                    batch_size=2, seq_len=16, steps=6, lr=1e-2, warmup_steps=2, eval_interval=3,
                    device="cpu", dtype="float32")
    train(**{**settings, **flags})
    return read_log(out_dir)


def test_without_a_rate_it_is_one_for_the_models_width_and_use(corpus, tmp_path):
    def highest(out_dir, **flags):
        return max(record["lr"] for record in run(corpus, tmp_path / out_dir, lr=None, **flags))
    dim = llama31.PRESETS["small"]["dim"]
    assert highest("new") == pytest.approx(0.6 / dim)
    # Resumed weights come from a checkpoint, too, but the rate from the run's record.
    records = run(corpus, tmp_path / "new", lr=None, resume=True, steps=12)
    assert records[-1]["lr"] == pytest.approx(0.06 / dim) and records[-1]["step"] == 12
    start = dict(ckpt_dir=str(tmp_path / "new" / "step_000012"), preset=None, tokenizer_path=None)
    assert highest("fine", **start) == pytest.approx(0.05 / dim)
    assert highest("adapters", lora_rank=2, **start) == pytest.approx(0.5 / dim)


def test_the_rate_warms_up_linearly_and_follows_a_cosine_to_its_floor():
    rates = [llama31.learning_rate_at(step, 110, 1.0, 0.1, 10) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert rates[34] == pytest.approx(0.1 + 0.9 * (1 + 0.5 ** 0.5) / 2)  # a quarter down
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_a_run_leaves_a_log_a_plot_and_checkpoints_that_all_programs_read(corpus, tmp_path):
    records = run(corpus, tmp_path, save_interval=2, keep=2)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= record.keys()
        assert ("val_bpb" in record) == ("val_loss" in record) == (record["step"] in (3, 6))
    assert records[0]["loss"] > records[-1]["loss"] + 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best", "log.jsonl", "loss.png", "step_000004", "step_000006", "tokenizer.model"]
    folder = tmp_path / "step_000006"
    ours = Llama.build(folder, device="cpu").text_completion(["the cat"], max_gen_len=12, temperature=0)
    assert ours == reference.Llama.build(folder).text_completion(["the cat"], max_gen_len=12, temperature=0)
    args = ModelArgs.from_json(folder / "params.json")
    assert read_weights(folder).keys() == Transformer(args).state_dict().keys()


@pytest.mark.parametrize("doc_mask", [False, True])
def test_bits_per_byte_are_counted_targets_nats_over_ordinary_bytes(corpus, tmp_path, doc_mask):
    """The bytes are those of ordinary tokens among the targets."""
    record = run(corpus, tmp_path, eval_steps=0, doc_mask=doc_mask)[-1]
    llama = Llama.build(tmp_path / "step_000006", device="cpu")
    tokenizer = llama.tokenizer
    tokens = shard_tokens(corpus / "val.bin").astype(np.int64)
    nats = count = num_bytes = 0
    for k in range((len(tokens) - 1) // 16):
        window = torch.from_numpy(tokens[16 * k:16 * k + 17])[None]
        targets = window[0, 1:].tolist()
        kept = [t != tokenizer.bos_id or not doc_mask for t in targets]
        loss = llama.model(window[:, :-1], window[:, 1:], tokenizer.bos_id if doc_mask else None)
        nats, count = nats + loss.item() * sum(kept), count + sum(kept)
        num_bytes += len(tokenizer.decode_bytes([t for t in targets if t < tokenizer.bos_id]))
    assert record["val_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert record["val_bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("changes", [
    NARROW, pytest.param(dict(RESCALED, **WIDE), marks=pytest.mark.slow)])
def test_heads_of_any_width_are_trained_saved_and_resumed(corpus, tmp_path, changes):
    model = random_model(vocab_size=560, **changes)
    write_checkpoint(tmp_path / "source", model, tokenizer=Tokenizer(corpus / "tokenizer.model"))
    flags = dict(preset=None, ckpt_dir=str(tmp_path / "source"), lr=1e-3)
    whole = run(corpus, tmp_path / "whole", **flags)
    run(corpus, tmp_path / "parts", save_interval=4, **flags)
    shutil.rmtree(tmp_path / "parts" / "step_000006")
    assert untimed(run(corpus, tmp_path / "parts", resume=True, **flags)) == untimed(whole)
    saved = Llama.build(tmp_path / "parts" / "step_000006", device="cpu", compile=False)
    assert saved.model.args == model.args
    theirs = reference.Llama.build(tmp_path / "parts" / "step_000006")
    tokens = random_tokens(1, 20)
    assert_close(saved.model(tokens)[0], reference.forward(theirs.weights, theirs.args, tokens[0]))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_run_continues_exactly(corpus, tmp_path, shuffle):
    whole = run(corpus, tmp_path / "whole", shuffle=shuffle)
    run(corpus, tmp_path / "parts", shuffle=shuffle, save_interval=4)
    shutil.rmtree(tmp_path / "parts" / "step_000006")
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # as a kill leaves it
    parts = run(corpus, tmp_path / "parts", shuffle=shuffle, resume=True)
    assert untimed(whole) == untimed(parts)
    a, b = read_weights(tmp_path / "whole" / "step_000006"), read_weights(tmp_path / "parts" / "step_000006")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("doc_mask", [False, True])
def test_accumulated_micro_batches_equal_one_large_batch(corpus, tmp_path, doc_mask):
    one = run(corpus, tmp_path / "one", batch_size=4, doc_mask=doc_mask)
    four = run(corpus, tmp_path / "four", batch_size=1, total_batch_tokens=64, doc_mask=doc_mask)
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_the_loss_of_a_step_is_in_float32_as_mps_has_no_float64(monkeypatch):
    types = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: types.append(loss.dtype) or backward(loss))
    model = random_model(n_layers=1)
    llama31.optimize(model, model.configure_optimizers(0.5), [(*random_tokens(2, 2, 9), None)], 1e-2, 1.0,
                     torch.autocast("cpu", enabled=False))
    assert types == [torch.float32]


@pytest.mark.parametrize("grad_clip", [0.0, 0.01])
def test_a_step_is_adamws_on_the_gradient_of_the_mean_over_all_targets(grad_clip):
    ours, plain = (random_model(n_layers=1) for _ in range(2))
    batches = [(*random_tokens(2, 2, 9, seed=seed), None) for seed in (1, 2, 3)]
    batches[1][1][:, 2:] = -100  # micro-batches of 18, 4 and 18 targets
    optimizers = [model.configure_optimizers(0.5) for model in (ours, plain)]
    loss, norm = llama31.optimize(ours, optimizers[0], batches, 1e-2, grad_clip,
                                  torch.autocast("cpu", enabled=False))
    mean = sum(plain(x, y, reduction="sum") for x, y, _ in batches) / 40
    mean.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    assert loss == pytest.approx(float(mean), rel=1e-6) and norm == pytest.approx(float(expected), rel=1e-5)
    for p in plain.parameters():
        p.grad *= grad_clip / expected if grad_clip else 1
    for group in optimizers[1].param_groups:
        group["lr"] = 1e-2
    optimizers[1].step()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=name)


class Waits(TorchDispatchMode):
    """Counts the operations that bring a number to the host, for which a GPU would be waited for."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select
        self.count += function.overloadpacket in waiting
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("recomputed, micro_batches", [(False, 1), (True, 1), (False, 3)])
def test_a_step_waits_for_the_loss_and_the_norm_alone(monkeypatch, recomputed, micro_batches):
    """Tensors' tolist, numpy and cpu pass by the dispatcher on a CPU."""
    model = random_model()
    model.compiled_attention = True  # The dense mask of a CPU alone asks whether there are documents.
    model.activation_checkpointing = recomputed
    optimizer = model.configure_optimizers(0.1)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = True
    batches = [(*random_tokens(2, 2, 9), starts)] * micro_batches
    calls = []
    for name in ("tolist", "numpy", "cpu"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name, method=method, **kwargs:
                            calls.append(name) or method(*args, **kwargs))
    with Waits() as waits:
        llama31.optimize(model, optimizer, batches, 0.1, 1.0, torch.autocast("cpu", enabled=False))
    assert waits.count == 1 and calls == ["tolist"]


@pytest.mark.slow
def test_a_short_finetune_at_a_low_rate_moves_the_weights(corpus, tmp_path):
    run(corpus, tmp_path / "base")
    start = tmp_path / "base" / "step_000006"
    run(corpus, tmp_path / "fine", ckpt_dir=str(start), preset=None, tokenizer_path=None, steps=20, lr=1e-5,
        dtype="bfloat16")
    a, b = read_weights(start), read_weights(tmp_path / "fine" / "step_000020")
    moved = sum(int((a[name] != b[name]).sum()) for name in a) / sum(a[name].numel() for name in a)
    assert moved > 0.9 and all(w.dtype == torch.float32 for w in b.values())


@pytest.mark.parametrize("cxx, said", [
    ("nosuchcompiler", "no C++ compiler found"), ("g++ -m64", "torch.compile needs a CXX of one word")])
def test_where_nothing_compiles_one_line_says_so_and_training_goes_on(cxx, said, corpus, tmp_path, capsys,
                                                                      monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    assert len(run(corpus, tmp_path, steps=2, compile=True)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "nothing is compiled" in line]
    assert line.startswith(said)


def test_training_on_a_cpu_is_compiled_where_that_is_asked_for(corpus, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(fast, "compile_blocks", lambda model: compiled.append(model))
    for name, compile, expected in (("default", None, 0), ("asked", True, 1), ("not", False, 0)):
        compiled.clear()
        run(corpus, tmp_path / name, steps=1, compile=compile)
        assert len(compiled) == expected


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_cpus_attention_is_compiled_unless_that_is_declined(corpus, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "first_seen", lambda *given: calls.append(given) or first_seen(*given))
    run(corpus, tmp_path / "not", steps=1, compile=False)
    assert not calls
    run(corpus, tmp_path / "default", steps=1)
    assert calls


@pytest.mark.slow
def test_compiled_training_has_the_losses_of_eager_training(corpus, tmp_path):
    eager, compiled = (run(corpus, tmp_path / str(flag), compile=flag) for flag in (False, True))
    for a, b in zip(eager, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_training_leaves_the_global_generators_and_defaults_alone(corpus, tmp_path):
    before = torch.get_rng_state()
    run(corpus, tmp_path / "a", steps=1)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("flags, said", [
    (dict(preset="huge"), "preset is huge; expected one of demo, "),
    (dict(ckpt_dir="here"), "expected one of them"),
    (dict(dtype="float16"), "expected float32 or bfloat16"),
    (dict(total_batch_tokens=48), "multiple of .* = 32"), (dict(tokenizer_path=None), "--tokenizer_path"),
    (dict(train_data="nothing*.bin"), "no file matches nothing"),
    (dict(batch_size=0), "batch_size is 0; expected at least 1"),
    (dict(lr=-1.0), "lr is -1"), (dict(grad_clip=-1.0), "grad_clip is -1"),
    (dict(dtype="float64"), "dtype is float64"), (dict(steps=0), "steps is 0"),
    (dict(seed=-1), "seed is -1"), (dict(train_data="/"), r"/: found a folder, expected a .bin file"),
    (dict(seed=2**64), "seed is 1844"),
    (dict(betas=(0.9, 1.5)), r"betas is \(0.9, 1.5\); expected two numbers from 0 to below 1")])
def test_a_wrong_flag_is_named_before_anything_is_written(corpus, tmp_path, flags, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run(corpus, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_training_data_is_never_validation_data(corpus, tmp_path):
    with pytest.raises(ValueError, match="val.bin is in both"):
        run(corpus, tmp_path, train_data=str(corpus / "*.bin"))


def test_a_folder_with_a_run_is_not_overwritten(corpus, tmp_path):
    run(corpus, tmp_path, steps=1)
    with pytest.raises(ValueError, match="holds a run"):
        run(corpus, tmp_path, steps=1)


def test_a_run_that_was_killed_before_it_saved_begins_again(corpus, tmp_path):
    """An empty log is nothing to lose; one with lines is kept until --resume says to begin again."""
    run(corpus, tmp_path / "sound", steps=2)
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "log.jsonl"
    log.touch()
    run(corpus, tmp_path / "run", steps=2)
    shutil.rmtree(tmp_path / "run" / "step_000002")
    (tmp_path / "run" / "best").unlink()
    with pytest.raises(ValueError, match="holds the log of a run that has saved nothing; the same flags"):
        run(corpus, tmp_path / "run", steps=2)
    assert len(read_log(tmp_path / "run")) == 2
    run(corpus, tmp_path / "run", steps=2, resume=True)
    assert [line["loss"] for line in read_log(tmp_path / "run")] == [
        line["loss"] for line in read_log(tmp_path / "sound")]


def test_a_masked_token_of_another_vocabulary_is_an_error(corpus, tmp_path):
    stored = np.arange(1, 40)
    stored[0] = 2**31 + 2**30 + 600  # It is read, but no target.
    (tmp_path / "train.bin").write_bytes(shard_bytes(stored, version=9))
    with pytest.raises(ValueError, match="holds token 600, the vocabulary ends at 559"):
        run(corpus, tmp_path / "out", train_data=str(tmp_path / "train.bin"), val_data=None)


def test_data_of_another_vocabulary_is_an_error(corpus, tmp_path):
    write_tokens(tmp_path / "train.bin", [list(range(530, 590))])
    with pytest.raises(ValueError, match="holds token 5.., the vocabulary ends at 559"):
        run(corpus, tmp_path / "out", train_data=str(tmp_path / "train.bin"))
    assert Tokenizer(corpus / "tokenizer.model").n_words == 560
    run(corpus, tmp_path / "base", steps=1)
    other = train_tokenizer(["a b c a b c"], 514, tmp_path / "other.model").model_path
    with pytest.raises(ValueError, match="514 tokens, the model 560"):
        run(corpus, tmp_path / "more", ckpt_dir=str(tmp_path / "base" / "step_000001"), preset=None,
            tokenizer_path=other)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"windows \d+ to \d+\) has loss (nan|.* gradient norm (nan|inf))"):
        run(corpus, tmp_path, lr=1e30, grad_clip=0.0, save_interval=1, steps=9)
    assert llama31.checkpoints_of_run(tmp_path)


def test_a_gradient_that_is_not_finite_reaches_no_weight_and_no_checkpoint(corpus, tmp_path, monkeypatch):
    calls = []

    def clip(parameters, limit):
        calls.append(limit)
        return real_clip(parameters, limit) if len(calls) < 3 else torch.tensor(math.inf)

    real_clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(ValueError, match=r"step 3 \(windows 4 to 5\) has loss .* and gradient norm inf"):
        run(corpus, tmp_path, save_interval=1, keep=1)
    assert [path.name for path in llama31.checkpoints_of_run(tmp_path)] == ["step_000002"]


def test_resuming_without_a_checkpoint_starts_at_the_first_step(corpus, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3}\n')  # as a kill before a save leaves it
    (tmp_path / "step_old").mkdir()
    assert [record["step"] for record in run(corpus, tmp_path, steps=2, resume=True)] == [1, 2]


@torch.no_grad()
@pytest.mark.parametrize("batch_size, num_ranks", [(4, 1), (3, 2), (7, 3)])
def test_an_evaluation_counts_every_window_and_its_targets_bytes_once(tmp_path, batch_size, num_ranks):
    tokens = random_tokens(16 * 10 + 5, high=256)
    stored = tokens.numpy() + 2**31 * (np.arange(len(tokens)) % 3 == 0)  # no targets, of version 8
    (tmp_path / "val.bin").write_bytes(shard_bytes(stored, version=8))
    model = Transformer(ModelArgs(**SHAPE, vocab_size=256))
    byte_lengths = 1 + torch.arange(256) % 5
    nats = count = num_bytes = 0
    for at in range(0, 160, 16):
        logprobs = model(tokens[None, at:at + 16])[0].log_softmax(-1)
        for i in range(at, at + 16):
            if (i + 1) % 3:
                nats -= float(logprobs[i - at, tokens[i + 1]])
                count, num_bytes = count + 1, num_bytes + int(byte_lengths[tokens[i + 1]])
    sums = []
    for rank in range(num_ranks):
        loader = llama31.DistributedShardedDataLoader(tmp_path / "val.bin", batch_size, 16, rank, num_ranks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama31.parallel, "sum_over_ranks",
                          lambda values, _: sums.append(values) or torch.tensor(values))
            llama31.evaluate(model, loader, 10, False, byte_lengths, torch.autocast("cpu", enabled=False))
    expected = pytest.approx([nats, count, num_bytes], 1e-5)
    assert [sum(column) for column in zip(*sums, strict=True)] == expected


def test_a_finished_run_that_is_resumed_only_draws_its_plot_again(corpus, tmp_path):
    whole = run(corpus, tmp_path)
    (tmp_path / "loss.png").unlink()
    assert run(corpus, tmp_path, resume=True) == whole
    assert (tmp_path / "loss.png").exists()
    (tmp_path / "log.jsonl").unlink()
    assert run(corpus, tmp_path, resume=True) == []  # of nothing, no plot is drawn


def test_a_signal_in_the_last_step_interrupts_nothing(corpus, tmp_path, monkeypatch, capsys):
    evaluate = llama31.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)
    monkeypatch.setattr(llama31, "evaluate", signalled)
    assert len(run(corpus, tmp_path, steps=2)) == 2
    assert (tmp_path / "loss.png").exists() and "--resume" not in capsys.readouterr().out


SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@pytest.fixture
def usual_signals():
    """Signals act as in a process that has just begun, whatever whoever started the tests has ignored."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("SIGTERM", "SIGINT") else pytest.mark.slow) for name in SIGNALS])
def test_a_signal_saves_and_ends_as_the_signal_would(corpus, tmp_path, monkeypatch, capsys, name,
                                                     usual_signals):
    whole = run(corpus, tmp_path / "whole")
    evaluate = llama31.evaluate

    def signalled(*args, **kwargs):
        for _ in range(1 if name == "SIGINT" else 2):  # bash and timeout send theirs twice
            os.kill(os.getpid(), getattr(signal, name))
        return evaluate(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(llama31, "evaluate", signalled)
        with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as error:
            run(corpus, tmp_path / "parts")
    assert name == "SIGINT" or error.value.code == 128 + getattr(signal, name)
    assert f"{name} after step 3, which is saved; --resume goes on\n" in capsys.readouterr().out
    assert llama31.checkpoints_of_run(tmp_path / "parts")[-1].name == "step_000003"
    assert untimed(run(corpus, tmp_path / "parts", resume=True)) == untimed(whole)


def test_a_signal_that_is_ignored_stays_so(corpus, tmp_path, monkeypatch, usual_signals):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup does with SIGHUP
    evaluate = llama31.evaluate

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)
    monkeypatch.setattr(llama31, "evaluate", signalled)
    assert len(run(corpus, tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a terminal of its own")
def test_a_lost_terminal_saves_and_ends_with_129(corpus, tmp_path):
    import pty
    words = [sys.executable, "llama31.py", "train", f"--train_data={corpus}/train.bin", "--seq_len=16",
             f"--val_data={corpus}/val.bin", f"--ckpt_dir={corpus}/ckpt", f"--out_dir={tmp_path}/run",
             "--steps=1000000", "--eval_interval=1000000", "--device=cpu"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(ROOT)
        os.execv(sys.executable, words)
    os.set_blocking(terminal, False)
    while not read_log(tmp_path / "run"):
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 10_000)
        time.sleep(0.02)
    os.close(terminal)  # SIGHUP, and what is written from now on fails
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    steps = len(read_log(tmp_path / "run"))
    assert [path.name for path in llama31.checkpoints_of_run(tmp_path / "run")] == [f"step_{steps:06d}"]


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_a_run(corpus, tmp_path):
    words = [sys.executable, "llama31.py", "train", f"--train_data={corpus}/train.bin", "--seq_len=16",
             f"--val_data={corpus}/val.bin", f"--ckpt_dir={corpus}/ckpt", f"--out_dir={tmp_path}/run",
             "--steps=9", "--device=cpu"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0 and (tmp_path / "run" / "loss.png").exists()


def test_a_failing_run_gives_the_signals_back(corpus, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for out_dir, flags in (("a", {}), ("b", dict(lr=1e30, grad_clip=0.0, steps=9))):
        with contextlib.suppress(ValueError):
            run(corpus, tmp_path / out_dir, **flags)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("again, said", [
    (dict(preset="other"), "n_layers 2, but 3 is asked for"),
    (dict(preset=None, ckpt_dir="other"), "dim 32, but 64 is asked for")])
def test_a_run_is_not_resumed_with_another_architecture(corpus, tmp_path, monkeypatch, again, said):
    run(corpus, tmp_path / "run", steps=1)
    monkeypatch.setitem(llama31.PRESETS, "other", {**SHAPE, "n_layers": 3})
    llama31.save_checkpoint(tmp_path / "ckpt", ModelArgs(**{**SHAPE, "dim": 64}, vocab_size=560), {})
    if again.get("ckpt_dir"):
        again = {**again, "ckpt_dir": str(tmp_path / "ckpt")}
    with pytest.raises(ValueError, match=said):
        run(corpus, tmp_path / "run", steps=2, resume=True, **again)
    assert len(run(corpus, tmp_path / "run", steps=2, resume=True)) == 2  # the same may be named, or nothing
    assert len(run(corpus, tmp_path / "run", steps=3, resume=True, preset=None, tokenizer_path=None)) == 3


@pytest.mark.parametrize("ckpt_dtype, flags, bytes_each", [
    (torch.float32, {}, 12), (torch.bfloat16, {}, 14),
    (torch.bfloat16, dict(param_dtype="bfloat16", compile=False), 6)], ids=str)
def test_a_checkpoint_takes_the_bytes_for_which_there_has_to_be_room(ckpt_dtype, flags, bytes_each, corpus,
                                                                     tmp_path):
    """Weights, and two averages; the weights that are trained, too, where those saved are less exact."""
    model = Transformer(ModelArgs(**SHAPE, vocab_size=560)).to(ckpt_dtype)
    llama31.save_checkpoint(tmp_path / "ckpt", model.args, model.state_dict(), corpus / "tokenizer.model")
    run(corpus, tmp_path / "out", steps=1, preset=None, tokenizer_path=None, ckpt_dir=str(tmp_path / "ckpt"),
        **flags)
    expected = bytes_each * sum(p.numel() for p in model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match=f"a checkpoint takes {expected:,} bytes"):
            run(corpus, tmp_path / "other", preset=None, tokenizer_path=None,
                ckpt_dir=str(tmp_path / "ckpt"), **flags)
    found = sum(path.stat().st_size for path in (tmp_path / "out" / "step_000001").rglob("*")
                if path.suffix in (".pth", ".distcp"))
    assert expected <= found < expected + 150_000  # Files and tensors have descriptions, too.


def test_too_little_disk_or_memory_is_said_before_the_first_step(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    model = Transformer.on_meta(ModelArgs(**SHAPE, vocab_size=560))
    size = 12 * sum(p.numel() for p in model.parameters())  # weights and AdamW's averages, in float32
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        with pytest.raises(OSError, match=f"a checkpoint takes {size:,} bytes, .* has 100,000 bytes free"):
            run(corpus, tmp_path / "out")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 200_000}))
    with pytest.raises(ValueError, match="weights, gradients and AdamW's averages take"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_step_is_told_in_a_line_where_there_is_no_terminal(corpus, tmp_path, capsys):
    run(corpus, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    for step, line in enumerate(lines, 1):
        assert re.fullmatch(rf"step {step}: loss [\d.]+, lr \d.\de-\d\d, norm [\d.]+, [\d,]+ tokens/s, "
                            r"MFU \d+%, [\d.]+ GB, \d+:\d\d:\d\d left", line), line


def test_a_damaged_optimizer_is_one_line(corpus, tmp_path):
    run(corpus, tmp_path, steps=2)
    [part] = (tmp_path / "step_000002" / "optimizer").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match="optimizer: damaged, or of another model; .*Error") as error:
        run(corpus, tmp_path, steps=4, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [dict(steps=3), dict(seq_len=8), dict(seed=2), dict(shuffle=True)])
def test_a_run_is_not_resumed_with_another_order_or_fewer_steps(corpus, tmp_path, flags):
    run(corpus, tmp_path, steps=4)
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="step_000004 has step 4 and .*: resume with the same"):
        run(corpus, tmp_path, resume=True, **{"steps": 5, **flags})
    assert (tmp_path / "log.jsonl").read_text() == before


def test_samples_of_a_short_context_do_not_end_a_run(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(llama31.PRESETS, "short", {**SHAPE, "max_seq_len": 8})
    run(corpus, tmp_path, preset="short", seq_len=8, steps=2, sample_interval=2)
    assert capsys.readouterr().out.count(llama31.PROMPTS[0]) == 1


# -----------------------------------------------------------------------------
# What is evaluated, and on what


def test_an_evaluation_is_the_same_at_every_batch_size(corpus, tmp_path):
    flags = dict(steps=1, lr=0.0)
    losses = [run(corpus, tmp_path / str(size), batch_size=size, eval_steps=7, **flags)[-1]["val_loss"]
              for size in (1, 2, 3, 5)]
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-7)
    everything = run(corpus, tmp_path / "all", eval_steps=0, **flags)[-1]["val_loss"]
    assert abs(everything - losses[0]) > 1e-5


def test_without_val_data_only_the_file_beside_train_data_validates(corpus, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine[1]"
    (tmp_path / "tinystories").mkdir()
    mine.mkdir()
    shutil.copy(corpus / "val.bin", tmp_path / "tinystories" / "TinyStories_val.bin")  # of no concern here
    shutil.copy(corpus / "train.bin", mine / "train.bin")
    monkeypatch.chdir(tmp_path)
    flags = dict(train_data="mine[1]/train.bin", val_data=None, steps=1)
    [record] = run(corpus, tmp_path / "without", **flags)
    assert "val_loss" not in record
    assert "no validation: --val_data is not given, and no file matches mine[1]/val.bin" in (
        capsys.readouterr().out)
    shutil.copy(mine / "train.bin", mine / "mine.bin")
    run(corpus, tmp_path / "unlike", **flags | dict(train_data="mine[1]/mine.bin"))
    assert "no validation: --val_data is not given, and no train in mine.bin could become val" in (
        capsys.readouterr().out)
    shutil.copy(corpus / "val.bin", mine / "val.bin")
    [record] = run(corpus, tmp_path / "beside", **flags)
    assert record["val_loss"] == run(corpus, tmp_path / "named", steps=1)[-1]["val_loss"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_dialogs_without_an_answer_train_nothing_and_give_no_number(corpus, tmp_path, capsys, split):
    question = np.arange(40) + 2**31
    question[0] += 2**30
    (tmp_path / f"{split}.bin").write_bytes(shard_bytes(np.tile(question, 5), version=9))
    flags = {f"{split}_data": str(tmp_path / f"{split}.bin")}
    if split == "train":
        with pytest.raises(llama31.NoTargetError, match="no document has a target among its first T"):
            run(corpus, tmp_path / "out", **flags)
        return
    records = run(corpus, tmp_path / "out", **flags)
    assert len(records) == 6 and not any("val_loss" in record for record in records)
    assert "no validation: " + str(tmp_path / "val.bin") in capsys.readouterr().out


def test_a_saved_folder_has_the_context_that_was_trained(corpus, tmp_path, capsys):
    """From scratch seq_len, after finetuning the source's, or a longer seq_len."""
    run(corpus, tmp_path / "scratch", steps=1)
    source = tmp_path / "scratch" / "step_000001"
    assert Llama.build(source, device="cpu").max_seq_len == 16
    for seq_len, context in ((8, 16), (24, 24)):
        out_dir = tmp_path / f"finetuned_{seq_len}"
        run(corpus, out_dir, steps=1, seq_len=seq_len, preset=None, ckpt_dir=str(source))
        assert Llama.build(out_dir / "step_000001", device="cpu").max_seq_len == context
        said = "--seq_len 24 is beyond the 16 tokens that the model is made for" in capsys.readouterr().out
        assert said == (seq_len == 24)


def test_metas_loader_takes_what_training_saves(corpus, tmp_path):
    """It gives both limits beside what params.json says."""
    args = pytest.importorskip("llama_models.llama3.args")
    run(corpus, tmp_path, steps=1)
    params = json.loads((tmp_path / "step_000001" / "params.json").read_text())
    theirs = args.ModelArgs(max_seq_len=99, max_batch_size=3, **params)
    assert all(getattr(theirs, name) == value for name, value in params.items())
    assert (theirs.max_seq_len, theirs.max_batch_size) == (99, 3)


@pytest.mark.parametrize("dtype", [
    torch.bfloat16, torch.float64, *(pytest.param(dtype, marks=pytest.mark.slow)
                                     for dtype in (torch.float16, torch.float32))], ids=str)
def test_finetuned_checkpoints_have_their_sources_type_and_resume_exactly(corpus, tmp_path, dtype):
    model = random_model(dim=32, vocab_size=560, tie_word_embeddings=True).to(dtype)
    write_checkpoint(tmp_path / "source", model, tokenizer=Tokenizer(corpus / "tokenizer.model"))
    flags = dict(preset=None, ckpt_dir=str(tmp_path / "source"), lr=1e-3)
    whole = run(corpus, tmp_path / "whole", **flags)
    run(corpus, tmp_path / "parts", save_interval=4, **flags)
    for folder in (tmp_path / "parts" / "step_000006", tmp_path / "parts" / "best"):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    assert untimed(run(corpus, tmp_path / "parts", resume=True, **flags)) == untimed(whole)
    for name, tensor in read_weights(tmp_path / "whole" / "step_000006").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, read_weights(tmp_path / "parts" / "step_000006")[name]), name
    size = (tmp_path / "whole" / "step_000006" / "consolidated.00.pth").stat().st_size
    num_parameters = sum(p.numel() for p in model.parameters())
    assert size < dtype.itemsize * num_parameters + 10_000  # The tied matrix is there once.
