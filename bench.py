"""What this machine can do and how much of it llama31.py reaches, also beside other programs.

    python bench.py                                          # the checkpoint last written under out/
    python bench.py --ckpt_dir DIR --dtype bfloat16 --peers  # beside transformers and llama.cpp
    python bench.py memory                                   # what training takes of a device's memory
    python bench.py train --peers                            # steps of training, beside transformers
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import llama31
from llama31 import PRESETS, Llama, ModelArgs, Transformer
from peers import missing, peers_of, synchronize
from plumbing import checkpoint, cli, fast

# -----------------------------------------------------------------------------
# The machine



def best_seconds(f, device, rounds=12):
    """The least time that f takes, after two calls to warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def gemm_peak(dtype, device):
    """FLOP/s of the best of some products of large matrices."""
    best = 0.0
    for n in (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * n**3 / best_seconds(lambda a=a, b=b: a @ b.T, device))
    return best


def read_bandwidth(device):
    """Bytes/s of the best of two sums over 512 MB, far more than a cache holds, in huge pages."""
    holder = torch.nn.Linear(2**14, 2**13, bias=False, device=device)
    if device.type == "cpu":
        fast.move_to_huge_pages(holder)
    x = holder.weight.detach().flatten()
    return x.nbytes / min(best_seconds(x.sum, device), best_seconds(lambda: x @ x, device))


def limits(device):
    """What the machine reaches just now: bytes/s, and operations/s in float32 and in bfloat16."""
    return read_bandwidth(device), gemm_peak(torch.float32, device), gemm_peak(torch.bfloat16, device)


def processor(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()

# -----------------------------------------------------------------------------
# The work


def matrix_weights(args):
    """How many weights all layers' matrices have, and the output matrix."""
    rows = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim + 3 * args.hidden_dim
    return args.n_layers * args.dim * rows, args.dim * args.vocab_size


def prefill_flops(args, lengths):
    """Operations that prompts of these lengths take: 2 a weight and token, attention's, the last logits'."""
    layers, output = matrix_weights(args)
    attention = 2 * args.n_layers * args.dim * sum(n * (n + 1) for n in lengths)  # half of 4 n n
    return 2 * layers * sum(lengths) + attention + 2 * output * len(lengths)


def decode_bytes(args, lengths, weight_bytes, cache_bytes):
    """Bytes read for one token of each of several rows of these lengths: all weights and the rows' caches.

    weight_bytes, cache_bytes: of one entry.
    """
    entries = 2 * args.n_layers * args.n_kv_heads * args.head_dim * sum(lengths)
    return sum(matrix_weights(args)) * weight_bytes + entries * cache_bytes


def ragged(lengths_up_to, B):
    """The lengths of B prompts, evenly from the longest down to half of it."""
    return [lengths_up_to - lengths_up_to * i // (2 * B) for i in range(B)]

# -----------------------------------------------------------------------------
# Contestants: functions of prompts and a number of new tokens that give the seconds of prefill and decoding.
# Decoding makes the tokens after the first, which comes with the prefill.


def ours(llama):
    def run(prompts, new):
        llama.generate(prompts, new, temperature=0, stop_tokens=[])
        return llama.stats["prefill"][1], llama.stats["decode"][1]
    return run

# -----------------------------------------------------------------------------
# Speed


def spread(ratios):
    """The median of some ratios, and their range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def check_least(**settings):
    """ValueError for a setting, name=(value, least), that is below its least."""
    for name, (value, least) in settings.items():
        llama31.expect(value >= least, name, value, f"at least {least}")


def speed(*, ckpt_dir: str | None = None, dtype: str | None = None, quantize: str | None = None,
          compile: bool = True, device: str | None = None, batch_size: int = 8, prompt_len: int = 512,
          decode_prompt_len: int = 128, new: int = 128, rounds: int = 5, peers: bool = False,
          train: bool = False):
    """Measures loading, prefill and decoding of a checkpoint directory, and the machine before and after.

    ckpt_dir None: the checkpoint last written under out/. peers: also transformers and llama.cpp where they
    are installed, with the same weights, in alternation; ratios are of tokens per second, ours to theirs,
    their median over the rounds and their range. A batch's prompts, random tokens, are of several lengths.
    train: instead of all this what the train command does.
    """
    if train:
        return train_speed(compile=compile, device=device, rounds=rounds, peers=peers)
    ckpt_dir = checkpoint.newest_checkpoint() if ckpt_dir is None else ckpt_dir
    check_least(batch_size=(batch_size, 1), prompt_len=(prompt_len, 1), new=(new, 2), rounds=(rounds, 1),
                decode_prompt_len=(decode_prompt_len, 1))
    device, room = llama31.choose_device(device), max(prompt_len, decode_prompt_len) + new
    before = limits(device)
    start = time.perf_counter()
    llama = Llama.build(ckpt_dir, None, room, batch_size, device, dtype, compile, quantize)
    load = time.perf_counter() - start
    args, held = llama.model.args, llama.model.norm.weight.dtype
    kind = str(held).removeprefix("torch.")

    def prompts(*lengths):
        return [torch.randint(args.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    generator = torch.Generator().manual_seed(0)
    jobs = {f"prefill of {prompt_len}": (prompts(prompt_len), 1),
            "decode": (prompts(decode_prompt_len), new),
            f"decode, batch of {batch_size}": (prompts(*ragged(decode_prompt_len, batch_size)), new)}
    start = time.perf_counter()
    llama.generate(prompts(decode_prompt_len), 2, temperature=0, stop_tokens=[])
    first = time.perf_counter() - start
    contestants, rates = {"llama31.py": ours(llama)}, {}
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            gguf_kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[kind]
            gguf_kind = "Q8_0" if quantize else gguf_kind
            contestants |= peers_of(ckpt_dir, Path(folder), gguf_kind, held, device, room, batch_size)
        for job, (rows, count) in jobs.items():
            for run in contestants.values():
                run(rows, min(count, 4))  # warms up
            for _, (name, run) in itertools.product(range(rounds), contestants.items()):
                prefill, decode = run(rows, count)
                rate = sum(map(len, rows)) / prefill if count == 1 else len(rows) * (count - 1) / decode
                rates.setdefault((job, name), []).append(rate)
    bandwidth, *peaks = map(max, before, limits(device))
    print(f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}: reads "
          f"{bandwidth / 1e9:.1f} GB/s; float32 {peaks[0] / 1e9:,.0f} GFLOP/s, "
          f"bfloat16 {peaks[1] / 1e9:,.0f} GFLOP/s")
    weight_bytes = 1 + 4 / 64 if quantize else held.itemsize
    compiled = "read" in vars(llama.model) if device.type == "cpu" else compile
    print(f"{sum(matrix_weights(args)) * weight_bytes / 1e6:,.0f} MB of matrices in {quantize or kind}, "
          f"{'compiled' if compiled else 'eager'}; loading {load:.1f} s, two tokens "
          f"{first:.1f} s")
    print()
    peer_names = list(contestants)[1:]
    print("| | tokens/s | reached | of the limit |" + "".join(f" to {name} |" for name in peer_names))
    print("|---|---|---|---|" + "---|" * len(peer_names))
    for job, (rows, count) in jobs.items():
        lengths, ours_rates = list(map(len, rows)), rates[job, "llama31.py"]
        rate = statistics.median(ours_rates)
        if count == 1:
            reached = rate / sum(lengths) * prefill_flops(args, lengths)
            limit, unit = peaks[kind == "bfloat16"], "GFLOP/s"
        else:
            halfway = [n + count // 2 for n in lengths]
            reached = rate / len(rows) * decode_bytes(args, halfway, weight_bytes, held.itemsize)
            limit, unit = bandwidth, "GB/s"
        ratios = [spread([a / b for a, b in zip(ours_rates, rates[job, name], strict=True)])
                  for name in peer_names]
        print(f"| {job} | {rate:,.0f} | {reached / 1e9:,.1f} {unit} | {reached / limit:.0%} |"
              + "".join(f" {ratio} |" for ratio in ratios))

# -----------------------------------------------------------------------------
# Memory of training


def saved_bytes(args, batch_size, seq_len, activation_checkpointing, dtype):
    """Bytes that a forward pass keeps for the backward pass, besides the parameters.

    dtype: of the parameters; the computation is in bfloat16. Tensors are fakes, which have a size only.
    """
    with torch.device("meta"):
        model = Transformer(args)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.tie()
        model.activation_checkpointing = activation_checkpointing
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast(
                "cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(tokens, tokens)  # noqa: F841 (it holds what is kept)
        for p in model.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in kept.values())


def training_memory(args, batch_size, seq_len, processes=1, fsdp=False, activation_checkpointing=False,
                    bytes_per_logit=2 + 4 + 4):
    """Bytes that each process of training takes at its peak, in bfloat16 over float32 weights.

    Weights, gradients and AdamW's averages are 16 bytes a parameter. FSDP shares them out, but gathers the
    embedding, the output and two blocks in bfloat16, and sums gradients in float32. To this comes what the
    forward pass keeps, the output matrix and a chunk's gradient of it, and a chunk of logits: a GPU takes
    their softmax of all at once in float32, the CPU in small parts, which leaves 2 bytes of each.
    Holes between what is in use are not counted; on the CPU they take up to a fifth more.
    """
    def saved(n_layers, recomputed):
        return saved_bytes(dataclasses.replace(args, n_layers=n_layers), batch_size, seq_len, recomputed,
                           torch.bfloat16 if fsdp else torch.float32)
    with torch.device("meta"):
        model = Transformer(args)
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.layers[0].parameters())
    outer = total - args.n_layers * block
    states = 16 * total
    if fsdp:
        states = 16 * total / processes + (2 + 4) * outer + (2 * 2 + 4) * block
    kept = saved(args.n_layers, activation_checkpointing)
    if activation_checkpointing:  # one block at a time is computed again
        kept += saved(2, False) - saved(1, False)
    logits = min(fast.ChunkedCrossEntropy.LOGITS_AT_ONCE, batch_size * seq_len * args.vocab_size)
    output = args.vocab_size * args.dim
    return int(states + kept + (2 if fsdp else 2 + 2) * output + bytes_per_logit * logits)


def memory(*, batch_size: int = 1, seq_len: int = 2048):
    """Prints as a Markdown table what training takes of each GPU, in GiB, and where that fits.

    batch_size, seq_len: of a micro-batch.
    """
    ways = {"one GPU, or eight with DDP": {}, "eight with --fsdp": dict(processes=8, fsdp=True)}
    print(f"| model | {batch_size} x {seq_len:,} tokens a GPU | GiB | with --activation_checkpointing |")
    print("|---|---|---|---|")
    for name in ("llama3.2-1b", "llama3.1-8b", "llama3.1-70b"):
        for way, settings in ways.items():
            cells = []
            for recomputed in (False, True):
                size = training_memory(ModelArgs(**PRESETS[name]), batch_size, seq_len,
                                       activation_checkpointing=recomputed, **settings) / 2**30
                fits = [f"{room} GB" for room in (24, 80) if size < 0.92 * room]  # CUDA itself takes some
                cells.append(f"{size:,.0f}: " + (f"fits {fits[0]}" if fits else "does not fit 80 GB"))
            print(f"| {name} | {way} | {cells[0]} | {cells[1]} |")


# -----------------------------------------------------------------------------
# Speed of training


class Trainer:
    """A model in a process of its own, for its peak memory, that trains a step when it is told to."""

    def __init__(self, *settings):
        context = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, context, Trainer.prepare, settings)

    @staticmethod
    def prepare(name, args, batch_size, seq_len, document, device, compile):
        shape, generator = (batch_size, seq_len + 1), torch.Generator().manual_seed(0)
        tokens = torch.randint(args.vocab_size - 1, shape, generator=generator)
        tokens[torch.rand(shape, generator=generator) < 1 / document] = args.vocab_size - 1  # BOS
        x, y = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
        if name == "transformers":
            import transformers
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
                num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
                num_key_value_heads=args.n_kv_heads, tie_word_embeddings=True, use_cache=False)).to(device)
            forward = torch.compile(model) if compile else model
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        else:
            model = Transformer(args).to(device)
            optimizer = model.configure_optimizers(1e-3)
            bos_id = args.vocab_size - 1 if "mask" in name else None
            for layer in model.layers if compile else []:
                layer.compile()

        def step():
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                if name == "transformers":
                    loss = F.cross_entropy(forward(x).logits.float().flatten(0, 1), y.flatten())
                else:
                    loss = model(x, y, bos_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)
            seconds, unit = time.perf_counter() - start, 1 if sys.platform == "darwin" else 1024
            return seconds, (torch.cuda.max_memory_allocated() if device.type == "cuda" else
                             resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        Trainer.prepared = step

    @staticmethod
    def run_prepared():
        return Trainer.prepared()

    def step(self):
        """The seconds it took, and the bytes of memory at the peak so far."""
        return self.process.submit(Trainer.run_prepared).result()


def train_speed(*, batch_size: int = 4, seq_len: int = 512, vocab_size: int = 49152, n_layers: int = 30,
                document: int = 150, rounds: int = 5, compile: bool = True, device: str | None = None,
                peers: bool = False):
    """Measures steps of training a model of dim 576, in bfloat16 over float32 weights, as a table.

    Once with causal attention, once with --doc_mask and documents of that many tokens on average, a
    TinyStory's; with peers also transformers. In alternation; ratios are of the first row's tokens/s to the
    others', their median over the rounds and their range.
    """
    check_least(batch_size=(batch_size, 1), seq_len=(seq_len, 1), vocab_size=(vocab_size, 2),
                document=(document, 1), rounds=(rounds, 1))
    device = llama31.choose_device(device)
    compile = compile and fast.can_compile(device)
    args = ModelArgs(dim=576, n_layers=n_layers, n_heads=9, n_kv_heads=3, vocab_size=vocab_size,
                     multiple_of=256, tie_word_embeddings=True, max_seq_len=seq_len)
    with torch.device("meta"):
        flops = batch_size * seq_len * Transformer(args).flops_per_token(seq_len)
    peak = gemm_peak(torch.bfloat16, device)
    print(f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}: bfloat16 "
          f"{peak / 1e9:,.0f} GFLOP/s; {'compiled' if compile else 'eager'}")
    names = ["causal", "document mask"] + ["transformers"] * (peers and not missing("transformers"))
    steps = {name: [] for name in names}
    trainers = {name: Trainer(name, args, batch_size, seq_len, document, device, compile) for name in names}
    first = {name: trainer.step()[0] for name, trainer in trainers.items()}
    for _, (name, trainer) in itertools.product(range(rounds + 1), trainers.items()):
        steps[name].append(trainer.step())
    print("\n| | first step | tokens/s | GFLOP/s | of the limit | peak memory | causal to this |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        times, peaks = zip(*steps[name][1:], strict=True)  # the first warms up
        seconds = statistics.median(times)
        ratios = [theirs / ours for (ours, _), theirs in zip(steps["causal"][1:], times, strict=True)]
        print(f"| {name} | {first[name]:.0f} s | {batch_size * seq_len / seconds:,.0f} | "
              f"{flops / seconds / 1e9:,.0f} | {flops / seconds / peak:.0%} | {peaks[-1] / 1e9:.1f} GB | "
              f"{spread(ratios)} |")


if __name__ == "__main__":
    cli.run({"speed": speed, "train": train_speed, "memory": memory}, default="speed")
