"""The whole chain tormented: `make torture`. Faults are injected until so many are done; results go to results.json.

Each attempt is a child of one process that has loaded everything, so that an attempt costs seconds. After every fault
the run is started again, and in the end its folder is compared with that of an undisturbed run, byte for byte. Beside
that: an attempt may not compute again what had a done-record (counted in forward passes), may not end in any way but
success, death or a message that names the place, and may not leave anything half-written.

    protocol   every call of a small run, in every way (toy.py)
    damage     every file of a finished run emptied, torn, deleted, or one bit flipped
    manners    two runs on one folder, inputs that change before a resume and during a run, clocks that jump, a sample
               that kills the process
    calls      a call of the whole chain fails or kills, resumes included
    signals    SIGKILL, SIGTERM, SIGINT at any time of the whole chain, resumes included
"""

import argparse
import datetime
import importlib.metadata
import json
import mmap
import os
import platform
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datalloy import cli, training, vlm, workflows
from datalloy.config import load_recipe
from datalloy.durable import write_json
from datalloy.readers import read_all
from datalloy.report import write_report  # noqa: F401 - loaded before the first fork
from datalloy.run import LIBRARIES, Run
from datalloy.scorers.baselines import LossScorer
from datalloy.scores import Scores
from datalloy.summary import summarise  # noqa: F401 - the same
from datalloy.tiny.pools import PoolPlan, write_pool
from torture import injector, toy
from torture.injector import NOT_REACHED, Fault, start_child, was_killed

PLAN = PoolPlan(samples={"chart": 12, "counting": 8}, targets=("chart",), target_items=8, holdout_items=4)
RECIPE = """\
name: tormented
base: tiny
domains: {chart: {path: data/chart.jsonl}, counting: {path: data/counting.jsonl}}
targets: {chart: {path: data/chart.target.jsonl, metric: loss}}
evaluation: {held-out: {path: data/chart.holdout.jsonl, metric: loss}}
score: {method: low_loss, warmup_fraction: 0.1, target_items: 8}
select: {keep_fraction: 0.5}
train: {adapter: lora, rank: 2, batch_size: 4, samples: 16}
evaluate: {resamples: 50}
"""
SHARD = 8
STAGES = ("check", "proxy", "scores", "selection", "model", "evaluation", "export", "status")
NOT_COMPARED = {"run.lock", "provenance.json", "report.html", "events.jsonl"}  # the time of day, how long things took
UNREAD = ("proxy/", "scores/", "units/proxy", "units/scores--")
VOLATILE = ("seconds", "flops")
SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
DAMAGE = ("emptied", "torn", "bit flipped", "deleted")
PATIENCE = 600.0  # seconds that an attempt may take


class Counted:
    """Forward passes of all attempts, counted in memory that children share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        for name in ("losses", "write_answers"):
            setattr(vlm.VLM, name, self._counting(getattr(vlm.VLM, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            self.value += 1
            return call(*arguments, **more)

        return counted

    @property
    def value(self) -> int:
        return struct.unpack("q", self._memory[:8])[0]

    @value.setter
    def value(self, count: int) -> None:
        self._memory[:8] = struct.pack("q", count)


class Torture:
    """A world with one recipe, an undisturbed run of it, and what was done to others."""

    def __init__(self, world: Path, seed: int, wanted: int, seconds: float) -> None:
        self.world, self.folder, self.said = world, world / "run", world / "said"
        self.seed, self.random, self.wanted = seed, random.Random(seed), wanted
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.kinds, self.stages, self.violations = Counter[str](), Counter[str](), list[str]()
        self.passes, self.unit_passes = Counted(), dict[str, int]()
        write_pool(world / "data", PLAN, seed=0)
        (world / "recipe.yaml").write_text(RECIPE)
        workflows.SHARD, training.CHECKPOINT_SECONDS = SHARD, 0.0
        tiny, load = vlm.VLM.load("tiny"), vlm.VLM.load

        def loaded(path: str, **more: Any) -> vlm.VLM:
            return tiny.copy() if path == "tiny" else load(path, **more)

        vlm.VLM.load = loaded
        self.expected, self.seconds = self._undisturbed()

    def _undisturbed(self) -> tuple[dict[str, bytes], float]:
        commit = Run.commit

        def noted(run: Run, unit: str, *arguments: Any, **more: Any) -> Any:
            done = commit(run, unit, *arguments, **more)
            with (self.world / "passes").open("a") as file:
                file.write(f"{self.passes.value} {unit}\n")
            return done

        Run.commit = noted
        started = time.monotonic()
        code = self.attempt()
        assert code == 0, self.said.read_text()
        Run.commit = commit
        before = 0
        for line in (self.world / "passes").read_text().splitlines():
            total, unit = line.split()
            self.unit_passes[unit], before = int(total) - before, int(total)
        seconds = time.monotonic() - started
        expected = contents(self.folder)
        self.begin()
        assert self.attempt() == 0, self.said.read_text()
        assert contents(self.folder) == expected, "an undisturbed run is not repeatable here"
        return expected, seconds

    # --- attempts

    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def attempt(
        self, *faults: Fault, during: Callable[[int], None] | None = None, work: Callable[[], int] | None = None
    ) -> int:
        """One attempt at the chain, as the command line makes it; checks how it ended and what it did again."""
        finished, self.passes.value = records(self.folder), 0
        child = start_child(work or self.run, self.folder, faults, self.said)
        if during:
            during(child)
        code = self._wait(child)
        again = [name for name, place in finished.items() if records(self.folder).get(name) != place]
        self._expect(not again, f"records of finished units were written again: {again}")
        todo = sum(n for unit, n in self.unit_passes.items() if unit not in map(unit_of, finished))
        if self.unit_passes:
            allowed = todo + 2 * SHARD  # after a kill a shard's samples are tried one at a time first
            self._expect(self.passes.value <= allowed, f"{self.passes.value} forward passes, {allowed} were left to do")
        return code

    def run(self) -> int:
        cli._listen_to_signals()
        return cli.answer(["run", str(self.world / "recipe.yaml"), "--run", str(self.folder)])

    def _wait(self, child: int) -> int:
        patience = time.monotonic() + PATIENCE
        while time.monotonic() < patience:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        self._expect(False, f"an attempt did not end within {PATIENCE:.0f} s")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            said = self.said.read_text()[-800:] if self.said.exists() else ""
            self.violations.append(f"{otherwise}\n{said}")
            sys.stderr.write(f"VIOLATION {otherwise}\n{said}\n")

    def note(self, kind: str, stage: str | None = None) -> None:
        self.kinds[kind] += 1
        self.stages[stage or stage_of(self.folder)] += 1

    def compare(self, after: str) -> None:
        found = contents(self.folder)
        differing = sorted(
            name for name in self.expected.keys() | found.keys() if self.expected.get(name) != found.get(name)
        )
        self._expect(not differing, f"after {after}, other than in an undisturbed run: {differing}")

    def tell(self, out: Path, *, ends: bool) -> None:
        """Write what was done so far; `ends`: this is all."""
        results = {
            "faults": self.injected,
            "lost_or_altered_results": len(self.violations),
            "violations": self.violations,
            "is_complete": ends,
            "by_kind": dict(sorted(self.kinds.items())),
            "by_stage": dict(sorted(self.stages.items())),
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.started),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": _commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, {platform.system()}",
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
        write_json(out, results)
        sys.stderr.write(f"{self.injected} faults, {len(self.violations)} results lost or altered\n")

    @property
    def injected(self) -> int:
        return self.kinds.total()

    @property
    def goes_on(self) -> bool:
        return self.injected < self.wanted and time.monotonic() < self.deadline

    # --- what is done to runs

    def protocol(self) -> None:
        """Every call of a small run."""
        torments = toy.torment_all(self.world / "toy")
        for kind, count in torments.items():
            self.kinds[kind] += count
            self.stages["protocol"] += count

    def damage(self) -> None:
        """Files of a finished run that are not what they were.

        What nothing reads any more (the proxy, parts of a table) is made again when it is asked for, not before.
        """
        self.begin()
        self._expect(self.attempt() == 0, "no finished run to damage")
        names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        read_again = [n for n in names if n not in ("run.lock", "events.jsonl") and not n.startswith(UNREAD)]
        for number, name in enumerate(read_again):
            way = DAMAGE[number % len(DAMAGE)]
            whole = (self.folder / name).read_bytes()
            self._damage(self.folder / name, way)
            self.note(f"{way} file", "finished run")
            finished = records(self.folder)
            code = self._wait(start_child(self.run, self.folder, log=self.said))
            if name == "provenance.json" and code == 3 and name in self.said.read_text():
                (self.folder / name).write_bytes(whole)
                continue
            self._expect(code == 0, f"{name} {way}: exit code {code}")
            untouched = [n for n, place in finished.items() if records(self.folder).get(n) != place]
            self._expect(len(untouched) <= 1, f"{name} {way}: {untouched} were done again")
            self.compare(f"{name} {way}")

    def _damage(self, path: Path, way: str) -> None:
        data = path.read_bytes()
        place = self.random.randrange(len(data)) if data else 0
        if way == "deleted":
            path.unlink()
        elif way == "bit flipped" and data:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << self.random.randrange(8)]) + data[place + 1 :])
        else:
            path.write_bytes(data[: place // 2] if way == "torn" else b"")

    def manners(self) -> None:
        self._two_runs()
        self._changed_inputs()
        self._jumping_clock()
        self._poison()

    def _two_runs(self) -> None:
        self.begin()

        def second(child: int) -> None:
            while not (self.folder / "provenance.json").exists():
                time.sleep(0.005)
            other = self.world / "other"
            code = os.waitstatus_to_exitcode(os.waitpid(start_child(self.run, self.folder, log=other), 0)[1])
            self._expect(code == 75 and f"process {child} on " in other.read_text(), f"a second run ended with {code}")
            self.note("second run on the folder")

        self._expect(self.attempt(during=second) == 0, "a run beside a second one did not end well")
        self.compare("a second run on its folder")

    def _changed_inputs(self) -> None:
        picture = next((self.world / "data" / "images").glob("*chart*"))
        for path in (self.world / "data" / "chart.jsonl", picture):
            whole = path.read_bytes()
            for while_running in (False, True):
                self.begin()

                def change(child: int, path: Path = path, whole: bytes = whole) -> None:
                    while not (self.folder / "units" / "check.json").exists():
                        time.sleep(0.002)
                    os.kill(child, signal.SIGSTOP)
                    path.write_bytes(whole + b"\n")
                    os.kill(child, signal.SIGCONT)

                if while_running:
                    code = self.attempt(during=change)
                else:
                    fault = Fault("rename", "kill before", "", 12)
                    self._expect(was_killed(self.attempt(fault)), "a kill did not kill")
                    path.write_bytes(whole + b"\n")
                    code = self.attempt()
                said = self.said.read_text()
                self.note(f"input changed {'during the run' if while_running else 'before a resume'}")
                self._expect(code == 3 and ("changed" in said or "belongs to another" in said), f"exit code {code}")
                self._expect(
                    not (self.folder / "status.json").exists(), "a run on changed inputs calls itself complete"
                )
                path.write_bytes(whole)
                if not while_running:
                    self._expect(self.attempt() == 0, "inputs were put back, and the run does not go on")
                    self.compare("inputs changed and put back")

    def _jumping_clock(self) -> None:
        self.begin()

        def jumping() -> int:
            real, jumps = time.time, random.Random(0)
            time.time = lambda: real() + jumps.uniform(-1e8, 1e8)
            return self.run()

        self._expect(was_killed(self.attempt(Fault("rename", "kill after", "", 20), work=jumping)), "no kill")
        for path in self.folder.rglob("*"):
            os.utime(path, (0, self.random.uniform(0, 2e9)))
        self.note("clock and file times jump")
        code = self._wait(start_child(jumping, self.folder, log=self.said))
        self._expect(code == 0, f"clocks that jump: exit code {code}")
        self.compare("clocks that jump")

    def _poison(self) -> None:
        """A sample that kills the process wherever it is scored: at the third retry the run gets past it."""
        self.begin()
        recipe = self.world / "recipe.yaml"
        recipe.write_text(RECIPE + "max_rejected_fraction: 0.2\n")
        sample = read_all(load_recipe(recipe).domains["counting"], "counting")[0][0]
        ids = vlm.VLM.load("tiny").encode(sample).inputs["input_ids"][0].tolist()
        score = LossScorer.score

        def deadly(scorer: Any, samples: Any) -> Any:
            if any(item.inputs["input_ids"][0].tolist() == ids for item in samples):
                os.kill(os.getpid(), signal.SIGKILL)
            return score(scorer, samples)

        LossScorer.score = deadly
        codes = [self._wait(start_child(self.run, self.folder, log=self.said)) for _ in range(4)]
        LossScorer.score = score
        for _ in range(3):
            self.note("a sample kills the process", "scores")
        self._expect([was_killed(code) for code in codes] == [True] * 3 + [False], f"deaths by a sample: {codes}")
        self._expect(codes[-1] == 0, f"after a sample that kills: exit code {codes[-1]}")
        table = Scores.read(self.folder / "scores.parquet")
        healthy = table.id != sample.id
        whole = self.world / "scores.parquet"
        whole.write_bytes(self.expected["scores.parquet"])
        same = Scores.read(whole).loss[healthy].tobytes() == table.loss[healthy].tobytes()
        self._expect(table.state[~healthy].tolist() == ["killed"] and same, "a sample that kills changed other samples")
        recipe.write_text(RECIPE)

    def calls(self) -> None:
        """One run after another in which calls go wrong, each attempt another, until it gets through."""
        kinds = injector.kinds()
        self.random.shuffle(kinds)
        self.begin()
        while self.goes_on:
            call, way, error = kinds[self.injected % len(kinds)]
            fault = Fault(call, way, error, int(2 ** self.random.uniform(0, 7)))
            code = self.attempt(fault)
            said = self.said.read_text()
            if was_killed(code) or NOT_REACHED not in said:
                self.note(f"chain, {fault.kind}")
            self._expect(was_killed(code) == (was_killed(code) and not error), f"{fault}: killed by a failing call")
            self._expect(was_killed(code) or code in (0, 4), f"{fault}: exit code {code}")
            self._expect(code != 4 or str(self.folder) in said, f"{fault}: the message names no place")
            if code == 0:
                self.compare(f"{fault} and others before it")
                return
        self._finish("calls that fail")

    def signals(self) -> None:
        """One run after another that is sent signals at any time, each attempt another, until it gets through."""
        self.begin()
        while self.goes_on:
            number = self.random.choice(list(SIGNALS))
            delay = self.random.uniform(0, 1.0 * self.seconds)

            def send(child: int, number: int = number, delay: float = delay) -> None:
                time.sleep(delay)
                os.kill(child, number)

            code = self.attempt(during=send)
            if code == 0:
                self.compare("signals")
                return
            self.note(f"{number.name} at any time")
            early = -number  # before the command line listens
            self._expect(code in (SIGNALS[number], early), f"{number.name}: exit code {code}")
            resume = "resume with: datalloy run" in self.said.read_text()
            self._expect(code < 0 or resume, f"{number.name}: no word on how to go on")
        self._finish("signals")

    def _finish(self, after: str) -> None:
        code = self.attempt()
        self._expect(code == 0, f"the run does not end well after {after}: exit code {code}")
        if code == 0:
            self.compare(after)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a run answers for; of done-records what they say, without how long things took."""
    found = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name.startswith("units/"):
            record = json.loads(path.read_bytes())
            data = {key: value for key, value in record["data"].items() if key not in VOLATILE}
            found[name] = json.dumps([record["unit"], record["fingerprint"], sorted(record["files"]), data]).encode()
        elif name not in NOT_COMPARED and not name.startswith("damaged/"):
            found[name] = path.read_bytes()
    return found


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def records(folder: Path) -> dict[str, tuple[int, int]]:
    """The done-records there are, each with the place on disk that a new one would not have."""
    found = {path.name: path.stat() for path in (folder / "units").glob("[!.]*.json")}
    return {name: (stat.st_ino, stat.st_ctime_ns) for name, stat in found.items()}


def unit_of(record: str) -> str:
    return record.removesuffix(".json").replace("--", "/")


def stage_of(folder: Path) -> str:
    """The stage that a run has come to: the first without its done-record."""
    units = {unit_of(name) for name in records(folder)}
    has = {"evaluation": {"evaluation/base", "evaluation/model"} <= units, "status": (folder / "status.json").exists()}
    return next((stage for stage in STAGES if not has.get(stage, stage in units)), "after the end")


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=600, help="how many, those of the small run included")
    parser.add_argument("--minutes", type=float, default=60.0, help="no new fault after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    wanted = parser.parse_args()
    if injector.compiler() is None:
        sys.stderr.write("faults are injected by a small C library: Linux and a C compiler named cc are needed\n")
        return 2
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of fsyncs would wait for a disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        if injector.VARIABLE not in os.environ:
            command = [sys.executable, "-m", "torture", *sys.argv[1:]]
            return subprocess.run(command, env=injector.environment(Path(folder)), check=False).returncode
        torture = Torture(Path(folder), wanted.seed, wanted.faults, 60 * wanted.minutes)
        for part in (torture.protocol, torture.manners, torture.damage):
            part()
            torture.tell(wanted.out, ends=False)
        while torture.goes_on:
            torture.calls()
            torture.signals()
            torture.tell(wanted.out, ends=False)
        torture.tell(wanted.out, ends=True)
    return 1 if torture.violations else 0


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return (
        subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
        or "unknown"
    )


if __name__ == "__main__":
    sys.exit(main())
