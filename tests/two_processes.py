"What each process of tests/test_distributed.py does: two_processes.py FOLDER ddp|fsdp2, started twice by torchrun."
import json
import math
import os
import sys
from pathlib import Path

import accelerate
import torch
import transformers
from test_trainer import PAIRS, TOKENIZER, config, exact, lora, ranked

import dpo_literate.run_folder as module
from dpo_literate.results import Refusal
from dpo_literate.objective import is_filler
from dpo_literate.step import PreferenceStep
from dpo_literate.trainer import DPOTrainer

MODE = sys.argv[2] if len(sys.argv) > 2 and __name__ == "__main__" else "one"
if MODE == "fsdp2":   # accelerate takes FSDP for GPUs only; the sharding itself runs on gloo
    begin = accelerate.state.AcceleratorState.__init__
    def on_cpu(self, *args, fsdp_plugin=None, **more):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None: self.distributed_type, self.fsdp_plugin = accelerate.utils.DistributedType.FSDP, fsdp_plugin
    accelerate.state.AcceleratorState.__init__ = on_cpu
    def arrived(v):
        if hasattr(v, "full_tensor"): v = v.full_tensor()
        return v.wait() if hasattr(v, "wait") else v
    whole = accelerate.Accelerator.get_state_dict   # a copy to the CPU waits for what is still on its way; from the CPU there is no copy
    accelerate.Accelerator.get_state_dict = lambda self, *args, **more: {k: arrived(v) for k, v in whole(self, *args, **more).items()}


def pairs(n): return [dict(PAIRS[i % 7], id=str(i), rejected=f"no {'sat ' * (i % 5)}{i}", weight=1. + i % 2) for i in range(n)]
def replies(n): return [dict(prompt=f"the cat {'sat ' * (i % 3)}", completion=f"no {'sat ' * (i % 5)}{i}", label=i % 3 > 0, id=str(i)) for i in range(n)]
def plain(data): return [{k: v for k, v in p.items() if k != "weight"} for p in data]


CASES = dict(   # rows, pairs of a process, accumulation, settings
    odd=(7, 2, 1, {}), one_row=(1, 2, 1, {}), tight=(9, 1, 3, dict(capacity=42)), padded=(9, 2, 2, dict(layout="padded")), ranked=(7, 2, 1, dict(loss_type="ranked")),
    checkpointing=(7, 2, 1, dict(gradient_checkpointing=True)),
    kto=(11, 1, 2, dict(loss_type="kto")), bco=(9, 2, 1, dict(loss_type="bco")), aot_unpaired=(9, 2, 1, dict(loss_type="aot_unpaired")), beta_dpo=(7, 2, 1, dict(loss_type="beta_dpo")))
REPLIES = ("kto", "bco", "aot_unpaired")   # cases of labelled replies
COPIES = dict(adapter=(7, 2, 1, dict(precompute_ref_log_probs=False)), frozen=(7, 2, 1, dict(precompute_ref_log_probs=False)), moving=(7, 2, 1, dict(sync_ref_model=True, ref_model_sync_steps=2)))   # not for a model in shards


def run(folder, name, case, world):
    "One training: its weights, log, evaluation, and the rows this process read."
    n, micro, accumulation, settings = case
    seen, writes, real, write = [], [], PreferenceStep.loss, module.write_atomic
    PreferenceStep.loss = lambda self, model, piece: (seen.extend(r.id for r in piece.rows if not is_filler(r)), real(self, model, piece))[1]
    module.write_atomic = lambda path, text: (writes.append(str(path)), write(path, text))[1]
    torch.manual_seed(0)
    model = lora(exact("llama")) if name == "adapter" else exact("llama")
    data = replies(n) if name in REPLIES else plain(pairs(n)) if name in ("ranked", "beta_dpo") else pairs(n)
    try:
        t = DPOTrainer(model, args=config(folder / name, per_device_train_batch_size=micro * 2 // world, gradient_accumulation_steps=accumulation, num_train_epochs=2, per_device_eval_batch_size=4 if world > 1 else 1, **settings),
                       train_dataset=data, eval_dataset=dict(same=data, three=data[:3], one=data[:1]), processing_class=TOKENIZER)
        t.remove_callback(transformers.PrinterCallback)
        t.train()
        seen_ = list(seen)
        metrics = {k: v for k, v in t.evaluate().items() if "loss" in k or "/" in k}
        if name == "odd": t.save_model(str(folder / name / "model"))
    finally: PreferenceStep.loss, module.write_atomic = real, write
    weights = whole_weights(t)
    log = [{k: v for k, v in h.items() if k not in ("tokens_per_second",)} for h in t.state.log_history if "loss" in h]
    return dict(weights=weights, log=log, metrics=metrics, rows=seen_, writes=writes, layout=t.step.layout.kind, world=t.args.world_size, running=t.step.objective.state_dict(), kind=type(t.model_wrapped).__name__)


def poisoned(folder):
    "One row of one process is not a number: every process must stop, none may wait."
    t = DPOTrainer(exact("llama"), args=config(folder / "nan", per_device_train_batch_size=2), train_dataset=pairs(8), processing_class=TOKENIZER)
    if not t.sharded:
        t.begin_run()
        t.step.reference.table[t.rows[t.order.__iter__().__next__()].key] = (math.nan, 0.); t.step.start_tolerance = None
    else: return "not here"
    try: t.train()
    except Refusal as why: return f"{why.code} {why}"
    return "went on"


def told(folder):
    "What `compute_metrics` is shown of five rows, two at a time: numbers that know their order."
    def seen(given):
        order = range(1, 1 + len(given.label_ids))
        return dict(ids=float(sum(k * row.sum() for k, row in zip(order, given.label_ids))),
                    logits=float(given.predictions.mean()), rows=len(order))
    t = DPOTrainer(exact("llama"), args=config(folder / "told", per_device_eval_batch_size=2, max_steps=1, learning_rate=0.),
                   train_dataset=plain(pairs(4)), eval_dataset=plain(pairs(5)), processing_class=TOKENIZER, compute_metrics=seen)
    t.remove_callback(transformers.PrinterCallback)
    t.train()
    try: found = t.evaluate()
    except Refusal as no: return str(no)
    return {name: found[f"eval_{name}"] for name in ("ids", "logits", "rows")}


def whole_weights(t): return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in t.accelerator.unwrap_model(t.model).named_parameters()}


def resumed(folder, make):
    "Four steps in one go; and two of them, then two more by another trainer, from the checkpoint."
    def trainer(name, more=()):
        torch.manual_seed(0)
        t = DPOTrainer(make(), args=config(folder / name, per_device_train_batch_size=2, num_train_epochs=4, save_strategy="steps", save_steps=2, lr_scheduler_type="linear"),
                       train_dataset=pairs(4), processing_class=TOKENIZER, callbacks=list(more))
        t.remove_callback(transformers.PrinterCallback)
        return t
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_): control.should_training_stop = state.global_step == 2
    once, half, rest = trainer("once"), trainer("twice", [Stop()]), trainer("twice")
    once.train(); half.train(); rest.train(resume_from_checkpoint=True)
    return dict(once=whole_weights(once), half=whole_weights(half), twice=whole_weights(rest), steps=[half.state.global_step, rest.state.global_step])


def main():
    transformers.logging.set_verbosity_error()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name, case in (CASES | (COPIES if MODE == "ddp" else {})).items():
        if name == "ranked":
            with ranked(): found = run(folder, name, case, 2)
        else: found = run(folder, name, case, 2)
        torch.save(found, folder / f"{name}.{rank}.pt")
    for name, make in dict(full=lambda: exact("llama"), tuned=lambda: lora(exact("llama"))).items():
        torch.save(resumed(folder / name, make), folder / f"{name}.{rank}.pt")
    (folder / f"told.{rank}.json").write_text(json.dumps(told(folder)))
    (folder / f"nan.{rank}.json").write_text(json.dumps(poisoned(folder)))
    torch.distributed.destroy_process_group()
    os._exit(0)     # everything is on disk; a thread of gloo may still abort the interpreter's way out


if __name__ == "__main__": main()
