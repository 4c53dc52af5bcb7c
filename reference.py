"""An independent Llama 3, slow and obvious, to lay beside llama31.py wherever numbers have to be trusted.

Written from the papers (Llama 3: arXiv 2407.21783, RoPE: 2104.09864, SwiGLU: 2002.05202, RMSNorm:
1910.07467, GQA: 2305.13245) and not from llama31.py, of which it imports nothing. Different on purpose:

- plain functions over the checkpoint's dictionary of tensors: what is written is what is computed;
- one sequence and one head at a time, an explicit causal mask, RoPE as a product of complex numbers;
- no cache: every new token recomputes the whole sequence; float32 throughout, and differentiable.

    python reference.py --ckpt_dir DIR
    python llama31.py --ckpt_dir DIR --temperature 0 --dtype float32    # the same text

Sizes in the comments: T tokens, H heads, D head dimension, V vocabulary.
"""

import json
import math
from pathlib import Path

import torch

from plumbing import cli
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Model


def rope_frequencies(args):
    """Radians per position of each of a head's pairs, (D/2); scaled as in Llama 3.1 if args say so."""
    D = args["dim"] // args["n_heads"]
    # Float32 also in the power: it is how Llama was trained, and 8,000 positions on, one unit in the last
    # place of a frequency is an angle of up to 5e-4.
    frequencies = 1.0 / args.get("rope_theta", 500000.0) ** (torch.arange(0, D, 2).float() / D)
    if not args.get("use_scaled_rope", False):
        return frequencies
    shape = (args["dim"], args["n_layers"], args["n_heads"], args.get("n_kv_heads"))
    is_llama_32 = shape in ((2048, 16, 32, 8), (3072, 28, 24, 8))  # 1B, 3B: their params.json omits the 32
    factor = args.get("rope_scale_factor", 32 if is_llama_32 else 8)
    scaled = []
    for frequency in frequencies.tolist():
        turns = 8192 * frequency / (2 * math.pi)  # in the context of Llama 3, before 3.1 extended it
        if turns > 4:    # fast pairs tell near positions apart and stay as they are
            scaled.append(frequency)
        elif turns < 1:  # slow pairs never came round and are slowed down further
            scaled.append(frequency / factor)
        else:
            kept = (turns - 1) / (4 - 1)
            scaled.append(kept * frequency + (1 - kept) * frequency / factor)
    return torch.tensor(scaled, dtype=torch.float32)


def rotate(x, rotations):
    """RoPE of one head (T, D): its neighbours 0 and 1, 2 and 3, ... as complex numbers, times (T, D/2)."""
    turned = torch.complex(x[:, 0::2], x[:, 1::2]) * rotations
    return torch.stack([turned.real, turned.imag], dim=2).flatten(1)


def rms_norm(x, weight, args):
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + args.get("norm_eps", 1e-5)) * weight


def attention(x, wq, wk, wv, wo, args, rotations):
    """Causal self-attention, (T, dim) -> (T, dim); consecutive query heads share a key and value head."""
    T, H, D = len(x), args["n_heads"], args["dim"] // args["n_heads"]
    n_kv_heads = args.get("n_kv_heads") or H
    future = torch.arange(T)[None, :] > torch.arange(T)[:, None]  # row t: the columns that t may not see
    outputs = []
    for head in range(H):
        kv_head = head // (H // n_kv_heads)
        q = rotate(x @ wq.view(H, D, -1)[head].T, rotations)      # (T, D)
        k = rotate(x @ wk.view(n_kv_heads, D, -1)[kv_head].T, rotations)
        v = x @ wv.view(n_kv_heads, D, -1)[kv_head].T
        scores = (q @ k.T / math.sqrt(D)).masked_fill(future, -math.inf)
        outputs.append(torch.softmax(scores, dim=1) @ v)
    return torch.cat(outputs, dim=1) @ wo.T


def feed_forward(x, w1, w2, w3):
    gate = x @ w1.T
    return (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T


def forward(weights, args, tokens):
    """Logits (T, V) after each of T token ids; weights: Meta's name -> float32, args: params.json's dict."""
    angles = torch.outer(torch.arange(len(tokens), dtype=torch.float32), rope_frequencies(args))
    rotations = torch.polar(torch.ones_like(angles), angles)      # (T, D/2), complex
    x = weights["tok_embeddings.weight"][torch.as_tensor(tokens)]  # (T, dim)
    for i in range(args["n_layers"]):
        wq, wk, wv, wo = (weights[f"layers.{i}.attention.{w}.weight"] for w in ("wq", "wk", "wv", "wo"))
        normed = rms_norm(x, weights[f"layers.{i}.attention_norm.weight"], args)
        x = x + attention(normed, wq, wk, wv, wo, args, rotations)
        w1, w2, w3 = (weights[f"layers.{i}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        normed = rms_norm(x, weights[f"layers.{i}.ffn_norm.weight"], args)
        x = x + feed_forward(normed, w1, w2, w3)
    tied = args.get("tie_word_embeddings", False) or "output.weight" not in weights
    output = weights["tok_embeddings.weight" if tied else "output.weight"]
    return rms_norm(x, weights["norm.weight"], args) @ output.T


def loss(weights, args, inputs, targets):
    """Mean cross-entropy in nats over the targets other than -100, 0 if there is none; ids are (B, T)."""
    losses = []
    for row, row_targets in zip(inputs, targets, strict=True):
        log_probabilities = torch.log_softmax(forward(weights, args, row), dim=1)
        losses += [-log_probabilities[t, target] for t, target in enumerate(row_targets) if target != -100]
    return sum(losses, torch.zeros(())) / max(len(losses), 1)

# -----------------------------------------------------------------------------
# Checkpoint and text


def sample(logits, generator, temperature=0.0, top_p=0.9, top_k=0, min_p=0.0):
    """An id by its logits (V): the likeliest at temperature 0, else drawn from those within all limits."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits / temperature, dim=0).sort(descending=True, stable=True)
    kept = probabilities >= min_p * probabilities[0]
    if top_p < 1:
        too_few = int((probabilities.cumsum(dim=0) < top_p).sum())  # one more hold top_p
        kept[too_few + 1:] = False
    if top_k > 0:
        kept[top_k:] = False
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=generator)])


def read_weights(folder):
    """A checkpoint's tensors in float32; of several files, columns of wo and w2 are joined, else rows."""
    paths = sorted(Path(folder).glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected consolidated.00.pth, found no such file")
    files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    weights = {}
    for name in files[0].keys() - {"rope.freqs"}:  # which follows from params.json
        parts = [file[name].float() for file in files]
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        weights[name] = parts[0] if name.endswith("norm.weight") else torch.cat(parts, dim)
    return weights


class Llama:
    """A checkpoint with its tokenizer; where that is None, token ids still work."""

    def __init__(self, weights, args, tokenizer, max_seq_len):
        self.weights, self.args, self.tokenizer, self.max_seq_len = weights, args, tokenizer, max_seq_len

    @staticmethod
    def build(ckpt_dir, tokenizer_path=None, max_seq_len=None):
        """Reads a checkpoint directory, with its tokenizer unless another is given."""
        try:
            args = json.loads(Path(ckpt_dir, "params.json").read_text())
            weights = read_weights(ckpt_dir)
            forward(weights, args, [0])  # trips over what is missing or doesn't fit
            if len(weights) != (n := 9 * args["n_layers"] + 2 + ("output.weight" in weights)):
                raise ValueError(f"{len(weights)} tensors, expected {n} for {args['n_layers']} layers")
        except FileNotFoundError:
            raise  # it names the file
        except Exception as error:
            raise ValueError(f"{ckpt_dir}: params.json and consolidated.*.pth are no Llama 3 in Meta's "
                             f"format ({type(error).__name__}: {error})") from error
        path = Path(tokenizer_path or Path(ckpt_dir, "tokenizer.model"))
        tokenizer = Tokenizer(path) if tokenizer_path or path.is_file() else None
        if tokenizer and tokenizer.n_words != len(weights["tok_embeddings.weight"]):
            raise ValueError(f"{path}: {tokenizer.n_words} tokens, not as many as the model of {ckpt_dir}")
        return Llama(weights, args, tokenizer, max_seq_len or args.get("max_seq_len", 2048))

    @torch.no_grad()
    def generate(self, prompt_tokens, max_gen_len, seed=1337, echo=False, stop_tokens=None, **settings):
        """Up to max_gen_len ids that follow each prompt's, with echo after the prompt's own.

        Row i draws with Generator(seed + i); settings: see sample. A row ends before an id of stop_tokens
        (None: the tokenizer's).
        """
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else []
        rows = []
        for i, prompt in enumerate(prompt_tokens):
            if not 0 < len(prompt) < self.max_seq_len:
                raise ValueError(f"prompt {i}: {len(prompt)} ids, expected 1 to {self.max_seq_len - 1}")
            generator = torch.Generator().manual_seed(seed + i)
            tokens = list(prompt)
            while len(tokens) < min(len(prompt) + max_gen_len, self.max_seq_len):
                token = sample(forward(self.weights, self.args, tokens)[-1], generator, **settings)
                if token in stop_tokens:
                    break
                tokens.append(token)
            rows.append(tokens if echo else tokens[len(prompt):])
        return rows

    def text_completion(self, prompts, max_gen_len=256, **settings):
        """[{"generation": text}, ...]: what follows each prompt; ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("no tokenizer.model beside the weights; give tokenizer_path")
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        rows = self.generate(prompt_tokens, max_gen_len, **settings)
        return [{"generation": self.tokenizer.decode(row)} for row in rows]


PROMPTS = ("Once upon a time", "One day", "Lily and George were best friends", "On a dark and stormy night")


def main(*, ckpt_dir: str, tokenizer_path: str | None = None, prompt: str | None = None,
         prompt_file: str | None = None, max_gen_len: int = 256, temperature: float = 0.0,
         top_p: float = 0.9, top_k: int = 0, min_p: float = 0.0, seed: int = 1337):
    """Prints completions of a prompt, of each line of a prompt_file, or of four default prompts."""
    if not temperature >= 0 or not 0 <= top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError("expected a temperature of at least 0, and top_p and min_p from 0 to 1; found "
                         f"{temperature}, {top_p} and {min_p}")
    if prompt is not None and prompt_file is not None:
        raise ValueError("found --prompt and --prompt_file; expected one of them")
    llama = Llama.build(ckpt_dir, tokenizer_path)
    prompts = PROMPTS if prompt is None else [prompt]
    if prompt_file is not None:
        prompts = Path(prompt_file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for i, text in enumerate(prompts):
        [completion] = llama.text_completion([text], max_gen_len, seed=seed + i, temperature=temperature,
                                             top_p=top_p, top_k=top_k, min_p=min_p)
        print(("\n" if i else "") + text + completion["generation"], flush=True)


if __name__ == "__main__":
    cli.run({"sample": main}, default="sample")
