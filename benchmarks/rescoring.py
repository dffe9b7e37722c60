"""How near the symbolic adversary's choice is to the best single change: `python -m benchmarks.rescoring`.

For generated images and the shipped classifier, every word at some places drawn at random is tried, which gives the
largest rise of the loss that one change can reach. Prints the share of it that the first-order choice reaches, and that
of the choice among N candidates whose loss was computed, with the time of a choice.

All changes of a whole image are too many to try. With `--whole N` every place may change, and the largest rise is that
of the N best estimates and of N random changes; the true one may be larger, so that the shares are upper bounds.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from mae_dat import load_model, load_tokenizer
from mae_dat.attacks import symbolic
from mae_dat.attacks.gradient import LossPerImage
from mae_dat.data.generated.draw import draw_image


@torch.no_grad()
def main() -> None:
    """Print a line for each number of candidates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--places", type=int, default=16)
    parser.add_argument("--rescore", type=int, nargs="+", default=[0, 10, 30, 100])
    parser.add_argument("--words_per_place", type=int, nargs="+", default=[symbolic.WORDS_PER_PLACE])
    parser.add_argument("--whole", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = load_model("mae_dat_demo"), load_tokenizer()
    pixels = [torch.from_numpy(draw_image(0, "val", number).image) for number in range(arguments.images)]
    images = torch.stack(pixels).permute(0, 3, 1, 2) / 255
    words = tokenizer.encode(images)
    target = model(images).argmax(1)
    torch.manual_seed(0)
    places = torch.stack([torch.randperm(words[0].numel())[: arguments.places] for _ in words])
    free = torch.zeros_like(words, dtype=torch.bool).flatten(1).scatter(1, places, True).view_as(words)
    loss_fn = LossPerImage(lambda view: F.cross_entropy(model(view), target, reduction="none"))
    start = loss_fn.each(tokenizer.decode(words))
    if arguments.whole:
        free = torch.ones_like(free)
        tried = symbolic.change_words(words, free, loss_fn, tokenizer, 1, rescore=arguments.whole)
        best = start.maximum(loss_fn.each(tokenizer.decode(tried)))
        sizes = torch.tensor([words[0].numel(), len(tokenizer.codebook)])
        changes = (torch.rand(arguments.whole, 2) * sizes).long()
        print(f"{len(images)} whole images; the best of {2 * arguments.whole:,} single changes:")
    else:
        best = start.clone()
        changes = torch.cartesian_prod(torch.arange(arguments.places), torch.arange(len(tokenizer.codebook)))
        print(f"{len(images)} images; the best of {len(changes):,} single changes:")
    for number, word in changes.tolist():
        place = torch.full((len(words), 1), number) if arguments.whole else places[:, number : number + 1]
        changed = words.flatten(1).scatter(1, place, word).view_as(words)
        best = best.maximum(loss_fn.each(tokenizer.decode(changed)))
    for per_place in arguments.words_per_place:
        symbolic.WORDS_PER_PLACE = per_place
        for rescore in arguments.rescore:
            begin = time.perf_counter()
            changed = symbolic.change_words(words, free, loss_fn, tokenizer, 1, rescore=rescore)
            milliseconds = 1e3 * (time.perf_counter() - begin) / len(images)
            share = (loss_fn.each(tokenizer.decode(changed)) - start) / (best - start)
            quartiles = share.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            print(
                f"{per_place} words a place, {rescore:3} exact losses: median {quartiles[1]:.2f} "
                f"(middle half {quartiles[0]:.2f} to {quartiles[2]:.2f}), {milliseconds:.0f} ms per image"
            )


if __name__ == "__main__":
    main()
