"""Fair yardsticks for what is more than one op."""

import torch


def nudged(x):
    """Each number of `x` moved, at random, to a neighbouring one, or left.

    The numbers that come out of a module, and more so of a model, share a few roundings, so that a
    single run may by luck be far better than its dtype is. The worst of several, on inputs that are
    a rounding apart, is not.
    """
    way = torch.randint(-1, 2, x.shape)
    moved = torch.nextafter(x, torch.where(way > 0, torch.inf, -torch.inf).to(x))
    return torch.where(way == 0, x, moved)


def worst(truth, runs):
    """Of several runs, each element that is farthest from the truth."""
    stack = torch.stack([run.detach() for run in runs])
    farthest = (stack - truth).abs().argmax(0, keepdim=True)
    return stack.gather(0, farthest)[0]
