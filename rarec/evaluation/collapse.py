"""Signs of a collapsed alignment: measures of slots and texts, and warnings with a field to change.

Shape letters: N vectors, K vectors of a source, D and E dimensions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarec.config import RunConfig
from rarec.evaluation.results import listed

Row = Mapping[str, Any]
Warned = dict[str, str]
ALIGNMENT_FIELDS = ("projection_cosine", "text_cosine", "projection_rank", "id_rank", "cka_before", "cka_after")
CONSTANT = 1e-14
"""Variance, as a share of the mean square, below which vectors count as all equal: float32 cannot resolve less."""
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


def alignment_values(p_NKD: Tensor, ids_NE: Tensor, text_ND: Tensor) -> dict[str, float | None]:
    """Return the values of `ALIGNMENT_FIELDS`, all None without projections p; several of a user are averaged."""
    if not p_NKD.numel():
        return dict.fromkeys(ALIGNMENT_FIELDS)
    p_ND = p_NKD.mean(1)
    cosines = mean_cosine(p_ND), mean_cosine(text_ND)
    ranks = effective_rank(p_ND), effective_rank(ids_NE)
    alignment = linear_cka(ids_NE, text_ND), linear_cka(p_ND, text_ND)
    return dict(zip(ALIGNMENT_FIELDS, (*cosines, *ranks, *alignment), strict=True))


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float | None:
    """Return the linear centred kernel alignment of two sets of N vectors (Kornblith et al., ICML 2019).

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels: 1 if one set is a scaled rotation of the other, about
    0 if they are unrelated. HSIC is estimated without bias (Song et al., JMLR 2012; as in Nguyen et al., ICLR 2021):
    the plain estimate grows by chance with the number of directions, so that sets before and after a map could not be
    compared.

    Returns:
        0 to 1, up to chance; None for fewer than four vectors, or if a set is constant or not finite. (Last-token
        states at block 0 are constant if all prompts end alike.)
    """
    if len(x_ND) < 4:
        return None
    x_NN, y_NN = _centred_gram(x_ND).fill_diagonal_(0), _centred_gram(y_NE).fill_diagonal_(0)
    x, y = _hsic(x_NN, x_NN), _hsic(y_NN, y_NN)
    return float(_hsic(x_NN, y_NN) / (x * y).sqrt()) if x > 0 and y > 0 else None


def effective_rank(x_ND: Tensor) -> float | None:
    """Return the effective rank of the centred vectors: exp of the entropy of the normalised singular values.

    Source: Roy and Vetterli, EUSIPCO 2007.

    Returns:
        1 to min(N - 1, D); 0 if the vectors are all equal, None if they are not finite.
    """
    gram_NN = _centred_gram(x_ND)
    if not gram_NN.isfinite().all():
        return None
    values_N = torch.linalg.eigvalsh(gram_NN)
    values_N = values_N[values_N > 1e-12 * values_N.max()].sqrt()  # smaller ones are rounding errors
    shares_N = values_N / values_N.sum()
    return float(torch.special.entr(shares_N).sum().exp()) if len(shares_N) else 0.0


def mean_cosine(x_ND: Tensor) -> float | None:
    """Return the mean cosine over all pairs of different vectors: 1 if all point in the same direction.

    Returns:
        -1 / (N - 1) to 1; None for fewer than two vectors, or if they are not finite.
    """
    count = len(x_ND)
    if count < 2 or not x_ND.isfinite().all():
        return None
    units_ND = F.normalize(x_ND.double(), dim=-1)
    return float((units_ND.sum(0).square().sum() - units_ND.square().sum()) / (count * (count - 1)))


def _centred_gram(x_ND: Tensor) -> Tensor:
    """Return the dot products (N, N) of the centred vectors in float64; zeros if the vectors are all equal."""
    x_ND = x_ND.double()
    centred_ND = x_ND - x_ND.mean(0)
    constant = centred_ND.square().sum() <= CONSTANT * x_ND.square().sum()
    return centred_ND @ centred_ND.T * ~constant


def _hsic(x_NN: Tensor, y_NN: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC, from kernels with a zero diagonal."""
    n = len(x_NN)
    whole = x_NN.sum() * y_NN.sum() / ((n - 1) * (n - 2))
    return ((x_NN * y_NN).sum() + whole - 2 / (n - 2) * (x_NN.sum(0) @ y_NN.sum(0))) / (n * (n - 3))


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
    for (side, source), group in groupby(diagnostics["blocks"], itemgetter("side", "source")):
        rows = list(group)
        for judge in (_norms, _spread, _rank, _cka):
            warned += judge(rows, f"{side} side, source {source}", config)
    for side, group in groupby(diagnostics["attention"], itemgetter("side")):
        warned += _attention(list(group), f"{side} side", config)
    return warned


def _norms(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    for name in ("projection", "instruction"):
        ratios = _ratios(rows, f"{name}_norm", "text_norm")
        long = [block for block, ratio in ratios.items() if ratio > NORM_FACTOR]
        short = [block for block, ratio in ratios.items() if ratio < 1 / NORM_FACTOR]
        if long:
            text = f"{name}s are up to {max(ratios.values()):.3g} times as long as the text's states"
            advice = f"lower {_now(config, 'train.lr_slots')} or raise {_now(config, 'train.weight_decay')}"
            yield _warned("norm", where, text, advice, long)
        if short:
            text = f"{name}s are down to {min(ratios.values()):.3g} times as long as the text's states"
            yield _warned("norm", where, text, _start(config), short)


def _spread(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    known = [row for row in rows if None not in (row["projection_cosine"], row["text_cosine"])]
    bad = [row for row in known if 1 - row["projection_cosine"] < MIN_SPREAD * (1 - row["text_cosine"])]
    if bad:
        worst = max(bad, key=itemgetter("projection_cosine"))
        cosines = f"mean cosine {worst['projection_cosine']:.6f}, that of their texts {worst['text_cosine']:.4f}"
        text = f"slots of different {worst['side']}s are nearly equal: {cosines} (block {worst['block']})"
        advice = f"raise {_now(config, 'loss.align_weight')}, whose contrast separates them, or {_start(config)}"
        yield _warned("alike", where, text, advice, [row["block"] for row in bad])


def _rank(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    ratios = _ratios(rows, "projection_rank", "id_rank")
    bad = [row for row in rows if ratios.get(row["block"], MIN_RANK) < MIN_RANK]
    if bad:
        worst = min(bad, key=itemgetter("projection_rank"))
        ranks = f"effective rank {worst['projection_rank']:.3g}, that of the ID vectors {worst['id_rank']:.3g}"
        text = f"projections vary in few directions: {ranks} (block {worst['block']})"
        advice = f"lower {_now(config, 'loss.align_temperature')}, for a sharper contrast, or {_start(config)}"
        yield _warned("flat", where, text, advice, [row["block"] for row in bad])


def _cka(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    """Judge the mean over blocks: in a single block projections may be less similar to the text than ID vectors."""
    known = [row for row in rows if None not in (row["cka_before"], row["cka_after"])]
    before, after = (mean(row[name] for row in known) if known else 0.0 for name in ("cka_before", "cka_after"))
    if known and after <= before:
        text = f"CKA with the text, mean over blocks, is {after:.3f}, not above the ID vectors' {before:.3f}"
        yield _warned(
            "cka", where, text, f"raise {_now(config, 'loss.align_weight')} or {_now(config, 'train.epochs')}"
        )


def _attention(rows: Sequence[Row], where: str, config: RunConfig) -> Iterator[Warned]:
    share, even = mean(row["share"] for row in rows), mean(row["even"] for row in rows)
    text = f"attention of the text on slots, mean over blocks, is {share:.4g} (even attention: {even:.4g})"
    if share < MIN_ATTENTION * even:
        yield _warned("unseen", where, f"{text}, nearly none", f"inject elsewhere (train.blocks), or {_start(config)}")
    if share > MAX_ATTENTION:
        advice = f"lower {_now(config, 'alignment.instructions')} or {_now(config, 'train.lr_slots')}"
        yield _warned("blinding", where, f"{text}, nearly all", advice)


def _warned(what: str, where: str, text: str, advice: str, blocks: Sequence[int] = ()) -> Warned:
    place = f"{where}, {_ranges(blocks)}" if blocks else where
    return {"what": what, "text": f"{place}: {text}", "advice": advice}


def _now(config: RunConfig, field: str) -> str:
    """Return a field with its value: `train.epochs (now 3)`."""
    value = attrgetter(field)(config)
    return f"{field} (now {value if isinstance(value, str) else format(value, 'g')})"


def _start(config: RunConfig) -> str:
    """Advise ridge initialisation, whose slots resemble the text's states, or to stay closer to it."""
    if config.alignment.init == "ridge":
        return f"lower {_now(config, 'train.lr_slots')}: training has moved far from the start"
    return f"set alignment.init: ridge (now {config.alignment.init}), which starts at the text's states"


def _ratios(rows: Iterable[Row], name: str, to: str) -> dict[int, float]:
    """Return one value relative to another, for the blocks that have both."""
    return {row["block"]: row[name] / row[to] for row in rows if row[name] is not None and row[to]}


def _ranges(blocks: Sequence[int]) -> str:
    """Return `block 3`, or `blocks 0, 2 to 5 and 7`."""
    numbered = groupby(enumerate(sorted(blocks)), lambda pair: pair[1] - pair[0])  # the same within a run
    runs = [[block for _, block in run] for _, run in numbered]
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"block{'s' if len(blocks) > 1 else ''} {listed(parts)}"
