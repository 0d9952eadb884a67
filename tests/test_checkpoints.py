"Checkpoints: kills, damage, full disks, signals, locks, refusals, and continuation to the bit."
import contextlib, json, logging, multiprocessing, os, random, shutil, signal, socket, subprocess, tempfile, time
from pathlib import Path

import numpy as np
import pytest, torch, transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dpo_literate import checkpoints as ck
from dpo_literate import run_folder as rf
from dpo_literate.models import tiny_model, weights_hash
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.port import TransformersPort, identity

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
TOKENIZER = tiny_tokenizer()
TEXTS = [TOKENIZER(f"the cat {'sat ' * (i % 3)}on mat {i}")["input_ids"] for i in range(11)]
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pytest", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "safetensors.torch"])


class Seen:
    "A part of a run that remembers something: the step at which it was saved."
    def __init__(self, trainer): self.trainer, self.step = trainer, None
    def state_dict(self): return {"step": torch.tensor(self.trainer.state.global_step)}
    def load_state_dict(self, state): self.step = state["step"].item()


class SafeTrainer(TransformersPort, Trainer):
    "The port alone, in front of a plain `Trainer`: next-token loss on a handful of texts."
    facts = {"data": "a", "beta": .1, "loss": "sigmoid", "reference": "r1"}
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts["seen"] = Seen(self)
    def run_identity(self): return dict(self.facts)


def collate(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=-100)
    return dict(input_ids=ids.clamp(min=0), labels=ids, attention_mask=(ids >= 0).long())


def dropping(lora=False, p=.2):
    model = tiny_model()
    for layer in model.model.layers: layer.self_attn.attention_dropout = p
    if not lora: return model
    from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, lora_dropout=.2, target_modules=["q_proj", "v_proj"]))


def make(out, lora=False, kind=SafeTrainer, model=None, tokenizer=TOKENIZER, evals=None, callbacks=None, **settings):
    given = dict(use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=2, num_train_epochs=3, per_device_train_batch_size=2,
                 gradient_accumulation_steps=2, learning_rate=1e-3, warmup_steps=2, save_steps=1)
    trainer = kind(dropping(lora) if model is None else model, TrainingArguments(str(out), **given | settings), train_dataset=TEXTS, eval_dataset=evals,
                   data_collator=collate, processing_class=tokenizer, callbacks=callbacks)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def lines(trainer): return [{k: v for k, v in h.items() if "runtime" not in k and "per_second" not in k} for h in trainer.state.log_history if "train_runtime" not in h]


def moments(trainer): return {(i, k): v for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()}


def assert_same(one, other):
    "Weights, optimizer, scheduler and every log line."
    a, b = one.model.state_dict(), other.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = moments(one), moments(other)
    assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert one.lr_scheduler.state_dict() == other.lr_scheduler.state_dict()
    assert lines(one) == lines(other)
    assert one.state.global_step == other.state.global_step == one.state.max_steps


def only(source, step, target):
    "A run that died right after this step: its folder, with nothing later."
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return target


def refusal(action, *args, **kwargs):
    with pytest.raises(Refusal) as no: action(*args, **kwargs)
    return no.value


def child(action, *args):
    process = FORK.Process(target=action, args=args)
    process.start()
    return process


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(.002)


@pytest.fixture
def tmp_path():
    "In memory where that is possible: these tests save some two thousand times, and a real fsync takes ten milliseconds a file."
    place = tempfile.mkdtemp(prefix="ckpt-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield Path(place)
    shutil.rmtree(place, ignore_errors=True)


# ------------------------------------------------------------ T44: continuation to the bit

SETTINGS = {
    "plain": {}, "lora": dict(lora=True),
    "accumulate 4": dict(gradient_accumulation_steps=4, learning_rate=1e-2), "lora accumulate 4": dict(lora=True, gradient_accumulation_steps=4),
    "evaluated each step": dict(evals=TEXTS[:3], eval_strategy="steps", eval_steps=1), "evaluated each epoch": dict(evals=TEXTS[:3], eval_strategy="epoch"),
    "lora evaluated": dict(lora=True, evals=TEXTS[:3], eval_strategy="epoch"),
    "cosine": dict(lr_scheduler_type="cosine", max_steps=5, num_train_epochs=99), "rmsprop": dict(optim="rmsprop"), "adafactor": dict(optim="adafactor"),
    "fused": dict(optim="adamw_torch_fused"), "workers": dict(dataloader_num_workers=2),
}
STEPS = {"accumulate 4": (1, 2, 3, 5), "lora accumulate 4": (1, 2, 3, 5), "cosine": (1, 3, 4, 5), "rmsprop": (2, 4), "adafactor": (2, 4), "fused": (2, 4), "workers": (2, 3)}


@pytest.mark.parametrize("name", SETTINGS)
def test_continued_to_the_bit(name, tmp_path):
    never_saved = make(tmp_path / "none", **SETTINGS[name] | dict(save_strategy="no"))
    never_saved.train()
    straight = make(tmp_path / "straight", **SETTINGS[name])
    straight.train()
    assert_same(straight, never_saved)
    for step in STEPS.get(name, (1, 3, 4, 5, 8)):
        resumed = make(only(tmp_path / "straight", step, tmp_path / f"at{step}"), **SETTINGS[name])
        resumed.train(resume_from_checkpoint=True)
        assert resumed.parts["seen"].step == step
        assert_same(straight, resumed)


def test_resume_points_are_enough():
    assert sum(len(STEPS.get(name, (1, 3, 4, 5, 8))) for name in SETTINGS) >= 40


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_twice_and_from_another_folder(lora, tmp_path):
    straight = make(tmp_path / "straight", lora)
    straight.train()
    for first, then in ((2, 6), (3, 4)):
        out = only(tmp_path / "straight", first, tmp_path / f"{first}")
        make(out, lora).train(resume_from_checkpoint=True)
        again = make(only(out, then, tmp_path / f"{first}-{then}"), lora)
        again.train(resume_from_checkpoint=str(tmp_path / f"{first}-{then}/checkpoint-{then}"))
        assert_same(straight, again)
    elsewhere = make(tmp_path / "elsewhere", lora)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-5"))
    assert_same(straight, elsewhere)


def test_bfloat16_weights_and_float32_moments(tmp_path):
    kwargs = dict(optim="adafactor", learning_rate=1e-2)
    straight = make(tmp_path / "straight", model=dropping().bfloat16(), **kwargs)
    straight.train()
    assert any(torch.is_tensor(v) and v.dtype == torch.float32 and v.dim() for v in moments(straight).values())
    resumed = make(only(tmp_path / "straight", 4, tmp_path / "b"), model=dropping().bfloat16(), **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert_same(straight, resumed)


def test_best_is_loaded_and_kept(tmp_path):
    settings = dict(evals=TEXTS[:3], eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, save_total_limit=2)
    straight = make(tmp_path / "a", **settings)  # "best" is the worst, so that it lies early
    straight.train()
    best = straight.state.best_global_step
    assert [s for s, _ in ck.checkpoints(tmp_path / "a")] == sorted({best, 9}) and best < 9
    again = dropping()
    ck.load_weights(again, tmp_path / f"a/checkpoint-{best}")
    assert weights_hash(again) == weights_hash(straight.model)


def test_finished_run_takes_no_further_step(tmp_path):
    done = make(tmp_path, max_steps=5)
    done.train()
    again = make(tmp_path, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5 and weights_hash(again.model) == weights_hash(done.model)


# ------------------------------------------------------------ state without a pickle

@pytest.mark.parametrize("kind,settings", [
    (torch.optim.AdamW, {}), (torch.optim.AdamW, dict(fused=True)), (torch.optim.AdamW, dict(amsgrad=True, foreach=True)), (torch.optim.RMSprop, dict(momentum=.9, centered=True)),
    (torch.optim.SGD, dict(momentum=.9, nesterov=True)), (torch.optim.Adagrad, {}), (torch.optim.NAdam, {}), (transformers.Adafactor, dict(lr=1e-2, relative_step=False, scale_parameter=False))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_round_trip(kind, settings, dtype, tmp_path):
    def fresh():
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(5, 3).to(dtype)), nn.Parameter(torch.randn(3).to(dtype)), nn.Parameter(torch.randn(2, 2).to(dtype))]
        return ps, kind([dict(params=ps[:1], weight_decay=.1), dict(params=ps[1:])], **dict(lr=1e-2) | settings)
    def steps(ps, optimizer, n):
        for i in range(n):
            for p in ps[:2]: p.grad = (p.detach().float().sin() + i).to(dtype)  # the third never gets one
            optimizer.step()
    ps, one = fresh()
    steps(ps, one, 3)
    ck.save_state(tmp_path, "optimizer", one.state_dict())
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    saved = ck.load_state(tmp_path, "optimizer")
    qs, two = fresh()
    with torch.no_grad():
        for p, q in zip(ps, qs): q.copy_(p)
    ck.load_optimizer(two, saved)
    a, b = one.state_dict(), two.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for i, s in a["state"].items():
        for k, v in s.items(): assert type(v) is type(b["state"][i][k]) and (torch.equal(v, b["state"][i][k]) and v.dtype == b["state"][i][k].dtype if torch.is_tensor(v) else v == b["state"][i][k])
    steps(ps, one, 2), steps(qs, two, 2)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs))


def test_other_optimizer_is_refused(tmp_path):
    p = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    one = torch.optim.AdamW(p)
    assert refusal(ck.load_optimizer, torch.optim.AdamW(p[:1]), one.state_dict()).code == 6


def test_state_round_trip_of_odd_values(tmp_path):
    state = {"a": {1: (1, 2.5, None, True), "": []}, "inf": [float("inf"), float("-inf")], "tiny": 5e-324, "big": 10 ** 30, "text": "é\u2028\"\x00", "np": np.float64(.1),
             "empty": torch.zeros(0, 3), "bits": torch.tensor([1, 2], dtype=torch.uint8), "scalar": torch.tensor(3.), "cut": torch.arange(6.).view(2, 3).T}
    ck.save_state(tmp_path, "x", state)
    back = ck.load_state(tmp_path, "x")
    for k in ("empty", "bits", "scalar", "cut"):
        a, b = state.pop(k), back.pop(k)
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert back == state and type(back["a"][1]) is tuple
    assert "NaN" not in (tmp_path / "x.json").read_text() and "Infinity" not in (tmp_path / "x.json").read_text()
    assert "a/b is a set" in str(refusal(ck.pack, {"a": {"b": {1}}}, {}))


def test_rng_round_trip():
    state = ck.unpack(json.loads(json.dumps(ck.pack(ck.rng_state(), tensors := {}))), tensors)
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(2).tolist())
    first = draw()
    ck.set_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma2"])
def test_weights_are_strict_and_readable(kind, tmp_path):
    model = tiny_model(kind)
    ck.save_weights(model, tmp_path)
    assert weights_hash(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)) == weights_hash(model)
    raw = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in list(raw.items())[1:]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refusal(ck.load_weights, tiny_model(kind), tmp_path).code == 6


def test_every_adapter_comes_back(tmp_path):
    from peft import LoraConfig
    def two(seed):
        model = dropping(lora=True)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
        torch.manual_seed(seed)
        for n, p in model.named_parameters():
            if "lora_" in n: nn.init.normal_(p)
        return model
    one, other = two(1), two(2)
    assert weights_hash(one) != weights_hash(other)
    ck.save_weights(one, tmp_path)
    ck.load_weights(other, tmp_path)
    assert weights_hash(one) == weights_hash(other)
    assert refusal(ck.load_weights, transformers_lora(r=8), tmp_path).code == 6


def transformers_lora(r):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(tiny_model(), LoraConfig(r=r, target_modules=["q_proj", "v_proj"]))


# ------------------------------------------------------------ T41: killed at any moment

def numbers(step): return {f"t{i}": torch.full((40_000,), step + i, dtype=torch.float32) for i in range(2)}


def write_forever(out, in_place):
    "Go on from the newest step; save, acknowledge, rotate, until killed (or 500 saves: a writer whose test has died must end)."
    out = Path(out)
    ck.sweep(out)
    last = max((s for s, _ in ck.checkpoints(out)), default=0)
    for step in range(last + 1, last + 500):
        fill = lambda folder: [save_file({k: t}, folder / f"{k}.safetensors") for k, t in numbers(step).items()]
        if in_place:
            (out / f"checkpoint-{step}").mkdir()
            fill(out / f"checkpoint-{step}")
        else: ck.write_folder_atomic(out / f"checkpoint-{step}", fill, step=step)
        rf.append_line(out / "log.jsonl", {"saved": step})
        if not in_place: ck.rotate(out, 2)


def acknowledged(out):
    path = Path(out) / "log.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line).get("saved", 0) for line in whole if line.endswith("}")), default=0)


def usable(folder, step):
    try: return all(torch.equal(load_file(folder / f"{k}.safetensors")[k], t) for k, t in numbers(step).items())
    except Exception: return False


def kill_writers(out, kills, in_place=False, seed=0):
    "(unusable, acknowledged lost, died in mid-save) over so many SIGKILLs at random moments."
    rng, unusable, lost, middle = random.Random(seed), 0, 0, 0
    for _ in range(kills):
        before = acknowledged(out)
        pid = os.fork()
        if not pid:
            try: write_forever(str(out), in_place)
            finally: os._exit(1)
        wait_for(lambda: acknowledged(out) > before)
        time.sleep(rng.uniform(0, .03))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        middle += bool(list(out.glob(".checkpoint-*")))
        newest = ck.latest(out) if not in_place else ck.checkpoints(out)[-1][1]
        step = int(newest.name.split("-")[1]) if newest else 0
        unusable += not newest or not usable(newest, step)
        lost += step < acknowledged(out)
        if in_place: shutil.rmtree(newest)
    return unusable, lost, middle


def test_100_kills_of_a_writer(tmp_path, capsys):
    unusable, lost, middle = kill_writers(tmp_path, 100)
    with capsys.disabled(): print(f"\n100 SIGKILLs of a writer, {middle} with a save or a deletion half done: {unusable} unusable, {lost} acknowledged lost")
    assert (unusable, lost) == (0, 0) and middle > 10
    ck.sweep(tmp_path)
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_the_kill_test_can_fail(tmp_path):
    assert kill_writers(tmp_path, 12, in_place=True)[0] > 0


@pytest.mark.slow
def test_1000_kills_of_a_writer(tmp_path, capsys):
    unusable, lost, middle = kill_writers(tmp_path, 1000, seed=1)
    with capsys.disabled(): print(f"\n1000 SIGKILLs of a writer, {middle} with a save or a deletion half done: {unusable} unusable, {lost} acknowledged lost")
    assert (unusable, lost) == (0, 0) and middle > 100


class Slow(TrainerCallback):
    def __init__(self, seconds): self.seconds = seconds
    def on_step_begin(self, *_, **__): time.sleep(self.seconds)


def train_on(out, settings, pause=0., resume=True):
    "A training process: go on if there is something to go on from."
    logging.disable(logging.WARNING)
    trainer = make(out, callbacks=[Slow(pause)] if pause else None, **settings)
    trainer.train(resume_from_checkpoint=resume)


def test_killed_training_ends_where_the_straight_run_ends(tmp_path, capsys):
    settings = dict(num_train_epochs=12, save_total_limit=3, logging_steps=3)
    straight = make(tmp_path / "straight", **settings)
    straight.train()
    out, rng, acks, kills = tmp_path / "killed", random.Random(0), [], 0
    while kills < 5:
        before = acknowledged(out)
        process = child(train_on, str(out), settings)
        wait_for(lambda: acknowledged(out) > before or not process.is_alive())
        time.sleep(rng.uniform(0, .1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        acks.append(acknowledged(out))
        assert int(ck.latest(out).name.split("-")[1]) >= acks[-1]
        assert acks[-1] < 36, "the run was over before it could be killed: make it longer"
    final = make(out, **settings)
    final.train(resume_from_checkpoint=True)
    assert_same(straight, final)
    assert not list(out.glob(".checkpoint-*")) and (out / ".run.lock").read_text() == ""
    with capsys.disabled(): print(f"\n5 SIGKILLs of a training run, after steps {acks}: the same weights, optimizer and log as the straight run")


# ------------------------------------------------------------ T42: damage

@pytest.fixture(scope="module")
def run():
    "A finished run with a checkpoint at every step, full and LoRA; copy before touching."
    root = Path(tempfile.mkdtemp(prefix="ckpt-run-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    trainers = {name: make(root / name, lora=name == "lora") for name in ("full", "lora")}
    for t in trainers.values(): t.train()
    yield root, trainers
    shutil.rmtree(root)


def flip(path, byte, bit):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def swap(path, other):
    "The file of another step; where both hold the same bytes there is nothing to find."
    if path.read_bytes() == (other / path.name).read_bytes(): return "same"
    shutil.copy(other / path.name, path)


def as_folder(path, _): path.unlink(); path.mkdir()
def as_link(path, other): path.unlink(); path.symlink_to(other / path.name)
def as_pipe(path, _): path.unlink(); os.mkfifo(path)


FAULTS = {"deleted": lambda p, _: p.unlink(), "emptied": lambda p, _: os.truncate(p, 0), "halved": lambda p, _: os.truncate(p, p.stat().st_size // 2),
          "one byte short": lambda p, _: os.truncate(p, p.stat().st_size - 1), "one byte more": lambda p, _: p.write_bytes(p.read_bytes() + b"\n"),
          "of another step": swap, "a folder": as_folder, "a link": as_link, "a pipe": as_pipe}
FAULTS |= {f"bit flipped at {i}/9": lambda p, _, i=i: flip(p, (p.stat().st_size - 1) * i // 9, i % 8) for i in range(10)}


def damaged(source, earlier, place):
    "Every fault in every file of a checkpoint: cases tried, swaps of equal bytes left out, cases that `verify` let pass or named otherwise."
    cases, same, missed = 0, 0, []
    for file in sorted(p.name for p in source.iterdir()):
        for fault, harm in FAULTS.items():
            folder = place / source.name
            shutil.copytree(source, folder)
            if harm(folder / file, earlier) == "same": same += 1
            else:
                cases += 1
                try: ck.verify(folder); missed.append((file, fault))
                except Refusal as no:
                    if file not in str(no) or no.code != 5: missed.append((file, fault, str(no)))
            shutil.rmtree(folder)
    return cases, same, missed


@pytest.mark.parametrize("name", ["full", "lora"])
def test_damage_matrix(name, run, tmp_path, capsys):
    source = run[0] / name / "checkpoint-5"
    cases, same, missed = damaged(source, source.parent / "checkpoint-4", tmp_path)
    with capsys.disabled(): print(f"\n{name}: {cases} damaged checkpoints, {cases - len(missed)} detected ({same} swaps of equal bytes left out)")
    assert not missed and cases >= 150


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_unreadable_file_is_named(run):
    place = Path(tempfile.mkdtemp(prefix="ckpt-"))
    try:
        place.chmod(0o755)
        folder = place / "checkpoint-5"
        shutil.copytree(run[0] / "full/checkpoint-5", folder)
        for path in folder.iterdir(): path.chmod(0o644)
        names = sorted(p.name for p in folder.iterdir())
        for name in [None, *names]:
            if name: (folder / name).chmod(0)
            said = verify_as_nobody(folder)
            assert (said == "whole") if name is None else (name in said and "cannot be read" in said), (name, said)
            if name: (folder / name).chmod(0o644)
    finally: shutil.rmtree(place)


def verify_as_nobody(folder):
    "What `verify` says to a process without rights."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgid(65534); os.setuid(65534)
            try: ck.verify(folder); said = "whole"
            except Refusal as no: said = str(no)
            os.write(write, said.encode())
        finally: os._exit(0)
    os.close(write); os.waitpid(pid, 0)
    with os.fdopen(read) as file: return file.read()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json", "state.safetensors", "trainer_state.json", "manifest.json", "tokenizer.json"])
def test_latest_falls_back_and_an_explicit_path_does_not(file, run, tmp_path, caplog):
    straight = run[1]["full"]
    for step in (6, 7): only(run[0] / "full", step, tmp_path)
    flip(tmp_path / "checkpoint-7" / file, 40, 3)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    no = refusal(make(tmp_path).train, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert no.code == 5 and file in str(no)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before, "something was written"
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert file in caplog.text and "checkpoint-7" in caplog.text and resumed.parts["seen"].step == 6
    assert_same(straight, resumed)
    assert (tmp_path / "aside-checkpoint-7").is_dir() and ck.latest(tmp_path).name == "checkpoint-9"


def test_nothing_whole_is_refused(run, tmp_path):
    for step in (4, 5):
        only(run[0] / "full", step, tmp_path)
        (tmp_path / f"checkpoint-{step}/optimizer.json").unlink()
    assert refusal(make(tmp_path).train, resume_from_checkpoint=True).code == 5


def test_checkpoint_of_plain_trainer_is_refused(tmp_path):
    make(tmp_path, kind=Trainer, max_steps=1).train()
    no = refusal(make(tmp_path, max_steps=1).train, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert no.code == 5 and "manifest.json is missing" in str(no)


@pytest.mark.parametrize("name", ["/etc/passwd", "../checkpoint-4/model.safetensors", "a/../../x"])
def test_manifest_stays_inside(name, run, tmp_path):
    folder = only(run[0] / "full", 5, tmp_path) / "checkpoint-5"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    (folder / "manifest.json").write_text(ck.render(manifest))
    assert "lies outside" in str(refusal(ck.verify, folder))


# ------------------------------------------------------------ T53: nothing on disk runs

class Bomb:
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return (Path.touch, (Path(self.marker),))


def seal_again(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    ck.seal(folder, {k: v for k, v in manifest.items() if k not in ("files", "sha256")})


def bomb_bytes(marker, form):
    import io, pickle, zipfile
    raw = pickle.dumps(Bomb(marker))
    if form == "pickle": return raw
    buffer = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(buffer, "w") as z: z.writestr("archive/data.pkl", raw)
    elif form == "torch": torch.save(Bomb(marker), buffer)
    else: np.save(buffer, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


BESIDE = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "adapter_model.bin", "extra/adapter_model.bin", "state.pkl"]
INSTEAD = [("model.safetensors", "full"), ("adapter_model.safetensors", "lora"), ("optimizer.safetensors", "full"), ("state.safetensors", "full"), ("optimizer.json", "full"), ("state.json", "full"), ("trainer_state.json", "full")]


def test_the_bomb_works(tmp_path):
    import pickle
    pickle.loads(bomb_bytes(tmp_path / "marker", "pickle"))  # noqa: S301
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_pickle_beside_is_refused(name, sealed, run, tmp_path):
    folder, marker = only(run[0] / "full", 5, tmp_path) / "checkpoint-5", tmp_path / "marker"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(bomb_bytes(marker, "torch" if name.endswith(("pt", "pth", "bin")) else "pickle"))
    if name.startswith("pytorch"): (folder / "model.safetensors").unlink()
    if sealed: seal_again(folder)
    for resume in (str(folder), True):
        no = refusal(make(tmp_path).train, resume_from_checkpoint=resume)
        assert no.code == 5
    assert not marker.exists() and (name in str(refusal(ck.verify, folder)) or name.startswith("pytorch"))


@pytest.mark.parametrize("form", ["pickle", "torch", "zip", "numpy"])
@pytest.mark.parametrize("name,kind", INSTEAD)
def test_pickle_instead_never_runs(name, kind, form, run, tmp_path):
    folder, marker = only(run[0] / kind, 5, tmp_path) / "checkpoint-5", tmp_path / "marker"
    (folder / name).write_bytes(bomb_bytes(marker, form))
    assert refusal(make(tmp_path, lora=kind == "lora").train, resume_from_checkpoint=str(folder)).code == 5
    seal_again(folder)  # even where the attacker writes a manifest that agrees
    with pytest.raises(Exception): make(tmp_path, lora=kind == "lora").train(resume_from_checkpoint=str(folder))
    assert not marker.exists()


def test_no_pickle_in_the_source():
    import ast
    source = Path(ck.__file__).read_text()
    names = {getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(ast.parse(source))} | {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert not names & {"pickle", "eval", "exec", "system", "dill", "joblib"}
    assert "torch.load" not in source and "torch.save" not in source and "allow_pickle" not in source and "shell=True" not in source


def test_export_holds_no_pickle(tmp_path, run):
    trainer = run[1]["full"]
    trainer.save_model(str(tmp_path / "export"))
    assert not [p for p in (tmp_path / "export").rglob("*") if p.suffix in ck.PICKLES]
    assert weights_hash(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float64)) == weights_hash(trainer.model)
    assert [p for p in (tmp_path / "export").iterdir() if p.name.startswith(".")] == []


# ------------------------------------------------------------ T43: full disks

@contextlib.contextmanager
def mounted(place):
    "A disk of 8 MB; None where this user may not mount one."
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        yield None
        return
    try: yield place
    finally: subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path) as disk:
        if disk is None: pytest.skip("cannot mount a small disk here")
        yield disk


def fill_up(out, leave):
    "Leave so many bytes free."
    (out / "filler").write_bytes(b"\0" * max(0, shutil.disk_usage(out).free - leave))


def test_too_small_a_disk_is_seen_at_the_start(small_disk):
    no = refusal(make(small_disk / "run").train)  # nine checkpoints of a megabyte
    assert no.code == 4 and not ck.checkpoints(small_disk / "run")
    needed, free = (int(w.replace(",", "")) for w in str(no).split() if w.replace(",", "").isdigit())
    assert needed > free and free <= 8 << 20
    make(small_disk / "run", save_total_limit=2).train()


PREDICTED = {
    "adamw": {}, "rmsprop": dict(optim="rmsprop"), "adafactor": dict(optim="adafactor"), "sgd": dict(optim="sgd"),
    "bfloat16": dict(dtype=torch.bfloat16), "bfloat16 adafactor": dict(optim="adafactor", dtype=torch.bfloat16),
    "float64": dict(dtype=torch.float64), "lora": dict(lora=True), "no tokenizer": dict(tokenizer=None),
    "norms only": dict(norms=True), "a copy of the model": dict(part=True), "a long log": dict(logging_steps=1, steps=40)}


class Copy:
    "A part that keeps a model, as a moving reference does."
    def __init__(self, model): self.model = model
    def state_dict(self): return {k: p.detach().clone() for k, p in self.model.named_parameters()}
    def load_state_dict(self, state): pass


@pytest.mark.parametrize("name", PREDICTED)
def test_a_prediction_is_never_too_little_and_within_a_tenth(name, tmp_path):
    how = dict(PREDICTED[name])
    config = transformers.AutoConfig.for_model("llama", vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    wide = transformers.AutoModelForCausalLM.from_config(config, dtype=how.pop("dtype", torch.float32))
    if how.pop("lora", False):
        from peft import LoraConfig, get_peft_model
        wide = get_peft_model(wide, LoraConfig(r=64, target_modules="all-linear"))
    if how.pop("norms", False):
        for n, p in wide.named_parameters(): p.requires_grad_("norm" in n)
    part, steps = how.pop("part", False), how.pop("steps", 2)
    t = make(tmp_path, model=wide, max_steps=steps, save_steps=steps, **how)
    if part: t.parts["copy"] = Copy(wide)
    said, room = [], t.folder.room
    t.folder.room = lambda size, peak=1: (said.append(size), room(size, peak))[1]
    t.train()
    size = sum(p.stat().st_size for p in (tmp_path / f"checkpoint-{steps}").iterdir())
    assert len(said) == 2 and all(size <= s < 1.1 * size + 100_000 for s in said), (said, size)


@pytest.mark.parametrize("share,asked", [(.5, True), (.98, True), (0, False), (.15, False), (.5, False), (.9, False), (.98, False)])
def test_disk_fills_between_two_saves(share, asked, small_disk): disk_fills(share, asked, small_disk)


def disk_fills(share, asked, small_disk, at=4):
    "Before the save where the size is asked; in weights, optimizer or manifest where the disk is fuller than it said."
    class Fills(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == at: fill_up(small_disk, int(share * size))
    class Trusting(SafeTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            room = self.folder.room
            self.folder.room = lambda size, peak=1: room(size, peak) if asked or self.state.global_step < at else size
    out = small_disk / "run"
    make(small_disk / "probe", max_steps=1).train()
    size = sum(p.stat().st_size for p in (small_disk / "probe/checkpoint-1").iterdir())
    shutil.rmtree(small_disk / "probe")
    no = refusal(make(out, kind=Trusting, callbacks=[Fills()], save_total_limit=3).train)
    assert no.code == 4 and "free" in str(no)
    assert [s for s, _ in ck.checkpoints(out)] == list(range(max(1, at - 3), at)) and not list(out.glob(".checkpoint-*"))
    assert ck.latest(out).name == f"checkpoint-{at - 1}"
    (small_disk / "filler").unlink()
    again = make(out, save_total_limit=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 9


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(ck.write_folder_atomic, tmp_path / "file/checkpoint-1", lambda folder: None).code == 4


def test_too_many_open_files(tmp_path):
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ck.write_folder_atomic(tmp_path / "checkpoint-1", lambda f: (f / "a").write_text("1"), step=1)
    lowest = os.dup(0); os.close(lowest)  # every number below it is taken
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try: no = refusal(ck.write_folder_atomic, tmp_path / "checkpoint-2", lambda f: (f / "a").write_text("1"), step=2)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert no.code == 4 and ck.latest(tmp_path).name == "checkpoint-1"


# ------------------------------------------------------------ T45: another run

CHANGES = {"data": dict(facts={"data": "b"}), "beta": dict(facts={"beta": .2}), "loss": dict(facts={"loss": "hinge"}), "reference": dict(facts={"reference": "r2"}),
           "order_seed": dict(data_seed=7), "tokenizer": dict(tokenizer=tiny_tokenizer(vocab_size=300)), "per_device_train_batch_size": dict(per_device_train_batch_size=3),
           "gradient_accumulation_steps": dict(gradient_accumulation_steps=1), "max_steps": dict(max_steps=7), "num_train_epochs": dict(num_train_epochs=4),
           "learning_rate": dict(learning_rate=2e-3), "lr_scheduler_type": dict(lr_scheduler_type="cosine"), "optim": dict(optim="sgd"), "max_grad_norm": dict(max_grad_norm=.5)}


def other_run(out, change):
    change = dict(change)
    facts = SafeTrainer.facts | change.pop("facts", {})
    return make(out, kind=type("Other", (SafeTrainer,), {"facts": facts}), **change)


@pytest.mark.parametrize("key", CHANGES)
def test_other_run_is_refused_unless_allowed(key, run, tmp_path):
    out = only(run[0] / "full", 5, tmp_path)
    was, now = run[1]["full"].folder.identity[key], identity(other_run(tmp_path / "unused", CHANGES[key]))[key]
    other = other_run(out, CHANGES[key])
    before = weights_hash(other.model)
    no = refusal(other.train, resume_from_checkpoint=True)
    assert no.code == 6 and f"{key} was {was!r} and is {now!r}" in str(no)
    assert weights_hash(other.model) == before
    other.allow_change = [key]
    if key in rf.FIXED: assert refusal(other.train, resume_from_checkpoint=True).code == 2
    else:
        other.train(resume_from_checkpoint=True)
        newest = ck.verify(ck.latest(out))
        assert newest["changes"] == [dict(step=5, what=key, was=was, now=now)] and newest["identity"][key] == now


def test_all_differences_are_named_at_once(run, tmp_path):
    other = other_run(only(run[0] / "full", 5, tmp_path), dict(facts={"data": "b", "beta": 9}, data_seed=7))
    said = str(refusal(other.train, resume_from_checkpoint=True))
    assert "data was 'a' and is 'b'" in said and "beta was 0.1 and is 9" in said and "order_seed was 42 and is 7" in said


def test_world_size_is_part_of_it(run): assert run[1]["full"].folder.identity["world_size"] == 1


def test_typo_in_allow_change(run, tmp_path):
    trainer = make(only(run[0] / "full", 5, tmp_path))
    trainer.allow_change = ["dta"]
    no = refusal(trainer.train, resume_from_checkpoint=True)
    assert no.code == 2 and "dta" in str(no) and "data" in str(no)


def test_other_version_warns_and_is_recorded(run, tmp_path, caplog):
    folder = only(run[0] / "full", 5, tmp_path) / "checkpoint-5"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (folder / "manifest.json").write_text(ck.render(manifest))
    make(tmp_path).train(resume_from_checkpoint=True)
    assert "torch 1.0" in caplog.text
    assert ck.verify(tmp_path / "checkpoint-9")["changes"] == [dict(step=5, what="torch", was="1.0", now=torch.__version__)]


def test_other_model_is_refused(run, tmp_path):
    out = only(run[0] / "full", 5, tmp_path)
    for model in (tiny_model("qwen3"), tiny_model("llama", vocab_size=400)):
        assert refusal(make(out, model=model).train, resume_from_checkpoint=True).code == 6
    assert refusal(make(out, lora=True).train, resume_from_checkpoint=True).code == 6


def test_fresh_start_beside_an_earlier_run_is_refused(run, tmp_path):
    out = only(run[0] / "full", 5, tmp_path)
    no = refusal(make(out).train)
    assert no.code == 2 and "checkpoint-5" in str(no)
    assert refusal(make(out).train, resume_from_checkpoint=str(run[0] / "full/checkpoint-4")).code == 2


def test_resume_before_the_first_save_starts(tmp_path, caplog):
    trainer = make(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and "starting at step 0" in caplog.text


def test_weights_only_is_refused(tmp_path):
    make(tmp_path, save_only_model=True, max_steps=1).train()
    assert "weights only" in str(refusal(make(tmp_path, max_steps=1).train, resume_from_checkpoint=True))


# ------------------------------------------------------------ T46: rotation

def mark(out, step): return ck.write_folder_atomic(out / f"checkpoint-{step}", lambda f: (f / "a").write_text(str(step)), step=step)


@pytest.mark.parametrize("keep,best,left", [
    (None, None, [900, 1000, 1100, 9900, 10000]), (1, None, [10000]), (2, None, [9900, 10000]), (1, 900, [900, 10000]), (2, 900, [900, 10000]), (3, 900, [900, 9900, 10000]), (1, 10000, [10000]), (9, None, [900, 1000, 1100, 9900, 10000])])
@pytest.mark.parametrize("clock", ["forward", "back", "same"])
def test_rotation_keeps_the_declared(keep, best, left, clock, tmp_path):
    for i, step in enumerate((10000, 900, 9900, 1100, 1000)):
        when = 1e9 + {"forward": i, "back": -i, "same": 0}[clock]
        os.utime(mark(tmp_path, step), (when, when))
    ck.rotate(tmp_path, keep, tmp_path / f"checkpoint-{best}" if best else None)
    assert [s for s, _ in ck.checkpoints(tmp_path)] == left and not list(tmp_path.glob(".*"))


def test_nothing_goes_while_the_newest_is_damaged(tmp_path):
    for step in (1, 2, 3): mark(tmp_path, step)
    (tmp_path / "checkpoint-3/a").write_text("4")
    assert refusal(ck.rotate, tmp_path, 1).code == 5 and len(ck.checkpoints(tmp_path)) == 3


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    for name in ("checkpoint-x", "checkpoint-1.5", "checkpoint-", "mycheckpoint-3", "checkpoint-5-old"): (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").touch(); (tmp_path / "checkpoint-8").symlink_to(tmp_path)
    assert ck.checkpoints(tmp_path) == [] and ck.latest(tmp_path) is None and ck.sweep(tmp_path) == []


def test_folder_is_never_written_over(tmp_path):
    mark(tmp_path, 1)
    assert "never written over" in str(refusal(mark, tmp_path, 1))


def test_what_is_on_the_disk_before_what(tmp_path, monkeypatch):
    "A power cut is not a SIGKILL: files, manifest, folder must reach the disk before the name, and the name before the call returns."
    done, real = [], {n: getattr(os, n) for n in ("fsync", "rename", "replace")}
    def name(handle): return os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[-1]
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(("fsync", name(h).split(".")[1] if name(h).startswith(".") else name(h))), real["fsync"](h))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(("rename", Path(b).name)), real["rename"](a, b))[1])
    def fill(folder):
        (folder / "sub").mkdir()
        for p in ("a", "sub/b"): (folder / p).write_text(p)
    ck.write_folder_atomic(tmp_path / "checkpoint-1", fill, step=1)
    files, rest = done[:3], done[3:]
    assert sorted(files) == [("fsync", "a"), ("fsync", "b"), ("fsync", "sub")]
    assert rest == [("fsync", "manifest"), ("fsync", "checkpoint-1"), ("rename", "checkpoint-1"), ("fsync", tmp_path.name)]


def test_a_fill_that_fails_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "a").write_text("1")
        raise KeyError("mine")
    with pytest.raises(KeyError): ck.write_folder_atomic(tmp_path / "checkpoint-1", fill)
    assert not any(tmp_path.iterdir())


def test_going_back_keeps_later_work(run, tmp_path):
    for step in (4, 5, 6): only(run[0] / "full", step, tmp_path)
    make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(p.name for p in tmp_path.glob("aside-*")) == ["aside-checkpoint-5", "aside-checkpoint-6"]
    assert ck.free_name(tmp_path / "aside-checkpoint-5").name == "aside-checkpoint-5.2"


# ------------------------------------------------------------ T47: one run, one folder

def hold(out):
    lock = rf.RunLock(out)   # held as long as there is a reference to it
    lock.take()
    (Path(out) / "held").touch()
    time.sleep(60)


def test_second_run_is_refused_and_a_dead_one_is_not(tmp_path):
    process = child(hold, str(tmp_path))
    wait_for((tmp_path / "held").exists)
    no = refusal(make(tmp_path, max_steps=1).train)
    assert no.code == 2 and str(process.pid) in str(no)
    process.kill(); process.join()
    make(tmp_path, max_steps=1).train()
    assert (tmp_path / ".run.lock").read_text() == ""   # the file stays: deleting it would let two hold "the" lock


@pytest.mark.parametrize("text", ["", "process 1 on another-host", "\xff"], ids=["empty", "a name", "bytes"])
def test_a_file_is_no_lock(text, tmp_path):
    "What is written in it tells people who holds the lock; the operating system decides."
    (tmp_path / ".run.lock").write_text(text)
    first = rf.RunLock(tmp_path)
    first.take()
    assert f"process {os.getpid()}" in str(refusal(rf.RunLock(tmp_path).take))
    first.release()
    rf.RunLock(tmp_path).take()


def race(out, gate, results):
    gate.wait()
    lock = rf.RunLock(out)
    try: lock.take(); results.put(os.getpid())
    except Refusal: results.put(None)
    time.sleep(1)


def test_of_many_one_gets_a_stale_lock(tmp_path):
    (tmp_path / ".run.lock").write_text("process 1")
    gate, results = FORK.Barrier(6), FORK.Queue()
    processes = [child(race, str(tmp_path), gate, results) for _ in range(6)]
    got = [results.get(timeout=30) for _ in processes]
    for p in processes: p.join()
    assert sum(pid is not None for pid in got) == 1


# ------------------------------------------------------------ several processes

def one_of_two(rank, port, out, settings, resume, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logging.disable(logging.WARNING)
    writes, mkdtemp = [], tempfile.mkdtemp
    def counted(*a, **k):
        if "checkpoint" in str(k.get("prefix")): writes.append(1)
        return mkdtemp(*a, **k)
    tempfile.mkdtemp = counted
    try:
        trainer = make(out, ddp_backend="gloo", **settings)
        trainer.train(resume_from_checkpoint=resume)
        results.put((rank, weights_hash(trainer.model), lines(trainer), len(writes), torch.rand(()).item()))
    except Refusal as no: results.put((rank, no.code, str(no), len(writes), None))
    torch.distributed.destroy_process_group()


def two(out, settings, resume=None):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    results = FORK.Queue()
    processes = [child(one_of_two, r, port, str(out), settings, resume, results) for r in (0, 1)]
    found = sorted(results.get(timeout=120) for _ in processes)
    for p in processes: p.join()
    return found


def test_two_processes(tmp_path):
    settings = dict(gradient_accumulation_steps=1, num_train_epochs=2)
    straight = two(tmp_path / "a", settings)
    assert straight[0][1] == straight[1][1] and straight[0][3] > 0 and straight[1][3] == 0, "only rank 0 writes"
    resumed = two(only(tmp_path / "a", 2, tmp_path / "b"), settings, True)
    assert [r[1] for r in resumed] == [r[1] for r in straight] and resumed[0][2] == straight[0][2]
    assert [r[4] for r in resumed] == [r[4] for r in straight] and resumed[0][4] != resumed[1][4], "each rank has its own random numbers"
    refused = two(only(tmp_path / "a", 2, tmp_path / "c"), settings | dict(data_seed=3), True)
    assert [r[1] for r in refused] == [6, 6] and "order_seed" in refused[1][2]
    alone = make(only(tmp_path / "a", 2, tmp_path / "d"), **settings)
    assert "world_size was 2 and is 1" in str(refusal(alone.train, resume_from_checkpoint=True))


# ------------------------------------------------------------ T48: signals

SLOW = dict(num_train_epochs=9, save_steps=1000, logging_steps=1)


def signalled(out, numbers, settings=SLOW, pause=.15):
    process = child(train_on, str(out), settings, pause, None)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("loss") >= 2)
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(.02)
    start = time.time()
    process.join(30)
    return process.exitcode, time.time() - start


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_saves(number, code, tmp_path):
    straight = make(tmp_path / "straight", **SLOW)
    straight.train()
    out = tmp_path / "out"
    exit_code, seconds = signalled(out, [number])
    assert exit_code == code and seconds < 30
    (step, _), = ck.checkpoints(out)
    assert 2 <= step < 27 and acknowledged(out) == step and (out / ".run.lock").read_text() == ""
    again = make(out, **SLOW)
    again.train(resume_from_checkpoint=True)
    assert_same(straight, again)


def test_second_signal_ends_at_once(tmp_path):
    exit_code, seconds = signalled(tmp_path, [signal.SIGTERM, signal.SIGINT], pause=1.)
    assert exit_code == 130 and seconds < .9
    assert not list(tmp_path.glob("*checkpoint-*")) and not list(tmp_path.glob(".checkpoint-*"))


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make(tmp_path, max_steps=1).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ------------------------------------------------------------ T50, T71

class Poison(TrainerCallback):
    def __init__(self, what, step): self.what, self.step = what, step
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step + 1 != self.step: return
        p = next(p for p in model.parameters() if p.requires_grad)
        with torch.no_grad(): (p if self.what == "weights" else optimizer.state[p]["exp_avg"]).view(-1)[3] = float(self.what == "weights" and "nan" or "inf")


@pytest.mark.parametrize("step", [1, 4, 9])
@pytest.mark.parametrize("what", ["weights", "moments"])
@pytest.mark.parametrize("lora", [False, True])
def test_non_finite_is_never_written(what, step, lora, tmp_path):
    no = refusal(make(tmp_path, lora, callbacks=[Poison(what, step)], logging_nan_inf_filter=False).train)
    assert no.code == 3 and "not finite" in str(no) and ("exp_avg" in str(no)) == (what == "moments")
    assert [s for s, _ in ck.checkpoints(tmp_path)] == list(range(1, step)) and not list(tmp_path.glob(".checkpoint-*"))


def test_log_is_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    for record in ({"x": float("nan"), "y": float("-inf")}, {"text": "é\u2028\x1b[31m\n"}, {"p": Path("x")}): rf.append_line(path, record)
    raw = path.read_bytes()
    assert raw.isascii() and b"\x1b" not in raw
    def no_constant(name): raise AssertionError(name)
    got = [json.loads(line, parse_constant=no_constant) for line in raw.decode().split("\n") if line and line != '{"b": ']
    assert got == [{"a": 1}, {"x": "nan", "y": "-inf"}, {"text": "é\u2028\x1b[31m\n"}, {"p": "x"}]


def test_log_tells_what_was_saved_and_resumed(run, tmp_path):
    make(only(run[0] / "full", 5, tmp_path)).train(resume_from_checkpoint=True)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0] == {"resumed_from": 5} and [r["saved"] for r in records if "saved" in r] == [6, 7, 8, 9]
    assert [r["step"] for r in records if "loss" in r] == [6, 8]


def test_callback_state_is_kept(run, tmp_path):
    from transformers import EarlyStoppingCallback
    settings = dict(evals=TEXTS[:3], eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss")
    make(tmp_path / "a", callbacks=[EarlyStoppingCallback(5)], **settings).train()
    stored = json.loads((tmp_path / "a/checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["EarlyStoppingCallback"]["args"]["early_stopping_patience"] == 5 and isinstance(stored["TrainerControl"], dict)
