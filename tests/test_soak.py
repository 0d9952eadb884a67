"""The long test can fail, its record says what it counted, and every promise names a test that
is there."""
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dpo_literate.frontier_cells import end_with_parent
from dpo_literate.models import tiny_model, write_folder
from dpo_literate.results import Refusal, new_folder
from dpo_literate.rows import tiny_tokenizer
from tools import soak, soak_hostile, soak_kills
from tools.soak_kills import Aim, Kind

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
RECORD = json.loads((ROOT / "nbs/results/soak.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------ kills

def careful(out, rank):
    "A run of three steps that goes on from what it has written."
    out.mkdir(exist_ok=True)
    done = len(list(out.glob("step-*")))
    for step in range(done, 3):
        (out / f"half-{step}").write_text(str(step))
        os.rename(out / f"half-{step}", out / f"step-{step}")
        time.sleep(.3)                   # for the parent, which kills it in this time
    return 0


def forgetful(out, rank):
    "It ends otherwise once it was disturbed."
    known = out.exists()
    careful(out, rank)
    (out / "step-2").write_text("disturbed" if known else "2")
    return 0


def stubborn(out, rank):
    if out.exists(): raise RuntimeError("the folder is not empty")
    return careful(out, rank)


def lying(out, rank):
    "It says that steps were saved which were not."
    out.mkdir(exist_ok=True)
    (out / "log.jsonl").write_text('{"saved": 7}\n')
    return careful(out, rank)


def steps_of(out): return {p.name: p.read_text() for p in sorted(out.glob("step-*"))}


@pytest.mark.parametrize("run,what", [(careful, None), (forgetful, "unequal"),
                                      (stubborn, "failed"), (lying, "lost")])
def test_a_run_that_breaks_its_word_is_found_out(run, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(soak_kills.KINDS, "it", Kind(run, steps_of, 1))
    monkeypatch.setattr(soak_kills, "aim_at", lambda rng, *_: Aim(writes=rng.randint(1, 2)))
    soak_kills.straight.cache_clear()
    try: found = [soak_kills.trial("it", seed, 2) for seed in range(2)]
    finally: soak_kills.straight.cache_clear()
    assert sum(t["kills"] for t in found) >= 2
    for name in ("unequal", "failed", "lost"):
        assert any(t[name] for t in found) == (name == what), (name, found)


def test_a_run_of_the_trainer_survives_kills_at_its_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(soak_kills.desk_at(tmp_path))
    kind = soak_kills.KINDS["full"]
    dead, code, writes, _ = soak_kills.run_until("full", Path("a"), Aim())
    assert (dead, code) == (False, 0) and writes > 100
    for n in (writes // 3, writes // 4):
        assert soak_kills.run_until("full", Path("b"), Aim(writes=n, late=.001))[0]
        logs, stages = soak_kills.promised(Path("b"))
        assert logs and not soak_kills.broken(logs, stages)
    assert soak_kills.run_until("full", Path("b"), Aim())[:2] == (False, 0)
    assert kind.outcome(Path("a")) == kind.outcome(Path("b"))


def asks_for_a_cell(pipe):
    with ProcessPoolExecutor(1, FORK, end_with_parent) as fresh:
        pipe.send(fresh.submit(os.getpid).result())
        fresh.submit(time.sleep, 60).result()


def test_the_process_of_a_cell_ends_with_a_killed_run():
    here, there = FORK.Pipe()
    run = FORK.Process(target=asks_for_a_cell, args=(there,))
    run.start()
    cell = here.recv()
    assert Path(f"/proc/{cell}").exists()
    run.kill(); run.join()
    end = time.monotonic() + 20
    while Path(f"/proc/{cell}").exists() and time.monotonic() < end: time.sleep(.05)
    alive = Path(f"/proc/{cell}").exists()
    if alive: os.kill(cell, signal.SIGKILL)
    assert not alive


def test_a_start_that_was_killed_at_once_is_no_reason_to_refuse(tmp_path):
    "Killed between the making of a folder and its first file: there is nothing to go on from."
    for left in ("work", "work/.here.part-abcdefgh"):
        (tmp_path / left).mkdir(parents=True)
        assert new_folder(tmp_path, marks=("work/stages-*",)) == tmp_path
    (tmp_path / "elsewhere").symlink_to(tmp_path / "work")
    with pytest.raises(Refusal, match="is not empty"): new_folder(tmp_path)
    (tmp_path / "elsewhere").unlink()
    (tmp_path / "work" / "deep" / "deeper").mkdir(parents=True)
    assert new_folder(tmp_path) == tmp_path
    (tmp_path / "work" / "deep" / "deeper" / "thoughts.txt").touch()
    with pytest.raises(Refusal, match="is not empty"): new_folder(tmp_path)


# ------------------------------------------------------------ under watch

def test_what_should_not_be_done_is_seen(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside): folder.mkdir()
    def act():
        (inside / "a").write_text("1")
        (outside / "b").write_text("2")
        (inside / "a").rename(outside / "c")
        with socket.socket() as s, pytest.raises(OSError): s.connect(("127.0.0.1", 9))
        subprocess.run([sys.executable, "--version"], capture_output=True)
        return 0
    found = soak_hostile.watched(act, inside)
    assert found["said"] == 0 and len(found["sockets"]) == 1 and len(found["outside"]) == 2
    assert any("Popen" in s for s in found["ran"])
    quiet = soak_hostile.watched(lambda: (inside / "d").write_text("1"), inside)
    assert not (quiet["sockets"] or quiet["outside"] or quiet["ran"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "m", tiny_model().float(),
                        tiny_tokenizer())


@pytest.mark.parametrize("name", ["pipe: tokenizer", "pipe: weights", "code: tokenizer",
                                  "pickle: model.safetensors (torch)", "link: a device"])
def test_a_folder_made_to_harm_is_answered_in_a_sentence(name, model, tmp_path):
    found = soak_hostile.hostile_folder(name, model, tmp_path)
    assert not found["wrong"] and found["refused"] == (name != "code: tokenizer"), found


# ------------------------------------------------------------ the record

def test_the_record_holds_every_row_and_says_which_do_not_meet_their_target():
    rows = {r["name"]: r for r in RECORD["values"]["rows"]}
    assert set(rows) == set(soak.ROWS)
    for name, r in rows.items():
        figure, target, _, command = soak.ROWS[name]
        assert (r["figure"], r["target"], r["command"]) == (figure, target, command)
        assert r["ours"] and isinstance(r["met"], bool)
    kills = rows["kills"]
    n = sum(kills["more"]["kills"].values())
    assert f"{n:,} kills" in kills["ours"]
    assert kills["met"] == (n >= 1000 and not any(kills["more"][k]
                                                  for k in ("failed", "unequal", "lost")))


# ------------------------------------------------------------ promises

def test_every_promise_names_tests_that_are_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) >= 7
    for line in rows:
        promise, held = line.strip("| ").split(" | ")
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", held)
        assert named, f"no test holds: {promise}"
        for path, test in named:
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (path, test)
