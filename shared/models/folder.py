"""A model's folder, or its name on the hub: which files it has, and whether they are whole."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from shared.config.schema import ModelTable
from shared.models.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; what the safetensors library reads at most


def check_weights(model: ModelTable) -> None:
    """ModelError if the weights in the model's folder are not whole; what is not a folder is not looked at."""
    if model.path is not None and Path(model.path).expanduser().is_dir():
        checked_path(model, weights=True)


def checked_path(model: ModelTable, *, weights: bool) -> str:
    """The folder or hub name, after looking for what an interrupted download or a typing error leaves behind."""
    assert model.path is not None
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1:
            raise ModelError(
                f"model.path: expected a folder at {folder.absolute()}, found none; mend the path, "
                f"or give a hub name like Qwen/Qwen3-0.6B, or a [model.build] table"
            )
        return model.path
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path {model.path!r}: expected config.json in the folder, found {_listing(folder)}; "
            f"give the folder that holds the model's files"
        )
    if weights:
        _check_shards(folder, model.path)
    return str(folder)


def weight_files(path: str) -> list[str]:
    """The safetensors files of what `checked_path` gave, fetched from the hub where need be; OSError without any."""
    try:
        return [str(cached_file(path, SAFE_WEIGHTS_NAME))]
    except OSError:
        files, _ = get_checkpoint_shard_files(path, cached_file(path, SAFE_WEIGHTS_INDEX_NAME))
        return list(files)


def _check_shards(folder: Path, path: str) -> None:
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        expected = sorted(set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()))
        missing = [name for name in expected if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"model.path {path!r}: expected {len(expected)} weight files, {len(missing)} are missing "
                f"(first: {missing[0]}); the download did not finish: run it again"
            )
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.path {path!r}: expected weights in *.safetensors, found {_listing(folder)}; "
            f"finish the download, or convert the weights to safetensors (pickled .bin files are not read)"
        )
    for file in sorted(folder.glob("*.safetensors")):
        size, wanted = file.stat().st_size, _whole_size(file)
        if size != wanted:
            raise ModelError(
                f"model.path {path!r}: expected {file.name} of {wanted} bytes, found {size}; "
                f"the download did not finish: run it again"
            )


def _whole_size(file: Path) -> int:
    """The bytes that a safetensors file has, by its own header (8 bytes of length, JSON, tensors); 8 without one."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, MAX_HEADER)))
        except ValueError:
            return 8 + length
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _listing(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"


def first_line(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0]}"
