"""The two routes to a horseshoe's global scale τ, by quadrature and by SVI on ΔF: `python
benchmarks/horseshoe_routes.py` prints one markdown table.

A layer of 20 inputs, about a sixth of its weights needed, in float32. Exact: `site_reduction`, the
search for τ and the moments of every weight. SVI: the program of `reduction_program`, which draws τ
and every λ and has ΔF as its factor, fitted with `ScaleFlow` by Adam, one draw a step. Its τ is the
median of the guide. Counted for SVI are the steps up to the one from which τ stays within 5 % of
the exact value: a user, who does not know that value, needs more. All seconds are those of the
processor, so that other work on the machine counts nowhere.
"""

from __future__ import annotations

import argparse
import time

import torch
from pyro.infer import Trace_ELBO

import pyro_bmr as bmr
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.programs import ScaleFlow, reduction_program
from pyro_bmr.reduction.reduced_site import site_reduction

PRIOR = bmr.Horseshoe(slab_scale=None)


def layer(n: int, seed: int) -> bmr.Posterior:
    generator = torch.Generator().manual_seed(seed)
    needed = torch.rand(n, generator=generator) < 0.15
    mean = torch.where(needed, 1.0, 0.05) * torch.randn(n, generator=generator)
    var = 0.005 + 0.01 * torch.rand(n, generator=generator)
    return bmr.Posterior(
        {
            "w": Site(
                mean.view(-1, 20),
                var.view(-1, 20),
                bmr.formulas.Diagonal(torch.tensor(0.0), torch.tensor(1.5)),
            )
        }
    )


def exact(posterior: bmr.Posterior, repeats: int) -> tuple[float, float]:
    """τ, and the seconds of the fastest call."""
    seconds, scale = [], 0.0
    for _ in range(repeats):
        start = time.process_time()
        scale = site_reduction(posterior, "w", PRIOR).scale or 0.0
        seconds.append(time.process_time() - start)
    return scale, min(seconds)


def by_svi(
    posterior: bmr.Posterior, steps: int, of: int, learning_rate: float, seed: int
) -> tuple[dict[int, float], float]:
    """τ after every tenth step of the first `steps` of a fit of `of`, and the seconds of one
    step.
    """
    torch.manual_seed(seed)
    program = reduction_program(posterior, "w", PRIOR)
    guide = ScaleFlow(program)
    optimizer = torch.optim.Adam(guide.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / of))
    loss = Trace_ELBO()
    taus, seconds = {}, 0.0
    for step in range(1, steps + 1):
        start = time.process_time()
        optimizer.zero_grad()
        loss.differentiable_loss(program, guide).backward()
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if step % 10 == 0:
            taus[step] = float(guide.median()["w_tau"])
    return taus, seconds / steps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument(
        "--fitted-up-to",
        type=int,
        default=100_000,
        help="above, the steps that the size before needed are counted at the cost of ten",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1500,
        help="of SVI, over which the learning rate falls to a fiftieth",
    )
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    print(
        "| weights | τ, exact | τ, SVI at its end | exact, seconds | SVI, steps to 5 % | seconds |"
        " ratio |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    needed = args.steps
    for n in args.weights:
        posterior = layer(n, args.seed)
        scale, seconds = exact(posterior, args.repeats)
        fitted = n <= args.fitted_up_to
        taus, each = by_svi(
            posterior, args.steps if fitted else 10, args.steps, args.learning_rate, args.seed
        )
        if fitted:
            away = [step for step, tau in taus.items() if abs(tau / scale - 1) > 0.05]
            needed = max(away, default=0) + 10
        reached = f"{needed}" if needed <= args.steps else f"more than {args.steps}"
        end = f"{taus[max(taus)]:.5f}" if fitted else "not fitted"
        print(
            f"| {n:,} | {scale:.5f} | {end} | {seconds:.2f} | {reached} | {needed * each:.1f} |"
            f" {needed * each / seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
