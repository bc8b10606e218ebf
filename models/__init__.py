from models.barlow import BarlowTwins
from models.moco import MoCo
from models.simclr import SimCLR
from models.simsiam import SimSiam

METHODS = {"barlow": BarlowTwins, "moco": MoCo, "simclr": SimCLR, "simsiam": SimSiam}
