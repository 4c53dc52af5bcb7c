"""Rows, files and folders as people have them: what is read, what is learned, what is refused and said."""

import gzip
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import sentences, shard_tokens

import tiny_stories
from plumbing import documents, files, json_stream
from tokenizer import Tokenizer

TEXTS = [f"{i} {sentence}" for i, sentence in enumerate(sentences(40, 7))]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def records_of(tmp_path, *rows, field="text"):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(documents.read_documents(str(path), field, None))


def prepare(tmp_path, inputs, tokenizer_path, **flags):
    flags = {"num_workers": 1, "data_dir": str(tmp_path / "data"), "val_fraction": 0.2} | flags
    tiny_stories.text(input=[str(name) for name in inputs], tokenizer_path=tokenizer_path, **flags)
    return tmp_path / "data"


def write_rows(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def packed(name, content):
    """The bytes of a file of this name that holds a text."""
    return gzip.compress(content.encode()) if name.lower().endswith(".gz") else content.encode()


def text_of(dialog, tokenizer):
    return tokenizer.decode(tokenizer.encode_dialog(dialog, generation_prompt=False))


def stored(data):
    """The tokens of both splits of a folder as they are stored."""
    return np.concatenate([shard_tokens(data / name) for name in ("val.bin", "train.bin")])


def documents_of(data, tokenizer):
    """(text, text of the targets) of each document that a START mark begins, sorted."""
    tokens = stored(data)
    starts = np.flatnonzero(tokens & files.START)
    assert starts[0] == 0
    found = []
    for document in np.split(tokens, starts[1:]):
        ids = document % files.START
        found.append((tokenizer.decode(ids), tokenizer.decode(ids[document < files.MASKED])))
    return sorted(found)


def texts_in(data, tokenizer):
    """The documents of both splits of plain text."""
    texts = tokenizer.decode(stored(data)).split("<|begin_of_text|>")[1:]
    return sorted(text.removesuffix("<|end_of_text|>") for text in texts)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("row", [
    {"messages": [USER, ANSWER], "text": "flat", "id": 3},
    {"messages": [{**USER, "name": None, "weight": 0}, {**ANSWER, "tool_calls": None, "weight": 1}]},
    {"messages": [{**USER, "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": None}]},
    {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}], "text": "no"},
    {"conversations": [USER, ANSWER]}, {"instruction": "Hi", "output": "Ho"},
    {"instruction": "Hi", "input": "", "output": "Ho", "text": "flat"},
    {"instruction": "Hi", "input": None, "output": "Ho", "messages": None},
    {"prompt": [USER], "completion": [ANSWER]}, {"prompt": "Hi", "messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER], "conversations": [], "prompt": "x", "completion": "y"}])
def test_a_row_of_a_chat_becomes_its_dialog(tmp_path, row):
    assert records_of(tmp_path, row) == [{"messages": [USER, ANSWER]}]


def test_system_prompts_tools_and_inputs_are_part_of_the_dialog(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    assert records_of(
        tmp_path, {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "tool", "value": "7"}]},
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be kind."}) == [
            {"messages": [system, USER]}, {"messages": [system, {"role": "tool", "content": "7"}]},
            {"messages": [system, {"role": "user", "content": "Add.\n\n1 and 2"},
                          {"role": "assistant", "content": "3"}]}]


def test_of_a_prompt_in_messages_no_answer_is_learned(tmp_path):
    [record] = records_of(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert record == {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}


@pytest.mark.parametrize("row, record", [
    ({"prompt": " Hi", "completion": " Ho ", "text": "flat"}, {"prompt": " Hi", "completion": " Ho "}),
    ({"text": "flat", "prompt": "Hi"}, {"story": "flat"}), ({"text": "a", "messages": None}, {"story": "a"}),
    ({"text": "flat", "instruction": "Hi"}, {"story": "flat"})])
def test_prompt_and_completion_come_before_the_text_field(tmp_path, row, record):
    assert records_of(tmp_path, row) == [record]


def test_a_field_that_is_named_comes_before_everything(tmp_path):
    rows = [{"messages": [USER, ANSWER], "body": "flat"}, {"messages": [USER, ANSWER], "text": "no"}]
    chat = {"messages": [USER, ANSWER]}
    assert records_of(tmp_path, *rows, field="body") == [{"story": "flat"}, chat]
    assert records_of(tmp_path, *rows, field="messages") == [chat, chat]


@pytest.mark.parametrize("row, said", [
    ({"messages": [USER, {**ANSWER, "content": None}], "text": "flat"}, "message 1: content: .*NoneType"),
    ({"messages": [{**USER, "role": None}], "text": "flat"}, "message 0: found role None"),
    ({"messages": "Hi", "text": "flat"}, "found str 'Hi', expected a list of messages"),
    ({"messages": [USER, {**ANSWER, "weight": "no"}]}, "message 1: found weight 'no', expected 0 or 1"),
    ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": 3}]}]}, ".*'image_url'"),
    ({"conversations": [{"from": "human", "value": None}], "text": "flat"}, "message 0: found value null"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, 'message 0: found from "bot", expected one of'),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "message 0: found from"),
    ({"conversations": {"from": "human"}}, "found conversations .*expected a list of turns"),
    ({"conversations": [7]}, "message 0: found message 7"),
    ({"instruction": {"words": []}, "output": "a", "text": "flat"}, "found instruction {.*expected text"),
    ({"instruction": "a", "output": 3}, "found output 3, expected text"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "found history"),
    ({"prompt": "a", "completion": [ANSWER]}, "found prompt of str, completion of list, expected two texts"),
    ({"prompt": [USER], "completion": [{**ANSWER, "role": "bot"}]}, "message 1: found role 'bot'"),
    ({"text": ["a"]}, r'found text \["a"\], expected {"text": text}'),
    ({"body": "a", "id": 1}, r'found keys \["body", "id"\], expected .*--field'), ({}, r"found keys \[\],"),
    ({"conversations": [{"role": "user", "content": 3}], "system": "a"}, "message 0: content: .*found int"),
    ({"conversations": [], "system": 3}, "found system 3, expected text")])
def test_a_row_that_is_not_usable_is_named_with_message_and_key(tmp_path, row, said):
    with pytest.raises(ValueError, match=f"rows.jsonl, document 1: {said}") as error:
        records_of(tmp_path, {"text": "a"}, row)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


# ---------------------------------------------------------------- what is learned and marked


def test_of_messages_with_weight_0_nothing_is_learned(tmp_path, tokenizer):
    dialogs = [[USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": text}] for text in TEXTS]
    path = write_rows(tmp_path, [{"messages": dialog} for dialog in dialogs])
    data = prepare(tmp_path, [path], tokenizer.model_path)
    assert documents_of(data, tokenizer) == sorted(
        (text_of(dialog, tokenizer), f"{text}<|eot_id|>")
        for dialog, text in zip(dialogs, TEXTS, strict=True))


def test_of_a_prompt_and_completion_the_completion_alone_is_learned(tmp_path, tokenizer):
    rows = [{"prompt": f"{text} once upon", "completion": " a time "} for text in TEXTS]
    data = prepare(tmp_path, [write_rows(tmp_path, rows)], tokenizer.model_path)
    assert documents_of(data, tokenizer) == sorted(
        (f"<|begin_of_text|>{row['prompt']} a time <|end_of_text|>", " a time <|end_of_text|>")
        for row in rows)
    tokens = stored(data) % files.START
    for row in rows:  # in the tokens that sampling from the prompt has
        ids = tokenizer.encode(row["prompt"], bos=True) + tokenizer.encode(row["completion"], eos=True)
        assert np.array(ids, "<u4").tobytes() in tokens.tobytes()


def test_chats_without_a_turn_to_learn_are_counted_and_left_out(tmp_path, tokenizer, capsys):
    rows = [{"messages": [USER, {**ANSWER, "content": text}]} for text in TEXTS]
    none = [{"messages": []}, {"messages": [USER], "text": "flat"}, {"conversations": []}, {"text": " "},
            {"messages": [USER, {**ANSWER, "train": False}]}]
    data = prepare(tmp_path, [write_rows(tmp_path, [*none, *rows])], tokenizer.model_path)
    said = capsys.readouterr().out
    assert len(documents_of(data, tokenizer)) == len(TEXTS)
    assert said.count("Left out: chats without an assistant's turn to learn: 4\n") == 1
    assert said.count("Left out: documents without text: 1\n") == 1
    with pytest.raises(ValueError, match="found no two documents"):
        prepare(tmp_path, [write_rows(tmp_path, none)], tokenizer.model_path)


def test_plain_text_beside_chats_is_marked_where_it_begins(tmp_path, tokenizer, monkeypatch):
    """Also where the shards of one file had no chat, and so no marks of their own."""
    monkeypatch.setattr(tiny_stories, "SHARD_CHARS", 400)
    rows = [{"text": text} for text in TEXTS]
    rows += [{"messages": [USER, {**ANSWER, "content": text}]} for text in TEXTS]
    data = prepare(tmp_path, [write_rows(tmp_path, rows)], tokenizer.model_path)
    assert [files.read_header(data / name).version for name in ("val.bin", "train.bin")] == [9, 9]
    plain = [(f"<|begin_of_text|>{text}<|end_of_text|>",) * 2 for text in TEXTS]
    chats = [(text_of([USER, {**ANSWER, "content": text}], tokenizer), f"{text}<|eot_id|>")
             for text in TEXTS]
    assert documents_of(data, tokenizer) == sorted(plain + chats)
    manifest = files.read_manifest(data)["files"]
    assert sum(len(about["shards"]) for about in manifest.values()) > 8
    for name, about in manifest.items():
        assert about["version"] == 9 and about["tokens"] == files.read_header(data / name).num_tokens
    assert sum(about["stories"] for about in manifest.values()) == 2 * len(TEXTS)


def test_a_corpus_of_text_alone_has_no_marks(tmp_path, tokenizer):
    path = write_rows(tmp_path, [{"text": text} for text in TEXTS])
    data = prepare(tmp_path, [path], tokenizer.model_path)
    assert {files.read_header(data / name).version for name in ("val.bin", "train.bin")} == {7}
    assert stored(data).max() < tokenizer.n_words


# ---------------------------------------------------------------- special tokens that texts spell

SPELLED = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"


def test_spelled_special_tokens_are_characters_and_counted(tmp_path, tokenizer, capsys):
    rows = [{"text": text} for text in TEXTS]
    rows += [{"text": SPELLED}, {"messages": [USER, {**ANSWER, "content": "<|eot_id|>"}]}]
    data = prepare(tmp_path, [write_rows(tmp_path, rows)], tokenizer.model_path)
    assert ("2 documents spell special tokens such as <|eot_id|>, 4 in all, encoded as characters; "
            "--special reads") in capsys.readouterr().out
    specials = (stored(data) % files.START >= tokenizer.bos_id).sum()
    assert specials == 2 * len(TEXTS) + 2 + len("bos start end eot start end eot".split())
    prepare(tmp_path, [write_rows(tmp_path, rows[:-2])], tokenizer.model_path, special=True)
    assert "documents spell" not in capsys.readouterr().out
    assert {files.read_header(data / name).version for name in ("val.bin", "train.bin")} == {7}


@pytest.mark.parametrize("row, said", [
    (dict(prompt="p", completion=None), "found completion null beside prompt"),
    (dict(instruction="i", input="", output=None), "found output null beside instruction")])
def test_a_row_without_its_answer_is_no_plain_text(tmp_path, row, said):
    with pytest.raises(ValueError, match=f"rows.jsonl, document 1: {said}, expected text"):
        records_of(tmp_path, {"text": "a"}, {**row, "text": "flat"})


def test_definitions_of_tools_are_counted_as_not_read(tmp_path, tokenizer, capsys):
    chats = [{"messages": [{**USER, "content": f"{i}?"}, ANSWER]} for i in range(12)]
    tools = [[{"name": "f"}], [], None] * 4
    rows = [{**chat, "tools": each} for chat, each in zip(chats, tools, strict=True)]
    data = prepare(tmp_path, [write_rows(tmp_path, rows)], tokenizer.model_path)
    assert "Not read: the definitions of tools of 4 chats; only" in capsys.readouterr().out
    with_tools = stored(data).tolist()
    prepare(tmp_path, [write_rows(tmp_path, chats)], tokenizer.model_path)
    assert stored(data).tolist() == with_tools


def test_an_empty_separator_is_named_and_no_part_stays(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="separator is empty"):
        prepare(tmp_path, [tmp_path / "a.txt"], tokenizer.model_path, separator="")
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(ValueError, match="b.jsonl, document 0"):
        prepare(tmp_path, [tmp_path / "b.jsonl"], tokenizer.model_path)
    assert not list(tmp_path.rglob("*.part"))


def test_special_reads_them_in_texts_and_prompts_but_never_in_chats(tmp_path, tokenizer, capsys):
    chat = [{"role": "user", "content": SPELLED}, ANSWER]
    inner = "a <|begin_of_text|>b<|end_of_text|> c"  # No loader may take this BOS for a document's start.
    rows = [{"text": f"<|begin_of_text|>{SPELLED}"}, {"text": f" {inner}"}, {"text": "plain"},
            {"text": "d<|end_of_text|>\n"}, {"messages": chat},
            {"prompt": f"<|begin_of_text|>{SPELLED}", "completion": "Ho<|eot_id|>"}]
    data = prepare(tmp_path, [write_rows(tmp_path, rows)], tokenizer.model_path, special=True)
    assert ("5 documents spell special tokens such as <|eot_id|>, 15 in all, encoded as tokens; in chats "
            "always as characters\n") in capsys.readouterr().out
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    starts = stored(data) & files.START > 0
    found = sorted(ids.tolist() for ids in np.split(stored(data) % files.START, np.flatnonzero(starts)[1:]))

    def read(text):
        return tokenizer.encode(text, allowed_special="all")
    assert found == sorted([
        [bos, *read(SPELLED), eos], [bos, *read(inner), eos], tokenizer.encode("plain", True, True),
        [bos, *read("d"), eos], [bos, *read(SPELLED), *read("Ho<|eot_id|>"), eos],
        tokenizer.encode_dialog(chat, False)])
    assert files.read_header(data / "train.bin").version == 9


def test_a_vocabulary_is_not_trained_on_the_names_of_special_tokens(tmp_path, tokenizer):
    rows = [{"text": f"{SPELLED * 9}{text}"} for text in TEXTS]
    data = prepare(tmp_path, [write_rows(tmp_path, rows)], None, vocab_size=540, special=True)
    words = [Tokenizer(data / "tokenizer.model").decode([i]) for i in range(256, 540 - 256)]
    assert not any("header" in word or "|" in word for word in words)


def test_an_earlier_runs_tokens_are_not_taken_for_those_of_special(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path, [{"text": f"{text}<|eot_id|>!"} for text in TEXTS])
    with monkeypatch.context() as patch:
        patch.setattr(tiny_stories, "write_split", lambda *_: 1 / 0)  # interrupted before shards are joined
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path, [path], tokenizer.model_path)
    data = prepare(tmp_path, [path], tokenizer.model_path, special=True)
    assert (stored(data) % files.START == tokenizer.eot_id).sum() == len(TEXTS)


# ---------------------------------------------------------------- files


LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n"
ROWS = [{"text": text, "id": [i, {"a": "\n]"}]} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("content", [
    LINES, "\n  \n" + LINES.replace("\n", "\r\n\n"), json.dumps(ROWS), json.dumps(ROWS, indent=1),
    "\n" * 5000 + json.dumps(ROWS, indent=4) + "\n\n", "\n".join(json.dumps(row, indent=2) for row in ROWS)])
def test_json_is_read_by_what_a_file_holds(tmp_path, content):
    for name in "a.json", "a.jsonl", "a.ndjson", "A.JSON", "a.JSONL.GZ", "a.Ndjson.gz":
        path = tmp_path / name
        path.write_bytes(packed(name, content))
        for block in 64, 2**20:
            found = documents.read_documents(str(path), "text", None, block)
            assert [record["story"] for record in found] == TEXTS


VALUES = st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers() | st.lists(st.booleans()))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(VALUES, max_size=5), st.sampled_from([2, 3, 64]), st.booleans(), st.sampled_from([None, 1]))
def test_json_in_blocks_is_what_json_reads(values, block, ascii, indent):
    def dump(value):
        return json.dumps(value, ensure_ascii=ascii, indent=indent)
    for content in dump(values), "\n".join(map(dump, values)), "".join(f"{dump(v)} \n\n" for v in values):
        assert list(json_stream.json_values(io.StringIO(content), block)) == values


def test_of_a_large_broken_file_no_more_is_read_than_the_fault_needs():
    class Counted(io.StringIO):
        amount = 0

        def read(self, n=-1):
            self.amount += n
            return super().read(n)
    for fault in '{"text": "b}\n', '{"text": b}\n', '{"text" "b"}\n', '{"text": "b"\n':
        file = Counted(LINES + fault + LINES * 50)
        with pytest.raises(ValueError):
            list(json_stream.json_values(file, 1000))
        assert file.amount < len(LINES) + 5000


def test_markdown_and_upper_case_suffixes_are_read_as_text(tmp_path):
    for name in "a.md", "a.TXT", "a.Md.GZ", "a.txt.gz":
        (tmp_path / name).write_bytes(packed(name, "# Title\n\ntext"))
        found = documents.read_documents(str(tmp_path / name), "text", None)
        assert list(found) == [{"story": "# Title\n\ntext"}]


def test_a_separator_is_unescaped(tmp_path):
    (tmp_path / "a.txt").write_text("a\tb\t\nc\\nd\t\ne")
    for separator, pieces in (r"\t\n", ["a\tb", "c\\nd", "e"]), (r"\\n", ["a\tb\t\nc", "d\t\ne"]):
        found = documents.read_documents(str(tmp_path / "a.txt"), "text", separator)
        assert [record["story"] for record in found] == pieces


READABLE = ["b.txt", "sub/a.MD", "sub/deep/c.txt.gz", "z.jsonl"]


@pytest.fixture
def notes(tmp_path):
    """A folder with readable files at two depths, and with others beside them."""
    folder = tmp_path / "notes"
    for name in (*READABLE, "cat.png", ".hidden.txt", "manifest.json", ".git/d.txt",
                 "text/documents.part/data0.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"text": name}) if name.endswith("jsonl") else name
        (folder / name).write_bytes(packed(name, content))
    return folder


def test_a_folder_gives_every_readable_file_below_it(notes, tokenizer, tmp_path, capsys):
    assert documents.find_inputs([notes]) == ([str(notes / name) for name in READABLE], 3)
    for name in str(notes), notes:
        assert documents.find_inputs(name) == documents.find_inputs([notes])
    data = prepare(tmp_path, [notes], tokenizer.model_path)
    assert texts_in(data, tokenizer) == READABLE
    assert "Reading 4 files, not 3 others beside them...\n" in capsys.readouterr().out
    (notes / ".git" / "d.txt").unlink()
    with pytest.raises(FileNotFoundError, match=".git: found no file in this folder that ends in .txt .md"):
        documents.find_inputs([notes / ".git"])


def test_patterns_are_expanded_where_the_shell_does_not(notes):
    for pattern, names in (("*.txt", ["b.txt"]), ("[bz].*", ["b.txt", "z.jsonl"]), ("?.jsonl", ["z.jsonl"]),
                           ("s*", ["sub/a.MD", "sub/deep/c.txt.gz"]), ("*/*.MD", ["sub/a.MD"])):
        assert documents.find_inputs([notes / pattern])[0] == [str(notes / name) for name in names]
    with pytest.raises(FileNotFoundError, match=r"q\*.json: found no file that matches, expected --input"):
        documents.find_inputs([notes / "*.txt", notes / "q*.json"])
    with pytest.raises(FileNotFoundError, match="none.txt: found no such file"):
        documents.find_inputs([notes / "none.txt"])
    with pytest.raises(ValueError, match="cat.png: found .png suffix, expected one of .txt .md"):
        documents.find_inputs([notes / "cat*"])


def test_a_path_that_exists_is_no_pattern(tmp_path):
    for name in "run[1]/a[0-9].txt", "run1/a1.txt", "a*?.txt":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    for name in "run[1]/a[0-9].txt", "a*?.txt":
        assert documents.find_inputs([tmp_path / name]) == ([str(tmp_path / name)], 0)
    assert documents.find_inputs([tmp_path / "run[1]"]) == ([str(tmp_path / "run[1]/a[0-9].txt")], 0)
    assert documents.find_inputs([tmp_path / "run[1]/a*"]) == ([str(tmp_path / "run[1]/a[0-9].txt")], 0)


@pytest.mark.skipif(not shutil.which("iconv"), reason="there is no iconv to try the command that is said")
@pytest.mark.parametrize("encoding, said", [
    ("latin1", "WINDOWS-1252"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")])
@pytest.mark.parametrize("text", ["früher und später", "plain letters alone é"])
def test_text_that_is_not_utf_8_is_called_so_and_how_to_convert_it(tmp_path, encoding, said, text):
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="notes.txt, document 0: found no UTF-8 text .*, expected") as error:
        list(documents.read_documents(str(path), "text", None))
    [command] = re.findall(": (cat .*) > NEW converts it", str(error.value))
    assert subprocess.check_output(command, shell=True, text=True).lstrip("\ufeff") == text
    assert f"iconv -f {said} -t UTF-8" in command
    assert "JSON" not in str(error.value) and "\n" not in str(error.value)


def test_rows_that_are_not_utf_8_are_called_so(tmp_path):
    for encoding in "latin1", "utf-16":
        (tmp_path / "a.jsonl").write_bytes('{"text": "früher"}\n'.encode(encoding))
        with pytest.raises(ValueError, match="a.jsonl, document 0: found no JSON in UTF-8 .*iconv -f"):
            list(documents.read_documents(str(tmp_path / "a.jsonl"), "text", None))


def test_parquet_has_the_rows_that_json_has(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    rows = [{"messages": [USER | {"weight": None}, ANSWER | {"weight": 0}], "text": None}, {"text": "flat"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(documents.read_documents(path, "text", None)) == [
        {"messages": [USER, ANSWER | {"weight": 0}]}, {"story": "flat"}]
    parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match=r'document 0: found columns \["body"\], expected .*--field'):
        list(documents.read_documents(path, "text", None))


# ---------------------------------------------------------------- what the splits are good for


def test_the_end_tells_up_to_which_seq_len_texts_fill_a_window(tmp_path, tokenizer, capsys):
    path = write_rows(tmp_path, [{"text": text} for text in TEXTS])
    data = prepare(tmp_path, [path], tokenizer.model_path)
    sizes = {name: files.read_header(data / f"{name}.bin").num_tokens for name in ("val", "train")}
    documents = {name: about["stories"] for name, about in files.read_manifest(data)["files"].items()}
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"val: documents {documents['val.bin']}, tokens {sizes['val']:,}; train: documents "
        f"{documents['train.bin']}, tokens {sizes['train']:,}; a longer --seq_len than "
        f"{min(sizes.values()) - 1} leaves a split without a full window")


def test_of_chats_the_end_tells_the_longest_and_of_few_a_larger_share(tmp_path, tokenizer, capsys):
    # Over a thousand tokens, so that the number would have a comma, which the command line refuses.
    dialogs = [[USER, {**ANSWER, "content": text}] for text in (*TEXTS, "long " * 900)]
    path = write_rows(tmp_path, [{"text": "long " * 900}] + [{"messages": dialog} for dialog in dialogs])
    longest = max(len(tokenizer.encode_dialog(dialog, False)) for dialog in dialogs)
    assert longest > 1000
    prepare(tmp_path, [path], tokenizer.model_path, val_fraction=0.01)
    *_, sizes, hint = capsys.readouterr().out.splitlines()
    assert sizes.endswith(f"; --seq_len {longest - 1} or more cuts no chat")
    number = 1 + len(dialogs)
    larger = min(0.5, round(10 / number, 1))
    about = round(larger * number)
    assert hint == f"Validation is small; --val_fraction {larger} gives it about {about} documents"
    prepare(tmp_path, [path], tokenizer.model_path, val_fraction=larger)
    assert "--val_fraction" not in capsys.readouterr().out
