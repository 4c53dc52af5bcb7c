"""What one idea brings: a training that differs in it from AdamW's recipe, and its bits per byte.

    OMP_NUM_THREADS=1 python tests/ablations.py demo out/demo/data seed=2
    OMP_NUM_THREADS=1 python tests/ablations.py stories DATA lr=1.5e-3 cautious=1 weight_decay=0.5

prints a line of JSON. DATA is what `tiny_stories.py text --vocab_size 2048` has made. docs/measurements.md
has the tables. What train has flags for is compared here, too: all runs must count time and score alike.
"""

import dataclasses
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama31 import PRESETS, DistributedShardedDataLoader, ModelArgs, Transformer, evaluate, optimize
from plumbing import attention, fast, files
from plumbing.muon import Muon
from tokenizer import Tokenizer


@dataclasses.dataclass
class Settings:
    """One training. Beginnings are shares of its tokens; 0 or False leaves an idea out."""
    dim: int
    n_layers: int
    n_heads: int
    tokens: int
    train: str
    val: str
    seed: int = 1
    lr: float = 3e-3
    warmup_steps: int = 30
    decay: str = "cosine"  # or "linear", or "trapezoid", which falls over the last 40%, or "inverse"
    rows: int = 6
    seq_len: int = 256
    weight_decay: float = 0.1
    beta2: float = 0.95
    growing_rows: int = 0  # rows to begin with; they grow to `rows` over the first half
    growing_length: int = 0  # seq_len of the first 30%, with as many tokens per step
    order: str = "stream"  # or "documents": each window begins with one; "short": those of short ones first
    cautious: bool = False  # decay only where the step, too, brings a weight nearer to zero
    average: float = 0.0  # the share at the end whose weights are averaged, every tenth step
    muon: bool = False
    muon_lr: float = 0.0  # another learning rate for Muon's matrices


TASKS = {"demo": dict(dim=192, n_layers=2, n_heads=3, tokens=1843200, train="TinyStories_train*.bin",
                      val="TinyStories_val.bin"),
         "stories": dict(dim=384, n_layers=6, n_heads=6, tokens=497664, train="train.bin", val="val.bin")}


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW whose decay acts only where it agrees with the step's direction (Chen et al., 2025)."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                mean, square = (state["mean"].lerp_(p.grad, 1 - beta1) / (1 - beta1 ** state["step"]),
                                state["square"].lerp_(p.grad ** 2, 1 - beta2) / (1 - beta2 ** state["step"]))
                update = mean / (square.sqrt() + 1e-8)
                update += group["weight_decay"] * p * (update * p > 0)
                p.sub_(update, alpha=group["lr"])


class Windows:
    """Batches of windows from the stream of documents, drawn anew in each epoch."""

    def __init__(self, tokens, bos_id, settings):
        self.tokens, self.bos_id, self.settings = tokens, bos_id, settings
        self.epoch, self.queue, self.seq_len = 0, [], None

    def cut(self, seq_len):
        tokens, rng = self.tokens, np.random.default_rng([self.settings.seed, self.epoch])
        if self.settings.order != "documents":
            windows = [tokens[k * seq_len:(k + 1) * seq_len + 1]
                       for k in rng.permutation((len(tokens) - 1) // seq_len)]
            if self.settings.order == "short" and self.epoch == 0:
                windows.sort(key=lambda window: -(window == self.bos_id).sum())
            return windows
        windows, row = [], tokens[:0]
        documents = np.split(tokens, np.flatnonzero(tokens == self.bos_id)[1:])
        for k in rng.permutation(len(documents)):
            document = documents[k]
            if len(row) and len(row) + len(document) > seq_len + 1:
                windows.append(row)
                row = row[:0]
            while len(document) > seq_len + 1:
                windows.append(document[:seq_len + 1])
                document = document[seq_len:]
            row = np.concatenate([row, document])
        return [np.pad(row, (0, seq_len + 1 - len(row)), constant_values=-100) for row in [*windows, row]]

    def batch(self, rows, seq_len):
        if seq_len != self.seq_len:
            self.queue, self.seq_len = [], seq_len
        while len(self.queue) < rows:
            self.queue += self.cut(seq_len)
            self.epoch += 1
        rows, self.queue = torch.from_numpy(np.stack(self.queue[:rows])), self.queue[rows:]
        inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:].clone()
        targets[targets == self.bos_id] = -100
        return inputs, targets, inputs == self.bos_id


def learning_rate(settings, seen, step):
    """By tokens, so that steps of different sizes compare."""
    rise = settings.warmup_steps * settings.rows * settings.seq_len / settings.tokens
    left = 1 - max(0.0, (seen / settings.tokens - rise) / (1 - rise))
    shape = {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left, "trapezoid": min(1, left / 0.4),
             "inverse": 1 / (1 + 9 * (1 - left))}[settings.decay]
    return settings.lr * min(1, step / settings.warmup_steps) * shape


def optimizer_of(model, s):
    """The model's own, unless an idea needs another one."""
    if not s.cautious:
        optimizer = model.configure_optimizers(s.lr, s.weight_decay, (0.9, s.beta2), muon=s.muon)
    else:
        parameters = list(model.parameters())
        optimizer = CautiousAdamW([
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], s.lr, (0.9, s.beta2))
    if isinstance(optimizer, Muon) and s.muon_lr:
        def scale(optimizer, args, kwargs):
            for group in optimizer.param_groups:
                group["lr"] *= s.muon_lr / s.lr if group["muon"] else 1
        optimizer.register_step_pre_hook(scale)
    return optimizer


def run(task, data, s):
    """The record of a training."""
    fast.keep_freed_memory(torch.device("cpu"))
    tokenizer = Tokenizer(str(Path(data) / "tokenizer.model"))
    shape = dict(dim=s.dim, n_layers=s.n_layers, n_heads=s.n_heads, n_kv_heads=s.n_heads)
    model = Transformer(ModelArgs(**PRESETS["demo"] | shape, vocab_size=tokenizer.n_words))
    model.init_weights(torch.Generator().manual_seed(s.seed))
    model.compiled_attention = attention.serves(torch.device("cpu"))
    paths = files.matching(str(Path(data) / s.train))
    shards = [files.read_tokens(path, 0, files.read_header(path).num_tokens) for path in paths]
    windows = Windows(np.concatenate(shards).astype(np.int64), tokenizer.bos_id, s)
    optimizer = optimizer_of(model, s)
    seen = step = averaged = 0
    seconds, averages = 0.0, []
    while seen < s.tokens:
        step += 1
        share, rows, seq_len = seen / s.tokens, s.rows, s.seq_len
        if s.growing_rows and share < 0.5:
            rows = round(s.growing_rows + (s.rows - s.growing_rows) * share / 0.5)
        if s.growing_length and share < 0.3:
            rows, seq_len = rows * seq_len // s.growing_length, s.growing_length
        begin = time.process_time()
        batch = windows.batch(rows, seq_len)
        optimize(model, optimizer, [batch], learning_rate(s, seen, step), 1.0, nullcontext())
        seconds += time.process_time() - begin
        seen += rows * seq_len
        if s.average and seen > (1 - s.average) * s.tokens and step % 10 == 0:
            averaged += 1
            averages = averages or [torch.zeros_like(p) for p in model.parameters()]
            for average, p in zip(averages, model.parameters(), strict=True):
                average.lerp_(p.detach(), 1 / averaged)
    record = dict(task=task, steps=step, cpu_seconds=round(seconds), **scores(model, data, s, tokenizer))
    if averages:
        with torch.no_grad():
            for average, p in zip(averages, model.parameters(), strict=True):
                p.copy_(average)
        record |= {f"averaged_{name}": value for name, value in scores(model, data, s, tokenizer).items()}
    return record


def scores(model, data, s, tokenizer):
    """Bits per byte of the validation split; in windows of 1,024, few stories are cut."""
    lengths = torch.tensor(tokenizer.byte_lengths)
    result = {}
    for seq_len in (256, 1024):
        loader = DistributedShardedDataLoader(str(Path(data) / s.val), max(1, 1536 // seq_len), seq_len,
                                              0, 1, bos_id=tokenizer.bos_id)
        bits = evaluate(model, loader, loader.num_windows, True, lengths, nullcontext())[1]
        result[f"bits_per_byte_{seq_len}"] = round(bits, 4)
    return result


def main():
    task, data, *pairs = sys.argv[1:]
    given = dict(pair.split("=") for pair in pairs)
    types = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
    types |= {name: type(value) for name, value in TASKS[task].items()}
    given = {name: bool(int(text)) if types[name] is bool else types[name](text)
             for name, text in given.items()}
    print(json.dumps({**run(task, data, Settings(**TASKS[task] | given)), **given}))


if __name__ == "__main__":
    main()
