"""Every collective of the library, counted."""

from lss.comm.collectives import Communicator, Pending, communicator
from lss.comm.counter import CollectiveCounter, count_collectives

__all__ = ["CollectiveCounter", "Communicator", "Pending", "communicator", "count_collectives"]
