"""TinyStories' shards to token files, against the original's rule; the download, against a local server."""

import contextlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import tiny_stories
from tokenizer import Tokenizer, train_tokenizer

SCRIPT = tiny_stories.__file__
WORDS = "Once upon a time there was little dog named Max who loved the big red ball and his friend".split()


def write_shards(data_dir, stories):
    """stories: one list of texts per shard."""
    folder = data_dir / tiny_stories.SHARDS
    folder.mkdir(parents=True)
    for i, texts in enumerate(stories):
        records = [{"story": text, "summary": "", "source": "GPT-4"} for text in texts]
        (folder / f"data{i:02d}.json").write_text(json.dumps(records), encoding="utf-8")


def some_stories(rng, n):
    return [f"\n\n {' '.join(rng.choices(WORDS, k=rng.randint(0, 60)))}.\né😀 " for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(some_stories(random.Random(0), 200), 560, path)
    return str(path)


@pytest.fixture
def data_dir(tmp_path):
    rng = random.Random(1)
    write_shards(tmp_path, [some_stories(rng, n) for n in (40, 25, 1, 60, 33)])
    return tmp_path


def originals_file(shards, tokenizer_path):
    """The bytes that the original program writes for these shards, had it kept them in order."""
    tokenizer, tokens = Tokenizer(tokenizer_path), []
    for i, shard in enumerate(shards):
        data = json.loads(Path(shard).read_text(encoding="utf-8"))
        random.Random(1337 + i).shuffle(data)
        for example in data:
            tokens += tokenizer.encode(example["story"].strip(), bos=True, eos=True)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, len(tokens)
    return header.tobytes() + np.array(tokens, dtype=np.uint32).tobytes()


def bin_files(data_dir):
    return {path.name: path.read_bytes() for path in Path(data_dir).glob("*.bin*")}


# ---------------------------------------------------------------- tokenize


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_originals_bytes(data_dir, tokenizer_path, num_workers):
    tiny_stories.tokenize(str(data_dir), tokenizer_path, num_workers)
    shards = sorted((data_dir / tiny_stories.SHARDS).glob("*.json"))
    assert bin_files(data_dir) == {"TinyStories_val.bin": originals_file(shards[:1], tokenizer_path),
                                   "TinyStories_train.bin": originals_file(shards[1:], tokenizer_path)}


@pytest.mark.parametrize("num_workers", [1, 2])
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
    monkeypatch.setattr(tiny_stories, "start_worker", refuse)
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


def test_a_train_split_too_large_for_one_header_is_cut_between_shards(data_dir, tokenizer_path, monkeypatch):
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
    whole = bin_files(data_dir)["TinyStories_train.bin"]
    (data_dir / "TinyStories_train_mine.bin").write_bytes(b"a user's file")
    monkeypatch.setattr(tiny_stories, "MAX_TOKENS", 4000)
    tiny_stories.tokenize(str(data_dir), tokenizer_path, 1)
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


def test_a_killed_worker_is_an_error_that_names_the_shard(monkeypatch):
    class Killed:
        def kill(self):
            pass
        join = kill

    def start_worker(jobs):
        answers, writer = tiny_stories.multiprocessing.Pipe(duplex=False)
        writer.close()
        return Killed(), answers
    monkeypatch.setattr(tiny_stories, "start_worker", start_worker)
    with pytest.raises(OSError, match="data07.json.*killed.*num_workers"):
        list(tiny_stories.process_shards([(0, "data07.json", "t")], 2))


def test_a_lone_surrogate_or_an_empty_story_is_tokenized(tmp_path, tokenizer_path):
    write_shards(tmp_path, [["\ud83d", ""], ["a"]])
    tiny_stories.tokenize(str(tmp_path), tokenizer_path, 1)
    tokenizer = Tokenizer(tokenizer_path)
    tokens = np.frombuffer((tmp_path / "TinyStories_val.bin").read_bytes()[1024:], "<u4").tolist()
    texts = tokenizer.decode(tokens).split("<|begin_of_text|>")[1:]
    assert sorted(texts) == ["<|end_of_text|>", "\ufffd<|end_of_text|>"]


def test_too_few_shards_a_missing_vocabulary_and_no_workers_are_errors(tmp_path, data_dir, tokenizer_path):
    with pytest.raises(FileNotFoundError, match="holds 0 data.*expected at least 2.*download"):
        tiny_stories.tokenize(str(tmp_path / "none"), tokenizer_path, 1)
    with pytest.raises(FileNotFoundError, match="none.model: found nothing, expected"):
        tiny_stories.tokenize(str(data_dir), str(tmp_path / "none.model"), 1)
    with pytest.raises(ValueError, match="num_workers is 0, expected at least 1"):
        tiny_stories.tokenize(str(data_dir), tokenizer_path, 0)


# ---------------------------------------------------------------- command line


def run(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60)


def test_the_command_line_tokenizes_and_an_unknown_flag_fails_before_anything_runs(data_dir, tokenizer_path):
    words = ["tokenize", "--data_dir", str(data_dir), "--tokenizer_path", tokenizer_path,
             "--num_workers", "1"]
    result = run(*words, "--shards", "3")
    assert result.returncode == 1 and "unknown flag --shards" in result.stderr
    assert not bin_files(data_dir) and len(result.stderr.splitlines()) == 1
    assert run(*words).returncode == 0 and len(bin_files(data_dir)) == 2
    for command in ([], ["tokenize"], ["download"]):
        result = run(*command, "--help")
        assert result.returncode == 0 and "--data_dir" in result.stdout


def test_ctrl_c_is_quiet_and_ends_the_workers(tmp_path, tokenizer_path):
    write_shards(tmp_path, [some_stories(random.Random(2), 20_000)] * 6)
    for delay in (0, 0.1, 0.3, 0.6, 1.0):  # while workers start, and while they work
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "tokenize", "--data_dir", str(tmp_path),
             "--tokenizer_path", tokenizer_path, "--num_workers", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
        assert process.stdout.readline().startswith("Tokenizing val")
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, workers included
        _, errors = process.communicate(timeout=30)  # its pipes close when the workers, too, are gone
        assert process.returncode == 130 and "Traceback" not in errors
    assert not list(tmp_path.glob("*.bin"))


# ---------------------------------------------------------------- download


def archive_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


SHARD = json.dumps([{"story": "".join(random.Random(3).choices("abcdefgh ", k=50_000))}]).encode()
ARCHIVE = archive_of({"data00.json": SHARD, "data01.json": SHARD})


@contextlib.contextmanager
def server(body, status=200, cut=None):
    """Serves body at the yielded address, whatever is asked for; cut: closes after so many bytes of it."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(206 if start and status == 200 else status)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:cut])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}/TinyStories_all_data.tar.gz"
        http_server.shutdown()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


UNPACKED = ["TinyStories_all_data", "TinyStories_all_data.tar.gz", "TinyStories_all_data/data00.json",
            "TinyStories_all_data/data01.json"]


def test_a_download_is_unpacked_and_not_repeated(tmp_path):
    with server(ARCHIVE) as url:
        tiny_stories.download(str(tmp_path / "d"), url)
    assert names(tmp_path / "d") == UNPACKED
    assert (tmp_path / "d" / tiny_stories.SHARDS / "data01.json").read_bytes() == SHARD
    tiny_stories.download(str(tmp_path / "d"), url)  # the server is gone


def test_an_error_status_is_named_and_leaves_nothing(tmp_path):
    with server(b"not here", status=404) as url, pytest.raises(ConnectionError, match="404.*expected 200"):
        tiny_stories.download(str(tmp_path), url)
    assert names(tmp_path) == []


def test_a_server_that_is_not_there_is_a_connection_error(tmp_path):
    with server(b"") as url:
        pass
    with pytest.raises(ConnectionError, match="127.0.0.1.*failed.*run again"):
        tiny_stories.download(str(tmp_path), url)
    assert names(tmp_path) == []


def test_a_truncated_body_is_an_error_and_a_new_run_continues_it(tmp_path):
    with server(ARCHIVE, cut=10_000) as url, pytest.raises(ConnectionError, match="failed.*run again"):
        tiny_stories.download(str(tmp_path), url)
    assert names(tmp_path) == ["TinyStories_all_data.tar.gz.part"]
    with server(ARCHIVE) as url:
        tiny_stories.download(str(tmp_path), url)
    assert names(tmp_path) == UNPACKED and (tmp_path / tiny_stories.ARCHIVE).read_bytes() == ARCHIVE


@pytest.mark.parametrize("body, said", [
    (b"<html>please log in</html>", "gzip"), (b"", "empty"), (ARCHIVE[:-9], "ended"),
    (ARCHIVE[:20_000] + b"\0" * 20 + ARCHIVE[20_020:], ""), (archive_of({"readme.txt": b"hi"}), "no data"),
    (archive_of({"data00.json": SHARD, "../../data01.json": SHARD}), "outside"),
])
def test_a_broken_or_unsafe_archive_is_put_aside_and_a_new_run_starts_anew(tmp_path, body, said):
    inside = tmp_path / "a" / "b"
    with server(body) as url, pytest.raises(ValueError, match=rf"tar.gz: found.*{said}.*run again"):
        tiny_stories.download(str(inside), url)
    assert names(tmp_path) == ["a", "a/b", "a/b/TinyStories_all_data.tar.gz.broken"]
    with server(ARCHIVE) as url:
        tiny_stories.download(str(inside), url)
    assert set(UNPACKED) < set(names(inside))
