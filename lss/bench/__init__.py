"""Time, memory and bytes of attention and of training steps, ours and rivals', checked in the run that times them."""

from lss.bench.attention import bench_attention
from lss.bench.candidates import parse_options
from lss.bench.plan import AttentionPlan, Heads
from lss.bench.rival import Rival, load_rivals
from lss.bench.rows import Results, read_rows
from lss.bench.scan import ScanPlan, Sizes, bench_scan
from lss.bench.timing import Clock

__all__ = [
    "AttentionPlan",
    "Clock",
    "Heads",
    "Results",
    "Rival",
    "ScanPlan",
    "Sizes",
    "bench_attention",
    "bench_scan",
    "load_rivals",
    "parse_options",
    "read_rows",
]
