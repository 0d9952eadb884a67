"""Songs: listeners, world model, pairs from dislikes, the step, estimators, logs."""
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from dpo_literate.recommend import (SIGNALS, Picker, PickRow, Plays, WorldModel, candidates,
                                    copy_loss, correction_pairs, draw_listeners, drawn_songs,
                                    expected_signals, feedback_loss, fit, greedy_policy, improve,
                                    last_values, listen, music_songs, no_plays, pick_layout,
                                    pick_scorer, play, policy_of, production_policy, r_squared,
                                    song_step, utility_weights)
from dpo_literate.recommend_eval import (HOSTILE, doubly_robust, effective_size, factor_policy,
                                         fixed_policy, gini, hostile, implicit_factors, ips,
                                         pick_shares, popularity_scores, rating_features, read_log,
                                         snips, variety)
from dpo_literate.results import Refusal

SONGS = drawn_songs(40)


def a_log(n=30, plays=8, seed=0):
    return play(production_policy(SONGS), SONGS, draw_listeners(SONGS, n, seed), plays, seed)[0]


# ------------------------------------------------------------ listeners

def test_expected_signals_are_the_mean_of_what_listeners_say():
    items, said = torch.arange(40), []
    people = draw_listeners(SONGS, 40, 0)
    mean = expected_signals(SONGS, people)[items, items]
    for seed in range(400):
        source = torch.Generator().manual_seed(seed)
        said.append(listen(SONGS, draw_listeners(SONGS, 40, 0), items, source))
    inside = (mean > .2) & (mean < .8)      # away from the ends, where noise is cut off
    gaps = (torch.stack(said).mean(0) - mean)[inside]
    assert inside.sum() > 60 and gaps.abs().max() < .11 and abs(gaps.mean()) < .01


def test_a_song_again_and_again_is_liked_less_each_time():
    people, source = draw_listeners(SONGS, 5, 0), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(4):
        seen.append(expected_signals(SONGS, people)[:, 3, 1])
        listen(SONGS, people, torch.full((5,), 3), source)
    assert all((later < sooner).all() for sooner, later in itertools.pairwise(seen))


def test_without_the_data_a_catalogue_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_LITERATE_DATA", str(tmp_path))
    assert len(music_songs()) == 120
    folder = tmp_path / "music_affect"
    folder.mkdir()
    (folder / "songs.csv").write_text(
        "song_id,title,artist,valence,arousal\n1,A,x,.5,.4\n2,B,y,.1,.9\n3,C,x,.2,.3\n")
    songs = music_songs()
    assert songs.names == ["A", "B", "C"] and songs.artist.tolist() == [0, 1, 0]
    torch.testing.assert_close(songs.style[0], songs.style[2])


def test_a_log_is_its_seed():
    one, two, other = a_log(seed=3), a_log(seed=3), a_log(seed=4)
    assert torch.equal(one.items, two.items) and torch.equal(one.signals, two.signals)
    assert not torch.equal(one.items, other.items)


# ------------------------------------------------------------ models

@pytest.mark.parametrize("positions", [False, True])
def test_positions_are_what_tells_an_order(positions):
    torch.manual_seed(0)
    model = WorldModel(SONGS.features, layers=1, positions=positions)
    log = a_log(6)
    turned = Plays(log.items.clone(), log.signals.clone())
    turned.items[:, :2], turned.signals[:, :2] = log.items[:, [1, 0]], log.signals[:, [1, 0]]
    if positions: torch.nn.init.normal_(model.encoder.body.wpe.weight)
    far = (model.encoder(log)[:, -1] - model.encoder(turned)[:, -1]).abs().max()
    assert (far > 3e-5) == positions   # one layer without positions sees a set
    fit(model, feedback_loss, log, 1)
    assert model.encoder.body.wpe.weight.any() == positions


def test_a_deaf_world_model_does_not_hear_feedback():
    torch.manual_seed(0)
    log = a_log(4)
    other = Plays(log.items, 1 - log.signals)
    deaf, hearing = (WorldModel(SONGS.features, feedback=f) for f in (False, True))
    assert torch.equal(deaf(log), deaf(other)) and not torch.equal(hearing(log), hearing(other))


def test_padding_and_unknown_signals_change_nothing():
    torch.manual_seed(0)
    world, picker, log = WorldModel(SONGS.features), Picker(SONGS.features), a_log(4)
    pad, nan = torch.full((4, 3), -1), torch.full((4, 3, 4), math.nan)
    long = Plays(torch.cat([log.items, pad], 1), torch.cat([log.signals, nan], 1))
    for model, loss in ((world, feedback_loss), (picker, copy_loss)):
        torch.testing.assert_close(loss(model, log), loss(model, long))
    torch.testing.assert_close(policy_of(picker)(log), policy_of(picker)(long))
    few = Plays(log.items, log.signals.clone())
    few.signals[..., 2:] = math.nan
    known = torch.nn.functional.binary_cross_entropy_with_logits(
        world(few)[..., :2], few.signals[..., :2])
    torch.testing.assert_close(feedback_loss(world, few), known)


def test_a_copycat_learns_a_policy_it_can_express():
    torch.manual_seed(0)
    wanted = torch.randn(40) * 2
    log, _ = play(fixed_policy(wanted), SONGS, draw_listeners(SONGS, 200, 0), 10, 0)
    copycat = fit(Picker(SONGS.features), copy_loss, log, 15)
    p, q = wanted.softmax(-1), policy_of(copycat)(log).exp().mean(0)
    assert (p - q).abs().sum() / 2 < .12 < (p - 1 / 40).abs().sum() / 2


def test_r_squared_and_last_values():
    true = torch.tensor([1., 2., 3., math.nan])
    assert r_squared(true, true) == 1 and r_squared(torch.full((4,), 2.), true) == 0
    log = Plays(torch.zeros(1, 3, dtype=torch.long), torch.rand(1, 3, 4))
    log.signals[0, 1, 2], mean = math.nan, torch.full((4,), .3)
    last = last_values(log, mean)
    assert last[0, 0].tolist() == mean.tolist() and last[0, 2, 2] == mean[2]
    assert torch.equal(last[0, 1], log.signals[0, 0])


# ------------------------------------------------------------ pairs and the step

def test_every_dislike_is_a_pair_whose_chosen_is_the_best_candidate():
    torch.manual_seed(0)
    world, log, weights = WorldModel(SONGS.features), a_log(), utility_weights(rating=1.)
    rows = correction_pairs(world, log, weights, near=5, far=5, seed=2)
    places = [(u, t) for u in range(30) for t in range(8) if log.signals[u, t, 1] == 0]
    assert len(rows) == len(places) > 20
    wrong = torch.tensor([r.rejected for r in rows])
    offered = candidates(SONGS.features, wrong, 5, 5, torch.Generator().manual_seed(2))
    for (u, t), row, some in zip(places, rows, offered):
        assert row.rejected == log.items[u, t] and torch.equal(row.items, log.items[u, :t])
        said = world.logits(world.encoder(log)[u, t])[some, 1]
        assert row.chosen == some[said.argmax()] != row.rejected


def test_the_scorer_is_a_softmax_over_the_catalogue():
    torch.manual_seed(0)
    picker, log = Picker(SONGS.features), a_log(3)
    rows = [PickRow(log.items[u, :u], log.signals[u, :u], 4 + u, 9) for u in range(3)]
    piece, = pick_layout(rows)
    sums = pick_scorer(picker, piece).sums
    for u in range(3):
        alone = policy_of(picker)(Plays(log.items[u:u + 1, :u], log.signals[u:u + 1, :u]))[0]
        torch.testing.assert_close(sums[[u, 3 + u]], alone[[4 + u, 9]])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo_sum", "aot"])
def test_losses_of_the_registry_move_the_policy_toward_the_chosen(loss):
    torch.manual_seed(0)
    copycat, log = Picker(SONGS.features), a_log(40)
    kept = {k: v.clone() for k, v in copycat.state_dict().items()}
    rows = [PickRow(log.items[u, :4], log.signals[u, :4], 1, 2) for u in range(40)]
    policy = improve(copycat, rows, epochs=3, size=8, loss=loss)
    assert song_step(copycat, loss=loss).measure(policy, rows, 40)["rewards/margins"] > .05
    assert all(torch.equal(v, kept[k]) for k, v in copycat.state_dict().items())


def test_greedy_picks_what_the_world_model_likes_best():
    torch.manual_seed(0)
    world, log, weights = WorldModel(SONGS.features), a_log(5), utility_weights(arousal=1.)
    best = world.logits(world.encoder(log)[:, -1])[..., 3].argmax(-1)
    assert torch.equal(greedy_policy(world, weights)(log).argmax(-1), best)


def test_a_wrong_signal_is_named():
    with pytest.raises(Refusal, match="'joy': use engagement, rating, valence, arousal"):
        utility_weights(joy=1.)
    assert utility_weights(valence=.5).tolist() == [0, 0, .5, 0] and len(SIGNALS) == 4


# ------------------------------------------------------------ measures and estimators

def test_gini_is_the_mean_difference_of_pairs():
    shares = pick_shares(torch.tensor([0, 0, 0, 2, 2, 3, -1]), 5)
    n = len(shares)
    plain = sum(abs(a - b) for a in shares for b in shares) / (2 * n * n * shares.mean())
    assert abs(shares.sum() - 1) < 1e-12 and abs(gini(shares) - plain) < 1e-12


def test_shift_is_zero_from_itself_and_one_from_strangers():
    a, b = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    assert variety(a, torch.eye(4), a)["shift"] == 0 and variety(a, torch.eye(4), b)["shift"] == 1


def test_estimators_over_every_log_of_two_plays():
    g = torch.Generator().manual_seed(1)
    b, pi = (torch.rand(3, generator=g, dtype=torch.float64).softmax(-1) for _ in range(2))
    r, q = torch.rand(2, 3, generator=g, dtype=torch.float64)
    total = dict(ips=0., dr=0.)
    for log in itertools.product(range(3), repeat=2):
        a = torch.tensor(log)
        w, p = (pi / b)[a], b[a].prod().item()
        total["ips"] += p * ips(w, r[a]).item()
        total["dr"] += p * doubly_robust(w, r[a], q[a], (pi * q).sum().expand(2)).item()
    for value in total.values(): assert abs(value - (pi * r).sum().item()) < 1e-12
    a = torch.tensor([0, 1, 2])
    right = doubly_robust(torch.rand(3).double(), r[a], r[a], (pi * r).sum().expand(3))
    assert abs(right - (pi * r).sum()) < 1e-12       # a right model needs no right weights


def test_estimators_equal_those_of_open_bandit():
    ope = pytest.importorskip("obp.ope")
    g = torch.Generator().manual_seed(0)
    n, k = 500, 5
    b, pi = (torch.rand(n, k, generator=g, dtype=torch.float64).softmax(-1) for _ in range(2))
    a = b.multinomial(1, generator=g)[:, 0]
    r, q = torch.rand(n, generator=g).double(), torch.rand(n, k, generator=g).double()
    at = torch.arange(n)
    w = (pi / b)[at, a]
    how = dict(reward=r.numpy(), action=a.numpy(), pscore=b[at, a].numpy(),
               action_dist=pi.numpy()[..., None], position=torch.zeros(n).long().numpy())
    theirs = [ope.InverseProbabilityWeighting().estimate_policy_value(**how),
              ope.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**how),
              ope.DoublyRobust().estimate_policy_value(
                  **how, estimated_rewards_by_reg_model=q.numpy()[..., None])]
    ours = [ips(w, r), snips(w, r), doubly_robust(w, r, q[at, a], (pi * q).sum(1))]
    for x, y in zip(theirs, ours): assert abs(x - y.item()) < 1e-10


def test_effective_size():
    assert effective_size(torch.tensor([1., 0., 0.])) == 1
    assert effective_size(torch.tensor([2., 2.])) == 2


def test_baselines():
    log = Plays(torch.tensor([[0, 1, -1], [0, 2, 2]]), torch.ones(2, 3, 4))
    assert popularity_scores(log, 4).exp().round().tolist() == [3, 2, 3, 1]
    policy = factor_policy(torch.eye(4) + .1)
    assert (policy(log).exp().sum(1) == 1).all()
    assert policy(log)[0].argmax() in (2, 3) and policy(log)[1].argmax() in (1, 3)


def test_implicit_finds_who_likes_what():
    pytest.importorskip("implicit")
    items = torch.tensor([[0, 1, 2], [3, 4, 5]] * 30)
    keep = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < .8
    log = Plays(items.where(keep, -1), torch.ones(60, 3, 4))
    for kind in ("bpr", "als"):
        f = implicit_factors(kind, log, 6)
        assert f[0] @ f[1] > f[0] @ f[4] and f[3] @ f[5] > f[3] @ f[2]


def test_hostile_histories_keep_their_padding():
    log = Plays(torch.tensor([[5, 6, -1]]), torch.rand(1, 3, 4))
    log.signals[0, 2] = math.nan
    for kind in HOSTILE:
        other = hostile(log, kind)
        assert torch.equal(other.items < 0, log.items < 0)
        assert other.signals[0, 2].isnan().all() and not other.signals[0, :2].isnan().any()
    assert hostile(log, "disliked").signals[0, :2, 1].sum() == 0


def test_rating_features_know_only_what_was_rated():
    log = Plays(torch.tensor([[0, 1, 2, 3]] * 20), torch.ones(20, 4, 4))
    log.signals[:10, 2:, 1], log.signals[10:, :2, 1] = 0, 0
    f = rating_features(log, 5, size=1)
    assert (f[0] - f[1]).norm() < 1e-3 < (f[0] - f[2]).norm() and f[4].norm() < 1e-3


# ------------------------------------------------------------ logs

BAD = {"user,item,rating\na,b,1\n": r":1: no column 'time'",
       "user,item,time,rating\na,b,1,5\na,c,2,nan\n": r":3: rating is 'nan'",
       "user,item,time,rating\na,b,1,\n": r":2: rating is ''",
       "user,item,time,rating\na,b,soon,5\n": r":2: time is 'soon'",
       "user,item,time,rating\na,b,1\n": r":2: 3 cells, expected 4",
       "user,item,time,rating\na,b,1,4\na,c,2,4\n": r"every rating is 4, so nothing is disliked",
       "user,item,time,rating,valence\na,b,1,4,2\na,c,2,3,.1\n": r":2: valence is outside",
       "user,item,time,rating\n": r"no plays below the head"}


@pytest.mark.parametrize("text", BAD, ids=lambda t: BAD[t][:30])
def test_a_bad_log_is_refused_with_its_line(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(Refusal, match=r"log\.csv.*" + BAD[text]): read_log(tmp_path / "log.csv")


def test_no_log_at_all(tmp_path):
    with pytest.raises(Refusal, match="no such file"): read_log(tmp_path / "none.csv")


def test_heads_of_recbole_and_optional_signals(tmp_path):
    path = tmp_path / "x.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                    "u\tb\t1\t9\nu\ta\t5\t3\nv\ta\t2\t1\n")
    log, users, items = read_log(path, scale=(1, 5))
    assert users == ["u", "v"] and log.items.tolist() == [[0, 1], [0, -1]]
    assert log.signals[0, :, 1].tolist() == [1, 0] and log.signals[0, :, 0].isnan().all()
    path.write_text("user,item,time,rating,valence\nu,a,1,1,\nu,b,2,3,.4\n")
    log = read_log(path)[0]
    assert log.signals[0, 0, 2].isnan() and abs(log.signals[0, 1, 2] - .4) < 1e-6
    assert len(no_plays(2)) == 2 and len(read_log(path, longest=1)[0].items[0]) == 1


def test_films_of_a_recorded_cell_are_judged_without_greedy_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import recommend as run
    torch.manual_seed(0)
    log, features = a_log(12), SONGS.features
    world, judge, copycat = WorldModel(features), WorldModel(features), Picker(features)
    found = run.logged_values({"copycat": copycat}, log, world, judge)
    assert set(found) == {"copycat", "greedy"} and abs(found["copycat"]["ess"] - 1) < 1e-5
    plain = log.signals[..., 1].mean().item()
    assert abs(found["copycat"]["snips"] - plain) < 1e-5
    assert found["greedy"]["trained_on"] > found["copycat"]["trained_on"]
    sys.modules.pop("recommend")
