"The frontier beyond the page: random worlds, ties, and every method's cell on a tiny model."
import argparse, json, math
import pytest, torch
from torch import nn
from dpo_literate.frontier import (STRENGTHS, FrontierConfig, best_of_n, best_of_n_bound, main_frontier, reward_at, run_cell, shared_pairs, shortfall,
                                   summary, wide_world)
from dpo_literate.models import tiny_model, write_folder
from dpo_literate.ppo import world_dpo, world_ppo
from dpo_literate.results import Refusal, load_result
from dpo_literate.reward import fit_scores
from dpo_literate.reward_model import with_score_head
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.world import World, kl, optimal_policy, total_variation

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_above_the_line(seed):
    world, g = wide_world(n_replies=12, seed=seed), torch.Generator().manual_seed(seed)
    for beta in (.1, .5, 2.): assert abs(shortfall(world, optimal_policy(world.ref_logps, world.rewards, beta))) < 1e-9
    for s in (.01, .3, 1., 3.):
        other = (world.ref_logps + s * (torch.randn(3, 12, generator=g) + world.rewards)).log_softmax(-1)   # pulled the right way, still below
        assert shortfall(world, other) > -1e-10
    d = [reward_at(world, x) for x in (.1, .5, 1., 1.5)]
    assert d == sorted(d) and d[1] - d[0] > d[2] - d[1]                                                       # rising, concave


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_by_enumeration(n):
    "All K^n draws, ties to the first drawn."
    g = torch.Generator().manual_seed(n)
    rewards = torch.tensor([[0., 1., 1., 2.], [3., 3., 3., 3.]], dtype=torch.float64)                         # ties, and nothing but ties
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
        for world in (small, large): assert (kl(best_of_n(world, n), world.ref_logps) <= best_of_n_bound(n) + 1e-12).all()
    assert best_of_n_bound(8) - kl(best_of_n(large, 8), large.ref_logps).mean() < .03


@pytest.mark.parametrize("seed", range(3))
def test_dpo_is_the_tilted_fit_on_any_verdicts(seed):
    world, g = wide_world(n_replies=6, seed=seed), torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 9, (3, 6, 6), generator=g).double() + .1
    wins.diagonal(dim1=-2, dim2=-1).zero_()
    for beta in (.2, 1.): assert total_variation(world_dpo(world, wins, beta), optimal_policy(world.ref_logps, fit_scores(wins), beta)).max() < 1e-6


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
    for name in ("dpo_exact", "dpo", "ppo_learned", "ppo_true", "dpo_minus_ppo"): assert again[name][0] == pytest.approx(kept[name][0], abs=1e-3)
    assert again["best_of_n"] == pytest.approx(kept["best_of_n"], abs=1e-9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A model and a reward as folders, and prompts."
    folder = tmp_path_factory.mktemp("frontier")
    judge = with_score_head(tiny_model(scale=1., seed=5))
    nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(0))
    write_folder(folder / "lm", tiny_model(scale=1.).float(), TOKENIZER)
    write_folder(folder / "judge", judge.float(), TOKENIZER)
    (folder / "prompts.txt").write_text("\n".join(f"tell me {w}" for w in "the cat sat on a mat and why not so please".split()))
    config = FrontierConfig(model=str(folder / "lm"), reward=str(folder / "judge"), rank=2, lr=1e-2, epochs=1, per_prompt=2, max_new_tokens=4, batch_size=8, ppo_epochs=1, eval_replies=2)
    return folder, config


PROMPTS, HELD = ["the cat", "no", "tell me", "why", "so"], ["the dog", "and"]


@pytest.mark.parametrize("method", list(STRENGTHS))
def test_a_cell_of_every_method(tiny, method):
    folder, config = tiny
    strength = STRENGTHS[method][0]
    cell = run_cell(config, method, strength, 0, PROMPTS, HELD, folder / "cells")
    assert len(cell["rewards"]) == len(cell["kls"]) == 2 and all(len(r) == 2 for r in cell["rewards"])
    d = torch.tensor(cell["kls"])
    assert d.isfinite().all() and (d >= -1e-6).all() and (d > 0).any() and cell["seconds"] > 0 and cell["peak_bytes"] > 1e8
    assert run_cell(config, method, strength, 0, None, None, folder / "cells") == cell, "a cell that was run is read, not run again"


def test_shared_replies_are_scored_and_paired(tiny):
    folder, config = tiny
    shared = shared_pairs(config, PROMPTS, 0)
    assert len(shared["texts"]) == 10 and len(shared["pairs"]) + shared["tied"] == 5 and all(c != r for _, c, r in shared["pairs"])
    again = shared_pairs(config, PROMPTS, 0)
    assert again["texts"] == shared["texts"] and shared_pairs(config, PROMPTS, 1)["texts"] != shared["texts"]


def test_unknown_method_and_too_few_prompts(tiny, tmp_path):
    folder, config = tiny
    with pytest.raises(Refusal, match="no method is called 'magic'"): run_cell(config, "magic", 1, 0, PROMPTS, HELD, folder / "cells")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(Refusal, match="at least 8"): main_frontier(argparse.Namespace(prompts=str(tmp_path / "p.txt"), output=str(tmp_path), methods=["sft"], seeds=[0]))


def test_the_command_runs_cells_and_reports(tiny):
    folder, config = tiny
    args = argparse.Namespace(prompts=str(folder / "prompts.txt"), output=str(folder / "out"), methods=["sft"], seeds=[0], **vars(config))
    assert main_frontier(args) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    row, = report["values"]["rows"]
    assert row["method"] == "sft" and row["seeds"] == 1 and math.isfinite(row["reward"]) and (folder / "out" / "report.png").stat().st_size > 1000


def test_summary_over_seeds():
    cells = [dict(method="dpo", strength=.1, seed=s, rewards=[[float(s), s + 1.]], kls=[[1., 3.]], seconds=10., peak_bytes=1, sampled=2, models=1) for s in range(3)]
    row, = summary(cells)
    assert row["reward"] == 1.5 and row["kl"] == 2. and row["low"] <= 1.5 <= row["high"] and row["seeds"] == 3
    assert summary(cells[:1])[0]["low"] is None
