"""Warnings about a collapsed alignment, each with the value behind it and a field to change."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from rarec.config import RunConfig
from rarec.evaluation.labels import listed

Row = Mapping[str, Any]
Warned = dict[str, str]
NORM_FACTOR = 5.0
"""Most that the median norm of slots may be above or below that of the text. A choice: ridge initialisation starts near
1. A post-norm block sees the norm; a pre-norm block divides it away."""
MIN_SPREAD = 0.01
"""Least 1 - mean cosine of the slots of different items, as a share of that of their texts. At .01 slots differ a tenth
as much as texts (it goes with the square). Even a poor ridge fit, of R^2 = .05, starts at .05."""
MIN_RANK = 0.1
"""Least effective rank of the projections, as a share of the ID vectors'. A linear map may favour directions that the
text also has; below a tenth, items that the ID model distinguishes share a slot."""
MIN_ATTENTION = 0.02
"""Least attention on slots, as a share of even attention, mean over blocks. Not higher, because in a healthy block an
attention sink may take nine tenths of all attention, which leaves the slots a tenth of their even share."""
MAX_ATTENTION = 0.9
"""Most attention on slots, mean over blocks: above it nearly none is left for the text."""


def warnings(diagnostics: Mapping[str, Any], config: RunConfig) -> list[Warned]:
    """Return the warnings about an alignment; none if it is healthy.

    Args:
        diagnostics: the results of `diagnose`.
        config: the run's configuration, whose values the advice names.

    Returns:
        For each `what`, the kind: `norm`, `alike` (slots hardly differ), `flat` (low rank), `cka`, `unseen` (little
        attention) or `blinding` (nearly all attention); `text`, the place and the value; `advice`, the field to change.
    """
    warned: list[Warned] = []
    for side, source in dict.fromkeys((row["side"], row["source"]) for row in diagnostics["blocks"]):
        rows = [row for row in diagnostics["blocks"] if (row["side"], row["source"]) == (side, source)]
        for judge in (_norms, _spread, _rank, _cka):
            warned += judge(rows, f"{side} side, source {source}", config)
    for side in dict.fromkeys(row["side"] for row in diagnostics["attention"]):
        rows = [row for row in diagnostics["attention"] if row["side"] == side]
        warned += _attention(rows, f"{side} side", config)
    return warned


def _norms(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    rate, decay = f"{config.train.lr_slots:g}", f"{config.train.weight_decay:g}"
    for name in ("projection", "instruction"):
        ratios = {row["block"]: _ratio(row[f"{name}_norm"], row["text_norm"]) for row in rows}
        long = {block: ratio for block, ratio in ratios.items() if ratio is not None and ratio > NORM_FACTOR}
        short = {block: ratio for block, ratio in ratios.items() if ratio is not None and ratio < 1 / NORM_FACTOR}
        if long:
            text = f"{name}s are up to {max(long.values()):.3g} times as long as the text's states"
            advice = f"lower train.lr_slots (now {rate}) or raise train.weight_decay (now {decay})"
            yield _warned("norm", f"{where}, {_ranges(long)}: {text}", advice)
        if short:
            text = f"{name}s are down to {min(short.values()):.3g} times as long as the text's states"
            yield _warned("norm", f"{where}, {_ranges(short)}: {text}", _start(config))


def _spread(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    known = [row for row in rows if None not in (row["projection_cosine"], row["text_cosine"])]
    bad = [row for row in known if 1 - row["projection_cosine"] < MIN_SPREAD * (1 - row["text_cosine"])]
    if bad:
        worst = max(bad, key=lambda row: float(row["projection_cosine"]))
        cosines = f"mean cosine {worst['projection_cosine']:.6f}, that of their texts {worst['text_cosine']:.4f}"
        text = f"slots of different {worst['side']}s are nearly equal: {cosines} (block {worst['block']})"
        advice = f"raise loss.align_weight (now {config.loss.align_weight:g}), whose contrast separates them, or"
        yield _warned("alike", f"{where}, {_ranges(row['block'] for row in bad)}: {text}", f"{advice} {_start(config)}")


def _rank(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    ratios = [(row, _ratio(row["projection_rank"], row["id_rank"])) for row in rows]
    bad = [row for row, ratio in ratios if ratio is not None and ratio < MIN_RANK]
    if bad:
        worst = min(bad, key=lambda row: float(row["projection_rank"]))
        ranks = f"effective rank {worst['projection_rank']:.3g}, that of the ID vectors {worst['id_rank']:.3g}"
        text = f"projections vary in few directions: {ranks} (block {worst['block']})"
        advice = f"lower loss.align_temperature (now {config.loss.align_temperature:g}), for a sharper contrast, or"
        yield _warned("flat", f"{where}, {_ranges(row['block'] for row in bad)}: {text}", f"{advice} {_start(config)}")


def _cka(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    """Judge the mean over blocks: in a single block projections may be less similar to the text than ID vectors."""
    both = [(row["cka_before"], row["cka_after"]) for row in rows if None not in (row["cka_before"], row["cka_after"])]
    before, after = (mean(side) for side in zip(*both, strict=True)) if both else (0.0, 1.0)
    if after <= before:
        text = f"{where}: CKA with the text, mean over blocks, is {after:.3f}, not above the ID vectors' {before:.3f}"
        weight, epochs = config.loss.align_weight, config.train.epochs
        yield _warned("cka", text, f"raise loss.align_weight (now {weight:g}) or train.epochs (now {epochs})")


def _attention(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    share, even = mean(row["share"] for row in rows), mean(row["even"] for row in rows)
    text = f"{where}: attention of the text on slots, mean over blocks, is {share:.4g} (even attention: {even:.4g})"
    if share < MIN_ATTENTION * even:
        yield _warned("unseen", f"{text}, nearly none", f"inject elsewhere (train.blocks), or {_start(config)}")
    if share > MAX_ATTENTION:
        advice = f"lower alignment.instructions (now {config.alignment.instructions}) or train.lr_slots"
        yield _warned("blinding", f"{text}, nearly all", f"{advice} (now {config.train.lr_slots:g})")


def _warned(what: str, text: str, advice: str) -> Warned:
    return {"what": what, "text": text, "advice": advice}


def _start(config: RunConfig) -> str:
    """Advise ridge initialisation, whose slots resemble the text's states, or to stay closer to it."""
    if config.alignment.init == "ridge":
        return f"lower train.lr_slots (now {config.train.lr_slots:g}): training has moved far from the start"
    return f"set alignment.init: ridge (now {config.alignment.init}), which starts at the text's states"


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


def _ranges(blocks: Iterable[int]) -> str:
    """Return `block 3`, or `blocks 0, 2 to 5 and 7`."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"block{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {listed(parts)}"
