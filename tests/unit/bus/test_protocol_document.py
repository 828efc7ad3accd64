"""docs/protocol.md describes the protocol that there is: every message, field, type, class of delivery and fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import shared.messages
from shared.messages import PROTOCOL, AnyMessage, Envelope, Part, Refused

DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", DOCUMENT, flags=re.MULTILINE | re.DOTALL))
MESSAGES = get_args(AnyMessage)
PARTS = Part.__subclasses__()


def documented_fields(section: str) -> dict[str, str]:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| \S", section, flags=re.MULTILINE)
    return {name: kind.replace("\\|", "|") for name, kind in rows}


@pytest.mark.parametrize("kind", [*MESSAGES, *PARTS, Envelope], ids=lambda kind: kind.__name__)
def test_every_struct_has_a_section_with_its_fields_and_their_types(kind):
    assert kind.__name__ in SECTIONS, f"docs/protocol.md has no section ### {kind.__name__}"
    expected = {name: kind.__annotations__[name] for name in kind.__struct_fields__}
    assert documented_fields(SECTIONS[kind.__name__]) == expected


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_tells_sender_class_answer_and_repetition(kind):
    section = SECTIONS[kind.__name__]
    assert (", reliable. " if kind.reliable else ", transient. ") in section
    assert "→ controller" in section or "controller →" in section or section.lstrip().startswith("either")
    assert "*Answer*:" in section and "*Repeated*:" in section


def test_nothing_is_described_that_is_not_there():
    prose = {"Limits", "Acknowledgement", "Sessions", "Ranks", "Heartbeats", "Refusals", "Versions"}
    assert set(SECTIONS) - prose == {kind.__name__ for kind in (*MESSAGES, *PARTS, Envelope)}


def test_every_fault_is_in_the_table_of_refusals():
    named = re.search(r"Faults: (.*?)\.\n", Refused.__doc__, flags=re.DOTALL).group(1)
    faults = set(re.split(r",\s+", named))
    assert set(re.findall(r"^\| `(\w+)` \|", SECTIONS["Refusals"], flags=re.MULTILINE)) == faults


def test_the_version_is_the_one_spoken():
    assert f"`protocol` is {PROTOCOL}." in DOCUMENT
    assert shared.messages.__doc__ and "docs/protocol.md" in shared.messages.__doc__
