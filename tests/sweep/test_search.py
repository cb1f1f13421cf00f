"""The search: seeded, exact in its counts, shared by processes, and better than random search if it learns."""

import json
import math
import multiprocessing
import statistics
from pathlib import Path

import pytest
from waiting import PATIENCE

from benchmarks.stopped_trials import STOPPED_VALUES, run_search
from lit_vlm.sweep.search import Search, TrialOutcome
from lit_vlm.sweep.sweep_file import parse_sweep, read_sweep

ROOT = Path(__file__).resolve().parents[2]
RATE = {"stage.learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}}
MIXED_TYPES = {"a": {"values": [None, True, 3, 0.5, "한글 'x'", ["l", 1]]}, "b": {"value": [1, 2]}}


def make_sweep(parameters: dict, method: str = "random", goal: str = "minimize", **keys):
    settings = {"method": method, "metric": {"name": "m", "goal": goal}, "parameters": parameters, **keys}
    return parse_sweep(settings, "x.yaml")


def run_all_trials(search: Search) -> list[dict]:
    found = []
    while (trial := search.ask()) is not None:
        found.append(trial.parameters)
        search.tell(trial.number, 1.0, "finished")
    return found


def test_a_grid_has_each_point_once_in_a_fixed_order():
    file = make_sweep({"a": {"values": ["x", "y", "x"]}, "b": {"min": 1, "max": 3}, "c": {"value": 0}}, "grid")
    points = [{"a": a, "b": b, "c": 0} for a in "xy" for b in (1, 2, 3)]
    assert run_all_trials(Search(file)) == points
    assert run_all_trials(Search(file, max_trials=4)) == points[:4]
    steps = make_sweep({"a": {"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.2}}, "grid")
    assert [point["a"] for point in run_all_trials(Search(steps))] == [0.2, 0.4]


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_values_keep_their_types(method, tmp_path):
    file = make_sweep(MIXED_TYPES, method, run_cap=8)
    points = run_all_trials(Search(file, tmp_path / "journal.log"))
    allowed = MIXED_TYPES["a"]["values"]
    assert all(any(point["a"] == one and type(point["a"]) is type(one) for one in allowed) for point in points)
    assert all(point["b"] == [1, 2] for point in points) and len(points) == (6 if method == "grid" else 8)


def test_the_cap_is_exact_and_failures_count():
    search = Search(make_sweep(RATE, run_cap=3))
    for outcome in (TrialOutcome.finished, TrialOutcome.failed, TrialOutcome.stopped):
        search.tell(search.ask().number, 0.5, outcome)
    assert search.ask() is None
    assert [trial.outcome for trial in search.list_trials()] == [
        TrialOutcome.finished,
        TrialOutcome.failed,
        TrialOutcome.stopped,
    ]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_resumed_search_suggests_the_trials_of_an_uninterrupted_one(method, tmp_path):
    file = make_sweep({**RATE, "w": {"min": 0.0, "max": 1.0}}, method, run_cap=7)

    def compute_loss(values):
        return math.log10(values["stage.learning_rate"]) ** 2 + values["w"]

    def run_trials(search, num_trials):
        for _ in range(num_trials):
            trial = search.ask()
            search.tell(trial.number, compute_loss(trial.parameters), "finished")
        return search

    whole = run_trials(Search(file, seed=5), 7).list_trials()
    run_trials(Search(file, tmp_path / "j.log", seed=5), 4)
    parts = run_trials(Search(file, tmp_path / "j.log", seed=5), 3).list_trials()
    assert [trial.parameters for trial in parts] == [trial.parameters for trial in whole]
    other = run_trials(Search(file, seed=6), 7).list_trials()
    assert [trial.parameters for trial in other] != [trial.parameters for trial in whole]


def test_an_unfinished_trial_is_found_again_with_its_worker(tmp_path):
    first = Search(make_sweep(RATE, run_cap=3), tmp_path / "j.log")
    trials = [first.ask(worker=worker) for worker in (0, 1)]
    first.tell(0, 1.0, "finished")
    (left,) = Search(make_sweep(RATE, run_cap=3), tmp_path / "j.log").list_unfinished_trials()
    assert (left.number, left.worker, left.parameters) == (1, 1, trials[1].parameters)


def _run_all_trials(path, numbers):
    search = Search(make_sweep(RATE, run_cap=24), path)
    while (trial := search.ask()) is not None:
        numbers.put(trial.number)
        search.tell(trial.number, float(trial.number), "finished")


def test_processes_share_a_journal_and_no_trial_is_assigned_twice(tmp_path):
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    workers = [context.Process(target=_run_all_trials, args=(tmp_path / "j.log", numbers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = sorted(numbers.get(timeout=PATIENCE) for _ in range(24))
    for worker in workers:
        worker.join(PATIENCE)
    assert found == list(range(24)) and numbers.empty()


def test_a_trial_that_was_only_half_assigned_does_not_count(tmp_path):
    search = Search(make_sweep(RATE, run_cap=2), tmp_path / "j.log")
    search._study.ask()  # the state after a process is killed in between
    assert [search.ask().number, search.ask().number, search.ask()] == [1, 2, None]
    assert [trial.number for trial in search.list_unfinished_trials()] == [1, 2]


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_hyperband_stops_the_worse_trials_at_the_same_rung(goal):
    sign = 1 if goal == "minimize" else -1
    hyperband = {"type": "hyperband", "min_iter": 1, "eta": 3}
    search = Search(make_sweep(RATE, goal=goal, early_terminate=hyperband, run_cap=9))

    def run_and_check_stops(value, steps=(1, 2)):
        number = search.ask().number
        stopped = [search.check_early_stopping(number, [sign * (value + 9 / (i + 1)) for i in range(n)]) for n in steps]
        search.tell(number, value, "stopped" if any(stopped) else "finished")
        return stopped

    assert run_and_check_stops(1.0) == [False, False]  # the first has no trial to compare with
    assert run_and_check_stops(2.0) == [False, True]
    assert run_and_check_stops(0.5) == [False, False]
    assert run_and_check_stops(0.7) == [
        False,
        False,
    ]  # the threshold is the worst of the best third, here the second best
    assert run_and_check_stops(0.9) == [False, True]
    assert run_and_check_stops(9.0, steps=(1,)) == [False]  # the rung is not reached yet


RECORDED = json.loads((Path(__file__).parent / "hyperband_of_wandb.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "case", RECORDED, ids=lambda case: " ".join(f"{k}={v}" for k, v in case["early_terminate"].items())
)
def test_hyperband_stops_the_same_trials_at_the_same_value_as_wandbs_sweeps(case):
    """The decisions were recorded with sweeps 0.2.0 by tests/outside/record_hyperband.py."""
    hyperband = {"type": "hyperband", **case["early_terminate"]}
    search = Search(make_sweep(RATE, goal=case["goal"], early_terminate=hyperband))
    numbers = [search.ask().number for _ in case["curves"]]
    seen, stopped = [0] * len(numbers), [None] * len(numbers)
    for number in case["events"]:
        seen[number] += 1
        running = [one for one in numbers if 0 < seen[one] < len(case["curves"][one]) and stopped[one] is None]
        for one in (number, *running):  # its value may raise the threshold for the others
            if search.check_early_stopping(one, case["curves"][one][: seen[one]]):
                stopped[one] = stopped[one] or seen[one]
    assert stopped == case["stopped"]


def test_most_trials_of_the_dpo_sweep_are_chosen_by_the_model():
    """The model learns from stopped trials too: with Optuna's own pruning most trials would be sampled at random."""
    found = run_search(read_sweep(ROOT / "sweeps" / "dpo.yaml"), STOPPED_VALUES["last"], seed=0, num_parallel=1)
    stopped = 30 - found["finished"]
    assert found["by_model"] >= 15 and stopped >= 10


def test_nan_is_a_failure_and_a_reported_result_is_final():
    search = Search(make_sweep(RATE, run_cap=2))
    first, second = search.ask().number, search.ask().number
    search.tell(first, math.nan, "finished")
    search.tell(second, 1.0, "finished")
    search.tell(second, 2.0, "failed")
    assert [(trial.outcome, trial.value) for trial in search.list_trials()] == [
        (TrialOutcome.failed, None),
        (TrialOutcome.finished, 1.0),
    ]


def compute_regret(method: str, seed: int) -> float:
    """Return the regret after a dozen trials on a loss like that of a learning rate: a bowl that ends in a cliff."""
    search = Search(make_sweep({**RATE, "w": {"min": 0.0, "max": 0.3}}, method, run_cap=12), seed=seed)
    best, low = math.inf, -3.2 + 0.15 * seed
    while (trial := search.ask()) is not None:
        x, w = math.log10(trial.parameters["stage.learning_rate"]), trial.parameters["w"]
        value = 0.8 * (x - low) ** 2 + 2 * max(0.0, x - low - 1) + 2 * (w - 0.1) ** 2
        search.tell(trial.number, value, "finished")
        best = min(best, value)
    return best


@pytest.mark.slow
def test_bayes_has_less_regret_than_random_search_after_a_dozen_trials():
    seeds = range(7)
    bayes_regret, random_regret = ([compute_regret(method, seed) for seed in seeds] for method in ("bayes", "random"))
    assert statistics.median(bayes_regret) < 0.3 * statistics.median(random_regret)
