"""Faults for an hour (or as long as you say): searches that are killed, and what was lost.

    python benchmarks/soak.py                          # an hour
    python benchmarks/soak.py --minutes 10 --seed 1

Searches with random sampling and no early stopping run as commands of their own. At seeded
random moments their driver is killed (SIGKILL), or stopped (SIGTERM), or a process of theirs is
killed, until they are done; then each is held against one that nothing happened to: the same
trials and finalists, each once, every number the same to the last bit. Prints a line per search,
and what was lost in all. The exit code is 1 where anything was.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from desisky_tune.errors import RESUME_ME
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.records import Ledger

OVERRIDES = (
    "search.default_first=false",
    "search.sampler=random",
    "search.scheduler=none",
    "search.grace=300",
    "space.width={choices: [16, 32]}",
    "space.depth={low: 1, high: 2}",
    "space.batch_size=32",
    "evaluation.finalists=3",
    "evaluation.finalist_folds=2",
    "evaluation.finalist_seeds=1",
)

#: What a trial's record holds that differs from run to run.
TIMES = ("seconds", "started", "ended")

#: How the titles of the processes begin that are killed.
VICTIMS = ("ray::Engine", "ray::SearchTrial", "ray::Dispatcher")

FAULTS = ("driver killed", "driver stopped", "process killed")

#: How a driver may end: done, killed, stopped (also before Python has taken the signal over).
EXPECTED_CODES = (0, -signal.SIGKILL, RESUME_ME, -signal.SIGTERM)


def main() -> int:
    """Run the soak; return the exit code."""
    options = arguments()
    moment = random.Random(options.seed)
    deadline = time.monotonic() + 60 * options.minutes
    done, lost = Counter[str](), Counter[str]()
    searches = 0
    with tempfile.TemporaryDirectory(prefix="desisky-tune-soak-") as folder:
        runs = Path(folder)
        assert start(runs, "undisturbed", options).wait() == 0, "the undisturbed search failed"
        expected = records_of(runs / "undisturbed")
        while time.monotonic() < deadline:
            name = f"soak-{searches}"
            lost["wrong exit codes"] += inject(runs, name, options, moment, done)
            found = records_of(runs / name)
            lost.update(compare(found, expected))
            searches += 1
            print(
                f"{name}: {len(found)} of {len(expected)} trials; faults so far: {told(done)}",
                flush=True,
            )
    print(f"{searches} searches, faults: {told(done)}")
    print(f"lost: {told(lost)}")
    return int(bool(+lost))


def arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=5000)
    parser.add_argument("--faults", type=int, default=4, help="faults of each search")
    parser.add_argument("--longest", type=float, default=20.0, help="between two faults (s)")
    return parser.parse_args()


def start(runs: Path, name: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start a search, or resume it where it has begun."""
    if (runs / name / "search.json").exists():
        words = ["resume", str(runs / name)]
    else:
        sizes = (f"search.trials={options.trials}", f"training.epochs={options.epochs}")
        sets = [word for value in (*OVERRIDES, *sizes) for word in ("--set", value)]
        words = ["search", "quick", *sets, "--runs", str(runs), "--name", name]
    with open(log_of(runs, name), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "desisky_tune", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def log_of(runs: Path, name: str) -> Path:
    """Where the lines of a search's drivers lie, one after the other."""
    return runs / f"{name}.log"


def inject(
    runs: Path, name: str, options: argparse.Namespace, moment: random.Random, done: Counter[str]
) -> int:
    """Take a search to its end with faults on the way; return how many exit codes were wrong."""
    driver = start(runs, name, options)
    wrong = 0
    for _ in range(options.faults):
        try:
            driver.wait(moment.uniform(0.0, options.longest))
        except subprocess.TimeoutExpired:
            fault = moment.choice(FAULTS)
            done[fault] += hit(driver, fault, moment)
        if driver.poll() not in (None, 0):
            if driver.returncode not in EXPECTED_CODES:
                wrong += 1
                show(runs, name, driver.returncode)
            driver = start(runs, name, options)
    code = driver.wait()
    if code != 0:
        wrong += 1
        show(runs, name, code)
        # A resume without a fault: what fails now is a failure of ours.
        code = start(runs, name, options).wait()
    if code != 0:
        show(runs, name, code)
        raise SystemExit(f"{name}: the search cannot be finished: exit code {code}")
    return wrong


def show(runs: Path, name: str, code: int) -> None:
    """Print the last lines of a driver that ended as none should."""
    lines = log_of(runs, name).read_text(errors="replace").splitlines()
    print(f"{name}: exit code {code}, after these lines:", *lines[-40:], sep="\n", file=sys.stderr)


def hit(driver: subprocess.Popen[bytes], fault: str, moment: random.Random) -> bool:
    """Inject one fault; return False where there was nothing to hit."""
    if fault == "driver killed":
        driver.kill()
    elif fault == "driver stopped":
        driver.send_signal(signal.SIGTERM)
    else:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            children = psutil.Process(driver.pid).children(recursive=True)
            ours = [p for p in children if named(p).startswith(VICTIMS)]
            if ours:
                os.kill(moment.choice(ours).pid, signal.SIGKILL)
                return True
        return False
    driver.wait()
    return True


def named(process: psutil.Process) -> str:
    """Return a process's title; nothing where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def records_of(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what each trial and each finalist of a run has measured, by number."""
    folder = RunFolder.open(run)
    return {
        (stage.stem, record.number): {
            name: value for name, value in vars(record).items() if name not in TIMES
        }
        for stage in (folder.ledger, folder.finalists)
        for record in Ledger(stage).records()
    }


def compare(found: dict[Any, Any], expected: dict[Any, Any]) -> Counter[str]:
    """Count what is missing, too much, or other than it should be."""
    return +Counter(
        {
            "trials missing": len(expected.keys() - found.keys()),
            "trials too many": len(found.keys() - expected.keys()),
            "trials changed": sum(found[n] != expected[n] for n in expected.keys() & found.keys()),
        }
    )


def told(counts: Counter[str]) -> str:
    """Return counts in a line."""
    return ", ".join(f"{count} {name}" for name, count in sorted((+counts).items())) or "nothing"


if __name__ == "__main__":
    raise SystemExit(main())
