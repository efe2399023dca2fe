"""Alignment diagnostics of the main variant, while the evaluation has it loaded."""

from typing import Any

from rarec.evaluation.diagnostic_sample import SideSample
from rarec.evaluation.diagnostics import diagnose
from rarec.evaluation.health import warnings
from rarec.models.towers import RaRec
from rarec.stages.context import Context


def diagnostics(context: Context, model: RaRec) -> dict[str, Any] | None:
    """What diagnostics.json holds: `diagnose`'s figures, the variant, warnings; None where the variant has no slots.

    Text comes from the catalogue and from validation users: no test target is read. All ranks must ask.
    """
    if not model.user.slots and not model.item.slots:
        return None
    shared = (context.dataset, context.prompts, context.sources, context.config.run.seed)
    samples = [SideSample.of_users(*shared), SideSample.of_items(*shared)]
    figures = diagnose(model, samples, context.prompts.tokenizer, context.config.evaluate.batch_size, context.world)
    found = warnings(figures, context.config)
    for warning in found:
        context.say(f"alignment: {warning['text']}; {warning['advice']}")
    if not found:
        context.say("alignment: no sign of collapse")
    return {"variant": context.main.name, **figures, "warnings": found}
