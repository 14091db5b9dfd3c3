"""Embed texts with a finished run, and find the text that answers a query.

python docs/examples/embed_texts.py runs/example/RUN_ID
"""

import sys

import embedscale


def main(run: str) -> None:
    query = "open a file and read its lines"
    texts = ["def read_lines(path):\n    return open(path).readlines()", "def add(a, b):\n    return a + b"]
    embedder = embedscale.Embedder.load(run)
    similarities = embedder.encode(texts) @ embedder.encode([query])[0]  # cosines: the vectors have length 1
    for similarity, text in sorted(zip(similarities, texts, strict=True), reverse=True):
        print(f"{similarity:.3f}  {text.splitlines()[0]}")


if __name__ == "__main__":
    main(sys.argv[1])
