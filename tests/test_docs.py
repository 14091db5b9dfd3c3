"""The documentation is correct: its commands run, its links work, its notebook runs.

Every line of every `sh` block of the README and of docs/ is run, page by page, in a folder that looks like a clone with
a finished quickstart. A line that several pages share runs once. docs_by_hand.sh lists the commands that take minutes
or need a cluster, with the reason. A block with a caption is written to the file that the caption names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest

from embedscale.data.installed_python import documented_functions, installed_files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "tests" / "analysis")]
import check_site  # noqa: E402
import generate  # noqa: E402
from sweeps import miniature  # noqa: E402

FENCE = re.compile(r"^```(\{code-block\} )?(\w+)\n(?::caption: (\S+)\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_HAND = ROOT / "tests" / "docs_by_hand.sh"
A_TENTH = {  # of the quickstart's pairs, of which as many are held out
    "{kind: installed-python}": "{kind: jsonl, path: functions.jsonl}",
    "held_out: 0.03": "held_out: 0.3",
}
RAN = {"embedscale prepare configs/quickstart.yaml", "embedscale fit runs/quickstart"}  # the fixture runs these first


def commands(text: str) -> list[str]:
    """Return the commands of a page, and commands that write the files that captions name."""
    found = []
    for _, language, caption, body in FENCE.findall(text):
        if caption:
            found.append(f"cat > {caption} << 'END OF FILE'\n{body}END OF FILE")
        elif language == "sh":
            found += [line for line in body.splitlines() if line]
    return found


def run_by_hand() -> set[str]:
    """Return the commands of docs_by_hand.sh as they stand on the pages."""
    lines = [line for line in BY_HAND.read_text().splitlines() if line and not line.startswith(("#", "set ", ": <<"))]
    return {re.sub(r"^(echo y \| |timeout \d+ )| \|\| true.*$", "", line) for line in lines}


def run(words: list[str], folder: Path, **variables: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    done = subprocess.run(
        words, cwd=folder, env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Return a folder like a clone: the configurations, the quickstart's store and a folder of finished runs.

    Reading every installed file takes 40 s of a core, so the store has a tenth of the quickstart's pairs.
    """
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", folder / "configs")
    functions = chain.from_iterable(documented_functions(path, Counter()) for path in installed_files())
    rows = [json.dumps({"query": pair.query, "pos": pair.positive}) for pair in islice(functions, 8000)]
    (folder / "functions.jsonl").write_text("\n".join(rows))
    for path in (folder / "configs").rglob("quickstart.yaml"):
        text = path.read_text()
        for whole, part in A_TENTH.items():
            assert whole in text
            text = text.replace(whole, part)
        path.write_text(text)
    miniature(folder / "runs" / "quickstart")
    for line in RAN:
        run(line.split(), folder)
    return folder


@pytest.mark.parametrize(
    "page", [p for p in PAGES if commands(p.read_text())], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_commands_of_a_page_run(page, clone):
    script = [line for line in commands(page.read_text()) if line not in run_by_hand() | RAN]
    run(["bash", "-ex", "-c", "\n".join(script)], clone, SLURM_CONF=os.devnull)  # no cluster
    RAN.update(line for line in script if line.startswith("embedscale ") and "$" not in line)


def test_every_command_of_the_script_is_on_a_page():
    every = {line for page in PAGES for line in commands(page.read_text())}
    assert run_by_hand() - every - {"LISTED"} == set()


def test_the_links_of_the_readme_exist():
    for name in ("README.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_the_check_of_the_site_finds_errors(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#here">B</a><a href="#top">up</a>')
    (tmp_path / "b.html").write_text('<p id="here"><a href="https://example.org">away</a></p>')
    assert check_site.problems(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<a href="c.html"></a><a href="a.html#x"></a><img src="https://example.org/i.png">'
    )
    found = check_site.problems(tmp_path)
    assert [line.split(": ")[0] for line in found] == ["a.html", "b.html", "b.html", "b.html"]
    assert any("another host" in line for line in found) and any("c.html, which is not there" in line for line in found)


def test_every_setting_is_explained():
    for name, page in generate.pages().items():
        for row in page.splitlines():
            assert not (row.startswith("| ") and row.endswith("|  |")), f"{name}: {row}"


def test_the_notebook_holds_its_outputs_and_runs(clone):
    notebook = json.loads((ROOT / "docs" / "notebooks" / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["execution_count"] for cell in cells) and any(cell["outputs"] for cell in cells)
    run([sys.executable, "-c", "\n".join("".join(cell["source"]) + "\n" for cell in cells)], clone, MPLBACKEND="agg")
