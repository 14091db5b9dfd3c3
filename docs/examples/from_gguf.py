"""Write the decoder in a GGUF file as a folder that embedscale trains: config.json, float32 weights, tokenizer.json.

    pip install gguf
    python docs/examples/from_gguf.py MODEL.gguf models/NAME

The weights of a quantised file were rounded to few bits. The folder holds these rounded weights, as float32: a little
less than the model as its makers published it. transformers reads the file, and says so if it cannot.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(file: str, folder: str) -> None:
    where, name = Path(file).parent, Path(file).name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # The weights are ordinary floats by now. transformers would refuse to save a model that says it is quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
