"""Scripts written for TRL, one of each kind: only the import is ours. Each trains, or is refused
with a remedy; each remedy is tried. Where both train the same thing, the weights agree."""
import copy
import logging
import re

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PromptTuningConfig,
                  VeraConfig, get_peft_model)
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_literate import trl as ours
from dpo_literate.inputs import prepare_rows
from dpo_literate.losses import all_losses
from dpo_literate.models import tiny_model
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.settings import ON_PURPOSE, REFUSED, THEIR_TESTS, UNNEEDED
from dpo_literate.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

TEXT = [dict(prompt=f"the {c} cat", chosen=f" sat on the {c} mat",
             rejected=" and the dog" * (1 + i % 2))
        for i, c in enumerate(("red", "blue", "green", "grey"))]
QUIET = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, bf16=False,
             save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-3,
             num_train_epochs=2, seed=0)


def say(role, text): return dict(role=role, content=text)


def chats(n=8):
    "Conversations of one or three turns, replies of different lengths."
    for i in range(n):
        turns = [say("user", "hello"), say("assistant", "yes?")] * (i % 3 == 0)
        yield dict(prompt=[*turns, say("user", f"the cat {'sat ' * (i % 4)}")],
                   chosen=[say("assistant", f"on the mat {i}")],
                   rejected=[say("assistant", f"no {'dog ' * (1 + i % 3)}")])


def tokenizer():
    "A template that ends a turn with its end token: the line break after it is a setting of ours."
    made = tiny_tokenizer()
    made.chat_template = made.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    return made


def experts():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=.5, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    transformers.logging.set_verbosity_error()
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


class Kit:
    "What a script has at hand: a folder, a model in it, and a way to train."
    def __init__(self, path):
        self.path = path

    @property
    def name(self): # of a model on disk
        folder = self.path / "model"
        if not folder.exists():
            tiny_model().float().save_pretrained(folder)
            tokenizer().save_pretrained(folder)
        return str(folder)

    def trainer(self, data=TEXT, model=None, kto=False, out="out", **given):
        passed = {k: given.pop(k) for k in PASSED & given.keys()}
        passed = dict(processing_class=tokenizer()) | passed
        config, cls = (KTOConfig, KTOTrainer) if kto else (DPOConfig, passed.pop("cls", DPOTrainer))
        data = data if isinstance(data, IterableDataset) else Dataset.from_list(list(data))
        args = config(str(self.path / out), **QUIET | given)
        return cls(tiny_model().float() if model is None else model, args=args,
                   train_dataset=data, **passed)

    def train(self, *data, **given):
        made = self.trainer(*data, **given)
        made.remove_callback(transformers.PrinterCallback)
        made.train()
        assert made.state.global_step > 0
        return made


PASSED = {"processing_class", "ref_model", "eval_dataset", "compute_metrics", "callbacks", "cls",
          "optimizers", "peft_config", "data_collator", "terms", "quantization_config"}
def said(trainer): return {k for line in trainer.state.log_history for k in line}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


# ------------------------------------------------------------ the kinds of script

SCRIPTS = {}
def script(f): SCRIPTS[f.__name__] = f


@script
def model_by_name(kit): kit.train(model=kit.name, processing_class=None)

@script
def text_with_a_prompt(kit): kit.train(TEXT)

@script
def text_with_an_implicit_prompt(kit):
    t = kit.train([{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in TEXT])
    assert any("prompt is what both texts begin with" in n for n in t.notes)

@script
def conversations(kit): kit.train(chats())

@script
def conversations_with_an_implicit_prompt(kit):
    kit.train([{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in chats()])

@script
def a_tool_call(kit):
    call = dict(type="function", function=dict(name="f", arguments={"x": 1}))
    asked = [dict(role="assistant", content="", tool_calls=[call]),
             dict(role="tool", name="f", content="2"), say("assistant", "two")]
    kit.train([dict(prompt=[say("user", f"how many {i}")], chosen=[say("assistant", f"2 {i}")],
                    rejected=asked) for i in range(4)])

@script
def template_kwargs_of_a_row(kit):
    t = kit.train([dict(r, chat_template_kwargs={"enable_thinking": False}) for r in chats()])
    assert any("chat_template_kwargs" in n for n in t.notes)

@script
def a_new_adapter(kit): assert kit.train(peft_config=LORA).ref_model is None

@script
def an_adapter_already_on(kit): kit.train(model=get_peft_model(tiny_model().float(), LORA))

@script
def a_reference_of_its_own(kit):
    ref = tiny_model().float()
    assert kit.train(ref_model=ref).ref_model is ref

@script
def a_reference_read_before(kit): kit.train(precompute_ref_log_probs=True)

@script
def a_reference_that_follows(kit):
    t = kit.trainer(sync_ref_model=True, ref_model_sync_steps=1)
    before = copy.deepcopy(t.ref_model.state_dict())
    t.train()
    assert any(not torch.equal(v, before[k]) for k, v in t.ref_model.state_dict().items())

@script
def several_losses(kit):
    names, weights = ["sigmoid", "bco_pair", "sft"], [.8, .2, 1.]
    t = kit.train(loss_type=names, loss_weights=weights)
    assert (t.beta, t.loss_types, t.loss_weights) == (.1, names, weights)

@script
def a_divergence(kit): kit.train(f_divergence_type="js_divergence")

@script
def weights_of_wpo(kit): kit.train(use_weighting=True)

@script
def long_replies_at_a_discount(kit): kit.train(ld_alpha=.5)

@script
def two_evaluation_sets(kit):
    sets = dict(a=Dataset.from_list(TEXT), b=Dataset.from_list(list(TEXT[:2])))
    t = kit.train(eval_dataset=sets, eval_strategy="epoch")
    assert {"eval_a_loss", "eval_b_rewards/accuracies"} <= said(t)

@script
def best_by_the_accuracy_of_tokens(kit):
    t = kit.train(eval_dataset=Dataset.from_list(TEXT), eval_strategy="epoch",
                  save_strategy="epoch", load_best_model_at_end=True,
                  metric_for_best_model="eval_mean_token_accuracy")
    assert "eval_mean_token_accuracy" in said(t) and t.state.best_metric is not None

@script
def metrics_of_ones_own(kit):
    seen = []
    def shapes(given):
        seen.append((given.predictions.shape, given.label_ids.shape))
        return dict(rows=len(given.label_ids))
    found = kit.trainer(eval_dataset=Dataset.from_list(TEXT), compute_metrics=shapes).evaluate()
    (logits, ids), = seen
    assert found["eval_rows"] == 2 * len(TEXT) and logits == (*ids, 320)

@script
def metrics_batch_by_batch(kit):
    rows = []
    def counted(given, compute_result):
        rows.append(len(given.label_ids))
        return dict(rows=sum(rows)) if compute_result else {}
    t = kit.trainer(eval_dataset=Dataset.from_list(TEXT), compute_metrics=counted,
                    batch_eval_metrics=True, per_device_eval_batch_size=3)
    assert t.evaluate()["eval_rows"] == 8 and rows == [6, 2]

@script
def a_callback(kit):
    steps = []
    class Count(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_): steps.append(state.global_step)
    kit.train(callbacks=[Count()])
    assert steps == [1, 2]

@script
def an_optimizer_of_ones_own(kit):
    model = tiny_model().float()
    kit.train(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=.1), None))

@script
def settings_of_speed(kit):
    kit.train(dataset_num_proc=2, pad_to_multiple_of=8, precompute_ref_batch_size=16,
              use_liger_kernel=True, activation_offloading=True, torch_compile=True,
              padding_free=True, dataloader_drop_last=True, gradient_checkpointing=True)

@script
def the_end_cut_off(kit):
    t = kit.train(max_length=8)
    assert any("cut at the end of a reply" in n for n in t.notes)

@script
def the_collator_of_trl(kit):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    plain = kit.trainer().train_dataset
    longest = max(map(len, plain))
    cut = trainer.DataCollatorForPreference(pad_token_id=0, max_length=longest - 1)
    t = kit.train(data_collator=cut)
    assert max(map(len, t.train_dataset)) == longest - 1
    assert t.train_dataset["prompt_ids"] == plain["prompt_ids"]

@script
def a_stream(kit):
    kit.train(Dataset.from_list(TEXT).to_iterable_dataset(), max_steps=2)

@script
def the_same_cell_again(kit):
    first = kit.train(save_strategy="epoch")
    second = kit.train(save_strategy="epoch")
    assert (first.args.output_dir, second.args.output_dir) == tuple(
        str(kit.path / name) for name in ("out", "out-2"))
    assert {p.name for p in kit.path.glob("out-2/checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}

@script
def a_run_gone_on_with(kit):
    kit.train(save_strategy="epoch", num_train_epochs=1)
    t = kit.trainer(save_strategy="epoch", num_train_epochs=1)
    t.train(resume_from_checkpoint=True)
    assert t.args.output_dir == str(kit.path / "out")

@script
def a_look_at_the_rows(kit):
    rows = kit.trainer().train_dataset
    assert rows.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert rows[0]["chosen_ids"] == rows["chosen_ids"][0]
    assert "chosen_ids" in next(iter(rows)) and "completion_ids" not in rows[0]
    assert "cat" in tokenizer().decode(rows[0]["prompt_ids"])

@script
def a_look_at_a_batch(kit):
    batch = next(iter(kit.trainer().get_train_dataloader()))
    assert batch["input_ids"].shape == batch["completion_mask"].shape
    assert len(batch["input_ids"]) == 8

@script
def a_card_with_tags(kit):
    t = kit.train()
    t.create_model_card("cats", "owner/pairs", tags=["cats", "dpo"])
    text = (kit.path / "out" / "README.md").read_text()
    assert text.count("- dpo\n") == 1 and "- cats\n" in text and "- owner/pairs\n" in text
    assert "dpo" in t.model.model_tags

@script
def saved_and_loaded(kit):
    kit.train().save_model(str(kit.path / "saved"))
    AutoModelForCausalLM.from_pretrained(kit.path / "saved")

@script
def shorter_than_a_log_line(kit):
    last = kit.train(logging_steps=100).state.log_history[-1]
    assert {"train_loss", "rewards/accuracies", "num_tokens"} <= set(last)

@script
def a_stream_to_judge_by(kit):
    "With the reference read beforehand, which TRL refuses: a stream is read first, page 10b."
    stream = Dataset.from_list(TEXT).to_iterable_dataset()
    t = kit.trainer(eval_dataset=dict(a=stream), precompute_ref_log_probs=True)
    assert "eval_a_loss" in t.evaluate()
    assert t.evaluate(eval_dataset=stream)["eval_loss"] > 0

@script
def judged_again_after_training(kit):
    "On rows that the reference was asked for before; TRL refuses any."
    t = kit.trainer(precompute_ref_log_probs=True)
    before = t.evaluate(eval_dataset=Dataset.from_list(TEXT))["eval_loss"]
    t.train()
    assert t.evaluate(eval_dataset=Dataset.from_list(TEXT))["eval_loss"] < before

@script
def what_liger_does_not_know(kit):
    "One's own metrics, and routers: TRL refuses them beside its kernel."
    t = kit.train(use_liger_kernel=True, eval_dataset=Dataset.from_list(TEXT),
                  compute_metrics=lambda given: dict(n=1))
    assert t.evaluate()["eval_n"] == 1
    assert "aux_loss" in said(kit.train(model=experts(), use_liger_kernel=True))

@script
def keys_of_the_log(kit):
    t = kit.train(token_metrics=True)
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy",
            "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "logps/chosen", "logps/rejected"} <= said(t)

@script
def tokens_counted_as_there(kit):
    t = kit.train(num_train_epochs=1)
    sides = ("chosen_ids", "rejected_ids")
    whole = sum(len(r[k]) + len(r["prompt_ids"]) for r in t.train_dataset for k in sides)
    line = t.state.log_history[0]
    assert line["num_tokens"] == whole > line["tokens_read"]

@script
def a_padding_token(kit):
    other = tokenizer().convert_ids_to_tokens(7)
    assert kit.trainer(pad_token=other).processing_class.pad_token == other != tokenizer().pad_token

@script
def how_a_model_is_loaded(kit):
    given = dict(torch_dtype="float32", use_cache=False, low_cpu_mem_usage=True)
    assert kit.train(model=kit.name, model_init_kwargs=given).model.config.use_cache is False

@script
def experts_in_balance(kit):
    assert "aux_loss" in said(kit.train(model=experts()))
    plain = kit.train(model=experts(), router_aux_loss_coef=0.)
    assert "aux_loss" not in said(plain) and not plain.aux_loss_enabled

@script
def experts_and_an_adapter(kit):
    "The reference is the model without its adapter; its routers are not asked the price."
    some = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    prices = [kit.train(model=experts(), peft_config=some, learning_rate=.1, seed=0, out=name,
                        precompute_ref_log_probs=read).state.log_history[1]["aux_loss"]
              for name, read in dict(once=True, each=False).items()]
    assert prices[0] == pytest.approx(prices[1], abs=1e-6)

@script
def labelled_replies(kit):
    rows = [dict(prompt=r["prompt"], completion=r["chosen"], label=i % 2 > 0)
            for i, r in enumerate(TEXT)]
    t = kit.train(rows, kto=True)
    assert "kl" in said(t)
    assert t.train_dataset.column_names == ["prompt_ids", "completion_ids", "label"]

@script
def pairs_for_kto(kit):
    assert len(kit.train(TEXT, kto=True, loss_type="apo_zero_unpaired").train_dataset) == 8

@script
def columns_that_steer(kit):
    t = kit.train([dict(r, margin=float(i)) for i, r in enumerate(TEXT)])
    assert any("column margin (0 to 3)" in n for n in t.notes)

@script
def given_by_hand_and_left_alone(kit):
    by_hand = kit.trainer(loss_type="robust", label_smoothing=0.)
    alone = kit.trainer(loss_type="robust")
    assert [t.step.objective.parts[0][2]["label_smoothing"] for t in (by_hand, alone)] == [0., .1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_only_its_import_changed(tmp_path, name):
    SCRIPTS[name](Kit(tmp_path))


# ------------------------------------------------------------ remedies that work when followed

class Own(DPOTrainer):
    def compute_loss(self, model, inputs): raise AssertionError("never called")


ENDS = [dict(r, chosen=r["chosen"] + " <|im_end|>") for r in TEXT]
TIES = [dict(r, winner="tie") for r in TEXT]
EQUAL = [*TEXT, dict(TEXT[0], rejected=TEXT[0]["chosen"])]
HEAVY = [dict(r, margin=.5) for r in TEXT]
def frozen(): return tiny_model().float().requires_grad_(False)
def with_adapter(): return get_peft_model(tiny_model().float(), LORA)

REMEDIES = { # what is refused -> with what words -> what they say to do
    "control tokens": (dict(data=ENDS), "set control_text='text'",
                       dict(data=ENDS, control_text="text")),
    "ties": (dict(data=TIES), r"set allow=\['tie'\]", dict(data=TIES, allow=["tie"])),
    "equal replies": (dict(data=EQUAL, identical="refuse"), "identical.?drop|identical='drop'",
                      dict(data=EQUAL, identical="drop")),
    "longer than the limit": (dict(max_length=8, truncation_mode="refuse"), "keep_start",
                              dict(max_length=8, truncation_mode="keep_start")),
    "a setting of another loss": (dict(discopop_tau=.1), "choose a loss that has it",
                                  dict(discopop_tau=.1, loss_type="discopop")),
    "noise": (dict(neftune_noise_alpha=5.), "leave it unset", {}),
    "smoothed labels": (dict(label_smoothing_factor=.1), "set label_smoothing",
                        dict(label_smoothing=.1)),
    "a reference that moves, read before": (
        dict(sync_ref_model=True, precompute_ref_log_probs=True),
        "leave precompute_ref_log_probs unset", dict(sync_ref_model=True)),
    "steps of a reference that rests": (dict(ref_model_sync_steps=1), "without sync_ref_model=True",
                                        dict(ref_model_sync_steps=1, sync_ref_model=True)),
    "pairs' loss for KTO": (dict(kto=True, loss_type="sigmoid"), "use DPOConfig",
                            dict(loss_type="sigmoid")),
    "a method never called": (dict(cls=Own), "take compute_loss out", {}),
    "an unknown padding token": (dict(pad_token="<x>"), "leave it unset", {}),
    "routers of a dense model": (dict(router_aux_loss_coef=.1), "leave it out", {}),
    "code of the model": (dict(trust_remote_code=True), "never run", {}),
    "a step of one": (
        dict(kto=True, per_device_train_batch_size=1), "raise per_device_train_batch_size",
        dict(kto=True, per_device_train_batch_size=2)),
    "two adapters": (dict(model=with_adapter, peft_config=LORA), "leave peft_config out",
                     dict(model=with_adapter)),
    "margins nobody reads": (dict(data=HEAVY, loss_type="ipo_sum"), "take the column out",
                             dict(data=TEXT, loss_type="ipo_sum")),
    "best by logits": (dict(metric_for_best_model="eval_logits/chosen"), "eval_rewards/margins",
                       dict(metric_for_best_model="eval_rewards/margins")),
    "nothing to train": (dict(model=frozen), "pass peft_config",
                         dict(model=frozen, peft_config=LORA)),
    "experts in shared rows": (dict(model=experts, layout="shared"), "use layout='packed'",
                               dict(model=experts, layout="packed")),
    "a collator of another kind": (dict(data_collator=len), "leave it out", {}),
    "loading what is loaded": (dict(model_init_kwargs=dict(dtype="float32")), "by name",
                               dict(model_init_kwargs=dict(dtype="float32"), model="by name")),
    "a weight too many": (dict(loss_weights=[1., 2.]), "2 numbers for 1 losses",
                          dict(loss_weights=[1.])),
    "a second reference": (dict(ref_model="a name"), "load it with load_model",
                           dict(ref_model=tiny_model().float())),
    "an adapter on the head": (
        dict(peft_config=LoraConfig(target_modules=["q_proj", "lm_head"])),
        "leave it out of target_modules",
        dict(peft_config=LoraConfig(target_modules=["q_proj"]))),
    "virtual tokens": (
        dict(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "use LoRA", dict(peft_config=LORA)),
    "a likelihood of prompts": (dict(loss_type="orpo_full"), "use orpo,", dict(loss_type="orpo"))}


def put(kit, given):
    given = dict(given)
    if callable(given.get("model")): given["model"] = given["model"]()
    if given.get("model") == "by name": given["model"] = kit.name
    return given


@pytest.mark.parametrize("name", REMEDIES)
def test_a_refusal_says_what_helps(tmp_path, name):
    wrong, words, right = REMEDIES[name]
    with pytest.raises(Refusal, match=words): Kit(tmp_path).train(**put(Kit(tmp_path), wrong))
    Kit(tmp_path).train(**put(Kit(tmp_path), right))


def test_what_is_not_needed_is_said_once(tmp_path, caplog):
    given = dict(pad_to_multiple_of=8, use_liger_kernel=True, activation_offloading=True)
    with caplog.at_level(logging.WARNING, "dpo_literate.settings"):
        logging.getLogger("dpo_literate.settings").propagate = True
        DPOConfig(str(tmp_path), **QUIET | given)
    lines = [r.getMessage() for r in caplog.records if "is not needed here" in r.getMessage()]
    assert len(lines) == 3 and all(UNNEEDED[name][1] in " ".join(lines) for name in given)


def test_a_command_and_the_trainer_refuse_the_same_rows(tmp_path):
    from dpo_literate.audit import take_preferences
    for rows in (ENDS, TIES):
        with pytest.raises(Refusal) as there: take_preferences(rows)
        args = DPOConfig(str(tmp_path), **QUIET)
        with pytest.raises(Refusal) as here: prepare_rows(rows, tokenizer(), args)
        told = [str(no.value).split("; take")[0] for no in (here, there)]
        assert told[0] == told[1] and "×" in told[0]


def test_differences_on_purpose_have_reasons():
    for reasons in (ON_PURPOSE, THEIR_TESTS):
        assert len(reasons) > 10 and all(len(why) > 7 for why in reasons.values())
    assert all(re.fullmatch(r"test_[a-z_]+(\[[\w…-]+\])?", name) for name in THEIR_TESTS)
    assert not REFUSED.keys() & UNNEEDED.keys()


# ------------------------------------------------------------ the same weights as TRL's

KINDS = ("qwen2", "qwen3", "gpt2", "gemma2", "experts")   # beside llama, which all losses run on
ADAPTERS = {
    "lora": LORA, "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "rslora": LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True),
    "loha": LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": LoKrConfig(r=4, target_modules=["q_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[])}
WANTS = dict(exo_pair=dict(label_smoothing=.1), robust=dict(label_smoothing=.1),
             sppo_hard=dict(lr=1e-5))   # a square, 200 times as steep at the start as sigmoid
THEIRS = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
          "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
OURS_TOO = [n for n in THEIRS if n in all_losses()]


def thumbs():
    "The same conversations with one reply each, good or bad."
    for i, r in enumerate(chats()):
        yield dict(prompt=r["prompt"], completion=r["rejected" if i % 3 else "chosen"],
                   label=not i % 3)


def three_steps(package, path, model, lr=.1, peft_config=None, kto=False, **given):
    "A trainer in float32 that is about to take them, all rows at once."
    args = (package.KTOConfig if kto else package.DPOConfig)(str(path), **QUIET | dict(
        per_device_train_batch_size=8, num_train_epochs=3, optim="sgd", learning_rate=lr,
        max_grad_norm=0., lr_scheduler_type="constant", gradient_checkpointing=False) | given)
    data = Dataset.from_list(list(thumbs() if kto else chats()))
    t = (package.KTOTrainer if kto else package.DPOTrainer)(
        copy.deepcopy(model), args=args, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer(), peft_config=copy.deepcopy(peft_config))
    t.remove_callback(transformers.PrinterCallback)
    return t


def weights_after_three_steps(*asked, **given):
    "Trainable weights, by name: before, and after."
    t = three_steps(*asked, **given)
    start = {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    return start, {n: p.detach() for n, p in t.model.named_parameters() if p.requires_grad}


def agree(tmp_path, model, **given):
    trl = pytest.importorskip("trl")
    model.save_pretrained(tmp_path / "model")   # TRL loads its reference by the model's name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    start, here = weights_after_three_steps(ours, tmp_path / "ours", model, **given)
    _, there = weights_after_three_steps(trl, tmp_path / "theirs", model, **given)
    gaps = [(here[n] - there[n]).abs().max().item() for n in start]
    moved = max((here[n] - start[n]).abs().max().item() for n in start)
    assert here.keys() == there.keys() and max(gaps) <= 1e-4 and moved > 10 * max(gaps)


def test_all_losses_of_trl_are_here(): assert OURS_TOO == list(THEIRS)


@pytest.mark.parametrize("loss", OURS_TOO)
def test_a_loss_walks_the_same_way(tmp_path, loss):
    agree(tmp_path, tiny_model().float(), loss_type=[loss], **WANTS.get(loss, {}))


@pytest.mark.parametrize("given", [
    dict(loss_type="kto"), dict(loss_type="apo_zero_unpaired"),
    dict(loss_type="kto", desirable_weight=1.3, undesirable_weight=.7),
    dict(loss_type="apo_zero_unpaired", desirable_weight=1.3, undesirable_weight=.7)],
    ids=["kto", "apo zero", "kto, weighted", "apo zero, weighted"])
def test_a_loss_of_single_replies_walks_the_same_way(tmp_path, given):
    agree(tmp_path, tiny_model().float(), kto=True, **given)


def test_experts_count_in_an_evaluation(tmp_path):
    trl, found = pytest.importorskip("trl"), []
    experts().save_pretrained(tmp_path / "model")   # TRL loads its reference by the model's name
    for package in (ours, trl):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        t = three_steps(package, tmp_path / package.__name__, model, per_device_eval_batch_size=8)
        t.evaluate()
        found.append([t.state.log_history[-1][k] for k in ("eval_loss", "eval_aux_loss")])
    assert found[0] == pytest.approx(found[1], abs=1e-4) and found[0][0] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_walks_the_same_way(tmp_path, kind):
    agree(tmp_path, experts() if kind == "experts" else tiny_model(kind).float())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_walks_the_same_way(tmp_path, kind):
    agree(tmp_path, tiny_model().float(), lr=1., peft_config=ADAPTERS[kind])


@pytest.mark.parametrize("given", [
    dict(use_weighting=True), dict(ld_alpha=.5), dict(f_divergence_type="forward_kl"),
    dict(f_divergence_type="alpha_divergence"), dict(sync_ref_model=True, ref_model_sync_steps=2)],
    ids=["wpo", "ld", "forward KL", "alpha", "TR-DPO"])
def test_a_setting_walks_the_same_way(tmp_path, given):
    agree(tmp_path, tiny_model().float(), **given)
