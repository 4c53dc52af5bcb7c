"""Checkpoint directories: one file or many, tied or not, what can be wrong with them, their memory."""

import json
import re
import subprocess
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from tiny import RESCALED, SHAPE, WIDE, assert_close, output, random_model, write_checkpoint

import reference
from llama31 import Llama, ModelArgs, Transformer, save_checkpoint
from plumbing.answers import chosen
from plumbing.devices import choose_dtype, fast_dtype
from plumbing.mapped import split_dim

ARGS = {**SHAPE, **dict(n_heads=8, n_kv_heads=8, vocab_size=104)}  # what eight files can share
TOKENS = torch.arange(20)[None]


def model_of(seed=0, **changes):
    return random_model(seed, **{**ARGS, **changes})


def change_file(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def drop(name):
    return lambda state: state.pop(name)


def put(**tensors):
    return lambda state: state.update(tensors)


def error_of(folder, **settings):
    """The one line that Llama.build says."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Llama.build(folder, device="cpu", **settings)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("changes", [dict(), dict(tie_word_embeddings=True), dict(WIDE, n_kv_heads=4)])
@pytest.mark.parametrize("num_files", [1, 2, 4, 8])
def test_the_files_of_a_checkpoint_are_merged_into_the_same_weights(tmp_path, num_files, changes):
    model = model_of(**changes)
    write_checkpoint(tmp_path, model, num_files)
    loaded = Llama.build(tmp_path, device="cpu").model
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p), name
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == ("tie_word_embeddings" in changes)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    theirs = reference.Llama.build(tmp_path)
    assert all(torch.equal(theirs.weights[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("num_files", [1, 2])
def test_the_output_is_tied_if_declared_absent_or_equal_to_the_embedding(tmp_path, num_files):
    tied, untied = model_of(tie_word_embeddings=True), model_of()
    write_checkpoint(tmp_path, tied, num_files, without=["output.weight"])
    for declared in (True, False):
        (tmp_path / "params.json").write_text(json.dumps({**ARGS, "tie_word_embeddings": declared}))
        model = Llama.build(tmp_path, device="cpu").model
        assert model.output.weight is model.tok_embeddings.weight and model.args.tie_word_embeddings
        assert torch.equal(model(TOKENS), tied(TOKENS))
    write_checkpoint(tmp_path, tied, num_files)
    (tmp_path / "params.json").write_text(json.dumps(ARGS))
    model = Llama.build(tmp_path, device="cpu").model
    assert model.output.weight is model.tok_embeddings.weight and model.args.tie_word_embeddings
    write_checkpoint(tmp_path, untied, num_files)
    model = Llama.build(tmp_path, device="cpu").model
    assert model.output.weight is not model.tok_embeddings.weight and not model.args.tie_word_embeddings


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("stored, asked", [
    (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "float32"), (torch.float32, "bfloat16"),
    (torch.float16, torch.bfloat16)])
def test_weights_come_in_the_dtype_asked_for_or_as_stored(tmp_path, num_files, stored, asked):
    model = model_of()
    write_checkpoint(tmp_path, model.to(stored), num_files)
    loaded = Llama.build(tmp_path, device="cpu", dtype=asked).model
    expected = stored if asked is None else choose_dtype(asked)
    for name, p in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p.to(stored).to(expected)), name
        assert loaded.state_dict()[name].dtype == expected


def test_weights_of_mixed_dtypes_come_in_that_of_the_matrices(tmp_path):
    write_checkpoint(tmp_path, model_of().bfloat16())
    change_file(tmp_path / "consolidated.00.pth",
                lambda state: state.update({"norm.weight": state["norm.weight"].float()}))
    llama = Llama.build(tmp_path, device="cpu")
    assert {p.dtype for p in llama.model.parameters()} == {torch.bfloat16}
    assert len(llama.generate([[1, 2]], 3)[0]) == 3


def test_metas_rope_frequencies_in_the_files_are_ignored(tmp_path):
    model = model_of()
    write_checkpoint(tmp_path, model, 2)
    for i in range(2):
        change_file(tmp_path / f"consolidated.{i:02d}.pth", put(**{"rope.freqs": torch.ones(4)}))
    assert torch.equal(Llama.build(tmp_path, device="cpu").model(TOKENS), model(TOKENS))


def test_loading_draws_nothing_and_changes_no_global_state(tmp_path):
    write_checkpoint(tmp_path, model_of())
    before = torch.get_rng_state()
    Llama.build(tmp_path, device="cpu")
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def test_a_saved_checkpoint_carries_the_detected_rope_scale_factor(tmp_path, capsys):
    shape = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=1, ffn_dim_multiplier=0.001,
                 vocab_size=3, use_scaled_rope=True)
    (tmp_path / "published").mkdir()
    path = tmp_path / "published" / "params.json"
    path.write_text(json.dumps(shape))
    args = ModelArgs.from_json(path)
    assert args.rope_scale_factor == 32 and capsys.readouterr().err.count("rope_scale_factor is 32") == 1
    save_checkpoint(tmp_path / "saved", args, {})
    assert json.loads((tmp_path / "saved" / "llama31.json").read_text())["rope_scale_factor"] == 32
    assert ModelArgs.from_json(tmp_path / "saved" / "params.json").rope_scale_factor == 32
    assert capsys.readouterr().err == ""


METAS_FIELDS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
                "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope"}


@pytest.mark.parametrize("changes", [dict(), WIDE, dict(RESCALED, head_dim=6)])
def test_params_json_has_metas_fields_and_llama31_json_the_others(tmp_path, changes):
    model = random_model(**changes)
    save_checkpoint(tmp_path / "saved", model.args, model.state_dict())
    path = tmp_path / "saved" / "params.json"
    assert json.loads(path.read_text()).keys() == METAS_FIELDS
    assert ModelArgs.from_json(path) == model.args
    theirs = reference.Llama.build(tmp_path / "saved")
    logits = Llama.build(tmp_path / "saved", device="cpu", compile=False).model(TOKENS)
    assert_close(logits[0], reference.forward(theirs.weights, theirs.args, TOKENS[0]))


@pytest.mark.parametrize("file, field, value, said", [
    ("llama31.json", "head_dim", 7, "llama31.json: head_dim is 7"),
    ("llama31.json", "head_dims", 8, "llama31.json: unknown field head_dims"),
    ("llama31.json", "head_dim", 8, "tensors don't fit the configuration: layers.0.attention.wk.weight is"),
    ("params.json", "n_kv_heads", 3, "params.json: n_kv_heads is 3")])
def test_the_file_of_a_field_that_does_not_fit_is_named(tmp_path, file, field, value, said):
    model = random_model(**WIDE)
    save_checkpoint(tmp_path / "saved", model.args, model.state_dict())
    path = tmp_path / "saved" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert said in error_of(tmp_path / "saved")


@pytest.mark.parametrize("change, said", [
    (drop("layers.1.feed_forward.w2.weight"), r"layers.1.feed_forward.w2.weight is missing, expected \["),
    (drop("tok_embeddings.weight"), "tok_embeddings.weight is missing"),
    (put(extra=torch.ones(2)), r"extra is \[2\], expected absent"),
    (put(optimizer={"step": 3}), "optimizer is dict, expected absent"),
    (put(step=3), "step is int, expected absent"), (lambda state: state.update({3: 4}), "3 is int"),
    (put(**{"norm.weight": torch.ones(64).to_sparse()}), "norm.weight is torch.sparse_coo"),
    (put(**{"norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}), "norm.weight is .*float8"),
    (put(**{"norm.weight": torch.ones(63)}), r"norm.weight is \[63\], expected \[64\]"),
    (put(**{"norm.weight": torch.ones(64, dtype=torch.int8)}), "norm.weight is torch.int8"),
    (put(**{f"extra{i}": torch.ones(1) for i in range(9)}), "and 5 more")])
@pytest.mark.parametrize("num_files", [1, 2])
def test_tensors_that_do_not_fit_are_listed(tmp_path, num_files, change, said):
    write_checkpoint(tmp_path, model_of(), num_files)
    change_file(tmp_path / f"consolidated.{num_files - 1:02d}.pth", change)
    message = error_of(tmp_path)
    assert re.search(said, message)
    assert f"consolidated.{num_files - 1:02d}.pth" in message and len(message) < 700


def test_a_folder_without_weights_is_named_with_the_way_on(tmp_path):
    assert "no such file" in error_of(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(ARGS))
    assert "found no weights, expected consolidated.00.pth" in error_of(tmp_path)


def test_a_file_of_torchs_old_format_loads(tmp_path):
    model = model_of()
    write_checkpoint(tmp_path, model)
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(Llama.build(tmp_path, device="cpu").model(TOKENS), model(TOKENS))


def test_logits_that_are_not_finite_are_said(tmp_path):
    model = model_of()
    model.norm.weight.data[3] = float("nan")
    write_checkpoint(tmp_path, model)
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="logits are not all finite"):
            Llama.build(tmp_path, device="cpu").generate([[1, 2]], 3, temperature=temperature)


@pytest.mark.parametrize("lost", range(8))
def test_one_of_eight_files_missing_is_named(tmp_path, lost):
    write_checkpoint(tmp_path, model_of(), 8)
    (tmp_path / f"consolidated.{lost:02d}.pth").unlink()
    message = error_of(tmp_path)
    if lost < 7:
        assert f"no consolidated.{lost:02d}.pth" in message
    else:
        assert "found 7 files" in message and "is one missing?" in message


def test_files_of_different_models_are_not_mixed(tmp_path):
    write_checkpoint(tmp_path / "a", model_of(seed=1), 2)
    write_checkpoint(tmp_path / "b", model_of(seed=2), 2)
    (tmp_path / "b" / "consolidated.01.pth").replace(tmp_path / "a" / "consolidated.01.pth")
    assert "files of one model" in error_of(tmp_path / "a")
    write_checkpoint(tmp_path / "b", model_of(dim=128), 2)
    (tmp_path / "b" / "consolidated.01.pth").replace(tmp_path / "a" / "consolidated.01.pth")
    assert "tensors don't fit the configuration" in error_of(tmp_path / "a")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, kept):
    write_checkpoint(tmp_path, model_of())
    path = tmp_path / "consolidated.00.pth"
    content = path.read_bytes()
    path.write_bytes(content[:kept if kept > 1 else int(kept * len(content))])
    assert f"{path}: damaged" in error_of(tmp_path)


def test_pickled_objects_are_never_run(tmp_path):
    write_checkpoint(tmp_path, model_of())
    torch.save({"model": subprocess.Popen}, tmp_path / "consolidated.00.pth")
    assert "consolidated.00.pth: damaged, or not from torch.save" in error_of(tmp_path)
    torch.save([torch.ones(3)], tmp_path / "consolidated.00.pth")
    assert "found a list" in error_of(tmp_path)


def test_a_vocabulary_that_does_not_fit_the_tokenizer_is_named(tmp_path, tokenizer):
    write_checkpoint(tmp_path, model_of(), tokenizer=tokenizer)
    assert "has 560 tokens, the model 104" in error_of(tmp_path)


def free(monkeypatch, num_bytes):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": num_bytes}))


def test_weights_and_caches_larger_than_free_memory_are_refused(tmp_path, monkeypatch):
    model = model_of()
    write_checkpoint(tmp_path, model)
    size = sum(p.nbytes for p in model.parameters())
    free(monkeypatch, size - 1)
    assert "the weights of" in error_of(tmp_path)
    Llama.build(tmp_path, device="cpu", dtype="bfloat16")  # half the size
    free(monkeypatch, size)
    llama = Llama.build(tmp_path, device="cpu")
    cache = 2 * 2 * 3 * 20 * 64 * 4  # k and v, layers, rows, positions, heads, bytes
    free(monkeypatch, cache)
    assert len(llama.generate([[1] * 10] * 3, 10)) == 3
    free(monkeypatch, cache - 1)
    with pytest.raises(ValueError, match=r"3 x 20 tokens take 0.00 GB, cpu has 0.00 GB free"):
        llama.generate([[1] * 10] * 3, 10)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")
    save_checkpoint(tmp_path / "old", ModelArgs(**ARGS), {"a": torch.ones(3)})
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "new", ModelArgs(**ARGS), {"a": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


MEMORY = """
import json, sys
from llama31 import Llama
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
bare = peak()
llama = Llama.build(sys.argv[1], device="cpu", **json.loads(sys.argv[2]))
llama.generate([[1, 2, 3]], 2)
print(peak() - bare)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("tied, settings, most", [
    (False, dict(), 1.3), (False, dict(compile=False), 1.1),
    *((True, settings, most) for settings, most in (
        (dict(compile=False), 1.1), (dict(), 1.3), (dict(dtype="float32", compile=False), 1.1),
        (dict(dtype="float32"), 1.3), (dict(quantize="int8", compile=False), 1.1),
        (dict(quantize="int8"), 1.3)))])
def test_loading_takes_little_more_memory_than_the_weights(tied, settings, most, tmp_path):
    """What is compiled may take more, as its weights lie in other pages than their file's."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(dim=1024, n_layers=12, n_heads=8, vocab_size=20000,
                                      tie_word_embeddings=tied)).bfloat16()
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    if not tied:  # equal ones would be tied
        torch.nn.init.ones_(model.output.weight)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 300e6
    write_checkpoint(tmp_path, model)
    size *= {"dtype": 2, "quantize": 0.53}.get(next(iter(settings), None), 1)
    assert int(output("-c", MEMORY, tmp_path, json.dumps(settings))) <= most * size + 150e6


def test_split_dim_knows_every_tensor_of_the_model():
    dims = {name: split_dim(name) for name in model_of().state_dict()}
    assert {name.split(".")[-2] for name, dim in dims.items() if dim == 1} == {"wo", "w2"}
    assert {name.split(".")[-2] for name, dim in dims.items() if dim is None} == {
        "attention_norm", "ffn_norm", "norm"}


@pytest.fixture
def old_processor(monkeypatch):
    """A processor that multiplies bfloat16 slowly, whatever this one is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compile", [False, None])
@pytest.mark.usefixtures("old_processor")
def test_weights_stay_as_stored_where_arithmetic_is_in_float32(tied, stored, compile, tmp_path):
    source = model_of(tie_word_embeddings=tied).to(stored)
    write_checkpoint(tmp_path, source)
    llama = Llama.build(tmp_path, device="cpu", compile=compile)
    exact = Llama.build(tmp_path, device="cpu", dtype="float32", compile=False)
    assert {p.dtype for p in llama.model.parameters()} == {stored} and llama.model.dtype is torch.float32
    assert (llama.model.output.weight is llama.model.tok_embeddings.weight) == tied
    state = llama.model.state_dict()
    assert state.keys() == source.state_dict().keys()
    assert all(torch.equal(state[name], p) for name, p in source.state_dict().items())
    kind = "bfloat16" if stored is torch.bfloat16 else "float16"
    assert chosen(llama.model).startswith(f"weights in {kind}, arithmetic in float32, on cpu")
    tokens = torch.arange(20).view(2, 10)
    assert_close(llama.model(tokens), exact.model(tokens))
    for start in (0, 7):  # a prompt, and behind it single tokens
        logits = []
        for each in (llama, exact):
            steps = each.steps([[1, 2, 3, 4]], start + 1, temperature=0, stop_tokens=[])
            logits.append([step for step, _ in steps][-1])
        assert_close(*logits)


@pytest.mark.parametrize("device, stored, able, expected", [
    ("cpu", None, True, torch.bfloat16), ("cpu", None, False, torch.float32),
    ("cpu", torch.bfloat16, True, torch.bfloat16), ("cpu", torch.bfloat16, False, torch.float32),
    ("cpu", torch.float16, True, torch.float32), ("cpu", torch.float32, True, torch.float32),
    ("cpu", torch.float64, True, torch.float64), ("cuda", torch.float32, True, torch.bfloat16),
    ("cuda", torch.bfloat16, False, torch.float16), ("cuda", None, True, torch.bfloat16),
    ("cuda", None, False, torch.float32)])
def test_the_default_type_is_fast_and_loses_nothing_on_a_cpu(device, stored, able, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert fast_dtype(torch.device(device), stored) is expected


@pytest.mark.parametrize("name, amx, training", [
    ("Intel Xeon", False, torch.float32), ("Intel Xeon", True, torch.bfloat16),
    ("AMD EPYC", False, torch.bfloat16)])
def test_training_takes_the_type_whose_products_are_faster(name, amx, training, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    capabilities = {"avx512_bf16": True, "amx_bf16": amx, "cpu_name": name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert (fast_dtype(cpu), fast_dtype(cpu, torch.bfloat16)) == (training, torch.bfloat16)


def test_a_file_that_was_zipped_again_has_the_same_tensors(tmp_path):
    model = model_of()
    write_checkpoint(tmp_path, model)
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, data)
    state = Llama.build(tmp_path, device="cpu", compile=False).model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), lambda model: model.double()])
def test_a_model_that_changes_after_it_was_compiled_is_an_error(change, tmp_path):
    llama = Llama.build(write_checkpoint(tmp_path / "ckpt", model_of()), device="cpu")
    change(llama.model)
    with pytest.raises(ValueError, match="build it with compile=False"):
        llama.generate([[1, 2]], 2)
