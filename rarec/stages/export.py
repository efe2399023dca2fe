"""`rarec export` and `rarec recommend`: the bundle that a user takes away, and its first use."""

from pathlib import Path

import numpy as np

from rarec.artefacts import sha256_json
from rarec.config.identity import bundle_settings
from rarec.errors import UserError
from rarec.files import read_json
from rarec.models.encode import Encoder
from rarec.ranking import EvalBatch, Ranker
from rarec.serving.bundle import Provenance, load_bundle, write_bundle
from rarec.stages.context import Context
from rarec.stages.trained import best_model, finished_evaluation, variant_hash
from rarec.training.finished import DONE


def provenance(context: Context) -> Provenance:
    """What lies in this run: hashes by name, the catalogue's own among them."""
    dataset = context.dataset
    catalogue = sha256_json([[str(i) for i in dataset.item_ids.to_pylist()], dataset.titles, dataset.texts])
    return Provenance({**context.inputs, "catalogue": catalogue}, context.llm.identity, context.shapes)


def export(context: Context) -> None:
    """Make `bundle/` from the variant `export.variant` at its best validation, with the evaluation's figures."""
    variant = context.main
    belongs = provenance(context)
    evaluation = finished_evaluation(context)
    made_from = {**belongs.inputs, "evaluate": evaluation["hash"], "train": variant_hash(context, variant)}
    if context.is_done(context.paths.bundle, "bundle", bundle_settings(context.config), made_from):
        return
    metrics = [row for row in read_json(context.paths.evaluation / "metrics.json") if row["variant"] == variant.name]
    count = read_json(context.paths.train(variant.name) / DONE)["trainable_parameters"]
    full = Provenance(made_from, belongs.llm, belongs.shapes)
    write_bundle(context.paths.bundle, best_model(context, variant), variant, context.config, full, metrics, count)
    size = sum(path.stat().st_size for path in context.paths.bundle.rglob("*") if path.is_file())
    context.say(f"{context.paths.bundle}: {count:,} trained parameters, {size / 1e6:.1f} MB")


def recommend(context: Context, user: str, k: int, bundle: Path | None = None) -> list[tuple[str, str]]:
    """The k best new items for a user of the prepared dataset, as (item id, title).

    Raises:
        UserError: the user is not in the dataset, or the bundle does not belong to this run's data and model.
    """
    dataset = context.dataset
    names = [str(value) for value in dataset.user_ids.to_pylist()]
    if user not in names:
        raise UserError(f"user {user!r} is not in {context.paths.prepare}", f"known ids look like {names[0]!r}")
    directory = bundle or context.paths.bundle
    model = load_bundle(directory, context.config, context.load_llm, provenance(context), context.prompts.sources)
    batch_size = context.config.evaluate.batch_size
    row = names.index(user)
    sequence = dataset.sequence(row)
    batch = EvalBatch(np.array([row]), [sequence], sequence[-1:])
    with context.engine.serving(model):
        encoder = Encoder(model, context.prompts, context.sources, batch_size, context.world)
        best = [int(item) for item in Ranker(encoder.items(), encoder.users).top_k(batch, k)[0] if item >= 0]
    return [(str(dataset.item_ids[item]), dataset.titles[item]) for item in best]
