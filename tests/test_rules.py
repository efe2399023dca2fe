"""A shop's rules by hand-made cases: conditions on columns, allow and deny, diversity, and what fills a list."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarec.bundle.conditions import matching
from rarec.bundle.recommended import Request
from rarec.bundle.rules import Asked, Rules, diversified
from rarec.errors import UserError

TIMES = pa.array([1_700_000_000_000_000, 1_710_000_000_000_000, None, 1_690_000_000_000_000], pa.timestamp("us"))
COLUMNS = {
    "in_stock": pa.array([True, False, None, True]),
    "category": pa.array(["lamp", "chair", "lamp", None]),
    "price": pa.array([9.5, 20.0, None, 20.0]),
    "size": pa.array([1, 2, 3, -4]),
    "released": TIMES,
    "in stock": pa.array(["a", "b", "it's", "d"]),
}


# ---- conditions


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("in_stock = true", [0, 3]),
        ("in_stock = TRUE and category in ('lamp', 'sofa')", [0]),
        ("not in_stock = true", [1]),  # of what is missing nothing is known, as in SQL
        ("in_stock <> true or category = 'lamp'", [0, 1, 2]),
        ("category is null", [3]),
        ("category is not null and not (size = 2)", [0, 2]),
        ("category not in ('lamp')", [1]),
        ("price >= 20", [1, 3]),
        ("20 <= price", [1, 3]),
        ("10 > price", [0]),
        ("size = -4", [3]),
        ("size < 2.5 and size > 0", [0, 1]),
        ("size < price", [0, 1, 3]),
        ("released < '2024-01-01'", [0, 3]),
        ("released >= '2024-03-09 16:00:00'", [1]),
        ("category < 'd'", [1]),
        ("\"in stock\" = 'it''s'", [2]),
        ("size in (1, 3, 7)", [0, 2]),
        ("((size = 1))", [0]),
    ],
)
def test_a_condition_is_computed_as_in_sql(condition, rows):
    assert np.flatnonzero(matching(condition, COLUMNS)).tolist() == rows


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("in_stok = true", r"no column 'in_stok'; did you mean `in_stock`\?"),
        ('category = "lamp"', r"no column 'lamp'.*\n.*single quotes: 'lamp'"),
        ("category = 'lamp", "quotation mark is not closed"),
        ('"category = 1', "quotation mark is not closed"),
        ("category =", "no condition"),
        ("", "one condition|no condition"),
        ("size = 1; drop table items", "one condition|no condition"),
        ("size = 1 -- and more", "comments"),
        ("lower(category) = 'lamp'", r"LOWER\(category\) is no part|is compared with"),
        ("size = abs(-1)", r"ABS\(-1\) is no part"),
        ("size in (select 1)", "is no part"),
        ("exists (select 1)", "is no part"),
        ("size = 1 + 1", "is no part"),
        ("category like 'l%'", "is no part"),
        ("size between 1 and 2", "is no part"),
        ("items.size = 1", "is no part"),
        ("size::text = '1'", "is no part|is compared with"),
        ("case when size = 1 then true end", "is no part"),
        ("in_stock", "is no part"),
        ("true", "is no part"),
        ("1 = 1", "compared with"),
        ("size = ?", "is no part"),
        ("size = $x", "is no part"),
        ("size = null", "compared with null\n.*is null"),
        ("size is true", "is no part"),
        ("size = '1'", "size holds a number"),
        ("category = 1", "category holds text"),
        ("in_stock = 1", "in_stock holds true or false"),
        ("released < 'soon'", "released holds a time"),
        ("released < 5", "released holds a time"),
        ("category = size", "category holds text"),
        ("size = 99999999999999999999", "size holds a number"),
        ("price = 1" + " or price = 1" * 900, "characters|too deeply"),
        ("(" * 3000 + "size = 1" + ")" * 3000, "too deeply|no condition"),
        ("__import__('os').system('true')", "is no part|no condition"),
    ],
)
def test_anything_else_is_refused_with_one_clear_error(condition, problem):
    with pytest.raises(UserError, match=problem) as refused:
        matching(condition, COLUMNS)
    assert refused.value.remedy
    assert "\n" not in refused.value.problem


def test_without_columns_it_is_said_how_to_add_some():
    with pytest.raises(UserError, match="rarec items update"):
        matching("a = 1", {})


NUMBERS = st.sampled_from(["-1", "0", "1", "2.5"])
WORDS = st.sampled_from(["'a'", "'b'", "''"])
SIGNS = st.sampled_from(["=", "<>", "<", "<=", ">", ">="])
ATOMS = st.one_of(
    st.tuples(st.sampled_from(["i", "f"]), SIGNS, NUMBERS).map(" ".join),
    st.tuples(NUMBERS, SIGNS, st.sampled_from(["i", "f"])).map(" ".join),
    st.tuples(st.just("t"), SIGNS, WORDS).map(" ".join),
    st.tuples(st.just("b"), st.sampled_from(["=", "<>"]), st.sampled_from(["true", "false"])).map(" ".join),
    st.tuples(st.sampled_from(["i < f", "f = i", "t is null", "b is not null", "i is null"])).map(" ".join),
    st.lists(WORDS, min_size=1, max_size=3).map(lambda words: f"t in ({', '.join(words)})"),
    st.lists(NUMBERS, min_size=1, max_size=3).map(lambda numbers: f"i not in ({', '.join(numbers)})"),
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        inner.map("not ({})".format),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map("({0[0]}) {0[1]} {0[2]}".format),
    ),
    max_leaves=6,
)


@given(CONDITIONS)
def test_any_condition_chooses_what_a_database_would(condition):
    table = pa.table(
        {
            "i": pa.array([-1, 0, 1, None, 2, 1], pa.int64()),
            "f": pa.array([0.0, None, 2.5, 1.0, -1.0, 1.0]),
            "t": pa.array(["a", "b", None, "", "a", "c"]),
            "b": pa.array([True, False, None, True, None, False]),
        }
    )
    with duckdb.connect() as database:
        database.register("items", table.append_column("row", pa.array(range(6))))
        expected = [
            row for (row,) in database.execute(f"select row from items where {condition} order by row").fetchall()
        ]
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    assert np.flatnonzero(matching(condition, columns)).tolist() == expected


# ---- diversity


def test_the_next_item_is_the_most_relevant_that_is_least_alike():
    """Relevance 1, .75, .5, 0; the second is the first again, the third and the fourth are at right angles to it."""
    scores = np.array([9, 8, 7, 5], np.float32)
    vectors = np.array([[2, 0], [1, 0], [0, 3], [0, 1]], np.float32)
    assert diversified(scores, vectors, 4, 0.0).tolist() == [0, 1, 2, 3]
    # after the first: .375 - .5, .25 - 0, 0 - 0; then .375 - .5, 0 - .5
    assert diversified(scores, vectors, 4, 0.5).tolist() == [0, 2, 1, 3]
    assert diversified(scores, vectors, 2, 0.5).tolist() == [0, 2]
    # after the first: .675 - .1, .45, 0; then .45, 0
    assert diversified(scores, vectors, 4, 0.1).tolist() == [0, 1, 2, 3]
    assert diversified(scores, vectors, 4, 1.0).tolist()[:2] == [0, 2]


def test_equal_scores_and_zero_vectors_keep_the_order():
    assert diversified(np.ones(3, np.float32), np.zeros((3, 2), np.float32), 3, 0.7).tolist() == [0, 1, 2]
    assert diversified(np.empty(0, np.float32), np.empty((0, 2), np.float32), 3, 0.7).tolist() == []


@given(st.integers(1, 12), st.integers(1, 15), st.floats(0, 1), st.integers(0, 99))
def test_it_is_the_formula_written_out(count, k, share, seed):
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.normal(size=count).astype(np.float32))[::-1]
    vectors = rng.normal(size=(count, 3)).astype(np.float32)
    relevance = (scores - scores.min()) / ((scores.max() - scores.min()) or 1)
    cosines = (vectors @ vectors.T) / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    chosen = diversified(scores, vectors, k, share).tolist()
    assert len(set(chosen)) == len(chosen) == min(k, count)
    for place, item in enumerate(chosen[1:], start=1):
        left = [other for other in range(count) if other not in chosen[:place]]
        worth = {other: (1 - share) * relevance[other] - share * cosines[other, chosen[:place]].max() for other in left}
        assert worth[item] == pytest.approx(max(worth.values()), abs=1e-5)


# ---- plans


IDS = ["a", "b", "c", 7]
COUNTS = np.array([5, 9, 9, 1])
VECTORS = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], np.float32)


def rules(**changes):
    given = {"ids": IDS, "counts_N": COUNTS, "columns": COLUMNS, "date": "released", "vectors_NE": VECTORS}
    return Rules(**{**given, **changes})


def listed(rows, scores, history=(), own=None, **asked):
    (plan,) = (own or rules()).plans([Request((), **asked)], [np.array(history, np.int64)])
    got_rows, got_scores = plan.listed(np.array(rows, np.int64), np.array(scores, np.float32))
    return list(zip(got_rows.tolist(), got_scores.tolist(), strict=True))


@pytest.mark.parametrize(
    ("asked", "excluded", "unknown"),
    [
        ({}, [], []),
        ({"allow": ["a", "7"]}, [1, 2], []),
        ({"allow": []}, [0, 1, 2, 3], []),
        ({"deny": [7, "b"]}, [1, 3], []),
        ({"allow": ["a", "x", "c"], "deny": ["c", 8, "x"]}, [1, 2, 3], ["x", 8]),
        ({"allow": ["x"]}, [0, 1, 2, 3], ["x"]),
        ({"where": "in_stock = true"}, [1, 2], []),
        ({"where": "size > 0", "allow": ["a", 7], "deny": ["b"]}, [1, 2, 3], []),
    ],
)
def test_what_may_not_be_returned(asked, excluded, unknown):
    (plan,) = rules().plans([Request((), **asked)], [np.array([0])])
    assert ([] if plan.excluded_N is None else np.flatnonzero(plan.excluded_N).tolist()) == excluded
    assert plan.unknown == unknown


def test_an_empty_history_gets_what_is_popular_unless_it_is_said_otherwise():
    """Equal counts: as in the catalogue. Without a date: last."""
    assert listed([], []) == [(1, 0), (2, 0), (0, 0), (3, 0)]
    assert listed([], [], fallback="recent") == [(1, 0), (0, 0), (3, 0), (2, 0)]
    assert listed([], [], fallback="popularity", k=2, deny=["b"]) == [(2, 0), (0, 0)]
    assert listed([], [], fallback="none") == []
    (plan,) = rules().plans([Request((), fallback="none")], [np.array([], np.int64)])
    assert plan.candidates == 10
    (plan,) = rules().plans([Request(())], [np.array([], np.int64)])
    assert plan.candidates == 0


def test_a_list_of_neighbours_is_filled_where_they_say_nothing():
    """The model lists item 3 alone; the others have 0. The history is 1."""
    own = rules(lists=True)
    assert listed([3, 0, 2, -1], [2.0, 0.0, 0.0, -np.inf], [1], own) == [(3, 2), (2, 0), (0, 0)]
    assert listed([3, 0, 2, -1], [2.0, 0.0, 0.0, -np.inf], [1], own, exclude_seen=False)[1:] == [(1, 0), (2, 0), (0, 0)]
    assert listed([3, 0, 2, -1], [2.0, 0.0, 0.0, -np.inf], [1], own, fallback="none") == [(3, 2)]
    assert listed([3, 0], [2.0, 0.0], [1], own, k=2, where="size = 3 or size = -4") == [(3, 2), (2, 0)]
    assert listed([3, 0, 2], [2.0, 0.0, -1.0], [1]) == [(3, 2), (0, 0), (2, -1)]  # a model that scores all


def test_what_is_read_and_left_out_is_as_the_row_was_evaluated():
    own = rules(asked=Asked(exclude_seen=False, max_history=2))
    histories, unknown = own.rows([["a", "b", "x", 7], [], ["c"]])
    assert [history.tolist() for history in histories] == [[1, 3], [], [2]]
    assert unknown == [1, 0, 0]
    for exclude, seen in ((None, []), (False, []), (True, [1, 3])):
        (plan,) = own.plans([Request((), exclude_seen=exclude)], histories[:1])
        assert plan.seen.tolist() == seen


def test_diversity_reads_more_items_than_it_returns():
    for k, candidates in ((1, 100), (10, 100), (50, 500), (200, 1000), (5000, 5000)):
        (plan,) = rules().plans([Request((), k, diversify=0.5)], [np.array([1])])
        assert plan.candidates == candidates
    # after item 0: item 1 has .375 - .5, item 2 has .25
    assert listed([0, 1, 2, 3], [9, 8, 7, 5], [1], k=2, diversify=0.5, exclude_seen=False) == [(0, 9), (2, 7)]
    assert listed([0, 1, 2, 3], [9, 8, 7, 5], [1], k=2, diversify=0.0) == [(0, 9), (1, 8)]


@pytest.mark.parametrize(
    ("asked", "changes", "problem"),
    [
        ({"k": 0}, {}, "k is 0"),
        ({"diversify": 2}, {}, "diversify is 2"),
        ({"diversify": -0.1}, {}, r"diversify is -0\.1"),
        ({"diversify": float("nan")}, {}, "diversify is nan"),
        ({"diversify": 0.5}, {"vectors_NE": None}, "no item vectors"),
        ({"deny": "sku-1"}, {}, "lists of item ids, not 'sku-1'"),
        ({"fallback": "best"}, {}, "fallback is 'best'\n.*popularity, recent, none"),
        ({"fallback": "recent"}, {"date": None}, "no dates\n.*prepare.items.date"),
        ({"where": "colour = 'red'"}, {}, "no column 'colour'"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(asked, changes, problem):
    with pytest.raises(UserError, match=problem) as refused:
        rules(**changes).plans([Request((), **asked)], [np.array([0])])
    assert refused.value.remedy
