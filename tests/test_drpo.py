"""The drift of preferences beyond its page: official values, batches, odd inputs, the baselines."""
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

from dpo_literate import one_step
from dpo_literate.drift_scores import awr_dipole, awr_mean_field, awr_weights, distance_scores
from dpo_literate.drpo import (KERNELS, PUBLISHED, Dipole, DriftSettings, affinity, copies,
                               dipole_field, drift_loss, floor_share, kernel_logits, pick,
                               preference_drift, top_bottom)
from dpo_literate.one_step import (METHODS, Encoder, Generator, Scene, align, color_coverage,
                                   compressed_size, coverage, data_drift, dpo_step, draw_prompts,
                                   drawn_emoji,
                                   in_sets, load_emoji, measure, new_source, raw_features,
                                   sample_rows, stage_features, word_logps, word_rank)
from dpo_literate.results import Refusal, claim_problems


def wave(n, rate, shift=0., f=torch.sin):
    return f(torch.arange(3. * n, dtype=torch.float64) * rate + shift).view(n, 3)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, GOOD, BAD = wave(4, 1.7), wave(2, .9, 1., torch.cos), wave(3, 1.3, 2.)
OFFICIAL = {  # first and last row of the force: the authors' drift.py (5c34973) in float64
    "laplacian": [[.1533451668, -.3473066478, -.4442929079],
                  [3.0541128549, 2.3818345422, -2.8999701491]],
    "rbf": [[1.85646e-05, -.0015073388, -.001328315], [1.7621518436, 1.6351948546, -1.4202512018]],
    "cosine": [[.0661222958, -.1143315814, -.1530448483],
               [2.8023768927, 2.2117215468, -2.7614083887]]}


@pytest.mark.parametrize("kernel", KERNELS)
def test_official_values(kernel):
    F = dipole_field(X, GOOD, BAD, Dipole(10., 5., radii=(.05, .2), kernel=kernel))
    assert abs(F.scale.item() - .8699593654932846) < 1e-12
    expected = torch.tensor(OFFICIAL[kernel], dtype=torch.float64)
    assert (F.force[[0, -1]] - expected).abs().max() < 1e-9


def test_official_reference_term():
    F = dipole_field(X, GOOD, X, Dipole(7., 3., radii=(.2,), masked="negatives"))
    expected = torch.tensor([[.5507162479, -.221918297, -.7570571494],
                             [1.6403337153, -.2466419301, -2.3254378812]],
                            dtype=torch.float64)
    assert (F.force[[0, -1]] - expected).abs().max() < 1e-9
    assert abs(F.scale.item() - .7990217277973165) < 1e-12


def by_loops(x, good, bad, how):
    "Every number of (24.3) and (24.4) by itself."
    T, n, m = [*x, *bad, *good], len(x), len(bad)
    w = [how.own] * n + [how.negative] * m + [how.positive] * len(good)
    d = [[max(math.dist(a.tolist(), t.tolist()), 1e-4) for t in T] for a in x]
    s = sum(d[i][j] * w[j] for i in range(n) for j in range(len(T))) / n / sum(w)
    s_d, total = s / math.sqrt(x.shape[1]), torch.zeros_like(x)
    for r in how.radii:
        def logit(i, j):
            if how.kernel == "cosine": near = (normalize(x[i], dim=0) @ normalize(T[j], dim=0)) / r
            else: near = -d[i][j] / (s * r) if how.kernel == "laplacian" else -.5 * (
                d[i][j] / (s * r)) ** 2
            return float(near) - 100 / r * (i == j)
        e = [[math.exp(logit(i, j)) for j in range(len(T))] for i in range(n)]
        A = [[w[j] * math.sqrt(max(how.floor, e[i][j] / sum(e[i]) * e[i][j] / sum(
            e[k][j] for k in range(n)))) for j in range(len(T))] for i in range(n)]
        F = torch.zeros_like(x)
        for i in range(n):
            away, near = sum(A[i][:n + m]), sum(A[i][n + m:])
            for j, t in enumerate(T):
                F[i] += (A[i][j] * away if j >= n + m else -A[i][j] * near) * (t - x[i]) / s_d
        total += F / F.square().mean().sqrt()
    return total


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(3))
def test_loops_agree(kernel, seed):
    how = Dipole(3., 2., .5, radii=(.2, .7), kernel=kernel, floor=1e-5)
    x, good, bad = (normal(n, 5, seed=10 * seed + n) for n in (6, 3, 4))
    assert (dipole_field(x, good, bad, how).force - by_loops(x, good, bad, how)).abs().max() < 1e-10


@pytest.mark.parametrize("kernel", KERNELS)
def test_order_of_samples_and_targets(kernel):
    x, good, bad, how = normal(7, 4), normal(3, 4, seed=1), normal(5, 4, seed=2), Dipole(
        radii=(.1, .5), kernel=kernel)
    at = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    moved = dipole_field(x[at], good.flip(0), bad.roll(2, 0), how).force
    torch.testing.assert_close(moved, dipole_field(x, good, bad, how).force[at],
                               rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_to_prefer_is_no_field(seed):
    x, same = normal(6, 3, seed=seed), normal(4, 3, seed=seed + 9)
    how = Dipole(radii=(.05, .3))
    assert dipole_field(x, same, same, Dipole(own=0., radii=(.05, .3))).force.abs().max() < 1e-9
    assert dipole_field(x, x, x, Dipole(masked="all", radii=(.3,))).force.abs().max() < 1e-9
    assert dipole_field(x, same, same, how).force.abs().max() > .1


@pytest.mark.parametrize("N, D", [(2, 1), (5, 3), (9, 40)])
def test_gradient_is_the_field(N, D):
    x = normal(N, D).requires_grad_()
    F = dipole_field(x, normal(2, D, seed=1), normal(3, D, seed=2))
    drift_loss(x, F).backward()
    torch.testing.assert_close(x.grad, -2 * F.force / (F.scale * N * D), rtol=1e-10, atol=1e-12)


def test_sets_of_a_batch_do_not_meet():
    x, good, bad = normal(3, 6, 4), normal(3, 2, 4, seed=1), normal(3, 3, 4, seed=2)
    both = dipole_field(x, good, bad)
    for k in range(3):
        torch.testing.assert_close(both.force[k], dipole_field(x[k], good[k], bad[k]).force)


def test_moving_or_scaling_the_world_changes_no_force():
    how, shift = Dipole(radii=(.2,)), normal(1, 3, seed=5)
    plain = dipole_field(X, GOOD, BAD, how).force
    for f in (lambda a: a + shift, lambda a: 7 * a):
        found = dipole_field(f(X), f(GOOD), f(BAD), how).force
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)  # 1e-4, of a copy, stays


def test_settings_are_refused():
    with pytest.raises(Refusal, match="gauss"): Dipole(kernel="gauss")
    with pytest.raises(Refusal, match="radii"): Dipole(radii=(0.,))
    with pytest.raises(Refusal, match="radii"): Dipole(radii=())
    with pytest.raises(Refusal, match="at least one preferred"): dipole_field(X, X[:0], BAD)
    with pytest.raises(Refusal, match="4 samples"):
        dipole_field(X, GOOD[:1], BAD[:1], Dipole(masked="negatives"))
    with pytest.raises(Refusal, match="'none'"): dipole_field(X, GOOD, BAD, Dipole(masked="none"))


def test_copies():
    T = torch.cat([X, X.flip(0), GOOD])
    assert copies(X, T, "own").sum() == 4 and copies(X, T, "all").sum() == 8
    assert copies(X, torch.cat([X, X]), "negatives").equal(torch.eye(4).repeat(1, 2).bool())


def test_floor_holds_where_facts_say():
    f = normal(16, 64)
    share = floor_share(f, f[:8], f[8:])
    assert share[.02] == share[.05] == 1. and share[.2] < .02
    assert floor_share(f, f[:8], f[8:], Dipole(floor=0.))[.2] == 0.


def test_affinity_without_floor():
    A = affinity(normal(4, 6), 0.)
    assert (A.square() <= 1).all() and (A > 0).all()
    torch.testing.assert_close(affinity(torch.zeros(4, 6)), torch.full((4, 6), (1 / 24) ** .5))


@pytest.mark.parametrize("best, worst", [(0, 4), (4, 0), (5, 4), (8, 1)])
def test_ranks_refused(best, worst):
    with pytest.raises(Refusal, match="among 8"): top_bottom(torch.arange(8.), best, worst)


def test_ranks_are_ranks():
    scores = normal(3, 8)
    best, worst = top_bottom(scores, 3, 2)
    assert (pick(scores[..., None], best).amin(1) > pick(scores[..., None], worst).amax(1)).all()
    assert best.equal(top_bottom(scores.exp(), 3, 2)[0])
    assert top_bottom(torch.zeros(4), 2, 2)[0].tolist() == [0, 1]


def test_distance_scores_by_hand():
    x = torch.tensor([[0.], [1.], [3.]]).double()
    scores = distance_scores(dict(a=x, b=2 * x), dict(a=x[2:], b=2 * x[2:]),
                             dict(a=x[:1], b=2 * x[:1]))
    gap = torch.tensor([-3., -1., 3.]).double()           # d- minus d+, by hand
    torch.testing.assert_close(scores, (gap - gap.mean()) / gap.std(correction=0),
                               rtol=0, atol=1e-4)         # a distance is at least 1e-4


def test_awr_weights():
    w = awr_weights(torch.tensor([0., -1., -100.]), alpha=.5)
    torch.testing.assert_close(w, torch.tensor([0., -2., -20.]).softmax(0))
    assert awr_weights(normal(2, 5)).sum(-1).allclose(torch.ones(2).double())


@pytest.mark.parametrize("split", ["top", "sign"])
def test_awr_dipole_goes_uphill(split):
    x = normal(16, 2)
    assert awr_dipole(x, x[:, 0], split).force[:, 0].mean() > .2


@pytest.mark.parametrize("kind", ["mean", "contrast", "top"])
def test_awr_means_go_uphill(kind):
    x = normal(16, 2)
    F = awr_mean_field(x, normal(16, 2, seed=1), x[:, 0], kind, radii=(.5,))
    assert F.force[:, 0].mean() > 0


def test_awr_contrast_by_hand():
    x, r, ref = normal(4, 2), 1., normal(4, 2, seed=1)
    scores, s = x[:, 0], torch.cdist(x, torch.cat([x, ref])).clamp(min=1e-4).mean()
    near = kernel_logits(x, x, s, r)
    F = ((near + scores).softmax(-1) @ x - x + kernel_logits(x, ref, s, r).softmax(-1) @ ref
         - (near - scores).softmax(-1) @ x)
    found = awr_mean_field(x, ref, scores, "contrast", radii=(r,)).force
    torch.testing.assert_close(found, F / F.square().mean().sqrt())


def test_equal_scores_have_no_sign():
    with pytest.raises(Refusal, match="equal scores"): awr_dipole(X, torch.zeros(4), "sign")


def test_reference_term_is_off_and_on():
    x = dict(a=X.clone().requires_grad_())
    sets = dict(a=X[:2]), dict(a=X[2:])
    one = preference_drift(x, *sets)
    assert one == preference_drift(x, *sets, dict(a=X + 1), DriftSettings(lambda_ref=0.))
    assert one < preference_drift(x, *sets, dict(a=X + 1), PUBLISHED["ViT-MAE"])


# the generator of pictures, on a few that are drawn here

@pytest.fixture
def scene():
    torch.manual_seed(0)
    judge = Encoder(4, 3, (4, 4, 8)).eval().requires_grad_(False)
    emoji = drawn_emoji()
    return Scene(emoji, lambda x: stage_features(judge, x), lambda x, w: word_logps(judge, x, w),
                 P=2, K=8)


def generator(seed=0):
    torch.manual_seed(seed)
    return Generator(4, 3, 8, (8, 8, 4, 4))


@pytest.mark.parametrize("method", [*METHODS, "dpo"])
def test_methods_move_the_policy_and_not_the_base(scene, method):
    base = generator()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    policy = align(base, scene, method, steps=2, lr=1e-2)
    assert all(v.equal(before[k]) for k, v in base.state_dict().items())
    assert any(not v.equal(before[k]) for k, v in policy.state_dict().items())
    again = align(base, scene, method, steps=2, lr=1e-2)
    assert all(v.equal(again.state_dict()[k]) for k, v in policy.state_dict().items())


def test_unknown_names(scene):
    with pytest.raises(Refusal, match="'ppo'"): align(generator(), scene, "ppo")
    with pytest.raises(Refusal, match="'best'"): awr_dipole(X, X[:, 0], "best")
    with pytest.raises(Refusal, match="'best'"): awr_mean_field(X, X, X[:, 0], "best")


def test_only_the_order_of_the_reward_counts(scene):
    bent = scene._replace(reward=lambda x, w: (scene.reward(x, w) / 9).exp())
    a, b = (align(generator(), s, "drpo", steps=2) for s in (scene, bent))
    assert all(p.equal(q) for p, q in zip(a.parameters(), b.parameters()))


def test_dpo_starts_at_ln_2_and_has_the_formula(scene):
    base = generator()
    asked = draw_prompts(scene.emoji.prompts(), 2, 8, base.noise, new_source(1))
    step, rows = dpo_step(scene, base, beta=2.), sample_rows(scene, base, asked)
    (pieces,), N = step.begin(base, [rows])
    assert abs(step.loss(base, pieces[0]).item() / N - math.log(2)) < 1e-5
    with torch.no_grad(): f = in_sets(scene.features(base(asked.words, asked.z)), 2)
    with torch.no_grad(): sums = step.scorer(base, pieces[0]).sums
    for p in range(2):
        def far(side): return sum((f[k][p][:, None] - getattr(rows[p], side)[k]).square().mean()
                                  for k in f) / len(f)
        assert abs(sums[p] + far("chosen")) < 1e-5 and abs(sums[p + 2] + far("rejected")) < 1e-5


def test_data_drift_moves_samples_to_data():
    x, data = dict(a=normal(1, 6, 2).requires_grad_()), dict(a=normal(1, 6, 2, seed=1) + 5)
    data_drift(x, data).backward()
    assert (x["a"].grad < 0).all()


def test_rewards_by_hand():
    red = torch.tensor([1., -1, -1]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    half = torch.cat([red[..., :16], -red[..., :16]], -1)
    words = torch.tensor([[0, 0]])
    assert color_coverage(red, words, ["red", "blue"]).item() == 1.
    assert color_coverage(half, words, ["red", "light blue"]).item() == .5
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert compressed_size(red) > compressed_size(half) > compressed_size(noise)


def test_word_rank_counts_those_ahead():
    class Says(torch.nn.Module):
        def forward(self, x): return torch.tensor([[3., 1, 2]]), torch.tensor([[0., 5.]])
    assert word_rank(Says(), torch.zeros(1), torch.tensor([[1, 0]])).item() == -3


def test_coverage_and_measure(scene):
    real = normal(10, 2)
    assert coverage(real, real) == 1. and coverage(real, real + 100) == 0.
    rewards, judge = dict(reward=scene.reward), Encoder(4, 3, (4, 4, 8)).eval()
    found = measure(generator(), generator(), scene.emoji, rewards, judge, K=4)
    assert found["distance"] == 0. and found["spread"] > 0 and 0 <= found["coverage"] <= 1
    assert measure(generator(1), generator(), scene.emoji, rewards, judge, K=4)["distance"] > 0


def test_features():
    x = drawn_emoji().images[:6]
    encoder = Encoder(2, 3, (4, 4, 8))
    f = in_sets(stage_features(encoder, x), 2)
    assert {v.shape[:2] for v in f.values()} == {(2, 3)} and len(f) == 9
    m = encoder.maps(x)[0]
    torch.testing.assert_close(f["stage 1, deviation"].flatten(0, 1) ** 2,
                               m.var((2, 3), correction=0) + 1e-6)
    assert raw_features(x)["pixels"].shape == (6, 3072)


def test_no_data_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(one_step, "data_dir", lambda: tmp_path)
    with pytest.raises(Refusal, match="no emoji32"): load_emoji()


# the recorded run

@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "drpo.py"
    spec = importlib.util.spec_from_file_location("drpo_bench", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def invented(bench, seeds=5):
    "Cells with numbers that nobody measured."
    def values(config):
        if config["arm"] == "clock":
            return {f"{k} {w[0]}": dict(forward=1., backward=2. + config["seed"] * (k != "DrPO"))
                    for k in ("DrPO", "gradient", "gradient, recomputed")
                    for w in bench.HEAVY["widths"]}
        draw = torch.Generator().manual_seed(len(config["arm"]) * 10 + config["seed"])
        return {k: torch.rand((), generator=draw).item()
                for k in ("reward", "judge", "colour", "size", "rank", "spread")}
    return [dict(config=c, values=values(c), seconds=1.) for c in bench.configs(range(seeds))]


def test_every_cell_has_a_name_of_its_own(bench):
    names = [bench.digest(c) for c in bench.configs(range(5))]
    assert len(names) == len(set(names)) == 5 * (len(bench.ARMS) + 2)
    assert set(bench.SHOWN) <= set(bench.ARMS)


def test_claims_are_paired_by_seed_and_in_order(bench):
    cells = invented(bench)
    rows = [bench.row(cells, *claim) for claim in bench.claims(cells[::-1])]
    assert claim_problems(rows) == [] and {len(r["seeds"]) for r in rows} == {5}
    of = lambda arm: [c["values"]["reward"] for c in cells if c["config"]["arm"] == arm]
    paired = stats.ttest_rel(of("DrPO"), of("DPO"))
    row = next(r for r in rows if "one-step DPO" in r["claim"])
    low, high = paired.confidence_interval()
    assert abs(row["low"] - low) < 1e-9 and abs(row["high"] - high) < 1e-9
    assert row["verdict"] == ("held" if low > 0 else "did not hold" if high < 0
                              else "too small to tell")


def test_ratio_of_seconds(bench):
    cells = invented(bench)
    assert bench.ratio(cells, "gradient", bench.HEAVY["widths"][-1][0]) == [
        (3 + seed) / 3 for seed in range(5)]


def test_settings_change_what_the_arm_says(bench):
    found = bench.settings(dict(weight=10., floor=0., masked="all", lambda_ref=1.))
    assert found.lambda_ref == 1. and found.preference.masked == "all"
    assert found.reference.masked == "negatives"
    assert found.preference.positive == found.reference.negative == 10.
    assert found.preference.floor == found.reference.floor == 0.
    assert bench.settings({}) == PUBLISHED["ViT-MAE"]
