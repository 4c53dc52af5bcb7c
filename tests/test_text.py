"""Your own text and chats as token files: every format, the validation split, the masks, broken input."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ROOT, assert_close, output, random_model, read_log, sentences, shard_tokens

import llama31
import tiny_stories
from llama31 import DistributedShardedDataLoader
from plumbing import documents, json_stream
from tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("quick_training")


def some_texts(n, seed=0):
    return [f"{i} {sentence}\nOh é 漢字!" for i, sentence in enumerate(sentences(n, seed))]


TEXTS = some_texts(300)


def prepare(tmp_path, paths, tokenizer_path, **flags):
    flags = {"num_workers": 1, "data_dir": str(tmp_path / "data"), "tokenizer_path": tokenizer_path} | flags
    tiny_stories.text(input=[str(path) for path in paths], **flags)
    return tmp_path / "data"


def documents_of(path, tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    text = tokenizer.decode((shard_tokens(path) & 0x3fffffff).tolist())
    begin, *documents = text.split("<|begin_of_text|>")
    assert begin == "" and all(document.endswith("<|end_of_text|>") for document in documents)
    return [document.removesuffix("<|end_of_text|>") for document in documents]


def all_documents(data, tokenizer_path):
    return [text for name in ("val.bin", "train.bin") for text in documents_of(data / name, tokenizer_path)]


def write(path, texts, field="text"):
    """The texts as a file of the kind that its name tells."""
    records = [{"id": i, field: text} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    content = {"txt": "\n====\n".join(texts), "json": json.dumps(records, indent=1),
               "jsonl": "\n".join(lines) + "\n\n"}[path.name.removesuffix(".gz").split(".")[-1]].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_every_format_gives_every_document_once(tmp_path, tokenizer_path, name):
    path = write(tmp_path / name, TEXTS)
    records = documents.read_documents(str(path), "text", r"\n====\n", block=100)
    assert list(records) == [{"story": text} for text in TEXTS]
    data = prepare(tmp_path, [path], tokenizer_path, separator=r"\n====\n")
    val, train = (documents_of(data / f"{split}.bin", tokenizer_path) for split in ("val", "train"))
    assert sorted(val + train) == sorted(TEXTS) and 0 < len(val) < 20
    assert sorted(path.name for path in data.iterdir()) == ["manifest.json", "train.bin", "val.bin"]


def test_parquet_gives_every_document_once(tmp_path, tokenizer_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS, "id": list(range(300))}), tmp_path / "a.parquet")
    data = prepare(tmp_path, [tmp_path / "a.parquet"], tokenizer_path)
    assert sorted(all_documents(data, tokenizer_path)) == sorted(TEXTS)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet: found no pyarrow.*pip install pyarrow"):
        prepare(tmp_path, [tmp_path / "a.parquet"], tokenizer_path)


def test_without_a_separator_a_file_is_a_document_and_an_empty_one_none(tmp_path, tokenizer_path):
    for i, text in enumerate(["", " \n ", *TEXTS[:40]]):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" * (i % 2) + text.encode())
    data = prepare(tmp_path, tmp_path.glob("*.txt"), tokenizer_path)
    assert sorted(all_documents(data, tokenizer_path)) == sorted(TEXTS[:40])


def test_another_field_is_read_when_named(tmp_path, tokenizer_path):
    path = write(tmp_path / "a.jsonl", TEXTS[:50], field="body")
    with pytest.raises(ValueError, match=r"a.jsonl, document 0: found .*expected .\"text\": text.*--field"):
        prepare(tmp_path, [path], tokenizer_path)
    data = prepare(tmp_path, [path], tokenizer_path, field="body")
    assert len(documents_of(data / "train.bin", tokenizer_path)) >= 40


def test_the_command_line_takes_several_inputs_and_trains_a_vocabulary(tmp_path):
    one, two = write(tmp_path / "a b.jsonl", TEXTS[:150]), write(tmp_path / "c.json", TEXTS[150:])
    words = ["tiny_stories.py", "text", "--input", one, two, "--vocab_size", "530",
             "--data_dir", tmp_path / "data"]
    trees = []
    for num_workers in "1", "2":
        output(*words, "--num_workers", num_workers)
        trees.append({path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()})
    assert trees[0] == trees[1]
    assert sorted(trees[0]) == ["manifest.json", "tokenizer.model", "train.bin", "val.bin"]
    path = tmp_path / "data" / "tokenizer.model"
    assert Tokenizer(path).n_words == 530
    manifest = json.loads(trees[0]["manifest.json"])["files"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert {about["tokenizer"] for about in manifest.values()} == {digest}
    assert sum(about["stories"] for about in manifest.values()) == 300
    assert sum(about["bytes"] for about in manifest.values()) == sum(len(text.encode()) for text in TEXTS)


# ---------------------------------------------------------------- the validation split


def test_a_document_stays_in_its_split_when_others_come_and_go(tmp_path, tokenizer_path):
    splits = []
    for i, texts in enumerate([TEXTS, TEXTS[::-1][:200] + some_texts(300, seed=1), TEXTS[:150] * 2]):
        folder = tmp_path / str(i)
        folder.mkdir()
        data = prepare(folder, [write(folder / "a.jsonl", texts)], tokenizer_path, val_fraction=0.2)
        splits.append([set(documents_of(data / f"{name}.bin", tokenizer_path)) for name in ("val", "train")])
        assert 0.1 < len(splits[-1][0]) / len(set(texts)) < 0.3
    val, train = map(set.union, *splits)
    assert not val & train


def test_few_documents_still_give_one_for_validation(tmp_path, tokenizer_path):
    data = prepare(tmp_path, [write(tmp_path / "a.jsonl", TEXTS[:5])], tokenizer_path, val_fraction=0.0)
    assert len(documents_of(data / "val.bin", tokenizer_path)) == 1
    assert len(documents_of(data / "train.bin", tokenizer_path)) == 4


@pytest.mark.parametrize("texts", [[], ["", "  "], TEXTS[:1], TEXTS[:1] * 3])
def test_a_corpus_without_two_documents_is_an_error_and_leaves_nothing(tmp_path, tokenizer_path, texts):
    path = write(tmp_path / "a.jsonl", texts)
    with pytest.raises(ValueError, match="a.jsonl: found no two documents.*--separator"):
        prepare(tmp_path, [path], tokenizer_path)
    assert list((tmp_path / "data").iterdir()) == []


def test_large_inputs_become_several_shards_with_the_same_documents(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(tiny_stories, "SHARD_CHARS", 3000)
    path = write(tmp_path / "a.jsonl", TEXTS)
    data = prepare(tmp_path, [path], tokenizer_path, val_fraction=0.3, num_workers=2)
    manifest = json.loads((data / "manifest.json").read_text())["files"]
    assert min(len(about["shards"]) for about in manifest.values()) > 3
    assert sorted(all_documents(data, tokenizer_path)) == sorted(TEXTS)


def test_an_interrupted_run_tokenizes_only_what_is_unfinished(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(tiny_stories, "SHARD_CHARS", 3000)
    path = write(tmp_path / "a.jsonl", TEXTS)
    names, encode_shard = [], tiny_stories.encode_shard

    def record(index, shard, words):
        if len(names) == stop_at:
            raise KeyboardInterrupt
        names.append(shard)
        return encode_shard(index, shard, words)
    monkeypatch.setattr(tiny_stories, "encode_shard", record)
    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, [path], tokenizer_path)
    stop_at = None
    data = prepare(tmp_path, [path], tokenizer_path)
    assert len(names) == len(set(names)) > 10
    assert sorted(path.name for path in data.iterdir()) == ["manifest.json", "train.bin", "val.bin"]


# ---------------------------------------------------------------- broken input


@pytest.mark.parametrize("name, content, said", [
    ("a.txt", b"\xff", "document 0: found no UTF-8 text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"', "document 1: found no"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "document 1: found text 3"),
    ("a.jsonl", b'{"text": "a"}\n["b"]', "document 1: found .\"b\""),
    ("a.jsonl", b'{"text": null, "id": 7}', "document 0: found keys .\"text\", \"id\""),
    ("a.json", b'[{"text": "a"}, 3]', "document 1: found 3"), ("a.json", b"", "document 0: found nothing"),
    ("a.jsonl.gz", b"plain", "document 0: .*[Nn]ot a gzipped"), ("a.csv", b"a,b", "found .csv"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 900, mtime=0)[:-12], "found no"),
    ("noname", b"a", "found no suffix"), ("a.jsonl", b'{"messages": 3}', "document 0: found int 3"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', "document 0: message 0: found message .'role'"),
    ("a.jsonl", b'{"messages": [{"role": "bot", "content": "a"}]}', "0: message 0: found role 'bot'"),
    ("a.jsonl", b"[" * 100_000, "document 0"),
    ("a.jsonl", b'{"text": "flat", "messages": [{"role": "user", "content": null}]}',
     "document 0: message 0: content")])
def test_broken_input_is_named_and_finished_files_stay(tmp_path, tokenizer_path, name, content, said):
    good = write(tmp_path / "good.jsonl", TEXTS)
    data = prepare(tmp_path, [good], tokenizer_path)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}[:,].*{said}.*expected"):
        prepare(tmp_path, [good, tmp_path / name], tokenizer_path)
    assert {path.name: path.read_bytes() for path in data.glob("*.*") if path.is_file()} == before
    prepare(tmp_path, [good], tokenizer_path)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_flags_that_contradict_and_files_that_are_missing_are_errors(tmp_path, tokenizer_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match="--vocab_size and --tokenizer_path"):
        prepare(tmp_path, [path], tokenizer_path, vocab_size=530)
    with pytest.raises(FileNotFoundError, match="none.txt"):
        prepare(tmp_path, [path, tmp_path / "none.txt"], tokenizer_path)
    with pytest.raises(FileNotFoundError, match="none.model: found nothing"):
        prepare(tmp_path, [path], str(tmp_path / "none.model"))
    with pytest.raises(ValueError, match="val_fraction is 1.5"):
        prepare(tmp_path, [path], tokenizer_path, val_fraction=1.5)
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path, tokenizer_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "data").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="data"):
        prepare(tmp_path, [path], tokenizer_path)


# ---------------------------------------------------------------- chats

DIALOG = [{"role": "system", "content": "Be <|eot_id|> kind."}, {"role": "user", "content": " the cat? "},
          {"role": "assistant", "content": "on a mat"}, {"role": "tool", "content": "42"},
          {"role": "assistant", "content": ""}, {"role": "user", "content": "and the dog?"},
          {"role": "assistant", "content": "under the tree\n"}]


def test_of_a_chat_the_assistants_words_and_ends_of_turn_alone_are_targets(tmp_path, tokenizer_path):
    dialogs = [[*DIALOG, {"role": "user", "content": text}] for text in TEXTS[:30]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": dialog}) for dialog in dialogs))
    data = prepare(tmp_path, [tmp_path / "a.jsonl"], tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    stored = np.concatenate([shard_tokens(data / f"{name}.bin") for name in ("val", "train")])
    tokens, learned, starts = stored & 0x3fffffff, stored >> 31 == 0, stored >> 30 & 1 == 1
    chats = np.split(np.arange(len(tokens)), np.flatnonzero(starts)[1:])
    assert len(chats) == 30 and np.array_equal(starts, tokens == tokenizer.bos_id)
    for chat in chats:
        last = tokenizer.decode(tokens[chat]).split("<|end_header_id|>\n\n")[-1].removesuffix("<|eot_id|>")
        dialog = [*DIALOG, {"role": "user", "content": last}]
        assert tokens[chat].tolist() == tokenizer.encode_dialog(dialog, generation_prompt=False)
        expected = [f"{m['content']}<|eot_id|>" for m in dialog if m["role"] == "assistant"]
        assert tokenizer.decode(tokens[chat][learned[chat]]) == "".join(expected)
        at = 1
        for message in dialog:  # token by token
            header = tokenizer.encode_dialog([], generation_prompt=True)[1:]
            ids = tokenizer.encode_dialog([message], generation_prompt=False)[1:]
            header = ids[:ids.index(header[-2]) + 2]  # as far as the line breaks behind <|end_header_id|>
            said = [False] * len(header) + [message["role"] == "assistant"] * (len(ids) - len(header))
            assert learned[chat][at:at + len(ids)].tolist() == said
            at += len(ids)
        assert at == len(chat) and not learned[chat][0]


def test_files_with_a_chat_are_version_9_and_others_7(tmp_path, tokenizer_path):
    records = [{"text": text} for text in TEXTS] + [{"messages": DIALOG}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = prepare(tmp_path, [tmp_path / "a.jsonl"], tokenizer_path)
    versions = {name: int(np.fromfile(data / name, "<i4", 3)[1]) for name in ("val.bin", "train.bin")}
    masked = {name: bool((shard_tokens(data / name) >> 31).any()) for name in versions}
    assert sorted(versions.values()) == [7, 9] and {n: v == 9 for n, v in versions.items()} == masked
    manifest = json.loads((data / "manifest.json").read_text())["files"]
    assert {name: about["version"] for name, about in manifest.items()} == versions


class Counted(io.StringIO):
    """A text file that counts how often it is read."""

    reads = 0

    def read(self, n=-1):
        self.reads += 1
        return super().read(n)


@pytest.mark.parametrize("content", [
    '[{"story": "' + "x" * 2_000_000 + '"}]', '[{"story": "' + "x" * 2_000_000,
    "[" + " " * 2_000_000 + '{"story": "a"}' + " " * 2_000_000 + "]"])
def test_the_time_to_read_one_long_value_grows_linearly(content):
    file = Counted(content)
    with contextlib.suppress(ValueError):
        list(json_stream.read_array(file, 2**12))
    assert file.reads < 40


def test_one_long_document_without_a_separator_is_read_in_linear_time():
    file = Counted("x" * 2**20 + "|y|")
    assert list(documents.split_at(file, "|", 2**12)) == ["x" * 2**20, "y", ""]
    assert file.reads < 15


def test_a_separator_across_two_blocks_is_found():
    for block in 1, 2, 3, 5:
        file = io.StringIO("a==b=c====d")
        assert list(documents.split_at(file, "==", block)) == ["a", "b=c", "", "d"]


def test_the_path_of_an_input_may_be_a_path_object(tmp_path, tokenizer_path):
    path = write(Path(tmp_path, "a.jsonl"), TEXTS)
    tiny_stories.text(input=[path], data_dir=tmp_path / "data", tokenizer_path=tokenizer_path, num_workers=1)
    assert (tmp_path / "data" / "train.bin").exists()


# ---------------------------------------------------------------- training on them


def some_dialogs(n):
    return [[*DIALOG, {"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
            for text in some_texts(n, seed=3)]


def test_the_gradient_of_a_chat_is_that_of_the_assistants_tokens_alone(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": d}) for d in some_dialogs(6)))
    data = prepare(tmp_path, [tmp_path / "a.jsonl"], tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    ids = (shard_tokens(data / "train.bin") & 0x3fffffff).astype(np.int64)
    said, assistants = [], False  # by the text alone: from the assistant's header to the end of its turn
    pieces = [tokenizer.decode([i]) for i in ids]
    for i, piece in enumerate(pieces):
        said.append(assistants)
        if piece == "<|eot_id|>":
            assistants = False
        before = "".join(pieces[max(0, i - 20):i + 1])
        assistants |= before.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    T = len(ids) - 1
    model = random_model(vocab_size=tokenizer.n_words, max_seq_len=T)
    [x], [y] = DistributedShardedDataLoader(data / "train.bin", 1, T, 0, 1).next_batch()
    assert x.tolist() == ids[:-1].tolist()
    assert y.tolist() == [i if kept else -100 for i, kept in zip(ids[1:].tolist(), said[1:], strict=True)]

    model.forward_loss(x[None], y[None]).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    log_probs = model(torch.from_numpy(ids[None, :-1]))[0].log_softmax(-1)
    places = [i - 1 for i, kept in enumerate(said) if kept]
    (-sum(log_probs[i, ids[i + 1]] for i in places) / len(places)).backward()
    for a, p in zip(found, model.parameters(), strict=True):
        assert_close(a, p.grad)


def test_training_learns_a_chat_and_refuses_another_vocabulary(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setitem(llama31.PRESETS, "tiny", dict(dim=32, n_layers=1, n_heads=2, multiple_of=32))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": d}) for d in some_dialogs(40)))
    data = prepare(tmp_path, [tmp_path / "a.jsonl"], tokenizer_path, val_fraction=0.2)
    flags = dict(train_data=str(data / "train.bin"), val_data=str(data / "val.bin"), preset="tiny",
                 batch_size=4, seq_len=128, steps=12, lr=3e-3, device="cpu", dtype="float32",
                 eval_interval=12)
    llama31.train(out_dir=str(tmp_path / "out"), tokenizer_path=tokenizer_path, **flags)
    records = read_log(tmp_path / "out")
    assert records[-1]["loss"] < records[0]["loss"] and records[-1]["val_bpb"] > 0

    other = tmp_path / "tokenizer.model"  # as many tokens, but others
    train_tokenizer(some_texts(300, seed=5)[::-1] + ["zebra crossing " * 9] * 50, 560, other)
    for name in "train", "val":
        with pytest.raises(ValueError, match=f"{name}.bin was not tokenized with {other}: manifest.json"):
            llama31.train(out_dir=str(tmp_path / "no"), tokenizer_path=str(other), **flags)
        manifest = json.loads((data / "manifest.json").read_text())
        del manifest["files"][f"{name}.bin"]
        (data / "manifest.json").write_text(json.dumps(manifest))
    assert not (tmp_path / "no").exists()
    for content in "{", "[]", '{"files": 3}', '{"files": {"train.bin": 3}}':
        (data / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="manifest.json: found no JSON object"):
            llama31.train(out_dir=str(tmp_path / "no"), tokenizer_path=tokenizer_path, **flags)
    (data / "manifest.json").unlink()
    llama31.train(out_dir=str(tmp_path / "free"), tokenizer_path=str(other), **flags)


# ---------------------------------------------------------------- scripts

UNGUARDED = """
import sys
from tiny_stories import text
print("once")
text(input=[sys.argv[1]], data_dir=sys.argv[2], tokenizer_path=sys.argv[3], num_workers=2)
"""


def test_text_works_in_a_script_without_a_main_guard(tmp_path, tokenizer_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    expected = prepare(tmp_path, [path], tokenizer_path, data_dir=str(tmp_path / "expected"))
    (tmp_path / "script.py").write_text(UNGUARDED)
    said = output(tmp_path / "script.py", path, tmp_path / "data", tokenizer_path,
                  env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert said.count("once") == 1
    for name in "train.bin", "val.bin":
        assert (tmp_path / "data" / name).read_bytes() == (expected / name).read_bytes()
