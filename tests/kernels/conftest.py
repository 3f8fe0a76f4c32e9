"""How the CPU backend is made to take each of its ways on problems small enough for a test."""

import os

import pytest
from mdml_kernels import cpu, cpu_loss, linear

WAYS = ("textbook", "operator", "rows of one episode")


@pytest.fixture(params=WAYS)
def cpu_way(request, monkeypatch):
    """The textbook formula, the operators in one chunk, or in chunks of a few rows each."""
    if request.param != "textbook":
        monkeypatch.setattr(cpu_loss, "_FEW_LOGITS", 0)
    if request.param == "rows of one episode":
        monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 12)
        monkeypatch.setattr(linear, "_CHUNK_ELEMENTS", 12)
        monkeypatch.setattr(linear, "_LEAST_ROWS", 2)
    return request.param


@pytest.fixture
def operators(monkeypatch):
    """The operators, however few the logits."""
    monkeypatch.setattr(cpu_loss, "_FEW_LOGITS", 0)


def pytest_ignore_collect(collection_path):
    """The interpreted checks are for processes of their own, which another test starts."""
    return True if collection_path.name == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1" else None
