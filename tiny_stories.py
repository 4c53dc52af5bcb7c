"""TinyStories as token files for training: download, unpack, tokenize.

    python tiny_stories.py --tokenizer_path Meta-Llama-3.1-8B/tokenizer.model

writes tinystories/TinyStories_val.bin and TinyStories_train.bin, and prints (with Llama 3's vocabulary)

    Number of shards: 50
    Tokenizing val split...
    writing 18,660,516 tokens to tinystories/TinyStories_val.bin
    Tokenizing train split...
    writing 907,021,844 tokens to tinystories/TinyStories_train.bin

The stories are those of "TinyStories: How Small Can Language Models Be and Still Speak Coherent English?"
(Eldan & Li, 2023). On disk: 1.5 GB of archive, then the unpacked JSON, then 72 MB and 3.4 GB of tokens.

A .bin file is 256 little-endian int32 of header (magic, version, number of tokens, zeros), then the tokens
as little-endian uint32. Every file appears under its final name only when it is complete.
"""

import contextlib
import glob
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import zlib
from array import array
from multiprocessing import resource_tracker

import numpy as np
import requests
from tqdm import tqdm

import cli
from tokenizer import Tokenizer

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
ARCHIVE = "TinyStories_all_data.tar.gz"
SHARDS = "TinyStories_all_data"  # the folder of unpacked shards, inside the data folder
DATA_DIR = "tinystories"
TOKENIZER_PATH = "Meta-Llama-3.1-8B/tokenizer.model"
TIMEOUT = 30  # seconds without an answer, or without a further byte

MAGIC = 20240801
VERSION = 7
MAX_TOKENS = 2**31 - 1  # of one .bin file, whose header counts in int32

# -----------------------------------------------------------------------------
# download


def download(data_dir: str = DATA_DIR, url: str = URL):
    """Downloads the archive into data_dir and unpacks it to data_dir/TinyStories_all_data/data*.json.

    What is complete already is kept; an interrupted download continues where it stopped. ConnectionError:
    the server can't be reached, refuses, or breaks off. ValueError: the archive is broken or unsafe.
    """
    folder, archive = os.path.join(data_dir, SHARDS), os.path.join(data_dir, ARCHIVE)
    if find_shards(folder):
        print(f"{folder} already exists, skipping download...")
    else:
        os.makedirs(data_dir, exist_ok=True)
        if os.path.exists(archive):
            print(f"{archive} already exists, skipping download...")
        else:
            print(f"Downloading {url} to {archive}...")
            fetch(url, archive)
        print(f"Unpacking {archive}...")
        unpack(archive, folder)
    print(f"Number of shards: {len(find_shards(folder))}")


def fetch(url, path):
    """Downloads url to path, by way of path.part, which a later call continues. Errors: ConnectionError."""
    part = path + ".part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity"}  # so that ranges and lengths count the bytes that are written
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if have and response.status_code == 416:  # nothing after what we have: no part of this file
                os.remove(part)
                return fetch(url, path)
            if response.status_code not in (200, 206):
                raise ConnectionError(f"{url} answered {response.status_code} {response.reason}, expected "
                                      f"200 OK; check the address or get {path} by other means")
            if response.status_code == 200:  # the whole file: as asked, or as the server ignores ranges
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if have else "wb") as file, tqdm(
                    desc=path, initial=have, total=total,
                    unit="iB", unit_scale=True, unit_divisor=1024) as bar:
                for chunk in response.iter_content(chunk_size=2**20):
                    bar.update(file.write(chunk))
                file.flush()
                os.fsync(file.fileno())
        if total is not None and os.path.getsize(part) != total:
            raise requests.ConnectionError(f"{os.path.getsize(part):,} bytes received, expected {total:,}")
    except requests.RequestException as error:
        raise ConnectionError(f"downloading {url} failed: {error}; run again to continue") from error
    os.replace(part, path)


def unpack(archive, folder):
    """Unpacks a .tar.gz to a folder that appears when complete.

    ValueError if it is broken, unsafe or without shards: it is put aside, so that a new run starts anew.
    """
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                tar.extractall(part, filter="data")  # the filter refuses members that would leave the folder
            while stream.read(2**20):  # on to the end, where gzip keeps its checksum
                pass
        if not find_shards(part):
            raise tarfile.TarError("it holds no data*.json")
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        shutil.rmtree(part, ignore_errors=True)
        os.replace(archive, archive + ".broken")
        raise ValueError(f"{archive}: found no sound .tar.gz of TinyStories' shards ({error}); now named "
                         f"{archive}.broken; check the address, then run again to download anew") from error
    os.replace(part, folder)


def find_shards(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "data*.json")))


# -----------------------------------------------------------------------------
# tokenize


def tokenize(data_dir: str = DATA_DIR, tokenizer_path: str = TOKENIZER_PATH, num_workers: int | None = None):
    """Writes data_dir/TinyStories_val.bin, the first shard, and TinyStories_train.bin, the others in order.

    num_workers: processes, None for one per core; the files are the same for any number. A train split of
    more than 2^31 - 1 tokens becomes TinyStories_train_000.bin, _001.bin, … Files of an earlier run stay
    until both splits are complete. FileNotFoundError without shards or tokenizer, ValueError if broken.
    """
    folder = os.path.join(data_dir, SHARDS)
    shards = find_shards(folder)
    if len(shards) < 2:
        raise FileNotFoundError(f"{folder} holds {len(shards)} data*.json, expected at least 2: one for "
                                f"validation, the rest for training; run tiny_stories.py download first")
    Tokenizer(tokenizer_path)  # its errors come once, before the work
    num_workers = os.cpu_count() if num_workers is None else num_workers
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}, expected at least 1")

    splits = {"val": shards[:1], "train": shards[1:]}
    jobs = [(i, shard, tokenizer_path) for split in splits.values() for i, shard in enumerate(split)]
    written = {}  # path.part -> path
    with contextlib.closing(process_shards(jobs, min(num_workers, len(jobs)))) as results:
        for name, split in splits.items():
            print(f"Tokenizing {name} split...")
            arrays = tqdm(itertools.islice(results, len(split)), total=len(split), unit="shard")
            written |= write_split(os.path.join(data_dir, f"TinyStories_{name}"), arrays)
    for part, path in written.items():
        os.replace(part, path)
    for suffix in "", "_[0-9][0-9][0-9]":  # an earlier train split may be in another number of files
        pattern = os.path.join(glob.escape(data_dir), f"TinyStories_train{suffix}.bin")
        for path in set(glob.glob(pattern)) - set(written.values()):
            os.remove(path)


def process_shards(jobs, num_workers):
    """Yields process_shard(*job) for each job, in order; at most num_workers + 1 shards are in memory.

    Worker w takes every num_workers-th job from the w-th on, and answers through its own pipe: an executor
    would hang if a worker were killed while it answers.
    """
    if num_workers == 1:
        yield from itertools.starmap(process_shard, jobs)
        return
    workers = []
    try:
        for first in range(num_workers):
            workers.append(start_worker(jobs[first::num_workers]))
        for job, (_, answers) in zip(jobs, itertools.cycle(workers), strict=False):
            try:
                result = answers.recv()
            except (EOFError, OSError):
                raise OSError(f"{job[1]}: its worker was killed or failed; if memory ran out, try fewer "
                              "--num_workers") from None
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        for worker, _ in workers:
            worker.kill()
            worker.join()


def start_worker(jobs):
    """Starts a process for these jobs; returns it and the end of a pipe that its answers come from."""
    spawn = multiprocessing.get_context("spawn")  # a caller may have threads (torch), which fork would break
    answers, writer = spawn.Pipe(duplex=False)
    worker = spawn.Process(target=work, args=(jobs, writer), daemon=True)
    if os.name == "posix":  # workers inherit the mask: Ctrl-C is for this process, which then kills them
        resource_tracker.ensure_running()  # its start would lift the mask
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        worker.start()
    finally:
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writer.close()  # so that a worker's end ends the pipe
    return worker, answers


def work(jobs, writer):
    for job in jobs:
        try:
            result = process_shard(*job)
        except (ValueError, OSError) as error:
            result = error
        writer.send(result)


def process_shard(shard_index, shard_filename, tokenizer_path):
    """The tokens of one shard, uint32: its stories, shuffled and stripped, each as <BOS> tokens <EOS>.

    The shuffle's seed is 1337 + shard_index, the shard's place within its split. ValueError names the shard.
    """
    stories = read_stories(shard_filename)
    random.Random(1337 + shard_index).shuffle(stories)
    tokenizer = Tokenizer(tokenizer_path)
    tokens = array("I")  # 4 bytes a token where a list takes about 40
    for story in stories:
        tokens.fromlist(tokenizer.encode(story.strip(), bos=True, eos=True))
    return np.frombuffer(tokens, dtype=np.uint32)


EXPECTED = f'expected a list of {{"story": text}}; delete {SHARDS} and run tiny_stories.py download again'


def read_stories(path):
    """The texts of a shard, a JSON list of {"story": text}, in file order; ValueError names the file."""
    with open(path, encoding="utf-8") as file:
        try:
            records = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: found no JSON in UTF-8 ({error}), {EXPECTED}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: found {json.dumps(records):.60}, {EXPECTED}")
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("story"), str):
            raise ValueError(f"{path}, story {i}: found {json.dumps(record):.60}, {EXPECTED}")
    return [record["story"] for record in records]


# -----------------------------------------------------------------------------
# token files


def write_split(stem, arrays):
    """Writes token arrays, each kept whole, to as few .bin files as hold them; returns {path.part: path}.

    One file will be STEM.bin, several STEM_000.bin, STEM_001.bin, …; the renaming is left to the caller.
    """
    file_number, filled = 0, 0

    def file_of(tokens):
        nonlocal file_number, filled
        if filled and filled + len(tokens) > MAX_TOKENS:
            file_number, filled = file_number + 1, 0
        filled += len(tokens)
        return file_number

    counts = {}  # path.part -> tokens
    for number, group in itertools.groupby(arrays, key=file_of):
        part = f"{stem}_{number:03d}.bin.part"
        counts[part] = write_datafile(part, group)
    written = {part: part.removesuffix(".part") if len(counts) > 1 else f"{stem}.bin" for part in counts}
    for part, path in written.items():
        print(f"writing {counts[part]:,} tokens to {path}")
    return written


def write_datafile(path, arrays):
    """Writes an iterable of token arrays as one .bin file, as they come; returns the number of tokens."""
    header, count = np.zeros(256, dtype="<i4"), 0
    with open(path, "wb") as file:
        file.write(header)
        for tokens in arrays:
            file.write(np.ascontiguousarray(tokens, dtype="<u4"))
            count += len(tokens)
        if count > MAX_TOKENS:
            raise ValueError(f"{path} would hold {count:,} tokens, expected at most {MAX_TOKENS:,}; "
                             "use more shards")
        header[:3] = MAGIC, VERSION, count
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
    return count


# -----------------------------------------------------------------------------
# command line


def prepare(data_dir: str = DATA_DIR, url: str = URL, tokenizer_path: str = TOKENIZER_PATH,
            num_workers: int | None = None):
    """Downloads, unpacks and tokenizes TinyStories."""
    Tokenizer(tokenizer_path)  # its errors come before 1.5 GB of download
    download(data_dir, url)
    tokenize(data_dir, tokenizer_path, num_workers)


if __name__ == "__main__":
    cli.run({"download": download, "tokenize": tokenize, "prepare": prepare}, default="prepare")
