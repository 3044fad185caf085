"""From a loader to a folder of files: augmented images, and batches of dicts as Hugging Face has
them, through fit, reduction, export, shrink and deploy; `curvature` and `prune` on the same
loaders.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import pyro_bmr as bmr
from tests.parameters import others_slow

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is a sum over"),  # of more parameters than rows
    pytest.mark.filterwarnings("ignore:deploy. Plain cannot be written as Python"),
]
GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(96, 1, 6, 6, generator=GENERATOR)
KINDS = (IMAGES[:, 0, :3].sum((1, 2)) > 0).long()
TEXTS = [
    torch.randint(1, 12, (3 + k % 4,), generator=GENERATOR) for k in range(96)
]  # of four lengths


class Moved(Dataset):
    """Images that are rolled by up to one pixel whenever they are read."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, number):
        across, down = torch.randint(-1, 2, (2,)).tolist()
        return IMAGES[number].roll((across, down), (1, 2)), KINDS[number]


class Named(dict):
    """What a Hugging Face model returns."""

    @property
    def logits(self):
        return self["logits"]


class Reader(nn.Module):
    """A classifier of texts; with labels it returns its loss as well."""

    def __init__(self):
        super().__init__()
        self.words, self.dense, self.head = nn.Embedding(12, 8), nn.Linear(8, 10), nn.Linear(10, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None].to(self.words.weight.dtype)
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(self.dense(mean).relu())
        if labels is None:
            return Named(logits=logits)
        return Named(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Plain(Reader):
    """The same, which returns the logits alone."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask).logits


def padded(batch):
    ids = pad_sequence([row["input_ids"] for row in batch], batch_first=True)
    labels = torch.stack([row["labels"] for row in batch])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


class Case(NamedTuple):
    net: nn.Module
    loader: DataLoader
    layer: str  # whose units are pruned
    rows: object  # inputs of the test
    labels: torch.Tensor
    call: object


def images():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 2)
    )
    loader = DataLoader(Moved(), batch_size=24, shuffle=True)
    return Case(net, loader, "0.weight", IMAGES, KINDS, lambda net: net(IMAGES))


def texts(model=Plain):
    torch.manual_seed(1)
    labels = torch.stack([(text.float().mean() > 6).long() for text in TEXTS])
    rows = [{"input_ids": text, "labels": label} for text, label in zip(TEXTS, labels, strict=True)]
    loader = DataLoader(rows, batch_size=24, shuffle=True, collate_fn=padded)
    inputs = {key: value for key, value in padded(rows).items() if key != "labels"}
    return Case(model(), loader, "dense.weight", inputs, labels, lambda net: net(**inputs))


@pytest.mark.parametrize("make", others_slow([images, texts], images))
def test_from_a_loader_to_a_folder(make, tmp_path):
    case = make()
    model = bmr.BayesianNetwork(case.net, bmr.Gaussian(), bmr.Categorical())
    target = {case.layer: bmr.Gaussian(scale=0), "*": None}
    schedule = bmr.Every(epochs=10, to=target, per="unit", kept=0.5)
    fit = bmr.fit(
        model, case.loader, epochs=40, optimizer=bmr.adam(0.02), reduce=schedule, progress=False
    )
    reduction = bmr.reduce(fit.posterior, to=target, per="unit", kept=0.5)
    prediction = bmr.predict(fit.program, reduction.posterior, case.rows)
    assert bmr.metrics.accuracy(prediction.probs, case.labels) > 0.7
    plain = bmr.export(fit.program, reduction.posterior)
    small = bmr.shrink(plain, reduction.masks, case.loader)  # its example is a batch of the loader
    before, after = (
        sum(parameter.numel() for parameter in net.parameters()) for net in (plain, small)
    )
    assert after < 0.8 * before
    torch.testing.assert_close(case.call(small), case.call(plain), rtol=1e-4, atol=1e-5)
    bmr.deploy(small, tmp_path, case.loader, formats=["safetensors", "program"], seconds=0.01)
    back = bmr.load_network(tmp_path)
    torch.testing.assert_close(case.call(back), case.call(small), rtol=1e-4, atol=1e-5)


def test_named_outputs_and_labels_inside_the_batches():
    """The program is the same as with the logits alone; the labels are its targets."""
    named, plain = texts(Reader), texts()
    done = [
        bmr.fit(
            bmr.BayesianNetwork(case.net, bmr.Gaussian(), bmr.Categorical()),
            case.loader,
            epochs=3,
            progress=False,
        )
        for case in (named, plain)
    ]
    for name, site in done[0].posterior.sites.items():
        assert torch.equal(site.mean, done[1].posterior[name].mean)
    exported = bmr.export(done[0].program, done[0].posterior)
    rows = {**named.rows, "labels": named.labels}
    assert exported(**rows).keys() == {"loss", "logits"}


@pytest.mark.slow
@pytest.mark.parametrize("make", [images, texts])
def test_a_trained_network_is_pruned_with_its_loader(make):
    case = make()
    optimiser = torch.optim.Adam(case.net.parameters(), 0.02)
    for _ in range(40):
        for batch in case.loader:
            labels = batch.pop("labels") if isinstance(batch, dict) else batch[1]
            outputs = case.net(**batch) if isinstance(batch, dict) else case.net(batch[0])
            optimiser.zero_grad()
            nn.functional.cross_entropy(outputs, labels).backward()
            optimiser.step()
    case.net.eval()
    found = bmr.curvature(case.net, case.loader, bmr.Categorical(), progress=False)
    mean = {name: p.detach() for name, p in case.net.named_parameters()}
    posterior = bmr.Posterior.from_curvature(mean, found, bmr.Gaussian(1.0), rows=96)
    reduction = bmr.reduce(posterior, to=bmr.Gaussian(scale=0), kept=0.5)
    assert abs(reduction.kept - 0.5) < 0.02
    pruned = bmr.prune(case.net, case.loader, bmr.Categorical(), 0.5, progress=False)
    accuracy = [
        bmr.metrics.accuracy(case.call(net).softmax(1), case.labels)
        for net in (case.net, pruned.net)
    ]
    assert accuracy[0] > 0.8 and accuracy[1] > accuracy[0] - 0.1
    assert abs(pruned.kept - 0.5) < 0.02
