"""Upvotes and rankings: what is read, what is refused and where, and what a ranking teaches."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

from dpo_literate.community import (Vote, agreement, confounds_of, partial_out, read_votes,
    reading_ease, style_match, syllables, thread_interval, thread_ranks, vote_pairs)
from dpo_literate.losses import dpo_loss, get_loss
from dpo_literate.models import tiny_model
from dpo_literate.objective import Objective
from dpo_literate.packing import packed_reply_logps, pack_rows
from dpo_literate.rankings import (ListLayout, ListReference, ListScorer, RankedRow,
    encode_rankings, plackett_luce_loss, rank_pairs, read_ranks)
from dpo_literate.reading import read_preferences
from dpo_literate.results import Refusal
from dpo_literate.rows import Row, tiny_tokenizer
from dpo_literate.step import PreferenceStep
from dpo_literate.world import optimal_policy, small_world


# ------------------------------------------------------------ the loss of a ranking

def draw(B, M, seed=0):
    g = torch.Generator().manual_seed(seed)
    def numbers(*shape): return -5 * torch.rand(*shape, generator=g, dtype=torch.float64)
    return dict(policy_chosen_logps=numbers(B), policy_rejected_logps=numbers(B),
                ref_chosen_logps=numbers(B), ref_rejected_logps=numbers(B),
                policy_between_logps=numbers(B, M), ref_between_logps=numbers(B, M))


@pytest.mark.parametrize("M", [0, 1, 3])
def test_a_list_of_two_is_dpo(M):
    "Also where there is room for more replies than the list has."
    x = draw(7, M)
    pair = {k: v for k, v in x.items() if "between" not in k}
    found = get_loss("plackett_luce")(x | dict(between_mask=torch.zeros(7, M).double()), beta=.3)
    for ours, theirs in zip(found, dpo_loss(**pair, beta=.3)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("there", [(1, 1, 1), (1, 0, 1), (0, 0, 1)])
def test_the_loss_of_a_list_is_a_product_of_choices(there):
    x = draw(4, 3, seed=2)
    mask = torch.tensor([there] * 4).double()
    loss, best, worst = plackett_luce_loss(**x, between_mask=mask, beta=.2)
    for b in range(4):
        r = [best[b], *(.2 * (x["policy_between_logps"] - x["ref_between_logps"])[b, k]
                        for k in range(3) if there[k]), worst[b]]
        p = math.prod((r[k].exp() / sum(s.exp() for s in r[k:])).item() for k in range(len(r)))
        assert loss[b].item() == pytest.approx(-math.log(p), abs=1e-12)


def test_huge_rewards_stay_finite_with_their_gradient():
    x = {k: (1e4 * v).requires_grad_() for k, v in draw(3, 2).items()}
    loss, *_ = plackett_luce_loss(**x, between_mask=torch.tensor([[1., 0.]] * 3).double())
    loss.sum().backward()
    assert loss.isfinite().all() and all(v.grad.isfinite().all() for v in x.values())
    assert x["policy_between_logps"].grad[:, 1].abs().max() == 0   # nobody is there


def expected_loss(theta, world, beta):
    "Over every order of every prompt's replies, as a Plackett-Luce judge would give them."
    policy, ref, total = theta.log_softmax(-1), world.ref_logps, 0.
    for order in itertools.permutations(range(theta.shape[1])):
        at = list(order)
        r = world.rewards[:, at]
        p = torch.stack([r[:, k] - r[:, k:].logsumexp(1) for k in range(r.shape[1])]).sum(0).exp()
        first, mid, last = at[0], at[1:-1], at[-1]
        loss, *_ = plackett_luce_loss(policy[:, first], policy[:, last], ref[:, first],
                                      ref[:, last], policy[:, mid], ref[:, mid], beta=beta)
        total = total + (p * loss).sum()
    return total


@pytest.mark.parametrize("beta", [.1, 1.])
def test_on_the_world_its_optimum_is_the_optimal_policy(beta):
    world = small_world()
    theta = world.ref_logps.clone()
    def f(t): return expected_loss(t.view_as(theta), world, beta)
    for _ in range(40):
        x = theta.flatten()
        g, H = torch.func.grad(f)(x), torch.func.hessian(f)(x)
        step = torch.linalg.pinv(H, rtol=1e-12) @ g
        theta = theta - (step / max(1., step.abs().max() * beta)).view_as(theta)
    found, best = theta.log_softmax(-1), optimal_policy(world.ref_logps, world.rewards, beta)
    assert (found.exp() - best.exp()).abs().max() <= 1e-8


# ------------------------------------------------------------ lists in a step

def lists():
    return [RankedRow([5, 6, 7], [8, 9, 2], [3, 2], "a", between_ids=([4, 4, 2], [9, 2])),
            RankedRow([7, 5], [6, 2], [8, 8, 8, 2], "b"),
            RankedRow([4], [5, 2], [6, 2], "c", between_ids=([7, 2],))]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("capacity", [1, 2048])
def test_every_reply_of_a_list_reads_as_alone(kind, capacity):
    model = tiny_model().double().eval()
    model.config._attn_implementation = kind
    layout, scorer = ListLayout(4, capacity), ListScorer()
    pieces = layout(lists())
    assert len(pieces) == (3 if capacity == 1 else 1)
    for piece in pieces:
        out = scorer(model, piece)
        for j, r in enumerate(piece.rows):
            ours = [out.chosen[j], *out.between[j][:len(r.between_ids)], out.rejected[j]]
            for y, logp in zip(r.replies, ours):
                alone, = pack_rows([Row(r.prompt_ids, y, [2])])
                expected = packed_reply_logps(model, alone).chosen[0]
                near = 1e-10 if kind == "sdpa" else 1e-6       # eager weighs in float32
                assert logp.item() == pytest.approx(expected.item(), abs=near)
            assert out.mask[j].sum() == len(r.between_ids)


def loss_of(rows, layout, model, ref):
    parts = [(get_loss("plackett_luce"), 1., dict(beta=.5))]
    step = PreferenceStep(layout, ListScorer(), ref, Objective(parts))
    (pieces,), N = step.begin(model, [rows])
    total = sum(step.loss(model, p) for p in pieces) / N
    return total, step


def test_a_step_on_lists_is_the_mean_gradient_of_its_lists():
    model, ref = tiny_model(seed=0).double(), ListReference(tiny_model(seed=1).double())
    loss, step = loss_of(lists(), ListLayout(4), model, ref)
    loss.backward()
    whole = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    for row in lists(): (loss_of([row], ListLayout(4), model, ref)[0] / 3).backward()
    alone = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-10)
    assert step.meter.line()["rewards/accuracies"] in (0, 1 / 3, 2 / 3, 1)
    assert step.measure(model, lists(), 2)["loss"] == pytest.approx(loss.item(), abs=1e-10)


def test_a_list_longer_than_the_layout_is_refused_by_name():
    with pytest.raises(Refusal, match="a: 4 replies, the layout has room for 3"):
        ListLayout(3)(lists())


# ------------------------------------------------------------ rankings from files

def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return str(path)


GOOD = dict(prompt="Q?", ranked=["best", "middle", "worst"])
BAD_RANKS = {"no list": (dict(prompt="Q?"), 'expected "ranked"'),
             "one reply": (dict(prompt="Q?", ranked=["a"]), "at least 2"),
             "twice": (dict(prompt="Q?", ranked=["a", "b", "a"]), "stands twice"),
             "no text": (dict(prompt="Q?", ranked=["a", 3]), "reply 2 must be text"),
             "no prompt": (dict(ranked=["a", "b"]), "prompt must be text"),
             "no ranks": (dict(prompt="Q?", replies=["a", "b"]), 'need "ranks"'),
             "few ranks": (dict(prompt="Q?", replies=["a", "b"], ranks=[1]), "as many ranks"),
             "a tie": (dict(prompt="Q?", replies=["a", "b"], ranks=[1, 1]), "share a rank"),
             "a word": (dict(prompt="Q?", replies=["a", "b"], ranks=["x", 1]), "must be a number")}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_a_bad_ranking_is_refused_with_its_line(tmp_path, name):
    row, why = BAD_RANKS[name]
    path = write(tmp_path / "r.jsonl", [GOOD, row])
    with pytest.raises(Refusal, match=rf"r\.jsonl:2: .*{why}"): read_ranks(path)


def test_rankings_become_pairs_and_rows(tmp_path):
    row = dict(prompt="Q?", replies=["worst", "best", "middle"], ranks=[3, 1, 2])
    first, second = read_ranks(write(tmp_path / "r.jsonl", [GOOD, row]))
    assert first.replies == second.replies == ("best", "middle", "worst")
    said = [(p["chosen"], p["rejected"]) for p in rank_pairs([second])]
    assert said == [("best", "middle"), ("best", "worst"), ("middle", "worst")]
    assert [len(rank_pairs([second], w)) for w in ("neighbours", "best_worst")] == [2, 1]
    tokenizer = tiny_tokenizer()
    encoded, = encode_rankings([first], tokenizer, max_length=None)
    texts = [tokenizer.decode(y, skip_special_tokens=True).strip() for y in encoded.replies]
    assert texts == list(first.replies)


# ------------------------------------------------------------ votes from files

HEAD = "thread,prompt,reply,score,time,views"
BAD_VOTES = {
    "a column": ("thread,prompt,reply,upvotes\na,p,x,1\na,p,y,2\n",
                 r"v\.csv:2: no column score.*score=upvotes"),
    "a word": (f"{HEAD}\na,p,x,1,1,1\na,p,y,many,1,1\n",
               r"v\.csv:3: score must be a number, found 'many'"),
    "nothing": (f"{HEAD}\na,p,x,1,1,1\na,p,,2,1,1\n", r"v\.csv:3: reply is empty"),
    "infinite": (f"{HEAD}\na,p,x,1,1,1\na,p,y,inf,1,1\n", r"v\.csv:3: score must be a number"),
    "a time": (f"{HEAD}\na,p,x,1,soon,1\na,p,y,2,1,1\n", r"v\.csv:2: time must be a number"),
    "one reply": (f"{HEAD}\na,p,x,1,1,1\nb,p,y,2,1,1\n",
                  r"2 threads, each with one reply \(first .*v\.csv:2\)"),
    "ties": (f"{HEAD}\na,p,x,2,1,1\na,p,y,2,1,1\nb,p,z,3,1,1\n", r"ties only.*v\.csv:2"),
    "no rows": (f"{HEAD}\n", "no rows")}


@pytest.mark.parametrize("name", BAD_VOTES)
def test_bad_votes_are_refused_with_their_line(tmp_path, name):
    text, why = BAD_VOTES[name]
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(Refusal, match=why): read_votes(str(tmp_path / "v.csv"))


def test_votes_of_any_names_and_dates(tmp_path):
    rows = [dict(question_id=7, body="x y", ups="3", created="2020-01-02"),
            dict(question_id=7, body="z", ups=1, created="2020-01-01")]
    names = dict(thread="question_id", reply="body", score="ups", time="created")
    first, second = read_votes(write(tmp_path / "v.jsonl", rows), names)
    assert (first.score, first.thread, first.views) == (3., "7", None)
    assert first.time - second.time == 24 * 3600


def votes_of(scores, thread="t", **more):
    return [Vote(thread, "p", f"reply {k}" + " w" * k, s, where=f"{thread}{k}",
                 **{n: v[k] for n, v in more.items()}) for k, s in enumerate(scores)]


def test_ranks_stay_within_the_thread_and_ties_share():
    votes = votes_of([0, 5, 5, 9]) + votes_of([100, 200], "u")
    found = thread_ranks(votes, [v.score for v in votes])
    assert found.tolist() == [.125, .5, .5, .875, .25, .75]


def test_every_reply_is_accounted_for_and_no_pair_leaves_its_thread():
    votes = votes_of([0, 1, 5, 9]) + votes_of([3, 3], "u") + votes_of([8], "v")
    pairs = vote_pairs(votes, gap=3., most=2)
    assert sum(pairs.counts.values()) == len(votes)
    assert all(votes[w].thread == votes[l].thread and votes[w].score - votes[l].score >= 3
               for w, l in pairs.at)
    assert pairs.at == [(3, 0), (3, 1)] and pairs.counts["alone in their thread"] == 1
    strict = vote_pairs(votes, thread_ranks(votes, [v.score for v in votes]), .25, .75, .25)
    assert strict.at == [(3, 0)]
    with pytest.raises(Refusal, match="above 0"): vote_pairs(votes, gap=0)


def test_what_views_explain_is_taken_out():
    "Scores that are views and a quality beside them: the residual is the quality."
    rng = np.random.default_rng(0)
    votes, quality = [], []
    for t in range(60):
        views, q = rng.permutation(8), rng.normal(size=8)
        quality += q.tolist()
        votes += votes_of((2. * views + q).tolist(), str(t), views=views.astype(float).tolist())
    raw = [v.score for v in votes]
    left, share = partial_out(votes, raw, dict(views=[v.views for v in votes]))
    pairs = vote_pairs(votes, left, gap=1.)
    assert share > .9 and np.corrcoef(left, quality)[0, 1] > .9
    assert abs(agreement(pairs, [v.views for v in votes])[0] - .5) < .05
    assert agreement(vote_pairs(votes), [v.views for v in votes])[0] > .85
    assert set(confounds_of(votes)) == {"length", "views"}


def test_threads_count_once():
    mean, low, high = thread_interval([1, 1, 1, 1, 0], ["a"] * 4 + ["b"])
    assert mean == .5 and low == 0 and high == 1


def test_pairs_of_votes_are_a_file_that_is_read_as_preferences(tmp_path):
    votes = votes_of([0, 1, 5])
    path = write(tmp_path / "pairs.jsonl", vote_pairs(votes).rows)
    prefs = read_preferences(path)
    assert len(prefs) == 3 and prefs[0]["_scores"][0] > prefs[0]["_scores"][1]


# ------------------------------------------------------------ linguistic measures

def test_style_and_ease_by_hand():
    assert style_match("the cat is on the mat", "the cat is on the mat") == pytest.approx(1)
    assert style_match("run", "it is not the one") < style_match("it is here", "it is not the one")
    assert [syllables(w) for w in ("cat", "table", "readable", "make", "free")] == [1, 2, 3, 1, 1]
    # 6 words, one sentence, 6 syllables
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert reading_ease("The cat sat.") > reading_ease("Institutional considerations predominate.")
