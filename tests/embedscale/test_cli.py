"""The command line itself: where settings may stand, and the messages for errors that no verb catches."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from embedscale import cli
from embedscale.errors import FAILED, INTERRUPTED, WRONG
from embedscale.files import write_atomically
from embedscale.options import parse
from embedscale.run import settings
from embedscale.training.pricing import flops


@pytest.mark.parametrize(
    ("words", "settings", "option"),
    [
        ("flops Q --budgets 1e11 2e11 budget=3e11", ["Q", "budget=3e11"], ("budgets", ["1e11", "2e11"])),
        ("train Q budget=1 --fits F --recipe 1e12 output=x", ["Q", "budget=1", "output=x"], ("fits", "F")),
        ("train --fits a=b --recipe 1e12 Q output=x", ["Q", "output=x"], ("fits", "a=b")),
        ("sweep submit S a=1 --to here name=x", ["a=1", "name=x"], ("to", "here")),
        ("sweep submit --evaluate paper X name=x --to here S", ["name=x"], ("evaluate", ["paper", "X"])),
    ],
)
def test_settings_may_stand_before_and_after_options(words, settings, option):
    args = parse(words.split())
    assert args.words == settings and getattr(args, option[0]) == option[1]


@pytest.mark.parametrize("words", ["train Q --nope a=b", "fit RUNS a=b", "export RUN FOLDER MORE"])
def test_unknown_words_and_options_are_refused(words, capsys):
    assert cli.main(words.split()) == WRONG
    assert "not an argument of this verb" in said(capsys)


def test_fits_without_a_recipe_are_refused(capsys):
    assert cli.main(["train", "--fits", "FOLDER"]) == WRONG
    assert "--recipe" in capsys.readouterr().err


def said(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def flops_that(monkeypatch, do) -> int:
    monkeypatch.setattr(flops, "print_flops", lambda *_: do())
    return cli.main(["flops"])


def test_an_error_of_the_system_is_one_line_that_names_the_file(tmp_path, tiny_run, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert cli.main(["train", *tiny_run, "budget=5e9", f"output={tmp_path / 'file'}"]) == WRONG
    assert said(capsys).startswith(f"embedscale: {tmp_path / 'file'}/")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code = flops_that(patch, lambda: write_atomically(tmp_path / "new", lambda file: file.write(b"text")))
    assert code == FAILED and said(capsys) == f"embedscale: {tmp_path / 'new'}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def library():
        raise OSError("200 requested and 100 written")

    with pytest.raises(OSError, match="requested"):  # not an error of the system, so the traceback is shown
        flops_that(monkeypatch, library)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory\nmore"),
        ImportError("lib.so: failed to map segment from shared object"),
    ],
    ids=str,
)
def test_too_little_memory_is_one_line(capsys, monkeypatch, error):
    def short():
        raise error

    assert flops_that(monkeypatch, short) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"embedscale: too little memory: {error}".strip().splitlines()[0]


@pytest.mark.parametrize("library", ["torch", "safetensors", "numpy"])
def test_a_failed_write_reports_the_cause_and_not_the_error_of_a_library(tmp_path, library):
    values = torch.zeros(10**6)
    write = {
        "torch": lambda file: torch.save(values, file),
        "safetensors": lambda file: save_file({"values": values}, file.name),
        "numpy": lambda file: np.save(file, values.numpy()),
    }[library]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # acts like a full disk
    try:
        with pytest.raises(OSError) as raised:
            write_atomically(tmp_path / "file", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_a_verb_handles_it_interrupts(capsys, monkeypatch, number):
    def wait():
        os.kill(os.getpid(), number)
        time.sleep(60)

    assert flops_that(monkeypatch, wait) == INTERRUPTED
    assert said(capsys) == "embedscale: interrupted"


def test_an_interrupt_that_a_library_hides_still_interrupts(capsys, monkeypatch):
    def load(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        finally:
            raise UnboundLocalError("of OmegaConf")

    monkeypatch.setattr(settings, "load", load)
    assert cli.main(["flops"]) == INTERRUPTED
    assert said(capsys) == "embedscale: interrupted"


def test_a_character_that_the_terminal_lacks_is_replaced():
    words = [sys.executable, "-m", "embedscale.cli", "sweep", "submit", "--help"]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"held-out, paper, ?" in b" ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training=3", "training: 3 is given; expected a mapping of settings"),
        ("data.sources={kind: jsonl}", "data.sources: a mapping is given; expected a list"),
        ("budget=[1e11", "'budget=[1e11': the value after the '=' is not valid YAML"),
        ("training.seed=-1", "training.seed: -1 is out of range"),
        ("trainin.seed=1", "trainin: unknown setting; did you mean 'training'"),
        ("data.sources=3", "data.sources: '3' is given; expected a list"),
        ("method.targets=q_proj", "method.targets: 'q_proj' is given; expected a list"),
        ("data.sources=[{weight: x}]", "data.sources.weight: expected a number"),
        ("training.batch_size=many", "training.batch_size: 'many' is given; expected a whole number"),
        ("training.lr=1e-3", "training.lr: unknown setting; did you mean 'training.learning_rate'?"),
        ("data.sources[0].path=x", "data.sources: has no entry [0]; the list is empty"),
        ("another.yaml", "'another.yaml' is not a key=value word; only the first word may be a file"),
        ("=1", "'=1' is not a key=value word"),
    ],
)
def test_an_error_in_a_word_names_the_setting_and_not_the_file(tmp_path, capsys, word, message):
    file = tmp_path / "run.yaml"
    file.write_text("budget: 1e11")
    assert cli.main(["flops", str(file), word]) == WRONG
    assert said(capsys).startswith(f"embedscale: {message}")


def test_an_error_in_the_file_names_the_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("training: 3")
    assert cli.main(["flops", str(file), "budget=1e11"]) == WRONG
    assert said(capsys) == f"embedscale: {file}: training: 3 is given; expected a mapping of settings to values"


def a_verb_that(tmp_path, do: str, words: str = "", **options):
    """Run the command line with `python -m` and a verb that runs this code."""
    imports = "import atexit, os, signal, socket, sys\nfrom embedscale import cli"
    imports += "\nfrom embedscale.training.pricing import flops"
    program = f"{imports}\n\ndef do(*_):\n    {do}\n\n{words}\nflops.print_flops = do\nsys.exit(cli.main(['flops']))\n"
    (tmp_path / "program.py").write_text(program)
    return subprocess.run(
        [sys.executable, "-m", "program"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60, **options
    )


def test_a_closed_socket_does_not_end_a_command(tmp_path):
    """As when W&B's service is killed: the write raises an error that can be caught, and the process goes on."""
    do = "a, b = socket.socketpair(); b.close()\n    try: a.send(b'x')\n    except BrokenPipeError: return 3"
    done = a_verb_that(tmp_path, do)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(("stdout", "code", "message"), [("closed", 3, ""), ("/dev/full", FAILED, "No space left")])
def test_a_closed_pipe_is_no_error_and_a_full_disk_is_one(tmp_path, stdout, code, message):
    if stdout == "closed":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(stdout, os.O_WRONLY)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = a_verb_that(tmp_path, "print('a table'); return 3", stdout=writer, env=environment)
    os.close(writer)
    assert done.returncode == code and message in done.stderr and len(done.stderr.splitlines()) == bool(message)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_changes_the_exit_status_only_if_it_interrupts(tmp_path, number):
    """It interrupts `exec` (an imported dataclass) as other code; while Python ends, it interrupts nothing."""
    kill = f"os.kill(os.getpid(), {int(number)})"
    done = a_verb_that(tmp_path, f"exec('{kill}; signal.pause()')")
    assert (done.returncode, done.stderr) == (INTERRUPTED, "embedscale: interrupted\n")
    done = a_verb_that(tmp_path, "return 3", f"atexit.register(lambda: {kill})")
    assert (done.returncode, done.stderr) == (3, "")
