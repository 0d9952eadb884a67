"The trainer beyond the page: exactness on real families, its settings against TRL, references, data, metrics, refusals."
import copy
import dataclasses
import json
import math
import random
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

from dpo_literate import losses as registry
from dpo_literate.losses import LOSSES, register_loss
from dpo_literate.models import tiny_model, weights_hash
from dpo_literate.results import Refusal
from dpo_literate.rows import Row, encode_pairs, tiny_tokenizer
from dpo_literate.settings import (CONFIG_TO_LOSS, DIFFERS, PAIR_INPUTS, REFUSED, TRL_DEFAULTS, UNNEEDED, DPOConfig,
                                   TRLTable, settings_of, trl_status)
from dpo_literate.step import PreferenceStep, gather_columns
from dpo_literate.port import identity
from dpo_literate.trainer import DPOTrainer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}", rejected=f"and the dog {'sat ' * (i % 4)}{i}") for i in range(7)]
PAIRED = sorted(n for n, l in getattr(registry, "all_losses", lambda: LOSSES)().items()   # the losses of later pages too
                if getattr(l, "paired", True) and set(getattr(l, "required", l.needs)) <= set(PAIR_INPUTS))
KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")


@pytest.fixture(autouse=True)
def quiet(): transformers.logging.set_verbosity_error()


def exact(kind, seed=0):
    "A tiny model whose norms take the formula in float64, as on page 08."
    model = tiny_model(kind, seed=seed)
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            one, eps = float("Gemma" in type(m).__name__), getattr(m, "variance_epsilon", getattr(m, "eps", None))
            m.forward = types.MethodType(lambda self, x, one=one, eps=eps: (one + self.weight) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt(), m)
    return model


@pytest.fixture
def double_softmax(monkeypatch):
    "transformers takes the eager attention's softmax in float32; here in the type of its input."
    real = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: real(x, dim=dim))


def config(path, **settings):
    given = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=1,
                 per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant")
    return DPOConfig(str(path), **(given | settings))


def trainer(path, model=None, data=PAIRS, **settings):
    more = {k: settings.pop(k) for k in ("eval_dataset", "peft_config", "ref_model", "callbacks", "processing_class") if k in settings}
    return DPOTrainer(tiny_model() if model is None else model, args=config(path, **settings), train_dataset=data, **(dict(processing_class=TOKENIZER) | more))


def train(path, model=None, data=PAIRS, **settings):
    t = trainer(path, model, data, **settings)
    t.remove_callback(transformers.PrinterCallback)
    t.train()
    return t


def lines(t): return [h for h in t.state.log_history if "loss" in h]
def losses(t): return [h["loss"] for h in lines(t)]
def apart(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))
def lora(model, **settings):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(**(dict(r=4, target_modules=["q_proj", "v_proj"]) | settings)))


# ------------------------------------------------------------ exactness (T26, T61, T63)

@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_gives_the_same_weights(tmp_path, kind, double_softmax):
    data = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}", rejected=f"and the dog {'sat ' * (i % 4)}{i}") for i in range(37)]   # 5 steps of 8, the last of 5
    rows, _ = encode_pairs(data, TOKENIZER)
    whole = train(tmp_path / "whole", exact(kind), rows, per_device_train_batch_size=8, layout="padded")
    assert whole.state.global_step == 5
    for b, a, layout in ((2, 4, "packed"), (1, 8, "padded"), (4, 2, "packed"), (8, 1, "packed")):
        cut = train(tmp_path / f"{b}{a}{layout}", exact(kind), rows, per_device_train_batch_size=b, gradient_accumulation_steps=a, layout=layout)
        assert cut.step.layout.kind == layout and apart(whole.model, cut.model) <= 1e-10
        assert max(abs(x - y) for x, y in zip(losses(whole), losses(cut), strict=True)) <= 1e-10


def batches(monkeypatch, groups):
    "Let a trainer read these rows, one group of micro-batches an optimizer step."
    def get(self, epoch_iterator, num_batches, device):
        rows = groups[self.state.global_step]
        return real(self, iter([{"rows": r} for r in rows]), len(rows), device)
    real = DPOTrainer.get_batch_samples
    monkeypatch.setattr(DPOTrainer, "get_batch_samples", get)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo_sum", "ranked"])
def test_uneven_cuts_and_permuted_rows(tmp_path, monkeypatch, loss):
    rows, _ = encode_pairs([dict(PAIRS[i % 7], rejected=f"a dog {i}", **({} if loss == "ranked" else dict(weight=1 + i % 2))) for i in range(40)], TOKENIZER)
    steps = [rows[k:k + 8] for k in range(0, 40, 8)]
    cuts = dict(whole=[[s] for s in steps], uneven=[[s[:5], s[5:]] for s in steps], ones=[[[r] for r in s] for s in steps],
                permuted=[[random.Random(k).sample(s, 8)] for k, s in enumerate(steps)])
    with ranked() if loss == "ranked" else nothing():
        found = {}
        for name, groups in cuts.items():
            with monkeypatch.context() as m:
                batches(m, groups)
                found[name] = train(tmp_path / name, exact("llama"), rows, loss_type=loss, per_device_train_batch_size=8 // len(groups[0]), gradient_accumulation_steps=len(groups[0]))
    assert {t.state.global_step for t in found.values()} == {5}
    assert all(apart(found["whole"].model, t.model) <= 1e-10 for t in found.values())
    assert apart(found["whole"].model, exact("llama")) > 1e-4


class nothing:
    def __enter__(self): pass
    def __exit__(self, *_): pass


class ranked(nothing):
    "A loss that sorts the margins of a batch, while the block lasts."
    def __enter__(self):
        @register_loss("ranked", title="sorted margins", source="test", formula="", at_init=lambda **_: math.log(2), batch_dependent=True)
        def ranked_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=.1):
            gap, ref = (policy_chosen_logps - policy_rejected_logps).sort().values, (ref_chosen_logps - ref_rejected_logps).sort().values
            return -torch.nn.functional.logsigmoid(beta * (gap - ref)), beta * (policy_chosen_logps - ref_chosen_logps), beta * (policy_rejected_logps - ref_rejected_logps)
    def __exit__(self, *_): del LOSSES["ranked"]


@pytest.mark.parametrize("name", PAIRED)
def test_every_loss_under_another_cut(tmp_path, name):
    a = train(tmp_path / "a", exact("llama"), loss_type=name, per_device_train_batch_size=4)
    b = train(tmp_path / "b", exact("llama"), loss_type=name, per_device_train_batch_size=1, gradient_accumulation_steps=4, layout="padded")
    assert apart(a.model, b.model) <= 1e-10 and losses(a) == pytest.approx(losses(b), abs=1e-10)


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpointed_activations_change_nothing(tmp_path, adapter):
    found = {}
    for on in (False, True):
        torch.manual_seed(0)
        model = lora(exact("llama")) if adapter else exact("llama")
        found[on] = train(tmp_path / str(on), model, gradient_checkpointing=on, num_train_epochs=2)
        assert bool(on) == any(getattr(m, "gradient_checkpointing", False) for m in found[on].model.modules())
    assert apart(found[False].model, found[True].model) <= 1e-10
    assert losses(found[True])[-1] < losses(found[True])[0]


def test_windowed_model_falls_back_and_says_so(tmp_path):
    narrow = transformers.AutoConfig.for_model("mistral", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    torch.manual_seed(0)
    t = train(tmp_path, transformers.AutoModelForCausalLM.from_config(narrow, dtype=torch.float64))
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert t.step.layout.kind == card["layout"] == "padded" and "window of 4" in card["why_padded"]


# ------------------------------------------------------------ settings (T36) and TRL's names

def test_the_table_is_that_of_the_installed_trl():
    trl = pytest.importorskip("trl")
    base = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    theirs = {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in dataclasses.fields(trl.DPOConfig)}
    ours = {f.name for f in dataclasses.fields(DPOConfig)}
    assert set(theirs) <= ours and {k for k in theirs if k not in base} <= set(TRL_DEFAULTS)
    assert {k: theirs[k] for k in TRL_DEFAULTS} == TRL_DEFAULTS
    changed = {f.name for f in dataclasses.fields(trl.DPOConfig) if f.name in base and f.name in vars(trl.DPOConfig).get("__annotations__", {})}
    assert changed <= set(TRL_DEFAULTS)
    mine = {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in dataclasses.fields(DPOConfig)}
    other = set(REFUSED) | set(UNNEEDED)
    assert all(mine[k] == v or k in DIFFERS for k, v in TRL_DEFAULTS.items() if k not in other) and set(DIFFERS) <= set(TRL_DEFAULTS) - other
    assert TRLTable()._repr_markdown_().count("\n") == len(TRL_DEFAULTS) + 1


def test_what_the_table_says_is_what_happens(tmp_path, caplog):
    refused = dict(trust_remote_code=True, neftune_noise_alpha=5., label_smoothing_factor=.1)
    unneeded = dict(pad_to_multiple_of=8, precompute_ref_batch_size=2, activation_offloading=True, use_liger_kernel=True,
                    torch_compile=True, auto_find_batch_size=True, include_num_input_tokens_seen="all")
    assert set(refused) == set(REFUSED) and set(unneeded) == set(UNNEEDED)
    for name, value in refused.items():
        with pytest.raises(Refusal, match=name): config(tmp_path, **{name: value})
        if name in TRL_DEFAULTS: assert trl_status(name).startswith("refused")
    for name, value in unneeded.items():
        caplog.clear(); args = config(tmp_path, **{name: value})
        left = getattr(args, name)
        assert getattr(left, "value", left) == UNNEEDED[name][0] and caplog.text.count(f"{name}=") == 1 and UNNEEDED[name][1] in caplog.text
        if name in TRL_DEFAULTS: assert trl_status(name).startswith("accepted, not needed")
    assert not any(tmp_path.iterdir())


def test_speed_settings_change_no_weight(tmp_path):
    plain = train(tmp_path / "a", exact("llama"))
    for i, given in enumerate((dict(dataset_num_proc=2, pad_to_multiple_of=8, precompute_ref_batch_size=1), dict(use_liger_kernel=True, torch_compile=True, activation_offloading=True))):
        assert apart(plain.model, train(tmp_path / str(i), exact("llama"), **given).model) == 0.


def test_the_order_can_be_that_of_the_file_and_the_last_step_left_out(tmp_path):
    t = trainer(tmp_path / "a", train_sampling_strategy="sequential")
    assert list(t.order) == list(range(7))
    dropped = train(tmp_path / "b", dataloader_drop_last=True, per_device_train_batch_size=4)
    assert dropped.state.global_step == 1 and train(tmp_path / "c", per_device_train_batch_size=4).state.global_step == 2


@pytest.mark.parametrize("setting,word", [
    (dict(beta=0), "beta"), (dict(beta=-1), "beta"), (dict(loss_type="sigmiod"), "sigmoid"), (dict(trust_remote_code=True), "never"), (dict(layout="flat"), "packed"),
    (dict(ld_alpha=2.), "ld_alpha"), (dict(loss_weights=[1., 2.]), "loss_weights"), (dict(loss_type=[]), "empty"), (dict(loss_type=["sigmoid", "sigmoid"]), "twice"), (dict(label_smoothing=.6), "label_smoothing"),
    (dict(ref_model_sync_steps=5), "sync_ref_model"), (dict(sync_ref_model=True, precompute_ref_log_probs=True), "moves"), (dict(sync_ref_model=True, ref_model_mixup_alpha=0.), "mixup"),
    (dict(loss_kwargs={"sigmoid": {"gamma": 1}}), "gamma"), (dict(loss_kwargs={"ipo_sum": {"beta": 1}}), "ipo_sum"), (dict(loss_kwargs={"sigmoid": {"beta": -1}}), "beta"),
    (dict(label_smoothing=.7), "label_smoothing"), (dict(loss_type="ipo_sum", label_smoothing=.1), "does nothing"), (dict(discopop_tau=.1), "does nothing"),
    (dict(capacity=0), "capacity"), (dict(truncation_mode="middle"), "truncation")])
def test_bad_settings_are_refused(tmp_path, setting, word):
    with pytest.raises(Refusal, match=word): config(tmp_path / "run", **setting)
    assert not any(tmp_path.iterdir())


def test_a_loss_that_asks_for_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "INPUTS", (*registry.INPUTS, "tide"))
    try:
        @register_loss("tidal", title="", source="test", formula="", at_init=None)
        def tidal_loss(policy_chosen_logps, policy_rejected_logps, tide, beta=.1): return policy_chosen_logps, policy_chosen_logps, policy_rejected_logps
        with pytest.raises(Refusal, match="needs tide"): config(tmp_path, loss_type="tidal")
    finally: LOSSES.pop("tidal", None)


@pytest.mark.parametrize("name", PAIRED)
def test_every_setting_reaches_a_loss_or_is_refused(tmp_path, name):
    loss, other = LOSSES[name], dict(label_smoothing=.2, f_divergence_type="js_divergence", f_alpha_divergence_coef=.25, discopop_tau=.2, desirable_weight=2., undesirable_weight=.5)
    for setting, aliases in CONFIG_TO_LOSS.items():
        reaches = any(k in loss.hyper for k in aliases)
        if reaches: assert other[setting] in settings_of(loss, config(tmp_path, loss_type=name, **{setting: other[setting]})).values()
        else:
            with pytest.raises(Refusal, match=setting): config(tmp_path, loss_type=name, **{setting: other[setting]})
    for key, value in loss.hyper.items():
        if isinstance(value, float): assert settings_of(loss, config(tmp_path, loss_type=name, loss_kwargs={name: {key: .3}}))[key] == .3


def test_settings_of_a_loss_reach_it(tmp_path):
    plain, smooth = (losses(train(tmp_path / str(i), num_train_epochs=2, loss_kwargs=k)) for i, k in enumerate((None, {"sigmoid": {"label_smoothing": .3}})))
    assert plain[0] == pytest.approx(smooth[0]) and abs(plain[-1] - smooth[-1]) > 1e-4


def test_a_config_from_the_command_line(tmp_path):
    parser = transformers.HfArgumentParser(DPOConfig)
    args, = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--beta", "0.2", "--loss_type", "sigmoid", "ipo_sum", "--loss_kwargs", '{"ipo_sum": {"beta": 0.5}}', "--use_cpu", "--precompute_ref_log_probs", "false"])
    assert args.beta == .2 and args.loss_kwargs == {"ipo_sum": {"beta": .5}} and args.precompute_ref_log_probs is False
    assert DPOConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}).loss_type == ["sigmoid", "ipo_sum"]


# ------------------------------------------------------------ refusals before any work

def test_capacity_smaller_than_a_pair(tmp_path):
    with pytest.raises(Refusal, match="capacity"): trainer(tmp_path, capacity=5)
    assert not any(tmp_path.iterdir())


def test_arguments_that_have_no_place(tmp_path):
    model = tiny_model()
    for given, word in ((dict(data_collator=print), "layout"), (dict(ref_model="gpt2"), "load_model"), (dict(ref_model=model), "shares"), (dict(ref_model=copy.copy(model)), "shares")):
        with pytest.raises(Refusal, match=word): DPOTrainer(model, args=config(tmp_path / "x"), train_dataset=PAIRS, processing_class=TOKENIZER, **given)
    half = copy.deepcopy(model); half.lm_head.weight = model.lm_head.weight
    with pytest.raises(Refusal, match="lm_head.weight"): trainer(tmp_path / "x", model, ref_model=half)
    with pytest.raises(Refusal, match="train_dataset"): trainer(tmp_path / "x", data=None)
    with pytest.raises(Refusal, match="dpo_literate.settings.DPOConfig"): DPOTrainer(model, args=transformers.TrainingArguments(str(tmp_path / "x")), train_dataset=PAIRS, processing_class=TOKENIZER)
    with pytest.raises(Refusal, match="trainable"): trainer(tmp_path / "x", tiny_model().requires_grad_(False))
    with pytest.raises(Refusal, match="embeddings"): trainer(tmp_path / "x", tiny_model(vocab_size=100))
    assert not any(tmp_path.iterdir())


def test_adapters_that_cannot_be(tmp_path):
    from peft import LoraConfig
    with pytest.raises(Refusal, match="head"): trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(Refusal, match="adapter already"): trainer(tmp_path, lora(tiny_model()), peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    merged = lora(tiny_model()); merged.merge_adapter()
    with pytest.raises(Refusal, match="merged"): trainer(tmp_path, merged)


# ------------------------------------------------------------ the reference (T01–T05, T09, T10)

@pytest.mark.parametrize("how", [True, "pissa", "olora", False, "gaussian", "trained", "saved head", "full"])
@pytest.mark.parametrize("cached", [True, False])
def test_every_start_costs_ln2(tmp_path, how, cached):
    torch.manual_seed(0)
    model = tiny_model().float() if how in ("pissa", "olora") else tiny_model()
    if how == "trained": model = train(tmp_path / "before", lora(model), num_train_epochs=3, learning_rate=1e-2).model
    elif how == "saved head": model = lora(model, modules_to_save=["lm_head"])
    elif how != "full": model = lora(model, init_lora_weights=how)
    t = train(tmp_path / "run", model, precompute_ref_log_probs=cached, num_train_epochs=3)
    assert abs(losses(t)[0] - math.log(2)) <= (1e-6 if model.dtype == torch.float32 else 1e-12)
    assert losses(t)[-1] < losses(t)[0]
    assert t.mode == ("cached" if cached else "frozen" if how == "full" else "adapter")


@pytest.mark.parametrize("how", ["cached", "frozen", "adapter", "embeddings"])
def test_the_reference_never_moves(tmp_path, how):
    torch.manual_seed(0)
    model = tiny_model() if how == "frozen" else lora(tiny_model())
    if how == "embeddings": model.get_input_embeddings().weight.requires_grad_(True)
    t = trainer(tmp_path, model, precompute_ref_log_probs=how == "cached", num_train_epochs=10, learning_rate=1e-2)
    t.begin_run()
    probe, = t.step.layout(t.rows[:4])
    before = torch.cat(t.step.reference.logps(probe))
    t.train()
    assert t.state.global_step == 20 and torch.equal(before, torch.cat(t.step.reference.logps(probe)))
    moved = weights_hash(t.model)
    assert abs(gather_columns(t.step, t.model, [probe])[0]["policy_chosen_logps"] - before[:4]).max() > .1 and weights_hash(t.model) == moved


@pytest.mark.parametrize("how", ["frozen", "adapter", "cached model", "cached adapter", "table", "moving"])
def test_a_reference_that_moved_stops_the_run_at_its_checkpoint(tmp_path, how):
    "T02 in production: a few rows are asked for again before a checkpoint is written."
    torch.manual_seed(0)
    adapter = how in ("adapter", "cached adapter")
    ref = dict(ref_model=tiny_model()) if how in ("frozen", "cached model") else {}
    class Nudge(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step != 3: return
            if how == "table": t.step.reference.table = {k: (a + 1e-9, b) for k, (a, b) in t.step.reference.table.items()}
            else: next(p for n, p in (t.model if adapter else t.ref_model or t.step.reference.model).named_parameters() if "q_proj" in n and not (adapter and p.requires_grad)).data[0, 0] += .01
    settings = dict(save_strategy="steps", save_steps=2, num_train_epochs=3, per_device_train_batch_size=4, precompute_ref_log_probs=how in ("cached model", "cached adapter", "table"), sync_ref_model=how == "moving",
                    **({"ref_model_sync_steps": 2} if how == "moving" else {}))
    if how == "moving": settings["precompute_ref_log_probs"] = None
    t = trainer(tmp_path, lora(tiny_model()) if adapter else tiny_model(), callbacks=[Nudge()], **ref, **settings)
    if how == "moving": t.train(); assert t.state.global_step == 6; return       # it was meant to move
    with pytest.raises(Refusal, match=rf"step 4: the reference \({t.mode}") as why: t.train()
    assert why.value.code == 3 and sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert t.state.global_step == 4


def test_the_adapter_is_its_own_reference(tmp_path):
    "T04: against base and adapter loaded apart from each other."
    import peft
    torch.manual_seed(0)
    train(tmp_path / "a", lora(tiny_model()), num_train_epochs=3, learning_rate=1e-2).model.save_pretrained(tmp_path / "adapter")
    apart_ = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    t = trainer(tmp_path / "b", model); t.begin_run()
    probe, = t.step.layout(t.rows)
    with torch.no_grad(): want = dpo_literate_logps(apart_, probe)
    assert (torch.cat(t.step.reference.logps(probe)) - want).abs().max() <= 1e-10


def dpo_literate_logps(model, batch):
    from dpo_literate.packing import packed_reply_logps
    return packed_reply_logps(model, batch).sums


def test_another_reference_only_when_meant(tmp_path):
    with pytest.raises(Refusal, match="other_reference"): train(tmp_path / "a", ref_model=tiny_model(seed=1))
    t = train(tmp_path / "b", ref_model=tiny_model(seed=1), other_reference=True)
    assert abs(losses(t)[0] - math.log(2)) > .01
    same = train(tmp_path / "c", ref_model=tiny_model(), precompute_ref_log_probs=False)
    assert same.mode == "frozen" and losses(same) == pytest.approx(losses(train(tmp_path / "d")), abs=1e-10)


def read_by(monkeypatch):
    "How many rows each run reads from its reference."
    import dpo_literate.reference_table as module
    seen, real = [], module.read_reference
    monkeypatch.setattr(module, "read_reference", lambda model, batches, *rest: (seen.append(sum(b.n_pairs for b in batches)), real(model, batches, *rest))[1])
    return seen


def test_the_cache_is_keyed_by_all_it_depends_on(tmp_path, monkeypatch):
    "T09: 13 changes, and what each must read again; values come by content, never by place."
    seen, n = read_by(monkeypatch), len(PAIRS)
    def run(model=None, data=PAIRS, **settings):
        before = len(seen)
        t = trainer(tmp_path, model, data, **settings)
        with t.folder.lock.lock: t.begin_run()      # a table is kept where the run may write
        probe = t.step.layout(t.rows)
        fresh = torch.cat([torch.stack(t.step.reference.logps(b)) - dpo_literate_logps(t.model, b).view(2, -1) for b in probe], 1)
        assert fresh.abs().max() < 1e-8
        return sum(seen[before:])
    assert run() == n and run() == 0
    assert run(data=[dict(PAIRS[0], chosen="on the mat 9"), *PAIRS[1:]]) == 1                    # a character
    assert run(data=PAIRS[::-1]) == 0 and run(data=PAIRS[1:]) == 0                               # order; a row less: same rows, same numbers
    wider = tiny_tokenizer(); wider.add_tokens(["zebra"])
    other = tiny_tokenizer(); other.chat_template += " "
    assert run(processing_class=wider) == n and run(processing_class=other) == n                 # vocabulary, template
    assert run(max_length=512) == n and run(truncation_mode="refuse") == n                   # length rules
    assert run(ld_alpha=.5) == n and run(layout="padded") == n                                   # weighting, layout
    bit = tiny_model(); flip = bit.lm_head.weight.data.view(-1)[:1].view(torch.int64); flip ^= 1
    assert run(bit) == n                                                                         # one bit
    assert run(lora(tiny_model())) == n and run(lora(tiny_model(), lora_alpha=99)) == n          # adapter, its scale
    assert run() == 0
    import dpo_literate.trainer as module
    monkeypatch.setattr(module, "versions", lambda: {"transformers": "6"})
    assert run() == n                                                                            # library
    assert run(tiny_model().float()) == n                                                        # precision


def test_a_damaged_table_is_read_again(tmp_path, monkeypatch):
    seen = read_by(monkeypatch)
    first = train(tmp_path)
    table, = (tmp_path / "reference").iterdir()
    table.write_bytes(table.read_bytes()[:-9])
    assert losses(train(tmp_path)) == losses(first) and seen == [7, 7]


def test_a_following_reference_survives_a_stop(tmp_path):
    settings = dict(sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=.5, per_device_train_batch_size=1, save_strategy="steps", save_steps=4)
    whole = train(tmp_path / "whole", **settings)
    stop = trainer(tmp_path / "cut", max_steps=4, **settings); stop.train()
    again = trainer(tmp_path / "cut", max_steps=7, **settings)
    with pytest.raises(Refusal, match="max_steps was 4 and is 7") as why: again.train(resume_from_checkpoint=True)
    assert why.value.code == 6
    again.allow_change = ["max_steps"]
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 7
    assert weights_hash(again.model) == weights_hash(whole.model) and weights_hash(again.step.reference.model) == weights_hash(whole.step.reference.model)
    assert weights_hash(whole.step.reference.model) not in (weights_hash(tiny_model()), weights_hash(whole.model))
    with pytest.raises(Refusal, match="whole"): trainer(tmp_path / "x", lora(tiny_model()), **settings)


@pytest.mark.parametrize("k", [1, 3, 4, 7])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_goes_on_to_the_bit(tmp_path, k, adapter):
    "T44 on DPO itself: dropout, warm-up, two epochs of an uneven set, log lines over several steps."
    from peft import LoraConfig
    def make(folder):
        more = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"])) if adapter else {}
        return trainer(folder, tiny_model(), **more, num_train_epochs=2, per_device_train_batch_size=2, logging_steps=3, warmup_steps=3, lr_scheduler_type="linear",
                       disable_dropout=False, save_strategy="steps", save_steps=1, eval_dataset=PAIRS[:3], eval_strategy="steps", eval_steps=2)
    whole = make(tmp_path / "whole"); whole.train()
    cut = make(tmp_path / "cut")
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_): control.should_training_stop = state.global_step == k
    cut.add_callback(Stop()); cut.train()
    again = make(tmp_path / "cut"); again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))
    def said(t): return [{n: v for n, v in h.items() if "second" not in n and "runtime" not in n} for h in t.state.log_history if "train_loss" not in h]
    assert said(whole) == said(again)


@pytest.mark.parametrize("change,word", [(dict(beta=.2), "beta was 0.1 and is 0.2"), (dict(data=PAIRS[:6]), "data was"), (dict(data_seed=9), "order_seed"), (dict(model=tiny_model(seed=1)), "reference")])
def test_another_run_is_not_gone_on_with(tmp_path, change, word):
    settings = dict(save_strategy="steps", save_steps=1)
    train(tmp_path, **settings)
    with pytest.raises(Refusal, match=word) as why: trainer(tmp_path, **(settings | change)).train(resume_from_checkpoint=True)
    assert why.value.code == 6


def test_a_loss_without_reference_reads_none(tmp_path, monkeypatch):
    seen = read_by(monkeypatch)
    @register_loss("contrast", title="contrast of means", source="test", formula="", at_init=None, quantity="mean")
    def contrast_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta=.1):
        c, r = beta * policy_chosen_logps / chosen_lengths, beta * policy_rejected_logps / rejected_lengths
        return -torch.nn.functional.logsigmoid(c - r), c, r
    try:
        t = train(tmp_path, loss_type="contrast")
        with pytest.raises(Refusal, match="no reference"): trainer(tmp_path, loss_type="contrast", ref_model=tiny_model(seed=1))
    finally: del LOSSES["contrast"]
    line = lines(t)[0]
    assert seen == [] and t.mode == "none" and line["mean_logps/chosen"] * .1 == pytest.approx(line["rewards/chosen"]) and line["logps/chosen"] < line["mean_logps/chosen"] < 0


# ------------------------------------------------------------ data

def test_weights_and_margins_reach_the_loss(tmp_path):
    heavy = [dict(p, weight=3. if i == 0 else 1.) for i, p in enumerate(PAIRS)]
    margin = [dict(p, margin=.5) for p in PAIRS]
    plain, weighted, asked = (train(tmp_path / str(i), data=d, per_device_train_batch_size=7) for i, d in enumerate((PAIRS, heavy, margin)))
    assert losses(plain)[0] == pytest.approx(math.log(2)) and losses(weighted)[0] == pytest.approx(math.log(2) * 9 / 7)
    assert losses(asked)[0] == pytest.approx(math.log1p(math.exp(.5)))
    assert apart(plain.model, weighted.model) > 1e-6 < apart(plain.model, asked.model)
    with pytest.raises(Refusal, match="margin"): trainer(tmp_path / "x", data=margin, loss_type="ipo_sum")
    with ranked():
        with pytest.raises(Refusal, match="weight of its own"): trainer(tmp_path / "x", data=heavy, loss_type="ranked")
        with pytest.raises(Refusal, match="use_weighting"): config(tmp_path / "x", loss_type="ranked", use_weighting=True)
    gone = [dict(p, weight=0. if i < 3 else 1.) for i, p in enumerate(PAIRS)]
    kept = train(tmp_path / "kept", exact("llama"), data=gone, per_device_train_batch_size=7, optim="sgd", max_grad_norm=0., learning_rate=.01)
    rest = train(tmp_path / "rest", exact("llama"), data=PAIRS[3:], per_device_train_batch_size=7, optim="sgd", max_grad_norm=0., learning_rate=.01 * 4 / 7)
    assert apart(kept.model, rest.model) <= 1e-12


def test_every_shape_of_data(tmp_path):
    import datasets
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    rows, _ = encode_pairs(PAIRS, TOKENIZER)
    table = datasets.Dataset.from_list(PAIRS)
    shapes = dict(list=PAIRS, rows=rows, bare=[Row(r.prompt_ids, r.chosen_ids, r.rejected_ids) for r in rows], file=tmp_path / "pairs.jsonl", table=table)
    with pytest.raises(Refusal, match="not all splits at once"): trainer(tmp_path / "all", data=datasets.DatasetDict(train=table, test=table))
    found = {k: losses(train(tmp_path / k, data=v, num_train_epochs=2)) for k, v in shapes.items()}
    whole = train(tmp_path / "stream", data=table.to_iterable_dataset(), max_steps=len(found["list"]))   # read to its end, so shuffled
    found["stream"] = losses(whole)
    assert all(v == found["list"] for v in found.values()), found
    cut = train(tmp_path / "cut", data=table.to_iterable_dataset(), max_steps=1)
    assert len(cut.rows) == 4 and cut.counts["train"].rows_in == 4
    for column in ("images", "chat_template_kwargs"):
        with pytest.raises(Refusal, match=column): trainer(tmp_path / "x", data=[dict(p, **{column: ["x"]}) for p in PAIRS])


def test_rows_of_an_epoch(tmp_path, monkeypatch):
    "T33: each row once an epoch, whatever the batch."
    for n in (1, 7, 8, 9):
        seen, real = [], PreferenceStep.loss
        with monkeypatch.context() as m:
            m.setattr(PreferenceStep, "loss", lambda self, model, piece: (seen.extend(r.id for r in piece.rows), real(self, model, piece))[1])
            t = train(tmp_path / str(n), data=[dict(PAIRS[i % 7], id=str(i), rejected=f"no {i}") for i in range(n)], per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2)
        assert sorted(seen) == sorted(str(i) for i in range(n) for _ in (0, 1))
        assert t.state.epoch == 2


# ------------------------------------------------------------ log, evaluation, callbacks

def test_evaluation_reads_each_row_once(tmp_path):
    t = trainer(tmp_path, exact("llama"), eval_dataset={"a": PAIRS, "b": PAIRS[:3]}, per_device_eval_batch_size=4)
    first = t.evaluate()
    assert abs(first["eval_a_loss"] - math.log(2)) < 1e-12 and first["eval_b_rewards/accuracies"] == .5
    t.train()
    whole = t.evaluate()
    t.args.per_device_eval_batch_size = 1
    ones = t.evaluate()
    keys = [k for k in whole if "loss" in k or "/" in k]
    assert whole["eval_a_loss"] < math.log(2) and len(keys) == 14 and all(abs(whole[k] - ones[k]) < 1e-10 for k in keys)
    with pytest.raises(Refusal, match="eval_dataset"): t.evaluate([dict(PAIRS[0], chosen="something new")])
    assert t.evaluate(PAIRS[:3])["eval_loss"] == pytest.approx(whole["eval_b_loss"], abs=1e-10)


def test_side_activities_do_not_change_training(tmp_path):
    "T64, T70: evaluation, samples, logging, batches of the cache."
    plain = train(tmp_path / "a", num_train_epochs=2)
    busy = train(tmp_path / "b", num_train_epochs=2, eval_dataset=PAIRS[:3], eval_strategy="steps", eval_steps=1, generate_samples=2, generate_tokens=5, logging_steps=3, dataloader_num_workers=1)
    assert weights_hash(plain.model) == weights_hash(busy.model)
    said = [json.loads(x) for x in (tmp_path / "b" / "samples.jsonl").read_text().splitlines()]
    assert len(said) == 2 * busy.state.global_step and {s["step"] for s in said} == {1, 2, 3, 4} and all(s["prompt"].startswith("the cat") and isinstance(s["reply"], str) for s in said)


def test_samples_reach_the_trackers(tmp_path):
    told = []
    class Board(transformers.TrainerCallback): tb_writer = types.SimpleNamespace(add_text=lambda *a: told.append(a))
    class Wandb(transformers.TrainerCallback): _wandb = types.SimpleNamespace(log=lambda d: told.append(d), Table=lambda columns, data: (columns, data))
    trainer(tmp_path, eval_dataset=PAIRS[:2], generate_samples=2, generate_tokens=3, callbacks=[Board(), Wandb()]).evaluate()
    assert [t[0] for t in told[:2]] == ["eval/0", "eval/1"] and "eval_samples" in told[2]


def test_early_stopping_by_name(tmp_path):
    for metric, better in (("eval_rewards/margins", True), ("eval_loss", False)):
        t = trainer(tmp_path / metric.replace("/", "_"), eval_dataset=PAIRS, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, num_train_epochs=9, learning_rate=0.,
                    load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=better, callbacks=[transformers.EarlyStoppingCallback(2)])
        t.train()
        assert t.state.global_step == 3 and t.state.best_global_step == 1


def test_counts_of_tokens(tmp_path):
    rows, _ = encode_pairs(PAIRS, TOKENIZER)
    once = sum(len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows)
    twice = once + sum(len(r.prompt_ids) for r in rows)
    t = train(tmp_path / "packed", num_train_epochs=2)
    assert (lines(t)[-1]["tokens_read"], lines(t)[-1]["num_tokens"]) == (2 * once, 2 * twice) and lines(t)[-1]["padding_share"] == 0 and lines(t)[-1]["tokens_per_second"] > 0
    p = train(tmp_path / "padded", layout="padded", per_device_train_batch_size=7)
    widest = max(len(r) for r in rows)
    assert lines(p)[0]["num_tokens"] == lines(p)[0]["tokens_read"] == twice and lines(p)[0]["padding_share"] == pytest.approx(1 - twice / (14 * widest))


def test_few_questions_to_the_device(tmp_path, monkeypatch):
    "A Python number read off a tensor makes a GPU wait: a step of eight micro-batches asks for few."
    asked = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, real=real, name=name: (asked.append(name) if sys._getframe(1).f_globals["__name__"] in ("dpo_literate.trainer", "dpo_literate.step", "dpo_literate.objective", "dpo_literate.run_folder", "transformers.trainer") else None, real(self, *a))[1])
    t = trainer(tmp_path, data=[dict(PAIRS[i % 7], rejected=f"no {i}") for i in range(32)], per_device_train_batch_size=2, gradient_accumulation_steps=8, logging_steps=100)
    t.begin_run(); asked.clear(); t.train()
    assert t.state.global_step == 2 and len(asked) <= 2 * 2 + 4, asked


def test_nan_stops_before_the_step(tmp_path):
    for where, word in ((0, "loss of row"), (2, "not finite")):
        t = trainer(tmp_path / str(where)); t.begin_run()
        before = [p.clone() for p in t.model.parameters()]
        if where == 0: t.step.reference.table = {k: (float("nan"), 0.) for k in t.step.reference.table}; t.step.start_tolerance = None
        else: t.model.lm_head.weight.register_hook(lambda g: g * float("inf"))
        with pytest.raises(Refusal, match=word) as why: t.train()
        assert why.value.code == 3 and all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))


def test_card_and_identity(tmp_path):
    t = train(tmp_path)
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert card["rows"]["train"]["rows_in"] == 7 and card["layout"] == "packed" and len(card["identity"]["reference"]["weights"]) == 64
    assert json.loads(json.dumps(t.run_identity(), default=str)) == card["identity"]
    one = identity(t)
    changes = dict(beta=dict(beta=.2), seed=dict(seed=1), per_device_train_batch_size=dict(per_device_train_batch_size=2), losses=dict(label_smoothing=.1))
    for key, settings in changes.items():
        other = trainer(tmp_path / key, **settings); other.begin_run()
        assert identity(other)[key] != one[key]
    other = trainer(tmp_path / "d", data=[dict(PAIRS[0], weight=2.), *PAIRS[1:]]); assert other.run_identity()["data"] != one["data"]


def test_model_card(tmp_path):
    t = train(tmp_path, lora(tiny_model()), eval_dataset=PAIRS, eval_strategy="epoch")
    t.create_model_card(dataset_name="cats", tags="demo")
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text and "- demo" in text and "7 pairs of cats" in text and "eval\\_rewards/accuracies" in text


def test_training_trains(tmp_path):
    "T51: what is trainable moves, what is not stays to the bit."
    torch.manual_seed(0)
    model = lora(tiny_model())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    t = train(tmp_path, model, num_train_epochs=10, per_device_train_batch_size=4)
    assert t.state.global_step == 20
    assert all(torch.equal(before[n], p) != p.requires_grad for n, p in model.named_parameters())


def test_half_precision_starts_at_its_constant(tmp_path):
    "The reference is read under the autocast of training, in the packs of its first epoch."
    for layout in ("packed", "padded"):
        t = train(tmp_path / layout, tiny_model().float(), layout=layout, bf16=True)
        assert all(line["rewards/margins"] == 0 for line in lines(t)[:1]) and abs(losses(t)[0] - math.log(2)) < 1e-6


# ------------------------------------------------------------ a TRL script, only its import changed

@pytest.mark.parametrize("use_peft", [False, True])
def test_trl_script_runs_with_the_import_changed(tmp_path, monkeypatch, use_peft):
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "scripts" / "dpo.py").read_text()
    lines_ = {"from trl import DPOTrainer, get_dataset": "from dpo_literate.trainer import DPOTrainer\n    from trl import get_dataset",
              "from trl import DatasetMixtureConfig, DPOConfig, ModelConfig": "from dpo_literate.trainer import DPOConfig\n    from trl import DatasetMixtureConfig, ModelConfig"}
    for old, new in lines_.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    tiny_model().float().save_pretrained(tmp_path / "model"); TOKENIZER.save_pretrained(tmp_path / "model")
    chat = [dict(prompt=[dict(role="user", content=p["prompt"])], chosen=[dict(role="assistant", content=p["chosen"])], rejected=[dict(role="assistant", content=p["rejected"])]) for p in PAIRS]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"): (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in chat))
    argv = ["dpo.py", "--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-3", "--num_train_epochs", "2",
            "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--no_remove_unused_columns", "--use_cpu", "--report_to", "none", "--save_strategy", "no",
            "--disable_tqdm", "true", "--logging_steps", "1"]
    if use_peft: argv += ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    seen, real = [], DPOTrainer.end
    monkeypatch.setattr(DPOTrainer, "end", lambda self: (seen.append(self), real(self))[1])
    exec(compile(source, "dpo.py", "exec"), {"__name__": "__main__", "__file__": "dpo.py"})
    t, = seen
    assert type(t).__module__ == "dpo_literate.trainer" and t.state.global_step == 4 and losses(t)[-1] < losses(t)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (tmp_path / "out" / ("adapter_model.safetensors" if use_peft else "model.safetensors")).is_file()
    assert [h for h in t.state.log_history if "eval_rewards/accuracies" in h]


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "apo_zero", "aot"])
def test_the_losses_of_trl_step_by_step(tmp_path, name):
    "TRL as an oracle: same model, pairs, template and steps, in float32."
    trl = pytest.importorskip("trl")
    import datasets
    if name not in PAIRED: pytest.skip(f"{name} is not registered")
    chat = [dict(prompt=[dict(role="user", content=p["prompt"])], chosen=[dict(role="assistant", content=p["chosen"])], rejected=[dict(role="assistant", content=p["rejected"])]) for p in PAIRS]
    given = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=5, per_device_train_batch_size=7, learning_rate=1e-3, lr_scheduler_type="constant", loss_type=[name], bf16=False, max_length=None)
    theirs = trl.DPOTrainer(tiny_model().float(), ref_model=tiny_model().float(), args=trl.DPOConfig(str(tmp_path / "trl"), gradient_checkpointing=False, **given), train_dataset=datasets.Dataset.from_list(chat), processing_class=TOKENIZER)
    theirs.train()
    ours = train(tmp_path / "ours", tiny_model().float(), chat, score_tail=True, **given)
    for key in ("loss", "logps/chosen", "logps/rejected"):
        a, b = ([h[key] for h in lines(t)] for t in (ours, theirs))
        assert len(a) == 5 and a == pytest.approx(b, rel=2e-4, abs=2e-4), key


def test_dropout_is_off_unless_asked_for(tmp_path):
    "T08: module and functional dropout, in policy and reference."
    def noisy():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gpt2", vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=.3, embd_pdrop=.3, attn_pdrop=.3), dtype=torch.float64).train()
    off = train(tmp_path / "off", noisy(), learning_rate=0.)
    on = train(tmp_path / "on", noisy(), learning_rate=0., disable_dropout=False)
    assert all(abs(x - math.log(2)) < 1e-12 for x in losses(off)) and any(abs(x - math.log(2)) > 1e-6 for x in losses(on))
    assert json.loads((tmp_path / "on" / "run_card.json").read_text())["settings"]["disable_dropout"] is False


def test_same_seed_same_weights_and_another_order_for_another(tmp_path):
    "T65, T66 within a process."
    a, b, c = (train(tmp_path / str(i), seed=s, data=[dict(PAIRS[i % 7], rejected=f"no {i}") for i in range(16)]) for i, s in enumerate((0, 0, 1)))
    assert weights_hash(a.model) == weights_hash(b.model) != weights_hash(c.model)
    assert a.order.seed == 0 and c.order.seed == 1


def test_bf16_on_a_cpu_without_it_is_said(tmp_path, caplog):
    from dpo_literate.models import fast_bf16
    from dpo_literate.reward_model import RewardConfig
    from dpo_literate.settings import note_bf16
    def warned(): return "no instructions for bfloat16" in caplog.text
    for config in (DPOConfig, RewardConfig):
        caplog.clear(); args = config(str(tmp_path), bf16=True, use_cpu=True, report_to=[])
        assert warned() == (not fast_bf16())
        for able in (True, False):
            caplog.clear(); note_bf16(args, able)
            assert warned() == (not able)
    caplog.clear(); note_bf16(DPOConfig(str(tmp_path), use_cpu=True, report_to=[]), False)
    assert not caplog.text


@pytest.mark.parametrize("settings", [dict(layout="packed"), dict(layout="padded"), dict(loss_type=["aot"]), dict(use_weighting=True), dict(loss_type=["kto"])])
def test_token_metrics_are_means_over_the_chosen_tokens(tmp_path, settings):
    "Against the model's own logits, one reply at a time, before the first step and over a set for evaluation."
    model = tiny_model(scale=1.)
    labelled = [dict(prompt=p["prompt"], completion=p[side], label=side == "chosen") for p in PAIRS for side in ("chosen", "rejected")]
    data = labelled if settings.get("loss_type") == ["kto"] else PAIRS
    t = trainer(tmp_path / "t", copy.deepcopy(model), data, eval_dataset=data[:6], token_metrics=True, per_device_train_batch_size=len(data), **settings)
    t.train()
    def expected(rows):
        entropies, hits = [], []
        for r in (r for r in rows if r.label is not False):
            ids = torch.tensor(r.prompt_ids + r.chosen_ids)
            with torch.no_grad(): lp = model(ids[None]).logits[0].log_softmax(-1)[len(r.prompt_ids) - 1:-1]
            entropies += (-(lp.exp() * lp).sum(-1)).tolist()
            hits += (lp.argmax(-1) == ids[len(r.prompt_ids):]).tolist()
        return sum(entropies) / len(entropies), sum(hits) / len(hits)
    entropy, hits = expected(t.rows)
    assert lines(t)[0]["entropy"] == pytest.approx(entropy, abs=1e-8) and lines(t)[0]["mean_token_accuracy"] == pytest.approx(hits, abs=1e-12)
    model.load_state_dict(t.model.state_dict())
    found = t.evaluate()
    entropy, hits = expected(t.eval_dataset)
    assert found["eval_entropy"] == pytest.approx(entropy, abs=1e-8) and found["eval_mean_token_accuracy"] == pytest.approx(hits, abs=1e-12)
    assert "first_tokens" not in found and "entropy" not in lines(train(tmp_path / "u", copy.deepcopy(model)))[0]
