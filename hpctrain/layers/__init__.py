"""Layers, one file per kind: what each computes, needs and costs, and the op that computes it on a rank."""

from hpctrain.layers.activation import ReLU
from hpctrain.layers.base import Layer, Op, Place, Weight
from hpctrain.layers.conv import Conv
from hpctrain.layers.dense import Dense, Flatten
from hpctrain.layers.loss import MSE, Loss, SoftmaxCrossEntropy
from hpctrain.layers.merge import Add
from hpctrain.layers.norm import BatchNorm
from hpctrain.layers.pool import AvgPool, GlobalAvgPool, MaxPool
from hpctrain.layers.source import Input

__all__ = [
    "MSE",
    "Add",
    "AvgPool",
    "BatchNorm",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalAvgPool",
    "Input",
    "Layer",
    "Loss",
    "MaxPool",
    "Op",
    "Place",
    "ReLU",
    "SoftmaxCrossEntropy",
    "Weight",
]
