"""A script written for TRL, run twice: once as it is, once with only its import changed. Losses agree step by step in float32."""
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dpo_literate.models import tiny_model
from dpo_literate.rows import tiny_tokenizer

SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = load_dataset("json", data_files={"train": DATA + "/train.jsonl", "test": DATA + "/test.jsonl"})

peft_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if LORA else None
training_args = DPOConfig(
    output_dir=OUT,
    beta=0.1,
    learning_rate=2e-3,
    lr_scheduler_type="constant",
    num_train_epochs=3,
    per_device_train_batch_size=8,
    eval_strategy="epoch",
    save_strategy="no",
    max_length=256,
    logging_steps=1,
    bf16=False,
    use_cpu=True,
    report_to="none",
    seed=0,
    disable_tqdm=True,
    gradient_checkpointing=CHECKPOINTING,
    precompute_ref_log_probs=PRECOMPUTE,
)
trainer = DPOTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    peft_config=peft_config,
)
trainer.train()
trainer.save_model(OUT)
"""
OURS = SCRIPT.replace("from trl import DPOConfig, DPOTrainer", "from dpo_literate.trainer import DPOConfig, DPOTrainer")
COLOURS = ("red", "blue", "green", "grey", "white", "black", "brown", "pink")


def chats(first):
    "Eight conversations, some of several turns, replies of different length."
    def say(role, text): return {"role": role, "content": text}
    for i, c in enumerate(COLOURS):
        turns = [say("user", f"hello {first}"), say("assistant", "yes?")] * (i % 3 == 0)
        yield dict(prompt=[*turns, say("user", f"the {c} cat {'sat ' * (i % 4)}")], chosen=[say("assistant", f"on the {c} mat {first}")], rejected=[say("assistant", f"no {'dog ' * (1 + i % 3)}")])


def put_tokenizer(folder, tail):
    "A chat template that ends a turn with its end token, or (as most do) with a line break after it."
    tokenizer = tiny_tokenizer()
    if not tail: tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(folder / "model")


@pytest.fixture
def given(tmp_path, monkeypatch):
    "A model folder and a folder of data, as a script would find them."
    transformers.logging.set_verbosity_error()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_model().float().save_pretrained(tmp_path / "model"); put_tokenizer(tmp_path, tail=False)
    (tmp_path / "data").mkdir()
    for split, first in (("train", 1), ("test", 2)): (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chats(first)))
    return tmp_path


def run(script, folder, name, **more):
    "Exec a script; its trainer."
    names = dict(MODEL=str(folder / "model"), DATA=str(folder / "data"), OUT=str(folder / name), LORA=False, CHECKPOINTING=False, PRECOMPUTE=False, __name__="__main__") | more
    transformers.set_seed(0)
    exec(compile(script, f"{name}.py", "exec"), names)
    return names["trainer"]


def column(trainer, key): return [h[key] for h in trainer.state.log_history if key in h]


def test_only_the_import_differs():
    theirs, ours = SCRIPT.splitlines(), OURS.splitlines()
    assert [(a, b) for a, b in zip(theirs, ours, strict=True) if a != b] == [("from trl import DPOConfig, DPOTrainer", "from dpo_literate.trainer import DPOConfig, DPOTrainer")]


@pytest.mark.parametrize("more", [{}, dict(LORA=True), dict(CHECKPOINTING=True), dict(PRECOMPUTE=True)], ids=["full", "lora", "checkpointing", "precompute"])
def test_a_script_for_trl_walks_the_same_way(given, more):
    trl = pytest.importorskip("trl")
    theirs, ours = run(SCRIPT, given, "theirs", **more), run(OURS, given, "ours", **more)
    assert type(theirs) is trl.DPOTrainer and type(ours).__module__ == "dpo_literate.trainer"
    assert ours.state.global_step == theirs.state.global_step == 3
    for key in ("loss", "eval_loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        a, b = column(ours, key), column(theirs, key)
        assert len(a) == len(b) == 3 and a == pytest.approx(b, abs=1e-4), key
    assert column(ours, "loss")[0] == pytest.approx(math.log(2), abs=1e-6) and column(ours, "loss")[-1] < .67
    file = "adapter_model.safetensors" if more.get("LORA") else "model.safetensors"
    a, b = (load_file(given / name / file) for name in ("ours", "theirs"))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_what_stands_after_the_end_token_is_the_one_difference(given):
    "TRL trains on the template's line break after the end token; here that is asked for by score_tail."
    pytest.importorskip("trl")
    put_tokenizer(given, tail=True)
    theirs, plain = run(SCRIPT, given, "theirs"), run(OURS, given, "plain")
    same = run(OURS.replace("beta=0.1,", "beta=0.1,\n    score_tail=True,"), given, "same")
    assert column(same, "loss") == pytest.approx(column(theirs, "loss"), abs=1e-4)
    assert column(same, "logps/chosen") == pytest.approx(column(theirs, "logps/chosen"), abs=1e-4)
    assert abs(column(plain, "logps/chosen")[0] - column(theirs, "logps/chosen")[0]) > 1


@pytest.mark.parametrize("precompute", [None, False], ids=["cached", "adapter off"])
def test_qlora_learns_on_a_frozen_base(tmp_path, precompute):
    "Four-bit base, adapter in float32; needs bitsandbytes, which has a CPU path. Both ways of keeping the reference give one walk."
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from dpo_literate.trainer import DPOConfig, DPOTrainer
    config = transformers.AutoConfig.for_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model"); tiny_tokenizer().save_pretrained(tmp_path / "model")
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    args = DPOConfig(str(tmp_path / "out"), use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=6, per_device_train_batch_size=8, learning_rate=5e-3,
                     lr_scheduler_type="constant", bf16=False, precompute_ref_log_probs=precompute)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    t = DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=list(chats(1)), processing_class=tiny_tokenizer(), quantization_config=nf4, peft_config=lora)
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.train()
    moved = {n for n, p in t.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n, p in t.model.named_parameters() if p.requires_grad} and all("lora" in n for n in moved)
    assert t.mode == ("cached" if precompute is None else "adapter") and t.step.layout.kind == "packed"
    assert column(t, "loss")[0] == pytest.approx(math.log(2), abs=1e-6) and column(t, "loss")[-1] < .65
