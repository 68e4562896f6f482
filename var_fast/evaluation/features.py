"""Features of pictures by a network that the user gives, and what they are counted from: .npz files and folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.evaluation.fid import FeatureStatistics
from var_fast.evaluation.npz import members, open_pictures
from var_fast.evaluation.pictures import PictureFolder
from var_fast.training.order import share_of
from var_fast.training.ranks import Ranks

FeatureNetwork = Callable[[torch.Tensor], torch.Tensor]
"""uint8 pictures (B, 3, H, W) -> features (B, D)."""


def load_feature_network(file: str | Path, device: torch.device | str) -> FeatureNetwork:
    """The network in a TorchScript file, on `device`: it gets uint8 pictures (B, 3, H, W) and gives (B, D), resizing
    them as it needs. One whose forward has an argument `return_features` (the published Inception in this form has) is
    called with True.

    A TorchScript file is a program: load only files that you trust. Raises UserError if it is none.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"features: there is no file {file}")
    try:
        network = torch.jit.load(file, map_location=device).eval()
        names = [argument.name for argument in network.forward.schema.arguments]
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise UserError(f"features: {file} is no TorchScript file: {first_line(error)}") from None
    options = {"return_features": True} if "return_features" in names else {}

    def features(pictures_B3HW: torch.Tensor) -> torch.Tensor:
        try:
            return network(pictures_B3HW.to(device), **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            # TorchScript's own words are the last line of a long trace
            words = str(error).strip().splitlines()[-1]
            shape = tuple(pictures_B3HW.shape)
            raise UserError(f"features: {file} failed on uint8 pictures {shape}: {words}") from None

    return features


@torch.no_grad()
def picture_statistics(
    source: str | Path,
    network: FeatureNetwork,
    *,
    batch: int = 64,
    ranks: Ranks | None = None,
    advance: Callable[[int], None] | None = None,
) -> FeatureStatistics:
    """Statistics of the features of all pictures in `source`: an .npz file (arr_0: uint8 (N, H, W, 3)) or a folder of
    pictures of one size. An .npz file with mu and sigma has them ready, and they are taken as they are. `advance` is
    told how many pictures of this rank are done.

    The ranks share the pictures. Raises UserError if something cannot be read, or the network gives no (B, D).
    """
    ranks, source = ranks or Ranks(), Path(source)
    if has_statistics(source):
        return ready_statistics(source)
    statistics: FeatureStatistics | None = None
    exact = torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )  # as other tools compute the numbers compared with
    with ranks.together(), exact, closing(_shared_pictures(source, batch, ranks)) as pictures:
        for array_BHW3 in pictures:
            features_BD = _checked(network(torch.tensor(array_BHW3).permute(0, 3, 1, 2).contiguous()), len(array_BHW3))
            if statistics is None:
                statistics = FeatureStatistics(features_BD.shape[1], ranks.device)
            statistics.update(features_BD)
            if advance:
                advance(len(array_BHW3))
    widths = {width for width in ranks.gather(None if statistics is None else len(statistics.mean_D)) if width}
    with ranks.together():
        if len(widths) != 1:
            raise UserError(f"features of {source} have widths {sorted(widths)}, expected one")
    statistics = statistics or FeatureStatistics(widths.pop(), ranks.device)
    statistics.merge(ranks)
    return statistics


def has_statistics(source: Path) -> bool:
    """Whether `source` is an .npz file with mu and sigma. Raises UserError for another kind of file."""
    return source.is_file() and {"mu", "sigma"} <= members(source)


def count_pictures(source: Path) -> int:
    """How many pictures `picture_statistics` has to look at. Raises UserError."""
    if has_statistics(source):
        return 0
    if not source.is_file():
        return len(PictureFolder(source))
    with open_pictures(source, 1) as pictures:
        return pictures.shape[0]


def ready_statistics(file: Path) -> FeatureStatistics:
    """Statistics from mu (D,) and sigma (D, D) of an .npz file. Raises UserError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = [arrays[name] for name in ("mu", "sigma")]
            if any(array.dtype.kind not in "fiu" for array in found):
                raise ValueError(f"of type {found[0].dtype} and {found[1].dtype}, expected real numbers")
            mean_D, covariance_DD = (torch.from_numpy(array.astype(np.float64)) for array in found)
    except Exception as error:  # numpy raises whatever the damaged bytes lead to
        raise UserError(f"cannot read mu and sigma of {file}: {first_line(error)}") from None
    try:
        return FeatureStatistics.known(mean_D, covariance_DD)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _checked(features: torch.Tensor, count: int) -> torch.Tensor:
    if not isinstance(features, torch.Tensor) or features.ndim < 2 or len(features) != count:
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise UserError(f"the feature network gave {found} for {count} pictures, expected a tensor ({count}, D)")
    return features.flatten(1)  # (B, D, 1, 1) is common too


def _shared_pictures(source: Path, batch: int, ranks: Ranks) -> Iterator[np.ndarray]:
    """This rank's pictures as uint8 (b, H, W, 3)."""
    if source.is_file():
        with open_pictures(source, batch) as pictures:
            own = share_of(range(pictures.shape[0]), ranks.rank, ranks.count)
            yield from pictures.between(own.start, own.stop)
        return
    folder = PictureFolder(source)
    own = share_of(range(len(folder)), ranks.rank, ranks.count)
    size = _read(folder, 0).shape
    for start in range(0, len(own), batch):
        arrays = [_read(folder, i) for i in own[start : start + batch]]
        for i, array in zip(own[start:], arrays):
            if array.shape != size:
                found, expected = (f"{s[1]} x {s[0]} pixels" for s in (array.shape, size))
                raise UserError(f"{folder.name(i)} is {found}, expected {expected} as {folder.name(0)}")
        yield np.stack(arrays)


def _read(folder: PictureFolder, i: int) -> np.ndarray:
    try:
        return np.asarray(folder.read(i))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder.name(i)}: {first_line(error)}") from None
