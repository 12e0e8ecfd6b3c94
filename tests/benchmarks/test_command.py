"""The command's arguments, and what it plans to run."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import check_same, parse
from benchmarks.measure import workloads
from benchmarks.peers import ALL
from benchmarks.results import Results
from benchmarks.systems.base import PARALLEL, SEQUENCE, TRIVIAL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "nobody"], "'nobody' is not known. There are: conductor-rabbitmq"),
        (["--workloads", "W9"], "'W9' is not known. There are: W1,"),
        (["--profile", "W9"], "'W9' is not known"),
        (["--baseline", "nobody"], "'nobody' is not known"),
        (["--pool", "gevent:9"], "no pool and concurrency"),
        (["--pool", "solo"], "no pool and concurrency"),
        (["--rounds", "0"], "above zero"),
        (["--scale", "0"], "above zero"),
    ],
)
def test_what_is_not_there_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_the_defaults_measure_three_rounds_on_two_solo_workers() -> None:
    options = parse([])
    assert (options.rounds, options.scale, options.pool, options.peers) == (3, 1.0, "solo:1", False)


def test_workloads_are_what_the_documentation_says() -> None:
    found = {workload.key: workload for workload in workloads(1)}
    assert (found["W1"].roots, found["W1"].size) == (2_000, 3)
    assert (found["W1-latency"].roots, found["W2"].size, found["W2"].units) == (100, 10, 10)
    assert [found[key].size for key in ("W3-1", "W3-2")] == [1_000, 5_000]
    assert [w.size for w in found.values() if w.kind == "replay"] == [10, 50, 200, 1_000]


def test_a_small_scale_leaves_something_to_measure() -> None:
    assert all(workload.roots >= 1 for workload in workloads(0.0001))
    # The length of a replay is what it is about: it does not shrink.
    assert max(workload.size for workload in workloads(0.0001)) == 1_000


def test_systems_are_asked_only_for_what_they_have() -> None:
    assert not ALL["procrastinate"].can(SEQUENCE)
    assert ALL["procrastinate"].can(TRIVIAL)
    assert not ALL["celery-rabbitmq"].can(PARALLEL)
    assert ALL["celery-redis"].can(SEQUENCE)
    assert not ALL["celery-redis"].can(SEQUENCE, replay=True)
    assert ALL["dbos"].can(SEQUENCE, replay=True)


def test_rounds_are_added_only_to_the_same_kind_of_measurement() -> None:
    about = {"scale": 1.0, "pool": "solo:1", "python": "3.11", "postgresql": "15"}
    check_same(Results(), about)
    check_same(Results(about=about), about)
    with pytest.raises(SystemExit, match=r"with scale 1.0, and now it is 0.5"):
        check_same(Results(about=about), {**about, "scale": 0.5})
