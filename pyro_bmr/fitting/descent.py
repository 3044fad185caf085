"""One step of a fit down the gradient: the draw, what all processes found, faults, the optimiser.

Owns `take_step` and `read_terms`. Next: `progress.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_bmr.errors import FitError
from pyro_bmr.fitting.faults import diagnosis
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.fitting.run import Run
from pyro_bmr.fitting.step import Draw, TakesDraws
from pyro_bmr.fitting.unread_terms import Number, first_not_finite, number_of
from pyro_bmr.isolation import seed_generator


def take_step(run: Run, batch: Batch, share: float, number: int) -> None:
    """Evaluates both terms of the ELBO at one draw in each process, after which the optimiser has
    taken step `number` down their gradient, or the step is skipped. `read_terms` gives the terms.

    Args:
        batch: this process's rows, the fraction `share` of the batch.

    Raises:
        FitError: the step is faulty, and no more may be skipped. Where `run.looks_later`, it is
            taken all the same, and `read_terms` raises.
    """
    step, processes = run.step, run.processes
    seed_generator(run.rows.device, run.seed * 1_000_003 + number)
    # holds weights of lower precision as they were in the step before, if the fit runs under
    # torch.autocast
    torch.clear_autocast_cache()
    for parameter in step.trained:
        parameter.grad = None
    draw = run.draw(batch, share, number)
    found = (*draw.gradients, *(p.grad for p in step.trained if p.grad is not None))
    total = sum(_total(g) for g in found)
    if run.looks_later:
        _descend(run, draw)
        run.unread.add(number, (draw.expected_log_likelihood, draw.kl, total))
        return
    faulty, where = not math.isfinite(draw.expected_log_likelihood + draw.kl + total), ""
    if processes.size > 1:
        draw, ranks = _over_processes(run, draw, share, faulty)
        faulty = bool(ranks)
        where = f", in process {', '.join(map(str, ranks))} of {processes.size}"
    fault = (
        f"{diagnosis(step, run.program, draw)}{where}"
        if faulty
        else run.faults.jump(float(draw.expected_log_likelihood))
    )
    if fault:
        run.faults.skip(
            f"step {number}: {fault}; lower the learning rate, or check the scale of the data and"
            " of the priors"
        )
        return
    _descend(run, draw)
    run.unread.add(number, (draw.expected_log_likelihood, draw.kl))


def read_terms(run: Run, wait: bool = False) -> list[tuple[float, float]]:
    """Both terms of the ELBO in each step that was taken and not read before. Where
    `run.looks_later`, there are none until sixteen steps are, or until the host shall `wait` for
    the device.

    Raises:
        FitError: a step was faulty.
    """
    if run.looks_later and not wait and not run.unread.due:
        return []
    read = run.unread.read()
    number = first_not_finite(read)
    if number is not None:
        raise FitError(
            f"step {number}: the loss or its gradient is not finite; lower the learning rate, or"
            " check the scale of the data and of the priors. On a GPU the steps are looked at"
            " sixteen at a time, so the steps after it were taken; with skip_faulty=1 each is"
            " looked at, and the message names the sites"
        )
    return [(likelihood, kl) for _, (likelihood, kl, *_) in read]


def _descend(run: Run, draw: Draw) -> None:
    """Takes the step of a draw."""
    if isinstance(run.optimizer, TakesDraws):
        run.optimizer.take_next(draw)
    else:
        run.step.write_gradients(draw)
        run.optimizer.step()


def _over_processes(run: Run, draw: Draw, share: float, faulty: bool) -> tuple[Draw, list[int]]:
    """The mean over the batch of what all processes found, each in its rows with its own noise, and
    which processes have a fault. `run.interrupted` tells of all of them afterwards.
    """
    trained, vectors = run.step.trained, run.step.to_average(draw)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    numbers = torch.zeros(3 + run.processes.size, dtype=torch.float32, device=run.rows.device)
    terms = float(draw.expected_log_likelihood), float(draw.kl), float(run.interrupted)
    numbers[:3] = torch.tensor(terms)
    numbers[3 + run.processes.rank] = float(faulty)
    *summed, numbers = run.processes.sum([*vectors, *grads, numbers], share)
    for parameter, grad in zip(trained, summed[len(vectors) :], strict=True):
        parameter.grad = grad
    likelihood, kl, interrupted, *faults = numbers.tolist()
    run.interrupted = interrupted > 0
    draw = run.step.averaged(draw, likelihood, kl, summed[: len(vectors)])
    return draw, [rank for rank, fault in enumerate(faults) if fault]


def _total(gradient: Tensor) -> Number:
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return number_of(real.sum())
