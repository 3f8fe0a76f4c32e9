"""How many episodes are computed at once: sizes in question, how one is measured, and where it is kept."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdml_fast.meta import chunks
from mdml_fast.meta.chunks import ChunkCache, Shape, candidates


def test_the_cache_lies_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ChunkCache().path == tmp_path / "mdml-fast" / "chunks.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ChunkCache().path == tmp_path / "home" / ".cache" / "mdml-fast" / "chunks.json"


@given(
    n_episodes=st.integers(1, 10_000),
    episode_bytes=st.integers(1, 1 << 24),
    memory=st.integers(1, 1 << 32),
    granule=st.sampled_from([1, 2, 8, 32]),
)
def test_candidates_fit_the_memory_and_are_whole_granules(
    n_episodes: int, episode_bytes: int, memory: int, granule: int
) -> None:
    sizes = candidates(n_episodes, episode_bytes, memory, granule)
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= 1
    if memory >= max(granule, 2) * episode_bytes:
        assert sizes[-1] * episode_bytes <= memory
        assert all(size % granule == 0 for size in sizes)
    assert sizes[-1] < n_episodes + granule


@given(n_support=st.integers(1, 300), n_query=st.integers(1, 300), group=st.sampled_from([1, 8]))
def test_a_granule_fills_whole_vectors(n_support: int, n_query: int, group: int) -> None:
    granule = chunks.granule(Shape(n_support, n_query, 5), group)
    assert granule % group == 0
    assert granule * n_support % 32 == granule * n_query % 32 == 0
    assert granule <= 32


@given(n_episodes=st.integers(1, 200), size=st.integers(1, 70))
def test_chunks_take_every_episode_once(n_episodes: int, size: int) -> None:
    found = chunks.cuts(n_episodes, size)
    assert [episode for start, count in found for episode in range(start, start + count)] == list(range(n_episodes))
    assert max(count for _, count in found) <= size + 1
    assert min(count for _, count in found) > 1 or size == 1 or n_episodes == 1


def test_measuring_takes_the_fastest_and_stops_where_more_is_slower() -> None:
    seconds, ran = {2: 3.0, 4: 4.0, 8: 8.1, 16: 14.0, 32: 40.0, 64: 1.0}, []

    def run(size: int) -> float:
        ran.append(size)
        return seconds[size]

    assert chunks.measure(run, [2, 4, 8, 16, 32, 64]) == 16  # 8 takes hardly longer each than 4, and is gone past
    assert chunks.measure(lambda size: size * {2: 2.0, 4: 2.01}[size], [2, 4]) == 4  # hardly more, in fewer chunks
    assert chunks.measure(lambda size: size * {2: 2.0, 4: 2.05}[size], [2, 4]) == 2
    assert 64 not in ran
