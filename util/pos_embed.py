"""Fixed 2-D sine-cosine position tables (paper, section 3 and appendix A.1)."""

import torch


def sincos_pos_embed_2d(embed_dim, grid_size, cls_token=False):
    """Sine-cosine position table of a grid of patches, rows in raster order.

    The first half of the width encodes a patch's column, the second half its row; each half is
    the sines, then the cosines, of the coordinate times 10000 ** (-i / (embed_dim / 4)).

    Args:
        embed_dim: width D, a multiple of 4.
        grid_size: patches along height and width, an int or (height, width).
        cls_token: put a row of zeros for a class token in front.

    Returns:
        float32 tensor [L, D], or [1 + L, D] with cls_token, computed in float64.

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {embed_dim}")
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) * 4 / embed_dim)
    angles = [axis[:, None] * frequencies for axis in (columns, rows)]  # each [L, D / 4]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    if cls_token:
        table = torch.cat([table.new_zeros(1, embed_dim), table])
    return table.float()
