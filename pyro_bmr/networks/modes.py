"""Training and evaluation mode of a network, some parts of which are always in evaluation mode (a
frozen backbone).

Owns `note_modes` and `set_training`. Next: `plain_module.py`.
"""

from __future__ import annotations

from torch import nn

_NOTE = "_in_evaluation"  # an attribute of the whole module, so that copies have it too


def note_modes(net: nn.Module) -> None:
    """Notes which modules are in evaluation mode while other layers are in training mode.

    If all layers are in evaluation mode, nothing is noted: that is also so for a network that was
    loaded or fitted. An earlier note is then kept; without one, all modules are trained.
    """
    layers = [module.training for module in net.modules() if next(module.children(), None) is None]
    resting = tuple(name for name, module in net.named_modules() if name and not module.training)
    if any(layers) and (resting or hasattr(net, _NOTE)):
        setattr(net, _NOTE, resting)


def set_training(net: object, on: bool) -> None:
    """Puts a module in training or evaluation mode. The modules inside it that `note_modes` has
    noted are always in evaluation mode.
    """
    if isinstance(net, nn.Module):
        net.train(on)
        for name in getattr(net, _NOTE, ()):
            net.get_submodule(name).training = False
