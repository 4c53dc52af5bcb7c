"""How a run goes on: the lock on its folder, its record of flags and data, and what resuming makes of it."""

import contextlib
import functools
import inspect
import itertools
import os
import socket
import sys
from pathlib import Path

from plumbing.checkpoint import checkpoints_of_run
from plumbing.cli import expect
from plumbing.files import sha256_of
from plumbing.parallel import gather_over_ranks, join_process_group, rank_and_size
from plumbing.streams import say
from plumbing.torch_file import load_file

# -----------------------------------------------------------------------------
# One at a time in a folder


@contextlib.contextmanager
def locked(path, is_master=True):
    """Holds a lock on the file at path, made for it; ValueError, on every rank, where another process does.

    At the end the file goes, and so do folders made for it that are empty. What has died holds no lock.
    """
    path = Path(path)
    made = [folder for folder in path.parents if is_master and not folder.exists()]
    lock = fault = None
    try:
        if is_master:
            try:
                lock = take_lock(path)
            except (ValueError, OSError) as error:
                fault = error
        faults = [each for each in gather_over_ranks(fault) if each]
        if faults:
            raise faults[0]
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock:
                path.unlink(missing_ok=True)
                lock.close()
            for folder in made:
                folder.rmdir()


def take_lock(path):
    """The open file at path, locked; ValueError names the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "a")
    try:
        import fcntl  # Windows has none.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        owner = path.read_text() or "another process"
        raise ValueError(f"{path} is held by {owner}, which works there; wait until it has ended, or give "
                         "another --out_dir") from None
    except (ImportError, OSError) as error:
        say(f"{path} can't be locked ({error}); see to it that nothing else works there", sys.stderr)
    else:
        is_there = path.exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
        if not is_there:  # Its owner has removed it in between.
            lock.close()
            return take_lock(path)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock

# -----------------------------------------------------------------------------
# The flags of a run

# Others would give other windows, other losses or another model.
FIXED = ("seq_len", "shuffle", "seed", "doc_mask", "lora_rank", "lora_alpha", "quantize", "param_dtype",
         "muon")
FREE = ("batch_size", "dtype", "compile")  # They change without a word.
SOURCES = ("ckpt_dir", "preset", "tokenizer_path")  # On resuming, a checkpoint of all weights is the source.
PASSING = ("out_dir", "resume", "device")  # They belong to one start on one machine.


def recordable(flags):
    """The flags that are worth keeping, as plain values that don't depend on the working directory."""
    record = {}
    for name, value in flags.items():
        is_path = name in ("train_data", "val_data", "ckpt_dir", "tokenizer_path")
        if is_path and isinstance(value, str | os.PathLike):
            value = os.path.abspath(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif hasattr(value, "item"):  # one of numpy's numbers
            value = value.item()
        if name not in PASSING:
            record[name] = value
    return record


def read_progress(newest):
    """What a checkpoint says of its run; None: what there is to say of a new one.

    step, loader: where it was. flags: those in effect. schedule: the step after which the learning rate's
    began, and its steps. data: name -> identities of files. best: the step of the lowest validation loss,
    and that loss. Earlier versions have only step, loader and order, which is three of the flags.
    """
    progress = load_file(newest / "progress.pt") if newest else {"step": 0}
    return {"flags": progress.get("order", {}), "schedule": None, "data": {}, "best": None} | progress


def refusal(newest, step, name, old, new):
    """The ValueError of going on from a checkpoint with something that has to be as it was."""
    return ValueError(f"{newest} has step {step} and {name} {old}; found {name} {new}: resume with the "
                      "same, or give another --out_dir")


def resumable(train):
    """Lets train go on, where it resumes, with the flags of the run's own record; locks its folder.

    train: a function of keyword-only flags. Those that it isn't given come from the newest checkpoint.
    ValueError for one that may not change; another one that changes is said in a line.
    """
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}

    @functools.wraps(train)
    def resumed(**given):
        flags = defaults | given
        out_dir = Path(flags["out_dir"])
        expect(not out_dir.is_file(), "out_dir", out_dir, "a folder, not a file")
        rank, world_size, _ = join_process_group(flags["device"])
        with locked(out_dir / "run.lock", rank == 0):
            saved = checkpoints_of_run(out_dir)
            has_source = flags["ckpt_dir"] is not None or flags["preset"] is not None
            expect(saved or has_source or not flags["resume"], "--resume's out_dir", f"{out_dir}, without a "
                   "checkpoint", "the folder of a run, or also the flags that begin one")
            if flags["resume"] and saved:
                given, notes = continued(saved[-1], given, world_size)
                for note in notes if rank == 0 else []:
                    say(f"resuming {saved[-1]} {note}", sys.stderr)
                given = {name: value for name, value in given.items() if name in defaults}
            return train(**given)
    return resumed


def continued(newest, given, world_size):
    """(flags to go on with from a checkpoint, lines on them): those given, else those recorded."""
    progress = read_progress(newest)
    record = progress["flags"]
    given = {name: value for name, value in given.items() if value is not None}  # None leaves the choice.
    notes = []
    has_base = record.get("lora_rank", 0) > 0  # What adapters were put on is still needed.
    for name, new in recordable(given).items():
        old = record.get(name, new)
        if new != old and name in FIXED:
            raise refusal(newest, progress["step"], name, old, new)
        if new != old and name not in FREE:
            is_compared = name in SOURCES and not has_base
            remark = ", which is only compared: the weights are its own" if is_compared else ""
            notes.append(f"with {name} {new}, not {old}{remark}")
    kept = {name: value for name, value in record.items() if has_base or name not in SOURCES}
    flags = kept | given
    if "epochs" in given and "steps" not in given:
        flags["steps"] = None  # The epochs then say how many there are.
    if flags.get("fsdp") and "fsdp" not in given and "RANK" not in os.environ:
        flags["fsdp"] = False
        notes.append("without fsdp, as this process is alone")
    if "total_batch_tokens" in record and "total_batch_tokens" not in given:
        # A step has the same windows on any number of ranks; a batch has to divide a rank's share of them.
        share, rest = divmod(flags["total_batch_tokens"], flags["seq_len"] * world_size)
        sizes = range(1, flags["batch_size"] + 1)
        fitting = [size for size in sizes if rest == 0 and share % size == 0]
        if fitting and fitting[-1] != flags["batch_size"]:
            notes.append(f"with batch_size {fitting[-1]}, not {flags['batch_size']}: a step has {share} "
                         f"windows on each of {world_size} processes")
            flags["batch_size"] = fitting[-1]
    return flags, notes

# -----------------------------------------------------------------------------
# The record of a run


def load_record(newest, flags, data, is_master):
    """(what the newest checkpoint says of the run, the record of it that the checkpoints to come keep).

    newest: None for a new run. flags: those in effect. data: name -> files. ValueError where fewer steps are
    asked for than are done, or where a file is another one.
    """
    progress = read_progress(newest)
    begun = progress["flags"]
    step = progress["step"]
    if flags["steps"] < step:
        raise refusal(newest, step, "steps", begun.get("steps", "more"), flags["steps"])
    known = [entry for entries in progress["data"].values() for entry in entries]
    data = {name: identities(paths, known) for name, paths in data.items()}
    for name, entries in data.items():
        recorded = progress["data"].get(name) or entries  # A run without validation may get one.
        nothing = {"path": "no file", "sha256": "none"}
        for old, new in itertools.zip_longest(recorded, entries, fillvalue=nothing):
            if old["sha256"] != new["sha256"]:
                old, new = (f"{entry['path']} (SHA-256 {entry['sha256']:.12})" for entry in (old, new))
                raise refusal(newest, step, name, old, new)
    schedule = progress["schedule"] or {"begin": 0, "steps": flags["steps"]}
    end = schedule["begin"] + schedule["steps"]
    if flags["steps"] > end and flags["lr"] != begun["lr"]:
        schedule = {"begin": step, "steps": flags["steps"] - step}
    elif flags["steps"] > end and is_master:
        say(f"the schedule ends at step {end}, and steps up to {flags['steps']} keep its last rate; another "
            "--lr begins a new schedule", sys.stderr)
    sources = {name: begun.get(name) for name in SOURCES if flags[name] is None}
    return progress, dict(flags=recordable(flags) | sources, schedule=schedule, data=data)


def identities(paths, known):
    """[{"path", "bytes", "changed", "sha256"}] of files, in order; the ranks share out the reading.

    known: such entries of an earlier start. A file whose path, size and time are among them isn't read
    again, else a gigabyte takes about a second.
    """
    rank, world_size = rank_and_size()
    known = {(entry["path"], entry["bytes"], entry["changed"]): entry for entry in known}
    found = {}
    for i in range(rank, len(paths), world_size):
        path = os.path.abspath(paths[i])
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns)
        found[i] = known.get(key) or dict(zip(("path", "bytes", "changed"), key, strict=True),
                                          sha256=sha256_of(path))
    everything = {}
    for part in gather_over_ranks(found):
        everything |= part
    return [everything[i] for i in range(len(paths))]
