"""The tokenizer against literal ids of Llama 3's vocabulary, Meta's own code and the tokenizers library."""

import base64
import json
import os
import random
import re
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiny import output

import tokenizer
from plumbing.messages import read_message, text_of
from plumbing.meta_vocabulary import SPELLED, SPLIT_PATTERN
from tokenizer import Tokenizer, train_tokenizer

meta = pytest.importorskip("llama_models.llama3.tokenizer")
datatypes = pytest.importorskip("llama_models.datatypes")
chat_format = pytest.importorskip("llama_models.llama3.chat_format")
PATH = Path(meta.__file__).parent / "tokenizer.model"
TOKENIZER, META = Tokenizer(PATH), meta.Tokenizer(PATH)

# ---------------------------------------------------------------- Llama 3's vocabulary


@pytest.mark.parametrize("text, ids", [
    ("", []),
    ("Hello world", [9906, 1917]),
    ("def f(x):\n    return x**2  # square\n",
     [755, 282, 2120, 997, 262, 471, 865, 334, 17, 220, 674, 9518, 198]),
    ("3.14159 2024 1234567", [18, 13, 9335, 2946, 220, 2366, 19, 220, 4513, 10961, 22]),
    ("I'm sure they'll say it's DON'T", [40, 2846, 2771, 814, 3358, 2019, 433, 596, 45373, 17773]),
    ("👩‍👩‍👧 🙂😀", [9468, 239, 102, 102470, 9468, 239, 102, 102470, 9468, 239, 100, 28584, 76460, 222]),
    ("你好，世界！", [57668, 53901, 3922, 102616, 6447]),
    ("  two   three    \t\ttabs ", [220, 1403, 256, 2380, 7938, 3324, 3518, 220]),
    ("a\n\n\nb\r\n\r\n \n c", [64, 1432, 65, 881, 720, 272]),
    (" " * 20, [3909]),
    ("\n\n\n\n", [1038]),
    ("Ünïcödé e\u0301 שלום العربية",
     [53591, 77, 38672, 66, 3029, 67, 978, 384, 54939, 88898, 50391, 37769, 251, 110356]),
    ("\ud800 \x00\x00", [5809, 220, 188, 188]),
    ("<|eot_id|>", [27, 91, 68, 354, 851, 91, 29]),
])
def test_literal_ids_of_llama_3(text, ids):
    assert TOKENIZER.encode(text) == ids
    assert TOKENIZER.encode(text, bos=True, eos=True) == [128000, *ids, 128001]
    assert TOKENIZER.decode(ids) == text.replace("\ud800", "\ufffd")


def test_literal_special_tokens_of_llama_3_1():
    named = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>",
             128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>",
             128009: "<|eot_id|>", 128010: "<|python_tag|>"}
    reserved = {128002: 0, 128003: 1, 128005: 2} | {i: i - 128008 for i in range(128011, 128256)}
    named |= {i: f"<|reserved_special_token_{number}|>" for i, number in reserved.items()}
    assert TOKENIZER.special_tokens == {name: i for i, name in named.items()}
    assert {i: TOKENIZER.decode([i]) for i in range(128000, 128256)} == named
    assert TOKENIZER.n_words == 128256
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (128000, 128001, 128004)
    assert (TOKENIZER.eom_id, TOKENIZER.eot_id) == (128008, 128009)
    assert sorted(TOKENIZER.stop_tokens) == [128001, 128008, 128009]


def test_special_tokens_are_ordinary_text_unless_asked():
    names = list(TOKENIZER.special_tokens)
    assert max(TOKENIZER.encode("".join(names))) < 128000
    assert TOKENIZER.encode("".join(names), allowed_special="all") == list(range(128000, 128256))
    assert TOKENIZER.encode("<|eot_id|><|eom_id|>", allowed_special=["<|eot_id|>"])[0] == 128009
    assert max(TOKENIZER.encode("<|eom_id|>", allowed_special=["<|eot_id|>"])) < 128000
    with pytest.raises(ValueError, match="no special token {'<.no.>'}"):
        TOKENIZER.encode("a", allowed_special="<|no|>")


@given(st.text())
def test_any_text_comes_back_and_has_metas_ids(text):
    ids = TOKENIZER.encode(text)
    assert ids == META.encode(text, bos=False, eos=False) and TOKENIZER.decode(ids) == text


@given(st.text(st.characters(categories=["Cs", "L", "N"]), max_size=20))
def test_text_with_surrogates_has_metas_ids(text):
    assert TOKENIZER.encode(text) == META.encode(text, bos=False, eos=False)


def test_byte_lengths_are_those_of_the_text_without_special_tokens():
    text = "Hello wörld 你好 👩‍👩‍👧\n"
    ids = TOKENIZER.encode(text, bos=True, eos=True)
    assert sum(TOKENIZER.byte_lengths[i] for i in ids) == len(text.encode())
    assert len(TOKENIZER.byte_lengths) == TOKENIZER.n_words


# ---------------------------------------------------------------- chat format


@pytest.mark.parametrize("dialog, ids", [
    ([], [128000]),
    ([("user", "Hello world")], [128000, 128006, 882, 128007, 271, 9906, 1917, 128009]),
    ([("system", " You are\n"), ("user", "\n\nHi"), ("assistant", ""), ("tool", "<|eot_id|>")],
     [128000, 128006, 9125, 128007, 271, 1472, 527, 198, 128009,
      128006, 882, 128007, 1038, 13347, 128009, 128006, 78191, 128007, 271, 128009,
      128006, 23799, 4690, 128007, 271, 27, 91, 68, 354, 851, 91, 29, 128009]),
])
def test_literal_ids_of_dialogs(dialog, ids):
    dialog = [{"role": role, "content": content} for role, content in dialog]
    assert TOKENIZER.encode_dialog(dialog, generation_prompt=False) == ids
    assert TOKENIZER.encode_dialog(dialog) == [*ids, 128006, 78191, 128007, 271]


def metas_dialog(tokenizer, dialog):
    """The ids of Meta's ChatFormat, but for contents that begin with a line break, those of the text.

    ChatFormat encodes a content apart from the two line breaks before it, which no chat template can.
    """
    ids = [tokenizer.special_tokens["<|begin_of_text|>"]]
    formatted = chat_format.ChatFormat(tokenizer)
    for message in dialog:
        text = message["content"]
        if re.match(r"\s*[\r\n]", text):
            header = formatted._encode_header(message["role"])[:-1]
            end = tokenizer.special_tokens["<|eot_id|>"]
            ids += [*header, *tokenizer.encode("\n\n" + text, bos=False, eos=False), end]
        else:
            ids += formatted.encode_message(datatypes.RawMessage(**message), None)[0]
    return ids + formatted._encode_header("assistant")


PIECES = st.sampled_from(list(TOKENIZER.special_tokens)) | st.sampled_from(["user", " ", "\n\n", "\r", "Hi"])
DIALOGS = st.lists(max_size=6, elements=st.fixed_dictionaries({
    "role": st.sampled_from(["system", "user", "assistant", "tool"]),
    "content": st.text() | st.lists(PIECES, max_size=6).map("".join)}))


@given(DIALOGS)
def test_any_dialog_has_metas_ids(dialog):
    assert TOKENIZER.encode_dialog(dialog) == metas_dialog(META, dialog)


@given(DIALOGS)
def test_no_content_has_a_special_token(dialog):
    ids = TOKENIZER.encode_dialog(dialog, generation_prompt=False)
    made = [i for i in ids if i >= 128000]
    assert made == [128000, *[128006, 128007, 128009] * len(dialog)]
    headers = re.split(r"<\|start_header_id\|>\w+<\|end_header_id\|>\n\n", TOKENIZER.decode(ids))
    if not any("<|" in message["content"] for message in dialog):
        expected = ["<|begin_of_text|>", *(f"{message['content']}<|eot_id|>" for message in dialog)]
        assert headers == expected


HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("dialog, found", [
    ("Hi", "found str 'Hi', expected a list of messages"), (HI, "found dict .*expected a list of messages"),
    (None, "found NoneType"), ([HI, "Hi"], "found message 'Hi', expected a dict of role and content"),
    ([[HI]], r"found message \[{'role"), ([HI, {"role": "user"}], r"found message \['role'\], expected"),
    ([{"content": "Hi"}], r"found message \['content'\]"),
    ([{**HI, "role": "bot"}], "found role 'bot', expected one of system, user, assistant, tool"),
    ([{**HI, "role": "User"}], "found role 'User'"), ([{**HI, "role": ["user"]}], r"found role \['user'\]"),
    ([{**HI, "content": None}], "message 0: content: expected one str, found NoneType"),
    ([HI, {**HI, "content": [{"type": "image", "text": None}]}], "message 1: content: .* type 'image'"),
    ([{**HI, "content": [{"type": "text", "text": 3}]}], "content: found a part of type 'text'"),
    ([{**HI, "content": ["a\nb"]}], r"content: found a part of type 'a\\nb'"),
    ([{**HI, "images": ["cat.png"]}], "found images .*expected a message of text alone"),
    ([{**HI, "function_call": {"name": "f"}}], "found function_call"),
    ([{**HI, "tool_calls": [{"name": "f", "arguments": {}}]}], "found tool_calls of role 'user'"),
    ([{"role": "assistant", "tool_calls": [{}, {}]}], "tool_calls: found {}, expected a function"),
    ([HI, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}] * 2}],
     "message 1: tool_calls: found 2 calls, expected one"),
    ([{"role": "assistant", "tool_calls": "f()"}], "tool_calls: found 'f\\(\\)', expected a list of calls"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "tool_calls: found {'name'"),
    ([{"role": "assistant", "content": None}], "content: expected one str, found NoneType"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "content: expected one str"),
    ([{"role": "assistant", "content": "a", "weight": 0.5}], "found weight 0.5, expected 0 or 1")])
def test_a_bad_dialog_is_named_with_what_was_found_in_one_line(dialog, found):
    with pytest.raises(ValueError, match=found) as error:
        TOKENIZER.encode_dialog(dialog)
    assert "\n" not in str(error.value)


CALL = {"name": "temperature", "arguments": {"city": "Zürich", "unit": None}}


@pytest.mark.parametrize("message, role, text", [
    ({**HI, "name": "Ann", "weight": 1, "train": None, "tool_calls": None, "id": [3]}, "user", "Hi"),
    ({**HI, "tool_calls": [], "function_call": None, "images": []}, "user", "Hi"),
    ({**HI, "role": "developer"}, "system", "Hi"), ({**HI, "role": "ipython"}, "tool", "Hi"),
    ({**HI, "role": "tool", "tool_call_id": "call_1"}, "tool", "Hi"),
    ({**HI, "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]},
     "user", "a b"), ({**HI, "content": []}, "user", ""),
    ({"role": "assistant", "content": "Hi", "weight": 0}, "assistant", "Hi")])
def test_a_message_with_more_than_role_and_text_is_read_as_them(message, role, text):
    assert metas_dialog(META, [{"role": role, "content": text}]) == TOKENIZER.encode_dialog([message])
    assert TOKENIZER.encode_dialog((message,)) == TOKENIZER.encode_dialog([read_message(message)])


@pytest.mark.parametrize("calls", [
    [CALL], [{"type": "function", "id": "1", "function": CALL}],
    [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]])
def test_a_call_of_a_tool_is_written_as_llama_3_1s_chat_template_does(calls):
    written = '{"name": "temperature", "parameters": {"city": "Zürich", "unit": null}}'
    for content in "", None:
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        assert text_of(read_message(message)) == written
    assert text_of(read_message({"role": "assistant", "tool_calls": calls})) == written
    text = TOKENIZER.decode(TOKENIZER.encode_dialog([{**message, "content": "Look:"}], False))
    assert text.endswith(f"assistant<|end_header_id|>\n\nLook:{written}<|eot_id|>")


@pytest.mark.parametrize("key", ["weight", "train", "training"])
def test_an_assistants_message_of_weight_0_is_read_as_not_to_be_learned(key):
    message = {"role": "assistant", "content": "Hi"}
    for weight in 0, False, 0.0:
        read = read_message({**message, key: weight})
        assert read == {**message, "weight": 0} == read_message(read)
        assert read_message({**HI, key: weight}) == HI
    for weight in 1, True, None:
        assert read_message({**message, key: weight}) == message


def test_every_special_token_that_a_text_spells_is_found():
    names = list(TOKENIZER.special_tokens)
    assert SPELLED.findall(" a<|".join(names)) == names
    assert not SPELLED.search("<|reserved_special_token_248|> <|eot_id |> <|> <eot_id>")


# ---------------------------------------------------------------- long texts


@pytest.mark.parametrize("text", ["a" * 60_000, " " * 60_000, "ab " + "x" * 25_001 + " y",
                                  "a" * 25_000 + " b", "word " * 90_000, ("q" * 26_000 + " " * 26_000) * 9])
def test_long_runs_have_metas_ids(text):
    assert TOKENIZER.encode(text) == META.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("symbol", [
    "a", " ", "😀", "\r\n", "\ud800",
    *(pytest.param(symbol, marks=pytest.mark.slow)
      for symbol in ("é", "0", "\n", "a ", "\u0301", "א", "\0"))])
def test_a_million_characters_of_one_symbol_are_encoded_in_short_runs(symbol, monkeypatch):
    """Of a run, all whitespace or all not, tiktoken's time grows with the square of the length."""
    text, longest, encode = (symbol * 1_000_000)[:1_000_000], [], tiktoken.Encoding.encode

    def measured(self, piece, **settings):
        longest.append(max(map(len, re.findall(r"\s+|\S+", piece))))
        return encode(self, piece, **settings)
    monkeypatch.setattr(tiktoken.Encoding, "encode", measured)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text.replace("\ud800", "\ufffd")
    assert max(longest) <= 25_000


# ---------------------------------------------------------------- what a user can get wrong


def test_ids_outside_the_vocabulary_are_named():
    for bad in (128256, -1):
        with pytest.raises(ValueError, match=rf"token id {bad}.*0 \.\. 128255"):
            TOKENIZER.decode([9906, bad])
    for bad in (["a"], [1.5], 7):
        with pytest.raises(ValueError, match="sequence of token ids"):
            TOKENIZER.decode(bad)
    with pytest.raises(ValueError, match="expected one str, found bytes"):
        TOKENIZER.encode(b"Hello")


def test_ids_that_end_inside_a_character_decode_to_a_replacement_character():
    ids = TOKENIZER.encode("a😀")
    assert len(ids) == 3 and TOKENIZER.decode(ids[:-1]) == "a\ufffd"
    assert TOKENIZER.decode_bytes(ids[:-1]) + TOKENIZER.decode_bytes(ids[-1:]) == "a😀".encode()


def rows(tokens):
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("content, found", [
    (b"<!DOCTYPE html>\n<html>\n", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "SentencePiece"),
    (b'{"version": "1.0",\n "model": {}}\n', "JSON"),
    (rows(BYTES) + b"Z", "line 257.*damaged"),                  # cut short within a line
    (rows(BYTES) + rows([b"ab"]), "line 257.*expected rank 256"),
    (rows(BYTES) + b"YQ== 256\n", "line 257.*b'a' has rank 97"),
    (rows(BYTES) + b"Y!== 256\n", "line 257"),
    (rows(BYTES[:100]), "100 tokens, without 156 of the 256 single bytes.*0x64"),
    (rows(BYTES[:-1] + [b"ab"]), "0xff"),
    (b"", "found 0 tokens"),
])
def test_a_damaged_file_is_named_with_what_was_found_in_one_line(tmp_path, content, found):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.model.*{found}.*expected Meta's tokenizer") as error:
        Tokenizer(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.model: found nothing, expected"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="found a folder, expected"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------- small vocabularies


def some_texts(n=200):
    """Sentences of invented words with numbers, signs, accents and line breaks, enough for 1,000 tokens."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abdeginorstué😀", k=rng.randint(2, 8))) for _ in range(200)]
    return ["  ".join([" ".join(rng.choices(words, k=12)) + ", ", str(rng.randrange(10**6)), "don't!!\n\n"])
            for _ in range(n)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_tokenizer(some_texts(), 1000, tmp_path_factory.mktemp("small") / "sub" / "tokenizer.model")


def test_training_gives_the_size_asked_for_and_shortens_its_texts(small):
    assert small.n_words == 1000
    assert (small.bos_id, small.eos_id, small.eot_id) == (744, 745, 753)
    text = "".join(some_texts(5))
    assert len(small.encode(text)) < len(text.encode()) / 2


def test_training_twice_gives_the_same_file(small, tmp_path):
    train_tokenizer(iter(some_texts()), 1000, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == Path(small.model_path).read_bytes()


def test_a_trained_file_has_one_token_and_rank_per_line_and_meta_reads_it(small):
    lines = Path(small.model_path).read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(1000 - 256))
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert len(set(tokens)) == len(tokens) and sorted(tokens[:256]) == BYTES
    text = "".join(some_texts(5))
    metas = meta.Tokenizer(Path(small.model_path))
    assert metas.encode(text, bos=True, eos=True) == small.encode(text, bos=True, eos=True)


def library_ids(train, texts, vocab_size):
    """What the tokenizers library makes of texts, with its own merges, after training on train."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.train_from_iterator(train, trainers.BpeTrainer(
        vocab_size=vocab_size - 256, min_frequency=2, show_progress=False,
        initial_alphabet=byte_level.alphabet()))
    return [library.encode(text).ids for text in texts]


def test_a_trained_vocabulary_encodes_as_in_the_tokenizers_library(small):
    texts = some_texts(300)  # 100 of them unseen
    assert [small.encode(text) for text in texts] == library_ids(some_texts(), texts, 1000)


def test_a_vocabulary_of_real_stories_encodes_as_in_the_tokenizers_library(tmp_path):
    folder = os.environ.get("TINYSTORIES_SAMPLE")
    if not folder:
        pytest.skip("TINYSTORIES_SAMPLE, the folder of real stories, is not set")
    stories = [story["story"] for path in sorted(Path(folder).glob("data*.json"))
               for story in json.loads(path.read_text(encoding="utf-8"))]
    small = train_tokenizer(stories[:600], 4096, tmp_path / "tokenizer.model")
    assert [small.encode(story) for story in stories] == library_ids(stories[:600], stories, 4096)


@given(st.text())
def test_any_text_comes_back_from_a_small_vocabulary(small, text):
    ids = small.encode(text, bos=True, eos=True)
    assert ids[0] == small.bos_id and ids[-1] == small.eos_id and small.decode(ids[1:-1]) == text


@given(DIALOGS)
def test_any_dialog_has_metas_ids_in_a_small_vocabulary(small, dialog):
    assert small.encode_dialog(dialog) == metas_dialog(meta.Tokenizer(Path(small.model_path)), dialog)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_saving_that_fails_half_way_leaves_the_final_name_as_it_was(tmp_path, monkeypatch, function):
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(tokenizer.os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        train_tokenizer(some_texts(), 600, tmp_path / "new.model")
    assert not (tmp_path / "new.model").exists()
    (tmp_path / "old.model").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        train_tokenizer(some_texts(), 600, tmp_path / "old.model")
    assert (tmp_path / "old.model").read_bytes() == b"old"


LONG_RUNS = """
import sys, tokenizer
texts = ["", "\\ud800\\0" * 9, "a" * 1_000_000, " " * 1_000_000]
tokenizer.train_tokenizer(texts, 516, sys.argv[1])
"""


def test_training_takes_odd_texts_and_very_long_runs(tmp_path):
    """In a process that is ended if it hangs: the trainer would take minutes over a run that is not cut."""
    output("-c", LONG_RUNS, tmp_path / "tokenizer.model", timeout=100)
    assert Tokenizer(tmp_path / "tokenizer.model").n_words == 516


@pytest.mark.parametrize("texts, vocab_size, said", [
    (["aa aa"], 511, "found vocab_size 511, expected an int of 512"),
    (["aa aa"], 600.0, "found vocab_size 600.0, expected an int"),
    (["aa aa"], 2000, "vocab_size of 51[0-9], expected 2000"),
    ([b"aa"], 600, "found bytes"), ([1], 600, "found int")])
def test_training_errors_say_what_was_found_and_write_nothing(tmp_path, texts, vocab_size, said):
    with pytest.raises(ValueError, match=said):
        train_tokenizer(texts, vocab_size, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())
