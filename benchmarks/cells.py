"""What the scripts of recorded runs share: cells, one arm with one seed each.

A cell is made once, kept in a small file of its own, and gathered at the end. Its file is named
after a hash of its settings, so a stopped run goes on where it was, and a cell that was made with
other settings is made anew.
"""
import argparse
import hashlib
import json
import sys
import time

from dpo_literate.results import Refusal, bootstrap_interval, data_dir, write_atomic


def key(config): return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def work(todo, path, run, shown, minutes, clock=time.time):
    "Make missing cells until the time is up; how many are left. `clock` counts the seconds kept."
    began, left = time.time(), [c for c in todo if not path(c).exists()]
    print(f"{len(todo) - len(left)} of {len(todo)} cells are there", flush=True)
    while left and time.time() - began < 60 * minutes:
        config, start, spent = left.pop(0), time.time(), clock()
        values = run(config)
        write_atomic(
            path(config),
            json.dumps({"config": config, "values": values, "seconds": clock() - spent}),
        )
        print(
            f"  {config['arm']}{', ' + config['data'] if 'data' in config else ''}, "
            f"seed {config['seed']}: {time.time() - start:.0f} s  {shown(values)}",
            flush=True,
        )
    return len(left)


def gathered(todo, path):
    missing = [c for c in todo if not path(c).exists()]
    if missing:
        raise Refusal(
            f"{len(missing)} cells are missing, first {missing[0]['arm']} "
            f"seed {missing[0]['seed']}: run it without --record"
        )
    return [json.loads(path(c).read_text()) for c in todo]


def seeds_of(cells): return sorted({c["config"]["seed"] for c in cells})


def seconds_of(cells): return sum(c["seconds"] for c in cells)


def by_seed(cells, **which):
    "Values of the cells with these settings, in the order of their seeds."
    some = [c for c in cells if all(c["config"].get(k) == v for k, v in which.items())]
    return [c["values"] for c in sorted(some, key=lambda c: c["config"]["seed"])]


def above(x=0.0):
    return lambda low, high: (
        "held" if low > x else "did not hold" if high < x else "too small to tell"
    )


def below(x=0.0):
    return lambda low, high: (
        "held" if high < x else "did not hold" if low > x else "too small to tell"
    )


def claim_row(claim, source, paper, values, verdict, **more):
    "A row of a claims table about a mean over seeds; `more` holds its setup, seeds and command."
    low, high = bootstrap_interval(values)
    return dict(
        claim=claim,
        source=source,
        paper_figure=paper,
        ours=sum(values) / len(values),
        low=low,
        high=high,
        verdict=verdict(low, high),
        **more,
    )


def polite_pairs():
    "Instruction pairs as chats: the same content, polite preferred."
    if data_dir() is None:
        raise Refusal("no data: set DPO_LITERATE_DATA to the folder that holds polite_pairs")
    raw = [
        json.loads(line)
        for line in (data_dir() / "polite_pairs" / "pairs.jsonl").read_text().splitlines()
    ]
    def turn(role, text): return [{"role": role, "content": text}]

    return [
        dict(
            id=r["id"],
            prompt=turn("user", r["instruction"] + (f"\n\n{r['input']}" if r["input"] else "")),
            chosen=turn("assistant", r["chosen"]),
            rejected=turn("assistant", r["rejected"]),
        )
        for r in raw
        if r["chosen"].strip() != r["rejected"].strip()
    ]


def options(doc, seeds=None):
    "A parser with what every script understands."
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no new cell after this long"
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the results and the claims table from the finished cells",
    )
    return parser


def run_or_record(args, configs, run, record):
    "Work on the cells, or gather them; the exit code."
    try:
        todo = configs()
        if args.record: record(todo); return 0
        left = run(todo, args.minutes)
        print(f"{left} cells left" if left else "all cells are there; add --record", flush=True)
        return 0
    except Refusal as no:
        print(f"{no}", file=sys.stderr)
        return no.code
