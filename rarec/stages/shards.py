"""`rarec shards`: select training samples, compute text-only states once, write the tars."""

from pathlib import Path
from typing import Any

from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import Manifest, sha256_json
from rarec.storage.directories import claim

LLM = ("path", "revision", "kind", "dtype", "quantize")
"""Fields of `llm` that say which weights, in which numbers; the rest says how they are computed with."""


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
        settings |= {"holdout": config.ids.held_out, "pool": config.readout.pool}
        settings |= {"instructions": config.alignment.instructions}
        del settings["shards"]["writers"]
        return settings

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        run = self.run
        sources = {f"ids/{name}": run.stage("ids", name) for name in run.config.sources_by_name}
        return {"prepare": run.stage("prepare"), **sources}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the language model and the prompt."""
        return self.run.model_inputs

    def location_key(self) -> object:
        """See `Stage`: the language model's name."""
        return self.run.config.llm.model_dump(mode="json", include=set(LLM))

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
        tars = map(tar_name, range(-(-content.total // run.config.shards.samples_per_shard)))
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
