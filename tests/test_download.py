"""Download and unpacking, against a local server with every fault a network has; kills at random moments."""

import contextlib
import functools
import gzip
import hashlib
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
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import sentences

import plumbing.download
import tiny_stories
from tokenizer import train_tokenizer

NAME = "TinyStories_all_data.tar.gz"


def archive_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shard_of(seed, size=50_000):
    return json.dumps([{"story": "".join(random.Random(seed).choices("abcdefgh ", k=size))}]).encode()


SHARD = shard_of(3)
ARCHIVE = archive_of({"data00.json": SHARD, "data01.json": SHARD})
OTHER = archive_of({"data00.json": SHARD, "data01.json": shard_of(4)})


@contextlib.contextmanager
def server(body=ARCHIVE, faults=(), ranges=True, tag=None, modified=None, length=True, slow=0):
    """Serves body; yields its url and its requests, the dicts of their header fields.

    faults: of the first requests: a status to answer, (a number of bytes, "cut" or "stall" after them), or a
    function that answers. tag, modified: the ETag and Last-Modified. slow: seconds between pieces. All can
    be changed in what is yielded.
    """
    requests, faults = [], list(faults)
    about = SimpleNamespace(body=body, tag=tag, modified=modified, requests=requests, faults=faults)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(dict(self.headers))
            fault = faults.pop(0) if faults else None
            if callable(fault):
                return fault(self)
            if type(fault) is int and 400 <= fault < 600:
                return self.send_error(fault)
            start, status = 0, 200
            validator = self.headers.get("If-Range")
            if ranges and "Range" in self.headers and validator in (None, about.tag, about.modified):
                start, status = int(self.headers["Range"][6:-1]), 206
                if start >= len(about.body):
                    return self.send_error(416)
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(about.body) - 1}/{len(about.body)}")
            if length:
                self.send_header("Content-Length", str(len(about.body) - start))
            for name, value in ("ETag", about.tag), ("Last-Modified", about.modified):
                if value:
                    self.send_header(name, value)
            self.end_headers()
            rest = about.body[start:][:fault[0] if isinstance(fault, tuple) else None]
            for at in range(0, len(rest), 4096):
                self.wfile.write(rest[at:at + 4096])
                time.sleep(slow)
            if isinstance(fault, tuple) and fault[1] == "stall":
                time.sleep(1.5)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.handle_error = lambda *_: None  # a client that was killed
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        about.url = f"http://127.0.0.1:{http_server.server_port}/{NAME}"
        yield about
        http_server.shutdown()


@pytest.fixture(autouse=True)
def waited(monkeypatch):
    """The seconds that were waited between attempts; in truth there are none."""
    seconds = []
    patient = functools.partial(plumbing.download.fetch, sleep=seconds.append, chunk_bytes=1000)
    monkeypatch.setattr(tiny_stories, "fetch", patient)
    return seconds


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


COMPLETE = [tiny_stories.SHARDS, NAME, f"{tiny_stories.SHARDS}/data00.json",
            f"{tiny_stories.SHARDS}/data01.json", "manifest.json"]


def assert_complete(folder, body=ARCHIVE):
    assert names(folder) == COMPLETE and (folder / NAME).read_bytes() == body
    about = json.loads((folder / "manifest.json").read_text())["archive"]
    assert about == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def download(folder, url, **flags):
    tiny_stories.download(str(folder), url, **flags)


# ---------------------------------------------------------------- sound servers


@pytest.mark.parametrize("length", [True, False])
def test_a_download_is_unpacked_and_not_repeated(tmp_path, length):
    with server(length=length) as web:
        download(tmp_path / "d", web.url)
    assert_complete(tmp_path / "d")
    assert (tmp_path / "d" / tiny_stories.SHARDS / "data01.json").read_bytes() == SHARD
    download(tmp_path / "d", web.url)  # the server is gone
    assert len(web.requests) == 1


def test_folders_of_a_users_own_are_left_alone(tmp_path):
    (tmp_path / tiny_stories.SHARDS).mkdir()
    (tmp_path / tiny_stories.SHARDS / "data00.json").write_bytes(SHARD)
    download(tmp_path, "http://127.0.0.1:1/none")
    assert names(tmp_path) == [tiny_stories.SHARDS, f"{tiny_stories.SHARDS}/data00.json"]


def test_an_archive_that_is_said_to_be_encoded_stays_as_it_is(tmp_path):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(ARCHIVE)))
        handler.end_headers()
        handler.wfile.write(ARCHIVE)
    with server(faults=[answer]) as web:
        download(tmp_path, web.url)
    assert_complete(tmp_path)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("faults", [
    [500], [503, 429, 502], [(0, "cut")], [(1, "cut")], [(10_000, "cut")] * 4, [(10_000, "stall"), 500],
    [(20_000, "cut"), 503, 503, 503, 503]])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_attempt_that_fails_is_repeated_until_all_is_there(tmp_path, monkeypatch, faults, ranges):
    monkeypatch.setattr(tiny_stories, "fetch", functools.partial(tiny_stories.fetch, timeout=0.3))
    with server(faults=faults, ranges=ranges) as web:
        download(tmp_path, web.url)
    assert_complete(tmp_path)
    assert len(web.requests) == len(faults) + 1


def test_a_broken_download_goes_on_where_it_stopped(tmp_path):
    with server(faults=[(10_000, "cut"), (10_000, "cut")], tag='"a"') as web:
        download(tmp_path, web.url)
    assert [request.get("Range") for request in web.requests] == [None, "bytes=10000-", "bytes=20000-"]
    assert [request.get("If-Range") for request in web.requests] == [None, '"a"', '"a"']
    assert_complete(tmp_path)


def test_a_weak_etag_does_not_vouch_for_what_is_there(tmp_path):
    date = "Mon, 01 Jan 2024 00:00:00 GMT"
    with server(faults=[(10_000, "cut")], tag='W/"a"', modified=date) as web:
        download(tmp_path, web.url)
    assert [request.get("If-Range") for request in web.requests] == [None, date]
    assert_complete(tmp_path)


def test_waiting_doubles_and_begins_anew_after_progress(tmp_path, waited):
    with server(faults=[500, 500, 500, (10_000, "cut"), 500, 500]) as web:
        download(tmp_path, web.url)
    assert waited == [1, 2, 4, 1, 1, 2]
    with server(faults=[500] * 9) as web, pytest.raises(
            ConnectionError, match="downloading http.*failed.*500 Internal Server Error; run again"):
        download(tmp_path / "b", web.url)
    assert waited[6:] == [1, 2, 4, 8] and len(web.requests) == 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_error_that_stays_is_named_at_once_and_leaves_nothing(tmp_path, status):
    with server(faults=[status]) as web:
        with pytest.raises(ConnectionError, match=f"{NAME} answered {status} .*, expected 200"):
            download(tmp_path, web.url)
    assert names(tmp_path) == [] and len(web.requests) == 1


def test_a_server_that_is_not_there_is_a_connection_error(tmp_path):
    with server() as web:
        pass
    with pytest.raises(ConnectionError, match="127.0.0.1.*failed.*run again"):
        download(tmp_path, web.url)
    assert names(tmp_path) == []


def test_what_an_ended_run_left_is_continued_by_the_next(tmp_path):
    cut = (10_000, "cut")
    for ranges in True, False:
        folder = tmp_path / str(ranges)
        with server(faults=[cut] + [500] * 9, ranges=ranges, tag='"a"') as web:
            with pytest.raises(ConnectionError, match="failed.*run again to continue"):
                download(folder, web.url)
            assert names(folder) == [f"{NAME}.part", f"{NAME}.part.json"]
            assert (folder / f"{NAME}.part").read_bytes() == ARCHIVE[:10_000]
            del web.requests[:]
        with server(ranges=ranges, tag='"a"') as web:
            state = json.loads((folder / f"{NAME}.part.json").read_text())
            (folder / f"{NAME}.part.json").write_text(json.dumps(state | {"url": web.url}))  # another port
            download(folder, web.url)
        assert [request.get("Range") for request in web.requests] == ["bytes=10000-"]
        assert_complete(folder)


PAGE = b"<!doctype html><html>please log in</html>"


@pytest.mark.parametrize("page", [PAGE, b"", b"{}"])
@pytest.mark.parametrize("before", [None, (10_000, "cut")])
def test_a_web_page_with_status_200_is_no_archive_and_spoils_no_part(tmp_path, page, before):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", str(len(page)))
        handler.end_headers()
        handler.wfile.write(page)
    with server(faults=[before, answer] if before else [answer]) as web:
        with pytest.raises(ValueError, match=f"{NAME} answered 200 with b.*expected a .tar.gz.*run again"):
            download(tmp_path, web.url)
        assert names(tmp_path) == ([f"{NAME}.part", f"{NAME}.part.json"] if before else [])
        download(tmp_path, web.url)
    assert_complete(tmp_path)


@pytest.mark.parametrize("validators", [dict(tag='"a"'), dict(modified="Mon, 01 Jan 2024 00:00:00 GMT"),
                                        dict(tag='W/"a"', modified="Mon, 01 Jan 2024 00:00:00 GMT"), dict()])
@pytest.mark.parametrize("obeys", [True, False])
def test_a_file_that_changes_between_attempts_is_begun_anew(tmp_path, validators, obeys):
    new = OTHER.ljust(len(ARCHIVE), b"\0") if validators else OTHER + b"\0\0"  # gzip skips zeros at the end
    with server(ARCHIVE.ljust(len(OTHER), b"\0"), faults=[(10_000, "cut")], **validators) as web:
        def change(handler):
            web.body = new
            web.tag = web.tag and web.tag.replace("a", "b")
            web.modified = web.modified and web.modified.replace("2024", "2025")
            if not obeys:  # a server that knows ranges but not If-Range
                del handler.headers["If-Range"]
            return handler.do_GET()
        web.faults.insert(1, change)
        download(tmp_path, web.url)
    assert_complete(tmp_path, new)


def test_a_part_that_is_longer_than_the_file_is_begun_anew(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(ARCHIVE + b"more")
    with server() as web:
        download(tmp_path, web.url)
    assert_complete(tmp_path)


# ---------------------------------------------------------------- digests


def test_the_digest_is_verified_on_later_runs_and_for_a_later_download(tmp_path):
    with server() as web:
        download(tmp_path, web.url)
        damaged = bytearray(ARCHIVE)
        damaged[20_000] ^= 1
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{NAME}: found SHA-256 .*expected .*broken; run again"):
            download(tmp_path, web.url)
        (tmp_path / f"{NAME}.broken").unlink()
        download(tmp_path, web.url)  # its shards are there
        tiny_stories.shutil.rmtree(tmp_path / tiny_stories.SHARDS)
        web.body = OTHER
        with pytest.raises(ValueError, match="SHA-256"):
            download(tmp_path, web.url)
        (tmp_path / f"{NAME}.broken").unlink()
        web.body = ARCHIVE
        download(tmp_path, web.url)
    assert_complete(tmp_path)


def test_a_known_digest_is_demanded(tmp_path):
    digest = hashlib.sha256(ARCHIVE).hexdigest()
    with server(body=OTHER) as web:
        with pytest.raises(ValueError, match=f"found SHA-256 .*expected {digest}.*broken"):
            download(tmp_path, web.url, sha256=digest)
    assert not (tmp_path / NAME).exists() and not (tmp_path / tiny_stories.SHARDS).exists()
    (tmp_path / f"{NAME}.broken").unlink()
    with server() as web:
        for _ in range(2):
            download(tmp_path, web.url, sha256=digest.upper())
    assert not list(tmp_path.glob("*.part*"))


def test_too_little_free_disk_is_said_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_stories.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = "the download takes .* has 1,000 bytes free; make room"
    with server() as web, pytest.raises(OSError, match=said):
        download(tmp_path, web.url)


# ---------------------------------------------------------------- unpacking


@pytest.mark.parametrize("body, said", [
    (ARCHIVE[:-9], "ended"), (ARCHIVE[:20_000] + b"\0" * 20 + ARCHIVE[20_020:], ""), (ARCHIVE[:30_000], ""),
    (archive_of({"readme.txt": b"hi"}), "no data"), (gzip.compress(b"no tar at all" * 99, mtime=0), ""),
    (archive_of({"data00.json": SHARD, "../../data01.json": SHARD}), "outside"),
    (archive_of({"data00.json": SHARD, "/data01.json/../../../data.json": SHARD}), "outside")])
def test_a_broken_or_unsafe_archive_is_put_aside_and_replaced(tmp_path, body, said):
    inside = tmp_path / "a" / "b"
    with server(body) as web:
        with pytest.raises(ValueError, match=rf"tar.gz: found.*{said}.*run again"):
            download(inside, web.url)
        assert names(tmp_path) == ["a", "a/b", f"a/b/{NAME}.broken", "a/b/manifest.json"]
        (inside / f"{NAME}.broken").unlink()
        web.body = ARCHIVE
        download(inside, web.url)
    assert_complete(inside)


def test_an_interrupted_unpacking_goes_on_and_is_not_taken_for_done(tmp_path, monkeypatch):
    members = {f"data0{i}.json": shard_of(i) for i in range(4)}
    written, complete, stop_at = [], plumbing.download.complete, [None]

    @contextlib.contextmanager
    def complete_until(path):
        if Path(path).name == stop_at[0]:
            Path(f"{path}.part").write_bytes(b"half of")
            raise KeyboardInterrupt
        written.append(Path(path).name)
        with complete(path) as file:
            yield file
    monkeypatch.setattr(plumbing.download, "complete", complete_until)
    with server(archive_of(members)) as web:
        for stop_at[0] in "data01.json", "data03.json":  # noqa: B007
            with pytest.raises(KeyboardInterrupt):
                download(tmp_path, web.url)
            assert not (tmp_path / tiny_stories.SHARDS).exists()
        stop_at[0] = None
        download(tmp_path, web.url)
    assert [name for name in written if name in members] == sorted(members)  # each once
    shards = (tmp_path / tiny_stories.SHARDS).iterdir()
    assert {path.name: path.read_bytes() for path in shards} == members
    assert not list(tmp_path.glob("*.part"))


# ---------------------------------------------------------------- kills


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".bin", ".json")}


@pytest.mark.slow
def test_kills_in_every_stage_end_in_the_same_files(tmp_path):
    """20 kills, each followed by the same command."""
    rng = random.Random(5)
    stories = [[{"story": text} for text in sentences(4_000, seed, 60, 60)] for seed in range(4)]
    body = archive_of({f"data0{i}.json": json.dumps(shard).encode() for i, shard in enumerate(stories)})
    train_tokenizer([record["story"] for record in stories[0][:500]], 540, tmp_path / "tokenizer.model")
    stages = ["*.gz.part", "*.gz", tiny_stories.SHARDS, "tokens.part", "*_val.bin*"]  # begin with these
    with server(body, slow=0.005, tag='"a"') as web:
        def start(folder):
            return subprocess.Popen(
                [sys.executable, tiny_stories.__file__, "--data_dir", folder, "--url", web.url,
                 "--tokenizer_path", tmp_path / "tokenizer.model", "--num_workers", "2"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        process = start(tmp_path / "whole")
        assert process.wait(60) == 0, process.stderr.read()
        for i in range(20):
            folder, stage = tmp_path / str(i), stages[i % 5]
            process = start(folder)
            while not any(folder.glob(stage)):
                assert process.poll() is None, f"ended before {stage} was there"
                time.sleep(0.001)
            time.sleep(0.1 * rng.random())
            if i % 2:  # the parent alone, or its workers, too
                os.kill(process.pid, signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            again = start(folder)
            assert again.wait(60) == 0, again.stderr.read()
            assert tree(folder) == tree(tmp_path / "whole")
            assert not list(folder.glob("*part*")) and not list(folder.glob("*.new"))
