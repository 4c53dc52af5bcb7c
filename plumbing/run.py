"""A training run's folder: what it has left there, its log and plot, a progress bar, and signals to stop."""

import datetime
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from plumbing import resume
from plumbing.checkpoint import checkpoints_of_run, point_best, remove
from plumbing.files import check_disk, complete
from plumbing.parallel import largest_over_ranks
from plumbing.plot import plot_losses
from plumbing.signals import noted
from plumbing.streams import say
from plumbing.tokenizer_json import copy_tokenizer, name_of_copy


def entropy_floor(folder):
    """The bits per byte that no model can beat on average, if entropy.json says so; else None."""
    path = Path(folder, "entropy.json")
    return json.loads(path.read_text())["val"]["bits_per_byte"] if path.is_file() else None


class Run:
    """The folder of one training run, and how the run looks from outside.

    newest: the checkpoint to go on from, None if there is none. best: the step with the lowest validation
    loss, and that loss; None if there is none. improved: whether this step is the best. signals: the names
    of those received since the steps began. stopping: whether a signal ends the run after this step.
    Only the master writes. ValueError if the folder holds a run and resume was not asked for.
    """

    def __init__(self, out_dir, resume, is_master, floor=None):
        self.out_dir = Path(out_dir)
        self.log_path = self.out_dir / "log.jsonl"
        self.is_master = is_master
        self.floor = floor
        self.best = None
        self.improved = False
        self.signals = []
        self.stopping = False
        saved = checkpoints_of_run(out_dir)
        if not resume and saved:
            raise ValueError(f"{out_dir} holds a run; --resume goes on with it, another --out_dir starts a "
                             "new one")
        if not resume and self.log_path.exists() and self.log_path.stat().st_size > 0:
            raise ValueError(f"{out_dir} holds the log of a run that has saved nothing; the same flags and "
                             "--resume begin it again, another --out_dir keeps it")
        self.newest = saved[-1] if saved else None

    def folder(self, step):
        """The checkpoint directory of a step."""
        return self.out_dir / f"step_{step:06d}"

    @property
    def best_folder(self):
        """The checkpoint directory of the best step, or None."""
        return self.folder(self.best["step"]) if self.best else None

    def load_progress(self, flags, data):
        """The progress that the newest checkpoint has saved, or that of a new run.

        flags: those in effect. data: name -> the files that have to stay the same. ValueError where they are
        others than before.
        """
        progress, self.record = resume.load_record(self.newest, flags, data, self.is_master)
        best = progress["best"]
        if best and self.folder(best["step"]).is_dir():
            self.best = best
        return progress

    def progress(self, step, loader):
        """What the checkpoint of a step says of the run."""
        return dict(step=step, loader=loader, best=self.best, **self.record)

    def learning_rate_step(self, step):
        """(step, steps) of the schedule, which may have begun later than the run, and ended earlier."""
        return step - self.record["schedule"]["begin"], self.record["schedule"]["steps"]

    def check_disk(self, num_bytes, last_step):
        """Raises OSError if there is no room for the checkpoints of num_bytes that will be there at once."""
        flags = self.record["flags"]
        steps = flags["steps"] - last_step
        to_come = 1 + steps // flags["eval_interval"]
        if flags["save_interval"]:
            to_come += steps // flags["save_interval"]
        at_once = flags["keep"] + 2  # the newest, the best, and the next as it is written
        count = min(to_come, at_once - len(checkpoints_of_run(self.out_dir)))
        check_disk("a checkpoint", num_bytes, self.out_dir)
        check_disk(f"--keep {flags['keep']} with the best and the next, {count} checkpoints more,",
                   count * num_bytes, self.out_dir)

    def prepare(self, last_step, tokenizer_path):
        """Makes the folder, or frees it of what a killed run left after last_step.

        Returns the path of a copy of the tokenizer's file, as the checkpoint that has it may be dropped.
        """
        if dist.is_initialized():
            dist.barrier()  # Every rank has looked at the folder before the master changes it.
        if self.is_master:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for part in self.out_dir.glob("*.part"):
                remove(part)
            point_best(self.out_dir, self.best_folder)
            copy_tokenizer(tokenizer_path, self.out_dir)
            self.cut_log(last_step)
        return self.out_dir / name_of_copy(tokenizer_path)

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

        Meanwhile signals to end are only noted, so that a step can be finished and saved.
        """
        # disable=None: no bar where there is no terminal.
        self.bar = tqdm(range(first, last + 1), initial=first - 1, total=last, unit="step",
                        disable=None if self.is_master else True)
        self.first = self.step = first
        self.last = last
        self.began = time.monotonic()
        with noted(self.signals, self.is_master), self.bar:
            for step in self.bar:
                self.step = step
                yield step
                if self.stopping:
                    break

    def heed_signals(self, device):
        """Ends the steps of all ranks if one of them has received a signal; the last step ends anyway."""
        number = signal.Signals[self.signals[0]] if self.signals else 0
        number = largest_over_ranks(number, device)
        self.stopping = number > 0 and self.step < self.last
        if self.stopping:
            self.signals[:] = [signal.Signals(number).name]

    def log(self, record):
        """Writes a step's line to log.jsonl, and shows it beside the bar, or alone where there is none.

        Every rank has to call it, as all note which step is the best.
        """
        val_loss = record.get("val_loss")
        lowest = self.best["val_loss"] if self.best else math.inf
        self.improved = val_loss is not None and val_loss < lowest
        if self.improved:
            self.best = {"step": self.step, "val_loss": val_loss}
        if not self.is_master:
            return
        with open(self.log_path, "a") as log:
            log.write(json.dumps(record) + "\n")
        loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"  # None: the step had no target.
        line = (f"loss {loss}, lr {record['lr']:.1e}, norm {record['grad_norm']:.2f}, "
                f"{record['tokens_per_s']:,} tokens/s, MFU {record['mfu']:.0%}, "
                f"{record['memory'] / 1e9:.1f} GB")
        if self.bar.disable:
            say(f"step {self.step}: {line}, {self.time_left()} left", sys.stderr)
        else:
            self.bar.set_postfix_str(line)
        if val_loss is not None:
            floor = f" (floor {self.floor:.3f})" if self.floor else ""
            self.show(f"step {self.step}: loss {loss}, validation {val_loss:.3f} "
                      f"nats per token, {record['val_bpb']:.3f} bits per byte{floor}")

    def time_left(self):
        """How long the steps to come take if they are as fast as those done since the steps began."""
        seconds_per_step = (time.monotonic() - self.began) / (self.step - self.first + 1)
        return datetime.timedelta(seconds=round(seconds_per_step * (self.last - self.step)))

    def show(self, text):
        """Prints a text above the bar."""
        if self.is_master:
            say(text)

    def close(self):
        """Plots a finished run; says which step was the best, and how an interrupted run goes on."""
        if not self.is_master:
            return
        # A folder that appears under its name when it is complete is thrown away if it never is.
        is_part = self.out_dir.suffix == ".part"
        out_dir = str(self.out_dir).removesuffix(".part")
        if self.stopping:
            remedy = "cut short, start it again" if is_part else "which is saved; --resume goes on"
            say(f"{self.signals[0]} after step {self.step}, {remedy}")
        else:
            records = [json.loads(line) for line in self.log_path.read_text().splitlines()]
            plot_losses(records, self.out_dir / "loss.png", self.floor)
        if self.first > self.last:
            say(f"{out_dir} has all its {self.last} steps; more --steps go on")
        if self.best and not (self.stopping and is_part):
            where = "best" if Path(self.out_dir, "best").is_symlink() else self.best_folder.name
            say(f"best at step {self.best['step']}, validation {self.best['val_loss']:.3f} nats per token: "
                f"{Path(out_dir, where)}")

    def leave(self):
        """Raises what the signal asks for that ended the steps: KeyboardInterrupt, or exit with 128 + n."""
        if self.stopping and self.signals[0] == "SIGINT":
            raise KeyboardInterrupt
        if self.stopping:
            raise SystemExit(128 + signal.Signals[self.signals[0]])
