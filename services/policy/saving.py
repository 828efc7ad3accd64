"""Checkpoints beside training: a snapshot between two orders, written by a thread while the next ones are carried out.

    main thread      save: snapshot of all ranks' parts -+- the next orders
    writer's thread                                      +- files, fsync, rename -> CheckpointSaved, CheckpointFailed

Writing and hashing release the interpreter's lock, so that the thread takes a core, and no turn, from training.

Invariants: what is written is a copy, which no step changes; `CheckpointSaved` goes out when the files are durable; one
write is under way at most, so that there is one copy at most, in memory that the next one takes over: it waits for it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.policy import checkpoint
from services.policy.checkpoint import CheckpointError
from services.policy.export import export
from services.policy.state import Head, head_of, kinds, manifest_for, random_of_device
from services.policy.trainer import Trainer
from shared.config import Recipe, dump_recipe
from shared.messages import AnyMessage, CheckpointFailed, CheckpointSaved, SaveCheckpoint
from shared.telemetry import get_logger
from shared.weights.staging import Area

Export = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Copy = Callable[[Trainer, Area | None], Area]
"""A copy of what a replica holds, put together by all its ranks, perhaps in the memory of an earlier one."""


class Saver:
    """Answers `SaveCheckpoint`, through `send`, which any thread may call."""

    def __init__(self, recipe: Recipe, run_folder: Path, send: Callable[[AnyMessage], object], copy: Copy) -> None:
        self._recipe, self._run_folder = recipe, run_folder
        self._send, self._copy = send, copy
        self._area: Area | None = None  # the last snapshot
        self._lock = threading.Lock()
        self._order: SaveCheckpoint | None = None  # the last one whose snapshot was taken
        self._answer: CheckpointSaved | CheckpointFailed | None = None  # to it; None: it is being written
        self._thread: threading.Thread | None = None

    def save(self, order: SaveCheckpoint, trainer: Trainer, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take the snapshot and have it written: the answer follows. The weights may change as soon as this returns.

        A repeated order is answered by the write under way, or again; one that failed is tried again if it can be.
        """
        if self._answered_before(order, trainer):
            return
        started = time.perf_counter()
        try:
            if not self.wait():
                raise CheckpointError(
                    self._run_folder / order.folder, "no other one under way",
                    f"one that is written for longer than timeouts.checkpoint_s = "
                    f"{self._recipe.timeouts.checkpoint_s:g} s", "look at the disk",
                )  # fmt: skip
            head, whole = self._snapshot(order, trainer)
        except (CheckpointError, OSError) as error:
            self._failed(order, str(error))
            return
        with self._lock:
            self._order, self._answer = order, None
        get_logger().info(
            "a checkpoint is written beside training",
            step=order.position.step,
            pause_seconds=round(time.perf_counter() - started, 3),
        )
        exported = (trainer.model, tokenizer) if order.export and tokenizer is not None else None
        self._thread = threading.Thread(
            target=self._write, args=(order, head, whole, exported), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> bool:
        """Until the write under way has ended, for `timeouts.checkpoint_s` at most; whether it has."""
        if self._thread is not None:
            self._thread.join(self._recipe.timeouts.checkpoint_s)
        return self._thread is None or not self._thread.is_alive()

    def _answered_before(self, order: SaveCheckpoint, trainer: Trainer) -> bool:
        with self._lock:
            if self._order != order:
                return False
            answer = self._answer
        if isinstance(answer, CheckpointFailed) and trainer.position == order.position:
            return False
        if answer is not None:
            self._send(answer)
        return True

    def _snapshot(self, order: SaveCheckpoint, trainer: Trainer) -> tuple[Head, dict[str, Tensor]]:
        folder = self._run_folder / order.folder
        if trainer.position != order.position:
            raise CheckpointError(
                folder, str(order.position), str(trainer.position), "ask the replica that holds that state"
            )
        if not trainer.between_batches:
            raise CheckpointError(folder, "weights between two batches", f"step {trainer.position.step} inside one",
                                  "ask again after the batch's last step")  # fmt: skip
        head = head_of(trainer)
        if self._area is not None and self._area.manifest != manifest_for(head, trainer.layout):
            self._area = None  # given back first
        self._area = self._copy(trainer, self._area)
        return head, {**self._area.tensors, **random_of_device(trainer)}

    def _write(self, order: SaveCheckpoint, head: Head, whole: Mapping[str, Tensor], exported: Export | None) -> None:
        """The writer's thread."""
        started = time.perf_counter()
        folder, run, keep = self._run_folder / order.folder, self._run_folder.name, self._recipe.checkpoint.keep
        try:
            path, digest = checkpoint.save(head, whole, folder, run, fingerprint(self._recipe), keep)
            if exported is not None:
                model, tokenizer = exported
                export(model, kinds(whole)["model"], tokenizer, self._run_folder / "export")
        except (CheckpointError, OSError) as error:
            self._failed(order, str(error))
        except Exception as error:  # nobody waits for this thread: the controller has to hear of any failure
            self._failed(order, f"{type(error).__name__}: {error}")
        else:
            get_logger().info("checkpoint written", path=str(path), seconds=round(time.perf_counter() - started, 3))
            # relative to the run folder, as the order was, so that the folder may be moved
            self._say(order, CheckpointSaved(order.position, f"{order.folder}/{path.name}", digest))

    def _failed(self, order: SaveCheckpoint, cause: str) -> None:
        get_logger().error("checkpoint not written", step=order.position.step, why=cause)
        self._say(order, CheckpointFailed(order.position, cause))

    def _say(self, order: SaveCheckpoint, answer: CheckpointSaved | CheckpointFailed) -> None:
        with self._lock:  # before it is sent: an order that comes again from now on has to be answered again
            if self._order == order:
                self._answer = answer
        self._send(answer)


def fingerprint(recipe: Recipe) -> str:
    """A short name for a resolved recipe, kept in checkpoints."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]
