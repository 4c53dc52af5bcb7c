"""LoRA: equal to peft's on transformers, on bases of every type, resumed, merged, shared by ranks."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hugging_face import hugging_face
from safetensors.torch import load_file, save_file
from tiny import (
    assert_close,
    forked,
    random_model,
    random_tokens,
    read_log,
    read_weights,
    run,
    untimed,
    write_checkpoint,
)
from torch import nn

import convert
import llama31
import reference
from llama31 import Llama, Transformer
from plumbing import fast, huggingface, lora, narrow
from plumbing.adapters import CONFIG, MATRICES, WEIGHTS, peft_names, save_adapters
from plumbing.checkpoint import load_weights, newest_checkpoint

pytestmark = pytest.mark.usefixtures("quick_training")

RANK = 3

# -----------------------------------------------------------------------------
# Models


def adapted(model, seed=5, quantize=None, stored=torch.float32, alpha=5.0):
    """A model like another one, whose adapters are drawn, B too, so that they change something."""
    ours = Transformer.on_meta(copy.deepcopy(model.args))
    lora.adapt(ours, RANK, alpha, stored, quantize, "base")
    weights = model.state_dict()
    if model.args.tie_word_embeddings:
        del weights["output.weight"]
    load_weights(ours, lora.adapted_tensors(ours, weights.items(), seed), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for name, p in ours.named_parameters():
        if name.endswith("lora_b"):
            p.data.normal_(std=0.1, generator=generator)
    return ours


def adapters_of(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merged_model(model, ours, factor):
    """The model with the adapters of ours added to it."""
    plain = copy.deepcopy(model)
    plain.load_state_dict(dict(lora.with_adapters(model.state_dict().items(), adapters_of(ours), factor)))
    return plain


@pytest.fixture
def folder(corpus, tmp_path):
    """A copy of the corpus, whose base may be changed."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def train(folder, out_dir, **flags):
    defaults = dict(train_data=f"{folder}/train.bin", val_data=f"{folder}/val.bin", out_dir=str(out_dir),
                    ckpt_dir=f"{folder}/ckpt", seq_len=16, batch_size=4, steps=6, lr=1e-2, eval_interval=3,
                    save_interval=3, eval_steps=8, device="cpu", lora_rank=RANK, compile=False)
    llama31.train(**{**defaults, **flags})
    return out_dir


# -----------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_product_has_the_values_and_gradients_of_plain_ones(stored):
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 7, 70), (9, 70), (3, 70), (9, 3)
    x, weight, a, b = (torch.randn(shape, generator=draw) for shape in shapes)
    scale = None
    if stored == torch.int8:
        weight, scale = narrow.quantize(weight)
        values = narrow.dequantize(weight, scale)
    else:
        weight = weight.to(stored)
        values = weight.float()
    saved = []
    layer = lora.AdaptedLinear(values, 3, 1.5, stored == torch.int8)
    layer.weight, layer.scale = (None if t is None else nn.Parameter(t, requires_grad=False)
                                 for t in (weight, scale))
    layer.lora_a, layer.lora_b = (nn.Parameter(t) for t in (a, b))
    leaves = [x.requires_grad_(), layer.lora_a, layer.lora_b]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours = layer(x)
    x, a, b = leaves
    expected = x @ values.T + 0.5 * (x @ a.T) @ b.T
    assert_close(ours, expected)
    grad = torch.randn(ours.shape, generator=draw)
    for mine, theirs in zip(*(torch.autograd.grad(y, leaves, grad) for y in (ours, expected)), strict=True):
        assert_close(mine, theirs)
    # Besides x and what is stored, only what A makes of x is kept.
    kept = sum(t.nbytes for t in {t.data_ptr(): t for t in saved if t is not None}.values())
    stored_bytes = sum(t.nbytes for t in (weight, scale) if t is not None)
    assert kept == stored_bytes + 4 * (x.numel() + a.numel() + b.numel() + 2 * 7 * 3)


@pytest.mark.parametrize("changes", [dict(), dict(tie_word_embeddings=True, head_dim=10)])
def test_logits_loss_and_gradients_are_those_of_peft(changes, tmp_path):
    peft = pytest.importorskip("peft")
    model = random_model(2, **changes)
    ours = adapted(model)
    save_adapters(tmp_path / "adapter", model.args, [adapters_of(ours)], alpha=5.0, base="base")
    theirs = peft.PeftModel.from_pretrained(hugging_face(model.args, model.state_dict()),
                                            tmp_path / "adapter", is_trainable=True)
    tokens = random_tokens(2, 21)
    targets = tokens[:, 1:].clone()
    targets[0, :7] = -100
    assert_close(ours(tokens[:, :-1]), theirs(tokens[:, :-1]).logits)
    loss = ours.forward_loss(tokens[:, :-1], targets)
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    names = peft_names(model.args)
    found = dict(theirs.named_parameters())
    assert len(names) == len(adapters_of(ours)) == 2 * 7 * model.args.n_layers
    for name, p in ours.named_parameters():
        if not p.requires_grad:
            assert p.grad is None
            continue
        grad = found[names[name].replace(".weight", ".default.weight")].grad
        if name.endswith("lora_b"):
            grad = huggingface.reordered(name, grad, model.args, to_meta=True)
        assert_close(p.grad, grad, name)


def test_an_int8_base_equals_the_dequantised_one():
    model = random_model(3)
    ours = adapted(model, quantize="int8")
    state = ours.state_dict()
    plain = copy.deepcopy(model)
    for name, p in plain.named_parameters():
        if name.replace("weight", "scale") in state:
            p.data = narrow.dequantize(state[name], state[name.replace("weight", "scale")])
            assert state[name].dtype == torch.int8
    same = adapted(plain)
    tokens = random_tokens(2, 21)
    for each in (ours, same):
        each.forward_loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert_close(ours(tokens), same(tokens))
    expected = dict(same.named_parameters())
    for name in adapters_of(ours):
        assert_close(ours.get_parameter(name).grad, expected[name].grad, name)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_equals_unmerged(stored):
    model = random_model(4)
    model.load_state_dict({name: t.to(stored).float() for name, t in model.state_dict().items()})
    ours = adapted(model, stored=stored)
    assert {p.dtype for p in ours.parameters() if not p.requires_grad} == {stored}
    tokens = random_tokens(2, 21)
    assert_close(ours(tokens), merged_model(model, ours, 5.0 / RANK)(tokens))


@pytest.mark.slow
def test_compiled_and_recomputed_blocks_have_the_same_gradients():
    """hidden_dim 176 is no multiple of the groups that share a scale, which a compiler got wrong."""
    model = random_model(4)
    assert model.args.hidden_dim % narrow.GROUP
    tokens = random_tokens(2, 21)
    plain, compiled, recomputed = (adapted(model, quantize="int8") for _ in range(3))
    assert fast.compile_blocks(compiled)
    recomputed.activation_checkpointing = True
    for each in (plain, compiled, recomputed):
        each.forward_loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name in adapters_of(plain):
        assert_close(compiled.get_parameter(name).grad, plain.get_parameter(name).grad, name)
        assert torch.equal(recomputed.get_parameter(name).grad, plain.get_parameter(name).grad), name


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_run_leaves_peft_files_and_the_merged_model(corpus, tmp_path, quantize, capsys):
    peft = pytest.importorskip("peft")
    out_dir = train(corpus, tmp_path / "out", quantize=quantize)
    assert f"in the model: {out_dir / 'merged'}\n" in capsys.readouterr().out
    losses = [record["loss"] for record in read_log(out_dir)]
    assert losses[-1] < losses[0]
    step = out_dir / "best"
    assert {path.name for path in step.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer", "progress.pt", "tokenizer.model"}
    config = json.loads((step / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 2 * RANK)
    assert config["base_model_name_or_path"] == str(corpus / "ckpt")
    base = llama31.load_checkpoint(corpus / "ckpt")
    theirs = peft.PeftModel.from_pretrained(hugging_face(base.args, base.state_dict()), step)
    merged = llama31.load_checkpoint(out_dir / "merged")
    tokens = random_tokens(2, 21)
    assert_close(merged(tokens), theirs(tokens).logits)
    assert (merged(tokens) - base(tokens)).abs().max() > 0.01
    again = reference.Llama.build(out_dir / "merged")
    assert_close(reference.forward(again.weights, again.args, tokens[0].tolist()), merged(tokens)[0])
    assert Llama.build(out_dir / "merged", device="cpu").tokenizer.n_words == 560
    assert newest_checkpoint(out_dir) == out_dir / "merged"


@pytest.mark.parametrize("flags", [dict(), dict(quantize="int8", activation_checkpointing=True)], ids=str)
def test_a_resumed_run_continues_exactly(corpus, tmp_path, flags):
    whole = train(corpus, tmp_path / "whole", **flags)
    shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    shutil.rmtree(tmp_path / "parts" / "step_000006")
    shutil.rmtree(tmp_path / "parts" / "merged")
    llama31.train(out_dir=str(tmp_path / "parts"), resume=True, device="cpu")  # The record has the flags.
    for name in "step_000006", "merged":
        file = WEIGHTS if name != "merged" else "consolidated.00.pth"
        assert (tmp_path / "parts" / name / file).read_bytes() == (whole / name / file).read_bytes()


def test_the_base_keeps_its_type_and_what_is_not_adapted_its_bytes(folder, tmp_path):
    model = llama31.load_checkpoint(folder / "ckpt").to(torch.bfloat16)
    write_checkpoint(folder / "ckpt", model)
    base = read_weights(folder / "ckpt")
    merged = read_weights(train(folder, tmp_path / "out", steps=2) / "merged")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, base[name]) == (not name.removesuffix(".weight").endswith(MATRICES))


@pytest.mark.parametrize("changes, said", [
    (dict(lora_rank=4), "lora_rank 3; found lora_rank 4: resume with the same"),
    (dict(lora_alpha=1.0), "lora_alpha None; found lora_alpha 1.0"),
    (dict(quantize="int8"), "quantize None; found quantize int8"),
    ("base", r"base .*consolidated.00.pth \(SHA-256 .*resume with the same")], ids=str)
def test_a_run_is_not_resumed_on_another_base(folder, tmp_path, changes, said):
    train(folder, tmp_path / "out", steps=2)
    if changes == "base":
        write_checkpoint(folder / "ckpt", random_model(9, dim=32, vocab_size=560))
        changes = {}
    with pytest.raises(ValueError, match=said) as caught:
        train(folder, tmp_path / "out", resume=True, steps=4, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags, said", [
    (dict(lora_rank=-1), "lora_rank is -1"), (dict(lora_rank=0, quantize="int8"), "--lora_rank, too"),
    (dict(lora_rank=0, lora_alpha=2.0), "--lora_rank, too"),
    (dict(param_dtype="bfloat16"), "param_dtype is bfloat16; expected float32"),
    (dict(lora_rank=0, param_dtype="int8"), "expected float32 or bfloat16"),
    (dict(lora_alpha=0.0), "a number above 0"),
    (dict(quantize="int4"), "expected int8 or None"), (dict(ckpt_dir=None), "found neither --ckpt_dir")],
    ids=str)
def test_a_wrong_flag_is_named_before_anything_is_written(corpus, tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        train(corpus, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_is_no_model(corpus, tmp_path):
    out_dir = train(corpus, tmp_path / "out", steps=2)
    with pytest.raises(FileNotFoundError, match="an adapter alone: python convert.py merge BASE"):
        Llama.build(out_dir / "step_000002", device="cpu")


# -----------------------------------------------------------------------------
# PEFT's files


def peft_adapter(folder, model, **settings):
    """An adapter that peft makes on transformers' model, with numbers in all of its matrices."""
    peft = pytest.importorskip("peft")
    defaults = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"],
                    task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hugging_face(model.args, copy.deepcopy(model.state_dict())),
                                 peft.LoraConfig(**{**defaults, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("settings", [
    dict(), dict(use_rslora=True), dict(target_modules="all-linear", r=2), dict(layers_to_transform=[1])],
    ids=str)
def test_an_adapter_of_peft_is_merged_as_peft_computes_it(settings, tokenizer, tmp_path):
    model = random_model(6, vocab_size=tokenizer.n_words)
    base = write_checkpoint(tmp_path / "base", model, 2, tokenizer=tokenizer)
    theirs = peft_adapter(tmp_path / "adapter", model, **settings)
    convert.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = Llama.build(tmp_path / "merged", device="cpu", compile=False)
    tokens = random_tokens(2, 21)
    assert_close(merged.model(tokens), theirs(tokens).logits)
    assert merged.tokenizer.n_words == tokenizer.n_words
    with pytest.raises(FileExistsError):
        convert.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    convert.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "half"), dtype="bfloat16")
    weights = read_weights(tmp_path / "merged")
    for name, tensor in read_weights(tmp_path / "half").items():
        assert torch.equal(tensor, weights[name].to(torch.bfloat16))


@pytest.mark.parametrize("settings, said", [
    (dict(rank_pattern={"q_proj": 2}), "rank_pattern is .*q_proj.*expected {}"),
    (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern is "), (dict(use_dora=True), "use_dora is true"),
    (dict(bias="all"), "bias is .all."),
    (dict(modules_to_save=["lm_head"]), "modules_to_save is .*lm_head"),
    (dict(target_modules=["q_proj", "lm_head"]), "lm_head.lora_A.weight is .*expected absent")], ids=str)
def test_an_adapter_of_another_kind_is_refused_by_name(settings, said, tmp_path):
    model = random_model(6)
    base = write_checkpoint(tmp_path / "base", model)
    peft_adapter(tmp_path / "adapter", model, **settings)
    with pytest.raises(ValueError, match=said) as caught:
        convert.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("edit, said", [
    (lambda f: (f / CONFIG).unlink(), "adapter_config.json: no such file"),
    (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json"),
    (lambda f: (f / CONFIG).write_text("{}"), "r is null; expected a whole number"),
    (lambda f: (f / CONFIG).write_text('{"peft_type": "IA3"}'), "peft_type is .IA3."),
    (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "damaged"),
    (lambda f: edit_tensors(f, lambda t: t.popitem()), "is missing, expected"),
    (lambda f: edit_tensors(f, lambda t: t.clear()), "no tensor")])
def test_a_damaged_adapter_is_one_line(edit, said, tmp_path):
    model = random_model(6)
    base = write_checkpoint(tmp_path / "base", model)
    save_adapters(tmp_path / "adapter", model.args, [adapters_of(adapted(model))], alpha=5.0,
                  base=base)
    edit(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        convert.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


# -----------------------------------------------------------------------------
# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("processes, flags", [(2, []), (2, ["--fsdp"]), (3, ["--fsdp", "--quantize=int8"]),
                                              (2, ["--quantize=int8"])], ids=str)
def test_several_processes_have_the_losses_of_one(corpus, tmp_path, processes, flags):
    words = ["llama31.py", "train", f"--train_data={corpus}/train.bin", f"--val_data={corpus}/val.bin",
             f"--ckpt_dir={corpus}/ckpt", "--seq_len=16", "--steps=6", "--eval_interval=3", "--eval_steps=6",
             "--lr=1e-2", "--total_batch_tokens=192", "--device=cpu", "--dtype=float32",
             f"--lora_rank={RANK}"]
    for count in (1, processes):
        given = [flag for flag in flags if count > 1 or flag != "--fsdp"]
        ended = run(*forked(count, *words, f"--out_dir={tmp_path}/{count}", f"--batch_size={12 // count}",
                              *given))
        assert ended.returncode == 0, ended.stderr[-6000:]
    one, several = tmp_path / "1", tmp_path / str(processes)
    for a, b in zip(untimed(read_log(one)), untimed(read_log(several)), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    found, expected = (load_file(path / "step_000006" / WEIGHTS) for path in (several, one))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert read_weights(several / "merged").keys() == read_weights(corpus / "ckpt").keys()
