"""What a GPU computes, beside the CPU and reference.py.

    pytest -n0 -m cuda tests/test_cuda.py        # tests/gpu.sh runs it, too

CUDA_TESTS_ON=cpu runs the same tests on the CPU, which tries the tests themselves.
"""

import os

import numpy as np
import pytest
import torch
from tiny import (
    output,
    random_model,
    random_tokens,
    read_log,
    read_weights,
    torchrun,
    untimed,
    write_checkpoint,
)

import llama31
import planner
import reference
from llama31 import Llama, ModelArgs, Transformer
from plumbing import attention, fast

DEVICE = torch.device(os.environ.get("CUDA_TESTS_ON", "cuda"))
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")]

# Sums in other orders differ in the last digits of float32; bfloat16 has 8 digits of a binary number.
CLOSENESS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEADS_OF_64 = dict(dim=256, n_heads=4, n_kv_heads=2, multiple_of=64)  # Flash kernels want such a width.
PROMPTS = [[5, 6, 7], [1], [8, 9] * 30]


def assert_near(found, expected, closeness=CLOSENESS[torch.float32]):
    error, size = (found.float().cpu() - expected.float().cpu()).abs().max(), expected.abs().max()
    assert error <= closeness * size, f"off by {error}, of {size}"


@pytest.fixture(scope="module", params=[dict(), dict(tie_word_embeddings=True, n_kv_heads=4)], ids=str)
def folder(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cuda"), random_model(**HEADS_OF_64 | request.param))


def build(folder, **settings):
    return Llama.build(folder, device=DEVICE, **settings)


# -----------------------------------------------------------------------------
# Inference


@pytest.mark.parametrize("dtype", CLOSENESS)
def test_logits_are_those_of_reference_py(folder, dtype):
    tokens, _ = random_tokens(2, 2, 60)
    theirs = reference.Llama.build(str(folder))
    found = build(folder, dtype=dtype, compile=False).model(tokens.to(DEVICE))
    assert_near(found, torch.stack([reference.forward(theirs.weights, theirs.args, row) for row in tokens]),
                CLOSENESS[dtype])


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_texts_are_those_of_reference_py(folder, compile):
    theirs = reference.Llama.build(str(folder))
    expected = theirs.generate(PROMPTS, 40, temperature=0.0, stop_tokens=[])
    llama = build(folder, dtype="float32", compile=compile)
    assert llama.generate(PROMPTS, 40, temperature=0, stop_tokens=[]) == expected


@pytest.mark.parametrize("settings", [dict(), dict(min_p=0.05), dict(top_k=5, repetition_penalty=1.2)],
                         ids=str)
def test_compiled_decoding_draws_what_the_cpu_draws(folder, settings):
    on_cpu = Llama.build(folder, device="cpu", dtype="float32", compile=False)
    compiled = build(folder, dtype="float32")
    assert DEVICE.type == "cpu" or compiled.reader is not None
    assert compiled.generate(PROMPTS, 40, **settings) == on_cpu.generate(PROMPTS, 40, **settings)


def test_a_row_has_the_text_that_it_has_alone(folder):
    llama = build(folder, dtype="float32")
    alone = [llama.generate([prompt], 30, temperature=0)[0] for prompt in PROMPTS]
    assert llama.generate(PROMPTS, 30, temperature=0) == alone


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("batch", [PROMPTS[:1], PROMPTS])
def test_int8_has_the_logits_of_the_values_that_it_stands_for(folder, batch, compile):
    llama = build(folder, dtype="float32", quantize="int8", compile=compile)
    plain = Transformer(llama.model.args)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in llama.model.state_dict().items()})
    expected = list(Llama(plain, None).steps(batch, 10, temperature=0))
    found = list(llama.steps(batch, 10, temperature=0))
    assert [ids for _, ids in found] == [ids for _, ids in expected]
    for (logits, _), (theirs, _) in zip(found, expected, strict=True):
        # The CPU's kernels round activations to 16 bits.
        assert_near(logits, theirs, 3e-4 if DEVICE.type == "cpu" else 1e-4)


def test_texts_longer_than_a_recording_go_on(folder):
    """From 256 columns on the graph is recorded anew."""
    llama = build(folder, dtype="float32", max_seq_len=600)
    expected = Llama.build(folder, device="cpu", dtype="float32", compile=False, max_seq_len=600)
    assert llama.generate([[5, 6]], 300, seed=1) == expected.generate([[5, 6]], 300, seed=1)


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("dtype", CLOSENESS)
def test_flex_attention_has_the_gradients_of_the_boolean_mask(dtype):
    generator = torch.Generator().manual_seed(0)
    q, dy = (torch.randn(2, 4, 200, 64, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 2, 200, 64, generator=generator) for _ in range(2))
    document = (torch.rand(2, 200, generator=generator) < 0.05).cumsum(1)
    mask = (document[:, :, None] == document[:, None]).tril()[:, None]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad(y, leaves, dy)
    on_device = [t.detach().to(DEVICE, dtype).requires_grad_() for t in (q, k, v)]
    if DEVICE.type == "cpu":
        pytest.skip("flex attention has no gradients on a CPU")
    y = attention.attend(*on_device, attention.document_block_mask(document.to(DEVICE)), True)
    for found, exact in zip(torch.autograd.grad(y, on_device, dy.to(y)), expected, strict=True):
        assert_near(found, exact, CLOSENESS[dtype])


def train(corpus, out_dir, **flags):
    defaults = dict(train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=str(out_dir),
                    ckpt_dir=f"{corpus}/ckpt", seq_len=32, batch_size=4, steps=20, lr=1e-3, warmup_steps=2,
                    eval_interval=10, save_interval=10, eval_steps=8, device=str(DEVICE))
    llama31.train(**{**defaults, **flags})
    return read_log(out_dir)


FORMS = [dict(), dict(activation_checkpointing=True), dict(lora_rank=4), dict(param_dtype="bfloat16"),
         dict(lora_rank=4, quantize="int8")]


@pytest.mark.parametrize("flags", FORMS, ids=str)
def test_training_has_the_cpus_losses(corpus, tmp_path, flags):
    found = train(corpus, tmp_path / "device", dtype="float32", **flags)
    expected = train(corpus, tmp_path / "cpu", dtype="float32", device="cpu", compile=False, **flags)
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert found[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-3)


@pytest.mark.parametrize("flags", [dict(), dict(lora_rank=4), dict(param_dtype="bfloat16")], ids=str)
def test_a_resumed_run_continues_exactly(corpus, tmp_path, flags):
    whole = train(corpus, tmp_path / "whole", **flags)
    train(corpus, tmp_path / "parts", **flags)
    for path in (tmp_path / "parts").glob("step_000020"):
        path.rename(tmp_path / "gone")
    parts = train(corpus, tmp_path / "parts", resume=True, **flags)
    assert untimed(parts) == untimed(whole)
    if not flags.get("lora_rank"):
        a, b = (read_weights(tmp_path / name / "step_000020") for name in ("whole", "parts"))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--nofsdp", "--fsdp"])
def test_one_process_under_torchrun_trains_as_without(corpus, tmp_path, flag):
    expected = train(corpus, tmp_path / "alone", dtype="float32")
    words = [f"--{name}={value}" for name, value in dict(
        train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=tmp_path / "ranks",
        ckpt_dir=f"{corpus}/ckpt", seq_len=32, batch_size=4, steps=20, lr=1e-3, warmup_steps=2,
        eval_interval=10, save_interval=10, eval_steps=8, device=DEVICE.type, dtype="float32").items()]
    output(*torchrun(1, "llama31.py", "train", *words, flag))
    for a, b in zip(read_log(tmp_path / "ranks"), expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the CPU's memory is measured in tests/test_memory.py")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_memory_is_what_the_planner_says(form):
    recomputed = form.get("activation_checkpointing", False)
    form = planner.FULL | {name: value for name, value in form.items() if name in planner.FULL}
    args = ModelArgs(dim=1024, n_layers=6, n_heads=16, n_kv_heads=4, vocab_size=32000, multiple_of=256)
    model = planner.prepared(args, form)
    state = {name: torch.zeros(p.shape, dtype=p.dtype, device=DEVICE) for name, p in
             model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie()
    del state
    model.activation_checkpointing = recomputed
    optimizer = model.configure_optimizers(1e-3)
    fast.compile_blocks(model)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 32000, (4, 1024))).to(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    computed = planner.training_memory(args, 4, 1024, activation_checkpointing=recomputed, form=form)
    # Compiled blocks keep fewer activations than the count, which is of uncompiled ones.
    assert 0.6 * computed < torch.cuda.max_memory_allocated() < 1.1 * computed
