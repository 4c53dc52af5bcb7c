"""Generation: the sampler's limits, ragged batches, stop tokens, streamed text and the sample command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama31
from llama31 import Llama, ModelArgs, Transformer, sample, sample_token, save_checkpoint
from tokenizer import train_tokenizer

ROOT = Path(llama31.__file__).parent


def random_llama(tokenizer=None, vocab_size=97, max_seq_len=64):
    model = Transformer(ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=vocab_size,
                                  multiple_of=16, max_seq_len=max_seq_len))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2, generator=generator)
    return Llama(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    return train_tokenizer(["once upon a time there was a cat"] * 9, 520, path)


@pytest.fixture
def ckpt_dir(tokenizer, tmp_path):
    model = random_llama(vocab_size=520).model
    save_checkpoint(tmp_path / "ckpt", model.args, model.state_dict(), tokenizer.model_path)
    return tmp_path / "ckpt"


def drawn(logits, n=4000, **limits):
    generator = torch.Generator().manual_seed(2)
    ids = [sample_token(logits, generator=generator, **limits) for _ in range(n)]
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / n


PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize("limits, kept", [
    (dict(), [0, 1, 2, 3, 4]), (dict(top_p=1.0), [0, 1, 2, 3, 4]), (dict(top_p=0.39), [1]),
    (dict(top_p=0.0), [1]), (dict(top_p=0.6), [1, 3]), (dict(top_p=0.8), [1, 3, 4]),
    (dict(top_p=0.9), [0, 1, 3, 4]), (dict(top_k=1), [1]),
    (dict(top_k=3), [1, 3, 4]), (dict(top_k=9), [0, 1, 2, 3, 4]), (dict(min_p=1.0), [1]),
    (dict(min_p=0.45), [1, 3, 4]), (dict(min_p=0.2, top_p=0.6), [1, 3])])
def test_limits_keep_the_likeliest_tokens_in_their_proportions(limits, kept):
    expected = torch.zeros(5)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    frequencies = drawn(PROBS.log(), temperature=1.0, **limits)
    assert (frequencies[expected == 0] == 0).all() and (frequencies - expected).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature):
    expected = torch.softmax(PROBS.log() / temperature, 0)
    assert (drawn(PROBS.log(), temperature=temperature) - expected).abs().max() < 0.03


def test_temperature_zero_and_temperatures_that_overflow_take_the_largest():
    logits = torch.tensor([3.0, 500.0, -20.0])
    assert all(sample_token(logits, temperature) == 1 for temperature in (0, 1e-40, 1e-6))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_generates_what_its_rows_would_alone(temperature):
    llama = random_llama()
    prompts = [[1], [5, 6, 7, 8, 9], [3, 0, 0]]
    batch = llama.generate(prompts, 20, temperature=temperature, seed=7)
    alone = [llama.generate([p], 20, temperature=temperature, seed=7 + i)[0] for i, p in enumerate(prompts)]
    assert batch == alone and all(len(row) == 20 for row in batch)
    assert batch != llama.generate(prompts, 20, temperature=1.0, seed=8)


def test_generation_stops_at_stop_tokens_and_at_max_seq_len():
    llama = random_llama(max_seq_len=16)
    row = llama.generate([[1, 2]], 100, temperature=0)[0]
    assert len(row) == 14
    assert llama.generate([[1, 2]], 100, temperature=0, stop_tokens=[row[3]])[0] == row[:row.index(row[3])]
    assert llama.generate([[1, 2]], 3, temperature=0, echo=True)[0] == [1, 2, *row[:3]]
    assert llama.generate([[1, 2]], 0) == [[]]


def test_the_default_stop_tokens_are_the_tokenizers(tokenizer, monkeypatch):
    llama = random_llama(tokenizer, vocab_size=520)
    row = llama.generate([[1]], 5, temperature=0)[0]
    assert len(row) == 5
    monkeypatch.setattr(tokenizer, "stop_tokens", [row[2]])
    assert llama.generate([[1]], 5, temperature=0) == [row[:row.index(row[2])]]
    assert llama.generate([[1]], 5, temperature=0, stop_tokens=[]) == [row]
    llama.model.norm.weight.data.zero_()  # all logits equal: the first id, 0, is the largest
    assert llama.generate([[1]], 5, temperature=0) == [[0] * 5]


@pytest.mark.parametrize("prompts, settings, said", [
    ([[]], {}, "prompt 0 has 0 tokens"), ([[1], [1] * 64], {}, "prompt 1 has 64 tokens; expected 1 to 63"),
    ([], {}, "0 prompts"), ([[1]] * 33, {}, "33 prompts; expected 1 to 32"),
    ([[97]], {}, "ids from 97 to 97"),
    ([[-1]], {}, "ids from -1"), ([[1]], dict(temperature=-1), "temperature is -1"),
    ([[1]], dict(temperature=float("nan")), "temperature is nan"), ([[1]], dict(top_p=1.1), "top_p is 1.1"),
    ([[1]], dict(min_p=-0.1), "min_p is -0.1"), ([[1]], dict(top_k=-1), "top_k is -1"),
    ([[1]], dict(seed=-1), "seed is -1"), ([[1]], dict(max_gen_len=-1), "max_gen_len is -1")])
def test_what_does_not_fit_is_named(prompts, settings, said):
    with pytest.raises(ValueError, match=said):
        random_llama().generate(prompts, **{"max_gen_len": 4, **settings})


def test_streamed_pieces_are_the_text_of_the_generated_tokens(tokenizer):
    llama = random_llama(tokenizer, vocab_size=520)
    prompts = ["once", "a cat"]
    tokens = llama.generate([tokenizer.encode(p, bos=True) for p in prompts], 30, temperature=1.0, seed=3)
    pieces = list(llama.stream_text(prompts, 30, temperature=1.0, seed=3))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [tokenizer.decode(row) for row in tokens]
    completions = llama.text_completion(prompts, 30, temperature=1.0, seed=3, echo=True)
    assert [c["generation"] for c in completions] == [
        p + tokenizer.decode(row) for p, row in zip(prompts, tokens, strict=True)]


def test_a_character_spread_over_tokens_comes_whole_with_the_last(tokenizer, monkeypatch):
    llama = random_llama(tokenizer, vocab_size=520)
    ids = tokenizer.encode("né😀")
    assert len(ids) == 7  # every byte is a token of its own in this vocabulary
    monkeypatch.setattr(llama, "stream", lambda *args, **settings: iter([[i] for i in [*ids, ids[1]]]))
    assert [piece for piece, in llama.stream_text(["x"])] == ["n", "", "é", "", "", "", "😀", "", "\ufffd"]


def test_sample_prints_each_prompt_with_its_completion(ckpt_dir, tokenizer, tmp_path, capsys):
    llama = Llama.build(ckpt_dir, device="cpu")
    settings = dict(max_gen_len=12, temperature=0.8, seed=5)
    expected = [c["generation"] for c in llama.text_completion(["a cat", "once"], echo=True, **settings)]
    (tmp_path / "prompts.txt").write_text("a cat\nonce\n")
    sample(ckpt_dir=ckpt_dir, prompt_file=tmp_path / "prompts.txt", device="cpu", **settings)
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"
    sample(ckpt_dir=ckpt_dir, prompt="a cat", device="cpu", **settings)
    assert capsys.readouterr().out == expected[0] + "\n"


def test_sample_takes_the_checkpoint_last_written_under_out(ckpt_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "a").mkdir(parents=True)
    ckpt_dir.rename(tmp_path / "out" / "a" / "step_000002")
    (tmp_path / "out" / "a" / "step_000003.part").mkdir()
    (tmp_path / "out" / "a" / "step_000003.part" / "params.json").write_text("{}")
    sample(prompt="a cat", max_gen_len=1, device="cpu")
    assert capsys.readouterr().out.startswith("a cat")


def test_without_a_checkpoint_one_line_says_how_to_get_one(tmp_path):
    words = [sys.executable, ROOT / "llama31.py", "--prompt", "Once upon a time"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "llama31.py demo" in result.stderr and "--ckpt_dir" in result.stderr


def test_one_text_is_no_list_of_prompts(tokenizer):
    with pytest.raises(ValueError, match="expected a list of prompts"):
        random_llama(tokenizer, vocab_size=520).text_completion("a cat")


@pytest.mark.parametrize("field, value", [
    ("dtype", "int8"), ("tokenizer_path", "no.model"), ("device", "nowhere"), ("device", "meta")])
def test_build_names_a_wrong_argument(ckpt_dir, field, value):
    with pytest.raises((ValueError, FileNotFoundError), match=value):
        Llama.build(ckpt_dir, **{field: value})


def test_a_tokenizer_of_another_size_is_refused(ckpt_dir, tmp_path):
    other = train_tokenizer(["a b a b"], 513, tmp_path / "other.model").model_path
    with pytest.raises(ValueError, match="other.model has 513 tokens, the model 520"):
        Llama.build(ckpt_dir, tokenizer_path=other)
