"""Batches for training: one contract, several sources.

    order     which images a step takes, and in which random views: pure functions of seed and step
    views     the views, drawn as numbers and applied by torch
    contract  what every source takes (steps) and gives (batches in the form that the networks take)
    dali, resident, workers   the sources; choice picks one and says why

All sources give the same images, labels and ids in the same order and the same views; pixels are equal before the view.
"""

from dfkd.data.loader.choice import SOURCES, LoaderChoice, choose, open_source
from dfkd.data.loader.contract import Batch, Form, Images, Source
from dfkd.data.loader.order import Order, Step, steps
from dfkd.data.loader.pixels import read_all
from dfkd.data.loader.views import KINDS, Views, draw

__all__ = [
    "KINDS",
    "SOURCES",
    "Batch",
    "Form",
    "Images",
    "LoaderChoice",
    "Order",
    "Source",
    "Step",
    "Views",
    "choose",
    "draw",
    "open_source",
    "read_all",
    "steps",
]
