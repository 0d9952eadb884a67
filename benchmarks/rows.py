"""What the preparation of many pairs takes: memory and seconds, from a file to the trainer's rows.

    python benchmarks/rows.py [--rows 200000] [--arms before 1 2] [--record]

The pairs are those of hh_harmless, repeated, each with a number in its question; the tokenizer is
the bundled model's. An arm is a process of its own, whose memory is watched from outside, that of
the processes it starts included: what each holds alone, and its share of what several hold
(proportional set size). `before` keeps pairs and rows as Python lists, as page 06 did once; a
number is `dataset_num_proc`. Arms already measured are read from `runs/rows/`.
"""
import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time

SIZES = dict(max_length=1024)


def pairs_file(rows):
    "A file of so many pairs, no two alike."
    from dpo_literate.results import data_dir, repo_dir
    path = repo_dir() / "runs" / "rows" / f"pairs-{rows}.jsonl"
    if path.is_file(): return path
    with gzip.open(data_dir() / "hh_harmless" / "train.jsonl.gz", "rt", encoding="utf-8") as f:
        lines = f.read().splitlines()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as out:
        for i in range(rows):
            row = json.loads(lines[i % len(lines)])
            row["prompt"][-1]["content"] += f" ({i})"
            print(json.dumps(row | dict(id=f"hh-{i}")), file=out)
    return part.replace(path)


def as_it_was(path, tokenizer, args):
    "Pairs as a list of dicts, rows as a list of lists of numbers that all rows share."
    from dataclasses import replace
    from dpo_literate import reading
    from dpo_literate.inputs import refuse_faults, run_date
    from dpo_literate.rows import encode_pair
    numbers = list(range(len(tokenizer)))
    class Plain(list): settled = lambda self: self
    reading.Records = Plain
    pairs = reading.read_preferences(path)
    refuse_faults(pairs, tokenizer, args)
    shared = lambda ids: [numbers[i] for i in ids]
    made = (encode_pair(p, tokenizer, **SIZES, date=run_date(args.output_dir)) for p in pairs)
    return [replace(r, **{k: shared(getattr(r, k)) for k in ("prompt_ids", "chosen_ids",
                                                              "rejected_ids")}) for r in made]


def prepare(arm, rows):
    "Rows of the trainer, counted and fingerprinted; printed as JSON."
    from dpo_literate.inputs import prepare_rows
    from dpo_literate.models import load_tokenizer
    from dpo_literate.settings import DPOConfig
    path, tokenizer = pairs_file(rows), load_tokenizer("bundled")
    args = DPOConfig(tempfile.mkdtemp(), use_cpu=True, report_to=[], **SIZES,
                     dataset_num_proc=None if arm == "before" else int(arm))
    import dpo_literate.trainer                     # what a run has loaded by then
    assert dpo_literate.trainer.DPOTrainer
    print("begin", flush=True)
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    made = as_it_was(path, tokenizer, args) if arm == "before" else \
        prepare_rows(path, tokenizer, args)[0]
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    h, tokens = hashlib.sha256(), 0
    for r in made:
        h.update(r.key.encode())
        tokens += len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids)
    print(json.dumps(dict(rows=len(made), tokens=tokens, sha=h.hexdigest()[:16],
                          seconds=seconds, cpu=cpu)), flush=True)


def held_by(process):
    "Memory of a process and of those it started (GB): each page once."
    import psutil
    total = 0
    for p in (process, *process.children(recursive=True)):
        try: total += p.memory_full_info().pss
        except psutil.Error: pass
    return total / 1e9


def watched(arm, rows):
    "An arm in a process of its own; the most memory seen, before it began and at all."
    import psutil
    pairs_file(rows)
    argv = [sys.executable, __file__, "--one", arm, "--rows", str(rows)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begin\n"
    process, most = psutil.Process(child.pid), []
    while child.poll() is None:
        try: most.append(held_by(process))
        except psutil.Error: break
        time.sleep(2)
    told = json.loads(child.stdout.readline())
    return told | dict(before_gb=most[0], peak_gb=max(most), load=os.getloadavg()[0])


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--arms", nargs="+", default=["before", "1", "2"])
    parser.add_argument("--one", help="an arm to run in this very process")
    parser.add_argument("--record", action="store_true", help="write nbs/results/rows_cpu.json")
    return parser.parse_args()


def main():
    from dpo_literate.results import repo_dir, save_result
    from dpo_literate.runs import Stages
    args = options()
    if args.one: return prepare(args.one, args.rows[0])
    stages, found = Stages(repo_dir() / "runs" / "rows"), []
    for rows in args.rows:
        for arm in args.arms:
            if arm == "before" and rows > 200_000: continue
            one = stages.do("arm", dict(arm=arm, rows=rows), lambda: watched(arm, rows))
            found.append(one | dict(arm=arm, pairs=rows))
            print(f"{rows} pairs, {arm}: {one['peak_gb']:.2f} GB ({one['before_gb']:.2f} before), "
                  f"{one['seconds']:.0f} s, {one['cpu']:.0f} s of processor time", flush=True)
    for rows in args.rows: assert len({f["sha"] for f in found if f["pairs"] == rows}) == 1
    if not args.record: return
    save_result("rows_cpu", dict(arms=found), config=dict(**SIZES, cores=os.cpu_count()), seed=None,
                seconds=sum(f["seconds"] for f in found),
                command="python benchmarks/rows.py --rows 200000 1000000 --record",
                what="Memory and seconds of making a file of pairs into a trainer's rows.")


if __name__ == "__main__": sys.exit(main())
