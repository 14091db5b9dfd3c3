"""Wrong commands of every verb: one clear line, exit status 2, nothing written, and no heavy import before it.

All commands run in one new process, one after another. What it prints after each of them is what a user sees.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
from records import WHOLE

from embedscale import cli, options
from embedscale.run.config import RunConfig

FILES = {
    "run.yaml": "budget: 1e11\n",
    "number.yaml": "training: 3\n",
    "broken.yaml": "a: [1,\n",
    "sweep.yaml": "axes: {budget: 1e15}\n",
    "key.yaml": "axis: {budget: 1e15}\n",
    "cluster.yaml": "max_gpu: 3\n",
    "with_cluster.yaml": "cluster: cluster.yaml\naxes: {budget: 1e15}\n",
    "columns.csv": "a,b\n1,2\n",
    "table.csv": "loss,n_parameters,budget_flop\n3,1e6,1e12\n",
    "texts.txt": "one\ntwo\n",
    "texts.xml": "<a/>\n",
    "full/file": "x\n",
}

# What is typed after `embedscale`, and what the line on standard error says.
WRONG = [
    ("", "the following arguments are required: VERB; see `embedscale --help`"),
    ("nope", "VERB: invalid choice: 'nope'"),
    ("train --nope", "--nope: not an argument of this verb; see `embedscale train --help`"),
    ("train nope.yaml", "nope.yaml: there is no such file"),
    ("train full", "full: is a folder; give a YAML file"),
    ("train broken.yaml", "broken.yaml: is not valid YAML: "),
    ("train number.yaml", "number.yaml: training: 3 is given; expected a mapping of settings to values"),
    ("train run.yaml another.yaml", "'another.yaml' is not a key=value word; only the first word may be a file"),
    ("train budget=many", "budget: 'many' is given; expected a number"),
    ("train budget=-1", "budget: -1.0 is out of range; allowed: above 0"),
    ("train budget=null", "budget: None is given; expected a number"),
    ("train budget=???", "'budget=???': the value after the '=' is not valid YAML"),
    ("train budget=[1", "'budget=[1': the value after the '=' is not valid YAML"),
    ("train bugdet=1", "bugdet: unknown setting; did you mean 'budget'?"),
    ("train training.lr=1", "training.lr: unknown setting; did you mean 'training.learning_rate'?"),
    ("train training=3", "training: 3 is given; expected a mapping of settings to values"),
    ("train training.batch_size=1.5", "training.batch_size: '1.5' is given; expected a whole number"),
    ("train training.batch_size=1", "training.batch_size: 1 is out of range; allowed: at least 2"),
    ("train a..b=1", "'a..b' cannot name a setting; write it as training.seed or data.sources[0].path"),
    ("train data.sources=3", "data.sources: '3' is given; expected a list"),
    ("train data.sources[0].path=x", "data.sources: has no entry [0]; the list is empty"),
    ("train evaluation.at[3]=1", "evaluation.at: has no entry [3]; its last entry is [2]"),
    ("train evaluation.at[0]=x", "evaluation.at[0]: 'x' is given; expected a number"),
    ("train evaluation.at[0].x=1", "evaluation.at[0].x: evaluation.at[0] is not a mapping of settings to values"),
    ("train budget[0]=1", "budget: is not a list, so it has no entry [0]"),
    ("train data.sources=[] data.sources.path=x", "'data.sources.path=x': does not fit to what an earlier word gives"),
    ("train output=${x}", "output: refers by ${…} to a setting that does not exist"),
    ("train output=${x", "'output=${x': ${ begins a reference to another setting, which ends with }"),
    ("train method.name=adapter", "method.name: 'adapter' is unknown; allowed: full, freeze, bias, lora"),
    ("train data.store=nowhere", "data.store: nowhere does not exist; run `embedscale prepare`"),
    ("train data.context=4000", "data.store: stores/pairs does not exist; run `embedscale prepare`"),
    ("train --fits full", "--fits: tells --recipe where to look; give --recipe BUDGET too"),
    ("train --recipe", "--recipe: expected one argument; see `embedscale train --help`"),
    ("train --recipe 1e15 --fits full", "full/fits.json: does not exist; write it by embedscale fit RUNS"),
    ("flops --budgets 1e11 many", "--budgets: 'many' is not a number; give FLOP, such as 1e15"),
    ("flops --budgets", "--budgets: expected at least one argument; see `embedscale flops --help`"),
    ("flops data.context=9999", "data.context: 9999 is longer than pythia-14m's; allowed: at most 2048"),
    ("config --of nothing", "--of: invalid choice: 'nothing'"),
    ("config --of cluster classes[0].hours=-1", "classes.hours: -1.0 is out of range; allowed: above 0"),
    ("config --of cluster environment.A=[1]", "environment.A: ['1'] is given; expected a text"),
    ("config --of sweep axes=null", "axes: None is given; expected a mapping of settings to values"),
    ("prepare", "data.sources: nothing is given; list one corpus or more"),
    ("prepare data.sources=[x]", "data.sources[0]: 'x' is given; expected a mapping of settings to values"),
    ("calibrate --seconds soon", "--seconds: 'soon' is not a number; see `embedscale calibrate --help`"),
    ("calibrate --seconds -1", "--seconds: -1.0 is out of range"),
    ("calibrate --sizes pythia-15m", "--sizes: 'pythia-15m' is neither a known size (pythia-14m,"),
    ("calibrate --methods nope", "--methods: 'nope' is not a method; such as: full,"),
    ("calibrate --out full", "--out: full is a folder; name a file"),
    ("calibrate --out full/file/speed.json", "--out: full/file is a file; give a folder"),
    ("evaluate nope", "nope: this run does not exist; expected the directory of a finished run"),
    ("evaluate full --tasks STS15", "full: this run is not finished; expected the directory of a finished run"),
    ("export nope", "the following arguments are required: FOLDER; see `embedscale export --help`"),
    ("export nope new", "nope: this run does not exist"),
    ("export full full", "full: is not empty; name an empty or a new folder"),
    ("encode nope nope nope", "nope: this run does not exist; expected the directory of a finished run"),
    ("encode done nope.txt new", "TEXTS: there is no file nope.txt"),
    ("encode done full new", "TEXTS: full holds no file named *.txt or "),
    ("encode done texts.xml new", "texts.xml: .xml is not known; allowed: .txt, .jsonl"),
    ("encode done columns.csv new", "columns.csv: there is no column 'text'; it has: a, b"),
    ("encode done texts.txt full", "full: holds other files; name an empty or a new folder"),
    ("encode done texts.txt new --format x", "--format: 'x' is unknown; allowed: npy, arrow"),
    ("encode done texts.txt new --blank x", "--blank: 'x' is unknown; allowed: zero, drop"),
    ("sweep", "the following arguments are required: ACTION; see `embedscale sweep --help`"),
    ("sweep nope", "ACTION: invalid choice: 'nope'"),
    ("sweep plan", "the following arguments are required: SWEEP; see `embedscale sweep plan --help`"),
    ("sweep plan nope.yaml", "nope.yaml: there is no such file"),
    ("sweep plan full", "full: is a folder; give the YAML file of the sweep"),
    ("sweep plan key.yaml", "key.yaml: axis: unknown setting; did you mean 'axes'?"),
    ("sweep plan with_cluster.yaml", "cluster.yaml: max_gpu: unknown setting; did you mean 'max_gpus'?"),
    ("sweep plan sweep.yaml axes.budget=[]", "budget: is an empty list; expected one value or more"),
    ("sweep plan sweep.yaml axes.budget=[x]", "budget: 'x' is given; expected a number"),
    ("sweep plan sweep.yaml include[0].budget=3", "include: has no entry [0]; the list is empty"),
    ("sweep plan sweep.yaml --max-gpu-hours nan", "--max-gpu-hours: 'nan' is not a number"),
    ("sweep prefetch nope.yaml", "nope.yaml: there is no such file"),
    ("sweep submit sweep.yaml --to mars", "--to: 'mars' is unknown; allowed: slurm, here"),
    ("sweep submit sweep.yaml --max-gpu-hours few", "--max-gpu-hours: 'few' is not a number"),
    ("sweep status sweep.yaml nope=1", "nope: unknown setting; did you mean 'name'?"),
    ("sweep watch sweep.yaml --every 0", "--every: 0.0 is out of range; allowed: above 0"),
    ("sweep cancel sweep.yaml more", "'more' is not a key=value word; only the first word may be a file"),
    ("fit", "the following arguments are required: RUNS; see `embedscale fit --help`"),
    ("fit nope", "nope: does not exist; allowed: a folder of runs, or a table"),
    ("fit full", "full: holds no run; expected run directories"),
    ("fit run.yaml", "run.yaml: has the ending '.yaml'; allowed: .csv"),
    ("fit columns.csv", "columns.csv: column 'loss' is missing; name it by --columns loss=NAME"),
    ("fit table.csv --columns x", "columns: 'x' was found; write NAME=VALUE"),
    ("fit table.csv --out full/file", "--out: full/file is a file; give a folder"),
    ("fit table.csv --replay largest --out full/file/new", "--out: full/file is a file; give a folder"),
    ("fit table.csv --simulate E=1 --out full/file", "--out: full/file is a file; give a folder"),
    ("fit table.csv --law nope", "law: 'nope' is unknown; allowed: chinchilla, tied"),
    ("fit table.csv --optimum nope", "optimum: 'nope' is unknown"),
    ("fit table.csv --seed 1.5", "--seed: '1.5' is not a whole number; see `embedscale fit --help`"),
    ("fit table.csv more", "more: not an argument of this verb; see `embedscale fit --help`"),
    ("fit sweep.yaml --simulate E=1", "simulate: E are not the coefficients of a law"),
    ("recipe full 1e15", "full/fits.json: does not exist; write it by embedscale fit RUNS"),
    ("recipe full", "budget: nothing is given; allowed: a budget such as 1e17, --tokens, or both"),
    ("recipe full -1e15", "budget: -1e15 is out of range; allowed: above 0"),
    ("recipe full 1e15 --tokens few", "--tokens: 'few' is not an amount with a known unit; allowed: 2e9,"),
    ("report nope", "nope: does not exist; write it by embedscale fit RUNS"),
    ("report full --out full/file", "--out: full/file is a file; give a folder"),
    ("report full --budget lots", "budget: 'lots' is not an amount with a known unit; allowed: 1e17,"),
    ("doctor --cluster cluster.yaml", "cluster.yaml: max_gpu: unknown setting; did you mean 'max_gpus'?"),
    ("doctor --sweep nope.yaml", "nope.yaml: there is no such file"),
]

PROGRAM = """
import contextlib, io, json, sys
from embedscale import cli
answers = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    heavy = {"torch", "transformers", "lightning", "mteb", "datasets"} & sys.modules.keys()
    answers.append((code, out.getvalue(), err.getvalue(), sorted(heavy)))
json.dump(answers, sys.__stdout__)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Run every command in a folder with the files, and return what each of them answered."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "done").mkdir()
    (folder / "done" / "record.json").write_text(json.dumps(WHOLE))
    before = sorted(folder.rglob("*"))
    commands = json.dumps([words.split() for words, _ in WRONG])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=commands,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before, "a refused command has written something"
    return dict(zip([words for words, _ in WRONG], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_command_gets_one_line_before_any_heavy_import(answers, words, message):
    code, out, err, heavy = answers[words]
    assert code == 2 and err.startswith("embedscale: ") and message in err, err
    assert err.count("\n") == 1 and out == "" and heavy == []


def test_every_verb_is_given_a_wrong_command():
    verbs = {" ".join(words.split()[: 2 if words.startswith("sweep ") else 1]) for words, _ in WRONG}
    assert cli.VERBS.keys() <= verbs and len(WRONG) >= 60


def test_the_shell_gets_the_line_and_the_status():
    done = subprocess.run([sys.executable, "-m", "embedscale.cli", "flops", "--nope"], capture_output=True, text=True)
    message = "embedscale: --nope: not an argument of this verb; see `embedscale flops --help`\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_the_help_of_train_names_every_section_of_settings(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    for item in fields(RunConfig):
        assert item.name in options.REFERENCE
        assert not is_dataclass(item.type) or f"{item.name}," in options.REFERENCE.replace(";", ",")
    assert " ".join(options.REFERENCE.split()[-6:]) in " ".join(said.split())
