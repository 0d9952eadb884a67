"""The ring around a folder: whose it is, whether it is what was written, what a kill leaves."""
import ast
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_literate import checkpoints as ck
from dpo_literate import manifest as mf
from dpo_literate import models, results
from dpo_literate.cli import main
from dpo_literate.results import PART, Refusal, folder_beside, new_folder, sweep_parts
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.run_folder import RunFolder


def here(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(done, *said, code):
    assert done.code == code and done.err.count("\n") == 1, (done.code, done.err)
    assert all(s in done.err for s in said), done.err


def write_model(folder, seed=0):
    model = models.tiny_model(seed=seed).float()
    return models.write_folder(folder, model, tiny_tokenizer())


@pytest.fixture(scope="module")
def base(tmp_path_factory): return write_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "p.jsonl"
    rows = [dict(prompt=f"dish {k}", chosen="the answer is yes", rejected="the answer is no")
            for k in range(8)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file()}


def flip(path, byte=-3):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 64
    path.write_bytes(raw)


# ------------------------------------------------------------ a folder that is not ours

@pytest.fixture
def strangers(base, tmp_path):
    "A base model, as it was downloaded: no manifest, no run."
    folder = tmp_path / "somebody" / "base"
    shutil.copytree(base, folder)
    (folder / "manifest.json").unlink()
    return folder


WRITERS = {
    "train": ["train", "--model", "{base}", "--data", "{pairs}", "--max-steps", 1],
    "train on": ["train", "--model", "{base}", "--data", "{pairs}", "--max-steps", 1, "--resume"],
    "ppo": ["ppo", "--model", "{base}", "--prompts", "{pairs}"],
    "ppo on": ["ppo", "--model", "{base}", "--prompts", "{pairs}", "--resume"],
    "demo": ["demo", "--model", "{base}", "--data", "{pairs}"],
    "frontier": ["frontier"],
    "reward-train": ["reward-train", "--model", "{base}", "--data", "{pairs}"],
    "probe": ["probe", "--model", "{base}", "--reference", "{base}"],
    "attack": ["attack", "--model", "{base}"],
    "hierarchy-eval": ["hierarchy-eval", "--model", "{base}"]}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_command_writes_over_a_base_model(writer, base, pairs, strangers):
    before = everything(strangers.parent)
    words = [str(w).format(base=base, pairs=pairs) for w in WRITERS[writer]]
    for _ in range(2):                       # and the refusal leaves no mark for a second try
        refused(here(*words, "--out", strangers), "is not empty", code=2)
    assert everything(strangers.parent) == before


def test_merge_neither(base, strangers, tmp_path):
    from peft import LoraConfig, get_peft_model
    tuned = get_peft_model(models.load_model(base), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    before = everything(strangers)
    refused(here("merge", "--model", tmp_path / "adapter", "--out", strangers), "is not empty",
            code=2)
    assert everything(strangers) == before


def trainer(out, base, pairs, **settings):
    from dpo_literate.settings import DPOConfig
    from dpo_literate.trainer import DPOTrainer
    given = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=1,
                 per_device_train_batch_size=4)
    return DPOTrainer(str(base), args=DPOConfig(str(out), **given | settings),
                      train_dataset=str(pairs), eval_dataset=None)


def test_neither_does_the_trainer(base, pairs, strangers):
    before = everything(strangers)
    for resume in (None, True):
        with pytest.raises(Refusal, match="no run to go on with"):
            trainer(strangers, base, pairs).train(resume_from_checkpoint=resume)
    with pytest.raises(Refusal, match="save to another folder"):
        ck.export(models.load_model(base), strangers)
    left = everything(strangers)
    assert {k: v for k, v in left.items() if k in before} == before
    assert not any((strangers / name).exists() for name in ("log.jsonl", "run_card.json"))


@pytest.mark.parametrize("cached", [True, False])
def test_an_evaluation_alone_writes_nothing(cached, base, pairs, strangers, tmp_path):
    "Neither into a stranger's folder nor into a run's to be; a run then finds what it read."
    before = everything(strangers)
    for out in (strangers, tmp_path / "new"):
        t = trainer(out, base, pairs, precompute_ref_log_probs=cached)
        assert t.evaluate(t.rows)["eval_loss"] > 0
    assert everything(strangers) == before and not any((tmp_path / "new").iterdir())
    t.train()
    kept = list((tmp_path / "new" / "reference").glob("*.safetensors"))
    assert (tmp_path / "new" / "run_card.json").is_file() and len(kept) == cached


def test_any_folder_without_a_run_is_no_place_to_go_on(base, pairs, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("of three days")
    words = ["train", "--model", base, "--data", pairs, "--out", tmp_path / "notes", "--resume"]
    refused(here(*words), "no run to go on with", code=2)
    with pytest.raises(Refusal, match="no run to go on with"):
        trainer(tmp_path / "notes", base, pairs).train(resume_from_checkpoint=True)
    assert (tmp_path / "notes" / "thoughts.txt").read_text() == "of three days"


def test_a_run_knows_its_folder_whenever_it_was_killed(base, pairs, tmp_path):
    "Locked only; with the table of its reference; with a card, a log, checkpoints."
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.lock").write_text("process 1 on elsewhere")
    (out / f".run_card.json{PART}abcdefgh").write_text("{")
    new_folder(out, marks=mf.RUN_MARKS)
    (out / "reference").mkdir()
    (out / "reference" / ("ab" * 16 + ".safetensors")).write_text("x")
    new_folder(out, marks=mf.RUN_MARKS)      # killed before its card was written
    (out / "reference" / "books.txt").write_text("x")
    with pytest.raises(Refusal, match="no run"): new_folder(out, marks=mf.RUN_MARKS)
    for name in ("run_card.json", "log.jsonl", "checkpoint-3/manifest.json"):
        place = tmp_path / name.replace("/", "-")
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text("x")
        (place / "model.safetensors").write_text("x")
        assert new_folder(place, marks=mf.RUN_MARKS) == place
        mf.leave_strangers(place, "")
    plain = tmp_path / "plain" / "checkpoint-5"    # of another trainer
    plain.mkdir(parents=True)
    with pytest.raises(Refusal, match="no run"): new_folder(plain.parent, marks=mf.RUN_MARKS)


def test_train_goes_on_and_says_what_may_change(base, pairs, tmp_path):
    words = ["train", "--model", base, "--data", pairs, "--out", tmp_path / "run",
             "--max-steps", 2, "--save-steps", 1]
    assert here(*words).code == 0
    refused(here(*words, "--resume", "--beta", .3), "beta was 0.1 and is 0.3", code=6)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    done = here(*words, "--resume", "--beta", .3, "--allow-change", "beta", "objective", "losses")
    assert done.code == 0, done.err
    changed = ck.verify(ck.latest(tmp_path / "run"))["changes"]
    assert {c["what"] for c in changed} == {"beta", "objective", "losses"}
    refused(here(*words, "--resume", "--allow-change", "bata"), "allow_change='bata'", code=2)


# ------------------------------------------------------------ is it what was written?

def test_a_model_written_here_has_its_manifest(base):
    found = mf.verify_model(base)["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
    assert models.load_model(base, verify=True).dtype == torch.float32


@pytest.mark.parametrize("harm,said", [
    (lambda f: flip(f / "model.safetensors"), "model.safetensors is not what was written"),
    (lambda f: flip(f / "config.json", 3), "config.json is not what was written"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "0 bytes"),
    (lambda f: flip(f / "manifest.json", 9), "manifest.json is not what was written"),
    (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing")])
def test_verify_names_the_file_in_every_command(harm, said, base, pairs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    harm(folder)
    out = ["--out", tmp_path / "out", "--verify"]
    for words in (["train", "--data", pairs], ["reward-train", "--data", pairs],
                  ["ppo", "--prompts", pairs], ["probe", "--reference", base], ["attack"],
                  ["hierarchy-eval"], ["generate", "--prompt", "Hello"]):
        refused(here(*words, "--model", folder, *out), said, code=5)
    refused(here("probe", "--model", base, "--reference", folder, *out), said, code=5)
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_seen_on_request_only(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    flip(tmp_path / "m" / "model.safetensors")
    models.load_model(tmp_path / "m")             # nobody asked
    with pytest.raises(Refusal, match="SHA-256 differs") as no:
        models.load_model(tmp_path / "m", verify=True)
    assert no.value.code == 5


def test_the_card_knows_the_weights(base, pairs, tmp_path):
    out = tmp_path / "run"
    words = ["train", "--model", base, "--data", pairs, "--out", out, "--max-steps", 1]
    assert here(*words).code == 0
    card = json.loads((out / "run_card.json").read_text())
    assert list(card["weights"]) == ["model.safetensors"] and card["command"]["model"]
    assert here("generate", "--model", out, "--prompt", "Hello", "--verify").code == 0
    flip(out / "model.safetensors")
    refused(here("generate", "--model", out, "--prompt", "Hello"),
            "model.safetensors is not what was written", code=5)
    write_model(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "model.safetensors", out)
    refused(here("generate", "--model", out, "--prompt", "Hello"), "model.safetensors", code=5)


def test_saved_twice_the_card_describes_the_second(base, pairs, tmp_path):
    t = trainer(tmp_path / "run", base, pairs, save_strategy="no")
    t.train()
    for step in range(2):
        t.save_model(str(tmp_path / "run"))
        assert mf.known_weights(tmp_path / "run")
        models.load_model(tmp_path / "run", verify=True)
        with torch.no_grad(): next(t.model.parameters()).add_(1.)


def test_an_exchange_that_is_killed_leaves_no_claim(base, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run_card.json").write_text("{}")
    model = models.load_model(base)
    ck.export(model, out)
    assert mf.known_weights(out) and (out / "manifest.json").exists()
    monkeypatch.setattr(ck.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(mf, "write_atomic", lambda p, c: Path(p).write_text(c))
    with pytest.raises(KeyboardInterrupt): ck.export(model, out)
    assert mf.known_weights(out) == {} and not (out / "manifest.json").exists()


def test_an_adapter_and_its_base_are_both_verified(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    own = tmp_path / "base"
    shutil.copytree(base, own)
    tuned = get_peft_model(models.load_model(own), LoraConfig(r=2, target_modules=["q_proj"]))
    ck.export(tuned, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("a card of our own")
    models.load_model(tmp_path / "adapter", verify=True)
    flip(own / "model.safetensors")
    with pytest.raises(Refusal, match="base: model.safetensors"):
        models.load_model(tmp_path / "adapter", verify=True)


# ------------------------------------------------------------ names that come from data

def test_an_index_may_not_lead_out_of_its_folder(base, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    for name in ("../other.safetensors", "/etc/passwd", "a/../../b"):
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict(
            x=name))))
        with pytest.raises(Refusal, match="lies outside the folder"): models.load_model(folder)


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a/b", "a\\b", "..", "C:x"])
def test_a_template_that_would_be_saved_elsewhere_is_refused_when_loaded(name, base, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    both = [dict(name=n, template="{{ messages }}") for n in ("default", name)]
    path.write_text(json.dumps(config | dict(chat_template=both)))
    with pytest.raises(Refusal, match="outside its folder"): models.load_tokenizer(folder)


def test_several_templates_with_plain_names_are_fine(base, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    both = [dict(name=n, template="{{ messages }}") for n in ("default", "tool_use")]
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(chat_template=both)))
    assert set(models.load_tokenizer(folder).chat_template) == {"default", "tool_use"}


# ------------------------------------------------------------ nothing that is read runs

RUNS = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "torch.save",
         "yaml.load", "runpy.run_path"}


def dotted(node):
    if isinstance(node, ast.Attribute): return f"{dotted(node.value)}.{node.attr}"
    return getattr(node, "id", "")


def test_no_module_of_the_package_runs_what_it_reads():
    "Ruff's S rules look at the pages; this looks at every call of the package, `torch.load` too."
    found, started = [], []
    paths = sorted(Path(results.__file__).parent.rglob("*.py"))
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): found += [a.name for a in node.names if a.name in RUNS]
            if isinstance(node, ast.ImportFrom) and node.module in RUNS: found.append(node.module)
            if not isinstance(node, ast.Call): continue
            name, named = dotted(node.func), {k.arg for k in node.keywords}
            if name == "yaml.load" and dotted(node.args[1]).endswith("Loader"): continue
            if name in CALLS or {"allow_pickle", "shell"} & named: found.append((path.name, name))
            remote = [k for k in node.keywords if k.arg == "trust_remote_code" and name != "dict"]
            if any(getattr(k.value, "value", None) is not False for k in remote):
                found.append((path.name, "trust_remote_code"))
            if name.startswith("subprocess."): started.append(path.name)
    assert len(paths) > 40 and not found and started == ["results.py"]   # git, for a record


# ------------------------------------------------------------ what a kill leaves

KILLED = """
import os, signal, sys, time
from pathlib import Path
from dpo_literate.results import folder_beside
with folder_beside(Path(sys.argv[1])) as beside:
    (beside / "half").write_text("0")
    print(beside, flush=True)
    time.sleep(60)
"""


def test_a_live_writer_keeps_its_folder_and_a_dead_ones_is_swept(tmp_path):
    "A process that is filling a folder is left alone; killed, its leftovers go at the next write."
    env = {**os.environ, "PYTHONPATH": str(Path(results.__file__).parents[1])}
    live = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "model"], env=env,
                            stdout=subprocess.PIPE, text=True)
    try:
        beside = Path(live.stdout.readline().strip())
        os.utime(beside, (0, 0))
        assert sweep_parts(tmp_path, "model") == [] and (beside / "half").exists()
        live.kill(); live.wait()
        (tmp_path / f".other{PART}abcdefgh").mkdir()
        os.utime(tmp_path / f".other{PART}abcdefgh", (0, 0))
        write_model(tmp_path / "model")
        left = {p.name for p in tmp_path.iterdir()}
        assert left == {"model", f".other{PART}abcdefgh"}   # another folder's business
    finally:
        live.kill(); live.wait()


def test_a_run_sweeps_what_its_killed_self_left(tmp_path):
    out, old = tmp_path / "run", time.time() - 9
    for name in ("reference", f".checkpoint-3{PART}aaaaaaaa", ".checkpoint-2.bbbbbbbb",
                 f".model{PART}cccccccc"):
        (out / name).mkdir(parents=True)
        os.utime(out / name, (old, old))
    for name in (f".run_card.json{PART}dddddddd", f"reference/.ab.safetensors{PART}eeeeeeee",
                 f".state.safetensors{PART}ffffffff"):
        (out / name).write_text("half")
    mine = [".bashrc.settings", ".gitignore", "notes.part-3", f"x{PART}gggggggg"]
    for name in mine: (out / name).write_text("somebody's")
    with RunFolder(out).live(): pass
    left = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert left == {"reference", ".run.lock", *mine}


def test_a_link_is_never_followed_by_the_broom(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work").write_text("of years")
    (tmp_path / f".model{PART}aaaaaaaa").symlink_to(tmp_path / "precious")
    assert sweep_parts(tmp_path) == [] and (tmp_path / "precious" / "work").exists()


def test_a_name_with_brackets_is_taken_literally(tmp_path):
    for name in ("a[b]", "a*"):
        (tmp_path / f".{name}{PART}aaaaaaaa").mkdir()
        os.utime(tmp_path / f".{name}{PART}aaaaaaaa", (0, 0))
    with folder_beside(tmp_path / "a[b]") as beside: (beside / "x").write_text("1")
    assert {p.name for p in tmp_path.iterdir()} == {"a[b]", f".a*{PART}aaaaaaaa"}
