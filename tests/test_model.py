"""The model's own promises: shapes, the cache, the document mask, checkpoints, the optimizer."""

import json

import pytest
import torch
from tiny import SHAPE, assert_close, random_model, random_tokens

import llama31
from llama31 import PRESETS, KVCache, Llama, ModelArgs, Transformer


@pytest.mark.parametrize("preset, count", [
    ("llama3.1-8b", 8_030_261_248), ("llama3.1-70b", 70_553_706_496), ("llama3.1-405b", 405_853_388_800),
    ("llama3.2-1b", 1_235_814_400), ("llama3.2-3b", 3_212_749_824)])
def test_presets_have_metas_parameter_counts(preset, count):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("fields, name", [
    ({"n_kv_heads": 3}, "n_kv_heads"), ({"dim": 50}, "dim"), ({"n_layers": 0}, "n_layers"),
    ({"vocab_size": 9.5}, "vocab_size"), ({"n_heads": True}, "n_heads"), ({"norm_eps": 0}, "norm_eps"),
    ({"rope_theta": "big"}, "rope_theta"), ({"use_scaled_rope": 1}, "use_scaled_rope"),
    ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier"), ({"n_kv_heads": 7}, "n_kv_heads"),
    ({"dim": 60, "n_heads": 8}, "dim is 60; expected a multiple of n_heads 8"),
    ({"head_dim": 7}, "head_dim is 7; expected an even"), ({"dim": 36}, "head_dim is 9; expected an even"),
    ({"head_dim": 0}, "head_dim"), ({"head_dim": 16.0}, "head_dim"),
    ({"rope_high_freq_factor": 1.0}, "factor is 1.0; expected more than rope_low_freq_factor 1.0"),
    ({"rope_low_freq_factor": 0}, "rope_low_freq_factor"), ({"rope_old_context": 0.5}, "rope_old_context")])
def test_an_inconsistent_field_is_named(fields, name):
    with pytest.raises(ValueError, match=name):
        ModelArgs(**{**SHAPE, **fields})


@pytest.mark.parametrize("text, said", [
    ("[3]", "found \\[3\\]"), ("{", "params.json: Expecting .*: found no JSON, expected an object"),
    ('{"dim": null}', "dim is None")])
def test_params_json_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        ModelArgs.from_json(tmp_path / "params.json")


@pytest.mark.parametrize("preset", ["llama3.2-1b", "llama3.2-3b", "llama3.1-8b"])
def test_llama_32_has_its_rope_scale_factor_though_params_json_omits_it(tmp_path, preset):
    ours = ("rope_scale_factor", "tie_word_embeddings")
    fields = {name: value for name, value in PRESETS[preset].items() if name not in ours}
    path = tmp_path / "params.json"
    path.write_text(json.dumps(fields))
    assert ModelArgs.from_json(path).rope_scale_factor == PRESETS[preset].get("rope_scale_factor", 8)
    path.write_text(json.dumps({**fields, "rope_scale_factor": 4}))
    assert ModelArgs.from_json(path).rope_scale_factor == 4


def test_hidden_dim_follows_metas_rule():
    assert ModelArgs(**PRESETS["llama3.1-8b"]).hidden_dim == 14336
    assert ModelArgs(**PRESETS["llama3.1-70b"]).hidden_dim == 28672
    assert ModelArgs(**PRESETS["llama3.1-405b"]).hidden_dim == 53248
    assert ModelArgs(**PRESETS["llama3.2-1b"]).hidden_dim == 8192


def test_an_unknown_field_is_named(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({**SHAPE, "colour": 3}))
    with pytest.raises(ValueError, match="colour"):
        ModelArgs.from_json(tmp_path / "params.json")


def test_a_full_cache_is_named():
    model, tokens = random_model(), random_tokens(2, 12)
    caches = [KVCache(model.args, 2, 12) for _ in model.layers]
    with torch.inference_mode():
        model.forward_cached(tokens, [0, 0], caches, [11, 11])
        with pytest.raises(ValueError, match="holds 12"):
            model.forward_cached(tokens[:, :1], [12, 12], caches, [0, 0])


def test_logits_do_not_see_the_future():
    model = random_model()
    tokens = torch.arange(10)[None]
    changed = tokens.clone()
    changed[0, 6] = 50
    assert torch.equal(model(tokens)[:, :6], model(changed)[:, :6])
    assert not torch.equal(model(tokens)[:, 6:], model(changed)[:, 6:])


def test_weight_decay_applies_to_matrices_and_never_to_norms():
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(0.5, weight_decay=0.25)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert_close(p, before[name] * (1 - 0.5 * 0.25) if p.dim() == 2 else before[name], name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_directory_loads_strictly(tmp_path, tied):
    model = random_model(tie_word_embeddings=tied)
    (tmp_path / "params.json").write_text(json.dumps({**SHAPE, "tie_word_embeddings": tied}))
    state = model.state_dict()
    torch.save(state, tmp_path / "consolidated.00.pth")
    llama = Llama.build(tmp_path, device="cpu")
    tokens = torch.arange(8)[None]
    assert torch.equal(llama.model(tokens), model(tokens))
    assert (llama.model.output.weight is llama.model.tok_embeddings.weight) == tied
    state = {name: w.clone() for name, w in state.items()}
    torch.save(state, tmp_path / "consolidated.00.pth")
    assert Llama.build(tmp_path, device="cpu").model.args.tie_word_embeddings == tied
    if tied:
        (tmp_path / "params.json").write_text(json.dumps(SHAPE))  # not declared, but equal, then absent
        assert Llama.build(tmp_path, device="cpu").model.args.tie_word_embeddings
        del state["output.weight"]
        torch.save(state, tmp_path / "consolidated.00.pth")
        assert torch.equal(Llama.build(tmp_path, device="cpu").model(tokens), model(tokens))
    torch.save({k: v for k, v in state.items() if "w2" not in k}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match="w2.weight is missing"):
        Llama.build(tmp_path, device="cpu")
    (tmp_path / "consolidated.00.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged, or not from torch.save"):
        Llama.build(tmp_path, device="cpu")


def test_scaled_rope_has_three_bands():
    plain = llama31.rope_frequencies(ModelArgs(dim=64, n_heads=1))
    args = ModelArgs(dim=64, n_heads=1, use_scaled_rope=True, rope_scale_factor=32)
    scaled = llama31.rope_frequencies(args)
    ratio = plain / scaled
    assert ratio[0] == 1
    assert_close(ratio[-1], torch.tensor(32.0))
    assert ((ratio > 1.01) & (ratio < 31)).any()
