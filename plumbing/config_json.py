"""config.json, Hugging Face's description of a model, in and out."""

import contextlib
import dataclasses
import re
from pathlib import Path

from plumbing.huggingface import weight_files
from plumbing.text_files import read_json, write_json

FIELDS = {  # field of ModelArgs -> (field of config.json, its value where config.json lacks it)
    "dim": ("hidden_size", None),
    "n_layers": ("num_hidden_layers", None),
    "n_heads": ("num_attention_heads", None),
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "vocab_size": ("vocab_size", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "max_seq_len": ("max_position_embeddings", 2048),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
# We write LLAMA into every config.json; one that we read may leave out all of it but model_type. IF_GIVEN is
# not written, but must hold where a config.json has these fields.
LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
IF_GIVEN = {"pretraining_tp": 1, "sliding_window": None, "quantization_config": None}
ROPE_FIELDS = {  # field of ModelArgs -> what config.json calls it, where it scales RoPE as Llama 3.1 does
    "rope_scale_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_old_context": "original_max_position_embeddings",
}


def read_config(folder, shape, presets):
    """The shape that a folder's config.json describes; ValueError names what llama31.py does not compute.

    shape: ModelArgs. presets: the fields of published models, of which multiple_of is taken where it fits.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        weight_files(Path(folder))  # It says what lies there, if there are no weights either.
    config = {name: value for name, value in read_json(path).items() if value is not None}
    # If a file has both, transformers takes the first. RoPE's settings may also lie outside of either.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, expected an object or null")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", 10000.0),
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0), **rope}
    # This one counts first outside of both, and is the whole context where it is nowhere.
    old_context = ROPE_FIELDS["rope_old_context"]
    rope[old_context] = config.get(old_context, rope.get(old_context, config.get("max_position_embeddings")))
    kind = rope["rope_type"]
    scaling = {ours: rope.get(theirs) for ours, theirs in ROPE_FIELDS.items()} if kind == "llama3" else {}

    def require(expected, found):
        for name, value in expected.items():
            if found.get(name) != value:
                raise ValueError(f"{name} is {found.get(name)!r}, expected {value!r}: no Llama 3")

    try:
        require({**LLAMA, **IF_GIVEN}, {**LLAMA, **IF_GIVEN, "model_type": None, **config})
        require({"partial_rotary_factor": 1.0}, rope)
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope_type is {kind!r}, expected 'default' or 'llama3': RoPE is scaled as in "
                             "Llama 3.1 or not at all")
        with errors_in_their_words():
            args = shape(
                **{ours: config.get(theirs, default) for ours, (theirs, default) in FIELDS.items()},
                rope_theta=rope["rope_theta"], use_scaled_rope=kind == "llama3", **scaling)
        return with_hidden_dim(args, config.get("intermediate_size"), presets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def errors_in_their_words():
    """Gives ModelArgs' errors the names that config.json has for its fields."""
    names = {ours: theirs for ours, (theirs, _) in FIELDS.items()} | ROPE_FIELDS
    try:
        yield
    except ValueError as error:
        words = re.split(r"(\w+)", str(error))
        raise ValueError("".join(names.get(word, word) for word in words)) from None


def with_hidden_dim(args, hidden_dim, presets):
    """The shape with this SwiGLU hidden size, a number in config.json but a rule in params.json."""
    rules = []  # (multiple_of, ffn_dim_multiplier); the first that gives hidden_dim is taken
    for preset in presets:  # If they fit, the numbers are those that Meta published.
        if preset["dim"] == args.dim:
            rules.append((preset["multiple_of"], preset.get("ffn_dim_multiplier")))
    rules += [(256, None), *((2 ** k, None) for k in reversed(range(12)))]
    if type(hidden_dim) is int and hidden_dim > 0:
        rules.append((1, (hidden_dim + 0.5) / int(8 * args.dim / 3)))
        for multiple_of, multiplier in rules:
            found = dataclasses.replace(args, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if found.hidden_dim == hidden_dim:
                return found
    raise ValueError(f"intermediate_size is {hidden_dim!r}, expected a size that the SwiGLU rule can give")


def write_config(folder, args, dtype, ids):
    """Writes config.json and generation_config.json; ids: special tokens, which go into both."""
    rope = {"rope_type": "llama3", **{theirs: getattr(args, ours) for ours, theirs in ROPE_FIELDS.items()}}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], **LLAMA, **ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(args, ours) for ours, (theirs, _) in FIELDS.items()},
        "intermediate_size": args.hidden_dim, "rope_theta": args.rope_theta,
        "rope_scaling": rope if args.use_scaled_rope else None})
