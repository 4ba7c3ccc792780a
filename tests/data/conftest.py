"""What the tests of training rows share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.rows import make


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """Without a chat template."""
    return make()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="spectrim.data.instructions"):
        yield caplog
