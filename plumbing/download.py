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

from plumbing.documents import BLOCK, find_shards
from plumbing.files import MANIFEST, check_disk, complete, read_manifest, sha256_of, write_manifest

TIMEOUT = 30  # seconds without an answer, or without a further byte
ATTEMPTS = 5  # in a row that bring nothing new
BACKOFF = 1  # second before the second of them; doubles each time
CHUNK = 2**13  # bytes of an answer that are written at once; a broken connection loses a part of them


def fetch(url, path, sha256=None):
    """Downloads url to path, by way of path.part, which a later call continues; returns the SHA-256.

    path.part.json tells of which file. ConnectionError: ATTEMPTS in a row brought nothing new.
    """
    part, state, failures = f"{path}.part", f"{path}.part.json", 0
    while True:
        had = size_of(part)
        try:
            receive(url, part, state)
            break
        except requests.RequestException as error:
            failures = 0 if size_of(part) > had else failures + 1
            if failures == ATTEMPTS:
                raise ConnectionError(f"downloading {url} failed: {error}; run again to continue") from error
            delay = BACKOFF * 2 ** max(failures - 1, 0)
            print(f"{error}; trying again in {delay} s", file=sys.stderr)
            time.sleep(delay)
    digest = check_archive(part, path, sha256)
    with contextlib.suppress(FileNotFoundError):
        os.remove(state)
    os.replace(part, path)
    return digest


def check_archive(path, archive, sha256):
    """Records and returns the digest of the archive, so far at path. ValueError: another is expected."""
    data_dir, found = os.path.dirname(archive), sha256_of(path)
    expected = sha256 or read_manifest(data_dir)["archive"].get("sha256", found)
    if found != expected.lower():
        os.replace(path, f"{archive}.broken")
        raise ValueError(f"{archive}: found SHA-256 {found}, expected {expected}; now "
                         f"named {archive}.broken; run again to download anew, or without {MANIFEST}")
    write_manifest(data_dir, archive={"bytes": os.path.getsize(path), "sha256": found})
    return found


def receive(url, part, state):
    """Tries once to complete part. Worth another try: RequestException; not: ConnectionError, ValueError."""
    have, known = size_of(part), {}
    with contextlib.suppress(FileNotFoundError, ValueError), open(state, encoding="utf-8") as file:
        known = json.load(file)
    if have and have == known.get("total") and url == known["url"]:
        return
    headers = {"Accept-Encoding": "identity"}  # so that ranges and lengths count the bytes that are written
    if have:
        headers["Range"] = f"bytes={have}-"
        if unchanged := known.get("etag") or known.get("modified"):
            headers["If-Range"] = unchanged  # else all of it is to come
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, fields = response.status_code, response.headers
        if status not in (200, 206, 416):
            error = f"{url} answered {status} {response.reason}"
            if status in (408, 429) or status >= 500:
                raise requests.HTTPError(error)
            raise ConnectionError(f"{error}, expected 200 OK; check the address or get the file otherwise")
        if span := re.match(r"bytes (\d+)-\d+/(\d+)", fields.get("Content-Range", "")):
            start, total = map(int, span.groups())
        else:
            start, length = have if status == 206 else 0, fields.get("Content-Length")
            total = start + int(length) if length else None
        etag = fields.get("ETag", "")  # a weak one, W/, doesn't vouch for bytes
        about = {"url": url, "total": total, "modified": fields.get("Last-Modified"),
                 "etag": None if etag.startswith("W/") else etag}
        changed = any(known.get(key) and about[key] and known[key] != about[key] for key in about)
        if status == 416 or status == 206 and (changed or start != have):
            os.remove(part)
            raise requests.ConnectionError(f"{url} has changed since its download began")
        response.raw.headers.pop("Content-Encoding", None)  # of the .gz itself: to stay packed
        chunks = response.iter_content(chunk_size=CHUNK)
        if status == 200:  # all of it: as asked, as the server ignores ranges, or as it has changed
            start, first = 0, next(chunks, b"")
            if not first.startswith(b"\x1f\x8b"):
                raise ValueError(f"{url} answered 200 with {first[:40]!r}, expected a .tar.gz; check the "
                                 "address and whether the network wants a login, then run again")
            chunks = itertools.chain([first], chunks)
            open(part, "wb").close()  # empty, before state tells of another file
            with complete(state) as file:
                file.write(json.dumps(about).encode())
        check_disk("the download", (total or start) - start, os.path.dirname(part))
        with open(part, "ab") as file, tqdm(desc=part, initial=start, total=total, unit="iB",
                                            unit_scale=True, unit_divisor=1024) as bar:
            for chunk in chunks:
                bar.update(file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size_of(part) != total:
        raise requests.ConnectionError(f"{url}: received {size_of(part):,} bytes, expected {total:,}")


def unpack(archive, folder, digest):
    """Unpacks a .tar.gz to a folder that appears when complete; members that are there already stay.

    ValueError if it is broken, unsafe or without shards: it is put aside, so that a new run starts anew.
    """
    part = f"{folder}.{digest[:16]}.part"
    for other in set(glob.glob(f"{glob.escape(folder)}.{'?' * 16}.part")) - {part}:
        shutil.rmtree(other)
    os.makedirs(part, exist_ok=True)
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    member = tarfile.data_filter(member, part)  # refuses what would leave the folder
                    path = os.path.join(part, member.name)
                    if member.isfile() and not (os.path.isfile(path) and size_of(path) == member.size):
                        os.makedirs(os.path.dirname(path), exist_ok=True)
                        with complete(path) as file:
                            shutil.copyfileobj(tar.extractfile(member), file, BLOCK)
            while stream.read(BLOCK):  # on to the end, where gzip keeps its checksum
                pass
        if not find_shards(part):
            raise tarfile.TarError("it holds no data*.json")
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        shutil.rmtree(part, ignore_errors=True)
        write_manifest(os.path.dirname(archive), archive={})  # so that another digest is welcome
        os.replace(archive, f"{archive}.broken")
        raise ValueError(f"{archive}: found no sound .tar.gz of TinyStories' shards ({error}); now named "
                         f"{archive}.broken; check the address, then run again to download anew") from error
    os.replace(part, folder)


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0
