"""The frozen prefix of a network: which of its calls need not run again, proved, and a forward that leaves them out.

torch alone: it serves loops of one's own as well as the cache of a learner.
"""

from .cut import Cut as Cut
from .cut import Refused as Refused
from .cut import check_hooks as check_hooks
from .cut import find_cut as find_cut
from .placeholder import Gate as Gate
from .placeholder import Placeholder as Placeholder
from .placeholder import instead_of as instead_of
from .proving import collect as collect
from .proving import gap as gap
from .proving import prove as prove
from .replay import Replay as Replay
