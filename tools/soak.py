"""The long test: kills, damage, full disks, fuzz, exactness, hostile folders, sockets, writes.

    python -m tools.soak                  # every row, at most an hour; what is done is kept
    python -m tools.soak --only kills     # some rows
    python -m tools.soak --record         # measure nothing: what is there, into the record

A row says what was counted, what was aimed at, and whether that was met; nbs/results/soak.json
holds the newest of each, with the commit it was counted at. Pieces that are done lie
in runs/soak/ under a hash of the package: an interrupted soak goes on, other code begins anew.
Most of it is the tests' own functions, called more often than `make test` has time for."""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_literate.results import commit, repo_dir, save_result, to_json
from dpo_literate.runs import Stages, digest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]
SELF = "python -m tools.soak --only "
ROWS = {}         # name -> (figure, target, function of a `Soak`, command)


def row(name, figure, target, command=None):
    "Register a figure; its function returns what was found, and whether that meets the target."
    def keep(f):
        ROWS[name] = (figure, target, f, command or SELF + name)
        return f
    return keep


class OutOfTime(Exception): pass


class Soak:
    "Where the pieces lie, which code they are of, and when to stop."
    def __init__(self, folder, minutes=60., part=1.):
        files = sorted(p for p in (ROOT / "dpo_literate").rglob("*.py"))
        self.package = digest([hashlib.sha256(p.read_bytes()).hexdigest() for p in files])
        self.stages, self.part = Stages(folder), part
        self.end = time.monotonic() + 60 * minutes

    def times(self, n): return max(1, round(n * self.part))

    def piece(self, name, k, make):
        "A piece of a row, made once; none is begun after the time is over."
        inputs = dict(package=self.package, piece=k)
        if (found := self.stages.find(name, inputs, f"-{k}")) is not None: return found["value"]
        if time.monotonic() > self.end: raise OutOfTime
        return self.stages.do(name, inputs, make, f"-{k}")

    def pieces(self, name, jobs):
        "The pieces of a row by name, made in their order as far as the time goes."
        found = {}
        for k, make in jobs.items():
            try: found[k] = self.piece(name, k, make)
            except OutOfTime: continue
        if not found: raise OutOfTime
        return found

    def done(self, name, keys):
        "The pieces of a row that are there."
        found = (self.stages.find(name, dict(package=self.package, piece=k), f"-{k}") for k in keys)
        return [f["value"] for f in found if f]


@contextlib.contextmanager
def place():
    "A folder in memory for the time of a block."
    from tools.soak_kills import RAM
    at = tempfile.mkdtemp(prefix="soak-", dir=RAM)
    try: yield Path(at)
    finally: shutil.rmtree(at, ignore_errors=True)


@contextlib.contextmanager
def desk():
    "The models and files of the runs that are killed, as the working folder."
    from tools import soak_kills as S
    before = os.getcwd()
    with place() as at:
        S.desk_at(at)
        os.chdir(at)
        sys.path.insert(0, str(at))
        try: yield at
        finally: os.chdir(before); sys.path.remove(str(at))


# ------------------------------------------------------------ kills

def kills_so_far(soak, share):
    "Pieces of every kind, and how many kills each has."
    from tools.soak_kills import KINDS
    found = {kind: soak.done("kills", [f"{kind} {i}" for i in range(400)]) for kind in KINDS}
    return found, {k: sum(t["kills"] for t in ts) for k, ts in found.items()}


def kill_on(soak, share):
    "Round by round, a trial of every kind that has not its share yet."
    from tools import soak_kills as S
    with desk() as at:
        S.warm(at)
        found, have = kills_so_far(soak, share)
        for i, (kind, of) in itertools.product(range(400), S.KINDS.items()):
            if have[kind] >= share * of.share or soak.done("kills", [f"{kind} {i}"]): continue
            t = soak.piece("kills", f"{kind} {i}", lambda: S.trial(kind, i))
            have[kind] += t["kills"]
            print(f"kills {sum(have.values())}: {kind} {have[kind]}  {t}", flush=True)
        S.straight.cache_clear()


@row("kills", "SIGKILLs, each followed by a start in the same folder: runs that did not go on, "
     "ends that differ in a bit, acknowledged saves lost", "1,000 kills; 0, 0, 0")
def kills(soak):
    with contextlib.suppress(OutOfTime):
        if time.monotonic() < soak.end: kill_on(soak, soak.part)
    found, have = kills_so_far(soak, soak.part)
    trials = [t for ts in found.values() for t in ts]
    if not trials: raise OutOfTime
    bad = {k: sum((t[k] for t in trials), []) for k in ("failed", "unequal", "lost")}
    n = sum(have.values())
    ours = (f"{n:,} kills ({sum(t['aimed'] for t in trials):,} at a write) in {len(trials)} runs; "
            + ", ".join(f"{len(v)} {k}" for k, v in bad.items()))
    return ours, n >= 1000 * soak.part and not any(bad.values()), dict(kills=have, **bad)


# ------------------------------------------------------------ damage, full disks

def damaged_runs():
    "A checkpoint of each kind of run, every fault in every file."
    import test_checkpoints as C
    from dpo_literate import checkpoints as ck
    from tools import soak_kills as S
    found = {}
    with desk() as at:
        for kind in ("full", "adapter", "moving reference", "ppo"):
            S.straight(kind)
            out = at / "straight" / kind.replace(" ", "-")
            kept = [p for _, p in ck.checkpoints(out)][-2:]
            cases, _, missed = C.damaged(kept[-1], kept[0], at / "harm")
            found[kind] = dict(cases=cases, missed=[str(m) for m in missed])
        S.straight.cache_clear()
    return found


def damaged_model():
    "Every fault in every file of a model folder, looked for with --verify."
    import test_checkpoints as C
    from dpo_literate import models
    from dpo_literate.results import Refusal
    cases, missed = 0, []
    with desk() as at:
        for file in sorted(p.name for p in (at / "model").iterdir()):
            for fault, harm in C.FAULTS.items():
                shutil.copytree(at / "model", at / "harmed")
                if harm(at / "harmed" / file, at / "other") != "same":
                    cases += 1
                    try: models.load_model(at / "harmed", verify=True)
                    except Refusal: pass
                    else: missed.append(f"{file} {fault}")
                shutil.rmtree(at / "harmed")
    return dict(cases=cases, missed=missed)


def damaged_folder():
    "Faults in what lies beside the checkpoints; the run must refuse, or end at the same bits."
    import test_checkpoints as C
    from dpo_literate import checkpoints as ck
    from tools import soak_kills as S
    cases, missed, refused = 0, [], 0
    with desk() as at:
        want, writes, _ = S.straight("full")
        S.run_until("full", at / "half", S.Aim(writes=writes // 2))
        newest = ck.latest(at / "half")
        files = [p for p in sorted((at / "half").rglob("*")) if p.is_file()
                 and not any(q.name.startswith((".checkpoint", "checkpoint")) for q in p.parents)]
        for file in (p.relative_to(at / "half") for p in files):
            for fault in ("deleted", "emptied", "halved", "one byte more", "a folder", "a pipe",
                          *(f for f in C.FAULTS if f.startswith("bit"))):
                shutil.copytree(at / "half", at / "run")
                C.FAULTS[fault](at / "run" / file, newest)
                dead, code, _, _ = S.run_until("full", at / "run", S.Aim(seconds=60))
                cases, refused = cases + 1, refused + (code != 0)
                said = (at / "run.0.txt").read_text(errors="replace")
                if dead or "Traceback" in said or not code and S.trained(at / "run") != want:
                    missed.append(f"{file} {fault}: {'no end' if dead else said[-200:]}")
                shutil.rmtree(at / "run")
        S.straight.cache_clear()
    return dict(cases=cases, missed=missed, refused=refused)


@row("damage", "damaged files of checkpoints, adapters, models, tables and run folders: not seen, "
     "and not harmless", "400 cases; 0")
def damage(soak):
    jobs = {"checkpoints": damaged_runs, "model": damaged_model, "run folder": damaged_folder}
    found = soak.pieces("damage", jobs)
    late = "".join(f"; {k} not tried" for k in jobs if k not in found)
    found = found.pop("checkpoints", {}) | found
    n, bad = sum(f["cases"] for f in found.values()), sum((f["missed"] for f in found.values()), [])
    each = ", ".join(f"{k} {f['cases']}" for k, f in found.items())
    met = n >= 400 and not bad and not late
    return f"{n:,} cases ({each}); {len(bad)}{late}", met, dict(missed=bad[:20])


def full_disks():
    "A disk of 8 MB that fills at a step, with a share of a checkpoint left."
    import test_checkpoints as C
    found, bad = 0, []
    shares = ((.5, True), (.98, True), (0, False), (.15, False), (.5, False), (.9, False))
    for at in range(2, 7):
        for share, asked in shares:
            with place() as folder, C.mounted(folder) as small:
                if small is None: return dict(cases=found, bad=["no disk can be mounted here"])
                found += 1
                try: C.disk_fills(share, asked, small, at)
                except AssertionError as why: bad.append(f"step {at}, {share:.0%}: {why}"[:200])
    return dict(cases=found, bad=bad)


@row("disk", "full disks (a real one of 8 MB): runs that lost a checkpoint or did not go on when "
     "there was room again", "30 points; 0")
def disk(soak):
    found = soak.piece("disk", "all", full_disks)
    return f"{found['cases']} points; {len(found['bad'])}", (
        found["cases"] >= 30 and not found["bad"]), dict(bad=found["bad"][:9])


# ------------------------------------------------------------ exactness, fuzz, hostile folders

@row("exactness", "every loss trained packed, shared, split and by two processes, against padded: "
     "largest difference of a weight (float64)", "at most 1e-10")
def exactness(soak):
    from tools import soak_exact as E
    from tools.soak_kills import RAM
    found = soak.pieces("exactness", {n: functools.partial(E.exactness, n, RAM) for n in E.NAMES})
    numbers = [v for f in found.values() for k, v in f.items()
               if k != "moved" and not isinstance(v, str)]
    words = {f"{n}, {k}": v for n, f in found.items() for k, v in f.items() if isinstance(v, str)}
    failed = {k: v for k, v in words.items() if not v.startswith("refused")}
    ours = f"{max(numbers):.0e} over {len(numbers)} cases of {len(found)} losses"
    if len(found) < len(E.NAMES): ours += f"; {len(E.NAMES) - len(found)} losses not tried"
    ours += f"; {len(words) - len(failed)} refused by name" if words else ""
    least = min(f.get("moved", 1) for f in found.values())
    fine = max(numbers) <= 1e-10 and not failed and least > 1e-5
    return ours, fine and len(found) == len(E.NAMES), dict(words=words)


@row("fuzz", "texts that spell control tokens, in 12 forms of templates and three families of "
     "tokenizers: rows with a control token of theirs", "10,000 a form; 0")
def fuzz(soak):
    from tools import soak_exact as E
    n, forms = soak.times(10_000), list(E.FORMS)[:12]
    jobs = {f"{form} {k}": functools.partial(E.fuzz, form, k, min(n, k + 2_500))
            for k in range(0, n, 2_500) for form in forms}
    found = list(soak.pieces("fuzz", jobs).values())
    total = {k: sum(f[k] for f in found) for k in found[0]}
    ours = (f"{total['texts']:,} texts, {total['spelled']:,} of them spelled one; "
            f"{total['through']} got through, {total['refused']} refused")
    return ours, total["texts"] >= 12 * n and not total["through"], {}


def every_folder():
    from tools import soak_hostile as H
    found = {}
    with desk() as at:
        for k, name in enumerate(H.FOLDERS):
            (at / f"h{k}").mkdir()
            found[name] = H.hostile_folder(name, at / "model", at / f"h{k}")
            shutil.rmtree(at / f"h{k}")
    return found


@row("folders", "model folders made to harm (pickles, code, kernels, templates, links, pipes): "
     "code that ran, hangs, or answers longer than a sentence", "40 folders; 0")
def folders(soak):
    found = soak.piece("folders", "all", every_folder)
    bad = {k: f["wrong"] for k, f in found.items() if f["wrong"]}
    refused = sum(f["refused"] for f in found.values())
    ours = f"{len(found)} folders, {refused} refused in a sentence, {len(found) - refused} harmless"
    return f"{ours}; {len(bad)} otherwise", len(found) >= 40 and not bad, dict(bad=bad)


def every_command():
    "The commands under watch; what was seen of sockets, and of writes outside the folder."
    from tools import soak_hostile as H, soak_kills as S
    found = {}
    with desk() as at:
        before, tempfile.tempdir = tempfile.tempdir, str(at)
        runs = {k: (lambda k=k: S.KINDS[k].run(at / "straight" / k, 0)) for k in S.KINDS
                if S.KINDS[k].processes == 1}
        from dpo_literate.cli import main
        runs |= {k: (lambda w=w: main([str(x) for x in w])) for k, w in H.commands(at).items()}
        for name, act in runs.items(): found[name] = H.watched(act, at, None, 300)
        tempfile.tempdir = before
    return found


@row("watch", "commands under an audit hook: sockets opened, files written outside the working and "
     "temporary folder, programs started (but git, which names the commit)", "0, 0, 0")
def watch(soak):
    found = soak.piece("watch", "all", every_command)
    seen = {k: sum((f[k] for f in found.values()), []) for k in ("sockets", "outside", "ran")}
    failed = {k: f["said"] for k, f in found.items() if f["said"] != 0}
    ours = f"{len(found)} commands; {', '.join(str(len(v)) for v in seen.values())}"
    return ours, not any(seen.values()) and not failed, dict(failed=failed, **seen)


# ------------------------------------------------------------ the tests' own counts

class Counted:
    "Counts the calls of a run of pytest."
    def __init__(self): self.by = dict(passed=0, failed=0, skipped=0)
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped: self.by[report.outcome] += 1


def by_tests(*ids):
    "Run tests in a fork of this process; how many passed, failed, were skipped."
    read, write = os.pipe()
    if not (pid := os.fork()):
        import pytest
        os.chdir(ROOT)
        silent = os.open(os.devnull, os.O_WRONLY)
        for handle in (1, 2): os.dup2(silent, handle)
        seen = Counted()
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=",
                            "-m", "not slow", *(f"tests/{i}" for i in ids)], [seen])
        os.write(write, to_json(dict(seen.by, code=int(code))).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file: text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else dict(passed=0, failed=1, skipped=0, code=-1)


def mutants_of(module):
    "Each mistake seeded into a module: caught, by which test; missed; or no longer there."
    env = dict(os.environ, PYTHONPATH="", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(ROOT / "tests/test_mutants.py"), f"module:{module}"],
                          cwd=tempfile.gettempdir(), env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@row("mutants", "mistakes seeded into the package: not seen by any test", "60 mistakes; 0")
def mutants(soak):
    from test_mutants import BLIND, MUTANTS
    modules = list(dict.fromkeys(m.module for m in (*BLIND, *MUTANTS)))
    found = soak.pieces("mutants", {m: functools.partial(mutants_of, m) for m in modules})
    late = len(modules) - len(found)
    caught = {m: [sum(v == "caught" for v, _ in f.values()), len(f)] for m, f in found.items()}
    alive = [f"{m}: {what}: {v}" for m, f in found.items() for what, (v, _) in f.items()
             if v != "caught"]
    n, of = (sum(c[k] for c in caught.values()) for k in (0, 1))
    ours = f"{of} mistakes in {len(found)} modules; {len(alive)} not seen"
    if late: ours += f"; {late} modules not tried"
    return ours, n == of >= 60 and not late, dict(modules=caught, alive=alive)


TESTS = dict(  # name: figure, target, how many cases at least, tests
    resumes=("points of a run from which it was continued: ends that differ in a bit",
             "40 points in 12 settings; 0", 12, ["test_checkpoints.py::test_continued_to_the_bit"]),
    contract=("incompatible runs, settings and tables that a resume refuses by name: not refused",
              "8 kinds; 0", 8, ["test_checkpoints.py::test_other_run_is_refused_unless_allowed",
                                "test_checkpoints.py::test_other_model_is_refused"]),
    start=("ways to make a reference: first losses off ln 2 by more than rounding",
           "16 ways; 0", 16, ["test_trainer.py::test_every_start_costs_ln2"]),
    drift=("references that moved by a bit during training", "4 kinds; 0", 4,
           ["test_trainer.py::test_the_reference_never_moves"]),
    stale=("changes after which a cached reference must be read again: not read",
           "13 changes; 0", 1, ["test_trainer.py::test_the_cache_is_keyed_by_all_it_depends_on"]),
    bandit=("distance of the trained policy from the closed form (total variation)",
            "at most 2e-3", 1, ["test_trainer_equal.py::test_theory_through_the_whole_stack"]),
    truncation=("combinations of lengths and limits against a loop over tokens: mismatches",
                "10,000; 0", 1, ["test_rows.py::test_truncation_against_brute_force"]),
    nonfinite=("numbers that are not finite, put into weights, moments and losses: written or "
               "stepped on", "12 cases; 0", 12,
               ["test_checkpoints.py::test_non_finite_is_never_written",
                "test_trainer.py::test_nan_stops_before_the_step",
                "test_ppo.py::test_non_finite_numbers_stop_before_an_update"]),
    inputs=("files of pairs made to be misread: accepted wrongly, or answered with more than a "
            "sentence", "100 cases; 0", 100,
            ["test_preferences.py", "test_cli.py::test_a_bad_file_gets_one_sentence_with_its_place",
             "test_cli.py::test_names_and_files_are_refused_before_torch_is_loaded"]),
    secrets=("secrets and machines' names in tracked files", "0", 1,
             ["test_repo.py::test_no_tracked_file_names_a_machine_or_holds_a_secret"]))


def tested(name, least, ids):
    def find(soak):
        found = soak.piece(name, "all", lambda: by_tests(*ids))
        skipped = f", {found['skipped']} skipped" if found["skipped"] else ""
        ours = f"{found['passed']} tests passed, {found['failed']} failed{skipped}"
        return ours, not found["code"] and not found["failed"] and found["passed"] >= least, {}
    return find


for _name, (_figure, _target, _least, _ids) in TESTS.items():
    row(_name, _figure, _target)(tested(_name, _least, _ids))


# ------------------------------------------------------------ main

def measured(soak, name):
    "A row of the record, or None where there was no time for it."
    figure, target, find, command = ROWS[name]
    start = time.monotonic()
    try: ours, met, more = find(soak)
    except OutOfTime: return print(f"        {name}: no time for it", flush=True)
    print(f"{'met    ' if met else 'NOT MET'} {name}: {ours}  "
          f"({time.monotonic() - start:.0f} s)", flush=True)
    return dict(name=name, figure=figure, target=target, ours=ours, met=bool(met), command=command,
                commit=commit(), package=soak.package[:12], more=more)


def record(rows, seconds, minutes):
    "Write the table; a row that was not measured now stays as it was, with its commit."
    path = repo_dir() / "nbs" / "results" / "soak.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(seconds=0.)
    before = old.get("values", dict(rows=[]))["rows"]
    known = {r["name"]: r for r in (*before, *filter(None, rows))}
    none = dict(ours="not measured", met=False, commit=None, package=None, more={})
    whole = [dict(name=n, target=t, **none) | known.get(n, {}) | dict(figure=f, command=c)
             for n, (f, t, _, c) in ROWS.items()]
    save_result("soak", dict(rows=whole), command="make soak", seed=None,
                seconds=old["seconds"] + seconds,
                config=dict(minutes=minutes),
                what="reliability figures: kills, damage, full disks, fuzz, exactness")
    return whole


def main(argv=None):
    ask = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__.split("\n")[0])
    ask.add_argument("--only", nargs="+", choices=sorted(ROWS), help="these rows")
    ask.add_argument("--minutes", type=float, default=60., help="begin nothing new after these")
    ask.add_argument("--part", type=float, default=1., help="a share of every count, for a trial")
    ask.add_argument("--record", action="store_true", help="measure nothing, write what is there")
    args = ask.parse_args(argv)
    import torch
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    soak = Soak(repo_dir() / "runs" / "soak", args.minutes, args.part)
    if args.record: soak.end = 0
    rows = [measured(soak, name) for name in args.only or ROWS]
    if args.part == 1: record(rows, sum(soak.stages.seconds.values()), args.minutes)
    return 0 if all(r and r["met"] for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
