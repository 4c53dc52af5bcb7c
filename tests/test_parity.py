"""llama31.py against reference.py, which shares no code with it: logits, loss, gradients, greedy generations."""

import json

import pytest
import torch

import llama31
import reference

BASE = dict(dim=64, n_layers=2, n_heads=4, vocab_size=101, multiple_of=16, max_seq_len=128)
CONFIGURATIONS = {
    "mha": dict(n_kv_heads=4),
    "gqa": dict(n_kv_heads=2),
    "mqa": dict(n_kv_heads=1, norm_eps=1e-3),
    "scaled by 8": dict(n_heads=2, n_kv_heads=1, use_scaled_rope=True, rope_scale_factor=8),
    "scaled by 32, tied": dict(n_heads=2, n_kv_heads=2, use_scaled_rope=True, rope_scale_factor=32,
                               tie_word_embeddings=True),
    "multiplier": dict(n_kv_heads=2, ffn_dim_multiplier=1.3, rope_theta=10000.0),
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def folder(request, tmp_path):
    fields = {**BASE, **request.param}
    model = llama31.Transformer(llama31.ModelArgs(**fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=float(p.dim() == 1), std=p.size(-1) ** -0.5, generator=generator)
    (tmp_path / "params.json").write_text(json.dumps(fields))
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth")
    return tmp_path


def assert_close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_logits_loss_and_gradients_agree(folder):
    model = llama31.Llama.build(folder, device="cpu").model
    theirs = reference.Llama.build(str(folder))
    weights = {name: w.detach().clone().requires_grad_() for name, w in theirs.weights.items()}
    if model.args.tie_word_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    tokens = torch.randint(101, (1, 41), generator=torch.Generator().manual_seed(5))[0]
    inputs, targets = tokens[:-1], tokens[1:].clone()
    targets[3:9] = -100
    assert_close(model(inputs[None])[0], reference.forward(weights, theirs.args, inputs))
    ours = model.forward_loss(inputs[None], targets[None])
    expected = reference.loss(weights, theirs.args, inputs[None], targets[None])
    assert_close(ours, expected)
    ours.backward()
    expected.backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, weights[name].grad)


def test_greedy_generations_are_identical(folder):
    prompts = [[1], [5, 6, 7, 8], list(range(60))]
    ours = llama31.Llama.build(folder, device="cpu").generate(prompts, 30, temperature=0)
    assert ours == reference.Llama.build(str(folder)).generate(prompts, 30, temperature=0.0)
