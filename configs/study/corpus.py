"""Make the study's English corpus from Debian packages: text pairs for the runs, texts for pre-training.

    python configs/study/corpus.py stores/study-corpus [--mirror URL]

apt-get fetches the package lists and the packages of Debian 12 into this folder. It needs no root, and it does not read
the machine's own lists or packages. The folder then holds

    pairs/SOURCE.jsonl           {"query", "pos"}, what `embedscale prepare` reads
    texts/train.txt held_out.txt one article per line, shuffled over the sources
    manifest.json                versions, licences, counts and digests

`prepare` holds a pair out by the hash of its query. This script applies the same rule, and then drops the other pairs
of the same article, so that no article is in both parts. A text for pre-training is made of the pairs that remain.

A pair is a near-duplicate of an earlier one, and dropped, if
  1. the first 128 bytes of its positive (letters and digits, lower case) are those of an earlier positive: the models
     read 128 bytes and could not distinguish the two; or
  2. it has a name in common with an earlier query, and the positives share half of the words of the shorter one:
     GCIDE and WordNet, or FOLDOC and the Jargon File, define a word alike.
Sources come in the order of `SOURCES`, the cleanest first, so that the cleaner version of a pair stays.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import sources
from sources import Entry

from embedscale.data.tokens import text_hashes

MIRROR = "http://deb.debian.org/debian"  # http://snapshot.debian.org/archive/debian/DATE repeats an old state
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"  # package debian-archive-keyring
CONTEXT = 128  # bytes of a text that a model reads
HELD_OUT = 0.02  # as data.held_out of sweep.yaml

PACKAGES = {  # → licence
    "wordnet-base": "WordNet 3.0",
    "dict-jargon": "public domain",
    "dict-foldoc": "GFDL 1.1+",
    "dict-gcide": "GPL 2+",
    "dict-vera": "GFDL 1.1+",
    "manpages": "of each page, mostly GPL 2+ and Linux-man-pages-copyleft",
    "manpages-dev": "of each page, mostly GPL 2+ and Linux-man-pages-copyleft",
    "libssl-doc": "Apache 2.0",
    "perl-doc": "Artistic or GPL 1+",
    "git-man": "GPL 2",
}
SOURCES = ("descriptions", "wordnet", "manual", "jargon", "foldoc", "gcide", "vera")


def fetch(folder: Path, mirror: str) -> dict[str, str]:
    """Download and unpack the packages and the descriptions below `folder`. Returns the packages' versions."""
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "packages", "empty"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYS}] {mirror} bookworm main\n")
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": apt / "empty",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "amd64",  # the packages are for all architectures, but the list is for one
        "APT::Architectures": "amd64",
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
        "Acquire::Check-Valid-Until": "false",  # the list of an old state is out of date
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", "-q", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "download", *PACKAGES], check=True, cwd=apt / "packages")
    versions = {}
    for package in sorted((apt / "packages").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
        name, version = package.name.split("_")[:2]
        versions[name] = version.replace("%3a", ":")
    return versions


def entries(folder: Path, source: str) -> Iterator[Entry]:
    """Yield a source's entries in a fixed order."""
    root = folder / "root/usr/share"
    if source == "descriptions":
        [translation] = (folder / "apt/lists").glob("*_Translation-en")
        yield from sources.descriptions(translation.read_text("utf-8"))
    elif source == "wordnet":
        for part in ("noun", "verb", "adj", "adv"):
            yield from sources.wordnet((root / f"wordnet/data.{part}").read_text("utf-8"))
    elif source == "manual":
        for path in sorted(root.glob("man/man*/*.gz")):
            if not path.is_symlink():
                yield sources.manual(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    else:
        parse = {"jargon": sources.foldoc}.get(source) or getattr(sources, source)
        content = gzip.decompress((root / f"dictd/{source}.dict.dz").read_bytes())
        for _, article in sources.dictd((root / f"dictd/{source}.index").read_text("utf-8"), content):
            yield parse(article)


class NearDuplicates:
    """The pairs seen so far, by the two rules of this file's docstring."""

    def __init__(self) -> None:
        self.positives: set[bytes] = set()
        self.meanings: dict[str, list[set[str]]] = defaultdict(list)

    def reason(self, query: str, positive: str) -> str | None:
        """Return why the pair is dropped, or None; then the pair counts as seen."""
        words = re.findall(r"[a-z0-9]+", positive.lower())
        beginning = hashlib.blake2b(" ".join(words).encode()[:CONTEXT], digest_size=8).digest()
        names = {" ".join(re.findall(r"[a-z0-9]+", name.lower())) for name in query.split(", ")}
        if len(words) < 3 or not any(names) or len(query.encode()) < 2:
            return "short"
        if beginning in self.positives:
            return "same beginning"
        these = set(words)
        for name in names:
            for others in self.meanings[name]:
                if 2 * len(these & others) >= min(len(these), len(others)):
                    return "same meaning"
        self.positives.add(beginning)
        for name in names:
            self.meanings[name].append(these)
        return None


def is_held_out(texts: list[str]) -> list[bool]:
    """Return which queries `embedscale prepare` holds out: those with the smallest hashes."""
    return [(int(value) >> 11) / 2.0**53 < HELD_OUT for value in text_hashes(texts)]


def select(entries: Iterator[Entry], seen: NearDuplicates, counts: Counter[str]) -> Iterator[tuple[Entry, bool]]:
    """Yield the entries with their remaining pairs, and whether they are held out; count what is dropped and why."""
    for entry in entries:
        kept = []
        for query, positive in entry.pairs:
            reason = seen.reason(query, positive)
            counts[reason or "new"] += 1
            if reason is None:
                kept.append((query, positive))
        apart = is_held_out([query for query, _ in kept])
        if any(apart):
            counts["article held out"] += apart.count(False)
            kept = [pair for pair, out in zip(kept, apart, strict=True) if out]
        counts["pairs"] += len(kept)
        counts["held out"] += sum(apart)
        if kept:
            yield Entry(entry.title, tuple(kept)), any(apart)


def text_of(entry: Entry) -> str:
    """Return an article as one text: the title, and what its pairs say beyond it, once each."""
    said = dict.fromkeys(text for pair in entry.pairs for text in pair if not text.startswith(f"{entry.title}: "))
    return f"{entry.title}: {' '.join(text for text in said if text != entry.title)}"


def build(folder: Path) -> dict[str, object]:
    """Write pairs and texts from what was fetched. Returns counts and digests."""
    seen = NearDuplicates()
    texts: dict[bool, list[str]] = {False: [], True: []}
    counts: dict[str, Counter[str]] = {}
    digests = {}
    for name in ("pairs", "texts"):
        (folder / name).mkdir(exist_ok=True)
    for source in SOURCES:
        counts[source] = Counter(bytes=0)
        lines = []
        for entry, apart in select(entries(folder, source), seen, counts[source]):
            lines += [json.dumps({"query": q, "pos": [p]}, ensure_ascii=False) for q, p in entry.pairs]
            texts[apart].append(text_of(entry))
            counts[source]["bytes"] += sum(min(len(t.encode()), CONTEXT) for pair in entry.pairs for t in pair)
        digests[f"pairs/{source}.jsonl"] = _write(folder / f"pairs/{source}.jsonl", lines)
        print(source, dict(counts[source]), flush=True)
    for apart, name in ((False, "train"), (True, "held_out")):
        shuffled = sorted(texts[apart], key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
        digests[f"texts/{name}.txt"] = _write(folder / f"texts/{name}.txt", shuffled)
    return {"counts": {name: dict(count) for name, count in counts.items()}, "sha256": digests}


def _write(path: Path, lines: list[str]) -> str:
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what is made; about 500 MB")
    parser.add_argument("--mirror", default=MIRROR, help=f"Debian archive (default: {MIRROR})")
    args = parser.parse_args()
    folder = Path(os.path.abspath(args.folder))  # noqa: PTH100, a link stays one
    folder.mkdir(parents=True, exist_ok=True)
    versions = fetch(folder, args.mirror)
    [release] = (folder / "apt/lists").glob("*_InRelease")
    [date] = re.findall(r"^Date: (.*)$", release.read_text(), re.MULTILINE)[:1]
    packages = {name: {"version": versions[name], "licence": PACKAGES[name]} for name in PACKAGES}
    made = {"release": date, "packages": packages} | build(folder)
    (folder / "manifest.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made["sha256"], indent=2))


if __name__ == "__main__":
    main()
