"""A training run's folder: what it has left there, its log and plot, a progress bar, and signals to stop."""

import datetime
import json
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from plumbing.checkpoint import checkpoints_of_run, load_file
from plumbing.cli import expect
from plumbing.files import complete

# -----------------------------------------------------------------------------
# What is measured


class Stopwatch:
    """Times generation around its steps: the first reads the prompts, the others decode."""

    def __init__(self, prompt_tokens):
        self.prompt_tokens = prompt_tokens
        self.prefill_seconds = 0.0
        self.decoded_tokens = 0
        self.decode_seconds = 0.0

    def over(self, steps):
        """The same steps of Llama.steps, timed."""
        start = time.perf_counter()
        for i, (logits, drawn) in enumerate(steps):
            seconds = time.perf_counter() - start
            if i == 0:
                self.prefill_seconds = seconds
            else:
                self.decode_seconds += seconds
                self.decoded_tokens += sum(token is not None for token in drawn)
            yield logits, drawn
            start = time.perf_counter()

    def report(self):
        """One line: tokens read and decoded, and how many per second."""
        read_rate = self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
        decode_rate = self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0
        return (f"prefill {self.prompt_tokens:,} tokens at {read_rate:,.1f}/s, decode "
                f"{self.decoded_tokens:,} tokens at {decode_rate:,.1f}/s")


def entropy_floor(folder):
    """The bits per byte that no model can beat on average, if entropy.json says so; else None."""
    path = Path(folder, "entropy.json")
    return json.loads(path.read_text())["val"]["bits_per_byte"] if path.is_file() else None

# -----------------------------------------------------------------------------
# The run


class Run:
    """The folder of one training run, and how the run looks from outside.

    newest: the checkpoint to go on from, None if there is none. signals: the names of those received since
    the steps began. stopping: whether this step is the last one; whoever trains sets it, as all ranks have
    to agree. Only the master writes. ValueError if the folder holds a run and resume was not asked for.
    """

    def __init__(self, out_dir, resume, is_master, floor=None):
        self.out_dir = Path(out_dir)
        expect(not self.out_dir.is_file(), "out_dir", out_dir, "a folder, not a file")
        self.log_path = self.out_dir / "log.jsonl"
        self.is_master = is_master
        self.floor = floor
        self.signals = []
        self.stopping = False
        saved = checkpoints_of_run(out_dir)
        if not resume and (saved or self.log_path.exists()):
            raise ValueError(f"{out_dir} holds a run; --resume goes on with it, another --out_dir starts a "
                             "new one")
        self.newest = saved[-1] if saved else None

    def folder(self, step):
        """The checkpoint directory of a step."""
        return self.out_dir / f"step_{step:06d}"

    def load_progress(self, order, steps):
        """The progress that the newest checkpoint has saved, or that of a new run.

        ValueError where its order of the windows is another, or it is beyond the steps asked for.
        """
        if self.newest is None:
            return {"step": 0}
        progress = load_file(self.newest / "progress.pt")
        if progress["order"] != order or progress["step"] > steps:
            raise ValueError(f"{self.newest} has step {progress['step']} and {progress['order']}; found "
                             f"steps {steps} and {order}: resume with the same, and no fewer steps")
        return progress

    def prepare(self, last_step, tokenizer_path):
        """Makes the folder, or frees it of what a killed run left after last_step.

        Returns the path of a copy of the tokenizer, as the checkpoint that has it may be dropped.
        """
        copy = self.out_dir / "tokenizer.model"
        if dist.is_initialized():
            dist.barrier()  # Every rank has looked at the folder before the master changes it.
        if self.is_master:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for part in self.out_dir.glob("*.part"):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            with complete(copy) as file:
                file.write(Path(tokenizer_path).read_bytes())
            self.cut_log(last_step)
        return copy

    def cut_log(self, last_step):
        """Cuts the log back to last_step: a killed run leaves later lines, and one that is half-written."""
        lines = self.log_path.read_text().splitlines(keepends=True) if self.log_path.exists() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.log_path}: found a line that is not a step's ({error}); mend or remove "
                             "it") from None
        with complete(self.log_path) as file:
            file.write("".join(kept).encode())

    def steps(self, first, last):
        """Yields the steps first to last, behind a progress bar; ends early when `stopping` is set.

        Meanwhile SIGTERM and Ctrl-C are only noted, so that a step can be finished and saved. Without
        torchrun, which passes some on twice, a second one acts as usual.
        """
        usual = {}

        def note(number, frame):
            self.signals.append(signal.Signals(number).name)
            if not dist.is_initialized():
                signal.signal(number, usual[number])

        if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread.
            usual = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        # disable=None: no bar where there is no terminal.
        self.bar = tqdm(range(first, last + 1), initial=first - 1, total=last, unit="step",
                        disable=None if self.is_master else True)
        self.first, self.last = first, last
        self.began = time.monotonic()
        try:
            for step in self.bar:
                self.step = step
                yield step
                if self.stopping:
                    break
        finally:
            self.bar.close()
            for number, handler in usual.items():
                signal.signal(number, handler)

    def log(self, record):
        """Writes a step's line to log.jsonl, and shows it beside the bar, or alone where there is none."""
        if not self.is_master:
            return
        with open(self.log_path, "a") as log:
            log.write(json.dumps(record) + "\n")
        line = (f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, norm {record['grad_norm']:.2f}, "
                f"{record['tokens_per_s']:,} tokens/s, MFU {record['mfu']:.0%}, "
                f"{record['memory'] / 1e9:.1f} GB")
        if self.bar.disable:
            print(f"step {self.step}: {line}, {self.time_left()} left", file=sys.stderr)
        else:
            self.bar.set_postfix_str(line)
        if "val_bpb" in record:
            floor = f" (floor {self.floor:.3f})" if self.floor else ""
            self.show(f"step {self.step}: loss {record['loss']:.3f}, validation {record['val_loss']:.3f} "
                      f"nats per token, {record['val_bpb']:.3f} bits per byte{floor}")

    def time_left(self):
        """How long the steps to come take if they are as fast as those done since the steps began."""
        seconds_per_step = (time.monotonic() - self.began) / (self.step - self.first + 1)
        return datetime.timedelta(seconds=round(seconds_per_step * (self.last - self.step)))

    def show(self, text):
        """Prints a text above the bar."""
        if self.is_master:
            self.bar.write(text)

    def close(self):
        """Plots a finished run; says how an interrupted one goes on."""
        if not self.is_master:
            return
        if self.stopping:
            cause = self.signals[0] if self.signals else "a signal"
            print(f"{cause} after step {self.step}, which is saved; --resume goes on")
        else:
            self.plot()

    def plot(self):
        """Draws the losses of log.jsonl, and the entropy floor if there is one, as loss.png."""
        import matplotlib  # Nothing else needs it.
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        records = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        evaluated = [record for record in records if "val_bpb" in record]
        if not evaluated:  # Somebody has removed the log.
            return
        last = evaluated[-1]
        best = min(record["val_bpb"] for record in evaluated)
        bits_per_byte = last["val_bpb"] / max(last["val_loss"], 1e-9)  # A nat per token is so many.
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        axes.plot([record["step"] for record in records],
                  [record["loss"] * bits_per_byte for record in records],
                  color="#9ecae1", linewidth=1, label="train")
        axes.plot([record["step"] for record in evaluated], [record["val_bpb"] for record in evaluated],
                  color="#08519c", marker="o", label=f"validation, {last['val_bpb']:.3f} at the end")
        if self.floor is not None:
            axes.axhline(self.floor, color="#d62728", linestyle="--",
                         label=f"entropy of the stories, {self.floor:.3f}")
        axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, last["step"]), ylim=(0, 4 * best))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        with complete(self.out_dir / "loss.png") as file:
            figure.savefig(file, format="png", dpi=150)
        plt.close(figure)
