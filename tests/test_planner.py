"""The planner's arithmetic, against what torch counts while it trains under a fake process group."""

import collections
import contextlib
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from tiny import fake_group
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import planner
from llama31 import PRESETS, ModelArgs, optimize
from planner import FULL, Sharing
from plumbing import cli, parallel

CPU = torch.device("cpu")
FORMS = {"float32": FULL, "bfloat16": FULL | dict(param_dtype="bfloat16"), "lora": FULL | dict(lora_rank=16),
         "int8": FULL | dict(lora_rank=16, quantize="int8")}


def tracked_memory(args, sharing, batch_size, seq_len, recomputes, form, micro_batches=1):
    """Bytes at the peak of a step, the second one, as torch's trackers count them."""
    with fake_group(sharing.number * sharing.copies):
        model = planner.prepared(args, form)
        if sharing.number > 1:
            parallel.shard_parameters(model, CPU, torch.bfloat16, sharing.number)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=CPU)
            model.tie()
            model.activation_checkpointing = recomputes
            trained = [p for p in model.parameters() if p.requires_grad]
            # Ours in bfloat16 reads a number that fakes don't have. This one has averages of the same types.
            optimizer = torch.optim.AdamW(trained, foreach=False, fused=False)
            tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)

            def step(tracker=None):
                for i in range(micro_batches):
                    if tracker and i:
                        tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(tokens, tokens, reduction="sum")
                    loss.backward()
                    del loss
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            # In a first one DTensor tries operations out on whole tensors, which trackers take for real.
            step()
            if sharing.number > 1:
                tracker = FSDPMemTracker(model, optimizer)
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
            with tracker:
                step(tracker)
            return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


POINTS = [  # preset, sharing, batch_size, seq_len, recomputes, form, micro-batches
    ("llama3.2-1b", Sharing(8), 1, 2048, False, "float32", 1),
    ("llama3.2-1b", Sharing(8), 4, 2048, True, "float32", 2),
    ("llama3.2-1b", Sharing(8, 8), 2, 4096, True, "bfloat16", 1),
    ("llama3.2-1b", Sharing(1), 1, 2048, True, "float32", 1),
    ("llama3.2-3b", Sharing(16), 1, 4096, True, "lora", 1),
    ("llama3.1-8b", Sharing(8), 1, 2048, False, "int8", 2),
    ("llama3.1-8b", Sharing(64), 1, 8192, True, "float32", 1),
    ("llama3.1-8b", Sharing(32, 4), 2, 2048, False, "bfloat16", 2),
    ("llama3.1-70b", Sharing(64, 2), 1, 4096, True, "float32", 1),
    ("llama3.1-70b", Sharing(256), 1, 8192, True, "lora", 1),
    ("llama3.1-405b", Sharing(1024), 1, 4096, True, "float32", 1),
    ("llama3.1-405b", Sharing(512, 2), 1, 8192, True, "bfloat16", 1),
]


def compare(preset, sharing, batch_size, seq_len, recomputes, form, micro_batches, **changes):
    args = dataclasses.replace(ModelArgs(**PRESETS[preset]), **changes)
    form = FORMS[form]
    tracked = tracked_memory(args, sharing, batch_size, seq_len, recomputes, form, micro_batches)
    computed = planner.training_memory(args, batch_size, seq_len, sharing, recomputes, micro_batches,
                                       on_cpu=True, form=form)
    print(f"{computed / 1e9:.2f} GB, tracked {tracked / 1e9:.2f} GB, ratio {computed / tracked:.3f}")
    return computed, tracked


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS[::4], ids=str)
def test_few_layers_take_the_memory_that_torch_counts(point):
    computed, tracked = compare(*point, n_layers=3, vocab_size=2048)
    assert computed == pytest.approx(tracked, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_training_takes_the_memory_that_torch_counts(point):
    preset, _, _, _, _, form, micro_batches = point
    takes_long = preset.endswith(("8b", "70b", "405b")) or (form == "float32" and micro_batches == 2)
    if takes_long and "ALL_POINTS" not in os.environ:
        pytest.skip("it takes minutes; ALL_POINTS=1 runs it")
    computed, tracked = compare(*point)
    assert computed == pytest.approx(tracked, rel=0.05)


class SentBytes(TorchDispatchMode):
    """Sums what collectives send in rings, by operation, but for those of a number."""

    def __init__(self):
        super().__init__()
        self.sent = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            group, = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)
                      and "ProcessGroup" in str(leaf._type()))
            number = dist.ProcessGroup.unbox(group).size()
            times = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2}
            if max(sizes) > 8:
                name = func._schema.name.removeprefix("c10d::")
                self.sent[name] += times[name] * max(sizes) * (number - 1) / number
        return func(*args, **(kwargs or {}))


def sum_bucket(state, bucket):
    """What DDP does with its buckets of gradients; it can't take the fake group's own result."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sharing, micro_batches", [
    (Sharing(1, 4), 3), (Sharing(4, 2), 1),
    *(pytest.param(sharing, number, marks=pytest.mark.slow)
      for sharing, number in ((Sharing(8), 3), (Sharing(1024), 1), (Sharing(64, 16), 3)))], ids=str)
def test_a_step_sends_the_bytes_that_are_computed(form, sharing, micro_batches, monkeypatch):
    args = ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=301, multiple_of=32,
                     tie_word_embeddings=form in ("float32", "lora"))
    form = FORMS[form]
    with fake_group(sharing.number * sharing.copies):
        model = planner.prepared(args, form)
        if sharing.number > 1:
            parallel.shard_parameters(model, CPU, torch.bfloat16, sharing.number)
        model.to_empty(device=CPU)
        model.tie()
        if sharing.number == 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
            model.register_comm_hook(None, sum_bucket)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        # Gathered weights are whatever lies in memory, as nothing is sent.
        monkeypatch.setattr("math.isfinite", lambda number: True)
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        batches = [(tokens, tokens, None)] * micro_batches
        for i in range(3):  # In the second step DDP makes its buckets anew.
            with SentBytes() if i == 2 else contextlib.nullcontext() as counted:
                optimize(model, optimizer, batches, 0.0, 1.0, torch.autocast("cpu", torch.bfloat16))
    sent, _ = planner.sent_bytes(args, sharing, micro_batches, form)
    assert sent == round(sum(counted.sent.values())) > 0


def test_what_leaves_a_machine():
    """Of a ring through 4 machines, each sends 3/4 of the whole on; all or one of its 8 GPUs take part."""
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=320, multiple_of=32)
    parameters = sum(p.numel() for p in planner.prepared(args, FULL).parameters())

    def away(*sharing, **settings):
        return planner.sent_bytes(args, Sharing(*sharing), machine=8, **settings)[1]
    assert away(1, 8) == away(8) == 0
    assert away(1, 32) == round(2 * 4 * parameters * 3 / 4 / 8)
    assert away(8, 4) == round(2 * 4 * parameters / 8 * 3 / 4)
    assert away(8, 4, micro_batches=3) == 3 * away(8, 4)
    layers = sum(p.numel() for p in planner.prepared(args, FULL).layers.parameters())
    assert away(32) == round((2 * (parameters + layers) + 4 * parameters) * 3 / 4 / 8)


def way(number, recomputes=False, gibibytes=1.0, sent=100, away=10):
    return planner.Way(Sharing(number, 64 // number), recomputes, gibibytes, sent, away)


def test_the_best_way_sends_the_least_then_computes_blocks_once():
    best = planner.best_of
    assert best([]) is None
    assert best([way(8, away=20), way(64)]).sharing.number == 64
    assert best([way(8, sent=200), way(64)]).sharing.number == 64
    assert best([way(8, True), way(64)]).sharing.number == 64
    assert best([way(8, sent=103, away=10.4), way(64)]).sharing.number == 8


def test_a_plan_marks_what_does_not_fit_and_names_the_best(capsys):
    planner.plan(preset="llama3.1-8b", gpus=16, gpu_memory=80, seq_len=2048, total_batch_tokens=2**17)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == ("llama3.1-8b, float32, on 16 x 80 GB, 8 GPUs in a machine; 131,072 tokens per step, "
                     "4 x 1 x 2,048 on each GPU")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    cells = {flags: rest for flags, *rest in rows[2:]}
    assert list(cells) == [f"{flags}{more}".strip() or "none" for flags in ("", "--fsdp 8 ", "--fsdp ")
                           for more in ("", "--activation_checkpointing")]
    args = ModelArgs(**PRESETS["llama3.1-8b"])
    size = planner.training_memory(args, 1, 2048, Sharing(8, 2), micro_batches=4) / 2**30
    assert cells["--fsdp 8"][0] == f"{size:.1f}"
    assert {cell[-1] for cell in cells.values()} == {"", "best", "doesn't fit"}
    assert cells["none"][-1] == "doesn't fit"


def test_a_plan_says_where_nothing_fits(capsys):
    planner.plan(preset="llama3.1-70b", gpus=8)
    assert "Nothing fits: take more" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (dict(preset="llama"), "preset is llama; expected one of demo, "),
    (dict(gpus=0), "gpus is 0; expected at least 1"),
    (dict(gpus=12), "gpus is 12; expected a multiple of --machine 8"),
    (dict(lora_rank=-1), "lora_rank is -1; expected at least 0"),
    (dict(total_batch_tokens=0), "total_batch_tokens is 0; expected a multiple of 131,072"),
    (dict(gpu_memory=0), "gpu_memory is 0; expected a number above 0"),
    (dict(total_batch_tokens=100), "total_batch_tokens is 100; expected a multiple of 131,072")])
def test_a_plan_refuses_what_it_cannot_compute(flags, message):
    with pytest.raises(ValueError, match=message):
        planner.plan(**dict(preset="llama3.2-1b", gpus=16) | flags)


def test_bench_py_plans(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "plan", "--preset", "llama3.2-1b", "--gpus", "1"])
    cli.run({"plan": planner.plan, "speed": bench.speed}, default="speed")
    assert "llama3.2-1b, float32, on 1 x 80 GB" in capsys.readouterr().out
