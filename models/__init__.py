"""The methods of pretraining, by the names that --method and the recipes in yaml/ have for them."""

from models.barlow import BarlowTwins
from models.moco import MoCo
from models.simclr import SimCLR
from models.simsiam import SimSiam

METHODS = {"barlow": BarlowTwins, "moco": MoCo, "simclr": SimCLR, "simsiam": SimSiam}
