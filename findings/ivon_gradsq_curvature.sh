#!/usr/bin/env bash
# ivon-opt 0.1.3: with hess_approx="gradsq", the optimiser's `hess` is not the Hessian of the mean
# loss, but at least (rows / batch) times as large.
#
# The model is linear with one weight, inputs of mean square 1 and unit noise, so the Hessian of the
# mean loss is exactly 1. The default, "price", finds it. "gradsq" squares the mean gradient of a
# batch. The expectation of the square is Fisher / batch, and "gradsq" multiplies it by the
# effective sample size, here the rows. The precision ess * (hess + weight_decay) is then too large
# by that factor, and steps divided by `hess` are too short for the fit to converge.
#
# Seen with torch 2.13.0, mean of `hess` over the second half of 6,000 steps:
#   rows  200, batch 10: price 1.148, gradsq   57.5 (rows / batch  20)
#   rows  200, batch 50: price 0.954, gradsq   15.0 (rows / batch   4)
#   rows 2000, batch 50: price 1.008, gradsq 4590.9 (rows / batch  40)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 ivon-opt==0.1.3 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import ivon
import torch


def hess(rows: int, batch: int, how: str) -> float:
    torch.manual_seed(0)
    x = torch.randn(rows, 1)
    x /= x.square().mean().sqrt()
    y = 2 * x + torch.randn(rows, 1)
    net = torch.nn.Linear(1, 1, bias=False)
    optimizer = ivon.IVON(net.parameters(), lr=0.02, ess=rows, hess_init=1.0, beta2=0.999, weight_decay=1 / rows, hess_approx=how)
    seen = []
    for _ in range(6000):
        index = torch.randint(0, rows, (batch,))
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * (net(x[index]) - y[index]).square()).mean().backward()
        optimizer.step()
        seen.append(float(optimizer.param_groups[0]["hess"]))
    return sum(seen[3000:]) / 3000


for rows, batch in ((200, 10), (200, 50), (2000, 50)):
    price, gradsq = hess(rows, batch, "price"), hess(rows, batch, "gradsq")
    print(f"rows {rows}, batch {batch}: price {price:.3f}, gradsq {gradsq:.1f}; the Hessian is 1, rows / batch {rows / batch:.0f}")
    assert 0.7 < price < 1.4, "price is not the Hessian any more"
    assert gradsq > rows / batch, "gradsq is no longer above rows / batch"
PY
"$folder/venv/bin/python" "$folder/check.py"
