"""Names and figures as people read them, and the one order in which variants are shown.

A variant's row is named `VARIANT`, `VARIANT+id` (its score and the ID model's, added: late fusion), `VARIANT+id+popularity` (and that
of popularity), or `VARIANT/PROBE`.
"""

from collections.abc import Iterable

from rarec.config import VARIANTS

ID_ONLY = "id_only"
FUSED = "+id"
POPULAR = "+popularity"
LATE_FUSION = "text_only" + FUSED
"""The honest baseline: scores of the language model without slots and of the ID model, added."""
SANITY_CHECKS = {"shuffled_history": "shuffled history", "permuted_ids": "permuted IDs"}
HEADLINE = ("hr@10", "hr@100", "ndcg@10", "mrr")
FULL = "full"
_ADDED = {"id": "ID"}
_TITLES = {ID_ONLY: "ID model"} | {name: variant.title for name, variant in VARIANTS.items()}
_MINUS = "\N{MINUS SIGN}"


def base_variant(variant: str) -> str:
    """The variant behind a row's name: `per_layer` for `per_layer+id` and `per_layer/permuted_ids`."""
    return variant.partition("/")[0].partition("+")[0]


def variant_title(variant: str) -> str:
    """`per_layer+id` as `RA-Rec (per layer) + ID`; names that are not known stay as they are."""
    name, _, sanity_check = variant.partition("/")
    base, *added = name.split("+")
    title = " + ".join([_TITLES.get(base, base), *(_ADDED.get(each, each) for each in added)])
    return f"{title}, {SANITY_CHECKS.get(sanity_check, sanity_check)}" if sanity_check else title


def variant_order(variant: str) -> tuple[int, int, str]:
    """Sorts plain variants first, then late fusions, those with popularity, sanity checks; in each, the ID model before all."""
    known = list(_TITLES)
    base = base_variant(variant)
    return variant_group(variant), known.index(base) if base in known else len(known), variant


def variant_group(variant: str) -> int:
    """0: a variant, 1: a late fusion, 2: one with popularity as well, 3: a sanity check."""
    return 3 if "/" in variant else 2 if variant.endswith(POPULAR) else 1 if "+" in variant else 0


def metric_title(metric: str) -> str:
    """`ndcg@10` as `NDCG@10`."""
    return metric.upper()


def metric_order(metric: str) -> tuple[str, int]:
    """Sorts by family, then by cutoff as a number."""
    family, _, cutoff = metric.partition("@")
    return family, int(cutoff) if cutoff.isdigit() else 0


def primary_metric(metrics: Iterable[str]) -> str:
    """NDCG@10, as the field compares models; where it was not computed, another NDCG, or MRR."""
    there = sorted(set(metrics), key=metric_order)
    if "ndcg@10" in there:
        return "ndcg@10"
    return next((metric for metric in there if metric.startswith("ndcg@")), "mrr")


def figure(value: float, signed: bool = False, decimals: int = 4) -> str:
    """Without the leading zero, as the field prints its metrics: `.0533`, `+.0021`."""
    digits = f"{abs(value):.{decimals}f}".removeprefix("0")
    negative = value < 0 and float(digits) > 0
    return (_MINUS if negative else "+" if signed else "") + digits


def tick(value: float, signed: bool = False) -> str:
    """`figure` without the zeros at its end: `.05`, `+.02`, `0`."""
    text = figure(value, signed).rstrip("0").rstrip(".")
    return text if any(map(str.isdigit, text)) else "0"


def interval(low: float, high: float, signed: bool = False) -> str:
    """`.0480 to .0588`, for running text."""
    return f"{figure(low, signed)} to {figure(high, signed)}"


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
