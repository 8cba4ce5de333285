"""One deformable attention, to be exported: any implementation, over given sizes."""

from torch import Tensor, nn

from d2zero.model.deformable import DeformableAttention, DeformableFunction, LevelSizes


class TinyAttention(nn.Module):
    """Two heads of eight channels, three levels, two points, with offsets that depend on the query."""

    def __init__(self, function: DeformableFunction, sizes: LevelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention = DeformableAttention(16, heads=2, levels=3, points=2, function=function)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.5)

    def forward(self, query: Tensor, source: Tensor, reference: Tensor) -> Tensor:
        """Attend."""
        found: Tensor = self.attention(query, source, reference, self.sizes)
        return found
