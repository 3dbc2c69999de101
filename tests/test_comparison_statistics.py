"""Statistics of the comparison room: edge cases, and simulations whose truth is planted."""
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from qwen2vl_sft.comparison.board import paired_tests
from qwen2vl_sft.comparison.statistics import (
    bootstrap_both,
    bootstrap_mean,
    choice_by_halves,
    cluster_kinds,
    collapse,
    detectable_difference,
    holm,
    mcnemar,
    mcnemar_p,
    power,
    repeated_scores,
    seed_interval,
    smallest_difference,
    wilson,
)


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


# ---------------------------------------------------------------------------------------------- intervals


def test_wilson_matches_the_formula_written_out():
    n, k, z = 57, 41, 1.959963984540054
    p = k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert wilson(k, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(5, 4), (-1, 4)])
def test_wilson_rejects_impossible_counts(correct, n):
    with pytest.raises(ValueError, match=f"correct={correct} .* n={n}"):
        wilson(correct, n)


def test_wilson_covers_the_truth_in_93_to_97_percent():
    """Exact coverage (no random numbers), averaged over accuracies; a Wald interval gives 91.3 % here."""
    n = 60
    intervals = [wilson(k, n) for k in range(n + 1)]
    truths = np.linspace(0.05, 0.95, 37)
    coverage = [sum(binomial(n, k, p) for k, i in enumerate(intervals) if p in i) for p in truths]
    assert 0.93 <= np.mean(coverage) <= 0.97
    assert min(coverage) > 0.90


def clustered_task(rng, clusters: int, size: int, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    """Copies of a picture are right or wrong together nine times in ten."""
    base = rng.random(clusters) < accuracy
    own = rng.random((clusters, size)) < accuracy
    shared = rng.random((clusters, size)) < 0.9
    values = np.where(shared, base[:, None], own).astype(float)
    return values.ravel(), np.repeat(np.arange(clusters), size)


def coverage_of_the_mean(size: int, use_groups: bool, simulations: int = 1500) -> float:
    rng, truths = np.random.default_rng(7), [0.35, 0.6, 0.75, 0.9, 0.5]
    hits = 0
    for i in range(simulations):
        tasks = [clustered_task(rng, clusters, size, p) for clusters, p in zip((60, 80, 100, 120, 60), truths, strict=True)]
        groups = [g.tolist() for _, g in tasks] if use_groups else None
        hits += np.mean(truths) in bootstrap_mean([v for v, _ in tasks], groups, repeats=600, seed=i)
    return hits / simulations


@pytest.mark.parametrize("size", [1, 3])
def test_bootstrap_of_a_mean_of_tasks_covers_the_truth_in_93_to_97_percent(size):
    assert 0.93 <= coverage_of_the_mean(size, use_groups=True) <= 0.97


def test_the_simulation_can_fail_without_clusters():
    """The same simulation catches what it is meant to catch: near-duplicates drawn one by one cover too little."""
    assert coverage_of_the_mean(3, use_groups=False, simulations=200) < 0.85


def test_bootstrap_of_paired_differences_covers_the_truth():
    rng, hits, simulations = np.random.default_rng(11), 0, 700
    for i in range(simulations):
        easy = [rng.random(100) < p for p in (0.3, 0.6, 0.8)]
        lead = [np.where(e, rng.choice([0, 1], 100, p=[0.9, 0.1]), rng.choice([-1, 0], 100, p=[0.05, 0.95])) for e in easy]
        truth = np.mean([p * 0.1 - (1 - p) * 0.05 for p in (0.3, 0.6, 0.8)])
        hits += truth in bootstrap_mean(lead, repeats=600, seed=i)
    assert 0.93 <= hits / simulations <= 0.97


def test_bootstrap_is_reproducible_and_skips_empty_tasks():
    values = [[1, 0, 1, 1], [], [0, 0, 1]]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert all(math.isnan(x) for x in bootstrap_mean([[], []]))


def test_bootstrap_equals_drawing_clusters_one_by_one():
    rng = np.random.default_rng(5)
    values, groups = clustered_task(rng, 40, 3, 0.6)
    interval = bootstrap_mean([values], [groups.tolist()], repeats=20_000)
    sums = values.reshape(40, 3).mean(axis=1)
    plain = np.quantile(sums[rng.integers(0, 40, (20_000, 40))].mean(axis=1), [0.025, 0.975])
    assert interval == pytest.approx(tuple(plain), abs=0.009)


def test_groups_must_match_the_values():
    with pytest.raises(ValueError, match="3 values but 2 groups"):
        cluster_kinds([1, 0, 1], ["a", "b"])


# ---------------------------------------------------------------------------------------------- paired tests


@pytest.mark.parametrize(("only_first", "only_second"), itertools.product([0, 1, 4, 9], [0, 2, 7]))
def test_mcnemar_is_the_two_sided_binomial_test(only_first, only_second):
    a = [1] * only_first + [0] * only_second + [1] * 5
    b = [0] * only_first + [1] * only_second + [1] * 5
    m, k = only_first + only_second, min(only_first, only_second)
    tail = sum(binomial(m, i, 0.5) for i in range(k + 1))
    expected = 1.0 if only_first == only_second else min(1.0, 2 * tail)
    assert mcnemar(a, b).p_value == pytest.approx(expected, abs=1e-12)


def test_mcnemar_refuses_unpaired_answers():
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        mcnemar([1, 0], [1, 0, 1])
    assert mcnemar([], []).difference == 0.0


def simulate(rng, tasks: int, n: int, gain: float) -> list[float]:
    """p-values of `tasks` paired comparisons: a shared difficulty, and on top a coin for each model."""
    p_values = []
    for _ in range(tasks):
        base = rng.random(n) < 0.7
        flips = rng.random((2, n)) < 0.12
        worse, better = base ^ flips[0], base ^ flips[1]
        better = better | (rng.random(n) < gain)
        p_values.append(mcnemar(better, worse).p_value)
    return p_values


def test_a_planted_null_is_found_no_more_often_than_stated():
    rng = np.random.default_rng(1)
    raw, adjusted = 0, 0
    for _ in range(120):
        p = simulate(rng, tasks=8, n=150, gain=0.0)
        raw += min(p) < 0.05
        adjusted += min(holm(p)) < 0.05
    assert adjusted / 120 <= 0.05
    assert raw / 120 > 0.15  # without the correction, a task of ten "improves" in many experiments


def test_a_planted_difference_is_found():
    """Normal approximation of the power for this design: 98 %."""
    rng = np.random.default_rng(2)
    found = np.mean([max(holm(simulate(rng, tasks=1, n=300, gain=0.3))) < 0.05 for _ in range(80)])
    assert found > 0.9


def test_holm_is_monotone_bounded_and_keeps_the_order():
    assert holm([]) == []
    p = [0.9, 0.001, 0.02, 0.02]
    adjusted = holm(p)
    assert adjusted == pytest.approx([0.9, 0.004, 0.06, 0.06])
    many = np.random.default_rng(0).random(50) ** 3
    assert holm(many) == pytest.approx(multipletests(many, method="holm")[1])


@pytest.mark.parametrize("tests", [1, 7, 20])
def test_smallest_difference_is_exactly_where_significance_begins(tests):
    n = 200
    k = round(smallest_difference(n, tests=tests) * n)
    significant = lambda k: tests * mcnemar([1] * k + [0] * (n - k), [0] * n).p_value <= 0.05
    assert significant(k) and not significant(k - 1)
    assert smallest_difference(0) == 1.0 and smallest_difference(3) == 1.0


def test_many_comparisons_at_once_are_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar as reference

    pairs = [(a, b) for a in (0, 1, 5, 12) for b in (0, 3, 12)]
    expected = [min(1.0, reference([[0, a], [b, 0]], exact=True).pvalue) if a + b else 1.0 for a, b in pairs]
    assert mcnemar_p(*np.array(pairs).T) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "first", "second"), [(120, 0.14, 0.05), (300, 0.12, 0.05), (500, 0.05, 0.05)])
def test_a_planted_difference_is_found_at_the_stated_power(n, first, second):
    rng = np.random.default_rng(n)
    draws = rng.multinomial(n, [first, second, 1 - first - second], size=20_000)
    found = (mcnemar_p(draws[:, 0], draws[:, 1]) < 0.05) & (draws[:, 0] > draws[:, 1])
    assert found.mean() == pytest.approx(power(n, first, second), abs=0.012)
    assert power(0, 0.1, 0.1) == power(10, 0.0, 0.0) == 0.0


def test_a_planted_null_over_a_whole_table_is_found_no_more_often_than_stated():
    """Ten rows against one on eight tasks: 80 tests that share the reference. Any false claim in at most 5 % of tables."""
    rng, tables = np.random.default_rng(4), 400
    claims = 0
    for _ in range(tables):
        easy = rng.random((8, 1, 150)) < 0.7
        right = easy ^ (rng.random((8, 11, 150)) < 0.12)
        first, second = (right[:, 1:] & ~right[:, :1]).sum(axis=2), (right[:, :1] & ~right[:, 1:]).sum(axis=2)
        claims += min(holm(mcnemar_p(first, second).ravel())) < 0.05
    assert claims / tables <= 0.05


def test_copies_of_a_picture_are_no_further_evidence():
    """40 pictures four times each: two equally good rows differ no more often than stated, a planted gain is still found; counting copies as pictures would claim too much."""
    rng, tasks, pictures, copies = np.random.default_rng(5), 150, 40, 4
    lines = []
    for row, share in {"reference": 0.5, "equal": 0.5, "better": 0.9}.items():
        right = np.repeat(rng.random((tasks, pictures)) < share, copies, axis=1)
        place = np.arange(right.size)
        lines.append(pd.DataFrame({"row": row, "kind": "trained", "rule": "closed", "task": place // (pictures * copies), "id": place, "cluster": place // copies, "outcome": np.where(right.ravel(), "correct", "wrong")}))
    tests = paired_tests(pd.concat(lines, ignore_index=True), "reference").set_index("row")
    assert (tests["n"] == 160).all() and (tests["groups"] == 40).all()
    found = lambda p: (p < 0.05).mean()
    assert found(tests.loc["equal", "p_value"]) <= 0.05 + 2 * (0.05 * 0.95 / tasks) ** 0.5
    assert found(mcnemar_p(tests.loc["equal", "only_first"].to_numpy(), tests.loc["equal", "only_second"].to_numpy())) > 0.2
    assert found(tests.loc["better", "p_value"]) > 0.9


@pytest.mark.parametrize("discordant", [0, 7, 20, 63])
def test_the_smallest_difference_given_the_disagreements_is_where_significance_begins(discordant):
    n, tests = 400, 10
    lead_needed = round(smallest_difference(n, tests=tests, discordant=discordant) * n)
    m = max(discordant, math.ceil(math.log2(2 * tests / 0.05)))
    p = lambda lead: tests * float(mcnemar_p((m + lead) // 2, (m - lead) // 2))
    assert p(lead_needed) <= 0.05 < p(lead_needed - 2)


def test_micro_weighs_by_samples():
    macro, micro = bootstrap_both([[1] * 10, [0] * 80 + [1] * 10])
    assert 0.5 < macro.low < macro.high < 0.65 and 0.1 < micro.low < 20 / 100 < micro.high < 0.35


def coverage_of_three_means(simulations: int = 700) -> dict[str, float]:
    """Three rows that refuse now and then on three tasks of different sizes; how often each interval holds the first row's truth."""
    rng, sizes, right, told = np.random.default_rng(8), np.array([60, 120, 240]), np.array([0.3, 0.6, 0.85]), np.array([0.7, 0.95, 0.8])
    truth = {  # macro, micro
        "strict": ((right * told).mean(), np.average(right * told, weights=sizes)),
        "answered": (right.mean(), np.average(right, weights=sizes * told)), "common": (right.mean(), np.average(right, weights=sizes * told**3)),
    }
    hits = dict.fromkeys(((rule, mean) for rule in truth for mean in ("macro", "micro")), 0)
    for i in range(simulations):
        good = [rng.random(n) < p for n, p in zip(sizes, right, strict=True)]
        answered = [rng.random((3, n)) < p for n, p in zip(sizes, told, strict=True)]
        values = {
            "strict": [g & a[0] for g, a in zip(good, answered, strict=True)], "answered": [g[a[0]] for g, a in zip(good, answered, strict=True)],
            "common": [g[a.all(axis=0)] for g, a in zip(good, answered, strict=True)],
        }
        for rule, tasks in values.items():
            for mean, interval, expected in zip(("macro", "micro"), bootstrap_both(tasks, repeats=600, seed=i), truth[rule], strict=True):
                hits[rule, mean] += expected in interval
    return {name: count / simulations for name, count in hits.items()}


def test_the_intervals_of_all_three_means_cover_the_truth_in_93_to_97_percent():
    coverage = coverage_of_three_means()
    assert all(0.93 <= share <= 0.97 for share in coverage.values()), coverage


def test_the_intervals_over_seeds_cover_the_truth_in_93_to_97_percent():
    """Seeds of different skill on one test set: the sampling interval is about these seeds, Student's about all seeds."""
    rng, simulations = np.random.default_rng(12), 1500
    skills = rng.normal(0.8, 0.03, (simulations, 3)).clip(0, 1)
    difficulty = rng.random((simulations, 1, 250))
    right = (0.5 * difficulty + 0.5 * rng.random((simulations, 3, 250)))  # a shared difficulty, and a coin for each seed
    level = np.quantile(0.5 * rng.random(200_000) + 0.5 * rng.random(200_000), skills)
    values = (right < level[:, :, None]).mean(axis=1)
    sampling = np.mean([skills[i].mean() in bootstrap_mean([values[i]], repeats=500, seed=i) for i in range(700)])
    seeds = np.mean([0.8 in seed_interval(rng.binomial(4000, skills[i]) / 4000) for i in range(simulations)])
    assert 0.93 <= sampling <= 0.97 and 0.93 <= seeds <= 0.97, (sampling, seeds)
    assert all(math.isnan(x) for x in seed_interval([0.8])) and all(math.isnan(x) for x in seed_interval([0.8, math.nan]))


@pytest.mark.parametrize(("n", "discordant"), [(120, 0.2), (500, 0.1)])
def test_the_detectable_difference_is_found_in_four_of_five_test_sets(n, discordant):
    reach = detectable_difference(n, discordant, 0.05 / 20)
    found = []
    for difference in (reach - 1 / n, reach):  # a sample less would be too little
        share = max(discordant, difference)
        draws = np.random.default_rng(n).multinomial(n, [(share + difference) / 2, (share - difference) / 2, 1 - share], size=20_000)
        found.append(((mcnemar_p(draws[:, 0], draws[:, 1]) < 0.05 / 20) & (draws[:, 0] > draws[:, 1])).mean())
    assert found[0] < 0.81 and found[1] > 0.79 and reach > smallest_difference(n, tests=20)


def test_the_optimism_of_a_choice_is_estimated():
    """Eight equally good rows: what the luckiest claims above the truth, and what random halves say it is."""
    rng = np.random.default_rng(9)
    claimed, estimated = [], []
    for i in range(60):
        rows = [rng.random((8, 120)) < 0.7 for _ in range(3)]
        claimed.append(np.mean([task.mean(axis=1) for task in rows], axis=0).max() - 0.7)
        estimated.append(choice_by_halves(rows, repeats=100, seed=i))
    assert np.mean(estimated) == pytest.approx(np.mean(claimed), abs=0.01)
    near = [np.repeat(rng.random((8, 40)) < 0.7, 3, axis=1) for _ in range(3)]  # every picture three times, answered alike
    whole = [choice_by_halves(near, [np.repeat(np.arange(40), 3)] * 3, repeats=200, seed=i) for i in range(10)]
    torn = [choice_by_halves(near, repeats=200, seed=i) for i in range(10)]
    assert np.mean(torn) < 0.7 * np.mean(whole)  # copies in both halves make luck look like skill
    sure = np.zeros((2, 100))
    sure[0] = 1
    assert choice_by_halves([sure]) == 0 and math.isnan(choice_by_halves([]))


# ---------------------------------------------------------------------------------------------- collapse


def test_a_planted_collapse_is_flagged_and_a_learner_is_not():
    rng = np.random.default_rng(3)
    flagged = {"constant": 0, "learner": 0, "chance": 0}
    for _ in range(200):
        targets = rng.choice(["no", "yes"], 120, p=[0.75, 0.25])
        constant = np.where(rng.random(120) < 0.97, "no", "yes")
        learner = np.where(rng.random(120) < 0.85, targets, np.where(targets == "no", "yes", "no"))
        chance = rng.choice(["no", "yes"], 120, p=[0.75, 0.25])
        for name, answers in {"constant": constant, "learner": learner, "chance": chance}.items():
            flagged[name] += collapse(answers.tolist(), targets.tolist()) == "no"
    assert flagged["constant"] > 170  # 3 % exceptions on average, at most 5 % allowed: some draws have more
    assert flagged["learner"] == flagged["chance"] == 0


def test_collapse_needs_mixed_targets_and_enough_answers():
    assert collapse(["a"] * 100, ["a"] * 100) is None  # nothing else was asked
    assert collapse(["a"] * 100, ["a"] * 98 + ["b"] * 2) is None  # two samples are too few to say
    assert collapse(["a"] * 100, ["a"] * 97 + ["b"] * 3) == "a"
    assert collapse(["a"] * 9, ["a", "b", "c"] * 3) is None
    assert collapse([None] * 100, ["a", "b"] * 50) is None


def test_refusals_do_not_hide_a_collapse():
    assert collapse([None, "no"] * 50, ["no", "yes", "yes", "no"] * 25) == "no"
    assert collapse([float("nan"), "no"] * 50, ["no", "yes", "yes", "no"] * 25) == "no"


def test_collapse_works_on_free_text():
    assert collapse(["call me"] * 40, [str(i) for i in range(40)]) == "call me"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([16.6] * 6 + [16.4, 16.0], 16.6),
        ([100.0] * 8, None),  # a solved task
        ([0.0] * 8, None),
        ([50.0] * 3, None),  # too few rows
        ([50.0, 50.0, 50.0, 51.0], 50.0),
        ([50.0, 50.0, 51.0, 51.0], None),
        ([float("nan")] * 8, None),
        ([], None),
    ],
)
def test_repeated_scores(scores, expected):
    assert repeated_scores(scores) == expected
