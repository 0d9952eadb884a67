"The head that never builds the logits, against the plain one, on real families, wrapped and not."
import itertools
import json
import random
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from dpo_literate.logps import (Batch, add_up, linear_logps, pad_rows, plain_reply_logps,
                                reply_logps, sequence_logps, token_logps)
from dpo_literate.losses import dpo_loss
from dpo_literate.models import tiny_model

KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")
# transformers' Gemma-2 takes its attention softmax in float32 whatever the model's dtype:
# there, rows of other widths differ by that rounding
NOISE = {"gemma2": 1e-6}
Pair = namedtuple("Pair", "prompt_ids chosen_ids rejected_ids chosen_weights rejected_weights",
                  defaults=(None, None))


def random_pairs(seed, n=4, longest=17):
    rng = random.Random(seed)
    def ids(low): return [rng.randrange(3, 320) for _ in range(rng.randint(low, longest))]
    return [Pair(ids(0) if rng.random() < .9 else [], ids(1) + [2], ids(1) + [2]) for _ in range(n)]


def by_hand(model, row, reply):
    "Sum of log-probabilities of one reply, alone, in a plain loop."
    text, first = row.prompt_ids + reply, max(len(row.prompt_ids), 1)
    with torch.no_grad(): logp = model(torch.tensor([text])).logits[0].log_softmax(-1)
    return sum(logp[t - 1, text[t]] for t in range(first, len(text)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_rows_one_by_one(kind):
    model = tiny_model(kind)
    for seed in range(5):
        rows = random_pairs(seed)
        with torch.no_grad(): got = reply_logps(model, pad_rows(rows))
        want = torch.stack([by_hand(model, r, r.chosen_ids) for r in rows]
                           + [by_hand(model, r, r.rejected_ids) for r in rows])
        assert (got.sums - want).abs().max() < NOISE.get(kind, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_values_and_gradients_equal_the_plain_head(kind, chunk):
    model = tiny_model(kind)
    batch = pad_rows(random_pairs(chunk))
    fast, slow = reply_logps(model, batch, chunk=chunk), plain_reply_logps(model, batch)
    assert (fast.sums - slow.sums).abs().max() < 1e-10
    params = [p for p in model.parameters() if p.requires_grad]
    weight = torch.linspace(-1, 1, len(fast.sums), dtype=torch.float64)
    got, want = (torch.autograd.grad((out.sums * weight).sum(), params, allow_unused=True)
                 for out in (fast, slow))
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None: assert (a - b).abs().max() <= 1e-10 * max(1., b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind):
    model = tiny_model(kind)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(ids).logits
        reply_logps(model, pad_rows(random_pairs(1)))
        assert torch.equal(before, model(ids).logits)
    with pytest.raises(IndexError):
        reply_logps(model, Batch(ids, ids, ids, None, torch.tensor([99]), torch.tensor([3]),
                                 torch.tensor([0]), None, 1))
    with torch.no_grad():
        assert torch.equal(before,
                           model(ids).logits), "an error inside must not leave the head replaced"


def test_gemma_soft_caps_its_logits_once():
    model = tiny_model("gemma2", scale=30.)
    assert model.config.final_logit_softcapping == 30.
    row = random_pairs(3, n=1)[0]
    with torch.no_grad(): got = reply_logps(model, pad_rows([row])).chosen[0]
    assert abs(got - by_hand(model, row, row.chosen_ids)) < 1e-10
    assert model.config.final_logit_softcapping == 30.


@pytest.mark.parametrize("width", [0, 1, 17, 128])
def test_padding_and_its_id_change_nothing(width):
    model, rows = tiny_model("gpt2"), random_pairs(5, n=3)
    longer = Pair([5], [6] * (40 + width) + [2], [7, 2])
    with torch.no_grad():
        alone = reply_logps(model, pad_rows(rows))
        beside = reply_logps(model, pad_rows(rows + [longer], pad_id=2))
    assert (alone.chosen - beside.chosen[:3]).abs().max() < 1e-10


def test_mask_spells_out_what_is_scored():
    "T16: token log-probabilities −2^t; the digits of the sum name the scored positions."
    for prompt in (0, 1, 2, 17):
        for reply in (1, 2, 17):
            row = Pair([5] * prompt, [6] * reply, [7] * 3)
            batch = pad_rows([row])
            T = batch.input_ids.shape[1]
            digits = -add_up(-2. ** (batch.score_at % T + 1).double(), batch).chosen[0].item()
            first = max(prompt, 1)          # with an empty prompt the first token cannot be scored
            assert digits == sum(2 ** t for t in range(first, prompt + reply))
            assert (add_up(torch.ones(len(batch.targets)), batch).lengths.tolist()
                    == [prompt + reply - first, 3 - (prompt == 0)])
            assert (batch.targets[batch.owner == 0].tolist()
                    == (row.prompt_ids + row.chosen_ids)[first:])


def test_weights_count_token_by_token():
    model = tiny_model()
    plain, weighted = (Pair([5, 6], [7, 8, 2], [9, 2]),
                       Pair([5, 6], [7, 8, 2], [9, 2], [1., .5, 0.], [1., 1.]))
    with torch.no_grad():
        tokens, got = (reply_logps(model, pad_rows([plain])).tokens,
                       reply_logps(model, pad_rows([weighted])))
    assert abs(got.chosen[0] - (tokens[0] + .5 * tokens[1])) < 1e-12
    assert got.lengths.tolist() == [3, 2]


def test_under_lora_only_the_adapter_gets_gradient_and_off_is_the_base():
    from peft import LoraConfig, get_peft_model
    base = tiny_model()
    batch = pad_rows(random_pairs(7))
    with torch.no_grad(): before = reply_logps(base, batch).sums
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"],
                                            task_type="CAUSAL_LM")).double()
    out = reply_logps(model, batch)
    assert (out.sums - before).abs().max() < 1e-10
    out.sums.sum().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())
    slow = plain_reply_logps(model, batch).sums.sum()
    for (n, p), g in zip([(n, p) for n, p in model.named_parameters() if p.requires_grad],
                         torch.autograd.grad(slow, [p for p in model.parameters()
                                                    if p.requires_grad])):
        assert (p.grad - g).abs().max() <= 1e-10, n


@pytest.mark.parametrize("words", [400, 32_000])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_half_precision_logits_are_summed_in_full(tokens, words):
    """T28: bf16 products, float32 statistics; a sequence and a margin against float64 on the
    same logits."""
    torch.manual_seed(0)
    logits = torch.randn(1, tokens + 1, words).mul(3).bfloat16()
    ids = torch.randint(words, (2, tokens + 1))
    found = torch.stack([token_logps(logits, one[None]).double().sum() for one in ids])
    exact = torch.stack([token_logps(logits.double(), one[None]).sum() for one in ids])
    assert ((found - exact).abs().max() < 1e-3
            and ((found - exact)[0] - (found - exact)[1]).abs() < 2e-3)
    assert token_logps(logits, ids[:1]).dtype == torch.float32


def test_probabilities_add_up_to_one():
    "T17: over every reply of up to four tokens, for 20 random models and 5 prompts."
    ended = [[*p, 0] for n in range(4) for p in itertools.product([1, 2], repeat=n)]
    every = ended + [list(p) for p in itertools.product([1, 2], repeat=4)]
    for seed in range(20):
        model = tiny_model("llama", vocab_size=3, seed=seed)
        for prompt in ([1], [2], [1, 2], [0, 1, 1], [2, 2, 0, 1]):
            with torch.no_grad():
                got = reply_logps(model, pad_rows([Pair(prompt, y, y) for y in every]))
            assert abs(got.chosen.exp().sum() - 1) < 1e-12 and torch.equal(got.chosen, got.rejected)


def test_gradient_through_gather_mask_sum_and_loss():
    "T14: gradcheck in float64; nothing flows into the reference or to positions before the reply."
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.randint(5, (4, 6)), torch.tensor([[0, 0, 1, 1, 1]] * 4)
    ref = torch.randn(4, dtype=torch.float64)
    def loss(z):
        logps = sequence_logps(z, ids, mask)
        return dpo_loss(logps[:2], logps[2:], ref[:2], ref[2:], beta=.5)[0]
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7, rtol=1e-5)
    grad, = torch.autograd.grad(loss(logits).sum(), logits)
    assert (grad[:, :2] == 0).all() and (grad[:, 5:] == 0).all() and (grad[:, 2:5] != 0).all()


@pytest.mark.parametrize("N, V, chunk",
                         [(1, 7, 1), (5, 300, 2), (64, 3, 256), (33, 129, 8), (200, 17, 1)])
@pytest.mark.parametrize("softcap, scale", [(None, 1.), (3., 1.), (None, .5), (2., 3.)])
def test_any_shape_of_chunk_and_slice(N, V, chunk, softcap, scale):
    g = torch.Generator().manual_seed(N)
    h, W, b = (torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()
               for shape in ((N, 6), (V, 6), (V,)))
    y, up = torch.randint(V, (N,), generator=g), torch.randn(N, dtype=torch.float64, generator=g)
    z = scale * (h @ W.T + b)
    if softcap: z = softcap * torch.tanh(z / softcap)
    slow = z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    fast = linear_logps(h, W, y, b, chunk=chunk, softcap=softcap, scale=scale)
    assert (fast - slow).abs().max() < 1e-11
    for a, c in zip(torch.autograd.grad(fast, (h, W, b), up),
                    torch.autograd.grad(slow, (h, W, b), up)):
        assert (a - c).abs().max() < 1e-11
    frozen = linear_logps(h, W.detach(), y, b.detach(), chunk=chunk, softcap=softcap, scale=scale)
    dh = torch.autograd.grad(frozen, h, up)[0]
    assert ((dh - torch.autograd.grad(linear_logps(h, W, y, b, softcap=softcap, scale=scale), h,
                                      up)[0]).abs().max() < 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_what_they_are_for_and_are_as_exact_as_plain(dtype):
    torch.manual_seed(0)
    h, W, y = torch.randn(300, 32), torch.randn(2000, 32), torch.randint(2000, (300,))
    def grads(head, cast, exact=False):
        a, b = (x.to(cast).detach().requires_grad_() for x in (h, W))
        out = torch.autograd.grad(head(a, b, y).sum(), (a, b))
        assert all(g.dtype == cast for g in out)
        return [g.double() for g in out]
    def plain(h, W, y): return (h @ W.T).float().log_softmax(-1).gather(-1, y[:, None])
    def plain64(h, W, y): return (h @ W.T).log_softmax(-1).gather(-1, y[:, None])
    exact = grads(plain64, torch.float64)
    ours, theirs = grads(linear_logps, dtype), grads(plain, dtype)
    for a, b, c in zip(ours, theirs, exact):
        assert (a - c).norm() < 1.2 * (b - c).norm() + 1e-6 * c.norm()


GOLDEN = Path(__file__).parent / "golden_steps.json"


def twenty_steps():
    "Losses and gradient norms of 20 plain SGD steps on four pairs, tiny model, float64."
    model, ref = tiny_model("llama"), tiny_model("llama")
    batch = pad_rows(random_pairs(11))
    with torch.no_grad(): start = reply_logps(ref, batch)
    found = []
    for _ in range(20):
        got = reply_logps(model, batch)
        loss = dpo_loss(got.chosen, got.rejected, start.chosen, start.rejected)[0].mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads): p -= 3e-2 * g
        found.append([loss.item(), torch.stack([g.norm() for g in grads]).norm().item()])
    return found


def test_twenty_steps_go_where_they_went():
    "T15: a committed trajectory, 1e-9 in float64."
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = torch.tensor(twenty_steps(), dtype=torch.float64)
    want = torch.tensor(golden["steps"], dtype=torch.float64)
    assert (abs(found[0, 0] - torch.tensor(2., dtype=torch.float64).log()) < 1e-12
            and found[-1, 0] < found[0, 0])
    assert ((found - want).abs() <= 1e-9 * want.abs().clamp(
        min=1)).all(), f"made with {golden['versions']}, {golden['threads']} thread"


def test_under_autocast_the_head_multiplies_in_bf16_and_answers_in_float32():
    torch.manual_seed(0)
    h, W, y = (torch.randn(30, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True),
               torch.randint(50, (30,)))
    with torch.autocast("cpu", dtype=torch.bfloat16): got = linear_logps(h, W, y)
    want = (h.bfloat16() @ W.bfloat16().T).float().log_softmax(-1).gather(-1,
        y[:, None]).squeeze(-1)
    assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-5
    got.sum().backward()
    assert h.grad.dtype == W.grad.dtype == torch.float32


def test_extras_cost_no_other_answer():
    torch.manual_seed(0)
    h, W, y = torch.randn(9, 6).double(), torch.randn(11, 6).double(), torch.randint(11, (9,))
    p = (h @ W.T).softmax(-1)
    logp, more = linear_logps(h, W, y, chunk=4, extras=("entropy", "top1", "sum_p2"))
    assert torch.equal(logp, linear_logps(h, W, y, chunk=4))
    assert (more["entropy"] + (p * p.log()).sum(-1)).abs().max() < 1e-12
    assert (more["sum_p2"] - p.square().sum(-1).log()).abs().max() < 1e-12
    assert torch.equal(more["top1"].bool(), p.argmax(-1) == y)
    with pytest.raises(ValueError, match="unknown"): linear_logps(h, W, y, extras=("nonsense",))
