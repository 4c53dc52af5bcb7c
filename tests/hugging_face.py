"""Hugging Face's LlamaForCausalLM with the weights of a Meta state dict."""

import pytest
import torch

NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def renamed(state, head_dim):
    """A state dict in Hugging Face's names and row order.

    Meta turns neighbours, (0, 1), (2, 3) …, Hugging Face an element of a head's first half with one of the
    second: of wq and wk the even rows come first, then the odd ones.
    """
    theirs = {}
    for name, tensor in state.items():
        layer, part = "", name.removesuffix(".weight")
        if name.startswith("layers."):
            _, n, part = part.split(".", 2)
            layer = f"model.layers.{n}."
        if part in ("attention.wq", "attention.wk"):
            tensor = tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        theirs[f"{layer}{NAMES[part]}.weight"] = tensor
    return theirs


def hugging_face(args, state, attention="eager"):
    """Hugging Face's model with the configuration of a ModelArgs and the weights of a Meta state dict."""
    transformers = pytest.importorskip("transformers")
    rope = dict(rope_type="default", rope_theta=args.rope_theta)
    if args.use_scaled_rope:
        rope |= dict(rope_type="llama3", factor=args.rope_scale_factor,
                     low_freq_factor=args.rope_low_freq_factor, high_freq_factor=args.rope_high_freq_factor,
                     original_max_position_embeddings=args.rope_old_context)

    class Config(transformers.LlamaConfig):
        def validate_architecture(self):
            """It refuses a dim that n_heads doesn't divide, which the model, given a head_dim, computes."""

    config = Config(
        hidden_size=args.dim, intermediate_size=len(state["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim, vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps, max_position_embeddings=2**17, rope_parameters=rope,
        tie_word_embeddings=args.tie_word_embeddings, bos_token_id=None, eos_token_id=None,
        attn_implementation=attention)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(renamed(state, args.head_dim), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()
