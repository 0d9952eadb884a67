"""What page 10 promises of its step: eight objects shown, no language in it, cells that need no
scrolling; and the trainer's reference model, made once."""
import copy
import importlib
import json
import re
from pathlib import Path

import pytest
import transformers

from dpo_literate.models import tiny_model, weights_hash
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.settings import DPOConfig
from dpo_literate.trainer import DPOTrainer

NBS = Path(__file__).resolve().parents[1] / "nbs"
# the pages the trainer is made of, and the most lines a cell of theirs may have
PAGES = ("09b_run_folder", "09c_port", "09d_objective", "10_step", "10ca_monitor", "10d_trainer",
         "11_align")
LONGEST = 64


def cells(name): return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
def code(some): return ["".join(c["source"]) for c in some if c["cell_type"] == "code"]
def lines(source):
    return [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]


def shown(cell):
    "What a cell shows, as text."
    data = [o.get("data", {}) for o in cell.get("outputs", [])]
    return "".join(x for d in data for x in d.get("text/plain", ()))


@pytest.mark.parametrize("name", PAGES)
def test_no_cell_has_to_be_scrolled_through(name):
    assert not [s[:60] for s in code(cells(name)) if len(lines(s)) > LONGEST]


def test_each_of_the_eight_objects_is_shown():
    "By its `repr`, alone or first in a tuple, before the step that holds them."
    texts = [shown(c) for c in cells("10_step")]
    for name in ("Layout", "Scorer", "FrozenReference", "Objective", "Meter", "Team", "RunFolder"):
        assert any(re.match(rf"\(?{name}\(", t) for t in texts), name
    assert any(t.startswith("PreferenceStep\n  Layout(") for t in texts)


def test_a_song_picker_takes_less_than_forty_lines():
    page = cells("10_step")
    sources = ["".join(c["source"]) for c in page]
    start = sources.index("## It knows no language")
    end = next(k for k, s in enumerate(sources) if s.startswith("And a classifier"))
    song = [x for s in code(page[start:end]) for x in lines(s)]
    assert 20 < len(song) < 40 and any("song_scorer" in x for x in song)


def test_the_step_imports_nothing_that_knows_words():
    "Nor do the objective and the folder: what a row is made of is the row's affair."
    for name in ("step", "objective", "run_folder"):
        source = importlib.import_module(f"dpo_literate.{name}").__file__
        used = re.findall(r"^(?:from|import) +([\w.]+)", Path(source).read_text(), re.M)
        assert not {"transformers", ".rows", ".templates", ".preferences"} & set(used), name


# ------------------------------------------------------------ trainer.ref_model

PAIRS = [dict(prompt="the cat", chosen=f"sat on the mat {i}", rejected=f"and the dog {i}")
         for i in range(4)]


def made(path, ref_model=None, peft_config=None, **settings):
    transformers.logging.set_verbosity_error()
    args = DPOConfig(str(path), use_cpu=True, save_strategy="no", report_to=[], max_steps=1,
                     disable_tqdm=True, learning_rate=1e-2, **settings)
    t = DPOTrainer(tiny_model(), ref_model, args, train_dataset=PAIRS,
                   processing_class=tiny_tokenizer(), peft_config=peft_config)
    t.remove_callback(transformers.PrinterCallback)
    return t


def copies(monkeypatch):
    "The models that are deep-copied from now on."
    found, real = [], copy.deepcopy
    def watched(x, *rest):
        if isinstance(x, transformers.PreTrainedModel): found.append(x)
        return real(x, *rest)
    monkeypatch.setattr(copy, "deepcopy", watched)
    return found


@pytest.mark.parametrize("settings", [dict(precompute_ref_log_probs=False),
                                      dict(sync_ref_model=True, ref_model_sync_steps=512)])
def test_ref_model_is_a_copy_made_once(tmp_path, monkeypatch, settings):
    copied = copies(monkeypatch)
    t = made(tmp_path, **settings)
    assert copied == [t.model] and "ref_model" in vars(t) and t.ref_model is t.ref_model
    start, places = weights_hash(t.ref_model), [{p.data_ptr() for p in m.parameters()}
                                                for m in (t.ref_model, t.model)]
    assert start == weights_hash(t.model) and not places[0] & places[1]
    t.train()
    assert len(copied) == 1 and t.step.reference.model is t.ref_model
    assert weights_hash(t.ref_model) == start != weights_hash(t.model)


def test_ref_model_is_none_where_there_is_no_such_model(tmp_path, monkeypatch):
    from peft import LoraConfig
    lora, asked = LoraConfig(r=2, target_modules=["q_proj"]), dict(precompute_ref_log_probs=False)
    for k, given in enumerate((dict(), dict(peft_config=lora), dict(peft_config=lora, **asked))):
        t = made(tmp_path / str(k), **given)
        t.begin_run()
        assert t.ref_model is None
    other = tiny_model(seed=1)
    assert made(tmp_path / "other", other, other_reference=True).ref_model is other


def test_no_copy_is_made_of_shards(tmp_path, monkeypatch):
    from dpo_literate.port import TransformersPort
    monkeypatch.setattr(TransformersPort, "sharded", property(lambda self: True))
    copied = copies(monkeypatch)
    with pytest.raises(Refusal, match="a reference that is read beforehand"):
        made(tmp_path, precompute_ref_log_probs=False)
    assert not copied
