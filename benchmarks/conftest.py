"""`pytest benchmarks/` measures: what the tests' configuration switches off is on here."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = False
    config.option.benchmark_warmup = "off"  # the clock of tilewise.bench has warmed up
