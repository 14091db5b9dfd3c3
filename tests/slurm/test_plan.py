"""The plan: its figures against the paper's formula and published counts, its refusals, and its imports."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from embedscale.errors import UserError
from slurm import grid
from slurm.plan import MORE, plan_sweep, print_plan, refuse_above
from slurm.tables import duration, size

ROOT = Path(__file__).parents[2]
# Non-embedding parameters and peak learning rates as published.
PUBLISHED = {
    "pythia-14m": (1_189_888, 1e-3),
    "pythia-31m": (4_739_072, 1e-3),
    "pythia-70m": (18_915_328, 1e-3),
    "pythia-160m": (85_056_000, 6e-4),
    "pythia-410m": (302_311_424, 3e-4),
    "pythia-1b": (805_736_448, 3e-4),
    "pythia-1.4b": (1_208_602_624, 2e-4),
    "pythia-2.8b": (2_517_652_480, 1.6e-4),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def paper():
    return plan_sweep(grid.load(ROOT / "configs/sweep/paper.yaml", [f"cluster={ROOT / 'configs/cluster/a100.yaml'}"]))


def planned(tmp_path: Path, text: str, *words: str):
    file = tmp_path / "small.yaml"
    file.write_text(text)
    return plan_sweep(grid.load(file, words))


def test_full_fine_tuning_costs_6nd(paper):
    """C = 6 N D, 14 + 64 tokens per pair, 1024 pairs per step (sections 3.5 and 4.1)."""
    full = [each for each in paper.runnable if each.run.method.name == "full"]
    assert len(full) == 45  # 3 of the 48 runs need more than 200 million pairs
    for each in full:
        n, peak = PUBLISHED[each.run.backbone.name.removeprefix("EleutherAI/")]
        assert each.tokens == int(each.run.budget) // (6 * n)
        assert each.pairs == each.tokens // 78
        assert each.steps == -(-each.pairs // 1024)
        assert 0 <= each.run.budget - each.spent_flop < 6 * n
        assert each.learning_rate == pytest.approx(peak / 10)


def test_lora_and_bias_have_one_learning_rate_for_all_sizes(paper):
    rates = {each.learning_rate for each in paper.runnable if each.run.method.name in ("lora", "bias")}
    assert rates == {1e-3}


def test_every_total_is_the_sum_of_its_runs(paper):
    assert len(paper.runnable) + len(paper.blocked) == 696
    assert paper.spent_flop == sum(each.spent_flop for each in paper.runnable)
    assert paper.gpu_hours == pytest.approx(sum(each.seconds for each in paper.runnable) / 3600)
    assert paper.spent_flop <= sum(each.run.budget for each in paper.runnable)
    assert paper.spent_flop == pytest.approx(sum(each.run.budget for each in paper.runnable), rel=1e-3)


def test_a_run_that_cannot_be_run_has_a_reason(paper):
    reasons = {}
    for each in paper.blocked:
        label = (each.run.backbone.name.removeprefix("EleutherAI/pythia-"), each.run.method.label, each.run.budget)
        reasons[label] = each.obstacle
    # 6 N D with N = 2.5e9 + 2.7e9 of adapters: less than 1024 pairs of 78 tokens.
    assert "budget: buys less than one batch of 1024 pairs" in reasons["2.8b", "lora-r2048", 1.5e15]
    assert "allowed: 1 to 512" in reasons["14m", "lora-r2048", 1.5e18]
    too_small = {(size, budget) for (size, label, budget), why in reasons.items() if label == "full" and "data" in why}
    by_hand = {
        (name.removeprefix("pythia-"), budget)
        for name, (n, _) in PUBLISHED.items()
        for budget in (1.5e15, 6e15, 2.4e16, 9.6e16, 3.8e17, 1.5e18)
        if budget / (6 * n * 78) > 200e6
    }
    assert too_small == by_hand


def test_gpu_hours_follow_the_assumed_share_of_the_peak(tmp_path):
    cluster = tmp_path / "cluster.yaml"
    text = f"cluster: {cluster}\naxes: {{budget: 1e18}}\nbackbones: [EleutherAI/pythia-410m]"
    cluster.write_text("peak_flop_per_second: 1e14\nclasses: [{name: any, utilisation: 0.5, hours: 1}]")
    (one,) = planned(tmp_path, text).estimates
    # The exact count is a little above the paper's 1e18 FLOP: it has attention scores, but no normalisation weights.
    assert one.gpu_hours == pytest.approx(1e18 / (1e14 * 0.5) / 3600, rel=0.03)
    assert one.seconds == pytest.approx(one.spent_flop_exact / 5e13)
    assert one.requeues == 5  # 5.6 hours, in jobs of one hour
    for gpus in ("gpus: 4", "gpus: 2, nodes: 2"):
        shape = f"{{name: any, utilisation: 0.5, hours: 1, {gpus}}}"
        cluster.write_text(f"peak_flop_per_second: 1e14\nclasses: [{shape}]")
        (four,) = planned(tmp_path, text).estimates
        assert four.gpu_hours == pytest.approx(one.gpu_hours)
        assert four.requeues == 1


def test_gradcache_costs_a_second_forward_pass(tmp_path):
    text = "axes: {budget: 1e18}\nbackbones: [EleutherAI/pythia-410m]\nbase: {resources.chunk_tokens: %s}"
    (whole,) = planned(tmp_path, text % "null").estimates
    (chunked,) = planned(tmp_path, text % 4096).estimates
    assert chunked.spent_flop == whole.spent_flop
    assert chunked.spent_flop_exact / whole.spent_flop_exact == pytest.approx(
        4 / 3, rel=1e-6
    )  # 2 forward + 4 backward, and 2 for the second forward pass


def calibrated(folder: Path, speeds: dict[str, float], **facts) -> Path:
    """Write a file of `embedscale calibrate` for pythia-70m and a cluster file that names it; return the latter."""
    numbers = ["pairs_per_second", "flop_per_second", "share_of_peak", "memory_gb", "seconds", "compile_seconds"]
    rest = dict.fromkeys([*numbers, "chunk_tokens", "steps"], 1)
    rows = [
        {"backbone": "pythia-70m", "method": label, "tokens_per_second": speed} | rest
        for label, speed in speeds.items()
    ]
    (folder / "calibration.json").write_text(json.dumps({"device": "X", "rows": rows} | facts))
    cluster = folder / "cluster.yaml"
    cluster.write_text("calibration: calibration.json")
    return cluster


def test_measured_speeds_replace_the_assumption(tmp_path, capsys):
    speeds = {"full": 1000.0, "lora-r8": 800.0, "freeze-0.333": 600.0}
    cluster = calibrated(tmp_path, speeds)
    text = f"cluster: {cluster}\nbackbones: [EleutherAI/pythia-70m]\naxes: {{budget: 1e16}}"
    text += "\nmethods: [full, bias, {name: lora, rank: [8, 32]}, {name: freeze, active_fraction: 1/3}]"
    plan = planned(tmp_path, text)
    full, bias, own, any_rank, freeze = plan.estimates
    for each, speed in ((full, 1000), (own, 800), (freeze, 600)):
        assert each.measured and each.seconds == pytest.approx(each.tokens / speed)
    assert not bias.measured and not any_rank.measured
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "3 runs at the speed measured in" in printed
    assert "calibration.json has no row of the backbone and the method: the speed of 2 runs is assumed." in printed
    for broken, message in (({"full": 0}, "rows.0.tokens_per_second: 0 was found"), ({"full": "fast"}, "'fast' was")):
        calibrated(tmp_path, broken)
        with pytest.raises(UserError, match=message):
            planned(tmp_path, text)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match="is not a file of `embedscale calibrate`"):
        planned(tmp_path, text)
    (tmp_path / "calibration.json").unlink()
    with pytest.raises(UserError, match="the file does not exist"):
        planned(tmp_path, text)


@pytest.mark.parametrize(
    "stated, asked, difference",
    [
        ({"precision": "float32"}, "training.precision: bf16", "precision float32, not bf16"),
        ({"batch_size": 1024}, "training.batch_size: 512", "batch_size 1024, not 512"),
        ({"context": 75}, "data.context: 512", "context 75, not 512"),
        ({"activation_checkpointing": False}, "resources.activation_checkpointing: true", "checkpointing False, not"),
        ({"compile": False}, "resources.compile: true", "compile False, not True"),
    ],
)
def test_a_speed_measured_with_other_settings_is_not_used(tmp_path, capsys, stated, asked, difference):
    cluster = calibrated(tmp_path, {"full": 1000.0}, **stated)
    text = f"cluster: {cluster}\nbackbones: [EleutherAI/pythia-70m]\naxes: {{budget: 1e16}}\n"
    assert planned(tmp_path, text).estimates[0].measured
    plan = planned(tmp_path, f"{text}base: {{{asked}}}")
    assert not plan.estimates[0].measured
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "was measured with" in printed and difference in printed
    assert "the speed of 1 run is assumed" in printed and "at the speed measured" not in printed


def test_a_label_that_two_methods_share_gives_a_speed_to_the_measured_one_alone(tmp_path):
    """`calibrate` measures freeze-1 with all blocks, and LoRA on all layers."""
    cluster = calibrated(tmp_path, {"freeze-1": 1000.0, "lora-r8": 1000.0})
    text = f"cluster: {cluster}\nbackbones: [EleutherAI/pythia-70m]\naxes: {{budget: 1e16}}\nmethods:"
    all_blocks = "{name: freeze, active_fraction: 1}, {name: lora, rank: 8}"
    others = "{name: freeze, active_blocks: 1}, {name: lora, rank: 8, targets: [attention.dense]}"
    assert [each.measured for each in planned(tmp_path, f"{text} [{all_blocks}]").estimates] == [True, True]
    assert [each.measured for each in planned(tmp_path, f"{text} [{others}]").estimates] == [False, False]


def test_an_existing_store_is_counted(tmp_path, tiny_run, save_decoder):
    """The figures for a prepared store agree with the exact plan of training."""
    from embedscale.data.store import PairStore
    from embedscale.run.settings import load
    from embedscale.training.plan import plan_run
    from slurm.cluster import shape_of

    config = load(None, [*tiny_run, "budget=1e10"])
    base = "{" + ", ".join(word.replace("=", ": ", 1) for word in tiny_run) + "}"
    plan = planned(tmp_path, f"base: {base}\naxes: {{budget: [1e10, 1e15, 1e5]}}")
    small, large, tiny = plan.estimates
    store = PairStore.open(config.data.store)
    exact = plan_run(config, shape_of(config.backbone.name), store)
    assert small.pairs == pytest.approx(exact.pairs, rel=0.02)
    assert abs(small.steps - exact.steps) <= 1 + 0.02 * exact.steps
    assert large.obstacle == f"the data are too small: {config.data.store} holds {store.pairs:,} pairs; {MORE}"
    assert "budget: buys less than one batch of 16 pairs" in tiny.obstacle
    few = save_decoder(tmp_path / "few", vocab_size=100)
    assert "256 tokens, but few has 100 embeddings" in (
        planned(tmp_path, f"base: {base}\naxes: {{budget: 1e10}}", f"base.backbone.name={few}").estimates[0].obstacle
    )
    assert not planned(tmp_path, f"base: {base}\naxes: {{budget: 1e15}}", "base.data.repeat=true").blocked
    assert "evaluation.pool" in (
        planned(tmp_path, f"base: {base}\naxes: {{budget: 1e10}}", "base.evaluation.pool=3200").estimates[0].obstacle
    )


def test_disk_space_is_that_of_two_checkpoints_and_the_weights(tmp_path, tiny_run):
    from embedscale.run.directory import RunDirectory
    from embedscale.run.stop import StopRequest
    from embedscale.training.train import train

    class AfterSteps(StopRequest):
        looks = 0

        @property
        def requested(self):
            self.looks += 1
            return self.looks > 4

    base = "{" + ", ".join(word.replace("=", ": ", 1) for word in tiny_run) + ", resources.checkpoint_minutes: 0}"
    text = f"output: {tmp_path}\nbase: {base}\naxes: {{budget: 5e9}}"
    (estimate,) = planned(tmp_path, text).estimates
    assert train(estimate.run, AfterSteps()) == 75
    files = [file.stat().st_size for file in RunDirectory(estimate.run.folder).checkpoints.iterdir()]
    assert len(files) == 2
    assert estimate.disk_bytes == pytest.approx(sum(files) * 7 / 6, rel=0.1)  # weights are a third of a checkpoint


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "backbones: [{name: models/absent, learning_rate: 1e-3}]",
            "'models/absent' is no folder, is not in the hub's",
        ),
        ("methods: [{name: freeze, active_fraction: 1/5}]", "multiples of 1/6"),
        ("base: {data.context: 4096}", "data.context: 4096 is longer than pythia-14m's; allowed: at most 2048"),
        ("base: {training.batch_size: 10, resources.devices: 4}", "training.batch_size: 10 is not divisible by 4 GPUs"),
    ],
)
def test_obstacles_are_found_without_data(tmp_path, text, reason):
    (estimate,) = planned(tmp_path, f"{text}\naxes: {{budget: 1e15}}").estimates
    assert reason in estimate.obstacle
    assert estimate.gpu_hours == estimate.spent_flop == estimate.disk_bytes == 0


def test_a_backbone_without_a_published_peak_needs_a_learning_rate_of_its_own(tmp_path, backbone_folder):
    """One in `base` would replace the rate of LoRA and bias too, a hundred times too small."""
    text = "axes: {budget: 1e12}\nbackbones: [%s]\nmethods: [full, bias, {name: lora, rank: 2}]"
    full, bias, lora = planned(tmp_path, text % backbone_folder).estimates
    assert "backbones[].learning_rate: the paper's rule has no value for pythia-tiny" in full.obstacle
    assert bias.obstacle is lora.obstacle is None
    advised = full.obstacle.partition("give this backbone's entry a learning_rate: ")[2].replace("…", "1e-5")
    rates = [each.learning_rate for each in planned(tmp_path, text % advised).estimates]
    assert rates == [1e-5, 1e-3, 1e-3]


def test_a_model_beyond_the_last_class_cannot_be_run(tmp_path):
    """AdamW of 6.5e9 parameters needs about 105 GB; the last class of a100.yaml is one card with 80 GB."""
    text = "axes: {budget: 1e19}\nbackbones: [{name: Qwen/Qwen2.5-7B, learning_rate: 1e-5}]\ncluster: %s"
    (blocked,) = planned(tmp_path, text % (ROOT / "configs/cluster/a100.yaml")).estimates
    assert re.search(r"parameters are more than every class of .*a100\.yaml takes; add a class", blocked.obstacle)
    (tmp_path / "wide.yaml").write_text("classes: [{name: small, up_to: 1e8}, {name: any, gpus: 8}]")
    (runs,) = planned(tmp_path, text % "wide.yaml").estimates
    assert (runs.obstacle, runs.resource_class.name) == (None, "any")


def test_folders_of_one_name_have_costs_of_their_own(tmp_path, save_decoder):
    small, large = save_decoder(tmp_path / "a" / "m"), save_decoder(tmp_path / "b" / "m", num_hidden_layers=8)
    row = "{backbone.name: %s, budget: %s, training.learning_rate: 1e-3}"
    both = planned(tmp_path, f"include: [{row % (small, '1e11')}, {row % (large, '2e11')}]").estimates
    alone = [planned(tmp_path, f"include: [{row % pair}]").estimates[0] for pair in ((small, "1e11"), (large, "2e11"))]
    assert [each.tokens for each in both] == [each.tokens for each in alone]
    assert both[0].tokens != both[1].tokens / 2


def test_more_gpu_hours_than_allowed_are_refused(paper):
    refuse_above(paper, None)
    refuse_above(paper, paper.gpu_hours)
    for limit in (paper.gpu_hours - 1, 0.0, float("nan")):
        with pytest.raises(UserError, match="--max-gpu-hours: paper needs an estimated"):
            refuse_above(paper, limit)


def test_the_table_shows_totals_and_every_obstacle(paper, capsys):
    print_plan(paper)
    text = capsys.readouterr().out
    assert f"paper: {len(paper.runnable)} runs" in text
    assert f"{len(paper.blocked)} runs cannot be run" in text
    assert f"{paper.gpu_hours:,.2f}" in text
    assert "an assumed share of A100's 3.12e+14 FLOP/s" in text
    print_plan(paper, each=True)
    text = capsys.readouterr().out
    assert all(each.run_id in text for each in paper.runnable)


def printed(capsys, tmp_path: Path, text: str) -> str:
    print_plan(planned(tmp_path, text))
    return capsys.readouterr().out


def test_a_reason_is_printed_once_with_all_that_it_stops(paper, capsys):
    print_plan(paper)
    table = capsys.readouterr().out.partition("cannot be run")[2]
    assert table.count("the data are too small:") == 1
    (row,) = re.findall(r"the data are too small:.*", table)
    assert "pythia-14m, pythia-31m, pythia-70m" in row and "9.6e+16, 3.8e+17, 1.5e+18" in row
    assert int(row.split()[-2]) == sum("data are too small" in each.obstacle for each in paper.blocked)


def test_only_what_says_something_is_printed(capsys, tmp_path):
    none = printed(capsys, tmp_path, "axes: {budget: 1e9}")
    assert "1 run cannot be run" in none and "total" not in none and "Disk" not in none
    few = printed(capsys, tmp_path, "axes: {budget: 1e14}\nexclude: [{budget: 2e14}]")
    (hours,) = {each.gpu_hours for each in planned(tmp_path, "axes: {budget: 1e14}").estimates}
    assert hours < 0.005 and f"{hours:.2g}" in few and " 0.00 " not in few


def test_rows_show_their_learning_rates(capsys, tmp_path):
    text = "axes: {budget: [1e16, 2e16]}\nbackbones: [EleutherAI/pythia-2.8b]\nmethods: [full, {name: lora, rank: 8, "
    lines = printed(capsys, tmp_path, text + "learning_rate: [1e-3, 1e-2]}]").splitlines()
    full, lora = ([cell.strip() for cell in line.split("│")[1:4]] for line in lines if "pythia-2.8b" in line)
    assert (full[1:], lora[1:]) == (["full", "1.6e-5"], ["lora", "0.001 … 0.01"])


def test_runs_of_few_steps_are_counted(capsys, tmp_path):
    """A step of 1024 pairs of 78 tokens costs 5.7e11 FLOP."""
    text = printed(capsys, tmp_path, "axes: {budget: [5.6e13, 5.8e13, 1e15]}")
    assert "1 of 3 runs have fewer than 100 steps: their losses say little about the law." in text
    assert "fewer than" not in printed(capsys, tmp_path, "axes: {budget: 5.8e13}")


def test_runs_of_more_than_one_epoch_are_counted(capsys, tmp_path):
    text = "axes: {budget: [5.6e13, 1.15e14, 1.425e14]}\nbase: {data.repeat: true}\nexpected_pairs: 102_400"
    assert "2 of 3 runs have more than one epoch, up to 2.5:" in printed(capsys, tmp_path, text)
    assert "epoch" not in printed(capsys, tmp_path, "axes: {budget: 1.425e14}")


def test_the_largest_checkpoints_of_runs_at_the_same_time_and_all_weights_need_disk_space(capsys, tmp_path):
    text = "axes: {budget: [1e15, 2e15]}\nbackbones: [EleutherAI/pythia-14m, EleutherAI/pythia-70m]\ncluster: few.yaml"
    checkpoints = [2 * 12 * (n + 50304 * width) for n, width in ((18_915_328, 512), (1_189_888, 128))]
    for settings, largest in (("{max_gpus: 1}", [1, 0]), ("{max_gpus: 3}", [2, 1]), ("{max_gpus: 64}", [2, 2])):
        (tmp_path / "few.yaml").write_text(settings)
        plan = planned(tmp_path, text)
        at_once = sum(number * bytes_ for number, bytes_ in zip(largest, checkpoints, strict=True))
        assert plan.disk_bytes == plan.kept_bytes + at_once
        assert plan.kept_bytes == pytest.approx(2 * sum(checkpoints) / 6, rel=0.001)
        print_plan(plan)
        said = capsys.readouterr().out
        assert f"{size(plan.kept_bytes)} stay" in said and f"at most {size(plan.disk_bytes)} at once" in said


def test_what_is_assumed_is_named(capsys, tmp_path):
    text = f"axes: {{budget: 1e15}}\nbase: {{data: {{store: {tmp_path / 'none'}, context: 512}}}}\n"
    said = printed(capsys, tmp_path, text)
    assert "78 tokens per pair are assumed (the paper's mean for texts of context 75; for others, set expected_" in said
    assert "No cluster file is named (cluster): up to 64 A100s under SLURM are assumed" in said
    said = printed(capsys, tmp_path, f"{text}expected_tokens_per_pair: 400\ncluster: configs/cluster/local.yaml")
    assert "400 tokens per pair are assumed (expected_tokens_per_pair); these stores" in said
    assert "No cluster file" not in said


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_is_readable_in_a_narrow_terminal(tmp_path, paper, capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    few = planned(tmp_path, "axes: {budget: [1e15]}\nexclude: [{budget: 2e15}]")
    for plan, each, name in ((paper, False, "pythia-2.8b"), (few, True, few.estimates[0].run_id)):
        print_plan(plan, each)
        table, _, below = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).partition("total")
        assert name in table and "steps" in table
        assert all(len(line) <= width and ("┃" not in line or len(line.split()) > 5) for line in table.splitlines())
    assert "exclude[0] matches no run" in below


def test_the_plan_of_the_paper_takes_seconds_and_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('the plan imported torch')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from embedscale.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "sweep", "plan", "configs/sweep/paper.yaml"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "622 runs" in done.stdout
    # Processor time, because a busy machine may take longer by the clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_max_gpu_hours_on_the_command_line_exits_2(capsys):
    from embedscale.cli import main

    assert main(["sweep", "plan", "configs/sweep/paper.yaml", "--max-gpu-hours", "10"]) == 2
    assert "allowed: 10" in capsys.readouterr().err


def test_a_sweep_of_which_no_run_can_be_run_exits_2(capsys):
    from embedscale.cli import main

    assert main(["sweep", "plan", "configs/sweep/paper.yaml", "axes.budget=[1e30]"]) == 2
    printed = capsys.readouterr()
    assert "data.repeat=true" in printed.out
    assert "embedscale: configs/sweep/paper.yaml: none of its " in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59, "59 s"), (90, "2 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("count, text", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e12, "2.5 TB")])
def test_sizes_read_well(count, text):
    assert size(count) == text
