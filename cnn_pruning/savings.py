"""What the removal of one filter saves, by layer: costs to weigh a criterion with."""

import torch
from torch import Tensor, nn

from cnn_pruning.chain import links
from cnn_pruning.measure import count_macs, count_parameters
from cnn_pruning.pruner import remove_filters
from cnn_pruning.training import training_flags

Shape = tuple[int, int, int]


def map_flops(model: nn.Module, image_shape: Shape = (1, 28, 28)) -> dict[str, float]:
    """Return the MFLOPs of one feature map of each layer: 2 H W (C K K + 1) / 10^6.

    H and W are those of the layer's input, C its input channels, K x K its kernel; a multiply-add
    is two. What the next layer saves is *not* counted.

    Source: Molchanov et al. 2017, FLOPs regularization, with its formula for a convolution.
    """
    chain = links(model)
    sizes: dict[nn.Module, int] = {}

    def measure(conv: nn.Module, inputs: tuple[Tensor]) -> None:
        sizes[conv] = inputs[0].shape[2] * inputs[0].shape[3]

    handles = [link.conv.register_forward_pre_hook(measure) for link in chain.values()]
    parameter = next(model.parameters())
    image = torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with training_flags(model), torch.no_grad():
            model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: 2 * sizes[link.conv] * (link.conv.weight[0].numel() + 1) / 1e6
        for layer, link in chain.items()
    }


def saved_macs(model: nn.Module, image_shape: Shape = (1, 28, 28)) -> dict[str, float]:
    """Return the millions of multiply-adds that go with one filter, the next layer's included."""
    whole = count_macs(model, image_shape)
    return {
        layer: (whole - count_macs(small, image_shape)) / 1e6
        for layer, small in _without_one(model).items()
    }


def saved_parameters(model: nn.Module) -> dict[str, float]:
    """Return the millions of parameters that go with one filter, the next layer's included."""
    whole = count_parameters(model)
    return {
        layer: (whole - count_parameters(small)) / 1e6
        for layer, small in _without_one(model).items()
    }


def _without_one(model: nn.Module) -> dict[str, nn.Module]:
    return {
        layer: remove_filters(model, {layer: [0]})
        for layer, link in links(model).items()
        if link.conv.out_channels > 1
    }
