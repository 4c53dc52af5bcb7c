"""What a user reads while something runs: the numbers in its lines, and the defaults of every command."""

import functools
import inspect
import itertools
import json
import mmap
import signal
from pathlib import Path

import psutil
import pytest
import torch

import bench
import chat
import convert
import evaluate
import llama31
import planner
import reference
import stories
import tiny_stories
from llama31 import PRESETS, ModelArgs, Sampler, Transformer
from plumbing import answers, devices, fast
from plumbing import run as run_module
from plumbing.plot import plot_losses
from plumbing.run import Run

RECORD = dict(step=3, loss=2.34567, lr=0.00123, grad_norm=0.456, tokens_per_s=12345, mfu=0.347,
              memory=2.56e9)


@pytest.fixture
def clock(monkeypatch):
    """Lets every clock of these modules go on by as many seconds as clock.tick at each look."""
    class Clock:
        tick = 0.5
        seconds = itertools.count()

        def perf_counter(self):
            return next(self.seconds) * self.tick

        monotonic = perf_counter
    clock = Clock()
    for module in (llama31, answers, devices, run_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def begun(out_dir, first, last, **settings):
    """A run that is in its first step, and the iterator over its steps."""
    run = Run(out_dir, resume=False, is_master=True, **settings)
    (out_dir / "tokenizer").write_text("words")
    run.prepare(0, out_dir / "tokenizer")
    steps = run.steps(first, last)
    next(steps)
    return run, steps


def test_a_step_is_one_line_of_rounded_numbers_and_the_time_left(tmp_path, capsys, clock):
    run, steps = begun(tmp_path, 3, 7)
    run.log(RECORD)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "step 3: loss 2.346, lr 1.2e-03, norm 0.46, 12,345 tokens/s, MFU 35%, 2.6 GB, 0:00:02 left")
    next(steps)
    run.log({**RECORD, "step": 4})
    assert capsys.readouterr().err.endswith("0:00:02 left\n")  # two steps in 1 s, three to come: 1.5 s
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3, 4]


@pytest.mark.parametrize("floor, said", [(None, ""), (0.4211, " (floor 0.421)")])
def test_an_evaluation_is_a_line_beside_the_floor(tmp_path, capsys, floor, said):
    run, _ = begun(tmp_path, 3, 3, floor=floor)
    run.log({**RECORD, "val_loss": 1.23456, "val_bpb": 0.98765})
    assert capsys.readouterr().out == (
        f"step 3: loss 2.346, validation 1.235 nats per token, 0.988 bits per byte{said}\n")


def test_only_the_master_writes_and_prints(tmp_path, capsys):
    run = Run(tmp_path, resume=False, is_master=False)
    for _ in run.steps(1, 1):
        run.log(RECORD)
        run.show("text")
    run.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_steps_without_targets_and_logs_without_validation_are_drawn(tmp_path, capsys):
    run, steps = begun(tmp_path, 1, 3)
    for step, loss in ((1, 2.0), (2, None), (3, 1.0)):
        run.log({**RECORD, "step": step, "loss": loss})
    assert list(steps) == [2, 3]
    run.close()
    assert "step 1: loss -, lr" in capsys.readouterr().err
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_fall_of_a_short_finetune_is_in_its_plot(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr("matplotlib.axes.Axes.set", lambda axes, **given: limits.append(given["ylim"]))
    for losses in ([3.0, 2.5, 0.1, 0.05], [9.0, *[2.0] * 38, 1.0]):  # That of one from scratch begins later.
        records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        plot_losses(records, tmp_path / "loss.png")
    assert limits == [(0, 3.0), (0, 4.0)]


def test_a_log_without_any_loss_is_not_drawn(tmp_path):
    run, steps = begun(tmp_path, 1, 1)
    run.log({**RECORD, "loss": None})
    assert list(steps) == []
    run.close()
    assert not (tmp_path / "loss.png").exists()


@pytest.fixture
def usual_ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where whoever started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_is_noted_once_and_the_steps_end_when_it_is_heeded(tmp_path, capfd, usual_ctrl_c):
    run, steps = begun(tmp_path, 1, 9)
    signal.raise_signal(signal.SIGINT)
    assert run.signals == ["SIGINT"] and next(steps) == 2
    assert capfd.readouterr().err.endswith("\nSIGINT: the step ends, and is saved, first\n")
    with pytest.raises(KeyboardInterrupt):  # the second acts as usual
        signal.raise_signal(signal.SIGINT)
    run.stopping = True
    assert list(steps) == []
    run.close()
    assert capfd.readouterr().out == "SIGINT after step 2, which is saved; --resume goes on\n"


def test_generation_is_timed_from_its_first_step(clock):
    watch = answers.Stopwatch(prompt_tokens=30)
    drawn = [[5, 6], [7, None], [8, None], [None, None]]
    assert [tokens for _, tokens in watch.over((None, tokens) for tokens in drawn)] == drawn
    assert watch.report() == "prefill 30 tokens at 60.0/s, decode 2 tokens at 1.3/s"  # 0.5 s a step
    assert answers.Stopwatch(7).report() == "prefill 7 tokens at 0.0/s, decode 0 tokens at 0.0/s"


def test_the_measured_peak_is_the_operations_of_a_square_product(clock):
    assert devices.measured_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident pages are read from /proc")
def test_used_memory_is_what_the_process_has():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert fast.used_memory(torch.device("cpu")) == pytest.approx(pages * mmap.PAGESIZE, rel=0.02)
    assert fast.free_memory(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_record_has_tokens_per_second_and_its_share_of_the_peak(corpus, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(devices, "measured_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(fast, "used_memory", lambda device: 123)
    llama31.train(train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=str(tmp_path),
                  ckpt_dir=f"{corpus}/ckpt", batch_size=2, seq_len=16, total_batch_tokens=96, steps=1,
                  device="cpu", dtype="float32")
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["tokens_per_s"] == 96 / 0.5 and record["memory"] == 123
    args = ModelArgs.from_json(corpus / "ckpt" / "params.json")
    flops = devices.flops_per_token(Transformer.on_meta(args), 16)
    assert record["mfu"] == pytest.approx(flops * 192 / 1e9, rel=1e-12)


def test_the_commands_keep_freed_memory(corpus, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(fast, "keep_freed_memory", kept.append)
    llama31.train(train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=str(tmp_path),
                  ckpt_dir=f"{corpus}/ckpt", batch_size=1, seq_len=16, steps=1, device="cpu",
                  dtype="float32")
    llama31.sample(ckpt_dir=tmp_path / "step_000001", prompt="a", max_gen_len=1, device="cpu")
    monkeypatch.setattr("sys.stdin", None)
    chat.chat(ckpt_dir=str(tmp_path / "step_000001"), device="cpu")
    assert kept == [torch.device("cpu")] * 3


def test_flops_of_training_are_six_per_weight_and_causal_attentions():
    shape = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, multiple_of=16)
    for D, tied in itertools.product((16, 20), (False, True)):
        layer = 64 * 12 * D + 3 * 64 * 176 + 2 * 64  # 4 heads of queries, 2 of keys, 2 of values, 4 to wo
        attention = 3 * 6 * 50 * 4 * D  # of 4 a pair and element, three times, as half of the pairs are seen
        model = Transformer.on_meta(ModelArgs(**shape, head_dim=D, tie_word_embeddings=tied))
        assert devices.flops_per_token(model, 50) == 6 * (3 * layer + 64 + 64 * 100) + attention


# -----------------------------------------------------------------------------
# Defaults

SAMPLING = dict(temperature=0.6, top_p=0.9, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=1337)
DEFAULTS = {
    llama31.sample: dict(
        ckpt_dir=None, tokenizer_path=None, prompt=None, prompt_file=None, max_gen_len=256, **SAMPLING,
        stop=None, special=False, max_seq_len=None, device=None, dtype=None, compile=None, quantize=None),
    llama31.train: dict(
        train_data="tinystories/TinyStories_train*.bin", val_data=None,
        out_dir="out/train", preset=None, ckpt_dir=None, tokenizer_path=None, batch_size=4, seq_len=1024,
        total_batch_tokens=None, steps=None, epochs=1, lr=None, min_lr=None, warmup_steps=10,
        weight_decay=0.1, betas=(0.9, 0.95), muon=False, grad_clip=1.0, eval_interval=100, eval_steps=80,
        sample_interval=0, save_interval=1000, keep=2, seed=1337, resume=False, shuffle=False, doc_mask=True,
        activation_checkpointing=False, fsdp=False, lora_rank=0, lora_alpha=None, quantize=None,
        param_dtype="float32", device=None, dtype=None, compile=None),
    llama31.demo: dict(out_dir="out/demo", retrain=False),
    chat.chat: dict(
        system=None, tokenizer_path=None, max_seq_len=None, max_gen_len=256, **SAMPLING, device=None,
        dtype=None, compile=None, quantize=None),
    reference.main: dict(
        tokenizer_path=None, prompt=None, prompt_file=None, max_gen_len=256, special=False, max_seq_len=None,
        **{**SAMPLING, "temperature": 0.0}),
    tiny_stories.download: dict(
        data_dir="tinystories", sha256=None, url="https://huggingface.co/datasets/roneneldan/TinyStories/"
        "resolve/main/TinyStories_all_data.tar.gz"),
    tiny_stories.tokenize: dict(
        data_dir="tinystories", tokenizer_path="Meta-Llama-3.1-8B/tokenizer.model", num_workers=None),
    tiny_stories.text: dict(
        data_dir="text", tokenizer_path=None, vocab_size=None, field="text", separator=None, special=False,
        val_fraction=0.01, num_workers=None),
    stories.write: dict(data_dir="data", num_stories=22_000),
    convert.from_hf: dict(dtype=None),
    convert.to_hf: dict(max_file_bytes=5 * 10**9, dtype=None),
    convert.to_gguf: dict(dtype=None),
    convert.merge: dict(dtype=None),
    evaluate.text: dict(
        tokenizer_path=None, field="text", separator=None, max_seq_len=None, stride=None, device=None,
        dtype=None, compile=None, quantize=None, tensor_parallel=1, json=False),
    evaluate.choices: dict(
        tokenizer_path=None, shots=0, seed=1337, max_seq_len=None, device=None, dtype=None, compile=None,
        quantize=None, tensor_parallel=1, json=False),
    bench.speed: dict(
        ckpt_dir=None, preset=None, dtype=None, quantize=None, compile=True, device=None, batch_size=8,
        prompt_len=512, decode_prompt_len=128, new=128, rounds=5, peers=False),
    bench.train_speed: dict(
        batch_size=4, seq_len=512, vocab_size=49152, n_layers=30, preset=None, document=150, rounds=5,
        compile=True, device=None, dtype=None, peers=False),
    planner.memory: dict(batch_size=1, seq_len=2048),
    planner.plan: dict(gpu_memory=80, machine=8, batch_size=1, seq_len=8192, total_batch_tokens=None,
                       param_dtype="float32", lora_rank=0, quantize=None)}


@pytest.mark.parametrize("command", DEFAULTS, ids=lambda command: f"{command.__module__}.{command.__name__}")
def test_the_defaults_of_a_command_are_those_that_users_know(command):
    parameters = inspect.signature(command).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[command]


def test_the_defaults_of_library_calls_are_those_that_users_know():
    assert vars(Sampler()) == SAMPLING
    assert vars(ModelArgs()) == dict(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, vocab_size=128256, multiple_of=256,
        ffn_dim_multiplier=None, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=False,
        rope_scale_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_old_context=8192,
        tie_word_embeddings=False, max_seq_len=2048)
    defaults = {name: p.default for function in (llama31.Llama.build, Transformer.configure_optimizers)
                for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    assert defaults == dict(
        tokenizer_path=None, max_seq_len=None, max_batch_size=32, device=None, dtype=None, compile=None,
        quantize=None, tensor_parallel=None, weight_decay=0.1, betas=(0.9, 0.95), seed=0, muon=False)


def test_the_demo_trains_by_its_recipe(tmp_path, monkeypatch):
    calls = []

    def train(**flags):
        calls.append(flags)
        raise ValueError("enough")
    monkeypatch.setattr(llama31, "train", train)
    monkeypatch.setattr(stories, "write", functools.partial(stories.write, num_stories=800))
    with pytest.raises(ValueError, match="enough"):
        llama31.demo(out_dir=str(tmp_path / "demo"))
    [flags] = calls
    recipe = dict(preset="demo", batch_size=2, seq_len=1024, steps=800, lr=3e-3, min_lr=0.0, warmup_steps=30,
                  muon=True, eval_interval=200, eval_steps=0, save_interval=0, shuffle=True)
    assert {name: flags[name] for name in recipe} == recipe
    assert flags.keys() - recipe.keys() == {"train_data", "val_data", "out_dir", "tokenizer_path"}
    assert PRESETS["demo"] == dict(dim=192, n_layers=2, n_heads=3, n_kv_heads=3, multiple_of=32,
                                   rope_theta=10000.0, tie_word_embeddings=True)
