"""What the tests share: a random tiny model and its files, texts, token files, closeness and processes."""

import contextlib
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import llama31
from llama31 import Llama, ModelArgs, Transformer

ROOT = Path(llama31.__file__).parent
SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, multiple_of=16, max_seq_len=128)
SCALED = dict(n_heads=2, use_scaled_rope=True)  # 16 pairs a head, which fall into all of rope_bands
# Heads narrower and wider than a share of dim, as kanana's and Minitron's are; of 60, 8 is no divisor.
NARROW = dict(n_heads=4, n_kv_heads=2, head_dim=6)
WIDE = dict(dim=60, n_heads=8, n_kv_heads=2, head_dim=10)
# RoPE slowed by other numbers, from another context on, and by 1, which changes nothing.
RESCALED = dict(SCALED, rope_scale_factor=16.0, rope_low_freq_factor=0.5, rope_high_freq_factor=32.0,
                rope_old_context=2048)
UNSLOWED = dict(SCALED, rope_scale_factor=1.0)
WORDS = ("once upon a time there was the little cat Zoë who sat on a mat and saw 🦙 with the big red dog "
         "named Max, it's 2024").split()

# -----------------------------------------------------------------------------
# Models


def random_model(seed=0, **changes):
    """A Transformer of SHAPE with weights so large that every one of them is seen in the logits."""
    model = Transformer(ModelArgs(**{**SHAPE, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=float(p.dim() == 1), std=p.size(-1) ** -0.5, generator=generator)
    return model


def random_llama(tokenizer=None, seed=0, **changes):
    """A Llama with a random model, of the size of the tokenizer's vocabulary where there is one."""
    if tokenizer:
        changes = {"vocab_size": tokenizer.n_words, **changes}
    return Llama(random_model(seed, **changes), tokenizer)


def write_checkpoint(folder, model, num_files=1, *, tokenizer=None, params=None, without=()):
    """Writes a model in Meta's layout, split as its model-parallel code splits, and returns the folder.

    params: what params.json has, instead of the model's args. without: names of tensors to leave out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params or asdict(model.args)))
    dims = {"wo": 1, "w2": 1, "attention_norm": None, "ffn_norm": None, "norm": None}
    for i in range(num_files):
        part = {}
        for name, p in model.state_dict().items():
            dim = dims.get(name.split(".")[-2], 0)
            if name not in without:
                whole = dim is None or num_files == 1
                part[name] = p if whole else p.chunk(num_files, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    if tokenizer:
        shutil.copy(tokenizer.model_path, folder / "tokenizer.model")
    return folder


def read_weights(folder):
    """The tensors, by name, of a checkpoint of one file."""
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def rope_bands(args):
    """How many of a head's pairs are kept, blended and slowed; Meta's bands are > 4, 1 to 4, < 1 turns."""
    D = args.get("head_dim") or args["dim"] // args["n_heads"]
    low, high = args.get("rope_low_freq_factor", 1), args.get("rope_high_freq_factor", 4)
    context = args.get("rope_old_context", 8192)
    theta = args.get("rope_theta", 500000.0)
    turns = [context * theta ** (-2 * i / D) / (2 * math.pi) for i in range(D // 2)]
    return sum(t > high for t in turns), sum(low <= t <= high for t in turns), sum(t < low for t in turns)


def assert_close(a, b, what="", negligible=0.0):
    """Asserts the contract between implementations, max|a-b| <= 1e-5 max|b|, or that both are negligible."""
    assert a.shape == b.shape, f"{what}: shape {a.shape}, expected {b.shape}"
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= 1e-5 * size or max(error, size) < negligible, f"{what}: off by {error}, of {size}"


# -----------------------------------------------------------------------------
# Texts and tokens


def sentences(n, seed=0, shortest=1, longest=30):
    """n random sentences, each of so many WORDS."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(shortest, longest))) + "." for _ in range(n)]


def random_tokens(*shape, high=SHAPE["vocab_size"], seed=1):
    """Random ids from 0 to below high."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def shard_bytes(tokens, magic=20240801, version=7, count=None):
    """What a .bin shard of these tokens holds, where its header tells no other count."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, dtype="<u4").tobytes()


def shard_tokens(path):
    """The tokens of a .bin shard as they are stored, with the marks of version 8."""
    return np.frombuffer(path.read_bytes()[1024:], "<u4")


# -----------------------------------------------------------------------------
# Memory


def tensor_bytes(function):
    """The most bytes of tensors that a function allocates at any time, and those it leaves.

    The profiler sees what torch's allocator gives, also inside of operations. That is the same on every
    processor, which the memory of the process is not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()  # noqa: F841 (it holds what is left)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most, live


# -----------------------------------------------------------------------------
# Processes and runs


@contextlib.contextmanager
def fake_group(world_size, rank=0):
    """This process as one of so many, whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(*words, **settings):
    """The finished process of python with these words, in the repository's folder; it may not hang."""
    defaults = dict(cwd=ROOT, text=True, capture_output=True, timeout=300)
    return subprocess.run([sys.executable, *map(str, words)], **{**defaults, **settings})


def output(*words, **settings):
    """The standard output of python with these words, which has to succeed."""
    process = run(*words, **settings)
    assert process.returncode == 0, process.stderr[-6000:]
    return process.stdout


def torchrun(processes, *words):
    """The words that let python run these words in so many processes."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]


FORKED = """
import os, runpy, socket, sys
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, torch.distributed.tensor
import matplotlib.figure, torch._dynamo
sys.path.insert(0, os.getcwd())
import llama31
processes, *sys.argv = sys.argv[1:]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, TORCHELASTIC_RUN_ID="forked",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
for rank in range(int(processes)):
    if os.fork() == 0:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(int(processes))]
sys.exit(any(statuses))
"""


def forked(processes, *words):
    """As torchrun, sooner: the processes share what has been imported. A failure ends only its own one."""
    return ["-c", FORKED, processes, *words]


def read_log(out_dir):
    """The records of a run's log so far, without a last line that is still being written."""
    path = out_dir / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def untimed(records):
    """What the records of a log say of the training itself."""
    return [{name: record[name] for name in record.keys() - {"tokens_per_s", "mfu", "memory"}}
            for record in records]
