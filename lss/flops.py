"""Floating point operations of a training step, by the convention that results are reported in."""

from __future__ import annotations

# Dense bf16 tensor-core peaks without sparsity, TFLOP/s, by a word in the device's name.
# Sources: NVIDIA data sheets of H100 (SXM 989, PCIe 756), H200 (989), A100 (312), V100 (125, fp16).
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "V100": 125.0}


def model_flops(
    matrix_parameters: int, attention_width: int, seq_len: int, sequences: int, scores: float, states: int = 0
) -> float:
    """FLOPs of one training step: 6 * parameters in matrix products * tokens + 12 * N*H * scores + 12 * states * tokens.

    A score costs 2 * H multiplications and additions for itself and as many for its value, and twice that in backward.
    Under a causal mask a layer has S^2 / 2 of them for each sequence, which makes 6 * layers * N*H * S^2. No credit is
    given for recomputation, and none for scores that windows or document borders hide. A token writes to each number of a
    scan's state, and reads it, by 2 FLOPs each; what a scan by blocks computes beyond that is not counted.

    Args:
        matrix_parameters: parameters in matrix products: all but norms and embedding look-ups; a tied output
            projection counts.
        attention_width: N * H, query heads times head size.
        seq_len: S.
        sequences: sequences in the step, over all ranks.
        scores: visible scores of one head, over all layers and sequences of the step.
        states: numbers of state, over all layers that scan.
    """
    tokens = seq_len * sequences
    return 6.0 * matrix_parameters * tokens + 12.0 * attention_width * scores + 12.0 * states * tokens


def peak_flops(device_name: str | None) -> float | None:
    """bf16 peak of one device in FLOP/s, None where it is not known (a CPU, say)."""
    name = device_name or ""
    return next((tflops * 1e12 for word, tflops in PEAK_TFLOPS.items() if word in name), None)
