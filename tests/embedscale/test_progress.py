"""Progress bars are drawn on a terminal and nowhere else."""

import os
import pty
import subprocess
import sys

WORK = """
from embedscale.progress import Bar
with Bar("encoding", total=4) as bar:
    for _ in range(4):
        bar.advance()
with Bar("run [bold]x", total=200, completed=50, share=True) as bar:
    bar.say("loss [/red] 0.25", completed=100)
with Bar("fit") as bar:
    bar.say("full")
"""


def test_no_bar_is_drawn_without_a_terminal():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_a_bar_shows_name_amount_and_text():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            some = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not some:
            break
        said += some
    os.close(ours)
    assert process.communicate()[0] == b"" and process.returncode == 0
    text = said.decode()
    for expected in ("encoding", "4/4", "run [bold]x", "50 %", "loss [/red] 0.25", "fit", "full"):
        assert expected in text, expected
