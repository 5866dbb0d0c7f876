"""Layers, one file per kind: what each computes, needs and costs, and the op that computes it on a rank."""

from hpctrain.layers.activation import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Softmax, Softplus, Tanh
from hpctrain.layers.base import Layer, Op, Phase, Place, Weight
from hpctrain.layers.conv import Conv
from hpctrain.layers.dense import Dense
from hpctrain.layers.dropout import Dropout
from hpctrain.layers.groupnorm import GroupNorm, InstanceNorm
from hpctrain.layers.loss import MAE, MSE, BCEWithLogits, Huber, Loss, SoftmaxCrossEntropy
from hpctrain.layers.merge import Add, Concat, Multiply
from hpctrain.layers.norm import BatchNorm, LayerNorm
from hpctrain.layers.pool import AvgPool, GlobalAvgPool, MaxPool
from hpctrain.layers.resample import AdaptiveAvgPool, Upsample
from hpctrain.layers.segmentation import Dice
from hpctrain.layers.shape import Flatten, Reshape, Slice
from hpctrain.layers.source import Input
from hpctrain.layers.transposed import ConvTranspose

__all__ = [
    "GELU",
    "MAE",
    "MSE",
    "AdaptiveAvgPool",
    "Add",
    "AvgPool",
    "BCEWithLogits",
    "BatchNorm",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Dice",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "GroupNorm",
    "Huber",
    "Input",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Loss",
    "MaxPool",
    "Multiply",
    "Op",
    "Phase",
    "Place",
    "ReLU",
    "Reshape",
    "SiLU",
    "Sigmoid",
    "Slice",
    "Softmax",
    "SoftmaxCrossEntropy",
    "Softplus",
    "Tanh",
    "Upsample",
    "Weight",
]
