"""Every collective of the library, counted."""

from lss.comm.collectives import Communicator, Pending
from lss.comm.counter import CollectiveCounter, count_collectives

__all__ = ["CollectiveCounter", "Communicator", "Pending", "count_collectives"]
