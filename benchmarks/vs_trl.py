"""DPOTrainer against TRL's: same pairs, order, seed, dtype, optimizer; each arm in its own process.

    python benchmarks/vs_trl.py [--pairs 128] [--float32] [--record]
        [--arms ours ours_checkpointing trl trl_precompute trl_checkpointing]

An arm is timed from its constructor to the end of `train()`: tokenizing, the reference pass and
every step included. Arms already measured with the same settings are read from `runs/bench/`;
`--fresh` measures all of them again.
The pairs are the first of `hh_harmless` (multi-turn), cut at 512 tokens as TRL cuts them.
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
from pathlib import Path

import torch

BATCH, LENGTH, LR, BETA = 8, 512, 1e-6, .1
OUR_ARMS = dict(ours={}, ours_checkpointing=dict(gradient_checkpointing=True))
TRL_ARMS = dict(trl={}, trl_precompute=dict(precompute_ref_log_probs=True),
                trl_checkpointing=dict(gradient_checkpointing=True))


def pairs(n):
    "The first n conversations of hh_harmless, in TRL's conversational format."
    from dpo_literate.results import Refusal, data_dir
    if data_dir() is None:
        raise Refusal("the benchmark reads hh_harmless: set DPO_LITERATE_DATA to the folder that "
                      "holds it")
    with gzip.open(data_dir() / "hh_harmless" / "train.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(n))]
    def turn(text): return [{"role": "assistant", "content": text}]
    return [{"prompt": r["prompt"], "chosen": turn(r["chosen"]), "rejected": turn(r["rejected"])}
            for r in rows]


def peak_gb():
    "Most memory this process has held, in GB."
    with open("/proc/self/status") as f: line = next(x for x in f if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def model_and_tokenizer():
    from dpo_literate.models import load_model, load_tokenizer
    return load_model("bundled"), load_tokenizer("bundled")


def settings(args, folder):
    "What both sides are told."
    return dict(output_dir=folder, per_device_train_batch_size=BATCH, max_length=LENGTH,
                bf16=not args.float32, num_train_epochs=1, logging_steps=1, report_to=[],
                use_cpu=not torch.cuda.is_available(), save_strategy="no", seed=0,
                train_sampling_strategy="sequential", disable_tqdm=True, learning_rate=LR,
                beta=BETA)


def ours(args, folder):
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    model, tokenizer = model_and_tokenizer()
    config = DPOConfig(**settings(args, folder), truncation_mode="keep_start", score_tail=True,
                       capacity=args.capacity, **OUR_ARMS[args.arm])
    data, start = pairs(args.pairs), time.perf_counter()
    trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.begin_run()
    reference = time.perf_counter() - start
    trainer.train()
    took = time.perf_counter() - start
    tokens = [(len(r.prompt_ids), len(r.chosen_ids), len(r.rejected_ids)) for r in trainer.rows]
    return trainer, took, dict(reference_seconds=reference, tokens_computed=sum(map(sum, tokens)),
                               lengths=tokens)


def theirs(args, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    model, tokenizer = model_and_tokenizer()
    own = {"gradient_checkpointing": False} | TRL_ARMS[args.arm]
    config = DPOConfig(**settings(args, folder), **own)
    data, start = Dataset.from_list(pairs(args.pairs)), time.perf_counter()
    trainer = DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    took = time.perf_counter() - start
    return trainer, took, dict(tokens_computed=padded_tokens(trainer.train_dataset))


def padded_tokens(data):
    "Tokens of TRL's batches: 2B rows as long as the longest of them."
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))
               for r in data]
    parts = [lengths[i:i + BATCH] for i in range(0, len(lengths), BATCH)]
    return sum(2 * len(part) * min(LENGTH, max(part)) for part in parts)


def arm(args):
    "Run one arm here; its figures."
    torch.manual_seed(0)
    side = ours if args.arm in OUR_ARMS else theirs
    with tempfile.TemporaryDirectory() as folder: trainer, seconds, more = side(args, folder)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return dict(pairs_per_second=args.pairs / seconds, seconds=seconds, peak_memory_gb=peak_gb(),
                losses=losses, **more)


def measured(args, name):
    "Run an arm in a fresh process, or read what it gave with the same settings."
    capacity = args.capacity if name in OUR_ARMS else None
    settings = [name, args.pairs, args.float32, capacity, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = Path("runs/bench") / f"{name}_{key}.json"
    if path.exists() and not args.fresh: return json.loads(path.read_text())
    flags = ["--pairs", str(args.pairs), "--arm", name] + ["--float32"] * args.float32
    if args.capacity: flags += ["--capacity", str(args.capacity)]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1",
               "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True,
                              env=env)
    line = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not line: sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line[0][7:])
    return json.loads(line[0][7:])


def compare(found):
    "The ratios that matter: the fastest of TRL's arms counts for speed, the leanest for memory."
    us, them = found["ours"], {k: v for k, v in found.items() if k in TRL_ARMS}
    lean = found.get("ours_checkpointing", us)
    best = max(them, key=lambda k: them[k]["pairs_per_second"])
    small = min(them, key=lambda k: them[k]["peak_memory_gb"])
    gaps = [max(abs(a - b) for a, b in zip(us["losses"], v["losses"], strict=True))
            for v in them.values()]
    def ratio(key, arm): return us[key] / them[arm][key]
    return dict(best_trl=best, speed_ratio=ratio("pairs_per_second", best),
                memory_ratio=ratio("peak_memory_gb", best), leanest_trl=small,
                memory_ratio_to_leanest=ratio("peak_memory_gb", small),
                lean_memory_ratio=lean["peak_memory_gb"] / them[small]["peak_memory_gb"],
                lean_speed_ratio=lean["pairs_per_second"] / them[small]["pairs_per_second"],
                max_loss_difference=max(gaps))


def show(name, a):
    print(f"{name:18s} {a['pairs_per_second']:7.3f} pairs/s  "
          f"{a['tokens_computed'] / a['seconds']:7.0f} tokens/s computed  "
          f"{a['peak_memory_gb']:5.2f} GB  {a['seconds']:6.1f} s  "
          f"loss {a['losses'][0]:.4f} → {a['losses'][-1]:.4f}", flush=True)


def parsed():
    "What was asked for on the command line."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=128)
    p.add_argument("--capacity", type=int, default=1536, help="tokens of our packed rows")
    p.add_argument("--float32", action="store_true", help="no autocast: losses must agree to 1e-4")
    arms = [*OUR_ARMS, *TRL_ARMS]
    p.add_argument("--arms", nargs="+", default=arms, choices=arms)
    p.add_argument("--record", action="store_true", help="write the comparison to nbs/results")
    p.add_argument("--fresh", action="store_true", help="measure every arm again")
    p.add_argument("--arm", choices=arms, help=argparse.SUPPRESS)
    return p.parse_args()


def record(args, values, seconds):
    from dpo_literate.results import save_result
    config = dict(pairs=args.pairs, batch=BATCH, max_length=LENGTH, lr=LR, beta=BETA,
                  capacity=args.capacity, bf16=not args.float32, threads=torch.get_num_threads())
    save_result("bench_cpu_float32" if args.float32 else "bench_cpu", values, seed=0,
                command="python benchmarks/vs_trl.py " + " ".join(sys.argv[1:]), seconds=seconds,
                config=config,
                what="dpo_literate.DPOTrainer against trl.DPOTrainer on hh_harmless: SmolLM2-135M, "
                "full fine-tune, constructor to last step, reference pass included")


def main():
    args = parsed()
    if args.arm: print("RESULT " + json.dumps(arm(args))); return
    began, found = time.perf_counter(), {}
    for name in args.arms:
        found[name] = measured(args, name); show(name, found[name])
    if "ours" not in found or len(found) < 2: return
    ratios = compare(found)
    for k, v in ratios.items(): print(f"{k:24s} {v if isinstance(v, str) else round(v, 5)}")
    if not args.record: print("not recorded: --record writes nbs/results"); return
    took = max(time.perf_counter() - began, sum(v["seconds"] for v in found.values()))
    record(args, {**found, **ratios}, took)


if __name__ == "__main__": main()
