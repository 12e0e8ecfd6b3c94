"""Where a worker's time goes: py-spy samples the first of two workers, and the samples are added up by who has it.

Time is wall time of the main thread, in which a solo pool runs bodies: waiting for the database's or the broker's
answer is theirs.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Failed, Run, workloads
from benchmarks.peers import ALL, VAR, Peer, environment
from benchmarks.results import Results
from benchmarks.servers import servers

RATE = 200
#: Who has a sample, asked in this order; the first whose pattern is found in any frame of the stack.
OWNERS = {
    "broker publish": r"\b(basic_publish\w*|_?publish|send_task_message) \((kombu|amqp|celery|conductor_app)/",
    "broker acknowledge": r"\b(acknowledge|basic_ack|ack) \(",
    "database driver": r"\(psycopg\w*/",
    "Django": r"\((django|asgiref)/",
    "idle: no message": r"\bpoll \(kombu/utils/eventio",
    "broker consume": r"\((amqp|redis|kombu/transport)/",
}
#: Below them, the innermost frame's package decides.
PACKAGES = {"conductor_app": "conductor_app", "benchmarks": "bodies", "celery": "Celery", "kombu": "Celery"}
START = "start-up and imports"

_FRAME = re.compile(r"^(?P<name>.+) \((?P<path>[^)]+?)(?::\d+)?\)$")
_PACKAGE = re.compile(r"^.*?(?:site-packages|lib/python3\.\d+)/")


def profile(options: argparse.Namespace, console: Console) -> int:
    """Run a workload with one worker under py-spy, and print shares of its time."""
    workload = next(w for w in workloads(options.scale) if w.key == options.profile)
    chosen = [ALL[name] for name in options.systems or [options.baseline]]
    spy = environment("profile").with_name("py-spy")
    failures = 0
    with servers({peer.broker for peer in chosen}) as started:
        for peer in chosen:
            raw = VAR / f"profile-{peer.name}-{workload.key}.txt"
            prefix = [str(spy), "record", "--format=raw", f"--rate={RATE}", "--idle", "--threads", f"--output={raw}"]
            raw.unlink(missing_ok=True)
            try:
                with Run(started, peer, options.pool, timeout=options.timeout, prefix=[*prefix, "--"]) as run:
                    run.start(workload.body, workload.size, workload.roots)
                    run.start_workers()
                    seen = run.wait(workload.roots)
                    run.finish_profile()
            except Failed as error:
                console.print(str(error), style="red")
                failures += 1
                continue
            found = _show(console, peer, workload.title, raw, workload.roots / seen.seconds)
            results = Results.load(options.output) if options.output.exists() else Results()
            results.profiles[f"{peer.name}, {workload.title}"] = found
            results.save(options.output)
    return 1 if failures else 0


def _show(console: Console, peer: Peer, title: str, raw: Path, rate: float) -> list[tuple[str, float]]:
    lines = raw.read_text(encoding="utf-8").splitlines()
    found = shares(lines)
    table = Table(title=f"{peer.name}, {title}: {rate:.1f} roots/s while profiled", title_justify="left")
    table.add_column("")
    table.add_column("share", justify="right")
    for owner, share in found:
        table.add_row(owner, f"{share:.1%}")
    console.print(table)
    functions = Table("innermost function of conductor_app", "with what it calls", title_justify="left")
    for name, share in hot(lines)[:15]:
        functions.add_row(name, f"{share:.1%}")
    console.print(functions)
    console.print(f"stacks: {raw}", highlight=False)
    return found


def shares(lines: Iterable[str]) -> list[tuple[str, float]]:
    """Whose the main thread's time was, in shares of it without start-up, the largest first."""
    found: Counter[str] = Counter()
    for frames, count in _samples(lines):
        found[owner(frames)] += count
    found.pop(START, None)
    total = sum(found.values())
    return [(name, count / total) for name, count in found.most_common()]


def hot(lines: Iterable[str]) -> list[tuple[str, float]]:
    """In which function of ours the time was spent, with everything that it called outside of ours."""
    found: Counter[str] = Counter()
    total = 0
    for frames, count in _samples(lines):
        if owner(frames) == START:
            continue
        total += count
        ours = [frame for frame in frames if "(conductor_app/" in frame]
        if ours:
            found[ours[-1]] += count
    return [(name, count / total) for name, count in found.most_common()] if total else []


def owner(frames: list[str]) -> str:
    """Who has a stack of frames such as ``execute (django/db/backends/utils.py)``, the outermost first."""
    if any(frame.startswith(("_find_and_load", "<module> (celery/__main__", "import_module ")) for frame in frames[2:]):
        return START
    # A solo pool runs bodies inside of the loop that consumes messages: what is outside of a run is not its owner.
    runs = [index for index, frame in enumerate(frames) if "(celery/concurrency/" in frame]
    frames = frames[runs[-1] :] if runs else frames
    for name, pattern in OWNERS.items():
        if any(re.search(pattern, frame) for frame in frames):
            return name
    match = _FRAME.match(frames[-1]) if frames else None
    return PACKAGES.get(match["path"].partition("/")[0], "other") if match else "other"


def _samples(lines: Iterable[str]) -> Iterable[tuple[list[str], int]]:
    """Read py-spy's raw format: ``frame;frame;frame count``, the thread first. Only the main thread's."""
    for line in lines:
        stack, _, count = line.rpartition(" ")
        _thread, *frames = stack.split(";")
        if frames and frames[0].startswith("_run_module_as_main "):
            yield [_short(frame) for frame in frames], int(count)


def _short(frame: str) -> str:
    match = _FRAME.match(frame)
    if not match:
        return frame
    return f"{match['name']} ({_PACKAGE.sub('', match['path'])})"
