"""A run's folder: its record, log and plot, a progress bar, and the signals that end it early."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist


def entropy_floor(folder):
    """The bits per byte that no model can beat on average, where entropy.json tells them; else None."""
    path = Path(folder, "entropy.json")
    return json.loads(path.read_text())["val"]["bits_per_byte"] if path.is_file() else None


def cut_log(path, last_step):
    """Leaves in a log the complete lines of steps up to last_step; returns the last one's step, or 0."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: found a line that is no step's ({error}); mend or remove it") from None
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(kept))
    os.replace(part, path)
    return json.loads(kept[-1])["step"] if kept else 0


def prepare_folder(out_dir, last_step, tokenizer_path):
    """Makes out_dir, or frees it of what a killed run left after last_step; see cut_log.

    It takes a copy of the tokenizer.model, as the checkpoint that has it may be dropped.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for part in out_dir.glob("*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    shutil.copyfile(tokenizer_path, out_dir / "tokenizer.model.part")
    os.replace(out_dir / "tokenizer.model.part", out_dir / "tokenizer.model")
    return cut_log(out_dir / "log.jsonl", last_step)


def report(record, out_dir, bar, floor, tokens_left):
    """Writes a step's line to log.jsonl, and shows it beside the bar, or as a line where there is none."""
    with open(out_dir / "log.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")
    line = (f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, norm {record['grad_norm']:.2f}, "
            f"{record['tokens_per_s']:,} tokens/s, MFU {record['mfu']:.0%}, {record['memory'] / 1e9:.1f} GB")
    if bar.disable:
        left = datetime.timedelta(seconds=tokens_left // max(record["tokens_per_s"], 1))
        print(f"step {record['step']}: {line}, {left} left", file=sys.stderr)
    else:
        bar.set_postfix_str(line)
    if "val_bpb" in record:
        bar.write(f"step {record['step']}: loss {record['loss']:.3f}, validation {record['val_loss']:.3f} "
                  f"nats per token, {record['val_bpb']:.3f} bits per byte"
                  + (f" (floor {floor:.3f})" if floor else ""))


def plot_losses(out_dir, floor):
    """Draws the losses of out_dir/log.jsonl, and the entropy floor if there is one, as out_dir/loss.png."""
    import matplotlib  # here, as nothing else needs it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "val_bpb" in record]
    last, best = evaluated[-1], min(record["val_bpb"] for record in evaluated)
    bits_per_byte = last["val_bpb"] / max(last["val_loss"], 1e-9)  # of a loss of one nat per token
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([record["step"] for record in records], [record["loss"] * bits_per_byte for record in records],
              color="#9ecae1", linewidth=1, label="train")
    axes.plot([record["step"] for record in evaluated], [record["val_bpb"] for record in evaluated],
              color="#08519c", marker="o", label=f"validation, {last['val_bpb']:.3f} at the end")
    if floor is not None:
        axes.axhline(floor, color="#d62728", linestyle="--", label=f"entropy of the stories, {floor:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, last["step"]), ylim=(0, 4 * best))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    part = out_dir / "loss.png.part"
    figure.savefig(part, format="png", dpi=150)
    plt.close(figure)
    os.replace(part, out_dir / "loss.png")


def measured_peak(device, dtype):
    """FLOP/s of large matrix products on a device: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a, seconds = torch.ones(n, n, dtype=dtype, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the result
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def used_memory(device):
    """Bytes: the most that this process has taken of a GPU so far, or what it now has of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def noted_signals():
    """Yields a list that takes the name of a SIGTERM or Ctrl-C, so that a step can be finished and saved.

    Without torchrun, which passes some on twice, a second one acts as usual.
    """
    noted, usual = [], {}

    def note(number, frame):
        noted.append(signal.Signals(number).name)
        if not dist.is_initialized():
            signal.signal(number, usual[number])
    if threading.current_thread() is threading.main_thread():  # in others Python does not allow it
        usual = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
