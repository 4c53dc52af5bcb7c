"""bench.py: its arithmetic against counts and by hand, llama.cpp's file read back, and its command."""

import re

import pytest
import torch
from tiny import NARROW, RESCALED, WIDE, output, random_model, write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bench
import peers
from llama31 import Llama, ModelArgs, Transformer, open_checkpoint, rope_frequencies
from plumbing import answers
from plumbing.gguf_file import write_gguf

ARGS = ModelArgs(dim=96, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=130, multiple_of=32)
WIDER = ModelArgs(dim=96, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=20, vocab_size=130, multiple_of=32)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_counted_are_those_of_the_matrices_that_multiply(tied):
    model = Transformer(ModelArgs(**{**vars(WIDER), "tie_word_embeddings": tied}))
    layers, output = bench.matrix_weights(model.args)
    assert layers == sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    assert output == model.output.weight.numel()


@pytest.mark.parametrize("args", [ARGS, WIDER])
def test_prefill_operations_are_those_torch_counts_less_what_is_masked(args):
    model, n = Transformer(args), 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, n, dtype=torch.int64))
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    _, output = bench.matrix_weights(args)
    heads_dim = args.n_heads * args.head_dim
    attention = args.n_layers * 4 * heads_dim * sum(range(1, n + 1))  # query i sees i keys
    expected = linear - 2 * output * (n - 1) + attention  # only the last token's logits are made
    assert bench.prefill_flops(args, [n]) == expected
    assert bench.prefill_flops(args, [n, 5]) == expected + bench.prefill_flops(args, [5])


def test_decoding_reads_every_weight_once_and_each_rows_own_cache():
    model = Transformer(ARGS)
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if p.dim() == 2 and not name.startswith("tok_embeddings"))
    caches = 2 * 3 * 2 * 16 * (10 + 7)  # keys and values, layers, heads, head_dim, positions
    assert bench.decode_bytes(ARGS, [10, 7], 2, 2) == 2 * (weights + caches)
    assert bench.decode_bytes(ARGS, [10, 7], 1, 4) == weights + 4 * caches


def test_the_prompts_of_a_batch_are_of_several_lengths_down_to_half():
    assert bench.ragged(128, 8) == [128, 120, 112, 104, 96, 88, 80, 72]
    assert bench.ragged(7, 1) == [7] and bench.ragged(1, 3) == [1, 1, 1]


def test_a_spread_is_the_median_and_the_range():
    assert bench.spread([2.0, 1.0, 1.1]) == "1.10 (1.00 to 2.00)"


def test_a_job_is_rated_by_the_tokens_read_or_by_those_decoded():
    times = {1: (0.5, 0.0), 4: (0.5, 0.25)}  # of prefill and of decoding, in seconds

    def contestant(prompts, new):
        assert prompts == [[7, 7], [7]]
        return times[new]

    reading = bench.Job("", [[7, 7], [7]], 1)
    decoding = bench.Job("", [[7, 7], [7]], 4)
    assert reading.rate(contestant) == (2 + 1) / 0.5
    assert decoding.rate(contestant) == 2 * (4 - 1) / 0.25  # The first tokens come with the prefill.


def test_what_a_rate_takes_is_the_work_of_all_prompts_or_of_a_step():
    prompts = [[7, 7], [7]]
    reading = bench.Job("", prompts, 1).reached(30, ARGS, 2, 4)
    decoding = bench.Job("", prompts, 4).reached(30, ARGS, 2, 4)
    assert reading == 10 * bench.prefill_flops(ARGS, [2, 1])  # 3 tokens each time
    assert decoding == 15 * bench.decode_bytes(ARGS, [2 + 2, 1 + 2], 2, 4)  # 2 tokens each time


def test_we_are_timed_from_prompts_to_the_first_token_and_on(monkeypatch):
    """A clock that counts its calls: with the first step at 1, each later one takes another unit."""
    clock = iter(range(100))
    monkeypatch.setattr(answers.time, "perf_counter", lambda: next(clock))
    llama = Llama(Transformer(ARGS), None)
    assert bench.ours(llama)([[1, 2, 3], [4]], 4) == (1, 3)
    assert bench.ours(llama)([[1, 2, 3], [4]], 1) == (1, 0)


def test_the_least_time_counts_after_two_calls_to_warm_up(monkeypatch):
    clock = iter([0, 1, 10, 11, 20, 25, 30, 33, 40, 44])  # calls that take 1, 1, 5, 3 and 4 seconds
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.best_seconds(lambda: None, torch.device("cpu"), rounds=3) == 3


def write(path, ckpt_dir, kind):
    model, pieces = open_checkpoint(ckpt_dir)
    write_gguf(path, model.args, pieces, kind, rope_frequencies(model.args))


@pytest.mark.parametrize("kind, bound", [("f32", 0), ("bf16", 2 ** -8), ("q8_0", 0.02)])
def test_llama_cpps_file_holds_the_same_weights(kind, bound, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = Transformer(ModelArgs(**{**vars(ARGS), "use_scaled_rope": True}))
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", model)
    write(tmp_path / "model.gguf", ckpt_dir, kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    state = model.state_dict()
    assert len(found) == len(state) + 1 and found["rope_freqs.weight"].shape == (8,)
    for name, theirs in (("blk.1.attn_q.weight", "layers.1.attention.wq.weight"),
                         ("blk.2.ffn_down.weight", "layers.2.feed_forward.w2.weight"),
                         ("token_embd.weight", "tok_embeddings.weight"),
                         ("output.weight", "output.weight"), ("output_norm.weight", "norm.weight")):
        expected = state[theirs]
        assert (found[name] - expected).abs().max() <= bound * expected.abs().max()
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.attention.key_length"].contents() == 16


@pytest.mark.parametrize("changes", [dict(), NARROW, WIDE, RESCALED], ids=str)
def test_llama_cpp_has_our_greedy_tokens_on_heads_of_any_width(changes, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    model = random_model(**changes)
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", model)
    write(tmp_path / "model.gguf", ckpt_dir, "f32")
    prompt = [3, 1, 4, 1, 5]
    theirs = peers.LlamaCpp(tmp_path / "model.gguf", 64, 1)
    row = list(prompt)
    row += theirs.step([row], [0])
    while len(row) < 30:
        row += theirs.step([row[-1:]], [len(row) - 1])
    assert row == Llama(model, None).generate([prompt], 25, temperature=0, echo=True)[0]


@pytest.mark.slow
def test_the_command_prints_the_machine_and_a_row_for_each_job(tmp_path, monkeypatch, capsys):
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", random_model())
    # Products in bfloat16 take minutes on some processors.
    monkeypatch.setattr(bench, "gemm_peak", lambda dtype, device: 1e11)
    bench.speed(ckpt_dir=str(ckpt_dir), prompt_len=16, new=4, decode_prompt_len=8, rounds=1, device="cpu",
                batch_size=3, compile=False)
    printed = capsys.readouterr().out
    assert re.search(r"reads [\d.]+ GB/s; float32 [\d,]+ GFLOP/s, bfloat16 [\d,]+ GFLOP/s", printed)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["prefill of 16", "decode", "decode, batch of 3"]
    for row in rows[2:]:
        assert float(row[1].replace(",", "")) > 0 and re.fullmatch(r" \d+% ", row[3])


@pytest.mark.slow
def test_the_train_command_prints_a_row_for_each_way_of_training():
    printed = output("bench.py", "train", "--seq_len", "16", "--vocab_size", "64", "--n_layers", "1",
                     "--rounds", "2", "--compile=False", "--device", "cpu", "--dtype", "float32")
    assert re.search(r"torch [^:]+: float32 [\d,]+ GFLOP/s; eager", printed)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["causal", "document mask"]
    assert float(rows[2][2].replace(",", "")) > 0 and rows[2][6] == " 1.00 (1.00 to 1.00) "


@pytest.mark.parametrize("command, flag", [(bench.speed, "rounds"), (bench.speed, "new"),
                                           (bench.train_speed, "rounds"), (bench.train_speed, "document")])
def test_a_setting_below_its_least_is_refused_before_measuring(command, flag, monkeypatch):
    monkeypatch.setattr(bench, "gemm_peak", None)
    monkeypatch.setattr(bench.checkpoint, "newest_checkpoint", lambda: "out/some")
    with pytest.raises(ValueError, match=f"{flag} is 0; expected at least"):
        command(**{flag: 0})


def test_what_is_not_installed_is_named_in_one_line(capsys):
    assert peers.missing("numpy", "no_such_package") == ["no_such_package"]
    assert capsys.readouterr().err == "not installed, so not measured: no_such_package\n"


def test_without_a_compiler_training_is_measured_eagerly(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(bench, "gemm_peak", lambda dtype, device: 1e9)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Stopped)
    with pytest.raises(Stopped):
        bench.train_speed(n_layers=1, device="cpu")
    printed = capsys.readouterr()
    assert "no C++ compiler found" in printed.err and "eager" in printed.out


class Stopped(Exception):
    """Ends a measurement where it would start its workers."""

    def __init__(self, *_):
        raise self
