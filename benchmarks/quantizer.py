"""Peak memory of the nearest-word search at the size of a DAT batch: `python benchmarks/quantizer.py`.

128 images of 784 words, 16,384 codes of dimension 4 (latent-diffusion's vq-f8 at 224 px), in a process of its own: the
growth of its largest resident set over the search, beside what the full matrix of distances would take.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

IMAGES, WORDS, CODES, DIM = 128, 784, 16384, 4
LIMIT = 10**9
logger = logging.getLogger("benchmarks.quantizer")


def peak_bytes() -> int:
    """Largest resident set of this process so far (Linux counts it in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def growth() -> int:
    """Bytes that the search adds to this process's peak; run in a fresh process."""
    import torch

    from mae_dat.tokenizer.quantize import nearest_words

    torch.manual_seed(0)
    latent, codebook = torch.randn(IMAGES * WORDS, DIM), torch.randn(CODES, DIM)
    nearest_words(latent[:8], codebook)  # libraries and thread pools are loaded before the count starts
    before = peak_bytes()
    nearest_words(latent, codebook)
    return peak_bytes() - before


def main() -> None:
    """Prints the peak and the full matrix's size; exit code 1 when the peak reaches 1 GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(growth())
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    child = subprocess.run([sys.executable, __file__, "--measure"], check=True, capture_output=True, text=True)
    ours, full = int(child.stdout), 4 * IMAGES * WORDS * CODES
    print(f"nearest of {CODES} codes for {IMAGES} x {WORDS} words of dimension {DIM}, float32")
    print(f"  peak memory of the search   {ours / 1e9:6.2f} GB  (limit {LIMIT / 1e9:.0f} GB)")
    print(f"  full matrix of distances    {full / 1e9:6.2f} GB  (calculated; {full / max(ours, 1):.0f} times as much)")
    if arguments.output:
        arguments.output.write_text(json.dumps({"peak_bytes": ours, "full_matrix_bytes": full}, indent=1) + "\n")
    if ours >= LIMIT:
        logger.error("the search takes %.2f GB, more than the limit", ours / 1e9)
        sys.exit(1)


if __name__ == "__main__":
    main()
