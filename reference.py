"""An independent Llama 3, slow and obvious, to lay beside llama31.py wherever numbers have to be trusted.

Written from the papers (Llama 3: arXiv 2407.21783, RoPE: 2104.09864, SwiGLU: 2002.05202, RMSNorm: 1910.07467,
GQA: 2305.13245) and not from llama31.py, of which it imports nothing. Different on purpose:

- plain functions over the checkpoint's dictionary of tensors, no modules: what is written is what is computed;
- one sequence and one head at a time, an explicit causal mask, RoPE as a product of complex numbers;
- no cache: every new token recomputes the whole sequence;
- float32 throughout, and differentiable, so that gradients can be compared as well as logits.

    python reference.py --ckpt_dir DIR
    python llama31.py --ckpt_dir DIR --temperature 0 --dtype float32    # the same text

Sizes in the comments: T tokens, H heads, D head_dim, V vocabulary.
"""

import json
import math
import pickle
from pathlib import Path

import torch

import cli
from tokenizer import Tokenizer

PROMPTS = ("Once upon a time", "One day", "Lily and George were best friends", "On a dark and stormy night")


# ---------------------------------------------------------------- the model

def rope_frequencies(args):
    """Radians per position of each of a head's D/2 pairs, (D/2); scaled as in Llama 3.1 if args say so."""
    D = args["dim"] // args["n_heads"]
    # Float32 also in the power: it is how Llama was trained, and 8,000 positions on, one unit in the last place
    # of a frequency is an angle of up to 5e-4.
    frequencies = 1.0 / args.get("rope_theta", 500000.0) ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    if not args.get("use_scaled_rope", False):
        return frequencies
    shape = (args["dim"], args["n_layers"], args["n_heads"], args.get("n_kv_heads"))
    is_llama_32 = shape in ((2048, 16, 32, 8), (3072, 28, 24, 8))  # 1B and 3B: their params.json omits the 32
    factor = args.get("rope_scale_factor", 32 if is_llama_32 else 8)
    scaled = []
    for frequency in frequencies.tolist():
        turns = 8192 * frequency / (2 * math.pi)  # in the context length of Llama 3, before 3.1 extended it
        if turns > 4:    # more than the high factor: fast pairs tell near positions apart and stay as they are
            scaled.append(frequency)
        elif turns < 1:  # less than the low factor: slow pairs never came round and are slowed down further
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
    T, H = len(x), args["n_heads"]
    n_kv_heads = args.get("n_kv_heads") or H
    D = args["dim"] // H
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
    """Logits (T, V) after each of T token ids.

    weights: Meta's name -> float32 tensor; without output.weight the embedding serves. args: params.json as a dict.
    """
    angles = torch.outer(torch.arange(len(tokens), dtype=torch.float32), rope_frequencies(args))
    rotations = torch.polar(torch.ones_like(angles), angles)      # (T, D/2), complex
    x = weights["tok_embeddings.weight"][torch.as_tensor(tokens)]
    for i in range(args["n_layers"]):
        wq, wk, wv, wo = (weights[f"layers.{i}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo"))
        normed = rms_norm(x, weights[f"layers.{i}.attention_norm.weight"], args)
        x = x + attention(normed, wq, wk, wv, wo, args, rotations)
        w1, w2, w3 = (weights[f"layers.{i}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        normed = rms_norm(x, weights[f"layers.{i}.ffn_norm.weight"], args)
        x = x + feed_forward(normed, w1, w2, w3)
    tied = args.get("tie_word_embeddings", False) or "output.weight" not in weights
    output = weights["tok_embeddings.weight" if tied else "output.weight"]
    return rms_norm(x, weights["norm.weight"], args) @ output.T


def loss(weights, args, inputs, targets):
    """Mean cross-entropy in nats over the targets other than -100, 0 if there is none; ids are (B, T)."""
    total, count = torch.zeros(()), 0
    for row, row_targets in zip(inputs, targets, strict=True):
        logits = forward(weights, args, row)
        for position, target in enumerate(row_targets.tolist()):
            if target != -100:
                total = total + torch.logsumexp(logits[position], dim=0) - logits[position, target]
                count += 1
    return total / max(count, 1)


# ---------------------------------------------------------------- a checkpoint and its text

def load(ckpt_dir):
    """(weights, args) of a directory with params.json and consolidated.00.pth.

    FileNotFoundError names the missing file; ValueError says why the files make no model.
    """
    params_path, weights_path = Path(ckpt_dir, "params.json"), Path(ckpt_dir, "consolidated.00.pth")
    for path in (params_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: --ckpt_dir is a folder in Meta's format, which has one")
    if len(files := list(Path(ckpt_dir).glob("consolidated.*.pth"))) > 1:
        raise ValueError(f"{ckpt_dir} has {len(files)} files of weights: reference.py reads models of one file")
    try:
        args = json.loads(params_path.read_text())
        stored = torch.load(weights_path, map_location="cpu", mmap=True, weights_only=True)
        weights = {name: tensor.float() for name, tensor in stored.items() if name != "rope.freqs"}
        forward(weights, args, [0])  # finds what is missing or doesn't fit before anybody waits for text
    except (ValueError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{ckpt_dir} is no Llama 3 checkpoint in Meta's format ({reason}); fetch it again") from error
    if len(weights) != (expected := 9 * args["n_layers"] + 2 + ("output.weight" in weights)):
        raise ValueError(f"{weights_path} has {len(weights)} tensors, expected {expected} for the n_layers of "
                         f"{params_path}: use the two files of one model")
    return weights, args


class Llama:
    """A checkpoint with its tokenizer, which is None where there is no file: token-level use still works."""

    def __init__(self, weights, args, tokenizer, max_seq_len):
        self.weights, self.args, self.tokenizer, self.max_seq_len = weights, args, tokenizer, max_seq_len

    @staticmethod
    def build(ckpt_dir, tokenizer_path=None, max_seq_len=2048):
        """Reads a directory in Meta's format, and its own tokenizer.model unless another is given."""
        weights, args = load(ckpt_dir)
        path = Path(tokenizer_path or Path(ckpt_dir, "tokenizer.model"))
        return Llama(weights, args, Tokenizer(str(path)) if tokenizer_path or path.is_file() else None, max_seq_len)

    @torch.no_grad()
    def generate(self, prompt_tokens, max_gen_len, temperature=0.0, top_p=0.9, seed=1337, echo=False,
                 stop_tokens=None):
        """Continuations of lists of ids, up to max_gen_len ids each and with echo after the prompt's own.

        temperature 0 takes the likeliest id; above, row i draws with Generator(seed + i) among the likeliest that
        make up top_p. A row ends at max_seq_len, or before an id in stop_tokens (None: the tokenizer's).
        """
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else []
        rows, V = [], len(self.weights["tok_embeddings.weight"])
        for i, prompt in enumerate(prompt_tokens):
            if not 0 < len(prompt) < self.max_seq_len or min(prompt) < 0 or max(prompt) >= V:
                raise ValueError(f"prompt {i} has {len(prompt)} ids, from {min(prompt, default=None)} to "
                                 f"{max(prompt, default=None)}: expected at least one, fewer than max_seq_len = "
                                 f"{self.max_seq_len}, from 0 to {V - 1}")
            generator = torch.Generator().manual_seed(seed + i)
            tokens = list(prompt)
            while len(tokens) < min(len(prompt) + max_gen_len, self.max_seq_len):
                token = sample(forward(self.weights, self.args, tokens)[-1], temperature, top_p, generator)
                if token in stop_tokens:
                    break
                tokens.append(token)
            rows.append(tokens if echo else tokens[len(prompt):])
        return rows

    def text_completion(self, prompts, max_gen_len=256, temperature=0.0, top_p=0.9, seed=1337):
        """[{"generation": text}, ...]: what follows each prompt. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.model: put it into the folder or give tokenizer_path")
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        rows = self.generate(ids, max_gen_len, temperature, top_p, seed)
        return [{"generation": self.tokenizer.decode(tokens)} for tokens in rows]


def sample(logits, temperature, top_p, generator):
    """An id by its logits (V): the likeliest at temperature 0, else drawn from the nucleus of mass top_p."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits / temperature, dim=0).sort(descending=True)
    before = probabilities.cumsum(dim=0) - probabilities
    nucleus = probabilities * (before <= top_p)  # the id that crosses top_p still belongs to it
    return int(ids[torch.multinomial(nucleus, 1, generator=generator)])


def main(ckpt_dir: str, tokenizer_path: str | None = None, prompt: str | None = None, max_gen_len: int = 256,
         temperature: float = 0.0, top_p: float = 0.9, seed: int = 1337):
    """Prints the completion of the prompt, or of four default ones, by any checkpoint directory."""
    if temperature < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected at least 0, and from 0 to 1")
    llama = Llama.build(ckpt_dir, tokenizer_path)
    for i, text in enumerate(PROMPTS if prompt is None else [prompt]):
        [completion] = llama.text_completion([text], max_gen_len, temperature, top_p, seed + i)
        print(("\n" if i else "") + text + completion["generation"], flush=True)


if __name__ == "__main__":
    cli.run({"sample": main}, default="sample")
