"""What the stages share: the configuration, where things lie, and opening what earlier stages made."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rarec.artefacts import check_made_from, is_current, sha256_json, write_text
from rarec.config import Arm, RunConfig, dump_config
from rarec.data.dataset import PreparedDataset
from rarec.ids.source import Source, open_source
from rarec.models.build import SourceShape, slots_reserved
from rarec.models.load import LoadedModel, load_model
from rarec.paths import RunPaths
from rarec.prompts import PromptPair

Say = Callable[[str], None]

# Their own bars and notices say nothing of the user's run.
disable_progress_bar()
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass
class Context:
    """One run.

    Attributes:
        config: resolved.
        say: tells the user one line.
        fresh: replace what the stage made before.
    """

    config: RunConfig
    say: Say
    fresh: bool = False

    @cached_property
    def paths(self) -> RunPaths:
        """Where the run's artefacts lie; writes the resolved configuration there."""
        paths = RunPaths(Path(self.config.run.dir))
        write_text(paths.config, dump_config(self.config))
        return paths

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The prepared dataset."""
        return PreparedDataset.open(self.paths.prepare)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every source, `id` first; each must have been made from this prepared dataset."""
        return {name: self._source(name) for name in ("id", *self.config.sources)}

    @property
    def shapes(self) -> dict[str, SourceShape]:
        """Of every source."""
        return {name: SourceShape(source.dim, source.vectors_per_user) for name, source in self.sources.items()}

    @cached_property
    def llm(self) -> LoadedModel:
        """The frozen language model, without LoRA."""
        return self.load_llm(None)

    def load_llm(self, arm: Arm | None) -> LoadedModel:
        """The language model for an arm; those without LoRA share one."""
        if arm is not None and not arm.lora:
            return self.llm
        lora = self.config.lora if arm is not None else None
        seed = self.config.run.seed
        return load_model(self.config.llm, self.paths.llm, pool=self.config.readout.pool, lora=lora, seed=seed)

    @cached_property
    def prompts(self) -> PromptPair:
        """Both prompts over the catalogue's titles."""
        reserved = slots_reserved(self.config, self.shapes)
        titles, texts = self.dataset.titles, self.dataset.texts
        return PromptPair(self.config.prompt, self.llm.tokenizer, titles, texts, reserved, self.llm.context_length)

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the dataset, the sources and the language model: what shards and models are made from."""
        sources = {f"ids/{name}": source.hash for name, source in self.sources.items()}
        identity = {key: value for key, value in self.llm.identity.items() if key not in ("name", "revision")}
        return {
            "prepare": self.dataset.hash,
            **sources,
            "llm": sha256_json(identity),
            "prompt": self.prompts.fingerprint,
        }

    def settings(self, *sections: str, **more: Any) -> dict[str, Any]:
        """Sections of the configuration as plain JSON, with the seed."""
        tree = self.config.model_dump(mode="json")
        return {"seed": self.config.run.seed, **{section: tree[section] for section in sections}, **more}

    def is_done(self, directory: Path, kind: str, settings: Mapping[str, Any], made_from: Mapping[str, str]) -> bool:
        """Whether the stage's artefact is there already, made just so; with `fresh`, it is thrown away first.

        Raises:
            UserError: it is there, but made otherwise.
        """
        if self.fresh:
            shutil.rmtree(directory, ignore_errors=True)
        if not is_current(directory, kind, settings, made_from):
            return False
        self.say(f"{directory} is there already, made with these settings")
        return True

    def _source(self, name: str) -> Source:
        directory = self.paths.source(name)
        source = open_source(directory)
        check_made_from(directory, source.manifest, prepare=self.dataset.hash)
        return source
