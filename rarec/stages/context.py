"""What the stages share: the configuration, where things lie, and opening what earlier stages made."""

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import disable_progress_bar

from rarec.artefacts import MANIFEST, check_files, is_current, sha256_json
from rarec.config import VARIANTS, RunConfig, Variant, dump_config
from rarec.config.identity import baseline_of, prepare_settings, sources_of
from rarec.config.ids import Ids, Import
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.files import lock_file, try_lock, write_text
from rarec.ids.make import source_identity
from rarec.ids.source import Source, open_source
from rarec.models.build import SourceShape, slots_reserved
from rarec.models.language_model import LoadedModel, convert, load_model, with_adapter
from rarec.paths import RunPaths
from rarec.prompts import PromptPair
from rarec.world import World

if TYPE_CHECKING:
    from rarec.training.engines import Engine

Say = Callable[[str], None]
WAIT = 0.5
"""Seconds between looks at what another process is making."""

# Their own bars and notices say nothing of the user's run.
disable_progress_bar()
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed)\.")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass
class Context:
    """One run.

    Attributes:
        config: resolved.
        say: tells the user one line.
        fresh: replace what the stage made before.
        made: whether a stage found something to make.
    """

    config: RunConfig
    say: Say
    fresh: bool = False
    made: bool = field(default=False, init=False)
    _adapted: LoadedModel | None = field(default=None, init=False)

    @cached_property
    def paths(self) -> RunPaths:
        """Where the run's artefacts lie."""
        return RunPaths.of(self.config)

    @cached_property
    def world(self) -> World:
        """This process among those that the launcher started, if any."""
        from rarec.training.accelerator import (
            start_world,
        )  # late: it brings DeepSpeed, whose notices are silenced above

        return start_world(self.config)

    @cached_property
    def engine(self) -> "Engine":
        """What runs models on the ranks."""
        from rarec.training.accelerator import build_engine

        return build_engine(self.world, self.config)

    @property
    def main(self) -> Variant:
        """The variant that is exported and that the others are compared with.

        Raises:
            UserError: it is not among the trained ones.
        """
        name, trained = self.config.export.variant, self.config.train.variants
        if name not in trained:
            problem = f"field `export.variant`: {name} is not among train.variants ({', '.join(trained)})"
            raise UserError(problem, "add it to train.variants, or export one of them")
        return VARIANTS[name]

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The prepared dataset; it must have been made by the configuration as it is now."""
        is_current(self.paths.prepare, "prepare", prepare_settings(self.config.prepare, self.config.run.seed), {})
        return PreparedDataset.open(self.paths.prepare)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every source, `id` first; each must have been made from this dataset, by the configuration as it is now."""
        return {name: self._source(name, section) for name, section in sources_of(self.config).items()}

    @cached_property
    def baseline(self) -> Source:
        """The ID model that variants are compared and fused with: `id`, or the one trained on what `id` was not."""
        name, section = baseline_of(self.config)
        return self.sources["id"] if name == "id" else self._source(name, section)

    @property
    def shapes(self) -> dict[str, SourceShape]:
        """Of every source."""
        return {name: SourceShape(source.dim, source.vectors_per_user) for name, source in self.sources.items()}

    @cached_property
    def llm(self) -> LoadedModel:
        """The frozen language model, without LoRA."""
        config = self.config.llm
        self.world.run_on_main(lambda: convert(config, self.paths.llm))
        with self.engine.loading(config):
            device = self.world.device.type
            return load_model(config, self.paths.llm, pool=self.config.readout.pool, device=device)

    def load_llm(self, variant: Variant) -> LoadedModel:
        """The language model as a variant has it. It is in memory once, and is one variant's at a time."""
        self._adapted = with_adapter(
            self._adapted or self.llm, self.config.lora if variant.lora else None, self.config.run.seed
        )
        return self._adapted

    @cached_property
    def prompts(self) -> PromptPair:
        """Both prompts over the catalogue's titles."""
        reserved = slots_reserved(self.config, self.shapes)
        titles, texts = self.dataset.titles, self.dataset.texts
        llm = self.llm
        kind = llm.identity["kind"]
        pair = PromptPair(self.config.prompt, llm.tokenizer, titles, texts, reserved, llm.context_length, kind)
        named = {name for side in pair.sources.values() for name in side}
        for name in self.shapes:
            if name not in named and not (name == "id" and named):  # IDs may stand aside for another source
                problem = f"source {name!r} stands in neither prompt.user nor prompt.item"
                raise UserError(problem, f"write {{soft:{name}}} where its slots should go")
        return pair

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

    def is_done(self, directory: Path, kind: str, settings: Mapping[str, Any], made_from: Mapping[str, str]) -> bool:
        """Whether the stage's artefact is there already, made just so; never, if it is to be made fresh.

        If it is to be made, the resolved configuration is written to `config.yaml`. What stands there stays until the
        new artefact is whole.

        Raises:
            UserError: it is there, but made otherwise.
        """
        done = not self.fresh and is_current(directory, kind, settings, made_from)
        self.made |= not done
        if done:
            self.say(f"{directory} is there already, made with these settings")
        self.world.run_on_main(lambda: self._write_config(made=not done))
        return done

    def _write_config(self, made: bool) -> None:
        """As resolved. Where nothing is made, only in place of one that says it otherwise."""
        text, path = dump_config(self.config), self.paths.config
        if made or (path.exists() and path.read_text(encoding="utf-8") != text):
            write_text(path, text)

    @contextmanager
    def alone(self, directory: Path, whole: str = MANIFEST) -> Iterator[None]:
        """Make an artefact alone: another process that would make it too waits here, and then finds it done.

        What is there already is only read, and for that nobody waits; so nothing is locked.

        Args:
            directory: of the artefact.
            whole: the file in it that is written last.
        """
        with ExitStack() as stack:
            wanted = self.world.is_main and (self.fresh or not (directory / whole).exists())
            lock = directory.with_name(f".{directory.name}.lock")
            handle = stack.enter_context(lock_file(lock)) if wanted else None
            told = False
            # all ranks ask again and again: one long wait in an exchange would be taken for a stall
            while self.world.all_reduce_max(int(handle is not None and not try_lock(handle))):
                if not told:
                    self.say(f"{directory} is being made by another process: waiting for it")
                told = True
                self.world.report(f"waiting for {directory}")
                time.sleep(WAIT)
            yield

    def start_over(self, directory: Path) -> None:
        """With `fresh`, throw away what is made in place. Renamed first: half of it must not pass for the whole."""
        if self.fresh:
            self.world.run_on_main(lambda: _throw_away(directory))

    def _source(self, name: str, section: Ids | Import) -> Source:
        directory = self.paths.source(name)
        settings, made_from = source_identity(name, section, self.dataset, self.config.run.seed)
        is_current(directory, "ids", settings, made_from)
        source = open_source(directory)
        check_files(directory, source.manifest)
        return source


def _throw_away(directory: Path) -> None:
    if directory.exists():
        aside = directory.with_name(f".{directory.name}.aside-old")
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
        shutil.rmtree(aside)
