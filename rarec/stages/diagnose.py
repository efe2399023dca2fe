"""Alignment diagnostics of the main variant, while the evaluation has it loaded."""

from typing import Any

from rarec.evaluation.diagnostic_sample import SideSample
from rarec.evaluation.diagnostics import diagnose
from rarec.evaluation.health import warnings
from rarec.models.towers import RaRec
from rarec.stages.run import Run


def diagnostics(run: Run, model: RaRec) -> dict[str, Any] | None:
    """What diagnostics.json holds: `diagnose`'s figures, the variant, warnings; None where the variant has no slots.

    Text comes from the catalogue and from validation users: no test target is read. All ranks must ask.
    """
    if not model.user.slots and not model.item.slots:
        return None
    shared = (run.dataset, run.prompts, run.sources, run.config.run.seed)
    samples = [SideSample.of_users(*shared), SideSample.of_items(*shared)]
    figures = diagnose(model, samples, run.prompts.tokenizer, run.config.evaluate.batch_size, run.world)
    found = warnings(figures, run.config)
    for warning in found:
        run.say(f"alignment: {warning['text']}; {warning['advice']}")
    if not found:
        run.say("alignment: no sign of collapse")
    return {"variant": run.config.main_variant.name, **figures, "warnings": found}
