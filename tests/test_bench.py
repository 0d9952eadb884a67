"""The benchmarks run: every measuring script on tiny models, its counts against what a collator
and a plain sum say."""
import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_literate.results import judge

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_benchmark_runs_on_a_cpu():
    """`--tiny`: both sides in processes of their own, the same losses, finite figures, nothing
    recorded."""
    pytest.importorskip("trl")
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny"],
                          capture_output=True, text=True, timeout=600)
    line, = ([x for x in done.stdout.splitlines() if x.startswith("RESULTS ")]
             or [done.stderr[-2000:]])
    found = json.loads(line[8:])
    ours, theirs = found["tiny/tiny/ours"], found["tiny/tiny/trl"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4) and len(ours["losses"]) == 1
    assert ours["useful_flops"] == theirs["useful_flops"] > 0 and ours["pairs_per_second"] > 0
    assert [s["tokens"] for s in found["sweep"]["sweep"]] == [4 * (p + 2 * 65) for p in (16, 32)]
    kernels = found["attention"]["attention"]
    assert {f"tiny/{k}" for k in ("pairs", "dense", "flex", "varlen")} == set(kernels)
    for k in ("pairs", "dense", "varlen"): assert kernels[f"tiny/{k}"]["off"] < 1e-3
    assert "agrees" in found["attention"]["varlen"] or "refused" in found["attention"]["varlen"]
    assert (not (BENCHMARKS.parent / "nbs" / "results" / "bench_gpu.json").exists()
            or "cuda" in (BENCHMARKS.parent / "nbs" / "results"
                          / "bench_gpu.json").read_text().lower())


def test_both_arms_of_the_comparison_see_the_same_pairs(monkeypatch, tmp_path):
    "Sequential order, float32, a tiny model: the losses of every step agree."
    pytest.importorskip("trl")
    from dpo_literate.models import load_model, load_tokenizer, tiny_model, write_folder
    from dpo_literate.rows import tiny_tokenizer
    vs_trl = script("vs_trl")
    def turn(role, text): return [{"role": role, "content": text}]
    pairs = [dict(prompt=turn("user", f"the cat {i}"), chosen=turn("assistant", f"sat on {i}"),
                  rejected=turn("assistant", "a dog " * (1 + i % 3))) for i in range(10)]
    monkeypatch.setattr(vs_trl, "pairs", lambda n: pairs[:n])
    folder = write_folder(tmp_path / "tiny", tiny_model().float(), tiny_tokenizer())
    monkeypatch.setattr(vs_trl, "model_and_tokenizer",
                        lambda: (load_model(folder), load_tokenizer(folder)))
    monkeypatch.setattr(vs_trl, "LR", 1e-3)
    def arm(name): return vs_trl.arm(argparse.Namespace(arm=name, pairs=10, float32=True,
                                                        capacity=512))
    ours, theirs = arm("ours"), arm("trl")
    assert len(ours["losses"]) == 2 and ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert ours["losses"][1] != ours["losses"][0]
    assert ours["reference_seconds"] > 0 and ours["tokens_computed"] < theirs["tokens_computed"]


def test_prompt_sweep_counts_each_token_once():
    """Tokens seen at the embeddings: prompt + chosen + rejected a pair when packed, 2(prompt +
    longer) when padded, as TRL's collator lays them out."""
    pytest.importorskip("trl")
    sweep = script("anatomy").main(["prompts", "--tiny", "--repeats", "1"])["sweep"]
    for s in sweep:
        assert s["packed_tokens"] == s["pairs"] * (s["prompt"] + 2 * s["reply"])
        assert s["padded_tokens"] == s["trl_tokens"] == s["pairs"] * 2 * (s["prompt"] + s["reply"])
        assert s["packed_seconds"] > 0 and s["padded_seconds"] > 0
    assert sweep[1]["prompt"] == 2 * sweep[0]["prompt"]


def test_parts_of_a_step_are_all_there():
    anatomy = script("anatomy")
    found = anatomy.main(["stages", "--tiny", "--repeats", "1"])
    assert (list(found["seconds"]) == ["tokenise", "pack", "reference", "body forward",
                                       "head forward", "head backward", "body backward",
                                       "optimizer"])
    assert (all(v > 0 for v in found["seconds"].values())
            and all(v > 0 for v in found["rates"].values()))
    assert (found["tokens"] == sum(map(sum, found["lengths"]))
            and found["scored"] == sum(c + r for _, c, r in found["lengths"]))
    assert (found["memory"]["activations"] > 0
            and found["flops"]["body backward"] == 2 * found["flops"]["body forward"])


def test_flops_are_those_that_a_forward_pass_makes():
    """The products counted by hand against torch's own counter, on a padded row without
    attention's share."""
    from torch.utils.flop_counter import FlopCounterMode
    from dpo_literate.models import tiny_model
    anatomy, model = script("anatomy"), tiny_model().float()
    body, head = anatomy.products(model.config, 12, 12)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 12, dtype=torch.long))
    seen = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    dense = sum(v for k, v in seen.items() if k.split(".")[-1] in ("mm", "addmm", "bmm"))
    assert dense == anatomy.flops(body) + anatomy.flops(head)


def scan_args(bench, *flags):
    "What `variants.py scan` would be told."
    seen = {}
    bench.scan = lambda args: seen.update(vars(args))
    bench.main(["scan", *flags])
    return argparse.Namespace(**seen)


def test_scan_record_gathers_seeds_and_prompts(monkeypatch):
    "Means of each run over prompts, of each prompt over seeds; nothing else enters the file."
    bench, kept = script("variants"), {}
    monkeypatch.setattr(bench, "save_result", lambda name, values,
                        **more: kept.update(name=name, values=values, more=more))
    args = scan_args(bench, "--losses", "sigmoid")
    def run(seed, beta):
        return dict(rewards=[seed, beta, 3.], kls=[1., 2., 3.], accuracy=.5, chosen_drift=-1.,
                    rejected_drift=-2., length=9., seconds=1.)
    found = {("sigmoid", b, s): run(s, b) for s in (0, 1) for b in (.1, .2)}
    bench.record(args, found, {s: dict(rewards=[0., s, 0.]) for s in (0, 1)})
    first, second = kept["values"]["runs"]
    assert ((first["beta"], second["beta"]) == (.1, .2) and first["rewards"] == [.5, .1, 3.]
            and second["reward"] == [1.0667, 1.4] and first["judged"] == [.1, .1])
    assert (kept["values"]["before"]["rewards"] == [0., .5, 0.] and kept["more"]["seed"] == [0, 1]
            and kept["more"]["seconds"] == 4.)


def test_scan_claims_need_prompts_and_seeds_to_agree():
    bench = script("variants")
    def run(loss, beta, rewards, judged):
        return dict(loss=loss, beta=beta, rewards=rewards, judged=judged, reward=judged,
                    kls=rewards, kl=judged)
    low, high = (run("simpo", 2., [.9, .5] * 10, [.5, .6, .4]),
                 run("sigmoid", .1, [.1, .2] * 10, [.2, .2, .2]))
    def said(sign, one, other, key):
        values, items, betas = bench.scan_values([low, high], one, other, key)
        found = judge(values, bench.line(sign), items=items)
        return found["ours"], found["verdict"], betas
    one, other = ("simpo", "best"), ("sigmoid", "best")
    assert said(1, one, other, "rewards")[:2] == (pytest.approx(.3), "held")
    assert said(-1, one, other, "rewards")[1] == "did not hold"
    for r, drift in ((low, [1., 2., 3.]), (high, [-1., -1., 0.])): r["chosen_drift"] = drift
    low_high = ("simpo", "low"), ("sigmoid", "high"), "chosen_drift"
    assert said(1, *low_high) == (pytest.approx(8 / 3), "held", "beta 2.0 against 0.1")
    low["judged"] = [.5, .1, .5]
    assert said(1, one, other, "rewards")[1] == "too small to tell"


def test_claims_of_the_scan_ask_of_what_it_runs():
    bench = script("variants")
    assert len(bench.SCAN_CLAIMS) >= 6
    for *_, (one, a), (other, b), key, wanted in bench.SCAN_CLAIMS:
        assert ({one, other} <= set(bench.SCAN) and {a, b} <= {"low", "high", "best"}
                and key in bench.UNITS and wanted in (-1, 1))


def test_best_beta_is_chosen_where_it_is_not_judged():
    bench = script("variants")
    lucky, honest = (dict(loss="a", beta=1., rewards=[0., 9.] * 4),
                     dict(loss="a", beta=2., rewards=[1., 0.] * 4))
    assert bench.chosen_beta([lucky, honest], "a", "best") is honest
    assert (bench.chosen_beta([lucky, honest], "a", "low") is lucky
            and bench.chosen_beta([lucky, honest], "a", "high") is honest)


def test_tokens_of_trl_are_those_its_collator_lays_out():
    "The count beside ours on page 40, batch by batch, cut at the benchmark's length."
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    bench, g = script("vs_trl"), torch.Generator().manual_seed(0)
    def ids(longest): return [5] * int(torch.randint(1, longest, (1,), generator=g))
    data = [dict(prompt_ids=ids(600), chosen_ids=ids(200), rejected_ids=ids(200))
            for _ in range(20)]
    collate = DataCollatorForPreference(pad_token_id=0, max_length=bench.LENGTH)
    laid = [collate(data[i:i + bench.BATCH])["input_ids"] for i in range(0, len(data), bench.BATCH)]
    assert (bench.padded_tokens(data) == sum(x.numel() for x in laid)
            and any(x.shape[1] == bench.LENGTH for x in laid) and len(laid[-1]) < 2 * bench.BATCH)


def test_the_best_of_trl_counts():
    "Speed against its fastest arm, memory against that same arm, losses against all of them."
    bench = script("vs_trl")
    def arm(speed, memory, losses):
        return dict(pairs_per_second=speed, peak_memory_gb=memory, losses=losses)
    found = bench.compare(dict(ours=arm(8., 4., [.7, .5]), trl=arm(2., 10., [.7, .5]),
                               ours_checkpointing=arm(6., 2., [.7, .5]),
                               trl_precompute=arm(1., 8., [.7, .4]),
                               trl_checkpointing=arm(1.5, 5., [.7, .5])))
    assert (found["best_trl"], found["speed_ratio"], found["memory_ratio"]) == ("trl", 4., .4)
    assert ((found["leanest_trl"], found["memory_ratio_to_leanest"]) == ("trl_checkpointing", .8)
            and found["max_loss_difference"] == pytest.approx(.1))
    assert (found["lean_memory_ratio"], found["lean_speed_ratio"]) == (.4, 4.)
    with pytest.raises(ValueError):
        bench.compare(dict(ours=arm(1., 1., [.7]), trl=arm(1., 1., [.7, .6])))


def test_the_cost_of_a_neighbour_is_measured_arm_by_arm():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "load.py"), "--tiny", "--steps", "2",
                           "--threads", "1"], capture_output=True, text=True, timeout=300)
    line, = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")] or [done.stderr]
    one, = json.loads(line[7:])
    assert (one["threads"], one["policy"]) == (1, "as it is")
    assert one["alone"] > 0 and one["cost"] == one["beside"] / one["alone"]
