"""Options of the test command."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write what passes do now into tests/passes/*.txt; review the diff"
    )


def pytest_configure() -> None:
    # On tiny tensors a second thread only waits: on two loaded cores the suite takes half the time with one.
    torch.set_num_threads(1)
