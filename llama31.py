"""Llama 3 in one file: the model, its cache, sampling, checkpoints, the data loader and the training loop.

    python llama31.py demo                                        # corpus, training and stories, 3 minutes
    python llama31.py --ckpt_dir DIR --prompt "Once upon a time"  # sample from a checkpoint directory
    torchrun --nproc_per_node 8 llama31.py --ckpt_dir DIR         # finetune it

Read it downwards: every part uses only what stands above it; llama31.cpp is for speed only. Sizes in
comments: B batch, T new tokens, S cached and new tokens, H query heads, K key/value heads, D head dimension,
V vocabulary.
"""

import codecs
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from plumbing import cli
from plumbing.checkpoint import (
    check_tensors,
    checkpoint_tensors,
    checkpoints_of_run,
    drop_checkpoints,
    load_file,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    save_checkpoint,  # noqa: F401  (for those who import it from here)
    save_training,
    split_dim,
)
from plumbing.fast import (
    ChunkedCrossEntropy,
    can_compile,
    check_memory,
    compile_inference,
    keep_freed_memory,
    load_int8,
)
from plumbing.files import MASKED, VERSION, check_disk, check_manifests, read_header, read_tokens
from plumbing.run import (
    entropy_floor,
    measured_peak,
    noted_signals,
    plot_losses,
    prepare_folder,
    report,
    used_memory,
)
from tokenizer import Tokenizer, train_tokenizer

# -----------------------------------------------------------------------------
# Configuration


def expect(fits, name, value, expected):
    """ValueError where the value of a setting doesn't fit."""
    if not fits:
        raise ValueError(f"{name} is {value}; expected {expected}")


@dataclass
class ModelArgs:
    """The shape of a Llama 3, with the field names of Meta's params.json.

    ValueError names a field that is out of range or doesn't fit the others, and from_json an unknown one.
    """
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = 128256
    multiple_of: int = 256  # the SwiGLU hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    rope_scale_factor: float = 8.0  # 32 for Llama 3.2 1B and 3B
    tie_word_embeddings: bool = False
    max_seq_len: int = 2048  # prompt and generated tokens together, unless Llama.build is told otherwise

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.type is bool:
                fits, expected = type(value) is bool, "true or false"
            elif field.type in (int, int | None):
                fits, expected = type(value) is int and value > 0, "a whole number of at least 1"
            else:
                fits, expected = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
            expect(fits, field.name, repr(value), expected)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        expect(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads,
               f"a divisor of n_heads, here {self.n_heads}")
        expect(self.dim % (2 * self.n_heads) == 0, "dim", self.dim, f"a multiple of 2 * n_heads = "
               f"{2 * self.n_heads}: RoPE turns pairs of a head's elements")

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def hidden_dim(self):
        """The SwiGLU hidden size by Meta's rule: 2/3 of 4 dim, times the multiplier, rounded up."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    @classmethod
    def from_json(cls, path):
        """Reads params.json; FileNotFoundError or ValueError names the file and the field at fault."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file; a checkpoint directory holds a params.json")
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"found {json.dumps(fields):.40}; expected an object of ModelArgs' fields")
            known = [field.name for field in dataclasses.fields(cls)]
            if unknown := sorted(fields.keys() - known):
                raise ValueError(f"unknown field {', '.join(unknown)}; expected some of {', '.join(known)}")
            args = cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        shape = args.dim, args.n_layers, args.n_heads, args.n_kv_heads
        if (args.use_scaled_rope and "rope_scale_factor" not in fields
                and shape in ((2048, 16, 32, 8), (3072, 28, 24, 8))):
            args.rope_scale_factor = 32.0
            print(f"{path}: the shape of Llama 3.2, so rope_scale_factor is 32", file=sys.stderr)
        return args


PRESETS = {  # the demo's shape, then Meta's published ones
    "demo": dict(dim=192, n_layers=2, n_heads=3, n_kv_heads=3, multiple_of=32, rope_theta=10000.0,
                 tie_word_embeddings=True),
    "llama3.1-8b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024,
                        ffn_dim_multiplier=1.3, use_scaled_rope=True),
    "llama3.1-70b": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096,
                         ffn_dim_multiplier=1.3, use_scaled_rope=True),
    "llama3.1-405b": dict(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, multiple_of=4096,
                          ffn_dim_multiplier=1.2, use_scaled_rope=True),
    "llama3.2-1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256,
                        ffn_dim_multiplier=1.5, use_scaled_rope=True, rope_scale_factor=32,
                        tie_word_embeddings=True),
    "llama3.2-3b": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, multiple_of=256,
                        ffn_dim_multiplier=1.0, use_scaled_rope=True, rope_scale_factor=32,
                        tie_word_embeddings=True),
}

# -----------------------------------------------------------------------------
# Normalization


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.type_as(x) * self.weight

# -----------------------------------------------------------------------------
# Rotary position embedding


def rope_frequencies(args):
    """(D/2,) float32: radians per position of each pair of a head's elements (Su et al., 2021).

    With use_scaled_rope, Llama 3.1's stretch of the context: pairs that turn at least 4 times within the old
    context stay, those that don't turn once are slowed by rope_scale_factor, those between are blended.
    """
    with torch.device("cpu"):  # also while the model is laid out on the meta device
        freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    if not args.use_scaled_rope:
        return freqs
    low, high, old_context = 1.0, 4.0, 8192
    turns = old_context / (2 * math.pi / freqs)  # how often each pair turns within the old context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * freqs / args.rope_scale_factor + kept * freqs


def apply_rope(x, cos, sin):
    """Turns each interleaved pair of x (B, T, heads, D) by its angle; cos and sin: (B or 1, T, 1, D/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)

# -----------------------------------------------------------------------------
# Key/value cache


class KVCache:
    """One layer's keys and values, (B, max_seq_len, K, D) each; a row's are valid up to its own length."""

    def __init__(self, args, batch_size, max_seq_len, dtype=None, device=None):
        shape = (batch_size, max_seq_len, args.n_kv_heads, args.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, k, v, positions, S):
        """Writes k and v (B, T, K, D) at positions (B, T); returns the first S of both, (B, S, K, D)."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        self.k[rows, positions] = k.to(self.k.dtype)  # which differs while FSDP trains
        self.v[rows, positions] = v.to(self.v.dtype)
        return self.k[:, :S].to(k.dtype), self.v[:, :S].to(v.dtype)

# -----------------------------------------------------------------------------
# Transformer


@functools.cache
def compiled_flex_attention():
    """Uncompiled, flex attention computes all T x S scores."""
    return torch.compile(flex_attention)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads (Ainslie et al., 2023)."""

    def __init__(self, args):
        super().__init__()
        self.head_dim, self.gqa = args.head_dim, args.n_heads != args.n_kv_heads
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, cos, sin, mask=None, cached=None):
        """x (B, T, dim) -> the same shape.

        mask: (B, 1, T, S), True where attended, or flex attention's BlockMask; None: causal, or one new
        token that sees all. cached: a function that stores the new keys and values, and returns them with
        those before.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)  # (B, T, H, D), (B, T, K, D)
        if cached is not None:
            k, v = cached(k, v)  # (B, S, K, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if isinstance(mask, BlockMask):
            attend = compiled_flex_attention() if q.is_cuda else flex_attention
            y = attend(q, k, v, block_mask=mask, enable_gqa=self.gqa)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.gqa,
                                               is_causal=q.size(2) > 1 and mask is None)
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each on a normalized copy added back to the stream."""

    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, cos, sin, mask=None, cached=None):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cached)
        return x + self.feed_forward(self.ffn_norm(x))


def counted(targets, bos_id=None):
    """Which targets count: not -100, nor, where bos_id separates documents, a document's first token."""
    kept = targets != -100
    return kept if bos_id is None else kept & (targets != bos_id)


def document_mask(tokens, bos_id):
    """What hides each document, from bos_id on, of tokens (B, T) from the next; None where causality does.

    A BlockMask for flex attention on cuda, elsewhere (B, 1, T, T), as flex attention can't train there.
    """
    document = (tokens == bos_id).cumsum(1)  # (B, T)
    if (document == document[:, :1]).all():
        return None

    def attended(b, h, i, j):
        return (document[b, i] == document[b, j]) & (i >= j)
    B, T = tokens.shape
    if tokens.is_cuda:
        return create_block_mask(attended, B, None, T, T, device=tokens.device)
    rows, columns = torch.arange(T)[:, None], torch.arange(T)
    return attended(torch.arange(B)[:, None, None], None, rows, columns)[:, None]


class Transformer(nn.Module):
    """The whole model; its state dict has Meta's checkpoint keys."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        empty = torch.empty(args.vocab_size, args.dim)  # drawing it on the meta device would take a second
        self.tok_embeddings = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie()
        self.rope_frequencies = rope_frequencies(args)  # no buffer: .to(bfloat16) must not round it
        self.tokens_at_once = 4096  # of a prompt, all rows together
        self.activation_checkpointing = False  # True: training keeps only the inputs of its blocks
        if not self.output.weight.is_meta:
            self.init_weights()

    def tie(self):
        """One storage for embedding and output where the configuration says so."""
        if self.args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self, generator=None):
        for name, p in self.named_parameters():
            self.init_weight(name, p, generator)

    @torch.no_grad()
    def init_weight(self, name, p, generator=None):
        """Embeddings of length one, matrices of half that scale, less where a layer adds to the stream.

        At GPT-2's widths this is about its 0.02. Returns p, the parameter of that name or a stand-in.
        """
        scale = self.args.dim ** -0.5
        if p.dim() == 1:
            return p.fill_(1)
        if name.startswith(("tok_embeddings", "output")):
            return p.normal_(std=scale, generator=generator)
        shrink = math.sqrt(2 * self.args.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 1
        return p.normal_(std=scale / 2 / shrink, generator=generator)

    def angles(self, positions):
        """cos and sin (B or 1, T, 1, D/2) of RoPE's angles at positions (B or 1, T)."""
        angles = positions[..., None, None].float() * self.rope_frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def trunk(self, tokens, positions, mask=None, cached=None):
        """tokens (B, T) at positions (B or 1, T) -> normalized hidden states (B, T, dim)."""
        cos, sin = self.angles(positions)
        x = self.tok_embeddings(tokens)
        for layer, layer_cached in zip(self.layers, cached or [None] * len(self.layers), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask, layer_cached)
        return self.norm(x)

    def forward(self, tokens, targets=None, bos_id=None):
        """tokens (B, T) int64 -> logits (B, T, V) float32, plain causal; with targets: forward_loss."""
        if targets is not None:
            return self.forward_loss(tokens, targets, bos_id)
        positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        return self.output(self.trunk(tokens, positions)).float()

    def forward_loss(self, inputs, targets, bos_id=None):
        """Mean cross entropy in nats over the targets (B, T) that are not -100; 0 if there are none.

        bos_id: documents begin at this token and don't see each other; predicting it does not count.
        """
        positions = torch.arange(inputs.size(1), device=inputs.device)[None]
        x = self.trunk(inputs, positions, None if bos_id is None else document_mask(inputs, bos_id))
        kept = counted(targets, bos_id)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        total = ChunkedCrossEntropy.apply(x.flatten(0, 1), self.output.weight,
                                          targets.masked_fill(~kept, -100).flatten(), dtype,
                                          torch.is_grad_enabled())
        return total / kept.sum().clamp(min=1)

    def read(self, tokens, start_pos, caches):
        """Extends the caches by tokens (B, T), row b from position start_pos[b]: (B, T, dim), normalized."""
        T, S = tokens.size(1), max(start_pos) + tokens.size(1)
        columns = torch.arange(S, device=tokens.device)
        positions = torch.tensor(start_pos, device=tokens.device)[:, None] + columns[:T]
        mask = None
        if S > T and (T > 1 or min(start_pos) < max(start_pos)):
            mask = (columns <= positions[..., None])[:, None]
        cached = [functools.partial(cache.update, positions=positions, S=S) for cache in caches]
        return self.trunk(tokens, positions, mask, cached)

    def logits(self, x):
        """(B, V) float32, of normalized hidden states (B, dim)."""
        return self.output(x).float()

    def forward_cached(self, tokens, start_pos, caches, last):
        """Extends the caches by tokens (B, T), row b from position start_pos[b]; logits (B, V) at last[b].

        start_pos, last: lists of ints; last: columns of tokens. Columns past a row's own end may hold
        anything: nothing that counts sees them, and later tokens overwrite them. Long prompts are read in
        chunks of columns, so that activations stay small. ValueError where the caches are too short, also
        for such columns.
        """
        (B, T), room = tokens.shape, caches[0].k.size(1)
        if max(start_pos) + T > room:
            raise ValueError(f"the KV cache holds {room} positions; {max(start_pos) + T} are needed")
        hidden, width = [None] * B, max(1, self.tokens_at_once // B)
        for begin in range(0, T, width):
            x = self.read(tokens[:, begin:begin + width], [n + begin for n in start_pos], caches)
            for b in range(B):
                if begin <= last[b] < begin + width:
                    hidden[b] = x[b, last[b] - begin]
        return self.logits(torch.stack(hidden))

    def flops_per_token(self, seq_len):
        """Floating-point operations of training on a token: 6 a weight, and causal attention's."""
        weights = sum(p.numel() for p in self.parameters())  # the embedding is looked up, not multiplied
        if not self.args.tie_word_embeddings:
            weights -= self.tok_embeddings.weight.numel()
        return 6 * weights + 6 * self.args.n_layers * seq_len * self.args.dim

    def configure_optimizers(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW with decay on matrices and none on norms; one fused kernel where the device has it.

        From then on the process keeps freed memory, as training needs it again at every step.
        """
        keep_freed_memory(self.norm.weight.device)
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        fused = parameters[0].device.type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

# -----------------------------------------------------------------------------
# Checkpoints


def open_checkpoint(ckpt_dir):
    """(ModelArgs, tensor name -> its pieces, one per consolidated.*.pth, memory-mapped) of a directory.

    The output is tied if declared, absent or equal to the embedding. Strict: FileNotFoundError for an absent
    file; ValueError names an unreadable one, lists missing, unexpected and wrongly shaped tensors, or says
    that the files are of different models.
    """
    files = sorted(Path(ckpt_dir).glob("consolidated.*.pth"))
    if not files and any(Path(ckpt_dir).glob("*.safetensors")):
        raise FileNotFoundError(f"{ckpt_dir}: found Hugging Face's *.safetensors, expected Meta's files; "
                                f"`python convert.py from_hf {ckpt_dir} NEW_DIR` makes them")
    args = ModelArgs.from_json(Path(ckpt_dir, "params.json"))
    if not files:
        raise FileNotFoundError(f"{ckpt_dir}: found no weights, expected consolidated.00.pth; download it "
                                "again")
    for i, path in enumerate(files):
        if path.name != f"consolidated.{i:02d}.pth":
            raise FileNotFoundError(f"{ckpt_dir}: found {path.name}, but no consolidated.{i:02d}.pth; "
                                    "download it again")
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Transformer(args).state_dict().items()}
    for name, shape in shapes.items():
        if (dim := split_dim(name)) is not None:
            if shape[dim] % len(files):
                raise ValueError(f"{ckpt_dir}: found {len(files)} files of weights, among which {name}, "
                                 f"{shape}, can't be split; is one missing?")
            shape[dim] //= len(files)
    states = [load_file(path) for path in files]
    for path, state in zip(files, states, strict=True):
        state.pop("rope.freqs", None)  # in some of Meta's files, follows from params.json
        if "output.weight" not in state and "tok_embeddings.weight" in state:
            state["output.weight"] = state["tok_embeddings.weight"]
        check_tensors(f"{path}, one of {len(files)} files" if len(files) > 1 else path, state, shapes)
        for name in shapes:
            if (state is not states[0] and split_dim(name) is None
                    and not torch.equal(state[name], states[0][name])):
                raise ValueError(f"{path}: its {name} differs from that of {files[0].name}; expected files "
                                 "of one model, download them again")
    args.tie_word_embeddings |= all(torch.equal(state["output.weight"], state["tok_embeddings.weight"])
                                    for state in states)
    return args, {name: [state[name] for state in states] for name in shapes}


def load_checkpoint(ckpt_dir, device="cpu", dtype=None, quantize=None):
    """The Transformer of a checkpoint directory; dtype None: as stored. Errors: see open_checkpoint.

    On the CPU and in the stored dtype, weights of a single file stay memory-mapped. quantize: int8 or None.
    """
    expect(quantize in (None, "int8"), "quantize", repr(quantize), "int8 or None")
    args, pieces = open_checkpoint(ckpt_dir)
    dtype = dtype or pieces["tok_embeddings.weight"][0].dtype
    with torch.device("meta"):
        model = Transformer(args)
    num_bytes = sum(p.numel() for p in model.parameters()) * (1 if quantize else dtype.itemsize)
    check_memory(f"the weights of {ckpt_dir}", num_bytes, torch.device(device))
    load = load_int8 if quantize else load_weights
    load(model, checkpoint_tensors(args, pieces), device, dtype)
    return model.eval()


# -----------------------------------------------------------------------------
# Sampling

PROMPTS = ("Once upon a time", "One day", "Lily and George were best friends", "On a dark and stormy night")


def choose_device(device=None):
    """The torch.device asked for; None: cuda, else mps, else cpu. ValueError where it is not there."""
    if device is None:
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device} can't be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def choose_dtype(dtype):
    """The torch.dtype of a name such as "bfloat16"; a dtype or None as it is."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    expect(name in ("float32", "bfloat16", "float16"), "dtype", name, "float32, bfloat16 or float16")
    return getattr(torch, name)


def check_vocabulary(tokenizer, args):
    """ValueError where tokenizer and model have vocabularies of different sizes."""
    if tokenizer.n_words != args.vocab_size:
        raise ValueError(f"{tokenizer.model_path} has {tokenizer.n_words} tokens, the model "
                         f"{args.vocab_size}; give the tokenizer.model that the model was trained with")


def sample_token(logits, temperature, top_p=1.0, top_k=0, min_p=0.0, generator=None):
    """One token id drawn from logits (V,); temperature 0, or next to it, takes the largest.

    Each limit looks at the whole distribution, and the likeliest token always stays. top_p: only the fewest
    tokens that together hold at least that probability. top_k: only so many of the likeliest, 0 for all.
    min_p: only those at least that fraction as likely as the likeliest.
    """
    if temperature < 1e-6:
        return int(logits.argmax())
    logits = logits.float().cpu()
    probs = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    # tokens rarer than this hold less than 1 - top_p together: they need no sorting (0.9: for rounding)
    ids = (probs >= 0.9 * (1 - top_p) / len(probs)).nonzero()[:, 0]
    probs, order = probs[ids].sort(descending=True, stable=True)
    kept = probs >= min_p * probs[0]
    if top_p < 1:
        kept &= probs.cumsum(-1) - probs < top_p  # what the likelier tokens hold
    if top_k:
        kept[top_k:] = False
    kept[0] = True
    noise = torch.empty_like(logits).exponential_(generator=generator)  # V numbers, whatever is kept
    return int(ids[order[(probs * kept / noise[:len(ids)]).argmax()]])  # as torch.multinomial draws


def split_at_stop(text, stop, final):
    """(what of a text can be shown, the rest, whether a text of stop was met, which itself is in neither).

    The rest may be the beginning of a stop text, unless the text is final. Of several, the first to be
    complete counts, so that it doesn't matter how tokens cut the text.
    """
    found = [(begin + len(s), begin) for s in stop if (begin := text.find(s)) >= 0]
    if found:
        return text[:min(found)[1]], "", True
    beginnings = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    shown = len(text) - (0 if final else max(beginnings, default=0))
    return text[:shown], text[shown:], False

# -----------------------------------------------------------------------------
# Generation


class Llama:
    """A model with its tokenizer (None where there is none: then token ids only)."""

    def __init__(self, model, tokenizer, max_seq_len=None, max_batch_size=32):
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len = model.args.max_seq_len if max_seq_len is None else max_seq_len
        self.max_batch_size = max_batch_size

    @staticmethod
    def build(ckpt_dir, tokenizer_path=None, max_seq_len=None, max_batch_size=32, device=None, dtype=None,
              compile=False, quantize=None):
        """Loads a checkpoint directory, with its own tokenizer.model unless tokenizer_path names another.

        max_seq_len None: as in params.json. device None: cuda, else mps, else cpu. dtype: a torch dtype or
        its name; None: bfloat16 on cuda, elsewhere as stored. compile: run faster, after some seconds.
        quantize: "int8" halves bfloat16's memory. ValueError or FileNotFoundError names what is wrong with
        the files.
        """
        expect(max_seq_len is None or max_seq_len >= 1, "max_seq_len", max_seq_len, "at least 1")
        expect(max_batch_size >= 1, "max_batch_size", max_batch_size, "at least 1")
        device, dtype = choose_device(device), choose_dtype(dtype)
        if dtype is None and device.type == "cuda":
            dtype = torch.bfloat16
        model = load_checkpoint(ckpt_dir, device, dtype, quantize)
        if compile and can_compile(device):
            compile_inference(model)
        keep_freed_memory(device)
        path = tokenizer_path or os.path.join(ckpt_dir, "tokenizer.model")
        tokenizer = Tokenizer(path) if tokenizer_path or os.path.exists(path) else None
        if tokenizer:
            check_vocabulary(tokenizer, model.args)
        return Llama(model, tokenizer, max_seq_len, max_batch_size)

    def new_caches(self, batch_size, max_seq_len=None):
        """One empty KVCache per layer; ValueError where memory lacks. max_seq_len None: the model's."""
        args, weight = self.model.args, self.model.norm.weight
        room = self.max_seq_len if max_seq_len is None else max_seq_len
        num_bytes = 2 * args.n_layers * batch_size * room * args.n_kv_heads * args.head_dim * weight.itemsize
        check_memory(f"the keys and values of {batch_size} x {room} tokens", num_bytes, weight.device)
        return [KVCache(args, batch_size, room, weight.dtype, weight.device) for _ in self.model.layers]

    @torch.inference_mode()
    def steps(self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, top_k=0, min_p=0.0, seed=1337,
              stop_tokens=None, caches=None, start_pos=None):
        """Yields, a step at a time, the logits and each row's next token, None once it has ended.

        Prompts of any lengths are read in one pass, padded on the right where causality hides the padding.
        Row i draws from its own generator, seeded with seed + i. stop_tokens None: the tokenizer's; [] never
        stops. caches: new_caches, or ones that hold the first start_pos[i] tokens of prompt i, which are not
        read again. At each step the caches hold all tokens before its own; self.stats counts and times them.
        ValueError for an empty prompt, one of max_seq_len or more tokens, or a setting out of range.
        """
        B, lengths = len(prompt_tokens), [len(prompt) for prompt in prompt_tokens]
        start_pos = [0] * B if start_pos is None else start_pos
        if not 0 < B <= self.max_batch_size:
            raise ValueError(f"{B} prompts; expected 1 to {self.max_batch_size}, which is max_batch_size")
        for i, (prompt, held) in enumerate(zip(prompt_tokens, start_pos, strict=True)):
            if not 0 < len(prompt) < self.max_seq_len:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; expected 1 to {self.max_seq_len - 1}"
                                 ", one fewer than max_seq_len")
            if not 0 <= min(prompt) <= max(prompt) < self.model.args.vocab_size:
                raise ValueError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}; expected 0 to "
                                 f"{self.model.args.vocab_size - 1}")
            expect(0 <= held < len(prompt), f"start_pos of prompt {i}", held,
                   f"0 to {len(prompt) - 1}: at least its last token is to be read")
        expect(max_gen_len >= 0, "max_gen_len", max_gen_len, "at least 0")
        expect(0 <= temperature < math.inf, "temperature", temperature, "at least 0")
        expect(0 <= top_p <= 1, "top_p", top_p, "0 to 1")
        expect(top_k >= 0, "top_k", top_k, "at least 0")
        expect(0 <= min_p <= 1, "min_p", min_p, "0 to 1")
        expect(0 <= seed < 2**62, "seed", seed, "0 to 2**62 - 1")
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else []
        if caches is None:
            caches = self.new_caches(B, min(self.max_seq_len, max(lengths) + max_gen_len))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(B)]
        unread = [prompt[held:] for prompt, held in zip(prompt_tokens, start_pos, strict=True)]
        width = max(map(len, unread))
        device = self.model.norm.weight.device
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in unread], device=device)
        last = [len(row) - 1 for row in unread]
        newest, ended = [0] * B, [False] * B
        self.stats = {"prefill": [0, 0.0], "decode": [0, 0.0]}  # tokens, seconds
        for step in range(max_gen_len):
            start = time.perf_counter()
            logits = self.model.forward_cached(tokens, start_pos, caches, last)
            if not torch.stack(torch.aminmax(logits)).isfinite().all():
                raise ValueError("the model's logits are not all finite; take --dtype float32, or get sound "
                                 "weights")
            for i in range(B):
                if not ended[i]:
                    newest[i] = sample_token(logits[i], temperature, top_p, top_k, min_p, generators[i])
            counts = self.stats["decode" if step else "prefill"]
            counts[0] += ended.count(False) if step else sum(map(len, unread))
            counts[1] += time.perf_counter() - start
            ended = [done or token in stop_tokens for done, token in zip(ended, newest, strict=True)]
            lengths = [n + (not done) for n, done in zip(lengths, ended, strict=True)]
            yield logits, [None if done else token for done, token in zip(ended, newest, strict=True)]
            ended = [done or n >= self.max_seq_len for done, n in zip(ended, lengths, strict=True)]
            if all(ended):
                return
            # a row that has ended feeds its last token to its last position again: it doesn't grow
            tokens = torch.tensor(newest, device=device)[:, None]
            start_pos, last = [n - 1 for n in lengths], [0] * B

    def speed(self):
        """One line on the last generation: tokens read and generated, and how many per second."""
        return ", ".join(f"{name} {tokens:,} tokens at {tokens / max(seconds, 1e-9):,.1f}/s"
                         for name, (tokens, seconds) in self.stats.items())

    def generate(self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, top_k=0, min_p=0.0, seed=1337,
                 echo=False, stop_tokens=None, logprobs=False):
        """The new tokens of each prompt, with echo after the prompt itself; the stop token is not returned.

        logprobs: (tokens, log-probabilities), those of the raw logits, whatever the sampler's limits; a
        prompt's first token, which nothing predicts, has 0. The rest as in steps.
        """
        rows, row_logprobs = [[] for _ in prompt_tokens], [[] for _ in prompt_tokens]
        for logits, newest in self.steps(prompt_tokens, max_gen_len, temperature, top_p, top_k, min_p, seed,
                                         stop_tokens):
            for i, token in enumerate(newest):
                if token is not None:
                    rows[i].append(token)
                    if logprobs:
                        row_logprobs[i].append(float(logits[i].log_softmax(-1)[token]))
        if echo:
            rows = [[*prompt, *row] for prompt, row in zip(prompt_tokens, rows, strict=True)]
            if logprobs:
                row_logprobs = [self.prompt_logprobs(prompt) + row
                                for prompt, row in zip(prompt_tokens, row_logprobs, strict=True)]
        return (rows, row_logprobs) if logprobs else rows

    @torch.inference_mode()
    def prompt_logprobs(self, prompt):
        """The log-probability of each of a prompt's tokens after those before it; 0 for the first."""
        tokens = torch.tensor(prompt, device=self.model.norm.weight.device)
        nats = F.cross_entropy(self.model(tokens[None, :-1])[0], tokens[1:], reduction="none")
        return [0.0, *(-nats).tolist()]

    def stream_text(self, prompts, max_gen_len=256, stop=(), **settings):
        """Yields, a step at a time, the next piece of text after every prompt, "" where there is none.

        prompts: texts, or dialogs as in chat_completion. A character spread over several tokens comes with
        the last of them. stop: a text, or several, before which a row ends. settings: as in steps.
        """
        if isinstance(prompts, str):
            raise ValueError(f"found one text, {prompts[:40]!r}; expected a list of prompts")
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.model; put it there or give tokenizer_path")
        if "" in prompts:
            raise ValueError(f"prompt {prompts.index('')} is empty; expected a text")
        stop = [stop] if isinstance(stop, str) else stop
        expect(all(stop), "stop", stop, "texts of at least one character")
        tokens = [self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else
                  self.tokenizer.encode_dialog(prompt) for prompt in prompts]
        decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
        held, ended = [""] * len(prompts), [False] * len(prompts)
        steps = self.steps(tokens, max_gen_len, **settings)
        for _, newest in itertools.chain(steps, [(None, [None] * len(prompts))]):
            pieces = [""] * len(prompts)
            for i, token in enumerate(newest):
                if not ended[i]:
                    ended[i] = token is None
                    new = b"" if ended[i] else self.tokenizer.decode_bytes([token])
                    text = held[i] + decoders[i].decode(new, final=ended[i])
                    pieces[i], held[i], stopped = split_at_stop(text, stop, ended[i])
                    ended[i] |= stopped
            yield pieces
            if all(ended):
                return

    def text_completion(self, prompts, max_gen_len=256, echo=False, **settings):
        """[{"generation": text}] for each prompt, with echo after its own; settings: as in stream_text."""
        rows = zip(*self.stream_text(prompts, max_gen_len, **settings), strict=True)
        return [{"generation": (prompt if echo else "") + "".join(pieces)}
                for prompt, pieces in zip(prompts, rows, strict=True)]

    def chat_completion(self, dialogs, max_gen_len=256, **settings):
        """[{"generation": {"role": "assistant", "content": text}}]: the message that follows each dialog.

        dialogs: lists of {"role": "system", "user" or "assistant", "content": text}. settings: as in
        stream_text.
        """
        rows = zip(*self.stream_text(dialogs, max_gen_len, **settings), strict=True)
        return [{"generation": {"role": "assistant", "content": "".join(pieces)}} for pieces in rows]

# -----------------------------------------------------------------------------
# Data loader


class DistributedShardedDataLoader:
    """Batches of windows from .bin shards, each window once an epoch over all ranks together.

    A shard of n tokens has (n-1)//T windows; all shards' windows, in file-name order, are numbered 0 … W-1.
    Row b of rank r at call s gets number ((s*N + r)*B + b) mod W, taken through a permutation of that epoch
    with shuffle. The state is that counter alone, so it resumes on any number of ranks.
    """

    def __init__(self, filename_pattern, B, T, process_rank, num_processes, shuffle=False, seed=0):
        if B < 1 or T < 1 or not 0 <= process_rank < num_processes:
            raise ValueError(f"B is {B}, T {T}, rank {process_rank} of {num_processes}; expected B and T of "
                             "at least 1, and a rank below the number of processes")
        self.filename_pattern, self.B, self.T, self.shuffle = filename_pattern, B, T, shuffle
        self.rank, self.num_processes = process_rank, num_processes
        self.files = sorted(glob.glob(str(filename_pattern)))
        if not self.files:
            raise FileNotFoundError(f"no file matches {filename_pattern}; tokenize first, or correct the "
                                    "pattern")
        headers = [read_header(path) for path in self.files]
        self.versions = [header.version for header in headers]
        self.ntok_total = sum(header.num_tokens for header in headers)
        windows = [max(header.num_tokens - 1, 0) // T for header in headers]
        self.first_windows = np.cumsum([0, *windows], dtype=np.int64)  # of each shard, then W
        self.num_windows = int(self.first_windows[-1])
        if self.num_windows == 0:
            raise ValueError(f"{filename_pattern}: {self.ntok_total} tokens in {len(headers)} files hold no "
                             f"window; expected a shard of at least T + 1 = {T + 1} tokens")
        self.permutation = functools.lru_cache(maxsize=2)(  # two: a batch may straddle the end of an epoch
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.num_windows))
        self.reset()

    def reset(self):
        self.counter = 0

    def state_dict(self):
        return {"counter": self.counter}

    def load_state_dict(self, state):
        self.counter = state["counter"]

    def window(self, number):
        """x, y of a window, int64 (T,); read, as a memory map of a file that shrinks is fatal."""
        shard = int(np.searchsorted(self.first_windows, number, side="right")) - 1
        start = (number - int(self.first_windows[shard])) * self.T
        path, length = self.files[shard], self.T + 1
        tokens = read_tokens(path, start, length)
        if len(tokens) != length:
            raise ValueError(f"{path}: {len(tokens)} tokens from token {start} on, expected {length}: "
                             "the file has shrunk since it was opened")
        tokens = tokens.astype(np.int64)
        if self.versions[shard] == VERSION:
            return tokens[:-1], tokens[1:]
        ids = tokens % MASKED
        return ids[:-1], np.where(tokens < MASKED, ids, -100)[1:]

    def next_batch(self):
        """x, y: int64 (B, T); y is x one token later, -100 where that is no target."""
        first = self.counter + self.rank * self.B
        self.counter += self.num_processes * self.B
        rows = []
        for number in range(first, first + self.B):
            epoch, index = divmod(number, self.num_windows)
            rows.append(self.window(int(self.permutation(epoch)[index]) if self.shuffle else index))
        return tuple(torch.from_numpy(np.stack(windows)) for windows in zip(*rows, strict=True))

# -----------------------------------------------------------------------------
# Distributed


def join_process_group(device, needed=False):
    """(rank, world_size, device) of this process, in torchrun's group; without torchrun it is alone.

    A process that is alone joins a group only where needed. ValueError where there is no torchrun then.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if needed and "RANK" not in os.environ:
        raise ValueError("--fsdp spreads a model over processes; start them with torchrun")
    if (world_size > 1 or needed) and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def sum_over_ranks(values, device):
    """The sum over all ranks of each of a list of numbers, as floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def shard_parameters(model, device, dtype):
    """Spreads weights, gradients and optimizer over the ranks, which gather one block at a time (FSDP2).

    dtype: in which they gather and compute; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, as sampling need not wait for it
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "forward_cached")


# -----------------------------------------------------------------------------
# Training


def learning_rate_at(step, steps, lr, min_lr, warmup_steps):
    """The rate of one step of 1 … steps: linear warm-up to lr, then a cosine down to min_lr."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def next_batch(loader, vocab_size, device):
    """The loader's next inputs and targets on a device; ValueError for an id outside the vocabulary."""
    inputs, targets = loader.next_batch()
    if (largest := max(int(inputs.max()), int(targets.max()))) >= vocab_size:
        raise ValueError(f"{loader.filename_pattern} holds token {largest}, the vocabulary ends at "
                         f"{vocab_size - 1}; tokenize with the tokenizer.model of this training")
    return inputs.to(device), targets.to(device)


@torch.no_grad()
def evaluate(model, loader, steps, bos_id, byte_lengths, autocast):
    """(nats per counted target, bits per UTF-8 byte) over the first batches of every rank, no window twice.

    byte_lengths: (V,) the UTF-8 bytes of each id, 0 for special tokens.
    """
    nats = count = num_bytes = 0
    loader.reset()
    for _ in range(steps):
        first = loader.counter + loader.rank * loader.B
        inputs, targets = next_batch(loader, len(byte_lengths), byte_lengths.device)
        targets[max(0, loader.num_windows - first):] = -100  # where the numbers have come round
        kept = counted(targets, bos_id)
        n = int(kept.sum())
        with autocast:
            nats += float(model(inputs, targets, bos_id)) * n
        count += n
        num_bytes += int(byte_lengths[targets[kept]].sum())
    nats, count, num_bytes = sum_over_ranks([nats, count, num_bytes], byte_lengths.device)
    return nats / max(count, 1), nats / math.log(2) / max(num_bytes, 1)


def training_source(saved, ckpt_dir, preset, tokenizer_path):
    """(tokenizer, ModelArgs, name -> pieces) of what training begins with; the last is None from scratch.

    saved: the run's newest checkpoint, or None. ValueError where nothing is given, or another architecture
    than the run has.
    """
    source = saved or ckpt_dir
    if ckpt_dir is not None and preset is not None:
        raise ValueError("found --ckpt_dir and --preset; expected one of them")
    if source is None and (preset is None or tokenizer_path is None):
        raise ValueError("found neither --ckpt_dir, to finetune, nor both --preset and --tokenizer_path, to "
                         "train from scratch")
    expect(preset in (None, *PRESETS), "preset", preset, f"one of {', '.join(PRESETS)}")
    tokenizer = Tokenizer(tokenizer_path or Path(source, "tokenizer.model"))
    asked = ModelArgs(**PRESETS[preset], vocab_size=tokenizer.n_words) if preset else None
    args, pieces = open_checkpoint(source) if source else (asked, None)
    if saved and ckpt_dir:
        asked = ModelArgs.from_json(Path(ckpt_dir, "params.json"))
    for field in dataclasses.fields(args) if asked else ():
        found, expected = getattr(args, field.name), getattr(asked, field.name)
        if found != expected and field.name not in ("max_seq_len", "tie_word_embeddings"):
            raise ValueError(f"{source} has {field.name} {found}, but {expected} is asked for; resume "
                             "without --preset and --ckpt_dir, or give another --out_dir")
    check_vocabulary(tokenizer, args)
    return tokenizer, args, pieces


def training_model(args, pieces, seed, device, dtype, fsdp):
    """The model with float32 weights, of a checkpoint's pieces or drawn with a seed; with fsdp in shards."""
    with torch.device("meta"):
        model = Transformer(args)
    num_bytes = 16 * sum(p.numel() for p in model.parameters()) / (dist.get_world_size() if fsdp else 1)
    if device.type == "cpu":  # which the processes of a machine share
        num_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_memory("weights, gradients and AdamW's averages", num_bytes, device)
    if fsdp:
        shard_parameters(model, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = ((name, model.init_weight(name, torch.empty(p.shape, device=device), generator))
             for name, p in model.named_parameters())
    load_weights(model, checkpoint_tensors(args, pieces) if pieces else drawn, device, torch.float32)
    return model


def check_training_flags(flags):
    """ValueError names a flag that is out of range."""
    least = dict(batch_size=1, seq_len=1, total_batch_tokens=1, steps=1, epochs=1, lr=0, min_lr=0,
                 warmup_steps=0, weight_decay=0, grad_clip=0, eval_interval=1, eval_steps=0,
                 sample_interval=0, save_interval=0, keep=1)
    for name, minimum in least.items():
        expect(flags[name] is None or minimum <= flags[name] < math.inf, name, flags[name],
               f"at least {minimum}")
    expect(0 <= flags["seed"] < 2**63, "seed", flags["seed"], "0 to 2**63 - 1")
    expect(all(0 <= beta < 1 for beta in flags["betas"]), "betas", flags["betas"],
           "two numbers from 0 to below 1")
    expect(not Path(flags["out_dir"]).is_file(), "out_dir", flags["out_dir"], "a folder, not a file")
    expect(choose_dtype(flags["dtype"]) in (torch.float32, torch.bfloat16), "dtype", flags["dtype"],
           "float32 or bfloat16, as float16 underflows in training")


def training_loaders(train_data, val_data, *settings, shuffle, seed, tokenizer):
    """The loaders of both splits, which share no file and hold a tokenizer's tokens.

    settings: B, T, rank and number of processes. Without a manifest only the first batches are looked at.
    """
    loader = DistributedShardedDataLoader(train_data, *settings, shuffle, seed)
    val_loader = DistributedShardedDataLoader(val_data, *settings)
    check_manifests(loader.files + val_loader.files, tokenizer.model_path)
    for each in (loader, val_loader):
        next_batch(each, tokenizer.n_words, "cpu")
        each.reset()
    if shared := set(map(os.path.realpath, loader.files)) & set(map(os.path.realpath, val_loader.files)):
        raise ValueError(f"{min(shared)} is in both train_data and val_data; expected different files")
    return loader, val_loader


def train(*, train_data: str = "tinystories/TinyStories_train*.bin",
          val_data: str = "tinystories/TinyStories_val.bin", out_dir: str = "out/train",
          preset: str | None = None, ckpt_dir: str | None = None, tokenizer_path: str | None = None,
          batch_size: int = 4, seq_len: int = 1024, total_batch_tokens: int | None = None,
          steps: int | None = None, epochs: int = 1, lr: float = 1e-5, min_lr: float | None = None,
          warmup_steps: int = 10, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
          grad_clip: float = 1.0, eval_interval: int = 100, eval_steps: int = 20, sample_interval: int = 0,
          save_interval: int = 1000, keep: int = 2, seed: int = 1337, resume: bool = False,
          shuffle: bool = False, doc_mask: bool = True, activation_checkpointing: bool = False,
          fsdp: bool = False, device: str | None = None, dtype: str = "bfloat16", compile: bool = False):
    """Trains from scratch (--preset) or finetunes (--ckpt_dir) on token files, alone or under torchrun.

    train_data, val_data: patterns of .bin shards. out_dir: takes log.jsonl, loss.png and the checkpoints.
    tokenizer_path: sets the vocabulary from scratch; else the checkpoint's own tokenizer.model serves.
    batch_size: windows of seq_len tokens that a process computes at once. total_batch_tokens: those of a
    step, over all processes and accumulated micro-batches; None: one micro-batch. steps: the total; None: as
    many as the epochs take. min_lr: where the cosine ends; None: a tenth of lr. grad_clip: the largest norm,
    0 for any. eval_steps: batches of an evaluation, 0 for all. sample_interval, save_interval: in steps, 0
    for never; the last step is always saved, and one that SIGTERM or Ctrl-C ends. keep: how many checkpoints
    stay. resume: go on from out_dir's newest, if there is one. doc_mask: documents don't see each other.
    activation_checkpointing: computes each block twice and keeps less. fsdp: the processes share out weights
    and optimizer, else each has all. dtype: of the computation; weights, optimizer and sums are float32.
    compile: the blocks, with torch.compile.
    """
    check_training_flags(locals())
    dtype, out_dir = choose_dtype(dtype), Path(out_dir)
    rank, world_size, device = join_process_group(device, needed=fsdp)
    is_master = rank == 0
    saved = checkpoints_of_run(out_dir)
    if not resume and (saved or (out_dir / "log.jsonl").exists()):
        raise ValueError(f"{out_dir} holds a run; --resume goes on with it, another --out_dir starts anew")
    tokenizer, args, pieces = training_source(saved[-1] if saved else None, ckpt_dir, preset, tokenizer_path)
    args.max_seq_len = max(args.max_seq_len, seq_len)

    loader, val_loader = training_loaders(train_data, val_data, batch_size, seq_len, rank, world_size,
                                          shuffle=shuffle, seed=seed, tokenizer=tokenizer)
    micro_batch_tokens = batch_size * seq_len * world_size
    total_batch_tokens = total_batch_tokens or micro_batch_tokens
    expect(total_batch_tokens % micro_batch_tokens == 0, "total_batch_tokens", total_batch_tokens,
           f"a multiple of batch_size * seq_len * processes = {micro_batch_tokens}")
    steps = steps or max(1, epochs * loader.num_windows * seq_len // total_batch_tokens)
    val_batches = math.ceil(val_loader.num_windows / (batch_size * world_size))
    eval_steps = min(eval_steps or val_batches, val_batches)

    model = training_model(args, pieces, seed, device, dtype, fsdp)
    model.activation_checkpointing = activation_checkpointing
    num_parameters = sum(p.numel() for p in model.parameters())
    check_disk("a checkpoint", 12 * num_parameters, out_dir)  # weights and AdamW's two averages
    optimizer = model.configure_optimizers(lr, weight_decay, betas)
    order = dict(seq_len=seq_len, shuffle=shuffle, seed=seed)  # of the windows, which resuming has to keep
    progress = dict(step=0)
    if saved:
        progress = load_file(saved[-1] / "progress.pt")
        if progress["order"] != order or progress["step"] > steps:
            raise ValueError(f"{saved[-1]} has step {progress['step']} and {progress['order']}; found steps "
                             f"{steps} and {order}: resume with the same, and no fewer steps")
        load_optimizer(saved[-1] / "optimizer", model, optimizer)
        loader.load_state_dict(progress["loader"])
    if compile and can_compile(device):
        for layer in model.layers:  # one block, compiled once, serves all layers
            layer.compile()
    wrapped = (DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 and not fsdp
               else model)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not fsdp)

    bos_id = tokenizer.bos_id if doc_mask else None
    byte_lengths = torch.tensor(tokenizer.byte_lengths, device=device)
    floor = entropy_floor(Path(val_loader.files[0]).parent)
    peak = measured_peak(device, dtype) * world_size
    min_lr = lr / 10 if min_lr is None else min_lr
    last_line = prepare_folder(out_dir, progress["step"], tokenizer.model_path) if is_master else 0
    [last_line] = sum_over_ranks([last_line], device)
    # killed between saving a step and writing its line, a run goes on with that line
    first = progress["step"] + (last_line == progress["step"])
    if is_master:
        print(f"{num_parameters:,} parameters on {world_size} x {device} in {dtype}, {steps:,} steps of "
              f"{total_batch_tokens:,} tokens out of {loader.ntok_total:,}")

    bar = tqdm(range(first, steps + 1), initial=first - 1, total=steps, unit="step",
               disable=None if is_master else True)  # None: where there is no terminal
    interrupted = False
    with noted_signals() as signals:
        for step in bar:
            if step > progress["step"]:
                start, first_window = time.perf_counter(), loader.counter
                rate = learning_rate_at(step, steps, lr, min_lr, warmup_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batches = [next_batch(loader, tokenizer.n_words, device)
                           for _ in range(total_batch_tokens // micro_batch_tokens)]
                counts = [int(counted(targets, bos_id).sum()) for _, targets in batches]
                [total] = sum_over_ranks([sum(counts)], device)
                nats = torch.zeros((), device=device)
                for i, ((inputs, targets), count) in enumerate(zip(batches, counts, strict=True), start=1):
                    wrapped.require_backward_grad_sync = i == len(batches)  # of DDP, which so sends once
                    with autocast:
                        loss = wrapped(inputs, targets, bos_id) * (count / max(total, 1))
                    (loss * world_size).backward()  # DDP and FSDP average over ranks; the loss is a sum
                    nats += loss.detach()
                loss, interrupted = sum_over_ranks([nats, len(signals)], device)
                grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
                grad_norm = float(grad_norm.full_tensor() if fsdp else grad_norm)
                if not math.isfinite(loss + grad_norm):
                    raise ValueError(f"step {step} (windows {first_window} to {loader.counter - 1}) has "
                                     f"loss {loss} and gradient norm {grad_norm}, expected finite ones; "
                                     f"{out_dir} keeps what was saved before. Try a lower lr than {lr}")
                optimizer.step()
                optimizer.zero_grad()
                tokens_per_s = total_batch_tokens / (time.perf_counter() - start)
                progress = dict(step=step, order=order, loader=loader.state_dict(), record=dict(
                    step=step, loss=loss, lr=rate, grad_norm=grad_norm, tokens_per_s=round(tokens_per_s),
                    mfu=model.flops_per_token(seq_len) * tokens_per_s / peak, memory=used_memory(device)))
                if step == steps or interrupted or save_interval and step % save_interval == 0:
                    save_training(out_dir / f"step_{step:06d}", model, optimizer,
                                  out_dir / "tokenizer.model", progress)
                    if is_master:
                        drop_checkpoints(out_dir, keep)
                if interrupted:
                    break
            record = progress["record"]
            if step == steps or step % eval_interval == 0:
                record["val_loss"], record["val_bpb"] = evaluate(wrapped, val_loader, eval_steps, bos_id,
                                                                 byte_lengths, autocast)
            if is_master:
                report(record, out_dir, bar, floor, (steps - step) * total_batch_tokens)
            if sample_interval and step % sample_interval == 0 and (is_master or fsdp):  # all hold a shard
                llama = Llama(model, tokenizer, max_seq_len=256)
                for completion in llama.text_completion(PROMPTS, 100, echo=True):
                    if is_master:
                        bar.write(completion["generation"] + "\n")
    bar.close()
    if is_master and interrupted:
        print(f"{signals[0] if signals else 'a signal'} after step {step}, which is saved; --resume goes on")
    elif is_master:
        plot_losses(out_dir, floor)
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.1)  # gloo's threads need Python's lock to let go of tensors, else destroying can hang
        dist.destroy_process_group()

# -----------------------------------------------------------------------------
# Command line


def sample(*, ckpt_dir: str | None = None, tokenizer_path: str | None = None, prompt: str | None = None,
           prompt_file: str | None = None, max_gen_len: int = 256, temperature: float = 0.6,
           top_p: float = 0.9, top_k: int = 0, min_p: float = 0.0, stop: str | None = None, seed: int = 1337,
           device: str | None = None, dtype: str | None = None, compile: bool = False,
           quantize: str | None = None):
    """Prints completions of a prompt, of every line of a prompt_file, or of four default prompts.

    ckpt_dir None: the checkpoint last written under out/. Several prompts are one batch, of which the first
    streams as its tokens come and the others follow at the end. stop: a text before which to end. compile:
    faster after some seconds. quantize: int8 halves bfloat16's memory. The speed goes to standard error.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("found --prompt and --prompt_file; expected one of them")
    prompts = PROMPTS if prompt is None else [prompt]
    if prompt_file is not None:
        try:
            prompts = Path(prompt_file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompt_file}: expected UTF-8, a prompt per line ({error})") from None
    llama = Llama.build(newest_checkpoint() if ckpt_dir is None else ckpt_dir, tokenizer_path,
                        max_batch_size=len(prompts), device=device, dtype=dtype, compile=compile,
                        quantize=quantize)
    later = [["\n", prompt] for prompt in prompts[1:]]
    pieces = llama.stream_text(prompts, max_gen_len, stop=[] if stop is None else stop, top_p=top_p,
                               temperature=temperature, top_k=top_k, min_p=min_p, seed=seed)
    for i, (first, *others) in enumerate(pieces):
        print(first if i else prompts[0] + first, end="", flush=True)
        for text, piece in zip(later, others, strict=True):
            text.append(piece)
    print()
    for text in later:
        print("".join(text))
    sys.stdout.flush()
    print(llama.speed(), file=sys.stderr)


def demo(*, out_dir: str = "out/demo", retrain: bool = False):
    """Writes a corpus of little stories, trains a small Llama 3 on it and prints four stories, in 3 minutes.

    Where out_dir holds a finished demo, its model is only sampled from; retrain makes the demo anew.
    """
    import stories  # here, as these serve the demo alone
    import tiny_stories
    out_dir = Path(out_dir).resolve()
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "data" / "entropy.json").exists():
        raise ValueError(f"{out_dir} holds no demo but other files; give another --out_dir")
    if retrain or not checkpoints_of_run(out_dir):
        old = out_dir.with_name(f"{out_dir.name}.old.part")
        part = out_dir.with_name(f"{out_dir.name}.part")  # an earlier demo stays until this one is done
        shutil.rmtree(part, ignore_errors=True)
        data = part / "data"
        stories.write(data)
        shards = tiny_stories.find_shards(data / tiny_stories.SHARDS)
        texts = (story for shard in shards[1:] for story in tiny_stories.read_stories(shard))
        train_tokenizer(texts, 2048, data / "tokenizer.model")  # enough for a token per word
        tiny_stories.tokenize(data, data / "tokenizer.model", num_workers=1)  # 1 s, workers start slower
        fast_bfloat16 = choose_device().type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
        bins = glob.escape(str(data))
        train(train_data=f"{bins}/TinyStories_train*.bin", val_data=f"{bins}/TinyStories_val.bin",
              out_dir=part, preset="demo", tokenizer_path=data / "tokenizer.model", batch_size=6,
              seq_len=256, steps=1200, lr=3e-3, min_lr=0.0, warmup_steps=30, eval_interval=300,
              eval_steps=0, save_interval=0, shuffle=True, dtype="bfloat16" if fast_bfloat16 else "float32")
        shutil.rmtree(old, ignore_errors=True)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(part, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    sample(ckpt_dir=checkpoints_of_run(out_dir)[-1])


def main():
    """The command line; without a subcommand, torchrun trains and python samples."""
    cli.run({"sample": sample, "train": train, "demo": demo},
            default="train" if "TORCHELASTIC_RUN_ID" in os.environ else "sample")


if __name__ == "__main__":
    main()
