"""GGUF files as llama.cpp reads them: weights, logits, ids, ends of texts, chats; what is refused."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from templates import TEMPLATES, write_folder
from tiny import NARROW, RESCALED, SCALED, WIDE, random_model, run, sentences, write_checkpoint

import convert
import peers
from llama31 import Llama, Transformer
from plumbing import gguf_file
from tokenizer import Tokenizer, word_splitter

gguf = pytest.importorskip("gguf")

# -----------------------------------------------------------------------------
# Weights


@pytest.fixture
def llama_cpp(monkeypatch):
    """The package, computing attention in float32; by default it rounds keys and values to float16."""
    llama_cpp = pytest.importorskip("llama_cpp")
    default = llama_cpp.llama_context_default_params

    def exact():
        settings = default()
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return settings
    monkeypatch.setattr(llama_cpp, "llama_context_default_params", exact)
    return llama_cpp


def written(path, model, dtype="f32", **settings):
    """The GGUF file of a model without a vocabulary."""
    ckpt_dir = write_checkpoint(path / "ckpt", model)
    convert.to_gguf(str(ckpt_dir), str(path / "model.gguf"), dtype=dtype, **settings)
    return path / "model.gguf"


@pytest.mark.parametrize("dtype, bound", [("f32", 0), ("f16", 2 ** -11), ("bf16", 2 ** -8), ("q8_0", 0.005)])
def test_a_file_holds_the_weights_within_the_dtypes_rounding(dtype, bound, tmp_path):
    model = random_model(**SCALED, multiple_of=32)
    path = written(tmp_path, model, dtype)
    reader = gguf.GGUFReader(path)
    found = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    state = model.state_dict()
    assert len(found) == len(state) + 1 and found["rope_freqs.weight"].shape == (16,)
    for name, theirs in (("blk.1.attn_q.weight", "layers.1.attention.wq.weight"),
                         ("blk.0.ffn_down.weight", "layers.0.feed_forward.w2.weight"),
                         ("token_embd.weight", "tok_embeddings.weight"),
                         ("output.weight", "output.weight"), ("output_norm.weight", "norm.weight")):
        expected = state[theirs]
        assert (found[name] - expected).abs().max() <= bound * expected.abs().max()
        assert name == "output_norm.weight" or dtype == "f32" or (found[name] != expected).any()


@pytest.mark.parametrize("stored, expected", [(torch.float32, "F32"), (torch.bfloat16, "BF16"),
                                              (torch.float16, "F16")])
def test_without_a_dtype_matrices_keep_the_type_they_are_stored_in(stored, expected, tmp_path):
    path = written(tmp_path, random_model(tie_word_embeddings=True).to(stored), None)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == expected and kinds["output_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied


def logits_of(path, tokens):
    """llama.cpp's logits of the last token."""
    theirs = peers.LlamaCpp(path, 128, 1)
    theirs.step([tokens], [0])
    row = theirs.cpp.llama_get_logits_ith(theirs.context, len(tokens) - 1)
    return torch.tensor(row[:theirs.vocab_size])


@pytest.mark.parametrize("changes", [dict(), NARROW, WIDE, SCALED, RESCALED], ids=str)
def test_llama_cpp_has_our_greedy_tokens_on_heads_of_any_width(changes, tmp_path, llama_cpp):
    model = random_model(**changes)
    theirs = peers.LlamaCpp(written(tmp_path, model), 64, 1)
    row = [3, 1, 4, 1, 5]
    row += theirs.step([row], [0])
    while len(row) < 30:
        row += theirs.step([row[-1:]], [len(row) - 1])
    assert row == Llama(model, None).generate([row[:5]], 25, temperature=0, echo=True)[0]


@pytest.mark.parametrize("dtype, bound", [("f32", 1e-5), ("f16", 5e-3), ("bf16", 5e-2), ("q8_0", 5e-2)])
def test_logits_are_ours_within_the_dtypes_rounding(dtype, bound, tmp_path, llama_cpp):
    model = random_model(**SCALED, multiple_of=32)
    tokens = torch.randint(101, (1, 100), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)[0, -1].detach()
    found = logits_of(written(tmp_path, model, dtype), tokens[0].tolist())
    assert (found - expected).abs().max() <= bound * expected.abs().max()

# -----------------------------------------------------------------------------
# Texts


def splitter(name):
    from tokenizers import Regex, pre_tokenizers
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "llama-bpe":
        return word_splitter()
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name == "qwen2":
        split, _ = json.loads(word_splitter().__getstate__())["pretokenizers"]
        pattern = split["pattern"]["Regex"].replace("{1,3}", "")
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return words


SPLITTERS = "llama-bpe", "smollm", "qwen2", "gpt-2"
KINDS = [*SPLITTERS, "ours", pytest.param("llama3", marks=pytest.mark.slow),
         pytest.param("smollm2", marks=pytest.mark.weights)]


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory, request):
    """name -> (our Tokenizer, llama.cpp's of the file that to_gguf makes), made when first asked for."""
    base = tmp_path_factory.mktemp("vocabularies")
    made = {}

    def vocabulary(name):
        llama_cpp = pytest.importorskip("llama_cpp")
        if name not in made:
            folder = base / name
            tokenizer = None
            if name in SPLITTERS:
                write_folder(folder, None, "<|im_start|>", "<|im_end|>")
                data = json.loads((folder / "tokenizer.json").read_text())
                data["pre_tokenizer"] = json.loads(splitter(name).__getstate__())
                (folder / "tokenizer.json").write_text(json.dumps(data))
            elif name == "smollm2":
                folder.mkdir()
                request.getfixturevalue("smollm2_tokenizer").save_pretrained(folder)
            elif name == "ours":
                tokenizer = request.getfixturevalue("tokenizer")
            else:
                meta = pytest.importorskip("llama_models.llama3.tokenizer")
                tokenizer = Tokenizer(Path(meta.__file__).parent / "tokenizer.model")
            tokenizer = tokenizer or Tokenizer(folder / "tokenizer.json")
            # A row more than tokens, as in embeddings that are padded; Meta's have none.
            rows = tokenizer.n_words + (tokenizer.model_path.endswith(".json"))
            model = random_model(dim=32, n_layers=1, vocab_size=rows, tie_word_embeddings=True)
            is_meta = tokenizer.model_path.endswith(".model")
            write_checkpoint(folder, model, tokenizer=tokenizer if is_meta else None)
            convert.to_gguf(str(folder), str(base / f"{name}.gguf"), dtype="f16")
            made[name] = tokenizer, llama_cpp.Llama(str(base / f"{name}.gguf"), n_ctx=64, verbose=False)
        return made[name]
    return vocabulary


@settings(deadline=None, derandomize=True, max_examples=150)
@example(text="<|im_start|>user <|eot_id|><think>").via("special tokens that a text spells")
@example(text=" việc hợp nhiều mektedir").via("tokens of Llama 3 that no merges make")
@given(text=st.one_of(
    st.text(), st.text(st.sampled_from("ab 's'tLL1203 \t\n\r\u00a0\u3000éŉ你🦙<|>_-!\u0301١²Ⅷ")),
    st.lists(st.sampled_from(["it's", "DON'T", "12345", "\n\n", " \n ", "  ", "the cat", "\r\n", "日本語",
                              "Привет", "नमस्ते", "👩‍👩‍👧", "<|eot_id|>", "[PAD]"])).map("".join)))
@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_has_our_ids_for_any_text(text, name, vocabularies):
    text = text.replace("\0", "")  # C's strings end there.
    ours, theirs = vocabularies(name)
    data = text.encode("utf-8", "replace")
    assert theirs.tokenize(data, add_bos=False, special=False) == ours.encode(data.decode())


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_begins_and_ends_texts_where_we_do(name, vocabularies):
    ours, theirs = vocabularies(name)
    assert theirs.tokenize(b"a cat", add_bos=True) == ours.encode("a cat", bos=True)
    assert theirs.token_eos() == ours.eos_id
    vocab = theirs._model.vocab
    cpp = sys.modules["llama_cpp"]
    assert all(cpp.llama_vocab_is_eog(vocab, token) for token in ours.stop_tokens)
    for special, i in ours.special_tokens.items():
        assert theirs.tokenize(special.encode(), add_bos=False, special=True) == [i]


@pytest.mark.parametrize("name", ["llama31", "smollm2", "deepseek", "phi"])
def test_llama_cpp_renders_the_folders_chat_template(name, tmp_path, llama_cpp):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    template, bos, eos, _ = TEMPLATES[name]
    folder = write_folder(tmp_path / "hf", template, bos, eos)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    write_checkpoint(folder, random_model(vocab_size=tokenizer.n_words))
    convert.to_gguf(str(folder), str(tmp_path / "model.gguf"), dtype="f16")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False)
    render = Jinja2ChatFormatter(theirs.metadata["tokenizer.chat_template"], eos_token=eos or "",
                                 bos_token=theirs._model.token_get_text(theirs.token_bos()) if bos else "")
    dialog = [{"role": "user", "content": "One day"}, {"role": "assistant", "content": "it rained."},
              {"role": "user", "content": "And then?"}]
    text = render(messages=dialog).prompt
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode_dialog(dialog)


def test_metas_chats_are_rendered_as_by_encode_dialog(tokenizer, tmp_path, llama_cpp):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    write_checkpoint(tmp_path / "ckpt", random_model(vocab_size=tokenizer.n_words), tokenizer=tokenizer)
    convert.to_gguf(str(tmp_path / "ckpt"), str(tmp_path / "model.gguf"))
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False)
    render = Jinja2ChatFormatter(theirs.metadata["tokenizer.chat_template"], eos_token="",
                                 bos_token="<|begin_of_text|>")
    dialog = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " One day "}]
    text = render(messages=dialog).prompt
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode_dialog(dialog)

# -----------------------------------------------------------------------------
# What is refused, and what is left behind


@pytest.fixture
def folder(tmp_path):
    """A checkpoint directory with a small tokenizer.json."""
    folder = write_folder(tmp_path / "ckpt", None, "<|im_start|>", "<|im_end|>")
    write_checkpoint(folder, random_model(vocab_size=Tokenizer(folder / "tokenizer.json").n_words))
    return folder


def change(path, changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


GROUPED = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("changes, said", [
    (dict(pre_tokenizer=GROUPED), "no name for .*, Digits and ByteLevel; expected one of"),
    (dict(pre_tokenizer=PREFIXED), "no name for .*, ByteLevel; expected one of"),
    (dict(normalizer={"type": "NFC"}), "no name for .*, NFC and Split and ByteLevel; expected one of")])
def test_a_splitter_that_llama_cpp_has_no_name_for_is_refused(changes, said, folder, tmp_path):
    change(folder / "tokenizer.json", changes)
    with pytest.raises(ValueError, match=said):
        convert.to_gguf(str(folder), str(tmp_path / "model.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]


def test_a_token_that_llama_cpp_would_read_otherwise_is_refused(folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["ignore_merges"] = False
    merged = next(token for token in data["model"]["vocab"] if len(token) == 3)
    data["model"]["merges"] = [merge for merge in data["model"]["merges"] if "".join(merge) != merged]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no merges lead to the token"):
        convert.to_gguf(str(folder), str(tmp_path / "model.gguf"))


def test_more_ends_of_a_text_than_a_file_can_name_are_refused(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 7, 8]}))
    with pytest.raises(ValueError, match="found 5 tokens that end a text, expected at most 3"):
        convert.to_gguf(str(folder), str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("words, said", [
    (["--dtype", "int4"], "dtype is int4; expected one of f32, f16, bf16, q8_0"),
    (["--dtype", "q8_0"], "rows of 176 weights, expected a multiple of 32 for q8_0")])
def test_a_type_that_the_file_cant_have_is_one_line(words, said, folder, tmp_path):
    done = run("convert.py", "to_gguf", folder, tmp_path / "model.gguf", *words)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]


def test_a_file_that_exists_stays_as_it_is(folder, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="model.gguf exists; give another name"):
        convert.to_gguf(str(folder), str(tmp_path / "model.gguf"))
    assert (tmp_path / "model.gguf").read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def write_tensor_data(self, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_tensor_data)
    with pytest.raises(OSError, match="No space left on device; make room"):
        convert.to_gguf(str(folder), str(tmp_path / "model.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]


def test_without_the_package_the_remedy_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf"):
        convert.to_gguf(str(folder), str(tmp_path / "model.gguf"))


def test_a_folder_without_a_tokenizer_is_converted_and_it_is_said(tmp_path, capsys):
    path = written(tmp_path, random_model())
    assert "no tokenizer, so the file is for token ids alone" in capsys.readouterr().err
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "no_vocab"


def test_few_tensors_at_a_time_are_made(tmp_path, monkeypatch):
    """Each is written before the next is merged."""
    order = []
    merged, write = convert.merged, gguf.GGUFWriter.write_tensor_data

    def noted(*args):
        for name, tensor in merged(*args):
            order.append(name)
            yield name, tensor
    monkeypatch.setattr(convert, "merged", noted)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *args: order.append("") or write(*args))
    written(tmp_path, random_model())
    assert order[1::2] == [""] * len(Transformer.on_meta(random_model().args).state_dict())

# -----------------------------------------------------------------------------
# Real weights


@pytest.mark.weights
def test_smollm2_gives_the_same_greedy_texts(smollm2_dir, smollm2_tokenizer, tmp_path, llama_cpp):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for path in Path(smollm2_dir).iterdir():
        (folder / path.name).symlink_to(path)
    smollm2_tokenizer.save_pretrained(folder)
    convert.to_gguf(str(folder), str(tmp_path / "model.gguf"), dtype="f32")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, verbose=False)
    ours = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=256)
    for prompt in sentences(5):
        tokens = ours.tokenizer.encode(prompt)
        assert theirs.tokenize(prompt.encode(), add_bos=False) == tokens
        theirs.reset()
        made = theirs.generate(tokens, temp=0, repeat_penalty=1.0)
        expected = ours.generate([tokens], 64, temperature=0, stop_tokens=[])[0]
        assert [next(made) for _ in range(64)] == expected
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = theirs.create_chat_completion(question, temperature=0, max_tokens=64, repeat_penalty=1.0)
    expected = ours.chat_completion([question], 64, temperature=0)[0]["generation"]["content"]
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert gguf_file.TYPES[0] == "f32"
