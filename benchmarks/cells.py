"""What the scripts of recorded runs share: cells, one arm with one seed each.

A cell is a stage of page 00c: made once, kept in a small file of its own under a hash of its
settings, and gathered at the end. So a stopped run goes on where it was, and a cell that was made
with other settings is made anew.
"""
import argparse
import json
import sys
import time

from dpo_literate.results import Refusal, data_dir, judge, load_result, save_claims
from dpo_literate.results import above, below  # noqa: F401, the scripts take them from here
from dpo_literate.runs import Stages


def name_of(config):
    "The part of a cell's file name that people read: arm, data, seed."
    said = [str(config[k]) for k in ("arm", "data", "seed") if k in config]
    return "-" + "_".join(said).replace(", ", "_").replace(" ", "-")


def find(folder, config):
    "The record of a cell, or None."
    return Stages(folder).find("cell", config, name_of(config))


def made(folder, config, make):
    "The values of a cell: from disk, or made and put there."
    return Stages(folder).do("cell", config, lambda: make(config), name_of(config))


def work(todo, folder, run, shown, minutes):
    "Make missing cells until the time is up; how many are left."
    began, left = time.time(), [c for c in todo if find(folder, c) is None]
    print(f"{len(todo) - len(left)} of {len(todo)} cells are there", flush=True)
    while left and time.time() - began < 60 * minutes:
        config, start = left.pop(0), time.time()
        values = made(folder, config, run)
        print(f" {name_of(config)}: {time.time() - start:.0f} s  {shown(values)}", flush=True)
    return len(left)


def gathered(todo, folder):
    "The cells, each with its config, values and seconds; refused while one is missing."
    found = [(c, find(folder, c)) for c in todo]
    missing = [c for c, record in found if record is None]
    if missing:
        raise Refusal(f"{len(missing)} cells are missing, first {missing[0]['arm']} "
                      f"seed {missing[0]['seed']}: run it without --record")
    dirty = [c for c, record in found if record.get("commit", "").endswith("+")]
    if dirty:
        raise Refusal(f"{len(dirty)} cells ran on code that no commit holds, first "
                      f"{dirty[0]['arm']} seed {dirty[0]['seed']}: remove their files, commit, "
                      "and run them again")
    return [dict(config=c, values=record["value"], seconds=record["seconds"],
                 commit=record.get("commit", "unknown")) for c, record in found]


def ran(cells):
    "What every cell ran with: settings that all share, and of each what is its own, and commit."
    configs = [c["config"] for c in cells]
    shared = {k: v for k, v in configs[0].items()
              if all(k in c and c[k] == v for c in configs)}
    return dict(shared=shared, cells=[
        {k: v for k, v in c["config"].items() if k not in shared} | dict(commit=c["commit"])
        for c in cells])


def seeds_of(cells): return sorted({c["config"]["seed"] for c in cells})


def seconds_of(cells): return sum(c["seconds"] for c in cells)


def by_seed(cells, **which):
    "Values of the cells with these settings, in the order of their seeds."
    some = [c for c in cells if all(c["config"].get(k) == v for k, v in which.items())]
    return [c["values"] for c in sorted(some, key=lambda c: c["config"]["seed"])]


def mean_of(values):
    "Mean over seeds, and its interval; ends are None for one seed."
    found = judge(values)
    return found["ours"], found["low"], found["high"]


def row_of(claim, source, paper, found, bar, *, unit, n, test, detectable=None, **more):
    "A row about what is no mean over seeds; `found`: its number, low, high."
    ours, low, high = found
    word = "too small to tell" if low is None else bar(low, high)
    if detectable is None and low is not None: detectable = (high - low) / 2 * (1 + .84 / 1.96)
    return dict(claim=claim, source=source, paper_figure=paper, ours=ours, low=low, high=high,
                unit=unit, n=n, test=test, detectable=detectable, **more, verdict=word)


def claim_row(claim, source, paper, values, bar, *, unit="seed", items=None, **more):
    "A row about a mean over seeds, judged by the rule of page 00b; `more`: setup, seeds, command."
    return dict(claim=claim, source=source, paper_figure=paper,
                **judge(list(values), bar, unit, items), **more)


def told(rows):
    "Print the claims with their verdicts."
    for r in rows:
        ends = "" if r["low"] is None else f" [{r['low']:+.3g}, {r['high']:+.3g}]"   # of one seed
        print(f"{r['verdict']:18} {r['ours']:+.3g}{ends}  {r['claim']}")


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
    parser.add_argument(
        "--judge",
        action="store_true",
        help="write the claims table anew from the committed results",
    )
    return parser


def recorded(name):
    "Values of a committed result, and the seeds they are of."
    found = load_result(name, quiet=True)
    return found, found["_provenance"]["seed"]


def publish(*judges):
    "Judge committed records, write the claims of each page, and say them."
    for judged in judges:
        page, rows = judged()
        save_claims(page, rows)
        told(rows)


def run_or_record(args, configs, run, record, *judges):
    "Work on the cells, gather them and judge the record, or judge it anew; the exit code."
    try:
        if args.judge and not judges:
            raise Refusal("there is nothing to judge anew: use --record")
        todo = [] if args.judge else configs()
        if args.record: record(todo)
        if args.record or args.judge:
            publish(*judges)
            return 0
        left = run(todo, args.minutes)
        print(f"{left} cells left" if left else "all cells are there; add --record", flush=True)
        return 0
    except Refusal as no:
        print(f"{no}", file=sys.stderr)
        return no.code
