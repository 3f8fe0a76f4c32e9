"""How kernels are launched: pure functions of shape, dtype and chip, legal everywhere."""

import pytest
import torch
from mdml_kernels import launch

ARCHS = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", launch.INTERPRETER]


def power_of_2(value):
    return value & (value - 1) == 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per_thread", [16, 32, 64])
def test_row_tiles_are_legal_for_every_k(arch, dtype, per_thread):
    for n_cols in (*range(1, 70), 1000, 4096, 4097, 8192, 8193, 65536):
        config = launch.rows_config(n_cols, dtype, arch, per_thread)
        assert all(map(power_of_2, (config.block_rows, config.block_cols, config.num_warps)))
        threads = config.num_warps * (64 if arch.startswith("gfx") else 32)
        held = config.block_rows * config.tiles * config.block_cols / threads
        assert held <= max(per_thread, 16) * (16 if arch == launch.INTERPRETER else 1)
        assert (config.tiles - 1) * config.block_cols < n_cols
        assert config == launch.rows_config(n_cols, dtype, arch, per_thread)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_inner_loop_is_whole_where_it_fits(arch, precision):
    fits = launch.inner_loop_config(64, 64, 64, 16, precision, arch)
    assert fits is not None
    assert fits.block_rows == 64
    for shape in ((129, 64, 64, 16), (64, 65, 64, 16), (64, 64, 65, 16), (64, 64, 64, 65)):
        assert launch.inner_loop_config(*shape, precision, arch) is None


@pytest.mark.parametrize(
    ("precision", "arch", "whole", "others"),
    [
        ("float32", "sm_80", "bf16x6", "tf32x3"),
        ("float32", "sm_90", "bf16x6", "tf32x3"),
        ("float32", "sm_100", "tf32x3", "tf32x3"),
        ("float32", "gfx942", "ieee", "ieee"),
        ("float32", launch.INTERPRETER, "ieee", "ieee"),
        ("tf32", "sm_90", "tf32", "tf32"),
        ("tf32", "gfx942", "tf32", "tf32"),
        ("tf32", "gfx90a", "ieee", "ieee"),
        ("bfloat16", "gfx942", "bf16", "bf16"),
        ("bfloat16", "sm_90", "bf16", "bf16"),
    ],
)
def test_products_go_to_tensor_cores(precision, arch, whole, others):
    assert launch.inner_loop_precision(precision, arch) == whole
    assert launch.dot_precision(precision, arch) == others


def test_a_cpu_tensor_is_for_the_interpreter():
    assert launch.arch_of(torch.device("cpu")) == launch.INTERPRETER
