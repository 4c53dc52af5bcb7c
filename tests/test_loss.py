"""The loss: chunked as if whole, documents apart as if run alone, blocks recomputed as if kept."""

import pytest
import torch
import torch.nn.functional as F
from tiny import SHAPE, assert_close, random_model, random_tokens, tensor_bytes

from llama31 import document_mask
from plumbing import attention, fast
from plumbing.attention import document_block_mask
from plumbing.fast import chunked_cross_entropy

BOS = 90  # above what words are
V, DIM = SHAPE["vocab_size"], SHAPE["dim"]


def words(*shape, seed=1):
    return random_tokens(*shape, high=BOS, seed=seed)


def packed(*lengths, seed=1):
    """One row of documents of these lengths, each beginning with BOS."""
    tokens, at = words(sum(lengths), seed=seed), 0
    for n in lengths:
        tokens[at] = BOS
        at += n
    return tokens[None]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_all_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], name)


def chunked_loss(model, inputs, targets, **sizes):
    """The mean of chunked_cross_entropy with chunks of these sizes."""
    x = model.trunk(inputs, torch.arange(inputs.size(1))[None])
    nats = chunked_cross_entropy(x.flatten(0, 1), model.output.weight, targets.flatten(), x.dtype, **sizes)
    return nats / (targets != -100).sum().clamp(min=1)


def plain_loss(model, inputs, targets):
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (
        targets != -100).sum().clamp(min=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("logits_at_once, cached_entries", [
    (1, 1), (V, 2**20), (V * 5, V * 2), (V * 34, V * 7), (2**25, 1), (2**25, V * 4), (2**25, 2**20)])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole_logits(
        logits_at_once, cached_entries, tied):
    sizes = dict(logits_at_once=logits_at_once, cached_entries=cached_entries)
    model, tokens = random_model(tie_word_embeddings=tied), words(2, 18)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 2:7], targets[1, 3] = -100, -100
    expected = plain_loss(model, inputs, targets)
    expected.backward()
    expected_gradients = gradients(model)
    # Times 3 and back: the gradient that comes into the function is not one.
    loss = 3 * chunked_loss(model, inputs, targets, **sizes) / 3
    loss.backward()
    assert_close(loss, expected)
    assert_all_close(gradients(model), expected_gradients)
    with torch.no_grad():
        assert_close(chunked_loss(model, inputs, targets, **sizes), expected)
    none = torch.full_like(targets, -100)
    loss = chunked_loss(model, inputs, none, **sizes)
    loss.backward()
    assert loss == 0 and all((g == 0).all() for g in gradients(model).values())


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_the_models_loss_is_the_mean_or_the_sum_over_counted_targets(bos_id):
    model, tokens = random_model(), packed(7, 9, 5)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 2:5] = -100
    count = 20 - 3 - (0 if bos_id is None else 2)
    mean = model(inputs, targets, bos_id)
    mean.backward()
    expected = gradients(model)
    nats = model(inputs, targets, bos_id, reduction="sum")
    (nats / count).backward()
    assert_close(nats / count, mean)
    assert_all_close(gradients(model), expected)
    if bos_id is None:
        assert_close(mean, plain_loss(model, inputs, targets))
    none = torch.full_like(targets, -100)
    assert model(inputs, none, bos_id) == 0 and model(inputs, none, bos_id, reduction="sum") == 0


def test_no_more_logits_exist_at_once_than_the_chunk_has():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result) and result.dim() == 2 and V in result.shape:
                sizes.append(result.numel())
            return result
    model, tokens = random_model(), words(4, 101)
    with Watch():
        chunked_loss(model, tokens[:, :-1], tokens[:, 1:], logits_at_once=V * 70).backward()
    assert max(sizes) == V * 70  # of V * 400; the weight has V * DIM


def test_the_loss_is_accumulated_in_float32_under_bfloat16():
    """4,000 equal targets: a bfloat16 sum would stop growing at 256 nats."""
    model = random_model(n_layers=1)
    inputs = torch.full((8, 500), 3)
    targets = torch.full((8, 500), 7)
    with torch.no_grad():
        exact = model(inputs[:1, :1], targets[:1, :1])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs, targets)
            one = model(inputs[:1, :1], targets[:1, :1])
    assert loss.dtype == torch.float32
    assert abs(loss - one) < 1e-3 * one and abs(loss - exact) < 0.05 * exact


@pytest.mark.parametrize("lengths", [(9,), (1, 8), (5, 2, 1, 6), (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_packed_documents_have_loss_and_gradients_of_documents_run_apart(lengths, n_kv_heads):
    model, tokens = random_model(n_kv_heads=n_kv_heads), packed(*lengths)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model.forward_loss(inputs, targets, bos_id=BOS)
    loss.backward()
    together, count = gradients(model), sum(lengths) - len(lengths)
    total = torch.zeros(())
    for document in tokens[0].split(lengths):
        if len(document) > 1:
            total = total + plain_loss(model, document[None, :-1], document[None, 1:]) * (len(document) - 1)
    (total / count).backward()
    assert_close(loss, total / count)
    assert_all_close(together, gradients(model))


def test_a_changed_document_leaves_the_others_logits_bit_identical(monkeypatch):
    model, a, b = random_model(), packed(7, 9, 5), packed(7, 9, 5)
    b[0, 8:16] = words(8, seed=9)  # the second document
    hidden = []
    norm = model.norm.forward
    monkeypatch.setattr(model.norm, "forward", lambda x: hidden.append(norm(x)) or hidden[-1])
    for tokens in (a, b):
        model(tokens, torch.full_like(tokens, -100), BOS)
    first, second = (model.output(x)[0] for x in hidden)
    assert torch.equal(first[:7], second[:7]) and torch.equal(first[16:], second[16:])
    assert not torch.equal(first[8:16], second[8:16])


def test_a_batch_without_a_boundary_inside_takes_the_causal_kernel(monkeypatch):
    masks, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **kwargs: masks.append(kwargs) or attend(*args, **kwargs))
    model, tokens = random_model(), words(2, 12)
    tokens[:, 0] = BOS
    model(tokens, tokens, BOS)
    assert len(masks) == 2 and all(m["is_causal"] and m["attn_mask"] is None for m in masks)
    tokens[1, 5] = BOS
    model(tokens, tokens, BOS)
    assert len(masks) == 4 and not any(m["is_causal"] for m in masks[2:])


def flex_mask(tokens):
    """What document_mask makes on cuda."""
    return document_block_mask((tokens == BOS).cumsum(1))


def test_flex_attention_has_the_logits_of_the_boolean_mask():
    model = random_model()
    tokens = torch.cat([packed(70, 60, 20), packed(1, 140, 9)])
    positions = torch.arange(150)[None]
    with torch.no_grad():
        expected = model.trunk(tokens, positions, document_mask(tokens == BOS))
        assert_close(model.trunk(tokens, positions, flex_mask(tokens)), expected)


@pytest.mark.slow
def test_a_compiled_block_mask_is_the_same_and_makes_no_matrix_of_booleans(monkeypatch):
    document = (torch.rand(1, 2048, generator=torch.Generator().manual_seed(0)) < 0.01).cumsum(1)
    expected = attention.document_block_mask(document)
    monkeypatch.setattr(attention, "create_block_mask", torch.compile(attention.create_block_mask))
    found = attention.document_block_mask(document)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    most, _ = tensor_bytes(lambda: attention.document_block_mask(document))
    assert most < 2048 * 2048 / 16


@pytest.mark.parametrize("free, number", [(2**40, 2**26), (14 * 2**26, 2**26), (14 * 2**26 - 1, 2**25),
                                          (14 * 2**22, 2**22), (0, 2**20)])
def test_a_gpu_makes_as_many_logits_as_fit(monkeypatch, free, number):
    monkeypatch.setattr(fast, "free_memory", lambda device: free)
    assert fast.logits_that_fit(torch.device("cuda")) == number
    assert fast.logits_that_fit(torch.device("cpu")) == 2**26


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_recomputed_blocks_have_the_same_loss_and_gradients_and_keep_less(bos_id):
    model, tokens = random_model(n_layers=4), packed(30, 20, 50)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    kept, outcomes = [], []
    for model.activation_checkpointing in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t,
                                                      lambda t: t):
            loss = model(inputs, targets, bos_id)
        loss.backward()
        kept.append(sum(saved))
        outcomes.append((loss, gradients(model)))
    (loss, grads), (again, grads_again) = outcomes
    assert loss == again and all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert kept[1] < kept[0] / 3


def test_softmax_is_float32_also_where_products_are_bfloat16():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, DIM, generator=generator), torch.randn(V, DIM, generator=generator)
    targets = words(40)
    logits = (x.bfloat16() @ weight.bfloat16().T).float()
    total = chunked_cross_entropy(x, weight, targets, torch.bfloat16)
    assert_close(total, F.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize("cached_entries", [1, 3 * DIM, 10**6])
def test_a_narrow_matrix_widened_in_parts_has_the_wide_ones_loss(cached_entries):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, DIM, generator=generator)
    narrow = torch.randn(V, DIM, generator=generator).bfloat16()
    targets = words(40)
    outcomes = []
    for weight in (narrow, narrow.float()):
        inputs = [x.clone().requires_grad_(), weight.requires_grad_()]
        loss = chunked_cross_entropy(*inputs, targets, torch.float32, cached_entries=cached_entries)
        loss.backward()
        outcomes.append((loss.detach(), inputs[0].grad, inputs[1].grad.float()))
    (loss, dx, dweight), (expected_loss, expected_dx, expected_dweight) = outcomes
    assert_close(loss, expected_loss)
    assert_close(dx, expected_dx)
    # Each entry is rounded to the 8 digits of bfloat16; sums in another order may be rounded the other way.
    rounding = 2**-8 * expected_dweight.abs()
    assert ((dweight - expected_dweight).abs() <= rounding + 1e-5 * expected_dweight.abs().max()).all()
