"""What a busy neighbour costs: the same work with the machine to itself, and beside a process that
keeps one core busy; for each number of threads and each way in which idle threads wait.

    python benchmarks/load.py [--steps 12] [--threads 1 2] [--tiny]

The work is what this book does most: tokens drawn by the bundled model, 64 replies at a time. Each
arm is a process of its own, since threads take their habits from the environment when they start:
`OMP_WAIT_POLICY` is left alone, ACTIVE (they spin) or PASSIVE (they sleep). Needs a quiet machine.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import torch

POLICIES = ("", "ACTIVE", "PASSIVE")


def work(args):
    "Seconds of some steps of the sampler, after one that is not counted."
    from dpo_literate.models import load_model, tiny_model
    from dpo_literate.sampling import decoder, sampling_dtype
    model = tiny_model() if args.tiny else load_model("bundled")
    d, rows = decoder(model, sampling_dtype(model)), torch.arange(64)
    with torch.inference_mode():
        d.begin([[5 + k % 7, 6, 7, 8] for k in range(64)], rows, args.steps + 1)
        d.step(rows)
        start = time.perf_counter()
        for _ in range(args.steps): d.step(rows)
    return time.perf_counter() - start


def arm(args, threads, policy, neighbour):
    "One process that works, beside one that only counts, or alone."
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env.pop("OMP_WAIT_POLICY", None)
    if policy: env["OMP_WAIT_POLICY"] = policy
    busy = neighbour and subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run([sys.executable, __file__, "--one", "--steps", str(args.steps),
                               *["--tiny"] * args.tiny], env=env, capture_output=True, text=True)
    finally:
        if busy: busy.kill(); busy.wait()
    if done.returncode: sys.exit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+",
                        default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for the tests")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = options()
    if args.one: print(work(args)); return
    found = []
    for threads in args.threads:
        for policy in POLICIES if threads > 1 else POLICIES[:1]:
            alone, beside = (arm(args, threads, policy, busy) for busy in (False, True))
            found.append(dict(threads=threads, policy=policy or "as it is", alone=alone,
                              beside=beside, cost=beside / alone))
            print(f"{threads} threads, {policy or 'as it is':8}  alone {alone:6.2f} s, beside a "
                  f"busy neighbour {beside:6.2f} s: {beside / alone:.2f} ×", flush=True)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__": main()
