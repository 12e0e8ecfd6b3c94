"""What is read from plans, and shown of statements."""

from __future__ import annotations

from benchmarks.growth import Found, compare, parse_plans, scans, shorten

LOG = (
    "q=0:LOG:  database system is ready to accept connections\n"
    'q=-12:LOG:  duration: 0.02 ms  plan:\n\t{"Plan": {\n\t  "Node Type": "Result"\n\t}}\n'
    "q=5:LOG:  duration: 0.01 ms\n"
    'q=7:LOG:  duration: 0.02 ms  plan:\n\t{"Plan": \n'
)


def test_plans_are_read_from_the_log_with_their_query() -> None:
    # The last one is cut off.
    assert list(parse_plans(LOG)) == [(-12, {"Plan": {"Node Type": "Result"}})]


def test_a_plan_names_its_indexes_and_the_tables_that_it_reads_all_of() -> None:
    plan = {
        "Node Type": "Nested Loop",
        "Plans": [
            {"Node Type": "Seq Scan", "Relation Name": "conductor_app_step"},
            {
                "Node Type": "Bitmap Heap Scan",
                "Relation Name": "conductor_app_execution",
                "Plans": [{"Node Type": "Bitmap Index Scan", "Index Name": "conductor_ex_waiting"}],
            },
            {"Node Type": "Index Scan", "Relation Name": "x", "Index Name": "conductor_app_execution_pkey"},
        ],
    }
    assert scans(plan) == {"all of step", "conductor_ex_waiting", "execution_pkey"}


def test_statements_are_shortened_to_what_tells_them_apart() -> None:
    select = 'SELECT "conductor_app_execution"."id",\n "x" FROM "conductor_app_execution" WHERE status = $1'
    assert shorten(select) == "SELECT … FROM execution WHERE status = $1"
    assert shorten('INSERT INTO "conductor_app_step" ("id") VALUES ($1)') == "INSERT INTO step …"
    assert shorten("SELECT a || b") == "SELECT a // b"
    assert shorten("UPDATE x SET " + "y" * 200, 20) == "UPDATE x SET yyyyyy…"


def test_statements_that_touch_the_most_come_first() -> None:
    empty = Found(5, 2, 1, 0, 10, 0, {"a": (1, 0.1, 3.0)}, {}, None)
    full = Found(6, 2, 1, 0, 900, 0, {"a": (2, 0.2, 4.0), "b": (1, 30.0, 800.0)}, {"b": "all of step"}, 9)
    rows, statements = compare(empty, full)
    assert rows[0] == ["W1, p50 ms", "5.00", "6.00"]
    assert statements[1:] == [
        ["b", "1", "– → 30.0", "– → 800", "all of step"],
        ["a", "2", "0.10 → 0.20", "3.00 → 4.00", "–"],
    ]
