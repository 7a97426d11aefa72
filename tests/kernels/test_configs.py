import pytest

from dskd_fast.kernels import configs


@pytest.mark.parametrize("c", [1, 3, 63, 64, 65, 128, 130, 256, 257, 512, 513, 1024, 1030, 2048])
def test_channels_are_padded_to_what_the_table_has(c):
    width = configs.padded_channels(c)
    assert c <= width < 2 * max(c, configs.SMALLEST_WIDTH)
    for architecture in configs.TABLE:
        for precision in ("bf16", "fp16", "tf32", "fp32"):
            entry = configs.config(architecture, precision, width)
            assert width % entry.forward.c == width % entry.gradient.c == width % entry.chunk == 0


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 1000, 65536])
def test_positions_are_padded_to_a_multiple_of_all_blocks(n):
    n_pad = configs.padded_rows(n)
    assert n <= n_pad < n + configs.ROW_MULTIPLE
    for entries in (entries for operands in configs.TABLE.values() for entries in operands.values()):
        for blocks in (blocks for entry in entries.values() for blocks in (entry.forward, entry.gradient)):
            assert n_pad % blocks.m == n_pad % blocks.n == 0


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 6), "sm_89"), ((8, 9), "sm_89"), ((10, 3), "sm_100"), ((13, 0), "sm_120")]
)
def test_compute_capabilities(capability, name):
    assert configs.nvidia_architecture(*capability) == name


def test_what_the_kernels_are_not_made_for():
    with pytest.raises(ValueError, match=r"7\.5, and the kernels need 8\.0"):
        configs.nvidia_architecture(7, 5)
    with pytest.raises(ValueError, match="gfx1100, and the kernels are made for gfx942"):
        configs.amd_architecture("gfx1100")
    assert configs.amd_architecture("gfx942:sramecc+:xnack-") == "gfx942"
