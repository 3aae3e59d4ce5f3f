"""Bits per base of the best order-k Markov model on the held-out end of a genome: what a trained model has to beat.

    lss data tokenize ecoli.fa.gz --tokenizer nucleotide -o ecoli
    python benchmarks/markov.py ecoli --held-out 0.06         # data.held_out of the run that it is compared with

For each order k, the probability of base b behind the k bases c is

    p(b | c) = (n(c b) + a) / (n(c) + 4 a)

with n counted exactly on the training part, and a the best of a grid on the last tenth of the training part, of counts on
the nine before. The held-out part chooses nothing; every base in it with k bases before it in its own sequence is scored,
the last bases of the training part being known. With --strands 2 the reverse complement of the training part is counted too.
One line of JSON for each order and number of strands, and then one of the best order, by held-out bits.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from lss.data.tokens import TokenCorpus

GRID = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def words(tokens, k, start=0):
    """int64 codes, in base 4, of the k + 1 bases that end at each token from `start` on, where all are bases."""
    first = max(k, start)
    codes, sound = np.zeros(len(tokens) - first, np.int64), np.ones(len(tokens) - first, bool)
    for back in range(k, -1, -1):
        part = tokens[first - back : len(tokens) - back]
        codes = codes * 4 + part
        sound &= part < 4
    return codes[sound]


def count(tokens, k, strands):
    """Times that each word of k + 1 bases stands in the tokens, (4^k, 4), or in them and their reverse complement."""
    total = np.bincount(words(tokens, k), minlength=4 ** (k + 1))
    if strands == 2:
        other = tokens[::-1].copy()
        other[other < 4] = 3 - other[other < 4]
        total += np.bincount(words(other, k), minlength=4 ** (k + 1))
    return total.reshape(-1, 4)


def bits(counts, scored, a):
    """Mean of -log2 p over the words `scored`."""
    found = counts.reshape(-1)[scored] + a
    return float(np.log2((counts.sum(1)[scored // 4] + 4 * a) / found).mean())


def order(tokens, border, k, strands):
    """Held-out bits of order k, with its smoothing chosen before the border."""
    inner = border - border // 10
    counts, scored = count(tokens[:inner], k, strands), words(tokens[:border], k, inner)
    a = min(GRID, key=lambda a: bits(counts, scored, a))
    scored = words(tokens, k, border)
    found = bits(count(tokens[:border], k, strands), scored, a)
    return {"order": k, "strands": strands, "smoothing": a, "scored": len(scored), "bits_per_base": found}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", help="folder of lss data tokenize, or of a run: RUN/tokens")
    parser.add_argument("--held-out", type=float, default=0.05)
    parser.add_argument("--orders", type=int, default=12, help="the highest")
    parser.add_argument("--strands", type=int, nargs="*", default=[1, 2], choices=[1, 2])
    options = parser.parse_args(arguments)
    corpus = TokenCorpus(str(Path(options.tokens)), 7)
    border = len(corpus.split(options.held_out)[0])
    tokens, rows = corpus.read(0, len(corpus)), []
    for k in range(options.orders + 1):
        for strands in options.strands:
            rows.append(order(tokens, border, k, strands))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"best": min(rows, key=lambda row: row["bits_per_base"])}))


if __name__ == "__main__":
    main()
