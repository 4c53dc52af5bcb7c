"""tokenizer.json as it comes: transformers' ids, the configs' roles, documents by marks, no row beyond."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch
from hugging_face import hugging_face
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import random_model, sentences, shard_tokens

import llama31
import reference
import tiny_stories
from llama31 import Llama
from plumbing import files
from plumbing.vocabularies import write_tokenizer_json
from plumbing.words import Words
from tokenizer import Tokenizer, find_tokenizer

meta = pytest.importorskip("llama_models.llama3.tokenizer")
transformers = pytest.importorskip("transformers")
META_TOKENIZER = Path(meta.__file__).parent / "tokenizer.model"
CONFIG = "tokenizer_config.json"
CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def change(path, edit):
    """Rewrites a JSON file; edit changes what it holds."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def add(data, i, content, special=False):
    data["added_tokens"].append(dict(id=i, content=content, special=special, single_word=False, lstrip=False,
                                     rstrip=False, normalized=False))


def rename(data, names):
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])


def derive(data):
    """What models made from Llama 3 do: other names, and tokens behind the last id, flagged or not."""
    rename(data, {"<|reserved_special_token_0|>": "<|im_start|>", "<|python_tag|>": "<｜Assistant｜>",
                  "<|reserved_special_token_1|>": "<|im_end|>"})
    add(data, 128256, "<think>")
    add(data, 128257, "<think>deep")
    add(data, 128258, "[PAD]", special=True)
    add(data, 128259, " \n ")


def write_digits(folder):
    """A small vocabulary with SmolLM2's splitter, single digits and GPT-2's pattern, and ChatML's names."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, pre_tokenizers, trainers
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = BPE(models.BPE(unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(sentences(300), trainers.BpeTrainer(
        vocab_size=500, special_tokens=names, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / CONFIG).write_text(json.dumps(CHATML | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Returns the folder of a vocabulary of a name, which is written when it is first asked for."""
    base = tmp_path_factory.mktemp("tokenizers")

    def folder(name):
        path = base / name
        if not path.exists():
            path.mkdir()
            if name == "digits":
                return write_digits(path)
            if name == "smollm2":
                try:
                    smollm2.tokenizer().save_pretrained(path)
                except smollm2.Unavailable as error:
                    pytest.skip(str(error))
                return path
            write_tokenizer_json(path, Tokenizer(META_TOKENIZER), 128)
            if name == "derived":
                change(path / "tokenizer.json", derive)
        return path
    return folder


@pytest.fixture
def digits(folders, tmp_path):
    """A copy of a small vocabulary's folder, to be changed."""
    return Path(shutil.copytree(folders("digits"), tmp_path / "digits"))


# -----------------------------------------------------------------------------
# Ids

PIECES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<think>deep", "<｜Assistant｜>",
          "[PAD]", "<|eot_id|>", "<|im_start", "|>", " ", "  ", " \n ", "it's", "DON'T", "12345", "\n\n",
          "ſ", "the cat", "\r\n"]
TEXTS = st.one_of(
    st.text(), st.text(st.sampled_from("ab 's'tLL1203 \t\n\r\u00a0\u3000éŉ你🦙<|>_-!\u0301\0")),
    st.lists(st.sampled_from(PIECES)).map("".join))
NAMES = ["digits", pytest.param("smollm2", marks=pytest.mark.weights),
         *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "derived"))]


@pytest.fixture(scope="session")
def pairs(folders):
    made = {}

    def pair(name):
        if name not in made:
            folder = folders(name)
            made[name] = (Tokenizer(folder / "tokenizer.json"),
                          transformers.AutoTokenizer.from_pretrained(folder))
        return made[name]
    return pair


@settings(deadline=None, derandomize=True, max_examples=25)
@example("").via("edge")
@example(" việc hợp nhiều mektedir").via("tokens of Llama 3 that no merges make")
@given(text=TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_text_has_the_ids_of_transformers(pairs, name, text):
    ours, theirs = pairs(name)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, allowed_special="all") == ids
    assert ours.encode(text, bos=True, allowed_special="all") == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    if not ours.spelled.search(text):
        assert ours.encode(text) == ids


@settings(deadline=None, derandomize=True, max_examples=25)
@given(text=TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_no_text_becomes_a_special_token_unasked(pairs, name, text):
    ours, _ = pairs(name)
    ids = ours.encode(text)
    assert not set(ids) & set(ours.special_tokens.values())
    if name != "smollm2":  # It has no token for some control characters, and leaves them out.
        assert ours.decode(ids) == text
        assert sum(ours.byte_lengths[i] for i in ids) == len(text.encode())


@pytest.mark.slow
def test_only_the_special_tokens_that_are_allowed_are_read(pairs):
    ours, _ = pairs("derived")
    text = "<think>a<think>deep<|im_end|>"
    assert 128256 in ours.encode(text, allowed_special=["<think>"])
    assert ours.encode(text, allowed_special=["<think>", "<think>deep"])[-1] < 128000
    assert ours.encode(text, allowed_special="<|im_end|>")[-1] == ours.special_tokens["<|im_end|>"]
    assert ours.encode("<think>deep", allowed_special="all") == [128257]
    with pytest.raises(ValueError, match="no special token {'<no>'}"):
        ours.encode("a", allowed_special="<no>")


@pytest.mark.slow
def test_llama_3s_own_tokenizer_json_is_metas_tokenizer(pairs):
    ours, _ = pairs("llama3")
    metas = Tokenizer(META_TOKENIZER)
    for name in ("n_words", "special_tokens", "bos_id", "eos_id", "eot_id", "eom_id", "pad_id",
                 "byte_lengths", "cuts_at_spaces"):
        assert getattr(ours, name) == getattr(metas, name), name
    assert ours.encode("\ud800 a", bos=True, eos=True) == metas.encode("\ud800 a", bos=True, eos=True)
    dialog = [{"role": "user", "content": " <|eot_id|> Hi\n"}, {"role": "assistant", "content": "Ho"}]
    assert ours.encode_dialog(dialog) == metas.encode_dialog(dialog)


def test_a_byte_without_a_token_is_left_out_and_becomes_no_special_one(digits):
    change(digits / "tokenizer.json", lambda data: data["model"]["vocab"].pop("Ā"))  # the byte 0
    ours = Tokenizer(digits / "tokenizer.json")
    assert ours.decode(ours.encode("a\0b")) == "ab"


def test_a_saved_truncation_or_padding_changes_no_ids(digits):
    whole = Tokenizer(digits / "tokenizer.json").encode("the cat sat on a mat")
    change(digits / "tokenizer.json", lambda data: data.update(
        truncation=dict(max_length=2, stride=0, strategy="LongestFirst", direction="Right"),
        padding=dict(strategy=dict(Fixed=64), direction="Right", pad_to_multiple_of=None, pad_id=0,
                     pad_type_id=0, pad_token="<|endoftext|>")))
    assert Tokenizer(digits / "tokenizer.json").encode("the cat sat on a mat") == whole


# -----------------------------------------------------------------------------
# Roles

GENERATION, MODEL = "generation_config.json", "config.json"


@pytest.mark.parametrize("configs, stops", [
    ({}, []),
    ({CONFIG: {"eos_token": "<|im_end|>"}}, [2]),
    ({CONFIG: {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}}, [2]),
    ({MODEL: {"eos_token_id": 0}, CONFIG: {"eos_token": "<|im_end|>"}}, [0, 2]),
    ({MODEL: {"eos_token_id": 40}, GENERATION: {"eos_token_id": [2, 0]}}, [2, 0]),  # a default that is wrong
    ({MODEL: {"eos_token_id": [1, 2]}, GENERATION: {"eos_token_id": None}}, [1, 2]),
    ({GENERATION: {"eos_token_id": [2, "<|endoftext|>", 2]}, CONFIG: {"eos_token": "<|im_start|>"}},
     [2, 0, 1])])
def test_stop_tokens_are_those_of_generate_then_the_tokenizers_own(digits, configs, stops):
    (digits / CONFIG).unlink()
    for name, content in configs.items():
        (digits / name).write_text(json.dumps(content))
    ours = Tokenizer(digits / "tokenizer.json")
    assert ours.stop_tokens == stops
    assert ours.eos_id == (stops[0] if stops else None)
    assert ours.encode("a", eos=True) == ours.encode("a") + stops[:1]


@pytest.mark.parametrize("configs, bos", [
    ({CONFIG: {"bos_token": "<|im_start|>"}, MODEL: {"bos_token_id": 1}}, None),  # as SmolLM2 has it
    ({CONFIG: {"bos_token": "<|im_start|>", "add_bos_token": False}}, None),
    ({CONFIG: {"bos_token": "<|im_start|>", "add_bos_token": True}}, 1),
    ({CONFIG: {"bos_token": {"content": "<|endoftext|>"}, "add_bos_token": True}}, 0),
    ({CONFIG: {"bos_token": "<|im_start|>", "add_bos_token": True}, MODEL: {"bos_token_id": 0}}, 0),
    ({CONFIG: {"add_bos_token": True}, MODEL: {"bos_token_id": 0}, GENERATION: {"bos_token_id": [1]}}, 1),
    ({CONFIG: {"add_bos_token": True}}, None)])
def test_without_a_template_texts_begin_with_a_bos_if_configs_say_so(digits, configs, bos):
    for name, content in configs.items():
        (digits / name).write_text(json.dumps(content))
    ours = Tokenizer(digits / "tokenizer.json")
    assert ours.bos_id == bos
    assert ours.encode("a", bos=True) == [*([] if bos is None else [bos]), *ours.encode("a")]


@pytest.mark.slow
def test_llama_3s_template_puts_bos_before_a_text_without_any_config(folders, tmp_path):
    shutil.copy(folders("llama3") / "tokenizer.json", tmp_path)
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.encode("a", bos=True, eos=True) == [128000, 64, 128001]
    assert ours.stop_tokens == [128001, 128009, 128008]


@pytest.mark.parametrize("file, content, found", [
    (GENERATION, {"eos_token_id": 500}, "eos_token_id is 500, expected ids or special tokens of"),
    (MODEL, {"eos_token_id": [2, 1.5]}, "eos_token_id is 1.5"), (MODEL, {"eos_token_id": True}, "is True"),
    (CONFIG, {"eos_token": "<|no|>"}, "eos_token is '<|no|>'"),
    (CONFIG, [], r"damaged, download it again: found \[\], expected an object")])
def test_a_role_without_a_token_is_named(digits, file, content, found):
    (digits / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}: .*{found}".replace("|", r"\|")) as error:
        Tokenizer(digits / "tokenizer.json")
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# What is refused


def unigram(data):
    data["model"] = dict(type="Unigram", unk_id=0, vocab=[["<unk>", 0.0], ["a", -1.0]])


@pytest.mark.parametrize("edit, found", [
    (unigram, "a Unigram model"),
    (lambda data: data.update(pre_tokenizer=dict(type="Metaspace", replacement="▁")),
     "a BPE model behind Metaspace"),
    (lambda data: data.update(pre_tokenizer=None), "a BPE model behind no splitter"),
    (lambda data: data.pop("model"), r"damage \(KeyError\('model'\)\)"),
    (lambda data: data.update(model=[]), "damage"),
    (lambda data: data["model"]["merges"].append(["a", "no"]), r"damage.*out of vocabulary"),
    (lambda data: data["model"]["vocab"].pop("!"), "no token for !"),
    (lambda data: data["model"]["vocab"].update(zz=-1), "ids that are not whole numbers"),
    (lambda data: data["model"]["vocab"].update(zz=2**31), "ids that are not whole numbers"),
    (lambda data: data["model"]["vocab"].update(zz=4), "ids that are not whole numbers, each of one token"),
    (lambda data: data["added_tokens"][0].update(lstrip=True), r"token '<\|endoftext\|>', which depends")])
def test_what_is_no_byte_level_bpe_is_refused_in_one_line(digits, edit, found):
    change(digits / "tokenizer.json", edit)
    message = f"tokenizer.json: found {found}.*, expected a byte-level BPE; "
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(digits / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_a_missing_or_damaged_file_is_named(digits):
    with pytest.raises(FileNotFoundError, match="none.json: no such file, expected one of Hugging Face's"):
        Tokenizer(digits / "none.json")
    (digits / "tokenizer.json").write_bytes(b'{"version": "1.0", ')
    with pytest.raises(ValueError, match="tokenizer.json: damaged, download it again"):
        Tokenizer(digits / "tokenizer.json")


def test_a_dialog_needs_the_special_tokens_of_llama_3s_format(pairs):
    ours, _ = pairs("digits")
    with pytest.raises(ValueError, match=r"has no <\|begin_of_text\|>, expected the special tokens"):
        ours.encode_dialog([{"role": "user", "content": "Hi"}])


# -----------------------------------------------------------------------------
# Models


def write_model(folder, rows):
    """Adds a random model to a tokenizer's folder; unhindered it nearly always draws rows behind the ids."""
    model = random_model(vocab_size=rows)
    with torch.no_grad():
        model.output.weight[Tokenizer(folder / "tokenizer.json").n_words:] *= 30
    hugging_face(model.args, model.state_dict()).save_pretrained(folder)
    return folder


def test_rows_beyond_the_vocabulary_are_never_drawn(digits):
    write_model(digits, 384)
    for llama in Llama.build(digits, device="cpu", compile=False), reference.Llama.build(digits):
        num_ids = llama.tokenizer.n_words
        assert num_ids < 384
        rows = llama.generate([[5, 6, 7], [8, 9, 300]], 40, temperature=3.0, stop_tokens=[])
        rows += llama.generate([[5, 6, 7]], 40, temperature=0.0, stop_tokens=[], repetition_penalty=1.2)
        assert [len(row) for row in rows] == [40, 40, 40] and max(map(max, rows)) < num_ids
    with pytest.raises(ValueError, match=f"ids from 5 to {num_ids}; expected 0 to {num_ids - 1}"):
        Llama.build(digits, device="cpu", compile=False).generate([[5, num_ids]], 1)


@pytest.mark.parametrize("build", [Llama.build, reference.Llama.build])
def test_a_token_without_a_row_is_named(digits, build):
    change(digits / "tokenizer.json", lambda data: add(data, 384, "<|pad|>", special=True))
    write_model(digits, 384)
    with pytest.raises(ValueError, match=r"token '<\|pad\|>' has id 384, expected ids below 384"):
        build(digits)


def test_greedy_texts_of_a_folder_are_those_of_transformers(digits):
    num_ids = Tokenizer(digits / "tokenizer.json").n_words
    write_model(digits, num_ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(digits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(digits)
    prompts = ["the cat 12", "Zoë saw 🦙 and", "a  big\n"]
    expected = [tokenizer.decode(theirs.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=30,
                                                 do_sample=False, eos_token_id=2)[0]) for prompt in prompts]
    ours = Llama.build(digits, device="cpu").text_completion(prompts, 30, temperature=0, echo=True)
    slow = reference.Llama.build(digits).text_completion(prompts, 30, temperature=0)
    assert [c["generation"] for c in ours] == expected
    assert [prompt + c["generation"] for prompt, c in zip(prompts, slow, strict=True)] == expected


def test_of_both_files_hugging_faces_counts_beside_a_config_json(digits):
    (digits / "config.json").write_text("{}")
    shutil.copy(META_TOKENIZER, digits)
    assert find_tokenizer(digits) == digits / "tokenizer.json"
    (digits / "tokenizer.json").unlink()
    assert find_tokenizer(digits) == digits / "tokenizer.model"


def test_metas_file_counts_where_a_folder_has_both(digits):
    assert find_tokenizer(digits) == digits / "tokenizer.json"
    shutil.copy(META_TOKENIZER, digits)
    assert find_tokenizer(digits) == digits / "tokenizer.model"
    assert find_tokenizer(digits / "none").name == "tokenizer.model"


# -----------------------------------------------------------------------------
# Documents


def test_records_are_encoded_whole_behind_bos_where_there_is_one(digits):
    story = "the cat  12 sat\n on"
    for bos in False, True:
        (digits / CONFIG).write_text(json.dumps(CHATML | {"add_bos_token": bos}))
        ours = Tokenizer(digits / "tokenizer.json")
        tokens = [1] * bos + ours.encode(story) + [2]
        spelled = "<|im_start|>" * bos + story + "<|im_end|>"
        for words, text in (Words(ours), story), (Words(ours, special=True), spelled):
            assert np.frombuffer(words.encode({"story": text}), "<u4").tolist() == tokens
        found = np.frombuffer(Words(ours).encode({"prompt": "the", "completion": " cat"}), "<u4")
        tokens = [1] * bos + ours.encode("the") + ours.encode(" cat") + [2]
        assert (found % files.MASKED).tolist() == tokens


def test_a_text_is_not_cut_where_a_splitter_joins_spaces_to_what_precedes(digits):
    def join(data):
        data["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=r"\S+ ?"), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)])
        data["model"]["vocab"]["eĠ"] = 383
        data["model"]["merges"].insert(0, ["e", "Ġ"])
    change(digits / "tokenizer.json", join)
    ours = Tokenizer(digits / "tokenizer.json")
    ids = ours.encode("the cat", eos=True)
    assert 383 in ids and np.frombuffer(Words(ours).encode({"story": "the cat"}), "<u4").tolist() == ids


def test_a_bos_within_documents_begins_none(digits, tmp_path):
    """BOS stands in every message: only marks, which its shards always have, tell where documents begin."""
    (digits / CONFIG).write_text(json.dumps(CHATML | {"add_bos_token": True}))
    turns = "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\nHo"
    for number, text in enumerate([turns, "the cat sat", *sentences(20)]):
        (tmp_path / f"{number}.txt").write_text(text)
    data = tmp_path / "data"
    tiny_stories.text(input=[str(tmp_path / "*.txt")], data_dir=str(data), num_workers=1, special=True,
                      tokenizer_path=str(digits / "tokenizer.json"))
    starts = 0
    num_bos = 0
    for path in data.glob("*.bin"):
        assert files.read_header(path).version == files.MARKING_VERSION
        stored = shard_tokens(path)
        starts += np.count_nonzero(stored & files.START)
        num_bos += np.count_nonzero(stored % files.START == 1)
        assert set(stored[(stored & files.START) > 0] % files.START) == {1}
    assert starts == 22 and num_bos == 23


@pytest.mark.slow
def test_a_folder_is_trained_resumed_and_sampled_with_its_own_tokenizer(digits, tmp_path, capsys):
    (digits / CONFIG).write_text(json.dumps(CHATML | {"add_bos_token": True}))
    (digits / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    write_model(digits, 384)
    change(digits / "config.json", lambda data: data.update(eos_token_id=[0, 2]))
    (tmp_path / "texts.txt").write_text("\n\n".join(sentences(40)))
    tiny_stories.text(input=[str(tmp_path / "texts.txt")], data_dir=str(tmp_path / "data"), num_workers=1,
                      separator="\\n\\n", tokenizer_path=str(digits / "tokenizer.json"))
    flags = dict(train_data=str(tmp_path / "data/train.bin"), out_dir=str(tmp_path / "out"), device="cpu")
    llama31.train(**flags, ckpt_dir=str(digits), batch_size=2, seq_len=32, steps=1, sample_interval=1)
    llama31.train(**flags, resume=True, steps=2)
    source = Tokenizer(digits / "tokenizer.json")
    folder = tmp_path / "out" / "step_000002"
    for llama in Llama.build(folder, device="cpu", compile=False), reference.Llama.build(folder):
        saved = llama.tokenizer
        assert Path(saved.model_path) == folder / "tokenizer.json"
        assert (saved.bos_id, saved.stop_tokens) == (source.bos_id, source.stop_tokens) == (1, [0, 2])
        assert saved.special_tokens == source.special_tokens
        assert llama.text_completion(["the cat"], 5)
    assert "SHA-256" not in capsys.readouterr().err
