"""Helpers of the tests of plans: tiny models, and large ones of which only config.json exists."""

from dataclasses import replace
from pathlib import Path

import yaml

from rarec.config import RunConfig
from rarec.models.build import SourceShape
from rarec.planning.calculator import Calculator
from rarec.planning.meta_model import MetaModelBuilder
from rarec.planning.setup import Cluster

D, F, V, E, M, BLOCKS, HEADS = 32, 64, 200, 6, 2, 2, 4
"""Sizes of the tiny Llama: hidden, feed-forward, vocabulary; dimension of the source, instructions, blocks, heads."""
SOURCES = {"id": SourceShape(E, 1)}
GPU = Cluster.of(1, 1, "80GB", "H100")
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def tree(llm: Path, /, **sections) -> dict:
    columns = {"interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"}}
    items = {"items": {"path": "items.csv", "item": "item", "title": "title"}}
    run = {"run": {"dir": str(llm.parent / "none")}, "prepare": {**columns, **items}, "llm": {"path": str(llm)}}
    own = {name: {**run.get(name, {}), **fields} for name, fields in sections.items()}
    return {**run, "ids": {"sasrec": {"dim": E}}, "alignment": {"instructions": M}, **own}


def calculator(llm: Path, /, **sections) -> Calculator:
    config = RunConfig.model_validate(tree(llm, **sections))
    return Calculator(config, MetaModelBuilder(config, SOURCES, Path("none")))


def written(directory: Path, llm: Path, /, **sections) -> Path:
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(tree(llm, **sections)))
    return path


def room(made: Calculator, total: int, **more) -> Cluster:
    """Return a cluster whose GPUs have room for exactly `total` bytes."""
    return replace(GPU, memory=round((total + 2e9) / 0.95) + 2, **more)
