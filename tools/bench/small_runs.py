"""What benchmarks of training share: small runs over generated logs, language models, and the launcher."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rarec.config.method import Prompt
from tools.bench.measuring import log_section
from tools.make_log import make_log

ROOT = Path(__file__).resolve().parents[2]


def write_run(root: Path, log: dict[str, Any], prepare: dict[str, Any] | None = None, **sections: Any) -> Path:
    """Generate a log, and write the configuration of a run over it on the CPU; return the configuration's path.

    Args:
        root: gets `log` and `config.yaml`; the run will be in `run`.
        log: settings of `make_log`.
        prepare: further fields of that section.
        sections: other sections.
    """
    make_log(root / "log", **log)
    run = {"dir": str(root / "run"), "device": "cpu"}
    tree = {"run": run, "prepare": log_section(root / "log", **prepare or {}), **sections}
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def texts_of(root: Path) -> list[str]:
    """Return all texts of which the prompts of such a run are made."""
    catalogue = pq.read_table(root / "log" / "items.parquet")
    return [*(text for name in ("title", "brand") for text in catalogue[name].to_pylist()), Prompt().user]


def llama(hidden: int, inner: int, blocks: int, heads: tuple[int, int] = (32, 8), **others: Any) -> dict[str, Any]:
    """Return the shape of a Llama 3, whose heads are those of queries, and of keys and values."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks}
    own = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": hidden // heads[0]}
    return {"vocab_size": 128_256, "rope_theta": 500_000.0, **sizes, **own, **others}


def write_llama(directory: Path, texts: Iterable[str], **shape: Any) -> None:
    """Write a Llama with random weights, and a tokenizer of the words of these texts."""
    torch.manual_seed(0)
    words = write_tokenizer(directory, texts)
    LlamaForCausalLM(LlamaConfig(**{"vocab_size": words} | shape)).save_pretrained(directory)


def write_tokenizer(directory: Path, texts: Iterable[str]) -> int:
    """Save a tokenizer of the words of these texts; return the size of its vocabulary."""
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {word: token for token, word in enumerate(["<s>", "</s>", "<unk>", *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = split
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(directory)
    return len(vocabulary)


def launched(engine: str, ranks: int, *script: str | Path) -> list[str]:
    """Return the command that starts a script on so many ranks, by an engine of configs/accelerate."""
    file = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    ranks_of_it = ["--num_processes", str(ranks), "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *ranks_of_it]
    return [*launcher, *map(str, script)]


def local(parameters: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of this rank: whole parameters, or shards of FSDP2 or ZeRO-3."""
    parameters = list(parameters)
    whole = [p.to_local() if hasattr(p, "to_local") else p.data for p in parameters]
    return whole + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
