"""Which tokens of a sequence a rank holds and what they see: index arithmetic only, no tensors move here."""

from lss.segment.blocks import Block, LocalRun, make_blocks
from lss.segment.boxes import Piece, overlap, whole_piece
from lss.segment.fetch import Fetch, Push, plan_all, plan_fetch, plan_push
from lss.segment.mask import Mask, Run, make_mask, runs_of
from lss.segment.order import ORDERS, Segment, make_segment
from lss.segment.recurrence import Halo, ScanBlocks, chunk_places, plan_halo, scan_blocks

__all__ = [
    "ORDERS",
    "Block",
    "Fetch",
    "Halo",
    "LocalRun",
    "Mask",
    "Piece",
    "Push",
    "Run",
    "ScanBlocks",
    "Segment",
    "chunk_places",
    "make_blocks",
    "make_mask",
    "make_segment",
    "overlap",
    "plan_all",
    "plan_fetch",
    "plan_halo",
    "plan_push",
    "runs_of",
    "scan_blocks",
    "whole_piece",
]
