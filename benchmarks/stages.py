"""Where our seconds go on this machine, and how they grow with the prompt: `nbs/results/bench_stages.json`.

    python benchmarks/stages.py [--pairs 16] [--float32]

One forward and backward of packed rows of hh_harmless on the bundled model, taken apart by the profiler; the chip's rate on
large products; and a sweep of prompt lengths with the replies kept, packed and padded.
"""
import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile
from vs_trl import LENGTH, model_and_tokenizer, pairs

from dpo_literate.logps import pad_rows
from dpo_literate.packing import pack_rows, pair_length, packed_reply_logps
from dpo_literate.results import save_result
from dpo_literate.rows import Row, encode_pairs

KINDS = dict(attention=("scaled_dot_product",), products=("aten::mm", "aten::addmm", "aten::bmm", "mkldnn"), copies=("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat"))


def step(model, batches, bf16):
    "Forward and backward of some batches, one after the other."
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): out = packed_reply_logps(model, batch)
        (out.chosen - out.rejected).sum().backward()
    model.zero_grad(set_to_none=True)


def seconds(fn, repeats=2):
    "Fastest of some runs, after one to warm up."
    fn()
    found = []
    for _ in range(repeats):
        start = time.perf_counter(); fn(); found.append(time.perf_counter() - start)
    return min(found)


def shares(model, batches, bf16):
    "Share of the profiled time by kind of work; the head's is taken out of the products first."
    with profile(activities=[ProfilerActivity.CPU]) as seen: step(model, batches, bf16)
    events = seen.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    head = sum(e.cpu_time_total for e in events if e.key in ("_LinearLogps", "_LinearLogpsBackward"))
    inside = {k: sum(e.self_cpu_time_total for e in events if e.key.startswith(names)) for k, names in KINDS.items()}
    return dict(total_seconds=total / 1e6, head=head / total, **{k: v / total for k, v in inside.items()})


def rate(bf16, n=2048):
    "FLOP/s of a large product on this chip."
    a = torch.randn(n, n, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * n**3 / seconds(lambda: a @ a, 5)


def flops(model, rows):
    "FLOPs the pairs ask for: each token once through the body, reply tokens through the head, forward and backward."
    c = model.config
    d, kv, layers = c.hidden_size, c.hidden_size * c.num_key_value_heads // c.num_attention_heads, c.num_hidden_layers
    body = layers * (2 * d * d + 2 * d * kv + 3 * d * c.intermediate_size)
    seen = sum(len(r.prompt_ids)**2 / 2 + sum(len(y) * len(r.prompt_ids) + len(y)**2 / 2 for y in (r.chosen_ids, r.rejected_ids)) for r in rows)
    replies = sum(len(r.chosen_ids) + len(r.rejected_ids) for r in rows)
    return 3 * (2 * body * sum(map(pair_length, rows)) + 4 * layers * d * seen + 2 * d * c.vocab_size * replies)


def sweep(model, bf16):
    "Seconds and tokens of eight pairs as their prompts grow and their replies stay."
    found = []
    for p in (16, 64, 128, 256, 448):
        rows = [Row([5 + i] * p, [6] * 31 + [2], [7] * 31 + [2], id=str(i)) for i in range(8)]
        packed, padded = pack_rows(rows), [pad_rows(rows)]
        found.append(dict(prompt=p, packed_tokens=sum(b.input_ids.numel() for b in packed), padded_tokens=padded[0].input_ids.numel(),
                          packed_seconds=seconds(lambda: step(model, packed, bf16)), padded_seconds=seconds(lambda: step(model, padded, bf16))))
        print(found[-1], flush=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=16)
    p.add_argument("--float32", action="store_true")
    args = p.parse_args()
    began, bf16 = time.perf_counter(), not args.float32
    model, tokenizer = model_and_tokenizer()
    rows, _ = encode_pairs(pairs(args.pairs), tokenizer, max_length=LENGTH, truncation="keep_start")
    batches = pack_rows(rows)
    took = seconds(lambda: step(model, batches, bf16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16): forward = seconds(lambda: [packed_reply_logps(model, b) for b in batches])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.)
    for q in model.parameters(): q.grad = torch.zeros_like(q)
    update = seconds(optimizer.step)
    values = dict(pairs=len(rows), tokens=sum(map(pair_length, rows)), step_seconds=took, forward_seconds=forward, update_seconds=update,
                  flops=flops(model, rows), product_rate=rate(bf16), shares=shares(model, batches, bf16), sweep=sweep(model, bf16))
    print({k: v for k, v in values.items() if k != "sweep"})
    save_result("bench_stages", values, command="python benchmarks/stages.py", seed=None, seconds=time.perf_counter() - began,
                config=dict(vars(args), threads=torch.get_num_threads()), what="packed forward and backward of SmolLM2-135M by kind of work, and a sweep of prompt lengths")


if __name__ == "__main__": main()
