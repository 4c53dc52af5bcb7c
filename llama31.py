"""Llama 3 in one file: the model, its cache, sampling, checkpoints and the data loader.

Read it downwards; every part uses only what stands above it. Sizes in comments: B batch, T new tokens, S cached and
new tokens, H query heads, K key/value heads, D head dimension, V vocabulary.
"""

import dataclasses
import functools
import glob
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import cli
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Configuration


@dataclass
class ModelArgs:
    """The shape of a Llama 3, with the field names of Meta's params.json.

    ValueError names a field that is unknown (from_json) or inconsistent with the others.
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
    rope_scale_factor: float = 8  # 32 for Llama 3.2 1B and 3B
    tie_word_embeddings: bool = False
    max_seq_len: int = 2048

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; expected a divisor of n_heads {self.n_heads}")
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim is {self.dim}; expected a multiple of 2 * n_heads {2 * self.n_heads}, since "
                             "RoPE turns pairs of a head's elements")
        for name in ("norm_eps", "rope_theta", "rope_scale_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number above 0")

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
            known = {field.name for field in dataclasses.fields(cls)}
            if unknown := sorted(set(fields) - known):
                raise ValueError(f"unknown field {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None


PRESETS = {  # Meta's published shapes
    "llama3.1-8b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3,
                        use_scaled_rope=True),
    "llama3.1-70b": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3,
                         use_scaled_rope=True),
    "llama3.1-405b": dict(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, multiple_of=4096,
                          ffn_dim_multiplier=1.2, use_scaled_rope=True),
    "llama3.2-1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256, ffn_dim_multiplier=1.5,
                        use_scaled_rope=True, rope_scale_factor=32, tie_word_embeddings=True),
    "llama3.2-3b": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, multiple_of=256, ffn_dim_multiplier=1.0,
                        use_scaled_rope=True, rope_scale_factor=32, tie_word_embeddings=True),
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

    With use_scaled_rope, Llama 3.1's stretch of the context: wavelengths that repeat at least 4 times in the old
    context stay, those that don't fit into it once are slowed by rope_scale_factor, those between are blended.
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
    """Turns each interleaved pair of x (B, T, heads, D) by its position's angle; cos and sin: (B or 1, T, 1, D/2)."""
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
        self.k[rows, positions] = k
        self.v[rows, positions] = v
        return self.k[:, :S], self.v[:, :S]

# -----------------------------------------------------------------------------
# Transformer


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads (Ainslie et al., 2023)."""

    def __init__(self, args):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, cos, sin, mask=None, cached=None):
        """x (B, T, dim); mask None: causal over T, or the one new token sees all; cached: writes and reads a cache."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)  # (B, T, H, D), (B, T, K, D)
        if cached is not None:
            k, v = cached(k, v)  # (B, S, K, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1,
                                           enable_gqa=q.size(1) != k.size(1))
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


class Transformer(nn.Module):
    """The whole model; its state dict has Meta's checkpoint keys."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie()
        self.rope_frequencies = rope_frequencies(args)  # no buffer: .to(bfloat16) must not round it
        self.init_weights()

    def tie(self):
        """One storage for embedding and output where the configuration says so."""
        if self.args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self, generator=None):
        """Normal weights of standard deviation 0.02, smaller where a layer writes to the stream (GPT-2)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.args.n_layers) if residual else 0.02,
                                generator=generator)

    def trunk(self, tokens, positions, mask=None, cached=None):
        """tokens (B, T) at positions (B or 1, T) -> normalized hidden states (B, T, dim)."""
        angles = positions[..., None, None].float() * self.rope_frequencies.to(tokens.device)  # (B or 1, T, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        x = self.tok_embeddings(tokens)
        for layer, layer_cached in zip(self.layers, cached or [None] * len(self.layers), strict=True):
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
        mask = None
        if bos_id is not None:
            targets = targets.masked_fill(targets == bos_id, -100)
            document = (inputs == bos_id).cumsum(1)  # (B, T)
            if (document != document[:, :1]).any():
                causal = positions[0][:, None] >= positions[0]
                mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]  # (B, 1, T, T)
        logits = self.output(self.trunk(inputs, positions, mask)).float()
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)

    def forward_cached(self, tokens, start_pos, caches, last):
        """Extends the caches by tokens (B, T), row b from position start_pos[b]; logits (B, V) at column last[b].

        start_pos, last: lists of ints. Columns past a row's own end may hold anything: nothing that counts
        sees them, and later tokens overwrite them. ValueError where the cache is too short.
        """
        (B, T), device = tokens.shape, tokens.device
        S, room = max(start_pos) + T, caches[0].k.size(1)
        if S > room:
            raise ValueError(f"the KV cache holds {room} positions; {S} are needed")
        positions = torch.tensor(start_pos, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        mask = None
        if S > T and (T > 1 or min(start_pos) < max(start_pos)):
            mask = (torch.arange(S, device=device) <= positions[..., None])[:, None]  # (B, 1, T, S)
        cached = [functools.partial(cache.update, positions=positions, S=S) for cache in caches]
        x = self.trunk(tokens, positions, mask, cached)
        return self.output(x[torch.arange(B, device=device), torch.tensor(last, device=device)]).float()

    def configure_optimizers(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW with decay on matrices and none on norms; one fused kernel where the device has it."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        fused = parameters[0].device.type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

# -----------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(ckpt_dir, device="cpu", dtype=None):
    """The Transformer of a checkpoint directory with one consolidated.00.pth; dtype None keeps the stored one.

    Strict: ValueError lists missing, unexpected and wrongly shaped tensors, or names an unreadable file.
    """
    args = ModelArgs.from_json(Path(ckpt_dir, "params.json"))
    path = Path(ckpt_dir, "consolidated.00.pth")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint directory holds the weights there")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    output = state.setdefault("output.weight", state.get("tok_embeddings.weight"))
    args.tie_word_embeddings |= output is state.get("tok_embeddings.weight")
    with torch.device("meta"):
        model = Transformer(args)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(getattr(p, "shape", ())) for name, p in state.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(f"{path}: tensors don't fit params.json: " + "; ".join(
            f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'absent')}"
            for name in dict(wrong)))
    for name in list(state):
        state[name] = state[name].to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    model.tie()
    return model.eval()

# -----------------------------------------------------------------------------
# Sampling


def sample_token(logits, temperature, top_p, generator):
    """One token id drawn from logits (V,); temperature 0 takes the largest.

    top_p: draws only among the fewest tokens that together hold at least that probability.
    """
    if temperature == 0:
        return int(logits.argmax())
    probs, ids = torch.softmax(logits.float().cpu() / temperature, dim=-1).sort(descending=True, stable=True)
    if top_p < 1:
        before = probs.cumsum(-1) - probs  # what the likelier tokens hold
        probs[1:] *= before[1:] < top_p  # the likeliest always stays
    return int(ids[torch.multinomial(probs, 1, generator=generator)])

# -----------------------------------------------------------------------------
# Generation


class Llama:
    """A model with its tokenizer (None where there is none: then token ids only)."""

    def __init__(self, model, tokenizer, max_seq_len=2048, max_batch_size=32):
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size

    @staticmethod
    def build(ckpt_dir, tokenizer_path=None, max_seq_len=2048, max_batch_size=32, device=None, dtype=None):
        """Loads a checkpoint directory; dtype: a torch dtype or its name.

        device None: cuda, else mps, else cpu. dtype None: bfloat16 on cuda, elsewhere as stored.
        """
        if device is None:
            device = ("cuda" if torch.cuda.is_available() else
                      "mps" if torch.backends.mps.is_available() else "cpu")
        if isinstance(dtype, str):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"dtype is {dtype}; expected float32, bfloat16 or float16")
            dtype = getattr(torch, dtype)
        if dtype is None and torch.device(device).type == "cuda":
            dtype = torch.bfloat16
        model = load_checkpoint(ckpt_dir, device, dtype)
        path = tokenizer_path or os.path.join(ckpt_dir, "tokenizer.model")
        tokenizer = Tokenizer(path) if tokenizer_path or os.path.exists(path) else None
        if tokenizer and tokenizer.n_words != model.args.vocab_size:
            raise ValueError(f"{path} has {tokenizer.n_words} tokens, the model in {ckpt_dir} "
                             f"{model.args.vocab_size}; they don't belong together")
        return Llama(model, tokenizer, max_seq_len, max_batch_size)

    @torch.inference_mode()
    def stream(self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, seed=1337, stop_tokens=None):
        """Yields, a step at a time, the next token of every row; None for a row that has ended.

        Prompts of any lengths are read in one pass, padded on the right where causality hides the padding.
        ValueError for an empty prompt, one of max_seq_len or more tokens, or a setting out of range.
        """
        if not 0 < len(prompt_tokens) <= self.max_batch_size:
            raise ValueError(f"{len(prompt_tokens)} prompts; expected 1 to max_batch_size {self.max_batch_size}")
        for i, prompt in enumerate(prompt_tokens):
            if not 0 < len(prompt) < self.max_seq_len:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; expected 1 to {self.max_seq_len - 1}, one "
                                 "fewer than max_seq_len")
        if temperature < 0 or not 0 <= top_p <= 1:
            raise ValueError(f"temperature is {temperature} and top_p {top_p}; expected at least 0, and 0 to 1")
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else []
        B, lengths = len(prompt_tokens), [len(prompt) for prompt in prompt_tokens]
        width = max(lengths)
        weight = self.model.tok_embeddings.weight
        room = min(self.max_seq_len, width + max_gen_len)
        caches = [KVCache(self.model.args, B, room, weight.dtype, weight.device) for _ in self.model.layers]
        generators = [torch.Generator().manual_seed(seed + i) for i in range(B)]
        tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompt_tokens],
                              device=weight.device)
        logits = self.model.forward_cached(tokens, [0] * B, caches, [n - 1 for n in lengths])
        newest, ended = [0] * B, [False] * B
        for step in range(max_gen_len):
            for i in range(B):
                if not ended[i]:
                    newest[i] = sample_token(logits[i], temperature, top_p, generators[i])
                    ended[i] = newest[i] in stop_tokens
                    lengths[i] += not ended[i]
            yield [None if ended[i] else newest[i] for i in range(B)]
            ended = [done or lengths[i] >= self.max_seq_len for i, done in enumerate(ended)]
            if all(ended) or step + 1 == max_gen_len:
                return
            # a row that has ended feeds its last token to its last position again: it doesn't grow
            tokens = torch.tensor(newest, device=weight.device)[:, None]
            logits = self.model.forward_cached(tokens, [n - 1 for n in lengths], caches, [0] * B)

    def generate(self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, seed=1337, echo=False,
                 stop_tokens=None):
        """The new tokens of each prompt, after the prompt itself with echo; the stop token is not among them.

        Row i draws from its own generator, seeded with seed + i. stop_tokens None: the tokenizer's; [] never stops.
        """
        rows = [list(prompt) if echo else [] for prompt in prompt_tokens]
        for newest in self.stream(prompt_tokens, max_gen_len, temperature, top_p, seed, stop_tokens):
            for row, token in zip(rows, newest, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def text_completion(self, prompts, max_gen_len=256, temperature=0.6, top_p=0.9, seed=1337, echo=False):
        """[{"generation": text}] for each prompt; with echo the text begins with the prompt."""
        if self.tokenizer is None:
            raise ValueError("no tokenizer.model beside the weights; give tokenizer_path")
        tokens = self.generate([self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts],
                               max_gen_len, temperature, top_p, seed)
        return [{"generation": (prompt if echo else "") + self.tokenizer.decode(row)}
                for prompt, row in zip(prompts, tokens, strict=True)]

# -----------------------------------------------------------------------------
# Data loader

MAGIC, VERSION, HEADER_BYTES = 20240801, 7, 1024


def shard_tokens(path):
    """The number of tokens in a .bin shard; ValueError names the file and what is wrong with it."""
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES), dtype="<i4")
        size = f.seek(0, os.SEEK_END)
    if len(header) < HEADER_BYTES // 4:
        raise ValueError(f"{path}: {size} bytes; a token file begins with a header of {HEADER_BYTES}")
    magic, version, count = (int(n) for n in header[:3])
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"{path}: magic {magic}, version {version}; expected {MAGIC} and {VERSION}: tokenize anew")
    if count < 0 or size != HEADER_BYTES + 4 * count:
        raise ValueError(f"{path}: the header says {count} tokens, {HEADER_BYTES + 4 * count} bytes; the file has "
                         f"{size} bytes: truncated or damaged, tokenize anew")
    return count


class DistributedShardedDataLoader:
    """Batches of windows from .bin shards, each window once an epoch over all ranks together.

    A shard of n tokens has (n-1)//T windows; those of all shards, in file-name order, are numbered 0 … W-1. Row b
    of rank r at call s gets number ((s*N + r)*B + b) mod W, through a permutation of its epoch with shuffle. The
    state is that counter alone, so it resumes on any number of ranks.
    """

    def __init__(self, filename_pattern, B, T, process_rank, num_processes, shuffle=False, seed=0):
        self.B, self.T, self.rank, self.num_processes = B, T, process_rank, num_processes
        self.shuffle, self.seed = shuffle, seed
        self.files = sorted(glob.glob(str(filename_pattern)))
        if not self.files:
            raise FileNotFoundError(f"no file matches {filename_pattern}: tokenize first, or correct the pattern")
        counts = [shard_tokens(path) for path in self.files]
        self.ntok_total = sum(counts)
        self.first_windows = np.cumsum([0] + [max(n - 1, 0) // T for n in counts], dtype=np.int64)
        self.num_windows = int(self.first_windows[-1])
        if self.num_windows == 0:
            raise ValueError(f"{filename_pattern}: {self.ntok_total} tokens in {len(counts)} files hold no window; "
                             f"one shard of at least T + 1 = {T + 1} tokens is needed")
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
        """The T + 1 tokens of a window, as int64; read by position: a map of a file that shrinks would kill us."""
        shard = int(np.searchsorted(self.first_windows, number, side="right")) - 1
        start = (number - int(self.first_windows[shard])) * self.T
        tokens = np.fromfile(self.files[shard], dtype="<u4", count=self.T + 1, offset=HEADER_BYTES + 4 * start)
        if len(tokens) != self.T + 1:
            raise ValueError(f"{self.files[shard]}: {len(tokens)} tokens at token {start}, expected {self.T + 1}: "
                             "the file has shrunk since it was opened")
        return tokens.astype(np.int64)

    def next_batch(self):
        """x, y: int64 (B, T); y is x one token later."""
        first = self.counter + self.rank * self.B
        self.counter += self.num_processes * self.B
        rows = []
        for number in range(first, first + self.B):
            epoch, index = divmod(number, self.num_windows)
            rows.append(self.window(int(self.permutation(epoch)[index]) if self.shuffle else index))
        batch = torch.from_numpy(np.stack(rows))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

# -----------------------------------------------------------------------------
# Command line

PROMPTS = ("Once upon a time", "One day", "Lily and George were best friends", "On a dark and stormy night")


def sample(*, ckpt_dir: str, tokenizer_path: str | None = None, prompt: str | None = None, max_gen_len: int = 256,
           temperature: float = 0.6, top_p: float = 0.9, seed: int = 1337, device: str | None = None,
           dtype: str | None = None):
    """Prints completions of a prompt, or of four default ones, by a checkpoint directory's model."""
    llama = Llama.build(ckpt_dir, tokenizer_path, device=device, dtype=dtype)
    prompts = PROMPTS if prompt is None else (prompt,)
    results = llama.text_completion(prompts, max_gen_len, temperature, top_p, seed, echo=True)
    print("\n\n".join(result["generation"] for result in results))


if __name__ == "__main__":
    cli.run({"sample": sample}, default="sample")
