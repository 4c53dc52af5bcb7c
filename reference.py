"""An independent Llama 3, slow and obvious, to compare llama31.py with wherever numbers have to be trusted.

It is written from the papers (Llama 3: arXiv 2407.21783, RoPE: 2104.09864, SwiGLU: 2002.05202, RMSNorm:
1910.07467, GQA: 2305.13245) and not from llama31.py, of which it imports nothing. It differs on purpose:

- plain functions over the checkpoint's dictionary of tensors, so that what is written is what is computed;
- one sequence and one head at a time, an explicit causal mask, RoPE as a product of complex numbers;
- no cache: every new token recomputes the whole sequence;
- float32 throughout, and differentiable.

    python reference.py --ckpt_dir DIR
    python llama31.py --ckpt_dir DIR --temperature 0 --dtype float32    # the same text

Sizes in the comments: T tokens, H heads, D head dimension, V vocabulary.
"""

import json
import math
from pathlib import Path

import torch

from plumbing import cli
from plumbing.prompts import PROMPTS, read_prompts, say_cut, say_spelled
from tokenizer import open_tokenizer

# -----------------------------------------------------------------------------
# Model


def head_size(args):
    """D, the elements of a head: the width shared out, unless args have a number of their own."""
    return args.get("head_dim") or args["dim"] // args["n_heads"]


def rope_frequencies(args):
    """Radians by which one position turns each of a head's pairs, (D/2), as args' use_scaled_rope asks."""
    D = head_size(args)
    # The power, too, is in float32, because Llama was trained that way: at position 8,000 the last bit of a
    # frequency makes a difference of up to 5e-4 radians.
    frequencies = 1.0 / args.get("rope_theta", 500000.0) ** (torch.arange(0, D, 2).float() / D)
    if not args.get("use_scaled_rope", False):
        return frequencies
    # Llama 3.1 slows by 8. Llama 3.2 1B and 3B slow by 32, but their params.json doesn't say so: they are
    # recognized by their shape.
    shape = (args["dim"], args["n_layers"], args["n_heads"], args.get("n_kv_heads"))
    is_llama_32 = shape in ((2048, 16, 32, 8), (3072, 28, 24, 8))
    factor = args.get("rope_scale_factor", 32 if is_llama_32 else 8)
    few = args.get("rope_low_freq_factor", 1)
    many = args.get("rope_high_freq_factor", 4)
    scaled = []
    for frequency in frequencies.tolist():
        # full turns within the context that was trained first, Llama 3's 8,192 tokens
        turns = args.get("rope_old_context", 8192) * frequency / (2 * math.pi)
        if turns > many:   # Fast pairs distinguish near positions and keep their frequency.
            scaled.append(frequency)
        elif turns < few:  # Slow pairs never made a full turn and are slowed by the whole factor.
            scaled.append(frequency / factor)
        else:              # Between the two, the frequency is a weighted mean of both.
            kept = (turns - few) / (many - few)
            scaled.append(kept * frequency + (1 - kept) * frequency / factor)
    return torch.tensor(scaled, dtype=torch.float32)


def rotate(x, rotations):
    """RoPE on one head's x (T, D): elements 2i and 2i + 1 are a complex number, times rotations (T, D/2)."""
    turned = torch.complex(x[:, 0::2], x[:, 1::2]) * rotations
    return torch.stack([turned.real, turned.imag], dim=2).flatten(1)


def rms_norm(x, weight, args):
    """Each row of x (T, dim) divided by its root mean square, times the weight (dim)."""
    mean_square = (x * x).mean(dim=1, keepdim=True)
    return x / torch.sqrt(mean_square + args.get("norm_eps", 1e-5)) * weight


def attention(x, wq, wk, wv, wo, args, rotations):
    """Causal self-attention, (T, dim) -> (T, dim); consecutive query heads share a key and value head."""
    T = len(x)
    H = args["n_heads"]
    D = head_size(args)
    n_kv_heads = args.get("n_kv_heads") or H
    future = torch.arange(T)[None, :] > torch.arange(T)[:, None]  # (T, T): row t is true after position t
    outputs = []
    for head in range(H):
        kv_head = head // (H // n_kv_heads)
        q = x @ wq.view(H, D, -1)[head].T                         # (T, D)
        k = x @ wk.view(n_kv_heads, D, -1)[kv_head].T             # (T, D)
        v = x @ wv.view(n_kv_heads, D, -1)[kv_head].T             # (T, D)
        scores = rotate(q, rotations) @ rotate(k, rotations).T / math.sqrt(D)  # (T, T)
        scores = scores.masked_fill(future, -math.inf)            # Softmax makes 0 of it.
        outputs.append(torch.softmax(scores, dim=1) @ v)
    return torch.cat(outputs, dim=1) @ wo.T


def feed_forward(x, w1, w2, w3):
    """SwiGLU, (T, dim) -> (T, dim): silu(x w1) gates x w3, where silu(g) = g sigmoid(g)."""
    gate = x @ w1.T
    return (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T


def forward(weights, args, tokens):
    """Logits (T, V) for the token after each of T token ids.

    weights: Meta's name -> float32 tensor. args: the dictionary in params.json.
    """
    angles = torch.outer(torch.arange(len(tokens), dtype=torch.float32), rope_frequencies(args))
    rotations = torch.polar(torch.ones_like(angles), angles)      # (T, D/2), complex, of length 1
    x = weights["tok_embeddings.weight"][torch.as_tensor(tokens)]  # (T, dim)
    for i in range(args["n_layers"]):
        layer = f"layers.{i}"
        wq, wk, wv, wo = (weights[f"{layer}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo"))
        normed = rms_norm(x, weights[f"{layer}.attention_norm.weight"], args)
        x = x + attention(normed, wq, wk, wv, wo, args, rotations)
        w1, w2, w3 = (weights[f"{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        normed = rms_norm(x, weights[f"{layer}.ffn_norm.weight"], args)
        x = x + feed_forward(normed, w1, w2, w3)
    x = rms_norm(x, weights["norm.weight"], args)
    # A model with tied embeddings uses one matrix at both ends.
    tied = args.get("tie_word_embeddings", False) or "output.weight" not in weights
    output = weights["tok_embeddings.weight" if tied else "output.weight"]
    return x @ output.T


def loss(weights, args, inputs, targets):
    """Mean cross-entropy in nats over the targets other than -100, 0 if there is none; ids are (B, T)."""
    losses = []
    for row, row_targets in zip(inputs, targets, strict=True):
        log_probabilities = torch.log_softmax(forward(weights, args, row), dim=1)
        for t, target in enumerate(row_targets):
            if target != -100:
                losses.append(-log_probabilities[t, target])
    return sum(losses, torch.zeros(())) / max(len(losses), 1)

# -----------------------------------------------------------------------------
# Checkpoint and text


def sample(logits, generator, tokens=(), temperature=0.0, top_p=0.9, top_k=0, min_p=0.0,
           repetition_penalty=1.0):
    """The next token's id from logits (V): the likeliest at temperature 0, otherwise drawn at random.

    tokens: the ids so far, on which there is a penalty. Only tokens that top_p, top_k and min_p all keep can
    be drawn; main explains these settings. A uniform number from 0 to the sum of the kept probabilities
    falls on the token, in the order of ids, at which their running sum exceeds it.
    """
    logits = logits.clone()
    for i in set(tokens):
        logits[i] *= repetition_penalty if logits[i] < 0 else 1 / repetition_penalty
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    likeliest, ids = probabilities.sort(descending=True, stable=True)
    number = len(ids)
    if top_p < 1:
        number = int((likeliest.cumsum(dim=0) < top_p).sum()) + 1  # With the last one, they reach top_p.
    if top_k > 0:
        number = min(number, top_k)
    kept = [i for i in sorted(ids[:number].tolist()) if probabilities[i] >= min_p * likeliest[0]]
    left = torch.rand((), dtype=torch.float64, generator=generator) * sum(probabilities[i] for i in kept)
    for i in kept:
        left -= probabilities[i]
        if left < 0:
            return i
    return kept[-1]  # Rounding may leave a remainder behind the last one.


def read_weights(folder):
    """A checkpoint's tensors, name -> float32.

    Large models come in several files, each with a part of every matrix: wo and w2 are cut into columns, the
    other matrices into rows. Norms are in every file, whole.
    """
    paths = sorted(Path(folder).glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected consolidated.00.pth, found no such file")
    files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    weights = {}
    for name in files[0].keys() - {"rope.freqs"}:  # Old files have it, but params.json says all it says.
        parts = [file[name].float() for file in files]
        if name.endswith("norm.weight"):
            weights[name] = parts[0]
        elif name.endswith(("wo.weight", "w2.weight")):
            weights[name] = torch.cat(parts, dim=1)
        else:
            weights[name] = torch.cat(parts, dim=0)
    return weights


HUGGING_FACE = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm", "self_attn": "attention", "mlp": "feed_forward",
                "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1",
                "down_proj": "w2", "up_proj": "w3"}  # parts of its names -> Meta's


def read_hugging_face(folder):
    """(args as in params.json, weights as of read_weights) of a folder in Hugging Face's format."""
    from safetensors.torch import load_file
    config = json.loads(Path(folder, "config.json").read_bytes())
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"found rope_type {kind}, expected default or llama3")
    llamas = {"hidden_act": "silu", "sliding_window": None, "quantization_config": None}
    for name, expected in llamas.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"found {name} {config[name]}, expected {expected}")
    args = {"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_dim": config.get("head_dim"),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            "use_scaled_rope": kind == "llama3",
            "max_seq_len": config.get("max_position_embeddings", 2048)}
    if args["use_scaled_rope"]:
        args["rope_scale_factor"] = rope["factor"]
        args["rope_low_freq_factor"] = rope["low_freq_factor"]
        args["rope_high_freq_factor"] = rope["high_freq_factor"]
        name = "original_max_position_embeddings"  # may also lie outside, where it counts first
        args["rope_old_context"] = config.get(name) or rope.get(name) or args["max_seq_len"]
    index = Path(folder, "model.safetensors.index.json")
    file_of = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    files = {Path(folder, name) for name in file_of.values()} or Path(folder).glob("model*.safetensors")
    weights = {}
    for path in files:
        for name, weight in load_file(path).items():
            parts = [HUGGING_FACE.get(part, part) for part in name.removeprefix("model.").split(".")]
            is_old_copy = file_of.get(name, path.name) != path.name  # The index names another file for it.
            if not is_old_copy and parts[-1] != "inv_freq":  # Old files have this table of RoPE's.
                weights[".".join(parts)] = weight.float()
    weights.setdefault("tok_embeddings.weight", weights.get("output.weight"))
    D = head_size(args)
    # It turns element i of a head together with i + D/2, Meta 2i with 2i + 1: so rows change places.
    order = torch.arange(D).view(2, D // 2).T.flatten()
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            weights[name] = weight.view(-1, D, args["dim"])[:, order].flatten(0, 1)
    return args, weights


class Llama:
    """A checkpoint with its tokenizer; without one (None), generate still works on token ids."""

    def __init__(self, weights, args, tokenizer, max_seq_len):
        self.weights = weights
        self.args = args
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len

    @staticmethod
    def build(ckpt_dir, tokenizer_path=None, max_seq_len=None):
        """Reads a checkpoint directory, with its own tokenizer unless tokenizer_path names another."""
        try:
            args = {}
            if Path(ckpt_dir, "config.json").is_file():
                args, weights = read_hugging_face(ckpt_dir)
            else:
                for path in (Path(ckpt_dir, "params.json"), Path(ckpt_dir, "llama31.json")):
                    if path.name == "params.json" or path.is_file():  # Meta's folders have no llama31.json.
                        args |= json.loads(path.read_bytes())
                weights = read_weights(ckpt_dir)
            # Meta doesn't say how long the context is; Llama 3's is the shorter one.
            context = 131072 if args.get("use_scaled_rope") else 8192
            forward(weights, args, [0])  # fails if a tensor is missing or has a size that doesn't fit
            # A layer has seven matrices and two norms; the embedding, the last norm and the output follow.
            needed = 9 * args["n_layers"] + 2 + ("output.weight" in weights)
            if len(weights) != needed:
                raise ValueError(f"{len(weights)} tensors, expected {needed} for {args['n_layers']} layers")
        except FileNotFoundError:
            raise  # Its message names the file.
        except Exception as error:
            raise ValueError(f"{ckpt_dir}: no Llama 3 in Meta's or Hugging Face's format "
                             f"({type(error).__name__}: {error})") from error
        tokenizer = open_tokenizer(ckpt_dir, tokenizer_path, len(weights["tok_embeddings.weight"]))
        return Llama(weights, args, tokenizer, max_seq_len or args.get("max_seq_len", context))

    @torch.no_grad()
    def generate(self, prompt_tokens, max_gen_len, seed=1337, echo=False, stop_tokens=None, **settings):
        """A list of up to max_gen_len new token ids for each prompt, with echo behind the prompt's own ids.

        Prompt i draws with its own Generator(seed + i); settings: see sample. Its row ends before the first
        id of stop_tokens (None: the tokenizer's stop_tokens), which is left out.
        """
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else []
        rows = []
        for i, prompt in enumerate(prompt_tokens):
            if not 0 < len(prompt) < self.max_seq_len:
                raise ValueError(f"prompt {i}: {len(prompt)} ids, expected 1 to {self.max_seq_len - 1}, one "
                                 "fewer than max_seq_len: shorten it, or raise --max_seq_len")
            generator = torch.Generator().manual_seed(seed + i)
            tokens = list(prompt)
            while len(tokens) < min(len(prompt) + max_gen_len, self.max_seq_len):
                logits = forward(self.weights, self.args, tokens)[-1]
                if self.tokenizer:
                    logits[self.tokenizer.n_words:] = -torch.inf  # rows that pad the vocabulary, no tokens
                token = sample(logits, generator, tokens, **settings)
                if token in stop_tokens:
                    break
                tokens.append(token)
            rows.append(tokens if echo else tokens[len(prompt):])
        return rows

    def encode(self, prompt, special=False):
        """A prompt's ids behind BOS, where texts begin with one; ValueError if there is no tokenizer.

        special: whether special tokens that the prompt spells out are read as such.
        """
        if self.tokenizer is None:
            raise ValueError("no tokenizer.model or tokenizer.json beside the weights; give tokenizer_path")
        ids = self.tokenizer.encode(prompt, allowed_special="all" if special else ())
        bos = self.tokenizer.encode("", bos=True)
        return ids if ids[:1] == bos else bos + ids

    def text_completion(self, prompts, max_gen_len=256, special=False, **settings):
        """[{"generation": text}, ...] for the prompts, in order; special: see encode."""
        prompt_tokens = [self.encode(prompt, special) for prompt in prompts]
        rows = self.generate(prompt_tokens, max_gen_len, **settings)
        return [{"generation": self.tokenizer.decode(row)} for row in rows]


def main(*, ckpt_dir: str, tokenizer_path: str | None = None, prompt: str | None = None,
         prompt_file: str | None = None, max_gen_len: int = 256, temperature: float = 0.0,
         top_p: float = 0.9, top_k: int = 0, min_p: float = 0.0, repetition_penalty: float = 1.0,
         special: bool = False, seed: int = 1337, max_seq_len: int | None = None):
    """Prints completions of a prompt, of each line of a prompt_file, or of four default prompts.

    Args:
        ckpt_dir: checkpoint directory, Meta's or Hugging Face's
        tokenizer_path: tokenizer.model or tokenizer.json to use; None: the checkpoint's own
        prompt: text to complete, in which \\n, \\t and \\\\ are a line break, a tab and a backslash
        prompt_file: file with a prompt per line, each taken as it is
        max_gen_len: most tokens to generate
        temperature: below 1 makes likely tokens likelier; 0 always takes the likeliest
        top_p: draw only from the fewest tokens that together have this probability
        top_k: draw only from so many of the likeliest tokens; 0: all
        min_p: draw only from tokens at least this fraction as likely as the likeliest
        repetition_penalty: above 1 makes tokens that prompt and text have so far less likely
        special: read special tokens that a prompt spells out, such as <|eot_id|>; else they are characters
        seed: the same seed gives the same text, here and of llama31.py
        max_seq_len: most tokens of a prompt and its completion together; None: the model's own limit
    """
    if not temperature >= 0 or not 0 <= top_p <= 1 or not 0 <= min_p <= 1 or not repetition_penalty > 0:
        raise ValueError("expected a temperature of at least 0, top_p and min_p from 0 to 1, and a "
                         "repetition_penalty above 0; found "
                         f"{temperature}, {top_p}, {min_p} and {repetition_penalty}")
    prompts = read_prompts(prompt, prompt_file, PROMPTS)
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len)
    prompt_tokens = [llama.encode(text, special) for text in prompts]
    if not special:
        say_spelled(prompts, llama.tokenizer.special_tokens)
    cut = 0  # texts that fill the context
    for i, (text, tokens) in enumerate(zip(prompts, prompt_tokens, strict=True)):
        [row] = llama.generate([tokens], max_gen_len, seed=seed + i, temperature=temperature, top_p=top_p,
                               top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty)
        print(("\n" if i else "") + text + llama.tokenizer.decode(row), flush=True)
        cut += len(row) < max_gen_len and len(tokens) + len(row) == llama.max_seq_len
    say_cut(cut, len(prompts), llama.max_seq_len)


if __name__ == "__main__":
    cli.run({"sample": main}, default="sample")
