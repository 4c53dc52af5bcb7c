"""Generation: the sampler's limits, ragged batches, stop tokens, streamed text and the sample command."""

import math
import re
import subprocess
import sys
from random import Random

import pytest
import torch
from tiny import ROOT, assert_close, random_llama, random_model, run, write_checkpoint

import reference
from llama31 import Llama, Sampler, sample
from plumbing import sampling
from tokenizer import Tokenizer, split_at_stop, train_tokenizer


@pytest.fixture
def ckpt_dir(tokenizer, tmp_path):
    return write_checkpoint(tmp_path / "ckpt", random_llama(tokenizer).model, tokenizer=tokenizer)


def drawn(logits, n=4000, **limits):
    """How often each token is drawn, with no limits but these."""
    sampler, random = Sampler(**{"top_p": 1.0, **limits}), Random(2)
    ids = [sampler(logits, random.random()) for _ in range(n)]
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


def plain_draw(logits, uniform, top_p=1.0, top_k=0, min_p=0.0):
    """The token that one uniform number falls on, by the contract: all sorted, kept ones in order of ids."""
    probs, ids = logits.double().softmax(-1).sort(descending=True, stable=True)
    kept = (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[0])
    if top_k:
        kept[top_k:] = False
    kept[0] = True
    chosen = torch.zeros(len(ids), dtype=torch.float64)
    chosen[ids[kept]] = probs[kept]
    return int((chosen.cumsum(-1) <= uniform * chosen.sum()).sum())


@pytest.mark.parametrize("limits", [
    dict(), dict(top_p=0.0), dict(top_p=0.5), dict(top_p=0.9001), dict(top_p=0.9991), dict(top_k=1),
    dict(top_k=40), dict(min_p=0.3), dict(min_p=1.0), dict(top_p=0.7, top_k=100, min_p=0.01)])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
def test_a_uniform_number_picks_among_the_kept_tokens_in_order_of_ids(spread, limits):
    for seed in range(10):
        logits = spread * torch.randn(3000, generator=torch.Generator().manual_seed(seed))
        sampler = Sampler(**{"temperature": 1.0, "top_p": 1.0, **limits})
        for uniform in (Random(seed).random(), Random(-1 - seed).random()):
            assert sampler(logits, uniform) == plain_draw(logits, uniform, **limits)


def test_of_equal_tokens_limits_keep_those_of_lower_ids():
    logits = torch.zeros(10)
    assert set(drawn(logits, top_k=3).nonzero()[:, 0].tolist()) == {0, 1, 2}
    assert set(drawn(logits, top_p=0.35).nonzero()[:, 0].tolist()) == {0, 1, 2, 3}
    assert len(drawn(logits, min_p=1.0).nonzero()) == 10  # All of them are as likely as the likeliest.
    assert Sampler(temperature=0)(logits) == 0


def test_impossible_tokens_are_never_drawn_and_senseless_logits_named():
    logits = torch.full((50,), -math.inf)
    logits[[7, 31]] = torch.tensor([1.0, 1.0])
    assert drawn(logits, n=400).nonzero()[:, 0].tolist() == [7, 31]
    for wrong in (math.nan, math.inf):
        for temperature in (0.0, 1.0):
            logits[3] = wrong
            with pytest.raises(ValueError, match=f"found {wrong} as the largest logit"):
                Sampler(temperature=temperature)(logits)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_penalized_logits_are_those_of_transformers(penalty):
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty)
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1))
    text = [3, 9, 9, 41, 3]
    expected = process(torch.tensor([text]), logits[None])[0]
    assert torch.equal(torch.from_numpy(sampling.penalized(logits.numpy(), text, penalty)),
                       expected)


def test_prompt_and_text_are_penalized_in_every_row_alone():
    llama = random_llama()
    prompts = [[1, 2, 3], [9]]
    settings = dict(temperature=0, repetition_penalty=1e9)  # Nothing comes twice.
    rows = llama.generate(prompts, 40, **settings)
    assert all(len({*prompt, *row}) == len(prompt) + 40 for prompt, row in zip(prompts, rows, strict=True))
    assert [llama.generate([prompt], 40, **settings)[0] for prompt in prompts] == rows
    assert rows != llama.generate(prompts, 40, temperature=0)


@pytest.mark.parametrize("settings", [
    dict(temperature=1.0), dict(temperature=0.7, top_p=0.8, repetition_penalty=1.2),
    dict(temperature=1.5, top_k=12, min_p=0.05), dict(temperature=0, repetition_penalty=1.5)])
def test_the_reference_draws_the_same_tokens_of_a_seed(tmp_path, settings):
    model = random_model()
    folder = write_checkpoint(tmp_path / "ckpt", model)
    prompts = [[1, 2, 3], [4], [50, 60, 7, 8]]
    settings = dict(settings, seed=11)
    assert (reference.Llama.build(folder).generate(prompts, 25, **settings)
            == Llama(model, None).generate(prompts, 25, **settings))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature):
    expected = torch.softmax(PROBS.log() / temperature, 0)
    assert (drawn(PROBS.log(), temperature=temperature) - expected).abs().max() < 0.03


def test_temperature_zero_and_temperatures_that_overflow_take_the_largest():
    logits = torch.tensor([3.0, 500.0, -20.0])
    assert all(Sampler(temperature=temperature)(logits) == 1
               for temperature in (0, 1e-40, 1e-6))


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
    llama = random_llama(tokenizer)
    row = llama.generate([[1]], 5, temperature=0)[0]
    assert len(row) == 5
    monkeypatch.setattr(tokenizer, "stop_tokens", [row[2]])
    assert llama.generate([[1]], 5, temperature=0) == [row[:row.index(row[2])]]
    assert llama.generate([[1]], 5, temperature=0, stop_tokens=[]) == [row]
    llama.model.norm.weight.data.zero_()  # all logits equal: the first id, 0, is the largest
    assert llama.generate([[1]], 5, temperature=0) == [[0] * 5]


def full_logprobs(llama, row):
    """The log-probability of each token of a row after the first, by the full forward pass."""
    logits = llama.model(torch.tensor([row[:-1]]))[0]
    return logits.log_softmax(-1)[range(len(row) - 1), row[1:]]


@pytest.mark.parametrize("limits", [dict(temperature=0), dict(temperature=1.5, top_p=0.5, top_k=7)], ids=str)
def test_log_probabilities_are_those_of_a_full_forward(limits):
    llama, settings = random_llama(), dict(limits, seed=3)
    prompts = [[1], [5, 6, 7, 8, 9], [3, 0, 0]]
    rows, logprobs = llama.generate(prompts, 12, logprobs=True, **settings)
    echoed, all_logprobs = llama.generate(prompts, 12, logprobs=True, echo=True, **settings)
    assert rows == llama.generate(prompts, 12, **settings)
    assert echoed == [prompt + row for prompt, row in zip(prompts, rows, strict=True)]
    for prompt, row, some, every in zip(prompts, echoed, logprobs, all_logprobs, strict=True):
        assert len(every) == len(row) == len(prompt) + len(some)
        expected = full_logprobs(llama, row)
        assert every[0] == 0 and every[len(prompt):] == some
        assert_close(torch.tensor(every[1:]), expected)


@pytest.mark.parametrize("tokens_at_once", [1, 5, 6, 17, 64])
def test_a_prompt_read_in_chunks_has_the_logits_of_one_pass(tokens_at_once, monkeypatch):
    llama = random_llama()
    rows = [list(range(1, 41)), [4], list(range(60, 90)), list(range(7, 19))]
    width, lengths = 40, [len(row) for row in rows]
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    widths, trunk = [], llama.model.trunk
    monkeypatch.setattr(llama.model, "trunk", lambda x, *args: widths.append(x.numel()) or trunk(x, *args))

    def read(**settings):
        last = [n - 1 for n in lengths]
        with torch.inference_mode():
            return llama.model.forward_cached(tokens, [0] * 4, llama.new_caches(4), last, **settings)
    once = read()
    assert widths == [4 * width]
    widths.clear()
    chunked = read(tokens_at_once=tokens_at_once)
    assert sum(widths) == 4 * width and max(widths) == 4 * max(1, tokens_at_once // 4)
    assert_close(chunked, once)
    for row, logits in zip(rows, chunked, strict=True):
        assert_close(logits, llama.model(torch.tensor([row]))[0, -1])


def test_what_caches_hold_is_not_read_again_and_changes_nothing(monkeypatch):
    llama, read = random_llama(), []
    trunk = llama.model.trunk
    monkeypatch.setattr(llama.model, "trunk", lambda x, *args: read.append(x.numel()) or trunk(x, *args))
    settings = dict(temperature=1.0, stop_tokens=[])
    caches, tokens, held = llama.new_caches(1), [5, 6, 7], 0
    for turn in ([], [9, 10], [4]):
        tokens += turn
        expected = llama.generate([tokens], 6, seed=len(tokens), **settings)[0]
        read.clear()
        steps = llama.steps([tokens], 6, seed=len(tokens), caches=caches, start_pos=[held], **settings)
        answer = [token for _, [token] in steps]
        assert answer == expected and read == [len(tokens) - held, 1, 1, 1, 1, 1]
        tokens += answer
        held = len(tokens) - 1
    with pytest.raises(ValueError, match="start_pos of prompt 0 is 3; expected 0 to 2"):
        llama.generate([[1, 2, 3]], 5) and next(llama.steps([[1, 2, 3]], 5, caches=caches, start_pos=[3]))


def test_an_exception_in_the_middle_leaves_the_model_usable(monkeypatch):
    llama = random_llama()
    expected = llama.generate([[1, 2], [3]], 9, seed=5)
    forward, calls = llama.model.layers[1].forward, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args)
    monkeypatch.setattr(llama.model.layers[1], "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        llama.generate([[1, 2], [3]], 9, seed=5)
    assert llama.generate([[1, 2], [3]], 9, seed=5) == expected


def test_generation_ends_with_its_last_row_and_finished_rows_do_not_grow(monkeypatch):
    llama = random_llama()
    free = llama.generate([[1], [5, 6], [3, 0, 0]], 20, temperature=0)
    stops = [free[0][2], free[1][4], free[2][9]]
    steps, forward = [], llama.model.forward_cached
    monkeypatch.setattr(llama.model, "forward_cached",
                        lambda tokens, start, *rest: steps.append(start) or forward(tokens, start, *rest))
    rows = llama.generate([[1], [5, 6], [3, 0, 0]], 20, temperature=0, stop_tokens=stops)
    assert rows == [row[:min(row.index(s) for s in stops if s in row)] for row in free]
    assert len(steps) == 1 + max(map(len, rows))
    for i, (length, row) in enumerate(zip([1, 2, 3], rows, strict=True)):
        assert steps[-1][i] == length + len(row) - 1


@pytest.mark.parametrize("prompts, settings, said", [
    ([[]], {}, "prompt 0 has 0 tokens"), ([], {}, "0 prompts"),
    ([[1], [1] * 128], {}, "prompt 1 has 128 tokens; expected 1 to 127"),
    ([[1]] * 33, {}, "33 prompts; expected 1 to 32"), ([[101]], {}, "ids from 101 to 101"),
    ([[-1]], {}, "ids from -1"), ([[1]], dict(temperature=-1), "temperature is -1"),
    ([[1]], dict(temperature=float("nan")), "temperature is nan"), ([[1]], dict(top_p=1.1), "top_p is 1.1"),
    ([[1]], dict(min_p=-0.1), "min_p is -0.1"), ([[1]], dict(top_k=-1), "top_k is -1"),
    ([[1]], dict(seed=-1), "seed is -1"), ([[1]], dict(max_gen_len=-1), "max_gen_len is -1")])
def test_what_does_not_fit_is_named(prompts, settings, said):
    with pytest.raises(ValueError, match=said):
        random_llama().generate(prompts, **{"max_gen_len": 4, **settings})


@pytest.mark.parametrize("prompts", [[[]], [[1, 999, 3]], [[1] * 128]])
def test_prompts_are_checked_before_their_log_probabilities(prompts):
    with pytest.raises(ValueError, match="prompt 0 has"):
        random_llama().generate(prompts, 1, echo=True, logprobs=True)


def test_streamed_pieces_are_the_text_of_the_generated_tokens(tokenizer):
    llama = random_llama(tokenizer)
    prompts = ["once", "a cat"]
    tokens = llama.generate([tokenizer.encode(p, bos=True) for p in prompts], 30, temperature=1.0, seed=3)
    pieces = list(llama.stream(llama.steps(llama.encode(prompts), 30, temperature=1.0, seed=3)))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [tokenizer.decode(row) for row in tokens]
    completions = llama.text_completion(prompts, 30, temperature=1.0, seed=3, echo=True)
    assert [c["generation"] for c in completions] == [
        p + tokenizer.decode(row) for p, row in zip(prompts, tokens, strict=True)]


def test_streamed_text_has_a_character_whole_with_its_last_token(tokenizer):
    llama = random_llama(tokenizer)
    ids = tokenizer.encode("né𐍈")
    assert len(ids) == 7  # every byte is a token of its own in this vocabulary
    steps = ((None, [i]) for i in [*ids, ids[1]])
    assert [piece for piece, in llama.stream(steps)] == ["n", "", "é", "", "", "", "𐍈", "", "\ufffd"]


@pytest.mark.parametrize("stop, expected", [
    ("cat", "a "), (["t sat", "mat"], "a ca"), ("nowhere", "a cat sat on a mat"), ([], "a cat sat on a mat"),
    (["sat on a mat and more"], "a cat sat on a mat"), (["at sat", "a"], ""), (["mat"], "a cat sat on a "),
    (["cat sat", "at"], "a c"), (["on a", "n"], "a cat sat o"), (["t ", "at "], "a c")])
def test_a_stop_text_ends_the_text_before_it_however_it_is_cut(stop, expected):
    text = "a cat sat on a mat"
    stop = [stop] if isinstance(stop, str) else stop
    for size in range(1, len(text) + 1):
        shown, held, stopped = "", "", False
        for begin in range(0, len(text), size):
            piece, held, stopped = split_at_stop(held + text[begin:begin + size], stop, False)
            shown += piece
            if stopped:
                break
            assert not any(s in shown + held for s in stop)
        else:
            piece, held, stopped = split_at_stop(held, stop, True)
            shown += piece
        assert shown == expected and held == "" and stopped == any(s in text for s in stop)


def test_text_completion_ends_before_a_stop_text_that_spans_tokens(tokenizer):
    llama = random_llama(tokenizer)
    prompts, settings = ["once", "a cat", "time"], dict(temperature=1.0, seed=3, stop_tokens=[])
    texts = [c["generation"] for c in llama.text_completion(prompts, 30, **settings)]
    row = llama.generate([tokenizer.encode(prompts[0], bos=True)], 30, **settings)[0]
    stop = tokenizer.decode(row[4:7])[1:-1]
    expected = [text.split(stop)[0] for text in texts]
    assert expected[0] == tokenizer.decode(row[:4]) + tokenizer.decode(row[4:7])[0]
    assert [c["generation"] for c in llama.text_completion(prompts, 30, stop=stop, **settings)] == expected
    steps = llama.steps(llama.encode(prompts[:1]), 30, **settings)
    pieces = [piece for piece, in llama.stream(steps, [stop])]
    assert "".join(pieces) == expected[0]
    assert len(pieces) <= 7  # nothing is generated for no one
    for wrong in ("", ["a", ""]):
        with pytest.raises(ValueError, match="expected texts of at least one character"):
            llama.text_completion(prompts, 30, stop=wrong)


def test_chat_completion_answers_each_dialog_as_if_alone(tokenizer):
    llama = random_llama(tokenizer, max_seq_len=300)
    dialogs = [[{"role": "user", "content": "a cat"}],
               [{"role": "system", "content": "be a cat"}, {"role": "user", "content": "once"},
                {"role": "assistant", "content": "upon"}, {"role": "user", "content": "<|eot_id|>"}]]
    answers = llama.chat_completion(dialogs, 20, temperature=1.0, seed=8)
    for i, dialog in enumerate(dialogs):
        [row] = llama.generate([tokenizer.encode_dialog(dialog)], 20, temperature=1.0, seed=8 + i)
        assert answers[i] == {"generation": {"role": "assistant", "content": tokenizer.decode(row)}}


def test_sample_prints_each_prompt_with_its_completion(ckpt_dir, tokenizer, tmp_path, capsys):
    llama = Llama.build(ckpt_dir, device="cpu")
    settings = dict(max_gen_len=12, temperature=0.8, seed=5)
    expected = [c["generation"] for c in llama.text_completion(["a cat", "once"], echo=True, **settings)]
    (tmp_path / "prompts.txt").write_text("a cat\nonce\n")
    capsys.readouterr()  # Building may have compiled, and said so.
    sample(ckpt_dir=ckpt_dir, prompt_file=tmp_path / "prompts.txt", device="cpu", compile=False, **settings)
    printed = capsys.readouterr()
    assert printed.out == "\n\n".join(expected) + "\n"
    prompt_tokens = llama.encode(["a cat", "once"])
    read = sum(len(tokens) for tokens in prompt_tokens)
    rows = llama.generate(prompt_tokens, **settings)
    decoded = sum(len(row) - 1 for row in rows)  # the first comes with the prompt
    assert decoded > 0
    chosen, speed = printed.err.splitlines()
    assert chosen == "weights in float32, arithmetic in float32, on cpu"
    line = rf"prefill {read} tokens at [\d.,]+/s, decode {decoded} tokens at [\d.,]+/s"
    assert re.fullmatch(line, speed)
    sample(ckpt_dir=ckpt_dir, prompt="a cat", device="cpu", **settings)
    assert capsys.readouterr().out == expected[0] + "\n"
    sample(ckpt_dir=ckpt_dir, prompt="a cat", stop=expected[0][8:10], device="cpu", **settings)
    assert capsys.readouterr().out == expected[0].split(expected[0][8:10])[0] + "\n"


def test_sample_ends_before_any_of_several_stops_with_their_escapes(ckpt_dir, capsys, monkeypatch):
    ids = Llama.build(ckpt_dir, device="cpu").tokenizer.encode("one\ttwo\nthree")
    monkeypatch.setattr(Llama, "steps", lambda *args, **settings: ((None, [i]) for i in [*ids, None]))
    for stop, text in (([r"\n"], "one\ttwo"), (["four", r"\n", "wo"], "one\tt"), (r"\t", "one"),
                       ([r"\\n"], "one\ttwo\nthree")):
        sample(ckpt_dir=ckpt_dir, prompt=r"a\n", stop=stop, device="cpu")
        assert capsys.readouterr().out == f"a\n{text}\n"


CHAT = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na cat<|eot_id|>"


@pytest.fixture(params=["llama31", "reference"])
def command(request, ckpt_dir, capsys):
    """sample, or reference.py's, of the likeliest tokens; returns what it prints, and its notes."""
    def call(**flags):
        if request.param == "llama31":
            sample(**dict(ckpt_dir=ckpt_dir, temperature=0.0, device="cpu", compile=False) | flags)
        else:
            reference.main(**dict(ckpt_dir=ckpt_dir) | flags)
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if not line.startswith(("weights", "prefill"))]
    return call


@pytest.mark.parametrize("begin", [0, len("<|begin_of_text|>")])
def test_special_tokens_of_a_prompt_are_read_on_request(command, ckpt_dir, tokenizer, begin):
    prompt = CHAT[begin:]
    llama = Llama.build(ckpt_dir, device="cpu")
    tokens = tokenizer.encode(CHAT, allowed_special="all")
    assert llama.encode([prompt], special=True) == [tokens]
    [row] = llama.generate([tokens], 8, temperature=0)
    out, err = command(prompt=prompt, max_gen_len=8, special=True)
    assert out == prompt + tokenizer.decode(row) + "\n" and not err
    [completion] = llama.text_completion([prompt], 8, temperature=0, special=True)
    assert completion["generation"] == tokenizer.decode(row)


def test_special_tokens_that_are_read_as_characters_are_counted(command, ckpt_dir, tokenizer, tmp_path):
    prompts = ["<|eot_id|>", "a <|nothing|> cat", "<|eot_id|> <|begin_of_text|>"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    _, err = command(prompt_file=tmp_path / "prompts.txt", max_gen_len=2)
    assert err == ["the prompts spell out 3 special tokens, which are read as characters; --special reads "
                   "them as tokens"]
    tokens = [tokenizer.bos_id, *tokenizer.encode("<|eot_id|>")]
    assert Llama.build(ckpt_dir, device="cpu").encode(["<|eot_id|>"]) == [tokens]
    assert command(prompt="a cat", max_gen_len=2)[1] == []


def test_a_raw_chat_ends_at_a_stop_token(command, ckpt_dir, tokenizer, monkeypatch):
    llama = Llama.build(ckpt_dir, device="cpu")
    [row] = llama.generate(llama.encode([CHAT], special=True), 9, temperature=0)
    stops = property(lambda self: row[4:], lambda self, ids: None)
    monkeypatch.setattr(Tokenizer, "stop_tokens", stops, raising=False)
    out, _ = command(prompt=CHAT, special=True, max_gen_len=9)
    assert out == CHAT + tokenizer.decode(row[:min(row.index(stop) for stop in row[4:])]) + "\n"


def test_texts_that_the_context_cuts_are_said_with_the_flag(command, tokenizer, tmp_path):
    prompts = ["a cat", "once upon a time there was the little cat"]
    lengths = [len(tokenizer.encode(prompt, bos=True)) for prompt in prompts]
    room = lengths[1] + 3
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = dict(prompt_file=tmp_path / "prompts.txt", max_seq_len=room)

    def said(count):
        return [f"{count} of 2 texts end because the context of {room} tokens is full; "
                "--max_seq_len sets it"]
    out, err = command(**flags, max_gen_len=100)
    assert err == said(2)
    assert len(tokenizer.encode(out.split("\n\n")[0])) >= room - 1 - 3
    assert command(**flags, max_gen_len=4)[1] == said(1)
    assert command(**flags, max_gen_len=3)[1] == []
    with pytest.raises(ValueError, match=f"prompt.* {lengths[1]} .*--max_seq_len"):
        command(prompt=prompts[1], max_seq_len=lengths[1])


def test_a_text_that_a_stop_ends_is_not_said_to_be_cut(ckpt_dir, tmp_path, capsys):
    llama = Llama.build(ckpt_dir, device="cpu")
    prompts = ["a cat", "once"]
    texts = [completion["generation"] for completion in llama.text_completion(prompts, 200, temperature=0)]
    stop = next(texts[0][i:i + 3] for i in range(9, 99) if texts[0][i:i + 3] not in texts[1])
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    sample(ckpt_dir=ckpt_dir, prompt_file=tmp_path / "prompts.txt", stop=[stop], max_gen_len=200,
           temperature=0.0, device="cpu", compile=False)
    assert "\n1 of 2 texts end because the context of 128 tokens is full" in capsys.readouterr().err


def test_a_context_beyond_the_models_own_is_said(ckpt_dir, capsys):
    Llama.build(ckpt_dir, max_seq_len=128, device="cpu", compile=False)
    assert capsys.readouterr().err == ""
    Llama.build(ckpt_dir, max_seq_len=129, device="cpu", compile=False)
    assert capsys.readouterr().err.startswith("max_seq_len 129 is beyond the 128 tokens that ")


def test_sample_prints_nothing_before_an_error(ckpt_dir, capsys):
    for wrong in (dict(temperature=-1.0), dict(stop=""), dict(max_gen_len=-1), dict(prompt="a " * 200)):
        with pytest.raises(ValueError):
            sample(**{"ckpt_dir": ckpt_dir, "prompt": "a cat", "device": "cpu", **wrong})
    assert capsys.readouterr().out == ""
    sample(ckpt_dir=ckpt_dir, prompt="a cat", device="cpu", max_gen_len=0)
    assert capsys.readouterr().out == "a cat\n"


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_program_quietly(ckpt_dir):
    words = f"{sys.executable} llama31.py --ckpt_dir {ckpt_dir} --device cpu --max_gen_len 60 | head -c 5"
    result = subprocess.run(["bash", "-c", f"{words}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.stdout == "Once " and "Error" not in result.stderr and "Traceback" not in result.stderr
    assert result.returncode == 0


def test_sample_takes_the_checkpoint_last_written_under_out(ckpt_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "a").mkdir(parents=True)
    ckpt_dir.rename(tmp_path / "out" / "a" / "step_000002")
    (tmp_path / "out" / "a" / "step_000003.part").mkdir()
    (tmp_path / "out" / "a" / "step_000003.part" / "params.json").write_text("{}")
    sample(prompt="a cat", max_gen_len=1, device="cpu")
    assert capsys.readouterr().out.startswith("a cat")


def test_without_a_checkpoint_one_line_says_how_to_get_one(tmp_path):
    result = run(ROOT / "llama31.py", "--prompt", "Once upon a time", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "llama31.py demo" in result.stderr and "--ckpt_dir" in result.stderr


def test_one_text_is_no_list_of_prompts(tokenizer):
    with pytest.raises(ValueError, match="expected a list of prompts"):
        random_llama(tokenizer).text_completion("a cat")


@pytest.mark.parametrize("field, value", [
    ("dtype", "int8"), ("tokenizer_path", "no.model"), ("device", "nowhere"), ("device", "meta")])
def test_build_names_a_wrong_argument(ckpt_dir, field, value):
    with pytest.raises((ValueError, FileNotFoundError), match=value):
        Llama.build(ckpt_dir, **{field: value})


def test_a_tokenizer_of_another_size_is_refused(ckpt_dir, tmp_path):
    other = train_tokenizer(["a b a b"], 513, tmp_path / "other.model").model_path
    with pytest.raises(ValueError, match="other.model has 513 tokens, the model 560"):
        Llama.build(ckpt_dir, tokenizer_path=other)


def test_another_vocabulary_of_the_same_size_is_said(ckpt_dir, tmp_path, capsys):
    own = tmp_path / "own.model"
    own.write_bytes((tmp_path / "ckpt" / "tokenizer.model").read_bytes())
    other = tmp_path / "other.model"
    lines = own.read_text().splitlines()
    first, second = (line.split()[0] for line in lines[-2:])
    other.write_text("\n".join([*lines[:-2], f"{second} {len(lines) - 2}", f"{first} {len(lines) - 1}", ""]))
    for path, said in (own, ""), (other, "is another vocabulary than"):
        Llama.build(ckpt_dir, path, device="cpu", compile=False)
        error = capsys.readouterr().err
        assert said in error and bool(said) == bool(error)
