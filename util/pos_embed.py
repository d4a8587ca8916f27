"""Position tables of grids of patches: sine-cosine ones, and resampling to another grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed_2d(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False
) -> Tensor:
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


def interpolate_pos_embed(
    pos_embed: Tensor,
    grid_size: int | tuple[int, int],
    num_prefix_tokens: int = 1,
    old_grid: tuple[int, int] | None = None,
) -> Tensor:
    """A position table resampled to another grid (bicubic, without antialiasing).

    timm's `resample_abs_pos_embed` is not used: it assumes a square source unless told otherwise,
    and returns any table with the right number of rows unchanged if the new grid is square.

    Args:
        pos_embed: [1, prefix + L, D].
        grid_size: patches along height and width, an int or (height, width).
        num_prefix_tokens: rows in front of the grid's, which are kept.
        old_grid: the table's own (height, width); if not given, `guess_grid` guesses it.

    Returns:
        [1, prefix + height x width, D]; the table itself if its grid is the same.

    Raises:
        ValueError: the table's grid can't be guessed.
    """
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    new_grid = height, width
    prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    old_grid = old_grid or guess_grid(table[0], likely=new_grid)
    if old_grid == new_grid:
        return pos_embed
    table = table.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, height, width]
    table = F.interpolate(table.float(), new_grid, mode="bicubic", align_corners=False)
    table = table.permute(0, 2, 3, 1).flatten(1, 2).to(prefix.dtype)
    return torch.cat([prefix, table], dim=1)


def guess_grid(table: Tensor, likely: tuple[int, int]) -> tuple[int, int]:
    """The probable (height, width) of the grid of a position table [L, D].

    A sine-cosine table shows its shape, even if it was trained further. Any other table is assumed
    to have the `likely` shape if that has L positions, else to be square.

    Raises:
        ValueError: it is neither.
    """
    L, D = table.shape
    if D % 4 == 0:
        shapes = [(height, L // height) for height in range(1, L + 1) if L % height == 0]
        fixed = {shape: sincos_pos_embed_2d(D, shape) for shape in shapes}
        distances = {shape: (table.float() - fixed[shape]).norm().item() for shape in shapes}
        closest = min(shapes, key=lambda shape: distances[shape])
        if distances[closest] < 0.2 * fixed[closest].norm().item():
            return closest
    side = math.isqrt(L)
    for height, width in (likely, (side, side)):
        if height * width == L:
            return height, width
    raise ValueError(f"the grid of {L} positions, which is not a square, is not known")
