"""Our networks at their published sizes fit the definitions in PyTorch: the same parameters, of the same shapes.

The numbers are compared in tests/mpi/test_models_torch.py, as running a network takes MPI.
"""

from __future__ import annotations

import pytest

from hpctrain import models
from hpctrain.models import Sample

torch = pytest.importorskip("torch", reason="PyTorch is what the networks are compared with: pip install '.[oracle]'")
import torch_networks  # noqa: E402

PUBLISHED = {
    "resnet18": ("resnet18", (224, 224, 3), {}),
    "resnet50": ("resnet50", (224, 224, 3), {}),
    "inception3": ("inception3", (299, 299, 3), {}),
    "alexnet": ("alexnet", (224, 224, 3), {}),
    "alexnet_two_groups": ("alexnet", (227, 227, 3), {"two_groups": True}),
    "vgg11": ("vgg11", (224, 224, 3), {}),
    "unet3d": ("unet3d", (132, 132, 116, 3), {}),
    "unet3d_valid": ("unet3d", (132, 132, 116, 3), {"padding": "valid"}),
    "cosmoflow_mlperf": ("cosmoflow", (128, 128, 128, 4), {"variant": "mlperf"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_has_the_parameters_of_pytorch(name: str) -> None:
    ours, shape, options = PUBLISHED[name]
    labels = {"unet3d": (132, 132, 116), "unet3d_valid": (44, 44, 28)}.get(name, ())
    net = models.build(ours, 3, Sample(shape, classes=7, positions=labels), options)

    def nothing(shape: tuple[int, ...]) -> torch.Tensor:
        """Only a shape, no numbers: PyTorch checks that weights and tensors fit, and computes nothing."""
        return torch.empty(shape, device="meta")

    trained = {f"{node.name}.{key}": nothing(weight.shape) for node, key, weight in net.weights()}
    state = {
        f"{node.name}.{key}": nothing(weight.shape)
        for node in net
        for key, weight in node.layer.state(*node.input_shapes).items()
    }
    weights = torch_networks.Weights(trained, state)
    logits = getattr(torch_networks, name)(weights, nothing(net["x"].shape))
    assert weights.used == trained.keys()
    assert tuple(logits.shape) == net.losses[0].input_shapes[0]
