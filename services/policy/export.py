"""The Hugging Face copy of the trained model. Called by the service at the end of a run.

Invariant: the export folder is either whole or not there; a new one replaces the old in one rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.policy.durable import replace_folder, sync_tree


def export(
    model: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """Write config, generation config and tokenizer to `folder`, and `weights` (safetensors), which are whole.

    Of the model itself a rank may have a part alone. OSError if the disk refuses.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=dict(weights))
        tokenizer.save_pretrained(partial)
        sync_tree(partial)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
