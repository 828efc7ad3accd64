"""Checkpoints: a policy's whole state in a folder that is whole or not there. Used by `saving` and by replays.

    checkpoints/<step>/  model.safetensors  optimizer.safetensors  reference.safetensors  random.safetensors
                         state.json  manifest.json (sha256 and size of every other file, written last)

Invariant: a folder with a number for its name was complete when it got that name; what its manifest does not confirm,
and what belongs to another model, is refused by name. Tensors are safetensors, the rest JSON: nothing executes on load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.policy.durable import replace_folder, sync_tree
from services.policy.layouts.compose import Layout
from services.policy.state import Head, kinds
from services.policy.trainer import Snapshot, Stage, Trainer
from shared.messages import Position
from shared.weights import digest_of

FORMAT = 1
MODEL, OPTIMIZER, REFERENCE, RANDOM = (
    "model.safetensors",
    "optimizer.safetensors",
    "reference.safetensors",
    "random.safetensors",
)
STATE, MANIFEST = "state.json", "manifest.json"
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of types, and torch's."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or used: what was expected, what is there, what to do."""

    def __init__(self, path: Path, expected: str, got: str, advice: str) -> None:
        super().__init__(f"checkpoint {path}: expected {expected}, got {got}; {advice}")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file in the manifest."""

    sha256: str
    bytes: int


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scalars of a checkpoint. `digest` is of the model's weights, `reference` where the stage's weights began."""

    format: int
    run: str
    recipe: str
    position: Position
    stage: Stage | None
    optimizer_steps: int
    reference: Position | None
    digest: str


# --- writing ----------------------------------------------------------------------------------------------------------


def save(head: Head, whole: Mapping[str, Tensor], folder: Path, run: str, recipe: str, keep: int) -> tuple[Path, str]:
    """Write `folder`/<step> durably, delete what is older than the newest `keep`, return (path, weights digest).

    `head` and `whole` are the state between two batches, put together from all ranks; nobody changes it meanwhile. A
    complete checkpoint of the same run and position is left as it is. Raises CheckpointError.
    """
    position = head.position
    target = folder / str(position.step)
    if target.exists():
        known = _known(target)
        if known is not None and (known.run, known.position) == (run, position):
            return target, known.digest
        if known is not None and known.run == run and known.position.lineage > position.lineage:
            raise CheckpointError(target, f"none of a later lineage than {position}", str(known.position),
                                  "another process is this replica now: end this one")  # fmt: skip
    partial = folder / f".{target.name}.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
        digest = _write(head, whole, partial, _same_reference(head, folder), run, recipe)
        sync_tree(partial)
        replace_folder(partial, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            target, "a folder that can be written", str(error), "free space or mend the rights"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _prune(folder, position, keep)
    return target, digest


def _write(
    head: Head, whole: Mapping[str, Tensor], partial: Path, same_reference: Path | None, run: str, recipe: str
) -> str:
    by_kind = kinds(whole)
    weights = by_kind["model"]
    files = {MODEL: weights, RANDOM: by_kind["random"]}
    if head.stage is not None:
        files[OPTIMIZER] = by_kind["optimizer"]
    manifest: dict[str, Entry] = {}
    if head.reference is not None and same_reference is not None:
        # it never changes within a stage: a second name for the same file costs nothing
        os.link(same_reference / REFERENCE, partial / REFERENCE)
        manifest[REFERENCE] = _read_manifest(same_reference)[REFERENCE]
    elif head.reference is not None:
        files[REFERENCE] = by_kind["reference"]
    for name, tensors in files.items():
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial / name)
    digest = digest_of(weights)
    scalars = State(
        format=FORMAT,
        run=run,
        recipe=recipe,
        position=head.position,
        stage=head.stage,
        optimizer_steps=head.steps,
        reference=head.reference,
        digest=digest,
    )
    (partial / STATE).write_bytes(msgspec.json.format(msgspec.json.encode(scalars), indent=2))
    for name in (*files, STATE):
        manifest[name] = _entry(partial / name)
    encoded = {name: msgspec.to_builtins(entry) for name, entry in sorted(manifest.items())}
    (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": encoded}, indent=2))
    return digest


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return Entry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _same_reference(head: Head, folder: Path) -> Path | None:
    """A checkpoint beside this one that holds the same reference weights already."""
    for path in numbered(folder):
        try:
            known, size = read_state(path).reference, _read_manifest(path)[REFERENCE].bytes
            whole = (path / REFERENCE).stat().st_size == size  # its content is checked when it is loaded
        except (CheckpointError, KeyError, OSError):
            continue
        if whole and known is not None and known == head.reference:
            return path
    return None


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, written: Position, keep: int) -> None:
    """Keep the newest `keep` up to `written`; later numbers are of a lineage that was given up.

    The one before the newest always stays: until the controller has heard of the newest, it is what a rollback needs.
    A later lineage's stay too: whoever finds those was itself given up while it wrote.
    """
    own = [path for path in numbered(folder) if _lineage(path) <= written.lineage]
    older = [path for path in own if int(path.name) < written.step]
    later = [path for path in own if int(path.name) > written.step]
    for path in [*older[max(1, keep - 1) :], *later]:
        gone = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, gone)  # a folder that is half deleted must not have a number for its name
        shutil.rmtree(gone, ignore_errors=True)


def _lineage(path: Path) -> int:
    """The lineage of a checkpoint; 0 when it cannot be read."""
    try:
        return read_state(path).position.lineage
    except CheckpointError:
        return 0


# --- finding and reading ----------------------------------------------------------------------------------------------


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, highest step first, complete or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def superseded(path: Path) -> bool:
    """Whether the checkpoint at `path` was deleted because later ones were written."""
    return not path.exists() and any(int(other.name) > int(path.name) for other in numbered(path.parent))


def newest(folder: Path, at_most: Position | None = None) -> Path | None:
    """The complete checkpoint with the highest step, None if there is none.

    With `at_most`, only those from which that position can be reached: no later step, no later lineage.
    """
    for path in numbered(folder):
        state = _known(path)
        if state is None:
            continue
        position = state.position
        if at_most is None or (position.step <= at_most.step and position.lineage <= at_most.lineage):
            return path
    return None


def verify(path: Path) -> State:
    """The scalars, once every file was checked against the manifest; CheckpointError for a torn or altered one."""
    torn = "it is torn: use an older checkpoint, or delete this one"
    for name, entry in _read_manifest(path).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(path, f"the file {name}", "none", torn)
        if file.stat().st_size != entry.bytes:
            raise CheckpointError(path, f"{name} of {entry.bytes} bytes", f"{file.stat().st_size} bytes", torn)
        if _entry(file) != entry:
            raise CheckpointError(path, f"{name} with sha256 {entry.sha256}", "other content", torn)
    return read_state(path)


def read_state(path: Path) -> State:
    """The scalars of the checkpoint at `path`, without checking its tensors; CheckpointError if they cannot be read."""
    try:
        state = msgspec.json.decode((path / STATE).read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(path, f"a readable {STATE}", str(error), "use another checkpoint") from error
    if state.format != FORMAT:
        raise CheckpointError(
            path, f"format {FORMAT}", f"format {state.format}", "load it with the version that wrote it"
        )
    return state


def load(trainer: Trainer, path: Path, position: Position) -> None:
    """Put the checkpoint's state into `trainer`, which holds `position` afterwards; raises CheckpointError.

    `position` may name a later lineage than the checkpoint's: after a rollback a new lineage starts from it.
    """
    head = verify(path)
    if (head.position.version, head.position.step) != (position.version, position.step):
        raise CheckpointError(
            path, f"the state of {position}", f"that of {head.position}", "name the checkpoint of that step"
        )
    layout = trainer.layout
    _refuse_foreign(path, layout)
    with safe_open(path / MODEL, "pt") as opened:
        layout.read({name: opened.get_slice(name) for name in layout.weights()})
    reference = None
    if head.reference is not None:
        tensors = {name: part.to(trainer.device) for name, part in _parts(path / REFERENCE, layout).items()}
        reference = Snapshot(head.reference, tensors)
    optimizer = _parts(path / OPTIMIZER, layout, "/") if head.stage is not None else {}
    try:
        trainer.restore(position, head.stage, head.optimizer_steps, optimizer, reference)
    except KeyError as error:
        raise CheckpointError(
            path, f"the tensor {error} of optimizer or reference", "none", "use another checkpoint"
        ) from error
    _restore_random(load_file(path / RANDOM), trainer.device)


def _parts(file: Path, layout: Layout, behind: str = "") -> dict[str, Tensor]:
    """This rank's parts of a file's tensors, and no more read; a tensor's parameter is named `behind` that mark."""
    own = layout.parameters()
    found = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            parameter = name.partition(behind)[2] if behind else name
            if parameter in own:
                found[name] = layout.cut(parameter, opened.get_slice(name))
    return found


def _refuse_foreign(path: Path, layout: Layout) -> None:
    wanted = {spec.name: f"{spec.dtype}{spec.shape}" for spec in layout.manifest}
    with safe_open(path / MODEL, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        got = {name: f"{TYPES.get(s.get_dtype(), s.get_dtype())}{s.get_shape()}" for name, s in slices.items()}
    for name in sorted(wanted.keys() | got.keys()):
        ours, theirs = (found.get(name, "no such tensor") for found in (wanted, got))
        if ours != theirs:
            raise CheckpointError(
                path, f"{name}: {ours}", theirs, "it is of another model: check [model] in the recipe"
            )


def _restore_random(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and str(device) in states:
        torch.cuda.set_rng_state(states[str(device)], device)


def _read_manifest(path: Path) -> dict[str, Entry]:
    try:
        content = cast(dict[str, Any], json.loads((path / MANIFEST).read_bytes()))
        return msgspec.convert(content["files"], dict[str, Entry])
    except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
        advice = "it is torn: use an older checkpoint, or delete this one"
        raise CheckpointError(path, f"a readable {MANIFEST}", f"{type(error).__name__}: {error}", advice) from error


def _known(path: Path) -> State | None:
    """The scalars of a checkpoint that is complete, else None."""
    try:
        return verify(path)
    except CheckpointError:
        return None
