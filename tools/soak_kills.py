"""SIGKILLs at any moment: a run that is killed, started again, killed again, and at last left in
peace must end with the weights and rows of a run that nobody disturbed, and no step whose save
was written into the log may be gone. Part of tools/soak.py.

The process that starts the runs has imported everything and trained nothing; each run is a fork
of it, which saves the seconds of an import and changes nothing else. Half of a run's kills come
at a moment of the clock, the others within milliseconds of a write to the disk: the child tells
its parent through a pipe whenever it makes, flushes or renames a file."""
import contextlib
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from test_align import REWARD, SMALL, curves, figures
from test_checkpoints import acknowledged

from dpo_literate import checkpoints as ck
from dpo_literate import results

RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None   # noqa: S108  a flush costs nothing
WORDS = dict(
    train=["--data", "pairs.jsonl", "--resume", "--max-steps", 12, "--save-steps", 1,
           "--save-total-limit", 2, "--per-device-train-batch-size", 4, "--learning-rate", "1e-3"],
    ppo=["--prompts", "prompts.txt", "--reward", "rewards:vowels", "--resume", "--steps", 6,
         "--save-steps", 1, "--batch-size", 4, "--max-new-tokens", 8, "--lora-r", 4],
    reward=["--data", "pairs.jsonl", "--lora-r", 4, "--batch-size", 4],
    demo=["--prompts", "prompts.txt", "--reward", "rewards:vowels", *SMALL],
    probe=["--reference", "other", "--probes", "honesty", "--quick"])
MOVING = ["--sync-ref-model", "true", "--ref-model-sync-steps", 2]


# ------------------------------------------------------------ what is run

def desk_at(folder):
    "Two tiny models, pairs, prompts and a reward, for every kind of run."
    from dpo_literate.models import tiny_model, write_folder
    from dpo_literate.rows import tiny_tokenizer
    for seed, name in enumerate(("model", "other")):
        write_folder(folder / name, tiny_model(seed=seed).float(), tiny_tokenizer())
    pairs = [dict(prompt=f"dish {k}", chosen="the answer is yes", rejected=f"no {'sat ' * (k % 3)}")
             for k in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    (folder / "prompts.txt").write_text("".join(f"tell me about dish {k}\n" for k in range(24)))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def command(name, *words):
    "A run through the command line."
    def run(out, rank):
        from dpo_literate.cli import main
        return main([name, "--model", "model", *map(str, words), "--out", str(out)])
    return run


def two_processes(out, rank):
    "One of two trainers that share each step."
    import transformers
    from dpo_literate.settings import DPOConfig
    from dpo_literate.trainer import DPOTrainer
    import torch
    args = DPOConfig(str(out), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
                     max_steps=6, save_steps=1, save_total_limit=2, logging_steps=1,
                     per_device_train_batch_size=2, learning_rate=1e-3, ddp_backend="gloo")
    t = DPOTrainer("model", args=args, train_dataset="pairs.jsonl")
    t.remove_callback(transformers.PrinterCallback)
    t.train(resume_from_checkpoint=True)
    t.save_model(str(out))
    torch.distributed.destroy_process_group()
    return 0


def frontier(out, rank):
    "The cells of a small frontier, made in this process instead of one process a cell."
    import dpo_literate.frontier_cells as f
    f.in_a_process = f.make_cell
    config = f.FrontierConfig(
        model="model", reward="rewards:vowels", dtype="float32", n_train=8, n_held=4, per_prompt=2,
        pool=8, eval_replies=1, max_new_tokens=6, rank=2, batch_size=4)
    jobs = f.plan(config, [0], ["dpo", "ppo_true", "best_of_n"], "prompts.txt", Path(out))
    f.run_jobs(jobs)
    return 0


# ------------------------------------------------------------ what must be the same

def sha(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def clockless(value):
    "Without what a clock or a gauge of memory says."
    if isinstance(value, list): return [clockless(v) for v in value]
    if not isinstance(value, dict): return value
    gone = ("seconds", "memory", "tokens_per_second", "peak_memory_gb", "date", "run")
    return {k: clockless(v) for k, v in value.items()
            if k not in gone and "runtime" not in k and "per_second" not in k}


def read(path): return clockless(json.loads(Path(path).read_text(encoding="utf-8")))


def trained(out):
    "Weights of the model written at the end, and every line of the log."
    name = next(n for n in ("model.safetensors", "adapter_model.safetensors") if (out / n).exists())
    state = read(ck.latest(out) / "trainer_state.json")
    return dict(weights=sha(out / name), rows=state["log_history"], step=state["global_step"])


def of_ppo(out):
    return dict(weights=sha(out / "model/model.safetensors"),
                rows=read(out / "report.json")["values"]["history"])


def of_reward(out):
    return dict(weights=sha(out / "model/model.safetensors"),
                rows=read(out / "report.json")["values"])


def of_demo(out):
    return dict(weights=sha(out / "adapter/adapter_model.safetensors"),
                rows=[figures(out), curves(out), (out / "report.md").read_text()])


def of_frontier(out):
    return dict(rows={p.name: read(p)["value"] for p in sorted(out.glob("*.json"))})


def of_probe(out): return dict(rows=read(out / "probes.json")["reports"])


class Kind(NamedTuple):
    "A sort of run: what starts it, what it must end with, how many processes, what of the kills."
    run:object
    outcome:object
    share:int            # of a thousand kills
    processes:int = 1
    resumes:bool = True  # False: it leaves all or nothing, and begins again in another folder


KINDS = {
    "full": Kind(command("train", *WORDS["train"]), trained, 270),
    "adapter": Kind(command("train", *WORDS["train"], "--lora-r", 4), trained, 200),
    "moving reference": Kind(command("train", *WORDS["train"], *MOVING), trained, 170),
    "two processes": Kind(two_processes, trained, 60, 2),
    "ppo": Kind(command("ppo", *WORDS["ppo"]), of_ppo, 120),
    "reward-train": Kind(command("reward-train", *WORDS["reward"]), of_reward, 60, 1, False),
    "demo": Kind(command("demo", *WORDS["demo"]), of_demo, 50),
    "frontier": Kind(frontier, of_frontier, 40),
    "probe": Kind(command("probe", *WORDS["probe"]), of_probe, 30, 1, False)}


# ------------------------------------------------------------ a run in a fork

def tell(pipe):
    "Let every write to the disk be heard at the other end of a pipe, as it begins."
    for where, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"),
                        (os, "rmdir"), (tempfile, "mkdtemp"), (tempfile, "mkstemp")):
        def spoken(*args, real=getattr(where, name), **more):
            os.write(pipe, b".")
            return real(*args, **more)
        setattr(where, name, spoken)


def fork(kind, out, rank=0, port=0):
    "Start a run; its process id, and the pipe on which its writes are heard."
    heard, spoken = os.pipe()
    if pid := os.fork():
        os.close(spoken)
        return pid, heard
    try:
        os.close(heard)
        silent = os.open(f"{out}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for handle in (1, 2): os.dup2(silent, handle)
        if KINDS[kind].processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                              WORLD_SIZE=str(KINDS[kind].processes), MASTER_PORT=str(port))
        tell(spoken)
        os._exit(KINDS[kind].run(Path(out), rank))
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Aim(NamedTuple):
    "When to kill: so many seconds after the start, or after so many writes; None: never."
    seconds:float|None = None
    writes:int|None = None
    late:float = 0.       # seconds after that write


def run_until(kind, out, aim):
    "Run to the end or to the kill: whether it was killed, exit code, writes, seconds."
    start, port = time.monotonic(), free_port()
    started = [fork(kind, out, r, port) for r in range(KINDS[kind].processes)]
    pids, pipes, writes, killed = [p for p, _ in started], [h for _, h in started], 0, False
    while pipes and not killed:
        left = None if aim.seconds is None else max(0, aim.seconds - (time.monotonic() - start))
        ready, _, _ = select.select(pipes, [], [], left)
        for pipe in ready:
            said = os.read(pipe, 1)
            if not said: pipes.remove(pipe); os.close(pipe)
            writes += len(said)
        killed = left is not None and not ready or aim.writes is not None and writes >= aim.writes
    if killed and aim.late: time.sleep(aim.late)
    if killed:
        for pid in random.sample(pids, len(pids)): os.kill(pid, signal.SIGKILL)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    for pipe in pipes: os.close(pipe)
    dead = any(os.WIFSIGNALED(e) and os.WTERMSIG(e) == signal.SIGKILL for e in ends)
    code = next((os.waitstatus_to_exitcode(e) for e in ends if e), 0)
    return dead, 0 if dead else code, writes, time.monotonic() - start


# ------------------------------------------------------------ what may not be lost

def promised(out):
    "What a killed run has said is on the disk: the newest saved step, and every whole stage."
    logs = {p.parent: acknowledged(p.parent) for p in out.rglob("log.jsonl")}
    stages = {p: sha(p) for p in out.rglob("*.json") if p.parent.name in ("work", out.name)
              and '"sha":' in p.read_text(encoding="utf-8")[-200:]}
    return {p: s for p, s in logs.items() if s}, stages


def broken(logs, stages):
    "Promises not kept: a saved step that no whole checkpoint reaches, a stage that is gone."
    through = lambda p: p.name.startswith("training-") and any(p.parent.glob("training-*.json"))
    found = [f"{p.name}: step {s} was saved" for p, s in logs.items() if not through(p)
             if not (newest := ck.latest(p)) or int(newest.name.split("-")[1]) < s]
    return found + [f"{p.name} was whole" for p, s in stages.items()
                    if not p.exists() or sha(p) != s]


def whole(out):
    "Whether a folder that was not gone on with claims to hold a result."
    return any((out / name).exists() for name in ("report.json", "probes.json"))


# ------------------------------------------------------------ trials

@functools.cache
def straight(kind):
    "The run that nobody disturbs: what it ends with, its writes, its seconds."
    out = Path("straight") / kind.replace(" ", "-")
    out.parent.mkdir(exist_ok=True)
    dead, code, writes, seconds = run_until(kind, out, Aim())
    assert not dead and code == 0, Path(f"{out}.0.txt").read_text()[-3000:]
    return KINDS[kind].outcome(out), writes, seconds


def aim_at(rng, writes, seconds):
    """One kill in four by the clock, the others at a write or within milliseconds of it; all by the
    clock where a run writes little and late."""
    if rng.random() < .25 or writes < 50: return Aim(seconds=rng.uniform(0, seconds))
    late = rng.choice((0, rng.uniform(0, .004)))
    return Aim(writes=rng.randint(1, max(2, writes // 4)), late=late)


def trial(kind, seed, most=8):
    "Kill a run up to `most` times, each time going on, then let it end: what was counted."
    rng, kills, aimed = random.Random(f"{kind} {seed}"), 0, 0
    want, writes, seconds = straight(kind)
    out = Path(tempfile.mkdtemp(prefix="trial-", dir=".")) / "run"
    found = dict(kills=0, aimed=0, unequal=[], lost=[], failed=[])
    try:
        for n in range(most + 1):
            aim = aim_at(rng, writes, seconds) if n < most else Aim()
            dead, code, _, _ = run_until(kind, out, aim)
            if not dead: break
            kills, aimed = kills + 1, aimed + (aim.writes is not None)
            logs, stages = promised(out) if out.exists() else ({}, {})
            found["lost"] += broken(logs, stages)
            if not KINDS[kind].resumes and out.exists():
                if whole(out) and KINDS[kind].outcome(out) != want: found["unequal"].append(f"{n}")
                out = out.with_name(f"run{n}")
        said = Path(f"{out}.0.txt").read_text(errors="replace")[-500:]
        if code: found["failed"].append(f"{kind} {seed}: exit {code}: {said}")
        elif KINDS[kind].outcome(out) != want: found["unequal"].append(f"{kind} {seed}")
    finally: shutil.rmtree(out.parent, ignore_errors=True)
    return found | dict(kills=kills, aimed=aimed)


def warm(desk):
    "Import what the runs import, once, without running anything in this process."
    read, write = os.pipe()
    for kind in KINDS:
        if KINDS[kind].processes > 1: continue
        if not (pid := os.fork()):
            silent = os.open(os.devnull, os.O_WRONLY)
            for handle in (1, 2): os.dup2(silent, handle)
            before = set(sys.modules)
            try: KINDS[kind].run(Path("warm") / kind, 0)
            finally:
                os.write(write, ("\n".join(sorted(set(sys.modules) - before)) + "\n").encode())
                os._exit(0)
        os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as names:
        for name in names.read().split():
            if name.startswith(("rewards", "__main")): continue
            with contextlib.suppress(Exception): importlib.import_module(name)
    results._version = functools.cache(results._version)   # reading it is a quarter of a save
    results.versions()
    gc.freeze()                                            # nothing of this is a child's garbage
