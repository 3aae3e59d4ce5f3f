"""Which tokens of a sequence a rank holds: index arithmetic only, no tensors move here."""

from lss.segment.order import ORDERS, Block, Segment, make_segment

__all__ = ["ORDERS", "Block", "Segment", "make_segment"]
