"""Decoding as one static graph, as on a GPU, here on the CPU: the same logits and tokens, compiled once."""

import copy

import numpy as np
import pytest
import torch
from tiny import assert_close, random_llama
from torch._dynamo.utils import counters

from llama31 import Llama, Sampler
from plumbing import fast
from plumbing.decoding import StaticReader, drawn

BATCHES = {"one token": [[5]], "one row": [[5, 6, 7]], "ragged rows": [[5, 6, 7], [1], [8, 9]]}
SETTINGS = [dict(temperature=0), dict(), dict(top_k=5), dict(min_p=0.1, temperature=1.5), dict(top_p=1.0),
            dict(repetition_penalty=1.5), dict(top_p=0.5, top_k=40, min_p=0.01, repetition_penalty=0.7)]


def static(llama, compile=False):
    """A llama with the same weights, which decodes statically."""
    model = copy.deepcopy(llama.model)
    assert not compile or fast.compile_blocks(model, dynamic=True)
    return Llama(model, None, llama.max_seq_len, reader=StaticReader(model))


def steps(llama, prompts, n, **settings):
    return list(llama.steps(prompts, n, **settings))


def assert_same_steps(found, expected):
    assert [ids for _, ids in found] == [ids for _, ids in expected]
    for (logits, ids), (theirs, _) in zip(found, expected, strict=True):
        for row, token in enumerate(ids):
            if token is not None:  # Rows that have ended go on in another way.
                assert_close(logits[row], theirs[row])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n_kv_heads", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_static_decoding_has_the_logits_and_tokens_of_llamas_own(n_kv_heads, batch, settings):
    llama = random_llama(n_heads=4, n_kv_heads=n_kv_heads)
    prompts = BATCHES[batch]
    expected = steps(llama, prompts, 40, **settings)
    assert_same_steps(steps(static(llama), prompts, 40, **settings), expected)


@pytest.mark.parametrize("room", [3, 12])
def test_rows_that_end_leave_the_others_as_they_are(room):
    """They end at a stop token, and where the model's limit is reached."""
    llama = random_llama()
    llama.max_seq_len = room + 3
    prompts = [[5, 6, 7], [1], [8, 9]]
    [first, *_] = steps(llama, prompts, 20, temperature=0)
    stops = [first[1][1]]  # the second row's first token
    expected = steps(llama, prompts, 20, temperature=0, stop_tokens=stops)
    assert expected[0][1][1] is None
    assert_same_steps(steps(static(llama), prompts, 20, temperature=0, stop_tokens=stops), expected)


def test_caches_hold_all_but_the_tokens_drawn_last_and_go_on_from_there():
    llama = random_llama()
    prompts = [[5, 6, 7], [1, 2]]
    caches = {}
    for name, each in (("own", llama), ("static", static(llama))):
        caches[name] = each.new_caches(2)
        drawn_ids = [ids for _, ids in each.steps(prompts, 6, caches=caches[name], temperature=0)]
    texts = [prompt + [ids[row] for ids in drawn_ids] for row, prompt in enumerate(prompts)]
    for own, other in zip(caches["own"], caches["static"], strict=True):
        for row, text in enumerate(texts):
            assert_close(other.k[row, :len(text) - 1], own.k[row, :len(text) - 1])
            assert_close(other.v[row, :len(text) - 1], own.v[row, :len(text) - 1])
    held = [len(text) - 1 for text in texts]
    longer = [text + [3, 4] for text in texts]
    found, expected = (steps(each, longer, 5, caches=caches[name], start_pos=held, temperature=0)
                       for name, each in (("static", static(llama)), ("own", llama)))
    assert_same_steps(found, expected)


def test_no_token_is_drawn_where_none_is_asked_for():
    assert steps(static(random_llama()), [[5, 6]], 0) == []


def test_each_steps_logits_are_its_own():
    """They are not a place that the next step writes to."""
    found = steps(static(random_llama()), [[5, 6]], 3, temperature=0)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["one row", "ragged rows"])
def test_compiled_blocks_serve_all_positions(batch, monkeypatch):
    llama = random_llama(max_seq_len=600)
    expected = steps(llama, BATCHES[batch], 550)
    compiled = static(llama, compile=True)
    steps(compiled, BATCHES[batch], 2)
    counters.clear()
    found = steps(compiled, BATCHES[batch], 550)  # The columns attended to double twice.
    assert_same_steps(found, expected)
    assert counters["stats"]["unique_graphs"] <= 1  # for any number of columns


def test_logits_that_are_not_finite_are_refused():
    llama = random_llama()
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not all finite"):
        steps(static(llama), [[5]], 3)


@pytest.mark.parametrize("settings", [
    *SETTINGS, dict(top_p=0.0), dict(top_k=1), dict(min_p=1.0), dict(temperature=1e-7),
    dict(temperature=5.0), dict(temperature=2.0, top_p=0.99, top_k=3)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])  # all equal, flat, peaked
def test_rows_are_drawn_as_the_sampler_draws_them(settings, spread):
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(200, 300, generator=generator)).round(decimals=1)  # some are equal
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    texts = torch.randint(300, (200, 40), generator=generator)
    sampler = Sampler(**settings)
    seen = torch.zeros(200, 300, dtype=torch.bool).scatter(1, texts, True)
    ids = drawn(logits, uniform, sampler, seen if sampler.repetition_penalty != 1 else None)
    assert ids.tolist() == [sampler(row, float(u), text) for row, u, text in
                            zip(logits.numpy(), uniform, texts.tolist(), strict=True)]


def test_only_rows_that_are_not_finite_are_told_apart():
    logits = torch.tensor([[1.0, 2.0], [np.nan, 0.0], [np.inf, 0.0], [-np.inf, 0.0]])
    for temperature in (0.0, 1.0):
        ids = drawn(logits, torch.zeros(4, dtype=torch.float64), Sampler(temperature=temperature))
        assert ids[0] >= 0 and ids[1:].tolist() == [-1, -1, -1]
