"""The tokenizer against literal ids of Llama 3's vocabulary and against Meta's own code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import Tokenizer

meta = pytest.importorskip("llama_models.llama3.tokenizer")
PATH = meta.Path(meta.__file__).parent / "tokenizer.model"
TOKENIZER, META = Tokenizer(PATH), meta.Tokenizer(PATH)


def test_literal_ids_of_llama_3():
    assert TOKENIZER.n_words == 128256
    assert TOKENIZER.encode("Hello world", bos=True, eos=True) == [128000, 9906, 1917, 128001]
    assert TOKENIZER.stop_tokens == [128001, 128009, 128008] and TOKENIZER.pad_id == 128004


def test_special_tokens_are_ordinary_text_unless_asked():
    assert TOKENIZER.eot_id not in TOKENIZER.encode("<|eot_id|>")
    assert TOKENIZER.encode("<|eot_id|>", allowed_special=["<|eot_id|>"]) == [128009]


@given(st.text())
def test_any_text_comes_back_and_has_metas_ids(text):
    ids = TOKENIZER.encode(text)
    assert ids == META.encode(text, bos=False, eos=False) and TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ["a" * 60_000, " " * 60_000, "ab " + "x" * 25_001 + " y", "a" * 25_000 + " b",
                                  "word " * 90_000, ("q" * 26_000 + " " * 26_000) * 9])
def test_long_runs_have_metas_ids(text):
    assert TOKENIZER.encode(text) == META.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("content, said", [
    (b"<html>\n", "HTML page"), (b"YQ== 3\n", "rank 3"), (b"YQ== 0\n", "single bytes")])
def test_a_damaged_file_is_named(tmp_path, content, said):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.model.*{said}"):
        Tokenizer(tmp_path / "tokenizer.model")
