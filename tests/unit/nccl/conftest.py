"""The real libnccl, which needs no GPU to be loaded, asked for ids, or refused by."""

from __future__ import annotations

import pytest

from shared.nccl.library import Library, NcclError, find, open_library


@pytest.fixture(scope="session")
def library() -> Library:
    try:
        return open_library(find())
    except NcclError as error:
        pytest.skip(f"no libnccl here (make test-nccl installs one): {error}")
