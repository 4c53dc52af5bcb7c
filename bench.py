"""What this machine can do and how much of it llama31.py reaches, also beside other programs.

    python bench.py                                          # the checkpoint last written under out/
    python bench.py --ckpt_dir DIR --dtype bfloat16 --peers  # beside transformers and llama.cpp
    python bench.py train --peers                            # steps of training, beside transformers
    python bench.py memory                                   # the memory that training takes
    python bench.py plan --preset llama3.1-70b --gpus 64     # how many GPUs should share a model
"""

import contextlib
import itertools
import multiprocessing
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import planner
from llama31 import Llama, ModelArgs, Transformer
from peers import missing, peers_of, transformers_runner
from plumbing import attention, checkpoint, cli, devices, fast, narrow
from plumbing.answers import Stopwatch
from plumbing.cli import expect, expect_at_least
from plumbing.machine import peak_process_memory

# -----------------------------------------------------------------------------
# The machine


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


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
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        best = max(best, 2 * n**3 / best_seconds(lambda a=a, b=b: a @ b.T, device))
    return best


def read_bandwidth(device):
    """Bytes/s of the faster of two sums over 512 MB, far more than a cache holds, in huge pages."""
    holder = torch.nn.Linear(2**14, 2**13, bias=False, device=device)
    if device.type == "cpu":
        fast.move_to_huge_pages(holder)
    x = holder.weight.detach().flatten()
    return x.nbytes / min(best_seconds(x.sum, device), best_seconds(lambda: x @ x, device))


def limits(device):
    """What the machine reaches at this moment: bytes/s, and FLOP/s in float32 and in bfloat16."""
    return read_bandwidth(device), gemm_peak(torch.float32, device), gemm_peak(torch.bfloat16, device)


def machine(device):
    """The processor's name, the number of threads and the version of torch, as one line."""
    return f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
    """How many weights the matrices of all layers have together, and how many the output matrix has."""
    rows = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim + 3 * args.hidden_dim
    return args.n_layers * args.dim * rows, args.dim * args.vocab_size


def prefill_flops(args, lengths):
    """Operations that reading prompts of these lengths takes, of which only the last tokens have logits.

    2 per weight and token, and attention's: in each layer 4 per pair of a query and a key that it sees, and
    element of the query heads.
    """
    layers, output = matrix_weights(args)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    attended = 4 * args.n_layers * args.n_heads * args.head_dim * pairs
    return 2 * layers * sum(lengths) + attended + 2 * output * len(lengths)


def decode_bytes(args, lengths, weight_bytes, cache_bytes):
    """Bytes read to decode one token in each row of a batch: all weights once, and each row's own cache.

    lengths: of the rows so far. weight_bytes, cache_bytes: of one entry.
    """
    entries = 2 * args.n_layers * args.n_kv_heads * args.head_dim * sum(lengths)
    return sum(matrix_weights(args)) * weight_bytes + entries * cache_bytes


def ragged(longest, B):
    """The lengths of B prompts, evenly from the longest down to half of it."""
    return [longest - longest * i // (2 * B) for i in range(B)]


def spread(ratios):
    """The median of some ratios, and their range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

# -----------------------------------------------------------------------------
# Speed of inference


@dataclass
class Job:
    """What the contestants do: read prompts, which makes one new token each, then decode the others."""
    name: str
    prompts: list
    new: int

    @property
    def lengths(self):
        return [len(prompt) for prompt in self.prompts]

    def rate(self, contestant):
        """Tokens/s: of the prompts if there is but one new token, else of those that are decoded."""
        prefill, decode = contestant(self.prompts, self.new)
        if self.new == 1:
            return sum(self.lengths) / prefill
        return len(self.prompts) * (self.new - 1) / decode

    def reached(self, rate, args, weight_bytes, cache_bytes):
        """What a rate takes of the machine: FLOP/s for reading, bytes/s for decoding."""
        if self.new == 1:
            return rate / sum(self.lengths) * prefill_flops(args, self.lengths)
        halfway = [n + self.new // 2 for n in self.lengths]  # the lengths on average
        return rate / len(self.prompts) * decode_bytes(args, halfway, weight_bytes, cache_bytes)


def jobs_of(args, prompt_len, decode_prompt_len, new, batch_size):
    """The three jobs, with random tokens; the prompts of a batch are of several lengths."""
    generator = torch.Generator().manual_seed(0)

    def prompts(*lengths):
        return [torch.randint(args.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    return [Job(f"prefill of {prompt_len}", prompts(prompt_len), 1),
            Job("decode", prompts(decode_prompt_len), new),
            Job(f"decode, batch of {batch_size}", prompts(*ragged(decode_prompt_len, batch_size)), new)]


def ours(llama):
    """llama31.py as a contestant, see peers.py."""
    def run(prompts, new):
        watch = Stopwatch(sum(len(prompt) for prompt in prompts))
        for _ in watch.over(llama.steps(prompts, new, stop_tokens=[], temperature=0)):
            pass
        return watch.prefill_seconds, watch.decode_seconds

    return run


def random_llama(args, room, batch_size, device, dtype, compile, quantize):
    """A Llama of a shape with random weights, for rows of so many tokens."""
    model = Transformer.on_meta(args)
    dtype = dtype or devices.fast_dtype(device, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    tensors = ((name, model.init_weight(name, torch.empty(p.shape, dtype=dtype, device=device), generator))
               for name, p in list(model.named_parameters()))
    if quantize:
        narrow.load_int8(model, tensors, device, dtype)
    else:
        checkpoint.load_weights(model, tensors, device, dtype)
    return Llama(model.eval(), None, room, batch_size, fast.compile_inference(model) if compile else None)


def way(reader):
    """How a Llama with this reader runs: with which instructions where fast.cpp was compiled for it."""
    if isinstance(reader, fast.CompiledReader):
        return f"compiled for {reader.kernels.instructions().decode()}"
    return "eager" if reader is None else "compiled"


def speed(*, ckpt_dir: str | None = None, preset: str | None = None, dtype: str | None = None,
          quantize: str | None = None, compile: bool = True, device: str | None = None, batch_size: int = 8,
          prompt_len: int = 512, decode_prompt_len: int = 128, new: int = 128, rounds: int = 5,
          peers: bool = False):
    """Measures loading, prefill and decoding of a model, and the machine before and after.

    Ratios are of tokens per second, ours to theirs: their median over the rounds, and their range. Prompts
    are random tokens, those of a batch of several lengths.

    Args:
        ckpt_dir: checkpoint directory; None: the one last written under out/
        preset: instead of a checkpoint, a shape such as llama3.2-1b, with random weights
        dtype: float32, bfloat16 or float16; None: bfloat16 on cuda, elsewhere as stored
        quantize: int8, in half of bfloat16's memory
        compile: compile inference
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        batch_size: prompts of the batch
        prompt_len: tokens of the prompt whose prefill is timed
        decode_prompt_len: tokens of the longest prompt in front of decoding
        new: tokens to generate
        rounds: how often each contestant has its turn
        peers: also transformers and llama.cpp, if they are installed, with the same weights, in alternation;
            with a preset transformers alone, with random weights
    """
    expect_at_least(1, batch_size=batch_size, prompt_len=prompt_len, decode_prompt_len=decode_prompt_len,
                    rounds=rounds)
    expect_at_least(2, new=new)
    expect(preset is None or ckpt_dir is None, "preset", preset, "no --ckpt_dir beside it")
    args = planner.args_of(preset) if preset else None
    device = devices.choose_device(device)
    room = max(prompt_len, decode_prompt_len) + new
    before = limits(device)
    start = time.perf_counter()
    if args:
        llama = random_llama(args, room, batch_size, device, devices.choose_dtype(dtype), compile, quantize)
    else:
        ckpt_dir = checkpoint.newest_checkpoint() if ckpt_dir is None else ckpt_dir
        llama = Llama.build(ckpt_dir, None, room, batch_size, device, dtype, compile, quantize)
    load_seconds = time.perf_counter() - start
    fast.keep_freed_memory(device)
    args = llama.model.args
    stored = llama.model.norm.weight.dtype
    kind = devices.name_of(stored)
    jobs = jobs_of(args, prompt_len, decode_prompt_len, new, batch_size)
    contestants = {"llama31.py": ours(llama)}
    start = time.perf_counter()
    contestants["llama31.py"](jobs[1].prompts, 2)
    first_seconds = time.perf_counter() - start

    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        if peers and preset and not missing("transformers"):
            model = transformers_model(args, device, stored)
            contestants["transformers"] = transformers_runner(model, device)
        elif peers and not preset:
            gguf = "q8_0" if quantize else {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[kind]
            contestants |= peers_of(ckpt_dir, Path(folder), gguf, stored, device, room, batch_size)
        for job in jobs:
            for contestant in contestants.values():
                contestant(job.prompts, min(job.new, 4))  # warms up
            for _, (name, contestant) in itertools.product(range(rounds), contestants.items()):
                rates.setdefault((job.name, name), []).append(job.rate(contestant))
    bandwidth, float32_peak, bfloat16_peak = map(max, before, limits(device))

    print(f"{machine(device)}: reads {bandwidth / 1e9:.1f} GB/s; float32 {float32_peak / 1e9:,.0f} GFLOP/s, "
          f"bfloat16 {bfloat16_peak / 1e9:,.0f} GFLOP/s")
    weight_bytes = 1 + 4 / narrow.GROUP if quantize else stored.itemsize  # int8: and a float32 scale a group
    print(f"{sum(matrix_weights(args)) * weight_bytes / 1e6:,.0f} MB of matrices in {quantize or kind}, "
          f"{way(llama.reader)}, keys and values in {devices.name_of(llama.model.dtype)}; loading "
          f"{load_seconds:.1f} s, two tokens {first_seconds:.1f} s\n")
    peer_names = list(contestants)[1:]
    print("| | tokens/s | reached | of the limit |" + "".join(f" to {name} |" for name in peer_names))
    print("|---|---|---|---|" + "---|" * len(peer_names))
    for job in jobs:
        our_rates = rates[job.name, "llama31.py"]
        rate = statistics.median(our_rates)
        reached = job.reached(rate, args, weight_bytes, llama.model.dtype.itemsize)
        limit, unit = bandwidth, "GB/s"
        if job.new == 1:
            # Where products in bfloat16 are slow, its weights are multiplied as float32.
            limit = float32_peak if kind == "float32" else max(float32_peak, bfloat16_peak)
            unit = "GFLOP/s"
        row = f"| {job.name} | {rate:,.0f} | {reached / 1e9:,.1f} {unit} | {reached / limit:.0%} |"
        for name in peer_names:
            ratios = [a / b for a, b in zip(our_rates, rates[job.name, name], strict=True)]
            row += f" {spread(ratios)} |"
        print(row)

# -----------------------------------------------------------------------------
# Speed of training


def start_worker(*settings):
    """A process with a model, one of its own for its peak memory, that trains a step when it is told to."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_step, settings)


prepared_step = None  # In a worker the function that trains for one step; prepare_step sets it.


def run_step():
    """In a worker: the seconds that a step took, and the bytes of memory at the peak so far."""
    return prepared_step()


def transformers_model(args, device, dtype=torch.float32):
    """transformers' model of the same shape, with random weights."""
    import transformers
    config = transformers.LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim,
        tie_word_embeddings=args.tie_word_embeddings, use_cache=False)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_documents(vocab_size, batch_size, seq_len, document):
    """Inputs and targets (B, T) of documents of that many tokens on average, behind the last id as BOS."""
    bos_id = vocab_size - 1
    shape = (batch_size, seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(bos_id, shape, generator=generator)
    tokens[torch.rand(shape, generator=generator) < 1 / document] = bos_id
    return tokens[:, :-1], tokens[:, 1:]


def peak_memory(device):
    """Bytes: the most that this process has taken of a GPU so far, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_process_memory()


def prepare_step(name, args, batch_size, seq_len, document, device, dtype, compile):
    """In a worker: makes the model, the optimizer and the data of the row of that name."""
    global prepared_step
    x, y = (tokens.to(device) for tokens in random_documents(args.vocab_size, batch_size, seq_len, document))
    if name == "transformers":
        model = transformers_model(args, device)
        forward = torch.compile(model) if compile else model
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        model = Transformer(args).to(device)
        optimizer = model.configure_optimizers(1e-3)
        bos_id = args.vocab_size - 1 if name == "document mask" else None
        fast.keep_freed_memory(device)
        if compile:
            model.compiled_attention = attention.serves(device)
            fast.compile_blocks(model)

    def step():
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if name == "transformers":
                loss = F.cross_entropy(forward(x).logits.float().flatten(0, 1), y.flatten())
            else:
                loss = model(x, y, bos_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start, peak_memory(device)

    prepared_step = step


def train_speed(*, batch_size: int = 4, seq_len: int = 512, vocab_size: int = 49152, n_layers: int = 30,
                preset: str | None = None, document: int = 150, rounds: int = 5, compile: bool = True,
                device: str | None = None, dtype: str | None = None, peers: bool = False):
    """Measures steps of training a model of dim 576, or of a preset, over float32 weights, as a table.

    Once with causal attention and once with --doc_mask, in alternation. Ratios are of the first row's tokens
    per second to the others': their median over the rounds, and their range.

    Args:
        batch_size: windows of a step
        seq_len: tokens of a window
        vocab_size: token ids
        n_layers: blocks
        preset: a shape such as llama3.2-1b instead of these
        document: tokens of a document on average; a TinyStory has 150
        rounds: how often each contestant has its turn
        compile: compile the blocks with torch.compile
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        dtype: type of the computation; None: bfloat16 where the device multiplies it fast, else float32
        peers: also transformers, if it is installed
    """
    expect_at_least(1, batch_size=batch_size, seq_len=seq_len, document=document, rounds=rounds)
    expect_at_least(2, vocab_size=vocab_size)
    args = planner.args_of(preset) if preset else ModelArgs(
        dim=576, n_layers=n_layers, n_heads=9, n_kv_heads=3, vocab_size=vocab_size, multiple_of=256,
        tie_word_embeddings=True, max_seq_len=seq_len)
    device = devices.choose_device(device)
    compute = devices.choose_dtype(dtype) or devices.fast_dtype(device)
    compile = compile and fast.can_compile(device)
    flops = batch_size * seq_len * devices.flops_per_token(Transformer.on_meta(args), seq_len)
    peak = gemm_peak(compute, device)
    print(f"{machine(device)}: {devices.name_of(compute)} {peak / 1e9:,.0f} GFLOP/s; "
          f"{'compiled' if compile else 'eager'}")
    names = ["causal", "document mask"]
    if peers and not missing("transformers"):
        names.append("transformers")
    workers = {name: start_worker(name, args, batch_size, seq_len, document, device, compute, compile)
               for name in names}
    first = {name: worker.submit(run_step).result()[0] for name, worker in workers.items()}
    seconds = {name: [] for name in names}
    peaks = {}
    for round, (name, worker) in itertools.product(range(rounds + 1), workers.items()):
        took, peaks[name] = worker.submit(run_step).result()
        if round > 0:  # The first one warms up.
            seconds[name].append(took)
    print("\n| | first step | tokens/s | GFLOP/s | of the limit | peak memory | causal to this |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        median = statistics.median(seconds[name])
        ratios = [theirs / ours for ours, theirs in zip(seconds["causal"], seconds[name], strict=True)]
        print(f"| {name} | {first[name]:.0f} s | {batch_size * seq_len / median:,.0f} | "
              f"{flops / median / 1e9:,.0f} | {flops / median / peak:.0%} | {peaks[name] / 1e9:.1f} GB | "
              f"{spread(ratios)} |")


if __name__ == "__main__":
    cli.run({"speed": speed, "train": train_speed, "memory": planner.memory, "plan": planner.plan},
            default="speed")
