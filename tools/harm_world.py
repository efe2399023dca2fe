"""A tiny world: a log, a language model, a configuration; runs over it that are new, half done and finished.

Every path in the configuration is relative, so that a state is copied as a whole and `rarec` runs inside the copy.
"""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harm_process import Command, Outcome, Server
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rarec.storage.artefacts import MANIFEST

CONFIG = """\
# a comment of the user's
run: {dir: run, device: cpu}
prepare:
  engine: duckdb
  interactions: {path: log/interactions.csv, user: user, item: item, time: time}
  items: {path: log/items.csv, item: item, title: title, text: [brand]}
ids: {holdout: 0.0, sasrec: {dim: 8, epochs: 4, negatives: 8, batch_size: 16, dropout: 0.0}}
llm: {path: llm}
shards: {samples_per_shard: 32}
train:
  {batch_size: 16, epochs: 1, validate_every: 3, variants: [text_only, per_layer], validation_users: 20, trackers: []}
evaluate: {resamples: 20}
report: {examples: 1}
"""
RUN = "run"
FOLDERS = {
    "prepare": ["prepare"],
    "ids": ["ids/id"],
    "neighbours": ["neighbours/cooccurrence", "neighbours/transition", "neighbours/ease", "neighbours/lexical"],
    "shards": ["shards"],
    "train": ["train/text_only", "train/per_layer"],
    "evaluate": ["evaluation"],
    "export": ["bundle"],
    "report": ["report"],
}
"""Directories in `run.dir`, by the stage that makes them."""
STAGES = list(FOLDERS)
WORDS = ["river", "stone", "cloud", "ember", "lamp", "chair", "shirt", "watch", "bag"]
HALF = {"ids": "ids/id", "shards": "shards", "train": "train/per_layer"}
"""Stages that resume, with the artefact that is killed right before its manifest is written."""


class World:
    """States of a run, each a directory that holds `log`, `llm`, `config.yaml`, and `run` where something was run.

    Args:
        root: where they are kept.
        server: runs the commands.
    """

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server = root, server
        self.copied = "new"
        """The state that was copied last."""
        write_inputs(self._state("new"))

    def state(self, name: str) -> Path:
        """Return a state, made when it is first asked for.

        Args:
            name: `new`; `finished`; `upto-STAGE`; `half-STAGE`, killed right before the manifest is written; or
                `half-fresh-STAGE`, the same of `--fresh` over a finished run.
        """
        if not self._state(name).exists():
            aside = self.root / f"{name}.aside"
            shutil.rmtree(aside, ignore_errors=True)
            self._make(name, aside)
            aside.rename(self._state(name))
        return self._state(name)

    def copy(self, name: str, place: Path) -> Path:
        """Copy a state; return the copy."""
        self.copied = name
        return self._copy(name, place)

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifest of each artefact of the finished run, by its directory in `run.dir`."""
        run = self.state("finished") / RUN
        return {folder: json.loads((run / folder / MANIFEST).read_bytes()) for folder in _folders(STAGES)}

    def _copy(self, name: str, place: Path) -> Path:
        return shutil.copytree(self.state(name), place, symlinks=True)

    def _state(self, name: str) -> Path:
        return self.root / name

    def _make(self, name: str, place: Path) -> None:
        kind, _, stage = name.rpartition("-")
        if name == "finished":
            self._copy("new", place)
            self.must(["run", "config.yaml"], place)
        elif kind == "upto":
            self._copy("finished", place)
            for folder in _folders(STAGES[STAGES.index(stage) + 1 :]):
                shutil.rmtree(place / RUN / folder)
        else:
            assert kind in ("half", "half-fresh"), name
            fresh = kind == "half-fresh"
            self._copy("finished" if fresh else f"upto-{STAGES[STAGES.index(stage) - 1]}", place)
            parent, _, last = HALF[stage].rpartition("/")
            folder = f"{parent}/.{last}.fresh".lstrip("/") if fresh else HALF[stage]
            words = [stage, "config.yaml", *["--fresh"] * fresh]
            kill = (signal.SIGKILL, 1, f"{folder}/{MANIFEST}")
            code = self.server.run(Command(words, str(place), kill=kill)).code
            assert code == -signal.SIGKILL, (name, code)

    def must(self, words: list[str], place: Path) -> Outcome:
        """Run a command that must succeed."""
        outcome = self.server.run(Command(words, str(place)))
        if outcome.code:
            raise RuntimeError(f"the undisturbed `rarec {' '.join(words)}` failed: {outcome.stderr}")
        return outcome


def _folders(stages: list[str]) -> Iterator[str]:
    return (folder for stage in stages for folder in FOLDERS[stage])


def next_stage(state: str) -> str:
    """Return the stage that a state comes to next; the last one, if it is finished."""
    if state == "new":
        return STAGES[0]
    done = STAGES[-1] if state == "finished" else state.removeprefix("upto-")
    return STAGES[min(STAGES.index(done) + 1, len(STAGES) - 1)]


def write_inputs(place: Path) -> None:
    """Write a log, a language model and a configuration."""
    (place / "log").mkdir(parents=True)
    generator = random.Random(0)
    rows = [
        f"u{user:02d},i{item:02d},{1_700_000_000 + 86_400 * step + user}"
        for user in range(30)
        for step, item in enumerate(generator.sample(range(24), generator.randint(6, 10)))
    ]
    (place / "log" / "interactions.csv").write_text("\n".join(["user,item,time", *rows, ""]))
    words = [(WORDS[item % 4], WORDS[4 + item % 5]) for item in range(24)]
    titles = [f"i{item:02d},{taste} {kind} {item},{taste.upper()}" for item, (taste, kind) in enumerate(words)]
    (place / "log" / "items.csv").write_text("\n".join(["item,title,brand", *titles, ""]))
    write_llm(place / "llm")
    (place / "config.yaml").write_text(CONFIG)


def write_llm(place: Path) -> None:
    """Write a BERT of two blocks with random weights, and a tokenizer of the catalogue's words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", ".", ":", *WORDS, *(word.upper() for word in WORDS[:4])]
    vocabulary = {word: index for index, word in enumerate([*words, *map(str, range(24))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(place)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=96, intermediate_size=32, **shape)
    BertModel(config).save_pretrained(place)
