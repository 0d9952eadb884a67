"Pictures in a pair: rows, layouts, scorer and trainer against a forward pass written out by hand."
import dataclasses
import json
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dpo_literate.inputs import prepare_rows
from dpo_literate.packing import lay_out
from dpo_literate.results import Refusal
from dpo_literate.settings import DPOConfig
from dpo_literate.step import Layout
from dpo_literate.trainer import DPOTrainer
from dpo_literate.vision import SEEING, Eyes, PictureLayout, PictureScorer, dress, tiny_vlm

MPO = dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[.8, .2, 1.])


@pytest.fixture(autouse=True)
def quiet(): transformers.logging.set_verbosity_error()


def noise(seed, size=(12, 8)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*parts): return [dict(role="user", content=list(parts))]


def said(text): return [dict(role="assistant", content=text)]


IMAGE = dict(type="image")
PAIRS = [   # one picture by its place, two around a text, one before a question, none
    dict(prompt=user(IMAGE, dict(type="text", text="what is it?")), images=[noise(0)],
         chosen=said("a cat"), rejected=said("the dog sat")),
    dict(prompt=user(IMAGE, dict(type="text", text=" or "), IMAGE),
         images=[noise(1), noise(2, (28, 12))], chosen=said("the second"), rejected=said("no")),
    dict(prompt=user(dict(type="text", text="tell me")), images=[noise(3, (9, 31))],
         chosen=said("it is a mat"), rejected=said("yes, yes")),
    dict(prompt=user(dict(type="text", text="no picture")), images=[], chosen=said("true"),
         rejected=said("false, why"))]


def exact_vlm(kind):
    "A tiny model whose norms take the formula in float64; transformers casts them to float32."
    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    model, processor = tiny_vlm(kind)
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"): m.forward = types.MethodType(norm, m)
    return model, processor


def config(path, **settings):
    given = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
                 num_train_epochs=1, per_device_train_batch_size=2, learning_rate=1e-2,
                 lr_scheduler_type="constant", max_length=400)
    return DPOConfig(str(path), **(given | settings))


@pytest.fixture(scope="module", params=SEEING)
def seen(request, tmp_path_factory):
    "A family's model and processor, and the rows of PAIRS."
    model, processor = exact_vlm(request.param)
    rows = prepare_rows(PAIRS, processor, config(tmp_path_factory.mktemp("rows")))[0]
    return model, processor, rows


def by_hand(model, processor, pair, row):
    "Log-probabilities of both replies: one text at a time, full logits."
    images = pair["images"]
    more = {}
    if images:
        more = dict(processor(text=[processor.image_token * len(images)], images=[images],
                              return_tensors="pt", add_special_tokens=False))
        more = {k: v.double() if v.is_floating_point() else v for k, v in more.items()
                if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    out, p = [], len(row.prompt_ids)
    for reply in (row.chosen_ids, row.rejected_ids):
        ids = torch.tensor([row.prompt_ids + reply])
        if "image_grid_thw" in more:
            more["mm_token_type_ids"] = (ids == processor.image_token_id).long()
        logp = model(input_ids=ids, **more).logits[0].double().log_softmax(-1)
        out.append(torch.stack([logp[p + t - 1, y] for t, y in enumerate(reply)]).sum())
    return torch.stack(out)


def scored(model, processor, rows, kind):
    pieces = PictureLayout(Layout(kind), Eyes(processor))(rows)
    with torch.no_grad(): out = [PictureScorer(Eyes(processor))(model, p) for p in pieces]
    return torch.cat([torch.stack((o.chosen, o.rejected)) for o in out], 1)


# ------------------------------------------------------------ one number, however it is laid out

def test_both_layouts_give_the_sums_of_a_forward_written_out(seen):
    model, processor, rows = seen
    with torch.no_grad():
        naive = torch.stack([by_hand(model, processor, p, r) for p, r in zip(PAIRS, rows)], 1)
    for kind in ("padded", "packed"):
        assert (scored(model, processor, rows, kind) - naive).abs().max() < 1e-10, kind
    assert naive.std() > .1


def test_order_and_batch_split_change_nothing(seen):
    model, processor, rows = seen
    whole = scored(model, processor, rows, "padded")
    for kind in ("padded", "packed"):
        alone = torch.cat([scored(model, processor, [r], kind) for r in rows], 1)
        back = scored(model, processor, rows[::-1], kind).flip(1)
        assert (alone - whole).abs().max() < 1e-10 and (back - whole).abs().max() < 1e-10, kind


def test_another_picture_is_another_number_and_another_key(seen):
    model, processor, rows = seen
    other = prepare_rows([PAIRS[0] | dict(images=[noise(9)])], processor, config("unused"))[0]
    assert other[0].prompt_ids == rows[0].prompt_ids and other[0].key != rows[0].key
    gap = scored(model, processor, other, "padded") - scored(model, processor, rows[:1], "padded")
    assert gap.abs().min() > 1e-6


def test_ids_are_those_of_the_processors_own_call(seen):
    _, processor, rows = seen
    for pair, row in zip(PAIRS[:2], rows):
        text = processor.tokenizer.apply_chat_template(pair["prompt"], tokenize=False,
            add_generation_prompt=True, chat_template=processor.chat_template)
        own = processor(text=[text], images=[pair["images"]], add_special_tokens=False)
        assert row.prompt_ids == list(own["input_ids"][0])


def test_no_image_token_is_scored_whatever_a_reply_spells(seen):
    _, processor, _ = seen
    spelled = [PAIRS[0] | dict(chosen=said(f"see {processor.image_token} here"))]
    rows = prepare_rows([*PAIRS, *spelled], processor, config("unused"))[0]
    for kind in ("padded", "packed"):
        for piece in PictureLayout(Layout(kind), Eyes(processor))(rows):
            assert processor.image_token_id in piece.input_ids
            assert processor.image_token_id not in piece.targets
    assert rows[0].prompt_ids == rows[-1].prompt_ids


def test_the_gradient_is_the_one_of_the_forward_written_out(seen):
    model, processor, rows = seen
    tower = [p for n, p in model.named_parameters() if "vis" in n and p.dim() > 1][-1]
    naive = sum(by_hand(model, processor, p, r).sum() for p, r in zip(PAIRS, rows))
    want, = torch.autograd.grad(naive, tower)
    assert want.abs().max() > 1e-6
    for kind in ("padded", "packed"):
        pieces = PictureLayout(Layout(kind), Eyes(processor))(rows)
        got, = torch.autograd.grad(sum(PictureScorer(Eyes(processor))(model, p).sums.sum()
                                       for p in pieces), tower)
        assert (got - want).abs().max() < 1e-8 * want.abs().max(), kind


def test_the_check_finds_a_packing_that_changes_numbers(seen, monkeypatch):
    model, processor, rows = seen
    eyes = Eyes(processor)
    assert eyes.check(model, rows) is None
    def late(self, pieces): raise RuntimeError("no mask of that kind")
    monkeypatch.setattr("dpo_literate.vision.attention_for", late)
    assert "padded rows: packing is refused" in eyes.check(model, rows)
    monkeypatch.undo()
    def mixed(some, eyes):     # each row gets the picture of another
        moved = [dataclasses.replace(r, pictures=q.pictures)
                 for r, q in zip(some, some[1:] + some[:1])]
        return real(lay_out(moved), eyes)
    same = prepare_rows([PAIRS[0], PAIRS[0] | dict(images=[noise(8)])], processor,
                        config("unused"))[0]
    real = dress
    monkeypatch.setattr("dpo_literate.vision.dress",
                        lambda piece, eyes: mixed(piece.rows, eyes) if piece.attention_mask is None
                        else real(piece, eyes))
    assert "packing would move" in eyes.check(model, same)


# ------------------------------------------------------------ the trainer

def train(path, kind="llava", data=PAIRS, resume=False, **settings):
    model, processor = exact_vlm(kind)
    more = {k: settings.pop(k) for k in ("peft_config", "ref_model") if k in settings}
    trainer = DPOTrainer(model, args=config(path, **settings), train_dataset=data,
                         processing_class=processor, **more)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def lines(trainer, key="loss"): return [h[key] for h in trainer.state.log_history if key in h]


def weights(trainer): return {k: v.clone() for k, v in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", SEEING)
def test_packed_and_padded_training_end_at_the_same_weights(tmp_path, kind):
    runs = [train(tmp_path / layout, kind, layout=layout, **MPO) for layout in ("packed", "padded")]
    assert [t.step.layout.kind for t in runs] == ["packed", "padded"]
    a, b = map(weights, runs)
    near = 1e-6 if kind == "qwen2_vl" else 1e-9   # its tower turns positions in float32
    assert max((a[k] - b[k]).abs().max().item() for k in a) < near
    assert lines(runs[0]) == pytest.approx(lines(runs[1]), abs=near) and len(lines(runs[0])) == 2


def test_the_reference_is_the_same_cached_copied_or_the_adapter_taken_back(tmp_path):
    from peft import LoraConfig
    lora = dict(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights="gaussian")
    runs = [train(tmp_path / "cached"), train(tmp_path / "copy", precompute_ref_log_probs=False),
            train(tmp_path / "other", ref_model=exact_vlm("llava")[0])]
    assert [t.mode for t in runs] == ["cached", "frozen", "cached"]
    for other in runs[1:]: assert lines(other) == pytest.approx(lines(runs[0]), abs=1e-10)
    tuned = [train(tmp_path / f"lora{k}", peft_config=LoraConfig(**lora),
                   precompute_ref_log_probs=k) for k in (None, False)]
    assert [t.mode for t in tuned] == ["cached", "adapter"]
    assert lines(tuned[0]) == pytest.approx(lines(tuned[1]), abs=1e-10)


@pytest.mark.parametrize("settings", [dict(loss_type=["ipo"]), dict(loss_type=["kto"]), MPO,
                                      dict(loss_type=["aot"]), dict(loss_type=["simpo"], )])
def test_losses_of_the_registry_train_on_pictures(tmp_path, settings):
    trainer = train(tmp_path, **settings)
    assert all(np.isfinite(lines(trainer))) and len(lines(trainer)) >= 2


def test_a_resumed_run_ends_where_the_whole_one_does_to_the_bit(tmp_path):
    given = dict(num_train_epochs=2, save_strategy="steps", save_steps=1, **MPO)
    whole = train(tmp_path / "whole", **given)
    train(tmp_path / "parts", **given)
    checkpoint = str(tmp_path / "parts" / "checkpoint-2")
    rest = train(tmp_path / "parts", resume=checkpoint, **given)
    a, b = weights(whole), weights(rest)
    assert all(torch.equal(a[k], b[k]) for k in a)
    changed = [PAIRS[0] | dict(images=[noise(7)]), *PAIRS[1:]]
    with pytest.raises(Refusal):
        train(tmp_path / "parts", data=changed, resume=checkpoint, **given)


def test_rows_as_trl_documents_them_train_unchanged(tmp_path):
    from datasets import Dataset
    table = Dataset.from_list([dict(image=dict(bytes=None, path=str(tmp_path / f"{k}.png")),
        prompt=[dict(role="user", content="what?")], chosen=said("a cat"),
        rejected=said(f"dog {k}")) for k in range(2)])
    for k in range(2): noise(k).save(tmp_path / f"{k}.png")
    from datasets import Image as Column
    table = table.cast_column("image", Column())
    trainer = train(tmp_path / "run", data=table)
    assert [len(r.spans) for r in trainer.rows] == [1, 1] and lines(trainer)


def test_a_folder_is_enough_and_its_processor_is_found(tmp_path):
    model, processor = tiny_vlm("llava")
    model.float().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    given = dict(args=config(tmp_path / "run"), train_dataset=PAIRS)
    trainer = DPOTrainer(str(tmp_path / "model"), **given)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    again = DPOTrainer(str(tmp_path / "out"), **given)
    assert type(again.processing_class) is type(processor)
    assert again.rows[0].prompt_ids == trainer.rows[0].prompt_ids


# -------------------------------------------------- bad input: one sentence, with its place

def written(folder, *rows):
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return file


GOOD = dict(prompt=user(dict(type="text", text="?")), images=["good.png"], chosen=said("cat"),
            rejected=said("dog"))


@pytest.mark.parametrize("bad, words", [
    (["gone.png"], "picture 1 (gone.png) does not exist"),
    (["good.png", "half.png"], "2 images for 1 places"),
    (["half.png"], "picture 1 (half.png) cannot be read as a picture"),
    (["text.png"], "picture 1 (text.png) cannot be read as a picture"),
    (["clear.png"], "picture 1 (clear.png) has transparent pixels"),
    (["ink.tiff"], "picture 1 (ink.tiff) has channels of kind CMYK"),
    (["moving.gif"], "picture 1 (moving.gif) holds 2 frames"),
    (["http://x.org/a.png"], "picture 1 is the address"),
    ([7], "picture 1 is int")])
def test_a_bad_picture_is_named_with_row_and_file(tmp_path, bad, words):
    noise(0).save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:150])
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "ink.tiff")
    noise(1).save(tmp_path / "moving.gif", save_all=True, append_images=[noise(2)])
    row = GOOD | dict(images=bad)
    if words.startswith("2 images"):
        row |= dict(prompt=user(IMAGE, dict(type="text", text="?")))
    file = written(tmp_path, GOOD, row)
    with pytest.raises(Refusal) as why: train(tmp_path / "run", data=str(file))
    assert f"{file}:2: " in str(why.value) and words in str(why.value)
    assert "\n" not in str(why.value) and not (tmp_path / "run" / "run_card.json").exists()


@pytest.mark.parametrize("images, places", [(0, 1), (1, 2), (3, 2)])
def test_images_and_places_are_counted(tmp_path, images, places):
    noise(0).save(tmp_path / "good.png")
    text = dict(type="text", text="?")
    row = GOOD | dict(prompt=user(*[IMAGE] * places, text), images=["good.png"] * images)
    file = written(tmp_path, row)
    with pytest.raises(Refusal, match=f"{images} images for {places} places"):
        train(tmp_path / "run", data=str(file))


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("how", ["keep_end", "keep_start"])
def test_truncation_never_goes_through_a_picture(tmp_path, kind, how):
    processor = tiny_vlm(kind)[1]
    words = dict(role="system", content="the cat sat on the mat " * 3)
    pair = PAIRS[0] | dict(prompt=[words, *PAIRS[0]["prompt"]], chosen=said("a cat " * 9))
    whole = prepare_rows([pair], processor, config(tmp_path))[0][0]
    outcomes = set()
    for limit in range(8, len(whole) + 1):
        try: rows, counts, _ = prepare_rows([pair], processor,
                                            config(tmp_path, max_length=limit, truncation_mode=how))
        except Refusal as why:
            outcomes.add("picture" if "a picture stands in" in str(why) else "no rows")
            continue
        row, = rows
        outcomes.add("cut" if len(row) < len(whole) else "whole")
        a, b = row.spans[0]
        assert len(row) <= limit and row.prompt_ids[a:b] == whole.prompt_ids[slice(*whole.spans[0])]
    assert outcomes >= {"cut", "whole"} and ("picture" in outcomes) == (how == "keep_end")


def test_what_cannot_be_meant_is_refused(tmp_path):
    model, processor = tiny_vlm("llava")
    def asked(data=PAIRS, **settings): return train(tmp_path, data=data, **settings)
    with pytest.raises(Refusal, match="generate_samples"): asked(generate_samples=2)
    with pytest.raises(Refusal, match="layout='shared' is for texts"): asked(layout="shared")
    reply = [dict(role="assistant", content=[IMAGE, dict(type="text", text="cat")])]
    with pytest.raises(Refusal, match="chosen holds a picture"):
        asked([PAIRS[0] | dict(chosen=reply)])
    film = user(dict(type="video"), dict(type="text", text="?"))
    with pytest.raises(Refusal, match="part of type 'video'"):
        asked([PAIRS[0] | dict(prompt=film)])
    with pytest.raises(Refusal, match="only text is read here"):
        DPOTrainer(model, args=config(tmp_path), train_dataset=PAIRS,
                   processing_class=processor.tokenizer)
