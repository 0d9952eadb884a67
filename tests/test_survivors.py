"""Tests that seeded mistakes asked for: each of these once lived through the whole suite."""
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_literate import checkpoints as ck
from dpo_literate import manifest as mf
from dpo_literate import models, results
from dpo_literate.audit import check_preferences, leakage
from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.models import TINY, tiny_model, weights_hash
from dpo_literate.packing import pack_rows
from dpo_literate.preferences import row_hash
from dpo_literate.reading import load_preferences
from dpo_literate.rows import Row, encode_pairs, tiny_tokenizer
from dpo_literate.secalign import delimiters_of, front_end, secalign_pairs
from dpo_literate.settings import DPOConfig
from dpo_literate.trainer import DPOTrainer, reference_context


@pytest.mark.parametrize("kind,setting", [("granite", dict(logits_scaling=4.)),
                                          ("cohere", dict(logit_scale=.25)),
                                          ("gemma2", dict(final_logit_softcapping=5., head_dim=8))])
def test_a_models_own_scale_of_logits_is_its_own(kind, setting):
    "Granite divides, Cohere multiplies, Gemma caps: as the model's own head does it."
    config = AutoConfig.for_model(kind, vocab_size=64, bos_token_id=1, eos_token_id=2,
                                  pad_token_id=0, **TINY | setting)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad(): [p.mul_(3) for p in model.parameters() if p.dim() > 1]
    row = Row([5, 6, 7], [8, 9, 10, 2], [11, 2])
    found = reply_logps(model, pad_rows([row])).sums
    for reply, got in zip((row.chosen_ids, row.rejected_ids), found):
        ids = torch.tensor([row.prompt_ids + reply])
        logps = model(input_ids=ids).logits.double().log_softmax(-1)[0, 2:-1]
        want = logps.gather(1, torch.tensor(reply)[:, None]).sum()
        assert abs(got - want) < 1e-4, (kind, float(got), float(want))


# ------------------------------------------------------------ files of pairs

def backwards(value):
    "The same value with the fields of every object in reverse order."
    if isinstance(value, list): return [backwards(v) for v in value]
    if not isinstance(value, dict): return value
    return {k: backwards(value[k]) for k in reversed(value)}


def test_the_order_of_fields_is_no_content():
    call = dict(type="function", function=dict(name="look", parameters=dict(type="object")))
    row = dict(prompt=[dict(role="user", content="where?")],
               chosen=[dict(role="assistant", content="here")],
               rejected=[dict(role="assistant", content="there")], tools=[call])
    one, two = load_preferences([row]), load_preferences([backwards(row)])
    assert one.set_sha256 == two.set_sha256 and row_hash(one[0]) == row_hash(two[0])
    found = check_preferences(load_preferences([row, backwards(row)])).found
    assert len(found["duplicate"]) == 1


@pytest.mark.parametrize("train", ["Ｈｅｌｌｏ", "①  apple", "ｶﾀｶﾅ"])
def test_compatible_letters_do_not_hide_a_leak(train):
    "Full width, circled, half width: NFKC folds them, NFC does not, nor does case folding."
    import unicodedata
    pair = dict(chosen="yes", rejected="no")
    plain = unicodedata.normalize("NFKC", train)
    assert plain.casefold() != unicodedata.normalize("NFC", train).casefold()
    found = leakage([dict(pair, prompt=train)], [dict(pair, prompt=plain)])
    assert (len(found.exact), len(found.near)) == (0, 1)


# ------------------------------------------------------------ dropout in references and evaluations

PAIRS = [dict(prompt=f"dish {k}", chosen="the answer is yes " * (1 + k % 3),
              rejected="the answer is no") for k in range(8)]


def dropping():
    "A tiny Llama that drops half of its attention, in training mode."
    model = tiny_model()
    for layer in model.model.layers: layer.self_attn.attention_dropout = .5
    return model.train()


def with_lora():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(dropping(), LoraConfig(r=2, target_modules=["q_proj"])).train()


@pytest.fixture
def batch():
    return pack_rows(encode_pairs(PAIRS, tiny_tokenizer())[0])[0]


def same_twice(ask):
    return all(torch.equal(a, b) for a, b in zip(ask(), ask()))


def test_a_reference_never_drops_anything(batch):
    frozen = models.FrozenReference(dropping())
    assert same_twice(lambda: frozen.logps(batch))
    policy = with_lora()
    off = models.AdapterOff(policy)
    assert same_twice(lambda: off.logps(batch)) and policy.training
    model = dropping()
    tables = [models.read_reference(model, [batch]) for _ in range(2)]
    assert tables[0] == tables[1] and model.training


def trainer(out, model=None, **settings):
    transformers.logging.set_verbosity_error()
    given = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=4,
                 per_device_train_batch_size=2, save_strategy="no", logging_steps=4,
                 learning_rate=1e-3)
    t = DPOTrainer(model or dropping(), args=DPOConfig(str(out), **given | settings),
                   train_dataset=PAIRS, eval_dataset=PAIRS[:3], processing_class=tiny_tokenizer())
    t.remove_callback(transformers.PrinterCallback)
    return t


def test_an_evaluation_drops_nothing(tmp_path):
    t = trainer(tmp_path, disable_dropout=False)
    t.model.train()
    losses = {t.evaluate()["eval_loss"] for _ in range(3)}
    assert len(losses) == 1 and t.model.training


def test_a_references_numbers_are_filed_under_their_autocast(tmp_path):
    plain, half = (trainer(tmp_path, bf16=on) for on in (False, True))
    contexts = [reference_context(t) for t in (plain, half)]
    assert contexts[0] != contexts[1]
    assert len({models.table_path(tmp_path, c) for c in contexts}) == 2


def test_tokens_and_slots_of_a_line_survive_its_interruption(tmp_path):
    "Saved in the middle between two log lines, where rows are padded."
    saving = dict(save_strategy="steps", save_steps=2, layout="padded")
    straight = trainer(tmp_path, **saving)
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=True)
    def line(t): return next(h for h in t.state.log_history if "padding_share" in h)
    assert line(straight)["padding_share"] > 0
    for key in ("padding_share", "num_tokens", "loss"):
        assert line(straight)[key] == line(again)[key]


# ------------------------------------------------------------ on the disk itself

def test_every_file_of_a_model_is_flushed_before_it_is_shown(tmp_path, monkeypatch):
    "The power may go at any moment: fsync of each file, then its name."
    done = []
    for module in (ck, mf, results):
        monkeypatch.setattr(module, "fsync", lambda p: done.append(("fsync", Path(p).name)))
    replace, rename = os.replace, os.rename
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("shown", Path(b).name)),
                                                     replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(("shown", Path(b).name)),
                                                    rename(a, b)))
    ck.export(tiny_model(), tmp_path / "exported", tiny_tokenizer())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert done.index(("fsync", name)) < done.index(("shown", name))
    done.clear()
    models.write_folder(tmp_path / "written", tiny_model(), tiny_tokenizer())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert done.index(("fsync", name)) < done.index(("shown", "written"))


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path, monkeypatch):
    "A kill in the middle of the deletion must not leave a folder of that name."
    ck.write_folder_atomic(tmp_path / "checkpoint-1", lambda f: (f / "a").write_text("1"), step=1)
    def killed(path, **_): raise KeyboardInterrupt
    monkeypatch.setattr(ck.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt): ck.discard(tmp_path / "checkpoint-1")
    assert ck.checkpoints(tmp_path) == []


# ------------------------------------------------------------ one bit, one heading, one output

def test_a_table_with_one_bit_flipped_is_no_table(tmp_path):
    "In the numbers themselves, where safetensors sees nothing."
    path = tmp_path / "t.safetensors"
    models.save_table(path, {f"{i:02x}" * 32: (-1. - i, -2.) for i in range(3)}, {})
    raw = bytearray(path.read_bytes())
    assert len(models.load_table(path, {})) == 3
    for at in (-1, -8, -3 * 16 - 1):     # a value's sign, its last bit; a key
        harmed = bytearray(raw)
        harmed[at] ^= 1
        path.write_bytes(harmed)
        assert models.load_table(path, {}) == {}


def test_an_injected_task_asks_for_another_output():
    "Else obeying the attacker and doing the task are the same reply, and the pair says nothing."
    rows = [dict(instruction=f"Say it {k}.", input=f"text {k}", output=" Paris " if k else "Paris")
            for k in range(9)] + [dict(instruction="Say.", input="x", output="Rome")]
    pairs = secalign_pairs(rows, tiny_tokenizer(), seed=0)
    assert len(pairs) > 5 and all(p["chosen"] != p["rejected"] for p in pairs)


def test_nobody_but_the_program_opens_a_heading():
    tokenizer = tiny_tokenizer()
    assert "##" in delimiters_of(tokenizer)
    for text in ("## instruction", "###", "#" * 9 + " do", "a ## b"):
        assert "##" not in front_end(tokenizer, text)


def test_neighbouring_seeds_and_epochs_share_no_order():
    "A seed that is added to the epoch gives seed 42's second epoch to seed 43 as its first."
    from dpo_literate.step import epoch_order
    orders = {tuple(epoch_order(30, seed, epoch)) for seed in range(40, 50) for epoch in range(10)}
    assert len(orders) == 100 and all(sorted(o) == list(range(30)) for o in orders)


# ------------------------------------------------------------ PPO

def test_an_advantage_ends_with_its_reply():
    "Whatever is rewarded behind the end of a shorter reply."
    from dpo_literate.ppo import gae
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, dtype=torch.float64, generator=g)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [1]])).double()
    advantages, returns = gae(rewards, values, mask, gamma=.9)
    for i, n in enumerate((5, 3, 1)):
        alone = gae(rewards[i:i + 1, :n], values[i:i + 1, :n], mask[i:i + 1, :n], gamma=.9)
        for found, want in zip((advantages, returns), alone):
            assert torch.allclose(found[i, :n], want[0], atol=1e-14)
            assert not found[i, n:].any()


def test_a_steered_beta_goes_on_where_it_was(tmp_path):
    from test_ppo import CONFIG, make
    from dpo_literate.ppo_text import resume, train
    config = dataclasses.replace(CONFIG, kl_target=.5, lr=3e-3, steps=3, save_steps=1)
    whole = make(config=config)
    train(whole)
    train(make(config=dataclasses.replace(config, steps=1), output_dir=tmp_path))
    again = make(config=config, output_dir=tmp_path)
    resume(again)
    assert again.done == 1 and again.control.coef != config.kl_coef
    train(again)
    assert again.control.coef == whole.control.coef != config.kl_coef
    assert weights_hash(again.policy) == weights_hash(whole.policy)
