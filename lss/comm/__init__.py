"""Every collective of the library, counted."""

from lss.comm.collectives import Communicator, Pending, communicator
from lss.comm.control import Control, control
from lss.comm.counter import CollectiveCounter, count_collectives
from lss.comm.hierarchical import cp_communicator
from lss.comm.watch import DEVICE, Watch

__all__ = [
    "DEVICE",
    "CollectiveCounter",
    "Communicator",
    "Control",
    "Pending",
    "Watch",
    "communicator",
    "control",
    "count_collectives",
    "cp_communicator",
]
