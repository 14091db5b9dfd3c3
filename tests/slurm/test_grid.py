"""A sweep file gives exactly the runs that it describes, each with its id, or one line that names the error."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from embedscale.errors import UserError
from embedscale.run.config import RunConfig
from embedscale.run.method import Method
from embedscale.run.settings import load
from slurm import grid
from slurm.cluster import Cluster, ResourceClass

SWEEPS = Path(__file__).parents[2] / "configs" / "sweep"
BLOCKS = {"14m": 6, "31m": 6, "70m": 6, "160m": 12, "410m": 24, "1b": 16, "1.4b": 24, "2.8b": 32}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(SWEEPS.parents[1])


def sweep(tmp_path: Path, text: str, *words: str) -> grid.Sweep:
    file = tmp_path / "small.yaml"
    file.write_text(text)
    return grid.load(file, words)


def test_the_grid_of_the_paper_is_complete():
    runs = grid.load(SWEEPS / "paper.yaml").runs
    budgets = {1.5e15, 6e15, 2.4e16, 9.6e16, 3.8e17, 1.5e18}
    assert {run.budget for run in runs} == budgets
    by_size = {size: [run for run in runs if run.backbone.name.endswith(f"-{size}")] for size in BLOCKS}
    for size, blocks in BLOCKS.items():
        parts = 6 if blocks % 6 == 0 else 8
        assert blocks % parts == 0
        expected = {("full", None), ("bias", None)}
        expected |= {("freeze", Fraction(k, parts)) for k in range(1, parts + 1)}
        expected |= {("lora", rank) for rank in (8, 16, 32, 128, 512, 2048)}
        found = Counter()
        for run in by_size[size]:
            fraction = run.method.active_fraction
            exact = None if fraction is None else Fraction(fraction).limit_denominator(100)
            found[run.budget, (run.method.name, exact or run.method.rank)] += 1
        assert found == Counter({(budget, each): 1 for budget in budgets for each in expected})
    assert sum(map(len, by_size.values())) == len(runs) == 696


def test_freezing_fractions_of_the_paper_are_whole_numbers_of_blocks():
    for run in grid.load(SWEEPS / "paper.yaml").runs:
        run.method.training_blocks(BLOCKS[run.backbone.name.removeprefix("EleutherAI/pythia-")])


def test_appendix_g_has_twice_the_batch_and_a_longer_context():
    runs = grid.load(SWEEPS / "paper_appendix_g.yaml").runs
    assert {(run.training.batch_size, run.data.context) for run in runs} == {(2048, 512)}
    assert {run.backbone.name.removeprefix("EleutherAI/pythia-") for run in runs} == {
        "14m",
        "31m",
        "70m",
        "160m",
        "410m",
    }
    assert len(runs) == 6 * 5 * (1 + 6)


@pytest.mark.parametrize("name", [path.name for path in sorted(SWEEPS.glob("*.yaml"))])
def test_every_run_has_an_id_and_a_directory_of_that_name(name):
    found = grid.load(SWEEPS / name)
    assert len({run.run_id for run in found.runs}) == len(found.runs)
    for run_id, run in found.by_id.items():
        assert run.folder == found.folder / run_id


def test_a_run_of_a_sweep_equals_the_run_of_train_with_the_same_words():
    found = grid.load(SWEEPS / "paper.yaml")
    words = [
        "backbone.name=EleutherAI/pythia-410m",
        "budget=9.6e16",
        "method.name=lora",
        "method.rank=32",
        "training.precision=bf16",
        "data.store=stores/bge-mtp-english",
    ]
    assert load(None, words).run_id in found.by_id


def test_axes_combine_and_lists_of_a_method_are_its_own_axes(tmp_path):
    found = sweep(
        tmp_path,
        """
        axes: {budget: [1e15, 4e15], training.seed: [0, 1, 2]}
        backbones: [EleutherAI/pythia-14m, EleutherAI/pythia-70m]
        methods:
          - {name: full}
          - {name: lora, rank: [8, 32], alpha: [8, 16, 32]}
          - {name: freeze, active_fraction: [1/2]}
        """,
    )
    counts = Counter(run.method.name for run in found.runs)
    assert counts == {"full": 12, "lora": 12 * 6, "freeze": 12}
    assert all(run.method.rank is None for run in found.runs if run.method.name != "lora")


def test_nested_and_dotted_settings_are_equal_and_words_override_them(tmp_path):
    nested = "base: {training: {batch_size: 64}}\naxes: {training: {seed: [0, 1]}, budget: 1e15}"
    dotted = "base: {training.batch_size: 64}\naxes: {training.seed: [0, 1], budget: 1e15}"
    assert sweep(tmp_path, nested).by_id == sweep(tmp_path, dotted).by_id
    changed = sweep(tmp_path, dotted, "axes.training.seed=[5]", "base.training.batch_size=32", "name=other")
    assert [(run.training.seed, run.training.batch_size) for run in changed.runs] == [(5, 32)]
    assert changed.folder == Path("runs/other")


def test_for_a_list_setting_an_axis_is_a_list_of_lists(tmp_path):
    one = sweep(tmp_path, "axes: {budget: 1e15, evaluation.at: [0.5, 0.75]}")
    assert [run.evaluation.at for run in one.runs] == [[0.5, 0.75]]
    text = "methods: [{name: lora, rank: 8, targets: [[dense], [dense, query_key_value]]}]"
    assert [run.method.targets for run in sweep(tmp_path, text).runs] == [["dense"], ["dense", "query_key_value"]]


def test_include_adds_rows_and_exclude_removes_matching_runs(tmp_path):
    text = """
    base: {training.batch_size: 512}
    axes: {budget: [1e15, 4e15]}
    backbones: [EleutherAI/pythia-14m, EleutherAI/pythia-70m]
    methods: [{name: full}, {name: lora, rank: [8, 32]}]
    include: [{budget: 9e15, backbone.name: EleutherAI/pythia-1b, training.seed: [7, 8]}]
    exclude:
      - {budget: 1e15, method.rank: [32, 64]}
      - {backbone.name: pythia-14m, method.name: full}
      - {backbone.name: pythia-140m}
    """
    found = sweep(tmp_path, text)
    assert found.excluded == 2 + 2 and found.idle == ["exclude[2]"]
    assert len(found.runs) == 2 * 2 * 3 - 4 + 2
    assert not [run for run in found.runs if run.budget == 1e15 and run.method.rank == 32]
    assert not [run for run in found.runs if run.backbone.name.endswith("14m") and run.method.name == "full"]
    added = [run for run in found.runs if run.budget == 9e15]
    assert [(run.training.seed, run.training.batch_size) for run in added] == [(7, 512), (8, 512)]


def test_a_run_described_twice_is_one_run(tmp_path):
    text = "axes: {budget: [1e15, 1e15]}\ninclude: [{budget: 1.0e15}]"
    assert len(sweep(tmp_path, text).runs) == 1


def test_learning_rates_of_backbones_apply_to_full_and_freeze_and_a_method_overrides_them(tmp_path):
    found = sweep(
        tmp_path,
        """
        backbones: [{name: own, learning_rate: 3e-3}]
        methods:
          - {name: full}
          - {name: freeze, active_blocks: 1}
          - {name: freeze, active_blocks: 2, learning_rate: 5e-3}
          - {name: bias}
          - {name: lora, rank: [8, 16], learning_rate: [1e-2, 2e-2]}
        """,
    )
    rates = [(run.method.label, run.training.learning_rate) for run in found.runs]
    assert rates == [
        ("full", 3e-3),
        ("freeze-1", 3e-3),
        ("freeze-2", 5e-3),
        ("bias", None),
        ("lora-r8", 1e-2),
        ("lora-r8", 2e-2),
        ("lora-r16", 1e-2),
        ("lora-r16", 2e-2),
    ]


def test_resource_classes_follow_the_size_of_the_backbone_and_do_not_change_ids(tmp_path):
    plain = grid.load(SWEEPS / "paper.yaml")
    classes = {run.backbone.name.rsplit("-", 1)[1]: plain.resource_class(run).name for run in plain.runs}
    assert classes["14m"] == classes["70m"] == "up-to-70m"
    assert classes["1b"] == classes["1.4b"] == "1b-to-1.4b"
    assert {classes[size] for size in ("160m", "410m", "2.8b")} == {"160m", "410m", "2.8b"}
    cluster = tmp_path / "two_gpus.yaml"
    cluster.write_text("classes: [{name: any, gpus: 2, chunk_tokens: 1000}]")
    other = grid.load(SWEEPS / "paper.yaml", [f"cluster={cluster}", "base.resources.chunk_tokens=77"])
    assert list(other.by_id) == list(plain.by_id)
    assert {(run.resources.devices, run.resources.chunk_tokens) for run in other.runs} == {(2, 77)}


@pytest.mark.parametrize("parameters, name", [(1, "a"), (10, "a"), (11, "b"), (10**9, "b"), (None, "b")])
def test_a_class_holds_sizes_up_to_its_limit_and_the_last_class_the_rest(parameters, name):
    classes = [ResourceClass("a", 10), ResourceClass("b", 100)]
    assert Cluster(classes=classes).class_of(parameters).name == name


@pytest.mark.parametrize(
    "text, message",
    [
        ("axis: {budget: [1e15]}", "axis: unknown setting; did you mean 'axes'? (`embedscale config --of sweep` lists"),
        ("backbones: pythia-14m", "backbones: 'pythia-14m' is given; expected a list"),
        ("axes: {budgt: [1e15]}", "axes: budgt: unknown setting; did you mean 'budget'?"),
        (
            "base: {training: {batchsize: 3}}",
            "base: training.batchsize: unknown setting; did you mean 'training.batch_",
        ),
        ("axes: {budget: []}", "budget: is an empty list"),
        ("axes: {budget: [1e15, -1]}", "budget: -1.0 is out of range; allowed: above 0"),
        ("axes: {budget: [many]}", "budget: 'many' is given; expected a number"),
        ("methods: [{name: lorra}]", "method.name: 'lorra' is unknown; allowed: full, freeze, bias, lora"),
        ("methods: [{name: full, rank: [8]}]", "method: settings of 'lora' are given, but method.name is 'full'"),
        ("methods: [{rank: 8}]", "methods[0]: {'rank': '8'} has no name"),
        ("methods: [{name: full, only: {backbone: 14m}}]", "methods[0].only: backbone: unknown setting"),
        ("axes: {method.name: [full]}\nmethods: [full]", "axes.method.name: is given in methods too"),
        ("base: {output: x}", "base.output: is the same for all runs; set output at the top"),
        ("axes: {budget: 1e15}\nexclude: [{}]", "exclude[0]: is empty"),
        ("axes: {budget: 1e15}\nexclude: [{buget: 1}]", "exclude[0]: buget: unknown setting; did you mean 'budget'?"),
        ("axes: {budget: 1e15}\nexclude: [{budget: 1e15}]", "no run is left"),
        ("name: x", "no run is left"),
        ("include: [5]", "include[0]: 5 is not a mapping"),
        ("include: [{budget: 0}]", "include[0]: budget: 0"),
        ("name: a/b\naxes: {budget: 1e15}", "name: 'a/b' cannot be the name of a folder"),
        ("name: ..\naxes: {budget: 1e15}", "name: '..' cannot be the name of a folder"),
        ("axes: {output: [a, b]}", "axes.output: is the same for all runs"),
        ("methods: {name: full}", "methods: a mapping is given; expected a list"),
        ("backbones: [{name: 3}, {name: [3]}, {name: null}]", "backbone.name: None is given; expected a text"),
        ("cluster: absent.yaml\naxes: {budget: 1e15}", "absent.yaml: there is no such file"),
        ("backbones: [one/model, two/model]", "names two runs that differ only in paths or resources"),
    ],
)
def test_an_error_in_the_sweep_file_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        sweep(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "small.yaml"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("classes: []", "classes: the list is empty"),
        ("classes: [{up_to: 10}, {up_to: 10}]", "classes.up_to: [10.0, 10.0] does not rise"),
        ("classes: [{hours: 0}]", "classes.hours: 0"),
        ("max_gpu: 3", "max_gpu: unknown setting; did you mean 'max_gpus'? (`embedscale config --of cluster` lists"),
        ("classes: [{memory: 3}]", "memory: unknown setting"),
    ],
)
def test_an_error_in_the_cluster_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"cluster\.yaml") as error:
        sweep(tmp_path, f"cluster: {file}\naxes: {{budget: 1e15}}")
    assert message in str(error.value)


def test_a_folder_in_place_of_a_sweep_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the YAML file of the sweep"):
        grid.load(tmp_path)


def test_an_error_in_a_word_is_not_blamed_on_the_file(tmp_path):
    for word in ("axes.budget=[-1]", "axes.budget={a: 1}", "budget=3", "name=a/b", "base.training.seed=-1"):
        with pytest.raises(UserError) as error:
            sweep(tmp_path, "axes: {budget: [1e15]}", word)
        assert not str(error.value).startswith(str(tmp_path))


def test_one_sixth_gives_the_same_run_in_any_spelling(tmp_path):
    file = tmp_path / "sixths.yaml"
    file.write_text("axes: {budget: 1e15}\nmethods: [{name: freeze, active_fraction: [1/6, 0.1667, 0.16667, 2/6]}]")
    ids = list(grid.load(file).by_id)
    assert len(ids) == 2
    for fraction in (1 / 6, 0.1667, 0.167):
        assert RunConfig(budget=1e15, method=Method("freeze", active_fraction=fraction)).run_id in ids
