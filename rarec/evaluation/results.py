"""Results: how rows are named, titled and ordered; and figures and paired comparisons, read back.

A row of the results is named `VARIANT`; `VARIANT+id` (late fusion: the ID model's score added); `VARIANT+id+cheap`
(the untrained baselines added as well: neighbour models and the log of the item's popularity; in earlier results
`+popularity`, that alone); `VARIANT+id+cheap+learned` (its best items in a learned order);
`VARIANT+id+cheap/without_PART`; `VARIANT/or_cheap` (for each user the better rank of the
variant and of `id_only+cheap`); `FUSION/refit` (its untrained baselines fitted on the validation interactions as well);
`VARIANT/SANITY_CHECK`; or `external:NAME` (ranks of another system). No row with a `/` can be deployed. This module
knows no ranks, and loads nothing heavy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from rarec.config.method import VARIANT_TITLES
from rarec.config.neighbours import neighbour_titles
from rarec.console.inert import inert
from rarec.neighbours.scores import NEW

ID_ONLY = "id_only"
FUSED = "+id"
CHEAP, POPULAR, LEARNED = "+cheap", "+popularity", "+learned"
ALL_CHEAP, POPULARITY = "cheap", "popularity"
"""Rows of the untrained baselines: fused, neighbour models and popularity; and of popularity alone."""
LATE_FUSION = "text_only" + FUSED
"""The strong baseline: scores of the language model without slots and of the ID model, added."""
TUNED_TEXT = "text_lora" + FUSED
"""The same with LoRA: what slots with LoRA must beat."""
EXTERNAL = "external:"
SANITY_CHECKS = {"shuffled_history": "shuffled history", "permuted_ids": "permuted IDs"}
WITHOUT, ORACLE, REFITTED = "/without_", "/or_cheap", "/refit"
MINUS = " - "
"""Between two rows whose difference is a row of strata.json."""
HEADLINE = ("hr@10", "hr@100", "ndcg@10", "mrr")
LISTED = 10
"""Length of the lists that these metrics describe, whether or not they hold the target."""
COVERAGE, NOVELTY, DISTANCE = LIST_METRICS = tuple(f"{name}@{LISTED}" for name in ("coverage", "novelty", "distance"))
FULL = "full"
"""The protocol: the full catalogue is ranked, without the user's earlier items; ties count against the model."""
GROUPS = (
    "Each variant alone",
    "With the ID model's score added (late fusion)",
    "With untrained baselines added as well (+ cheap): neighbour models and popularity",
    "Its best items in an order learned on validation users (+ learned)",
    "One part left out; untrained baselines refitted on validation; oracle: the better of two lists for each user",
    "Sanity checks",
)
"""Headings of the groups of rows, by `variant_group`."""
BOUNDS_GROUP, SANITY_GROUP = len(GROUPS) - 2, len(GROUPS) - 1
_ADDED = {"id": "ID"}


def baselines(rows: Iterable[str]) -> list[str]:
    """Return the baselines: the ID model, and text only + ID, without and with LoRA, as the run has it."""
    names = set(rows)
    return [ID_ONLY, *([row for row in (LATE_FUSION, TUNED_TEXT) if row in names] or [LATE_FUSION])]


def is_external(variant: str) -> bool:
    """Return True for a row of another system's ranks."""
    return variant.startswith(EXTERNAL)


def base_variant(variant: str) -> str:
    """Return the variant behind a row name: `per_layer` for `per_layer+id` and `per_layer/permuted_ids`."""
    return variant.partition("/")[0].partition("+")[0]


def variant_title(variant: str) -> str:
    """Return a row's title: `RA-Rec (per layer) + ID` for `per_layer+id`, `llara (external)` for `external:llara`."""
    if is_external(variant):
        return inert(f"{variant.removeprefix(EXTERNAL)} (external)")  # plots cannot draw every character
    name, _, change = variant.partition("/")
    base, *added = name.split("+")
    title = " + ".join([_titles().get(base, base), *(_ADDED.get(part, part) for part in added)])
    if variant.endswith(ORACLE):
        return f"oracle of {title} and {variant_title(ID_ONLY + CHEAP)}"
    if WITHOUT in variant:
        return f"{title}, without {part_title(change.removeprefix(WITHOUT[1:]))}"
    changes = {**SANITY_CHECKS, REFITTED[1:]: "refitted on validation"}
    return f"{title}, {changes.get(change, change)}" if change else title


def part_title(part: str) -> str:
    """Return the title of a part of a fusion, as `Evaluator` names it."""
    return _ADDED.get(part) or variant_title(part)


def title_in_sentence(variant: str) -> str:
    """Return a row's title with the article that a sentence needs: `the ID model`."""
    title = variant_title(variant)
    return f"the {title}" if variant == ID_ONLY else title


def variant_order(variant: str) -> tuple[int, int, str]:
    """Return a sort key: by group (see `variant_group`); within a group the ID model first, external systems last."""
    known = list(_titles())
    base = base_variant(variant)
    return variant_group(variant), known.index(base) if base in known else len(known), variant


def variant_group(variant: str) -> int:
    """Return the row's place in `GROUPS`."""
    if "/" in variant:
        return BOUNDS_GROUP if WITHOUT in variant or variant.endswith((ORACLE, REFITTED)) else SANITY_GROUP
    if variant.endswith(LEARNED):
        return 3
    return 2 if cheap_suffix(variant) else 1 if "+" in variant else 0


def cheap_suffix(variant: str) -> str:
    """Return `+cheap`, `+cheap+learned` or `+popularity` if the row's name ends so."""
    return next((suffix for suffix in (CHEAP, CHEAP + LEARNED, POPULAR) if variant.endswith(suffix)), "")


def metric_order(metric: str) -> tuple[str, int]:
    """Return a sort key: by family, then by cutoff as a number."""
    family, _, cutoff = metric.partition("@")
    return family, int(cutoff) if cutoff.isdigit() else 0


def primary_metric(metrics: Iterable[str]) -> str:
    """Return `ndcg@10` if it was computed, as is usual in the field; else another NDCG, else `mrr`."""
    ndcg = sorted((metric for metric in set(metrics) if metric.startswith("ndcg@")), key=metric_order)
    return "ndcg@10" if "ndcg@10" in ndcg else next(iter(ndcg), "mrr")


def headline_metrics(metrics: Iterable[str]) -> list[str]:
    """Return the headline metrics that were computed; if fewer than two were, the first four of all."""
    computed = set(metrics).difference(LIST_METRICS)
    headline = [metric for metric in HEADLINE if metric in computed]
    return headline if len(headline) > 1 else sorted(computed, key=metric_order)[:4]


def figure(value: float, signed: bool = False) -> str:
    """Format a metric without its leading zero: `.0533`, `+.0021`."""
    digits = f"{abs(value):.4f}".removeprefix("0")
    negative = value < 0 and float(digits) > 0
    return ("\N{MINUS SIGN}" if negative else "+" if signed else "") + digits


def tick(value: float, signed: bool = False) -> str:
    """Format a metric for an axis, without trailing zeros: `.05`, `+.02`, `0`."""
    text = figure(value, signed).rstrip("0").rstrip(".")
    return text if any(map(str.isdigit, text)) else "0"


def interval(low: float, high: float, signed: bool = False) -> str:
    """Format an interval for running text: `.0480 to .0588`."""
    return f"{figure(low, signed)} to {figure(high, signed)}"


def listed(parts: list[str]) -> str:
    """Join words: `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def sentence_case(text: str) -> str:
    """Return a text whose first letter is a capital."""
    return text[:1].upper() + text[1:]


def _titles() -> dict[str, str]:
    """Return the titles of all rows without `+` and `/`, in their order."""
    untrained = {POPULARITY: "popularity", NEW: "a new item", ALL_CHEAP: "untrained baselines (cheap)"}
    return {ID_ONLY: "ID model", **neighbour_titles(), **untrained, **VARIANT_TITLES}


Row = Mapping[str, Any]
Outcome = Literal["better", "worse", "inconclusive"]
MIN_DIFFERING = 6
"""Fewest users for whom two variants must differ: with fewer no sign test reaches 5%, though a bootstrap would."""


@dataclass(frozen=True)
class Finding:
    """A paired comparison of two variants on the same test users.

    Attributes:
        variant: row name of the variant that is judged.
        baseline: row name of what it is compared with.
        metric: such as `ndcg@10`.
        difference: mean over users of variant minus baseline.
        low: lower end of the difference's 95% interval.
        high: upper end.
        n: number of test users.
        differing: number of users for whom the two values are not equal.
    """

    variant: str
    baseline: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    differing: int

    @classmethod
    def of(cls, row: Row) -> "Finding":
        """Read a row of comparisons.json."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def swapped(self) -> "Finding":
        """The same comparison with variant and baseline exchanged."""
        names = self.baseline, self.variant, self.metric
        return Finding(*names, -self.difference, -self.high, -self.low, self.n, self.differing)

    @property
    def outcome(self) -> Outcome:
        """`better` or `worse` if the whole interval is above or below zero, else `inconclusive`.

        Also `inconclusive` where fewer than `MIN_DIFFERING` users differ.
        """
        if self.differing < MIN_DIFFERING:
            return "inconclusive"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "inconclusive"

    @property
    def reading(self) -> str:
        """The outcome in words."""
        return f"no significant difference (n={self.n:,})" if self.outcome == "inconclusive" else self.outcome

    @property
    def evidence(self) -> str:
        """The numbers behind the outcome."""
        size = figure(self.difference, signed=True)
        ends = interval(self.low, self.high, signed=True)
        return f"paired difference in {self.metric.upper()} {size}, 95% interval {ends}, n={self.n:,}"


Findings = Mapping[str, Finding | None]
"""Comparisons of one variant by baseline; None where the two were not compared."""


@dataclass(frozen=True)
class Results:
    """The figures of an evaluation.

    Attributes:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        validation: rows of validation.json, in the form of `metrics`: the rows that can be deployed.
    """

    metrics: Sequence[Row]
    comparisons: Sequence[Row] = ()
    validation: Sequence[Row] = ()

    @cached_property
    def cells(self) -> dict[tuple[str, str], Row]:
        """The rows of `metrics` under full ranking, by variant and metric."""
        return {(row["variant"], row["metric"]): row for row in self.metrics if row["protocol"] == FULL}

    @cached_property
    def primary(self) -> str:
        """The primary metric."""
        return primary_metric(metric for _, metric in self.cells)

    @cached_property
    def values(self) -> dict[str, float]:
        """The primary metric on test users, by variant."""
        return {variant: row["value"] for (variant, metric), row in self.cells.items() if metric == self.primary}

    @cached_property
    def findings(self) -> list[Finding]:
        """The comparisons under full ranking."""
        return [Finding.of(row) for row in self.comparisons if row["protocol"] == FULL]

    @cached_property
    def _by_pair(self) -> dict[tuple[str, str, str], Finding]:
        both = [finding for own in self.findings for finding in (own, own.swapped)]
        return {(finding.variant, finding.baseline, finding.metric): finding for finding in both}

    def find(self, variant: str, baseline: str, metric: str | None = None) -> Finding | None:
        """Return the comparison of two variants, in the primary metric by default, or None if there is none."""
        return self._by_pair.get((variant, baseline, metric or self.primary))

    def find_all(self, variant: str, others: Iterable[str], metric: str | None = None) -> Findings:
        """Return `find` for each of several baselines, but for the variant itself."""
        return {other: self.find(variant, other, metric) for other in others if other != variant}
