"""Hugging Face's folders as they come: right, or refused by what lies there; the numbers are Meta's."""

import json
import shutil

import pytest
import torch
from hugging_face import hugging_face
from safetensors.torch import load_file, save_file
from tiny import (
    NARROW,
    RESCALED,
    UNSLOWED,
    WIDE,
    assert_close,
    output,
    random_model,
    random_tokens,
    write_checkpoint,
)

import llama31
import reference
from llama31 import Llama
from plumbing import huggingface

pytest.importorskip("transformers")
TOKENS = random_tokens(2, 40)


def save(folder, model, max_shard_size="5GB", dtype=None):
    """Saves a model of ours as transformers does."""
    theirs = hugging_face(model.args, model.state_dict())
    theirs.to(dtype or torch.float32).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def change(path, edit):
    """Rewrites a safetensors file; edit changes its name -> tensor."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


SHAPES = [dict(), dict(tie_word_embeddings=True), dict(n_kv_heads=4), dict(n_kv_heads=1),
          dict(n_heads=2, use_scaled_rope=True, rope_scale_factor=8.0),
          dict(n_heads=2, use_scaled_rope=True, rope_scale_factor=32.0, rope_theta=1e6, norm_eps=1e-3),
          NARROW, dict(WIDE, dim=64, tie_word_embeddings=True), RESCALED, dict(UNSLOWED, head_dim=20)]


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("changes", SHAPES)
def test_a_folder_has_the_logits_of_metas(changes, max_shard_size, tmp_path):
    model = random_model(**changes)
    folder = save(tmp_path / "hf", model, max_shard_size)
    loaded = llama31.load_checkpoint(folder)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.args.tie_word_embeddings == model.args.tie_word_embeddings
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == model.args.tie_word_embeddings
    again = reference.Llama.build(folder)
    assert_close(reference.forward(again.weights, again.args, TOKENS[0].tolist()), model(TOKENS)[0])


def links(folder):
    """As the hub's cache has it: files are links into a folder of blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))


def mixed(folder):
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        change(path, lambda ts, dtype=dtype: ts.update({name: t.to(dtype) for name, t in ts.items()}))


STRAY = {"model.norm.weight": torch.ones(3)}


@pytest.mark.parametrize("size, edit", [
    ("5GB", links), ("40KB", links),
    ("40KB", lambda f: (f / huggingface.INDEX).unlink()),
    ("40KB", lambda f: save_file(STRAY, f / "model-00001-of-00099.safetensors")),
    ("5GB", lambda f: save_file(STRAY, f / "consolidated.safetensors")),
    ("5GB", lambda f: write_checkpoint(f / "original", random_model(seed=9))),
    ("5GB", lambda f: (f / "pytorch_model.bin").write_bytes(b"old"))])
def test_what_else_a_folder_has_changes_nothing(size, edit, tmp_path):
    model = random_model()
    folder = save(tmp_path / "hf", model, size)
    edit(folder)
    assert torch.equal(llama31.load_checkpoint(folder)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_weights_may_be_there_once_under_either_name(kept, tmp_path):
    model = random_model(tie_word_embeddings=True)
    folder = save(tmp_path / "hf", model)

    def edit(tensors):
        weight = tensors.pop("model.embed_tokens.weight")
        names = ["lm_head.weight", "model.embed_tokens.weight"] if kept == "both" else [kept]
        tensors.update({name: weight.clone() for name in names})
    change(folder / huggingface.SINGLE, edit)
    assert torch.equal(llama31.load_checkpoint(folder)(TOKENS), model(TOKENS))
    again = reference.Llama.build(folder)
    assert_close(reference.forward(again.weights, again.args, TOKENS[0].tolist()), model(TOKENS)[0])


def test_files_of_several_types_come_in_one_that_holds_them(tmp_path):
    model = random_model()
    folder = save(tmp_path / "hf", model, "40KB")
    mixed(folder)
    loaded = llama31.load_checkpoint(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    again = reference.Llama.build(folder)
    assert_close(loaded(TOKENS)[0], reference.forward(again.weights, again.args, TOKENS[0].tolist()))


def only(folder, *names):
    """Leaves nothing in a folder but config.json and new, empty files of these names."""
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize("edit, said", [
    (lambda f: only(f, "pytorch_model.bin"), "found pytorch_model.bin, PyTorch's old format: load it with"),
    (lambda f: only(f, "pytorch_model-00001-of-00002.bin"), "found pytorch_model-00001-of-00002.bin"),
    (lambda f: only(f, "adapter_config.json", "adapter_model.safetensors"), "found adapter_c.*an adapter"),
    (lambda f: only(f, "model.Q4_K.gguf"), "found model.Q4_K.gguf, llama.cpp's format"),
    (lambda f: only(f, "consolidated.safetensors"), "found consolidated.safetensors, Mistral's layout"),
    (lambda f: only(f, "original/consolidated.00.pth"), "found original.consolidated.00.pth, Meta's files"),
    (lambda f: only(f, "best/params.json", "step_000002/params.json"), "name the folder best in it"),
    (lambda f: only(f, "step_000002/params.json"), "found step_000002.*training's folder: name one"),
    (lambda f: only(f, "x.incomplete"), "found x.incomplete, a download that broke off"),
    (lambda f: only(f), "model.safetensors: no such file; found config.json; download it again"),
    (lambda f: only(f, "model-00001-of-00002.safetensors"), "model-00002-of-00002.*no such file|damaged"),
    (lambda f: shutil.copy(f / huggingface.SINGLE, f / "model-00001-of-00001.safetensors")
     and (f / huggingface.INDEX).write_text(json.dumps(
         {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}})),
     "found model.safetensors and model-00001-of-00001.safetensors, expected one of them"),
    (lambda f: only(f, huggingface.SINGLE, "model-00001-of-00002.safetensors"),
     "found model.safetensors and model-00001-of-00002.safetensors, expected one of them"),
    (lambda f: only(f, "model-00001-of-00001.safetensors", "model-00002-of-00002.safetensors"),
     "found parts of 00001 and of 00002 files, but no model.safetensors.index.json"),
    (lambda f: only(f, "model-a-of-b.safetensors"), "found model-a-of-b.safetensors, weights of another"),
    (lambda f: (f / huggingface.INDEX).write_text('{"weight_map": {}}'), "found no weight_map"),
    (lambda f: (f / "config.json").write_text(json.dumps(
        json.loads((f / "config.json").read_text()) | {"quantization_config": {"bits": 4}})),
     "quantization_config is .*expected None"),
    (lambda f: (f / "config.json").unlink(), "config.json: no such file, expected one of Hugging Face's")])
def test_a_folder_that_cannot_be_read_is_refused_by_what_lies_there(edit, said, tmp_path):
    folder = save(tmp_path / "hf", random_model())
    edit(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        Llama.build(folder, device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("changes, said", [
    (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "found rope_type yarn, expected default or"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "found rope_type linear"),
    (dict(hidden_act="gelu"), "found hidden_act gelu, expected silu"),
    (dict(sliding_window=64), "found sliding_window 64, expected None"),
    (dict(quantization_config=dict(bits=4)), "found quantization_config"),
    ("bias", "22 tensors, expected 21")])
def test_the_reference_refuses_what_is_no_llama(changes, said, tmp_path):
    folder = save(tmp_path / "hf", random_model())
    if changes == "bias":
        bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
        change(folder / huggingface.SINGLE, lambda tensors: tensors.update(bias))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"no Llama 3 in Meta's or Hugging Face's format .*{said}"):
        reference.Llama.build(folder)


def test_where_config_json_has_two_rope_thetas_the_inner_one_counts(tmp_path):
    model = random_model(rope_theta=7e4)
    folder = save(tmp_path / "hf", model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 100.0}))
    assert llama31.load_checkpoint(folder).args.rope_theta == 7e4
    assert reference.Llama.build(folder).args["rope_theta"] == 7e4


def test_a_folder_that_holds_no_model_is_named_with_what_it_holds(tmp_path):
    (tmp_path / "README.md").touch()
    (tmp_path / "empty").mkdir()
    for folder, said in [(tmp_path, "found README.md, empty; name a model's folder, theirs or Meta's"),
                         (tmp_path / "empty", "found nothing; name a model's folder"),
                         (tmp_path / "none", "found no such folder; fix the path")]:
        with pytest.raises(FileNotFoundError, match=said) as caught:
            Llama.build(folder, device="cpu")
        assert str(folder) in str(caught.value)


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    model = random_model()
    folder = save(tmp_path / "hf", model, "40KB")
    files = json.loads((folder / huggingface.INDEX).read_text())["weight_map"]
    name = "model.norm.weight"
    for file in set(files.values()) - {files[name]}:
        change(folder / file, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert torch.equal(llama31.load_checkpoint(folder)(TOKENS), model(TOKENS))
    again = reference.Llama.build(folder)
    assert_close(reference.forward(again.weights, again.args, TOKENS[0].tolist()), model(TOKENS)[0])


def test_a_file_in_place_of_its_folder_is_said_to_be_one(tmp_path):
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(FileNotFoundError, match="00.pth is a file; name the folder that it lies in"):
        Llama.build(tmp_path / "consolidated.00.pth", device="cpu")


def test_a_hub_cache_is_named_by_its_snapshots(tmp_path):
    save(tmp_path / "models--a--b" / "snapshots" / "abc", random_model())
    with pytest.raises(FileNotFoundError, match="found snapshots.abc, the hub's cache: name one of its"):
        Llama.build(tmp_path / "models--a--b", device="cpu")
    assert Llama.build(tmp_path / "models--a--b" / "snapshots" / "abc", device="cpu", compile=False)


@pytest.mark.slow
def test_commands_take_a_folder(tokenizer, corpus, tmp_path):
    model = random_model(vocab_size=tokenizer.n_words)
    folder = save(tmp_path / "hf", model)
    ours = write_checkpoint(tmp_path / "meta", model, tokenizer=tokenizer)
    words = ["--tokenizer_path", tokenizer.model_path, "--device", "cpu", "--prompt", "a cat",
             "--temperature", "0", "--max_gen_len", "9"]
    text = output("llama31.py", "--ckpt_dir", folder, *words)
    assert text == output("llama31.py", "--ckpt_dir", ours, *words)
    reference_words = [word for word in words if word not in ("--device", "cpu")]
    assert text == output("reference.py", "--ckpt_dir", folder, *reference_words)
    llama31.train(train_data=str(corpus / "train.bin"), ckpt_dir=str(folder), out_dir=str(tmp_path / "out"),
                  tokenizer_path=tokenizer.model_path, steps=1, seq_len=32, batch_size=2, device="cpu")
    assert Llama.build(tmp_path / "out" / "step_000001", device="cpu", compile=False).tokenizer


PEAK = """
import json, sys
from llama31 import Llama
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
bare = peak()
llama = Llama.build(sys.argv[1], device="cpu", compile=json.loads(sys.argv[2]))
llama.generate([[1, 2, 3]], 2)
print(peak() - bare)
"""


@pytest.mark.slow
@pytest.mark.parametrize("compile, most", [("false", 1.1), ("null", 1.3)])
def test_loading_takes_as_little_memory_as_metas_folder(compile, most, tmp_path):
    model = random_model(dim=1024, n_layers=12, n_heads=8, vocab_size=20000, n_kv_heads=8).bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    assert size > 300e6
    folder = save(tmp_path / "hf", model, dtype=torch.bfloat16)
    del model
    assert int(output("-c", PEAK, folder, compile)) <= most * size + 150e6
