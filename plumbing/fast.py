"""What makes llama31.py fast: the chunked loss, compiled blocks and inference, kept memory.

The Transformer's block is written three times: to be read (llama31.py), for prompts whose products PyTorch
makes faster (CompiledReader.extend_with_torch), and for all others (read_tokens in fast.cpp). The tests hold
all three to the same numbers.
"""

import ctypes
import functools
import importlib.util
import math
import sys
from pathlib import Path

import psutil
import torch
from torch import nn

from plumbing import machine
from plumbing.compiler import Address, compile_library, find_compiler
from plumbing.decoding import StaticReader
from plumbing.devices import fast_dtype, name_of
from plumbing.narrow import Int8Linear

# -----------------------------------------------------------------------------
# Loss

LOGITS_AT_ONCE = 2**26  # Logits that exist at any time, where memory is free: 128 MB in bfloat16.
CACHED_ENTRIES = 2**20  # On the CPU, entries handled at a time, so that float32 passes stay in its cache.


def chunked_cross_entropy(x, weight, targets, dtype, logits_at_once=None, cached_entries=CACHED_ENTRIES):
    """The sum in nats, float32, of the cross entropies of x @ weight.T against targets.

    x: (N, dim). weight: (V, dim), no gradient of which is made where it is frozen. targets: (N,), of which
    -100 don't count. dtype: of the matrix products. A chunk of rows at a time goes from logits to loss to
    gradients, so that no (N, V) logits ever exist; logits_at_once None: as many as fit. The gradients are
    scaled in place, so that a second backward pass through one loss raises.
    """
    logits_at_once = logits_at_once or logits_that_fit(x.device)
    return ChunkedCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled(), logits_at_once,
                                     cached_entries)


def logits_that_fit(device):
    """LOGITS_AT_ONCE, or a power of two below it if a GPU lacks the memory."""
    number = LOGITS_AT_ONCE
    # With its softmax, a logit takes up to 14 bytes. A CPU makes that of a few rows at a time.
    if device.type == "cuda":
        free = free_memory(device)
        while number > 2**20 and 14 * number > free:
            number //= 2  # not just what fits, so that the sums of most runs are the same
    return number


class ChunkedCrossEntropy(torch.autograd.Function):
    """The autograd function of chunked_cross_entropy."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients, logits_at_once, cached_entries):
        V = len(weight)
        # A narrow weight is widened by blocks of words, so that no wide copy of it ever exists.
        is_narrow = weight.itemsize < dtype.itemsize
        words = max(1, cached_entries // weight.size(1)) if is_narrow else V
        blocks = weight.split(words) if is_narrow else [weight.to(dtype)]
        is_target = (targets != -100)[:, None]
        index = targets[:, None].clamp(min=0)  # Any column will do where there is no target.
        total = torch.zeros((), device=x.device)
        dx = None
        dweight = None
        is_trained = with_gradients and ctx.needs_input_grad[1]
        if with_gradients:
            dx = torch.empty_like(x)
        if is_trained:
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        chunk_rows = max(1, min(len(x), logits_at_once // V))
        # One for all chunks, as fresh memory takes time.
        buffer = torch.empty(chunk_rows, V, dtype=dtype, device=x.device)
        for begin in range(0, len(x), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            h = x[rows].to(dtype)
            logits = buffer[:len(h)]
            for block, columns in zip(blocks, logits.split(words, 1), strict=True):
                torch.mm(h, block.to(dtype).T, out=columns)
            for part, i, counts in parts(cached_entries, logits, index[rows], is_target[rows]):
                logprobs = part.float().log_softmax(-1)
                total -= (logprobs.gather(1, i) * counts).sum()
                if with_gradients:
                    # Overwrite the logits with their gradient, softmax - one-hot.
                    ones = torch.ones_like(i, dtype=torch.float32)
                    part.copy_(logprobs.exp_().scatter_add_(1, i, -ones))
            if with_gradients:
                dh = torch.zeros_like(h)
                for block, columns in zip(blocks, logits.split(words, 1), strict=True):
                    dh.addmm_(columns, block.to(dtype))
                dx[rows] = dh * is_target[rows]
            if is_trained:
                counted = h * is_target[rows]
                for dweight_part, logits_part in parts(cached_entries, dweight, logits.T):
                    dweight_part += logits_part @ counted  # It is a view: dweight itself grows.
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        if dweight is not None:
            dweight.mul_(grad)
        return dx.mul_(grad), dweight, None, None, None, None, None


def product_dtype(x):
    """The type of products of x: autocast's, if it is on, which an autograd.Function has to apply itself."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def parts(num_entries, *tensors):
    """Cuts tensors into the same rows: on the CPU with num_entries each, elsewhere all at once."""
    first = tensors[0]
    num_rows = max(1, num_entries // first.size(1)) if first.is_cpu else len(first)
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)

# -----------------------------------------------------------------------------
# Compiled inference
#
# On the CPU in C++, as PyTorch reads weights at a third of the memory's speed where there are few tokens:
# fast.cpp says why, and how it does better.


def say_uncompiled(reason):
    print(f"{reason}; nothing is compiled", file=sys.stderr)


def can_compile(device):
    """Whether torch.compile has what it needs for a device; if not, a line on standard error says so."""
    reason = None
    if device.type == "cpu":
        try:
            command = find_compiler()
            if len(command) > 1:
                reason = f"torch.compile needs a CXX of one word, not {' '.join(command)}"
        except OSError as error:
            reason = error
    elif device.type != "cuda":
        reason = f"torch.compile is not ready for {device}"
    elif importlib.util.find_spec("triton") is None:
        reason = "torch.compile needs the package triton"
    elif torch.cuda.get_device_capability(device) < (7, 0):
        reason = f"torch.compile needs a GPU of compute capability 7.0, which {device} has not"
    if reason:
        say_uncompiled(reason)
    return reason is None


def compile_blocks(model, dynamic=None):
    """Compiles a model's blocks with torch.compile, for training, or for inference on other devices.

    One block is compiled, once, and serves all layers. dynamic: for any number of tokens at once. Returns
    whether it could.
    """
    can = can_compile(model.device)
    for layer in model.layers if can else ():
        layer.compile(dynamic=dynamic)
    return can


def compile_inference(model):
    """What extends caches and makes logits faster: an object with the model's methods extend and head.

    On the CPU a CompiledReader, on other devices a StaticReader of compiled blocks, which also draws. None,
    after a line on standard error that says why, where nothing can be compiled.
    """
    if model.tensor_parallel > 1:
        say_uncompiled(f"{model.tensor_parallel} processes split the model")
        return None
    if model.device.type != "cpu":
        return StaticReader(model) if compile_blocks(model, dynamic=True) else None
    try:
        find_compiler()  # Also where this process has compiled the kernels before, CXX may have changed.
        return CompiledReader(model)
    except OSError as error:
        say_uncompiled(error)
        return None


class Model(ctypes.Structure):
    """fast.cpp's Model."""
    _fields_ = [*((name, ctypes.c_int64) for name in (
        "dim", "hidden_dim", "vocab_size", "n_layers", "n_heads", "n_kv_heads", "head_dim")),
        ("norm_eps", ctypes.c_double), ("layers", ctypes.c_void_p)]


assert ctypes.sizeof(Model) == 9 * 8  # fast.cpp asserts the same of its own.


@functools.cache
def compile_kernels(**constants):
    """fast.cpp as a ctypes library; see compile_library."""
    path = Path(__file__).resolve().with_name("fast.cpp")  # This file may be a link to a folder elsewhere.
    library = compile_library(path, **constants)
    model = ctypes.POINTER(Model)
    number = ctypes.c_int64
    library.read_tokens.argtypes = [model, number, number, *[Address] * 5, number]
    library.head.argtypes = [model, number, *[Address] * 3]
    library.add_and_norm.argtypes = [model, number, *[Address] * 4]
    library.attend_to_prompt.argtypes = [model, number, number, *[Address] * 7, number]
    library.swiglu.argtypes = [number, Address, Address]
    library.instructions.restype = ctypes.c_char_p
    return library


def move_to_huge_pages(model):
    """Puts weights on the CPU into pages of 2 MB, which virtual machines read up to twice as fast.

    Where a system has none, into one piece of memory. Each tensor that has moved lets go of its old place, a
    file's memory map or what glibc keeps, so that only one is there twice at a time.
    """
    tensors = [*model.parameters(), *model.buffers()]
    sizes = [64 * math.ceil(tensor.nbytes / 64) for tensor in tensors]  # Each begins with a cache line.
    places = torch.frombuffer(machine.private_memory(sum(sizes)), dtype=torch.uint8).split(sizes)
    for tensor, place in zip(tensors, places, strict=True):
        tensor.data = place[:tensor.nbytes].view(tensor.dtype).view_as(tensor).copy_(tensor.data)
        return_freed_memory()


class CompiledReader:
    """Runs a model through fast.cpp. It holds raw addresses: the weights must not be moved or replaced."""

    def __init__(self, model):
        is_int8 = isinstance(model.output, Int8Linear)
        weight_dtype = torch.int8 if is_int8 else model.output.weight.dtype
        names = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16",
                 torch.int8: "int8_t"}
        self.dtype = model.dtype
        for dtype in (self.dtype, weight_dtype):
            if dtype not in names:
                raise OSError(f"no kernels for {name_of(dtype)}, take --dtype float32")
        # Compile first: if that fails, the model is still as it was.
        self.kernels = compile_kernels(VALUE=names[self.dtype], WEIGHT=names[weight_dtype])
        move_to_huge_pages(model)
        self.model = model
        self.weights_at = model.norm.weight.data_ptr()
        self.weights = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]  # kept alive
        norms = [norm for layer in model.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        self.norms = torch.stack([norm.weight.detach().float() for norm in (*norms, model.norm)])
        self.layers = torch.tensor([self.addresses(
            attention_norm, layer.attention.wq, layer.attention.wk, layer.attention.wv,
            layer.attention.wo, ffn_norm, layer.feed_forward.w1, layer.feed_forward.w3,
            layer.feed_forward.w2)  # in the order of fast.cpp's Layer
            for layer, attention_norm, ffn_norm in zip(model.layers, self.norms[:-1:2], self.norms[1::2],
                                                       strict=True)])
        self.output = torch.tensor(self.addresses(model.output))
        args = model.args
        self.sizes = Model(args.dim, args.hidden_dim, args.vocab_size, args.n_layers, args.n_heads,
                           args.n_kv_heads, args.head_dim, args.norm_eps, self.layers.data_ptr())
        # PyTorch multiplies many tokens faster only in bfloat16, if the processor has instructions for it.
        fast = fast_dtype(model.device, self.dtype)
        self.torch_multiplies = self.dtype == weight_dtype == fast == torch.bfloat16

    @staticmethod
    def addresses(*places):
        """Addresses: of a norm's weight; of a matrix's values and its scales, 0 where it has none."""
        addresses = []
        for place in places:
            if isinstance(place, Int8Linear):
                addresses += [place.quantized.data_ptr(), place.scale.data_ptr()]
            elif isinstance(place, nn.Linear):
                addresses += [place.weight.data_ptr(), 0]
            else:
                addresses += [place.data_ptr()]
        return addresses

    def extend(self, tokens, start_pos, caches):
        """As Transformer.extend; ValueError if the model has other weights than when it was compiled."""
        model = self.model
        if model.dtype != self.dtype or model.norm.weight.data_ptr() != self.weights_at:
            raise ValueError("the model was changed after its inference was compiled; build it with "
                             "compile=False to change it")
        B, T = tokens.shape
        positions = torch.tensor(start_pos)[:, None] + torch.arange(T)
        x = model.tok_embeddings(tokens).float()
        h = torch.empty_like(x, dtype=self.dtype)
        cos, sin = model.angles(positions)
        where = cos, sin, positions
        room = caches[0].k.size(1)
        # Not bound to `caches`: this frame may be the last to hold their memory.
        addresses = torch.tensor([[cache.k.data_ptr(), cache.v.data_ptr()] for cache in caches])
        added = None
        if T > 1 and self.torch_multiplies:
            added = self.extend_with_torch(x, h, where, addresses, room)
        else:
            self.kernels.read_tokens(self.sizes, B, T, x, *where, addresses, room)
        self.kernels.add_and_norm(self.sizes, B * T, x, added, self.norms[-1], h)
        return h

    def extend_with_torch(self, x, h, where, caches, room):
        """read_tokens with PyTorch's products. h: memory. Returns what is still to be added to x."""
        B, T = x.shape[:2]
        kernels = self.kernels
        added = None
        for i, (layer, cache) in enumerate(zip(self.model.layers, caches, strict=True)):
            attention = layer.attention
            ffn = layer.feed_forward
            kernels.add_and_norm(self.sizes, B * T, x, added, self.norms[2 * i], h)
            q = attention.wq(h)
            k = attention.wk(h)
            v = attention.wv(h)
            kernels.attend_to_prompt(self.sizes, B, T, q, k, v, *where, cache, room)
            added = attention.wo(q)
            kernels.add_and_norm(self.sizes, B * T, x, added, self.norms[2 * i + 1], h)
            gate = ffn.w1(h)
            kernels.swiglu(gate.numel(), gate, ffn.w3(h))
            added = ffn.w2(gate)
        return added

    def head(self, x):
        """As Transformer.head."""
        logits = torch.empty(len(x), self.model.args.vocab_size)
        self.kernels.head(self.sizes, len(x), x.contiguous(), self.output, logits)
        return logits

# -----------------------------------------------------------------------------
# Memory


def glibc():
    """The C library if it is the GNU one, which can be told what to do with freed memory; else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def return_freed_memory():
    """Lets glibc return to the system what tensors on the CPU have freed; others do so by themselves."""
    if libc := glibc():
        libc.malloc_trim(0)


def keep_freed_memory(device):
    """Lets glibc keep what tensors on the CPU free for the next ones, in this whole process: for commands.

    By default it returns large pieces, and fetching fresh pages takes a fifth of a step of training.
    """
    if device.type == "cpu" and (libc := glibc()):
        return_freed_memory()
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return any again.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take no piece apart from the others.


def free_memory(device):
    """Bytes of memory that are free on a device, within a container's limit; mps shares the machine's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return machine.free_memory()


def used_memory(device):
    """Bytes: the most that this process has taken of a GPU so far, or what it now has of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def check_memory(what, num_bytes, device):
    """Raises ValueError if a device has less than num_bytes free."""
    free = free_memory(device)
    if num_bytes > free and device.type != "cuda":
        return_freed_memory()  # A command keeps it for later tensors: see keep_freed_memory.
        free = free_memory(device)
    if num_bytes > free:
        raise ValueError(f"{what} take {num_bytes / 1e9:.2f} GB, {device} has {free / 1e9:.2f} GB free; "
                         "take a smaller dtype, max_seq_len, batch or model")
