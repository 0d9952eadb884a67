"""Tokens drawn per second: this book's sampler, its older self, `transformers.generate`, llama.cpp.

    python benchmarks/sampling.py [--rounds 3] [--prompts 64] [--llama PROGRAM] [--record]

The bundled model answers the first held-out prompts, four replies of at most 40 tokens to each, at
temperature 0.7. A round runs every arm once, on the same prompts, so that a busy machine is busy
for all of them; ratios are taken within a round. Rounds already measured are read from
`runs/sampling/`. PROGRAM is llama.cpp's `llama-batched-bench`; it reads the wheel's own GGUF file,
draws no tokens, and writes 28 a reply, about what the others come to.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

PER_PROMPT, LIMIT, TEMPERATURE = 4, 40, .7


def as_it_was(model, tokenizer, prompts, seed):
    "The loop of before: every reply reads its own prompt, sixteen prompts at a time."
    from dpo_literate.sampling import prompt_tokens, uniforms
    ids = [prompt_tokens(p, tokenizer) for p in prompts for _ in range(PER_PROMPT)]
    keys = [(p, k) for p in prompts for k in range(PER_PROMPT)]
    u = torch.stack([uniforms(seed, p, k, LIMIT) for p, k in keys])
    found, step = [], 16 * PER_PROMPT
    for k in range(0, len(ids), step):
        found += one_batch(model, tokenizer, ids[k:k + step], u[k:k + step])
    return found


@torch.inference_mode()
def one_batch(model, tokenizer, prompts, u):
    "Replies drawn together, each token from a running sum over the whole vocabulary."
    from dpo_literate.rows import control_ids
    from dpo_literate.sampling import left_pad
    step, mask, position = left_pad(prompts)
    replies, live, cache = [[] for _ in prompts], list(range(len(prompts))), None
    ends = torch.tensor(sorted(control_ids(tokenizer)))
    for t in range(u.shape[1]):
        out = model(input_ids=step, attention_mask=mask, position_ids=position,
                    past_key_values=cache, use_cache=True, logits_to_keep=1)
        cumulative = (out.logits[:, -1].float() / TEMPERATURE).softmax(-1).cumsum(-1)
        at, cache = u[live, t] * cumulative[:, -1], out.past_key_values
        token = torch.searchsorted(cumulative, at[:, None], right=True)[:, 0]
        for r, i in zip(live, token.tolist()): replies[r].append(i)
        going = (~torch.isin(token, ends)).nonzero()[:, 0]
        if len(going) == 0: break
        if len(going) < len(live): cache.batch_select_indices(going)
        live, step = [live[i] for i in going.tolist()], token[going, None]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], 1)
        position = position[going, -1:] + 1
    return replies


@torch.inference_mode()
def generate_of_transformers(model, tokenizer, prompts, seed):
    "`model.generate`, sixteen prompts at a time, four replies each."
    from dpo_literate.rows import control_ids
    from dpo_literate.sampling import left_pad, prompt_tokens
    stop, found = control_ids(tokenizer), []
    torch.manual_seed(seed)
    for k in range(0, len(prompts), 16):
        ids, mask, _ = left_pad([prompt_tokens(p, tokenizer) for p in prompts[k:k + 16]])
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.,
                             temperature=TEMPERATURE, num_return_sequences=PER_PROMPT,
                             max_new_tokens=LIMIT, eos_token_id=sorted(stop),
                             pad_token_id=tokenizer.pad_token_id)
        for y in out[:, ids.shape[1]:].tolist():
            end = next((t for t, i in enumerate(y) if i in stop), len(y) - 1)
            found.append(y[:end + 1])
    return found


def ours(model, tokenizer, prompts, seed, dtype):
    "The sampler of page 09e, the copy of the weights included."
    from dpo_literate.sampling import decoder, sample
    how = dict(per_prompt=PER_PROMPT, limit=LIMIT, temperature=TEMPERATURE, seed=seed)
    drawn = sample(decoder(model, dtype), tokenizer, prompts, **how)
    return [y["ids"] for ys in drawn for y in ys]


def cpu_seconds(who=resource.RUSAGE_SELF):
    spent = resource.getrusage(who)
    return spent.ru_utime + spent.ru_stime


def timed(make):
    "Tokens, seconds on the clock and seconds of processor time."
    wall, cpu = time.perf_counter(), cpu_seconds()
    replies = make()
    return dict(tokens=sum(map(len, replies)), replies=len(replies),
                seconds=time.perf_counter() - wall, cpu=cpu_seconds() - cpu)


def llama(program, replies, prompt_tokens, write=28):
    "llama.cpp's own benchmark: as many replies at a time, each with its prompt, or one for all."
    from dpo_literate.models import bundled_gguf
    batch, found, threads = min(replies, 64), {}, str(torch.get_num_threads())
    argv = [program, "-m", str(bundled_gguf()), "-c", str(batch * (prompt_tokens + write) + 256),
            "-npp", str(prompt_tokens), "-ntg", str(write), "-npl", str(batch),
            "-t", threads, "-tb", threads, "--output-format", "jsonl"]
    for name, more in (("llama.cpp", []), ("llama.cpp, one prompt for all", ["-pps"])):
        cpu = cpu_seconds(resource.RUSAGE_CHILDREN)
        done = subprocess.run(argv + more, capture_output=True, text=True, check=True)
        line = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))
        found[name] = dict(tokens=batch * write, replies=batch, seconds=line["t_pp"] + line["t_tg"],
                           cpu=cpu_seconds(resource.RUSAGE_CHILDREN) - cpu)
    return found


def rounded(x):
    "Every row in 255 steps of its own, as eight-bit products would have it."
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def eight_bit(model):
    "A copy whose weights and inputs are rounded to eight bits, row by row."
    from dpo_literate.sampling import FastDecoder

    class Weight(torch.Tensor):
        @classmethod
        def __torch_function__(cls, f, types, args=(), kwargs=None):
            plain = [a.as_subclass(torch.Tensor) if isinstance(a, Weight) else a for a in args]
            if f is torch.nn.functional.linear: plain[0] = rounded(plain[0])
            return f(*plain, **kwargs or {})
    def low(pair): return rounded(pair[0]).as_subclass(Weight), pair[1]
    d = FastDecoder(model)
    d.layers = [x._replace(**{n: low(getattr(x, n)) for n in ("qkv", "out", "gate_up", "down")})
                for x in d.layers]
    d.head = low(d.head)
    return d


@torch.inference_mode()
def error_of_copy(model, tokenizer, prompts, dtype):
    "KL of the model's next token from its copy's (nat a token), at T = 1, along greedy replies."
    from dpo_literate.sampling import FastDecoder, prompt_tokens
    ids, found = [prompt_tokens(p, tokenizer) for p in prompts], []
    own = FastDecoder(model)
    copy = eight_bit(model) if dtype == torch.int8 else FastDecoder(model, dtype)
    rows = torch.arange(len(ids))
    theirs, ours = (d.begin(ids, rows, LIMIT) for d in (own, copy))
    for _ in range(LIMIT // 2):
        p, q = (z.float().log_softmax(-1) for z in (theirs, ours))
        found.append((p.exp() * (p - q)).sum(-1))
        theirs, ours = (d.step(p.argmax(-1)) for d in (own, copy))
    return torch.cat(found).mean().item()


def one_round(k, args):
    "Every arm once; who goes first changes from round to round."
    from dpo_literate.align import HELD_OUT_TOPICS, shipped_prompts
    from dpo_literate.models import load_model, load_tokenizer
    from dpo_literate.sampling import prompt_tokens, sampling_dtype
    tokenizer, model = load_tokenizer("bundled"), load_model("bundled")
    fast, prompts = sampling_dtype(model), shipped_prompts(HELD_OUT_TOPICS)[:args.prompts]
    low = load_model("bundled", fast)
    ours(model, tokenizer, prompts[:2], k, fast)               # what is made at the first call
    arms = {"before": lambda: as_it_was(low, tokenizer, prompts, k),
            "transformers.generate": lambda: generate_of_transformers(low, tokenizer, prompts, k),
            "ours": lambda: ours(model, tokenizer, prompts, k, fast)}
    names = list(arms)[k % len(arms):] + list(arms)[:k % len(arms)]
    found = {name: timed(arms[name]) for name in names}
    if args.llama:
        length = statistics.mean(len(prompt_tokens(p, tokenizer)) for p in prompts)
        found |= llama(args.llama, len(prompts) * PER_PROMPT, round(length))
    for name, f in found.items():
        print(f"round {k}  {name:32}{f['tokens'] / f['seconds']:8.0f} tokens/s "
              f"({f['tokens'] / f['cpu']:.0f} a second of processor time)", flush=True)
    errors = {name: error_of_copy(model, tokenizer, prompts[:8], getattr(torch, name))
              for name in (fast, "int8")}
    return dict(dtype=fast, arms=found, errors=errors)


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--llama", help="path of llama.cpp's llama-batched-bench")
    parser.add_argument("--record", action="store_true",
                        help="write nbs/results/sampling_cpu.json")
    return parser.parse_args()


def main():
    from dpo_literate.results import repo_dir, save_result
    from dpo_literate.runs import Stages
    args = options()
    config = dict(prompts=args.prompts, per_prompt=PER_PROMPT, limit=LIMIT, temperature=TEMPERATURE,
                  threads=torch.get_num_threads(), llama=bool(args.llama))
    stages = Stages(repo_dir() / "runs" / "sampling")
    rounds = [stages.do("round", config, lambda: one_round(k, args), f"-{k}")
              for k in range(args.rounds)]
    if not args.record: return
    spent = sum(f["seconds"] for r in rounds for f in r["arms"].values())
    save_result("sampling_cpu", dict(rounds=rounds, load=os.getloadavg()[0]), config=config,
                seed=list(range(args.rounds)), seconds=spent,
                command="python benchmarks/sampling.py --llama llama-batched-bench --record",
                what="Tokens per second of samplers on the bundled model, all arms in each round.")


if __name__ == "__main__": sys.exit(main())
