"""Images for training: where they lie, how they are cut, and the batches made of them, in an order that is a function
of the seed."""

from var_fast.training.data.augmentation import Augmentation
from var_fast.training.data.image_folder import ImageFolder
from var_fast.training.data.loader import Batch, TrainBatches, evaluation_batches
from var_fast.training.data.open import open_images
from var_fast.training.data.pixels import to_float
from var_fast.training.data.source import ImageSource
from var_fast.training.data.tar_shards import TarShards

__all__ = [
    "Augmentation",
    "Batch",
    "ImageFolder",
    "ImageSource",
    "TarShards",
    "TrainBatches",
    "evaluation_batches",
    "open_images",
    "to_float",
]
