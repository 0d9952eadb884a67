"""Loops and broken JSON of the bundled model, before and after it was trained on its own failures:
the recorded run of page 27.

    python benchmarks/failures.py [--seeds 0 1 2 3 4] [--minutes 40]
        train and measure, one small file a cell
    python benchmarks/failures.py --record
        gather the cells into nbs/results/

A cell is one seed: it splits the prompts, makes pairs of the model's own failures, and measures
the base model, SFT on the chosen replies, and DPO after SFT on the held-out prompts. What the base
model says is drawn once for all seeds. A finished cell is not run again.
"""
import random
import statistics

import torch
from cells import (above, below, claim_row, gathered, options, ran, recorded,
                   run_or_record, seconds_of,
                   seeds_of, work)

from dpo_literate.align import distinct
from dpo_literate.failures import failure_pairs, json_fault, loop_fault
from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.models import load_model, load_tokenizer
from dpo_literate.results import repo_dir, save_result
from dpo_literate.rows import encode_pairs
from dpo_literate.runs import Stages
from dpo_literate.sampling import decoder, greedy, prompt_tokens, sample, sampling_dtype

CELLS = repo_dir() / "runs" / "failures"
FORMS = ("List twenty words about {}.", "Write a poem about {}.", "Write song lyrics about {}.",
         "Write a long story about {}.")
TOPICS = ("kitchens, rivers, winter, trains, gardens, sleep, bicycles, the sea, a small town, tea, "
          "friends, the moon, old books, rain, horses, music, a market, bread, mountains, letters, "
          "the night bus, a lighthouse, spring, boats, cats, a bridge, snow, dancing, a journey, "
          "apples, stars, a school").split(", ")
JSON_FORMS = ("Turn this into JSON with title, year and tags, and write nothing else: {}.",
              "Reply only with a JSON object with the keys title, year (a number) and tags "
              "(a list of texts): {}.")
SCHEMA = dict(type="object", required=["title", "year", "tags"], additionalProperties=False,
              properties=dict(title=dict(type="string"), year=dict(type="integer"),
                              tags=dict(type="array", items=dict(type="string"))))
SETTINGS = dict(model="bundled", limit=96, json_limit=64, per_prompt=3, temperature=.9,
                loops=32, jsons=16, held_topics=8, held_jsons=20, beta=.1, learning_rate=3e-4,
                sft_rate=3e-4, lora_r=8, batch=4, epochs=1.)
ARMS = ("base", "sft", "sft+dpo")


def made_up(k):
    "The k-th thing to write as JSON, and its truth."
    rng = random.Random(f"thing {k}")
    first = rng.choice(("Blue", "Red", "Night", "Silent", "Paper", "Glass", "Iron", "Last"))
    second = rng.choice(("Door", "Ferry", "Sand", "Lamp", "River", "Garden", "Letter", "Station"))
    tags = rng.sample(("family", "winter", "ghosts", "money", "sailors", "desert", "love", "war",
                       "trains", "music", "school", "crime"), rng.choice((2, 3)))
    title, year = f"{first} {second}", rng.randrange(1950, 2020)
    told = (f"{title}, {year}, {', '.join(tags)}", f"{title} came out in {year} and is about "
            + " and ".join(tags))
    truth = '{{"title": "{}", "year": {}, "tags": [{}]}}'.format(
        title, year, ", ".join(f'"{t}"' for t in tags))
    return JSON_FORMS[k % 2].format(told[k // 2 % 2]), truth


def split(seed):
    "Topics and things to train on and to hold out, chosen by the seed."
    rng, topics = random.Random(seed), list(TOPICS)
    rng.shuffle(topics)
    cut = SETTINGS["held_topics"]
    train, held = ([f.format(t) for t in some for f in FORMS]
                   for some in (topics[cut:], topics[:cut]))
    things = list(range(96))
    rng.shuffle(things)
    jsons = [made_up(k) for k in things]
    return train, held, jsons[SETTINGS["held_jsons"]:], jsons[:SETTINGS["held_jsons"]]


def said_by(model, tokenizer, prompts, limit):
    "Greedy replies."
    d = decoder(model, sampling_dtype(model))
    return greedy(d, tokenizer, [prompt_tokens(p, tokenizer) for p in prompts], limit)


def base_says():
    "What the base model answers to every prompt: greedily, and three drawn replies."
    stages, tokenizer, memory = Stages(CELLS), load_tokenizer("bundled"), {}
    def model():
        if not memory: memory["d"] = decoder(load_model("bundled").eval(), "bfloat16")
        return memory["d"]
    stories = [f.format(t) for t in TOPICS for f in FORMS]
    things = [made_up(k)[0] for k in range(96)]
    drawn = {k: SETTINGS[k] for k in ("per_prompt", "limit", "temperature")}
    def draw():
        return [[r["text"] for r in rs] for rs in sample(model(), tokenizer, stories, **drawn)]
    greedily = stages.do("stories", dict(p=stories, limit=SETTINGS["limit"]),
                         lambda: said_by(model(), tokenizer, stories, SETTINGS["limit"]))
    jsons = stages.do("jsons", dict(p=things, limit=SETTINGS["json_limit"]),
                      lambda: said_by(model(), tokenizer, things, SETTINGS["json_limit"]))
    others = stages.do("drawn", dict(p=stories, **drawn), draw)
    return dict(zip(stories, zip(greedily, others))), dict(zip(things, jsons))


def pairs_of(seed):
    "Pairs of own failures, of both kinds, and what became of the prompts."
    stories, jsons = base_says()
    train, _, things, _ = split(seed)
    loops = failure_pairs(train, [[stories[p][0], *stories[p][1]] for p in train],
                          lambda k, y: loop_fault(y))
    prompts, truths = zip(*things)
    broken = failure_pairs(prompts, [[jsons[p]] for p in prompts],
                           lambda k, y: json_fault(y, SCHEMA), truths)
    random.Random(seed).shuffle(loops.rows)
    rows = loops.rows[:SETTINGS["loops"]] + broken.rows[:SETTINGS["jsons"]]
    used = [len(loops.rows[:SETTINGS["loops"]]), len(broken.rows[:SETTINGS["jsons"]])]
    return rows, dict(loops=dict(loops.counts), json=dict(broken.counts), used=used)


def train(start, pairs, seed, loss, rate):
    "The model after an epoch of one loss, an adapter merged in."
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed

    from dpo_literate.settings import DPOConfig
    from dpo_literate.trainer import DPOTrainer
    set_seed(seed)
    args = DPOConfig(str(CELLS / "trainer"), loss_type=[loss], beta=SETTINGS["beta"],
                     learning_rate=rate, num_train_epochs=SETTINGS["epochs"], seed=seed,
                     lr_scheduler_type="cosine", warmup_steps=1, bf16=True, use_cpu=True,
                     per_device_train_batch_size=SETTINGS["batch"], max_length=None,
                     save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1)
    lora = LoraConfig(r=SETTINGS["lora_r"], lora_alpha=2 * SETTINGS["lora_r"],
                      target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = load_tokenizer("bundled")
    chats = [dict(prompt=[dict(role="user", content=p["prompt"])],
                  chosen=[dict(role="assistant", content=p["chosen"])],
                  rejected=[dict(role="assistant", content=p["rejected"])]) for p in pairs]
    trainer = DPOTrainer(start, args=args, train_dataset=chats, processing_class=tokenizer,
                         peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    late = [h for h in trainer.state.log_history if "loss" in h][-2:]
    return trainer.model.merge_and_unload().eval(), statistics.mean(h["loss"] for h in late)


@torch.no_grad()
def perplexity(model, tokenizer, things, stories):
    "Of held-out text that nobody was trained on: true JSON, and clean replies of the base model."
    pairs = [dict(prompt=[dict(role="user", content=p)],
                  chosen=[dict(role="assistant", content=y)],
                  rejected=[dict(role="assistant", content=".")]) for p, y in (*things, *stories)]
    rows, _ = encode_pairs(pairs, tokenizer, max_length=None)
    with torch.autocast("cpu", torch.bfloat16):
        out = [reply_logps(model, pad_rows([r])) for r in rows]
    def of(some): return float(torch.tensor(
        -sum(o.sums[0].item() for o in some) / sum(o.lengths[0].item() for o in some)).exp())
    return of(out[:len(things)]), of(out[len(things):])


def measure(model, tokenizer, held, things, clean, said=None, jsons=None):
    "Loop rate, JSON validity, length, variety, perplexity on held-out prompts."
    said = said or said_by(model, tokenizer, held, SETTINGS["limit"])
    jsons = jsons or said_by(model, tokenizer, [p for p, _ in things], SETTINGS["json_limit"])
    on_json, on_text = perplexity(model, tokenizer, things, clean)
    return dict(loops=sum(loop_fault(y) is not None for y in said),
                valid=sum(json_fault(y, SCHEMA) is None for y in jsons),
                exact=sum(y.split() == t.split() for y, (_, t) in zip(jsons, things)),
                words=statistics.mean(len(y.split()) for y in said), distinct2=distinct(said, 2),
                empty=sum(not y for y in said), perplexity_json=on_json, perplexity_text=on_text,
                said=[said[1][:200], jsons[0][:120]])


def cell(config):
    "One seed: base, SFT, DPO after SFT."
    seed, tokenizer = config["seed"], load_tokenizer("bundled")
    stories, jsons = base_says()
    _, held, _, things = split(seed)
    clean = [(p, next((y for y in stories[p][1] if y and not loop_fault(y)), None)) for p in held]
    clean = [(p, y) for p, y in clean if y][:12]
    pairs, became = pairs_of(seed)
    def look(model, *said): return measure(model, tokenizer, held, things, clean, *said)
    found = dict(base=look(load_model("bundled").eval(), [stories[p][0] for p in held],
                           [jsons[p] for p, _ in things]))
    sft, sft_loss = train(load_model("bundled"), pairs, seed, "sft", SETTINGS["sft_rate"])
    found["sft"] = look(sft)
    dpo, dpo_loss = train(sft, pairs, seed, "sigmoid", SETTINGS["learning_rate"])
    found["sft+dpo"] = look(dpo)
    return dict(arms=found, pairs=became, held=[len(held), len(things)],
                loss=dict(sft=sft_loss, dpo=dpo_loss))


def shown(values):
    return "; ".join(f"{arm} loops {v['loops']} valid {v['valid']} ppl {v['perplexity_text']:.2f}"
                     for arm, v in values["arms"].items())


# ------------------------------------------------------------ the record

COMMAND = "python benchmarks/failures.py --record --seeds {}"


def claims(found, more):
    "Rows of the claims table; a value a seed."
    paper = "Beyond Chatbots, arXiv:2604.14314"
    def rate(arm, key, of):
        return [v["arms"][arm][key] / v["held"][of] for v in found]
    def text(arm): return [v["arms"][arm]["perplexity_text"] for v in found]
    def minus(a, b): return [x - y for x, y in zip(a, b)]
    base, sft, dpo = (rate(arm, "loops", 0) for arm in ARMS)
    rows = [
        ("SFT, then DPO on own failures cuts the loop rate by more than half (relative fall)",
         paper, "59.4 % on average over five families, 87.6 % at best (reconstructed)",
         [1 - d / b for d, b in zip(dpo, base)], above(.5)),
        ("SFT, then DPO lowers the loop rate (difference to base)", paper, "in all five families",
         minus(dpo, base), below(0)),
        ("SFT alone raises the loop rate (difference to base)", paper,
         "0.60 to 3.23 % for one model (reconstructed)", minus(sft, base), above(0)),
        ("DPO after SFT lowers the loop rate below SFT's", paper, "3.23 to 1.41 % (reconstructed)",
         minus(dpo, sft), below(0)),
        ("The same pairs mend JSON: share of valid replies rises (difference to base)",
         "our transfer of the idea", None, minus(rate("sft+dpo", "valid", 1),
                                                 rate("base", "valid", 1)), above(0)),
        ("Perplexity of clean held-out replies stays within 5 % (relative change)",
         "our check", None, [d / b - 1 for d, b in zip(text("sft+dpo"), text("base"))],
         below(.05))]
    return [claim_row(*row, **more) for row in rows]


def record(todo):
    cells = gathered(todo, CELLS)
    seeds = seeds_of(cells)
    command = COMMAND.format(" ".join(map(str, seeds)))
    values = [dict(seed=c["config"]["seed"], **c["values"]) for c in cells]
    save_result("failures", dict(seeds=values), command=command, config=SETTINGS, seed=seeds,
                seconds=seconds_of(cells), ran=ran(cells),
                what="Loops and broken JSON of SmolLM2-135M-Instruct "
                "on held-out prompts: base, SFT on own failures' repairs, DPO after it")


def judge():
    "Page, and its claims, from the committed record."
    record, seeds = recorded("failures")
    found, command = record["seeds"], record["_provenance"]["command"]
    n, used = found[0]["held"], found[0]["pairs"]["used"]
    setup = (f"SmolLM2-135M-Instruct, LoRA r {SETTINGS['lora_r']}, {used[0]} loop and {used[1]} "
             f"JSON pairs, {n[0]} and {n[1]} held-out prompts a seed")
    return "27_own_failures", claims(found, dict(setup=setup, seeds=seeds, command=command))


def main():
    args = options(__doc__, [0, 1, 2, 3, 4]).parse_args()
    def configs(): return [dict(arm="failures", seed=s, **SETTINGS) for s in args.seeds]
    def run(todo, minutes): return work(todo, CELLS, cell, shown, minutes)
    return run_or_record(args, configs, run, record, judge)


if __name__ == "__main__": raise SystemExit(main())
