"""Training that is killed, at any moment and several times, and resumed: the rest is bit-identical.

A process that has imported everything forks a child for each attempt, which saves the seconds of importing.
"""

import json
import os
import random
import signal

import pytest
from tiny import output, read_log, read_weights, untimed

import llama31

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")]

FORKS = """
import json, os, signal, sys, time
import llama31, matplotlib
settings, attempts = json.loads(sys.argv[1])

def train(kill_at):
    replace, calls = os.replace, []
    def counting(*paths):
        calls.append(paths)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = counting
    sys.stdout = sys.stderr = open(os.devnull, "w")
    llama31.train(**settings, resume=True)

def attempt(kill_at=None, kill_after=None):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(kill_at)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    best = os.path.join(settings["out_dir"], "best")
    assert not os.path.islink(best) or os.path.exists(os.path.join(best, "params.json")), os.readlink(best)
    return status

for kill in attempts:
    print(attempt(**kill), flush=True)
"""


def train_in_forks(corpus, out_dir, attempts, **flags):
    """The statuses of attempts to train; each is resumed by the next."""
    settings = dict(train_data=f"{corpus}/train.bin", val_data=f"{corpus}/val.bin", out_dir=str(out_dir),
                    ckpt_dir=f"{corpus}/ckpt", batch_size=2, seq_len=16, lr=1e-3, eval_steps=0, device="cpu",
                    dtype="float32", **flags)
    return [int(word) for word in output("-c", FORKS, json.dumps([settings, attempts])).split()]


def outcome(out_dir):
    """What a run has left, without its times."""
    newest = llama31.checkpoints_of_run(out_dir)[-1]
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = {name: p.tolist() for name, p in read_weights(newest).items()}
    return newest.name, os.readlink(out_dir / "best"), untimed(read_log(out_dir)), weights


def test_kills_at_random_moments_change_nothing(corpus, tmp_path):
    flags = dict(steps=30, save_interval=2, eval_interval=5, keep=2, shuffle=True)
    assert train_in_forks(corpus, tmp_path / "whole", [{}], **flags) == [0]
    moments = random.Random(1)
    attempts = [dict(kill_after=moments.uniform(0.02, 1.2)) for _ in range(8)] + [{}]
    statuses = train_in_forks(corpus, tmp_path / "parts", attempts, **flags)
    assert statuses.count(signal.SIGKILL) >= 3 and statuses[-1] == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


def test_kills_before_every_rename_change_nothing(corpus, tmp_path):
    flags = dict(steps=4, save_interval=1, eval_interval=2, keep=1)
    assert train_in_forks(corpus, tmp_path / "whole", [{}], **flags) == [0]
    killed = 0
    for begin in (1, 2):
        out_dir = tmp_path / str(begin)
        attempts = [dict(kill_at=n) for n in range(begin, begin + 6)] + [{}]
        statuses = train_in_forks(corpus, out_dir, attempts, **flags)
        assert statuses[-1] == 0 and set(statuses) <= {0, signal.SIGKILL}
        killed += statuses.count(signal.SIGKILL)
        assert outcome(tmp_path / "whole") == outcome(out_dir)
    assert killed >= 6
