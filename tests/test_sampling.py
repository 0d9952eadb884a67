"Replies: the model's own probabilities, the same whatever the batch. Distances: a plain loop's."
import contextlib
import math
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.special import gammaincc

from dpo_literate import sampling as S
from dpo_literate.models import tiny_model
from dpo_literate.results import Refusal
from dpo_literate.rows import control_ids, tiny_tokenizer
from dpo_literate.sampling import draw, generate, greedy, kl_per_reply, prompt_tokens, uniforms

TOKENIZER = tiny_tokenizer()
STOP = control_ids(TOKENIZER) | set(range(20, 60))
TEXTS = ("a", "tell me what the cat sat on", "yes and no", "b c d", "tell me", "yes and yes")


def model_of(kind):
    "gemma2's eager attention makes NaN of a float64 mask."
    return tiny_model(kind).float() if kind == "gemma2" else tiny_model(kind)


def asked(n):
    "Prompts with repetitions, and a random stream for each reply."
    prompts = [prompt_tokens(TEXTS[k % len(TEXTS)], TOKENIZER) for k in range(n)]
    return prompts, torch.stack([uniforms(3, TEXTS[k % len(TEXTS)], k, 24) for k in range(n)])


def alone(model, prompt, u, stop, T):
    "One reply by the plainest loop there is: the whole text read again for each token."
    text = list(prompt)
    for x in u:
        p = (model(torch.tensor([text])).logits[0, -1].double() / T).softmax(-1)
        text.append(min(int((p.cumsum(-1) <= x).sum()), len(p) - 1))
        if text[-1] in stop: break
    return text[len(prompt):]


# ------------------------------------------------------------ the same replies whatever the batch

@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2"])
def test_a_reply_is_the_one_drawn_alone(kind):
    model, (prompts, u) = model_of(kind), asked(12)
    together = generate(S.decoder(model, model.dtype), prompts, u, STOP, .8)
    assert together == generate(model, prompts, u, STOP, .8)
    with torch.no_grad():
        plain = [alone(model, p, x, STOP, 0.8) for p, x in zip(prompts, u.double())]
    assert together == plain
    assert len({len(y) for y in together}) > 1 and all(
        len(y) == 24 or y[-1] in STOP for y in together
    )
    assert not any(STOP & set(y[:-1]) for y in together)


@pytest.mark.parametrize("fast", [True, False])
def test_batch_size_and_order_change_nothing(fast):
    "Float64: sizes 1, 3 and 64, and three orders, give the same tokens."
    model, (prompts, u) = tiny_model(), asked(64)
    d = S.FastDecoder(model) if fast else S.PlainDecoder(model)
    want = generate(d, prompts, u, STOP)
    for size in (1, 3): assert generate(d, prompts, u, STOP, batch=size) == want
    for seed in range(3):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        got = generate(d, [prompts[i] for i in order], u[order], STOP, batch=(64, 7, 20)[seed])
        assert got == [want[i] for i in order]


def test_a_small_room_cuts_batches_and_changes_nothing(monkeypatch):
    model, (prompts, u) = tiny_model(), asked(20)
    want = generate(model, prompts, u, STOP)
    monkeypatch.setattr(S, "ROOM", 90)
    sizes = [len(b) for b in S.batches(list(range(20)), [len(p) + 24 for p in prompts], 256)]
    assert max(sizes) < 4 and sum(sizes) == 20 and generate(model, prompts, u, STOP) == want


def test_streams_depend_on_seed_prompt_and_number_alone():
    one = uniforms(0, "a", 0, 50)
    assert torch.equal(one, uniforms(0, "a", 0, 50)) and torch.equal(
        one[:9], uniforms(0, "a", 0, 9)
    )
    others = [uniforms(*key, 50) for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert all((one != x).sum() > 45 for x in others) and one.min() >= 0 and one.max() < 1


# ------------------------------------------------------------ from the model's own distribution

def p_value(counts, p):
    "Pearson's chi square of the counts under p; tokens expected under five times share a cell."
    want = p * counts.sum()
    rare = want < 5
    seen, want = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), want))
    chi2 = ((seen - want)**2 / want.clamp(min=1e-9)).sum()
    return gammaincc(torch.tensor((len(want) - 1) / 2, dtype=torch.float64), chi2 / 2).item()


@pytest.mark.parametrize("T", [.5, 1., 1.7])
def test_sampling_follows_the_models_own_distribution(T):
    "First tokens of 20,000 replies; uniform, reversed and another temperature fail the same test."
    model, prompt, n = tiny_model(), [5, 6, 7], 20_000
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor(generate(S.decoder(model, model.dtype), [prompt] * n, u, {2}, T))[
        :, 0
    ].bincount(minlength=320)
    z = model(torch.tensor([prompt])).logits[0, -1].detach()
    right = (z / T).softmax(-1)
    wrong = [
        torch.full((320,), 1 / 320, dtype=torch.float64),
        right.flip(0),
        (z / (3 * T)).softmax(-1),
    ]
    assert p_value(counts, right) > 1e-3 and max(p_value(counts, p) for p in wrong) < 1e-6


def test_second_tokens_follow_the_model_too():
    "The second token is drawn after the first, though a prompt is read once for all its replies."
    model, prompt, n = tiny_model(), [5, 6, 7], 4000
    u = torch.rand(n, 2, generator=torch.Generator().manual_seed(1))
    drawn = torch.tensor(
        [
            y
            for y in generate(S.decoder(model, model.dtype), [prompt] * n, u, {2}, 0.1)
            if len(y) == 2
        ]
    )
    first = drawn[:, 0].mode().values.item()
    p = (model(torch.tensor([prompt + [first]])).logits[0, -1].detach() / .1).softmax(-1)
    counts = drawn[drawn[:, 0] == first, 1].bincount(minlength=320)
    assert counts.sum() > 300 and p_value(counts, p) > 1e-3
    other = (model(torch.tensor([prompt])).logits[0, -1].detach() / .1).softmax(-1)
    assert p_value(counts, other) < 1e-9


def test_the_reference_test_sees_a_uniform_sampler():
    uniform = torch.randint(320, (20_000,), generator=torch.Generator().manual_seed(0)).bincount(
        minlength=320
    )
    p = (tiny_model()(torch.tensor([[5, 6, 7]])).logits[0, -1].detach()).softmax(-1)
    assert (
        p_value(uniform, torch.full((320,), 1 / 320, dtype=torch.float64))
        > 1e-3
        > p_value(uniform, p)
    )


def test_nothing_is_drawn_from_a_broken_model():
    for bad, T in product(([0., math.nan], [math.inf, 0.], [-math.inf, -math.inf]), (1., 0)):
        with pytest.raises(Refusal, match="not finite") as e:
            draw(torch.tensor([bad]), torch.tensor([0.5]), T)
        assert e.value.code == 3


def test_extremes_of_u_and_of_the_logits():
    z = torch.tensor([[0., 50., -math.inf], [-math.inf, 0., -math.inf]])
    for z in (z, torch.cat([z, torch.full((2, 600), -math.inf)], 1)):     # one stretch, and several
        assert draw(z, torch.tensor([0., 0.])).tolist() == [0, 1]
        assert draw(z, torch.tensor([1 - 2**-24] * 2)).tolist() == [1, 1]
        assert draw(z.bfloat16(), torch.tensor([.5, .5])).tolist() == [1, 1]
        assert draw(z, torch.tensor([.5, .5]), 0).tolist() == [1, 1]


@pytest.mark.parametrize("V", [1, 255, 256, 257, 1000])
def test_stretches_are_the_plain_running_sum(V):
    g = torch.Generator().manual_seed(V)
    z, u = (
        3 * torch.randn(400, V, generator=g, dtype=torch.float64),
        torch.rand(400, generator=g, dtype=torch.float64),
    )
    plain = (z.softmax(-1).cumsum(-1) <= u[:, None]).sum(-1).clamp(max=V - 1)
    assert torch.equal(draw(z, u), plain)


def test_a_token_without_probability_is_never_drawn():
    "Whatever rounding does at the ends of stretches, in float32 and for a u next to 1."
    g = torch.Generator().manual_seed(0)
    z = torch.where(
        torch.rand(300, 2000, generator=g) < 0.01,
        5 * torch.randn(300, 2000, generator=g),
        -math.inf,
    )
    z[:, 7] = 0.
    for u in (torch.rand(300, generator=g), torch.full((300,), 1 - 2**-24), torch.zeros(300)):
        assert z.gather(1, draw(z, u)[:, None]).isfinite().all()


# ------------------------------------------------------------ greedy

def test_greedy_is_argmax_one_by_one():
    model, prompts = tiny_model(), asked(6)[0]
    def by_hand(ids):
        text = list(ids)
        for _ in range(12):
            with torch.no_grad():
                text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
            if text[-1] in STOP: break
        return TOKENIZER.decode(text[len(ids):], skip_special_tokens=True).strip()
    assert greedy(model, TOKENIZER, prompts, 12, STOP) == [by_hand(p) for p in prompts]
    assert greedy(model, TOKENIZER, [], 12) == []


def test_greedy_leaves_the_mode_of_the_model():
    model = tiny_model().train()
    greedy(model, TOKENIZER, asked(2)[0], 2)
    assert model.training and not greedy.__defaults__[0]


# ------------------------------------------------------------ the fast decoder

@pytest.mark.parametrize(
    "kind,fast",
    [("llama", True), ("qwen2", True), ("qwen3", True), ("gpt2", False), ("gemma2", False)],
)
def test_who_is_read_by_the_fast_decoder(kind, fast):
    model = model_of(kind)
    assert isinstance(S.decoder(model, model.dtype), S.FastDecoder if fast else S.PlainDecoder)
    assert isinstance(S.decoder(model), S.PlainDecoder)               # nobody asked for a copy


def test_whoever_would_be_misread_is_called_as_it_is():
    hooked, windowed = tiny_model(), tiny_model("qwen2")
    hooked.model.layers[0].register_forward_hook(lambda m, i, o: o)
    windowed.config.layer_types = ["sliding_attention"] * 2
    assert not S.is_plain(hooked) and not S.is_plain(windowed) and S.is_plain(tiny_model())
    odd = tiny_model()
    odd.model.layers[1].mlp.act_fn = torch.nn.GELU()  # the configuration still says silu
    assert S.is_plain(odd) and isinstance(S.decoder(odd, odd.dtype), S.PlainDecoder)
    empty = tiny_model()
    for d in (empty, S.decoder(empty, empty.dtype)):
        with pytest.raises(Refusal, match="empty"): generate(d, [[5], []], torch.rand(2, 3), {2})


def adapted():
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for n, p in policy.named_parameters():
            if "lora_B" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return policy.eval()


def test_an_adapter_is_read_as_it_stands():
    "On, off for a while, and merged: always the replies of the model that is called."
    policy, (prompts, u) = adapted(), asked(6)
    for model in (policy, policy.merge_and_unload()):
        d = S.decoder(model, torch.float64)
        assert isinstance(d, S.FastDecoder)
        on = generate(d, prompts, u, STOP)
        assert on == generate(S.PlainDecoder(model), prompts, u, STOP)
    policy = adapted()
    with policy.disable_adapter():
        off = generate(S.decoder(policy, policy.dtype), prompts, u, STOP)
    assert off == generate(tiny_model(), prompts, u, STOP) != on


def test_a_decoder_is_a_copy():
    "A step of training does not move it; a new one sees the step."
    model, (prompts, u) = tiny_model(), asked(4)
    d, before = S.decoder(model, "float64"), generate(model, prompts, u, STOP)
    with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert generate(d, prompts, u, STOP) == before != generate(model, prompts, u, STOP)


def test_prompts_are_read_once_and_what_they_share_once_for_all():
    "What passes the first layer: the shared start, a rest a prompt, then a token a reply."
    model, seen = tiny_model(), []
    d, real = S.decoder(model, model.dtype), S.attention_of
    prompts = [[5, 6, 7, 8, k] for k in (10, 11, 12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            S,
            "attention_of",
            lambda d, n, x, *rest: (
                seen.append(len(x)) if n == 0 else None,
                real(d, n, x, *rest),
            )[1],
        )
        generate(d, [p for p in prompts for _ in range(4)], torch.rand(12, 3), set())
    assert seen == [4, 3, 12, 12]


def test_finished_replies_leave_the_batch():
    model, seen = tiny_model(), []
    d, real = S.decoder(model, model.dtype), S.read
    prompts, u = asked(64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            S, "read", lambda d, c, ids, *rest: (seen.append(len(ids)), real(d, c, ids, *rest))[1]
        )
        replies = generate(d, prompts, u, STOP)
    steps = seen[2:]
    assert steps == sorted(steps, reverse=True) and sum(steps) < sum(map(len, replies)) / .8
    assert steps[0] <= 64 and steps[-1] < 16


def test_the_number_type_is_measured_once_and_float64_stays(monkeypatch):
    calls = []
    S.fastest_dtype.cache_clear()
    monkeypatch.setattr(
        S,
        "seconds_of",
        lambda t, d: calls.append(t) or {torch.bfloat16: 1.0, torch.float32: 2.0}[t],
    )
    assert (
        S.sampling_dtype(tiny_model().float())
        == "bfloat16"
        == S.sampling_dtype(tiny_model().float())
        and len(calls) == 2
    )
    assert S.sampling_dtype(tiny_model()) == "float64"
    S.fastest_dtype.cache_clear()
    monkeypatch.setattr(S, "seconds_of", lambda t, d: {torch.bfloat16: 40., torch.float32: 1.}[t])
    assert S.sampling_dtype(tiny_model().float()) == "float32"
    S.fastest_dtype.cache_clear()


def test_a_copy_in_bfloat16_stays_near_the_model():
    model = tiny_model().float()
    ids, at = torch.arange(5, 25)[None], torch.arange(20)[None]
    with torch.inference_mode():
        want = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        d = S.FastDecoder(model, torch.bfloat16)
        got = (
            S.read(d, S.cache_of(d, 1, 20), ids, at, torch.ones(1, 20).bool())[0]
            .float()
            .log_softmax(-1)
        )
    assert 0 <= (want.exp() * (want - got)).sum() < .02 and d.head[0].dtype == torch.bfloat16


# ------------------------------------------------------------ how far

@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_kl_against_a_plain_loop(kind, chunk):
    a, b = tiny_model(kind), tiny_model(kind, seed=1)
    if kind == "gemma2":
        a, b = a.float(), b.float()  # its eager attention makes NaN of a float64 mask
    near = 1e-10 if a.dtype == torch.float64 else 1e-3
    prompts, replies, T = [[5, 6, 7], [8], [9, 10]], [[11, 2], [12, 13, 14, 15], [2]], .7
    exact, cheap = kl_per_reply(a, b, prompts, replies, T, chunk)
    for i, (p, y) in enumerate(zip(prompts, replies)):
        want, log = 0., 0.
        for t in range(len(y)):
            with torch.no_grad():
                new, old = (
                    (m(torch.tensor([p + y[:t]])).logits[0, -1] / T).log_softmax(-1) for m in (a, b)
                )
            want += (new.exp() * (new - old)).sum().item(); log += (new - old)[y[t]].item()
        assert exact[i].item() == pytest.approx(want, abs=near) and cheap[
            i
        ].item() == pytest.approx(log, abs=near)


def test_kl_of_an_adapter_that_is_switched_off_for_the_reference():
    base = tiny_model()
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for n, p in policy.named_parameters():
            if "lora_B" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    @contextlib.contextmanager
    def lent():
        with policy.disable_adapter(): yield policy
    prompts, replies = [[5, 6, 7], [8]], [[11, 2], [12, 13, 14]]
    a, b = (kl_per_reply(policy, ref, prompts, replies)[0] for ref in (lent(), base))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (a > 1e-3).all()


def test_kl_never_holds_the_logits_of_a_batch():
    "Of 2 × 8 × 60 tokens and a vocabulary of 320, no more than 16 rows reach a softmax."
    seen, softmax = [], torch.Tensor.log_softmax
    replies = [list(range(5, 65))] * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "log_softmax",
            lambda z, d: (seen.append(tuple(z.shape)), softmax(z, d))[1],
        )
        kl_per_reply(tiny_model(), tiny_model(seed=1), [[5, 6]] * 8, replies, chunk=16)
    assert seen and max(n for n, _ in seen) == 16 and sum(n for n, _ in seen) == 2 * 8 * 60


