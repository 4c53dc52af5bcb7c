"""Files that appear whole, room on the disk, the .bin shard of tokens and the manifest beside it.

A shard is 256 little-endian int32 of header (magic, version, number of tokens, number of documents, bytes of
text as int64, answers that a template lost, zeros), then the tokens as little-endian uint32: the format of
karpathy's llm.c. Its version
says which bits a token may have besides its id:

    7   none: every token is a target, and <|begin_of_text|> alone begins a document
    8   MASKED: the token is read, but no target. Older programs of ours wrote it; it is only read now
    9   MASKED, and START: the token is the first of a document, whatever its id

Version 9 is written where a chat, a prompt or a special token was read, and always with a tokenizer.json;
else 7.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.machine import flush_to_disk

# -----------------------------------------------------------------------------
# Files that appear whole


@contextlib.contextmanager
def complete(path):
    """Opens a binary file that appears at path only when it is complete; an OSError names it."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)  # A full disk gets its space back.
        if isinstance(error, OSError) and error.errno and not error.filename:  # write() names no file.
            remedy = f"{error.strerror}; make room, then run again: what is finished stays"
            raise OSError(error.errno, remedy, str(path)) from error
        raise


@contextlib.contextmanager
def complete_folder(path, replace=False):
    """Yields a new folder, path with .part appended, that appears at path only when it is complete.

    replace: whether a folder at path may be there; it stays until then and is removed.
    """
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        old = Path(f"{path}.old.part")
        shutil.rmtree(old, ignore_errors=True)
        if replace and os.path.exists(path):
            os.replace(path, old)  # A folder that holds files can't be replaced in one step.
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        # When the disk is full, torch.save fails a second time as it closes its archive; we show the first.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise OSError(f"{part}: {error.__context__}") from None
        raise


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_disk(what, num_bytes, folder):
    """Raises OSError if the disk of a folder, which need not exist yet, has less than num_bytes free."""
    folder = Path(folder).absolute()
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise OSError(f"{what} takes {num_bytes:,} bytes, the disk of {there} has {free:,} bytes free; make "
                      "room or choose a folder on another disk")


def matching(pattern):
    """The files that a pattern matches, by name; names that exist may have *, ? and [ in them."""
    if os.path.exists(pattern):
        return [os.fspath(pattern)]
    parts = Path(pattern).parts
    known = 0  # so many parts, taken as they are, lead to something that exists
    while known < len(parts) and os.path.exists(os.path.join(*parts[:known + 1])):
        known += 1
    return sorted(glob.glob(os.path.join("", *map(glob.escape, parts[:known]), *parts[known:])))

# -----------------------------------------------------------------------------
# Shards of tokens

MAGIC = 20240801
VERSION = 7
MASKING_VERSION = 8
MARKING_VERSION = 9
MASKED = 2**31  # a position that the model reads but isn't trained to predict
START = 2**30  # a document's first token, which no id tells in every vocabulary
HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1  # The header has the count as an int32.


class Header(NamedTuple):
    version: int
    num_tokens: int
    num_documents: int  # 0 in files of other programs
    num_bytes: int  # UTF-8 bytes of the documents' text; 0 in files of other programs
    num_lost: int = 0  # answers of dialogs of which a chat template leaves nothing to learn


def read_header(path):
    """The Header of a .bin shard; ValueError names the file and the fault."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: found a folder, expected a .bin file or a pattern of some, such as "
                         f"{path}/train.bin")
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        size = file.seek(0, os.SEEK_END)
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes; a token file begins with a header of {HEADER_BYTES}")
    magic, version, count, num_documents, *_, num_lost = np.frombuffer(header, dtype="<i4")[:7].tolist()
    [num_bytes] = np.frombuffer(header, dtype="<i8")[2:3].tolist()
    if magic != MAGIC or not VERSION <= version <= MARKING_VERSION:
        raise ValueError(f"{path}: magic {magic}, version {version}; expected {MAGIC} and {VERSION} to "
                         f"{MARKING_VERSION}: tokenize again")
    if count < 0 or size != HEADER_BYTES + 4 * count:
        raise ValueError(f"{path}: the header says {count} tokens, {HEADER_BYTES + 4 * count} bytes; the "
                         f"file has {size} bytes: truncated or damaged, tokenize again")
    return Header(version, count, num_documents, num_bytes, num_lost)


def read_tokens(path, first=0, count=-1):
    """Tokens of a shard as they are stored, uint32, from number first on; count -1: to the end."""
    return np.fromfile(path, dtype="<u4", count=count, offset=HEADER_BYTES + 4 * first)


def split_marks(stored, version, bos_id=None):
    """Stored tokens as ids, whether they are targets, and whether they begin a document.

    bos_id: the id that begins documents in versions 7 and 8, None if none does.
    """
    if version == MARKING_VERSION:
        return stored % START, stored < MASKED, (stored & START) > 0
    ids = stored % MASKED if version == MASKING_VERSION else stored
    is_target = (stored < MASKED) | (version == VERSION)
    return ids, is_target, ids == bos_id


def check_apart(train_files, val_files=()):
    """Raises ValueError if a shard is among both."""
    shared = set(map(os.path.realpath, train_files)) & set(map(os.path.realpath, val_files))
    if shared:
        raise ValueError(f"{min(shared)} is in both train_data and val_data; expected different files")


def write_tokens(path, arrays, version=VERSION, num_documents=0, num_bytes=0, num_lost=0,
                 max_tokens=MAX_TOKENS):
    """Writes an iterable of token arrays as one .bin shard, one by one; returns the number of tokens."""
    header = np.zeros(256, dtype="<i4")
    count = 0
    with complete(path) as file:
        file.write(header)
        for tokens in arrays:
            file.write(np.ascontiguousarray(tokens, dtype="<u4"))
            count += len(tokens)
        if count > max_tokens:
            raise ValueError(f"{path} would hold {count:,} tokens, expected at most {max_tokens:,}; "
                             "use more shards")
        header[:4] = MAGIC, version, count, num_documents
        header[4:6].view("<i8")[:] = num_bytes
        header[6] = num_lost
        file.seek(0)
        file.write(header)
    return count

# -----------------------------------------------------------------------------
# The manifest: what the files of a folder were made from

MANIFEST = "manifest.json"


def read_manifest(folder):
    """{"archive": about it, "files": shard's name -> about it}; ValueError if it is damaged."""
    path = Path(folder, MANIFEST)
    manifest = {"archive": {}, "files": {}}
    try:
        if path.is_file():
            manifest = manifest | json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(about, dict) for about in (manifest["archive"], *manifest["files"].values())):
            raise TypeError("its entries are not objects")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: found no JSON object that says what files were made from ({error}); "
                         "delete it, then run again") from error
    return manifest


def write_manifest(folder, **sections):
    """Replaces the sections that are given, "archive" or "files", and keeps the others."""
    manifest = json.dumps(read_manifest(folder) | sections, indent=1, sort_keys=True)
    with complete(Path(folder, MANIFEST)) as file:
        file.write(manifest.encode())


def check_manifests(files, tokenizer_path):
    """Raises ValueError if the manifest beside a .bin shard says it was made with another tokenizer."""
    digest = sha256_of(tokenizer_path)
    for path in map(Path, files):
        made_with = read_manifest(path.parent)["files"].get(path.name, {}).get("tokenizer", digest)
        if made_with != digest:
            raise ValueError(f"{path} was not tokenized with {tokenizer_path}: {MANIFEST} says SHA-256 "
                             f"{made_with}, found {digest}; give that tokenizer, or tokenize again")
