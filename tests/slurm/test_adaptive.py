"""An adaptive sweep makes the same choices however often it is stopped, and spends no more than it may."""

import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from records import record

from embedscale.adaptive import sweep as adaptive
from embedscale.adaptive.choices import FILE, Choices
from embedscale.adaptive.sweep import Money, go_on, pool_of
from embedscale.cli import main
from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.files import read_json
from embedscale.run.directory import RunDirectory
from embedscale.run.record import RunRecord
from slurm import grid
from slurm.grid import Sweep
from slurm.plan import plan_sweep

FILE_TEXT = """
output: {folder}
cluster: {folder}/cluster.yaml
expected_pairs: 1_000_000_000
axes: {{budget: [1.5e15, 6e15, 2.4e16, 9.6e16]}}
backbones: [EleutherAI/pythia-14m, EleutherAI/pythia-31m, EleutherAI/pythia-70m, EleutherAI/pythia-160m]
methods:
  - {{name: full}}
  - {{name: bias, learning_rate: [1e-3, 1e-2]}}
  - {{name: lora, rank: [8, 128]}}
"""


@pytest.fixture
def small(tmp_path) -> Callable[[str], Sweep]:
    """Return a function from a name to a sweep of 80 runs."""
    (tmp_path / "cluster.yaml").write_text("{scheduler: here, max_gpus: 3}")

    def make(name: str) -> Sweep:
        file = tmp_path / f"{name}.yaml"
        file.write_text(FILE_TEXT.format(folder=tmp_path))
        return grid.load(file)

    return make


def true_loss(run) -> float:
    """Chinchilla's law: lora, rank 128 is the best method at the largest budget, with the smaller of two sizes."""
    size = {"14m": 1.2e6, "31m": 4.7e6, "70m": 1.9e7, "160m": 8.5e7}[run.backbone.name.rpartition("-")[2]]
    behind = {"full": 0.02, "bias": 0.06, "lora": 0.0}[run.method.name]
    behind += 0.02 * (run.method.rank == 8) + 0.01 * (run.method.name == "bias" and run.training.learning_rate > 5e-3)
    return (1.2 + 90 / size**0.3 + 300 / (run.budget / (6 * size)) ** 0.3) * (1 + behind)


def finish(sweep: Sweep, run_id: str, status: str = "done") -> None:
    directory = RunDirectory(sweep.folder / run_id)
    directory.path.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([ord(letter) for letter in run_id]).standard_normal()
    loss = true_loss(sweep.by_id[run_id]) * math.exp(0.002 * noise)
    known = replace(RunRecord.from_json(record()), run_id=run_id, status=status, loss=loss)
    directory.write_record(known)


def run_all(part: Sweep) -> int:
    for run_id in part.by_id:
        finish(part, run_id)
    return DONE


class Stopped(Exception):
    """A process that ends in the middle."""


class Fragile:
    """A runner that is stopped after some runs: it says so, or its process dies."""

    def __init__(self, moments: list[int], rng: np.random.Generator):
        self.moments, self.rng, self.made = moments, rng, 0

    def __call__(self, part: Sweep) -> int:
        for run_id in self.rng.permutation(list(part.by_id)):  # runs end in any order
            if self.moments and self.made >= self.moments[0]:
                self.moments.pop(0)
                if self.rng.random() < 0.5:
                    raise Stopped
                return INTERRUPTED
            finish(part, str(run_id))
            self.made += 1
        return DONE


def choices_of(sweep: Sweep) -> Choices:
    found = Choices.of(sweep.folder)
    assert found is not None
    return found


def test_ten_interruptions_change_no_choice(small, capsys):
    whole, broken = small("whole"), small("broken")
    plan = plan_sweep(whole)
    money = Money.of("25%", plan)
    assert go_on(whole, plan, 9.6e16, money, run_all) == DONE
    rng = np.random.default_rng(0)
    total = len(choices_of(whole).runs)
    moments = sorted(rng.choice(total, 10, replace=False).tolist())
    runner, stops = Fragile(moments, rng), 0
    while True:
        try:
            if go_on(broken, plan_sweep(broken), 9.6e16, money, runner) == DONE:
                break
        except Stopped:
            pass
        stops += 1
        if stops % 3 == 0:  # a process that dies between a choice and its first run
            with pytest.raises(Stopped):
                go_on(broken, plan_sweep(broken), 9.6e16, money, lambda part: (_ for _ in ()).throw(Stopped()))
    assert stops == 10
    assert choices_of(broken) == choices_of(whole)


def test_the_answer_is_found_for_a_part_of_the_grid(small, capsys):
    sweep = small("answer")
    plan = plan_sweep(sweep)
    assert go_on(sweep, plan, 9.6e16, Money.of("25 %", plan), run_all) == DONE
    found, printed = choices_of(sweep), capsys.readouterr().out
    assert found.spent <= 0.25 * plan.spent_flop == found.money and found.end
    assert sum(each.cost for each in found.runs if each.check) <= 0.1 * found.spent
    best = min((each for each in sweep.runs if each.budget == 9.6e16), key=true_loss)
    assert (best.method.name, best.method.rank) == ("lora", 128)
    last = printed.strip().splitlines()[-2]
    assert "lora" in last and "rank 128" in last
    for each in found.runs:  # one line a run says why
        assert f"  {each.run}: {each.why}" in printed.splitlines()


@pytest.mark.parametrize(
    ("budgets", "target", "told"),
    [
        ("[9.6e16]", 9.6e16, r"loss 2\.\d+ \(measured\)"),
        ("[9.6e16]", 4e17, r"loss 2\.\d+ \(too few runs for an interval\)"),
        ("[6e15,9.6e16]", 4e17, r"loss 2\.\d+ \(95 %: 2\.\d+ to 2\.\d+\)"),
    ],
    ids=["measured", "4 runs", "8 runs"],
)
def test_a_loss_is_measured_or_has_an_interval_where_the_runs_fix_a_law(small, tmp_path, capsys, budgets, target, told):
    small("sure")
    sweep = grid.load(tmp_path / "sure.yaml", [f"axes.budget={budgets}", "methods=[full]"])
    plan = plan_sweep(sweep)
    go_on(sweep, plan, target, Money.of("100%", plan), run_all)
    first, second, _ = capsys.readouterr().out.strip().splitlines()[-3:]
    assert " FLOP, 100 % of the grid; " in first and re.search(told, second)


def test_a_loss_measured_at_the_target_is_told_if_the_law_expects_more(small, tmp_path, capsys):
    """One of two seeds is far below what the others let expect."""
    small("lucky")
    words = ["axes.budget=[9.6e16]", "axes.training.seed=[0,1]", "methods=[full]"]
    sweep = grid.load(tmp_path / "lucky.yaml", words)
    run_all(sweep)
    lucky = RunDirectory(sweep.folder / list(sweep.by_id)[-1])
    lucky.write_record(replace(lucky.read_record(), loss=1.9))
    plan = plan_sweep(sweep)
    go_on(sweep, plan, 9.6e16, Money.of("100%", plan), run_all)
    assert "(measured); the lowest measured there: 1.9, full, " in capsys.readouterr().out


def test_status_says_what_was_chosen_and_why(small, tmp_path, capsys):
    sweep = small("told")
    plan = plan_sweep(sweep)
    go_on(sweep, plan, 9.6e16, Money.of("5%", plan), run_all)
    capsys.readouterr()
    assert main(["sweep", "status", str(tmp_path / "told.yaml")]) == DONE
    printed = capsys.readouterr().out.splitlines()
    assert "chosen for 9.6e16 FLOP:" in printed and printed[-1] == "the money is spent"
    for each in choices_of(sweep).runs:
        assert f"  {each.run}: {each.why}" in printed


def test_existing_runs_count_and_cost_nothing(small):
    sweep = small("existing")
    cheap = [run_id for run_id, run in sweep.by_id.items() if run.budget == 1.5e15]
    for run_id in cheap:
        finish(sweep, run_id)
    plan = plan_sweep(sweep)
    go_on(sweep, plan, 9.6e16, Money.of("10%", plan), run_all)
    found = choices_of(sweep)
    assert found.rounds[0].known == len(cheap)
    assert not {each.run for each in found.runs} & set(cheap)


def test_diverged_runs_are_paid_and_left_behind(small):
    sweep = small("diverged")
    plan = plan_sweep(sweep)

    def run(part: Sweep) -> int:
        for run_id, each in part.by_id.items():
            finish(part, run_id, "diverged" if each.method.name == "bias" else "done")
        return DONE

    assert go_on(sweep, plan, 9.6e16, Money.of("20%", plan), run) == DONE
    chosen = [each.run for each in choices_of(sweep).runs]
    assert len(set(chosen)) == len(chosen)
    assert choices_of(sweep).spent <= 0.2 * plan.spent_flop


def test_a_round_of_failed_runs_ends_the_sweep_until_they_are_tried_again(small, capsys):
    sweep = small("hopeless")
    plan = plan_sweep(sweep)
    money = Money.of("20%", plan)

    def run(part: Sweep) -> int:
        for run_id in part.by_id:
            RunDirectory(sweep.folder / run_id).begin_attempt().end("failed", reason="no store")
        return FAILED

    assert go_on(sweep, plan, 9.6e16, money, run) == FAILED
    first = choices_of(sweep).rounds
    assert len(first) == 1 and "every run of this round failed" in capsys.readouterr().out
    assert go_on(sweep, plan, 9.6e16, money, run_all, retry_failed=True) == DONE
    assert choices_of(sweep).rounds[0] == first[0] and choices_of(sweep).rounds[1].known == len(first[0].runs)


def test_a_budget_beyond_the_grid_has_the_options_of_the_largest(small):
    sweep = small("beyond")
    plan = plan_sweep(sweep)
    pool = pool_of(plan, 1e18, Money.of("1e17", plan))
    assert len(pool.options) == 20 and {each.budget_flop for each in pool.options} == {1e18}
    grown = pool.options[0].tokens / next(each.tokens for each in pool.candidates if each.budget_flop == 9.6e16)
    assert grown == pytest.approx(1e18 / 9.6e16)
    rates = {each.method: each.settings[2] for each in pool.options}
    assert rates["full"] is None and rates["bias"] is not None, "a rate that follows from the size is no choice"


@pytest.mark.parametrize(
    ("text", "told"),
    [("0%", "out of range"), ("x%", "is not a share"), ("1 week", "not an amount"), ("-1e15", "above 0")],
)
def test_wrong_amounts_are_named(small, text, told):
    with pytest.raises(UserError, match=f"--spend: .*{told}"):
        Money.of(text, plan_sweep(small("amounts")))


def test_hours_are_those_of_the_plan(small):
    plan = plan_sweep(small("hours"))
    money = Money.of("2 device-hours", plan)
    assert money.unit == "device-hours" and money.cost(plan.runnable[0]) == plan.runnable[0].gpu_hours


def test_runs_that_cannot_be_compared_are_refused(small, tmp_path):
    small("batches")
    families = ["backbones=[EleutherAI/pythia-14m,HuggingFaceTB/SmolLM2-135M]"]
    with pytest.raises(UserError, match=r"differ in backbone\.family"):
        pool_of(plan_sweep(grid.load(tmp_path / "batches.yaml", families)), 9.6e16, Money(1e18, False))
    with pytest.raises(UserError, match=r"differ in training\.batch_size"):
        sweep = grid.load(tmp_path / "batches.yaml", ["axes.training.batch_size=[512,1024]"])
        pool_of(plan_sweep(sweep), 9.6e16, Money(1e18, False))
    settings = {"pooling": "[mean,last]", "attention": "[causal,bidirectional]", "weights": "[pretrained,random]"}
    for name, values in (settings | {"revision": "[main,step1000]"}).items():
        sweep = grid.load(tmp_path / "batches.yaml", [f"axes.backbone.{name}={values}"])
        with pytest.raises(UserError, match=rf"differ in backbone\.{name}"):
            pool_of(plan_sweep(sweep), 9.6e16, Money(1e18, False))


def test_each_backbone_is_looked_up_at_its_own_revision(small, tmp_path, monkeypatch):
    """Two models of the hub are in the local cache, each at another commit than its newest."""
    small("pinned")
    known = {("my/neox-a", "abc"): 128, ("my/neox-b", "def"): 256}
    config = {"model_type": "gpt_neox", "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 50304}
    for (name, _), width in known.items():
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "max_position_embeddings": 2048}
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config | shape))

    def cached(name: str, file: str, revision: str | None) -> str | None:
        return str(tmp_path / name / file) if (name, revision) in known else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    backbones = ",".join(f"{{name: {name}, revision: {revision}}}" for name, revision in known)
    words = [f"backbones=[{backbones}]", "methods=[{name: full, learning_rate: 1e-3}]"]
    pool = pool_of(plan_sweep(grid.load(tmp_path / "pinned.yaml", words)), 9.6e16, Money(1e18, False))
    assert len(pool.candidates) == 8 and len({each.n_parameters for each in pool.candidates}) == 2


def test_the_command_line_asks_for_what_it_needs(small, tmp_path, capsys):
    small("words")
    file = str(tmp_path / "words.yaml")
    for words, told in (
        (["--adaptive"], "--adaptive: what may be spent"),
        (["--spend", "15%"], "give --adaptive too"),
        (["--adaptive", "--spend", "15%", "--for", "2 device-hours"], "--for: 2 device-hours is not a number of FLOP"),
    ):
        assert main(["sweep", "submit", file, *words]) == 2
        assert told in capsys.readouterr().err


def test_a_dry_run_shows_the_next_round_and_writes_nothing(small, tmp_path, capsys):
    sweep, file = small("dry"), str(tmp_path / "dry.yaml")

    def shown(*words: str) -> list[str]:
        assert main(["sweep", "submit", file, "--adaptive", "--spend", "20%", "--to", "here", *words]) == DONE
        return capsys.readouterr().out.splitlines()

    lines = shown("--dry-run")
    assert not sweep.folder.exists()
    assert lines[0] == "round 1, 0 runs known" and "would run 3 here, in this order:" in lines
    go_on(sweep, plan_sweep(sweep), 9.6e16, Money.of("5%", plan_sweep(sweep)), run_all)
    rounds = choices_of(sweep).rounds
    assert lines[1:4] == [f"  {each.run}: {each.why}" for each in rounds[0].runs]
    capsys.readouterr()
    assert shown("--dry-run")[0].startswith(f"round {len(rounds) + 1}, ")
    assert choices_of(sweep).rounds == rounds and choices_of(sweep).end


def test_a_dry_run_shows_what_goes_into_a_queue(queued_sweep, tmp_path, capsys):
    text = "expected_pairs: 10_000_000\naxes: {budget: [1.5e15, 6e15]}\nmethods: [full, bias]"
    sweep, _ = queued_sweep(text, max_gpus=2)
    assert main(["sweep", "submit", str(tmp_path / "small.yaml"), "--adaptive", "--spend", "60%", "--dry-run"]) == DONE
    assert "would submit 1 run as 1 job in 1 array" in capsys.readouterr().out
    assert not sweep.folder.exists()


def test_choices_for_another_budget_are_not_mixed(small):
    sweep = small("other")
    plan = plan_sweep(sweep)
    go_on(sweep, plan, 9.6e16, Money.of("5%", plan), run_all)
    with pytest.raises(UserError, match=r"chosen for 9\.6e16 FLOP"):
        go_on(sweep, plan, 1e18, Money.of("5%", plan), run_all)
    path: Path = sweep.folder / FILE
    path.write_text(json.dumps({"rounds": 1}))
    with pytest.raises(UserError, match=r"choices\.json"):
        go_on(sweep, plan, 9.6e16, Money.of("5%", plan), run_all)


def test_a_chosen_run_that_left_the_grid_is_named(small, tmp_path):
    sweep = small("changed")
    plan = plan_sweep(sweep)
    go_on(sweep, plan, 9.6e16, Money.of("5%", plan), run_all)
    file = tmp_path / "changed.yaml"
    file.write_text(file.read_text().replace("{name: full}", "{name: full, learning_rate: 1e-4}"))
    changed = grid.load(file)
    with pytest.raises(UserError, match=r"choices\.json: \S+_full_\S+ was chosen, but is no run of the grid"):
        go_on(changed, plan_sweep(changed), 9.6e16, Money.of("5%", plan), run_all)


@pytest.mark.slow
def test_the_command_at_the_end_is_run_once_for_all_rounds(laptop):
    told = laptop.folder / "told"
    cluster = {"on_done": f"cat >> {told}", "max_gpus": 1}
    sweep = laptop.write("rounds", axes={"budget": [1e9]}, methods=["full", "bias"], cluster=cluster)
    said = laptop.sweep("submit", sweep, "--to", "here", "--adaptive", "--spend", "100%")
    assert said.count("\nround ") + said.startswith("round ") == 2
    assert told.read_text() == "rounds: 2 done\n"
    laptop.sweep("submit", sweep, "--to", "here", "--adaptive", "--spend", "100%")
    assert told.read_text() == "rounds: 2 done\n", "nothing has ended since"


def test_rounds_go_through_a_queue(queued_sweep, monkeypatch, tmp_path):
    methods = "methods: [full, {name: lora, rank: 8}]\nbackbones: [EleutherAI/pythia-14m, EleutherAI/pythia-31m]"
    text = f"expected_pairs: 10_000_000\naxes: {{budget: [1.5e15, 6e15]}}\n{methods}"
    sweep, queue = queued_sweep(text, max_gpus=2, on_done=f"cat >> {tmp_path}/told")
    over, sent = threading.Event(), []

    def cluster() -> None:
        while not over.wait(0.02):
            for handle, job in queue.read()["jobs"].items():
                for run_id in job["runs"]:
                    finish(sweep, run_id)
                sent.extend(job["runs"])
                queue.end(handle)

    monkeypatch.setattr(adaptive, "POLL_SECONDS", 0.05)
    worker = threading.Thread(target=cluster)
    worker.start()
    file = str(sweep.folder.parents[1] / "small.yaml")
    try:
        assert main(["sweep", "submit", file, "--adaptive", "--spend", "60%"]) == DONE
    finally:
        over.set()
        worker.join()
    found = choices_of(sweep)
    assert found.end and len(found.rounds) >= 2
    assert sorted(sent) == sorted(each.run for each in found.runs), "each chosen run went out once, and no other run"
    assert (tmp_path / "told").read_text() == f"small: {len(sent)} done\n"
    orders = [read_json(path) for path in sweep.folder.glob(".submissions/*/orders.json")]
    assert len(orders) >= 2 and not any(each["on_done"] for each in orders), "no job tells the end of its round"
