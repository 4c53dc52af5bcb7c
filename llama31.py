"""Llama 3 in one file: the model and its KV cache, sampling, the data loader and the training loop.

    python llama31.py demo                                        # corpus, training, stories; a few minutes
    python llama31.py --ckpt_dir DIR --prompt "Once upon a time"  # sample from a checkpoint directory
    torchrun --nproc_per_node 8 llama31.py --ckpt_dir DIR         # finetune it

Read it downwards, as every part uses only what stands above it:

    Configuration                          ModelArgs and the published shapes
    Normalization, positions, KV cache     RMSNorm, RoPE, KVCache
    Attention, documents, Transformer      Attention, FeedForward, TransformerBlock, the model and its loss
    Loading, sampling, generation          load_checkpoint, Sampler, Llama
    Data loader, training, commands        DistributedShardedDataLoader, optimize, train, sample, demo

This file says what is computed. The folder plumbing/ says how it is made fast, how files look and how a run
is kept; delete plumbing/fast.cpp, and only speed is lost.

Sizes: B batch, T new tokens, S cached and new ones, H query and K key/value heads, D head_dim, V vocabulary.
"""

import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from plumbing import answers, attention, checkpoint, cli, devices, fast, files, huggingface, lora, parallel
from plumbing.checkpoint import checkpoints_of_run, newest_checkpoint, save_checkpoint  # noqa: F401
from plumbing.cli import expect, expect_at_least
from plumbing.config_json import read_config
from plumbing.decoding import StaticReader
from plumbing.dialogs import NoTargetError, pack_dialogs, remark_on
from plumbing.mapped import pop_pieces, stored_dtype, whole_tensors
from plumbing.muon import Muon
from plumbing.narrow import load_int8, widen
from plumbing.params import expect_types, fit_context, read_params
from plumbing.prompts import PROMPTS
from plumbing.resume import locked, resumable
from plumbing.rounding import RoundingAdamW
from plumbing.run import Run, entropy_floor
from plumbing.sampling import NOT_FINITE, candidates, check_prompts, penalized, unread
from plumbing.start import check_flags, check_shape, check_source, default_lr, fill_model, validation_pattern
from plumbing.streams import only_first_prints
from plumbing.tensor_parallel import processes_that_split, split_model
from tokenizer import TextStream, Tokenizer, find_tokenizer, open_tokenizer, train_tokenizer

# -----------------------------------------------------------------------------
# Configuration


@dataclass
class ModelArgs:
    """The shape of a Llama 3, with the field names of Meta's params.json.

    ValueError names a field that is out of range or doesn't fit the others, and from_json an unknown one.
    """
    dim: int = 4096  # width of the residual stream, which every block reads and adds to
    n_layers: int = 32  # blocks, one after the other
    n_heads: int = 32  # query heads
    n_kv_heads: int | None = None  # key/value heads, fewer so that the cache is smaller; None: n_heads
    head_dim: int | None = None  # elements of each head; None: dim / n_heads
    vocab_size: int = 128256  # token ids; 128,000 byte sequences and 256 special tokens in Meta's vocabulary
    multiple_of: int = 256  # the SwiGLU hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None  # widens the SwiGLU hidden size beyond 8/3 dim; None: 8/3 dim
    norm_eps: float = 1e-5  # keeps RMSNorm from dividing by zero
    rope_theta: float = 500000.0  # RoPE's slowest pairs turn once in about 2 pi rope_theta positions
    use_scaled_rope: bool = False  # Llama 3.1's stretch of the context from 8,192 to 131,072 tokens
    rope_scale_factor: float = 8.0  # how much that stretch slows the slow pairs; 32 for Llama 3.2 1B and 3B
    rope_low_freq_factor: float = 1.0  # turns in the old context up to which a pair is slowed in full
    rope_high_freq_factor: float = 4.0  # turns from which on a pair stays as it is
    rope_old_context: int = 8192  # tokens that were trained before the stretch
    tie_word_embeddings: bool = False  # one matrix serves as embedding and as output
    max_seq_len: int = 2048  # prompt and generated tokens together, unless Llama.build is told otherwise

    def __post_init__(self):
        expect_types(self)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        expect(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads,
               f"a divisor of n_heads, here {self.n_heads}")
        if self.head_dim is None:
            expect(self.dim % self.n_heads == 0, "dim", self.dim, f"a multiple of n_heads {self.n_heads}")
            self.head_dim = self.dim // self.n_heads
        expect(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, as RoPE turns pairs")
        expect(self.rope_low_freq_factor < self.rope_high_freq_factor, "rope_high_freq_factor",
               self.rope_high_freq_factor, f"more than rope_low_freq_factor {self.rope_low_freq_factor}")

    @property
    def hidden_dim(self) -> int:
        """The SwiGLU hidden size by Meta's rule: 2/3 of 4 dim, times the multiplier, rounded up.

        The factor 2/3 keeps the number of weights, as SwiGLU has three matrices, the classic layer two.
        """
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "ModelArgs":
        """Reads params.json and, for the fields that Meta's doesn't have, llama31.json beside it.

        FileNotFoundError or ValueError names the file and the field at fault.
        """
        args, fields = read_params(path, cls)
        if "max_seq_len" not in fields:  # Meta publishes none; Llama 3's is the shorter one.
            args.max_seq_len = 131072 if args.use_scaled_rope else 8192
        # Llama 3.2's params.json says that RoPE is scaled, not by how much; by its shape we know it is 32.
        shape = args.dim, args.n_layers, args.n_heads, args.n_kv_heads
        is_llama_32 = shape in ((2048, 16, 32, 8), (3072, 28, 24, 8))
        if args.use_scaled_rope and is_llama_32 and "rope_scale_factor" not in fields:
            args.rope_scale_factor = 32.0
            print(f"{path}: the shape of Llama 3.2, so rope_scale_factor is 32", file=sys.stderr)
        return args


PRESETS: dict[str, dict[str, Any]] = {  # the demo's shape, then Meta's published ones
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
    """x / rms(x) * weight (Zhang and Sennrich, 2019): LayerNorm without its mean and its bias."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        h = x.float()  # A sum of thousands of squares in bfloat16 would keep three digits.
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)  # rows of mean square 1
        return h.type_as(x) * self.weight  # Each element has a learned scale.

# -----------------------------------------------------------------------------
# Rotary position embedding


def rope_frequencies(args):
    """(D/2,) float32: radians per position of each pair of a head's elements (Su et al., 2021).

    Queries and keys are turned by their position times these, so that their product depends on how far apart
    they are: fast pairs tell neighbours apart, slow ones paragraphs. use_scaled_rope stretches the context
    as Llama 3.1 does: pairs that turn often within the old one stay, slow ones are slowed, others blended.
    """
    with torch.device("cpu"):  # They are computed even while the model is laid out on the meta device.
        freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    if not args.use_scaled_rope:
        return freqs
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    turns = args.rope_old_context / (2 * math.pi / freqs)  # how often each pair turns within the old context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast and as it was; 0: slow, and slowed in full
    return (1 - kept) * freqs / args.rope_scale_factor + kept * freqs


def apply_rope(x, cos, sin):
    """Turns each interleaved pair of x (B, T, heads, D) by its angle; cos and sin: (B or 1, T, 1, D/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, D/2) each
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)  # (B, T, heads, D/2, 2)
    return turned.flatten(-2).type_as(x)

# -----------------------------------------------------------------------------
# Key/value cache


class KVCache:
    """One layer's keys and values of all tokens so far, (B, max_seq_len, K, D) each.

    A token's key and value depend only on the tokens up to it, so they never change. Because they are kept,
    a new token is computed alone, not the whole text again. Rows may have different lengths.
    """

    def __init__(self, args, batch_size, max_seq_len, dtype=None, device=None, tensor_parallel=1):
        K = args.n_kv_heads // tensor_parallel  # Processes that split a model share out its heads.
        shape = (batch_size, max_seq_len, K, args.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def seek(self, positions, columns):
        """Says where the next update writes: at positions (B, T). columns (S,): as many as it returns."""
        self.positions = positions
        self.columns = columns  # Only its length counts; a number would be compiled into the blocks.

    def update(self, k, v):
        """Writes k and v (B, T, K, D) where seek said; returns the first S columns, (B, S, K, D) each."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1), each with positions of its own
        # While FSDP trains it computes in bfloat16, and the cache has the weights' float32: hence the casts.
        self.k[rows, self.positions] = k.to(self.k.dtype)
        self.v[rows, self.positions] = v.to(self.v.dtype)
        S = self.columns.size(0)  # Columns past the longest row are left out.
        return self.k[:, :S].to(k.dtype), self.v[:, :S].to(v.dtype)

# -----------------------------------------------------------------------------
# Attention, feed-forward, block


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads (Ainslie et al., 2023)."""

    def __init__(self, args):
        super().__init__()
        self.head_dim = args.head_dim
        self.is_grouped = args.n_heads != args.n_kv_heads  # enable_gqa slows some kernels even where H = K.
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)  # mixes the heads

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B, T, dim) -> the same shape.

        mask: (B, 1, T, S), True where attended, or one of plumbing/attention.py's. None: plain causal
        attention, or a single new token, which may see everything before it. cache: a KVCache, which takes
        the new keys and values and returns them behind those of earlier tokens.
        """
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        q = apply_rope(q, cos, sin)  # Only queries and keys are turned: values carry no position.
        k = apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, S, K, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # heads before positions, as the kernels want it
        if attention.has_kernel(mask):
            y = attention.attend(q, k, v, mask, self.is_grouped)
        else:
            # is_causal aligns its triangle with the first key: right only where all keys are new, T = S.
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.is_grouped,
                                               is_causal=q.size(2) > 1 and mask is None)
        return self.wo(y.transpose(1, 2).flatten(-2))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w1 makes gates, through SiLU, for what w3 makes; w2 brings it back to dim."""

    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)  # down
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # up

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, dim) -> (B, T, hidden_dim) -> (B, T, dim)


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layer, each on a normalized copy and added back to the stream."""

    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):
        # The stream x is only ever added to, so that gradients reach the first block undamped.
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))

# -----------------------------------------------------------------------------
# Documents: several of them are packed into one row of a training batch


def document_mask(starts):
    """The attention mask that keeps documents from seeing each other.

    starts (B, T), True where a document begins -> a BlockMask for flex attention on cuda; elsewhere, where
    flex attention can't train, (B, 1, T, T), True where attended, or None if each row is one document, as
    causal attention is enough then.
    """
    document = starts.cumsum(1)  # (B, T), the number of each token's document in its row
    if starts.is_cuda:  # The check below would make the CPU wait for the GPU.
        return attention.document_block_mask(document)
    if (document == document[:, :1]).all():
        return None
    same_document = document[:, :, None] == document[:, None, :]  # (B, T, T)
    return same_document.tril()[:, None]  # (B, 1, T, T); tril: nothing sees what comes after it

# -----------------------------------------------------------------------------
# Transformer


class Transformer(nn.Module):
    """The whole model; its state dict has Meta's checkpoint keys."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        empty = torch.empty(args.vocab_size, args.dim)  # nn.Embedding would take 1 s to draw it on meta
        self.tok_embeddings = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)  # brings the stream, which has grown, to one scale
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)  # a score for every token
        self.tie()
        # Not a buffer: .to(torch.bfloat16) would round it, and angles at late positions would be far off.
        self.rope_frequencies = rope_frequencies(args)
        self.activation_checkpointing = False  # True: training keeps only the inputs of its blocks
        self.compiled_attention = False  # True: training's attention is plumbing/attention.cpp's
        self.tensor_parallel = 1  # how many processes split its heads, see load_checkpoint
        self.compute_dtype = None  # type of products where weights have fewer bits; None: the weights' own
        if not self.output.weight.is_meta:
            self.init_weights()

    @classmethod
    def on_meta(cls, args: ModelArgs) -> "Transformer":
        """The model with shapes but without memory, for weights that are loaded or drawn afterwards."""
        with torch.device("meta"):
            return cls(args)

    def tie(self):
        """Gives embedding and output one storage where the configuration says so."""
        if self.args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self, generator=None):
        for name, p in self.named_parameters():
            self.init_weight(name, p, generator)

    @torch.no_grad()
    def init_weight(self, name, p, generator=None):
        """Draws the parameter of that name, or a stand-in of its shape, in place; returns it.

        Embedding and output: normal with std 1/sqrt(dim), so that a row has length 1. The layers' matrices:
        half of that, which at GPT-2's width is about its 0.02; those that write to the residual stream are
        further divided by sqrt(2 n_layers), because 2 n_layers of them add up there.
        """
        std = self.args.dim ** -0.5
        if p.dim() == 1:
            return p.fill_(1)  # A norm's scale changes nothing at first.
        if name.startswith(("tok_embeddings", "output")):
            return p.normal_(std=std, generator=generator)
        shrink = math.sqrt(2 * self.args.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 1
        return p.normal_(std=std / 2 / shrink, generator=generator)

    @property
    def dtype(self):
        """The type of hidden states and caches."""
        return self.compute_dtype or self.tok_embeddings.weight.dtype

    @property
    def device(self):
        return self.norm.weight.device

    def angles(self, positions):
        """cos and sin (B or 1, T, 1, D/2) of RoPE's angles at positions (B or 1, T)."""
        # Positions are multiplied as float32: bfloat16 can't tell 257 from 258.
        angles = positions[..., None, None].float() * self.rope_frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def trunk(self, tokens, positions, mask=None, caches=None):
        """tokens (B, T) at positions (B or 1, T) -> normalized hidden states (B, T, dim)."""
        cos, sin = self.angles(positions)
        x = self.tok_embeddings(tokens)  # (B, T, dim)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator's state to preserve.
                x = recompute(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, bos_id: int | None = None,
                starts: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) float32, plain causal; with targets: forward_loss.

        The loss goes through forward, too, as the hooks of DDP and FSDP run only there.
        """
        if targets is not None:
            return self.forward_loss(tokens, targets, bos_id, starts, reduction=reduction)
        positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        return self.output(self.trunk(tokens, positions)).float()  # bfloat16 has too few digits for a loss.

    def forward_loss(self, inputs: Tensor, targets: Tensor, bos_id: int | None = None,
                     starts: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats, float32, of the targets (B, T) that count; 0 if none does.

        A target of -100 doesn't count. Documents don't see each other where they begin at the token bos_id,
        or where starts (B, T), bool, is true; nothing foretells a document's first token, so predicting it
        doesn't count. reduction: "mean", or "sum" for whoever divides by the targets of several batches.
        """
        if bos_id is not None:
            starts = inputs == bos_id
            targets = targets.masked_fill(targets == bos_id, -100)
        if self.compiled_attention:
            mask = attention.first_seen(inputs, starts)
        else:
            mask = None if starts is None else document_mask(starts)
        if starts is not None:
            is_first = F.pad(starts[:, 1:], (0, 1))  # starts ends one token before the targets do.
            targets = targets.masked_fill(is_first, -100)
        positions = torch.arange(inputs.size(1), device=inputs.device)[None]
        x = self.trunk(inputs, positions, mask)
        # The same as F.cross_entropy(self.output(x).flatten(0, 1), targets.flatten(), reduction="sum"), but
        # the logits, by far the largest tensor here, never exist all at once.
        nats = fast.chunked_cross_entropy(x.flatten(0, 1), self.output.weight, targets.flatten(),
                                          fast.product_dtype(x))
        return nats if reduction == "sum" else nats / (targets != -100).sum().clamp(min=1)

    def extend(self, tokens, start_pos, caches):
        """Extends the caches by tokens (B, T), row b from position start_pos[b]: (B, T, dim), normalized."""
        T = tokens.size(1)
        S = max(start_pos) + T
        columns = torch.arange(S, device=tokens.device)
        positions = torch.tensor(start_pos, device=tokens.device)[:, None] + columns[:T]  # (B, T)
        # Without a mask the kernels are faster. A fresh prompt needs none, as is_causal is right there; nor
        # does one new token in rows of one length, as it sees all columns.
        mask = None
        if S > T and (T > 1 or min(start_pos) < max(start_pos)):
            mask = (columns <= positions[..., None])[:, None]  # (B, 1, T, S)
        for cache in caches:
            cache.seek(positions, columns)
        return self.trunk(tokens, positions, mask, caches)

    def head(self, x):
        """Logits (B, V) float32 of normalized hidden states (B, dim)."""
        return self.output(x).float()

    def forward_cached(self, tokens, start_pos, caches, last, reader=None, tokens_at_once=4096):
        """Extends the caches by tokens (B, T), row b from position start_pos[b]; logits (B, V) at last[b].

        start_pos, last: lists of ints; last: columns of tokens. Columns past a row's own end may hold
        anything: nothing that counts sees them, and later tokens overwrite them; but ValueError where they
        don't fit the caches. reader: compile_inference's, with fast versions of extend and head; None: self.
        Long prompts are read in chunks of tokens_at_once tokens, so that activations stay small.
        """
        reader = self if reader is None else reader
        B, T = tokens.shape
        room = caches[0].k.size(1)
        if max(start_pos) + T > room:
            raise ValueError(f"the KV cache holds {room} positions; {max(start_pos) + T} are needed")
        hidden = [None] * B  # each row's state in its last column
        chunk = max(1, tokens_at_once // B)
        for begin in range(0, T, chunk):
            x = reader.extend(tokens[:, begin:begin + chunk], [n + begin for n in start_pos], caches)
            for b in range(B):
                if begin <= last[b] < begin + chunk:
                    hidden[b] = x[b, last[b] - begin]
        return reader.head(torch.stack(hidden))  # (B, dim) -> (B, V)

    def configure_optimizers(self, learning_rate: float, weight_decay: float = 0.1,
                             betas: tuple[float, float] = (0.9, 0.95), seed: int = 0,
                             compile: bool | None = None, muon: bool = False) -> torch.optim.Optimizer:
        """AdamW with decay on matrices and none on norms; one fused kernel where the device has it.

        Decay pulls weights to zero, but a norm's weight is a scale whose neutral value is one. bfloat16
        weights are rounded stochastically, with a seed, in a pass that is compiled where that works. muon:
        the layers' matrices move by Muon instead; the embedding, whose rows are looked up, stays AdamW's.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        if parameters[0].dtype == torch.bfloat16:
            return RoundingAdamW(groups, learning_rate, betas, seed, compile is not False)
        fused = parameters[0].device.type in ("cuda", "cpu", "mps")  # One pass over memory beats ten.
        if muon:
            matrices = [p for p in self.layers.parameters() if p.dim() == 2]
            return Muon(groups, matrices, lr=learning_rate, betas=betas, fused=fused)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

# -----------------------------------------------------------------------------
# Loading


def read_args(ckpt_dir):
    """The ModelArgs of a checkpoint directory: out of Hugging Face's config.json, or Meta's params.json."""
    if huggingface.is_hugging_face(ckpt_dir):
        return read_config(ckpt_dir, ModelArgs, PRESETS.values())
    return ModelArgs.from_json(Path(ckpt_dir, "params.json"))


def open_checkpoint(ckpt_dir):
    """(Transformer on the meta device, tensor name -> its Pieces in files) of a checkpoint directory.

    The directory is Meta's or Hugging Face's. The output is tied if declared, absent or equal to the
    embedding. Errors: see read_args and both open_pieces.
    """
    model = Transformer.on_meta(read_args(ckpt_dir))
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    if huggingface.is_hugging_face(ckpt_dir):
        pieces, tied = huggingface.open_pieces(ckpt_dir, model.args, shapes)
    else:
        pieces, tied = checkpoint.open_pieces(ckpt_dir, shapes)
    model.args.tie_word_embeddings |= tied
    model.tie()
    return model, pieces


def load_checkpoint(ckpt_dir, device: str | torch.device = "cpu", dtype=None, quantize=None,
                    tensor_parallel: int = 1):
    """The Transformer of a checkpoint directory. Errors: see open_checkpoint.

    dtype: of weights and arithmetic. None: what the device multiplies fast; on the CPU the weights then stay
    in the type that they are stored in, and those of a single file memory-mapped. quantize: int8 or None.
    tensor_parallel: how many of torchrun's processes split the model; each reads its part of the files, and
    keeps it in the type of the arithmetic.
    """
    expect(quantize in (None, "int8"), "quantize", repr(quantize), "int8 or None")
    expect(quantize is None or tensor_parallel == 1, "quantize", quantize,
           f"None where {tensor_parallel} processes split a model")
    device = torch.device(device)
    model, pieces = open_checkpoint(ckpt_dir)
    if tensor_parallel > 1:
        split_model(model, device, tensor_parallel)
    stored = stored_dtype(pieces)
    compute = dtype or devices.fast_dtype(device, stored)
    kept = stored if dtype is None and device.type == "cpu" and tensor_parallel == 1 else compute
    num_bytes = sum(p.numel() for p in model.parameters()) * (1 if quantize else kept.itemsize)
    parallel.check_memory_of_ranks(f"the weights of {ckpt_dir}", num_bytes, device, tensor_parallel)
    if quantize:
        load_int8(model, whole_tensors(pieces, model.args.tie_word_embeddings), device, compute)
        return model.eval()
    checkpoint.load_weights(model, pop_pieces(pieces, model.args.tie_word_embeddings), device, kept)
    if kept != compute:
        widen(model, compute)
    return model.eval()

# -----------------------------------------------------------------------------
# Sampling


@dataclass
class Sampler:
    """Draws a token from logits: one that all limits keep, each of which judges the whole distribution."""
    temperature: float = 0.6  # below 1 sharpens the distribution; 0 always takes the likeliest token
    top_p: float = 0.9  # only the fewest tokens that hold this probability (Holtzman et al., 2020)
    top_k: int = 0  # only so many of the likeliest; 0: all
    min_p: float = 0.0  # only tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that the text has so far less likely
    seed: int = 1337  # row i of a batch draws with seed + i, so that its text doesn't depend on the others

    def __post_init__(self):
        expect_at_least(0, temperature=self.temperature, top_k=self.top_k)
        expect(0 <= self.top_p <= 1, "top_p", self.top_p, "0 to 1")
        expect(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        expect(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty,
               "a number above 0")
        expect(0 <= self.seed < 2**62, "seed", self.seed, "0 to 2**62 - 1")

    def __call__(self, logits: np.ndarray | Tensor, uniform: float = 0.0, text: Collection[int] = ()) -> int:
        """One token id drawn from logits (V,), float32, on the CPU, to stand behind the ids of a text.

        uniform: a random number from 0 to below 1, applied by inverse CDF over the tokens that are kept, in
        the order of their ids. At temperature 0 it isn't used, and the first of equals wins. ValueError if
        the largest logit isn't finite.
        """
        scores = np.asarray(logits)  # NumPy's operations begin sooner than torch's.
        if self.repetition_penalty != 1:
            scores = penalized(scores, text, self.repetition_penalty)
        largest = scores.max()
        if not math.isfinite(largest):
            raise ValueError(f"found {largest} as the largest logit; expected a finite one")
        if self.temperature < 1e-6:  # At 0, softmax would be of 0 / 0.
            return int(scores.argmax())
        # Weights are softmax without its division: probabilities but for a common factor.
        ids, weights = candidates(scores, largest, self)
        # On a line from 0 to their sum each token owns a stretch as long as its weight: which one is hit?
        cdf = weights.cumsum()
        return int(ids[cdf.searchsorted(uniform * cdf[-1], side="right")])

# -----------------------------------------------------------------------------
# Generation


class Llama:
    """A model with its tokenizer (None: token ids only), and its reader if inference was compiled."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, max_seq_len: int | None = None,
                 max_batch_size: int = 32, reader=None):
        self.model = model
        self.tokenizer = tokenizer
        # A model may have more rows than the vocabulary tokens, padded to a multiple: those are never drawn.
        self.num_ids = tokenizer.n_words if tokenizer else model.args.vocab_size
        self.max_seq_len = model.args.max_seq_len if max_seq_len is None else max_seq_len
        self.max_batch_size = max_batch_size
        self.reader = reader

    @staticmethod
    def build(ckpt_dir: str | os.PathLike, tokenizer_path: str | os.PathLike | None = None,
              max_seq_len: int | None = None, max_batch_size: int = 32,
              device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
              compile: bool | None = None, quantize: str | None = None,
              tensor_parallel: int | None = None) -> "Llama":
        """Loads a checkpoint directory, with its own tokenizer unless tokenizer_path names another.

        max_seq_len None: the model's own. device None: cuda, else mps, else cpu. dtype: a torch dtype or
        its name; None: see load_checkpoint. compile None: where it works; else a line on standard error says
        why. quantize: "int8" halves bfloat16's memory. tensor_parallel: how many of torchrun's processes
        split the model, and call all alike; None: all. ValueError or FileNotFoundError names a bad file.
        """
        expect_at_least(1, max_seq_len=max_seq_len, max_batch_size=max_batch_size,
                        tensor_parallel=tensor_parallel)
        tensor_parallel, device = processes_that_split(tensor_parallel, device)
        model = load_checkpoint(ckpt_dir, device, devices.choose_dtype(dtype), quantize, tensor_parallel)
        if max_seq_len is not None and max_seq_len > model.args.max_seq_len:
            print(f"max_seq_len {max_seq_len} is beyond the {model.args.max_seq_len} tokens that {ckpt_dir} "
                  "is made for; what comes after them may be worse", file=sys.stderr)
        tokenizer = open_tokenizer(ckpt_dir, tokenizer_path, model.args.vocab_size)
        reader = None if compile is False else fast.compile_inference(model)
        return Llama(model, tokenizer, max_seq_len, max_batch_size, reader)

    def new_caches(self, batch_size, max_seq_len=None):
        """One empty KVCache per layer; ValueError where memory lacks. max_seq_len None: this Llama's."""
        model = self.model
        args = model.args
        room = self.max_seq_len if max_seq_len is None else max_seq_len
        elements = 2 * args.n_layers * batch_size * room * args.n_kv_heads * args.head_dim
        fast.check_memory(f"the keys and values of {batch_size} x {room} tokens",
                          elements // model.tensor_parallel * model.dtype.itemsize, model.device)
        return [KVCache(args, batch_size, room, model.dtype, model.device, model.tensor_parallel)
                for _ in model.layers]

    @torch.inference_mode()
    def steps(self, prompt_tokens: list[list[int]], max_gen_len: int, stop_tokens: list[int] | None = None,
              caches: list[KVCache] | None = None, start_pos: list[int] | None = None,
              **sampling) -> Iterator[tuple[Tensor, list[int | None]]]:
        """Yields once per step: the logits (B, V), and each row's next token, None once the row has ended.

        Prompts of any lengths are read together, padded on the right where causality hides the padding.
        stop_tokens None: the tokenizer's; [] never stops. caches: new_caches, or ones that hold the first
        start_pos[i] tokens of prompt i, which are not read again; when a step is yielded, they hold all but
        the tokens it draws. sampling: as in Sampler. Errors: see Sampler, forward_cached, check_prompts.
        """
        sampler = Sampler(**sampling)
        B = len(prompt_tokens)
        start_pos = [0] * B if start_pos is None else start_pos
        check_prompts(self, prompt_tokens, start_pos)
        expect_at_least(0, max_gen_len=max_gen_len)
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else []
        rows = [list(prompt) for prompt in prompt_tokens]  # each with what has been drawn behind it
        if caches is None:
            room = max(map(len, rows)) + max_gen_len
            caches = self.new_caches(B, min(self.max_seq_len, room))
        # One number a token, on the CPU, so that a seed's text is the same on every device.
        generators = [torch.Generator().manual_seed(sampler.seed + i) for i in range(B)]
        most = min(max_gen_len, self.max_seq_len)
        uniforms = torch.stack([torch.rand(most, generator=g, dtype=torch.float64) for g in generators])
        ended = [False] * B
        # On a GPU the reader draws, as waiting for each row's logits would take longer than making them.
        draws = self.reader.draws if isinstance(self.reader, StaticReader) else self.draws
        for logits, ids in draws(rows, ended, start_pos, caches, sampler, uniforms, self.num_ids):
            drawn: list[int | None] = [None] * B
            for i, token in enumerate(ids):
                if ended[i] or token is None:
                    continue
                if token in stop_tokens:  # It is not returned.
                    ended[i] = True
                    continue
                drawn[i] = token
                rows[i].append(token)
                ended[i] = len(rows[i]) >= self.max_seq_len  # The cache has no room for one more.
            yield logits, drawn
            if all(ended):
                return

    def draws(self, rows, ended, start_pos, caches, sampler, uniforms, num_ids):
        """Yields the logits (B, V) behind rows of ids, and for each that hasn't ended an id drawn from them.

        Whoever takes them makes rows longer and marks those that have ended. uniforms (B, steps): the
        numbers to draw with. ValueError if the logits aren't finite.
        """
        device = self.model.device
        tokens, last = unread(rows, start_pos, device)
        for step in range(uniforms.size(1)):
            logits = self.model.forward_cached(tokens, start_pos, caches, last, self.reader)
            scores = logits[:, :num_ids].cpu().numpy()  # one copy for all rows
            if not math.isfinite(scores.sum()):  # The sum is finite only if every logit is.
                raise ValueError(NOT_FINITE)
            ids = [None if ended[i] else sampler(scores[i], float(uniforms[i, step]), row)
                   for i, row in enumerate(rows)]
            yield logits, ids
            # A row that has ended feeds its last token to its last position again: it doesn't grow.
            tokens = torch.tensor([[row[-1]] for row in rows], device=device)  # (B, 1)
            start_pos = [len(row) - 1 for row in rows]
            last = [0] * len(rows)

    def generate(self, prompt_tokens: list[list[int]], max_gen_len: int, *, echo: bool = False,
                 stop_tokens: list[int] | None = None, logprobs: bool = False, **sampling):
        """The new tokens of each prompt, behind the prompt itself if echo; the stop token is not returned.

        logprobs: (tokens, log-probabilities), those of the raw logits, whatever the sampler's limits; a
        prompt's first token, which nothing predicts, has 0. The rest as in steps.
        """
        rows = [list(prompt) if echo else [] for prompt in prompt_tokens]
        row_logprobs = [[] for _ in prompt_tokens]
        for logits, drawn in self.steps(prompt_tokens, max_gen_len, stop_tokens, **sampling):
            for i, token in enumerate(drawn):
                if token is not None:
                    rows[i].append(token)
                    if logprobs:
                        row_logprobs[i].append(float(logits[i].log_softmax(-1)[token]))
        if echo and logprobs:  # By now steps has checked the prompts.
            for i, prompt in enumerate(prompt_tokens):
                row_logprobs[i] = self.prompt_logprobs(prompt) + row_logprobs[i]
        return (rows, row_logprobs) if logprobs else rows

    @torch.inference_mode()
    def prompt_logprobs(self, prompt):
        """The log-probability of each of a prompt's tokens after those before it; 0 for the first."""
        tokens = torch.tensor(prompt, device=self.model.device)
        nats = F.cross_entropy(self.model(tokens[None, :-1])[0], tokens[1:], reduction="none")
        return [0.0, *(-nats).tolist()]

    def encode(self, prompts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The tokens of each of several texts, behind BOS; ValueError names an empty one.

        special: whether special tokens that a text spells out are read as such, among them a BOS of its own.
        """
        if isinstance(prompts, str):
            raise ValueError(f"found one text, {prompts[:40]!r}; expected a list of prompts")
        if "" in prompts:
            raise ValueError(f"prompt {prompts.index('')} is empty; expected a text")
        tokenizer = self.required_tokenizer
        rows = [tokenizer.encode(prompt, bos=True, allowed_special="all" if special else ())
                for prompt in prompts]
        # A prompt that spells BOS itself needs no other one in front.
        return [row[1:] if row[1:2] == [tokenizer.bos_id] else row for row in rows]

    @property
    def required_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.model or tokenizer.json; put it there or give "
                             "tokenizer_path")
        return self.tokenizer

    def stream(self, steps, stop=()):
        """Turns steps into text: yields, per step, the piece that each row can show now, "" where none.

        stop: a text, or several, before which a row ends.
        """
        stop = [stop] if isinstance(stop, str) else stop
        expect(all(stop), "stop", stop, "texts of at least one character")
        rows = None
        for _, drawn in steps:
            rows = rows or [TextStream(self.required_tokenizer, stop) for _ in drawn]
            yield [row.push(token) for row, token in zip(rows, drawn, strict=True)]
            if all(row.ended for row in rows):
                return
        if rows:
            yield [row.push(None) for row in rows]  # Nothing is held back any longer.

    def texts(self, steps, num_rows, stop):
        """The whole text of each row of some steps, of which there may be none; see stream."""
        texts = [""] * num_rows
        for pieces in self.stream(steps, stop):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def text_completion(self, prompts: Sequence[str], max_gen_len: int = 256, echo: bool = False,
                        stop: str | Sequence[str] = (), special: bool = False, **settings) -> list[dict]:
        """[{"generation": text}] per prompt, echo: behind it; for the rest see stream, encode and steps."""
        tokens = self.encode(prompts, special)
        texts = self.texts(self.steps(tokens, max_gen_len, **settings), len(tokens), stop)
        return [{"generation": (prompt if echo else "") + text}
                for prompt, text in zip(prompts, texts, strict=True)]

    def chat_completion(self, dialogs: list[list[dict]], max_gen_len: int = 256,
                        stop: str | Sequence[str] = (), **settings) -> list[dict]:
        """[{"generation": {"role": "assistant", "content": text}}]: the message that follows each dialog.

        dialogs: lists of {"role": "system", "user" or "assistant", "content": text}. The rest as in
        text_completion.
        """
        tokens = [self.required_tokenizer.encode_dialog(dialog) for dialog in dialogs]
        return [{"generation": {"role": "assistant", "content": text}}
                for text in self.texts(self.steps(tokens, max_gen_len, **settings), len(tokens), stop)]

# -----------------------------------------------------------------------------
# Data loader


class DistributedShardedDataLoader:
    """Batches of windows from .bin shards, each window once an epoch over all ranks together.

    A shard of n tokens has (n-1)//T windows, one with masked targets those of pack_dialogs instead. If no
    shard has a whole window, each is one, padded. All windows, by file name, are numbered 0 … W-1. Of N
    ranks, rank r gets as row b of its call s the window ((s*N + r)*B + b) mod W; with shuffle, a permutation
    of each epoch maps that number. The state is one counter, so a run resumes on any number of ranks.

    bos_id: the token that begins documents in shards of versions 7 and 8; in those of version 9 marks do.
    remark: one line on what is cut, left out and padded, "" if nothing is.
    """

    def __init__(self, filename_pattern: str | os.PathLike, B: int, T: int, process_rank: int,
                 num_processes: int, shuffle: bool = False, seed: int = 0, bos_id: int | None = None):
        expect_at_least(1, B=B, T=T)
        expect(0 <= process_rank < num_processes, "rank", process_rank, f"0 to {num_processes - 1}")
        self.filename_pattern = filename_pattern
        self.B = B  # windows of this rank's batches
        self.T = T  # inputs of a window, and as many targets
        self.rank = process_rank
        self.num_processes = num_processes
        self.shuffle = shuffle
        self.seed = seed  # It draws the permutations.
        self.bos_id = bos_id
        self.files = files.matching(filename_pattern)
        if not self.files:
            raise FileNotFoundError(f"no file matches {filename_pattern}; tokenize first, or correct it")
        self.headers = [files.read_header(path) for path in self.files]
        self.ntok_total = sum(header.num_tokens for header in self.headers)
        self.dialogs = [pack_dialogs(path, T, bos_id) for path in self.files]  # None: no dialogs
        windows = [max(header.num_tokens - 1, 0) // T if dialogs is None else len(dialogs.windows) - 1
                   for header, dialogs in zip(self.headers, self.dialogs, strict=True)]
        if sum(windows) == 0 and any(self.dialogs):
            raise NoTargetError(f"{filename_pattern}: no document has a target among its first T + 1 = "
                                f"{T + 1} tokens; take a longer seq_len, or chats with an assistant's turn")
        if sum(windows) == 0:  # A short text is better padded than lost.
            windows = [int(header.num_tokens > 1) for header in self.headers]
        self.first_windows = np.cumsum([0, *windows], dtype=np.int64)  # The last entry is W.
        self.num_windows = int(self.first_windows[-1])
        if self.num_windows == 0:
            raise ValueError(f"{filename_pattern}: {self.ntok_total} tokens in {len(self.files)} files hold "
                             f"no window of T + 1 = {T + 1}; expected an input and its target at least")
        self.remark = remark_on(filename_pattern, self.headers, self.dialogs, T)
        self.permuted = None  # the epoch whose order is at hand
        self.reset()

    def reset(self):
        self.counter = 0  # windows that all ranks together have given out

    def state_dict(self):
        return {"counter": self.counter}

    def load_state_dict(self, state):
        self.counter = state["counter"]

    def permutation(self, epoch):
        """The order of an epoch's windows: from seed and epoch alone, so the same on every rank."""
        if epoch != self.permuted:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
            self.permuted = epoch
        return self.order

    def read(self, shard, begin, length):
        """The ids of a shard's tokens, whether they are targets, and whether they begin a document."""
        # Read by position, as a memory map of a file that shrinks would kill the process.
        stored = files.read_tokens(self.files[shard], begin, length)
        if len(stored) != length:
            raise ValueError(f"{self.files[shard]}: {len(stored)} tokens from token {begin} on, expected "
                             f"{length}: the file has shrunk since it was opened")
        return files.split_marks(stored, self.headers[shard].version, self.bos_id)

    def segments(self, shard, index):
        """(first token, length) of a window's segments: whole dialogs, or one stretch of T + 1 tokens."""
        if self.dialogs[shard]:
            return self.dialogs[shard].segments(index)
        begin = index * self.T  # The last token is only a target; the next window begins with it.
        return [(begin, min(self.T + 1, self.headers[shard].num_tokens - begin))]

    def window(self, number):
        """T + 1 tokens: their ids, whether they are targets, and whether they begin a document.

        Padding has id 0 and is no target; as it comes last, causality hides it from what is one.
        """
        # The last shard that begins at or before this window; side="right" passes over empty shards.
        shard = int(np.searchsorted(self.first_windows, number, side="right")) - 1
        ids = np.zeros(self.T + 1, dtype=np.int64)
        is_target = np.zeros(self.T + 1, dtype=bool)
        starts = np.zeros(self.T + 1, dtype=bool)
        column = 0  # the next one to fill
        for begin, length in self.segments(shard, number - int(self.first_windows[shard])):
            part = slice(column, column + length)
            ids[part], is_target[part], starts[part] = self.read(shard, begin, length)
            if self.dialogs[shard]:  # A segment counts as a document, even the second of a long one.
                is_target[column] = False
                starts[column] = True
            column += length
        return ids, is_target, starts

    def next_batch(self, starts: bool = False, end: int | None = None) -> tuple[Tensor, ...]:
        """x, y: int64 (B, T), y one token later than x and -100 where that is no target.

        starts: also which tokens of x begin a document, bool (B, T); then those of y that do are no targets.
        end: windows numbered so or more, such as those of later epochs, have no targets.
        """
        first = self.counter + self.rank * self.B  # Ranks take turns, rank 0 first.
        self.counter += self.num_processes * self.B  # The other ranks take as many.
        x, y, marks = [], [], []
        for number in range(first, first + self.B):
            epoch, index = divmod(number, self.num_windows)
            if self.shuffle:
                index = int(self.permutation(epoch)[index])
            ids, is_target, is_start = self.window(index)
            if starts:
                is_target &= ~is_start
            if end is not None and number >= end:
                is_target[:] = False
            x.append(ids[:-1])  # (T,)
            y.append(np.where(is_target, ids, -100)[1:])  # (T,), each one token later
            marks.append(is_start[:-1])
        batch = (x, y, marks) if starts else (x, y)
        return tuple(torch.from_numpy(np.stack(rows)) for rows in batch)

# -----------------------------------------------------------------------------
# Training


def learning_rate_at(step, steps, lr, min_lr, warmup_steps):
    """The rate of one step of 1 … steps: up to lr while AdamW's averages fill, a cosine down to min_lr."""
    step = min(step, steps)  # Steps that are added later keep the last rate.
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2  # lr at progress 0, min_lr at 1


def batch_on(device, loader, vocab_size, doc_mask, end=None):
    """The loader's next inputs, targets and, with doc_mask, starts, on a device; see next_batch.

    No starts, None, where each row is one document. ValueError for an id outside the vocabulary.
    """
    inputs, targets, *starts = loader.next_batch(starts=doc_mask, end=end)
    largest = max(int(inputs.max()), int(targets.max()))
    if largest >= vocab_size:
        raise ValueError(f"{loader.filename_pattern} holds token {largest}, the vocabulary ends at "
                         f"{vocab_size - 1}; tokenize with the tokenizer of this training")
    has_documents = doc_mask and bool(starts[0][:, 1:].any())
    return inputs.to(device), targets.to(device), starts[0].to(device) if has_documents else None


@torch.no_grad()
def evaluate(model, loader, num_windows, doc_mask, byte_lengths, autocast):
    """(nats per counted target, bits per UTF-8 byte) over the first windows, which all ranks share out.

    Bits per byte don't depend on the vocabulary, so that models of different ones can be compared.
    byte_lengths: (V,) the UTF-8 bytes of each id, 0 for special tokens.
    """
    nats = count = num_bytes = 0
    loader.reset()
    while loader.counter < num_windows:  # It counts for all ranks, so they make the same number of steps.
        inputs, targets, starts = batch_on(byte_lengths.device, loader, len(byte_lengths), doc_mask,
                                           end=num_windows)
        with autocast:
            nats += float(model(inputs, targets, starts=starts, reduction="sum"))
        counted = targets[targets != -100]
        count += len(counted)
        num_bytes += int(byte_lengths[counted].sum())
    nats, count, num_bytes = parallel.sum_over_ranks([nats, count, num_bytes], byte_lengths.device).tolist()
    return nats / max(count, 1), nats / math.log(2) / max(num_bytes, 1)  # a bit is log(2) nats


def optimize(model, optimizer, batches, lr, grad_clip, autocast, what="the step"):
    """One step of training on this rank's micro-batches: the loss over all ranks and the gradient's norm.

    model: may be wrapped by DDP or sharded by FSDP. batches: (inputs, targets, starts), (B, T) each, starts
    may be None. If no target counts there is no loss, None, and nothing changes. ValueError if the loss or
    the norm of `what` is not finite, before any weight has changed.
    """
    device = batches[0][0].device
    _, world_size = parallel.rank_and_size()
    # Every target weighs the same, on whatever rank it lies: sums are divided by the number of all targets.
    # A mean of means would favour the targets of batches that have few.
    count, = parallel.sum_over_ranks([sum((targets != -100).sum() for _, targets, _ in batches)], device)
    divisor = count.clamp(min=1).float()  # A count in float64 would make the loss that, which MPS lacks.
    total = torch.zeros((), device=device)
    for i, (inputs, targets, starts) in enumerate(batches, start=1):
        # DDP: all-reduce the gradients after the last micro-batch only.
        model.require_backward_grad_sync = i == len(batches)
        with autocast:
            share = model(inputs, targets, starts=starts, reduction="sum") / divisor
        # DDP and FSDP average gradients over the ranks; the shares have to be added, hence world_size.
        (share * world_size).backward()
        total += share.detach()
    loss, = parallel.sum_over_ranks([total], device)
    # One odd batch must not throw the weights far: longer gradients are scaled down to the norm grad_clip.
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    count, loss = torch.stack([count, loss]).tolist()  # Only here is a GPU waited for, once for both.
    grad_norm = float(parallel.whole(grad_norm))  # With FSDP each rank has a part of it.
    if count == 0:  # A step would still decay the weights, and move them by the averages of earlier steps.
        optimizer.zero_grad()
        return None, 0.0
    if not math.isfinite(loss + grad_norm):
        raise ValueError(f"{what} has loss {loss} and gradient norm {grad_norm}, expected finite ones; what "
                         f"was saved before stays. Try a lower lr than {lr}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def training_source(newest, ckpt_dir, preset, tokenizer_path):
    """(tokenizer, model on the meta device, name -> pieces) to begin with; no pieces: weights are drawn.

    newest: the run's newest checkpoint, or None; ValueError if another architecture is asked for.
    """
    source = newest or ckpt_dir
    check_source(source, ckpt_dir, preset, tokenizer_path, PRESETS)
    tokenizer = Tokenizer(tokenizer_path or find_tokenizer(str(source)))
    of_preset = ModelArgs(**PRESETS[preset], vocab_size=tokenizer.n_words) if preset else None
    if source:
        model, pieces = open_checkpoint(source)
    else:
        assert of_preset  # A preset's, or check_source would have refused.
        model, pieces = Transformer.on_meta(of_preset), None
    if newest and (preset or ckpt_dir):
        check_shape(newest, model.args, of_preset or read_args(ckpt_dir))
    tokenizer.check_vocabulary(model.args.vocab_size)
    return tokenizer, model, pieces


def open_data(train_data, val_data, batch_size, seq_len, shuffle, seed, tokenizer):
    """(loader, the validation's, a line on that); the second is None where there is nothing to validate on.

    For the patterns see train. ValueError if both share a file, or were not made with this tokenizer.
    """
    rank, world_size = parallel.rank_and_size()
    layout = batch_size, seq_len, rank, world_size
    loaders = [DistributedShardedDataLoader(train_data, *layout, shuffle, seed, tokenizer.mark_id)]
    pattern, remark = validation_pattern(train_data, val_data)
    if pattern:
        try:
            loaders.append(DistributedShardedDataLoader(pattern, *layout, bos_id=tokenizer.mark_id))
            remark = loaders[1].remark
        except NoTargetError as error:
            remark = f"no validation: {error}"
    files.check_apart(*(loader.files for loader in loaders))
    for loader in loaders:
        files.check_manifests(loader.files, tokenizer.model_path)
        batch_on("cpu", loader, tokenizer.n_words, doc_mask=True)  # It refuses ids beyond the vocabulary.
        loader.reset()
    return loaders[0], loaders[1] if len(loaders) > 1 else None, remark


@resumable
def train(*, train_data: str = "tinystories/TinyStories_train*.bin",
          val_data: str | None = None, out_dir: str = "out/train",
          preset: str | None = None, ckpt_dir: str | None = None, tokenizer_path: str | None = None,
          batch_size: int = 4, seq_len: int = 1024, total_batch_tokens: int | None = None,
          steps: int | None = None, epochs: int = 1, lr: float | None = None, min_lr: float | None = None,
          warmup_steps: int = 10, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
          muon: bool = False, grad_clip: float = 1.0, eval_interval: int = 100, eval_steps: int = 80,
          sample_interval: int = 0, save_interval: int = 1000, keep: int = 2, seed: int = 1337,
          resume: bool = False, shuffle: bool = False, doc_mask: bool = True,
          activation_checkpointing: bool = False, fsdp: bool | int = False,
          lora_rank: int = 0, lora_alpha: float | None = None,
          quantize: str | None = None, param_dtype: str = "float32", device: str | None = None,
          dtype: str | None = None, compile: bool | None = None):
    """Trains from scratch (--preset) or finetunes (--ckpt_dir) on token files, alone or under torchrun.

    Checkpoints have the type of the weights that are finetuned, and what resuming needs inside. Resuming
    takes each flag that isn't given from the run's own record, but for device. Steps that are added keep the
    last rate. A signal, such as Ctrl-C's, lets the step finish and saves it; then the command ends with
    status 128 + its number. In Python, Ctrl-C raises KeyboardInterrupt.

    Args:
        train_data: pattern of the .bin shards to train on
        val_data: pattern of the .bin shards to validate on; None: train_data's with val for train, if there
        out_dir: folder that takes log.jsonl, loss.png and the checkpoints
        preset: shape to train from scratch, such as demo or llama3.2-1b; needs --tokenizer_path
        ckpt_dir: checkpoint directory to finetune
        tokenizer_path: sets the vocabulary from scratch; None: the checkpoint's own tokenizer
        batch_size: windows that each process computes at once
        seq_len: tokens of a window
        total_batch_tokens: tokens of a step, over processes and micro-batches; None: one micro-batch each
        steps: steps in all; None: as many as the epochs take
        epochs: how often every window is seen, where --steps doesn't say how long
        lr: learning rate after the warm-up; None: 0.05 / dim, of adapters 0.5 / dim, from scratch 0.6 / dim;
            another one, given with more steps on resuming, begins a new schedule
        min_lr: learning rate at the end of the cosine; None: a tenth of lr
        warmup_steps: steps in which the learning rate rises
        weight_decay: pull of matrices towards zero (AdamW)
        betas: how slowly AdamW's averages of gradients and of their squares change
        muon: Muon trains the layers' matrices, not AdamW; the demo learns more in the same time
        grad_clip: largest norm of the gradient; 0: any
        eval_interval: steps from one evaluation to the next; the last step is always evaluated
        eval_steps: windows that an evaluation looks at, the first ones; 0: all
        sample_interval: steps from one set of printed samples to the next; 0: none
        save_interval: steps from one checkpoint to the next; 0: only the last one, or one ended by a signal;
            besides, each evaluation that is the best so far is saved
        keep: how many checkpoints stay, the newest ones; beside them the best, which is OUT_DIR/best
        seed: draws the first weights and the shuffled orders
        resume: go on from out_dir's newest checkpoint, if there is one
        shuffle: a new order of the windows in each epoch
        doc_mask: documents of a window don't see each other
        activation_checkpointing: compute each block twice, to keep less in memory
        fsdp: processes share out weights and optimizer (FSDP2); a number: so many do, and each such group
            has a copy (HSDP); else each process has one (DDP)
        lora_rank: freeze the model and train adapters of this rank on its layers' matrices (LoRA); 0: don't;
            checkpoints are PEFT's files then, and at the end OUT_DIR/merged is the model with the best
        lora_alpha: adapters count lora_alpha / lora_rank times; None: twice
        quantize: int8: the frozen matrices take half of bfloat16's memory
        param_dtype: bfloat16: weights, gradients and averages take half of float32's memory
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        dtype: type of the computation, bfloat16 or float32; None: bfloat16 where the device multiplies it
            fast, else float32; sums are float32
        compile: compile blocks with torch.compile; None: on cuda, while a CPU gets compiled attention alone
    """
    flags = dict(locals())  # The flags are the only local names as long as this line comes first.
    check_flags(flags)
    rank, world_size, place = parallel.join_process_group(device, needed=bool(fsdp))
    compute_dtype = devices.choose_dtype(dtype) or devices.fast_dtype(place)
    fast.keep_freed_memory(place)  # Otherwise every step would ask the system for memory anew.

    # What to train on, and where.
    run = Run(out_dir, resume, rank == 0)  # Only the first rank writes.
    # The checkpoints of adapters hold no base, so that the model comes from ckpt_dir again.
    tokenizer, model, pieces = training_source(None if lora_rank else run.newest, ckpt_dir, preset,
                                                tokenizer_path)
    loader, val_loader, val_remark = open_data(train_data, val_data, batch_size, seq_len, shuffle, seed,
                                               tokenizer)
    eval_windows = 0
    if val_loader:
        run.floor = entropy_floor(Path(val_loader.files[0]).parent)
        eval_windows = min(eval_steps or val_loader.num_windows, val_loader.num_windows)
    micro_batch_tokens = batch_size * seq_len * world_size  # One pass takes so many, over all ranks.
    total_batch_tokens = total_batch_tokens or micro_batch_tokens
    expect(total_batch_tokens % micro_batch_tokens == 0, "total_batch_tokens", total_batch_tokens,
           f"a multiple of batch_size * seq_len * processes = {micro_batch_tokens}")
    micro_batches = total_batch_tokens // micro_batch_tokens  # Their gradients add up to a step's.
    steps = steps or max(1, epochs * loader.num_windows * seq_len // total_batch_tokens)

    # The model, the optimizer, and where an earlier run stopped.
    lr = default_lr(model.args.dim, pieces is None, lora_rank > 0) if lr is None else lr
    flags |= dict(steps=steps, total_batch_tokens=total_batch_tokens, lr=lr)  # What was None has its number.
    data = dict(train_data=loader.files, val_data=val_loader.files if val_loader else [],
                vocabulary=[tokenizer.model_path], base=lora.base_files(lora_rank, ckpt_dir))
    progress = run.load_progress(flags, data)
    stored = stored_dtype(pieces) if pieces else torch.float32
    # What is trained: all weights, or LoRA's adapters on frozen ones.
    save, saved_dtype, form_remark = lora.prepare(model, stored, param_dtype, lora_rank, lora_alpha,
                                                  quantize, ckpt_dir)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.check_disk(checkpoint.bytes_of_training(model, saved_dtype), progress["step"])
    fill_model(model, pieces, seed, place, compute_dtype, fsdp, run.newest)
    stretched = fit_context(model.args, seq_len, pieces is None)
    model.activation_checkpointing = activation_checkpointing
    model.compiled_attention = compile is not False and attention.serves(place)
    optimizer = model.configure_optimizers(lr, weight_decay, betas, seed, compile, muon)
    if run.newest:
        checkpoint.load_optimizer(run.newest / "optimizer", model, optimizer, saved_dtype)
        loader.load_state_dict(progress["loader"])
    if compile or (compile is None and place.type == "cuda"):
        fast.compile_blocks(model)
    needs_ddp = world_size > 1 and not fsdp
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if needs_ddp else model
    # Matrix products in dtype, sums and softmax in float32.
    autocast = torch.autocast(place.type, compute_dtype, enabled=compute_dtype != torch.float32)

    byte_lengths = torch.tensor(tokenizer.byte_lengths, device=place)  # (V,)
    min_lr = lr / 10 if min_lr is None else min_lr
    peak_flops = devices.measured_peak(place, compute_dtype) * world_size
    tokenizer_copy = run.prepare(progress["step"], tokenizer.model_path)
    if run.is_master:
        print(f"{num_trained:,} parameters on {world_size} x {place} in {devices.name_of(compute_dtype)}, "
              f"{steps:,} steps of {total_batch_tokens:,} tokens out of {loader.ntok_total:,}")
        for remark in filter(None, (form_remark, stretched, loader.remark, val_remark)):
            print(remark)

    for step in run.steps(progress["step"] + 1, steps):
        start = time.perf_counter()
        first_window = loader.counter  # An error names a step's windows.
        batches = [batch_on(place, loader, tokenizer.n_words, doc_mask) for _ in range(micro_batches)]
        lr_now = learning_rate_at(*run.learning_rate_step(step), lr, min_lr, warmup_steps)
        loss, grad_norm = optimize(wrapped, optimizer, batches, lr_now, grad_clip, autocast,
                                   f"step {step} (windows {first_window} to {loader.counter - 1})")
        tokens_per_s = total_batch_tokens / (time.perf_counter() - start)
        record = dict(step=step, loss=loss, lr=lr_now, grad_norm=grad_norm, tokens_per_s=round(tokens_per_s),
                      mfu=devices.flops_per_token(model, seq_len) * tokens_per_s / peak_flops,
                      memory=fast.used_memory(place))
        if val_loader and (step == steps or step % eval_interval == 0):
            record["val_loss"], record["val_bpb"] = evaluate(wrapped, val_loader, eval_windows, doc_mask,
                                                             byte_lengths, autocast)
        run.log(record)  # Logged first: a run killed before it has saved cuts this line when it resumes.
        run.heed_signals(place)  # All ranks stop at the same step.
        is_due = step == steps or (save_interval and step % save_interval == 0)
        if is_due or run.stopping or run.improved:
            progress = run.progress(step, loader.state_dict())
            checkpoint.save_training(run.folder(step), model, optimizer, tokenizer_copy, progress,
                                     saved_dtype, keep, run.best_folder, save)
        takes_part = run.is_master or fsdp  # With FSDP every rank has to compute its part.
        if takes_part and sample_interval and step % sample_interval == 0 and not run.stopping:
            llama = Llama(model, tokenizer, max_seq_len=256)
            for completion in llama.text_completion(PROMPTS, max_gen_len=100, echo=True):
                run.show(completion["generation"] + "\n")
    run.close()
    if lora_rank and run.is_master and not run.stopping:
        best = run.best_folder or run.folder(steps)
        lora.save_merged(run.out_dir / "merged", *open_checkpoint(ckpt_dir), best, tokenizer_copy)
        run.show(f"with these adapters in the model: {run.out_dir / 'merged'}")
    parallel.leave_process_group()
    run.leave()

# -----------------------------------------------------------------------------
# Commands


@only_first_prints()
def sample(*, ckpt_dir: str | None = None, tokenizer_path: str | None = None, prompt: str | None = None,
           prompt_file: str | None = None, max_gen_len: int = 256,
           temperature: float = Sampler.temperature, top_p: float = Sampler.top_p,
           top_k: int = Sampler.top_k, min_p: float = Sampler.min_p,
           repetition_penalty: float = Sampler.repetition_penalty, stop: list[str] | None = None,
           special: bool = False, seed: int = Sampler.seed, max_seq_len: int | None = None,
           device: str | None = None, dtype: str | None = None, compile: bool | None = None,
           quantize: str | None = None):
    """Prints completions of a prompt, of every line of a file, or of four default ones; or answers dialogs.

    Of several prompts the first streams as its tokens come, the others follow. Speed goes to standard error.
    A .jsonl file holds dialogs, a row with messages or conversations each; every row is printed as JSON with
    the answer as a further message, in the file's order. Under torchrun all processes split the model.

    Args:
        ckpt_dir: checkpoint directory; None: the one last written under out/
        tokenizer_path: tokenizer.model or tokenizer.json to use; None: the checkpoint's own
        prompt: text to complete, in which \\n, \\t and \\\\ are a line break, a tab and a backslash
        prompt_file: file with a prompt per line, each taken as it is; a .jsonl file: with dialogs to answer
        max_gen_len: most tokens to generate
        temperature: below 1 makes likely tokens likelier; 0 always takes the likeliest
        top_p: draw only from the fewest tokens that together have this probability
        top_k: draw only from so many of the likeliest tokens; 0: all
        min_p: draw only from tokens at least this fraction as likely as the likeliest
        repetition_penalty: above 1 makes tokens that prompt and text have so far less likely
        stop: text before which to end, or several; \\n, \\t and \\\\ as in a prompt
        special: read special tokens that a prompt spells out, such as <|eot_id|>; else they are characters
        seed: the same seed gives the same text, in every batch
        max_seq_len: most tokens of a prompt and its completion together; None: the model's own limit
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        dtype: float32, bfloat16 or float16; None: what the device multiplies fast, with weights as stored
        compile: run faster; None: where it works, the first time after some seconds; --nocompile: never
        quantize: int8, in half of bfloat16's memory
    """
    stop = [cli.unescape(text) for text in ([stop] if isinstance(stop, str) else stop or [])]
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                    repetition_penalty=repetition_penalty, seed=seed)
    rows, prompts = answers.read(prompt, prompt_file, special, PROMPTS)
    llama = Llama.build(newest_checkpoint() if ckpt_dir is None else ckpt_dir, tokenizer_path, max_seq_len,
                        max_batch_size=len(prompts), device=device, dtype=dtype, compile=False,
                        quantize=quantize)
    answers.make_ready(llama, compile)
    if rows:
        answers.print_answers(llama, prompt_file, rows, prompts, max_gen_len, stop, **sampling)
    else:
        answers.print_completions(llama, prompts, special, max_gen_len, stop, **sampling)
    parallel.leave_process_group()


def demo(*, out_dir: str = "out/demo", retrain: bool = False):
    """Writes a corpus of little stories, trains a small Llama 3 on it and prints four, in a few minutes.

    Args:
        out_dir: folder of the demo; where it holds a finished one, its model is only sampled from
        retrain: make the demo again
    """
    import stories  # The demo alone needs these.
    import tiny_stories
    folder = Path(out_dir).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "data" / "entropy.json").exists():
        raise ValueError(f"{folder} holds no demo but other files; give another --out_dir")
    if retrain or not checkpoints_of_run(folder):
        # The old one stays until this is whole.
        with locked(f"{folder}.lock"), files.complete_folder(folder, replace=True) as part:
            data = part / "data"
            stories.write(str(data))
            shards = tiny_stories.find_shards(data / tiny_stories.SHARDS)  # the first one for validation
            texts = (story for shard in shards[1:] for story in tiny_stories.read_stories(shard))
            vocabulary = train_tokenizer(texts, 2048, data / "tokenizer.model").model_path
            tiny_stories.tokenize(str(data), vocabulary, num_workers=1)  # 1 s; workers start slower
            train(train_data=str(data / "TinyStories_train*.bin"),
                  val_data=str(data / "TinyStories_val.bin"), out_dir=str(part), preset="demo",
                  tokenizer_path=vocabulary, batch_size=2, seq_len=1024, steps=800, lr=3e-3, min_lr=0.0,
                  warmup_steps=30, muon=True, eval_interval=200, eval_steps=0, save_interval=0, shuffle=True)
    sample(ckpt_dir=str(checkpoints_of_run(folder)[-1]))


def main():
    """The command line; without a subcommand, torchrun trains and python samples."""
    cli.run({"sample": sample, "train": train, "demo": demo},
            default="train" if "TORCHELASTIC_RUN_ID" in os.environ else "sample")


if __name__ == "__main__":
    main()
