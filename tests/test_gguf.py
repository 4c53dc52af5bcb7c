"""convert.py to_gguf: read by llama.cpp, its file has our ids, logits, texts, dialogs, stops and nats."""

import functools
import json
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import SCALED, output, random_model, random_tokens, sentences, write_checkpoint

import convert
import evaluate
from llama31 import Llama
from plumbing import cli, scoring
from plumbing.meta_vocabulary import SPLIT_PATTERN
from tokenizer import Tokenizer, find_tokenizer

gguf = pytest.importorskip("gguf")

llama_models = pytest.importorskip("llama_models.llama3.tokenizer")
META_TOKENIZER = Path(llama_models.__file__).parent / "tokenizer.model"
# RoPE is slowed from so few positions on that those of a test show it.
SLOWED = dict(SCALED, rope_old_context=32)
# How far logits may be off, as a part of the largest; llama.cpp also rounds what it multiplies weights by.
ROUNDING = {"f32": 1e-5, "f16": 5e-3, "bf16": 3e-2, "q8_0": 5e-2}


def open_gguf(path, **settings):
    """llama.cpp's model of a file, which keeps keys, values and logits in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    defaults = dict(n_ctx=256, logits_all=True, n_threads=2, type_k=0, type_v=0, verbose=False)
    return llama_cpp.Llama(str(path), **{**defaults, **settings})


def theirs_of(model, text, special):
    return model.tokenize(text.encode(), add_bos=False, special=special)


def logits_of(model, ids):
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[:len(ids)].copy())


def greedy(model, ids, new):
    """The new tokens that llama.cpp finds likeliest, one after the other."""
    made = []
    model.reset()
    for token in model.generate(ids, temp=0.0, reset=True):
        made.append(token)
        if len(made) == new:
            break
    return made


def stops_of(model, num_tokens):
    """The ids at which llama.cpp ends a text."""
    import llama_cpp
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    return {i for i in range(num_tokens) if llama_cpp.llama_vocab_is_eog(vocab, i)}


def dialog_ids(model, dialog):
    """The ids of a dialog by the template in the file, as llama-cpp-python makes them."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    eos, bos = (model._model.token_get_text(i) for i in (model.token_eos(), model.token_bos()))
    template = model.metadata["tokenizer.chat_template"]
    made = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=dialog)
    return theirs_of(model, made.prompt, special=True)


# -----------------------------------------------------------------------------
# Folders


def edit_json(path, edit):
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def with_splitter(data, splitter, ignore_merges=False):
    data.update(pre_tokenizer=splitter)
    data["model"].update(ignore_merges=ignore_merges)


def llama3s(data, pattern=None):
    if pattern:
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=pattern)
    data["model"].update(ignore_merges=False)


BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
DIGITS = dict(type="Digits", individual_digits=True)
OTHERS = {  # name of a pre-tokenizer -> what makes a tokenizer.json of Llama 3's kind one of that kind
    "dbrx": llama3s,
    "qwen2": lambda data: llama3s(data, SPLIT_PATTERN.replace("{1,3}", "")),
    "gpt-2": lambda data: with_splitter(data, BYTES),
    "smollm": lambda data: with_splitter(data, dict(type="Sequence", pretokenizers=[DIGITS, BYTES])),
}


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Name -> checkpoint directory: in Meta's layout small, and large with Meta's vocabulary; hf; OTHERS."""
    root = tmp_path_factory.mktemp("folders")
    model = random_model(3, vocab_size=tokenizer.n_words, max_seq_len=256, **SLOWED)
    write_checkpoint(root / "small", model, 2, tokenizer=tokenizer)
    meta = Tokenizer(META_TOKENIZER)
    model = random_model(4, dim=16, n_layers=1, n_heads=2, vocab_size=meta.n_words, tie_word_embeddings=True)
    write_checkpoint(root / "large", model, tokenizer=meta)
    convert.to_hf(root / "small", root / "hf")
    for name, edit in OTHERS.items():
        shutil.copytree(root / "hf", root / name)
        edit_json(root / name / "tokenizer.json", edit)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def file_of(folders, tmp_path_factory):
    """Returns the file of a folder of a name, in f32, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("files")

    @functools.cache
    def write(name):
        convert.to_gguf(folders[name], root / f"{name}.gguf", dtype="f32")
        return root / f"{name}.gguf"
    return write


@pytest.fixture(scope="module")
def pairs(folders, file_of):
    """Name of a folder -> (our tokenizer, llama.cpp's model)."""
    return {name: (Tokenizer(find_tokenizer(folder)), open_gguf(file_of(name)))
            for name, folder in folders.items()}


# -----------------------------------------------------------------------------
# Token ids

ALPHABETS = st.sampled_from(["abcxyz 's'tLL", "0123456789 .,", "\t\n\r \u00a0\u3000", "éŉßΩжשع",
                             "你好こ안नมไ",
                             "🦙👩\u200d🚀🇮🇹\u0301\ufe0f", "<|>_-!¡€²Ⅳ"])
TEXTS = st.one_of(st.text(st.characters(exclude_categories=["Cs", "Cn"])),
                  st.lists(ALPHABETS.flatmap(lambda letters: st.text(letters, max_size=8))).map("".join))
each_vocabulary = pytest.mark.parametrize("name", ["small", "large", "hf", *OTHERS])


@each_vocabulary
@settings(deadline=None, derandomize=True, max_examples=150)
@example("  two   three    \t\ttabs \n \n\n x").via("edge")
@example(" việc hợp nhiều mektedir").via("tokens of Llama 3 that no merges make")
@example("<|eot_id|><|begin_of_text|> [PAD3]").via("names are text")
@example("it's 2024 and 20, 202 of 12345").via("digits")
@given(text=TEXTS)
def test_any_text_has_our_ids(pairs, name, text):
    ours, theirs = pairs[name]
    assert theirs_of(theirs, text, special=False) == ours.encode(text)


@each_vocabulary
@settings(deadline=None, derandomize=True, max_examples=50)
@given(parts=st.lists(st.one_of(TEXTS, st.sampled_from(
    ["<|eot_id|>", "<|begin_of_text|>", "<|reserved_special_token_3|>", "<|end_header_id|>", " ", "\n\n"]))))
def test_special_tokens_that_are_spelled_have_our_ids(pairs, name, parts):
    ours, theirs = pairs[name]
    text = "".join(parts)
    assert theirs_of(theirs, text, special=True) == ours.encode(text, allowed_special="all")


@pytest.mark.parametrize("name", ["small", "large", "hf"])
def test_texts_begin_and_end_as_ours(pairs, name):
    ours, theirs = pairs[name]
    assert theirs.tokenize(b"a cat") == ours.encode("a cat", bos=True)
    assert stops_of(theirs, ours.n_words) == set(ours.stop_tokens)
    assert (theirs.token_bos(), theirs.token_eos()) == (ours.bos_id, ours.eos_id)


def test_texts_end_at_any_tokens_that_the_folder_names(folders, tmp_path):
    folder = shutil.copytree(folders["hf"], tmp_path / "hf")
    ours = Tokenizer(folder / "tokenizer.json")
    names = [f"<|reserved_special_token_{i}|>" for i in (7, 9, 11)]  # Of these llama.cpp knows nothing.
    ids = [ours.special_tokens[name] for name in names]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[:2]}))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(eos_token=names[2]))
    convert.to_gguf(folder, tmp_path / "model.gguf")
    assert stops_of(open_gguf(tmp_path / "model.gguf"), ours.n_words) >= set(ids)


@pytest.mark.parametrize("name", ["small", "large", "hf"])
def test_a_dialog_has_our_ids_by_the_template(pairs, name):
    ours, theirs = pairs[name]
    dialog = [dict(role="system", content=" Be  good.\n"), dict(role="user", content="Hi 🦙"),
              dict(role="assistant", content="Yes?"), dict(role="user", content="once upon a time")]
    assert dialog_ids(theirs, dialog) == ours.encode_dialog(dialog)


def test_a_chat_is_answered_as_by_us(folders, pairs):
    ours = Llama.build(folders["small"], device="cpu", dtype="float32", compile=False)
    dialog = [dict(role="user", content="once upon a time")]
    ids = ours.generate([ours.tokenizer.encode_dialog(dialog)], 12, temperature=0)[0]
    text = [i for i in ids if i not in ours.tokenizer.special_tokens.values()]  # They show nothing else.
    answer = pairs["small"][1].create_chat_completion(dialog, max_tokens=12, temperature=0)
    expected = ours.tokenizer.decode_bytes(text).decode(errors="ignore")
    assert answer["choices"][0]["message"]["content"] == expected != ""


# -----------------------------------------------------------------------------
# Numbers


def test_nats_per_token_are_those_of_llama_cpps_logits(folders, pairs, tmp_path, capsys):
    """evaluate.py's, over overlapping windows."""
    ours, theirs = pairs["small"]
    texts = [" ".join(sentences(20)), "a cat 🦙", *sentences(5, seed=3)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    evaluate.text(ckpt_dir=str(folders["small"]), input=[str(path)], max_seq_len=64, stride=16, json=True,
                  device="cpu")
    found = json.loads(capsys.readouterr().out)
    nats = []
    for text in texts:
        ids = np.array(ours.encode(text, bos=True))
        for window in scoring.windows_of(ids, np.ones(len(ids), bool), 64, 16):
            targets = torch.from_numpy(window.ids[1:])
            each = F.cross_entropy(logits_of(theirs, window.ids.tolist())[:-1], targets, reduction="none")
            nats += each[torch.from_numpy(window.is_scored[1:])].tolist()
    assert found["tokens"] == len(nats)
    assert found["nats_per_token"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ROUNDING)
def test_logits_are_ours_within_the_types_rounding(folders, tmp_path, dtype):
    convert.to_gguf(folders["small"], tmp_path / "model.gguf", dtype=dtype)
    ours = Llama.build(folders["small"], device="cpu", dtype="float32", compile=False)
    ids = random_tokens(1, 200, high=500)
    expected = ours.model(ids)[0]
    found = logits_of(open_gguf(tmp_path / "model.gguf"), ids[0].tolist())
    assert (found - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


def test_greedy_tokens_are_ours_in_f32(folders, pairs):
    ours = Llama.build(folders["small"], device="cpu", dtype="float32", compile=False)
    for seed in range(5):
        prompt = random_tokens(60, high=500, seed=seed).tolist()
        expected = ours.generate([prompt], 64, temperature=0, stop_tokens=[])[0]
        assert greedy(pairs["small"][1], prompt, 64) == expected


def test_both_layouts_give_the_same_file(file_of):
    assert file_of("small").read_bytes() == file_of("hf").read_bytes()


def test_rows_beyond_the_vocabulary_are_unused_tokens(folders, tmp_path):
    folder = shutil.copytree(folders["hf"], tmp_path / "hf")
    model = random_model(vocab_size=576)
    convert.to_hf(write_checkpoint(tmp_path / "meta", model), tmp_path / "wider")
    for name in "config.json", "model.safetensors":
        shutil.copy(tmp_path / "wider" / name, folder / name)
    convert.to_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.token_type"].contents()[559:] == [3] + [5] * 16
    names = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(names)) == 576 and names[560] == "[PAD560]"
    assert open_gguf(tmp_path / "model.gguf").n_vocab() == 576


def test_without_a_type_weights_keep_theirs(tokenizer, tmp_path):
    model = random_model(vocab_size=tokenizer.n_words).bfloat16()
    folder = write_checkpoint(tmp_path / "meta", model, tokenizer=tokenizer)
    convert.to_gguf(folder, tmp_path / "new" / "model.bin")
    convert.to_gguf(folder, folder / "model.gguf", dtype="bf16")
    assert (tmp_path / "new" / "model.bin").read_bytes() == (folder / "model.gguf").read_bytes()
    assert Llama.build(folder, device="cpu", compile=False)


PEAK = """
import sys
import convert
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
from plumbing.gguf_file import import_gguf; import_gguf()
bare = peak()
convert.to_gguf(sys.argv[1], sys.argv[2], dtype="q8_0")
print(peak() - bare)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_few_tensors_are_in_memory_at_a_time(tokenizer, layout, tmp_path):
    model = random_model(dim=1024, n_layers=16, n_heads=8, n_kv_heads=8, vocab_size=tokenizer.n_words)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 700e6
    write_checkpoint(tmp_path / "meta", model, tokenizer=tokenizer)
    del model
    if layout == "hf":
        convert.to_hf(tmp_path / "meta", tmp_path / "hf", max_file_bytes=10**8)
    assert int(output("-c", PEAK, tmp_path / layout, tmp_path / "model.gguf")) < 150e6


# -----------------------------------------------------------------------------
# What a user can get wrong


def test_the_command_line_writes_a_file_once(folders, file_of, tmp_path):
    path = tmp_path / "model.gguf"
    words = ["to_gguf", str(folders["small"]), str(path), "--dtype", "f32"]
    cli.run({"to_gguf": convert.to_gguf}, None, words)
    assert path.read_bytes() == file_of("small").read_bytes()
    with pytest.raises(SystemExit, match="error: .*model.gguf exists; give the name of a new file"):
        cli.run({"to_gguf": convert.to_gguf}, None, words)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def edit_tokenizer(edit):
    return lambda folder: edit_json(folder / "tokenizer.json", edit)


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / "tokenizer.json").unlink(), "found no tokenizer.model or tokenizer.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    (lambda folder: cut(folder / "model.safetensors"), "damaged"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    (lambda folder: edit_json(folder / "config.json", lambda data: data.update(vocab_size=9)), "don't fit"),
    (edit_tokenizer(lambda data: data["added_tokens"].append(
        dict(id=560, content="<|pad|>", special=True))), "id 560, expected ids below 560"),
    (edit_tokenizer(lambda data: data.update(normalizer=dict(type="NFC"))), "found normalizer NFC"),
    (edit_tokenizer(lambda data: llama3s(data, r"\w+|\s+")), r"found pre_tokenizer Split and .*w\+"),
    (edit_tokenizer(lambda data: with_splitter(data, BYTES, True)), "ByteLevel .* with ignore_merges"),
    (edit_tokenizer(lambda data: with_splitter(data, BYTES | dict(add_prefix_space=True))), "ByteLevel"),
    (edit_tokenizer(lambda data: data["model"].update(dropout=0.1)), "found dropout of its BPE"),
    (lambda folder: edit_json(folder / "generation_config.json", lambda data: data.update(
        eos_token_id=[300, 301, 302, 303])), "found 5 stop tokens, expected 1 to 3"),
])
def test_what_a_file_cannot_hold_is_refused_by_name(folders, damage, said, tmp_path):
    folder = shutil.copytree(folders["hf"], tmp_path / "hf")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        convert.to_gguf(folder, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_type_that_no_file_has_is_refused(folders, tmp_path):
    for dtype in "F32", "float32", "q4_0", 16:
        with pytest.raises(ValueError, match="expected f32, f16, bf16 or q8_0"):
            convert.to_gguf(folders["small"], tmp_path / "model.gguf", dtype=dtype)


def test_weights_too_large_for_f16_are_refused_by_name(tokenizer, tmp_path):
    model = random_model(vocab_size=tokenizer.n_words)
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 4] = 1e5
    folder = write_checkpoint(tmp_path / "meta", model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="blk.1.ffn_down.weight: found 1e.05, expected at most 65504"):
        convert.to_gguf(folder, tmp_path / "model.gguf", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_without_the_package_its_name_is_said(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        convert.to_gguf(folders["small"], tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [5_000, 200_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(folders, limit, tmp_path):
    """The size of files is limited where a disk's is hard to; both fail in the same write."""
    folder = folders["hf"]  # Nothing else is written on the way.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            convert.to_gguf(folder, tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# Real weights

PROMPTS = ["Water", "The capital of France is", "Once upon a time, there was a boy called Tom",
           "def add(a, b):", "Im Jahr 1923 fuhr die „Zoë“ über den See. 🚢"]


@pytest.fixture(scope="module")
def smollm2(smollm2_dir, smollm2_tokenizer, tmp_path_factory):
    """SmolLM2 with its tokenizer, and its file in f32."""
    root = tmp_path_factory.mktemp("SmolLM2")
    folder = root / "meta"
    folder.mkdir()
    for path in Path(smollm2_dir).iterdir():
        (folder / path.name).symlink_to(path)
    smollm2_tokenizer.save_pretrained(folder)
    convert.to_gguf(folder, root / "model.gguf", dtype="f32")
    return Llama.build(folder, device="cpu", dtype="float32", compile=False), open_gguf(root / "model.gguf")


@pytest.mark.weights
def test_real_greedy_tokens_are_the_same(smollm2):
    ours, theirs = smollm2
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt, bos=True)
        assert theirs.tokenize(prompt.encode()) == ids
        assert greedy(theirs, ids, 64) == ours.generate([ids], 64, temperature=0, stop_tokens=[])[0]


@pytest.mark.weights
def test_a_real_chat_has_the_same_answer(smollm2):
    ours, theirs = smollm2
    dialog = [dict(role="user", content="What is the capital of France?")]
    assert dialog_ids(theirs, dialog) == ours.tokenizer.encode_dialog(dialog)
    expected = ours.chat_completion([dialog], max_gen_len=64, temperature=0)[0]["generation"]["content"]
    answer = theirs.create_chat_completion(dialog, max_tokens=64, temperature=0)["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (expected, "stop")


@pytest.mark.weights
@settings(deadline=None, derandomize=True, max_examples=150)
@given(text=TEXTS)
def test_real_ids_are_the_same(smollm2, text):
    ours, theirs = smollm2
    assert theirs_of(theirs, text, special=False) == ours.tokenizer.encode(text)


@pytest.mark.weights
def test_eight_bits_take_about_half_of_sixteen(smollm2, tmp_path):
    folder = Path(smollm2[0].tokenizer.model_path).parent
    sizes = {}
    for dtype in "bf16", "q8_0":
        convert.to_gguf(folder, tmp_path / dtype, dtype=dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert 0.5 < sizes["q8_0"] / sizes["bf16"] < 0.56
