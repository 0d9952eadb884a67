"""DPO on one GPU: pairs per second, share of the bf16 rate, peak memory; beside TRL's if installed.

    python benchmarks/gpu.py [--arms ours trl] [--only 1b-full/hh ...] [--fresh]

Models are Llama architectures with random weights (no download), pairs are random tokens with the
lengths of known data sets. Every arm runs in a process of its own; figures go to
`nbs/results/bench_gpu.json`. `--tiny` runs the same code on a CPU in seconds, for the tests: its
figures mean nothing and are not recorded.
"""
import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import torch

MODELS = {  # Llama-3.2-1B and Llama-3.1-8B, by their published shapes
    "1b-full": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                    num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256,
                    tie_word_embeddings=True),
    "8b-lora": dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256,
                    tie_word_embeddings=False),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
                 tie_word_embeddings=True)}
LENGTHS = {  # medians of prompt and reply in tokens, and spread of their logarithms
    "hh": dict(prompt=110, reply=55, spread=.8),                # multi-turn HH
    "ultrafeedback": dict(prompt=120, reply=300, spread=.6),
    "tiny": dict(prompt=20, reply=10, spread=.5)}
MICRO, LIMIT = 16, 2048


def lengths(kind, n, seed=0):
    "Lengths of n pairs: prompt, chosen, rejected, each log-normal, cut at LIMIT in all."
    shape, g = LENGTHS[kind], torch.Generator().manual_seed(seed)
    def draw(median):
        length = median * (shape["spread"] * torch.randn(n, generator=g)).exp()
        return length.long().clamp(4, LIMIT // 3).tolist()
    return list(zip(draw(shape["prompt"]), draw(shape["reply"]), draw(shape["reply"])))


def rows(kind, n, vocab):
    "Pairs of random tokens, each reply closed by the end token."
    from dpo_literate.rows import Row
    g = torch.Generator().manual_seed(1)
    def ids(k): return torch.randint(3, vocab, (k,), generator=g).tolist()
    return [Row(ids(p), ids(c) + [2], ids(r) + [2], id=str(i))
            for i, (p, c, r) in enumerate(lengths(kind, n))]


def words(ids): return " ".join(f"t{i}" for i in ids)


def tokenizer(vocab):
    "One word, one id: TRL, which wants text, then sees exactly our tokens."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t1"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="t0", unk_token="t1",
                                   eos_token="t2")


def model(name):
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model("llama", **MODELS[name], max_position_embeddings=8192,
                                  bos_token_id=1, eos_token_id=2, pad_token_id=0)
    dtype = torch.bfloat16 if name == "8b-lora" else torch.float32
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapter(name):
    from peft import LoraConfig
    if name != "8b-lora": return None
    return LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM",
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def bf16_rate(n=8192, repeats=20):
    "FLOP/s of a large bf16 matrix product on this chip, measured."
    if not torch.cuda.is_available(): n, repeats = 512, 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3): a @ a
    start = clock()
    for _ in range(repeats): a @ a
    return 2 * n**3 * repeats / (clock() - start)


def clock():
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


def useful_flops(name, pairs, train_weights=True):
    """FLOPs the pairs themselves ask for: every prompt and reply token once through the body, every
    reply token through the head, attention over what a token may see; forward and backward (3×; 2×
    where the weights are frozen) plus the reference's forward."""
    c = MODELS[name]
    d, f, layers, V = (c[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                      "vocab_size"))
    kv = c["num_key_value_heads"] * d // c["num_attention_heads"]
    body = layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    seen = sum(p * p / 2 + sum(y * p + y * y / 2 for y in (a, b)) for p, a, b in pairs)
    replies = sum(a + b for _, a, b in pairs)
    forward = 2 * body * sum(map(sum, pairs)) + 4 * layers * d * seen + 2 * d * V * replies
    return forward * (1 + (3 if train_weights else 2))


def settings(args, folder):
    return dict(output_dir=folder, per_device_train_batch_size=MICRO, max_length=LIMIT,
                bf16=not args.tiny, num_train_epochs=1, logging_steps=1, report_to=[],
                save_strategy="no", seed=0, disable_tqdm=True, learning_rate=1e-6,
                use_cpu=not torch.cuda.is_available(), gradient_checkpointing=args.checkpointing)


def ours(args, data, folder):
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    config = DPOConfig(**settings(args, folder), capacity=args.capacity)
    words_of_it = tokenizer(MODELS[args.model]["vocab_size"])
    return DPOTrainer(model(args.model), args=config, train_dataset=data,
                      processing_class=words_of_it, peft_config=adapter(args.model))


def theirs(args, data, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    config = DPOConfig(**settings(args, folder), precompute_ref_log_probs=args.precompute)
    text = [dict(prompt=words(r.prompt_ids), chosen=" " + words(r.chosen_ids[:-1]),
                 rejected=" " + words(r.rejected_ids[:-1])) for r in data]
    net, lora = model(args.model), adapter(args.model)
    # a model without a name cannot be loaded a second time
    ref = None if lora or args.precompute else copy.deepcopy(net)
    return DPOTrainer(net, ref, args=config, train_dataset=Dataset.from_list(text),
                      processing_class=tokenizer(MODELS[args.model]["vocab_size"]),
                      peft_config=lora)


def arm(args):
    "One side, one model, one set of lengths: warm up on a few pairs, then measure."
    make, n = ours if args.arm == "ours" else theirs, args.pairs
    data = rows(args.lengths, n + MICRO, MODELS[args.model]["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        make(args, data[:MICRO], folder).train()                        # compiles, autotunes
        if torch.cuda.is_available():
            torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        start = clock()
        trainer = make(args, data[MICRO:], folder)
        trainer.train()
        seconds = clock() - start
    tokens = [(len(r.prompt_ids), len(r.chosen_ids), len(r.rejected_ids)) for r in data[MICRO:]]
    flops, rate = useful_flops(args.model, tokens, args.model != "8b-lora"), bf16_rate()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.
    return dict(pairs_per_second=n / seconds, seconds=seconds, peak_memory_gb=memory,
                losses=losses, useful_flops=flops, bf16_flops_per_second=rate,
                share_of_bf16_rate=flops / seconds / rate)


def sweep(args):
    "Seconds of one training step as prompts grow and replies stay: ours, one row of pairs."
    from dpo_literate.packing import pack_rows, packed_reply_logps
    from dpo_literate.rows import Row
    net, found = model(args.model), []
    for p in (16, 32) if args.tiny else (128, 256, 512, 1024, 2048, 4096):
        pairs = [Row([5] * p, [6] * 64 + [2], [7] * 64 + [2], id=str(i)) for i in range(4)]
        batch, = pack_rows(pairs, capacity=4 * (p + 130))
        def step():
            packed_reply_logps(net, batch.to(net.device)).sums.sum().backward()
            net.zero_grad(set_to_none=True)
        with torch.autocast(net.device.type, torch.bfloat16):
            step(); start = clock()
            for _ in range(3): step()
        found.append(dict(prompt=p, tokens=batch.input_ids.numel(), seconds=(clock() - start) / 3))
    return dict(sweep=found)


ATTENTION = dict(pairs="sdpa_pairs", dense="sdpa", flex="flex_attention", varlen="sdpa_segments")


def attention(args):
    """Seconds of a training step and its log-probs' distance from `pairs`, kernel by kernel: two
    dense calls a pair, one call with a mask, FlexAttention, one varlen call."""
    from dpo_literate.packing import attention_for, pack_rows
    from dpo_literate.logps import reply_logps
    from dpo_literate.segments import check_varlen
    net, c, found = model(args.model), MODELS[args.model], {}
    kinds = ("tiny",) if args.tiny else ("hh", "ultrafeedback")
    lent = {k: pack_rows(rows(k, MICRO, c["vocab_size"]), args.capacity)[0].to(net.device)
            for k in kinds}
    for kind, batch in lent.items():
        first = None
        for name, implementation in ATTENTION.items():
            net.config._attn_implementation = implementation
            def step():
                mask = attention_for(batch, implementation, torch.bfloat16)
                sums = reply_logps(net, batch, attention_mask=mask).sums
                sums.sum().backward()
                net.zero_grad(set_to_none=True)
                return sums.detach()
            try:
                with torch.autocast(net.device.type, torch.bfloat16, enabled=not args.tiny):
                    sums = step(); start = clock()          # the first call compiles and tunes
                    for _ in range(3): step()
            except Exception as why:                        # a kernel that this machine lacks
                found[f"{kind}/{name}"] = dict(failed=f"{type(why).__name__}: {why}"[:200])
                continue
            seconds, first = (clock() - start) / 3, sums if first is None else first
            found[f"{kind}/{name}"] = dict(seconds=seconds, tokens=batch.input_ids.numel(),
                                           off=(sums - first).abs().max().item())
    width = c["hidden_size"] // c["num_attention_heads"]
    trusted = check_varlen(net.device, torch.bfloat16, c["num_attention_heads"],
                           c["num_key_value_heads"], width)
    return dict(attention=found, varlen=trusted or "agrees with its plain twin")


def child(args, **over):
    "Run one arm in a fresh process."
    flags = []
    for name, value in over.items():
        if value not in (None, False): flags += [f"--{name}"] + [str(value)] * (value is not True)
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    line = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if line: return json.loads(line[0][7:])
    return dict(failed=done.stderr.strip().splitlines()[-1:] or ["no output"])


def parsed():
    "What was asked for on the command line."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", nargs="+", default=["ours", "trl"], choices=["ours", "trl"])
    p.add_argument("--only", nargs="+", help="such as 1b-full/hh")
    p.add_argument("--pairs", type=int, default=256)
    p.add_argument("--capacity", type=int, default=8192, help="tokens of our packed rows")
    p.add_argument("--checkpointing", action="store_true",
                   help="gradient checkpointing, on both sides")
    p.add_argument("--precompute", action="store_true", help="TRL's precomputed reference")
    p.add_argument("--tiny", action="store_true", help="seconds on a CPU, not recorded")
    for name in ("arm", "model", "lengths"): p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return p.parse_args()


def cells_of(args):
    if args.tiny: return ["tiny/tiny"]
    models, lengths = ("1b-full", "8b-lora"), ("hh", "ultrafeedback")
    return args.only or [f"{m}/{k}" for m in models for k in lengths]


def measured(args):
    "Every cell and the sweep, each in a process of its own."
    pairs, found = (16 if args.tiny else args.pairs), {}
    shared = dict(tiny=args.tiny, capacity=512 if args.tiny else args.capacity,
                  checkpointing=args.checkpointing)
    for cell in cells_of(args):
        name, kind = cell.split("/")
        for side in args.arms:
            got = found[f"{cell}/{side}"] = child(args, arm=side, model=name, lengths=kind,
                                                  pairs=pairs, precompute=args.precompute, **shared)
            short = {k: round(v, 4) for k, v in got.items()
                     if isinstance(v, float) and math.isfinite(v)}
            print(f"{cell}/{side}", short or got, flush=True)
    found["sweep"] = child(args, arm="sweep", model="tiny" if args.tiny else "1b-full", **shared)
    print("sweep", found["sweep"])
    found["attention"] = child(args, arm="attention", model="tiny" if args.tiny else "1b-full",
                               **shared)
    print("attention", found["attention"])
    return found


def main():
    args = parsed()
    if args.arm:
        what = dict(sweep=sweep, attention=attention).get(args.arm, arm)
        print("RESULT " + json.dumps(what(args)))
        return
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device here; --tiny runs the same code on a CPU")
    began, found = time.perf_counter(), measured(args)
    if args.tiny: print("RESULTS " + json.dumps(found)); return
    from dpo_literate.results import save_result
    config = dict(vars(args), micro_batch=MICRO, limit=LIMIT, lengths=LENGTHS, models=MODELS)
    save_result("bench_gpu", found, command="python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
                seed=0, seconds=time.perf_counter() - began, config=config,
                what="DPO on one GPU: ours and TRL's, reference pass included")


if __name__ == "__main__": main()
