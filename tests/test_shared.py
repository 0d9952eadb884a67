"Replies shared across the pairs of a prompt: the same numbers, fewer tokens, in every setting."
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import transformers
from test_trainer import TOKENIZER, config, exact, lora

from dpo_literate.models import tiny_model
from dpo_literate.packing import attention_for, pack_rows, packed_reply_logps
from dpo_literate.results import Refusal
from dpo_literate.rows import Row, encode_pairs, split_pairs
from dpo_literate.shared import (check_shared, group_rows, lay_out_groups, pack_groups,
                                 prompt_numbers)
from dpo_literate.step import EpochOrder, Layout, choose_layout
from dpo_literate.trainer import DPOTrainer
from dpo_literate.logps import pad_rows, reply_logps

ANSWERS = ("on the mat", "and the dog sat", "no", "please tell me what")
PAIRS = [dict(prompt=f"the cat {i}", chosen=ANSWERS[a], rejected=ANSWERS[b])
         for i in range(3) for a, b in combinations(range(4), 2)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)
KINDS = ("llama", "qwen2", "qwen3", "gpt2")


def by_id(batches, model, extras=()):
    found = {}
    for b in batches:
        out = (packed_reply_logps if b.attention_mask is None else reply_logps)(model, b, extras)
        found |= {r.id: torch.stack(two) for r, *two in zip(b.rows, out.chosen, out.rejected)}
    return torch.stack([found[k] for k in sorted(found)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 40])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(kind, capacity):
    model = exact(kind)
    padded, shared = by_id([pad_rows(ROWS)], model), by_id(pack_groups(ROWS, capacity), model)
    assert (padded - shared).abs().max() < 1e-10
    weights = [p for p in model.parameters() if p.requires_grad]
    want, got = (torch.autograd.grad(x.square().sum(), weights, allow_unused=True)
                 for x in (padded, shared))
    for a, b in zip(want, got):
        assert a is None and b is None or (a - b).abs().max() < 1e-10 * (1 + a.abs().max())


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_written_mask_says_the_same(kind):
    model = tiny_model(scale=1.)
    model.config._attn_implementation = kind
    batch = pack_groups(ROWS)[0]
    with torch.no_grad():
        masked = reply_logps(model, batch, attention_mask=attention_for(batch, kind, torch.float64))
        fast = packed_reply_logps(tiny_model(scale=1.), batch)
    assert (masked.sums - fast.sums).abs().max() < 1e-6   # the norms are float32


def test_each_prompt_and_each_reply_is_read_once():
    prompts = {tuple(r.prompt_ids) for r in ROWS}
    replies = {(tuple(r.prompt_ids), tuple(y)) for r in ROWS
               for y in (r.chosen_ids, r.rejected_ids)}
    once = sum(map(len, prompts)) + sum(len(y) for _, y in replies)
    assert sum(b.input_ids.numel() for b in pack_groups(ROWS)) == once
    assert sum(len(b.score_at) for b in pack_groups(ROWS)) == sum(len(y) for _, y in replies)
    assert once < sum(b.input_ids.numel() for b in pack_rows(ROWS)) / 3


def test_token_weights_and_extras_go_with_the_pair():
    "The same reply with other weights is another reply."
    rows = [replace(ROWS[0], chosen_weights=[.5] * len(ROWS[0].chosen_ids)), *ROWS[1:4]]
    model = exact("llama")
    assert len(group_rows(rows)[0].replies) == 5
    assert (by_id([pad_rows(rows)], model) - by_id(pack_groups(rows), model)).abs().max() < 1e-10
    (padded,), (shared,) = [pad_rows(rows)], pack_groups(rows)
    a = reply_logps(model, padded, ("entropy",))
    b = packed_reply_logps(model, shared, ("entropy",))
    pairs = [(padded, a.extras["entropy"]), (shared, b.extras["entropy"])]
    assert all(len(x) == len(batch.owner) for batch, x in pairs)
    sums = [torch.zeros(8, dtype=x.dtype).index_add(0, batch.owner, x) for batch, x in pairs]
    assert (sums[0] - sums[1]).abs().max() < 1e-9


def test_replies_alone_are_grouped_too():
    alone, model = split_pairs(ROWS[:6]), exact("llama")
    batch, = pack_groups(alone)
    assert (batch.input_ids.numel() < sum(b.input_ids.numel() for b in pack_rows(alone)))
    assert (by_id([pad_rows(alone)], model) - by_id([batch], model)).abs().max() < 1e-10


def test_a_prompt_without_tokens():
    rows = [Row([], [5, 6, 2], [7, 2], "a"), Row([], [5, 6, 2], [8, 9, 2], "b")]
    model = exact("llama")
    assert (by_id([pad_rows(rows)], model) - by_id(pack_groups(rows), model)).abs().max() < 1e-10


def test_a_group_longer_than_a_row_is_cut_between_pairs():
    longest = max(len(group_rows([r])[0]) for r in ROWS)
    with pytest.raises(Refusal, match=f"raise it to {longest}"): pack_groups(ROWS, longest - 1)
    batches = pack_groups(ROWS, longest)
    assert all(b.input_ids.numel() <= longest for b in batches)
    assert sorted(r.id for b in batches for r in b.rows) == sorted(r.id for r in ROWS)


def trained(folder, layout, model=None, rows=ROWS, **settings):
    given = dict(layout=layout, per_device_train_batch_size=6, num_train_epochs=2,
                 train_sampling_strategy="sequential") | settings
    t = DPOTrainer(model or exact("llama"), args=config(folder, **given), train_dataset=rows,
                   processing_class=TOKENIZER)
    t.remove_callback(transformers.PrinterCallback)
    return t


@pytest.mark.parametrize("more", [
    {}, dict(precompute_ref_log_probs=False), dict(loss_type="ipo"), dict(use_weighting=True),
    dict(loss_type="aot", per_device_train_batch_size=3, gradient_accumulation_steps=2),
    dict(loss_type="kto"), dict(ld_alpha=.5), dict(capacity=40)])
def test_training_ends_at_the_same_weights(tmp_path, more):
    packed, shared = (trained(tmp_path / kind, kind, **more) for kind in ("packed", "shared"))
    for t in (packed, shared): t.train()
    assert shared.step.layout.kind == "shared" and packed.step.layout.kind == "packed"
    for (n, a), b in zip(packed.model.named_parameters(), shared.model.parameters()):
        assert (a - b).abs().max() < 1e-9, n
    a, b = ([h for h in t.state.log_history if "loss" in h] for t in (packed, shared))
    assert [h["loss"] for h in a] == pytest.approx([h["loss"] for h in b], abs=1e-10)
    assert b[-1]["num_tokens"] == a[-1]["num_tokens"]    # as TRL counts them
    assert b[-1]["tokens_read"] < a[-1]["tokens_read"]


def test_an_adapter_and_its_reference(tmp_path):
    def run(kind):
        torch.manual_seed(0)                             # the adapter's start
        t = trained(tmp_path / kind, kind, lora(exact("llama")), precompute_ref_log_probs=False)
        t.train()
        return t
    packed, shared = run("packed"), run("shared")
    for a, b in zip(packed.model.parameters(), shared.model.parameters()):
        assert (a - b).abs().max() < 1e-9


def test_a_shuffled_epoch_keeps_the_rows_of_a_prompt_together():
    rows = [r for trio in zip(ROWS[:6], ROWS[6:12], ROWS[12:]) for r in trio]
    groups = prompt_numbers(rows)
    order = EpochOrder(len(rows), 3, groups=groups)
    first, second = order.indices(0), order.indices(1)
    assert sorted(first) == sorted(second) == list(range(18)) and first != second
    for found in (first, second):
        assert sorted([found[i:i + 6] for i in (0, 6, 12)]) == sorted(groups)
    assert EpochOrder(len(rows), 3, groups=groups).indices(1) == second
    assert EpochOrder(18, 3, shuffle=False).indices(0) == list(range(18))


def test_resumed_to_the_bit(tmp_path):
    saves = dict(save_strategy="steps", save_steps=2, train_sampling_strategy="random")
    whole = trained(tmp_path / "whole", "shared", **saves)
    whole.train()
    half = trained(tmp_path / "half", "shared", **saves)
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2
    half.add_callback(Stop())
    half.train()
    again = trained(tmp_path / "half", "shared", **saves)
    again.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


def test_the_model_is_asked_first():
    assert choose_layout(exact("llama"), ROWS, "shared").kind == "shared"
    torch.manual_seed(0)
    shape = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    mistral = transformers.AutoConfig.for_model("mistral", **shape)
    why = check_shared(transformers.AutoModelForCausalLM.from_config(mistral).eval(), ROWS)
    assert why.startswith("padded rows") and "window of 4" in why


def test_who_reads_pairs_apart_says_so():
    from dpo_literate.probes.matched import pair_at
    from dpo_literate.reward_model import end_positions
    batch = lay_out_groups(group_rows(ROWS[:6]))
    for ask in (pair_at, end_positions):
        with pytest.raises(Refusal, match="layout='packed'"): ask(batch)


def test_a_layout_says_what_it_is():
    assert repr(Layout("shared", 64)) == "Layout(shared, capacity=64)"
    assert [b.n_pairs for b in Layout("shared")(ROWS)] == [18]
