"""Training and evaluation mode of modules, with those parts of a network left alone that were put
in evaluation mode to stay there.

Owns `note_modes` and `set_training`. Next: `plain_module.py`.
"""

from __future__ import annotations

from torch import nn

_NOTE = "_in_evaluation"  # on the whole module, so that copies have it too


def note_modes(net: nn.Module) -> None:
    """Notes which modules are in evaluation mode, as a frozen backbone, beside layers that are in
    training mode.

    If all layers are in evaluation mode that says nothing: a network that was loaded, or fitted,
    is. An earlier note then stays, or all are trained.
    """
    layers = [module.training for module in net.modules() if next(module.children(), None) is None]
    resting = tuple(name for name, module in net.named_modules() if name and not module.training)
    if any(layers) and (resting or hasattr(net, _NOTE)):
        setattr(net, _NOTE, resting)


def set_training(net: object, on: bool) -> None:
    """Puts a module in training or evaluation mode, but for the modules that are noted
    (`note_modes`): those stay in evaluation mode.
    """
    if isinstance(net, nn.Module):
        net.train(on)
        for name in getattr(net, _NOTE, ()):
            net.get_submodule(name).training = False
