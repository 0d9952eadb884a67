"The frontier beyond the page: random worlds, ties, and every method's cell on a tiny model."
import argparse, json, math
from dataclasses import replace
import pytest, torch
from torch import nn
from dpo_literate.frontier import (
    best_of,
    best_of_n,
    best_of_n_bound,
    reward_at,
    shortfall,
    summary,
    wide_world,
)
from dpo_literate.frontier_cells import (
    STRENGTHS,
    FrontierConfig,
    Job,
    main_frontier,
    plan,
    run_cell,
    run_jobs,
)
from dpo_literate.models import tiny_model, write_folder
from dpo_literate.ppo import world_dpo, world_ppo
from dpo_literate.ppo_text import reference_of
from dpo_literate.results import Refusal, claim_problems, load_result
from dpo_literate.reward import fit_scores
from dpo_literate.reward_model import with_score_head
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.world import World, kl, optimal_policy, total_variation

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_above_the_line(seed):
    world, g = wide_world(n_replies=12, seed=seed), torch.Generator().manual_seed(seed)
    for beta in (0.1, 0.5, 2.0):
        assert abs(shortfall(world, optimal_policy(world.ref_logps, world.rewards, beta))) < 1e-9
    for s in (.01, .3, 1., 3.):
        other = (
            world.ref_logps + s * (torch.randn(3, 12, generator=g) + world.rewards)
        ).log_softmax(-1)  # pulled the right way, still below
        assert shortfall(world, other) > -1e-10
    d = [reward_at(world, x) for x in (.1, .5, 1., 1.5)]
    assert d == sorted(d) and d[1] - d[0] > d[2] - d[1]  # rising, concave


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_by_enumeration(n):
    "All K^n draws, ties to the first drawn."
    g = torch.Generator().manual_seed(n)
    rewards = torch.tensor(
        [[0.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64
    )  # ties, and nothing but ties
    ref = torch.randn(2, 4, generator=g, dtype=torch.float64).log_softmax(-1)
    world = World(["a", "b"], [list("abcd")] * 2, torch.tensor([.5, .5]).double(), ref, rewards)
    draws = torch.cartesian_prod(*[torch.arange(4)] * n).view(-1, n)
    for i in range(2):
        p = ref[i][draws].sum(-1).exp()
        kept = draws.gather(1, rewards[i][draws].argmax(1, keepdim=True))[:, 0]
        want = torch.zeros(4, dtype=torch.float64).index_add(0, kept, p)
        torch.testing.assert_close(best_of_n(world, n)[i].exp(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_best_of_n_keeps_its_bound_and_nears_it_with_many_replies(seed):
    small, large = wide_world(n_replies=8, seed=seed), wide_world(n_replies=1000, seed=seed)
    for n in (2, 8, 64):
        for world in (small, large):
            assert (kl(best_of_n(world, n), world.ref_logps) <= best_of_n_bound(n) + 1e-12).all()
    assert best_of_n_bound(8) - kl(best_of_n(large, 8), large.ref_logps).mean() < .03


@pytest.mark.parametrize("seed", range(3))
def test_dpo_is_the_tilted_fit_on_any_verdicts(seed):
    world, g = wide_world(n_replies=6, seed=seed), torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 9, (3, 6, 6), generator=g).double() + .1
    wins.diagonal(dim1=-2, dim2=-1).zero_()
    for beta in (0.2, 1.0):
        assert (
            total_variation(
                world_dpo(world, wins, beta),
                optimal_policy(world.ref_logps, fit_scores(wins), beta),
            ).max()
            < 1e-6
        )


def test_ppo_with_the_true_reward_comes_close():
    world = wide_world()
    assert shortfall(world, world_ppo(world, world.rewards, .5, seed=7)[-1]) < .01


def test_the_record_is_what_the_code_gives():
    "One recorded world, computed again."
    from pathlib import Path
    import importlib.util
    path = Path(__file__).parent.parent / "benchmarks" / "frontier.py"
    spec = importlib.util.spec_from_file_location("bench_frontier", path)
    bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)
    kept = load_result("frontier_worlds", quiet=True)["worlds"][3]
    bench.PRICES = bench.PRICES[:1]
    again = bench.one_world(3)
    for name in ("dpo_exact", "dpo", "ppo_learned", "ppo_true", "dpo_minus_ppo"):
        assert again[name][0] == pytest.approx(kept[name][0], abs=1e-3)
    assert again["best_of_n"] == pytest.approx(kept["best_of_n"], abs=1e-9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A model and a reward as folders, and prompts."
    folder = tmp_path_factory.mktemp("frontier")
    judge = with_score_head(tiny_model(scale=1., seed=5))
    nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(0))
    write_folder(folder / "lm", tiny_model(scale=1.).float(), TOKENIZER)
    write_folder(folder / "judge", judge.float(), TOKENIZER)
    (folder / "prompts.txt").write_text(
        "\n".join(f"tell me {w}" for w in "the cat sat on a mat and why not so please".split())
    )
    config = FrontierConfig(
        model=str(folder / "lm"),
        dtype="float32",
        reward=str(folder / "judge"),
        n_train=5,
        n_held=2,
        per_prompt=2,
        max_new_tokens=4,
        rank=2,
        lr=1e-2,
        epochs=3,
        batch_size=5,
        ppo=dict(epochs=1, minibatch_size=5, lr=1e-2),
        eval_replies=2,
        pool=8,
    )
    return folder, config


def job(tiny, method, strength=0.0, seed=0, out="cells"):
    return Job(tiny[1], method, float(strength), seed, str(tiny[0] / "prompts.txt"), tiny[0] / out)


@pytest.mark.parametrize("method", list(STRENGTHS))
def test_a_cell_of_every_method(tiny, method):
    cell = run_cell(job(tiny, method, STRENGTHS[method][-1]))
    d = torch.tensor(cell["kls"])
    assert (
        len(cell["rewards"]) == len(d) == 2
        and d.isfinite().all()
        and (d >= -1e-6).all()
        and (d > 0).any()
    )
    assert cell["seconds"] > 0 and cell["memory"] > .1
    assert run_cell(job(tiny, method, STRENGTHS[method][-1])) == cell, (
        "a cell that was run is read, not run again"
    )


def test_shared_replies_are_scored_and_paired(tiny):
    shared = run_cell(job(tiny, "shared"))
    assert (
        len(shared["replies"]) == 5
        and len(shared["pairs"]) + shared["tied"] == 5
        and all(c != r for _, c, r in shared["pairs"])
    )
    assert run_cell(job(tiny, "shared", out="other"))["replies"] == shared["replies"]
    assert run_cell(job(tiny, "shared", seed=1))["replies"] != shared["replies"]


def test_another_setting_is_another_cell(tiny):
    a = run_cell(job(tiny, "shared"))
    b = run_cell(job((tiny[0], replace(tiny[1], max_new_tokens=3)), "shared"))
    assert (
        max(len(r["ids"]) for rs in b["replies"] for r in rs)
        <= 3
        < max(len(r["ids"]) for rs in a["replies"] for r in rs)
    )


def test_ppo_samples_as_many_replies_as_are_shared(tiny):
    cell = run_cell(job(tiny, "ppo_true", .02))
    assert (
        len(cell["log"]) == 2 and 10 <= cell["sampled"] <= 10 * 4
    )  # 5 prompts × 2 replies in steps of 5


def test_the_lent_reference_is_the_start(tiny):
    from peft import LoraConfig, get_peft_model
    model = tiny_model(scale=1.)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        policy = get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        with reference_of(policy) as ref: lent = ref(input_ids=ids).logits
        assert torch.equal(lent, before) and not torch.equal(policy(input_ids=ids).logits, before)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_best_of_is_the_mean_over_all_groups(n):
    r = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(n)).double()   # ties
    groups = torch.combinations(torch.arange(5), n)
    torch.testing.assert_close(best_of(r, n), r[:, groups].amax(-1).mean(-1), rtol=0, atol=1e-12)
    with pytest.raises(Refusal, match="best of 6"): best_of(r, 6)


def test_order_of_the_cells_and_their_needs(tiny):
    jobs = plan(tiny[1], [0, 1], list(STRENGTHS), None, tiny[0])
    seeds, names = [j.seed for j in jobs], [j.method for j in jobs if j.seed == 0]
    assert (
        seeds == sorted(seeds)
        and names.index("shared") < names.index("dpo")
        and names.index("pool") < names.index("judge") < names.index("ppo_learned")
    )
    assert (
        len(set(jobs and [(j.method, j.strength, j.seed) for j in jobs])) == len(jobs)
        and names.count("shared") == names.count("judge") == 1
    )


def test_time_that_is_over_begins_nothing(tiny, capsys):
    jobs = plan(tiny[1], [7], ["sft"], str(tiny[0] / "prompts.txt"), tiny[0] / "late")
    assert run_jobs(jobs, minutes=0) == [] and "0 of 2 cells" in capsys.readouterr().out


def test_unknown_method_and_too_few_prompts(tiny, tmp_path):
    with pytest.raises(Refusal, match="no method is called 'magic'"):
        run_cell(job(tiny, "magic", 1))
    with pytest.raises(Refusal, match="no method is called 'magic'"):
        plan(tiny[1], [0], ["magic"], None, tmp_path)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(Refusal, match="at least 8"):
        main_frontier(
            argparse.Namespace(
                prompts=str(tmp_path / "p.txt"), output=str(tmp_path / "out"), methods=["sft"],
                seeds=[0],
            )
        )


def test_the_command_runs_cells_and_reports(tiny):
    folder, config = tiny
    args = argparse.Namespace(
        prompts=str(folder / "prompts.txt"),
        output=str(folder / "out"),
        methods=["sft"],
        seeds=[0],
        **vars(config),
    )
    assert main_frontier(args) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    row, = report["values"]["rows"]
    assert (
        row["method"] == "sft"
        and row["seeds"] == 1
        and math.isfinite(row["reward"])
        and (folder / "out" / "report.png").stat().st_size > 1000
    )


def test_summary_is_means_over_seeds_with_the_price_of_the_stages():
    cells = [
        dict(
            method="ppo_learned",
            strength=0.1,
            seed=s,
            rewards=[[float(s), s + 1.0], [0.0, 0.0]],
            kls=[[1.0, 3.0]] * 2,
            seconds=10.0,
            memory=1.0,
            sampled=2,
        )
        for s in range(3)
    ]
    cells += [
        dict(method=m, strength=0.0, seed=s, seconds=5.0, memory=3.0, sampled=7)
        for s in range(3)
        for m in ("shared", "judge", "pool")
    ]
    row, = summary(cells)
    assert (
        row["reward"] == 0.75
        and row["kl"] == 2.0
        and row["low"] <= 0.75 <= row["high"]
        and row["seeds"] == 3
    )
    assert (row["seconds"], row["memory"], row["sampled"]) == (20.0, 3.0, 16) and row["by_seed"][
        2
    ] == (2.0, 1.25)


@pytest.fixture(scope="module")
def bench():
    "The script that makes the records."
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(
        "bench_frontier", Path(__file__).parent.parent / "benchmarks" / "frontier.py"
    )
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module


def made_up(dpo_gain=1.):
    "Three seeds: DPO gains `dpo_gain` a nat, every rival half; the rest as the script has it."

    def cell(method, strength, seed, d, r):
        return dict(
            method=method,
            strength=strength,
            seed=seed,
            seconds=10.0 + d,
            memory=2.0 + method.startswith("ppo"),
            sampled=3,
            rewards=[[r + (.01 + .001 * (method == "dpo")) * p, r] for p in range(6)],
            kls=[[d, d]] * 6,
        )
    cells = [cell("dpo", b, s, d, d * dpo_gain) for s in range(3) for b, d in ((1., 1.), (.1, 2.))]
    cells += [
        cell(m, 1, s, 1.5, 0.75)
        for s in range(3)
        for m in ("ppo_learned", "ppo_true", "sft", "unlikelihood")
    ]
    cells += [cell("best_of_n", 1, s, 0., 0.) for s in range(3)]
    return cells + [
        dict(method=m, strength=0.0, seed=s, seconds=5.0, memory=1.0, sampled=7)
        for s in range(3)
        for m in ("shared", "judge", "pool")
    ]


@pytest.mark.parametrize("gain,word", [(1., "held"), (.2, "did not hold")])
def test_claims_follow_the_cells(bench, gain, word):
    rows = bench.text_claims(made_up(gain), [0, 1, 2], "made up")
    assert {r["test"] for r in rows[:4]} == {"seeds × items"}
    assert [r["verdict"] for r in rows[:4]] == [word] * 4 and not claim_problems(rows)
    assert rows[0]["ours"] == pytest.approx(1.5 * gain - .75, abs=.02)
    assert (
        rows[4]["ours"] == pytest.approx((5 + 5 + 11.5) / (5 + 11.5))
        and rows[5]["ours"] == 1.0
        and rows[4]["verdict"] == rows[5]["verdict"] == "cannot tell"   # no spread over three seeds
    )


def test_a_record_gives_the_chart_of_its_cells(bench):
    cells = made_up()
    kept = json.loads(json.dumps([bench.small(c) for c in cells]))
    for a, b in zip(summary(cells), summary(kept)):
        for k in ("kl", "reward", "low", "high", "seconds", "memory", "sampled"):
            assert a[k] == pytest.approx(b[k], abs=1e-3)


def test_the_sweep_picks_the_arm_that_scored_most_late(bench):
    def arm(*scores): return dict(log=[dict(score=s) for s in scores])
    assert bench.late_score(arm(0., 0., 1., 2.)) == 1.5 and bench.late_score(arm(9., .5, .5)) == .5


def test_halves_share_no_prompt(bench, tmp_path, monkeypatch):
    turns = [f"\n\nHuman: question {k % 7}\n\nAssistant:" for k in range(20)]
    for side, part in (("train", turns[:15]), ("test", turns[15:])):
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / f"{side}.jsonl").write_text(
            "\n".join(
                json.dumps(dict(prompt=t, chosen=f" yes {i}", rejected=f" no {i}"))
                for i, t in enumerate(part)
            )
        )
    monkeypatch.setenv("DPO_LITERATE_DATA", str(tmp_path))
    a, b = bench.halves("some", TOKENIZER)
    assert (
        len(a) + len(b) == 20
        and a
        and b
        and not {tuple(r.prompt_ids) for r in a} & {tuple(r.prompt_ids) for r in b}
    )


def test_an_interrupted_ppo_cell_goes_on_to_the_same_end(tiny, monkeypatch):
    import dpo_literate.frontier_cells as f
    calls, judge = [], f.reward_function(tiny[1].reward)
    def breaks(prompts, replies):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return judge(prompts, replies)
    whole = run_cell(job(tiny, "ppo_true", .1, out="whole"))
    monkeypatch.setattr(f, "reward_function", lambda name: breaks)
    with pytest.raises(KeyboardInterrupt): run_cell(job(tiny, "ppo_true", .1, out="broken"))
    assert list((tiny[0] / "broken" / "work").rglob("checkpoint-1/state.json"))
    assert not list((tiny[0] / "broken").glob("*.json"))
    monkeypatch.setattr(f, "reward_function", lambda name: judge)
    again = run_cell(job(tiny, "ppo_true", .1, out="broken"))
    def same(c):
        log = [{k: v for k, v in line.items() if k != "seconds"} for line in c["log"]]
        return {k: v for k, v in c.items() if k not in ("seconds", "memory")} | dict(log=log)
    assert same(again) == same(whole)
