"""Muon: matrices that move in all directions alike (Jordan et al., 2024), beside AdamW for all others."""

import torch

# Each step's polynomial is the odd one of degree 5 that brings what the steps before it have left nearest to
# 1 (Amsel et al., 2025). Of singular values from 0.01 to 1 these three leave 0.73 to 1.27.
COEFFICIENTS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


class Muon(torch.optim.AdamW):
    """AdamW on groups of parameters; but some of them, matrices, move by their orthogonalized momentum.

    A gradient's largest singular values hide the others, which have something to teach, too: all become
    about 1. The move then has the size of AdamW's (Liu et al., 2025), so that both take one learning rate.
    """

    def __init__(self, groups, matrices, momentum=0.95, **settings):
        moved = {id(p) for p in matrices}
        split = []  # each group as two: what AdamW trains, and what Muon trains
        for group in groups:
            by_adamw = [p for p in group["params"] if id(p) not in moved]
            by_muon = [p for p in group["params"] if id(p) in moved]
            split.append({**group, "params": by_adamw, "muon": False})
            split.append({**group, "params": by_muon, "muon": True})
        super().__init__(split, **settings)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())  # AdamW wants to find it when it is loaded.
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - self.momentum)
                # The gradient counts once more on top of the average, as Nesterov has it.
                direction = orthogonalized(p.grad.lerp(average, self.momentum))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
                p.grad = None  # AdamW leaves what has none.
        return super().step(closure)


def orthogonalized(matrix):
    """A matrix (out, in) with its singular vectors, and singular values near 1, by Newton-Schulz steps.

    Each step is a polynomial of the matrix, so that products suffice.
    """
    x = matrix / (matrix.norm() + 1e-7)  # No singular value is above the norm.
    wide = x if x.size(0) <= x.size(1) else x.T  # The products are of the shorter side.
    for a, b, c in COEFFICIENTS:
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide if x.size(0) <= x.size(1) else wide.T
