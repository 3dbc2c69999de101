"""Break one line of the package at a time; the named tests must turn red (`make mutants`).

Each entry stands for a point of the design that a plausible slip would break silently. A mutation whose
tests stay green is a hole in the tests. `python tests/mutants.py 5.2 5.10` runs the entries of two points.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
HUNG_SECONDS = 300  # a mutation that makes a test run forever counts as noticed
COPIED = ("qwen2vl_sft", "tests", "settings.ini", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    point: str  # which point of the design, such as "5.2"
    slip: str  # what is broken, in words
    module: str  # file under the project root
    old: str  # occurs exactly once in it
    new: str
    tests: tuple[str, ...]  # node ids; each must fail


GAPS = 'tests/test_comparison_gaps.py::test_'
MUTATIONS: list[Mutation] = [
    Mutation(
        '4.guess', "folders that look alike are one class", 'qwen2vl_sft/data/guess.py',
        'if len(explicit) > 1:', 'if False:',
        ('tests/test_data_guess.py::test_classes_are_as_the_folders_say',),
    ),
    Mutation(
        '4.guess', "an object becomes a label of Python source text", 'qwen2vl_sft/data/sources.py',
        'if isinstance(value, list | tuple | dict):\n        return None, f"label_no_text', 'if False:\n        return None, f"label_no_text',
        ('tests/test_data_sources.py::test_labels_that_are_lists_or_objects',),
    ),
    Mutation(
        '4.guess', "a column of splits is ignored", 'qwen2vl_sft/data/guess.py',
        'if texts := split_texts(counts):', 'if texts := {}:',
        ('tests/test_data_guess.py::test_a_column_of_splits_divides_the_table',),
    ),
    Mutation(
        '4.guess', "where takes every row", 'qwen2vl_sft/data/sources.py',
        'rows = rows_where(rows, accepted) if accepted else rows', 'rows = rows',
        ('tests/test_data_sources.py::test_where_takes_rows_by_a_column', 'tests/test_data_guess.py::test_a_column_of_splits_divides_the_table'),
    ),
    Mutation(
        '4.guess', "each numbered part is a table of its own", 'qwen2vl_sft/data/guess.py',
        'part = PART.search(file.name)', 'part = None',
        ('tests/test_data_guess.py::test_numbered_parts_are_one_table_of_their_split',),
    ),
    Mutation(
        '4.guess', "a folder beside train and test makes classes of them", 'qwen2vl_sft/data/guess.py',
        'for each in named}) > 1 or named == inside)', 'for each in named}) > 1 and named == inside)',
        ('tests/test_data_guess.py::test_a_folder_beside_the_splits_is_no_class',),
    ),
    Mutation(
        'gaps', "a question that was never asked is evidence for the other row", 'qwen2vl_sft/comparison/board.py',
        'right = samples["outcome"].eq("correct").astype(float).where(samples["outcome"].isin(RESPONDED))',
        'right = samples["outcome"].eq("correct").astype(float)',
        (f'{GAPS}what_was_never_asked_or_failed_is_evidence_for_no_row', f'{GAPS}a_row_without_any_response_is_compared_with_nothing'),
    ),
    Mutation(
        'gaps', "the interval of a lead counts what was never asked as wrong", 'qwen2vl_sft/comparison/board.py',
        'samples["row"].isin(rows) & samples["outcome"].isin(RESPONDED)]', 'samples["row"].isin(rows)]',
        (f'{GAPS}what_was_never_asked_or_failed_is_evidence_for_no_row',),
    ),
    Mutation(
        'gaps', "a row with failed samples passes for a complete one", 'qwen2vl_sft/comparison/samples.py',
        'partial=cells["n"] - cells["error"] < full', 'partial=cells["n"] < full',
        (f'{GAPS}the_denominator_stays_and_the_row_is_marked', f'{GAPS}plots_leave_out_what_is_not_fully_scored_and_say_so'),
    ),
    Mutation(
        'gaps', "a refusal is left out of tests as if nothing had come back", 'qwen2vl_sft/comparison/samples.py',
        'if outcome != "error")', 'if outcome not in ("error", "refused", "off_list"))',
        (f'{GAPS}a_refusal_is_a_response_and_stays_in_the_tests',),
    ),
    Mutation(
        'gaps', "strict figures leave out what failed", 'qwen2vl_sft/comparison/board.py',
        'lines = samples[["row", "task", "outcome", "cluster"]].assign(right=samples["outcome"].eq("correct"))',
        'lines = samples.loc[samples["outcome"] != "error", ["row", "task", "outcome", "cluster"]].assign(right=samples["outcome"].eq("correct"))',
        (f'{GAPS}the_denominator_stays_and_the_row_is_marked',),
    ),
    Mutation(
        'gaps', "a run that goes on is better than when it was stopped", 'qwen2vl_sft/comparison/scoreboard.py',
        'board.samples[board.samples["outcome"].isin(RESPONDED)] for board', 'board.samples for board',
        (f'{GAPS}a_run_that_goes_on_after_its_budget_is_not_better_than_before',),
    ),
    Mutation(
        'gaps', "one row that failed empties the common support", 'qwen2vl_sft/comparison/board.py',
        'counted = samples[~samples["row"].isin(sparse_rows(samples))]', 'counted = samples',
        (f'{GAPS}a_bad_row_does_not_empty_the_common_support',),
    ),
    Mutation(
        'gaps', "an unknown price is a price of nothing", 'qwen2vl_sft/comparison/samples.py',
        'return (np.nan, "") if cost == 0 and not free else', 'return',
        (f'{GAPS}an_unknown_price_is_no_price_and_an_estimate_is_marked',),
    ),
    Mutation(
        'gaps', "costs in two currencies share an axis", 'qwen2vl_sft/comparison/plots.py',
        'priced.any() and len(currencies) < 2 and', 'priced.any() and',
        (f'{GAPS}a_price_of_zero_is_known_and_currencies_are_not_mixed',),
    ),
    Mutation(
        'gaps', "widened intervals leave what is possible", 'qwen2vl_sft/comparison/statistics.py',
        'np.clip(np.quantile(means, [tail, 1 - tail]), *bounds)', 'np.quantile(means, [tail, 1 - tail])',
        (f'{GAPS}no_interval_leaves_0_to_100',),
    ),
    Mutation(
        'gaps', "one API model votes once a row", 'qwen2vl_sft/comparison/mistakes.py',
        'distinct_models(board, voters(board))', 'voters(board)',
        (f'{GAPS}one_api_model_in_several_rows_has_one_vote_and_free_answers_are_no_confidence',),
    ),
    Mutation(
        'gaps', "free answers alone contradict a label with confidence", 'qwen2vl_sft/comparison/mistakes.py',
        '(stated & set(models) or not sure)', 'True',
        (f'{GAPS}one_api_model_in_several_rows_has_one_vote_and_free_answers_are_no_confidence',),
    ),
    Mutation(
        'gaps', "a smaller model of the same family passes for the one asked for", 'qwen2vl_sft/comparison/findings.py',
        '(\\d[\\d.-]*|latest)', '(.*)',
        (f'{GAPS}another_model_that_answered_is_named',),
    ),
    Mutation(
        'api', "turns that came in a pause are all taken at its end", 'qwen2vl_sft/scoring/remote.py',
        'while session.paused > time.monotonic() and not session.is_over():', 'while False:',
        ('tests/test_scoring_remote.py::test_after_a_pause_requests_leave_at_the_stated_pace',),
    ),
    Mutation(
        'api', "a run that is over waits on", 'qwen2vl_sft/scoring/remote.py',
        'while not (task.done() or session.is_over()):', 'while not task.done():',
        ('tests/test_scoring_remote.py::test_an_interrupted_notebook_does_not_wait_for_the_end_of_a_pause',),
    ),
    Mutation(
        'api', "a setting that the model refuses costs an attempt", 'qwen2vl_sft/scoring/remote.py',
        'self.other + (not failure.leaves_out and not failure.limited)', 'self.other + (not failure.limited)',
        ('tests/test_scoring_remote.py::test_settings_that_the_model_refuses_are_left_out',),
    ),
    Mutation(
        'api.faults', "a refused field of extra is sent for ever", 'qwen2vl_sft/scoring/remote.py',
        '    if name in extra:\n', '    if name in extra and name not in LEFT_OUT:\n',
        ('tests/test_scoring_api_faults.py::test_a_refused_field_of_extra_is_not_sent_for_ever[seed]',),
    ),
    Mutation(
        'api.faults', "a request that never left is paid for", 'qwen2vl_sft/scoring/remote.py',
        'Failed(storable(" ".join(words.split())[:300]), again=True, charged=bool(left))', 'Failed(storable(" ".join(words.split())[:300]), again=True, charged=True)',
        ('tests/test_scoring_api_faults.py::test_a_request_that_never_left_costs_nothing[nobody]',),
    ),
    Mutation(
        'api.faults', "a request that timed out is free", 'qwen2vl_sft/scoring/remote.py',
        'left.append(event)', 'pass',
        ('tests/test_scoring_api_faults.py::test_a_request_that_left_counts_at_its_expected_cost',),
    ),
    Mutation(
        'api.key', "an escaped key is not the key", 'qwen2vl_sft/scoring/remote.py',
        'return key_pattern(key).sub("[key]", text)', 'return text.replace(key, "[key]")',
        tuple(f'tests/test_scoring_api_faults.py::test_a_key_that_a_service_repeats_escaped_is_blotted_out[{mode}]' for mode in ('401 escaped', '200 in numbers')),
    ),
    Mutation(
        'api.key', "a word that stands for no key is blotted out of answers", 'qwen2vl_sft/scoring/remote.py',
        'if status >= 400 or is_secret(session.key):', 'if True:',
        ('tests/test_scoring_api_faults.py::test_a_word_that_stands_for_a_key_changes_no_answer[green]',),
    ),
    Mutation(
        'api.run', "what was asked before a price was known is free", 'qwen2vl_sft/scoring/remote.py',
        'return self.store.usage(self.run)["cost"] + (self', 'return self.store.usage(self.run)["cost"] + 0 * (self',
        ('tests/test_scoring_api_faults.py::test_what_was_asked_before_a_price_was_known_counts_too',),
    ),
    Mutation(
        'api.run', "Ctrl-C drops what is in flight", 'qwen2vl_sft/scoring/remote.py',
        'if session.interrupted and going:', 'if going:',
        ('tests/test_scoring_api_faults.py::test_ctrl_c_brings_home_what_is_in_flight',),
    ),
    Mutation(
        'api.run', "another suite is asked about", 'qwen2vl_sft/scoring/remote.py',
        '    check_suite(experiment, prepared.suite)\n', '',
        ('tests/test_scoring_api_faults.py::test_another_suite_is_refused_before_anything_is_asked',),
    ),
    Mutation(
        'api.run', "what an earlier command was told is forgotten", 'qwen2vl_sft/scoring/remote.py',
        'reason = before if before and (not now or', 'reason = before if before and (not now and',
        ('tests/test_scoring_api_faults.py::test_a_run_without_an_answer_says_why_and_fails',),
    ),
    Mutation(
        'api.run', "a run whose last questions always fail is given up", 'qwen2vl_sft/scoring/remote.py',
        'or (session.has_worked and', 'or (False and',
        ('tests/test_scoring_api_faults.py::test_one_answer_among_failures_is_enough_to_go_on',),
    ),
    Mutation(
        'api.cost', "a proxy's page is paid for", 'qwen2vl_sft/scoring/remote.py',
        "if body.lstrip()[:1] == \"{\":", 'if True:',
        ('tests/test_scoring_api_faults.py::test_what_is_no_answer_says_why_and_costs_what_it_may_have_cost[page-HTTP 200, but no chat completion: Log in to the proxy-0.0]',),
    ),
    Mutation(
        'api.cost', "a negative usage lifts the budget", 'qwen2vl_sft/scoring/remote.py',
        'return found if all(0 <= tokens < 10**9 for tokens in found) and found[2] <= found[0] else None', 'return found',
        ('tests/test_scoring_api_faults.py::test_a_usage_that_cannot_be_is_estimated[negative]',),
    ),
    Mutation(
        'api.faults', "a run without any answer has worked", 'qwen2vl_sft/scoring/remote.py',
        'if len(failed) and len(failed) == len(rows):', 'if False:',
        ('tests/test_scoring_api_faults.py::test_a_run_without_an_answer_says_why_and_fails',),
    ),
    Mutation(
        'api.faults', "a service that answers now and then is given up", 'qwen2vl_sft/scoring/remote.py',
        'works = session.counts["answered"] or', 'works =',
        ('tests/test_scoring_api_faults.py::test_one_answer_among_failures_is_enough_to_go_on',),
    ),
    Mutation(
        'api.faults', "a question that failed before the end was not asked", 'qwen2vl_sft/scoring/remote.py',
        'if failure.unasked and tries.last:', 'if False:',
        ('tests/test_scoring_api_faults.py::test_a_question_that_failed_before_the_end_says_so',),
    ),
    Mutation(
        '5.13.shared', "rows of tasks that begin otherwise are scored together", 'qwen2vl_sft/scoring/suite.py',
        'first.setdefault((images[place], before(own[place])), (data, place))', 'first.setdefault((images[place], ()), (data, place))',
        ('tests/test_scoring_suite.py::test_rows_of_no_common_picture_or_beginning_do_not_ride',),
    ),
    Mutation(
        '5.13.shared', "a task's own part files take the numbers of those it rode in", 'qwen2vl_sft/scoring/experiment.py',
        'max(following.get(name, 0) for name in others)', '0',
        ('tests/test_scoring_suite.py::test_tasks_about_the_same_pictures_are_scored_together_as_they_are_alone',),
    ),
    Mutation(
        '5.13.shared', "of two processes one scores again what rode with the other's rows", 'qwen2vl_sft/scoring/experiment.py',
        'taken = {(other.task.name, place) for rows in work.riders.values() for other, place in rows}', 'taken = set()',
        ('tests/test_scoring_suite.py::test_two_processes_share_tasks_about_the_same_pictures',),
    ),
    Mutation(
        '5.13.shared', "a task about some of the pictures gets the first ones' answers", 'qwen2vl_sft/scoring/suite.py',
        'prompts.branch().only(list(rows))', 'prompts.branch().only(list(range(len(rows))))',
        ('tests/test_scoring_suite.py::test_tasks_about_the_same_pictures_are_scored_together_as_they_are_alone',),
    ),
    Mutation(
        '5.14.shared', "the self-test asks one task alone where several are scored together", 'qwen2vl_sft/scoring/suite.py',
        'found = Apart(tokens=max(tree.depths) + 2)\n    if others and share_ending(samples):', 'found = Apart(tokens=max(tree.depths) + 2)\n    if False:',
        ('tests/test_scoring_suite.py::test_the_self_test_asks_beside_the_other_tasks',),
    ),
    Mutation(
        '5.13.shared', "a second question's positions go on after the first one's", 'qwen2vl_sft/scoring/labels.py',
        'self.depths.append(self.depths[node] + 1 if node >= 0 else 0)', 'self.depths.append(len(self.depths))',
        ('tests/test_correctness.py::test_5_13_tasks_about_one_picture_share_its_beginning_and_equal_stock_forwards[base]',),
    ),
    Mutation(
        '5.13.shared', "prompts that begin otherwise are taken to begin alike", 'qwen2vl_sft/model/prefill.py',
        'return tuple(ids[:place]), tuple(ids[place + 1 :])', 'return (), tuple(ids[place + 1 :])',
        ('tests/test_correctness.py::test_5_13_tasks_about_one_picture_share_its_beginning_and_equal_stock_forwards[question first]',),
    ),
    Mutation(
        '5.13.shared', "a free answer behind a shared beginning starts at the question's position", 'qwen2vl_sft/model/prefill.py',
        'return replace(longer, positions=prompts.positions + count, last=hidden[:, -1])', 'return replace(longer, positions=prompts.positions, last=hidden[:, -1])',
        ('tests/test_correctness.py::test_5_13_branches_of_a_beginning_do_not_see_each_other',),
    ),
    Mutation(
        '5.13.shared', "a branch's tokens stay in the beginnings' cache", 'qwen2vl_sft/model/prefill.py',
        'keys_values.layers = [copy.copy(layer) for layer in keys_values.layers]', 'pass',
        ('tests/test_correctness.py::test_5_13_branches_of_a_beginning_do_not_see_each_other',),
    ),
    Mutation(
        '5.13.shared', "each task reads the beginning for itself", 'qwen2vl_sft/scoring/labeler.py',
        'for tasks in sharing(labeler, own):', 'for tasks in ([task] for task in labeler.tasks):',
        ('tests/test_correctness.py::test_5_13_tasks_about_one_picture_share_its_beginning_and_equal_stock_forwards[base]',),
    ),
    Mutation(
        '4', "a copy of a train picture is let in with the source of a test row", 'qwen2vl_sft/data/prepare.py',
        'if last[number] and len(places) > 1:', 'if place[number] is None and len(places) > 1:',
        ('tests/test_data_prepare.py::test_a_copy_of_a_train_picture_with_the_source_of_a_test_row_is_quarantined',),
    ),
    Mutation(
        '4', "large pictures are hashed by whole factors", 'qwen2vl_sft/data/audit.py',
        'Image.Resampling.LANCZOS, reducing_gap=3.0)', 'Image.Resampling.BOX)',
        ('tests/test_data_audit.py::test_the_hash_is_imagehashs_whatever_the_size',),
    ),
    Mutation(
        '5.6', "a picture's only frame meets the first frame's weights only", 'qwen2vl_sft/model/fused.py',
        '(weight.sum(2), patches)', '(weight[:, :, 0], patches)',
        ('tests/test_model_fused.py::test_the_towers_output_and_gradients_are_the_stock_ones',),
    ),
    Mutation(
        '5.6', "in half precision the frames' weights are added", 'qwen2vl_sft/model/fused.py',
        '(weight.sum(2), patches) if _is_plain(weight) else', '(weight.sum(2), patches) if True else',
        ('tests/test_model_fused.py::test_in_half_precision_a_picture_of_one_frame_meets_the_weights_of_both',),
    ),
    Mutation(
        '5.9', "frozen parts that peft sets to evaluation stay so", 'qwen2vl_sft/training/trainer.py',
        'all(part.training == mode for part in parts)', 'model.training == mode',
        ('tests/test_training_trainer.py::test_a_continued_run_ends_with_the_same_bits[qlora]',),
    ),
    Mutation(
        '5.12', "a merge's rotary frequencies are rounded with its weights", 'qwen2vl_sft/model/load.py',
        'weight.data = weight.data.to(dtype)', 'module.to(dtype)',
        ('tests/test_export.py::test_the_gate_judges_what_a_reader_will_load',),
    ),
    Mutation(
        '5.4', "under autocast packed attention computes in float32", 'qwen2vl_sft/model/attention.py',
        'if torch.is_autocast_enabled(query.device.type):', 'if False:',
        ('tests/test_correctness.py::test_5_4_under_autocast_packed_attention_is_in_half_precision',),
    ),
    Mutation(
        '6', "the plan forgets that FSDP divides the weights", 'qwen2vl_sft/training/plan.py',
        'if weights_are_sharded():', 'if False:',
        ('tests/test_training_plan.py::test_full_7b_fits_eight_gpus_that_divide_its_weights',),
    ),
    Mutation(
        '5.14', "outputs from the vision cache stay on the CPU beside the GPU's", 'qwen2vl_sft/scoring/suite.py',
        'sample.features = sample.features.to(device)', 'sample.features = sample.features',
        ('tests/test_scoring_suite.py::test_outputs_from_the_cache_and_fresh_ones_meet_on_the_models_device',),
    ),
    Mutation(
        '5.14', "a GPU's logits are rounded to bfloat16", 'qwen2vl_sft/model/prefill.py',
        'if hidden.device.type == "cuda" and halves', 'if hidden.device.type == "xpu" and halves',
        ('tests/test_scoring_suite.py::test_logits_of_half_precision_states_are_not_rounded_on_a_gpu',),
    ),
    Mutation(
        '5.14', "a label that moves as far as it likes passes the self-test", 'qwen2vl_sft/scoring/suite.py',
        'if not exact and apart.moved >', 'if exact and apart.moved >',
        ('tests/test_scoring_suite.py::test_a_label_that_moves_further_than_rounding_can_move_it_stops_the_run',),
    ),
    Mutation(
        '5.14', "pairs of labels two steps apart are no near ties", 'qwen2vl_sft/scoring/suite.py',
        'NEAR_TIE = 2 * STEP', 'NEAR_TIE = STEP',
        ('tests/test_scoring_suite.py::test_pairs_of_labels_one_and_two_steps_of_bfloat16_apart_are_near_ties', 'tests/test_scoring_suite.py::test_a_near_tie_stops_no_model_in_bfloat16'),
    ),
    Mutation(
        '4.1', "a quote that is never closed swallows the rest of a table", 'qwen2vl_sft/data/sources.py',
        'delimiter=delimiter, strict=True, quoting', 'delimiter=delimiter, quoting',
        ('tests/test_data_sources.py::test_a_stray_quote_swallows_no_row',),
    ),
    Mutation(
        '4.2', "tasks over the same pictures draw their splits apart", 'qwen2vl_sft/data/prepare.py',
        'settle_splits(draw, wanted) for draw, wanted', 'settle_splits(draw) for draw, wanted',
        ('tests/test_data_prepare.py::test_no_task_trains_on_what_a_later_one_tests', 'tests/test_data_prepare.py::test_two_questions_about_the_same_pictures_share_no_test_and_train'),
    ),
    Mutation(
        '4.2', "near duplicates of different tasks are no unit", 'qwen2vl_sft/data/prepare.py',
        'np.stack([pictures[rows], pictures[near[rows]]], 1)', 'np.stack([pictures[rows], pictures[rows]], 1)',
        ('tests/test_data_prepare.py::test_no_task_trains_on_what_a_later_one_tests',),
    ),
    Mutation(
        '4.2', "a source does not count between tasks", 'qwen2vl_sft/data/prepare.py',
        'in (("sha256", "kept"), ("source", "sourced")):', 'in (("sha256", "kept"),):',
        ('tests/test_data_prepare.py::test_no_task_trains_on_what_a_later_one_tests',),
    ),
    Mutation(
        '4.2', "new rows test what another task trains on", 'qwen2vl_sft/data/prepare.py',
        'split = next(split for split in ("train", "test", "validation")', 'split = next(split for split in ("test", "train", "validation")',
        ('tests/test_data_prepare.py::test_given_and_earlier_splits_are_followed_by_new_rows',),
    ),
    Mutation(
        '4.2', "shared units are dealt without regard to shares", 'qwen2vl_sft/data/prepare.py',
        ' - cells[task][label][split] / cells[task][label][None]', '',
        ('tests/test_data_prepare.py::test_tasks_over_the_same_pictures_have_one_split_and_their_shares',),
    ),
    Mutation(
        '4.2', "a given train is emptied into validation", 'qwen2vl_sft/data/prepare.py',
        'if draw.pool == "train" and rows', 'if draw.pool == "-" and rows',
        ('tests/test_data_prepare.py::test_no_task_trains_on_what_a_later_one_tests',),
    ),
    Mutation(
        '4.2', "rows with one picture are compared in two buckets", 'qwen2vl_sft/data/audit.py',
        '(keys[rows].astype(np.uint64) * SPREAD', '(np.arange(rows.start, rows.stop).astype(np.uint64) * SPREAD',
        ('tests/test_data_prepare.py::test_small_buckets_give_the_same_files',),
    ),
    Mutation(
        '4.5', "long columns stay in memory", 'qwen2vl_sft/data/audit.py',
        'if count <= BUCKET:\n        return np.zeros', 'if True:\n        return np.zeros',
        ('tests/test_data_prepare.py::test_memory_does_not_grow_with_the_rows',),
    ),
    Mutation(
        '4.5', "an order over the rows stays in memory", 'qwen2vl_sft/data/audit.py',
        '    if count <= BUCKET:\n        return np.lexsort', '    if True:\n        return np.lexsort',
        ('tests/test_data_prepare.py::test_no_array_over_the_rows_is_in_memory',),
    ),
    Mutation(
        '4.5', "what is picked out of an array stays in memory", 'qwen2vl_sft/data/audit.py',
        'found = zeros(len(numbers), (array.dtype, array.shape[1:]), folder)', 'found = np.zeros((len(numbers), *array.shape[1:]), array.dtype)',
        ('tests/test_data_prepare.py::test_no_array_over_the_rows_is_in_memory',),
    ),
    Mutation(
        '4.5', "an order over many buckets forgets where a digit's rows end", 'qwen2vl_sft/data/audit.py',
        'begin[values] += many', 'begin[values] += 1',
        ('tests/test_data_audit.py::test_an_order_over_many_buckets_is_that_of_numpy', 'tests/test_data_prepare.py::test_small_buckets_give_the_same_files'),
    ),
    Mutation(
        '4.5', "the names of a large folder are in order in parts only", 'qwen2vl_sft/data/sources.py',
        'yield from heapq.merge(*parts)', 'yield from (name for part in parts for name in part)',
        ('tests/test_data_sources.py::test_a_large_folder_is_read_in_order_part_by_part',),
    ),
    Mutation(
        '4.5', "pages of records stay in memory", 'qwen2vl_sft/data/audit.py',
        'self.end, self.file = folder, 0, tempfile.TemporaryFile(dir=folder)', 'self.end, self.file = folder, 0, __import__("io").BytesIO()',
        ('tests/test_data_prepare.py::test_memory_does_not_grow_with_the_rows',),
    ),
    Mutation(
        '4.1', "a text that is cut by the end of a block breaks a JSON list", 'qwen2vl_sft/data/sources.py',
        'or error.msg.startswith("Unterminated")', '',
        ('tests/test_data_sources.py::test_json_lists_are_read_by_the_element_as_json_reads_them_whole',),
    ),
    Mutation(
        '4.2', "tasks over the same pictures draw their folds apart", 'qwen2vl_sft/data/prepare.py',
        '    if elsewhere:\n        agree(', '    if False:\n        agree(',
        ('tests/test_data_prepare.py::test_folds_of_tasks_over_the_same_pictures_agree_as_far_as_their_labels_allow',
         'tests/test_data_prepare.py::test_no_fold_trains_one_task_on_what_it_tests_in_another'),
    ),
    Mutation(
        '4.2', "near pictures beyond the first one found are lost", 'qwen2vl_sft/data/audit.py',
        '                waiting += found\n', '',
        ('tests/test_data_audit.py::test_unlike_hashes_that_share_a_band_are_divided_again_and_nothing_is_lost',),
    ),
    Mutation(
        '4.2', "near pictures are lost where a bucket is divided again", 'qwen2vl_sft/data/audit.py',
        'component = near_components(taken(hashes, again, folder), most, folder)', 'component = np.arange(len(again))',
        ('tests/test_data_audit.py::test_unlike_hashes_that_share_a_band_are_divided_again_and_nothing_is_lost',),
    ),
    Mutation(
        '4.2', "a label whose tokens begin another's isn't seen", 'qwen2vl_sft/data/audit.py',
        'known.get(tuple(token_ids[label][:end]))', 'known.get(tuple(token_ids[label][end:]))',
        ('tests/test_data_prepare.py::test_labels_whose_tokens_begin_anothers_are_remarked',),
    ),
    Mutation(
        '4.5', "changes to the last page of records are lost", 'qwen2vl_sft/data/audit.py',
        '        yield number, page[number - records.ends[at]]\n    if page:', '        yield number, page[number - records.ends[at]]\n    if not page:',
        ('tests/test_data_prepare.py::test_workers_give_the_same_files',),
    ),
    Mutation(
        '4.3', "a row that was away gets a new split", 'qwen2vl_sft/data/prepare.py',
        'FORMER_FILES = ("former-splits.parquet", "splits.parquet")', 'FORMER_FILES = ("splits.parquet",)',
        ('tests/test_data_prepare.py::test_a_row_that_leaves_and_returns_keeps_its_place',),
    ),
    Mutation(
        '4.4', "a row that joins two splits keeps their groups together", 'qwen2vl_sft/data/prepare.py',
        'assign_groups(records, limits)  # groups that these rows had joined', 'pass',
        ('tests/test_data_prepare.py::test_only_the_row_that_joins_is_quarantined_and_the_groups_fall_apart',),
    ),
    Mutation(
        '4.5', "a streamed picture is stored under another's hash", 'qwen2vl_sft/training/order.py',
        'for image, key in zip(lacking, keys, strict=True):', 'for image, key in zip(lacking[1:] + lacking[:1], keys, strict=True):',
        ('tests/test_data_stream.py::test_what_the_cache_gets_under_a_hash_is_that_picture_though_another_run_stores_between',),
    ),
    Mutation(
        '5.1', "the image's tokens are counted without the merge", 'qwen2vl_sft/encoding/images.py',
        'return int(np.prod(self.grid(width, height))) // self.merge**2',
        'return int(np.prod(self.grid(width, height))) // self.merge',
        ('tests/test_correctness.py::test_5_1_the_text_is_the_templates_byte_for_byte',),
    ),
    Mutation(
        '5.1', "the answer's prompt lacks the generation prompt", 'qwen2vl_sft/encoding/prompt.py',
        'add_generation_prompt=answer is None)',
        'add_generation_prompt=False)',
        ('tests/test_correctness.py::test_5_1_the_prompt_is_the_templates_up_to_the_answer',),
    ),
    Mutation(
        '5.2', 'the newline after the turn is supervised', 'qwen2vl_sft/encoding/prompt.py',
        'newline if encoder.supervise_newline else',
        'newline if not encoder.supervise_newline else',
        ('tests/test_correctness.py::test_5_2_the_answer_and_its_end_are_supervised_and_nothing_else',),
    ),
    Mutation(
        '5.2', 'the end of the turn is not supervised', 'qwen2vl_sft/encoding/prompt.py',
        'labels += [target,',
        'labels += [np.where(target == encoder.end_id, IGNORED, target),',
        ('tests/test_correctness.py::test_5_2_the_answer_and_its_end_are_supervised_and_nothing_else',),
    ),
    Mutation(
        '5.2', 'special tokens in data are let through', 'qwen2vl_sft/encoding/prompt.py',
        'if token in text]:',
        'if token == text]:',
        ('tests/test_correctness.py::test_5_2_data_cannot_write_the_conversation',),
    ),
    Mutation(
        '5.3', "the image token's id is a literal", 'qwen2vl_sft/encoding/prompt.py',
        'return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)',
        'return 150000 + 1655',
        ('tests/test_correctness.py::test_5_1_the_text_is_the_templates_byte_for_byte',),
    ),
    Mutation(
        '5.4', 'text after the image counts on by tokens, not by rows', 'qwen2vl_sft/encoding/batch.py',
        'after = image_start + max(rows, columns)',
        'after = image_start + rows * columns',
        ('tests/test_correctness.py::test_5_4_positions_are_the_stock_models',),
    ),
    Mutation(
        '5.4', 'left padding shifts nothing into place', 'qwen2vl_sft/encoding/batch.py',
        'mask[row, place], positions[:, row, place] = 1, sample.positions',
        'mask[row, place], positions[:, row, :length] = 1, sample.positions',
        ('tests/test_correctness.py::test_5_4_the_padding_side_does_not_change_the_logits',),
    ),
    Mutation(
        '5.4', 'packed samples share one count of text positions', 'qwen2vl_sft/encoding/batch.py',
        '"position_ids": torch.from_numpy(np.concatenate(rows, axis=1))[:, None],',
        '"position_ids": torch.from_numpy(np.concatenate(rows, axis=1))[1:, None],',
        ('tests/test_correctness.py::test_5_4_changing_one_packed_sample_changes_nothing_in_the_others',),
    ),
    Mutation(
        '5.4', 'packed training keeps the cache on', 'qwen2vl_sft/training/loss.py',
        'places(inputs, keep)), use_cache=False)',
        'places(inputs, keep)), use_cache=True)',
        ('tests/test_correctness.py::test_5_4_packed_loss_and_gradients_equal_separate_stock_forwards',),
    ),
    Mutation(
        '5.4', 'attention crosses the borders of packed samples', 'qwen2vl_sft/model/attention.py',
        'states.split(lengths, dim=2)',
        'states.split([sum(lengths)], dim=2)',
        ('tests/test_correctness.py::test_5_4_changing_one_packed_sample_changes_nothing_in_the_others',
         'tests/test_correctness.py::test_5_4_packed_loss_and_gradients_equal_separate_stock_forwards'),
    ),
    Mutation(
        '5.4', 'packed samples see their own future', 'qwen2vl_sft/model/attention.py',
        'scale=scaling, is_causal=True, enable_gqa=True)',
        'scale=scaling, is_causal=False, enable_gqa=True)',
        ('tests/test_correctness.py::test_5_4_packed_loss_and_gradients_equal_separate_stock_forwards',),
    ),
    Mutation(
        '5.8', 'the fused adapter forgets its scaling on the way back', 'qwen2vl_sft/model/fused.py',
        'low_gradient = (gradient @ b).mul_(ctx.scaling)',
        'low_gradient = gradient @ b',
        ('tests/test_model_fused.py::test_logits_and_gradients_are_pefts',),
    ),
    Mutation(
        '5.8', 'the fused adapter leaves out dropout', 'qwen2vl_sft/model/fused.py',
        'and not isinstance(layer.lora_dropout[one], nn.Identity)',
        'and False',
        ('tests/test_model_fused.py::test_logits_and_gradients_are_pefts',),
    ),
    Mutation(
        '6', 'the fused activation is another', 'qwen2vl_sft/model/fused.py',
        'alpha=1 / slope)',
        'alpha=1.0)',
        ('tests/test_model_fused.py::test_the_towers_output_and_gradients_are_the_stock_ones',),
    ),
    Mutation(
        '6', 'queries and keys of the tower are turned the wrong way', 'qwen2vl_sft/model/fused.py',
        'both = turned(all_three[:, :2], *(part[:, None, None] for part in position_embeddings))',
        'both = turned(all_three[:, :2], *(part[:, None, None] for part in position_embeddings), back=True) ',
        ('tests/test_model_fused.py::test_the_towers_output_and_gradients_are_the_stock_ones',),
    ),
    Mutation(
        '6', 'the way back of the norm takes its scale for a constant', 'qwen2vl_sft/model/fused.py',
        'return weighted.addcmul_(x, along).mul_(scale), to_weight, None',
        'return weighted.mul_(scale), to_weight, None',
        ('tests/test_model_fused.py::test_norms_gates_and_rotations_are_the_stock_ones_all_weights_learning',),
    ),
    Mutation(
        '6', 'the way back turns in the same direction', 'qwen2vl_sft/model/fused.py',
        'return turned(gradient, *ctx.saved_tensors, back=True), None, None',
        'return turned(gradient, *ctx.saved_tensors), None, None',
        ('tests/test_model_fused.py::test_norms_gates_and_rotations_are_the_stock_ones_all_weights_learning',),
    ),
    Mutation(
        '6', 'a cache is not told of keys and values', 'qwen2vl_sft/model/fused.py',
        'keys, values = past_key_values.update(keys, values, own.layer_idx)\n        attend',
        'past_key_values.update(keys, values, own.layer_idx)\n        attend',
        ('tests/test_model_fused.py::test_activation_checkpointing_and_a_cache_work_through_the_fused_parts',),
    ),
    Mutation(
        '6', 'a full vision cache goes on storing', 'qwen2vl_sft/model/vision_cache.py',
        'if size + end <= most}',
        'if size + end}',
        ('tests/test_model_vision_cache.py::test_the_run_reports_what_the_cache_gave',),
    ),
    Mutation(
        '5.6', 'bytes are normalised with the mean left out', 'qwen2vl_sft/encoding/images.py',
        'torch.stack([1 / (255 * std), -mean / std])',
        'torch.stack([1 / (255 * std), -mean])',
        ('tests/test_correctness.py::test_5_6_patches_equal_the_stock_processors',),
    ),
    Mutation(
        '5.5', 'lengths are not checked', 'qwen2vl_sft/training/order.py',
        'if length > max_tokens]:',
        'if length > 10**9]:',
        ('tests/test_correctness.py::test_5_5_a_sample_that_cannot_fit_is_named_before_any_weight_loads',),
    ),
    Mutation(
        '5.6', 'EXIF orientation is ignored', 'qwen2vl_sft/encoding/images.py',
        '        ImageOps.exif_transpose(image, in_place=True)\n',
        '        image.load()\n',
        ('tests/test_correctness.py::test_5_6_exif_orientation_is_applied',),
    ),
    Mutation(
        '5.6', 'transparency becomes black', 'qwen2vl_sft/encoding/images.py',
        'drawing.size, "white")',
        'drawing.size, "black")',
        ('tests/test_correctness.py::test_5_6_transparency_is_white_and_16_bits_are_scaled',),
    ),
    Mutation(
        '5.6', 'the resize filter is another', 'qwen2vl_sft/encoding/images.py',
        'encoder.size(*image.size), encoder.resample)',
        'encoder.size(*image.size), Image.Resampling.BILINEAR)',
        ('tests/test_correctness.py::test_5_6_patches_equal_the_stock_processors',),
    ),
    Mutation(
        '5.7', 'the tower is quantised (skip list says `visual`)', 'qwen2vl_sft/model/load.py',
        '["model.visual", "lm_head"]',
        '["visual", "lm_head"]',
        ('tests/test_correctness.py::test_5_7_nf4_covers_the_language_model_and_nothing_else',),
    ),
    Mutation(
        '5.7', 'no double quantisation', 'qwen2vl_sft/model/load.py',
        'bnb_4bit_use_double_quant=method.double_quantisation',
        'bnb_4bit_use_double_quant=False',
        ('tests/test_correctness.py::test_5_7_nf4_covers_the_language_model_and_nothing_else',),
    ),
    Mutation(
        '5.8', 'full training runs on bfloat16 weights', 'qwen2vl_sft/model/load.py',
        'torch.float32 if method and method.name == "full" else compute_dtype(config)',
        'compute_dtype(config)',
        ('tests/test_correctness.py::test_5_8_full_training_has_float32_master_weights',),
    ),
    Mutation(
        '5.8', "an adapter's keys are not compared", 'qwen2vl_sft/model/load.py',
        '    _check_landed(model, stored, name, folder)\n    return model',
        '    return model',
        ('tests/test_correctness.py::test_5_8_an_adapter_whose_keys_do_not_land_is_an_error',),
    ),
    Mutation(
        '5.8', 'an idle adapter is accepted', 'qwen2vl_sft/model/load.py',
        'if not torch.equal(tuned, output()):',
        'if True:',
        ('tests/test_correctness.py::test_5_8_an_adapter_that_changes_nothing_is_an_error', 'tests/test_scoring_suite.py::test_an_adapter_that_changes_nothing_stops_the_run_and_one_of_the_tower_does_not'),
    ),
    Mutation(
        '5.8', 'an adapter on the tower alone is taken for idle', 'qwen2vl_sft/model/load.py',
        'for output in (lambda: model(input_ids=ids, use_cache=False).logits, lambda: _tower_output(inner)):',
        'for output in (lambda: model(input_ids=ids, use_cache=False).logits,):',
        ('tests/test_scoring_suite.py::test_an_adapter_that_changes_nothing_stops_the_run_and_one_of_the_tower_does_not',),
    ),
    Mutation(
        '8', 'one picture that has no room makes all later batches small', 'qwen2vl_sft/model/memory.py',
        'alone(items[start], error), start + 1, before',
        'alone(items[start], error), start + 1, at_once.most',
        ('tests/test_scoring_labeler.py::test_a_batch_without_memory_is_halved_and_a_picture_without_gets_a_reason',),
    ),
    Mutation(
        '8', 'predictions of another precision stay', 'qwen2vl_sft/scoring/suite.py',
        '"precision": candidate.precision, ',
        '',
        ('tests/test_scoring_suite.py::test_another_precision_is_another_prediction_and_another_device_is_not', 'tests/test_scoring_suite.py::test_what_predictions_follow_from'),
    ),
    Mutation(
        '8', 'a row that left the test set stays in the predictions', 'qwen2vl_sft/scoring/experiment.py',
        'if not what_changed(one, data, rule, scorer):\n                drop_leftovers',
        'if False:\n                drop_leftovers',
        ('tests/test_scoring_suite.py::test_a_row_that_left_the_test_set_leaves_the_predictions',),
    ),
    Mutation(
        '8', 'predictions follow from where the weights lie', 'qwen2vl_sft/scoring/suite.py',
        '_hash_of_file(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files',
        'str(file) for file in files',
        ('tests/test_export.py::test_what_exported_weights_gave_belongs_to_their_bytes_and_not_to_their_place',),
    ),
    Mutation(
        '8', 'the longest answer that label was told is lost', 'qwen2vl_sft/cli.py',
        'threshold, batch, device, max_new_tokens)',
        'threshold, batch, device)',
        ('tests/test_export.py::test_what_exported_weights_gave_belongs_to_their_bytes_and_not_to_their_place',),
    ),
    Mutation(
        '8', 'the longest answer that score was told is lost', 'qwen2vl_sft/cli.py',
        '"limit": limit, "max_new_tokens": max_new_tokens}',
        '"limit": limit, "max_new_tokens": None}',
        ('tests/test_scoring_suite.py::test_the_commands_longest_answer_arrives',),
    ),
    Mutation(
        '8', 'a second preparation fails instead of waiting', 'qwen2vl_sft/data/prepare.py',
        '.lock", busy, wait=True):',
        '.lock", busy):',
        ('tests/test_data_prepare.py::test_a_second_process_waits_and_says_so',),
    ),
    Mutation(
        '8', 'a row with another number is scored again', 'qwen2vl_sft/scoring/suite.py',
        'found.append(name if same else free[key].pop(0) if free.get(key) else None)',
        'found.append(name if same else None)',
        ('tests/test_scoring_suite.py::test_a_row_that_left_the_test_set_leaves_the_predictions',),
    ),
    Mutation(
        '8', 'a prediction keeps the number that is another row\'s now', 'qwen2vl_sft/scoring/suite.py',
        'found.append(name if same else free[key].pop(0) if free.get(key) else None)',
        'found.append(name if same or free.get(key) else None)',
        ('tests/test_scoring_suite.py::test_a_row_that_left_the_test_set_leaves_the_predictions',),
    ),
    Mutation(
        '5.14', 'the self-test leaves out all adapters but the last', 'qwen2vl_sft/scoring/experiment.py',
        'for number, one in enumerate(loaded.group.candidates):',
        'for number, one in enumerate(loaded.group.candidates[-1:]):',
        ('tests/test_scoring_suite.py::test_all_runs_and_the_untuned_model_go_over_the_data_once',),
    ),
    Mutation(
        '5.14', 'the self-test writes the whole batch again', 'qwen2vl_sft/scoring/suite.py',
        'prompts = prefill(model, scorer.encoder, [sample])\n        found.largest',
        'prompts = prefill(model, scorer.encoder, samples[i:] + samples[:i])\n        found.largest',
        ('tests/test_correctness.py::test_5_14_the_self_test_stops_a_model_that_depends_on_the_batch',),
    ),
    Mutation(
        '5.9', 'the frozen tower builds a graph', 'qwen2vl_sft/model/vision_cache.py',
        '@torch.no_grad()\ndef tower_features(',
        'def tower_features(',
        ('tests/test_correctness.py::test_5_9_the_frozen_towers_backward_does_not_run_under_activation_checkpointing',),
    ),
    Mutation(
        '5.10', 'every position goes through the head', 'qwen2vl_sft/training/loss.py',
        '**only_at(model, places(inputs, keep)), use_cache=False).logits',
        'use_cache=False).logits[keep][None]',
        ('tests/test_correctness.py::test_5_10_the_head_runs_on_supervised_positions_only',),
    ),
    Mutation(
        '5.10', 'the last layer sees one token too many', 'qwen2vl_sft/model/last_layer.py',
        '<= (index - start)[:, None]',
        '<= (index - start)[:, None] + 1',
        ('tests/test_model_last_layer.py::test_loss_and_gradients_are_those_of_the_stock_forward',),
    ),
    Mutation(
        '5.10', 'the last layer takes padding for text', 'qwen2vl_sft/model/last_layer.py',
        'if wanted.seen is not None:',
        'if False:',
        ('tests/test_model_last_layer.py::test_padding_on_the_left_is_not_seen',),
    ),
    Mutation(
        '7', 'a continued stream misses its first picture', 'qwen2vl_sft/training/order.py',
        'index >= data.start and',
        'index > data.start and',
        ('tests/test_data_stream.py::test_a_run_from_a_stream_that_is_cut_or_decoded_by_workers_ends_with_the_same_bits',),
    ),
    Mutation(
        '7', 'a stream holds every picture that it passes', 'qwen2vl_sft/training/order.py',
        'schedule.stream_buffer if schedule.stream else None',
        'None',
        ('tests/test_data_stream.py::test_every_sample_gets_its_own_picture_and_few_are_held',),
    ),
    Mutation(
        '5.10', 'labels are not shifted', 'qwen2vl_sft/training/loss.py',
        'F.pad(labels[:, 1:] != IGNORED, (0, 1))',
        '(labels != IGNORED)',
        ('tests/test_correctness.py::test_5_10_the_head_runs_on_supervised_positions_only',),
    ),
    Mutation(
        '5.11', 'each micro-batch is averaged for itself', 'qwen2vl_sft/training/trainer.py',
        'return averaged(losses, inputs, average, total) * world',
        'return averaged(losses, inputs, average) / config.schedule.accumulation',
        ('tests/test_correctness.py::test_5_11_accumulation_averages_over_the_tokens_of_the_effective_batch',),
    ),
    Mutation(
        '5.12', 'the merge goes into 4-bit weights', 'qwen2vl_sft/model/export.py',
        'plain = load_base(config, MethodConfig(name="lora"))',
        'plain = load_base(config, MethodConfig(name="qlora"))',
        ('tests/test_correctness.py::test_5_12_a_merge_is_made_in_the_original_weights',),
    ),
    Mutation(
        '5.7', 'int8 takes the tower too', 'qwen2vl_sft/model/load.py',
        'BitsAndBytesConfig(load_in_8bit=True, **kept)',
        'BitsAndBytesConfig(load_in_8bit=True)',
        ('tests/test_model_load.py::test_int8_trains_and_keeps_the_tower',),
    ),
    Mutation(
        '5.8', "the tower learns at the language model's rate", 'qwen2vl_sft/model/load.py',
        'return "tower" if "visual." in name else "language_model"',
        'return "language_model"',
        ('tests/test_model_load.py::test_each_part_learns_at_its_own_rate',),
    ),
    Mutation(
        '5.8', 'rank-stabilised scaling is not passed on', 'qwen2vl_sft/model/load.py',
        'use_rslora=method.rslora,',
        'use_rslora=False,',
        ('tests/test_model_load.py::test_the_adapters_scale_is_the_papers[options1-8.0]',),
    ),
    Mutation(
        '5.11', 'a step that is done again keeps the gradients of its first try', 'qwen2vl_sft/training/plan.py',
        'model.zero_grad(set_to_none=True)',
        'pass',
        ('tests/test_training_plan.py::test_a_step_is_done_again_with_smaller_micro_batches_and_ends_with_the_same_weights[4-2-False]',),
    ),
    Mutation(
        '5.11', 'a step that is done again leaves out its earlier micro-batches', 'qwen2vl_sft/training/plan.py',
        'first = 0  # past the except',
        'pass  # past the except',
        ('tests/test_training_plan.py::test_a_step_is_done_again_with_smaller_micro_batches_and_ends_with_the_same_weights[4-2-False]',),
    ),
    Mutation(
        '5.12', 'the gate is not asked', 'qwen2vl_sft/model/export.py',
        'if gate.agreement < least_agreement:',
        'if gate.agreement < 0:',
        ('tests/test_correctness.py::test_5_12_the_gate_refuses_a_merge_that_changes_labels',),
    ),
    Mutation(
        '5.13.shared', "in the last layer a question sees what comes after it in the batch", 'qwen2vl_sft/model/last_layer.py',
        'return Places(index, [len(at)] * rows, [count] * rows, sees=sees[:, inside])', 'return Places(index, [len(at)] * rows, [count] * rows, sees=torch.ones_like(sees[:, inside]))',
        ('tests/test_model_last_layer.py::test_what_follows_a_shared_beginning_runs_the_last_layer_where_it_is_read', 'tests/test_correctness.py::test_5_13_tasks_about_one_picture_share_its_beginning_and_equal_stock_forwards'),
    ),
    Mutation(
        'validation.shared', "a row that rides on another task's is validated a second time", 'qwen2vl_sft/training/validation.py',
        'if place not in taken][process_rank()', '][process_rank()',
        ('tests/test_training_validation.py::test_tasks_about_the_same_pictures_are_validated_together_as_they_are_alone', 'tests/test_training_validation.py::test_processes_share_the_pictures_of_a_validation'),
    ),
    Mutation(
        'validation.shared', "a row that rides is asked the other task's question", 'qwen2vl_sft/training/validation.py',
        'asked.add(row, sample if other is data else scorer.about(other, row, sample), number)', 'asked.add(row, sample, number)',
        ('tests/test_training_validation.py::test_tasks_about_the_same_pictures_are_validated_together_as_they_are_alone',),
    ),
    Mutation(
        'validation.shared', "the plan forgets what is kept of shared beginnings", 'qwen2vl_sft/training/plan.py',
        'for layer in kept.layers] if branches else []', 'for layer in kept.layers] if not nodes else []',
        ('tests/test_training_plan.py::test_what_a_validation_reads_is_in_the_plan_and_made_to_fit',),
    ),
    Mutation(
        'validation', 'a validation seeds the random generators anew', 'qwen2vl_sft/training/validation.py',
        'torch.random.fork_rng(devices=devices), torch.no_grad()',
        'nullcontext(torch.manual_seed(0)), torch.no_grad()',
        ('tests/test_training_validation.py::test_validation_changes_no_bit_of_the_training',),
    ),
    Mutation(
        'validation', 'the best checkpoint is chosen on test rows', 'qwen2vl_sft/training/validation.py',
        '"rule": "auto", "split": "validation", "limit": limit}',
        '"rule": "auto", "split": "test", "limit": limit}',
        ('tests/test_training_validation.py::test_validation_finds_what_stock_forwards_find',),
    ),
    Mutation(
        'validation', 'the last validation counts as the best', 'qwen2vl_sft/training/validation.py',
        'return int(history.loc[history["mean"].idxmax(), "step"])',
        'return int(history["step"].iloc[-1])',
        ('tests/test_training_validation.py::test_the_best_checkpoint_is_kept_by_validation',),
    ),
    Mutation(
        'validation', 'a stopped run is not saved', 'qwen2vl_sft/training/progress.py',
        'self.ending, control.should_save = INTERRUPTED, True',
        'self.ending, control.should_save = INTERRUPTED, control.should_save',
        ('tests/test_training_validation.py::test_a_stopped_run_goes_on_to_the_same_bits',),
    ),
    Mutation(
        'validation', "a loss is counted for another sample's task", 'qwen2vl_sft/training/progress.py',
        'task = tasks.to(losses.device)[sample_index(batch).to(losses.device)]',
        'task = tasks.flip(0).to(losses.device)[sample_index(batch).to(losses.device)]',
        ('tests/test_training_validation.py::test_the_loss_of_each_task_is_the_stock_loss_of_its_samples',),
    ),
    Mutation(
        '5.13', "the label's end is left out", 'qwen2vl_sft/scoring/labels.py',
        'wordings = sums[:, nodes] + reading.stops[:, nodes]',
        'wordings = sums[:, nodes]',
        ('tests/test_correctness.py::test_5_13_label_probabilities_equal_one_stock_forward_a_label',),
    ),
    Mutation(
        '5.13', 'a node sees every other node', 'qwen2vl_sft/scoring/labels.py',
        'torch.from_numpy(sight(tree, part)).to(device)',
        'torch.ones(len(part), len(part), dtype=torch.bool, device=device)',
        ('tests/test_correctness.py::test_5_13_label_probabilities_equal_one_stock_forward_a_label',),
    ),
    Mutation(
        '5.13', 'of several wordings of a label only the likeliest counts', 'qwen2vl_sft/scoring/labels.py',
        'return best + shares.log()',
        'return best',
        ('tests/test_correctness.py::test_5_13_label_probabilities_equal_one_stock_forward_a_label',),
    ),
    Mutation(
        '5.13', "a label's second token doesn't count", 'qwen2vl_sft/scoring/labels.py',
        'for depth in range(1, int(depths.max()) + 1)',
        'for depth in range(2, int(depths.max()) + 1)',
        ('tests/test_correctness.py::test_5_13_label_probabilities_equal_one_stock_forward_a_label',),
    ),
    Mutation(
        '5.13', 'an answer that leaves the label tree is taken for a label', 'qwen2vl_sft/scoring/labels.py',
        'found.append(written if node is not None else None)',
        'found.append(written)',
        ('tests/test_correctness.py::test_5_13_what_is_read_off_the_tree_is_what_stock_generates',),
    ),
    Mutation(
        '5.8', 'the adapter of the candidate before stays active', 'qwen2vl_sft/scoring/experiment.py',
        'self.model.set_adapter(self.adapters[str(one)])',
        'pass',
        ('tests/test_scoring_suite.py::test_a_checkpoints_scores_are_those_of_the_weights_in_its_folder',),
    ),
    Mutation(
        '5.8', 'the untuned row is scored with an adapter active', 'qwen2vl_sft/scoring/experiment.py',
        'with self.model.disable_adapter() if self.adapters else nullcontext():',
        'with nullcontext():',
        ('tests/test_scoring_suite.py::test_all_runs_and_the_untuned_model_go_over_the_data_once',),
    ),
    Mutation(
        '5.7', 'adapters of qlora are scored on the plain base', 'qwen2vl_sft/scoring/experiment.py',
        'plain = one.folder is None or one.method.name != "qlora"',
        'plain = True',
        ('tests/test_scoring_suite.py::test_all_runs_and_the_untuned_model_go_over_the_data_once',),
    ),
    Mutation(
        '8', 'a changed picture keeps its old prediction', 'qwen2vl_sft/scoring/suite.py',
        'for name in ("sha256", "question", "label"))',
        'for name in ("question", "label"))',
        ('tests/test_scoring_suite.py::test_a_changed_picture_or_label_is_scored_again_and_no_other_row',),
    ),
    Mutation(
        '8', 'one right telephone number among wrong ones is enough', 'qwen2vl_sft/scoring/metrics.py',
        'said[kind] == true[kind] for kind',
        'bool(said[kind] & true[kind]) for kind',
        ('tests/test_scoring_metrics.py::test_contact_details_are_compared_field_by_field',),
    ),
    Mutation(
        '5.14', 'padding of a batch is attended to', 'qwen2vl_sft/model/prefill.py',
        'allowed = torch.cat([prompts.seen[:, None].expand(-1, count, -1)',
        'allowed = torch.cat([torch.ones_like(prompts.seen)[:, None].expand(-1, count, -1)',
        ('tests/test_correctness.py::test_5_14_a_sample_alone_and_in_a_batch_has_the_same_label',),
    ),
    Mutation(
        '5.14', 'the self-test scores the whole batch again', 'qwen2vl_sft/scoring/suite.py',
        'alone = score_labels(model, scorer.encoder, [sample], tree)',
        'alone = score_labels(model, scorer.encoder, samples[i:] + samples[:i], tree)',
        ('tests/test_correctness.py::test_5_14_the_self_test_stops_a_model_that_depends_on_the_batch',),
    ),
    Mutation(
        'comparison', 'a picture that was trained on under another name is no leak', 'qwen2vl_sft/comparison/samples.py',
        'for column in values.keys() & train.keys():',
        'for column in {"group"} & values.keys() & train.keys():',
        ('tests/test_comparison_scoreboard.py::test_leaked_pictures_are_badged_with_the_accuracy_without_them',),
    ),
    Mutation(
        'comparison', 'an open answer that is somewhat like the text is an exact match', 'qwen2vl_sft/comparison/samples.py',
        'near.eq(1).mean()',
        'near.gt(0).mean()',
        ('tests/test_comparison_scoreboard.py::test_how_near_open_answers_came_stands_in_every_form',),
    ),
    Mutation(
        'workflow', 'a sweep names an error of an earlier session', 'qwen2vl_sft/workflow/sweep.py',
        'log.read_bytes()[since:]',
        'log.read_bytes()',
        ('tests/test_workflow_sweep.py::test_a_training_that_is_killed_is_not_started_over_and_over',),
    ),
    Mutation(
        'comparison', "a local model's closed figures stand against an API model's free ones", 'qwen2vl_sft/comparison/samples.py',
        'return "free"',
        'return "closed"',
        ('tests/test_comparison_scoreboard.py::test_against_an_api_model_the_headline_is_free_on_both_sides_with_the_closed_figure_beside',),
    ),
    Mutation(
        'comparison', 'paired tests without a correction for their number', 'qwen2vl_sft/comparison/board.py',
        'adjusted = np.array(holm(p))',
        'adjusted = np.array(p)',
        ('tests/test_comparison_scoreboard.py::test_holm_runs_over_all_cells_of_the_table',),
    ),
    Mutation(
        'comparison', 'common support is what any row answered', 'qwen2vl_sft/comparison/board.py',
        'return pd.Series(counts == counted["row"].nunique(), index=samples.index)',
        'return pd.Series(counts >= 1, index=samples.index)',
        ('tests/test_comparison_scoreboard.py::test_common_support_leaves_out_for_everybody_what_one_did_not_answer',),
    ),
    Mutation(
        'comparison', 'copies of a picture count as further evidence', 'qwen2vl_sft/comparison/board.py',
        'codes = np.unique(clusters.loc[both.index], return_inverse=True)[1]',
        'codes = np.arange(len(both))',
        ('tests/test_comparison_statistics.py::test_copies_of_a_picture_are_no_further_evidence',),
    ),
    Mutation(
        'comparison', 'answers to another question pass for answers to the present one', 'qwen2vl_sft/comparison/samples.py',
        'return task in (asked or {}) and not',
        'return task in () and not',
        ('tests/test_comparison_scoreboard.py::test_answers_to_another_question_are_marked_and_stand_in_nothing_else', 'tests/test_comparison_scoreboard.py::test_validation_answers_to_another_question_choose_neither_a_step_nor_a_threshold'),
    ),
    Mutation(
        'comparison', 'answers to another question are marked, but counted', 'qwen2vl_sft/comparison/scoreboard.py',
        'samples = samples[~samples["other_question"]]',
        'samples = samples[samples["row"] != ""]',
        ('tests/test_comparison_scoreboard.py::test_answers_to_another_question_are_marked_and_stand_in_nothing_else',),
    ),
    Mutation(
        'comparison', 'a tuned row that ties with the untuned model is recommended', 'qwen2vl_sft/comparison/board.py',
        'if row and round(means[row] - ranked[0].strict, 6) >= 0',
        'if row and round(means[row] - ranked[0].strict, 6) > 0',
        ('tests/test_comparison_scoreboard.py::test_a_tie_is_called_a_tie_and_what_needs_no_training_is_preferred',),
    ),
    Mutation(
        'comparison', 'five right answers of five support a threshold', 'qwen2vl_sft/comparison/deployment.py',
        'return decided >= fewest_decided(precision) and',
        'return decided >= 1 or',
        ('tests/test_comparison_report.py::test_a_share_decided_automatically_is_no_headline_where_few_validation_rows_chose_the_threshold',),
    ),
    Mutation(
        'workflow', 'a training that was refused by one that ends in that instant has failed', 'qwen2vl_sft/workflow/sweep.py',
        'held = HELD in planned.notes and attempt < MOST_REFUSALS',
        'held = False',
        ('tests/test_workflow_sweep.py::test_a_training_refused_by_one_that_ends_in_that_instant_is_not_failed',),
    ),
    Mutation(
        'comparison', "settings of other methods count as differences", 'qwen2vl_sft/comparison/board.py',
        'and name not in idle)',
        'and name)',
        ('tests/test_comparison_scoreboard.py::test_settings_of_other_methods_are_no_difference',),
    ),
    Mutation(
        'comparison', 'a recipe is ranked by its first seed', 'qwen2vl_sft/comparison/board.py',
        'return float(np.mean(self.scores))',
        'return self.scores[0]',
        ('tests/test_comparison_scoreboard.py::test_a_recipe_is_named_and_ranked_by_its_seeds_even_if_the_first_one_is_not_complete',),
    ),
    Mutation(
        'comparison', 'rows have common supports over different tasks', 'qwen2vl_sft/comparison/board.py',
        'if len(part) == rows and (part["coverage"] > 0).all()}',
        'if (part["coverage"] > 0).all()}',
        ('tests/test_comparison_scoreboard.py::test_a_row_that_lacks_tasks_shrinks_the_common_support_for_all_and_is_never_bold',),
    ),
    Mutation(
        'comparison', 'a mean that is missing turns the winner', 'qwen2vl_sft/comparison/findings.py',
        'if pd.notna(ours[rule]) and pd.notna(theirs[rule]) and not (gap',
        'if not (gap',
        ('tests/test_comparison_scoreboard.py::test_a_mean_that_is_missing_turns_no_winner',),
    ),
    Mutation(
        'comparison', 'a step without test predictions is chosen', 'qwen2vl_sft/comparison/samples.py',
        ' and checkpoint in scored and rule and',
        ' and rule and',
        ('tests/test_comparison_scoreboard.py::test_a_step_that_is_best_on_validation_but_not_scored_on_test_is_not_chosen',),
    ),
    Mutation(
        'comparison', 'failed requests cost nothing and take no time', 'qwen2vl_sft/comparison/samples.py',
        'asked = predictions[predictions["outcome"] != "error"] if',
        'asked = predictions if',
        ('tests/test_comparison_scoreboard.py::test_requests_without_a_response_count_neither_as_quick_nor_as_free',),
    ),
    Mutation(
        'comparison', 'a right answer in other words accuses its label', 'qwen2vl_sft/comparison/mistakes.py',
        'outcome == "correct" or normalised_text(a)',
        'normalised_text(a)',
        ('tests/test_comparison_mistakes.py::test_an_answer_that_is_correct_in_other_words_accuses_no_label',),
    ),
    Mutation(
        'comparison', "McNemar's test is one-sided", 'qwen2vl_sft/comparison/statistics.py',
        'return np.minimum(1.0, 2 * binom.cdf(np.minimum(a, b), a + b, 0.5))',
        'return np.minimum(1.0, binom.cdf(np.minimum(a, b), a + b, 0.5))',
        ('tests/test_comparison_statistics.py::test_many_comparisons_at_once_are_statsmodels',),
    ),
    Mutation(
        'comparison', 'what was learned counts as forgotten', 'qwen2vl_sft/comparison/mistakes.py',
        'np.where(right[:, -1], "learned", "forgotten")',
        'np.where(right[:, 0], "learned", "forgotten")',
        ('tests/test_comparison_mistakes.py::test_trajectories_agree_with_the_accuracies',),
    ),
    Mutation(
        'comparison', 'a threshold is chosen on the test set though there is validation', 'qwen2vl_sft/comparison/deployment.py',
        'basis = validation if len(validation) else test',
        'basis = test',
        ('tests/test_comparison_mistakes.py::test_thresholds_are_chosen_on_validation_and_judged_on_test',),
    ),
    Mutation(
        'comparison', "a sentence's tests are corrected over one row's tasks only", 'qwen2vl_sft/comparison/board.py',
        '    every = board.tests(other)\n',
        '    every = paired_tests(board.samples, other, [row])\n',
        ('tests/test_comparison_scoreboard.py::test_holm_runs_over_the_whole_table_in_sentences_and_plots_too',),
    ),
    Mutation(
        'comparison', 'copies of a picture lie in both halves', 'qwen2vl_sft/comparison/statistics.py',
        'if groups and groups[i] is not None else np.arange(task.shape[1])',
        'if False else np.arange(task.shape[1])',
        ('tests/test_comparison_statistics.py::test_the_optimism_of_a_choice_is_estimated',),
    ),
    Mutation(
        'comparison', "a picture that another task trains on counts as this task's leak", 'qwen2vl_sft/comparison/samples.py',
        'if other == task:',
        'if other:',
        ('tests/test_comparison_scoreboard.py::test_pictures_that_another_task_trains_on_are_told_apart',),
    ),
    Mutation(
        'comparison', "a row's name is an argument of LaTeX's line break", 'qwen2vl_sft/comparison/scoreboard.py',
        '"[": "{[}", ',
        '',
        ('tests/test_comparison_scoreboard.py::test_no_name_is_an_instruction_to_latex',),
    ),
    Mutation(
        'comparison', "the page's data can end its script", 'qwen2vl_sft/comparison/report.py',
        'separators=(",", ":")).replace("<", "' + chr(92) * 2 + 'u003c")',
        'separators=(",", ":"))',
        ('tests/test_comparison_report.py::test_what_comes_from_data_is_escaped',),
    ),
    Mutation(
        '5.8', "older names of an adapter's weights are not translated", 'qwen2vl_sft/model/load.py',
        'return next((new + key.removeprefix(old) for old, new in OLDER_NAMES if key.startswith(old)), key)',
        'return key',
        ('tests/test_export.py::test_an_adapter_of_llama_factory_lands_and_acts[layers]',),
    ),
    Mutation(
        '7', 'the old best goes before the new one is saved', 'qwen2vl_sft/training/progress.py',
        'if self.validation and is_due(step, schedule) and not control.should_save:',
        'if self.validation and is_due(step, schedule):',
        ('tests/test_training_validation.py::test_each_tasks_best_is_kept_and_an_old_best_stays_until_the_new_one_is_saved',),
    ),
    Mutation(
        '5.12', 'an export takes the place of whatever stands there', 'qwen2vl_sft/training/export.py',
        'if not is_ours and any(out.iterdir()):',
        'if not is_ours and not any(out.iterdir()):',
        ('tests/test_export.py::test_an_export_replaces_an_earlier_one_and_nothing_else',),
    ),
    Mutation(
        '6', "the worker processes of the fill draw from the training's random numbers", 'qwen2vl_sft/training/order.py',
        'collate_fn=as_it_is, generator=torch.Generator())',
        'collate_fn=as_it_is)',
        ('tests/test_model_vision_cache.py::test_worker_processes_decode_the_fill_and_a_pass_too_large_is_halved',),
    ),
    Mutation(
        '5.12', 'probabilities may move as they like', 'qwen2vl_sft/model/export.py',
        'if gate.mean_shift > most_shift:',
        'if gate.mean_shift > 2:',
        ('tests/test_export.py::test_a_merge_that_moves_more_than_the_recipe_allows_is_refused',),
    ),
    Mutation(
        '7', 'rotation takes the named steps too', 'qwen2vl_sft/training/checkpoints.py',
        'between = [step for step, folder in points.items() if folder.name.startswith("resume-")]',
        'between = list(points)',
        ('tests/test_training_checkpoints.py::test_rotation_keeps_the_named_steps',),
    ),
    Mutation(
        '7', 'a changed base model is not noticed', 'qwen2vl_sft/training/checkpoints.py',
        'if kept.base != inputs.base:',
        'if kept.base == "":',
        ('tests/test_training_checkpoints.py::test_another_base_model_under_the_same_name_is_refused',),
    ),
    Mutation(
        '7', "a continued run's dice are new", 'qwen2vl_sft/training/trainer.py',
        'set_random_states(kept[process_rank()])',
        'seed_everything(1)',
        ('tests/test_training_kills.py::test_killed_at_random_times_a_run_ends_as_if_never_stopped[lora]',),
    ),
    Mutation(
        '7', 'a checkpoint saved during its validation stays one to continue from', 'qwen2vl_sft/training/progress.py',
        '            name_checkpoint(callback.run, step)',
        '            pass',
        ('tests/test_training_validation.py::test_a_checkpoint_saved_during_its_validation_is_kept_if_it_is_the_best',),
    ),
    Mutation(
        '7', 'a run whose last validation was interrupted trains on', 'qwen2vl_sft/training/trainer.py',
        'if not self.control.should_training_stop:',
        'if True:',
        ('tests/test_training_validation.py::test_a_run_stopped_during_the_validation_that_ends_it_ends_there',),
    ),
    Mutation(
        '7', "the effective batch is one process's", 'qwen2vl_sft/config.py',
        'return self.batch_on(process_count())',
        'return self.batch_on(1)',
        ('tests/test_model_load.py::test_the_effective_batch_is_that_of_all_processes',),
    ),
    Mutation(
        '6', 'the memory plan leaves validation out', 'qwen2vl_sft/training/plan.py',
        'states + weights.gradients + pictures, states + reads)',
        'states + weights.gradients + pictures)',
        ('tests/test_training_plan.py::test_what_a_validation_reads_is_in_the_plan_and_made_to_fit',),
    ),
    Mutation(
        '7', 'gradients of several processes are averaged once too often', 'qwen2vl_sft/training/trainer.py',
        'return averaged(losses, inputs, average, total) * world',
        'return averaged(losses, inputs, average, total)',
        ('tests/test_processes.py::test_two_processes_train_and_score_as_one_with_twice_the_accumulation',),
    ),
    Mutation(
        '8', 'a picture in test and validation stays in both', 'qwen2vl_sft/data/audit.py',
        'PRECEDENCE = {"test": 2, "validation": 1}',
        'PRECEDENCE = {"test": 1, "validation": 1}',
        ('tests/test_data_audit.py::test_leaks_leave_test_alone',),
    ),
    Mutation(
        '8', 'links are not followed when a path is checked', 'qwen2vl_sft/data/sources.py',
        'path = Path(os.path.realpath(root / reference))',
        'path = Path(os.path.abspath(root / reference))',
        ('tests/test_data_sources.py::test_paths_and_links_that_leave_the_root',),
    ),
    Mutation(
        '5.6', 'the header check ignores EXIF', 'qwen2vl_sft/encoding/images.py',
        'turned = tags.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)',
        'turned = False',
        ('tests/test_correctness.py::test_5_6_exif_orientation_is_applied',),
    ),
    Mutation(
        '4', 'every epoch has the same order', 'qwen2vl_sft/data/mixture.py',
        'np.random.default_rng([seed, key_of(name), epoch]), buffer)',
        'np.random.default_rng([seed, key_of(name), 0]), buffer)',
        ('tests/test_data_mixture.py::test_concatenate_gives_every_row_once_an_epoch',),
    ),
    Mutation(
        '5.6', 'the order of the two passes of the resize is not checked', 'qwen2vl_sft/encoding/resize.py',
        'ROWS_FIRST[key] = next(same, None)',
        'ROWS_FIRST[key] = True',
        ('tests/test_encoding_resize.py::test_every_size_gives_the_bytes_of_pillow_however_often_it_comes',),
    ),
    Mutation(
        '5.6', "weights of the resize have fewer places than Pillow's", 'qwen2vl_sft/encoding/resize.py',
        'PLACES = 22 ',
        'PLACES = 16 ',
        ('tests/test_encoding_resize.py::test_photographs_take_the_fast_way',),
    ),
    Mutation(
        '6', 'a damaged file of the pixel cache is believed', 'qwen2vl_sft/data/pixels.py',
        ' or checksum(pixels) != expected:',
        ':',
        ('tests/test_data_pixels.py::test_a_damaged_file_is_decoded_again',),
    ),
    Mutation(
        '4', 'num_samples takes the first rows', 'qwen2vl_sft/data/sources.py',
        'return set(random.Random(0).sample(range(count), min(count, chat.samples)))',
        'return set(range(min(count, chat.samples)))',
        ('tests/test_data_sources.py::test_num_samples_takes_random_rows_and_the_same_ones_each_time',),
    ),
    Mutation(
        '4', 'the fold held out is trained on too', 'qwen2vl_sft/data/prepare.py',
        '(places >= 0) & ~np.isin(places, list(held.values()))',
        '(places >= 0)',
        ('tests/test_data_prepare.py::test_a_fold_held_out_is_what_training_and_scoring_see',),
    ),
    Mutation(
        '8', 'the first of several choices is taken', 'qwen2vl_sft/data/sources.py',
        """    if len(answers) > 1:
        return {"reason": f"several_answers: {', '.join(answers)[:200]}"}
""",
        '',
        ('tests/test_data_sources.py::test_the_short_export_of_label_studio',),
    ),
    Mutation(
        '8.api', 'another pace asks everything again', 'qwen2vl_sft/scoring/remote.py',
        'exclude={"suite", "run", *PACE})',
        'exclude={"suite", "run"})',
        ('tests/test_scoring_remote.py::test_a_run_from_the_command_line',),
    ),
    Mutation(
        '8.api', 'an error is kept as if it were an answer', 'qwen2vl_sft/scoring/remote.py',
        'if status >= 400 and not policy_code(body):',
        'if status >= 500 and not policy_code(body):',
        ('tests/test_scoring_remote.py::test_the_key_is_nowhere',),
    ),
    Mutation(
        '8.api', "the key stays in a service's words", 'qwen2vl_sft/scoring/remote.py',
        'body = without_key(body, session.key)',
        'body = str(body)',
        ('tests/test_scoring_remote.py::test_the_key_is_nowhere',),
    ),
    Mutation(
        '8.api', "the client's loggers write the key down", 'qwen2vl_sft/scoring/remote.py',
        'logging.getLogger(name).addFilter(blotted)',
        'logging.getLogger(name)',
        ('tests/test_scoring_remote.py::test_the_key_is_nowhere',),
    ),
    Mutation(
        '8.api', 'samples that were not asked leave the table', 'qwen2vl_sft/scoring/remote.py',
        'if response is not None or place in chosen or name in earlier:',
        'if response is not None or name in earlier:',
        ('tests/test_scoring_remote.py::test_a_wrong_key_stops_the_run_and_the_denominator_stays',),
    ),
    Mutation(
        '8.api', 'rows of errors leave the table when fewer samples are asked about', 'qwen2vl_sft/scoring/remote.py',
        'if response is not None or place in chosen or name in earlier:',
        'if response is not None or place in chosen:',
        ('tests/test_scoring_remote.py::test_no_row_is_lost_by_asking_about_fewer',),
    ),
    Mutation(
        '8.api', 'a minute begins with all of its requests at once', 'qwen2vl_sft/scoring/remote.py',
        'leak = rate if burst == 1 else max(rate - burst, rate / 2)',
        'burst, leak = max(rate, 1.0), rate',
        ('tests/test_scoring_remote.py::test_in_no_minute_more_than_stated_leaves',),
    ),
    Mutation(
        '8.api', 'a response without usage is free', 'qwen2vl_sft/scoring/remote.py',
        'return response | {"estimated": [question.tokens, config.longest]}',
        'return response',
        ('tests/test_scoring_remote.py::test_settings_that_the_model_refuses_are_left_out',),
    ),
    Mutation(
        '8.api', "another run's lost requests are this run's", 'qwen2vl_sft/scoring/responses.py',
        'WHERE ended IS NULL AND run = ?", [run])',
        'WHERE ended IS NULL")',
        ('tests/test_scoring_remote.py::test_a_run_counts_its_own_lost_requests',),
    ),
    Mutation(
        '8.api', 'after 429 only the one that was refused waits', 'qwen2vl_sft/scoring/remote.py',
        '            session.pause(seconds)\n',
        '            pass\n',
        ('tests/test_scoring_remote.py::test_after_429_all_workers_pause_and_errors_keep_their_attempts',),
    ),
    Mutation(
        '8.api', '429 uses up the attempts', 'qwen2vl_sft/scoring/remote.py',
        'self.limited + failure.limited, self.other + (not failure.leaves_out and not failure.limited)',
        'self.limited + failure.limited, self.other + 1',
        ('tests/test_scoring_remote.py::test_after_429_all_workers_pause_and_errors_keep_their_attempts',),
    ),
    Mutation(
        '8.api', 'half a character goes into the table', 'qwen2vl_sft/scoring/responses.py',
        'return text.encode("utf-8", "replace").decode("utf-8")',
        'return text',
        ('tests/test_scoring_remote.py::test_half_a_character_and_odd_parts_block_no_run',),
    ),
    Mutation(
        '5.13', 'stale predictions of the other rule stay', 'qwen2vl_sft/scoring/experiment.py',
        '            drop_stale(one, tests, scorer)\n',
        '',
        ('tests/test_scoring_suite.py::test_stale_predictions_of_the_other_rule_go',),
    ),
    Mutation(
        '5.13', 'a cut answer is taken for a shorter label', 'qwen2vl_sft/scoring/suite.py',
        '**vars(judge(task, target, text, cut))',
        '**vars(judge(task, target, text))',
        ('tests/test_scoring_suite.py::test_a_cut_answer_says_so_and_targets_that_are_too_long_are_named',),
    ),
    Mutation(
        '5.13', 'a number that cannot be read is left out', 'qwen2vl_sft/scoring/metrics.py',
        '            found["phone"] |= digit_runs(one, task.region, least)\n',
        '            pass\n',
        ('tests/test_scoring_metrics.py::test_another_number_or_extension_is_wrong',),
    ),
    Mutation(
        '5.13', "the latest label of a name is another picture's", 'qwen2vl_sft/scoring/labeler.py',
        'key, table = ["image", "task", "stamp"], read_parts(parts)\n',
        'key, table = ["image", "task", "stamp"], read_parts(parts).drop_duplicates(["image", "task"], keep="last")\n',
        ('tests/test_scoring_labeler.py::test_a_picture_that_came_back_gets_its_own_label',),
    ),
    Mutation(
        '8.api', 'Retry-After is not waited for', 'qwen2vl_sft/scoring/remote.py',
        'return min(failure.wait, self.config.longest_retry_after)',
        'pass',
        ('tests/test_scoring_remote.py::test_after_429_the_waits_are_more_than_a_minute_and_keep_the_attempts',),
    ),
    Mutation(
        '8.api', 'what is in flight does not count against the budget', 'qwen2vl_sft/scoring/remote.py',
        'session.reserved += cost',
        'session.reserved += 0',
        ('tests/test_scoring_remote.py::test_the_budget_ends_the_run_and_more_money_continues_it',),
    ),
    Mutation(
        '6', 'a pause inside a pause counts twice', 'qwen2vl_sft/training/progress.py',
        'self.paused = before + time.perf_counter() - started',
        'self.paused += time.perf_counter() - started',
        ('tests/test_training_trainer.py::test_a_pause_inside_a_pause_counts_once',),
    ),
    Mutation(
        '8.api', 'the store of responses is bound to the thread that opened it', 'qwen2vl_sft/scoring/responses.py',
        ', check_same_thread=False)',
        ')',
        ('tests/test_scoring_remote.py::test_a_notebook_whose_event_loop_runs_may_ask',),
    ),
    Mutation(
        '8.api', 'a request that a killed process left is taken to be in flight', 'qwen2vl_sft/scoring/responses.py',
        'if not (is_gone(owner) or now > latest):',
        'if not now > latest:',
        ('tests/test_scoring_remote.py::test_what_a_killed_process_left_is_taken_over',),
    ),
    Mutation(
        '8.api', 'a refusal by error code is an error', 'qwen2vl_sft/scoring/responses.py',
        'lower() in POLICY_CODES), None)',
        'lower() in ()), None)',
        ('tests/test_scoring_remote.py::test_the_key_is_nowhere',),
    ),
    Mutation(
        '8.calibration', 'the temperature is applied upside down', 'qwen2vl_sft/scoring/calibration.py',
        'return softmax(np.log(np.maximum(values, SMALLEST)) / temperature, axis=1)',
        'return softmax(np.log(np.maximum(values, SMALLEST)) * temperature, axis=1)',
        ('tests/test_scoring_calibration.py::test_the_temperature_has_the_greatest_likelihood', 'tests/test_scoring_labeler.py::test_calibration_and_threshold_apply'),
    ),
    Mutation(
        '8.calibration', 'two labels count as four logits', 'qwen2vl_sft/scoring/calibration.py',
        'return (X[:, 1] - X[:, 0]) / 2 if self.count == 2 else X',
        'return (X[:, 1] - X[:, 0]) if self.count == 2 else X',
        ('tests/test_scoring_calibration.py::test_the_temperature_has_the_greatest_likelihood',),
    ),
    Mutation(
        '8.calibration', 'the test set chooses the temperature', 'qwen2vl_sft/scoring/calibration.py',
        'temperature, note = fit_temperature(splits["validation"])',
        'temperature, note = fit_temperature(splits.get("test", splits["validation"]))',
        ('tests/test_scoring_calibration.py::test_the_test_set_decides_nothing',),
    ),
    Mutation(
        '8.calibration', "other weights take over a name's calibration", 'qwen2vl_sft/scoring/calibration.py',
        'if stored.get("weights") != weights:',
        'if not weights:',
        ('tests/test_scoring_calibration.py::test_a_calibration_belongs_to_its_labels_and_its_weights', 'tests/test_scoring_labeler.py::test_calibration_and_threshold_apply'),
    ),
    Mutation(
        '8.label', 'what is below the threshold is labelled all the same', 'qwen2vl_sft/scoring/labeler.py',
        'below = np.where(best == positive, -1, best)',
        'below = best',
        ('tests/test_scoring_labeler.py::test_calibration_and_threshold_apply',),
    ),
    Mutation(
        '8.label', 'the tower runs once a task', 'qwen2vl_sft/scoring/labeler.py',
        'Sample(one, features=features[number])',
        'Sample(one, readable[number].pixels)',
        ('tests/test_scoring_labeler.py::test_two_tasks_run_the_tower_once',),
    ),
    Mutation(
        'labels', "a file that no labelling wrote is replaced", 'qwen2vl_sft/scoring/labeler.py',
        '    if not note:\n', '    if not note and replace:\n',
        ('tests/test_scoring_labeler.py::test_only_an_earlier_labelling_is_replaced', 'tests/test_scoring_labeler.py::test_a_wrong_path_is_refused_with_a_suggestion_before_weights_load'),
    ),
    Mutation(
        'labels', "another checkpoint's labels are replaced unasked", 'qwen2vl_sft/scoring/labeler.py',
        'note["checkpoint"] != checkpoint and not replace', 'note["checkpoint"] != checkpoint and replace is None',
        ('tests/test_scoring_labeler.py::test_only_an_earlier_labelling_is_replaced', 'tests/test_scoring_labeler.py::test_labels_of_a_version_without_notes_are_known_by_their_parts'),
    ),
    Mutation(
        'labels', "labels of other images are replaced unasked", 'qwen2vl_sft/scoring/labeler.py',
        'if note.get("source", os.path.realpath(source)) != os.path.realpath(source) and not replace:', 'if False:',
        ('tests/test_scoring_labeler.py::test_only_an_earlier_labelling_is_replaced',),
    ),
    Mutation(
        'labels', "labels of tasks that aren't asked for now go unasked", 'qwen2vl_sft/scoring/labeler.py',
        'if name not in tasks]) and not replace:', 'if name not in tasks]) and False:',
        ('tests/test_scoring_labeler.py::test_only_an_earlier_labelling_is_replaced',),
    ),
    Mutation(
        'labels', "a second row about a picture takes the first one's name", 'qwen2vl_sft/scoring/labeler.py',
        'row.id = stated if seen[stated] == 1 else f"{stated} ({seen[stated]})"', 'row.id = stated',
        ('tests/test_scoring_labeler.py::test_rows_without_ids_are_named_by_their_paths_and_what_is_no_row_gets_a_reason',),
    ),
    Mutation(
        'calibration', "calibrating again without a wish takes the threshold away", 'qwen2vl_sft/scoring/calibration.py',
        'wanted if is_asked(wanted) else wanted_before(run, checkpoint, task.name))', 'wanted)',
        ('tests/test_scoring_calibration.py::test_a_run_is_calibrated_from_its_files_and_changed_predictions_void_it',),
    ),
    Mutation(
        'calibration', "too few rows for a wanted precision aren't said", 'qwen2vl_sft/scoring/calibration.py',
        'if needed is None or seen < needed:', 'if needed is None:',
        ('tests/test_scoring_calibration.py::test_too_few_rows_for_a_wanted_precision_are_said',),
    ),
    Mutation(
        'score', "the tower's time is left out where its output is shared", 'qwen2vl_sft/scoring/suite.py',
        'tower = tower_rate * sum(', 'tower = 0 * tower_rate * sum(',
        ('tests/test_scoring_suite.py::test_seconds_hold_the_towers_part_also_where_its_output_is_shared_or_cached',),
    ),
]


def tree_copy(folder: Path) -> None:
    "A checkout in `folder`: package and tests copied, everything else linked."
    for path in ROOT.iterdir():
        if path.name in COPIED and path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif path.name in COPIED:
            shutil.copy(path, folder)
        elif path.name not in (".git", ".venv", "runs"):
            (folder / path.name).symlink_to(path)


def run_tests(folder: Path, tests: list[str]) -> tuple[int, float, str]:
    "pytest's exit code (1 when it hangs), seconds and the end of its output, with the package of `folder` first on the path."
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    started, limit = time.perf_counter(), HUNG_SECONDS * len(tests)
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return 1, limit, "hung"
    return done.returncode, time.perf_counter() - started, done.stdout[-2500:] + done.stderr[-1000:]


def loads_the_copy(folder: Path) -> bool:
    code = "import qwen2vl_sft; print(qwen2vl_sft.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return Path(done.stdout.strip()).is_relative_to(folder)


def verdict(folder: Path, mutation: Mutation) -> tuple[str, float]:
    "'red' when every named test fails under the mutation; otherwise what happened. The copy is restored."
    path = folder / mutation.module
    original = path.read_text()
    if original.count(mutation.old) != 1:
        return f"NOT APPLIED: its text occurs {original.count(mutation.old)} times", 0.0
    path.write_text(original.replace(mutation.old, mutation.new))
    seconds = 0.0
    try:
        for test in mutation.tests:
            code, took, output = run_tests(folder, [test])
            seconds += took
            if code != 1:  # 0: all passed; 2 to 5: the tests didn't run
                print(output)
                return (f"STAYED GREEN: {test}" if code == 0 else f"pytest exit {code}: {test}"), seconds
    finally:
        path.write_text(original)
    return "red", seconds


def try_all(chosen: list[Mutation], folders: list[Path]) -> int:
    "Try each mutation, a worker a folder; print a line for each and return how many survived."
    free: SimpleQueue[Path] = SimpleQueue()
    for folder in folders:
        free.put(folder)

    def attempt(mutation: Mutation) -> tuple[str, float]:
        folder = free.get()
        try:
            return verdict(folder, mutation)
        finally:
            free.put(folder)

    survivors = 0
    with ThreadPoolExecutor(len(folders)) as pool:
        for mutation, (result, seconds) in zip(chosen, pool.map(attempt, chosen), strict=True):
            survivors += result != "red"
            print(f"{mutation.point:6} {mutation.slip:70.70} {seconds:5.0f} s  {result}", flush=True)
    return survivors


def main(points: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not points or any(f"{m.point}.".startswith(f"{point}.") for point in points)]
    tests = list(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    with ExitStack() as stack:
        names = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(WORKERS)]
        folders = [Path(name).resolve() for name in names]
        for folder in folders:
            tree_copy(folder)
        if not loads_the_copy(folders[0]):
            print("the copy of the package is not the one imported")
            return 1
        code, seconds, output = run_tests(folders[0], tests)
        if code != 0:
            print(output, f"\nthe unbroken package fails its tests (pytest exit {code})")
            return 1
        print(f"unbroken: {len(tests)} tests green in {seconds:.0f} s\n")
        survivors = try_all(chosen, folders)
    print(f"\n{len(chosen) - survivors} passed, {survivors} failed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
