"PPO beyond the page: seeds, families, adapters, non-finite numbers, side effects, the command."
import argparse, json, math, os, signal
from dataclasses import replace
import pytest, torch
from dpo_literate.sampling import kl_per_reply
from dpo_literate.models import tiny_model, weights_hash, write_folder
from dpo_literate.ppo import (KLControl, drawn_pairs, gae, kl_estimates, masked_mean, policy_loss,
                              step_stats, token_rewards, value_loss, walk_dpo, whiten,
                              world_dpo, world_ppo)
from dpo_literate.checkpoints import checkpoints, verify
from dpo_literate.ppo_text import (PPO, PPOConfig, collect, main_ppo, prompt_numbers,
                                   read_replies, resume, reward_function, roll_out,
                                   score_replies, train)
from dpo_literate.results import Refusal
from dpo_literate.rows import encode_prompt, tiny_tokenizer
from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.world import World, kl, objective, optimal_policy, sample_pairs, small_world

TOKENIZER = tiny_tokenizer()
ENDS = [TOKENIZER.eos_token_id]
PROMPTS = ["the cat", "please tell me what the answer is", "no", "and the dog sat"]
IDS = [encode_prompt(p, TOKENIZER) for p in PROMPTS]
CONFIG = PPOConfig(
    steps=3,
    batch_size=8,
    minibatch_size=4,
    epochs=2,
    max_new_tokens=6,
    lr=1e-3,
    value_lr=1e-2,
    kl_coef=0.01,
)


def likes_e(prompts, replies): return [r.count("e") / max(len(r), 1) for r in replies]
def make(reward=likes_e, policy=None, config=CONFIG, prompts=PROMPTS, **more):
    policy = tiny_model(scale=1.) if policy is None else policy
    return PPO(policy, TOKENIZER, prompts, reward, config, **more)


def rng(seed): return torch.Generator().manual_seed(seed)


def random_world(seed, N=3, K=6):
    g = rng(seed)
    return World(
        [str(i) for i in range(N)],
        [[str(j) for j in range(K)]] * N,
        torch.rand(N, generator=g, dtype=torch.float64).softmax(0),
        (2 * torch.randn(N, K, generator=g, dtype=torch.float64)).log_softmax(-1),
        torch.randn(N, K, generator=g, dtype=torch.float64),
    )


# ------------------------------------------------------------ formulas

@pytest.mark.parametrize("seed", range(10))
def test_gae_is_the_sum(seed):
    g = rng(seed)
    B, T = 5, 9
    r, v = torch.randn(2, B, T, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    mask = (torch.arange(T) < lengths[:, None]).double()
    gamma, lam = torch.rand(2, generator=g).tolist()
    adv, ret = gae(r * mask, v, mask, gamma, lam)
    for b, n in enumerate(lengths.tolist()):
        delta = [r[b, t] + gamma * (v[b, t + 1] if t + 1 < n else 0.) - v[b, t] for t in range(n)]
        brute = [sum((gamma * lam)**k * delta[t + k] for k in range(n - t)) for t in range(n)]
        torch.testing.assert_close(adv[b, :n], torch.stack(brute), rtol=0, atol=1e-12)
    assert not (adv * (1 - mask)).any()
    torch.testing.assert_close((ret - adv) * mask, v * mask, rtol=0, atol=1e-12)


def test_values_behind_the_end_do_not_leak():
    mask = torch.tensor([[1., 1., 0., 0.]])
    r, v = torch.tensor([[0., 1., 0., 0.]]), torch.zeros(1, 4)
    spoiled = v.clone(); spoiled[0, 2:] = 1e9
    assert torch.equal(gae(r, v, mask)[0], gae(r, spoiled, mask)[0])


@pytest.mark.parametrize("seed", range(10))
def test_surrogate_at_ratio_one_is_the_policy_gradient(seed):
    world, beta = random_world(seed), .3
    logits = torch.randn(
        world.ref_logps.shape, generator=rng(seed), dtype=torch.float64
    ).requires_grad_()
    now = logits.log_softmax(-1)
    weight = world.prompt_p[:, None] * now.exp().detach()
    gain = (world.rewards - beta * kl_estimates(now, world.ref_logps).k1).detach() - torch.randn(
        3, 1, generator=rng(seed)
    )
    (a,) = torch.autograd.grad(
        (weight * policy_loss(now, now.detach(), gain)).sum(), logits, retain_graph=True
    )
    (b,) = torch.autograd.grad(
        -(world.prompt_p * objective(now, world.ref_logps, world.rewards, beta)).sum(), logits
    )
    assert b.abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_k1_and_k3_are_unbiased(seed):
    world = random_world(seed)
    other = random_world(seed + 100).ref_logps
    k, exact = kl_estimates(other, world.ref_logps), kl(other, world.ref_logps)
    for name in ("k1", "k3"):
        torch.testing.assert_close(
            (other.exp() * getattr(k, name)).sum(-1), exact, rtol=0, atol=1e-10
        )
    assert (k.k2 >= 0).all() and (k.k3 >= 0).all() and (k.k1 < 0).any()


def test_clipping_in_all_directions():
    logps = torch.tensor(
        [math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)], dtype=torch.float64
    )
    A = torch.tensor([2., -2., 2., -2.], dtype=torch.float64)
    torch.testing.assert_close(
        policy_loss(logps, torch.zeros_like(logps), A, 0.2),
        torch.tensor([-2.4, 3.0, -1.0, 1.6], dtype=torch.float64),
    )
    v = torch.tensor([1., 1.])
    torch.testing.assert_close(
        value_loss(v, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), 0.2),
        torch.tensor([0.32, 2.0]),
    )


def test_token_rewards_end_where_the_reply_ends():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    r = token_rewards(torch.tensor([1., 2., 3.]), torch.full((3, 3), .5), mask, .1)
    assert r.ne(0).long().tolist() == mask.tolist()
    torch.testing.assert_close(r.sum(-1), torch.tensor([.9, 1.85, 2.95]))


def test_whitening_ignores_what_is_outside():
    g = rng(0)
    x, mask = torch.randn(4, 6, generator=g) * 7 + 3, (torch.rand(4, 6, generator=g) < .6).float()
    white = whiten(x, mask)
    assert abs(masked_mean(white, mask)) < 1e-6 and abs(masked_mean(white**2, mask) - 1) < 1e-5
    assert torch.equal(white, whiten(torch.where(mask.bool(), x, 1e6), mask))
    assert whiten(torch.ones(2, 2), torch.ones(2, 2)).isfinite().all()


def test_control_finds_its_target():
    control, level = KLControl(.01, target=5.), 0.
    for _ in range(4000): level = 1 / control.update(level)     # a policy whose KL is 1/β
    assert abs(level - 5.) < .1


def test_statistics():
    s = step_stats(
        torch.tensor([[0.5, 0.0, 9.0]]),
        torch.zeros(1, 3),
        torch.zeros(1, 3),
        torch.tensor([[1.0, -1.0, 5.0]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
    )
    assert (
        s["clip_fraction"] == 0.5
        and s["explained_variance"] == 0
        and abs(s["step_kl"] - (math.exp(0.5) - 1 - 0.5) / 2) < 1e-6
    )


# ------------------------------------------------------------ the enumerable world

@pytest.mark.parametrize("seed", range(5))
def test_ppo_reaches_the_optimum_within_one_percent(seed):
    world, beta = small_world(), .5
    def J(lp): return (world.prompt_p * objective(lp, world.ref_logps, world.rewards, beta)).sum()
    best, start = J(optimal_policy(world.ref_logps, world.rewards, beta)), J(world.ref_logps)
    found = J(world_ppo(world, world.rewards, beta, 100 + seed)[-1])
    assert found <= best + 1e-12 and best - found < .01 * min(best, best - start)


@pytest.mark.parametrize("seed", range(3))
def test_dpo_in_expectation_is_the_optimum(seed):
    world = random_world(seed)
    found, star = (
        world_dpo(world, drawn_pairs(world), 1.0),
        optimal_policy(world.ref_logps, world.rewards, 1.0),
    )
    gap = (
        world.prompt_p
        * (
            objective(star, world.ref_logps, world.rewards, 1.0)
            - objective(found, world.ref_logps, world.rewards, 1.0)
        )
    ).sum()
    assert abs(gap) < 1e-6


def test_drawn_pairs_are_what_is_sampled():
    world, n = small_world(), 400_000
    expected, pairs = drawn_pairs(world), sample_pairs(world, n, rng(0))
    seen = (
        torch.zeros_like(expected).index_put(
            tuple(pairs), torch.ones(n, dtype=torch.float64), accumulate=True
        )
        / n
    )
    assert abs(expected.sum() - 1) < 1e-12
    assert ((seen - expected).abs() < 5 * (expected / n).sqrt() + 1e-12).all()


# ------------------------------------------------------------ sampling and reading

@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2"])
def test_reading_a_rollout_is_reading_each_reply_alone(kind):
    model = tiny_model(kind, scale=1.)
    if kind == "gemma2":
        model = (
            model.float()
        )  # its eager attention is NaN in float64 where a padded row sees nothing
    rollout = roll_out(model, IDS, 9, [int(t) for t in range(0, 320, 9)], rng(1))
    assert rollout.mask.sum(-1).unique().numel() > 1
    said = read_replies(model, rollout)["logps"]
    pairs = []
    for ids, reply, m in zip(IDS, rollout.replies, rollout.mask):
        pairs.append((ids, reply[m.bool()].tolist()))
    from dpo_literate.rows import Row
    rows = [Row(p, y, y) for p, y in pairs]
    with torch.no_grad():
        alone = torch.stack([reply_logps(model, pad_rows([r])).chosen[0] for r in rows])
    torch.testing.assert_close(said.sum(-1), alone, rtol=0, atol=1e-4 if kind == "gemma2" else 1e-9)


def test_sampling_follows_the_model():
    model, n = tiny_model(scale=1.), 4000
    rollout = roll_out(model, [IDS[0]] * n, 1, ENDS, rng(0))
    with torch.no_grad(): p = model(torch.tensor([IDS[0]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(rollout.replies[:, 0], minlength=320).double()
    big = p * n > 5
    chi2 = ((seen - n * p)**2 / (n * p))[big].sum() / big.sum()
    assert big.sum() > 50 and .7 < chi2 < 1.3


def test_a_reply_stops_at_its_end_token():
    ends = list(range(0, 320, 5))
    r = roll_out(tiny_model(scale=1.), IDS * 20, 10, ends, rng(0))
    for reply, m, ended in zip(r.replies.tolist(), r.mask.tolist(), r.ended.tolist()):
        n = sum(m)
        assert m == [1] * n + [0] * (len(m) - n)
        assert [t in ends for t in reply[:n]] == [False] * (n - 1) + [ended] and (ended or n == 10)


def test_chance_is_the_generators_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a = roll_out(tiny_model(scale=1.), IDS, 8, ENDS, rng(7))
    b = roll_out(tiny_model(scale=1.), IDS, 8, ENDS, rng(7))
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(torch.get_rng_state(), state)


def test_exact_kl_of_a_rollout_by_hand():
    p, q = tiny_model(scale=1.), tiny_model(scale=1., seed=1)
    r = roll_out(p, IDS, 5, ENDS, rng(0))
    by_hand = []
    for ids, reply in zip(IDS, r.lists()):
        text = torch.tensor([ids + reply])
        with torch.no_grad():
            a, b = (x(text).logits[0, len(ids) - 1 : -1].log_softmax(-1) for x in (p, q))
        by_hand.append((a.exp() * (a - b)).sum())
    torch.testing.assert_close(
        kl_per_reply(p, q, IDS, r.lists())[0], torch.stack(by_hand), rtol=0, atol=1e-8
    )


def test_k1_and_k3_of_text_average_to_the_exact_kl():
    p, q = tiny_model(scale=1.), tiny_model(scale=1., seed=1)
    many = roll_out(p, [IDS[0]] * 2000, 4, ENDS, rng(2))
    exact = kl_per_reply(p, q, [IDS[0]] * 2000, many.lists())[0]
    with torch.no_grad():
        k = kl_estimates(read_replies(p, many)["logps"], read_replies(q, many)["logps"])
    for one in (k.k1.sum(-1), k.k3.sum(-1)):
        assert (one - exact).mean().abs() < 4 * (one - exact).std() / 2000**0.5
    assert exact.std() < k.k3.sum(-1).std() < k.k1.sum(-1).std()


# ------------------------------------------------------------ the loop

def test_reward_rises_and_the_reference_stays():
    run = make(
        config=replace(
            CONFIG, steps=25, batch_size=64, minibatch_size=32, max_new_tokens=8, lr=3e-3, seed=1
        )
    )
    before = weights_hash(run.ref)
    lines = train(run)
    assert (
        lines[-1]["score"] > lines[0]["score"] + 0.2 and lines[0]["kl"] == 0 and lines[-1]["kl"] > 1
    )
    assert weights_hash(run.ref) == before != weights_hash(run.policy)


def test_an_adapter_is_its_own_reference():
    peft = pytest.importorskip("peft")
    base = tiny_model(scale=1.)
    policy = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    run = make(policy=policy, config=replace(CONFIG, lr=1e-2))
    lines = train(run)
    assert run.ref is None and abs(lines[0]["kl"]) < 1e-9 and lines[-1]["kl"] != 0
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)


def test_first_step_gradient_is_reinforce():
    "λ = 1, V = 0, ratio 1, no whitening: each token pushed by the reward that came after it."
    from dpo_literate.ppo_text import piece_loss
    run = make(config=replace(CONFIG, lam=1., whiten=False, vf_coef=0., kl_coef=.1))
    e = collect(run)
    loss, *_ = piece_loss(run, e, torch.arange(8))
    got = torch.autograd.grad(loss, list(run.trained.values()), allow_unused=True)
    logps = read_replies(run.policy, e.rollout)["logps"]
    to_go = e.scores[:, None].expand_as(logps)  # kl is 0 before the first step
    want = torch.autograd.grad(
        -masked_mean(logps * to_go, e.rollout.mask), list(run.trained.values()), allow_unused=True
    )
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_side_activities_change_nothing():
    def noisy(line): torch.rand(3); roll_out(loud.policy, IDS, 3, ENDS, rng(1))
    quiet, loud = make(), make()
    train(quiet); train(loud, noisy)
    assert weights_hash(quiet.policy) == weights_hash(loud.policy)


def lines_of(run):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in run.history]


TIMES = ("seconds", "tokens_per_second")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_to_the_bit(tmp_path, stop, adapted):
    whole, half, again = (make(policy=policy(adapted), config=replace(CONFIG, steps=steps), **more)
                          for steps, more in ((3, {}), (stop, dict(output_dir=tmp_path)),
                                              (3, dict(output_dir=tmp_path))))
    train(whole); train(half)
    resume(again); train(again)
    assert weights_hash(whole.policy) == weights_hash(again.policy)
    assert torch.equal(whole.value.weight, again.value.weight)
    assert lines_of(whole) == lines_of(again)
    assert [step for step, _ in checkpoints(tmp_path)] == [3], "one checkpoint stays"
    files = verify(tmp_path / "checkpoint-3")["files"]
    assert {"optimizer.json", "state.json"} < set(files)
    assert ("adapter_model.safetensors" in files) == adapted


def policy(adapted):
    if not adapted: return tiny_model(scale=1.)
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    return peft.get_peft_model(tiny_model(scale=1.), lora)


@pytest.mark.parametrize("what,change", [
    ("lr", dict(config=replace(CONFIG, lr=.5))), ("prompts", dict(prompts=["another one"])),
    ("model", dict(policy=tiny_model(scale=1., seed=7)))])
def test_a_run_goes_on_as_what_it_was(tmp_path, what, change):
    train(make(config=replace(CONFIG, steps=1), output_dir=tmp_path))
    with pytest.raises(Refusal, match=f"cannot be continued: {what} was") as e:
        resume(make(output_dir=tmp_path, **change))
    assert e.value.code == 6


def test_a_folder_with_a_run_in_it_is_not_written_over(tmp_path):
    train(make(config=replace(CONFIG, steps=1), output_dir=tmp_path))
    other = make(output_dir=tmp_path)
    with pytest.raises(Refusal, match="checkpoint-1 of an earlier run"): train(other)


def test_a_damaged_checkpoint_is_seen(tmp_path):
    train(make(config=replace(CONFIG, steps=1), output_dir=tmp_path))
    path = tmp_path / "checkpoint-1" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes()); raw[-1] ^= 1; path.write_bytes(raw)
    other = make(output_dir=tmp_path)
    with pytest.raises(Refusal, match="none of its 1 checkpoints is whole"): resume(other)


def test_a_checkpoint_every_so_many_steps(tmp_path):
    seen = []
    run = make(config=replace(CONFIG, steps=5, save_steps=2), output_dir=tmp_path)
    train(run, lambda line: seen.append([step for step, _ in checkpoints(tmp_path)]))
    assert seen == [[], [], [2], [2], [4]] and [k for k, _ in checkpoints(tmp_path)] == [5]


def test_a_batch_half_learned_is_not_kept(tmp_path, monkeypatch):
    "Weights that moved without the batch being done would be trained on it twice."
    import dpo_literate.ppo_text as ppo_text
    run = make(config=replace(CONFIG, save_steps=1), output_dir=tmp_path)
    count, update = [0], ppo_text.update
    def second_piece_of_step_two_fails(run, loss):
        count[0] += 1
        pieces = CONFIG.epochs * -(-CONFIG.batch_size // CONFIG.minibatch_size)
        if count[0] == pieces + 2: raise MemoryError
        return update(run, loss)
    monkeypatch.setattr(ppo_text, "update", second_piece_of_step_two_fails)
    with pytest.raises(MemoryError): train(run)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    monkeypatch.setattr(ppo_text, "update", update)
    whole, again = make(), make(output_dir=tmp_path)
    train(whole); resume(again); train(again)
    assert weights_hash(whole.policy) == weights_hash(again.policy)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish(tmp_path, number):
    seen = []
    def told(p, r):
        seen.append(1)
        if len(seen) == 2: os.kill(os.getpid(), number)
        return likes_e(p, r)
    with pytest.raises(SystemExit) as e: train(make(told, output_dir=tmp_path))
    assert e.value.code == 128 + number and [k for k, _ in checkpoints(tmp_path)] == [2]
    whole, again = make(), make(output_dir=tmp_path)
    train(whole); resume(again); train(again)
    assert weights_hash(whole.policy) == weights_hash(again.policy)


@pytest.mark.parametrize(
    "reward,words,code",
    [
        (lambda p, r: 1 / 0, "raised ZeroDivisionError", 2),
        (lambda p, r: ["fine"] * len(r), "gave 'fine' for the reply", 2),
        (lambda p, r: [math.nan] * len(r), "gave nan for the reply", 3),
        (lambda p, r: [math.inf] * len(r), "gave inf", 3),
        (lambda p, r: [1.0], "gave list for 8 replies", 2),
        (lambda p, r: None, "gave NoneType for 8", 2),
        (lambda p, r: [None] * len(r), "gave None for the reply", 2),
        (lambda p, r: "good", "gave str for 8", 2),
    ],
)
def test_a_broken_reward_is_one_sentence_and_the_state_is_kept(tmp_path, reward, words, code):
    seen = []
    def late(p, r): seen.append(1); return likes_e(p, r) if len(seen) < 2 else reward(p, r)
    run = make(late, output_dir=tmp_path)
    with pytest.raises(Refusal, match=words) as e: train(run)
    assert e.value.code == code and "\n" not in str(e.value)
    again = make(output_dir=tmp_path)
    resume(again)
    assert again.done == 1 and weights_hash(again.policy) == weights_hash(run.policy)
    whole = make(); train(whole); train(again)
    assert weights_hash(whole.policy) == weights_hash(again.policy), (
        "mended, the run goes where it would have gone"
    )


def test_numbers_of_every_kind_are_rewards():
    import numpy as np

    for good in (
        [1, 2],
        (1.0, 2.0),
        torch.tensor([1.0, 2.0]),
        [np.float32(1), np.float64(2)],
        [torch.tensor(1.0), 2],
    ):
        assert score_replies(lambda p, r: good, ["x"] * 2, ["a", "b"]).tolist() == [1., 2.]


def test_all_empty_is_refused_and_some_empty_counted(tmp_path):
    mute = make(output_dir=tmp_path)
    mute.end_ids = list(range(320))  # whatever comes first ends the reply
    mute.tokenizer = tiny_tokenizer(); mute.tokenizer.decode = lambda *a, **k: ""
    with pytest.raises(Refusal, match="every reply of the batch is empty"): train(mute)
    assert not checkpoints(tmp_path), "nothing was learned, nothing is kept"
    assert score_replies(likes_e, ["x"] * 2, ["", "e"]).tolist() == [0., 1.]


def test_replies_without_an_end_pay():
    free, fined = (collect(make(config=replace(CONFIG, missing_end_penalty=p))) for p in (0., 2.))
    assert (
        torch.equal(free.scores - fined.scores, 2.0 * (~free.rollout.ended).double())
        and (~free.rollout.ended).any()
    )


@pytest.mark.parametrize("where", ["policy", "value", "gradient"])
def test_non_finite_numbers_stop_before_an_update(tmp_path, where):
    run = make(output_dir=tmp_path, config=replace(CONFIG, steps=1))
    if where == "policy":
        with torch.no_grad(): run.policy.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    if where == "value": run.value.bias.data.fill_(math.nan)
    if where == "gradient": run.policy.model.norm.weight.register_hook(lambda g: g * math.inf)
    before = weights_hash(run.policy)
    with pytest.raises(Refusal, match="not finite") as e: train(run)
    assert e.value.code == 3 and weights_hash(run.policy) == before and not checkpoints(tmp_path)


@pytest.mark.parametrize(
    "setting,word",
    [
        (dict(kl_estimator="k4"), "k1, k2, k3"),
        (dict(steps=0), "steps"),
        (dict(kl_coef=-1.0), "kl_coef"),
        (dict(kl_target=0.0), "kl_target"),
    ],
)
def test_bad_settings(setting, word):
    with pytest.raises(Refusal, match=word): PPOConfig(**setting)


def test_no_prompts():
    with pytest.raises(Refusal, match="no prompts"): PPO(tiny_model(), TOKENIZER, [], likes_e)


def test_every_prompt_once_an_epoch():
    run = make(config=replace(CONFIG, batch_size=3))
    seen = []
    for step in range(4): run.done = step; seen += prompt_numbers(run)
    assert [sorted(seen[i:i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


def test_the_command(tmp_path):
    write_folder(tmp_path / "lm", tiny_model(scale=1.).float(), TOKENIZER)
    (tmp_path / "p.txt").write_text("what is the answer\n\ntell me\n")
    pytest.importorskip("vaderSentiment")
    args = argparse.Namespace(
        model=str(tmp_path / "lm"),
        prompts=str(tmp_path / "p.txt"),
        reward="vader",
        columns=None,
        split=None,
        output=str(tmp_path / "out"),
        rank=2,
        resume=True,
        steps=2,
        batch_size=4,
        minibatch_size=2,
        epochs=1,
        max_new_tokens=4,
        lr=None,
        seed=0,
    )
    assert main_ppo(args) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())["values"]
    assert (
        len(report["history"]) == 2
        and len(report["after"]) == 2
        and (tmp_path / "out" / "model" / "config.json").exists()
    )
    args.steps = 3
    assert main_ppo(args) == 0
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["values"]["history"]) == 3
    args.resume = False
    with pytest.raises(Refusal, match="out is not empty.*--resume"): main_ppo(args)


def test_rewards_by_name(tmp_path):
    pytest.importorskip("vaderSentiment")
    up, down = reward_function("vader")(
        None, ["I love this, it is wonderful!", "I hate this, it is terrible!"]
    )
    assert up > .5 and down < -.5
    with pytest.raises(Refusal, match="cannot be loaded"): reward_function("no_such_module:f")


def test_a_language_model_is_not_a_reward(tmp_path):
    write_folder(tmp_path / "lm", tiny_model(scale=1.).float(), TOKENIZER)
    with pytest.raises(Refusal, match="no trained head"): reward_function(tmp_path / "lm")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_every_penalty_and_a_target_run(kind):
    lines = train(make(config=replace(CONFIG, kl_estimator=kind, kl_target=.5, lr=3e-3)))
    assert (
        lines[0]["kl_coef"] == 0.01
        and lines[1]["kl_coef"] < 0.01
        and all(math.isfinite(v) for v in lines[-1].values())
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_keeps_its_state(tmp_path, stop):
    seen = []
    def later(p, r):
        seen.append(1)
        if len(seen) == 3: raise stop
        return likes_e(p, r)
    with pytest.raises(stop): train(make(later, output_dir=tmp_path))
    whole, again = make(), make(output_dir=tmp_path)
    train(whole)
    resume(again); train(again)
    assert again.done == 3 and weights_hash(whole.policy) == weights_hash(again.policy)


# ------------------------------------------------------------ the comparison of page 12a

@pytest.mark.parametrize("optimiser", ["SGD", "Adam"])
@pytest.mark.parametrize("method", ["DPO", "PPO", "PPO, no clip"])
def test_tables_side_by_side_walk_as_one_does(method, optimiser):
    "The script's runs of one table are those of the page, draw by draw."
    from fragile import dpo_walks, ppo_walks
    world, how = small_world(), dict(steps=6, epochs=3)
    c = dict(method=method, optimiser=optimiser, beta=.5, batch=16, rates=[.05], value_lr=.2, **how)
    walks = dpo_walks if method == "DPO" else ppo_walks
    prompts = torch.full_like(world.prompt_p, 1 / len(world.prompts))     # the script's are even
    world = World(world.prompts, world.replies, prompts, world.ref_logps, world.rewards)
    ours = walks(world.ref_logps[None, None], world.rewards[None, None], c, rng(3))[0, 0]
    how |= dict(seed=3, batch=16, lr=.05, optimizer=getattr(torch.optim, optimiser))
    if method != "DPO": how |= dict(value_lr=.2, clip=.2 if method == "PPO" else 1e9)
    walk = walk_dpo if method == "DPO" else world_ppo
    theirs = walk(world, world.rewards, .5, **how)[-1]
    assert (ours - theirs).abs().max() < 1e-8 < (theirs - world.ref_logps).abs().max()


def test_rates_and_worlds_do_not_meet():
    "A table's walk knows nothing of the tables beside it but the draws."
    from fragile import dpo_walks
    world = small_world()
    ref, r = (t.expand(2, 3, *t.shape) for t in (world.ref_logps, world.rewards))
    c = dict(method="DPO", optimiser="SGD", beta=.5, batch=64, rates=[0., 1.], value_lr=1.,
             steps=3, epochs=2)
    end = dpo_walks(ref, r, c, rng(0))
    assert (end[0] - ref[0]).abs().max() < 1e-12 < (end[1] - ref[1]).abs().min(-1)[0].max()


@pytest.mark.parametrize("seed", range(3))
def test_dpo_by_steps_nears_its_minimiser(seed):
    world = small_world()
    star = optimal_policy(world.ref_logps, world.rewards, .5)
    path = walk_dpo(world, world.rewards, .5, seed, steps=60)
    def off(lp): return (world.prompt_p * kl(lp, star)).sum().item()
    assert off(path[-1]) < .05 * off(world.ref_logps)
