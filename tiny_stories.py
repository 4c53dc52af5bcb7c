"""Texts as token files for training: TinyStories (download, unpack, tokenize), or your own.

    python tiny_stories.py --tokenizer_path Meta-Llama-3.1-8B/tokenizer.model

writes tinystories/TinyStories_val.bin and TinyStories_train.bin, and prints (with Llama 3's vocabulary)

    Number of shards: 50
    Tokenizing val split...
    writing 18,660,516 tokens to tinystories/TinyStories_val.bin
    Tokenizing train split...
    writing 907,021,844 tokens to tinystories/TinyStories_train.bin

The stories are those of "TinyStories: How Small Can Language Models Be and Still Speak Coherent English?"
(Eldan & Li, 2023). On disk: 1.5 GB of archive, the JSON in it, 72 MB and 3.4 GB of tokens, twice meanwhile.

    python tiny_stories.py text --input notes/*.txt chats.jsonl.gz --data_dir mine --vocab_size 4096

writes mine/val.bin and mine/train.bin, with a vocabulary trained on these texts.

plumbing/files.py describes .bin files, manifest.json says what they were made from. A file appears under its
final name only when it is complete; after an interruption the same command goes on with what is unfinished.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing.resource_tracker
import os
import random
import re
import shutil
import signal
import sys
import threading

import numpy as np
from tqdm import tqdm

from plumbing import cli, files
from plumbing.documents import SHARDS, find_shards, read_documents, read_shard, texts_of
from plumbing.download import check_archive, fetch, unpack
from tokenizer import MAX_CHARS, Tokenizer, train_tokenizer

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
ARCHIVE = "TinyStories_all_data.tar.gz"
DATA_DIR = "tinystories"
TOKENIZER_PATH = "Meta-Llama-3.1-8B/tokenizer.model"
LLAMA3 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"  # SHA-256 of its tokenizer.model
KNOWN_TOKENS = {"val": 18_660_516, "train": 907_021_844}  # All 50 shards, tokenized with it.
SHARD_CHARS = 2**25  # Your own text is cut into shards of this size, each a job for one worker.
SAMPLE_CHARS = 2**25  # A vocabulary is trained on that much of it.

# -----------------------------------------------------------------------------
# Download


def download(data_dir: str = DATA_DIR, url: str = URL, sha256: str | None = None):
    """Downloads the archive into data_dir and unpacks it to data_dir/TinyStories_all_data/data*.json.

    What is complete is kept, what was interrupted goes on. sha256: the archive's digest; without it, the
    archive has to be that of an earlier download. ConnectionError: no good answer. ValueError: unsound.
    """
    folder = os.path.join(data_dir, SHARDS)
    archive = os.path.join(data_dir, ARCHIVE)
    unpacked = bool(find_shards(folder))
    os.makedirs(data_dir, exist_ok=True)
    if os.path.exists(archive):
        print(f"{archive} already exists, skipping download...")
        digest = check_archive(archive, archive, sha256)
    elif not unpacked:
        print(f"Downloading {url} to {archive}...")
        digest = fetch(url, archive, sha256)
    if unpacked:
        print(f"{folder} already exists, skipping unpacking...")
    else:
        print(f"Unpacking {archive}...")
        unpack(archive, folder, digest)
    print(f"Number of shards: {len(find_shards(folder))}")


def read_stories(path):
    """The texts of a shard, a JSON list of {"story": text}, in file order; ValueError names the file."""
    return [record["story"] for record in read_shard(path)]

# -----------------------------------------------------------------------------
# Tokenize


def tokenize(data_dir: str = DATA_DIR, tokenizer_path: str = TOKENIZER_PATH, num_workers: int | None = None):
    """Writes data_dir/TinyStories_val.bin, the first shard, and TinyStories_train.bin, the others in order.

    num_workers: processes, None for one per core; the files are the same for any number. A train split of
    more than 2^31 - 1 tokens becomes TinyStories_train_000.bin, _001.bin, … Files of an earlier run stay
    until both splits are complete. FileNotFoundError: no shards; ValueError: a broken one; OSError: no room.
    """
    folder = os.path.join(data_dir, SHARDS)
    shards = find_shards(folder)
    if len(shards) < 2:
        raise FileNotFoundError(f"{folder} holds {len(shards)} data*.json, expected at least 2: one for "
                                f"validation, the rest for training; run tiny_stories.py download first")
    splits = {"val": shards[:1], "train": shards[1:]}
    counts = write_splits(data_dir, "TinyStories_", splits, tokenizer_path, num_workers)
    if len(shards) == 50 and files.sha256_of(tokenizer_path) == LLAMA3:
        matching = "match" if counts == KNOWN_TOKENS else f"do not match {KNOWN_TOKENS}, the known ones"
        print(f"The counts of the full dataset {matching}.")


def write_splits(data_dir, prefix, splits, tokenizer_path, num_workers, max_tokens=files.MAX_TOKENS):
    """Tokenizes splits, name -> shards, to data_dir/PREFIXname.bin; returns name -> number of tokens."""
    Tokenizer(tokenizer_path)  # Its errors come once, before the work.
    num_workers = os.cpu_count() if num_workers is None else num_workers
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}, expected at least 1")
    finished = os.path.join(data_dir, "tokens.part")  # The folder of the shards that are tokenized.
    os.makedirs(finished, exist_ok=True)
    digest = files.sha256_of(tokenizer_path)
    jobs = [(i, shard, finished, tokenizer_path, digest)
            for split in splits.values() for i, shard in enumerate(split)]
    # The tokens lie on the disk twice, finished and joined, which takes about as much as the JSON.
    done_bytes = sum(entry.stat().st_size for entry in os.scandir(finished))
    files.check_disk("tokenizing", sum(os.path.getsize(job[1]) for job in jobs) - done_bytes, data_dir)
    made = {}
    counts = {}
    with contextlib.closing(process_shards(jobs, min(num_workers, len(jobs)))) as results:
        for name, split in splits.items():
            print(f"Tokenizing {name} split...")
            done = list(tqdm(itertools.islice(results, len(split)), total=len(split), unit="shard"))
            made |= write_split(os.path.join(data_dir, prefix + name), done, digest, max_tokens)
            counts[name] = sum(about["tokens"] for *_, about in done)
    files.write_manifest(data_dir, files={})  # While files are replaced, it must not describe other ones.
    for path in made:
        os.replace(f"{path}.new", path)
    for name in os.listdir(data_dir):  # An earlier train split may be in another number of files.
        path = os.path.join(data_dir, name)
        if re.fullmatch(prefix + r"train(_\d\d\d)?\.bin", name) and path not in made:
            os.remove(path)
    files.write_manifest(data_dir, files={os.path.basename(path): about for path, about in made.items()})
    shutil.rmtree(finished)
    return counts


def write_split(stem, finished, tokenizer_digest, max_tokens):
    """Joins finished shards, each kept whole, to as few files PATH.new as hold them: path -> about it."""
    groups = [[]]
    filled = 0
    for shard in finished:
        num_tokens = shard[2]["tokens"]
        if filled and filled + num_tokens > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += num_tokens
    made = {}
    for number, group in enumerate(groups):
        path = f"{stem}_{number:03d}.bin" if len(groups) > 1 else f"{stem}.bin"
        parts, versions, shards = zip(*group, strict=True)
        about = {key: sum(shard[key] for shard in shards) for key in ("stories", "tokens", "bytes")}
        print(f"writing {about['tokens']:,} tokens to {path}")
        files.write_tokens(f"{path}.new", map(files.read_tokens, parts), max(versions))
        made[path] = about | {"version": max(versions), "tokenizer": tokenizer_digest, "shards": shards}
    return made


def process_shards(jobs, num_workers):
    """Yields finish_shard(*job) for each job, in order."""
    if num_workers == 1:
        yield from itertools.starmap(finish_shard, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # The caller may have threads (torch's), which fork breaks.
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, initializer=end_with_parent)
    multiprocessing.resource_tracker.ensure_running()  # Started later, it would lift the mask.
    # Workers inherit this mask, so that Ctrl-C interrupts this process alone, which then kills them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        results = []
        for job in jobs:
            shard = job[1]
            try:
                results.append(pool.submit(finish_shard, *job))
            except OSError:  # A worker has died, and the pool is closing its pipes.
                raise concurrent.futures.BrokenExecutor from None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for job, result in zip(jobs, results, strict=True):
            shard = job[1]
            yield result.result()
    except concurrent.futures.BrokenExecutor:
        raise OSError(f"{shard}: its worker, or that of a later shard, was killed; if memory ran out, try "
                      "fewer --num_workers") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown()


def end_with_parent():
    """Ends a worker when its parent is killed; it would otherwise wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def finish_shard(index, shard, folder, tokenizer_path, tokenizer_digest):
    """Writes a shard's tokens to a .bin in folder, or finds it there; returns path, version and counts."""
    name = os.path.basename(shard)
    digest = files.sha256_of(shard)
    # The file is named after all that its content depends on, so it is never taken for another one.
    key = hashlib.sha256(f"{name} {digest} {index} {tokenizer_digest}".encode()).hexdigest()
    path = os.path.join(folder, f"{key[:32]}.bin")
    if not os.path.exists(path):
        try:
            chunks, *about = encode_shard(index, shard, words_of(tokenizer_path, tokenizer_digest))
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"{shard}: tokenizing failed with {error!r}") from error
        files.write_tokens(path, (np.frombuffer(chunk, "<u4") for chunk in chunks), *about)
    header = files.read_header(path)
    return path, header.version, {"name": name, "sha256": digest, "stories": header.num_documents,
                                  "tokens": header.num_tokens, "bytes": header.num_bytes}


def process_shard(shard_index, shard_filename, tokenizer_path):
    """The tokens of a shard, uint32: its stories, shuffled, each <BOS> tokens <EOS>; ValueError names it."""
    chunks, *_ = encode_shard(shard_index, shard_filename, Words(Tokenizer(tokenizer_path)))
    return np.frombuffer(bytearray().join(chunks), dtype="<u4")


def encode_shard(shard_index, shard, words):
    """(shuffled records as the bytes of their tokens, version of the format, records, bytes of text)."""
    chunks = []
    version = files.VERSION
    num_bytes = 0
    for record in read_shard(shard):
        chunks.append(words.encode(record))
        if "messages" in record:
            version = files.MASKING_VERSION
        num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts_of(record))
    random.Random(1337 + shard_index).shuffle(chunks)  # The index counts the shards of a split.
    return chunks, version, len(chunks), num_bytes


BETWEEN_WORDS = re.compile(r" (?=\S)(?<=\S )")  # A space that touches no other white space.


class Words:
    """Encodes records to bytes of uint32, fast as it remembers the tokens of words.

    A text may be encoded in pieces, each beginning with a space that touches no other white space: Llama 3's
    pattern joins it to what follows, never to what precedes. Only a text's first word has no such space.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.first = {}  # word -> bytes of its tokens
        self.later = {}  # word -> bytes of the tokens of a space and the word

    def encode(self, record):
        """<BOS> story <EOS>, or a dialog, masked but for the assistant's words and <|eot_id|>."""
        if "messages" in record:
            return self.encode_chat(record["messages"])
        [text] = texts_of(record)
        if not text or len(text) > MAX_CHARS:  # The tokenizer cuts a longer text, even within a word.
            tokens = [as_bytes(self.tokenizer.encode(text))]
        else:  # The second way to cut is slower, and rarely needed: for double spaces and the like.
            tokens = self.look_up(text.split(" ")) or self.look_up(BETWEEN_WORDS.split(text))
        return b"".join([as_bytes([self.tokenizer.bos_id]), *tokens, as_bytes([self.tokenizer.eos_id])])

    def look_up(self, words):
        """The bytes of each word's tokens; None if the text must not be cut there."""
        tokens = [self.first.get(words[0]), *map(self.later.get, words[1:])]
        if all(tokens):
            return tokens
        for i, word in enumerate(words):
            if tokens[i]:
                continue
            if not word or word[0].isspace() or word[-1].isspace():
                return None
            memory = self.later if i else self.first
            tokens[i] = memory.get(word)  # It may be known by now, as the text has it twice.
            if not tokens[i]:
                tokens[i] = as_bytes(self.tokenizer.encode(f" {word}" if i else word))
                if len(word) < 32 and len(self.first) + len(self.later) < 2**17:  # At most 30 MB.
                    memory[word] = tokens[i]
        return tokens

    def encode_chat(self, messages):
        tokens = [self.tokenizer.bos_id | files.MASKED]
        header = self.tokenizer.encode_header("assistant")
        for message in messages:
            ids = self.tokenizer.encode_message(message)
            num_masked = len(header) if message["role"] == "assistant" else len(ids)
            tokens += [i | files.MASKED for i in ids[:num_masked]] + ids[num_masked:]
        return as_bytes(tokens)


@functools.lru_cache(maxsize=1)
def words_of(tokenizer_path, digest):  # The digest is there as the file may change.
    return Words(Tokenizer(tokenizer_path))


def as_bytes(tokens):
    return np.array(tokens, dtype="<u4").tobytes()

# -----------------------------------------------------------------------------
# Your own text


def text(*, input: str, data_dir: str = "text", tokenizer_path: str | None = None,
         vocab_size: int | None = None, field: str = "text", separator: str | None = None,
         val_fraction: float = 0.01, num_workers: int | None = None):
    """Tokenizes your own texts and chats to data_dir/val.bin and data_dir/train.bin.

    input: files, also gzipped (.gz). .txt: a document, or several between separators (\\n is a line break).
    .jsonl, .json, .parquet (needs pyarrow): objects by line, in a list, by row; of each, the text under
    field, or a chat, "messages": [{"role": …, "content": …}], of which the assistant's turns are learned.
    tokenizer_path: None for Meta's, where tokenize expects it. vocab_size: a vocabulary of that size is
    trained on the texts instead, data_dir/tokenizer.model. val_fraction: of the documents, chosen by their
    hash, one at least. ValueError names the file and the document that can't be read.
    """
    paths = input.split("\n") if isinstance(input, str) else list(map(os.fspath, input))
    if vocab_size is not None and tokenizer_path is not None:
        raise ValueError("found --vocab_size and --tokenizer_path, expected one of them")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise FileNotFoundError(f"{missing[0]}: found no such file, expected --input PATH...")
    if vocab_size is None:
        tokenizer_path = tokenizer_path or TOKENIZER_PATH
        Tokenizer(tokenizer_path)  # Its errors come before the work.
    folder = os.path.join(data_dir, "documents.part")  # Every run writes it again, which is quick.
    print(f"Reading {len(paths):,} files...")
    least = split_documents(paths, field, separator, val_fraction, folder)
    if least >= val_fraction:  # None came to validation; now the document of the least hash does.
        split_documents(paths, field, separator, math.nextafter(least, 2), folder)
    splits = {name: find_shards(os.path.join(folder, name)) for name in ("val", "train")}
    if not splits["train"]:
        shutil.rmtree(folder)
        raise ValueError(f"{paths[0]}: found no two documents to train and to validate on, expected more; "
                         "--separator cuts .txt files, --val_fraction is the share of validation")
    if vocab_size is not None:
        tokenizer_path = os.path.join(data_dir, "tokenizer.model")
        train_tokenizer(sample_texts(splits["train"]), vocab_size, tokenizer_path)
    write_splits(data_dir, "", splits, tokenizer_path, num_workers)
    shutil.rmtree(folder)


def split_documents(paths, field, separator, val_fraction, folder):
    """Puts a document into folder/val if its hash, 0 … 1, is below val_fraction; returns the least hash."""
    shutil.rmtree(folder, ignore_errors=True)
    lines = {"val": [], "train": []}  # of the shard that each split is at
    sizes = collections.Counter()  # split -> characters in these lines
    numbers = collections.Counter()  # split -> shards that are written
    least = 1.0

    def flush(split):
        path = os.path.join(folder, split, f"data{numbers[split]:05d}.json")
        with files.complete(path) as file:
            file.write(f"[{', '.join(lines[split])}]".encode())
        lines[split].clear()
        sizes[split] = 0
        numbers[split] += 1

    for split in lines:
        os.makedirs(os.path.join(folder, split))
    for record in itertools.chain.from_iterable(read_documents(path, field, separator) for path in paths):
        if not any(map(str.strip, texts_of(record))):
            continue  # An empty document teaches nothing.
        line = json.dumps(record)
        place = int.from_bytes(hashlib.sha256(line.encode()).digest()[:6]) / 2**48
        least = min(least, place)
        split = "val" if place < val_fraction else "train"
        lines[split].append(line)
        sizes[split] += len(line)
        if sizes[split] > SHARD_CHARS:
            flush(split)
    for split in lines:
        if lines[split]:
            flush(split)
    return least


def sample_texts(shards):
    """Yields texts from the beginning of every shard, about SAMPLE_CHARS in all."""
    for shard in shards:
        left = SAMPLE_CHARS / len(shards)
        for text in itertools.chain.from_iterable(map(texts_of, read_shard(shard))):
            yield text
            left -= len(text)
            if left < 0:
                break

# -----------------------------------------------------------------------------
# Command line


def prepare(data_dir: str = DATA_DIR, url: str = URL, tokenizer_path: str = TOKENIZER_PATH,
            num_workers: int | None = None, sha256: str | None = None):
    """Downloads, unpacks and tokenizes TinyStories."""
    Tokenizer(tokenizer_path)  # Its errors come before 1.5 GB of download.
    download(data_dir, url, sha256)
    tokenize(data_dir, tokenizer_path, num_workers)


def main():
    words = sys.argv[1:]
    if "--input" in words:  # It is the one flag that takes several words.
        begin = words.index("--input") + 1
        end = next((i for i in range(begin, len(words)) if words[i].startswith("--")), len(words))
        words[begin - 1:end] = ["--input=" + "\n".join(words[begin:end])]
    cli.run({"download": download, "tokenize": tokenize, "text": text, "prepare": prepare}, "prepare", words)


if __name__ == "__main__":
    main()
