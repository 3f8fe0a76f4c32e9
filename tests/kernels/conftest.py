"""How the CPU backend is made to take each of its ways on problems small enough for a test."""

import os

import pytest
from mdml_kernels import cpu, cpu_loss, linear
from mdml_kernels.native import loader

WAYS = ("compiled", "textbook", "operator", "rows of one episode")


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr(loader, "native", lambda: loader.Native(None, "the test wants none"))


@pytest.fixture(params=WAYS)
def cpu_way(request, monkeypatch):
    """The compiled kernels; without them the textbook formula, and operators in one chunk or in small ones."""
    if request.param == "compiled":
        assert loader.native().kernels is not None, loader.native().reason
        return request.param
    request.getfixturevalue("without_native")
    if request.param != "textbook":
        monkeypatch.setattr(cpu_loss, "_FEW_LOGITS", 0)
    if request.param == "rows of one episode":
        monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 12)
        monkeypatch.setattr(linear, "_CHUNK_ELEMENTS", 12)
        monkeypatch.setattr(linear, "_LEAST_ROWS", 2)
    return request.param


@pytest.fixture(params=["compiled", "tensor operations"])
def operators(request, monkeypatch):
    """The operators, however few the logits: the compiled ones and those of a machine without a compiler."""
    monkeypatch.setattr(cpu_loss, "_FEW_LOGITS", 0)
    if request.param != "compiled":
        request.getfixturevalue("without_native")


def pytest_ignore_collect(collection_path):
    """The interpreted checks are for processes of their own, which another test starts."""
    return True if collection_path.name == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1" else None
