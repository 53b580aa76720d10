"""Data sets as whole tensors: images and recordings."""

from g2gnet.data.augmentation import random_crop_and_flip, random_erase, random_unit_shift
from g2gnet.data.catalog import DATASETS, dataset_name, load_dataset
from g2gnet.data.image_data import DataError, ImageData, MissingDataError
from g2gnet.encoding import as_samples

__all__ = [
    "DATASETS", "DataError", "ImageData", "MissingDataError", "as_samples", "dataset_name", "load_dataset",
    "random_crop_and_flip", "random_erase", "random_unit_shift",
]  # fmt: skip
