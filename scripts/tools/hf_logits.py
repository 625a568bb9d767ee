"""Computes the float64 logits of Hugging Face checkpoints with transformers; check_hf.py runs it where torch is.

python scripts/tools/hf_logits.py DIR [DIR ...]      # DIR holds the checkpoint and input_ids.npy, and gets logits.npy
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

for directory in map(Path, sys.argv[1:]):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    unused = {kind: names for kind, names in report.items() if names}
    if unused:
        raise SystemExit(f"{directory}: transformers reports {unused}")
    if (directory / "tokenizer.json").exists():
        transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(directory / "input_ids.npy")).long()).logits
    np.save(directory / "logits.npy", logits.numpy())
