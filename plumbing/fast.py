"""Compiled inference on the CPU, int8 weights, the chunked loss, and what memory is kept and free."""

import contextlib
import ctypes
import functools
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import nn

# -----------------------------------------------------------------------------
# Loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of x (N, dim) @ weight (V, dim).T's cross entropies against targets (N,), in float32.

    Logits are many times larger than all else here, so only LOGITS_AT_ONCE of them exist at a time, and the
    gradients are made along with the loss. dtype: of the products. Targets of -100 don't count.
    """
    LOGITS_AT_ONCE = 2**26
    CACHED_ENTRIES = 2**20  # of a matrix, which a processor's cache holds in float32 for several passes

    @staticmethod
    def parts(*tensors):
        """Rows of several tensors: as many at a time as a processor's cache holds, elsewhere all at once."""
        first = tensors[0]
        size = max(1, ChunkedCrossEntropy.CACHED_ENTRIES // first.size(1)) if first.is_cpu else len(first)
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients):
        w, total, dx, dweight = weight.to(dtype), torch.zeros((), device=x.device), None, None
        if with_gradients:
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
            product = torch.empty_like(w)
        V, kept = len(w), (targets != -100)[:, None]
        index = targets[:, None].clamp(min=0)
        size = max(1, min(len(x), ChunkedCrossEntropy.LOGITS_AT_ONCE // V))
        chunk = w.new_empty(size, V)  # one for all, as fresh memory takes time
        for begin in range(0, len(x), size):
            rows = slice(begin, begin + size)
            h = x[rows].to(dtype)
            logits = torch.mm(h, w.T, out=chunk[:len(h)])
            for some, i, counts in ChunkedCrossEntropy.parts(logits, index[rows], kept[rows]):
                logprobs = some.float().log_softmax(-1)
                total -= (logprobs.gather(1, i) * counts).sum()
                if with_gradients:  # of the logits, in their place
                    ones = torch.ones_like(i, dtype=torch.float32)
                    some.copy_(logprobs.exp_().scatter_add_(1, i, -ones))
            if with_gradients:
                dx[rows] = logits @ w * kept[rows]
                torch.mm(logits.T, h * kept[rows], out=product)
                for some, grad in ChunkedCrossEntropy.parts(dweight, product):
                    some += grad
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx.mul_(grad), dweight.mul_(grad), None, None, None

# -----------------------------------------------------------------------------
# Int8 weights


def dequantize(quantized, scale):
    """The float32 values (out, in) of int8 weights with a scale (out, in / 64) for every 64 in a row."""
    return (quantized.float().unflatten(1, (scale.size(1), -1)) * scale[..., None]).flatten(1)


class Int8Linear(nn.Module):
    """A Linear whose weights are whole numbers from -127 to 127, times a scale for every 64 of them.

    Half of bfloat16's memory. `weight`, in a state dict too, are the values they stand for, in dtype.
    """

    def __init__(self, quantized, scale, dtype):
        super().__init__()
        self.register_buffer("quantized", quantized, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.dtype = dtype

    @staticmethod
    def quantize(weight):
        """weight (out, in) -> (quantized, scale); a scale for a whole row would cost 1% of perplexity."""
        groups = weight.float().unflatten(1, (-1, math.gcd(64, weight.size(1))))
        scale = groups.abs().amax(-1).clamp(min=1e-30) / 127
        return (groups / scale[..., None]).round().to(torch.int8).flatten(1), scale

    @property
    def weight(self):
        return dequantize(self.quantized, self.scale).to(self.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight

    def forward(self, x):
        rows = max(1, 2**18 // x.size(-1))  # at a time, as then they stay in the processor's cache
        parts = zip(self.quantized.split(rows), self.scale.split(rows), strict=True)
        return torch.cat([F.linear(x, dequantize(*part).to(x.dtype)) for part in parts], -1)


class Int8Embedding(Int8Linear):
    """The rows of the same, looked up."""

    def forward(self, tokens):
        rows = dequantize(self.quantized[tokens.flatten()], self.scale[tokens.flatten()])
        return rows.to(self.dtype).unflatten(0, tokens.shape)


def load_int8(model, tensors, device, dtype):
    """Gives a model on the meta device its weights, from (name, tensor) pairs, matrices as int8."""
    for name, tensor in tensors:
        path = name.removesuffix(".weight")
        tensor = tensor.to(device)
        if tensor.dim() == 1:  # copied, as a slice would keep its whole file mapped into memory
            model.get_submodule(path).weight = nn.Parameter(tensor.to(dtype, copy=True))
            continue
        kind = Int8Embedding if path == "tok_embeddings" else Int8Linear
        model.set_submodule(path, kind(*Int8Linear.quantize(tensor), dtype))
    if model.args.tie_word_embeddings:
        model.output = Int8Linear(model.tok_embeddings.quantized, model.tok_embeddings.scale, dtype)

# -----------------------------------------------------------------------------
# Compiled inference
#
# For the CPU in C++, as PyTorch reads weights at a third of the memory's speed where there are few tokens:
# fast.cpp says why, and how it does better.


def can_compile(device):
    """Whether compilation can work for a device; where not, one line on standard error says why."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        print("no C++ compiler found (g++, or CXX), so --compile has no effect", file=sys.stderr)
        return False
    return True


@functools.cache
def compile_kernels(**constants):
    """fast.cpp as a ctypes library for the processor it runs on; OSError if the compiler fails."""
    source = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    source += '#line 1 "fast.cpp"\n' + Path(__file__).with_name("fast.cpp").read_text(encoding="utf-8")
    compiler = os.environ.get("CXX", "g++")
    flags = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi", "-fno-math-errno",
             "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # sums in any order
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        compiled, library = os.path.join(folder, "fast.o"), os.path.join(folder, "fast.so")
        for command in ([compiler, "-x", "c++", "-", "-c", "-o", compiled, *flags],
                        [compiler, "-shared", "-o", library, compiled]):  # it finds the OpenMP of PyTorch
            done = subprocess.run(command, input=source, text=True, capture_output=True)
            if done.returncode:
                lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
                reason = next((line for line in lines if "error" in line), lines[0])
                raise OSError(f"{compiler} can't compile fast.cpp: {reason.strip()}")
        return ctypes.CDLL(library)


def call(function, *arguments):
    """Calls a C function; tensors go as their addresses."""
    function(*(ctypes.c_int64(value) if isinstance(value, int) else
               ctypes.c_void_p(value if value is None else value.data_ptr()) for value in arguments))


def move_to_huge_pages(model):
    """Puts weights on the CPU into pages of 2 MB, which virtual machines read up to twice as fast.

    Where a system has none, into one piece of memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    sizes = [64 * math.ceil(tensor.nbytes / 64) for tensor in tensors]
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    for tensor, place in zip(tensors, torch.frombuffer(memory, dtype=torch.uint8).split(sizes), strict=True):
        tensor.data = place[:tensor.nbytes].view(tensor.dtype).view_as(tensor).copy_(tensor.data)


class CompiledReader:
    """Reads tokens and makes logits by what is in fast.cpp; the weights must stay where they are."""

    def __init__(self, model):
        self.model, dtype = model, model.norm.weight.dtype
        types = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "_Float16"}
        if dtype not in types:
            raise OSError(f"nothing can be compiled for {dtype}; take --dtype float32")
        args, value = model.args, types[dtype]
        weight = "int8_t" if isinstance(model.output, Int8Linear) else value
        chunk = math.gcd(64, args.dim, args.hidden_dim)
        lanes = math.gcd(16, chunk, args.head_dim)
        self.constants = dict(
            DIM=args.dim, HIDDEN=args.hidden_dim, VOCAB=args.vocab_size, LAYERS=args.n_layers,
            H=args.n_heads, K=args.n_kv_heads, D=args.head_dim, EPS=f"{float(args.norm_eps)}f",
            VALUE=value, WEIGHT=weight, CHUNK=chunk, LANES=lanes,
            PAIRS=int(weight == "bfloat16" and chunk % 32 == 0 and lanes == 16))
        self.kernels(1)  # before anything is changed
        move_to_huge_pages(model)
        self.weights = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]  # kept alive
        self.layers = torch.tensor([self.addresses(
            layer.attention_norm, layer.attention.wq, layer.attention.wk, layer.attention.wv,
            layer.attention.wo, layer.ffn_norm, layer.feed_forward.w1, layer.feed_forward.w3,
            layer.feed_forward.w2) for layer in model.layers])
        self.output = torch.tensor(self.addresses(model.output))

    @staticmethod
    def addresses(*modules):
        """Of a norm its weight's, of a matrix its values' and its scales', where 0 stands for none."""
        addresses = []
        for module in modules:
            if isinstance(module, Int8Linear):
                addresses += [module.quantized.data_ptr(), module.scale.data_ptr()]
            else:
                addresses += [module.weight.data_ptr()] + [0] * isinstance(module, nn.Linear)
        return addresses

    def kernels(self, B):
        """The library for B rows, of which it multiplies up to 8 at once."""
        return compile_kernels(TILE=math.ceil(B / math.ceil(B / 8)), **self.constants)

    def read(self, tokens, start_pos, caches):
        """As Transformer.read."""
        (B, T), model, room = tokens.shape, self.model, caches[0].k.size(1)
        positions = torch.tensor(start_pos)[:, None] + torch.arange(T)
        where = *model.angles(positions), positions
        x = model.tok_embeddings(tokens).float()
        caches = torch.tensor([[cache.k.data_ptr(), cache.v.data_ptr()] for cache in caches])
        h, added = torch.empty_like(x, dtype=model.norm.weight.dtype), None
        kernels = self.kernels(B if T == 1 else 1)  # those for prompts are the same for any B
        if T == 1:
            call(kernels.read_token, B, x, *where, self.layers, caches, room)
        else:
            for layer, cache in zip(model.layers, caches, strict=True):
                attention, ffn = layer.attention, layer.feed_forward
                call(kernels.add_and_norm, B * T, x, added, layer.attention_norm.weight, h)
                q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
                call(kernels.attend_to_prompt, B, T, q, k, v, *where, cache, room, h)
                added = attention.wo(h)
                call(kernels.add_and_norm, B * T, x, added, layer.ffn_norm.weight, h)
                gate, up = ffn.w1(h), ffn.w3(h)
                call(kernels.swiglu, gate.numel(), gate, up)
                added = ffn.w2(gate)
        call(kernels.add_and_norm, B * T, x, added, model.norm.weight, h)
        return h

    def logits(self, x):
        """As Transformer.logits."""
        logits = torch.empty(len(x), self.model.args.vocab_size)
        call(self.kernels(len(x)).logits, len(x), x.contiguous(), self.output, logits)
        return logits


def compile_inference(model):
    """Makes model.read and model.logits faster; elsewhere than on the CPU torch.compile does it."""
    if model.norm.weight.device.type != "cpu":
        for layer in model.layers:
            layer.compile(dynamic=True)
        return
    try:
        reader = CompiledReader(model)
        model.read, model.logits = reader.read, reader.logits
    except OSError as error:
        print(f"{error}; --compile has no effect", file=sys.stderr)

# -----------------------------------------------------------------------------
# Memory


def glibc():
    """The C library if it is the GNU one, which can be told what to do with freed memory; else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def keep_freed_memory(device):
    """Lets glibc keep what tensors on the CPU free from now on for the next ones, in this whole process.

    By default it returns large pieces, and fetching fresh pages takes a fifth of a step of training.
    """
    if device.type == "cpu" and (libc := glibc()):
        libc.malloc_trim(0)  # returns what is free by now
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never again
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no pieces apart from the others


def check_memory(what, num_bytes, device):
    """ValueError where so many bytes are more than a device has free, and the system tells how many."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # mps shares the machine's memory
        free = psutil.virtual_memory().available
        if num_bytes > free and (libc := glibc()):
            libc.malloc_trim(0)  # returns what keep_freed_memory keeps
            free = psutil.virtual_memory().available
    if num_bytes > free:
        raise ValueError(f"{what} take {num_bytes / 1e9:.2f} GB, {device} has {free / 1e9:.2f} GB free; "
                         "take a smaller dtype, max_seq_len, batch or model")
