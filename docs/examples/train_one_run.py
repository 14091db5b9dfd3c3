"""Train one run and read its record.

    python docs/examples/train_one_run.py budget=1e10 output=runs/example

The words are settings that override those of configs/quickstart.yaml. Run it again: the store and the run are found.
"""

import sys

import embedscale


def main(words: list[str]) -> None:
    config = embedscale.load_config("configs/quickstart.yaml", words)
    embedscale.prepare(config)
    embedscale.train(config)
    record = embedscale.RunDirectory(config.folder).read_record()
    print(f"{config.folder}: held-out loss {record.loss:.4f} after {record.tokens:,} tokens")


if __name__ == "__main__":  # needed: `prepare` starts processes that import this file
    main(sys.argv[1:])
