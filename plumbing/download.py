"""A file over a bad network: fetched in as many attempts as it takes, checked by digest, safely unpacked."""

import contextlib
import glob
import gzip
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import time
import zlib

import requests
from tqdm import tqdm

from plumbing.documents import find_shards
from plumbing.files import MANIFEST, check_disk, complete, read_manifest, sha256_of, write_manifest


def fetch(url, path, sha256=None, attempts=5, timeout=30, sleep=time.sleep, chunk_bytes=2**13):
    """Downloads url to path and returns the SHA-256; a later call continues what is in path.part.

    attempts: how many in a row may bring nothing new. timeout: seconds without an answer or a further byte.
    chunk_bytes: how many are written at once; a broken connection loses at most one chunk. ConnectionError:
    the server refuses, or the attempts failed. ValueError: it is no .gz, or it has another digest.
    """
    part = f"{path}.part"
    state = f"{path}.part.json"
    failures = 0
    while True:
        had = size_of(part)
        try:
            receive(url, part, state, timeout, chunk_bytes)
            break
        except requests.RequestException as error:
            failures = 0 if size_of(part) > had else failures + 1
            if failures == attempts:
                raise ConnectionError(f"downloading {url} failed: {error}; run again to continue") from error
            delay = 2 ** max(failures - 1, 0)  # 1, 2, 4, 8 seconds
            print(f"{error}; trying again in {delay} s", file=sys.stderr)
            sleep(delay)
    digest = check_archive(part, path, sha256)
    with contextlib.suppress(FileNotFoundError):
        os.remove(state)
    os.replace(part, path)
    return digest


def receive(url, part, state, timeout, chunk_bytes):
    """Tries once to complete part, whose source the file state notes; RequestException: try again."""
    have = size_of(part)
    known = {}
    with contextlib.suppress(FileNotFoundError, ValueError), open(state, encoding="utf-8") as file:
        known = json.load(file)
    if have and have == known.get("total") and url == known["url"]:
        return
    headers = {"Accept-Encoding": "identity"}  # Ranges and lengths then count the bytes that are written.
    if have:
        headers["Range"] = f"bytes={have}-"
        # If the file has changed, all of it comes, with status 200. A header that is None is not sent.
        headers["If-Range"] = known.get("etag") or known.get("modified")
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if status not in (200, 206, 416):
            error = f"{url} answered {status} {response.reason}"
            if status in (408, 429) or status >= 500:
                raise requests.HTTPError(error)
            raise ConnectionError(f"{error}, expected 200 OK; check the address or get the file otherwise")
        start, about = read_fields(url, response, have)
        # A field that one of the two answers lacks proves nothing.
        changed = any(known.get(key) and about[key] and known[key] != about[key] for key in about)
        if status == 416 or status == 206 and (changed or start != have):
            os.remove(part)
            raise requests.ConnectionError(f"{url} has changed since its download began")
        response.raw.headers.pop("Content-Encoding", None)  # With it, requests would unpack the .gz.
        chunks = response.iter_content(chunk_bytes)
        if status == 200:  # The whole file comes: it was asked for, has changed, or can't come in ranges.
            first = next(chunks, b"")
            if not first.startswith(b"\x1f\x8b"):  # Every .gz begins with these bytes, no web page does.
                raise ValueError(f"{url} answered 200 with {first[:40]!r}, expected a .tar.gz; check the "
                                 "address and whether the network wants a login, then run again")
            start = 0
            chunks = itertools.chain([first], chunks)
            open(part, "wb").close()  # Emptied first: state must never describe another file's bytes.
            with complete(state) as file:
                file.write(json.dumps(about).encode())
        total = about["total"]
        check_disk("the download", (total or start) - start, os.path.dirname(part))
        bar = tqdm(desc=part, initial=start, total=total, unit="iB", unit_scale=True, unit_divisor=1024)
        with open(part, "ab") as file, bar:
            for chunk in chunks:
                bar.update(file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size_of(part) != total:
        raise requests.ConnectionError(f"{url}: received {size_of(part):,} bytes, expected {total:,}")


def read_fields(url, response, have):
    """The place of an answer's first byte in the file, and the fields that identify the file."""
    fields = response.headers
    start = have if response.status_code == 206 else 0
    length = fields.get("Content-Length")
    total = start + int(length) if length else None
    span = re.match(r"bytes (\d+)-\d+/(\d+)", fields.get("Content-Range", ""))
    if span:
        start, total = map(int, span.groups())
    etag = fields.get("ETag", "")
    etag = None if etag.startswith("W/") else etag  # A weak one, W/, may stay the same while bytes change.
    return start, {"url": url, "total": total, "modified": fields.get("Last-Modified"), "etag": etag}


def check_archive(path, archive, sha256):
    """Records and returns the digest of the archive, which lies at path; ValueError: another is expected."""
    data_dir = os.path.dirname(archive)
    found = sha256_of(path)
    # Without sha256, the archive must have the digest of an earlier download, if there was one.
    expected = sha256 or read_manifest(data_dir)["archive"].get("sha256", found)
    if found != expected.lower():
        os.replace(path, f"{archive}.broken")
        raise ValueError(f"{archive}: found SHA-256 {found}, expected {expected}; now named "
                         f"{archive}.broken; run again to download it again, or without {MANIFEST}")
    write_manifest(data_dir, archive={"bytes": os.path.getsize(path), "sha256": found})
    return found


def unpack(archive, folder, digest):
    """Unpacks a .tar.gz to a folder that appears when complete; ValueError: broken, unsafe or no shards."""
    # The files of an interrupted call are used, those from another archive are removed.
    part = f"{folder}.{digest[:16]}.part"
    for other in set(glob.glob(f"{glob.escape(folder)}.{'?' * 16}.part")) - {part}:
        shutil.rmtree(other)
    os.makedirs(part, exist_ok=True)
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                member = tarfile.data_filter(member, part)  # It refuses what would leave the folder.
                path = os.path.join(part, member.name)
                if member.isfile() and not (os.path.isfile(path) and size_of(path) == member.size):
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    with complete(path) as file:
                        shutil.copyfileobj(tar.extractfile(member), file, 2**20)
            while stream.read(2**20):  # gzip compares its checksum only at the very end.
                pass
        if not find_shards(part):
            raise tarfile.TarError("it holds no data*.json")
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        shutil.rmtree(part, ignore_errors=True)
        write_manifest(os.path.dirname(archive), archive={})  # The next archive may have another digest.
        os.replace(archive, f"{archive}.broken")
        raise ValueError(f"{archive}: found no sound .tar.gz of TinyStories' shards ({error}); now named "
                         f"{archive}.broken; check the address, run again to download it again") from error
    os.replace(part, folder)


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0
