"""The frozen language model: loading it, knowing it again, its text-only states, and that nothing of it ever trains."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AlbertConfig,
    AlbertModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rarec.config.method import Llm, Lora
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone, fingerprint, pool_text
from rarec.models.encode import text_states
from rarec.models.language_model import SDPA_FLOAT32, load_model
from rarec.models.slots import Slots
from rarec.prompts import Encoded
from tests.synthetic import tiny_model, tiny_tokenizer, write_llm

KINDS = ("bert", "llama", "qwen3", "gpt2")
SMALL = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a tiny model of every kind, as users have them on disk."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_llm(root / kind, kind)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a saved model, to be spoilt."""
    return lambda kind: shutil.copytree(saved / kind, tmp_path / kind)


def load(path, lora=None, pool="mean", **settings):
    return load_model(Llm(path=str(path), **settings), path.parent / "converted", lora=lora, pool=pool)


def edit_weights(directory, edit):
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def save_model(directory, model):
    model.save_pretrained(directory)
    tiny_tokenizer(encoder=True).save_pretrained(directory)
    return directory


def batch(lengths=(7, 4), seed=0):
    """Token ids and mask of prompts of these lengths, padded on the right."""
    ids_BT = torch.randint(5, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids_BT, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def some_slots(blocks=2, batch=2):
    slots_LBKD = torch.randn(blocks, batch, 1, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return Slots(slots_LBKD, torch.zeros(batch, 1, dtype=torch.long), tuple(range(blocks)))


# ---- loading


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_and_decoders_are_told_apart(saved, kind):
    loaded = load(saved / kind)
    encoder = kind == "bert"
    assert loaded.identity["kind"] == ("encoder" if encoder else "decoder")
    assert loaded.backbone.sink == (not encoder)
    assert loaded.context_length == 128
    assert len(loaded.tokenizer.prefix) == 1  # [CLS], or what opens the prompt of a decoder
    assert (len(loaded.backbone.blocks), loaded.backbone.hidden_size) == (2, 32)


def test_the_loaded_model_computes_what_was_saved(saved):
    ids_BT, mask_BT = batch()
    original = FrozenBackbone(tiny_model("llama"), "last")
    torch.testing.assert_close(load(saved / "llama").backbone(ids_BT, mask_BT), original(ids_BT, mask_BT))


def test_the_configuration_has_the_last_word(saved):
    loaded = load(saved / "llama", pool="last", dtype="bfloat16", attention="eager", kind="encoder")
    assert loaded.backbone.pool == "last"
    assert not loaded.backbone.sink
    assert loaded.backbone.model.dtype == torch.bfloat16
    assert loaded.identity["kind"] == "encoder"
    assert loaded.backbone.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_bfloat16_attention_is_computed_in_float32(saved, kind):
    """The same states and gradients as under transformers' own, but for rounding; the same identity."""

    def states(**settings):
        loaded = load(saved / kind, **settings)
        slots, (ids_BT, mask_BT) = some_slots(), batch()
        hidden_PD = loaded.backbone(ids_BT, mask_BT, slots)[mask_BT.bool()]
        (hidden_PD * torch.linspace(-1, 1, hidden_PD.numel()).view_as(hidden_PD)).sum().backward()
        gradient_LBKD = slots.slots_LBKD.grad
        return loaded, hidden_PD.detach().float().flatten(), gradient_LBKD.flatten()

    wide, *computed = states(dtype="bfloat16")
    plain, *expected = states(dtype="bfloat16", attention="sdpa")
    chosen = [loaded.backbone.trunk.config._attn_implementation for loaded in (wide, plain)]
    assert chosen == [SDPA_FLOAT32, "sdpa"]
    assert wide.identity == plain.identity
    for vector, other in zip(computed, expected, strict=True):
        assert torch.cosine_similarity(vector, other, dim=0) > 0.999


def test_attention_is_left_as_it_is_for_float32_and_for_gpus(saved):
    elsewhere = Llm(path=str(saved / "llama"), dtype="bfloat16")
    for loaded in (load(saved / "llama"), load_model(elsewhere, saved / "converted", device="cuda")):
        assert loaded.backbone.trunk.config._attn_implementation == "sdpa"


def test_identity_follows_the_weights_and_not_the_place(saved, copy):
    original, moved = load(saved / "llama"), copy("llama")
    same = load(moved, attention="eager", gradient_checkpointing=True)
    assert {**same.identity, "name": ""} == {**original.identity, "name": ""}
    edit_weights(moved, lambda weights: weights["model.layers.1.self_attn.k_proj.weight"].mul_(1.001))
    other = load(moved)
    assert other.identity["fingerprint"] != original.identity["fingerprint"]
    assert other.identity["config_sha256"] == original.identity["config_sha256"]
    assert load(saved / "llama", dtype="bfloat16").identity["fingerprint"] != original.identity["fingerprint"]


def test_identity_follows_the_configuration(saved, copy):
    changed = copy("llama")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert load(changed).identity["config_sha256"] != load(saved / "llama").identity["config_sha256"]


def test_an_absent_pooler_changes_nothing(saved, copy):
    """Transformers makes it up at random, but nothing reads it: the same identity, each time."""
    without = copy("bert")
    edit_weights(without, lambda weights: [weights.pop(name) for name in list(weights) if "pooler" in name])
    prints = {load(path).identity["fingerprint"] for path in (without, without, saved / "bert")}
    assert len(prints) == 1


def test_padding_positions_of_roberta_are_no_room_for_tokens(tmp_path):
    """Its positions count from 2, so 34 of them hold 32 tokens."""
    config = RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=34)
    loaded = load(save_model(tmp_path / "roberta", RobertaModel(config)))
    assert loaded.context_length == 32
    ids_BT, mask_BT = batch([32])
    assert loaded.backbone(ids_BT, mask_BT).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        loaded.backbone(*batch([33]))


# ---- models that cannot be used


def test_architectures_that_do_not_fit_are_refused(tmp_path):
    t5 = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(UserError, match=r"llm\.path.* t5 .*\n.*llm\.kind"):
        load(save_model(tmp_path / "t5", T5ForConditionalGeneration(t5)))
    albert = AlbertConfig(**{**SMALL, "num_hidden_layers": 3}, intermediate_size=64, embedding_size=16)
    with pytest.raises(UserError, match=r"llm\.path: AlbertModel"):
        load(save_model(tmp_path / "albert", AlbertModel(albert)))


def test_a_kernel_that_is_not_installed_is_said(saved):
    with pytest.raises(UserError, match=r"llm\.attention.*flash-attn\b.*\n.*sdpa"):
        load(saved / "llama", attention="flash_attention_2")


# ---- GGUF


def write_gguf(path, seed):
    """A tiny Llama with a byte-level vocabulary, as llama.cpp keeps it."""
    model = tiny_model("llama", vocabulary=300, seed=seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_context_length(128)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(300)
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters + [f"extra{i}" for i in range(300 - len(letters))])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_converted_once_for_each_content(tmp_path):
    path, converted = tmp_path / "tiny.gguf", tmp_path / "converted"
    with pytest.raises(UserError, match=r"llm\.path: \S+/tiny\.gguf"):
        load(path)
    model = write_gguf(path, seed=0)
    loaded = load(path)
    embedding = loaded.backbone.trunk.embed_tokens.weight
    torch.testing.assert_close(embedding, model.model.embed_tokens.weight.bfloat16().float())

    made = (converted / "model.safetensors").stat().st_mtime_ns
    assert load(path).identity == loaded.identity
    assert (converted / "model.safetensors").stat().st_mtime_ns == made

    (converted / "manifest.json").write_text("{}")
    assert load(path).identity == loaded.identity, "converted again"

    write_gguf(path, seed=1)
    assert load(path).identity["fingerprint"] != loaded.identity["fingerprint"], "not the old conversion"


# ---- frozen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_drops_nothing_out_of_the_frozen_model(kind, checkpointing):
    """BERT and GPT-2 have dropout 0.1 in their configuration."""
    backbone = FrozenBackbone(tiny_model(kind), "last", checkpointing)
    ids_BT, mask_BT = batch()
    expected = backbone.eval()(ids_BT, mask_BT, some_slots())
    assert backbone.train().training
    torch.testing.assert_close(backbone(ids_BT, mask_BT, some_slots()), expected, atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(backbone(ids_BT, mask_BT, some_slots()), expected, atol=0, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_that_drop_out_by_themselves_do_not_either(checkpointing):
    """OPT's blocks read their own mode, which transformers wants to be training for a block to be recomputed."""
    config = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5)
    backbone = FrozenBackbone(OPTForCausalLM(config).eval(), "last", checkpointing)
    ids_BT, mask_BT = batch()
    weights, gradients = torch.randn(2, 7, 32), []
    for mode in (False, True):
        slots = some_slots()
        hidden = backbone.train(mode)(ids_BT, mask_BT, slots)
        gradients.append(torch.autograd.grad((hidden * weights).sum(), slots.slots_LBKD)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_frozen_weight_gets_a_gradient(kind, checkpointing):
    backbone = FrozenBackbone(tiny_model(kind), "last", checkpointing).train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(*batch()).requires_grad, "without slots there is nothing to go backwards through"
    slots = some_slots()
    backbone(*batch(), slots)[:, 1:].square().sum().backward()
    assert slots.slots_LBKD.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


# ---- pooling and text-only states


def test_pooling_by_hand():
    """Positions 1 and 3 are text; 0 is a slot, 2 another, 4 is padding."""
    hidden_BTD = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [8.0, 8.0], [3.0, 6.0], [7.0, 7.0]]])
    text_BT = torch.tensor([[0, 1, 0, 1, 0]])
    assert pool_text(hidden_BTD, text_BT, "mean").tolist() == [[2.0, 4.0]]
    assert pool_text(hidden_BTD, text_BT, "last").tolist() == [[3.0, 6.0]]


def test_a_decoder_is_read_behind_its_first_token():
    backbone = FrozenBackbone(tiny_model("llama", blocks=1), "mean", sink=True)
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert backbone.read_mask(mask_BT).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    ids_BT = torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0]])
    words_BTD = backbone.model.get_input_embeddings()(ids_BT)
    expected_BD = torch.stack([words_BTD[0, 1:3].mean(0), words_BTD[1, 1]])
    torch.testing.assert_close(backbone.text_states(ids_BT, mask_BT, [0])[0], expected_BD)


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_states_are_the_pooled_hidden_states_entering_each_block(kind, pool):
    backbone = FrozenBackbone(tiny_model(kind, blocks=3), pool)
    hooks = [len(module._forward_pre_hooks) for module in backbone.modules()]
    ids_BT, mask_BT = batch()
    states_LBD = backbone.text_states(ids_BT, mask_BT, [2, 0])
    output = backbone.trunk(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True)
    for state_BD, block in zip(states_LBD, [2, 0], strict=True):
        torch.testing.assert_close(state_BD, pool_text(output.hidden_states[block], mask_BT, pool))
    assert not states_LBD.requires_grad
    with pytest.raises(IndexError):
        backbone.text_states(ids_BT, mask_BT, [0, 3])
    assert [len(module._forward_pre_hooks) for module in backbone.modules()] == hooks


def test_stored_text_states_do_not_depend_on_the_batch():
    """In any order, batch or company, each distinct text once; N, L, D as the shards keep it."""
    backbone = FrozenBackbone(tiny_model("bert"), "mean")
    rng = np.random.default_rng(0)
    prompts = [Encoded(rng.integers(5, 40, length).astype(np.int32), {"id": 1}) for length in (9, 3, 5, 7)]
    prompts.append(Encoded(prompts[1].tokens_T, {}))
    states_NLD = text_states(backbone, prompts, [0, 1], 0, dtype="float32", batch_size=2)
    assert states_NLD.shape == (5, 2, 32)
    np.testing.assert_array_equal(states_NLD[4], states_NLD[1])
    for prompt, state_LD in zip(prompts, states_NLD, strict=True):
        ids_BT = torch.from_numpy(prompt.tokens_T[None].astype(np.int64))
        alone = backbone.text_states(ids_BT, torch.ones_like(ids_BT), [0, 1])[:, 0]
        np.testing.assert_allclose(state_LD, alone.numpy(), atol=1e-6)
    half = text_states(backbone, prompts, [0, 1], 0)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, states_NLD.astype(np.float16))


def test_a_state_too_large_for_its_type_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e8)
    prompts = [Encoded(np.array([7, 8], np.int32), {})]
    with pytest.raises(UserError, match=r"float16\n.*shards\.state_dtype"):
        text_states(FrozenBackbone(model, "last"), prompts, [0], 0)
    assert text_states(FrozenBackbone(model, "last"), prompts, [0], 0, dtype="float32").max() > 65504


# ---- LoRA


def lora_weights(backbone, which):
    return [parameter for name, parameter in backbone.named_parameters() if f"lora_{which}." in name]


@pytest.mark.filterwarnings("error")
def test_a_model_with_lora_is_loaded_without_a_librarys_warnings(saved):
    load(saved / "bert", lora=Lora())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_its_own_weights_and_no_others(saved, kind, checkpointing):
    """B starts at zero, so A's gradient is zero until the first step has moved B."""
    loaded = load(saved / kind, lora=Lora(rank=4), gradient_checkpointing=checkpointing)
    backbone = loaded.backbone.train()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert loaded.identity["fingerprint"] == load(saved / kind).identity["fingerprint"], "the base is the same"

    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1.0)
    weights = torch.randn(2, 7, 32)
    for step in range(2):
        optimizer.zero_grad()
        (backbone(*batch()) * weights).sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in lora_weights(backbone, "B"))
        assert all((parameter.grad.abs().max() > 0) == bool(step) for parameter in lora_weights(backbone, "A"))
        optimizer.step()
    assert fingerprint(backbone.trunk, backbone.model.config) == loaded.identity["fingerprint"], (
        "nothing of the base has moved"
    )


def test_names_of_adapted_modules_are_written_in_one_order(saved, tmp_path):
    """PEFT keeps sets, whose order Python changes from process to process."""
    names = ["v_proj", "up_proj", "q_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
    load(saved / "llama", lora=Lora(targets=names)).backbone.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_lora_starts_at_the_frozen_model_and_its_states_stay_there(saved):
    ids_BT, mask_BT = batch()
    plain, loaded = load(saved / "llama").backbone, load(saved / "llama", lora=Lora(dropout=0.5)).backbone
    expected, states = plain(ids_BT, mask_BT), plain.text_states(ids_BT, mask_BT, [0, 1])
    torch.testing.assert_close(loaded(ids_BT, mask_BT), expected)
    with torch.no_grad():
        for parameter in lora_weights(loaded, "B"):
            parameter.fill_(0.5)
    moved = loaded(ids_BT, mask_BT)
    assert (moved - expected).abs().max() > 1e-2
    torch.testing.assert_close(loaded.train().text_states(ids_BT, mask_BT, [0, 1]), states)
    assert all(parameter.requires_grad for parameter in lora_weights(loaded, "A")), "switched on again, and training"
    assert not torch.equal(loaded(ids_BT, mask_BT), loaded(ids_BT, mask_BT)), "LoRA's own dropout follows the mode"
    torch.testing.assert_close(loaded.eval()(ids_BT, mask_BT), moved, atol=0, rtol=0)


def test_lora_beside_a_bfloat16_base_stays_float32_and_repeats_with_its_seed(saved):
    first, second = (load(saved / "llama", lora=Lora(), dtype="bfloat16").backbone for _ in range(2))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16, torch.float32}
    for weight, same in zip(lora_weights(first, "A"), lora_weights(second, "A"), strict=True):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, same)


def test_lora_leaves_out_what_no_readout_uses(saved):
    """It would never get a gradient, and so no moments, of which a checkpoint has all."""
    backbone = load(saved / "bert", lora=Lora(targets=["query", "dense"])).backbone
    names = [name for name, _ in backbone.named_parameters()]
    assert any("pooler" in name for name in names)
    assert any("dense.lora_A" in name for name in names)
    assert not any("pooler" in name and "lora" in name for name in names)


def test_lora_targets_that_are_not_there_are_refused(saved):
    with pytest.raises(UserError, match=r"lora\.targets"):
        load(saved / "llama", lora=Lora(targets=["nonesuch"]))
