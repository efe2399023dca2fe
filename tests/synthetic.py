"""Small worlds for the tests: a log whose next item is predictable from taste and titles, and tiny language models."""

import csv
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TASTES = ("river", "stone", "cloud", "ember")
KINDS = ("lamp", "chair", "shirt", "watch", "bag")


def title(item: int) -> str:
    """The first word is the item's taste, so titles carry what users follow."""
    return f"{TASTES[item % len(TASTES)]} {KINDS[item % len(KINDS)]} {item}"


def write_log(directory: Path, users: int = 60, items: int = 40, seed: int = 0) -> tuple[Path, Path]:
    """Write interactions.csv (user, item, time) and items.csv (item, title, brand); ids are strings."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    interactions, catalogue = directory / "interactions.csv", directory / "items.csv"
    popularity = 1 / np.arange(1, items + 1) ** 0.8
    taste_of = np.arange(items) % len(TASTES)
    with interactions.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "time"])
        for user in range(users):
            weights = popularity * np.where(taste_of == user % len(TASTES), 20.0, 1.0)
            count = int(rng.integers(6, 14))
            chosen = rng.choice(items, size=count, replace=False, p=weights / weights.sum())
            for step, item in enumerate(chosen):
                writer.writerow([f"u{user:03d}", f"i{item:03d}", 1_700_000_000 + 86_400 * step + user])
    with catalogue.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "title", "brand"])
        writer.writerows([f"i{item:03d}", title(item), TASTES[item % len(TASTES)].upper()] for item in range(items))
    return interactions, catalogue


def tiny_model(kind: str, blocks: int = 2, hidden: int = 32, vocabulary: int = 200, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised decoder, BERT, or ELECTRA with word embeddings narrower than its blocks."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocabulary, "num_hidden_layers": blocks, "hidden_size": hidden}
    rope = {**common, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * hidden}
    rope["max_position_embeddings"] = 128
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**rope)).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**rope, sliding_window=None)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**rope)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**rope, head_dim=hidden // 4)).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_layer=blocks, n_embd=hidden, n_head=4, n_positions=128)
        return GPT2LMHeadModel(config).eval()
    encoder = {**common, "num_attention_heads": 4, "intermediate_size": 2 * hidden, "max_position_embeddings": 128}
    if kind == "electra":
        return ElectraModel(ElectraConfig(**encoder, embedding_size=hidden // 2)).eval()
    assert kind == "bert", kind
    return BertModel(BertConfig(**encoder)).eval()


def tiny_tokenizer(encoder: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the synthetic titles; encoders get [CLS] and [SEP], decoders a <s>."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", ",", ".", ":", *TASTES, *KINDS]
    words += [taste.upper() for taste in TASTES] + [str(number) for number in range(60)]
    words += "Your task is to recommend the next product user may be interested based on their purchase history".split()
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if encoder:
        marks = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    else:
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def write_llm(directory: Path, kind: str = "bert", **shape: int) -> Path:
    """Save a tiny language model with its tokenizer, as a user would have one on disk."""
    tiny_model(kind, **shape).save_pretrained(directory)
    tiny_tokenizer(encoder=kind in ("bert", "electra")).save_pretrained(directory)
    return directory
