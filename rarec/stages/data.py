"""The stages before training: `rarec prepare`, `rarec ids`, `rarec neighbours` and `rarec shards`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rarec.config.ids import FOLD, IMPORTED_FILES, OLDER, Ids, Import, Recipe
from rarec.config.neighbours import REFIT, Neighbours, source_of
from rarec.errors import UserError, redacted_setting
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import PROGRESS, Manifest, sha256_json
from rarec.storage.directories import claim

if TYPE_CHECKING:
    from rarec.neighbours.base import Float32

COMPUTES = ("engine", "spark", "memory", "scratch")
"""Fields of `prepare` that say how the dataset is computed, not what it is: every engine gives the same."""
LLM_FIELDS = ("path", "revision", "kind", "dtype", "quantize")
"""Fields of `llm` that say which weights, in which numbers; the rest says how they are computed with."""


class PrepareStage(Stage):
    """Users, items, interactions, the split, and a manifest with the counts of every step."""

    name = "prepare"
    summary = "Logs to a prepared dataset: ids, order, split."
    shareable = True

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        config = self.run.config
        left_out: Any = {**dict.fromkeys(COMPUTES, True), "items": {"columns", "date"}}  # a bundle alone has these
        return {"seed": config.run.seed, "prepare": config.prepare.model_dump(mode="json", exclude=left_out)}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the log and of the catalogue."""
        from rarec.data.preparation.inputs import input_hashes

        return input_hashes(self.run.config.prepare)

    def location_key(self) -> object:
        """See `Stage`: where tables are known by their names, the engine that knows them."""
        config = self.run.config.prepare
        named = config.interactions.table or config.items.table
        return redacted_setting(config.engine) if named else None

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.data.preparation.pipeline import write_dataset

        run = self.run
        figures: dict[str, Any] = {}
        run.world.run_on_main(lambda: figures.update(write_dataset(run.config.prepare, directory, run.say)))
        return Built(figures)

    def verify(self, directory: Path) -> None:
        """Prove that nothing of validation, test or the future can enter training."""
        from rarec.data.dataset import PreparedDataset, check_no_leaks

        check_no_leaks(PreparedDataset.open(directory))


class IdsStage(Stage):
    """Vectors of one source: `id`, each of the configuration's `sources`, and of the ID models that samples read."""

    name = "ids"
    summary = "Train or import ID embeddings."
    claims = ("items.npy", "model.safetensors")
    shareable = True

    def __init__(self, run: Run, part: str) -> None:
        super().__init__(run, part)
        self.section: Ids | Import = run.config.vectors_by_name[part]
        self.chosen: Recipe | Import = self.section.chosen if isinstance(self.section, Ids) else self.section
        # An import is quick and built in a temporary directory, so one that is refused leaves nothing behind.
        self.resumable = isinstance(self.chosen, Recipe)

    @classmethod
    def parts(cls, run: Run) -> list[str]:
        """See `Stage`."""
        return list(run.config.vectors_by_name)

    def settings(self) -> dict[str, Any]:
        """See `Stage`: a recipe and the seed, or how an import makes its user vectors."""
        chosen = self.chosen
        config = self.run.config
        if isinstance(chosen, Recipe):
            section = cast(Ids, self.section)  # sources beside `id` have no recipe
            users = {"kind": section.model, **chosen.model_dump(mode="json")}
            settings = {"seed": config.run.seed, "holdout": section.held_out, "users": users}
            return settings if self._fold is None else {**settings, "fold": self._fold, "folds": section.folds}
        if chosen.users is not None:
            return {"missing": chosen.missing, "users": {"kind": "table"}}
        rule = {"rule": chosen.user_rule, "half_life": chosen.half_life, "max_history": chosen.max_history}
        return {"missing": chosen.missing, "users": {"kind": "rule", **rule}}

    @property
    def _fold(self) -> int | None:
        """The part of the users whose held-out interactions do not train this model; None for any other model."""
        return int(self.part.removeprefix(FOLD)) if self.part.startswith(FOLD) else None

    @property
    def _start(self) -> Stage | None:
        """The ID model that this one's training goes on from, if it does."""
        config = self.run.config
        goes_on = isinstance(self.chosen, Recipe) and self.part != OLDER and OLDER in config.vectors_by_name
        return self.run.stage("ids", OLDER) if goes_on else None

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        before = {"start": self._start} if self._start else {}
        if self._fold is not None:
            before["id"] = self.run.stage("ids", "id")
        return {"prepare": self.run.stage("prepare"), **before}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the files that vectors are imported from."""
        from rarec.ids.make import imported_hashes

        return imported_hashes(self.part, self.chosen) if isinstance(self.chosen, Import) else {}

    def location_key(self) -> object:
        """See `Stage`: the names of the source and of imported files."""
        chosen = self.chosen
        files = [getattr(chosen, field) for field in IMPORTED_FILES] if isinstance(chosen, Import) else []
        return [self.part, files]

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.ids.make import import_vectors

        run = self.run
        name, dataset = self.part, run.dataset
        figures: dict[str, Any] = {}
        match self.chosen:
            case Import() as chosen:
                made = (name, chosen, dataset, directory, run.config.run.seed, run.say)
                run.world.run_on_main(lambda: figures.update(import_vectors(*made)))
            case recipe:
                figures = self._train(recipe, directory)
        if not figures:  # of a rank that has only waited
            return Built()
        reached = figures["validation"]
        means = f"hr@10 {reached['hr@10']:.4f}, ndcg@10 {reached['ndcg@10']:.4f}"
        run.say(f"{self.part}: full ranking of {reached['n']} validation users: {means}")
        return Built({"name": self.part, **figures})

    def _train(self, recipe: Recipe, directory: Path) -> dict[str, Any]:
        """Train the ID model on all training interactions but those that are hidden from it; return its figures."""
        import numpy as np

        from rarec.data.shards.samples import fold_of
        from rarec.ids.trainer import KEPT, train_ids
        from rarec.storage.checkpoint_store import CheckpointStore

        run, section, start = self.run, cast(Ids, self.section), self._start
        dataset = run.dataset
        if self.part == OLDER:
            dataset = dataset.holding_out(section.held_out)
        elif self._fold is not None:
            own_U = fold_of(np.arange(dataset.n_users), section.folds) == self._fold
            dataset = dataset.holding_out(section.held_out, own_U)
            if dataset.n_users < section.folds:
                problem = f"{dataset.directory} has {dataset.n_users} users, fewer than ids.folds, {section.folds}"
                raise UserError(problem, "lower ids.folds")
            best = run.stage("ids", "id").require()["best_epoch"]
            recipe = recipe.model_copy(update={"epochs": best})  # as far as `id`, whose place it takes
        from_hash = start.hash if start else None
        identity = sha256_json([self.settings(), run.dataset.hash, from_hash])
        checkpoints = CheckpointStore(directory / PROGRESS, KEPT, identity)
        begin = start.directory if start else None
        return train_ids(dataset, recipe, run.config.run.seed, checkpoints, directory, run.say, run.world, begin)


class NeighboursStage(Stage):
    """The neighbour table of one model."""

    name = "neighbours"
    summary = "Count which items are neighbours: bought together, one after the other, alike in words or meaning."
    shareable = True

    @classmethod
    def parts(cls, run: Run) -> list[str]:
        """See `Stage`."""
        return run.config.neighbour_tables

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        refit = {"refit": True} if self.part.endswith(REFIT) else {}
        return {**table_settings(self.model_name, self.run.config.neighbours), **refit}

    @property
    def model_name(self) -> str:
        """The name of the model that the table is of."""
        return self.part.removesuffix(REFIT)

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        source = {f"ids/{self.source}": self.run.stage("ids", self.source)} if self.source else {}
        return {"prepare": self.run.stage("prepare"), **source}

    @property
    def source(self) -> str | None:
        """The source whose vectors make the table, if one does."""
        return source_of(self.run.config.neighbours.by_name[self.model_name])

    @property
    def reads_llm(self) -> bool:
        """Return whether the table is made from the language model's vectors of texts."""
        return bool(self.run.config.neighbours.class_of(self.model_name).reads_llm)

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: the hash of the language model, where it is read."""
        return {"llm": self.run.llm_hash} if self.reads_llm else {}

    def location_key(self) -> object:
        """See `Stage`: the language model's name, where it is read."""
        return self.run.config.llm.model_dump(mode="json", include=set(LLM_FIELDS)) if self.reads_llm else None

    def build(self, directory: Path) -> Built:
        """See `Stage`. A model that reads the language model leaves the vectors of the catalogue's texts as well."""
        import numpy as np

        from rarec.data.engines import open_engine
        from rarec.neighbours.base import VECTORS, write_table

        run = self.run
        config = run.config.neighbours
        dataset = run.dataset.refitted() if self.part.endswith(REFIT) else run.dataset
        n_items = dataset.n_items
        engine = partial(open_engine, run.config.prepare, directory / "spill")
        model = config.class_of(self.model_name)(config.config_of(self.model_name), engine)
        fits = n_items <= model.largest
        if model.reads_llm and fits:
            model.vectors_ND = self._text_vectors()
        elif self.source:
            model.vectors_ND = run.source(self.source).items_NE
        top = model.config.top

        def write() -> None:
            pairs = figures["pairs"] = write_table(model.rows(dataset) if fits else (), directory)
            if model.reads_llm and model.vectors_ND is not None:
                np.save(directory / VECTORS, model.vectors_ND, allow_pickle=False)
            lacking = model.needs if fits else f"more items than neighbours.{model.limit}"
            few = f"; all that there are, fewer than neighbours.top, {top:,}" if top >= n_items else ""
            note = few if pairs else f": {lacking}, so it will add nothing"
            run.say(f"{self.part}: {pairs:,} neighbours of {n_items:,} items{note}")

        figures: dict[str, int] = {}
        run.world.run_on_main(write)
        return Built(figures)

    def _text_vectors(self) -> "Float32":
        """Return the language model's vectors of titles and texts, (N, D); all ranks compute them."""
        from rarec.models.encode import text_vectors
        from rarec.neighbours.base import plain_texts

        run, dataset = self.run, self.run.dataset
        texts = list(plain_texts(dataset.titles, dataset.texts, dataset.untitled))
        run.world.report("reading the catalogue")
        with run.engine.serving(run.llm.backbone):
            return text_vectors(run.llm, texts, run.world, run.scratch)


class ShardsStage(Stage):
    """Tars of training samples with their text-only states, an index, item states, the selection's report."""

    name = "shards"
    summary = "Select training samples, cache text-only states, write shards."
    resumable = True
    shareable = True

    def settings(self) -> dict[str, Any]:
        """See `Stage`.

        Of other sections: what is held out, how states are pooled, and how many slots prompts keep free.
        """
        config = self.run.config
        settings: dict[str, Any] = {"seed": config.run.seed, **config.sections("shards", "prompt")}
        settings |= {"holdout": config.ids.held_out, "folds": len(config.ids.for_samples), "pool": config.readout.pool}
        settings |= {"instructions": config.alignment.instructions}
        del settings["shards"]["writers"]
        return settings

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        run = self.run
        names = dict.fromkeys([*run.config.ids.for_samples, *run.config.sources_by_name])
        sources = {f"ids/{name}": run.stage("ids", name) for name in names}
        return {"prepare": run.stage("prepare"), **sources}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the language model and the prompt."""
        return self.run.model_inputs

    def location_key(self) -> object:
        """See `Stage`: the language model's name."""
        return self.run.config.llm.model_dump(mode="json", include=set(LLM_FIELDS))

    def require(self, *, outside: bool = False) -> Manifest:
        """See `Stage`. If the shards are kept elsewhere, everything but their tars is fetched first."""
        self._fetch_description()
        return super().require(outside=outside)

    def make(self, fresh: bool = False) -> bool:
        """See `Stage`. Shards that are kept elsewhere were made elsewhere: only their description is fetched."""
        remote, directory = self.run.config.train.stream.remote, self.directory
        if not remote:
            return super().make(fresh)
        if fresh:
            self.run.world.run_on_main(lambda: self._fetch_description(fresh=True))
        self.require(outside=True)
        self.run.say(f"{directory} describes the shards at {remote}")
        return False

    def build(self, directory: Path) -> Built:
        """See `Stage`. Tars that an interrupted build has finished are kept."""
        from rarec.data.shards.files import INDEX, tar_name
        from rarec.stages.shard_content import ShardContent

        run = self.run
        content = ShardContent(run)
        identity = sha256_json([self.settings(), run.model_inputs, run.dataset.hash])
        tars = map(tar_name, range(len(content.places)))
        run.world.run_on_main(lambda: claim(directory, [INDEX, *content.sidecars, *tars]))
        figures, files = content.write(directory, identity, content.sidecars)
        cut = {"user": content.cut_users(), "item": run.prompts.cut["item"]}
        run.say(f"{content.total} samples in {len(figures['shards'])} shards")
        run.say(f"prompts cut to the context length: {cut['user']} of users, {cut['item']} of items")
        return Built({"state_blocks": content.blocks, "cut_prompts": cut, **figures}, files)

    def _fetch_description(self, fresh: bool = False) -> None:
        remote = self.run.config.train.stream.remote
        if remote:
            from rarec.data.shards.files import fetch_description

            fetch_description(remote, self.directory, fresh)


def table_settings(name: str, config: Neighbours) -> dict[str, Any]:
    """Return what shapes the table of a neighbour model."""
    return {"model": config.by_name.get(name, name), **config.config_of(name).model_dump(mode="json")}
