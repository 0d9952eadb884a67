"""Our packed step against TRL's trainer: same pairs, order, seed, dtype, optimizer; each side in a process of its own.

    python benchmarks/vs_trl.py [--pairs 32] [--capacity 1024] [--float32]

Our side is the bare loop below (reference pass, packed rows one at a time, clip, AdamW), not yet DPOTrainer: the result says so.
"""
import argparse
import gzip
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

BATCH, LENGTH, LR, BETA = 8, 512, 1e-6, .1


def data(n):
    from dpo_literate.results import data_dir
    path = data_dir() / "hh_harmless" / "train.jsonl.gz"
    with gzip.open(path, "rt") as f: rows = [json.loads(line) for line, _ in zip(f, range(n))]
    def turn(text): return [{"role": "assistant", "content": text}]
    return [{"prompt": r["prompt"], "chosen": turn(r["chosen"]), "rejected": turn(r["rejected"])} for r in rows]


def peak_gb():
    with open("/proc/self/status") as f: line = next(x for x in f if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_literate.models import resolve_model
    path = str(resolve_model("bundled"))
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def encoded(pairs, tok):
    "The ids that TRL's own preparation gives: template, cut at LENGTH from the end."
    from dpo_literate.rows import Row
    def ids(messages, **kw): return list(tok.apply_chat_template(messages, return_dict=True, **kw)["input_ids"])
    rows = []
    for i, p in enumerate(pairs):
        x = ids(p["prompt"], add_generation_prompt=True)
        y = [ids(p["prompt"] + p[side]) for side in ("chosen", "rejected")]
        assert all(t[:len(x)] == x for t in y) and len(x) < LENGTH
        rows.append(Row(x, *(t[len(x):LENGTH] for t in y), id=str(i)))
    return rows


def ours(args):
    from dpo_literate.packing import pack_rows, packed_reply_logps
    model, tok = model_and_tokenizer()
    rows = encoded(data(args.pairs), tok)
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0., fused=True)
    def cast(): return torch.autocast("cpu", torch.bfloat16, enabled=not args.float32)
    model.eval(); start = time.perf_counter(); ref, tokens = {}, 0
    def packs(group):   # the same packs for reference and policy: the first loss is ln 2 to the bit, in bf16 too
        longest = max(len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in group)
        return pack_rows(group, capacity=max(args.capacity, longest))
    groups = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]
    with torch.no_grad():
        for pack in (pack for group in groups for pack in packs(group)):
            with cast(): out = packed_reply_logps(model, pack)
            ref.update({r.id: (c, l) for r, c, l in zip(pack.rows, out.chosen, out.rejected)})
    ref_seconds = time.perf_counter() - start
    losses = []
    for step, group in enumerate(groups):
        total = 0.
        for g in opt.param_groups: g["lr"] = LR * (1 - step / len(groups))
        for pack in packs(group):
            with cast(): out = packed_reply_logps(model, pack)
            rc, rl = (torch.stack(t) for t in zip(*(ref[r.id] for r in pack.rows)))
            loss = -F.logsigmoid(BETA * (out.chosen - rc - out.rejected + rl)).sum() / len(group)
            loss.backward(); total += loss.item(); tokens += pack.input_ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad(set_to_none=True); losses.append(total)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "reference_seconds": ref_seconds, "tokens_computed": tokens, "losses": losses,
                "pairs_per_second": len(rows) / seconds, "peak_memory_gb": peak_gb()}


def trl(args):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer
    model, tok = model_and_tokenizer()
    config = DPOConfig(output_dir="/tmp/vs_trl", per_device_train_batch_size=BATCH, max_length=LENGTH, bf16=not args.float32,
        gradient_checkpointing=args.checkpointing, num_train_epochs=1, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", seed=0, disable_tqdm=True, learning_rate=LR)
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(data(args.pairs)), processing_class=tok)
    trainer._get_train_sampler = lambda *a, **k: SequentialSampler(trainer.train_dataset)
    start = time.perf_counter(); trainer.train(); seconds = time.perf_counter() - start
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return {"seconds": seconds, "losses": losses, "pairs_per_second": args.pairs / seconds, "peak_memory_gb": peak_gb()}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--pairs", type=int, default=32); p.add_argument("--capacity", type=int, default=1024)
    p.add_argument("--float32", action="store_true"); p.add_argument("--side", choices=("ours", "trl"))
    p.add_argument("--checkpointing", action="store_true", help="TRL side: its memory-saving option (slower on a CPU)")
    args = p.parse_args(); torch.manual_seed(0)
    if args.side:
        print("RESULT " + json.dumps({"ours": ours, "trl": trl}[args.side](args))); return
    began, got = time.perf_counter(), {}
    for side in ("ours", "trl"):
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True, check=False)
        line = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
        if not line: sys.exit(out.stderr[-3000:])
        got[side] = json.loads(line[0][7:])
        print(side, {k: v for k, v in got[side].items()}, flush=True)
    a, b = got["ours"], got["trl"]
    assert len(a["losses"]) == len(b["losses"])
    values = {"ours": a, "trl": b, "speed_ratio": a["pairs_per_second"] / b["pairs_per_second"],
        "memory_ratio": a["peak_memory_gb"] / b["peak_memory_gb"],
        "max_loss_difference": max(abs(x - y) for x, y in zip(a["losses"], b["losses"]))}
    print({k: round(v, 4) for k, v in values.items() if isinstance(v, float)})
    from dpo_literate.results import save_result
    name = "bench_cpu_float32" if args.float32 else "bench_cpu"
    save_result(name, values, command="python benchmarks/vs_trl.py " + " ".join(sys.argv[1:]), seed=0, seconds=time.perf_counter() - began,
        config=dict(vars(args), batch=BATCH, max_length=LENGTH, lr=LR, beta=BETA, threads=torch.get_num_threads()),
        what="bare packed loop (not DPOTrainer) against trl.DPOTrainer: SmolLM2-135M full fine-tune, reference pass included")


if __name__ == "__main__": main()
