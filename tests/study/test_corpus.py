"""The study's corpus: each parser on a few lines of its source, near-duplicates, and held-out articles."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "configs" / "study"))
import corpus
import sources
from sources import Entry

from embedscale.data.prepare import prepare
from embedscale.data.store import PairStore
from embedscale.run.config import Data, RunConfig, Source

ROOT = Path(__file__).parents[2]


def test_each_paragraph_of_a_description_is_a_pair_and_headings_join_the_next():
    translation = (
        "Package: chess-tool\nDescription-md5: 00\nDescription-en: plays chess against people\n"
        " A program that plays chess and explains\n every move it makes.\n .\n Features:\n .\n"
        " It runs on any machine with a network and a screen.\n\n"
        "Package: no-description\n"
    )
    [entry] = sources.descriptions(translation)
    assert entry == Entry(
        "plays chess against people",
        (
            ("plays chess against people", "A program that plays chess and explains every move it makes."),
            ("plays chess against people", "Features: It runs on any machine with a network and a screen."),
        ),
    )


def test_wordnet_pairs_lemmas_with_gloss_and_examples_with_both():
    data = (
        "  1 a line of the licence | with a bar\n"
        "02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a tame animal; has been kept for ages; "
        '"the dog barked all night"; "dog"  \n'
        "00001740 00 a 01 able(p) 0 000 | having the skill  \n"
    )
    dog, able = sources.wordnet(data)
    gloss = "a tame animal; has been kept for ages"
    assert dog.pairs == (
        ("dog, domestic dog", gloss),
        ("the dog barked all night", f"dog, domestic dog: {gloss}"),
    )
    assert able.pairs == (("able", "having the skill"),)


def test_dictd_yields_each_article_once_in_the_order_of_the_file():
    content = "Info\nEin Bäh\n   ein Laut\nzwei\n   2\n".encode()
    index = "zwei\ta\tK\n00-database-info\tA\tF\nbäh\tF\tV\nein\tF\tV\n"
    assert list(sources.dictd(index, content)) == [("bäh", "Ein Bäh\n   ein Laut\n"), ("zwei", "zwei\n   2\n")]


GCIDE = r"""Ferment \Fer"ment\ (f[~e]r"m[e^]nt), n. [L. fermentum; cf. F. ferment (of {Fervent}).]
   1. That which causes fermentation, as yeast, or {barm}[1].
      [Obs.]
      [1913 Webster]

            Down to the lowest lees the ferment ran. --Thomson.
      [1913 Webster]

   2. See {Tumult}.

   Note: Ferments are of two kinds.

   {ferment oils}, volatile oils produced by the fermentation of
      plants.

   3. a state of agitation
      [WordNet 1.5]
"""


def test_the_markup_of_gcide_is_removed():
    entry = sources.gcide(GCIDE)
    assert entry.title == "Ferment"
    assert entry.pairs == (
        ("Ferment", "That which causes fermentation, as yeast, or barm."),
        ("Down to the lowest lees the ferment ran.", "Ferment: That which causes fermentation, as yeast, or barm."),
        ("ferment oils", "volatile oils produced by the fermentation of plants."),
    )


def test_letters_of_gcide_become_ascii():
    assert sources.gcide("Torul[ae]\n   A caf['e] of [=a]ges.\n").pairs == (("Torulae", "A cafe of ages."),)


def test_links_dates_and_pronunciation_of_foldoc_and_the_jargon_file_are_removed():
    foldoc = (
        "LERP\n\n   <graphics> To fill in between {pixels} that lie near.\n\n   [{Jargon File}]\n\n   (1999-06-30)\n"
    )
    assert sources.foldoc(foldoc).pairs == (("LERP", "(graphics) To fill in between pixels that lie near."),)
    jargon = "filter\n /fil't@/, n.\n\n    [very common; {Unix}] A program that processes a stream of data.\n\n    G\n"
    assert sources.foldoc(jargon).pairs == (("filter", "A program that processes a stream of data."),)
    assert sources.foldoc("HAL\n\n   See {Hardware Abstraction Layer}.\n").pairs == ()


def test_vera_and_manual_pages():
    assert sources.vera("FHE\n       Fully Homomorphic Encryption (cryptography,\nmaths)\n").pairs == (
        ("FHE", "Fully Homomorphic Encryption (cryptography, maths)"),
    )
    page = (
        ".TH qsort 3\n.SH NAME\nqsort, qsort_r \\- sort an array\n.SH SYNOPSIS\n.nf\nvoid qsort();\n.fi\n"
        ".SH DESCRIPTION\nThe\n.BR qsort ()\nfunction sorts an array of\n\\fInmemb\\fP elements in place.\n.PP\n"
        '.nf\nint code;\n.fi\nIts contents are ordered by a function that\n.I compar\npoints to.\n.SH "SEE ALSO"\nls\n'
    )
    name = "qsort, qsort_r - sort an array"
    assert sources.manual(page).pairs == (
        (name, "The qsort() function sorts an array of nmemb elements in place."),
        (name, "Its contents are ordered by a function that compar points to."),
    )
    assert sources.manual(".SH SYNOPSIS\nnothing\n").pairs == ()


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (("ant", "One two three four."), ("bee", "one, TWO three four"), "same beginning"),
        (("ant", "x " * 80 + "end"), ("bee", "x " * 80 + "another end"), "same beginning"),
        (("dog, hound", "a tame animal"), ("Hound", "A tame old animal of the house."), "same meaning"),
        (("hound", "a tame animal"), ("hound", "to follow somebody everywhere"), None),
        (("hound", "a tame animal"), ("cat", "a tame, furry animal"), None),
        (("hound", "a tame animal"), ("cat", "See dog"), "short"),
    ],
)
def test_near_duplicates(first, second, reason):
    seen = corpus.NearDuplicates()
    assert seen.reason(*first) is None
    assert seen.reason(*second) == reason


def made_up_debian(folder: Path, articles: int) -> None:
    """Write the files that `fetch` downloads, with few articles."""
    root = folder / "root/usr/share"
    for name in ("wordnet", "dictd", "man/man1"):
        (root / name).mkdir(parents=True)
    (folder / "apt/lists").mkdir(parents=True)
    stanzas = [
        f"Package: p{i}\nDescription-en: tool number {i}\n Tool {i} measures the quantity {i * 7} in a sea of them.\n"
        f" .\n The quantity {i * 7} is printed by the tool, {i} times over.\n"
        for i in range(articles)
    ]
    (folder / "apt/lists/debian_Translation-en").write_text("\n".join(stanzas))
    for part in ("noun", "verb", "adj", "adv"):
        line = f'00001740 03 n 01 {part} 0 000 | a {part} of the language; "this is called a {part}"  \n'
        (root / f"wordnet/data.{part}").write_text(line)
    for name in ("jargon", "foldoc", "gcide", "vera"):
        article = f"{name}\n   The content of the dictionary that is called {name}.\n".encode()
        (root / f"dictd/{name}.dict.dz").write_bytes(gzip.compress(article))
        digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        length = digits[len(article) // 64] + digits[len(article) % 64]
        (root / f"dictd/{name}.index").write_text(f"{name}\tA\t{length}\n")
    page = b".SH NAME\nls - list\n.SH DESCRIPTION\nLists the files of a folder in the order of their names.\n"
    (root / "man/man1/ls.1.gz").write_bytes(gzip.compress(page))


def test_build_and_prepare_hold_out_the_same_whole_articles(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT", 0.2)
    made_up_debian(tmp_path, articles=300)
    first, again = corpus.build(tmp_path), corpus.build(tmp_path)
    assert first == again
    counts = sum(map(Counter, first["counts"].values()), Counter())

    files = sorted((tmp_path / "pairs").iterdir())
    assert len(files) == len(corpus.SOURCES)
    store = tmp_path / "store"
    backbone = ROOT / "configs/quickstart/backbones/tiny-7k"
    data = Data(str(store), [Source(path=str(path)) for path in files], str(backbone), context=128, held_out=0.2)
    prepare(RunConfig(data=data))
    made = PairStore.open(store)
    assert made.held_out == counts["held out"] > 0
    assert made.pairs + made.held_out == counts["pairs"]

    held_out = (tmp_path / "texts/held_out.txt").read_text().splitlines()
    train = (tmp_path / "texts/train.txt").read_text().splitlines()
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    apart = corpus.is_held_out([row["query"] for row in rows])
    for row, out in zip(rows, apart, strict=True):
        assert not any(row["pos"][0] in text for text in (train if out else held_out))
    queries = {row["query"] for row, out in zip(rows, apart, strict=True) if out}
    assert {text.partition(":")[0] for text in held_out} <= queries | {"noun", "verb", "adj", "adv"}
    assert len(train) + len(held_out) == 300 + 4 + 5
