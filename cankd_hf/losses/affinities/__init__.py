"""The affinities of the Can block, one file each: the published form beside one without an [N, M] tensor."""

from cankd_hf.losses.affinities.base import Affinity, Block, Projection, Projections
from cankd_hf.losses.affinities.concatenation import Concatenation
from cankd_hf.losses.affinities.dot_product import DotProduct
from cankd_hf.losses.affinities.embedded_gaussian import EmbeddedGaussian
from cankd_hf.losses.affinities.gaussian import Gaussian

AFFINITIES: dict[str, Affinity] = {
    "dot_product": DotProduct(),
    "embedded_gaussian": EmbeddedGaussian(),
    "gaussian": Gaussian(),
    "concatenation": Concatenation(),
}

__all__ = ["AFFINITIES", "Affinity", "Block", "Projection", "Projections"]
