"""Muon: what it does to singular values, which parameters it moves, and runs that stop and go on."""

import pytest
import torch
from tiny import random_model, random_tokens, read_log, read_weights, untimed

import llama31
from plumbing.muon import Muon, orthogonalized

pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 128), (1, 64), (64, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_singular_vectors_stay_and_values_come_near_to_1(shape, size):
    matrix = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = u.T @ orthogonalized(matrix).double() @ v.T
    found = inside.diagonal()
    assert (inside - found.diag()).abs().max() < 1e-4
    assert found.min() > 0 and found.max() < 1.28
    assert found[values > 0.01 * values.norm()].min() > 0.72


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_layers_matrices_move_by_muon_and_all_else_by_adamw():
    ours, theirs = random_model(tie_word_embeddings=True), random_model(tie_word_embeddings=True)
    optimizers = [ours.configure_optimizers(0.01, 0.1, muon=True), theirs.configure_optimizers(0.01, 0.1)]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    momentum = {}
    for seed in (1, 2):
        x, y = random_tokens(2, 2, 9, seed=seed)
        for model in (ours, theirs):
            model.load_state_dict({**before, "output.weight": before["tok_embeddings.weight"]})
            model(x, y).backward()
        gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if not name.startswith("layers") or p.dim() < 2:
                assert torch.equal(p, q), name
                continue
            momentum[name] = 0.95 * momentum.get(name, 0) + 0.05 * gradients[name]
            direction = orthogonalized(0.05 * gradients[name] + 0.95 * momentum[name])
            expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(p.shape) ** 0.5 * direction
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)


def train(corpus, out_dir, **flags):
    defaults = dict(train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=str(out_dir),
                    ckpt_dir=f"{corpus}/ckpt", seq_len=16, batch_size=4, steps=6, lr=1e-2, eval_interval=3,
                    save_interval=3, eval_steps=8, device="cpu", muon=True)
    llama31.train(**{**defaults, **flags})
    return read_log(out_dir)


def test_a_resumed_run_continues_exactly(corpus, tmp_path):
    whole = train(corpus, tmp_path / "whole")
    train(corpus, tmp_path / "parts")
    (tmp_path / "parts" / "step_000006").rename(tmp_path / "gone")
    assert untimed(train(corpus, tmp_path / "parts", resume=True)) == untimed(whole)
    a, b = (read_weights(tmp_path / name / "step_000006") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="muon"):
        train(corpus, tmp_path / "whole", resume=True, muon=False, steps=9)


def test_it_learns(corpus, tmp_path):
    records = train(corpus, tmp_path, steps=30, lr=3e-3)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


@pytest.mark.parametrize("flags", [dict(fsdp=True), dict(fsdp=1), dict(lora_rank=2),
                                   dict(param_dtype="bfloat16")], ids=str)
def test_what_has_no_whole_float32_matrices_is_refused(corpus, tmp_path, flags):
    with pytest.raises(ValueError, match="muon"):
        train(corpus, tmp_path, **flags)


def test_matrices_without_a_gradient_are_left():
    p = torch.nn.Parameter(torch.ones(2, 3))
    Muon([{"params": [p]}], [p], lr=0.1).step()
    assert torch.equal(p, torch.ones(2, 3))
