"""TinyStories' shards to token files, against the original's rule; what is broken, killed or missing."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import WORDS, run, sentences, shard_bytes, shard_tokens

import tiny_stories
from plumbing import documents, json_stream, workers
from plumbing.files import sha256_of
from tokenizer import Tokenizer, train_tokenizer


def write_shards(data_dir, stories):
    """stories: one list of texts per shard."""
    folder = data_dir / tiny_stories.SHARDS
    folder.mkdir(parents=True)
    for i, texts in enumerate(stories):
        records = [{"story": text, "summary": "", "source": "GPT-4"} for text in texts]
        (folder / f"data{i:02d}.json").write_text(json.dumps(records), encoding="utf-8")


def some_stories(n, seed):
    return [f"\n\n {text}\né😀 " for text in sentences(n, seed, 0, 60)]


@pytest.fixture
def data_dir(tmp_path):
    write_shards(tmp_path, [some_stories(n, seed) for seed, n in enumerate((40, 25, 1, 60, 33))])
    return tmp_path


def originals_file(shards, tokenizer_path):
    """The bytes that the original program writes for these shards, had it kept them in order."""
    tokenizer, tokens = Tokenizer(tokenizer_path), []
    for i, shard in enumerate(shards):
        data = json.loads(Path(shard).read_text(encoding="utf-8"))
        random.Random(1337 + i).shuffle(data)
        for record in data:
            tokens += tokenizer.encode(record["story"].strip(), bos=True, eos=True)
    return shard_bytes(tokens)


def bin_files(data_dir):
    return {path.name: path.read_bytes() for path in Path(data_dir).glob("*.bin")}


# ---------------------------------------------------------------- tokenize


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_originals_bytes(data_dir, tokenizer_path, num_workers):
    tiny_stories.tokenize(str(data_dir), tokenizer_path, num_workers)
    shards = sorted((data_dir / tiny_stories.SHARDS).glob("*.json"))
    assert bin_files(data_dir) == {"TinyStories_val.bin": originals_file(shards[:1], tokenizer_path),
                                   "TinyStories_train.bin": originals_file(shards[1:], tokenizer_path)}


@pytest.mark.parametrize("num_workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_real_stories_with_the_real_vocabulary_give_the_originals_files(tmp_path, num_workers):
    sample = os.environ.get("TINYSTORIES_SAMPLE")
    if not sample:
        pytest.skip("TINYSTORIES_SAMPLE, the folder of real stories, is not set")
    meta = pytest.importorskip("llama_models.llama3.tokenizer")
    vocabulary = str(Path(meta.__file__).parent / "tokenizer.model")
    (tmp_path / tiny_stories.SHARDS).symlink_to(Path(sample).resolve())
    tiny_stories.tokenize(str(tmp_path), vocabulary, num_workers)
    shards = sorted(Path(sample).glob("data*.json"))
    assert bin_files(tmp_path) == {"TinyStories_val.bin": originals_file(shards[:1], vocabulary),
                                   "TinyStories_train.bin": originals_file(shards[1:], vocabulary)}


def test_one_worker_starts_no_process(data_dir, tokenizer_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a process was started")
    monkeypatch.setattr(workers.concurrent.futures, "ProcessPoolExecutor", refuse)
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)


def test_the_tokens_of_a_shard_take_four_bytes_each(tmp_path, tokenizer_path):
    write_shards(tmp_path, [["a b" * 400] * 500])
    shard = str(tmp_path / tiny_stories.SHARDS / "data00.json")
    text_bytes = Path(shard).stat().st_size
    tiny_stories.process_shard(0, shard, tokenizer_path)  # imports and the like, so as not to count them
    tracemalloc.start()
    tokens = tiny_stories.process_shard(0, shard, tokenizer_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens.dtype == np.uint32 and len(tokens) > 400_000
    assert peak < 3 * text_bytes + 8 * len(tokens)  # the file, its texts, the growing array; a list: 36 each


def test_a_train_split_too_large_for_one_header_is_cut_between_shards(data_dir, tokenizer_path):
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    whole = bin_files(data_dir)["TinyStories_train.bin"]
    (data_dir / "TinyStories_train_mine.bin").write_bytes(b"a user's file")
    shards = sorted(str(path) for path in (data_dir / tiny_stories.SHARDS).glob("*.json"))
    splits = {"val": shards[:1], "train": shards[1:]}
    tiny_stories.write_splits(str(data_dir), "TinyStories_", splits, tokenizer_path, 1, max_tokens=4000)
    parts = [path.read_bytes() for path in sorted(data_dir.glob("TinyStories_train_0*.bin"))]
    assert len(parts) > 1 and b"".join(part[1024:] for part in parts) == whole[1024:]
    assert [np.frombuffer(part[:12], "<i4")[2] * 4 for part in parts] == [len(part) - 1024 for part in parts]
    assert not (data_dir / "TinyStories_train.bin").exists()  # it would be read twice by a pattern
    assert (data_dir / "TinyStories_train_mine.bin").read_bytes() == b"a user's file"


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("content, said", [
    (b'[{"story": "a"', "found no JSON"), (b"[]", r"found \[\]"), (b'{"story": "a"}', "found {"),
    (b'[{"story": "a"}, {"text": "b"}]', "story 1"), (b'[{"story": 3}]', "story 0"),
    (b"\xff", "JSON in UTF-8")])
def test_a_broken_shard_is_named_and_old_files_stay(data_dir, tokenizer_path, num_workers, content, said):
    (data_dir / "TinyStories_train.bin").write_bytes(b"earlier")
    shard = data_dir / tiny_stories.SHARDS / "data03.json"
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"data03.json.*{said}.*expected a list"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, num_workers)
    assert (data_dir / "TinyStories_train.bin").read_bytes() == b"earlier"
    assert not (data_dir / "TinyStories_val.bin").exists()


@pytest.mark.parametrize("at_work", [False, True])
def test_a_killed_worker_is_an_error_that_names_a_shard(tmp_path, tokenizer_path, at_work):
    write_shards(tmp_path, [some_stories(4_000, 2)] * 30)
    children = set(multiprocessing.active_children())

    def kill_one():
        while not (workers := set(multiprocessing.active_children()) - children):
            time.sleep(0.001)
        while at_work and not list(tmp_path.glob("tokens.part/*")):
            time.sleep(0.001)
        os.kill(workers.pop().pid, signal.SIGKILL)
    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(OSError, match="data.*json: its worker.*killed.*num_workers"):
        tiny_stories.tokenize(str(tmp_path), tokenizer_path, 2)
    killer.join()
    assert set(multiprocessing.active_children()) == children and not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("error", [OSError("handle is closed"), ValueError("bad value(s) in fds_to_keep")])
def test_a_pool_that_breaks_as_it_is_given_work_names_a_shard(tmp_path, tokenizer_path, monkeypatch, error):
    write_shards(tmp_path, [["a"]] * 3)

    def submit(*_):
        raise error
    monkeypatch.setattr(workers.concurrent.futures.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(OSError, match="data00.json: its worker.*killed.*num_workers"):
        tiny_stories.tokenize(str(tmp_path), tokenizer_path, 2)


def test_a_lone_surrogate_or_an_empty_story_is_tokenized(tmp_path, tokenizer_path):
    write_shards(tmp_path, [["\ud83d", ""], ["a"]])
    tiny_stories.tokenize(str(tmp_path), tokenizer_path, 1)
    tokenizer = Tokenizer(tokenizer_path)
    tokens = shard_tokens(tmp_path / "TinyStories_val.bin").tolist()
    texts = tokenizer.decode(tokens).split("<|begin_of_text|>")[1:]
    assert sorted(texts) == ["<|end_of_text|>", "\ufffd<|end_of_text|>"]


def test_too_few_shards_a_missing_vocabulary_and_no_workers_are_errors(tmp_path, data_dir, tokenizer_path):
    with pytest.raises(FileNotFoundError, match="holds 0 data.*expected at least 2.*download"):
        tiny_stories.tokenize(str(tmp_path / "none"), tokenizer_path, 1)
    with pytest.raises(FileNotFoundError, match="none.model: found nothing, expected"):
        tiny_stories.tokenize(str(data_dir), str(tmp_path / "none.model"), 1)
    with pytest.raises(ValueError, match="num_workers is 0, expected at least 1"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, 0)


# ---------------------------------------------------------------- interruptions, manifest, disk


def redone(monkeypatch):
    """The names of the shards that are tokenized from now on."""
    names, encode_shard = [], tiny_stories.encode_shard

    def record(index, shard, words):
        names.append(Path(shard).name)
        return encode_shard(index, shard, words)
    monkeypatch.setattr(tiny_stories, "encode_shard", record)
    return names


def finished_tree(data_dir):
    return bin_files(data_dir) | {"manifest": (data_dir / "manifest.json").read_bytes()}


def test_after_an_interruption_only_unfinished_shards_are_redone(data_dir, tokenizer_path, monkeypatch):
    shard = data_dir / tiny_stories.SHARDS / "data03.json"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="data03.json"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    shard.write_bytes(content)
    names = redone(monkeypatch)
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert names == ["data03.json", "data04.json"]
    after = finished_tree(data_dir)
    assert not list(data_dir.glob("*.part")) and not list(data_dir.glob("*.new"))
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert finished_tree(data_dir) == after


@pytest.mark.parametrize("change", ["shard", "order", "vocabulary"])
def test_a_finished_shard_is_not_taken_for_another(data_dir, tmp_path_factory, tokenizer_path, change):
    folder = data_dir / tiny_stories.SHARDS
    (folder / "data04.json").rename(folder / "later.json")
    (folder / "data04.json").write_text("[")
    with pytest.raises(ValueError, match="data04.json"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    (folder / "later.json").rename(folder / "data04.json")
    if change == "shard":  # as long as before
        content = (folder / "data01.json").read_text()
        (folder / "data01.json").write_text(content.replace("little", "LITTLE"))
    if change == "order":  # data01 becomes validation, data02 the first of train, whose seed differs
        (folder / "data00.json").unlink()
    if change == "vocabulary":
        tokenizer_path = str(tmp_path_factory.mktemp("other") / "tokenizer.model")
        train_tokenizer(some_stories(200, 9), 540, tokenizer_path)
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    shards = sorted(folder.glob("*.json"))
    assert bin_files(data_dir) == {"TinyStories_val.bin": originals_file(shards[:1], tokenizer_path),
                                   "TinyStories_train.bin": originals_file(shards[1:], tokenizer_path)}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_manifest_tells_what_every_shard_gave(data_dir, tokenizer_path, num_workers):
    tiny_stories.tokenize(str(data_dir), tokenizer_path, num_workers)
    files = json.loads((data_dir / "manifest.json").read_text())["files"]
    shards = sorted((data_dir / tiny_stories.SHARDS).glob("*.json"))
    tokenizer = Tokenizer(tokenizer_path)
    for name, of_split in ("TinyStories_val.bin", shards[:1]), ("TinyStories_train.bin", shards[1:]):
        about = files[name]
        assert about["tokenizer"] == sha256_of(tokenizer_path) and about["version"] == 7
        for shard, told in zip(of_split, about["shards"], strict=True):
            texts = [text.strip() for text in tiny_stories.read_stories(shard)]
            assert told == {"name": shard.name, "sha256": sha256_of(shard),
                            "stories": len(texts), "bytes": sum(len(text.encode()) for text in texts),
                            "tokens": sum(len(tokenizer.encode(text)) + 2 for text in texts)}
        for key in "stories", "tokens", "bytes":
            assert about[key] == sum(told[key] for told in about["shards"])
        assert about["tokens"] * 4 + 1024 == (data_dir / name).stat().st_size


def test_a_damaged_manifest_is_named(data_dir, tokenizer_path):
    for content in "", "[1]", "{", "null":
        (data_dir / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="manifest.json: found no JSON object.*delete it"):
            tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)


def test_the_known_counts_of_the_full_dataset_are_reported(data_dir, tokenizer_path, monkeypatch, capsys):
    folder = data_dir / tiny_stories.SHARDS
    for i in range(5, 50):
        shutil.copy(folder / "data02.json", folder / f"data{i:02d}.json")
    monkeypatch.setattr(tiny_stories, "LLAMA3", sha256_of(tokenizer_path))
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert "do not match {'val': 18660516, 'train': 907021844}" in capsys.readouterr().out
    counts = {name: (len(data) - 1024) // 4 for name, data in bin_files(data_dir).items()}
    monkeypatch.setattr(tiny_stories, "KNOWN_TOKENS", {"val": counts["TinyStories_val.bin"],
                                                       "train": counts["TinyStories_train.bin"]})
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert "full dataset match." in capsys.readouterr().out
    (folder / "data49.json").unlink()
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert "match" not in capsys.readouterr().out


def test_too_little_free_disk_is_said_before_the_work(data_dir, tokenizer_path, monkeypatch):
    monkeypatch.setattr(tiny_stories.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    names = redone(monkeypatch)
    with pytest.raises(OSError, match=r"tokenizing takes \d+,\d+ bytes, .* has 1,000 bytes free; make room"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert names == []


FULL = """
import resource, signal, sys
import tiny_stories
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
tiny_stories.cli.run({"tokenize": tiny_stories.tokenize}, "tokenize",
                     ["--data_dir", sys.argv[1], "--tokenizer_path", sys.argv[2], "--num_workers", "1"])
"""


def test_no_space_left_is_one_line_with_the_file_and_loses_nothing(data_dir, tokenizer_path):
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    expected = finished_tree(data_dir)
    for limit in 1000, 8_000, 16_000:
        result = run("-c", FULL, data_dir, tokenizer_path, limit)
        [line] = [line for line in result.stderr.splitlines() if "error" in line]
        assert result.returncode == 1 and str(data_dir) in line and "make room, then run again" in line
        assert finished_tree(data_dir) == expected and not list(data_dir.rglob("*.bin.*part"))
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    assert finished_tree(data_dir) == expected


def test_an_exception_in_a_worker_names_the_shard_and_ends_the_run(data_dir, tokenizer_path, monkeypatch):
    def fail(index, shard, words):
        raise KeyError("ours")
    monkeypatch.setattr(tiny_stories, "encode_shard", fail)
    with pytest.raises(ValueError, match="data00.json: tokenizing failed with KeyError..ours"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)


# ---------------------------------------------------------------- fuzzing


SPACES = " |  |\n|\n\n| \n|\r\n|\t|\u00a0|\u2003|\u2028|\x1c|\x85|\u200b".split("|")
SIGNS = ["'s", "1234", "...", "<|eot_id|>", "\ud83d", "é", "e\u0301", "\u0301", "😀", "漢字"]
PIECES = st.one_of(st.sampled_from(SPACES), st.sampled_from([*WORDS, *SIGNS]), st.text(max_size=4))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Words of a vocabulary that merges white space with words and lines, as Llama 3's does."""
    rng = random.Random(4)
    texts = ["".join(rng.choices([*SPACES, *SPACES, *WORDS, *SIGNS], k=40)) for _ in range(3000)]
    path = tmp_path_factory.mktemp("white") / "tokenizer.model"
    return tiny_stories.Words(train_tokenizer(texts, 1400, path))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=12).map("".join))
@example(" a")
@example("a  b")
@example("a\n \nb c")
def test_word_by_word_gives_the_tokens_of_the_whole_text(words, text):
    expected = words.tokenizer.encode(text.strip(), bos=True, eos=True)
    assert np.frombuffer(words.encode({"story": text}), "<u4").tolist() == expected


def test_long_texts_and_long_words_have_the_tokens_of_the_whole_text(words):
    for text in "dog " * 99_999 + "little dog", "dog " + "x" * 60_000 + " dog", "a" * 399_999 + " b c":
        expected = words.tokenizer.encode(text, bos=True, eos=True)
        assert np.frombuffer(words.encode({"story": text}), "<u4").tolist() == expected


def stories_as_json_reads_them(content):
    """The stories of a shard, or None if it is broken; by json.loads."""
    try:
        records = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    sound = isinstance(records, list) and records and all(
        isinstance(record, dict) and isinstance(record.get("story"), str) for record in records)
    return [record["story"] for record in records] if sound else None


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["story", "a"]), inner, max_size=3), max_leaves=6)
RECORDS = st.lists(st.builds(lambda story, more: {**more, "story": story}, st.text(max_size=40),
                             st.dictionaries(st.text(max_size=2), JSON, max_size=2)) | JSON, max_size=5)


@st.composite
def shard_content(draw):
    """JSON of all kinds, most of it a shard, some of it then damaged."""
    value = draw(st.one_of(RECORDS, RECORDS, JSON))
    indent = draw(st.sampled_from([None, 0, 2]))
    content = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)
    content = bytearray(content.encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        content[at:at + draw(st.integers(0, 3))] = draw(st.one_of(
            st.binary(max_size=3), st.sampled_from([b",", b"]", b"[", b'"', b"\\", b" \n"])))
    return bytes(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(content=shard_content(), block=st.sampled_from([8, 9, 13, 64, 2**20]))
@example(content=b"[" * 100_000, block=64)
@example(content=b'[{"story": "a"}] \n\t x', block=8)
@example(content=b'[{"story": "a"},]', block=8)
@example(content=b'[{"story": "a", "n": 1' + b"0" * 5000 + b"}]", block=64)
def test_a_shard_read_in_blocks_is_what_json_reads_or_an_error_names_it(scratch, content, block):
    path = scratch / "data07.json"
    path.write_bytes(content)
    expected = stories_as_json_reads_them(content)
    if expected is not None:
        assert [record["story"] for record in documents.read_shard(path, block)] == expected
        assert tiny_stories.read_stories(path) == expected
    else:
        with pytest.raises(ValueError, match="data07.json.*found.*expected a list"):
            list(documents.read_shard(path, block))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(JSON, max_size=5), st.sampled_from([2, 3, 64]))
@example([1234567, -1.5e300], 3)
@example([1e300], 4)  # of [1e+300] the first block has [1e+
def test_an_array_read_in_blocks_is_what_json_reads(values, block):
    content = json.dumps(values)
    assert json.dumps(list(json_stream.read_array(io.StringIO(content), block))) == content


# ---------------------------------------------------------------- command line


def test_the_command_tokenizes_and_an_unknown_flag_fails_at_once(data_dir, tokenizer_path):
    words = ["tiny_stories.py", "tokenize", "--data_dir", str(data_dir), "--tokenizer_path", tokenizer_path,
             "--num_workers", "1"]
    result = run(*words, "--shards", "3")
    assert result.returncode == 1 and "unknown flag --shards" in result.stderr
    assert not bin_files(data_dir) and len(result.stderr.splitlines()) == 1
    assert run(*words).returncode == 0 and len(bin_files(data_dir)) == 2
    for command in ([], ["tokenize"], ["download"]):
        result = run("tiny_stories.py", *command, "--help")
        assert result.returncode == 0 and "--data_dir" in result.stdout


@pytest.mark.slow
def test_ctrl_c_is_quiet_and_ends_the_workers(tmp_path, tokenizer_path):
    write_shards(tmp_path, [some_stories(20_000, 2)] * 8)
    interrupted = 0
    for delay in (0, 0.1, 0.2, 0.4):  # while workers start, and while they work
        process = subprocess.Popen(
            [sys.executable, tiny_stories.__file__, "tokenize", "--data_dir", str(tmp_path),
             "--tokenizer_path", tokenizer_path, "--num_workers", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it
        assert process.stdout.readline().startswith("Tokenizing val")
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, workers included
        _, errors = process.communicate(timeout=30)  # its pipes close when the workers, too, are gone
        if process.returncode == 0:  # it was faster
            break
        assert process.returncode == 130 and "Traceback" not in errors
        assert not list(tmp_path.glob("*.bin"))
        interrupted += 1
    assert interrupted >= 2
