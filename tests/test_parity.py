"""llama31.py against reference.py, which shares no code with it, and its cache against its own full forward.

Always float32, and max|a-b| <= 1e-5 max|b| for every tensor.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    NARROW,
    RESCALED,
    SCALED,
    SHAPE,
    UNSLOWED,
    WIDE,
    assert_close,
    output,
    random_model,
    random_tokens,
    rope_bands,
    write_checkpoint,
)

import llama31
import reference

CONFIGURATIONS = {
    "mha": dict(n_kv_heads=4),
    "gqa": dict(n_kv_heads=2),
    "mqa, tied": dict(n_kv_heads=1, norm_eps=1e-3, tie_word_embeddings=True),
    "scaled by 8": dict(SCALED, n_kv_heads=1, rope_scale_factor=8),
    "scaled by 32, tied": dict(SCALED, n_kv_heads=2, rope_scale_factor=32, tie_word_embeddings=True),
    "multiplier": dict(n_kv_heads=2, ffn_dim_multiplier=1.3, rope_theta=10000.0),
    "narrow heads": NARROW,
    "wide heads, scaled by other numbers": dict(RESCALED, **WIDE),
}
each_configuration = pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def make(changes, seed=3):
    """(model, weights, args): the Transformer and what reference.py takes, with the same random weights."""
    model = random_model(seed, **changes)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return model, weights, {**SHAPE, **changes}


def save(folder, changes):
    """A folder of Meta's own, whose params.json leaves out what is as by default."""
    return write_checkpoint(folder, random_model(3, **changes), params={**SHAPE, **changes})


def hidden_size(args):
    """Meta's rule for SwiGLU; reference.py takes whatever size the weights have."""
    size = int((args.get("ffn_dim_multiplier") or 1) * (8 * args["dim"] // 3))
    return -(-size // args["multiple_of"]) * args["multiple_of"]


def assert_parity(changes, inputs, targets, seed=3):
    model, weights, args = make(changes, seed)
    assert len(weights["layers.0.feed_forward.w1.weight"]) == hidden_size(args)
    logits = model(inputs)
    for row, row_logits in zip(inputs, logits, strict=True):
        assert_close(row_logits, reference.forward(weights, args, row), "logits")
    loss, expected = model(inputs, targets), reference.loss(weights, args, inputs, targets)
    assert_close(loss, expected, "loss")
    loss.backward()
    if (targets == -100).all():
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
        return
    expected.backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, weights[name].grad, name, negligible=1e-7)  # 0 in exact arithmetic


@each_configuration
def test_logits_loss_and_gradients_agree(changes):
    tokens = random_tokens(3, 41)
    targets = tokens[:, 1:].clone()
    targets[0, 3:9], targets[1, 0], targets[2, 20:] = -100, -100, -100
    assert_parity(changes, tokens[:, :-1], targets)


@pytest.mark.parametrize("changes", [
    dict(SCALED, rope_scale_factor=8), dict(SCALED, rope_scale_factor=32), RESCALED, UNSLOWED,
    dict(RESCALED, head_dim=40), dict(SCALED, rope_high_freq_factor=1.5, head_dim=128)])
def test_scaled_frequencies_agree_in_each_of_the_three_bands(changes):
    args = {**SHAPE, **changes}
    ours, theirs = llama31.rope_frequencies(llama31.ModelArgs(**args)), reference.rope_frequencies(args)
    kept, blended, slowed = rope_bands(args)
    assert min(kept, blended, slowed) > 0
    for part in (slice(0, kept), slice(kept, kept + blended), slice(kept + blended, None)):
        assert_close(ours[part], theirs[part], part)
    plain = reference.rope_frequencies({**args, "use_scaled_rope": False})
    assert torch.equal(ours[:kept], plain[:kept])
    assert_close(ours[-slowed:], plain[-slowed:] / args.get("rope_scale_factor", 8))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_logits_loss_and_gradients_agree_on_any_small_configuration(data):
    def draw(*options):
        return data.draw(st.sampled_from(options))
    n_kv_heads, group, pairs, vocab_size = draw(1, 2, 3), draw(1, 2, 3), draw(1, 2, 3, 8), draw(2, 7, 50)
    changes = dict(
        n_heads=n_kv_heads * group, n_kv_heads=draw(n_kv_heads, None) if group == 1 else n_kv_heads,
        dim=2 * pairs * n_kv_heads * group, n_layers=draw(1, 2, 3), vocab_size=vocab_size,
        multiple_of=draw(1, 8, 32), ffn_dim_multiplier=draw(None, 0.6, 1.3), norm_eps=draw(1e-5, 1e-2),
        rope_theta=draw(500000.0, 10000.0, 100.0), use_scaled_rope=draw(False, True),
        rope_scale_factor=draw(8, 32, 3.7), tie_word_embeddings=draw(False, True),
        head_dim=draw(None, 2, 20), rope_low_freq_factor=draw(1.0, 0.3),
        rope_high_freq_factor=draw(4.0, 1.1, 50), rope_old_context=draw(8192, 512))
    # of three tokens or fewer, gradients of wq and wk are nearly 0, differences of much larger numbers
    B, T, seed = draw(1, 2, 3), draw(9, 15, 20), data.draw(st.integers(0, 1000))
    tokens = random_tokens(B, T + 1, high=vocab_size, seed=seed)
    ignored = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < draw(0, 0.3, 1)
    assert_parity(changes, tokens[:, :-1], tokens[:, 1:].masked_fill(ignored, -100), seed)


# a head of 8 has one pair for the blended and one for the slowed band
LONG = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, use_scaled_rope=True, max_seq_len=8400)


@torch.no_grad()
def test_logits_loss_and_cached_decode_agree_beyond_position_8192():
    model, weights, args = make(LONG)
    assert min(rope_bands(args)) > 0
    tokens = random_tokens(1, 8331)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:, :8192] = -100
    full, theirs = model(inputs), reference.forward(weights, args, inputs[0])
    assert_close(full[0, 8192:], theirs[8192:])
    assert_close(full[0, -3:], theirs[-3:])
    assert_close(model(inputs, targets), -theirs.log_softmax(1)[range(8192, 8330), targets[0, 8192:]].mean())
    for at, logits in cached_logits(model, inputs, [4096, 4096, 133, *[1] * 5]):
        assert_close(logits, full[:, at - 1])


# -----------------------------------------------------------------------------
# The cache


def caches_for(model, B, room):
    return [llama31.KVCache(model.args, B, room) for _ in model.layers]


def extend(model, caches, tokens, start_pos, last):
    """Logits (B, V) at column last[b] of tokens (B, T), whose row b begins at position start_pos[b]."""
    with torch.inference_mode():
        return model.forward_cached(tokens, start_pos, caches, last)


def cached_logits(model, tokens, chunks):
    """Yields (n, logits after n tokens) as tokens (B, T) are read in chunks of the given widths."""
    B, at = len(tokens), 0
    caches = caches_for(model, B, sum(chunks))
    for T in chunks:
        yield at + T, extend(model, caches, tokens[:, at:at + T], [at] * B, [T - 1] * B)
        at += T


@each_configuration
@pytest.mark.parametrize("chunks", [[1] * 24, [24], [20, 1, 1, 1, 1], [1, 22, 1], [7, 1, 1, 9, 6],
                                    [8, 8, 8]], ids=str)
def test_cached_logits_equal_the_full_forward(changes, chunks):
    model = make(changes)[0]
    tokens = random_tokens(2, 24)
    full = model(tokens)
    for at, logits in cached_logits(model, tokens, chunks):
        assert_close(logits, full[:, at - 1], f"after {at}")


@each_configuration
@pytest.mark.parametrize("widths", [[1] * 6, [3, 1, 4], [5]], ids=str)
def test_rows_of_different_lengths_in_a_cache_equal_their_full_forward(changes, widths):
    model = make(changes)[0]
    lengths = [9, 1, 17, 4]
    rows = random_tokens(4, 40)
    prompts = rows[:, :17].clone()
    for row, n in zip(prompts, lengths, strict=True):
        row[n:] = 0  # padding, overwritten by what follows
    caches = caches_for(model, 4, 17 + sum(widths))
    logits = extend(model, caches, prompts, [0] * 4, [n - 1 for n in lengths])
    for T in [*widths, None]:
        for i, n in enumerate(lengths):
            assert_close(logits[i], model(rows[i:i + 1, :n])[0, -1], f"row {i} of {n}")
        if T:
            chunk = torch.stack([row[n:n + T] for row, n in zip(rows, lengths, strict=True)])
            logits = extend(model, caches, chunk, lengths, [T - 1] * 4)
            lengths = [n + T for n in lengths]


# -----------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("changes", [
    pytest.param(changes, id=name, marks=[] if name in ("gqa", "scaled by 32, tied") else pytest.mark.slow)
    for name, changes in CONFIGURATIONS.items()])
def test_greedy_generations_are_identical(changes, tmp_path):
    save(tmp_path, changes)
    ours, theirs = llama31.Llama.build(tmp_path, device="cpu"), reference.Llama.build(tmp_path)
    prompts = [[1], [5, 6, 7, 8], [4, 3] * 10, [*range(50), *range(60)]]

    def identical(**flags):
        rows = theirs.generate(prompts, 30, temperature=0, **flags)
        assert ours.generate(prompts, 30, temperature=0, **flags) == rows
        return rows
    free = identical(stop_tokens=[])
    assert [len(row) for row in free] == [30, 30, 30, SHAPE["max_seq_len"] - 110]
    assert identical(echo=True) == [prompt + row for prompt, row in zip(prompts, free, strict=True)]
    stops = [free[0][4], free[2][9]]
    assert identical(stop_tokens=stops) == [
        row[:next((i for i, token in enumerate(row) if token in stops), None)] for row in free]


def test_reference_imports_nothing_of_llama31():
    for name in ("reference", "plumbing.cli", "tokenizer"):
        source = Path(sys.modules[name].__file__).read_text()
        imported = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported and "llama31" not in imported and "importlib" not in imported


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ['The "cat",\n\n  2024 🦙', "{}"])
def test_both_scripts_print_the_same_text(prompt, tokenizer, tmp_path):
    write_checkpoint(tmp_path, random_model(3, vocab_size=tokenizer.n_words), tokenizer=tokenizer)
    flags = ["--ckpt_dir", tmp_path, "--prompt", prompt, "--max_gen_len", "40"]
    theirs = output("reference.py", *flags)
    ours = output("llama31.py", *flags, "--temperature", "0", "--dtype", "float32", "--device", "cpu")
    assert ours == theirs
    assert ours.startswith(prompt) and len(ours) > len(prompt) + 1
