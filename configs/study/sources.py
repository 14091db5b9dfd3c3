"""Read the text pairs of the study's sources: Debian's package descriptions, dictionaries and manual pages.

Each parser turns an article into an `Entry`: its title, and its pairs of a short text and the longer text that it
should find. A long article gives a pair for each of its first passages, because the models read 128 bytes of a text.
Each parser has a few rules that clean nearly all of its source. An article that the rules do not fit is dropped or
keeps some markup.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# GCIDE writes letters outside ASCII as names in brackets, and an accent as a mark before or after the letter.
NAMED = {
    "ae": "ae",
    "AE": "AE",
    "oe": "oe",
    "eth": "dh",
    "thorn": "th",
    "aum": "a",
    "oum": "o",
    "uum": "u",
    "imac": "i",
}
NAMED |= {"asl": "a", "deg": " degrees", "frac12": "1/2", "frac14": "1/4", "rarr": "->", "ccedil": "c", "th": "th"}
LETTER = re.compile(r"\[[^\w\s\[\]]{0,2}([A-Za-z]{1,2})[^\w\s\[\].]{0,2}\]")
SPEECH = r"(?:(?:n|v|t|i|a|adj|adv|prep|conj|interj|pron|p|pr|imp|vb|pl|sing|superl|compar|obs|prefix|suffix)\.?)"
SPEECH_RUN = re.compile(rf"^[,;\s]*(?:{SPEECH}(?:[\s,;&]+(?:or |and )?|$))+")
CROSS_REFERENCE = re.compile(r"^(?:\([^)]*\) ?)?(?:Same as|See|Cf\.|Alt\. of|pl\. of|imp\.|p\. p\.|of \w+[.,])", re.I)


PASSAGES = 8  # most passages of an article; each is a pair


@dataclass(frozen=True)
class Entry:
    """One article: its title and its (query, positive) pairs."""

    title: str
    pairs: tuple[tuple[str, str], ...]


def titled(title: str, passages: list[str]) -> Entry:
    """Return the entry whose title is the query of each of its first passages."""
    return Entry(title, tuple((title, passage) for passage in passages[:PASSAGES]))


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text, each on one line, none of them shorter than 40 characters.

    A shorter paragraph, such as the heading of a list, is joined to the next one.
    """
    found, short = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        short = one_line(f"{short} {paragraph}")
        if len(short) >= 40:
            found.append(short)
            short = ""
    return found or ([short] if short else [])


def one_line(text: str) -> str:
    """Return the text with every run of white space replaced by one space."""
    return " ".join(text.split())


def descriptions(translation: str) -> Iterator[Entry]:
    """Yield short description → paragraphs of the long one for each package of a Debian Translation-en file."""
    for stanza in translation.split("\n\n"):
        _, found, body = stanza.partition("Description-en: ")
        if not found:
            continue
        short, *long = body.split("\n")
        yield titled(one_line(short), paragraphs("\n".join("" if line.strip() == "." else line for line in long)))


def wordnet(data: str) -> Iterator[Entry]:
    """Yield lemmas → gloss, and each example → lemmas and gloss, of a WordNet data file."""
    for line in data.splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        fields, _, gloss = line.partition(" | ")
        words = fields.split(" ")
        lemmas = ", ".join(
            re.sub(r"\((?:a|p|ip)\)$", "", w).replace("_", " ") for w in words[4 : 4 + 2 * int(words[3], 16) : 2]
        )
        definition = one_line(re.split(r';\s*(?="|$)|;?\s*"', gloss, maxsplit=1)[0])
        if not definition:
            continue
        examples = [one_line(example) for example in re.findall(r'"([^"]+)"', gloss)]
        pairs = [
            (lemmas, definition),
            *((example, f"{lemmas}: {definition}") for example in examples if " " in example),
        ]
        yield Entry(lemmas, tuple(pairs))


def dictd(index: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield headword and article of a dictd database, each article once. Offsets and lengths are base 64 numbers."""
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(word: str) -> int:
        value = 0
        for c in word:
            value = 64 * value + digits[c]
        return value

    places = {}
    for line in index.splitlines():
        head, offset, length = line.split("\t")[:3]
        if not head.startswith(("00-database", "00database")):
            places.setdefault((number(offset), number(length)), head)
    for (offset, length), head in sorted(places.items()):
        yield head, content[offset : offset + length].decode("utf-8", "replace")


def gcide(article: str) -> Entry:
    """Return headword → each sense, each quotation → headword and sense, and each phrase of the headword → its meaning.

    Senses that GCIDE took from WordNet are left out: WordNet is a source of its own.
    """
    article = re.sub(r" ?\\[^\\\n]*\\", "", article)  # pronunciation
    article = re.sub(r"\[(\w+)\]", lambda m: NAMED.get(m[1], m[0]), article)
    article = LETTER.sub(lambda m: m[1], article)
    head = re.split(r"[,(\[\n]", article, maxsplit=1)[0].strip()
    pairs, sense = [], ""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", article)):
        quotation = number > 0 and len(paragraph) - len(paragraph.lstrip()) >= 9
        if "WordNet" in paragraph:
            sense = ""
            continue
        plain = re.sub(r"--\s?[A-Z(][^-]{1,40}$", "", _without_brackets(one_line(paragraph)))
        if number == 0:
            plain = re.sub(r"^ ?\([^)]*\)", "", plain.removeprefix(head), count=1)
            plain = SPEECH_RUN.sub("", plain, count=1)
            first = re.search(r"(?:^|\s)1\. (?=[A-Za-z(])", plain)
            plain = plain[first.end() :] if first else plain
        phrase = re.match(r"^\{([^{}]+)\}(?: \([^)]*\))?, (.+)$", plain)
        plain = one_line(re.sub(r"[{}]", "", phrase[2] if phrase else plain)).strip(" ,;")
        plain = re.sub(r"^(?:\d+\.|\([a-z]\)) ", "", plain)
        if quotation and sense and plain:
            pairs.append((plain, f"{head}: {sense}"))
        elif plain and not quotation and not plain.startswith("Note:") and not CROSS_REFERENCE.match(plain):
            pairs.append((phrase[1] if phrase else head, plain))
            sense = "" if phrase else plain
    return Entry(head, tuple(pairs))


def _without_brackets(text: str) -> str:
    """Return the text without [etymologies, labels and source marks], nested ones too."""
    before = None
    while before != text:
        before, text = text, re.sub(r" ?\[[^\[\]]*\]", "", text)
    return text


def foldoc(article: str) -> Entry:
    """Return headword → passages of FOLDOC or of the Jargon File: pronunciation, part of speech, date and links off."""
    head, _, body = article.strip("\n").partition("\n")
    body = re.split(r"\n\s*\n\s*[A-Z]\s*$", body)[0]  # the title of the Jargon File's next letter
    body = _without_brackets(re.sub(r"[{}]", "", re.sub(r"\[\{?Jargon File\}?\]", "", body)))
    body = re.sub(r"\(\d{4}-\d\d-\d\d\)", "", body)
    body = re.sub(r"<([^<>]{3,40})>", r"(\1)", body)
    body = re.sub(r"^\s*(?:/[^/]+/,?\s*)?(?:\w{1,6}\.,?\s+){0,3}", "", body)
    passages = [re.sub(r"^\d+\. ", "", passage) for passage in paragraphs(body)]
    if re.match(r"^(?:\([^)]*\) )?(?:See|Synonym for|Syn\.|Common misspelling) ?[\w ]*\W*$", " ".join(passages)):
        passages = []
    return titled(one_line(head), passages)


def vera(article: str) -> Entry:
    """Return acronym → meaning."""
    head, _, body = article.strip("\n").partition("\n")
    return titled(one_line(head), [one_line(body)])


def manual(page: str) -> Entry:
    """Return NAME → passages of the DESCRIPTION of a manual page in roff. Examples (no-fill blocks) are left out."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    filled = True
    for line in page.replace("\\\n", "").split("\n"):
        macro, _, rest = line.partition(" ")
        if macro in (".SH", ".Sh"):
            lines = sections.setdefault(rest.strip(' "').upper(), [])
            filled = True
        elif macro in (".nf", ".Vb", ".EX", ".Bd"):
            filled = False
        elif macro in (".fi", ".Ve", ".EE", ".Ed"):
            filled = True
        elif filled and re.match(r"^\.(?:B|I|BR|IR|RB|RI|BI|IB|SM)$", macro):
            words = [word or other for word, other in re.findall(r'"([^"]*)"|(\S+)', rest)]
            lines.append(("" if len(macro) == 3 and macro != ".SM" else " ").join(words))
        elif re.match(r"^\.(?:PP|P|LP|TP|IP|Pp|SS)?$", macro):
            lines.append("\n\n" + (rest.split('"')[1] if rest.count('"') > 1 else ""))
        elif filled and not re.match(r"^[.']", line):
            lines.append(line)
    name, description = (_plain("\n".join(sections.get(title, []))) for title in ("NAME", "DESCRIPTION"))
    return titled(one_line(name), paragraphs(description) if name else [])


def _plain(roff: str) -> str:
    """Return a text without roff's escapes."""
    roff = re.sub(r'\\".*|\\f(?:\[\w*\]|\(\w\w|\w)|\\s[-+]?\d|\\[&|^/,:%]|\\\*\(\w\w', "", roff)
    roff = re.sub(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]", "'", roff)
    roff = re.sub(r"\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]", '"', roff)
    roff = re.sub(r"\\\((?:em|en|mi|hy)|\\\[(?:em|en|mi|hy)\]|\\-", "-", roff)
    return re.sub(r"\\e|\\\(rs|\\\[rs\]", r"\\", re.sub(r"\\\(\w\w|\\\[\w+\]|\\[ ~]", " ", roff))
