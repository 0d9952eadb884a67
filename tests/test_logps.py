"The head that never builds the logits, against the plain one, on real families, wrapped and not."
import random
from collections import namedtuple

import pytest
import torch

from dpo_literate.logps import Batch, linear_logps, pad_rows, plain_reply_logps, reply_logps, token_logps
from dpo_literate.models import tiny_model

KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")
# transformers' Gemma-2 takes its attention softmax in float32 whatever the model's dtype: there, rows of other widths differ by that rounding
NOISE = {"gemma2": 1e-6}
Pair = namedtuple("Pair", "prompt_ids chosen_ids rejected_ids chosen_weights rejected_weights", defaults=(None, None))


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
        want = torch.stack([by_hand(model, r, r.chosen_ids) for r in rows] + [by_hand(model, r, r.rejected_ids) for r in rows])
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
    got, want = (torch.autograd.grad((out.sums * weight).sum(), params, allow_unused=True) for out in (fast, slow))
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
    with pytest.raises(IndexError): reply_logps(model, Batch(ids, ids, ids, None, torch.tensor([99]), torch.tensor([3]), torch.tensor([0]), None, 1))
    with torch.no_grad(): assert torch.equal(before, model(ids).logits), "an error inside must not leave the head replaced"


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
            places = (batch.score_at[batch.owner == 0] % T + 1).tolist()
            digits = sum(2 ** t for t in places)
            first = max(prompt, 1)
            assert digits == sum(2 ** t for t in range(first, prompt + reply))


def test_weights_count_token_by_token():
    model = tiny_model()
    plain, weighted = Pair([5, 6], [7, 8, 2], [9, 2]), Pair([5, 6], [7, 8, 2], [9, 2], [1., .5, 0.], [1., 1.])
    with torch.no_grad(): tokens, got = reply_logps(model, pad_rows([plain])).tokens, reply_logps(model, pad_rows([weighted]))
    assert abs(got.chosen[0] - (tokens[0] + .5 * tokens[1])) < 1e-12
    assert got.lengths.tolist() == [3, 2]


def test_under_lora_only_the_adapter_gets_gradient_and_off_is_the_base():
    from peft import LoraConfig, get_peft_model
    base = tiny_model()
    batch = pad_rows(random_pairs(7))
    with torch.no_grad(): before = reply_logps(base, batch).sums
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).double()
    out = reply_logps(model, batch)
    assert (out.sums - before).abs().max() < 1e-10
    out.sums.sum().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())
    slow = plain_reply_logps(model, batch).sums.sum()
    for (n, p), g in zip([(n, p) for n, p in model.named_parameters() if p.requires_grad],
                         torch.autograd.grad(slow, [p for p in model.parameters() if p.requires_grad])):
        assert (p.grad - g).abs().max() <= 1e-10, n


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_half_precision_logits_are_summed_in_full(tokens):
    "T28: bf16 products, float32 statistics; against float64 on the same logits."
    torch.manual_seed(0)
    logits = torch.randn(1, tokens + 1, 4000).mul(3).bfloat16()
    ids = torch.randint(4000, (1, tokens + 1))
    error = (token_logps(logits, ids).double().sum() - token_logps(logits.double(), ids).sum()).abs()
    assert error < 1e-3 and token_logps(logits, ids).dtype == torch.float32


def test_under_autocast_the_head_multiplies_in_bf16_and_answers_in_float32():
    torch.manual_seed(0)
    h, W, y = torch.randn(30, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True), torch.randint(50, (30,))
    with torch.autocast("cpu", dtype=torch.bfloat16): got = linear_logps(h, W, y)
    want = (h.bfloat16() @ W.bfloat16().T).float().log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
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
