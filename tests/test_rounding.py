"""bfloat16 weights: rounding is unbiased, shards round alike, and what float32 weights learn is learned."""

import copy
import shutil

import pytest
import torch
from tiny import forked, random_model, random_tokens, read_log, read_weights, run, untimed

import llama31
from llama31 import Transformer
from plumbing import lora, rounding
from plumbing.rounding import RoundingAdamW, random_bits, rounded, update, update_parts

pytestmark = pytest.mark.usefixtures("quick_training")

BF16 = torch.bfloat16


def test_rounding_is_up_as_often_as_a_number_is_near_to_the_upper_one():
    n = 2**16
    keys = torch.tensor([12345, -6789], dtype=torch.int32)
    bits = random_bits(torch.arange(n, dtype=torch.int32), *keys)
    for share in (0.0, 0.1, 0.5, 0.9):
        for low in (1.0, -1.0, 2.0**-99, -2.0**65):
            step = low * 2**-7  # to the next one, away from 0
            x = torch.full((n,), low + share * step)
            for each in (bits, bits >> 16):
                found = rounded(x, each).float()
                assert set(found.unique().tolist()) <= {low, low + step} or share > 0
                mean = ((found.double() - low) / step).mean()
                assert mean == pytest.approx(share, abs=4 * 0.5 / n**0.5)


def test_what_is_a_bfloat16_or_not_finite_stays_so():
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, 3.3895e38, float("inf"), -float("inf")]).to(BF16)
    bits = torch.full((len(x),), -1, dtype=torch.int32)
    assert torch.equal(rounded(x.float(), bits), x)
    assert rounded(torch.tensor([float("nan")]), bits[:1]).isnan().all()


def test_random_bits_are_even_and_neither_neighbours_nor_steps_are_related():
    index = torch.arange(2**16, dtype=torch.int32)
    rows = [random_bits(index, *torch.tensor(keys, dtype=torch.int32))
            for keys in ((1, 2), (1, 3), (2, 2))]
    signs = torch.stack([((row >> shift) & 1) * 2 - 1 for row in rows for shift in (0, 15, 16, 31)]).double()
    assert signs.mean(1).abs().max() < 4 / 2**8
    related = signs @ signs.T / 2**16 - torch.eye(len(signs), dtype=torch.float64)
    assert related.abs().max() < 5 / 2**8
    assert (signs[:, 1:] * signs[:, :-1]).mean(1).abs().max() < 4 / 2**8


def test_bits_are_scrambled_as_lowbias32_does():
    def lowbias32(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    found = rounding.scrambled(torch.tensor(numbers).to(torch.int32))
    assert [x % 2**32 for x in found.tolist()] == [lowbias32(x) for x in numbers]


def optimizers(seed=1, shape=(37, 41), compile=False, **settings):
    """(weight, optimizer) in bfloat16 and in float32, of equal weights."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)
    ours = torch.nn.Parameter(weight.clone())
    theirs = torch.nn.Parameter(weight.float())
    settings = dict(lr=1e-2, betas=(0.9, 0.95)) | settings
    groups = [{"params": [ours], "weight_decay": 0.1}]
    rounding = RoundingAdamW(groups, seed=seed, compile=compile, **settings)
    return ours, rounding, theirs, torch.optim.AdamW([theirs], weight_decay=0.1, **settings)


def test_a_step_is_adamws_but_for_rounding():
    ours, rounding, theirs, adamw = optimizers()
    ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    theirs.grad = ours.grad.float()
    rounding.step()
    adamw.step()
    found, expected = rounding.state[ours], adamw.state[theirs]
    for a, b in [(ours, theirs), *((found[name], expected[name]) for name in ("exp_avg", "exp_avg_sq"))]:
        assert a.dtype == BF16
        distance = (a.float() - b).abs() / b.abs()
        assert distance.max() < 2**-7  # less than to the next one
        assert (a.float() - b).mean().abs() < 4 * (b.abs().mean() * 2**-8) / b.numel()**0.5


def test_small_updates_move_the_weights_as_in_float32_on_average():
    """Rounded to the nearest, none of them would."""
    ours, rounding, theirs, adamw = optimizers(lr=1e-5, shape=(300, 300))
    before = theirs.detach().clone()
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    for _ in range(20):
        ours.grad = grad.clone()
        theirs.grad = grad.float()
        rounding.step()
        adamw.step()
    moved = theirs.detach() - before
    assert ((before + moved / 20).to(BF16) == before.to(BF16)).float().mean() > 0.98
    direction = moved.sign()
    found = ((ours.detach().float() - before) * direction).mean()
    assert found == pytest.approx(float(moved.abs().mean()), rel=0.1)


def test_rounding_follows_from_seed_step_parameter_and_index_alone():
    def after(steps=2, seed=1, **settings):
        ours, rounding, _, _ = optimizers(seed=seed, shape=(300, 300), **settings)
        for step in range(steps):
            ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step)).to(BF16)
            rounding.step()
        return ours.detach()

    assert torch.equal(after(), after())
    assert not torch.equal(after(), after(seed=2))
    weight, grad = (torch.randn(6, 64, generator=torch.Generator().manual_seed(i)).to(BF16) for i in (3, 4))
    keys = torch.arange(4, dtype=torch.int32)
    rates = torch.tensor([1.0, 0.9, 0.1, 0.95, 0.05, 1e-3, 0.05, 1e-8])
    whole = [weight.clone().view(-1), grad.view(-1), *torch.zeros(2, 384, dtype=BF16)]
    update(*whole, rates, keys, 0)
    rows = [weight[2:4].clone().view(-1), grad[2:4].reshape(-1), *torch.zeros(2, 128, dtype=BF16)]
    update(*rows, rates, keys, 128)
    assert all(torch.equal(a[128:256], b) for a, b in zip(whole, rows, strict=True))
    parts = [weight.clone().view(-1), grad.view(-1), *torch.zeros(2, 384, dtype=BF16)]
    update_parts(*parts, rates, keys, 0, size=100)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.slow
def test_the_compiled_pass_rounds_as_the_other_one():
    results = []
    for compile in (False, True):
        ours, rounding, _, _ = optimizers(compile=compile, shape=(300, 301))
        for step in range(3):
            ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step)).to(BF16)
            rounding.step()
        results.append(ours.detach())
    assert (results[0] != results[1]).float().mean() < 1e-3  # float32 may differ in a last digit.


def stored(model):
    """The same model, trained in bfloat16, and in float32 with equal weights."""
    plain = copy.deepcopy(model)
    plain.load_state_dict({name: t.to(BF16).float() for name, t in model.state_dict().items()})
    ours = Transformer.on_meta(copy.deepcopy(model.args))
    lora.store_as(ours, BF16)
    weights = model.state_dict()
    if model.args.tie_word_embeddings:
        del weights["output.weight"]
    llama31.checkpoint.load_weights(ours, weights.items(), torch.device("cpu"))
    return ours, plain


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_float32s_and_gradients_are_rounded_once(tied):
    ours, plain = stored(random_model(3, tie_word_embeddings=tied))
    tokens = random_tokens(2, 21)
    tokens[:, ::2] = 7  # a token that is there often
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = ours.forward_loss(tokens[:, :-1], tokens[:, 1:])
    shapes = {p.shape for name, p in plain.named_parameters() if name.startswith("layers") and p.dim() > 1}
    assert not any(t is not None and t.shape in shapes and t.dtype == torch.float32 for t in kept)
    expected = plain.forward_loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == BF16
        size = q.grad.abs()
        if tied and name.startswith("tok"):  # a sum of two, each of which is rounded
            size = size.max()
        assert ((p.grad.float() - q.grad).abs() <= 2**-8 * size + 1e-7).all(), name


def train(corpus, out_dir, **flags):
    defaults = dict(train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=str(out_dir),
                    ckpt_dir=f"{corpus}/ckpt", seq_len=16, batch_size=4, steps=6, lr=1e-3, eval_interval=3,
                    save_interval=3, eval_steps=8, device="cpu", param_dtype="bfloat16", compile=False,
                    keep=9)
    llama31.train(**{**defaults, **flags})
    return out_dir


def test_a_resumed_run_continues_exactly(corpus, tmp_path):
    whole = train(corpus, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    shutil.rmtree(tmp_path / "parts" / "step_000006")
    llama31.train(out_dir=str(tmp_path / "parts"), resume=True, device="cpu")
    a, b = (read_weights(path / "step_000006") for path in (whole, tmp_path / "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(t.to(BF16).float(), t.float()) for t in a.values())
    assert untimed(read_log(whole)) == untimed(read_log(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(), dict(ckpt_dir=None, preset="demo", lr=3e-3)], ids=str)
def test_it_learns_what_float32_weights_learn(corpus, tmp_path, flags):
    flags = dict(steps=40, lr=3e-3, eval_interval=40) | flags
    if "preset" in flags:
        flags["tokenizer_path"] = f"{corpus}/tokenizer.model"
    losses = [read_log(train(corpus, tmp_path / kind, param_dtype=kind, **flags))[-1]["val_loss"]
              for kind in ("float32", "bfloat16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--batch_size=6"], ["--batch_size=4", "--fsdp"]], ids=str)
def test_several_processes_round_as_one(corpus, tmp_path, flags):
    processes = 12 // int(flags[0].partition("=")[2])
    words = ["llama31.py", "train", f"--train_data={corpus}/train.bin", f"--val_data={corpus}/val.bin",
             f"--ckpt_dir={corpus}/ckpt", "--seq_len=16", "--steps=2", "--eval_steps=6", "--lr=1e-3",
             "--total_batch_tokens=192", "--device=cpu", "--dtype=float32", "--param_dtype=bfloat16",
             "--nocompile"]
    for count, given in ((1, ["--batch_size=12"]), (processes, flags)):
        ended = run(*forked(count, *words, f"--out_dir={tmp_path}/{count}", *given))
        assert ended.returncode == 0, ended.stderr[-6000:]
    a, b = (read_weights(tmp_path / str(count) / "step_000002") for count in (1, processes))
    same = sum(int((a[name] == b[name]).sum()) for name in a) / sum(t.numel() for t in a.values())
    assert same > 0.98  # The others had gradients that the sums over ranks round otherwise.
