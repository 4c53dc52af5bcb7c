"""attention.cpp: the values and gradients of PyTorch's attention in float64, by itself and in a model."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close, random_model, random_tokens

from plumbing import attention
from plumbing.attention import attend, attend_on_cpu, first_seen, serves
from plumbing.fast import compile_blocks

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
CPU = torch.device("cpu")


def random_inputs(B, T, H, K, D, dtype=torch.float32):
    """q, k, v as attend takes them, and a gradient of its result."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, T, D, generator=generator).to(dtype) for heads in (H, K, K, H)]


def random_starts(B, T, document):
    """(B, T): a document begins at each token with this probability; None: nowhere."""
    generator = torch.Generator().manual_seed(1)
    return None if document is None else torch.rand(B, T, generator=generator) < document


def outcome(attend_to, q, k, v, dy):
    """Its result, and the gradients of q, k and v."""
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    y = attend_to(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def ours(starts, *tensors):
    B, _, T, _ = tensors[0].shape
    first = first_seen(torch.zeros(B, T, dtype=torch.int64), starts)
    return outcome(lambda q, k, v: attend(q, k, v, first, q.size(1) != k.size(1)), *tensors)


def expected(starts, *tensors):
    """PyTorch's, in float64, with the mask written out."""
    B, _, T, _ = tensors[0].shape
    document = torch.zeros(B, T) if starts is None else starts.cumsum(1)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    return outcome(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
                   *(t.double() for t in tensors))


@pytest.mark.parametrize("document", [None, 0.02, 0.3, 1])
@pytest.mark.parametrize("shape", [(4, 200, 9, 3, 64), (2, 97, 6, 3, 128), (3, 95, 4, 2, 24),
                                   (1, 500, 2, 2, 66), (2, 5, 2, 2, 2), (2, 1, 4, 1, 6)])
def test_values_and_gradients_are_those_of_pytorch_in_float64(shape, document):
    starts = random_starts(*shape[:2], document)
    tensors = random_inputs(*shape)
    for found, exact in zip(ours(starts, *tensors), expected(starts, *tensors), strict=True):
        # 1: The score of a query's only key has no gradient, and rounding leaves a little.
        assert (found - exact).abs().max() <= 1e-5 * max(exact.abs().max(), 1)


def test_scores_of_any_size_are_exact():
    q, k, v, dy = random_inputs(1, 150, 2, 1, 16)
    k[:, :, 0] *= 1000  # Scores of hundreds among ordinary ones make weights of 0 and 1.
    for found, exact in zip(ours(None, q, k, v, dy), expected(None, q, k, v, dy), strict=True):
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_bfloat16_is_computed_in_float32():
    starts, tensors = random_starts(2, 150, 0.02), random_inputs(2, 150, 4, 2, 32, torch.bfloat16)
    for found, exact in zip(ours(starts, *tensors), expected(starts, *tensors), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_a_document_is_untouched_by_the_others():
    starts = torch.zeros(1, 300, dtype=torch.bool)
    starts[:, 130] = True
    tensors = random_inputs(1, 300, 4, 2, 16)
    before = ours(starts, *tensors)
    changed = [torch.cat([t[:, :, :130] + 1, t[:, :, 130:]], 2) for t in tensors]
    for a, b in zip(before, ours(starts, *changed), strict=True):
        assert torch.equal(a[:, :, 130:], b[:, :, 130:]) and not torch.equal(a[:, :, :130], b[:, :, :130])


def test_what_is_not_finite_is_not_hidden():
    q, k, v, dy = random_inputs(1, 120, 2, 1, 16)
    q[0, 0, 70, 3] = torch.nan
    y, dq, dk, dv = ours(None, q, k, v, dy)
    assert y[0, 0, 70].isnan().all() and y[0, 0, 71].isfinite().all()
    assert dq.isnan().any() and dk.isnan().any() and dv.isnan().any()


def test_the_number_of_threads_changes_nothing():
    tensors, before = random_inputs(2, 200, 6, 3, 32), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ours(None, *tensors))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_the_operator_keeps_what_pytorch_demands_of_one():
    q, k, v, _ = (t.transpose(1, 2).requires_grad_() for t in random_inputs(2, 10, 4, 2, 8))
    torch.library.opcheck(attend_on_cpu, (q, k, v, torch.zeros(2, 10, dtype=torch.int64)))


@pytest.mark.parametrize("bos_id", [None, 3])
@pytest.mark.parametrize("way", ["eager", "recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_model_has_the_loss_and_gradients_that_pytorchs_attention_gives(way, bos_id):
    model, tokens = random_model(vocab_size=20), random_tokens(2, 110, high=20)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    outcomes = []
    for model.compiled_attention in (False, serves(CPU)):
        loss = model(inputs, targets, bos_id)
        outcomes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        model.activation_checkpointing = way == "recomputed"
        if way == "compiled":
            compile_blocks(model)
    for a, b in zip(*outcomes, strict=True):
        assert_close(b, a)


def test_of_a_window_that_is_four_times_as_long_four_times_as_much_is_kept():
    kept = {}
    for T in (100, 400):
        q, k, v, _ = (t.requires_grad_() for t in random_inputs(1, T, 4, 2, 16))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes), bool):
            attend(q, k, v, torch.zeros(1, T, dtype=torch.int64), True)
        kept[T] = sum(sizes)
    assert 0 < kept[400] == 4 * kept[100]


def test_without_a_compiler_one_line_says_who_computes_attention(monkeypatch, capsys):
    attention.compile_kernels.cache_clear()
    monkeypatch.setenv("CXX", "nosuchcompiler")
    assert not serves(CPU)
    assert capsys.readouterr().err == ("no C++ compiler found (nosuchcompiler, or CXX); attention is "
                                       "computed by PyTorch\n")
    assert not serves(torch.device("meta")) and not capsys.readouterr().err
