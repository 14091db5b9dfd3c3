"""A real browser that shows a page and runs a script in it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from analysis.page.live import library

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needed = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

# The page is in a frame, because a browser window cannot be as narrow as a phone. Without a charset, the browser
# guesses one from the first bytes that it happens to read.
FRAME = """<meta charset=utf-8>
<body style="margin:0"><iframe id=frame style="width:%dpx;height:%dpx;border:0" srcdoc="%s"></iframe><script>
window.onload = async () => {
  const frame = document.getElementById("frame"), page = frame.contentDocument, window = frame.contentWindow;
  document.title = JSON.stringify(await (async () => {%s})());
};
</script>"""


def browse(page: str, folder: Path, script: str, width: int = 1280, height: int = 900, dark: bool = False) -> Any:
    """Return what a script returns that runs beside the page; it knows `page`, its document, and `window`."""
    assert CHROMIUM is not None
    file = folder / "frame.html"
    file.write_text(FRAME % (width, height, html.escape(page), script))
    found = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"),
            *("--hide-scrollbars", f"--window-size={width},{height}", "--virtual-time-budget=20000"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", found.stdout, re.DOTALL)[1]))


def own(page: str) -> str:
    """Return the page without the code of plotly.js."""
    return page.replace(library(), "")
