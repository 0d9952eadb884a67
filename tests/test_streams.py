"A stream without an end that is known: trained on as it is read, resumed to the bit."
import datasets
import pytest
import torch
import transformers
from transformers import TrainerCallback
from dpo_literate.inputs import LOT, StreamRows, trains_as_it_reads
from dpo_literate.models import tiny_model
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.settings import DPOConfig
from dpo_literate.trainer import DPOTrainer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the {i}", chosen=f"mat {i}", rejected=f"dog {i}") for i in range(83)]
QUIET = dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
RUN = dict(lr_scheduler_type="constant", learning_rate=1e-3, per_device_train_batch_size=4,
           gradient_accumulation_steps=2, logging_steps=3)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Source:
    "Pairs that are counted as they are taken."
    def __init__(self, pairs=PAIRS): self.pairs, self.taken = pairs, 0

    def __call__(self):
        for pair in self.pairs:
            self.taken += 1
            yield pair

    @property
    def stream(self): return datasets.IterableDataset.from_generator(self)


class At(TrainerCallback):
    "Does something at the end of a step."
    def __init__(self, step, action): self.step, self.action = step, action
    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step: self.action(control)


def stop(control): control.should_training_stop = True

def trainer(path, source, calls=(), **settings):
    args = DPOConfig(str(path), **QUIET | RUN | settings)
    made = DPOTrainer(tiny_model(), args=args, train_dataset=source.stream,
                      processing_class=TOKENIZER, callbacks=list(calls))
    made.remove_callback(transformers.PrinterCallback)
    return made

def apart(a, b): # of two models
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def test_a_step_is_taken_when_its_rows_are_there_and_all_rows_are_trained_on(tmp_path):
    long, seen = Source(PAIRS * 5), []
    t = trainer(tmp_path / "a", long, [At(1, lambda _: seen.append(long.taken))])
    t.train()
    assert seen == [LOT] and long.taken == 415 and t.state.global_step == -(-415 // 8)
    assert str(t.counts["train"]) == "415 rows in: 415 kept"
    steps = [line for line in t.state.log_history if "loss" in line]
    assert [line["step"] for line in steps] == list(range(3, 52, 3))
    assert {line["learning_rate"] for line in steps} == {1e-3}


def test_a_stream_trains_as_its_rows_do_in_their_order(tmp_path):
    "The last step too, which is shorter; the reference beside it is the one a table would hold."
    streamed = trainer(tmp_path / "a", Source())
    streamed.train()
    args = DPOConfig(str(tmp_path / "b"), **QUIET | RUN | dict(
        num_train_epochs=1, train_sampling_strategy="sequential", precompute_ref_log_probs=False))
    table = DPOTrainer(tiny_model(), args=args, train_dataset=PAIRS, processing_class=TOKENIZER)
    table.remove_callback(transformers.PrinterCallback)
    table.train()
    assert streamed.state.global_step == table.state.global_step == 11
    assert apart(streamed.model, table.model) == 0.


@pytest.mark.parametrize("at", [3, 10])
def test_a_stopped_stream_goes_on_to_the_bit(at, tmp_path):
    how = dict(save_strategy="steps", save_steps=at)
    whole = trainer(tmp_path / "a", Source(), **how)
    whole.train()
    trainer(tmp_path / "b", Source(), [At(at, stop)], **how).train()
    again = trainer(tmp_path / "b", Source(), **how)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 11 and apart(whole.model, again.model) == 0.
    assert (tmp_path / "b" / "checkpoint-11").is_dir()      # saved where the stream ended
    done = trainer(tmp_path / "b", Source(), **how)
    done.train(resume_from_checkpoint=True)                 # and nothing is left to do
    assert done.state.global_step == 11 and apart(whole.model, done.model) == 0.


def test_another_stream_is_not_gone_on_with(tmp_path):
    how = dict(save_strategy="steps", save_steps=3)
    trainer(tmp_path, Source(PAIRS * 2), [At(9, stop)], **how).train()
    late = [dict(p) for p in PAIRS * 2]
    late[70]["chosen"] = "bird"                             # behind the first lot
    for pairs, words in ((late, "rows are not those"), (PAIRS[:70], "rows are not those"),
                         (late[70:], "data was")):
        with pytest.raises(Refusal, match=words) as no:
            trainer(tmp_path, Source(pairs), **how).train(resume_from_checkpoint=True)
        assert no.value.code == 6


def test_what_needs_the_end_is_read_whole_or_refused(tmp_path, caplog):
    source = Source()
    t = trainer(tmp_path / "a", source, lr_scheduler_type="linear", num_train_epochs=1)
    assert source.taken == 83 == len(t.rows) and "choose 'constant'" in caplog.text
    assert not trains_as_it_reads(source.stream, DPOConfig(str(tmp_path), **QUIET, max_steps=3))
    for name, value in dict(warmup_steps=.1, save_steps=.5, layout="shared",
                            dataloader_num_workers=1, precompute_ref_log_probs=True).items():
        more = dict(save_strategy="steps") if name == "save_steps" else {}
        with pytest.raises(Refusal, match=name): trainer(tmp_path, Source(), **{name: value} | more)
    with pytest.raises(Refusal, match="no rows"): trainer(tmp_path, Source([]))


def test_every_lot_is_audited_and_counted(tmp_path):
    same = dict(prompt="a", chosen="b", rejected="b")
    for bad, words in ((dict(same, chosen="<|im_end|>"), "control_text='text'"),
                       (dict(prompt="a", chosen="b"), "row 71: expected prompt, chosen, rejected")):
        with pytest.raises(Refusal, match=words):
            trainer(tmp_path, Source([*PAIRS[:70], bad])).train()
    t = trainer(tmp_path, Source([*PAIRS[:70], same, *PAIRS[70:]]))
    t.train()
    assert str(t.counts["train"]) == "84 rows in: 83 kept, 1 dropped: identical replies"


def test_rows_long_passed_are_forgotten(tmp_path):
    args = DPOConfig(str(tmp_path), **QUIET | RUN)
    rows = StreamRows(Source(PAIRS * 20).stream, TOKENIZER, args)
    assert rows.has(1600) and len(rows.kept) <= 2 * LOT + 4 * 8 and rows[1600].id == "row 1601"
    with pytest.raises(IndexError): rows[LOT]
    assert rows[:2][1] == rows[1] and not rows.has(1660) and len(rows) == 1660


def test_labelled_replies_and_split_pairs_stream_too(tmp_path):
    thumbs = [dict(prompt=f"the {i}", completion=f"mat {i}", label=i % 3 > 0) for i in range(83)]
    for k, pairs in enumerate((thumbs, PAIRS)):
        t = trainer(tmp_path / str(k), Source(pairs), loss_type="kto")
        t.train()
        assert t.state.global_step == -(-(83 << k) // 8) and torch.isfinite(next(
            t.model.parameters())).all()
