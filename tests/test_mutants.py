"""The tests must be able to fail: mistakes seeded into a copy of the package, each of which some test has to notice.

A few run every time; all of them with `pytest tests/test_mutants.py -m slow -s`, which prints the score.
Run as a script, this file is the process that tries mutants: it loads torch once and forks for each."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    "One mistake: in `module`, `old` becomes `new`; at least one of `tests` must go red."
    what: str
    module: str
    old: str
    new: str
    tests: str              # node ids under tests/, separated by blanks
    often: bool = False     # tried on every run of the suite


MUTANTS = [
    # ---- the objective
    Mutant("KL weighed by the reference", "world", "p = logps.exp()\n    term", "p = ref_logps.exp()\n    term", "test_world.py::test_objective_is_its_top_minus_the_distance_to_the_optimum"),
    Mutant("sign of β in the best policy", "world", "F.log_softmax(ref_logps + rewards / beta, dim=-1)", "F.log_softmax(ref_logps - rewards / beta, dim=-1)", "test_world.py::test_dpo_optimum_is_the_closed_form", True),
    Mutant("β multiplied instead of divided", "world", "F.log_softmax(ref_logps + rewards / beta, dim=-1)", "F.log_softmax(ref_logps + rewards * beta, dim=-1)", "test_world.py::test_dpo_optimum_is_the_closed_form"),
    Mutant("total variation not halved", "world", ".abs().sum(-1) / 2", ".abs().sum(-1)", "test_world.py::test_total_variation_is_a_distance"),
    Mutant("the judge prefers the worse", "world", "torch.where(wins, first, second)", "torch.where(wins, second, first)", "test_world.py::test_pairs_follow_the_judge_everywhere"),
    Mutant("a reply compared with itself", "world", "torch.multinomial(ref, 2, generator", "torch.multinomial(ref, 2, True, generator", "test_world.py::test_pairs_repeat_with_their_seed_and_never_compare_a_reply_with_itself"),
    Mutant("β missing from the reward", "losses", "return beta * (policy_logps - ref_logps)", "return policy_logps - ref_logps", "test_losses.py::test_gradient_by_the_book"),
    Mutant("chosen and rejected exchanged in the margin", "losses", "margin = chosen_reward - rejected_reward - offset", "margin = rejected_reward - chosen_reward - offset", "test_variants.py::test_golden_values"),
    Mutant("log of a sigmoid", "losses", "loss = -F.logsigmoid(margin)\n", "loss = -margin.sigmoid().log()\n", "test_losses.py::test_huge_margins_stay_finite"),
    # ---- log-probabilities
    Mutant("labels not shifted", "logps", "z = in_full(logits[:, :-1])", "z = in_full(logits[:, 1:])", "test_logps.py::test_gradient_through_gather_mask_sum_and_loss"),
    Mutant("scored one place late", "logps", "len(prompt) + skip - 1    #", "len(prompt) + skip        #", "test_logps.py::test_mask_spells_out_what_is_scored", True),
    Mutant("end token not scored", "logps", "range(first, first + len(reply) - skip)\n        targets += reply[skip:]\n        owner += [i] * (len(reply) - skip)", "range(first, first + len(reply) - skip - 1)\n        targets += reply[skip:-1]\n        owner += [i] * (len(reply) - skip - 1)", "test_logps.py::test_probabilities_add_up_to_one"),
    Mutant("a mean for the sum", "logps", "return ReplyLogps(sums, lengths", "return ReplyLogps(sums / lengths, lengths", "test_logps.py::test_probabilities_add_up_to_one", True),
    Mutant("every token at position 0", "logps", "positions = torch.arange(T).expand_as(ids) * keep", "positions = torch.zeros_like(ids)", "test_logps.py::test_a_batch_is_its_rows_one_by_one"),
    Mutant("hidden states taken one place late", "logps", "at += range(first, first + len(reply) - skip)", "at += range(first + 1, first + 1 + len(reply) - skip)", "test_logps.py::test_a_batch_is_its_rows_one_by_one"),
    Mutant("statistics in half precision", "logps", "return x if x.dtype == torch.float64 else x.float()", "return x", "test_logps.py::test_half_precision_logits_are_summed_in_full", True),
    Mutant("softmax without its −1 at the target", "logps", "(g * here)[:, None])\n", "(0 * g * here)[:, None])\n", "test_logps.py::test_any_shape_of_chunk_and_slice", True),
    Mutant("target looked for in the wrong slice", "logps", "targets - s.start", "targets", "test_logps.py::test_any_shape_of_chunk_and_slice"),
    Mutant("last slice forgotten", "logps", "for i in range(0, n, size))", "for i in range(0, n - size + 1, size))", "test_logps.py::test_any_shape_of_chunk_and_slice"),
    Mutant("largest logit not put back", "logps", ".sum(-1).log_().add_(top)", ".sum(-1).log_()", "test_logps.py::test_any_shape_of_chunk_and_slice"),
    Mutant("soft cap not differentiated", "logps", "if slope is not None: d *= slope", "pass", "test_logps.py::test_any_shape_of_chunk_and_slice"),
    Mutant("head left replaced after an error", "logps", "del m.forward\n", "pass\n", "test_logps.py::test_the_model_is_left_as_it_was"),
    Mutant("soft cap applied twice", "logps", "for t, k, _ in saved: setattr(t, k, values[k])", "pass", "test_logps.py::test_gemma_soft_caps_its_logits_once"),
    Mutant("token weights ignored", "logps", "if batch.token_weights is not None:\n        weighted", "if False:\n        weighted", "test_logps.py::test_weights_count_token_by_token"),
    # ---- tokens
    Mutant("data may become control tokens", "turns",
           "return ids if (spelled, steer) == wrote else", "return ids if True else",
           "test_rows.py::test_controls_in_every_field", True),
    Mutant("letters between control tokens are looked up", "templates",
           "split_special_tokens=data", "split_special_tokens=False",
           "test_templates.py::test_an_unknown_character_is_no_control_token"),
    Mutant("the guard looks at nothing", "templates",
           "    if not bad: return ids\n    raise Refusal(\"text from data",
           "    return ids\n    raise Refusal(\"text from data",
           "test_templates.py::test_letters_that_become_a_control_token_on_the_way_are_refused"),
    Mutant("nobody proves the twin", "templates", "    if r.text is r.twin: return True",
           "    return True", "test_rows.py::test_template_that_rewrites_text_is_refused"),
    Mutant("a tag that is a control token is left alone", "templates",
           "p if k % 2 and p not in control else", "p if k % 2 else",
           "test_templates.py::test_fuzz_of_forms_and_families test_rows.py::test_controls_in_every_field"),
    Mutant("two end tokens", "turns", "[t[n:] for t in tails]",
           "[t[n:] + _end(tokenizer) for t in tails]",
           "test_rows.py::test_rows_are_the_templates_own_text"),
    Mutant("the line end behind the end token is scored", "turns",
           "return (len(r.text) if score_tail else ends[-1]), True", "return len(r.text), True",
           "test_rows.py::test_rows_are_the_templates_own_text"),
    Mutant("no end token on text", "turns", "[encode_text(tokenizer, r) + _end(tokenizer)",
           "[encode_text(tokenizer, r)", "test_rows.py::test_one_bos_where_the_tokenizer_puts_it"),
    Mutant("BOS forgotten", "turns", "ids = plain_bos(tokenizer) + _text_ids(tokenizer, prompt)",
           "ids = _text_ids(tokenizer, prompt)",
           "test_rows.py::test_one_bos_where_the_tokenizer_puts_it"),
    Mutant("a prompt that its reply changes", "turns", "n = _shared([asked, *tails])",
           "n = len(asked)",
           "test_templates.py::test_both_replies_stand_behind_one_prompt_where_one_takes_the_blank_along"),
    Mutant("a prompt rewritten by its reply passes", "turns",
           "<= border for t in twins): return border", "<= border for t in wholes): return border",
           "test_templates.py::test_a_template_that_forgets_is_refused"),
    Mutant("the day of a run is forgotten", "rows", "date=rules.date", "date=None",
           "test_templates.py::test_the_date_is_an_argument"),
    Mutant("a lost end is not counted", "rows", "len(a) < len(b)", "len(a) > len(b)",
           "test_rows.py::test_truncated_rows_are_counted_and_keep_one_prompt"),
    Mutant("checking stops at the first refusal", "rows", "            if stop: raise\n",
           "            raise\n", "test_templates.py::test_checking_refuses_what_encoding_refuses"),
    Mutant("one token more than the limit", "rows", 'return "reply cut", 0, max_length - p', 'return "reply cut", 0, max_length - p + 1', "test_rows.py::test_truncation_against_brute_force", True),
    Mutant("budget of the shorter reply", "rows", "longest = max(c, r)", "longest = min(c, r)", "test_rows.py::test_truncation_against_brute_force"),
    Mutant("the two replies cut to different prompts", "rows", "p = _whole_start(tokenizer, p[gone:])", "p = _whole_start(tokenizer, p[:len(p) - gone])", "test_rows.py::test_truncated_rows_are_counted_and_keep_one_prompt"),
    Mutant("a cut through a character", "rows", 'if not tokenizer.decode(kept[-8:]).endswith("\\ufffd"): return kept', "return kept", "test_rows.py::test_truncated_rows_are_counted_and_keep_one_prompt"),
    Mutant("a dropped row is not counted", "rows", "counts.by[verdict] += 1", "counts.by[verdict] += isinstance(row, Row)", "test_rows.py::test_truncated_rows_are_counted_and_keep_one_prompt"),
    Mutant("rows keyed by where they stand", "rows", "return h.hexdigest()", "return self.id", "test_rows.py::test_prefix_weights_offset_and_key test_rows.py::test_pad_equal_to_eos_changes_nothing test_rows.py::test_keys_are_content"),
    # ---- files of pairs
    Mutant("a repeated key is overwritten", "preferences", "object_pairs_hook=_pairs_once,",
           "object_pairs_hook=dict,", "test_preferences.py::test_refused", True),
    Mutant("a bad line is skipped", "reading",
           'if text.strip(" \\t\\r"): yield where, parse_json(text, where)',
           'if text.strip(" \\t\\r").endswith("}"): yield where, parse_json(text, where)',
           "test_preferences.py::test_refused"),
    Mutant("lines counted from zero", "reading", "for number in itertools.count(1):",
           "for number in itertools.count(0):", "test_preferences.py::test_refused", True),
    Mutant("lines split at U+2028", "reading",
           'yield number, text.removesuffix("\\n").removesuffix("\\r")',
           "yield from ((number, part) for part in text.splitlines())",
           "test_preferences.py::test_accepted"),
    Mutant("text is stripped", "preferences",
           "    if isinstance(value, str): return value\n    if isinstance(value, list) and any(",
           "    if isinstance(value, str): return value.strip()\n"
           "    if isinstance(value, list) and any(",
           "test_preferences.py::test_accepted"),
    Mutant("rows share structure with what was given", "preferences",
           "m = dict(m) if flat else without_nulls(m)", "pass",
           "test_preferences.py::test_keys_do_not_collide_and_rows_stay_as_they_were"),
    Mutant("a null of another row's tool is shown", "preferences",
           "for k, v in value.items() if v is not None}", "for k, v in value.items()}",
           "test_preferences.py::test_nulls_that_a_columnar_file_wrote_are_gone"),
    Mutant("a prompt column that says something else is passed over", "preferences",
           "if not _agrees(prompt, c[:k]): raise", "if False: raise",
           "test_preferences.py::test_a_prompt_that_is_not_theirs_is_refused_with_its_remedy"),
    Mutant("a prompt cut inside a word", "preferences",
           "k = blank if blank or a[:k].isascii() else k", "k = k",
           "test_preferences.py::test_text_without_a_prompt_splits_where_words_begin"),
    Mutant("messages written as text are scored as text", "layouts",
           'if isinstance(value, str): return value[:1] not in',
           'if isinstance(value, str): return True or value[:1] not in',
           "test_preferences.py::test_messages_written_as_text_are_parsed"),
    Mutant("a repeated prompt is learned as the reply", "reading",
           "pairs = take_off(pairs, did)", "pass",
           "test_preferences.py::test_replies_that_repeat_their_prompt_lose_it_and_are_counted"),
    Mutant("the first of several splits", "reading", "if len(hits) == 1: return hits[0]",
           "if hits: return hits[0]",
           "test_preferences.py::test_a_hub_snapshot_with_several_sets"),
    Mutant("a column that nothing reads is not named", "reading",
           "left.update(dict.fromkeys(names))", "pass",
           "test_preferences.py::test_columns_that_nothing_reads_are_named_once_with_the_nearest_name"),
    Mutant("the order hash is sorted too", "preferences",
           "return _hash_of(map(row_hash, self.rows))",
           "return _hash_of(sorted(map(row_hash, self.rows)))",
           "test_preferences.py::test_row_order_changes_one_hash_only"),
    Mutant("identical pairs only counted", "audit",
           "def exit_code(self): return 2 if self.refusals else 0",
           "def exit_code(self): return 0",
           "test_preferences.py::test_audit_names_every_class"),
    Mutant("swapped columns only counted", "audit",
           "return bool(self.found[name]) and (name in REFUSED or many)",
           "return bool(self.found[name]) and name in REFUSED",
           "test_preferences.py::test_doubts_are_counted_in_one_row_and_refused_in_most"),
    Mutant("leakage sees letters only as they are", "audit", "text.casefold().split()",
           "text.split()", "test_preferences.py::test_leakage_in_every_form"),
    # ---- labelled replies, and what the trainer keeps
    Mutant("a reply measured against its own prompt", "objective", "and o.prompt_ids != row.prompt_ids), None)", "), None)", "test_unpaired.py::test_a_neighbour_with_the_same_prompt_is_passed_over", True),
    Mutant("labels turned", "objective", "column(float(r.label) for r", "column(float(not r.label) for r", "test_unpaired.py::test_any_cut_is_the_plain_loop[bco-gpt2]"),
    Mutant("shares of a heap in float32", "departures", ".double() / m", " / m", "test_unpaired.py::test_any_cut_is_the_plain_loop[aot_unpaired-gpt2]"),
    Mutant("a mean over both labels", "objective", 'counts.get(k.rpartition("/")[2], sums["rows"])', 'sums["rows"]', "test_unpaired.py::test_trl_step_by_step[apo_zero_unpaired]"),
    Mutant("running means lost on resume", "objective", "if self.numbers.running: self.numbers.running.seen = dict(state)", "pass", "test_unpaired.py::test_a_run_goes_on_to_the_bit[bco]"),
    Mutant("the reference not asked again", "trainer", "        if self.probe: self.probe.check(what)", "        pass", "test_trainer.py::test_a_reference_that_moved_stops_the_run_at_its_checkpoint[frozen]"),
    Mutant("a reply that is not there is scored", "packing", "*range(b, b + n - 1)][skip:n]", "*range(b, b + n - 1)]", "test_unpaired.py::test_any_cut_is_the_plain_loop[bco-gpt2]"),
    # ---- results
    Mutant("a result written in place", "results", "os.replace(temporary, path)", "path.write_bytes(raw[:9]); __import__('time').sleep(.01); path.write_bytes(raw)", "test_results.py::test_a_killed_write_leaves_old_or_new"),
    Mutant("NaN recorded as a result", "results", "allow_nan=False", "allow_nan=True", "test_results.py::test_bad_values_are_refused_and_nothing_is_written", True),
    Mutant("a bootstrap that never gives the same interval twice", "results", "torch.Generator().manual_seed(seed)\n    index", "None\n    index", "test_results.py::test_bootstrap"),
]


# Written from the code alone, without a look at the tests, over the modules that the first list
# leaves out: the share that is caught is a rate, not a guard. `tests` are whole files.
BLIND = [
    Mutant("a query sees one key too many", "attention", ".tril(k - q)", ".tril(k - q + 1)", "test_attention.py"),
    Mutant("query heads beside the wrong key head", "attention", "x.repeat_interleave(shared, 1)", "x.repeat(1, shared, 1, 1)", "test_attention.py"),
    Mutant("the model's own scale of scores forgotten", "attention", "scale=scaling, dropout_p", "scale=None, dropout_p", "test_attention.py test_packing.py"),
    Mutant("a window twice as long passes", "attention", "longest > window", "longest > 2 * window", "test_attention.py"),
    Mutant("k3 with a wrong sign", "ppo", "d.expm1() - d)", "d.expm1() + d)", "test_ppo.py"),
    Mutant("advantage leaks over the end", "ppo", "advantage) * mask[:, t]", "advantage)", "test_survivors.py::test_an_advantage_ends_with_its_reply"),
    Mutant("the optimistic side of the clip", "ppo", "torch.maximum(-advantages * ratio", "torch.minimum(-advantages * ratio", "test_ppo.py"),
    Mutant("the smaller value error", "ppo", "torch.maximum((values - returns)", "torch.minimum((values - returns)", "test_ppo.py"),
    Mutant("β steered the wrong way", "ppo", "1 + self.rate *", "1 - self.rate *", "test_ppo.py"),
    Mutant("whitened over the padding", "ppo", "centred = (x - masked_mean(x, mask)) * mask", "centred = (x - x.mean()) * mask", "test_ppo.py"),
    Mutant("PPO's steered β lost on resume", "ppo_text", "run.control.coef, run.history = found[\"coef\"], found[\"history\"]", "run.history = found[\"history\"]", "test_survivors.py::test_a_steered_beta_goes_on_where_it_was"),
    Mutant("PPO's chance lost on resume", "ppo_text", "run.generator.set_state(found[\"chance\"])", "pass", "test_ppo.py"),
    Mutant("scores pushed away from zero", "reward_model", "+ centring * (", "- centring * (", "test_reward_model.py"),
    Mutant("scores of the two replies exchanged", "reward_model", "2 + reply // B", "3 - reply // B", "test_reward_model.py"),
    Mutant("the unit of scores not kept", "reward_model", "config.reward_scale = scale * scores.std().item()", "config.reward_scale = scale", "test_reward_model.py"),
    Mutant("an injected task with the row's own output", "secalign", "if r[\"output\"].strip() != row[\"output\"].strip()]", "if r is not row]", "test_survivors.py"),
    Mutant("the injected reply preferred", "secalign", "replies = dict(chosen=row[\"output\"].strip(), rejected=other[\"output\"].strip())", "replies = dict(chosen=other[\"output\"].strip(), rejected=row[\"output\"].strip())", "test_secalign.py"),
    Mutant("a heading may be forged", "secalign", "reserved_tokens(tokenizer), \"##\"}", "reserved_tokens(tokenizer)}", "test_survivors.py"),
    Mutant("the middle is the start", "secalign", "half = len(words) // 2", "half = 0", "test_secalign.py"),
    Mutant("new rows are sums", "secalign", "table[ids].mean(0)", "table[ids].sum(0)", "test_secalign.py"),
    Mutant("only the last letter of a mark goes", "hierarchy", "if found: del out[-len(found):]", "if found: del out[-1:]", "test_hierarchy.py"),
    Mutant("best of n counted one too few", "frontier", "below**n", "below**(n - 1)", "test_frontier.py"),
    Mutant("best of n may spend more", "frontier", "(n - 1) / n", "(n - 1) / (n + 1)", "test_frontier.py"),
    Mutant("the frontier sought at the wrong end", "frontier", "if at(middle).kl > d: low", "if at(middle).kl < d: low", "test_frontier.py"),
    Mutant("second best against worst", "align", "best, worst = r.index(max(r)), r.index(min(r))", "best, worst = r.index(sorted(r)[-2]), r.index(min(r))", "test_align.py::test_pairs_take_the_best_and_the_worst_and_count_ties"),
    Mutant("ties count as wins", "align", "(pair == 0) / 2", "(pair == 0)", "test_align.py"),
    Mutant("Llama's attention_dropout missed", "models", "if \"drop\" in key and isinstance(value, float): setattr", "if key.startswith(\"drop\") and isinstance(value, float): setattr", "test_models.py::test_no_dropout_finds_every_kind_of_it"),
    Mutant("a frozen reference in training mode", "models", "self.model, self.source, self.scorer = model.eval(), source, scorer", "self.model, self.source, self.scorer = model, source, scorer", "test_survivors.py"),
    Mutant("an adapter's reference in training mode", "models", "        self.policy.eval()\n", "", "test_survivors.py"),
    Mutant("a table read in training mode", "models", "model.training\n    model.eval()\n    for batch", "model.training\n    for batch", "test_survivors.py"),
    Mutant("a reference that stays where it was put", "models", "p.data.copy_(kept[name])", "pass", "test_models.py"),
    Mutant("the moving reference goes the other share", "models", "own.lerp_(theirs.to(own), alpha)", "own.lerp_(theirs.to(own), 1 - alpha)", "test_models.py"),
    Mutant("a harmed table is believed", "models", "if _table_sha(keys, values) != sha or", "if", "test_survivors.py"),
    Mutant("a table of another context is believed", "models", "    if said != json.dumps(context, sort_keys=True, default=str): return {}\n", "", "test_contract.py::test_a_table_of_another_context_is_read_again"),
    Mutant("a chat template may name a path", "models", "    check_template_names(tokenizer, where)\n", "", "test_manifest.py"),
    Mutant("a shard may lie outside", "models", "if out := [n for n in map(str, named) if not inside(n)]:", "if out := []:", "test_manifest.py"),
    Mutant("the card's weights not looked at", "models", "    check_files(folder, known_weights(folder), \"model folder\")\n", "", "test_manifest.py"),
    Mutant("an old checkpoint deleted under its own name", "checkpoints", "os.rename(path, hidden / path.name)", "shutil.rmtree(path)", "test_survivors.py"),
    Mutant("no fsync in export", "checkpoints", "        fsync(path)\n        goal", "        goal", "test_survivors.py"),
    Mutant("no fsync of a model folder", "manifest", "    for path in sorted(folder.rglob(\"*\")): fsync(path)\n", "", "test_survivors.py"),
    Mutant("the oldest goes though the newest is damaged", "checkpoints", "    verify(newest)\n", "", "test_checkpoints.py::test_nothing_goes_while_the_newest_is_damaged"),
    Mutant("moments rounded to the weights' type", "checkpoints", "and here[key].dtype != value.dtype:", "and False:", "test_checkpoints.py::test_bfloat16_weights_and_float32_moments test_checkpoints.py::test_optimizer_round_trip"),
    Mutant("names of tensors weigh nothing", "checkpoints", "HEADER = 300", "HEADER = 0", "test_checkpoints.py::test_a_prediction_is_never_too_little_and_within_a_tenth"),
    Mutant("a moving reference weighs nothing", "port", "dict(scheduler=scheduler, rng=rng, parts=parts)", "dict(scheduler=scheduler, rng=rng)", "test_checkpoints.py::test_a_prediction_is_never_too_little_and_within_a_tenth"),
    Mutant("a name may lead out", "manifest", "and \"..\" not in path.parts", "", "test_manifest.py test_checkpoints.py::test_manifest_stays_inside"),
    Mutant("sizes alone compared", "manifest", "if have[\"sha256\"] != want[\"sha256\"]:", "if False:", "test_manifest.py"),
    Mutant("a card that speaks of other weights meanwhile", "checkpoints", "    note_weights(target, {})\n", "", "test_manifest.py"),
    Mutant("anybody's folder is ours", "manifest", "if any(next(folder.glob(kind), None) for kind in kinds): new_folder", "if False: new_folder", "test_manifest.py"),
    Mutant("a live writer is swept", "results", "or (held := hold(path)) is None", "or (held := os.open(path, os.O_RDONLY)) is None", "test_manifest.py"),
    Mutant("dropout is not part of the contract", "port", "                  dropout=dropout_rates(bare_model(trainer)),\n", "", "test_contract.py"),
    Mutant("the scheduler's settings are not part of it", "run_folder", "\"lr_scheduler_kwargs\", ", "", "test_contract.py"),
    Mutant("tables are not bound", "trainer", "mode=self.trainer.mode, table=table,", "mode=self.trainer.mode,", "test_contract.py"),
    Mutant("the loss since the last line counted twice", "port", "trainer._total_loss_scalar = -loop[\"loss\"].item()", "trainer._total_loss_scalar = 0.", "test_checkpoints.py::test_continued_to_the_bit"),
    Mutant("an evaluation in training mode", "step", "    model.eval()\n    try: yield model", "    try: yield model", "test_survivors.py"),
    Mutant("slots forgotten on resume", "objective", "self.slots, self.seen, self.texts = state[\"slots\"]", "self.slots, self.seen, self.texts = 0", "test_survivors.py"),
    Mutant("a reference's key without its autocast", "trainer", "                autocast=[a.bf16, a.fp16], max_length", "                max_length", "test_survivors.py"),
    Mutant("NFC where NFKC is meant", "audit", "normalize(\"NFKC\"", "normalize(\"NFC\"", "test_preferences.py::test_leakage_in_every_form test_survivors.py"),
    Mutant("the order of fields makes another pair", "preferences", "+ late, sort_keys=True, default=str)", "+ late, default=str)", "test_survivors.py"),
    Mutant("the system text in a user's turn", "rows", "prompt = [{\"role\": \"system\", \"content\": system}, *prompt]", "prompt = [{\"role\": \"user\", \"content\": system}, *prompt]", "test_rows.py test_templates.py"),
    Mutant("z₀ with a gradient", "departures", "(policy_logps - ref_logps).detach().mean()", "(policy_logps - ref_logps).mean()", "test_variants.py test_unpaired.py"),
    Mutant("Granite's scale the wrong way", "logps", "scale=scale / (getattr(config, \"logits_scaling\", None) or 1.)", "scale=scale * (getattr(config, \"logits_scaling\", None) or 1.)", "test_logps.py test_survivors.py"),
    Mutant("a held-out prompt trained on", "align", "groups.setdefault(prompt_key(row), [])", "groups.setdefault(k, [])", "test_align.py::test_hold_out_keeps_prompts_whole"),
]

def tree(folder, mutant=None):
    "A copy of what the tests need, with the mistake in it; says whether the text to change stands there exactly once."
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / name, folder)
    for name in ("dpo_literate", "tests"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    (folder / "nbs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "nbs" / "00b_results.ipynb", folder / "nbs")
    shutil.copytree(ROOT / "nbs" / "results", folder / "nbs" / "results", dirs_exist_ok=True)
    if not mutant: return True
    path = folder / "dpo_literate" / f"{mutant.module}.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return text.count(mutant.old) == 1


class Catcher:
    "Writes down the first test that fails."
    def __init__(self, path): self.path = path
    def pytest_runtest_logreport(self, report):
        if report.failed and not self.path.exists(): self.path.write_text(report.nodeid.removeprefix("tests/"))
    def pytest_collectreport(self, report): self.pytest_runtest_logreport(report)


def in_child(folder, tests):
    "Exit code of the tests in a forked process, whose package is the copy."
    if child := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "-o", "addopts=", "-m", "not slow",
                            *(f"tests/{t}" for t in tests.split())], [Catcher(Path(folder) / "caught.txt")])
    os._exit(int(code))


def verdict(mutant):
    "caught and by which test | missed | stale (the text is not there) | error (the tests did not run)."
    with tempfile.TemporaryDirectory() as folder:
        if not tree(Path(folder), mutant): return "stale", ""
        said = {0: "missed", 1: "caught"}.get(in_child(folder, mutant.tests), "error")
        by = Path(folder) / "caught.txt"
        return said, by.read_text() if by.exists() else ""


def chosen(which):
    "often: a few of the list; all: the list; blind: the other one; module:NAME; or some, named by words in them."
    if which.startswith("module:"): return [m for m in (*MUTANTS, *BLIND) if m.module == which[7:]]
    if which in ("often", "all"): return [m for m in MUTANTS if m.often or which == "all"]
    return [m for m in BLIND if which == "blind" or any(w in m.what for w in which.split(","))]


def main(which):
    "Print one line of JSON: what became of each mutant, and of the copy without a mistake."
    import datasets, hypothesis, peft, tokenizers, torch, transformers  # noqa: F401  once, before the forks
    torch.set_num_threads(1)
    found = {}
    for m in chosen(which):
        found[m.what] = verdict(m)
        print(f"{found[m.what][0]:7s} {m.module}: {m.what}  {found[m.what][1]}", file=sys.stderr, flush=True)
    tests = " ".join(dict.fromkeys(t for m in chosen(which) for t in m.tests.split()))
    if which in ("often", "all"):
        with tempfile.TemporaryDirectory() as folder:
            tree(Path(folder))
            found["no mistake"] = {0: "green"}.get(in_child(folder, tests), "red"), ""
    print(json.dumps(found))


def tried(which):
    "What became of the mutants, in a fresh process."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, __file__, which], cwd=tempfile.gettempdir(), env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


def judge(found):
    "Print the score, and which test caught what; fail on a mutant that lives, and where even the right package is red."
    right, caught = found.pop("no mistake", ("green", ""))[0], sum(v == "caught" for v, _ in found.values())
    print(f"\n{caught} of {len(found)} mutants caught")
    for what, (said, by) in found.items(): print(f"  {said:7s} {what}: {by}")
    assert right == "green", "the tests are red without any mistake"
    assert not {what: v for what, (v, _) in found.items() if v != "caught"}


def test_a_few_mutants_are_caught(): judge(tried("often"))


@pytest.mark.slow
def test_every_mutant_is_caught(): judge(tried("all"))


@pytest.mark.slow
def test_mistakes_made_without_a_look_at_the_tests_are_caught(): judge(tried("blind"))


def test_there_are_enough_and_each_is_one_change():
    every = [*MUTANTS, *BLIND]
    assert len(MUTANTS) >= 40 and len(BLIND) >= 60 and sum(m.often for m in MUTANTS) >= 8
    assert len({m.what for m in every}) == len(every) and all(m.old != m.new for m in every)
    assert len({m.module for m in every}) >= 25


@pytest.mark.parametrize("m", [*MUTANTS, *BLIND], ids=lambda m: m.what)
def test_the_text_to_change_stands_there_once(m):
    text = (ROOT / "dpo_literate" / f"{m.module}.py").read_text(encoding="utf-8")
    assert text.count(m.old) == 1, (m.what, text.count(m.old))


def test_the_tests_they_name_exist():
    named = {t for m in (*MUTANTS, *BLIND) for t in m.tests.split()}
    gone = [t for t in sorted(named) if f"def {t.split('::')[-1].split('[')[0]}(" not in (ROOT / "tests" / t.split("::")[0]).read_text(encoding="utf-8")
            and "::" in t]
    assert not gone


if __name__ == "__main__": main(sys.argv[1])
